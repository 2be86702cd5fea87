"""A chunk of the delta rule where the decays are mild (see `pallas_kernels.mild`): `chunked.py`'s formulas without them.

In the coordinates of the chunk's middle, with the rows R = (A; Q) of what reads and L = (B; K) of what is written, 2 C of
each, the masked table M = (M_a; M_q) of all R L^T, and W = (U; V) of all values written,

    (I - M_ab) U = A S + M_ak V          O = Q S + M_q W          S <- S + L^T W

One product each for the table and for what S gives and gets; backward likewise, with one inverse for both ways.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels import mild
from pallas_kernels.delta_rule.blocks import product, unit_inverse
from pallas_kernels.delta_rule.reference import Tokens


class Chunk(NamedTuple):
    """What forward and backward both need. P is 2 C."""

    scales: mild.Scales
    before: Float[Array, "B H K V"]  # the state before the chunk
    read: Float[Array, "B H P V"]  # R S
    rows: Float[Array, "B H P K"]
    columns: Float[Array, "B H P K"]
    table: Float[Array, "B H P P"]
    inverse: Float[Array, "B H C C"]  # of I - M_ab
    values: Float[Array, "B H P V"]
    masks: mild.Documents  # of the table, the rows and the columns


def forward(
    state: Float[Array, "B H K V"], tokens: Tokens, starts: Bool[Array, "B C"] | None
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H C V"]]:
    """The state after the chunk, and its outputs. tokens: `[B, H, C, ...]`, q scaled; starts: of documents, or None."""
    x, length = _chunk(state, tokens, starts), tokens.v.shape[2]
    o = x.read[:, :, length:] + product("zhij,zhjv->zhiv", x.table[:, :, length:], x.values)
    written = product("zhjk,zhjv->zhkv", _keep(x.masks.last, x.columns), x.values)
    return x.scales.last[..., None] * (_keep(x.masks.through, x.before) + written), o


def backward(state, tokens, starts, d_state, d_o):
    """The cotangents of state and tokens, given those of what `forward` returns."""
    x, length = _chunk(state, tokens, starts), tokens.v.shape[2]
    masks, scales = x.masks, x.scales
    d_state = scales.last[..., None] * d_state
    d_values = product("zhij,zhiv->zhjv", x.table[:, :, length:], d_o)
    d_values = d_values + product("zhjk,zhkv->zhjv", _keep(masks.last, x.columns), d_state)
    d_right = product("zhij,zhiv->zhjv", x.inverse, d_values[:, :, :length])  # of the system's right side
    d_v = d_values[:, :, length:] + product("zhij,zhiv->zhjv", x.table[:, :, :length, length:], d_right)
    d_read = jnp.concatenate([d_right, d_o], axis=2)
    d_table = _keep(masks.same, product("zhiv,zhjv->zhij", d_read, x.values))
    d_rows = product("zhij,zhjk->zhik", d_table, x.columns)
    d_rows = d_rows + _keep(masks.first, product("zhiv,zhkv->zhik", d_read, x.before))
    d_kept = _keep(masks.last, product("zhjv,zhkv->zhjk", x.values, d_state))  # of L as the state after the chunk has it
    d_columns = product("zhij,zhik->zhjk", d_table, x.rows) + d_kept
    d_state = _keep(masks.through, d_state)
    d_before = d_state + product("zhik,zhiv->zhkv", _keep(masks.first, x.rows), d_read)

    d_a, d_q = jnp.split(d_rows, 2, axis=2)
    d_b, d_k = jnp.split(d_columns, 2, axis=2)
    sooner, read = jnp.split(x.rows * d_rows, 2, axis=2)
    written = sum(jnp.split(x.columns * d_columns, 2, axis=2))
    after = jnp.sum(x.before * d_state, axis=-1) + jnp.sum(x.columns * d_kept, axis=2)
    moved = written, read, sooner, after
    if tokens.log_decay.shape[-1] == 1:  # one decay for all channels
        moved = (jnp.sum(each, axis=-1, keepdims=True) for each in moved)
    d_log_decay = mild.of_log_decay(*moved)
    d_tokens = Tokens(
        d_q * scales.reader, d_k * scales.writer, d_v, d_a * scales.sooner, d_b * scales.writer, d_log_decay
    )
    return scales.first[..., None] * d_before, d_tokens


def _chunk(state, tokens, starts) -> Chunk:
    q, k, v, a, b, log_decay = tokens
    length = v.shape[2]
    if starts is not None:
        log_decay = jnp.where(starts[:, None, :, None], jnp.zeros((), log_decay.dtype), log_decay)
    scales, masks = mild.scales(log_decay), _masks(starts, length)
    before = scales.first[..., None] * state
    rows = jnp.concatenate([a * scales.sooner, q * scales.reader], axis=2)
    columns = jnp.concatenate([b * scales.writer, k * scales.writer], axis=2)
    table = _keep(masks.same, product("zhik,zhjk->zhij", rows, columns))
    read = _keep(masks.first, product("zhik,zhkv->zhiv", rows, before))
    inverse = unit_inverse(table[:, :, :length, :length])
    right = read[:, :, :length] + product("zhij,zhjv->zhiv", table[:, :, :length, length:], v)
    values = jnp.concatenate([product("zhij,zhjv->zhiv", inverse, right), v], axis=2)
    return Chunk(scales, before, read, rows, columns, table, inverse, values, masks)


def _masks(starts, length):
    below, lower = (np.tril(np.ones((length, length), bool), offset) for offset in (-1, 0))
    mask = jnp.asarray(np.block([[below, below], [lower, lower]]))[None, None]
    if starts is None:
        return mild.Documents(mask, None, None, None)
    same, first, last, through = mild.documents(starts)
    first, last = (jnp.concatenate([each, each], axis=2) for each in (first, last))
    return mild.Documents(mask & jnp.tile(same, (1, 1, 2, 2)), first, last, through)


def _keep(mask, x):
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))
