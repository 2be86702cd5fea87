"""Static cycles of our TPU attention beside JAX's own kernels at their best block sizes: `check --rivals`.

Counted from the compiler's schedule, of all Pallas kernels in a call (what XLA does around them is left out, as are
stalls), 8 heads of 128, causal, bfloat16:

    cycles = steps x (bundles of a step outside its tiles and what else is skipped on a condition)
           + rows of tiles x (bundles of that: it begins or ends a row)
           + sum over the tiles that are visited of the tile's bundles

steps: how often the loop over the grid runs, by its exit test: those in which nothing is seen are among them. tile: a
loop in the step, or what is skipped on a condition, that has matrix products. Where a step has two of them, the first
is for tiles of which all is seen, the second for those that the mask cuts. Where it has four, the first and the last
fill and drain the stages of a pipeline, and a tile before one that is cut goes with those that are. Where it has three,
the second is a loop of two pairs of tiles a turn, the first and the last fill and drain its two stages; what is skipped
inside of it begins a run of pairs with the same queries, and the other loops go over an outer tile's tiles of keys.
"""

import functools
import importlib
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.attention import api
from pallas_kernels.attention.shapes import Shape
from pallas_kernels.check.cases import PASSES, Call, Op, attention
from pallas_kernels.check.processes import compile_all
from pallas_kernels.commands import versions

LENGTHS = (4_096, 16_384)
SHAPES = {f"{length:,}": Shape(T=length, H=8, G=8, K=128) for length in LENGTHS}
FLASH = ((256, 512), (512, 512), (512, 1024), (1024, 512), (1024, 1024))  # queries, keys
SPLASH = (
    (512, 512, 512),
    (512, 1024, 512),
    (1024, 1024, 512),
    (1024, 1024, 1024),
    (1024, 2048, 512),
    (2048, 2048, 512),
)
OURS = "mosaic_tpu"


def flash(shape: Shape, queries: int, keys: int) -> Call:
    from jax.experimental.pallas.ops.tpu import flash_attention as module

    sizes = module.BlockSizes(
        block_b=1, block_q=queries, block_k_major=keys, block_k=keys,
        block_q_major_dkv=queries, block_q_dkv=queries, block_k_major_dkv=keys, block_k_dkv=keys,
        block_q_dq=queries, block_k_major_dq=keys, block_k_dq=keys,
    )  # fmt: skip
    return functools.partial(module.flash_attention, causal=True, block_sizes=sizes), _heads_first(attention(shape)[1])


def splash(shape: Shape, queries: int, keys: int, part: int) -> Call:
    """part: of the keys of a block, how many are computed at a time."""
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.splash_attention")
    sizes = module.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=part,
        block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=part, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = module.MultiHeadMask([module.CausalMask((shape.T, shape.T))] * shape.H)
    kernel = module.make_splash_mha_single_device(mask, block_sizes=sizes)
    return jax.vmap(kernel), _heads_first(attention(shape)[1])


def _heads_first(arrays: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((b, h, t, d), a.dtype) for a in arrays for b, t, h, d in [a.shape])


def ours(shape: Shape) -> Call:
    run, arguments = attention(shape)
    return functools.partial(run, implementation=OURS), arguments


OPS = {
    **({"lcr": Op(SHAPES, ours, ())} if OURS in api.IMPLEMENTATIONS else {}),
    **{
        f"flash {' x '.join(map(str, b))}": Op(SHAPES, functools.partial(flash, queries=b[0], keys=b[1]), ())
        for b in FLASH
    },
    **{
        f"splash {' x '.join(map(str, b))}": Op(
            SHAPES, functools.partial(splash, queries=b[0], keys=b[1], part=b[2]), ()
        )
        for b in SPLASH
    },
}


def compare(targets: list[Any], quick: bool, out: str | None) -> int:
    """Prints the table; 1 if a kernel of ours could not be counted. quick: 4,096 tokens, forward. out: for its rows."""
    groups = [(shape, what) for shape in SHAPES for what in PASSES][: 1 if quick else None]
    found: list[dict[str, Any]] = []
    print(
        "| target | tokens | pass | kernels | block sizes | cycles | of the best rival's | spills |\n|" + " --- |" * 8,
        flush=True,
    )
    for target in targets:
        for shape, what in groups:
            counted: list[dict[str, Any]] = []

            def keep(row: dict[str, Any], counted: list[dict[str, Any]] = counted) -> None:
                counted.append(count(row))
                print(
                    f"{' '.join(row[key] for key in ('target', 'op', 'shape', 'pass'))}: {row['seconds']} s",
                    file=sys.stderr,
                )

            compile_all(target, __name__, [(op, shape, what, None) for op in OPS], keep)
            report(counted)
            found += counted
    if out is not None:
        packages = versions(("jax", "jaxlib", "libtpu"))
        saved = {"date": time.strftime("%Y-%m-%d"), "versions": packages, "rows": found}
        Path(out).write_text(json.dumps(saved, indent=1) + "\n")
    if "lcr" not in OPS:
        print(f"\nno kernel of ours: attention has no implementation {OURS!r} here")
    failed = [row for row in found if row["cycles"] is None]
    for row in failed:
        named = " ".join(row[key] for key in ("target", "op", "shape", "pass"))
        print(f"not counted: {named}: {row['error'].splitlines()[0][:200]}")
    return int(any(row["op"] == "lcr" for row in failed))


