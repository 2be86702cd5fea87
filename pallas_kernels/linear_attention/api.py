"""The public function of linear attention: checks the call, chooses an implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import devices, dispatch
from pallas_kernels.linear_attention import chunked, loop, mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.mesh import Axes
from pallas_kernels.segments import without_padding


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H"] | Float[Array, "H"] | None = None,
    *,
    bonus: Float[Array, "H K"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Linear attention with decay: the recurrence of RetNet, Mamba-2, gated linear attention and RWKV-5 and -6.

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T          o_t = scale q_t S_t

    or, with a bonus u for the current token,             o_t = scale q_t (S_{t-1} + diag(u) k_t v_t^T)

    q, k, v: one dtype, `[B, T, G, K]`, `[B, T, G, K]` and `[B, T, H, V]`; any T >= 1. H is G, or a multiple of it: then
        heads 0, 1, ..., H / G - 1 share the first q and k, and so on (the groups of Mamba-2), which the chunked form
        with scalar decay never repeats.
    log_decay: g, at most 0: `[B, T, H, K]` (one for each token and key channel), `[B, T, H]` (one for all channels),
        `[H]` (one for each head: a table made once, unless there are segment_ids) or None (no decay). -inf forgets
        everything.
    bonus: u, `[H, K]`, any float dtype; None: the token reads its own value as it reads those before.
    scale: of the output; `K ** -0.5` if None.
    initial_state: `[B, H, K, V]`, S before the first token; zeros if None.
    segment_ids: int32 `[B, T]`, see `pallas_kernels.segments`. Padding (0) neither decays nor writes the state and
        its output is 0; at a document boundary the state is forgotten; the first document continues
        `initial_state`.
    implementation: "reference" (token by token), "chunked" (matrix products over chunks of tokens),
        "loop_forward" (token by token, and chunked where a gradient is asked for), "mosaic_gpu" (kernels for Hopper:
        bfloat16 and float16, K of 64, 128, 192 or 256, V a multiple of 64), "mosaic_tpu" (kernels: bfloat16 and float32), or
        None: the fastest known that supports the call.

    Returns o `[B, T, H, V]` in v's dtype and the last S `[B, H, K, V]` in float32 (float64 for float64 inputs).
    Differentiable (reverse mode) in q, k, v, log_decay, bonus and initial_state, given cotangents of both outputs.

    Raises ValueError for shapes or dtypes that do not fit together and for an implementation that is not known
    or does not support the call.

    Sources: RetNet, arXiv 2307.08621, equations 5 to 7; Mamba-2, arXiv 2405.21060; gated linear attention, arXiv
    2312.06635, equation 3; RWKV-6 (bonus), arXiv 2404.05892, equation 19.
    """
    _check(q, k, v, log_decay, bonus, initial_state, segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    valid = None if segment_ids is None else segment_ids != 0
    if valid is not None:
        by_head = log_decay is None or log_decay.ndim == 1
        q, k, v = (without_padding(x, valid) for x in (q, k, v))
        log_decay = log_decay if by_head else without_padding(log_decay, valid)
    call = q, k, v, log_decay, initial_state, segment_ids, scale, bonus
    batch, length, heads, value_width = v.shape
    by_channel = log_decay is not None and log_decay.ndim == 4
    state_size = batch * heads * k.shape[-1] * value_width
    candidates = preferred(devices.current().platform, length, state_size, by_channel)
    o, state = dispatch.call("linear_attention", IMPLEMENTATIONS, implementation, candidates, AXES, *call)
    return o if valid is None else without_padding(o, valid), state


IMPLEMENTATIONS = {
    "reference": reference,
    "chunked": chunked,
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": mosaic_tpu,
    "loop_forward": dispatch.Implementation(dispatch.loop_forward(loop.run, chunked.run, scale_at=6)),
}

# Of q, k, v, log_decay (each of its forms), initial_state, segment_ids, scale and bonus; and of the results
AXES = Axes(
    "BTGK", "BTGK", "BTHV", ("BTHK", "BTH", "H"), "BHKV", "BT", "", "HK", results=("BTHV", "BHKV")
)  # fmt: skip


def preferred(platform: str, length: int, state_size: int, by_channel: bool) -> tuple[str, ...]:
    """What `implementation=None` stands for, the first that supports the call: given the platform, T, B H K V and
    whether each key channel has a decay of its own.

    Measured forward on two CPU cores, float32, T of 512 and 4,096 (which hardly matters), K = V of 32, 64 and 128, 1
    to 128 heads over 1 to 32 rows, the loop's time over the chunked form's. Up to 2^15 numbers of state (8 heads of 64,
    2 of 128) XLA runs the loop's body on one core: 0.4 to 0.9; 1.0 to 1.2 with one head, 0.85 to 1.15 with heads of 32.
    Beyond, both cores take part in every token and wait for each other: 0.9 to 2.8 with one decay a head, 0.95 to 2.2
    with one a channel. With one a head, or none, that is little beside the work again from 2^18 on: 0.7 to 1.3, from
    2^20 on 0.55 to 0.85; with one a channel 0.85 to 1.7. Forward and backward a token loop takes 7 to 11 times as long.
    """
    if platform == "cpu":
        loop = state_size <= 2**15 or (state_size >= 2**18 and not by_channel)
        return ("loop_forward",) if length > 1 and loop else ("chunked",)
    return (f"mosaic_{platform}", "chunked") if platform in ("gpu", "tpu") else ("chunked",)


def _check(q, k, v, log_decay, bonus, initial_state, segment_ids):
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q of shape {q.shape}: expected [B, T, G, K] with nothing empty")
    batch, length, groups, width = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k of shape {k.shape} with q of shape {q.shape}: expected the same shape")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % groups or 0 in v.shape:
        raise ValueError(
            f"v of shape {v.shape} with q of shape {q.shape}: expected [{batch}, {length}, H, V] with H = {groups}, or "
            "a multiple of it"
        )
    heads = v.shape[2]
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}: expected one float dtype; cast them")
    floats = {"log_decay": log_decay, "bonus": bonus, "initial_state": initial_state}
    dispatch.check_dtypes(floats, segment_ids)
    decays = {(batch, length, heads, width): "channel", (batch, length, heads): "token", (heads,): "head"}
    if log_decay is not None and log_decay.shape not in decays:
        known = ", ".join(f"{list(shape)} (one for each {what})" for shape, what in decays.items())
        raise ValueError(
            f"log_decay of shape {log_decay.shape} with q of shape {q.shape}: expected {known} or None"
        )
    if bonus is not None and bonus.shape != (heads, width):
        raise ValueError(f"bonus of shape {bonus.shape}: expected [H, K] = {[heads, width]}, as in q")
    expected = (batch, heads, width, v.shape[-1])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state of shape {initial_state.shape}: expected [B, H, K, V] = {list(expected)}")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids of shape {segment_ids.shape}: expected [B, T] = [{batch}, {length}]")
