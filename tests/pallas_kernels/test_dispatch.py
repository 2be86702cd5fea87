import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from pallas_kernels import selective_scan, wkv
from pallas_kernels.dispatch import compute_dtype

X, D = jnp.ones((1, 3, 2)), jnp.ones(2)


def test_whole_numbers_are_refused_where_the_result_would_be_cut_to_them():
    with pytest.raises(ValueError, match="x: dtype int32; expected a float dtype"):
        inspect.unwrap(selective_scan)(X.astype(jnp.int32), X, -jnp.ones((2, 4)), jnp.ones((1, 3, 4)), jnp.ones((1, 3, 4)))
    with pytest.raises(ValueError, match="v: dtype int32; expected a float dtype"):
        inspect.unwrap(wkv)(X, X.astype(jnp.int32), -D, D)


def test_computes_in_float32_or_what_is_wider():
    half, double = np.ones(2, jnp.bfloat16), np.ones(2)
    assert compute_dtype({"a": half, "b": None}) == np.float32
    assert compute_dtype({"a": half, "b": (double, half)}) == np.float64
