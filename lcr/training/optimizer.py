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

from lcr.checks import check_choice
from lcr.typing import Array, Float, Int

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]

NO_DECAY_NAMES = ("bias", "scale")
GROUPS = ("decay", "no_decay", "memory_gate", "selection_bias")


def make_schedule(optimizer: ConfigDict, steps: int, peak: float | None = None) -> Schedule:
    """The learning rate as a function of the step (int32, the first is 0), float32. See the module's formula.

    peak: `optimizer.learning_rate` if None.
    """
    peak = optimizer.learning_rate if peak is None else peak
    warmup, final = optimizer.warmup_steps, optimizer.final_fraction

    def learning_rate(step: Int[Array, ""]) -> Float[Array, ""]:
        s = step.astype(jnp.float32)
        rising = (s + 1) / max(warmup, 1)
        progress = jnp.clip((s - warmup) / max(steps - warmup, 1), 0, 1)
        falling = final + (1 - final) * (1 + jnp.cos(math.pi * progress)) / 2
        return peak * jnp.where(s < warmup, rising, falling)

    return learning_rate


def parameter_groups(parameters: Mapping[str, nnx.Variable]) -> dict[str, str]:
    """The group of each parameter: what its metadata `group` says, else "no_decay" where it is named "bias" or
    "scale", else "decay".

        decay            AdamW
        no_decay         AdamW without decay: norms, gates, decays
        memory_gate      AdamW without decay at a learning rate of its own, outside the clipping: gates of a memory,
                         which at the model's learning rate do not leave their first value
        selection_bias   plain steps of the whole gradient: the router's bias, whose "gradient" is its step

    parameters: by their dotted names, as `lcr.training.step.named_parameters` gives them.
    Raises ValueError for a group that is none of these.
    """
    groups = {}
    for name, variable in parameters.items():
        plain = "no_decay" if name.split(".")[-1] in NO_DECAY_NAMES else "decay"
        groups[name] = variable.get_metadata().get("group") or plain
        check_choice(f"group of parameter {name}", groups[name], GROUPS)
    return groups


def make_optimizer(optimizer: ConfigDict, steps: int, groups: Mapping[str, str]) -> optax.GradientTransformation:
    """Clipping (where `clip_norm` is not 0) and AdamW, for each parameter as its group wants it.

    optimizer: that section of the configuration. steps: of the whole run, for the schedule.
    groups: from `parameter_groups`.
    """
    decayed = {name: group == "decay" for name, group in groups.items()}

    def adamw(learning_rate, weight_decay):
        return optax.adamw(
            make_schedule(optimizer, steps, learning_rate),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=weight_decay,
            mask=lambda parameters: {name: decayed[name] for name in parameters},
        )

    main = adamw(optimizer.learning_rate, optimizer.weight_decay)
    if optimizer.clip_norm:
        main = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), main)
    chain = main
    if set(groups.values()) - {"decay", "no_decay"}:
        of_group = {
            "decay": main,
            "no_decay": main,
            "memory_gate": adamw(optimizer.gate_learning_rate, 0.0),
            "selection_bias": optax.sgd(1.0),
        }
        labels = {name: "decay" if group == "no_decay" else group for name, group in groups.items()}
        chain = optax.partition({label: of_group[label] for label in set(labels.values())}, labels)

    def update(grads, state, parameters):
        # Optax raises a float to an integer's power, which a caller with strict dtype promotion would forbid
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(grads, state, parameters)

    return optax.GradientTransformation(chain.init, update)
