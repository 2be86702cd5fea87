"""`python -m pallas_kernels.benchmark attention`: ours beside cuDNN, PyTorch and jax-linear-attention on this device.

Inputs are random, in bfloat16 (float32 on a CPU); batches are such that a call has 16,384 tokens, or one row. TFLOP/s
count both products of the scores that are seen; a backward pass is 2.5 times a forward pass. Decoding is one token for
each of eight rows: GB/s count the cache, read once.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.attention import attention
from pallas_kernels.attention.shapes import Shape
from pallas_kernels.benchmark import timing

LENGTHS = tuple(1 << power for power in range(11, 18))
TOKENS = 16_384
MEASURED = "attention/measured"
OURS = ("mosaic_gpu", "mosaic_tpu", "chunked")  # the first that supports a call is timed
VARIANTS: dict[str, Callable[..., Shape]] = {
    "MHA 16 x 128, causal": functools.partial(Shape, H=16, G=16, K=128),
    "GQA 32 / 8 x 128, causal": functools.partial(Shape, H=32, G=8, K=128),
    "MHA 32 x 64, causal": functools.partial(Shape, H=32, G=32, K=64),
    "MLA 16 x 192 / 128, causal": functools.partial(Shape, H=16, G=16, K=192, V=128),
    "GQA 32 / 8 x 128, window 4K": functools.partial(Shape, H=32, G=8, K=128, window=4096),
    "MHA 16 x 128, full": functools.partial(Shape, H=16, G=16, K=128, causal=False),
    "GQA 32 / 8 x 64, causal": functools.partial(Shape, H=32, G=8, K=64),
}
# One token may as well see all keys: so cuDNN, which takes the first query for the first key, computes the same.
DECODING: dict[str, Callable[..., Shape]] = {
    "GQA 32 / 8 x 128, decoding": functools.partial(Shape, B=8, T=1, H=32, G=8, K=128, causal=False),
    "MLA 128 x 576 / 512, latent decoding": functools.partial(Shape, B=8, T=1, H=128, G=1, K=576, V=512, causal=False),
    "MHA 16 x 128, decoding": functools.partial(Shape, B=8, T=1, H=16, G=16, K=128, causal=False),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """backward: whether gradients are computed too. latent: values are the first channels of the keys."""

    name: str
    length: int
    shape: Shape
    backward: bool = False
    latent: bool = False

    @property
    def what(self) -> str:
        return "decoding" if self.shape.T == 1 else "forward + backward" if self.backward else "forward"

    @property
    def work(self) -> int:
        """Operations; bytes of the cache where one token is decoded."""
        if self.shape.T > 1:
            return round(self.shape.forward_flops * (3.5 if self.backward else 1))
        values = 0 if self.latent else self.shape.V or self.shape.K
        return 2 * self.shape.B * self.length * self.shape.G * (self.shape.K + values)


def rows(lengths: tuple[int, ...], tokens: int = TOKENS) -> list[Row]:
    """In the order of their importance: the aims at 16K and 128K, all lengths of the first variants, the others at 16K,
    the rest. tokens: of a call, in as many rows as that takes."""
    found = []
    for length in lengths:
        batch = max(1, tokens // length)
        for place, (name, shape) in enumerate(VARIANTS.items()):
            for backward in (False, True):
                where = (
                    0 if length == TOKENS and place < 2 else 1 if place == 0 else 2 if length == TOKENS else 3 + place
                )
                found.append((where, Row(name, length, shape(B=batch, T=length), backward)))
        for place, (name, shape) in enumerate(DECODING.items()):
            found.append(
                (
                    0 if length == max(lengths) and place < 2 else 1 + place,
                    Row(name, length, shape(S=length), latent="latent" in name),
                )
            )
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def measure(row: Row, peaks: dict[str, float]) -> dict[str, Any]:
    """Rates of every form that can do it, and how ours compares. peaks: matrix products' and copies' rates."""
    found: dict[str, Any] = {"call": row.name, "tokens": row.length, "batch": row.shape.B, "pass": row.what}
    unit, peak = ("GB/s", peaks["copy"]) if row.shape.T == 1 else ("TFLOP/s", peaks["matrix product"])
    scale = 1e9 if row.shape.T == 1 else 1e12
    rates = {}
    for form, call, wait in forms(row):
        name = "lcr" if form in OURS else form
        try:
            rates[name] = row.work / timing.median_seconds(call, wait)
        except Exception as error:  # out of memory, or a rival that does not support it after all: the others go on
            found[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
        else:
            found[name] = float(f"{rates[name] / scale:.4g}")
        if name == "lcr":
            found["by"] = form
    found["unit"] = unit
    for rival in rates:
        if rival != "lcr" and "lcr" in rates:
            found[f"lcr / {rival}"] = round(rates["lcr"] / rates[rival], 2)
    if "lcr" in rates:
        found["of peak"] = round(rates["lcr"] / peak, 3)
    return found


def forms(row: Row) -> Iterator[tuple[str, Callable[[int], Any], Callable[[Any], Any]]]:
    """(name, call, wait) of each; see `timing.median_seconds`."""
    shape = row.shape
    dtype = jnp.dtype(jnp.float32 if devices.current().platform == "cpu" else jnp.bfloat16)
    options = dict(shape.options) | ({"value_width": shape.V} if row.latent else {})
    sizes = [shape.q, shape.k] + ([] if row.latent else [shape.v])
    o = (*shape.q[:3], shape.v[3])
    sets = timing.inputs([*sizes, *[o] * row.backward], dtype, timing.sets_of(sizes, dtype.itemsize))
    functions = {}
    for name in (*OURS, "cudnn"):
        function = functools.partial(_attend, options=options, implementation=name)
        if timing.supported(name, function, sets[0][: len(sizes)]) and not (name in OURS and functions):
            functions[name] = function
    if (theirs := jax_linear_attention(row, sets[0])) is not None:
        functions["jla"] = theirs
    for name, function in functions.items():
        run = jax.jit(functools.partial(timing.both, function) if row.backward else function)
        yield name, lambda number, run=run: run(*sets[number % len(sets)]), jax.block_until_ready
    if (call := torch_sdpa(row)) is not None:
        yield "SDPA", *call


def _attend(q, k, v=None, *, options: dict[str, Any], implementation: str) -> jax.Array:
    return attention(q, k, v, **options, implementation=implementation)


def jax_linear_attention(row: Row, arguments: tuple[jax.Array, ...]) -> Callable | None:
    """The Hopper kernel of the package jax-linear-attention 0.1.0: causal calls alone."""
    if importlib.util.find_spec("jla") is None or row.shape.T == 1 or not row.shape.causal:
        return None
    from jla.ops.mosaic_gpu.attention import flash_attention
    from jla.ops.mosaic_gpu.attention import supported as why_not

    if why_not(*arguments[:3]) is not None:
        return None
    return functools.partial(flash_attention, sliding_window=row.shape.window)


def torch_sdpa(row: Row) -> tuple[Callable[[int], Any], Callable[[Any], Any]] | None:
    """PyTorch's scaled_dot_product_attention, by whichever of its kernels it takes, where it has CUDA."""
    if importlib.util.find_spec("torch") is None or row.shape.window is not None or row.latent:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()  # what the row before held, which JAX may need
    shape = row.shape
    sizes = [(b, h, t, d) for b, t, h, d in (shape.q, shape.k, shape.v)]
    count = timing.sets_of(sizes, 2)
    sets = [
        [torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=row.backward) for size in sizes]
        for _ in range(count)
    ]
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=shape.causal, enable_gqa=shape.H != shape.G
    )
    cotangent = torch.randn((*sizes[0][:3], sizes[2][3]), device="cuda", dtype=torch.bfloat16)

    def forward(number: int) -> Any:
        with torch.no_grad():
            return attend(*sets[number % count])

    def both(number: int) -> Any:
        return torch.autograd.grad(attend(*sets[number % count]), sets[number % count], cotangent)

    return both if row.backward else forward, lambda _: torch.cuda.synchronize()
