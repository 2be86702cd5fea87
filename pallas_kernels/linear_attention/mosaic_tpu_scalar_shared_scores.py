"""From the gradients of weights to those of scores and decays, and from these to those of queries and keys: the second
part of `mosaic_tpu_scalar_shared_backward`.

Log decays are summed up to what reads and to what is decayed; the gradients of these sums are the sums of d_scores *
scores over the lines and over the columns, and what since, until and total add to them.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.mosaic_tpu_scalar_decays import SUBLANES
from pallas_kernels.linear_attention.mosaic_tpu_scalar_parts import blocks, read
from pallas_kernels.linear_attention.mosaic_tpu_scalar_sums import Sums, by_sublanes, lane_sum, of_head, pieces
from pallas_kernels.mosaic_tpu_blocks import part


class Scores:
    """scratch: `mosaic_tpu_scalar_shared_backward.Scratch`."""

    def __init__(self, chunk, given, scratch, decays):
        self.chunk, self.given, self.scratch, self.decays = chunk, given, scratch, decays
        self.step = given.d_state.shape[0]
        self.sums = Sums(chunk, decays, scratch.sums)

    def of_group(self, n, slot):
        """Adds what the weights of the n-th group of heads give."""
        number, first = self.chunk.of_step(n, self.step)
        for h in range(self.chunk.together):
            if self.chunk.decay == "token":
                self.of_sums(number, first + h, h, slot)
            else:
                self.of_tables(number, first + h, h, slot)
        if self.chunk.decay == "head":
            self.add_tables(number, first, slot)

    def of_sums(self, number, head, h, slot):
        chunk, scratch = self.chunk, self.scratch
        down = jnp.zeros((SUBLANES, chunk.length), jnp.float32)
        for block in blocks(chunk.length):
            d_weight, between = scratch.d_weights[slot, h, block], scratch.between[slot, h, block].astype(jnp.float32)
            score = scratch.scores[number, block]
            d_score = d_weight * between
            scratch.d_scores[number, block] += d_score
            flow = d_score * score
            down += by_sublanes(flow)
            column = lane_sum(flow, of_head(chunk, h, scratch.moved[slot, 0, block]))
            self.sums.put_one(number, 0, head, block, column)
        down = jnp.sum(down, axis=0, keepdims=True)
        lane = jax.lax.broadcasted_iota(jnp.int32, down.shape, 1)
        row = jnp.where(lane == chunk.length - 1, lane_sum(of_head(chunk, h, scratch.d_last[slot])), 0.0) - down
        self.given.d_rows[number, pl.ds(self.decays.at(self.decays.parts - 1, head), 1)] = row

    def of_tables(self, number, head, h, slot):
        """Where decays are tables, or none."""
        chunk, scratch = self.chunk, self.scratch
        for block in blocks(chunk.length):
            d_weight = scratch.d_weights[slot, h, block]
            if chunk.decay == "head":
                rows = self.decays.rows_of_table(0, head, block)
                self.given.d_fixed.between[number, rows] += d_weight * scratch.scores[number, block]
                d_weight = d_weight * self.given.fixed.between[number, rows]
            scratch.d_scores[number, block] += d_weight

    def add_tables(self, number, first, slot):
        """since, until and total."""
        chunk, scratch = self.chunk, self.scratch

        def add(what, head, block, x):
            for found in pieces(x):
                rows = self.decays.rows_of_table(what, head, block)
                self.given.d_fixed.wide[number, rows, : found.shape[1]] += found

        for h in range(chunk.together):
            for what in range(2):
                for block in blocks(chunk.length):
                    add(what, first + h, block, of_head(chunk, h, scratch.moved[slot, what, block]))
            row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, chunk.lanes), 0)
            last = jnp.where(row == 0, of_head(chunk, h, scratch.d_last[slot]), 0.0)
            add(2, first + h, slice(0, SUBLANES), last)

    def mask(self):
        """Gradients of the scores of what is seen."""
        for number in range(self.step):
            for block in blocks(self.chunk.length):
                found = self.scratch.d_scores[number, block]
                i = jax.lax.broadcasted_iota(jnp.int32, found.shape, 0) + block.start
                seen = i >= jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
                self.scratch.masked[number, block] = jnp.where(seen, found, 0.0).astype(self.chunk.dtype)

    def multiply(self):
        """What scores give to the gradients of queries and keys."""
        scratch, product = self.scratch, self.chunk.product
        for number in range(self.step):
            d_scores = scratch.masked[number]
            scratch.dq[number] += product(d_scores, read(scratch.keys.at[number]), (1, 0))
            scratch.dk[number] += product(d_scores, read(scratch.queries.at[number]), (0, 0))

    def write(self):
        """The gradients of queries and keys."""
        d_tokens, scratch = self.given.d_tokens, self.scratch
        for number in range(self.step):
            at = part(number, self.chunk.pack.keys, self.step)
            for block in blocks(self.chunk.length):
                d_tokens.q[block, at] = (scratch.dq[number, block] * self.chunk.scale).astype(d_tokens.q.dtype)
                d_tokens.k[block, at] = scratch.dk[number, block].astype(d_tokens.k.dtype)

    def write_rows(self):
        for number in range(self.step):
            self.sums.add_to(self.given.d_rows, number)
