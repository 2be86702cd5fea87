"""The loop that writes tokens one at a time, with every layer's arrays apart."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lcr.models.decoder import Decoder
from lcr.typing import Array, Float, Int, State


def write(
    model: nnx.Module,
    token: Int[Array, "B"],
    states: State,
    choose: Callable[[Float[Array, "B 1 vocab"], Array], Int[Array, "B"]],
    keys: Array,
) -> tuple[Int[Array, "B N"], State]:
    """Reads `token`, chooses the next one, reads that, and so on, as often as there are keys.

    choose: `choose(logits, key)` gives the token after the one just read.
    Returns the N tokens read (`token` and all that were chosen but for the last) with that last one after them,
    `[B, N + 1]`, and the states after the N.

    A scan over stacked layers takes each layer's parameters and caches out of the stack and puts the caches back:
    for one token that is more traffic than the arithmetic needs. A `Decoder` is therefore taken apart once, before
    the loop over tokens: one copy of parameters and states for as long as the call lasts, and a program that grows
    with the depth. Any other model is called as it is.
    """
    if isinstance(model, Decoder):
        apart = [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(model.repetitions)]
        tokens, apart = _loop(_layer_by_layer(model), token, apart, choose, keys)
        return tokens, jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
    return _loop(model, token, states, choose, keys)


def _layer_by_layer(model: Decoder) -> Callable:
    """`model` for one more token, with a list of states."""
    groups = [model.group(i) for i in range(model.repetitions)]

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
