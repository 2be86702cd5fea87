"""What every implementation of `attention` is held to: one suite of cases, run by the tests (a simulated device) and by
`python -m pallas_kernels.check --run` (a real one)."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.attention import api
from pallas_kernels.attention.shapes import Shape
from pallas_kernels.conformance import Program, compiled
from pallas_kernels.tolerances import error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call: its shape, and what its rows hold.

    rows: "whole" (one document, nothing given), "packed" (documents, padding at both ends and inside, an id that comes
    back), "ring" (a cache whose slots are in any order, some empty, of which each row has filled another part).
    block_size: of a random block mask in which a whole line of blocks is empty.
    """

    shape: Shape
    rows: str = "whole"
    block_size: tuple[int, int] | None = None
    alibi: bool = False


CASES = {
    "one token": Case(shape=Shape(T=1, H=2, G=2, K=64)),
    "one tile": Case(shape=Shape(T=64, H=1, G=1, K=64)),
    "ragged, grouped": Case(shape=Shape(B=2, T=63, H=4, G=2, K=64)),
    "full": Case(shape=Shape(T=300, S=500, H=2, G=1, K=128, causal=False)),
    "width 96": Case(shape=Shape(T=150, H=2, G=2, K=96)),
    "width 256": Case(shape=Shape(T=140, H=2, G=1, K=256, soft_cap=5.0)),
    "widths 64 and 256": Case(shape=Shape(T=100, H=2, G=1, K=64, V=256)),
    "widths 192 and 128": Case(shape=Shape(T=200, H=2, G=2, K=192, V=128)),
    "window": Case(shape=Shape(T=500, H=1, G=1, K=64, window=70)),
    "window, not causal": Case(shape=Shape(T=200, H=2, G=1, K=64, causal=False, window=33)),
    "soft cap and scale": Case(shape=Shape(T=130, H=2, G=2, K=64, soft_cap=2.0, scale=0.3)),
    "into a longer cache": Case(shape=Shape(T=70, S=330, H=4, G=1, K=64)),
    "more queries than keys": Case(shape=Shape(T=150, S=40, H=2, G=2, K=64)),
    "packed": Case(shape=Shape(B=2, T=300, H=2, G=1, K=64), rows="packed"),
    "packed, window": Case(shape=Shape(B=2, T=300, H=2, G=2, K=64, window=40), rows="packed"),
    "packed, full": Case(shape=Shape(B=2, T=200, H=2, G=1, K=64, causal=False), rows="packed"),
    "ring": Case(shape=Shape(B=2, T=80, S=300, H=4, G=2, K=64, window=200), rows="ring"),
    "blocks": Case(shape=Shape(B=2, T=300, S=400, H=2, G=1, K=64, causal=False), block_size=(128, 128)),
    "blocks, packed": Case(shape=Shape(B=2, T=384, H=1, G=1, K=64), rows="packed", block_size=(128, 128)),
    "decode": Case(shape=Shape(B=3, T=1, S=700, H=8, G=2, K=128), rows="ring"),
    "decode three": Case(shape=Shape(B=2, T=3, S=260, H=4, G=1, K=64), rows="ring"),
    "decode, soft cap": Case(shape=Shape(B=2, T=1, S=300, H=2, G=2, K=64, soft_cap=3.0, window=150), rows="ring"),
    "latent decode": Case(shape=Shape(B=2, T=1, S=200, H=16, G=1, K=576, V=512, latent=True), rows="ring"),
    "latent prefill": Case(shape=Shape(T=70, S=150, H=4, G=1, K=96, V=64, latent=True)),
    "alibi": Case(shape=Shape(B=2, T=150, H=4, G=2, K=64), rows="packed", alibi=True),
}


