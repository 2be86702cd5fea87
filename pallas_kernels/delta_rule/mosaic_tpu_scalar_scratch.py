"""Scratch memory of the delta rule's chunks with one decay a head, or none, on a TPU, beside `mosaic_tpu_tables`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_rule.mosaic_tpu_tables import shapes_of_tables
from pallas_kernels.mosaic_tpu_chunks import LANES


class Forward(NamedTuple):
    """For each pack: k and b, decayed until the state after the chunk, `[keys, 2 C]`. What q reads of the state
    before it, `[C, values of all packs]`; what a reads before it writes, but for what that depends on; u."""

    until: Any
    before: Any
    right: Any
    u: Any


def forward_shapes(chunk, step, length, keys, values) -> Forward:
    return Forward(
        until=pltpu.VMEM((step, keys, 2 * length), chunk.dtype),
        before=pltpu.VMEM((length, step * values), jnp.float32),
        right=pltpu.VMEM((length, step * values), jnp.float32),
        u=pltpu.VMEM((length, step * values), chunk.dtype),
    )


class Backward(NamedTuple):
    """For each head: the scores and the inverse (in parts) transposed; the decays of what reads and of what writes,
    `[2 C, 128]`; the cotangents of the scores, times decays, and transposed; of the logarithm of its state's decay
    `[1, 128]`; sums of its scores' log decays, by what reads and by what writes. For each pack: what writes, decayed,
    and what reads, decayed, transposed; their cotangents. For each value, `[C or 2 C, values of all packs]`: r, u, the
    cotangents of v from the state and of u, dB; and `[keys, values of all packs]` what is added to the state's."""

    scores: Any
    inverse: Any
    reader: Any
    writer: Any
    of_scores: Any
    of_scores_lying: Any
    of_whole: Any
    of_readers: Any
    of_writers: Any
    until: Any
    since: Any
    of_since: Any
    of_until: Any
    right: Any
    u: Any
    of_v: Any
    of_u: Any
    read: Any
    state: Any


def backward_shapes(chunk, step, length, keys, values) -> Backward:
    heads, both, gated = step * chunk.pack.heads, 2 * length, chunk.decay == "scalar"
    parts = shapes_of_tables(chunk, step, length, keys).inverse.shape

    def vmem(*shape, dtype=jnp.float32):
        return pltpu.VMEM(shape, dtype)

    def exact(*shape):
        return pltpu.VMEM(shape, chunk.dtype)

    return Backward(
        scores=exact(heads, both, both),
        inverse=exact(*parts),
        reader=vmem(heads, both, LANES) if gated else None,
        writer=vmem(heads, both, LANES) if gated else None,
        of_scores=exact(heads, both, both),
        of_scores_lying=exact(heads, both, both),
        of_whole=vmem(heads, 1, LANES) if gated else None,
        of_readers=vmem(heads, 1, both) if gated else None,
        of_writers=vmem(heads, 1, both) if gated else None,
        until=exact(step, both, keys),
        since=exact(step, keys, both),
        of_since=vmem(step, both, keys),
        of_until=vmem(step, both, keys),
        right=vmem(length, step * values),
        u=exact(length, step * values),
        of_v=vmem(length, step * values),
        of_u=vmem(length, step * values),
        read=exact(both, step * values),
        state=vmem(keys, step * values),
    )
