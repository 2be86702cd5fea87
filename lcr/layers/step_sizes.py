"""The step sizes and decay rates of state-space models and gated delta nets (arXiv 2312.00752, section 3.6)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from lcr.checks import check_positive
from lcr.typing import Array, Float

LARGEST_LOG_RATE = 20.0


def initial_dt_bias(count: int, dt_min: float, dt_max: float, *, floor: float = 0.0, rngs: nnx.Rngs) -> nnx.Param:
    """The bias `[count]`, float32, for which softplus(bias) is log-uniform in [dt_min, dt_max], not below `floor`."""
    log_dt = jax.random.uniform(rngs.params(), (count,), jnp.float32, math.log(dt_min), math.log(dt_max))
    dt = jnp.maximum(jnp.exp(log_dt), floor)
    return nnx.Param(dt + jnp.log(-jnp.expm1(-dt)), group="no_decay")  # softplus^-1(dt)


def check_step_sizes(dt_min: object, dt_max: object, dt_floor: object = None) -> None:
    """Raises: ValueError for bounds of `initial_dt_bias` that are no numbers above 0, or in another order."""
    check_positive(dt_min=dt_min, dt_max=dt_max)
    if dt_min > dt_max:
        raise ValueError(f"dt_min={dt_min}: expected at most dt_max={dt_max}")
    if dt_floor is not None:
        check_positive(dt_floor=dt_floor)
        if dt_floor > dt_min:
            raise ValueError(f"dt_floor={dt_floor}: expected at most dt_min={dt_min}, which it would override")


def decay_rates(A_log: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """exp(A_log), and exp(20) above that: nothing outlives a step there, and an infinite rate times a step of 0
    (padding) would be no number."""
    return jnp.exp(jnp.minimum(A_log, LARGEST_LOG_RATE))
