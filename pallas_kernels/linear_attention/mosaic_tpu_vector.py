"""One chunk of linear attention on a TPU with a decay for each key channel: see `mosaic_tpu_halving`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention.reference import as_log_decay
from pallas_kernels.mosaic_tpu_chunks import product
from pallas_kernels.mosaic_tpu_halving import (
    halvings,
    part_at,
    parting,
    second_halves,
    to_middle,
    with_second_halves,
)
from pallas_kernels.mosaic_tpu_packs import Pack, side_by_side


class Tokens(NamedTuple):
    q: Any
    k: Any
    v: Any
    log_decay: Any


@dataclasses.dataclass(frozen=True)
class Body:
    """The state stands on its side, `[values, keys]`, so that its decays lie along the lanes.

    fixed: the bonus `[1, keys]`, or None. rows: None, or `[8, C]`: whether a token reads the state and the tokens
    before it (1) or its own value alone (0)."""

    pack: Pack
    scale: float
    exclusive: bool
    dtype: Any  # of the products' operands

    @property
    def name(self):
        return "linear_attention_vector"

    def __call__(self, blocks):
        return [self.pack_of_heads(*block) for block in blocks]

    def pack_of_heads(self, fixed, state, tokens: Tokens, rows):
        pack, dtype = self.pack, self.dtype
        q, k = tokens.q.astype(jnp.float32), tokens.k.astype(jnp.float32)
        v, log_decay = tokens.v, as_log_decay(tokens.log_decay, np.dtype(np.float32))
        length = q.shape[0]
        # The queries of all heads below one another, so that one product makes all their scores
        own = self.heads_below(q if fixed is None else q * fixed)
        if rows is not None:
            q = q * rows.T[:, :1]
        read = self.heads_below(q)
        i = jax.lax.broadcasted_iota(jnp.int32, (read.shape[0], length), 0) & (length - 1)
        j = jax.lax.broadcasted_iota(jnp.int32, (read.shape[0], length), 1)
        scores, pairs = jnp.where(i == j, product(own, k, (1, 1), dtype), 0.0), parting(i, j)
        for size, sums in halvings(log_decay, self.exclusive):
            if size < length:
                decay = to_middle(sums, size)
                later = second_halves(read, size) * self.below(second_halves(decay, size))
                found = product(later, k * decay, (1, 1), dtype)
                parts = part_at(second_halves(pairs, size), size)
                scores = with_second_halves(scores, jnp.where(parts, found, second_halves(scores, size)), size)
        since, until, total = q * jnp.exp(sums.reading), k * jnp.exp(sums.rest), jnp.exp(sums.total[:1])

        def weights(head):
            return scores[head * length : (head + 1) * length]

        states, outs = [], []
        for lanes in pack.units:
            values, old = v[:, lanes], state[lanes]
            o = pack.by_head(lambda head, values=values: product(weights(head), values, (1, 0), dtype), lanes)
            outs.append(((o + product(since, old, (1, 1), dtype)) * self.scale).astype(v.dtype))
            written = pack.blocks(product(values, until, (0, 0), dtype), lanes, upright=False)
            states.append(total * old + written)
        return jnp.concatenate(states), side_by_side(outs)

    def heads_below(self, x):
        heads = [self.pack.of_keys(head, x) for head in range(self.pack.heads)]
        return heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=0)

    def below(self, x):
        return x if self.pack.heads == 1 else jnp.concatenate([x] * self.pack.heads, axis=0)


def rows_of_tokens(starts, chunk: int, packs: int):
    """`[B, packs, chunks, 8, C]`: 0 for tokens `[B, T]` that must not read the state that they find."""
    batch, length = starts.shape
    rows = jnp.where(starts, 0.0, 1.0).reshape(batch, 1, length // chunk, 1, chunk)
    return jnp.broadcast_to(rows, (batch, packs, length // chunk, 8, chunk))