def count(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its cycles; None where the compiler refused the kernel, as for want of VMEM."""
    kernels = row.get("kernels", [])
    try:
        counted = [cycles_of(kernel, SHAPES[row["shape"]], *tile_of(row["op"], kernel["name"])) for kernel in kernels]
        cycles = None if "error" in row else sum(counted)
    except ValueError as error:
        row, cycles = row | {"error": str(error)}, None
    spills = sum(kernel["spills"] + kernel["fills"] for kernel in kernels)
    named = {key: row[key] for key in ("target", "op", "shape", "pass", "kernels", "error") if key in row}
    return named | {"cycles": cycles, "spills": spills}


def cycles_of(kernel: dict[str, Any], shape: Shape, queries: int, keys: int) -> int:
    """See the module's docstring. Raises: ValueError for a kernel with other numbers of tiles in a step."""
    tiles, lines = kernel["tiles"], causal_tiles(shape.T, queries, keys)
    outside = kernel["step"] - sum(tiles) - kernel["optional"]
    if len(tiles) == 3:
        return kernel["steps"] * outside + shape.B * shape.H * _in_pairs(kernel, shape, lines, queries, keys)
    seen, whole = (sum(numbers) for numbers in zip(*lines, strict=True))
    before_whole = sum(max(number - 1, 0) for _, number in lines)
    visits = {
        0: (),
        1: (seen,),
        2: (whole, seen - whole),
        4: (len(lines), before_whole, seen - before_whole, len(lines)),
    }.get(len(tiles))
    if visits is None:
        raise ValueError(f"{kernel['name']}: {len(tiles)} parts of a step have matrix products; expected 0 to 4")
    inside = len(lines) * kernel["optional"] + sum(size * number for size, number in zip(tiles, visits, strict=True))
    return kernel["steps"] * outside + shape.B * shape.H * inside


def _in_pairs(kernel: dict[str, Any], shape: Shape, lines: list[tuple[int, int]], queries: int, keys: int) -> int:
    """Of a head, what is not in every step: see the module's docstring. lines: of `causal_tiles`."""
    together = int(re.findall(r"_(\d+)", kernel["name"])[2])
    outer = math.ceil(shape.T / (keys * together))
    runs = sum(math.ceil(seen / together) for seen, _ in lines)
    first, two_steps, last = kernel["tiles"]
    steps = sum(seen for seen, _ in lines) - outer  # the first pair of each outer tile is not one of the loop's
    once = first + last + (together - 1) * sum(kernel["others"])
    return outer * once + (steps * (two_steps - kernel["inside"]) + (runs - outer) * kernel["inside"]) // 2


def causal_tiles(length: int, queries: int, keys: int) -> list[tuple[int, int]]:
    """For each tile of queries, of how many tiles of keys a causal mask shows something, and of how many all."""
    lines = []
    for first in range(0, length, queries):
        last = min(first + queries, length) - 1
        lines.append((last // keys + 1, (first + 1) // keys))
    return lines


def tile_of(op: str, kernel: str) -> tuple[int, int]:
    """Queries and keys of a tile: ours, which differ forward and backward, stand in the kernel's name."""
    numbers = re.findall(r"_(\d+)_(\d+)", kernel)[0] if op == "lcr" else op.split(" ", 1)[1].split(" x ")[:2]
    queries, keys = (int(number) for number in numbers)
    return queries, keys


def report(rows: list[dict[str, Any]]) -> None:
    """Of the rows of a shape and pass: a line for each kind of kernel, at the block sizes with the fewest cycles."""
    best: dict[str, dict[str, Any]] = {}
    for row in sorted((row for row in rows if row["cycles"]), key=lambda row: row["cycles"]):
        best.setdefault(row["op"].split()[0], row)
    least = min((row["cycles"] for kind, row in best.items() if kind != "lcr"), default=math.nan)
    for kind, row in sorted(best.items(), key=lambda pair: list(OPS).index(pair[1]["op"])):
        tiles = dict.fromkeys(" x ".join(map(str, tile_of(row["op"], kernel["name"]))) for kernel in row["kernels"])
        sizes = ", ".join(tiles) if kind == "lcr" else row["op"].split(" ", 1)[1]
        numbers = f"{row['cycles']:,} | {row['cycles'] / least:.2f} | {row['spills']}"
        print(f"| {row['target']} | {row['shape']} | {row['pass']} | {kind} | {sizes} | {numbers} |", flush=True)
