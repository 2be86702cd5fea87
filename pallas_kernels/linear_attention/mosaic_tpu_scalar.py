"""One chunk of linear attention on a TPU with one decay for all channels of a head: the formulas of `chunked.py`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention import mosaic_tpu_scalar_backward as own_backward
from pallas_kernels.linear_attention import mosaic_tpu_scalar_shared_backward as shared_backward
from pallas_kernels.linear_attention.mosaic_tpu_scalar_decays import Decays
from pallas_kernels.linear_attention.mosaic_tpu_scalar_parts import (
    Given,
    beside,
    blocks,
    in_lockstep,
    read,
    round_to,
    write,
)
from pallas_kernels.mosaic_tpu_blocks import Blocks, part
from pallas_kernels.mosaic_tpu_chunks import LANES, product
from pallas_kernels.mosaic_tpu_packs import Pack, spread

WIDE = 256  # lanes of a tile at most


class Fixed(NamedTuple):
    """What all chunks have in common. bonus: `[1, keys]`. Of one decay for each head: between, `[heads x C, C]`, 0
    where i must not see j; wide, `[3 heads x C, 128]`, since, until and total (see `chunked.Decays`), alike in all
    lanes."""

    between: Any = None
    wide: Any = None
    bonus: Any = None


class Tokens(NamedTuple):
    q: Any
    k: Any
    v: Any


@dataclasses.dataclass(frozen=True)
class Chunk:
    """See `mosaic_tpu_chunks.Chunk`. decay: "none", "head" (in `fixed`) or "token" (in `rows`, see `Decays`).

    Values are worked on in tiles of lanes: of several heads that are narrow, or part of one. Work on a tile is cut into
    stages, each of a few tiles in a block of instructions beside other stages of other tiles; all stand at fixed places
    (stores to places that are not known beforehand hold up the loads after them).
    """

    pack: Pack
    decay: str
    scale: float
    exclusive: bool
    dtype: Any  # of the products' operands
    length: int

    @property
    def name(self):
        return "linear_attention_scalar"

    @property
    def tile(self) -> int:
        """Lanes of values: a part of those of one head, or whole heads."""
        value, values = self.pack.value, self.pack.values
        if value % LANES == 0:
            return WIDE if value % WIDE == 0 else LANES
        return LANES if LANES % value == 0 and values % LANES == 0 else values

    @property
    def lanes(self) -> int:
        """Of what is alike in all lanes of a head: one register, if that can stand for all of a tile."""
        alike = self.tile % LANES == 0 and (self.together == 1 or self.tile == LANES)
        return LANES if alike else self.tile

    @property
    def together(self) -> int:
        """Heads of a tile."""
        return max(1, self.tile // self.pack.value)

    @property
    def tiles(self) -> int:
        """Of the heads that stand together."""
        return self.together * self.pack.value // self.tile

    @property
    def groups(self) -> int:
        """Of heads that stand together."""
        return self.pack.heads // self.together

    def output(self, block):
        tokens = block[2]
        return jax.ShapeDtypeStruct((self.length, self.pack.values), tokens.v.dtype)

    def scratch(self, block, step, *, backward):
        if backward:
            return (shared_backward if self.pack.shared else own_backward).scratch(self, block, step)
        square, slots, of_weights = (self.length, self.length), step * self.groups, self.together * self.length
        return [
            pltpu.VMEM(self.columns_shape(block, step), jnp.float32),
            pltpu.VMEM((step, *square), jnp.float32),  # scores, where heads share them
            beside(self.pack.keys, step, self.length, dtype=self.dtype),  # queries times the scale
            pltpu.VMEM((slots, 2, self.length, self.lanes), jnp.float32),  # decays since and until
            pltpu.VMEM((slots, 1, self.lanes), jnp.float32),  # and in all
            pltpu.VMEM((step, self.pack.keys, self.pack.values), self.dtype),  # the state, rounded
            pltpu.VMEM((step, self.pack.keys, self.length), self.dtype),  # keys, turned
            pltpu.VMEM((slots, self.length, of_weights), self.dtype),
            *([pltpu.VMEM((slots, self.length, self.tile), jnp.float32)] if self.tiles == 1 else []),
        ]

    def columns_shape(self, block, step):
        rows = LANES if self.decay != "token" else block[3].shape[0]
        return step, -(-rows // LANES), self.length, LANES

    def of_step(self, n, step):
        """Of the n-th group of heads: (the pack, the group's first head in it)."""
        pack, group = (0, n) if step == 1 else (n, 0) if self.groups == 1 else (n // self.groups, n % self.groups)
        return pack, group * self.together

    def of_tile(self, m, step):
        """Of the m-th tile: (the group of heads, the pack, the first head in it, lanes of the pack, lanes of all)."""
        n, t = (m, 0) if self.tiles == 1 else (m // self.tiles, m % self.tiles)
        pack, first = self.of_step(n, step)
        in_pack = self.groups * self.tiles
        lanes = part(m if step == 1 else 0 if in_pack == 1 else m % in_pack, self.tile, in_pack)
        return n, pack, first, lanes, part(m, self.tile, step * in_pack)

    def decays_of(self, of_decays, decays, total, slot, number, first):
        """since, until `[C, tile]` and total `[1, tile]` of a group; None where there is no decay."""
        if self.decay == "none":
            return None, None, None
        if self.decay == "head":
            whole = slice(0, self.length)
            since, until = (of_decays.of_table(number, first, what, whole) for what in range(2))
            found = since, until, of_decays.total(number, first)
        else:
            found = decays[slot, 0], decays[slot, 1], total[slot]
        return tuple(spread(x, self.tile) for x in found)

    def product(self, a, b, axes):
        return product(a, b, axes, self.dtype)

    def forward(
        self, fixed, state, tokens, rows, o, columns, scores, query, decays, total, rounded, keys, weights, *befores
    ):
        step, pack = state.shape[0], self.pack
        of_decays = Decays(self, fixed, rows, columns)
        count, alone = step * self.groups, Blocks()

        @pl.when(pl.program_id(2) == 0)
        def _():
            round_to(rounded, state)

        def turn_keys(number):
            keys[number] = tokens.k[:, part(number, pack.keys, step)].T

        def prepare(n):
            """Weights and decays of a group of heads."""
            number, first = self.of_step(n, step)
            heads = range(self.together)
            found = [scores[number] if pack.shared else self.scores(number, first + h, fixed, tokens) for h in heads]
            for block in blocks(self.length):
                betweens, since, until = of_decays.of_block(number, first, block)
                for h, between in enumerate(betweens):
                    weight = self.weights(found[h][block], block, between)
                    weights[n, block, h * self.length : (h + 1) * self.length] = weight.astype(self.dtype)
                if self.decay == "token":
                    decays[n, 0, block], decays[n, 1, block] = since, until
            if self.decay == "token":
                total[n] = of_decays.total(number, first)

        def before(m):
            """What a tile reads of the state before the chunk."""
            n, number, first, lanes, _ = self.of_tile(m, step)
            found = self.product(read(query.at[number]), rounded[number, :, lanes], (1, 0))
            since, _, _ = self.decays_of(of_decays, decays, total, n, number, first)
            return found if since is None else found * since

        def write_before(m):
            befores[0][m] = before(m)

        def read_tile(m):
            n, number, _, _, at = self.of_tile(m, step)
            if self.tiles > 1 and m % (self.groups * self.tiles) == 0:
                turn_keys(number)  # beside products
            out = self.product(weights[n], self.apart(tokens.v[:, at]), (1, 0))
            o[:, at] = (out + (befores[0][m] if befores else before(m))).astype(o.dtype)

        def write_tile(m):
            n, number, first, lanes, at = self.of_tile(m, step)
            _, until, kept = self.decays_of(of_decays, decays, total, n, number, first)
            values, last = tokens.v[:, at], state[number, :, lanes]
            if until is not None:
                values, last = values.astype(jnp.float32) * until, last * kept
            now = self.within_heads(self.product(keys[number], values, (1, 0)), lanes) + last
            state[number, :, lanes], rounded[number, :, lanes] = now, now.astype(self.dtype)

        def begin():
            for number in range(step):
                of_decays.turn(number)
                if pack.shared:
                    scores[number] = self.scores(number, 0, fixed, tokens)
                if self.tiles == 1:
                    self.write_queries(number, tokens, query)
                    turn_keys(number)

        def prepare_all(groups):
            for n in groups:
                prepare(n)
            for number in range(step if groups.start == 0 else 0):
                self.write_queries(number, tokens, query)

        alone(begin)
        if self.tiles == 1:
            # Weights of some tiles beside products of those before them. Neither are more of them in a block, nor does
            # one wait for both of its products, or a chip that has 256 x 256 matrix units runs out of registers.
            in_lockstep(alone, 2, count, [(prepare, 0), (write_before, 1), (read_tile, 2), (write_tile, 2)])
            return
        for start in range(0, count, 4):
            alone(functools.partial(prepare_all, range(start, min(start + 4, count))))
        in_lockstep(alone, 4, count * self.tiles, [(write_tile, 1), (read_tile, 0)])

    def backward(self, *references):
        kernel, count = shared_backward if self.pack.shared else own_backward, len(Given._fields)
        kernel.backward(self, Given(*references[:count]), *references[count:])

    def write_queries(self, number, tokens, query):
        """Times the scale."""
        at = part(number, self.pack.keys, query.shape[0])
        for block in blocks(self.length):
            write(query.at[number, :, block], tokens.q[block, at].astype(jnp.float32) * self.scale)

    def scores(self, number, head, fixed, tokens):
        """`[C, C]` of one head, 0 where a token is not seen; with a bonus, the tokens' own stand on the diagonal."""
        step = tokens.k.shape[1] // self.pack.keys
        keys, queries = (x[:, part(number, self.pack.keys, step)] for x in (tokens.k, tokens.q))
        of_head = self.pack.of_keys(head, queries)
        found = self.product(of_head, keys, (1, 1)) * self.scale
        if self.decay == "head" and not self.exclusive:
            return found  # decays between tokens are 0 there
        i = jax.lax.broadcasted_iota(jnp.int32, (self.length, self.length), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (self.length, self.length), 1)
        found = jnp.where(i > j if self.exclusive else i >= j, found, 0.0)
        if self.exclusive:
            own = self.product(of_head.astype(jnp.float32) * fixed.bonus[number], keys, (1, 1)) * self.scale
            found = jnp.where(i == j, own, found)
        return found

    def weights(self, found, block, between):
        """`[., C]`: scores times decays."""
        if between is None:
            return found
        if self.exclusive:
            i = jax.lax.broadcasted_iota(jnp.int32, found.shape, 0) + block.start
            between = jnp.where(i == jax.lax.broadcasted_iota(jnp.int32, found.shape, 1), 1.0, between)
        return found * between

    def apart(self, x):
        """`[C, tile]` to `[together x C, tile]`: the heads below one another, each 0 outside of its lanes."""
        if self.together == 1:
            return x
        bits = pltpu.bitcast(x, jnp.uint32)
        lane = jax.lax.broadcasted_iota(jnp.int32, bits.shape, 1)
        heads = [(lane >= h * self.pack.value) & (lane < (h + 1) * self.pack.value) for h in range(self.together)]
        heads = [pltpu.bitcast(jnp.where(own, bits, jnp.zeros_like(bits)), x.dtype) for own in heads]
        return jnp.concatenate(heads, axis=0)

    def within_heads(self, x, lanes):
        """Some lanes of a state, but 0 outside of the heads' blocks."""
        return self.pack.blocks(x, lanes if isinstance(lanes, slice) else slice(lanes.start, None))
