"""The recurrences of models of 1.3B parameters, as `benchmark scan` times them: random inputs, our op, its rivals.

Rivals: the package jax-linear-attention 0.1.0 (`jla`, JAX) and flash-linear-attention (`fla`, Triton under PyTorch), each
where it is installed. They take what a model has at hand (the learning rate of a delta rule, not its products with the
keys), and so does ours here: the products are part of what is timed. fla wants as many heads of keys as of values, so
that it gets Mamba-2's one group of them repeated beforehand.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import delta_rule, linear_attention, selective_scan
from pallas_kernels.delta_rule.shapes import REAL as DELTA_RULE
from pallas_kernels.linear_attention.shapes import REAL as LINEAR_ATTENTION
from pallas_kernels.selective_scan.shapes import REAL as SELECTIVE_SCAN


@dataclasses.dataclass(frozen=True)
class Model:
    """One layer's recurrence.

    sizes: by name, of the inputs for B rows of T tokens, as a function. floats: those that are float32 always. run: of
    (*inputs, implementation=...). jla, fla: the rival's function (None where it has none) and the names of the inputs that
    it takes, in its order. heads: of its states. flops: of reading and writing the state, a token and layer.
    """

    sizes: Callable[[int, int], dict[str, tuple[int, ...]]]
    run: Callable[..., jax.Array]
    flops: int
    width: int
    floats: tuple[str, ...] = ()
    jla: tuple[Callable[[], Callable] | None, tuple[str, ...]] = (None, ())
    fla: tuple[str | None, tuple[str, ...]] = (None, ())
    repeat: int = 1


def inputs(model: Model, batch: int, length: int, dtype: Any, seed: int) -> dict[str, jax.Array]:
    """Random, as they are in a model: unit keys for delta rules, decays below 1, steps after softplus."""

    sizes = model.sizes(batch, length)

    @jax.jit
    def make(key):
        found = []
        for number, (name, size) in enumerate(sizes.items()):
            x = jax.random.normal(jax.random.fold_in(key, number), size, jnp.float32)
            if name in ("unit", "a", "b"):
                x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
            x = {"a": lambda x: -x, "decay": lambda x: -jax.nn.softplus(x - 3), "beta": jax.nn.sigmoid,
                 "dt": lambda x: jax.nn.softplus(x - 3), "A": lambda x: -jnp.exp(x)}.get(name, lambda x: x)(x)  # fmt: skip
            found.append(x.astype(jnp.float32 if name in model.floats else dtype))
        return found

    return dict(zip(sizes, make(jax.random.key(seed)), strict=True))


def _first(function: Callable) -> Callable:
    return lambda *arguments, **options: function(*arguments, **options)[0]


def _gated(q, unit, v, decay, beta, **options):
    """Gated DeltaNet in the terms of `delta_rule`; see its docstring."""
    beta = beta[..., None].astype(q.dtype)
    forget = jnp.exp(decay)[..., None].astype(q.dtype)
    return delta_rule(q, unit, beta * v, unit * forget, -beta * unit, decay, **options)[0]


def _plain(q, unit, v, beta, **options):
    beta = beta[..., None].astype(q.dtype)
    return delta_rule(q, unit, beta * v, unit, -beta * unit, **options)[0]


def _mamba2(q, k, v, decay, **options):
    return linear_attention(q, k, v, decay, scale=1.0, **options)[0]


def _rwkv6(q, k, v, decay, bonus, **options):
    return linear_attention(q, k, v, decay, bonus=bonus, scale=1.0, **options)[0]


def _rwkv7(q, k, v, a, b, decay, **options):
    return delta_rule(q, k, v, a, b, decay, scale=1.0, **options)[0]


def _jla(kind: str, *gates: str, **options: Any) -> Callable:
    from jla.ops import linear_attention

    def run(q, k, v, *values):
        return linear_attention(kind, q, k, v, **dict(zip(gates, values, strict=True)), **options)[0]

    return run


def _jla_mamba() -> Callable:
    run = _jla("mamba1", "dt", "a")
    return lambda x, dt, A, B, C: run(C, B, x, dt, A)


def _jla_rwkv7() -> Callable:
    from jla.ops.mosaic_gpu.rwkv7 import rwkv7

    return lambda *arguments: rwkv7(*arguments, scale=1.0)[0]


def _of_heads(shape: Any, *gates: str, bonus: bool = False, unit: bool = False) -> Callable:
    """The inputs of a recurrence with heads; gates: "decay", "channel" (a decay a channel), "beta", "a", "b"."""

    def sizes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
        heads = batch, length, shape.H
        keys = batch, length, getattr(shape, "G", None) or shape.H, shape.K
        found = {"q": keys, "unit" if unit else "k": keys, "v": (*heads, shape.V)}
        for gate in gates:
            found["decay" if gate == "channel" else gate] = heads if gate in ("decay", "beta") else (*heads, shape.K)
        return found | ({"bonus": (shape.H, shape.K)} if bonus else {})

    return sizes


def _state(shape: Any, times: int) -> int:
    return times * 2 * shape.H * shape.K * shape.V


def _linear(name: str, *gates: str, run: Callable, jla: Any, fla: Any, **options: Any) -> Model:
    shape = LINEAR_ATTENTION[name]
    return Model(
        _of_heads(shape, *gates, **options), run, _state(shape, 2), shape.H * shape.V, ("decay", "bonus"), jla, fla,
        repeat=shape.H // (shape.G or shape.H),
    )  # fmt: skip


def _delta(name: str, *gates: str, run: Callable, jla: Any, fla: Any, **options: Any) -> Model:
    shape = DELTA_RULE[name]
    sizes = _of_heads(shape, *gates, **options)
    return Model(sizes, run, _state(shape, 4), shape.H * shape.V, ("decay", "beta"), jla, fla)


def _mamba_sizes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    shape = SELECTIVE_SCAN["mamba_1b"]
    tokens, states = (batch, length, shape.D), (batch, length, shape.N)
    return {"x": tokens, "dt": tokens, "A": (shape.D, shape.N), "B": states, "C": states}


QKVG, GATED = ("q", "k", "v", "decay"), ("q", "unit", "v", "decay", "beta")
MODELS = {
    "Mamba": Model(
        _mamba_sizes, _first(selective_scan), 6 * SELECTIVE_SCAN["mamba_1b"].D * SELECTIVE_SCAN["mamba_1b"].N,
        SELECTIVE_SCAN["mamba_1b"].D, ("dt", "A"), jla=(_jla_mamba, ("x", "dt", "A", "B", "C")),
    ),
    "RetNet": _linear("retnet_1b", "decay", run=_first(linear_attention),
                      jla=(functools.partial(_jla, "simple_gla", "g"), QKVG), fla=("simple_gla.chunk_simple_gla", QKVG)),
    "Mamba-2": _linear("mamba2_1b", "decay", run=_mamba2,
                       jla=(functools.partial(_jla, "simple_gla", "g", scale=1.0), QKVG),
                       fla=("simple_gla.chunk_simple_gla", QKVG)),
    "GLA": _linear("gla_1b", "channel", run=_first(linear_attention),
                   jla=(functools.partial(_jla, "gla", "g"), QKVG), fla=("gla.chunk_gla", QKVG)),
    "RWKV-6": _linear("rwkv6_1b", "channel", bonus=True, run=_rwkv6, jla=(None, ()),
                      fla=("rwkv6.chunk_rwkv6", ("q", "k", "v", "decay", "bonus"))),
    "DeltaNet": _delta("deltanet_1b", "beta", unit=True, run=_plain,
                       jla=(functools.partial(_jla, "deltanet", "beta"), ("q", "unit", "v", "beta")),
                       fla=("delta_rule.chunk_delta_rule", ("q", "unit", "v", "beta"))),
    "Gated DeltaNet": _delta("gated_deltanet_1b", "decay", "beta", unit=True, run=_gated,
                             jla=(functools.partial(_jla, "gated_deltanet", "g", "beta"), GATED),
                             fla=("gated_delta_rule.chunk_gated_delta_rule", GATED)),
    "RWKV-7": _delta("rwkv7_1b", "a", "b", "channel", run=_rwkv7,
                     jla=(_jla_rwkv7, ("q", "k", "v", "decay", "a", "b")),
                     fla=("rwkv7.chunk_rwkv7", ("q", "decay", "k", "v", "a", "b"))),
}  # fmt: skip


def jla_function(model: Model, names: tuple[str, ...]) -> Callable | None:
    """jla's function, of inputs in the order of `names`; None where it has none or is not installed."""
    make, wanted = model.jla
    if make is None or importlib.util.find_spec("jla") is None:
        return None
    function = make()
    return lambda *arrays: function(*(arrays[names.index(name)] for name in wanted))


def fla_function(model: Model) -> tuple[Callable, tuple[str, ...]] | None:
    """fla's function, and the inputs that it takes; None where it has none, is not installed, or there is no CUDA."""
    path, wanted = model.fla
    if path is None or any(importlib.util.find_spec(package) is None for package in ("torch", "fla")):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(f"fla.ops.{module}"), name), wanted
