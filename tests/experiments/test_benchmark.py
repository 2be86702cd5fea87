import types

import jax
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
    # once to compile and once to see how long it takes; then once before each timed call
    assert calls == 4 * ["a", "a", "b", "b"]
    assert all(milliseconds >= 0 and peak >= 0 for milliseconds, peak in found.values())


def test_a_long_form_is_timed_once_and_one_out_of_memory_is_left_out(monkeypatch, capfd):
    calls = []
    monkeypatch.setattr(benchmark, "timed", lambda call: (calls.append(call.__name__), (6.0, 7))[1])

    def short():
        pass

    def greedy():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 27481081128 bytes.")

    assert benchmark.in_turns({"short": short, "greedy": greedy}) == {"short": (6000.0, 7e-6)}
    assert calls == ["short"] and "greedy: out of memory" in capfd.readouterr().err
    with pytest.raises(jax.errors.JaxRuntimeError):  # our own form must not be
        benchmark.in_turns({"greedy": greedy})


def test_a_new_row_takes_the_place_of_the_old_one():
    old = [{"op": "a", "shape": "1", "pass": "forward", "ms": 1}, {"op": "b", "shape": "1", "pass": "forward", "ms": 2}]
    new = old[0] | {"ms": 3}
    assert benchmark.put(old, new) == [new, old[1]]
    assert benchmark.put(old, new | {"shape": "2"}) == [*old, new | {"shape": "2"}]
    assert benchmark.put([{"tokens": 1}], {"tokens": 2}) == [{"tokens": 1}, {"tokens": 2}]


def test_an_unknown_op_is_told(monkeypatch):
    monkeypatch.setattr(benchmark, "OPS", types.SimpleNamespace(value=["RWKV-8"]))
    with pytest.raises(SystemExit, match="--ops=RWKV-8: expected some of selective_scan, retention"):
        next(benchmark.scans())


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
