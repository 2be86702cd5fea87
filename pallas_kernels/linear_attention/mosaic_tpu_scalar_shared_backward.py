"""One chunk of linear attention with one decay a head backward on a TPU, where heads share keys.

With W = scores * decays, q already times the scale, B = d_o * since and U = v * until, of one head

    dW = d_o v^T      dv = W^T d_o + until * (k dS)      dq = B S^T + d_scores k
    dk = U dS^T + d_scores^T q      dS <- q^T B + total * dS      d_scores = dW * decays

Log decays are summed up to what reads and to what is decayed; the gradients of these sums are the sums of dW * W over
the lines and over the columns, and what since, until and total add to them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.mosaic_tpu_scalar_decays import SUBLANES, Decays
from pallas_kernels.linear_attention.mosaic_tpu_scalar_parts import (
    beside,
    blocks,
    each,
    pairs,
    read,
    round_to,
    write,
)
from pallas_kernels.mosaic_tpu_blocks import Blocks, part
from pallas_kernels.mosaic_tpu_chunks import LANES
from pallas_kernels.mosaic_tpu_packs import spread


def scratch(chunk, block, step):
    length, keys, slots = chunk.length, chunk.pack.keys, chunk.slots(step)
    square = (length, length)
    return [
        *chunk.common_scratch(block, step),
        pltpu.VMEM((step, chunk.keyed, *square), jnp.float32),  # gradients of the scores
        pltpu.VMEM((step, keys, length), chunk.dtype),  # queries, turned
        beside(keys, step, length, dtype=chunk.dtype),  # keys
        pltpu.VMEM((step, length, keys), jnp.float32),  # gradients of queries
        pltpu.VMEM((step, length, keys), jnp.float32),  # and of keys
        pltpu.VMEM((slots, chunk.together * length, length), chunk.dtype),  # weights
        beside(chunk.together * length, slots, length, dtype=chunk.dtype),  # and turned
        pltpu.VMEM((slots, chunk.together, *square), chunk.dtype),  # decays between tokens
        pltpu.VMEM((slots, chunk.together, *square), jnp.float32),  # gradients of weights
        pltpu.VMEM((slots, 2, length, chunk.lanes), jnp.float32),  # gradients of the logarithms of since and until
        pltpu.VMEM((slots, 1, chunk.lanes), jnp.float32),  # and of what a state is decayed by at the end
        *[beside(chunk.tile, 2, length, dtype=chunk.dtype)] * 2,  # d_o * since and v * until, of two tiles
        *[beside(chunk.tile, chunk.together * length, dtype=chunk.dtype)] * 2,  # d_o and v, heads below one another
        pltpu.VMEM((step, chunk.keyed, 1 + chunk.exclusive, *square), chunk.dtype),  # gradients of scores that count
        pltpu.VMEM((3, length, chunk.tile), jnp.float32),  # products of a tile: W^T d_o, k dS and q S
        *([pltpu.VMEM(_columns(chunk, step), jnp.float32)] if chunk.decay == "token" else []),
    ]


def _columns(chunk, step):
    """The shape of the gradients of sums up to what reads and to what is decayed, one for each head."""
    return (step, 1 + chunk.exclusive, -(-chunk.pack.heads // LANES), chunk.length, LANES)


def backward(
    chunk, given, columns, scores, query, decays, total, rounded, d_scores, turned, all_keys, dq, dk, weights,
    weights_turned, betweens, d_weights, moved, d_last, reads, writes, outs, values_apart, masked, found_values,
    *d_columns,
):  # fmt: skip
    fixed, before, tokens, rows, d_state, d_o, d_fixed, d_tokens, d_rows = given
    step, pack, length = d_state.shape[0], chunk.pack, chunk.length
    of_decays = Decays(chunk, fixed, rows, columns)
    d_columns = d_columns[0] if d_columns else None
    count, alone = step * chunk.groups, Blocks()

    @pl.when(pl.program_id(2) == 0)
    def _():
        round_to(rounded, d_state)

    def begin(number):
        of_decays.turn(number)
        chunk.write_queries(number, tokens, query)
        for head in range(chunk.keyed):
            scores[number, head] = chunk.scores(number, head, fixed, tokens)
        turned[number] = read(query.at[number]).T
        write(all_keys.at[number], tokens.k[:, part(number, pack.keys, step)])
        if d_rows is not None:
            d_rows[number] = jnp.zeros_like(d_rows[number])

    def prepare(n):
        """Weights and decays of a group of heads."""
        number, first = chunk.of_step(n, step)
        slot = chunk.slot(n)
        for block in blocks(length):
            of_heads, since, until = of_decays.of_block(number, first, block)
            for h, between in enumerate(of_heads):
                weight = chunk.weights(scores[number, 0 if pack.shared else first + h, block], block, between)
                weights[slot, h * length + block.start : h * length + block.stop] = weight.astype(chunk.dtype)
                if chunk.decay == "token":
                    betweens[slot, h, block] = between.astype(chunk.dtype)
            if chunk.decay == "token":
                decays[slot, 0, block], decays[slot, 1, block] = since, until
        for h in range(chunk.together if chunk.tiles > 1 else 0):  # used more than once
            weights_turned[slot, h] = weights[slot, h * length : (h + 1) * length].T
        if chunk.decay == "token":
            total[slot] = of_decays.total(number, first)

    def add(ref, at, x, begins):
        """Adds, but for the first to what may be anything."""
        ref[at] = x if begins is True else jnp.where(begins, x, x + ref[at])

    def prepare_tile(m):
        prepare_from(m, d_o, 0, outs, reads)
        prepare_from(m, tokens.v, 1, values_apart, writes)

    def prepare_from(m, given, what, below, decayed):
        """Of d_o, or of the values: the heads below one another, and what is decayed since or until."""
        n, number, first, _, at = chunk.of_tile(m, step)
        write(below, chunk.apart(given[:, at]))
        for block in blocks(length):
            found = given[block, at]
            if chunk.decay == "head":
                found = found.astype(jnp.float32) * spread(of_decays.of_table(number, first, what, block), chunk.tile)
            if chunk.decay == "token":
                found = found.astype(jnp.float32) * spread(decays[chunk.slot(n), what, block], chunk.tile)
            write(decayed.at[m % 2, :, block], found)

    def of_tile(m):
        """The products of a tile."""
        n, number, first, lanes, at = chunk.of_tile(m, step)
        slot = chunk.slot(n)
        _, _, kept = chunk.decays_of(of_decays, decays, total, slot, number, first)
        decayed = kept is not None
        d_reads, written = reads.at[m % 2], writes.at[m % 2]
        first_of_heads = True if chunk.tiles == 1 else m % chunk.tiles == 0
        first_of_pack = m == 0 if step == 1 else m % (chunk.groups * chunk.tiles) == 0

        # Every operand is read where it is used, and not kept for where it is used again
        d_out = read(outs) if chunk.together == 1 else d_o[:, at]
        found = chunk.product(d_out, read(values_apart), (1, 1))
        for h in range(chunk.together):
            add(d_weights, (slot, h), found[:, h * length : (h + 1) * length], first_of_heads)
        add(dq, number, chunk.product(read(d_reads), before[number, :, lanes], (1, 1)), first_of_pack)
        if decayed:
            found_values[2] = chunk.product(read(query.at[number]), before[number, :, lanes], (1, 0))
        if chunk.tiles > 1:
            found_values[0] = chunk.product(read(weights_turned.at[slot]), read(outs), (1, 0))
        else:
            found_values[0] = chunk.product(weights[slot], read(outs), (0, 0))
        found_values[1] = chunk.product(read(all_keys.at[number]), rounded[number, :, lanes], (1, 0))
        add(dk, number, chunk.product(read(written), rounded[number, :, lanes], (1, 1)), first_of_pack)
        if decayed:
            found = _fold(chunk, d_state[number, :, lanes] * before[number, :, lanes].astype(jnp.float32))
            found = jnp.sum(found, axis=0, keepdims=True)
            add(d_last, slot, found if chunk.decay == "head" else found * kept[:, : chunk.lanes], first_of_heads)
        d_now, d_after = chunk.product(turned[number], read(d_reads), (1, 0)), d_state[number, :, lanes]
        d_now = chunk.within_heads(d_now + (d_after * kept if decayed else d_after), lanes)
        d_state[number, :, lanes], rounded[number, :, lanes] = d_now, d_now.astype(chunk.dtype)

    def finish_tile(m):
        """From a tile's products: the gradients of its values and of since and until."""
        n, number, first, _, at = chunk.of_tile(m, step)
        slot, table, last = chunk.slot(n), chunk.decay == "head", jnp.zeros((1, chunk.lanes), jnp.float32)
        first_of_heads = True if chunk.tiles == 1 else m % chunk.tiles == 0
        for block in blocks(length):
            d_written = found_values[1, block]
            if chunk.decay != "none":
                # Of the decays themselves where they are a table, else of their logarithms
                of_since = d_o[block, at] if table else read(reads.at[m % 2, :, block])
                of_since = _fold(chunk, found_values[2, block] * of_since.astype(jnp.float32))
                of_until = tokens.v[block, at] if table else read(writes.at[m % 2, :, block])
                of_until = _fold(chunk, d_written * of_until.astype(jnp.float32))
                if table or chunk.exclusive:
                    add(moved, (slot, 0, block), of_since, first_of_heads)
                    add(moved, (slot, 1, block), of_until, first_of_heads)
                else:
                    add(moved, (slot, 0, block), of_since - of_until, first_of_heads)
                if not table:
                    last += jnp.sum(of_until, axis=0, keepdims=True)
                until = of_decays.of_table(number, first, 1, block) if table else decays[slot, 1, block]
                d_written *= spread(until, chunk.tile)
            d_tokens.v[block, at] = (found_values[0, block] + d_written).astype(d_tokens.v.dtype)
        if chunk.decay == "token":
            d_last[slot] += last

    def finish(n, slot):
        """From the gradients of the weights of a group of heads: those of scores and decays."""
        number, first = chunk.of_step(n, step)
        for h in range(chunk.together):
            head, own = first + h, None
            key = 0 if pack.shared else head
            down = jnp.zeros((1, length), jnp.float32)
            for block in blocks(length):
                d_weight = d_weights[slot, h, block]
                if chunk.decay == "none":
                    add_score(number, key, block, d_weight)
                    continue
                if chunk.decay == "token":
                    between = betweens[slot, h, block].astype(jnp.float32)
                else:
                    between = fixed.between[number, of_decays.rows_of_table(0, head, block)]
                score = scores[number, key, block]
                if chunk.exclusive:
                    i = jax.lax.broadcasted_iota(jnp.int32, score.shape, 0) + block.start
                    own = i == jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
                d_score = d_weight * between
                add_score(number, key, block, d_score if own is None else jnp.where(own, d_weight, d_score))
                if chunk.decay == "head":
                    d_between = d_weight * score
                    d_between = d_between if own is None else jnp.where(own, 0.0, d_between)
                    d_fixed.between[number, of_decays.rows_of_table(0, head, block)] += d_between
                    continue
                flow = d_score * score
                flow = flow if own is None else jnp.where(own, 0.0, flow)
                down += jnp.sum(flow, axis=0, keepdims=True)
                column = _lane_sum(flow, _of_head(chunk, h, moved[slot, 0, block]))
                write_column(number, int(chunk.exclusive), head, block, column)
                if chunk.exclusive:
                    write_column(number, 0, head, block, -_lane_sum(_of_head(chunk, h, moved[slot, 1, block])))
            if chunk.decay == "token":
                lane = jax.lax.broadcasted_iota(jnp.int32, down.shape, 1)
                row = jnp.where(lane == length - 1, _lane_sum(_of_head(chunk, h, d_last[slot])), 0.0) - down
                d_rows[number, pl.ds(of_decays.at(of_decays.parts - 1, head), 1)] = row
        if chunk.decay == "head":
            _add_tables(chunk, of_decays, d_fixed, number, first, moved.at[slot], d_last[slot])

    def add_score(number, key, block, x):
        d_scores[number, key, block] = x + d_scores[number, key, block] if pack.shared else x

    def write_column(number, table, head, block, x):
        tile, lane = (0, head) if d_columns.shape[2] == 1 else (head // LANES, head % LANES)
        at = number, table, tile, block
        lanes = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
        d_columns[at] = jnp.where(lanes == lane, x, d_columns[at])

    def turn(m):
        # Three tiles at once: what a first gave, a second's products, and the operands of a third
        finish_tile(jnp.maximum(m - 1, 0))
        if chunk.tiles == 1:
            finish(jnp.maximum(m - 1, 0), chunk.slot(m + 1))
        of_tile(m)
        following = jnp.minimum(m + 1, count * chunk.tiles - 1)
        if chunk.tiles == 1:
            prepare(following)
        prepare_tile(following)

    def prepare_first(groups):
        if chunk.tiles == 1:  # as if there had been a tile before the first
            for ref in (betweens, d_weights, moved, d_last):
                ref[1] = jnp.zeros_like(ref[1])
        if pack.shared and 0 in groups:
            d_scores[...] = jnp.zeros_like(d_scores)
        for n in groups:
            prepare(n)

    for number in range(step):
        alone(functools.partial(begin, number))
    for groups in pairs(count if chunk.tiles > 1 else 1):
        alone(functools.partial(prepare_first, groups))
    alone(lambda: prepare_from(0, d_o, 0, outs, reads))
    alone(lambda: prepare_from(0, tokens.v, 1, values_apart, writes))

    each(count * chunk.tiles, turn)
    alone(lambda: finish_tile(count * chunk.tiles - 1))

    def finish_last(groups):
        for n in groups:
            finish(n, chunk.slot(n))

    for groups in pairs(count) if chunk.tiles > 1 else [[count - 1]]:
        alone(functools.partial(finish_last, groups))
    for of_scores in (_mask_scores, _of_scores, _write_keys):
        of_scores = functools.partial(of_scores, chunk, fixed, query, all_keys, d_scores, masked, dq, dk)
        alone(functools.partial(of_scores, d_fixed, d_tokens))
    if chunk.decay == "token":
        alone(functools.partial(_turn_back, chunk, of_decays, d_columns, d_rows))


def _mask_scores(chunk, fixed, query, all_keys, d_scores, masked, dq, dk, d_fixed, d_tokens):
    """Gradients of the scores of what is seen, and with a bonus of what a token reads of itself."""
    for number in range(d_scores.shape[0]):
        for head in range(chunk.keyed):
            for block in blocks(chunk.length):
                found = d_scores[number, head, block]
                i = jax.lax.broadcasted_iota(jnp.int32, found.shape, 0) + block.start
                j = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
                seen = i > j if chunk.exclusive else i >= j
                masked[number, head, 0, block] = jnp.where(seen, found, 0.0).astype(chunk.dtype)
                if chunk.exclusive:
                    masked[number, head, 1, block] = jnp.where(i == j, found, 0.0).astype(chunk.dtype)


def _of_scores(chunk, fixed, query, all_keys, d_scores, masked, dq, dk, d_fixed, d_tokens):
    """What scores give to the gradients of queries, keys and the bonus."""
    pack = chunk.pack
    for number in range(d_scores.shape[0]):
        for head in range(chunk.keyed):
            seen, keys = masked[number, head, 0], read(all_keys.at[number])
            queries = pack.of_keys(head, read(query.at[number]))
            dq[number] += pack.of_keys(head, chunk.product(seen, keys, (1, 0)))
            dk[number] += chunk.product(seen, queries, (0, 0))
            if chunk.exclusive:
                own, bonus = masked[number, head, 1], fixed.bonus[number]
                of_keys = pack.of_keys(head, chunk.product(own, keys, (1, 0)))
                queries = queries.astype(jnp.float32)
                dq[number] += of_keys * bonus
                dk[number] += chunk.product(own, queries * bonus, (0, 0))
                d_fixed.bonus[number] += jnp.sum(of_keys * queries, axis=0, keepdims=True)


def _write_keys(chunk, fixed, query, all_keys, d_scores, masked, dq, dk, d_fixed, d_tokens):
    step = d_scores.shape[0]
    for number in range(step):
        at = part(number, chunk.pack.keys, step)
        for block in blocks(chunk.length):
            d_tokens.q[block, at] = (dq[number, block] * chunk.scale).astype(d_tokens.q.dtype)
            d_tokens.k[block, at] = dk[number, block].astype(d_tokens.k.dtype)


def _add_tables(chunk, of_decays, d_fixed, number, first, moved, d_last):
    def add(what, head, block, x):
        at = of_decays.rows_of_table(what, head, block)
        for start in range(0, chunk.lanes, LANES):  # the tables have 128, alike
            lanes = slice(0, min(LANES, chunk.lanes - start))
            d_fixed.wide[number, at, lanes] += x[:, start : start + lanes.stop]

    for h in range(chunk.together):
        for what in range(2):
            for block in blocks(chunk.length):
                add(what, first + h, block, _of_head(chunk, h, moved[what, block]))
        row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, chunk.lanes), 0)
        add(2, first + h, slice(0, SUBLANES), jnp.where(row == 0, _of_head(chunk, h, d_last), 0.0))


