"""One chunk of linear attention with one decay a head backward on a TPU, where every head has keys of its own.

With W = scores * between, d_scores = (d_o v^T) * between and q already times the scale, of one head

    dq = since * (d_o S^T) + d_scores k      dv = W^T d_o + (until * k) dS
    dk = until * (v dS^T) + d_scores^T q     dS <- (since * q)^T d_o + total * dS

so that decays are met in the lanes of keys alone, and values and their cotangents are operands as they stand. What a
token reads goes with the exponential of its sum of log decays, what it writes with that of its negative: the gradients
of these sums are those of q dq and of k dk over the channels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.mosaic_tpu_scalar_decays import SUBLANES, Decays
from pallas_kernels.linear_attention.mosaic_tpu_scalar_parts import (
    beside,
    blocks,
    in_lockstep,
    read,
    round_to,
    write,
)
from pallas_kernels.linear_attention.mosaic_tpu_scalar_sums import Sums, fold, lane_sum, of_head, pieces
from pallas_kernels.mosaic_tpu_blocks import Blocks, part
from pallas_kernels.mosaic_tpu_chunks import LANES
from pallas_kernels.mosaic_tpu_packs import side_by_side, spread


class Scratch(NamedTuple):
    """Of the packs of heads of a step, `[step, ...]` each.

    columns: see `Decays`. rounded: the cotangent of the state after the chunk. queries: q times the scale. reads and
    writes: since * q and until * k; turned: reads, the tokens along the lanes. scores, d_weights: `[heads, C, C]`, as
    are weights, of which what reads lies along the lanes, and d_scores (of what is seen; d_scores_turned: those so).
    from_state: `[2, C, keys]`, d_o S^T and v dS^T. from_tokens: d_scores k and d_scores^T q. dv: what goes through the
    state. own: with a bonus, d_o v of a token and itself, in the lanes of its head's keys. d_last: `[groups of heads,
    1, lanes]`, the state before the chunk times the cotangent of that after it. sums: see `Sums`."""

    columns: Any
    rounded: Any
    queries: Any
    reads: Any
    writes: Any
    turned: Any
    scores: Any
    d_weights: Any
    weights: Any
    d_scores: Any
    d_scores_turned: Any
    from_state: Any
    from_tokens: Any
    dv: Any
    own: Any
    d_last: Any
    sums: Any


def scratch(chunk, block, step):
    length, pack = chunk.length, chunk.pack
    square = pack.heads, length, length
    operand = beside(pack.keys, step, length, dtype=chunk.dtype)
    return list(
        Scratch(
            columns=pltpu.VMEM(chunk.columns_shape(block, step), jnp.float32),
            rounded=pltpu.VMEM((step, pack.keys, pack.values), chunk.dtype),
            queries=operand,
            reads=operand,
            writes=operand,
            turned=pltpu.VMEM((step, pack.keys, length), chunk.dtype),
            scores=pltpu.VMEM((step, *square), jnp.float32),
            d_weights=pltpu.VMEM((step, *square), jnp.float32),
            weights=pltpu.VMEM((step, *square), chunk.dtype),
            d_scores=pltpu.VMEM((step, *square), chunk.dtype),
            d_scores_turned=pltpu.VMEM((step, *square), chunk.dtype),
            from_state=pltpu.VMEM((step, 2, length, pack.keys), jnp.float32),
            from_tokens=pltpu.VMEM((step, 2, length, pack.keys), jnp.float32),
            dv=pltpu.VMEM((step, length, pack.values), jnp.float32),
            own=pltpu.VMEM((step, length, pack.keys if chunk.exclusive else LANES), jnp.float32),
            d_last=pltpu.VMEM((step, chunk.groups, 1, chunk.lanes), jnp.float32),
            sums=Sums.scratch(chunk, step),
        )
    )


def backward(chunk, given, *references):
    stages = _Stages(chunk, given, Scratch(*references))
    alone, step = Blocks(), given.d_state.shape[0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        round_to(stages.scratch.rounded, given.d_state)

    # Every block has products to wait for beside what waits for none, and no more than fits a v6e's registers
    in_lockstep(
        alone, 1, step,
        [(stages.of_keys, 2), (stages.finish, 3), (stages.of_totals, 2), (stages.weigh, 1)],
        [(stages.prepare, 1), (stages.of_values, 2), (stages.meet, 0)],
    )  # fmt: skip


class _Stages:
    """What is done with a pack, one stage after another; each is called with the pack's number."""

    def __init__(self, chunk, given, scratch):
        self.chunk, self.given, self.scratch, self.pack = chunk, given, scratch, chunk.pack
        self.step = given.d_state.shape[0]
        self.decays = Decays(chunk, given.fixed, given.rows, scratch.columns)
        self.sums = Sums(chunk, self.decays, scratch.sums)

    def keys(self, number):
        return part(number, self.pack.keys, self.step)

    def prepare(self, number):
        """What reads and writes states."""
        tokens, scratch = self.given.tokens, self.scratch
        for block in blocks(self.chunk.length):
            q, k = (x[block, self.keys(number)].astype(jnp.float32) for x in (tokens.q, tokens.k))
            q = q * self.chunk.scale
            since, until = self.decays.of_keys(number, block)
            write(scratch.queries.at[number, :, block], q)
            write(scratch.reads.at[number, :, block], q if since is None else q * since)
            write(scratch.writes.at[number, :, block], k if until is None else k * until)
        scratch.turned[number] = read(scratch.reads.at[number]).T

    def meet(self, number):
        """Products of tokens with tokens; first of all, so that decays are there for what follows."""
        chunk, tokens, scratch = self.chunk, self.given.tokens, self.scratch
        self.decays.turn(number)
        for group in range(chunk.groups):
            lanes = part(number * chunk.groups + group, chunk.together * self.pack.value, self.step * chunk.groups)
            found = chunk.product(self.given.d_o[:, lanes], chunk.apart(tokens.v[:, lanes]), (1, 1))
            for h in range(chunk.together):
                of_head = found[:, h * chunk.length : (h + 1) * chunk.length]
                scratch.d_weights[number, group * chunk.together + h] = of_head
        for head in range(self.pack.heads):
            scratch.scores[number, head] = chunk.scores(number, head, self.given.fixed, tokens)

    def weigh(self, number):
        """Weights, and the gradients of scores and of decays between tokens."""
        chunk, scratch = self.chunk, self.scratch
        weights = [[] for _ in range(self.pack.heads)]
        for block in blocks(chunk.length):
            owns = []
            for head in range(self.pack.heads):
                at = number, head, block
                score, d_weight, between = scratch.scores[at], scratch.d_weights[at], self.decays.between(*at)
                weights[head].append(chunk.weights(score, block, between).astype(chunk.dtype))
                i = jax.lax.broadcasted_iota(jnp.int32, score.shape, 0) + block.start
                j = jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
                d_score = d_weight if between is None else d_weight * between
                if chunk.decay != "head":  # of which those between tokens that are not seen are 0
                    d_score = jnp.where(i > j if chunk.exclusive else i >= j, d_score, 0.0)
                scratch.d_scores[at] = d_score.astype(chunk.dtype)
                if chunk.exclusive:
                    own = jnp.sum(jnp.where(i == j, d_weight, 0.0), axis=1, keepdims=True)
                    owns.append(jnp.broadcast_to(own, (own.shape[0], LANES)))
                if chunk.decay == "head":
                    d_between = d_weight * score
                    d_between = jnp.where(i == j, 0.0, d_between) if chunk.exclusive else d_between
                    self.given.d_fixed.between[number, self.decays.rows_of_table(0, head, block)] += d_between
            if chunk.exclusive:
                scratch.own[number, block] = self.decays.by_head(owns, self.pack.key, self.pack.keys)
        for head, parts in enumerate(weights):
            scratch.weights[number, head] = jnp.concatenate(parts).T
            scratch.d_scores_turned[number, head] = scratch.d_scores[number, head].T

    def of_keys(self, number):
        chunk, given, scratch, pack = self.chunk, self.given, self.scratch, self.pack
        values = part(number, pack.values, self.step)
        scratch.from_state[number, 0] = chunk.product(given.d_o[:, values], given.before[number], (1, 1))
        scratch.from_state[number, 1] = chunk.product(given.tokens.v[:, values], scratch.rounded[number], (1, 1))
        scratch.dv[number] = chunk.product(read(scratch.writes.at[number]), scratch.rounded[number], (1, 0))
        queries, keys = read(scratch.queries.at[number]), given.tokens.k[:, self.keys(number)]
        dq = dk = 0.0
        for head in range(pack.heads):
            d_scores = scratch.d_scores[number, head]
            dq += chunk.product(d_scores, pack.of_keys(head, keys), (1, 0))
            dk += chunk.product(scratch.d_scores_turned[number, head], pack.of_keys(head, queries), (1, 0))
        scratch.from_tokens[number, 0], scratch.from_tokens[number, 1] = dq, dk

    def of_totals(self, number):
        """The gradients of what states are decayed by."""
        chunk, given = self.chunk, self.given
        for tile in range(chunk.groups * chunk.tiles if chunk.decay != "none" else 0):
            group, (lanes, _) = tile // chunk.tiles, self.tile(number, tile)
            found = given.d_state[number, :, lanes] * given.before[number, :, lanes].astype(jnp.float32)
            found = jnp.sum(fold(found, chunk.lanes), axis=0, keepdims=True)
            d_last = self.scratch.d_last.at[number, group]
            d_last[...] = found if tile % chunk.tiles == 0 else found + d_last[...]

    def tile(self, number, tile):
        """Lanes of a tile of values, among those of the pack and of all."""
        tiles = self.chunk.groups * self.chunk.tiles
        return part(tile, self.chunk.tile, tiles), part(number * tiles + tile, self.chunk.tile, self.step * tiles)

    def of_values(self, number):
        """What goes by lanes of values: their gradients, and the cotangent of the state before the chunk."""
        chunk, given, scratch = self.chunk, self.given, self.scratch
        for tile in range(chunk.groups * chunk.tiles):
            group, (lanes, at) = tile // chunk.tiles, self.tile(number, tile)
            heads = range(group * chunk.together, (group + 1) * chunk.together)
            if chunk.together == 1:  # the same operand for both
                weights = jnp.concatenate([scratch.weights[number, group], scratch.turned[number]])
                found = chunk.product(weights, given.d_o[:, at], (1, 0))
                dv, now = found[: chunk.length], found[chunk.length :]
            else:
                weights = side_by_side([scratch.weights[number, head] for head in heads])
                dv = chunk.product(weights, chunk.apart(given.d_o[:, at]), (1, 0))
                now = chunk.product(scratch.turned[number], given.d_o[:, at], (1, 0))
            given.d_tokens.v[:, at] = (dv + scratch.dv[number, :, lanes]).astype(given.d_tokens.v.dtype)
            after = given.d_state[number, :, lanes]
            if chunk.decay != "none":
                after = after * spread(self.decays.total(number, group * chunk.together), chunk.tile)
            now = chunk.within_heads(now + after, lanes)
            given.d_state[number, :, lanes], scratch.rounded[number, :, lanes] = now, now.astype(chunk.dtype)

    def finish(self, number):
        """The gradients of queries and keys, and those of decays that come from them."""
        chunk, given, scratch, pack = self.chunk, self.given, self.scratch, self.pack
        at, last = self.keys(number), 0.0
        for block in blocks(chunk.length):
            q = read(scratch.queries.at[number, :, block]).astype(jnp.float32)
            k = given.tokens.k[block, at].astype(jnp.float32)
            dq, dk = scratch.from_state[number, 0, block], scratch.from_state[number, 1, block]
            if chunk.decay == "head":
                self.add_tables(number, 0, block, q * dq)
                self.add_tables(number, 1, block, k * dk)
            since, until = self.decays.of_keys(number, block)
            dq, dk = (dq, dk) if since is None else (dq * since, dk * until)
            if chunk.decay == "token":
                last += jnp.sum(k * dk, axis=0, keepdims=True)
            dq, dk = dq + scratch.from_tokens[number, 0, block], dk + scratch.from_tokens[number, 1, block]
            if chunk.decay == "token":
                self.put_sums(number, block, q * dq, k * dk)
            if chunk.exclusive:
                own, bonus = scratch.own[number, block], given.fixed.bonus[number]
                dq, dk = dq + own * k * bonus, dk + own * q * bonus
                given.d_fixed.bonus[number] += jnp.sum(own * q * k, axis=0, keepdims=True)
            given.d_tokens.q[block, at] = (dq * chunk.scale).astype(given.d_tokens.q.dtype)
            given.d_tokens.k[block, at] = dk.astype(given.d_tokens.k.dtype)
        if chunk.decay == "head":
            self.add_totals(number)
        if chunk.decay == "token":
            self.write_rows(number, last)

    def add_tables(self, number, what, block, x):
        """To the gradients of a table: x, in the lanes of keys."""
        for head in range(self.pack.heads):
            rows = self.decays.rows_of_table(what, head, block)
            for found in pieces(self.pack.of_keys(head, x)):
                self.given.d_fixed.wide[number, rows, : found.shape[1]] += found

    def add_totals(self, number):
        for head in range(self.pack.heads):
            rows = self.decays.rows_of_table(2, head, slice(0, 1))
            of_group = self.scratch.d_last[number, head // self.chunk.together]
            for found in pieces(of_head(self.chunk, head, of_group)):
                self.given.d_fixed.wide[number, rows, : found.shape[1]] += found

    def put_sums(self, number, block, of_reads, of_writes):
        heads = range(self.pack.heads)
        of_reads, of_writes = ([self.pack.of_keys(head, x) for head in heads] for x in (of_reads, of_writes))
        if self.chunk.exclusive:
            tables = [-x for x in of_writes], of_reads
        else:
            tables = ([x - y for x, y in zip(of_reads, of_writes, strict=True)],)
        for table, of_heads in enumerate(tables):
            found = [jnp.sum(x, axis=1, keepdims=True) for x in of_heads]
            self.sums.put(number, table, 0, block, found)

    def write_rows(self, number, last):
        chunk, d_rows = self.chunk, self.given.d_rows
        end, found = slice(chunk.length - SUBLANES, chunk.length), []
        row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)
        for head in range(self.pack.heads):
            group = head // chunk.together
            of_states = self.scratch.d_last[number, group] * self.decays.total(number, group * chunk.together)
            parts = self.pack.of_keys(head, last), of_head(chunk, head, of_states)
            found.append(jnp.where(row == SUBLANES - 1, lane_sum(*parts), 0.0))
        self.sums.put(number, 0, 0, end, found, add=True)
        d_rows[number] = jnp.zeros_like(d_rows[number])
        self.sums.add_to(d_rows, number)
