"""One chunk of the delta rule with one decay a head, or none, on a TPU: `chunked.py`'s formulas over references, in
stages small enough for the registers (see `mosaic_tpu_stages`)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.delta_rule import mosaic_tpu_scalar_backward
from pallas_kernels.delta_rule.mosaic_tpu_scalar_scratch import Forward, backward_shapes, forward_shapes
from pallas_kernels.delta_rule.mosaic_tpu_stages import (
    READ_UNITS,
    UNITS,
    blocks,
    by_head,
    by_keys_below,
    heads_of,
    in_units,
)
from pallas_kernels.delta_rule.mosaic_tpu_tables import (
    bind,
    make_tables,
    shapes_of_tables,
    solve,
    tall_product,
    whole_of,
    writing,
)
from pallas_kernels.mosaic_tpu_chunks import product
from pallas_kernels.mosaic_tpu_packs import Pack


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A `Chunk`. decay: "none", or "scalar", in `rows` (see `Gates`)."""

    pack: Pack
    decay: str
    scale: float
    dtype: Any  # of the products' operands

    @property
    def name(self):
        return f"delta_rule_{self.decay}"

    def output(self, block):
        return block[2].v

    def scratch(self, block, step, *, backward):
        _, state, tokens, _ = block
        length, (keys, values) = tokens.v.shape[0], state.shape
        own = (backward_shapes if backward else forward_shapes)(self, step, length, keys, values)
        return [shape for shape in (*shapes_of_tables(self, step, length, keys), *own) if shape is not None]

    def forward(self, fixed, state, tokens, rows, o, *scratch):
        step, keys, values = state.shape
        length = o.shape[0]
        tables, rest = bind(shapes_of_tables(self, step, length, keys), scratch)
        own = Forward(*rest)

        def until(one, gates):
            written = writing(tokens, one, keys).T
            if gates is not None:
                written = written.astype(jnp.float32) * by_keys_below(self.pack, gates.lying_until)
            own.until[one] = written.astype(self.dtype)

        make_tables(self, tokens, rows, tables, until)
        in_units(self.pack, step, UNITS, lambda unit: self.before(unit, state, tokens, tables, own))
        in_units(self.pack, step, UNITS, lambda unit: self.solved(unit, tables, own))
        in_units(self.pack, step, READ_UNITS, lambda unit: self.after(unit, state, tokens, tables, own, o))

    def backward(self, fixed, before, tokens, rows, d_state, d_o, d_fixed, d_tokens, d_rows, *scratch):
        mosaic_tpu_scalar_backward.run(self, before, tokens, rows, d_state, d_o, d_tokens, d_rows, scratch)

    def before(self, unit, state, tokens, tables, own):
        length = own.before.shape[0]
        found = product(tables.since[unit.one], state[unit.one, :, unit.own], (1, 0), self.dtype)
        own.before[:, unit.lanes] = found[:length]
        v = tokens.v[:, unit.lanes]

        def of_values(head):
            scores = tables.scores[unit.one * self.pack.heads + head, length:, :length]
            return product(scores, v, (1, 0), self.dtype)

        own.right[:, unit.lanes] = found[length:] + by_head(self.pack, of_values, unit)

    def solved(self, unit, tables, own):
        right = own.right[:, unit.lanes]

        def of_head(head):
            return solve(tables.inverse[unit.one * self.pack.heads + head], right, self.dtype)

        own.u[:, unit.lanes] = by_head(self.pack, of_head, unit).astype(self.dtype)

    def after(self, unit, state, tokens, tables, own, o):
        """With one product for the outputs and the state."""
        length, heads = o.shape[0], heads_of(self.pack, unit)
        written = jnp.concatenate([tokens.v[:, unit.lanes], own.u[:, unit.lanes]])
        scores = [tables.scores[unit.one * self.pack.heads + head, :length] for head in heads]
        found = tall_product(jnp.concatenate([*scores, own.until[unit.one]]), written, self.dtype)

        def of_head(head):
            return found[(head - heads[0]) * length : (head - heads[0] + 1) * length]

        out = own.before[:, unit.lanes] + by_head(self.pack, of_head, unit)
        o[:, unit.lanes] = (out * self.scale).astype(o.dtype)
        kept = state[unit.one, :, unit.own]
        if tables.whole is not None:
            kept = kept * whole_of(self.pack, tables, unit)
        state[unit.one, :, unit.own] = kept + blocks(self.pack, found[len(heads) * length :], unit)
