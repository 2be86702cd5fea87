"""A recurrence over chunks of tokens on a TPU: what its kernels forward and backward have in common.

The grid goes over rows of the batch, packs of heads, and chunks, one chunk after another. A pack is one head, or
several narrow ones side by side in the lanes (`mosaic_tpu_packs`). Its state stays in fast memory from the first
chunk to the last. Inputs are read where they lie, `[B, T, heads x width]`. Backward the chunks are walked through
from the last to the first: everything inside a chunk is computed again from the state before it, which the forward
pass keeps.

What is done in a chunk is a `Chunk`'s, over the references of a step of the grid, forward and backward by hand. (As
`jax.vjp` of a function of values, inside the kernel, it was some fifth of the code, and spilled up to 4,900 registers.)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Tree = Any
Block = tuple[Tree, jax.Array, Tree, Tree]
LANES = 128
VMEM_LIMIT = 48 * 2**20  # bytes; the smallest fast memory among the generations aimed at holds 64 MiB


@dataclasses.dataclass(frozen=True)
class Plan:
    """chunk: tokens of one. packs: of heads. step: packs that one step of the grid works on, each for itself, so that
    the chip has something to do while one waits for its own products. parts: for each array of tokens, in how many
    equal parts its lanes fall: one for each pack, or fewer, of which neighbouring packs share one (then `step` is 1).
    keep: the dtype in which states before chunks are kept for the backward pass.
    """

    chunk: int
    packs: int
    parts: tuple[int, ...]
    step: int = 1
    keep: Any = jnp.float32


@runtime_checkable
class Chunk(Protocol):
    """What a kernel does in a chunk; hashable. References are to what a step of the grid has of each array, `plan.step`
    packs: fixed `[step, ., .]`, state `[step, K, V]`, tokens and o `[chunk, step x width]` (shared ones `[chunk,
    width]`), rows `[step, ., .]`. A gradient's reference has the shape of what it is the gradient of, but tokens that
    packs share have one for each pack."""

    name: str

    def output(self, block: Block) -> jax.ShapeDtypeStruct:
        """`[chunk, lanes]` of o, of one pack. block: (fixed, state, tokens, rows) of one, by shape and dtype."""

    def scratch(self, block: Block, step: int, *, backward: bool) -> list[Any]:
        """Scratch shapes, whose references come last."""

    def forward(self, fixed, state, tokens, rows, o, *scratch) -> None:
        """Writes o, and into `state` the state after the chunk."""

    def backward(self, fixed, before, tokens, rows, d_state, d_o, d_fixed, d_tokens, d_rows, *scratch) -> None:
        """before: the state before the chunk, in `plan.keep`. Adds to d_fixed, writes d_tokens and d_rows, and into
        `d_state`, where the cotangent of the state after the chunk stands, that of the state before it."""


def scan_chunks(
    body: Chunk, plan: Plan, fixed: Tree, state: jax.Array, tokens: Tree, rows: Tree
) -> tuple[jax.Array, jax.Array]:
    """(the last state, o) of a recurrence.

    fixed: `[packs, ., .]` each, what all chunks have in common. state: float32 `[B, packs, K, V]`. tokens: `[B, T,
    width]` each, T a multiple of the chunk. rows: `[B, packs, T / chunk, ., .]` each, what has the tokens along the
    lanes or belongs to a chunk as a whole. In all of these None may stand for an array.

    Returns o `[B, T, packs x lanes of the body's o]`. Differentiable once, in reverse, in all floating arrays.
    """
    return _scan(body, plan, fixed, state, tokens, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(body, plan, fixed, state, tokens, rows):
    return _forward(body, plan, fixed, state, tokens, rows, keep=False)[:2]


def _fwd(body, plan, fixed, state, tokens, rows):
    last, o, before = _forward(body, plan, fixed, state, tokens, rows, keep=True)
    return (last, o), (fixed, before, tokens, rows)


def _bwd(body, plan, saved, cotangents):
    fixed, before, tokens, rows = saved
    d_fixed, d_state, d_tokens, d_rows = _backward(body, plan, fixed, before, tokens, rows, *cotangents)
    d_fixed = jax.tree.map(lambda x: jnp.sum(x, axis=0), d_fixed)
    leaves, tree = jax.tree.flatten(d_tokens)
    leaves = [_add_shared(plan, parts, x) for parts, x in zip(plan.parts, leaves, strict=True)]
    return d_fixed, d_state, jax.tree.unflatten(tree, leaves), d_rows


_scan.defvjp(_fwd, _bwd)


def _add_shared(plan, parts, x):
    """The cotangent of what several packs read, from those of the packs."""
    if parts == plan.packs:
        return x
    batch, length, lanes = x.shape
    each = x.reshape(batch, length, parts, plan.packs // parts, lanes // plan.packs)
    return jnp.sum(each, axis=3, dtype=jnp.float32).astype(x.dtype).reshape(batch, length, -1)


def _forward(body, plan, fixed, state, tokens, rows, keep):
    """(the last state, o, the states before all chunks `[B, packs, chunks, K, V]` or None)."""
    specs = _Specs(plan, tokens, lambda c: c)
    block = specs.blocks(fixed, state, tokens, rows)
    out, shape = body.output(block), state.shape[2:]
    kept = (specs.batch, plan.packs, specs.chunks, *shape)
    results = (
        (jax.ShapeDtypeStruct(state.shape, state.dtype), specs.of_state(shape)),
        (
            jax.ShapeDtypeStruct((specs.batch, specs.length, plan.packs * out.shape[1]), out.dtype),
            specs.of_tokens(plan.step * out.shape[1], plan.packs),
        ),
        (jax.ShapeDtypeStruct(kept, plan.keep), specs.of_rows(shape)) if keep else (None, None),
    )

    def kernel(fixed, first, tokens, rows, state, o, before, *scratch):
        @pl.when(pl.program_id(2) == 0)
        def _():
            state[...] = first[...]

        if keep:
            before[...] = state[...].astype(before.dtype)
        body.forward(fixed, state, tokens, rows, o, *scratch)

    arguments = (
        (fixed, specs.of_fixed(fixed)),
        (state, specs.of_state(state.shape[2:])),
        (tokens, specs.of_all_tokens(tokens)),
        (rows, jax.tree.map(lambda x: specs.of_rows(x.shape[3:]), rows)),
    )
    scratch = body.scratch(block, plan.step, backward=False)
    return _call(kernel, specs, arguments, results, scratch, f"{body.name}_forward{'' if keep else '_alone'}")


def _backward(body, plan, fixed, before, tokens, rows, d_last, d_out):
    """The cotangents of fixed (for each row of the batch), state, tokens (for each pack) and rows."""
    count = before.shape[2]
    specs = _Specs(plan, tokens, lambda c: count - 1 - c)
    shape = before.shape[3:]

    def for_each_pack(parts, x):
        return jax.ShapeDtypeStruct((*x.shape[:2], x.shape[2] // parts * plan.packs), x.dtype)

    leaves, tree = jax.tree.flatten(tokens)
    d_tokens = [for_each_pack(parts, x) for parts, x in zip(plan.parts, leaves, strict=True)]
    token_specs = [specs.of_tokens(x.shape[2] // plan.packs * plan.step, plan.packs) for x in d_tokens]
    row_specs = jax.tree.map(lambda x: specs.of_rows(x.shape[3:]), rows)
    results = (
        (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct((specs.batch, *x.shape), jnp.float32), fixed),
            jax.tree.map(lambda x: specs.of_state(x.shape[1:]), fixed),
        ),
        (jax.ShapeDtypeStruct(d_last.shape, d_last.dtype), specs.of_state(shape)),
        (jax.tree.unflatten(tree, d_tokens), jax.tree.unflatten(tree, token_specs)),
        (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows), row_specs),
    )

    def kernel(fixed, before, tokens, rows, d_last, d_out, d_fixed, d_state, d_tokens, d_rows, *scratch):
        @pl.when(pl.program_id(2) == 0)
        def _():
            d_state[...] = d_last[...]
            for ref in jax.tree.leaves(d_fixed):
                ref[...] = jnp.zeros_like(ref)

        body.backward(fixed, before, tokens, rows, d_state, d_out, d_fixed, d_tokens, d_rows, *scratch)

    arguments = (
        (fixed, specs.of_fixed(fixed)),
        (before, specs.of_rows(shape)),
        (tokens, specs.of_all_tokens(tokens)),
        (rows, row_specs),
        (d_last, specs.of_state(shape)),
        (d_out, specs.of_tokens(d_out.shape[2] // plan.packs * plan.step, plan.packs)),
    )
    scratch = body.scratch(specs.blocks(fixed, d_last, tokens, rows), plan.step, backward=True)
    return _call(kernel, specs, arguments, results, scratch, f"{body.name}_backward")


def _call(kernel, specs, arguments, results, scratch, name):
    plan = specs.plan
    return pl.pallas_call(
        kernel,
        grid=(specs.batch, plan.packs // plan.step, specs.chunks),
        in_specs=[spec for _, spec in arguments],
        out_specs=[spec for _, spec in results],
        out_shape=[shape for shape, _ in results],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=f"{name}_{plan.chunk}",
    )(*(array for array, _ in arguments))


@dataclasses.dataclass(frozen=True)
class _Specs:
    """Which block of an array a step of the grid sees. order: which chunk comes c-th."""

    plan: Plan
    tokens: Tree
    order: Callable[[Any], Any]

    @property
    def batch(self):
        return jax.tree.leaves(self.tokens)[0].shape[0]

    @property
    def length(self):
        return jax.tree.leaves(self.tokens)[0].shape[1]

    @property
    def chunks(self):
        return self.length // self.plan.chunk

    def of_fixed(self, fixed):
        return jax.tree.map(lambda x: pl.BlockSpec((self.plan.step, *x.shape[1:]), lambda b, p, c: (p, 0, 0)), fixed)

    def of_state(self, shape):
        return pl.BlockSpec((None, self.plan.step, *shape), lambda b, p, c: (b, p, 0, 0))

    def of_rows(self, shape):
        block = (None, self.plan.step, None, *shape)
        return pl.BlockSpec(block, lambda b, p, c: (b, p, self.order(c), 0, 0))

    def of_tokens(self, width, parts):
        each = self.plan.packs // parts
        return pl.BlockSpec((None, self.plan.chunk, width), lambda b, p, c: (b, self.order(c), p // each))

    def of_all_tokens(self, tokens):
        leaves, tree = jax.tree.flatten(tokens)
        specs = [
            self.of_tokens(x.shape[2] // parts * (self.plan.step if parts == self.plan.packs else 1), parts)
            for parts, x in zip(self.plan.parts, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, specs)

    def blocks(self, fixed, state, tokens, rows):
        """What the body sees, by shape and dtype."""
        leaves, tree = jax.tree.flatten(tokens)
        tokens = [
            jax.ShapeDtypeStruct((self.plan.chunk, x.shape[2] // parts), x.dtype)
            for parts, x in zip(self.plan.parts, leaves, strict=True)
        ]
        return (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), fixed),
            jax.ShapeDtypeStruct(state.shape[2:], state.dtype),
            jax.tree.unflatten(tree, tokens),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[3:], x.dtype), rows),
        )


def divisor(count: int, most: int) -> int:
    """The largest divisor of `count` that is at most `most`."""
    return next(n for n in range(min(count, most), 0, -1) if count % n == 0)


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype: Any) -> jax.Array:
    """A product of matrices over one axis of each, in float32: of operands in this dtype."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), (((axes[0],), (axes[1],)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
