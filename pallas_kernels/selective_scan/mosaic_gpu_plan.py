"""How the Hopper kernels of the selective scan cut their work, and how a warpgroup holds it in its registers.

A block is one warpgroup and has 32 or 64 channels. Its states are a list of matrices [32 channels, 8 or 16 states]:
8 channels for each warp, 4 threads for each channel. A sum over states is then two exchanges between threads, and 4,096
channels are 128 blocks: one row of a batch fills a chip. With a thread for each channel it would fill a quarter of one.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices

F32 = jnp.float32
LINES = 32  # channels of one matrix of states
LARGEST_TILE = 32  # tokens; every tile's are a power of 2
WORDS = 32  # of 4 bytes, at least, in what is copied to shared memory: 1 for each thread

# Barriers are where the kernels say `barrier`, wait for copies, or say `commit_smem` before them; automatic ones, two
# for each store, would cost more than the recurrence. Between barriers a thread reads only what it wrote itself.
COMPILER = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
)


def barrier() -> None:
    """All threads have come here, and see what the others wrote to shared memory. (`commit_smem` waits for more.)"""
    if not devices.current().interpreted:  # a simulated warpgroup is one thread
        plgpu.inline_mgpu()(lambda context: mgpu.warpgroup_barrier())()


def matrix(columns: int, vector: int) -> Any:
    """The layout of matrices with so many columns, of which each thread has `vector` next to one another."""
    lines = 32 * vector // columns  # of a warp
    if lines == 1:
        tiling = plgpu.Tiling(((4, columns), (vector,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = plgpu.Tiling(((4 * lines, columns), (lines, columns), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def along_lines(x: jax.Array, columns: int, layout: Any) -> jax.Array:
    """One number per line, for every column."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (x.shape[0], columns), [0]), layout)


def along_columns(x: jax.Array, lines: int, layout: Any) -> jax.Array:
    """One number per column, for every line."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (lines, x.shape[0]), [1]), layout)


@dataclasses.dataclass(frozen=True)
class Plan:
    """channels: of a block. states: N, a power of 2 from 8 to 128. tokens: of a tile, what is copied at a time.

    together: tokens whose steps are one stretch of code; backward, their states are recomputed in registers.
    summed: backward, tokens whose sums over channels are made together.
    parts: of the sequence, each with blocks of its own; all but the last have `part_tiles` tiles.
    """

    channels: int
    states: int
    tokens: int
    together: int
    summed: int = 1
    parts: int = 1
    part_tiles: int = 0

    @property
    def vector(self) -> int:
        return 4 if self.states >= 16 else 2

    @property
    def columns(self) -> int:
        """Of a matrix of states."""
        return 4 * self.vector

    @property
    def lines(self) -> range:
        """First channels of the matrices of states."""
        return range(0, self.channels, LINES)

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """The first channel and state of each."""
        return [(r, n) for r in self.lines for n in range(0, self.states, self.columns)]

    @property
    def of_states(self) -> Any:
        return matrix(self.columns, self.vector)

    @property
    def of_channels(self) -> Any:
        """Of [tokens, channels]."""
        return matrix(self.channels, 4 if self.tokens >= 16 else 2)

    @property
    def of_weights(self) -> Any:
        """Of [tokens, N]."""
        return matrix(self.states, self.vector)

    @property
    def stretch(self) -> int:
        """Tokens of the smallest matrix [tokens, channels]."""
        return 4 * 32 * (4 if self.tokens >= 16 else 2) // self.channels

    def load(self, array: Any, block: Any) -> list[jax.Array]:
        """The block's part of [D, N] in global memory, in float32."""
        parts = self._cut(array, block)
        return [plgpu.load(part, layout=self.of_states, optimized=False).astype(F32) for part in parts]

    def load_row(self, array: Any, block: Any) -> dict[int, jax.Array]:
        """The block's part of [D] in global memory, float32 [32] by first channel."""
        first, layout = block * self.channels, self.of_states.reduce(1)
        parts = {r: array.at[pl.ds(first + r, LINES)] for r in self.lines}
        return {r: plgpu.load(part, layout=layout, optimized=False).astype(F32) for r, part in parts.items()}

    def load_exponents(self, A: Any, block: Any) -> list[jax.Array]:
        """The block's part of A, for exponents of 2."""
        return [a * math.log2(math.e) for a in self.load(A, block)]

    def store(self, array: Any, block: Any, values: list[jax.Array]) -> None:
        for part, value in zip(self._cut(array, block), values, strict=True):
            plgpu.store(part, value, optimized=False)

    def zeros(self) -> list[jax.Array]:
        zeros = plgpu.layout_cast(jnp.zeros((LINES, self.columns), F32), self.of_states)
        return [zeros] * len(self.matrices)

    def _cut(self, array, block):
        first = block * self.channels
        return [array.at[pl.ds(first + r, LINES), pl.ds(n, self.columns)] for r, n in self.matrices]

    def spread(self, values: dict[int, jax.Array]) -> list[jax.Array]:
        """Numbers [32] by first channel, for each matrix of states."""
        whole = {r: along_lines(value, self.columns, self.of_states) for r, value in values.items()}
        return [whole[r] for r, _ in self.matrices]

    def over_states(self, values: list[jax.Array]) -> dict[int, jax.Array]:
        """By first channel, [32]: the sums over states."""
        total = {}
        for (r, _), value in zip(self.matrices, values, strict=True):
            total[r] = total[r] + value if r in total else value
        return {r: value.sum(axis=1) for r, value in total.items()}

    def tiles_of(self, part: Any, tiles: int) -> tuple[Any, Any]:
        """The first tile of a part, and how many it has."""
        if self.parts == 1:
            return jnp.int32(0), jnp.int32(tiles)
        first = part * self.part_tiles
        return first, jnp.minimum(self.part_tiles, tiles - first)
