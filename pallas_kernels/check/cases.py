"""What is compiled: for every op its real shapes, and how a call of that shape is made."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.attention import api as attention_api
from pallas_kernels.attention import shapes as attention_shapes
from pallas_kernels.delta_rule import api as delta_rule_api
from pallas_kernels.delta_rule import shapes as delta_rule_shapes
from pallas_kernels.linear_attention import api as linear_attention_api
from pallas_kernels.linear_attention import shapes as linear_attention_shapes
from pallas_kernels.selective_scan import api as selective_scan_api
from pallas_kernels.selective_scan import shapes as selective_scan_shapes
from pallas_kernels.wkv import api as wkv_api
from pallas_kernels.wkv import shapes as wkv_shapes

Call = tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]  # a function that gives an array, and its arguments


@dataclasses.dataclass(frozen=True)
class Op:
    """call: of a shape. quick: the shapes that `--quick` takes. api: the module with the op's IMPLEMENTATIONS, where
    kernels of ours may be among them; then the function that `call` gives takes `implementation`. plain: the one that
    is compiled for TPUs too, to be compared with kernels of ours."""

    shapes: Mapping[str, Any]
    call: Callable[[Any], Call]
    quick: tuple[str, ...]
    api: ModuleType | None = None
    plain: str | None = None

    def forms(self, platform: str) -> list[str | None]:
        """What is compiled for a platform: the default (None), our kernels, not always the default, and `plain`."""
        ours = f"mosaic_{platform}"
        kernels = [ours] if self.api is not None and ours in self.api.IMPLEMENTATIONS else []
        return [None, *kernels, *([self.plain] if self.plain and platform == "tpu" else [])]


def attention(shape: attention_shapes.Shape) -> Call:
    def run(q, k, v=None, implementation=None):
        ids = None
        if shape.documents > 1:
            ids = jnp.broadcast_to(1 + jnp.arange(shape.T, dtype=jnp.int32) * shape.documents // shape.T, q.shape[:2])
        return pallas_kernels.attention(q, k, v, segment_ids=ids, **shape.options, implementation=implementation)

    return run, _arrays(*(shape.q, shape.k, shape.v)[: 2 if shape.latent else 3])


def selective_scan(shape: selective_scan_shapes.Shape) -> Call:
    tokens, states = shape[:3], (*shape[:2], shape.N)
    x, B, C = _arrays(tokens, states, states)
    dt, A, D = _arrays(tokens, (shape.D, shape.N), (shape.D,), dtype=jnp.float32)
    gate = _arrays(tokens) if shape.gated else ()

    def run(x, dt, A, B, C, D, gate=None, implementation=None):
        return pallas_kernels.selective_scan(x, dt, A, B, C, D, gate=gate, implementation=implementation)[0]

    return run, (x, dt, A, B, C, D, *gate)


def linear_attention(shape: linear_attention_shapes.Shape) -> Call:
    keys, values = (shape.B, shape.T, shape.G or shape.H, shape.K), (shape.B, shape.T, shape.H, shape.V)
    decays = {"channel": (*values[:3], shape.K), "token": values[:3], "head": (shape.H,)}
    floats = [decays[shape.decay]] if shape.decay in decays else []
    floats += [(shape.H, shape.K)] if shape.bonus else []

    def run(q, k, v, *floats, implementation=None):
        decay, bonus = floats[: shape.decay in decays], floats[shape.decay in decays :]
        options = {"bonus": bonus[0] if bonus else None, "implementation": implementation}
        return pallas_kernels.linear_attention(q, k, v, *decay, **options)[0]

    return run, _arrays(keys, keys, values) + _arrays(*floats, dtype=jnp.float32)


def delta_rule(shape: delta_rule_shapes.Shape) -> Call:
    keys, values = (shape.B, shape.T, shape.H, shape.K), (shape.B, shape.T, shape.H, shape.V)
    decay = {"none": [], "scalar": [keys[:3]], "vector": [keys]}[shape.decay]
    arguments = _arrays(keys, keys, values, keys, keys) + _arrays(*decay, dtype=jnp.float32)
    return _first(pallas_kernels.delta_rule), arguments


def wkv(shape: wkv_shapes.Shape) -> Call:
    arguments = _arrays(shape, shape) + _arrays((shape.D,), (shape.D,), dtype=jnp.float32)
    return _first(pallas_kernels.wkv), arguments


def _first(op: Callable) -> Callable:
    """The op without its final state."""
    return lambda *arguments, **options: op(*arguments, **options)[0]


def _arrays(*shapes: tuple[int, ...], dtype: Any = jnp.bfloat16) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(tuple(shape), dtype) for shape in shapes)


OPS = {
    "attention": Op(attention_shapes.REAL, attention, ("llama3 8b 8k", "llama3 8b decode 128k"), attention_api),
    "selective_scan": Op(
        selective_scan_shapes.REAL, selective_scan, ("mamba_1b_decode",), selective_scan_api, "chunked"
    ),
    "linear_attention": Op(
        linear_attention_shapes.REAL, linear_attention, ("mamba2_1b_decode",), linear_attention_api, "chunked"
    ),
    "delta_rule": Op(delta_rule_shapes.REAL, delta_rule, ("rwkv7_1b_decode",), delta_rule_api, "chunked"),
    "wkv": Op(wkv_shapes.REAL, wkv, ("rwkv4_1b_decode",), wkv_api),
}

PASSES = ("forward", "forward + backward")


def passes(shape: Any) -> tuple[str, ...]:
    """Of a shape of one token the forward pass alone: nobody trains on one token."""
    return PASSES if shape.T > 1 else PASSES[:1]


def program(op: Op, shape: Any, what: str, implementation: str | None = None) -> Call:
    """The function that is compiled: the call itself, or the call with the gradients of all its arguments."""
    run, arguments = op.call(shape)
    if implementation is not None:
        run = functools.partial(run, implementation=implementation)
    if what == "forward":
        return run, arguments

    def both(*arguments):
        *arguments, cotangent = arguments
        o, pullback = jax.vjp(run, *arguments)
        return o, pullback(cotangent)

    return both, (*arguments, jax.eval_shape(run, *arguments))
