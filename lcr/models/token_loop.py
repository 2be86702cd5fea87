"""The loop that writes tokens one at a time, with every layer's arrays apart."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcr.models.decoder import Decoder
from lcr.typing import Array, Float, Int, State


def write(
    model: nnx.Module,
    token: Int[Array, "B"],
    states: State,
    choose: Callable[[Float[Array, "B 1 vocab"], Array], Int[Array, "B"]],
    keys: Array,
    layers: list[State] | None = None,
) -> tuple[Int[Array, "B N"], State]:
    """Reads `token`, chooses the next one, reads that, and so on, as often as there are keys.

    choose: `choose(logits, key)` gives the token after the one just read.
    layers: what `layers_in_place` gave for the model, outside of the program that is traced.
    Returns the N tokens read (`token` and all that were chosen but for the last) with that last one after them,
    `[B, N + 1]`, and the states after the N.

    A scan over stacked layers takes each layer's parameters and caches out of the stack and puts the caches back:
    for one token that is more traffic than the arithmetic needs. A `Decoder` is therefore taken apart once, before
    the loop over tokens: one copy of states, and of parameters without `layers`, for as long as the call lasts, and a
    program that grows with the depth. Any other model is called as it is.
    """
    if isinstance(model, Decoder):
        apart = [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(model.repetitions)]
        tokens, apart = _loop(_layer_by_layer(model, layers), token, apart, choose, keys)
        return tokens, jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
    return _loop(model, token, states, choose, keys)


def layers_in_place(model: nnx.Module) -> list[State] | None:
    """Each layer's parameters as arrays that lie where the stacked ones do; None where only a copy could part them.

    Memory can be shared on a CPU alone, by way of NumPy. (XLA has no slices without a copy, and a first touch of fresh
    memory takes several times as long as reading it: for 64 tokens, a fifth of the time.) JAX's arrays never change, and
    these keep the stack's memory alive.
    """
    if not isinstance(model, Decoder):
        return None
    stacked = nnx.state(model.groups)
    for leaf in jax.tree.leaves(stacked):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return None
        if {device.platform for device in leaf.devices()} != {"cpu"} or len(leaf.devices()) > 1:
            return None
    return [
        jax.tree.map(lambda leaf, i=i: jax.device_put(np.asarray(leaf)[i], leaf.sharding), stacked)
        for i in range(model.repetitions)
    ]


def _layer_by_layer(model: Decoder, layers: list[State] | None) -> Callable:
    """`model` for one more token, with a list of states."""
    groups = [model.group(i, None if layers is None else layers[i]) for i in range(model.repetitions)]

    def read(tokens, states):
        x = model.embed(tokens)
        first_values, after = model.no_values(x), []
        for i, (group, state) in enumerate(zip(groups, states, strict=True)):
            x, state, _, first_values = group(x, state, None, first_values, jnp.asarray(i == 0))
            after.append(state)
        return model.logits(x), after

    return read


def _loop(read, token, states, choose, keys):
    def step(carry, key):
        token, states = carry
        logits, states = read(token[:, None], states)
        return (choose(logits, key), states), token

    (last, states), tokens = jax.lax.scan(step, (token, states), keys)
    return jnp.concatenate([tokens, last[None]]).T, states
