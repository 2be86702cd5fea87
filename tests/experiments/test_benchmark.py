import types

import jax.numpy as jnp
import numpy as np
import pytest
from experiments import benchmark


@pytest.fixture(autouse=True)
def three_repeats(monkeypatch):
    monkeypatch.setattr(benchmark, "REPEATS", types.SimpleNamespace(value=3))


def test_forms_are_called_in_turns():
    calls = []
    found = benchmark.in_turns({name: lambda name=name: calls.append(name) for name in ("a", "b")})
    # once to compile, once to see how long it takes; then, being short, twice each time
    assert calls == ["a", "a", "b", "b"] + 3 * ["a", "a", "b", "b"]
    assert all(milliseconds >= 0 and peak >= 0 for milliseconds, peak in found.values())


def test_backward_gives_the_gradient_of_all_arguments():
    x, y = jnp.arange(3.0), jnp.ones(3)
    forms = benchmark.forms_of({"product": lambda x, y: (x * y, None)}, (x, y), backward=True)
    value, (of_x, of_y) = forms["product"]()
    assert value == 5
    np.testing.assert_array_equal(of_x, 2 * x)
    np.testing.assert_array_equal(of_y, 2 * x * x)


def test_a_value_that_a_row_lacks_is_shown_as_not_run():
    assert benchmark.table([{"op": "a", "ms": 1234.5}, {"op": "b", "rival ms": 2}]).splitlines() == [
        "| op | ms | rival ms |", "| --- | --- | --- |", "| a | 1,234.5 | – |", "| b | – | 2 |"
    ]  # fmt: skip
