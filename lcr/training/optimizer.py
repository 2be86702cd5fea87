"""AdamW as every run uses it: warm-up, cosine, clipping, and no decay on norms, gates and decays.

    learning rate of step s (the first is 0), W = warmup_steps, S = steps, f = final_fraction:
        s < W:   peak (s + 1) / W
        s >= W:  peak (f + (1 - f) (1 + cos(pi (s - W) / (S - W))) / 2), and f peak from step S on

AdamW: arXiv 1711.05101, algorithm 2, with the decay times the learning rate. Clipping: arXiv 1211.5063, of the norm
of the whole gradient.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from lcr.typing import Array, Float, Int

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]

NO_DECAY_NAMES = ("bias", "scale")


def make_schedule(optimizer: ConfigDict, steps: int) -> Schedule:
    """The learning rate as a function of the step (int32, the first is 0), float32. See the module's formula."""
    peak, warmup, final = optimizer.learning_rate, optimizer.warmup_steps, optimizer.final_fraction

    def learning_rate(step: Int[Array, ""]) -> Float[Array, ""]:
        s = step.astype(jnp.float32)
        rising = (s + 1) / max(warmup, 1)
        progress = jnp.clip((s - warmup) / max(steps - warmup, 1), 0, 1)
        falling = final + (1 - final) * (1 + jnp.cos(math.pi * progress)) / 2
        return peak * jnp.where(s < warmup, rising, falling)

    return learning_rate


def decay_mask(parameters: Mapping[str, nnx.Variable]) -> dict[str, bool]:
    """Which parameters decay: all but those with the metadata `group="no_decay"` and those named "bias" or "scale".

    parameters: by their dotted names, as `lcr.training.step.named_parameters` gives them.
    """
    return {
        name: variable.get_metadata().get("group") != "no_decay" and name.split(".")[-1] not in NO_DECAY_NAMES
        for name, variable in parameters.items()
    }


def make_optimizer(optimizer: ConfigDict, steps: int, decayed: Mapping[str, bool]) -> optax.GradientTransformation:
    """Clipping (where `clip_norm` is not 0) and AdamW, decaying the parameters that `decayed` says.

    optimizer: that section of the configuration. steps: of the whole run, for the schedule.
    """
    transformations = [
        optax.adamw(
            make_schedule(optimizer, steps),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            mask=dict(decayed),
        )
    ]
    if optimizer.clip_norm:
        transformations.insert(0, optax.clip_by_global_norm(optimizer.clip_norm))
    chain = optax.chain(*transformations)

    def update(grads, state, parameters):
        # Optax raises a float to an integer's power, which a caller with strict dtype promotion would forbid
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(grads, state, parameters)

    return optax.GradientTransformation(chain.init, update)
