"""The public function of the delta rule: checks the call, chooses an implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import devices, dispatch
from pallas_kernels.delta_rule import chunked, mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.mesh import Axes
from pallas_kernels.segments import without_padding


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The general delta rule: the recurrence of DeltaNet, Gated DeltaNet, Kimi delta attention and RWKV-7.

        S_t = (diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T          o_t = scale q_t S_t

    a reads the state before it decays. With d = exp(g), and beta or eta the model's learning rate:

        DeltaNet, S_t = (I - beta k k^T) S_{t-1} + beta k v^T             a = k,    b = -beta k,  v -> beta v
        gated or KDA, S_t = (I - beta k k^T) diag(d) S_{t-1} + beta k v^T  a = d k,  b = -beta k,  v -> beta v
        RWKV-7, S_t = (diag(d) - (kk eta) kk^T) S_{t-1} + k v^T            a = -kk,  b = kk eta

    q, k, a, b: one dtype, `[B, T, H, K]`; v: of that dtype, `[B, T, H, V]`; any T >= 1.
    log_decay: g, at most 0, any float dtype: `[B, T, H]` (one for all channels of a head), `[B, T, H, K]` (one for each
        key channel) or None (no decay). -inf forgets everything but what a reads.
    scale: of the output; `K ** -0.5` if None.
    initial_state: `[B, H, K, V]`, S before the first token; zeros if None.
    segment_ids: int32 `[B, T]`, see `pallas_kernels.segments`. Padding (0) leaves the state as it is and its output
        is 0; at a document boundary the state is forgotten; the first document continues `initial_state`.
    implementation: "reference" (token by token), "chunked" (matrix products over chunks of tokens), "mosaic_gpu" (kernels
        for Hopper: bfloat16 and float16, K and V multiples of 64 up to 256 and 512), "mosaic_tpu" (kernels: bfloat16 and
        float32), or None: the fastest known that supports the call.

    Returns o `[B, T, H, V]` in v's dtype and the last S `[B, H, K, V]` in float32 (float64 for float64 inputs).
    Differentiable (reverse mode) in q, k, v, a, b, log_decay and initial_state, given cotangents of both outputs.
    The state stays bounded only if the eigenvalues of diag(exp(g)) + b a^T do not exceed 1 in size: for a unit key,
    beta between 0 and 2.

    Raises ValueError for shapes or dtypes that do not fit together and for an implementation that is not known
    or does not support the call.

    Sources: arXiv 2406.06484 (DeltaNet, section 3), 2412.06464 (Gated DeltaNet), 2503.14456 (RWKV-7).
    """
    _check(q, k, v, a, b, log_decay, initial_state, segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = q, k, v, a, b, log_decay, initial_state, segment_ids, scale
    candidates = preferred(devices.current().platform)
    o, state = dispatch.call("delta_rule", IMPLEMENTATIONS, implementation, candidates, AXES, *call)
    return o if segment_ids is None else without_padding(o, segment_ids != 0), state


IMPLEMENTATIONS = {
    "reference": reference,
    "chunked": chunked,
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": mosaic_tpu,
}

# Of q, k, v, a, b, log_decay (each of its forms), initial_state, segment_ids and scale; and of the results
AXES = Axes(
    "BTHK", "BTHK", "BTHV", "BTHK", "BTHK", ("BTHK", "BTH"), "BHKV", "BT", "", results=("BTHV", "BHKV")
)  # fmt: skip


def preferred(platform: str) -> tuple[str, ...]:
    """What `implementation=None` stands for on a platform: the first that supports the call."""
    return (f"mosaic_{platform}", "chunked") if platform in ("gpu", "tpu") else ("chunked",)


def _check(q, k, v, a, b, log_decay, initial_state, segment_ids):
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q of shape {q.shape}: expected [B, T, H, K] with nothing empty")
    batch, length, heads, width = q.shape
    for name, x in (("k", k), ("a", a), ("b", b)):
        if x.shape != q.shape:
            raise ValueError(f"{name} of shape {x.shape} with q of shape {q.shape}: expected the same shape")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] == 0:
        raise ValueError(f"v of shape {v.shape} with q of shape {q.shape}: expected [{batch}, {length}, {heads}, V]")
    dtypes = [x.dtype for x in (q, k, v, a, b)]
    if len(set(dtypes)) > 1 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q, k, v, a, b of dtypes {', '.join(map(str, dtypes))}: expected one float dtype; cast them"
        )
    if log_decay is not None:
        if log_decay.shape not in (q.shape[:3], q.shape):
            raise ValueError(
                f"log_decay of shape {log_decay.shape} with q of shape {q.shape}: expected {list(q.shape[:3])} "
                f"(one for each token and head), {list(q.shape)} (one for each key channel) or None"
            )
    dispatch.check_dtypes({"log_decay": log_decay, "initial_state": initial_state}, segment_ids)
    expected = (batch, heads, width, v.shape[-1])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state of shape {initial_state.shape}: expected [B, H, K, V] = {list(expected)}")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids of shape {segment_ids.shape}: expected [B, T] = [{batch}, {length}]")