def _turn_back(chunk, of_decays, d_columns, d_rows):
    for number in range(d_rows.shape[0]):
        for table in range(of_decays.tables):
            for tile in range(d_columns.shape[2]):
                heads = min(LANES, chunk.pack.heads - tile * LANES)
                start = of_decays.at((table + 1) * of_decays.parts - 1, tile * LANES)
                d_rows[number, start : start + heads] += d_columns[number, table, tile].T[:heads]


def _of_head(chunk, h, x):
    """x `[., lanes]`, but 0 outside of the lanes of one of the heads that stand together."""
    if chunk.together == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= h * chunk.pack.value) & (lane < (h + 1) * chunk.pack.value), x, 0.0)


def _lane_sum(*parts):
    """The sum over the lanes of all, `[., 1]`."""
    if len({x.shape for x in parts}) <= 1:
        return jnp.sum(sum(parts[1:], parts[0]), axis=1, keepdims=True)
    return sum(jnp.sum(x, axis=1, keepdims=True) for x in parts)


def _fold(chunk, x):
    """The sum of the registers that lie beside one another, where all are of one head."""
    if chunk.together > 1 or x.shape[1] % LANES:
        return x
    return sum((x[:, start : start + LANES] for start in range(LANES, x.shape[1], LANES)), x[:, :LANES])
