"""The delta rule in Pallas kernels for Hopper GPUs (H100, H200), by Mosaic GPU: which calls they take, and the order.

Three stages (formulas in `mosaic_gpu_tables`): what the chunks are made into without the state, all at once; the state,
chunk after chunk; and the outputs, all at once again. The way back through the first is a kernel for one decay a head
or none; for decays of channels it is left to XLA. One token is a kernel of its own.

What forward reads and writes, in arrays of the size of q where K = V = 64: 19, for tables are 5 and states 1, written
and read, and v is read twice; the inputs and o are 6, which nothing can do without. Decays of channels are 2 more.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import devices, parts
from pallas_kernels.delta_rule import mosaic_gpu_vector
from pallas_kernels.delta_rule.mosaic_gpu_outputs import outputs
from pallas_kernels.delta_rule.mosaic_gpu_split import CHUNK
from pallas_kernels.delta_rule.mosaic_gpu_step import step
from pallas_kernels.delta_rule.mosaic_gpu_tables import tables
from pallas_kernels.delta_rule.parts import in_parts
from pallas_kernels.delta_rule.reference import first_state, mark_documents
from pallas_kernels.mosaic_gpu_states import states

WIDTHS = {"K": 256, "V": 512}  # at most


def supports(q, k, v, a, b, log_decay, initial_state, segment_ids, scale) -> str | None:
    """None, or what about the call is not supported."""
    device = devices.current()
    if not device.hopper:
        return f"by Mosaic GPU needs a Hopper GPU (H100, H200), and this is {device.kind or device.platform}"
    if q.dtype not in ("bfloat16", "float16"):
        return f"by Mosaic GPU is for bfloat16 or float16, and q is {q.dtype}"
    widest = WIDTHS
    if log_decay is not None and log_decay.ndim == 4:
        widest = WIDTHS | {"K": mosaic_gpu_vector.WIDEST}
    for (name, most), width in zip(widest.items(), (q.shape[3], v.shape[3]), strict=True):
        if width % 64 or width > most:
            return f"by Mosaic GPU has {name} that is a multiple of 64, up to {most}, and this is {width}"
    return None


def run(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """See `delta_rule`. Any T: the last chunk is filled up with tokens that change nothing. Long sequences of few heads go
    in parts (`parts.count`), in which a head's values are wider by its keys."""
    batch, length, heads, width = v.shape
    chains = batch * heads * -(-width // 128)  # blocks of the pass over the states
    count = parts.count(chains, length) if width + q.shape[3] <= WIDTHS["V"] else 1
    call = q, k, v, a, b, log_decay, initial_state, segment_ids, scale
    return in_parts(_run, count, *call) if count > 1 else _run(*call)


def _run(q, k, v, a, b, log_decay, initial_state, segment_ids, scale):
    tokens = mark_documents(q, k, v, a, b, log_decay, segment_ids)
    state, length = first_state(q, v, initial_state), q.shape[1]
    if length == 1:
        state, o = step(state, jax.tree.map(lambda x: x[:, 0], tokens), scale)
        return o[:, None], state
    if missing := -length % CHUNK:
        tokens = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))), tokens)
    made = tables(tokens.q, tokens.k, tokens.a, tokens.b, tokens.log_decay, scale)
    before, state = states(made.key, tokens.v, made.total, state, made.seen, made.back)
    return outputs(made.read, made.own, before, tokens.v)[:, :length], state
