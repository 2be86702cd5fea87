"""A scan over chunks of tokens that reads its inputs, and writes its outputs, where they lie.

`jax.lax.scan` wants the chunks in front: `[B, T, ...]` is copied to `[T / C, B, C, ...]` first and the outputs back
afterwards, forward and again backward. On a CPU such a copy into memory not touched before takes longer than many a
recurrence spends on computing (80 ms for 134 MB, read in 7 ms). Here the loop counts chunks, and each cuts its own out.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


def scan_chunks(
    body: Callable[[Tree, Tree, Tree], tuple[Tree, jax.Array]], chunk: int, shared: Tree, carry: Tree, inputs: Tree
) -> tuple[Tree, jax.Array]:
    """carry, o[:, s : s + C] = body(shared, carry, inputs[:, s : s + C]) for s = 0, C, 2 C, ...: (the last carry, o).

    body: a function of its arguments alone (no tracers closed over); its output is an array `[B, C, ...]`. The last
        chunk is shorter where C does not divide T.
    shared: what all chunks have in common. inputs: arrays `[B, T, ...]`. In all of these None may stand for an array.

    Differentiable (reverse mode) in all floating arrays. What is kept is the carry before each chunk; everything inside
    a chunk is computed again.
    """
    return _scan(body, chunk, shared, carry, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(body, chunk, shared, carry, inputs):
    return _forward(body, chunk, shared, carry, inputs, keep=False)[0]


def _forward(body, chunk, shared, carry, inputs, keep):
    """((the last carry, o), the carries before the whole chunks, the carry before the short one)."""
    length = jax.tree.leaves(inputs)[0].shape[1]
    count, rest = divmod(length, chunk)
    first = jax.eval_shape(body, shared, carry, jax.tree.map(lambda x: x[:, :chunk], inputs))[1]
    out = jnp.zeros((first.shape[0], length, *first.shape[2:]), first.dtype)
    kept = None

    def step(state, i):
        before, out = state
        after, o = body(shared, before, _cut(inputs, i * chunk, chunk))
        return (after, _paste(out, o, i * chunk)), before if keep else None

    if count:
        (carry, out), kept = jax.lax.scan(step, (carry, out), jnp.arange(count))
    last = carry
    if rest:
        carry, o = body(shared, carry, _cut(inputs, count * chunk, rest))
        out = _paste(out, o, count * chunk)
    return (carry, out), kept, last


def _fwd(body, chunk, shared, carry, inputs):
    outputs, kept, last = _forward(body, chunk, shared, carry, inputs, keep=True)
    return outputs, (shared, kept, last, inputs)


def _bwd(body, chunk, saved, cotangents):
    shared, kept, last, inputs = saved
    d_carry, d_out = cotangents
    count, rest = divmod(d_out.shape[1], chunk)
    of_shared = len(_floating(shared))

    def back(state, before, start, size):
        """The cotangents before a chunk, of those after it."""
        d_carry, d_shared, d_inputs = state
        trees = shared, before, _cut(inputs, start, size)

        def run(leaves):
            after, o = body(*_replace(trees, leaves))
            return _floating(after), o

        _, pull = jax.vjp(run, _floating(trees))
        (found,) = pull((d_carry, _cut(d_out, start, size)))
        of_carry = of_shared + len(d_carry)
        d_shared = [old + new for old, new in zip(d_shared, found[:of_shared], strict=True)]
        d_inputs = [_paste(old, new, start) for old, new in zip(d_inputs, found[of_carry:], strict=True)]
        return found[of_shared:of_carry], d_shared, d_inputs

    # Every number of these is written below. Started alike, they would be one array and copies of it, which XLA makes
    # on one core of a CPU; started differently, each is filled by all of them.
    d_inputs = [jnp.full_like(x, i) for i, x in enumerate(_floating(inputs))]
    state = _floating(d_carry), [jnp.zeros_like(x) for x in _floating(shared)], d_inputs
    if rest:
        state = back(state, last, count * chunk, rest)
    if count:
        state, _ = jax.lax.scan(
            lambda state, x: (back(state, x[0], x[1] * chunk, chunk), None),
            state,
            (kept, jnp.arange(count)),
            reverse=True,
        )
    d_carry, d_shared, d_inputs = state
    return _cotangents(shared, d_shared), _cotangents(last, d_carry), _cotangents(inputs, d_inputs)


_scan.defvjp(_fwd, _bwd)


def _cut(inputs, start, size):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), inputs)


def _paste(whole, part, start):
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=1)


def _is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _floating(tree):
    return [x for x in jax.tree.leaves(tree) if _is_floating(x)]


def _replace(tree, leaves):
    """The tree with these for its floating leaves."""
    leaves = iter(leaves)
    return jax.tree.map(lambda x: next(leaves) if _is_floating(x) else x, tree)


def _cotangents(tree, leaves):
    """The floating leaves' cotangents, and the zeros that JAX wants for integers."""
    leaves = iter(leaves)
    return jax.tree.map(lambda x: next(leaves) if _is_floating(x) else np.zeros(x.shape, jax.dtypes.float0), tree)
