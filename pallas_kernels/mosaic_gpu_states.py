"""The states before every chunk of a linear recurrence, by one kernel for Hopper GPUs.

Chunk-parallel forms (gated linear attention, arXiv 2312.06635, section 4; the delta rule, arXiv 2406.06484, section
3.2) do everything in parallel over chunks of tokens but this one thing, which goes from chunk to chunk:

    S_{c+1} = diag(total_c) S_c + keys_c^T values_c  [+ write_c^T (read_c S_c)]

The cotangents of the states obey the same recurrence from the last chunk to the first, with read and write exchanged.

A block owns a slice of V (and, where nothing is read, of K) of one head, and carries S^T in float32 in registers: V is
what the tensor cores have 64 lines for. So read_c S_c needs nothing of another warpgroup. Once a chunk S_c is rounded
in shared memory, where the copy to `before` and the product with read_c find it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import devices
from pallas_kernels import mosaic_gpu_products as products

CHUNK = 64
SIDE = products.LINES  # of V, for each warpgroup; K is a multiple of it too
SCALAR = 32  # so many copies of a number are fetched: 128 bytes is the least that is copied at once
STAGES = 3  # chunks in flight at most
COPIES = 2  # of the state, rounded: one is written while the other is on its way out
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def states(
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H V"],
    total: Float[Array, "B n H K_or_1"],
    initial: Float[Array, "B H K V"],
    read: Float[Array, "B T H K"] | None = None,
    write: Float[Array, "B T H K"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B n H K V"], Float[Array, "B H K V"]]:
    """The recurrence above for c = 0, ..., n - 1, with n = T / chunk: (before, last).

    keys, values, read, write: bfloat16 or float16, one dtype; read and write both or neither. K and V are multiples of
        64; T is one of the chunk, and that one of 32.
    total: float32, what remains of each line of the state over a chunk, or of all of it.
    initial: S_0, float32.

    Returns before, S_c in the operands' dtype, and last, S_n in float32. Differentiable once, in reverse, in all
    arrays. The state is float32 all along; the operands of products with it are rounded.
    """
    return _states(chunk, keys, values, total, initial, read, write)


def supports(key_width: int, value_width: int, dtype: Any) -> str | None:
    """None, or what about a call is not supported."""
    device = devices.current()
    if not device.hopper:
        return f"by Mosaic GPU needs a Hopper GPU (H100, H200), and this is {device.kind or device.platform}"
    if jnp.dtype(dtype) not in ("bfloat16", "float16"):
        return f"by Mosaic GPU is for bfloat16 or float16 throughout, and q is {jnp.dtype(dtype)}"
    if key_width % SIDE or value_width % SIDE or key_width > 256:
        return (
            f"by Mosaic GPU has key widths of 64, 128, 192 and 256 and value widths that are multiples of 64, and "
            f"these are {key_width} and {value_width}"
        )
    return None


def batched_product(formula: str, x: jax.Array, y: jax.Array) -> Float[Array, "..."]:
    """An einsum by XLA with float32 sums; of operands in float32 where a CPU simulates the GPU: it has no other."""
    if devices.current().interpreted:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _states(chunk, keys, values, total, initial, read, write):
    return recurrence(chunk, total, initial, products_of=(keys, values), read=read, write=write)


def _forward(chunk, keys, values, total, initial, read, write):
    before, last = _states(chunk, keys, values, total, initial, read, write)
    return (before, last), (keys, values, total, read, write, before)


def _backward(chunk, residuals, cotangents):
    keys, values, total, read, write, before = residuals
    d_before, d_last = cotangents
    after, d_initial = recurrence(
        chunk, total, d_last, added=d_before.astype(before.dtype), read=write, write=read, reverse=True
    )

    def chunks(x):
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:])

    def product(formula, x, y, like):
        return batched_product(formula, x, y).reshape(like.shape).astype(like.dtype)

    d_keys = product("bnchv,bnhkv->bnchk", chunks(values), after, keys)
    d_values = product("bnchk,bnhkv->bnchv", chunks(keys), after, values)
    d_total = (after.astype(jnp.float32) * before.astype(jnp.float32)).sum(axis=4)
    d_total = d_total if total.shape[3] > 1 else d_total.sum(axis=3, keepdims=True)
    d_read = d_write = None
    if read is not None:
        like = jnp.zeros(values.shape, values.dtype)
        was_read = product("bnchk,bnhkv->bnchv", chunks(read), before, like)
        d_was_read = product("bnchk,bnhkv->bnchv", chunks(write), after, like)
        d_write = product("bnchv,bnhkv->bnchk", chunks(was_read), after, write)
        d_read = product("bnchv,bnhkv->bnchk", chunks(d_was_read), before, read)
    return d_keys, d_values, d_total, d_initial, d_read, d_write


_states.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Plan:
    """chunk: tokens. width: of the slice of K. warpgroups: that compute, 64 of V each. stages: chunks in flight."""

    chunk: int
    width: int
    warpgroups: int
    stages: int
    reverse: bool

    @property
    def swizzle(self) -> int:
        return 128 if self.chunk % 64 == 0 else 64


def recurrence(
    chunk: int,
    total: Float[Array, "B n H K_or_1"],
    initial: Float[Array, "B H K V"],
    *,
    products_of: tuple[Float[Array, "B T G K"], Float[Array, "B T H V"]] | None = None,
    until: Float[Array, "B H nC"] | None = None,
    added: Float[Array, "B n H K V"] | None = None,
    read: Float[Array, "B T H K"] | None = None,
    write: Float[Array, "B T H K"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Array, "B n H K V"], Float[Array, "B H K V"]]:
    """S <- diag(total_c) S + added_c + write_c^T (read_c S) from `initial` for every chunk, in reverse the last first.

    products_of: keys and values, where keys_c^T values_c is what is added; heads may share keys (G divides H), and T
        need not be a multiple of the chunk. until: float32 factors of the values' tokens (n x chunk of them), if any.

    Returns S before (in reverse: after) each chunk, and the last S in float32.
    """
    batch, count, heads = total.shape[:3]
    width, value_width = initial.shape[2:]
    dtype = (products_of[0] if added is None else added).dtype
    plan = _plan(chunk, width, value_width, read is not None, reverse)
    matrix = functools.partial(products.matrix, dtype=dtype, swizzle=plan.swizzle)
    slots, lines = (plan.stages, chunk), plan.warpgroups * SIDE
    scalar = total.shape[3] == 1
    arrays = {
        "total": jnp.broadcast_to(total, (batch, count, heads, SCALAR)) if scalar else total,
        "initial": _cut(initial, plan.width),
        # A first step that the compiler does not know: see `products.nought`.
        "first": jnp.zeros(1, jnp.int32),
    }
    scratch = {"total": plgpu.SMEM((plan.stages, SCALAR if scalar else plan.width), jnp.float32)}
    if added is None:
        arrays |= dict(zip(("keys", "values"), products_of, strict=True))
        scratch |= {"keys": matrix(*slots, plan.width), "values": matrix(*slots, lines)}
    else:
        arrays["added"], scratch["added"] = added, matrix(plan.stages, plan.width, lines)
    if until is not None:
        arrays["until"], scratch["until"] = until, plgpu.SMEM(slots, jnp.float32)
    if read is not None:
        arrays |= {"read": read, "write": write}
        scratch |= {"read": matrix(*slots, width), "write": matrix(*slots, width)}
    own = dict(
        rounded=matrix(plan.warpgroups, COPIES, plan.width, SIDE),
        left=products.scratch(plan.warpgroups, chunk, dtype),
        here=plgpu.Barrier(num_arrivals=len(scratch), num_barriers=plan.stages),
        free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
    )

    def recurrent_states(*references):
        *inputs, before, last = references
        inputs = dict(zip(arrays, inputs, strict=True))

        def block(tiles, **own):
            _block(plan, heads // heads_of_keys, inputs, before, last, tiles, **own)

        pl.run_scoped(block, scratch, **own, collective_axes="warpgroup")

    heads_of_keys = heads if added is not None else products_of[0].shape[2]
    run = plgpu.kernel(
        recurrent_states,
        out_type=[
            jax.ShapeDtypeStruct((batch, count, heads, width, value_width), dtype),
            jax.ShapeDtypeStruct(arrays["initial"].shape, jnp.float32),
        ],
        # The last axes run fastest: blocks that share keys follow one another.
        grid=(batch, heads, width // plan.width, value_width // lines),
        grid_names=("row", "head", "key_slice", "value_slice"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    before, last = run(*arrays.values())
    return before, _join(last)


def _block(plan, group, inputs, before, last, tiles, *, rounded, left, here, free):
    row, head, key_slice, value_slice, warpgroup = (
        lax.axis_index(name) for name in ("row", "head", "key_slice", "value_slice", "warpgroup")
    )
    count, lines = before.shape[1], plan.warpgroups * SIDE
    channels = pl.ds(key_slice * plan.width, plan.width)

    def chunk_of(step):
        return count - 1 - step if plan.reverse else step

    @pl.when(warpgroup == plan.warpgroups)
    def fetch():
        columns = pl.ds(value_slice * lines, lines)

        def fetch_chunk(step, _):
            slot, chunk = lax.rem(step, jnp.int32(plan.stages)), chunk_of(step)
            tokens = pl.ds(chunk * plan.chunk, plan.chunk)
            where = {
                "total": (row, chunk, head, pl.ds(0, SCALAR) if inputs["total"].shape[3] == SCALAR else channels),
                "keys": (row, tokens, lax.div(head, jnp.int32(group)), channels),
                "values": (row, tokens, head, columns),
                "until": (row, head, tokens),
                "added": (row, chunk, head, channels, columns),
                "read": (row, tokens, head),
                "write": (row, tokens, head),
            }
            pl.when(step >= plan.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for name, tile in tiles.items():
                plgpu.copy_gmem_to_smem(inputs[name].at[where[name]], tile.at[slot], here.at[slot])

        lax.fori_loop(0, count, fetch_chunk, None)
        products.drain(free, plan.stages, 0, count)

    def compute(part):  # which warpgroup: known when traced, since it is where operands begin
        columns = pl.ds(part * SIDE, SIDE)
        own_left = products.of_warpgroup(left, part)
        value_tile = value_slice * plan.warpgroups + part

        def values_and_keys(slot):
            values = tiles["values"].at[slot, :, columns].transpose((1, 0))
            if "until" in tiles:
                until = plgpu.load(tiles["until"].at[slot], layout=products.PER_COLUMN)
                values = plgpu.layout_cast(plgpu.load(values, layout=TRANSPOSED), products.MATRIX)
                values = (values.astype(jnp.float32) * products.along_columns(until, values.shape)).astype(before.dtype)
            return values, tiles["keys"].at[slot]

        def read_and_write(own, slot):
            was_read = products.product(own.transpose((1, 0)), tiles["read"].at[slot].transpose((1, 0)))
            return was_read.astype(before.dtype), tiles["write"].at[slot]

        def decayed(slot, state):
            if tiles["total"].shape[1] == SCALAR:
                return state * tiles["total"][slot, 0]
            total = plgpu.load(tiles["total"].at[slot], layout=products.PER_COLUMN)
            return state * products.along_columns(total, state.shape)

        def visit(step, state):
            slot = lax.rem(step, jnp.int32(plan.stages)) if plan.stages > 1 else products.nought(step)
            chunk = chunk_of(step)
            own = rounded.at[part, lax.rem(step, jnp.int32(COPIES))]
            plgpu.wait_smem_to_gmem(COPIES - 1, wait_read_only=True)
            own.transpose((1, 0))[...] = plgpu.layout_cast(state.astype(before.dtype), TRANSPOSED)
            plgpu.commit_smem()
            place = before.at[row, chunk, head, channels, pl.ds(value_tile * SIDE, SIDE)]
            plgpu.copy_smem_to_gmem(own, place)
            plgpu.barrier_wait(here.at[slot])
            state = decayed(slot, state)
            if "added" in tiles:
                added = plgpu.load(tiles["added"].at[slot, :, columns].transpose((1, 0)), layout=TRANSPOSED)
                state = state + plgpu.layout_cast(added, products.MATRIX).astype(jnp.float32)
            terms = [values_and_keys(slot)] if "keys" in tiles else []
            terms += [read_and_write(own, slot)] if "read" in tiles else []
            state = products.added_all(state, terms, own_left)
            plgpu.commit_smem()  # what was read in the ordinary way is read before the next copy writes it
            plgpu.barrier_arrive(free.at[slot])
            return state

        state = plgpu.load(inputs["initial"].at[row, head, key_slice, value_tile], layout=products.MATRIX)
        state = lax.fori_loop(inputs["first"][0], count, visit, state)
        last[row, head, key_slice, value_tile] = state
        plgpu.wait_smem_to_gmem(0)

    for part in range(plan.warpgroups):
        pl.when(warpgroup == part)(functools.partial(compute, part))


def _plan(chunk, width, value_width, reads, reverse):
    """A slice of K of at most 128 (all of it where it is read): 64 registers of a thread for the state. Two warpgroups
    share the keys where there are as many slices of V and all fits."""
    part = width if reads else next(part for part in (128, 192, 64) if width % part == 0)
    for warpgroups in (2, 1):
        own = 2 * COPIES * warpgroups * part * SIDE
        each = 2 * max((3 if reads else 1) * chunk * part, part) + 2 * max(chunk, part) * warpgroups * SIDE
        stages = min(STAGES, (products.SHARED_MEMORY - own) // each)
        if value_width % (warpgroups * SIDE) == 0 and stages >= min(2, warpgroups):
            return Plan(chunk, part, warpgroups, stages, reverse)
    raise ValueError(f"a chunk of {chunk} tokens with keys {width} wide does not fit the shared memory")


def _cut(state, width):
    """Into the slices of the blocks, transposed: `[B, H, K / width, V / 64, 64, width]`."""
    batch, heads, keys, values = state.shape
    return state.reshape(batch, heads, keys // width, width, values // SIDE, SIDE).transpose(0, 1, 2, 4, 5, 3)


def _join(slices):
    batch, heads, key_slices, value_slices, _, width = slices.shape
    return slices.transpose(0, 1, 2, 5, 3, 4).reshape(batch, heads, key_slices * width, value_slices * SIDE)
