"""The recurrences that `experiments.benchmark` times: their arguments, our op, and rivals that compute the same.

Rivals: the associative scan over all tokens, written out here; and what the package jax-linear-attention (`jla`) has in
plain JAX, where it is installed. (Its own requirement is JAX 0.11.2; `pip install --no-deps` takes it elsewhere.)
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from pallas_kernels import delta_rule, linear_attention, selective_scan, wkv

OPS = ("selective_scan", "retention", "scalar decay", "vector decay", "gated delta rule", "RWKV-7", "RWKV-4")
HEAD = 64  # K and V
SELECTIVE_SHAPES = ((1, 4096, 512), (8, 4096, 512), (32, 256, 128))  # B, T, D; N = 16
HEAD_SHAPES = ((1, 4096, 4), (8, 4096, 4), (1, 4096, 16), (8, 4096, 16))  # B, T, H


@dataclasses.dataclass(frozen=True)
class Case:
    """ours: of (*arguments, implementation=...). associative, jla: of (*arguments); jla may be None. All give an array
    like ours. state_bytes: of the states after every token, which the rivals hold."""

    op: str
    shape: str
    arguments: tuple[jax.Array, ...]
    ours: Callable[..., jax.Array]
    associative: Callable[..., jax.Array]
    jla: Callable[..., jax.Array] | None
    state_bytes: int


def all_cases() -> Iterator[Case]:
    for shape in SELECTIVE_SHAPES:
        yield selective_case(*shape)
    for shape in HEAD_SHAPES:
        yield from head_cases(*shape)


def head_cases(batch: int, length: int, heads: int) -> Iterator[Case]:
    """Each recurrence with heads of 64, and RWKV-4 as wide as they are together."""
    random = iter(jax.random.split(jax.random.key(0), 6))
    sizes, width = (batch, length, heads, HEAD), heads * HEAD
    q, k, v = (jax.random.normal(next(random), sizes) for _ in range(3))
    unit = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    by_token, by_channel = (-jax.nn.softplus(jax.random.normal(next(random), s) - 3) for s in (sizes[:3], sizes))
    by_head = jnp.log1p(-(2.0 ** -(5 + jnp.arange(heads, dtype=jnp.float32))))
    beta = jax.nn.sigmoid(jax.random.normal(next(random), sizes[:3]))
    for op, arguments, functions in (
        ("retention", (q, k, v, by_head), (linear, associative_decay, jla("simple_gla", "g", prepare=over_tokens))),
        ("scalar decay", (q, k, v, by_token), (linear, associative_decay, jla("simple_gla", "g"))),
        ("vector decay", (q, k, v, by_channel), (linear, associative_decay, jla("gla", "g"))),
        (
            "gated delta rule", (q, unit, v, by_token, beta),
            (gated_delta, lambda *x: associative_delta(*gated_arguments(*x)), jla("gated_deltanet", "g", "beta")),
        ),
        ("RWKV-7", (q, k, v, -unit, beta[..., None] * unit, by_channel), (delta, associative_delta, jla_rwkv7())),
    ):  # fmt: skip
        yield Case(op, f"B {batch}, T {length}, H {heads}", arguments, *functions, 4 * batch * length * width * HEAD)
    flat = k.reshape(batch, length, width), v.reshape(batch, length, width)
    arguments = (*flat, -jnp.geomspace(1e-3, 1.0, width), q[0, :1].reshape(width))
    shape = f"B {batch}, T {length}, D {width}"
    yield Case("RWKV-4", shape, arguments, first(wkv), associative_wkv, None, 3 * 4 * batch * length * width)


def selective_case(batch: int, length: int, width: int) -> Case:
    keys = jax.random.split(jax.random.key(0), 5)
    arguments = (
        jax.random.normal(keys[0], (batch, length, width)),
        jax.nn.softplus(jax.random.normal(keys[1], (batch, length, width)) - 3),
        -jnp.exp(jax.random.normal(keys[2], (width, 16))),
        jax.random.normal(keys[3], (batch, length, 16)),
        jax.random.normal(keys[4], (batch, length, 16)),
    )
    rival = jla("mamba1", "dt", "a")
    return Case(
        "selective_scan", f"B {batch}, T {length}, D {width}, N 16", arguments, first(selective_scan),
        associative_selective_scan, rival and (lambda x, dt, A, B, C: rival(C, B, x, dt, A)),
        4 * batch * length * width * 16,
    )  # fmt: skip


def first(op: Callable[..., tuple]) -> Callable[..., jax.Array]:
    return lambda *arguments, **options: op(*arguments, **options)[0]


linear, delta = first(linear_attention), first(delta_rule)


def gated_arguments(q, k, v, log_decay, beta):
    """What `delta_rule` takes for Gated DeltaNet; see its docstring."""
    beta = beta[..., None]
    return q, k, beta * v, k * jnp.exp(log_decay)[..., None], -beta * k, log_decay


def gated_delta(*arguments, **options):
    return delta(*gated_arguments(*arguments), **options)


def associative(decay, update):
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (decay, update), axis=1)[1]


def associative_selective_scan(x, dt, A, B, C):
    states = associative(jnp.exp(dt[..., None] * A[None, None]), (dt * x)[..., None] * B[:, :, None])
    return jnp.einsum("btdn,btn->btd", states, C)


def associative_decay(q, k, v, log_decay):
    """log_decay: [H], [B, T, H] or [B, T, H, K]."""
    log_decay = log_decay[..., None] if log_decay.ndim < 4 else log_decay
    decay = jnp.broadcast_to(jnp.exp(log_decay), (*q.shape[:3], log_decay.shape[-1]))[..., None]
    states = associative(decay, jnp.einsum("bthk,bthv->bthkv", k, v))
    return jnp.einsum("bthk,bthkv->bthv", q, states) * q.shape[-1] ** -0.5


def associative_delta(q, k, v, a, b, log_decay):
    """log_decay: [B, T, H] or [B, T, H, K]."""
    log_decay = log_decay[..., None] if log_decay.ndim < 4 else log_decay
    matrices = jnp.eye(q.shape[-1])[None, None, None] * jnp.exp(log_decay)[..., None] + jnp.einsum("bthk,bthl->bthkl", b, a)

    def combine(left, right):
        return right[0] @ left[0], right[0] @ left[1] + right[1]

    updates = jnp.einsum("bthk,bthv->bthkv", k, v)
    states = jax.lax.associative_scan(combine, (matrices, updates), axis=1)[1]
    return jnp.einsum("bthk,bthkv->bthv", q, states) * q.shape[-1] ** -0.5


def associative_wkv(k, v, log_decay, bonus):
    """Sums are held divided by the exponential of their largest exponent."""

    def combine(left, right):
        g, num, den, top = left
        g_right, num_right, den_right, top_right = right
        largest = jnp.maximum(top + g_right, top_right)
        old, new = jnp.exp(top + g_right - largest), jnp.exp(top_right - largest)
        return g + g_right, old * num + new * num_right, old * den + new * den_right, largest

    one = jnp.ones_like(k)
    _, num, den, top = jax.lax.associative_scan(combine, (log_decay[None, None] * one, v, one, k), axis=1)
    # what was before the token, and the token with its bonus
    num, den, top = (jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))) for x in (num, den, top))
    own = bonus[None, None] + k
    largest = jnp.maximum(top, own)
    old, new = jnp.exp(top - largest), jnp.exp(own - largest)
    return (old * num + new * v) / (old * den + new)


def jla(kind: str, *gates: str, prepare: Callable[..., Any] | None = None) -> Callable[..., jax.Array] | None:
    """jax-linear-attention's plain-JAX form of one of its kinds; None where it is not installed."""
    if importlib.util.find_spec("jla") is None:
        return None
    from jla.ops import linear_attention

    def run(q, k, v, *values):
        values = values if prepare is None else prepare(q, *values)
        return linear_attention(kind, q, k, v, **dict(zip(gates, values, strict=True)), impl="chunked")[0]

    return run


def over_tokens(q, log_decay):
    return (jnp.broadcast_to(log_decay, q.shape[:3]),)


def jla_rwkv7() -> Callable[..., jax.Array] | None:
    if importlib.util.find_spec("jla") is None:
        return None
    from jla.ops.rwkv7 import rwkv7_chunked

    def run(q, k, v, a, b, log_decay):
        return rwkv7_chunked(q, k, v, log_decay, a, b, scale=q.shape[-1] ** -0.5)[0]

    return run