def arguments(case: Case, dtype: Any, seed: int = 0) -> tuple[list[Array], dict[str, Array], dict[str, Any]]:
    """`(q, k[, v])`, the options of `attention` that are arrays, and those that are not."""
    shape, rng = case.shape, np.random.default_rng(seed)
    sizes = (shape.q, shape.k) if shape.latent else (shape.q, shape.k, shape.v)
    floats = [jnp.asarray(rng.standard_normal(size), dtype) for size in sizes]
    index = {"whole": lambda *_: {}, "packed": _packed, "ring": _ring}[case.rows](rng, shape)
    static = dict(shape.options)
    if case.block_size is not None:
        blocks = [-(-n // size) for n, size in zip((shape.T, shape.k[1]), case.block_size, strict=True)]
        index["block_mask"] = rng.random((shape.B, *blocks)) < 0.6
        index["block_mask"][0, blocks[0] // 2] = False
        static["block_size"] = case.block_size
    if case.alibi:
        index["alibi_slopes"] = np.geomspace(0.5, 0.01, shape.H).astype(np.float32)
    return floats, {name: jnp.asarray(a) for name, a in index.items()}, static


def _packed(rng, shape):
    ids = np.sort(rng.integers(1, 5, (shape.B, shape.T)), axis=1)
    ids[:, -shape.T // 8 :] = 1
    ids[0, : shape.T // 6] = 0
    ids[-1, -shape.T // 10 :] = 0
    ids[rng.random(ids.shape) < 0.05] = 0
    return {"segment_ids": ids.astype(np.int32)}


def _ring(rng, shape):
    """Each row's cache is filled to another length, and turned; two documents are in it, and the queries follow."""
    slots, length = shape.k[1], shape.T
    filled = slots - np.arange(shape.B)[:, None] * (slots // 2)
    slot = (np.arange(slots)[None] + 7 * np.arange(shape.B)[:, None]) % slots
    ids = np.where(slot < filled, 1 + (slot >= filled // 4), 0)
    positions = filled - length + np.arange(length)[None]
    queries = np.where(np.arange(length)[None] % 9 == 4, 0, np.full((shape.B, 1), 2))
    index = {"segment_ids": queries, "kv_segment_ids": ids, "q_positions": positions, "kv_positions": slot}
    return {name: a.astype(np.int32) for name, a in index.items()}


@functools.cache
def _both(implementation: str, static: tuple, with_logsumexp: bool):
    def forward(floats, index):
        q, k, v = (*floats, None)[:3]
        options = {**index, **dict(static), "return_logsumexp": with_logsumexp, "implementation": implementation}
        results = api.attention(q, k, v, **options)
        return results if with_logsumexp else (results,)

    def both(floats, index, cotangents):
        results, pullback = jax.vjp(lambda floats: forward(floats, index), floats)
        return results, pullback(cotangents)[0]

    return both


def gives_logsumexp(implementation: str) -> bool:
    return getattr(api.IMPLEMENTATIONS.get(implementation), "GIVES_LOGSUMEXP", True)


def prepare(
    case: Case, implementation: str, dtype: Any, exact: bool = False, seed: int = 0, with_logsumexp: bool = True,
    program: Program = compiled,
) -> Callable[[], dict[str, np.ndarray]]:
    """What computes o, the log-sum-exp (0 where it is -inf) and where it is, if it is asked for; dq, dk, dv of both.

    exact: the same numbers, in float32.
    """
    floats, index, static = arguments(case, dtype, seed)
    if exact:
        floats = [a.astype(jnp.float32) for a in floats]
    rng = np.random.default_rng(seed + 1)
    shape = (*case.shape.q[:3], case.shape.v[3])
    cotangents = jnp.asarray(rng.standard_normal(shape), dtype).astype(floats[0].dtype)
    of_sums = jnp.asarray(rng.standard_normal(shape[:3]), jnp.float32)
    both = _both(implementation, tuple(sorted(static.items())), with_logsumexp)
    run = program(both, floats, index, (cotangents, of_sums) if with_logsumexp else (cotangents,))

    def compute():
        (o, *logsumexp), gradients = run()
        dtypes = [o.dtype, *(a.dtype for a in logsumexp)]
        assert dtypes == [floats[0].dtype, jnp.float32][: len(dtypes)], dtypes
        named = {"o": o}
        for a in logsumexp:
            unseen = np.isneginf(a)
            named |= {"unseen": unseen, "logsumexp": np.where(unseen, 0, a)}
        named |= {f"d{name}": gradient for name, gradient in zip("qkv", gradients, strict=False)}
        return {name: np.asarray(a, np.float32) for name, a in named.items()}

    return compute


def errors(
    case: Case, implementation: str, dtype: Any, seed: int = 0, poison: Callable[[], None] = lambda: None,
    twice: bool = True, program: Program = compiled, reference: Program = compiled,
) -> Iterator[tuple[str, float, str]]:
    """`(what, error, kind of tolerance)` of every result against the reference in float32 on the same numbers.

    poison: called before each run, to fill memory with what no result may show. twice: whether the results of a second
    run have to be the same bits. program, reference: how the implementation and the reference are run.
    """
    half = np.dtype(dtype).itemsize < 4
    kind = "bfloat16" if half else "float32"
    options = {"seed": seed, "with_logsumexp": gives_logsumexp(implementation)}
    want = prepare(case, "reference", dtype, exact=True, program=reference, **options)()
    run = prepare(case, implementation, dtype, program=program, **options)
    poison()
    found = run()
    poison()
    again = run() if twice else found
    for name, expected in want.items():
        gradient = " gradient" if name.startswith("d") else ""
        yield name, error(found[name], expected), "exact" if name == "unseen" else kind + gradient
        if twice:
            yield f"{name}, second run", float((found[name] != again[name]).any()), "exact"
