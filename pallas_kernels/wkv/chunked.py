"""WKV in chunks, in plain JAX: the sums of a few chunks at once, then their states, then all of them side by side.

The sums over a chunk's tokens are a reduction, without a loop. A short loop over the chunks turns them into the state
before each chunk, and from there the token loop runs over the positions of a chunk, with all chunks as its rows. That
computes twice what the token loop does, in fewer and larger steps. Only as many chunks are taken together as fill a
core's cache, one such block after another; the backward pass saves the state before each block and computes the block
again.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from pallas_kernels.segments import document_starts
from pallas_kernels.wkv.reference import WKVState, hold, level, step

# Measured on two busy CPU cores, forward and backward, for one row of 256 and 1024 channels: chunks of 16 to 64 tokens
# differ by no more than the noise, 128 takes longer; 2048 and 4096 elements take 1.2 to 3 times as long as 1024.
CHUNK = 64
ROW_ELEMENTS = 1024  # chunks are taken together up to this many elements of [chunks, B, D]


def run(k, v, log_decay, bonus, initial_state, segment_ids):
    """See `api.wkv`; arguments are checked and of one dtype there. Memory: a few arrays as large as k."""
    batch, length, width = k.shape
    chunk = min(CHUNK, length)
    chunks = min(max(ROW_ELEMENTS // (batch * width), 1), -(-length // chunk))  # in one block
    blocks = -(-length // (chunk * chunks))
    if segment_ids is None:
        valid, starts = jnp.ones((1, length), bool), jnp.zeros((1, length), bool)
    else:
        starts, valid = document_starts(segment_ids)

    def split(leaf):  # [B, T, ...] -> [blocks, C, chunks, B, ...]
        leaf = jnp.pad(leaf, ((0, 0), (0, blocks * chunks * chunk - length)) + ((0, 0),) * (leaf.ndim - 2))
        leaf = leaf.reshape(leaf.shape[0], blocks, chunks, chunk, *leaf.shape[2:])
        return jnp.moveaxis(leaf, (1, 3, 2), (0, 1, 2))

    @jax.checkpoint
    def block(state, tokens):
        before, after = _states(*tokens, log_decay, state)
        flags = (None, None) if segment_ids is None else tokens[2:]
        return after, _outputs(*tokens[:2], *flags, log_decay, bonus, before)

    tokens = (split(k), split(v), split(valid[..., None]), split(starts[..., None]))
    final_state, y = jax.lax.scan(block, hold(initial_state), tokens)
    y = jnp.moveaxis(y, (0, 1, 2), (1, 3, 2)).reshape(batch, -1, width)
    return y[:, :length], final_state


def _states(k, v, valid, starts, log_decay, state):
    """The state before each chunk, [chunks, B, D], and the last one; from k and v [C, chunks, B, D]."""
    index = jnp.cumsum(starts, axis=0)
    count = jnp.cumsum(valid, axis=0)
    following = (count[-1:] - count).astype(k.dtype)  # how many real tokens follow each one
    exponent = k + following * log_decay[None, None, None]
    exponent = jnp.where(valid & (index == index[-1:]), exponent, -jnp.inf)
    top = _finite(jnp.max(stop_gradient(exponent), axis=0))
    weight = jnp.exp(exponent - top[None])
    sums = WKVState(jnp.sum(weight * v, axis=0), jnp.sum(weight, axis=0), top)
    continues = index[-1] == 0
    decay = count[-1].astype(k.dtype) * log_decay[None, None]

    def add(state, chunk):
        sums, continues, decay = chunk
        held, own = jnp.where(continues, level(state), -jnp.inf), level(sums)
        top = stop_gradient(_finite(jnp.maximum(held + decay, own)))
        past, now = jnp.exp((held - top) + decay), jnp.exp(own - top)
        return WKVState(past * state.num + now * sums.num, past * state.den + now * sums.den, top), state

    final_state, before = jax.lax.scan(add, state, (sums, continues, decay))
    return before, final_state


def _finite(top):
    """0 instead of the -inf of no token at all."""
    return jnp.where(top > -jnp.inf, top, 0)


def _outputs(k, v, valid, starts, log_decay, bonus, state):
    """The token loop over the positions of a chunk, every row of every chunk being a row of its own."""

    @jax.checkpoint
    def one(state, token):
        return step(state, token, log_decay[None], bonus[None])

    chunk, chunks, batch, width = k.shape
    rows = jax.tree.map(lambda leaf: leaf.reshape(chunk, chunks * batch, leaf.shape[-1]), (k, v, valid, starts))
    state = jax.tree.map(lambda leaf: leaf.reshape(-1, width), state)
    return jax.lax.scan(one, state, rows)[1].reshape(k.shape)
