"""References with parts beside one another, and loops over parts (see `mosaic_tpu_blocks`)."""

import functools
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu_blocks import Blocks, part
from pallas_kernels.mosaic_tpu_chunks import LANES
from pallas_kernels.mosaic_tpu_packs import side_by_side

LINES = 32


class Given(NamedTuple):
    """What `mosaic_tpu_chunks.Chunk.backward` is given."""

    fixed: Any
    before: Any
    tokens: Any
    rows: Any
    d_state: Any
    d_o: Any
    d_fixed: Any
    d_tokens: Any
    d_rows: Any


def beside(width: int, *shape: int, dtype):
    """Scratch for `[*shape, width]`, 128 lanes after the others: so 16 lines of bfloat16 are one load everywhere."""
    *most, lines = shape
    lanes = LANES if width % LANES == 0 else width
    return pltpu.VMEM((*most, width // lanes, lines, lanes), dtype)


def read(ref):
    return side_by_side([ref[n] for n in range(ref.shape[0])])


def write(ref, x):
    lanes = ref.shape[2]
    for n in range(ref.shape[0]):
        ref[n] = x[:, n * lanes : (n + 1) * lanes].astype(ref.dtype)


def round_to(rounded, x):
    """A state in the dtype of the products' operands."""
    size = next(size for size in (32, 16, 8, 1) if x.shape[1] % size == 0)

    def lines(number, n):
        at = part(n, size, x.shape[1] // size)
        rounded[number, at] = x[number, at].astype(rounded.dtype)

    for number in range(x.shape[0]):
        each(x.shape[1] // size, lambda n, number=number: lines(number, n))


def blocks(length: int) -> list[slice]:
    """Lines that are worked on at once where no matrix product is."""
    return [slice(start, start + LINES) for start in range(0, length, LINES)]


def each(count: int, body) -> None:
    """A loop, of which a single turn has a static index."""
    if count == 1:
        body(0)
    else:
        jax.lax.fori_loop(0, count, lambda n, _: body(n), None)


def pairs(count: int) -> list[range]:
    """What is worked on beside one another outside of loops: enough to fill the chip, and not its registers."""
    return [range(n, min(n + 2, count)) for n in range(0, count, 2)]


def in_lockstep(alone: Blocks, at_once: int, count: int, *blocks) -> None:
    """Every stage of 0 .. count - 1, in rounds of `at_once` of them. blocks: what a round consists of, each the stages
    that stand in a block, in their order: (a function of the number, by how many rounds it comes later)."""
    parts = [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]

    def run(stages, turn):
        for body, later in stages:
            for n in parts[turn - later] if 0 <= turn - later < len(parts) else ():
                body(n)

    for turn in range(len(parts) + max(later for stages in blocks for _, later in stages)):
        for stages in blocks:
            if any(0 <= turn - later < len(parts) for _, later in stages):
                alone(functools.partial(run, stages, turn))
