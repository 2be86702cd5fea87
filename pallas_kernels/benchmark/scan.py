"""`python -m pallas_kernels.benchmark scan`: the recurrences of 1.3B models beside their rivals, and beside attention.

Milliseconds of a layer's recurrence, in bfloat16 (float32 on a CPU), in batches such that a call has 16,384 tokens, or one
row: ours; our chunked form in plain XLA; jax-linear-attention; flash-linear-attention; attention (16 heads of 128, causal,
what the default is here). "least" is the longer of two times: that of reading every input and writing every output
once, backward also reading the outputs' cotangent and writing the gradients, at the measured speed of a copy; and that
of the state's reads and writes (backward: twice as many again) at the measured speed of a matrix product.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import attention, devices
from pallas_kernels.benchmark import timing
from pallas_kernels.benchmark.scan_models import MODELS, Model, fla_function, inputs, jla_function

LENGTHS = tuple(1 << power for power in range(11, 19))
TOKENS = 16_384
MEASURED = "benchmark/measured"
OURS = ("mosaic_gpu", "mosaic_tpu")  # the first that supports a call is timed, or else the chunked form


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    length: int
    batch: int
    backward: bool

    @property
    def what(self) -> str:
        return "forward + backward" if self.backward else "forward"


def rows(lengths: tuple[int, ...], tokens: int = TOKENS) -> list[Row]:
    """8K first, then the longest, then the rest; forward and backward before forward alone. tokens: of a call, in as many
    rows as that takes."""
    first = [n for n in (8_192, max(lengths)) if n in lengths]
    order = [*dict.fromkeys([*first, *lengths])]
    return [
        Row(name, length, max(1, tokens // length), backward)
        for length in order
        for backward in (True, False)
        for name in MODELS
    ]


def measure(row: Row, peaks: dict[str, float]) -> dict[str, Any]:
    """Milliseconds of every form that can do it, and how ours compares. peaks: matrix products' and copies' rates."""
    found: dict[str, Any] = {"model": row.name, "tokens": row.length, "batch": row.batch, "pass": row.what}
    times = {}
    for form, call, wait in forms(row):
        name = "lcr" if form in OURS else form
        try:
            times[name] = timing.median_seconds(call, wait)
        except Exception as error:  # out of memory, or a rival that does not support it after all: the others go on
            found[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
        else:
            found[name] = float(f"{times[name] * 1e3:.4g}")
        if name == "lcr":
            found["by"] = form
    if "lcr" not in found and "chunked" in times:
        times["lcr"], found["lcr"], found["by"] = times["chunked"], found["chunked"], "chunked"
    found["unit"] = "ms"
    if "lcr" in times:
        for rival, seconds in times.items():
            if rival != "lcr":
                found[f"{rival} / lcr"] = round(seconds / times["lcr"], 2)
        found["least / lcr"] = round(least(row, peaks) / times["lcr"], 3)
    return found


def least(row: Row, peaks: dict[str, float]) -> float:
    """Seconds: see above."""
    model = MODELS[row.name]
    half = 4 if devices.current().platform == "cpu" else 2
    sizes = model.sizes(row.batch, row.length)
    read = sum((4 if name in model.floats else half) * _product(size) for name, size in sizes.items())
    written = half * row.batch * row.length * model.width
    size = 2 * read + 2 * written if row.backward else read + written
    flops = (3 if row.backward else 1) * model.flops * row.batch * row.length
    # the state's reads and writes are products of matrices in all but Mamba, where they are bound by memory anyway
    return max(size / peaks["copy"], 0.0 if row.name == "Mamba" else flops / peaks["matrix product"])


def summary(done: list[dict[str, Any]]) -> str:
    """From which length on each model's recurrence takes less time than attention, forward and backward."""
    lines = []
    for name in dict.fromkeys(row["model"] for row in done):
        of_model = [r for r in done if r["model"] == name and r["pass"] == "forward + backward" and "attention / lcr" in r]
        faster = sorted(r["tokens"] for r in of_model if r["attention / lcr"] > 1)
        if of_model:
            at = f"from {faster[0]:,} tokens on" if faster else f"at no length up to {max(r['tokens'] for r in of_model):,}"
            lines.append(f"{name}: less time than attention {at}")
    return "\n".join(lines)


def forms(row: Row) -> Iterator[tuple[str, Callable[[int], Any], Callable[[Any], Any]]]:
    """(name, call, wait) of each; see `timing.median_seconds`."""
    model = MODELS[row.name]
    dtype = jnp.dtype(jnp.float32 if devices.current().platform == "cpu" else jnp.bfloat16)
    names = tuple(model.sizes(row.batch, row.length))
    count = timing.sets_of(list(model.sizes(row.batch, row.length).values()), dtype.itemsize)
    sets = [tuple(inputs(model, row.batch, row.length, dtype, seed).values()) for seed in range(count)]
    functions = {}
    for name in (*OURS, "chunked"):
        function = functools.partial(model.run, implementation=name)
        if timing.supported(name, function, sets[0]):
            functions[name] = function
    if (theirs := jla_function(model, names)) is not None:
        functions["jla"] = theirs
    for name, function in functions.items():
        yield name, *_jax_call(row, function, sets)
    if (theirs := fla_function(model)) is not None:
        yield "fla", *_torch_call(row, model, *theirs)
    sizes = [(row.batch, row.length, 16, 128)] * 3
    yield "attention", *_jax_call(row, attention, timing.inputs(sizes, dtype, timing.sets_of(sizes, dtype.itemsize)))


def _jax_call(row: Row, function: Callable, sets: list) -> tuple[Callable[[int], Any], Callable[[Any], Any]]:
    cotangent = None
    if row.backward:
        o = jax.eval_shape(function, *sets[0])
        ((cotangent,),) = timing.inputs([o.shape], o.dtype, 1)
    run = jax.jit(functools.partial(timing.both, function) if row.backward else function)
    rest = (cotangent,) if row.backward else ()
    return lambda number: run(*sets[number % len(sets)], *rest), jax.block_until_ready


def _torch_call(
    row: Row, model: Model, function: Callable, wanted: tuple[str, ...]
) -> tuple[Callable[[int], Any], Callable[[Any], Any]]:
    import numpy as np
    import torch

    torch.cuda.empty_cache()  # what the row before held, which JAX may need

    def tensors(seed):
        for name, x in inputs(model, row.batch, row.length, jnp.dtype(jnp.bfloat16), seed).items():
            x = torch.from_numpy(np.asarray(x.astype(jnp.float32)))
            if name in ("q", "k") and model.repeat > 1:
                x = x.repeat_interleave(model.repeat, dim=2)
            half = torch.float32 if name in model.floats else torch.bfloat16
            yield name, x.to("cuda", half).requires_grad_(row.backward)

    sets = [dict(tensors(seed)) for seed in range(2)]
    calls = [[tensors[name] for name in wanted] for tensors in sets]

    def forward(number: int) -> Any:
        with torch.no_grad():
            return function(*calls[number % 2])[0]

    cotangent = torch.randn_like(forward(0))

    def both(number: int) -> Any:
        arguments = calls[number % 2]
        return torch.autograd.grad(function(*arguments)[0], arguments, cotangent, allow_unused=True)

    return both if row.backward else forward, lambda _: torch.cuda.synchronize()


def _product(size: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, size, 1)
