"""What a TPU's attention kernels are specialised for, and the few operations that forward and backward share.

Scores are kept in base 2 (times log2 e): the hardware's exponential is that of 2. A visibility is computed from
documents and positions that broadcast against each other, whichever of queries and keys lie along the lanes.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tiles import Band

LANES = 128
NEVER = -1e30  # below every score, yet finite, so that a row that has seen nothing gives no NaN
LOG2_E = math.log2(math.e)
VMEM_LIMIT = 48 * 2**20  # bytes; the smallest fast memory among the generations aimed at holds 64 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """band: which distances are seen. by_document: whether documents have to be compared at all.

    scale, soft_cap: as in `api.attention`. value_width: V. precision: of the
    matrix products.
    """

    band: Band
    by_document: bool
    scale: float
    soft_cap: float | None
    value_width: int
    precision: jax.lax.Precision

    def product(self, a, b, contracted: tuple[int, int]):
        """A matrix product over one axis of each, in float32."""
        axes = (((contracted[0],), (contracted[1],)), ((), ()))
        return jax.lax.dot_general(a, b, axes, precision=self.precision, preferred_element_type=jnp.float32)

    def scores(self, products):
        """Scaled and capped scores in base 2; and their derivative in the products, but for the scale and the base."""
        if self.soft_cap is None:
            return products * (self.scale * LOG2_E), None
        bent = jnp.tanh(products * (self.scale / self.soft_cap))
        return bent * (self.soft_cap * LOG2_E), 1 - bent * bent

    def bias(self, slope, position, kv_position):
        """What ALiBi takes from a score, in base 2."""
        return slope * LOG2_E * (position - kv_position).astype(jnp.float32)

    def seen(self, document, kv_document, position, kv_position):
        conditions = [document == kv_document] if self.by_document else []
        if self.band.causal:
            conditions.append(kv_position <= position)
        if self.band.window is not None:
            conditions.append(kv_position > position - self.band.window)
        return functools.reduce(jnp.logical_and, conditions)


def row_of(array, batch: int):
    """The row of an array that serves row b of the batch: its only one, or its own."""
    return (lambda b: b) if array.shape[0] == batch else (lambda b: 0)


def in_main_memory(array):
    """An operand that the kernel copies itself, or None, kept where it is.

    XLA would have small ones in fast memory, and a copy from there is not the copy engine's work but the vector unit's.
    """
    return None if array is None else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def across_lanes(row):
    """`[1, n]` to `[n, 128]`, alike in all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def spread(column, like):
    """`[rows, 128]`, alike in all lanes, to the width of another array."""
    width = like.shape[1]
    repeated = jnp.tile(column, (1, pl.cdiv(width, LANES)))
    return repeated if width % LANES == 0 else repeated[:, :width]
