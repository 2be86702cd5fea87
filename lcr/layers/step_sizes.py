"""How the step sizes of state-space models and gated delta nets start (arXiv 2312.00752, section 3.6)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx


def initial_dt_bias(count: int, dt_min: float, dt_max: float, *, floor: float = 0.0, rngs: nnx.Rngs) -> nnx.Param:
    """The bias `[count]`, float32, for which softplus(bias) is log-uniform in [dt_min, dt_max], not below `floor`."""
    log_dt = jax.random.uniform(rngs.params(), (count,), jnp.float32, math.log(dt_min), math.log(dt_max))
    dt = jnp.maximum(jnp.exp(log_dt), floor)
    return nnx.Param(dt + jnp.log(-jnp.expm1(-dt)), group="no_decay")  # softplus^-1(dt)
