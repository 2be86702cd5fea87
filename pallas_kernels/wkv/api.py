"""The public `wkv`: checks the call, chooses an implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import devices, dispatch
from pallas_kernels.mesh import Axes
from pallas_kernels.segments import without_padding
from pallas_kernels.wkv import chunked, reference
from pallas_kernels.wkv.reference import WKVState

IMPLEMENTATIONS = {
    "reference": reference,
    "chunked": chunked,
    "loop_forward": dispatch.Implementation(dispatch.loop_forward(reference.run, chunked.run)),
}
# Of k, v, log_decay, bonus, initial_state (each of its leaves) and segment_ids; and of the results
AXES = Axes("BTD", "BTD", "D", "D", "BD", "BT", results=("BTD", "BD"))
FORGETS = -1e30  # what a log decay of -inf is taken for: nothing is left either, and its multiples are finite


def wkv(
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    log_decay: Float[Array, "D"],
    bonus: Float[Array, "D"],
    *,
    initial_state: WKVState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], WKVState]:
    """The weighted average over the past of RWKV-4 (arXiv 2305.13048, equation 14, and its appendix on stability).

        num_t = exp(g) num_{t-1} + exp(k_t) v_t        den_t = exp(g) den_{t-1} + exp(k_t)
        y_t = (num_{t-1} + exp(u + k_t) v_t) / (den_{t-1} + exp(u + k_t))

    in each channel by itself. No exponential overflows, whatever the size of k and u: the sums are held divided by
    exp(max), where max_t = max(max_{t-1} + g, k_t) is the largest exponent in them. (A decay that is too small to change
    max shrinks the sums; where it does so for long, with |k| above a thousand, a key is forgotten after 100 nats.)

    k: logarithms of the weights, v: what is averaged, `[B, T, D]`; any T >= 1.
    log_decay: g, at most 0, `[D]`; -inf forgets everything. bonus: u, `[D]`: the token's own further log weight.
    initial_state: the sums before the first token, a `WKVState(num, den, max)` of three `[B, D]`. Zero num and den are
        the sums of no token, whatever max is, and get no gradient; None: these. Other den must be above 0.
    segment_ids: int32 `[B, T]`, see `pallas_kernels.segments`. Padding (0) neither decays nor changes the sums and its
        output is 0; at a document boundary the sums are forgotten; the first document continues `initial_state`.
    implementation: "reference" (token by token), "chunked", "loop_forward" (token by token, and chunked where a
        gradient is asked for), or None: the fastest known.

    Computes in float32 (float64 if any argument is), whatever the dtypes given. Returns `(y, final_state)`: y
    `[B, T, D]` in v's dtype, final_state in the dtype of the computation. Differentiable (reverse mode) in every float
    argument, each leaf of `initial_state` included, given cotangents of y and of final_state's num and den; its max is
    a constant to the gradient, which loses nothing of whatever is computed from num exp(max) and den exp(max).

    Raises ValueError for shapes that do not agree, for arguments that are no floats, and for an unknown implementation.
    """
    _check(k, v, log_decay, bonus, initial_state, segment_ids)
    dispatch.check_dtypes({}, segment_ids)
    batch, length, width = k.shape
    arguments = {"k": k, "v": v, "log_decay": log_decay, "bonus": bonus}
    dtype = dispatch.compute_dtype(arguments | {"initial_state": initial_state})
    if initial_state is None:
        initial_state = WKVState(*[jnp.zeros((batch, width), dtype)] * 3)
    candidates = preferred(devices.current().platform, length)
    cast = [k, v, jnp.maximum(log_decay, FORGETS), bonus, initial_state]
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), cast)
    valid = None if segment_ids is None else segment_ids != 0
    if valid is not None:
        cast[:2] = (without_padding(a, valid) for a in cast[:2])
    y, final_state = dispatch.call("wkv", IMPLEMENTATIONS, implementation, candidates, AXES, *cast, segment_ids)
    return (y if valid is None else without_padding(y, valid)).astype(v.dtype), final_state


def preferred(platform: str, length: int) -> tuple[str, ...]:
    """What `implementation=None` stands for, given the platform and T."""
    # Measured on two busy CPU cores, float32, T = 4096, [B, D] from [1, 256] to [8, 1024]: forward the loop takes 0.4
    # to 0.7 of the chunked form's time; forward and backward it takes 0.9 to 1.7 times as long, and more memory.
    if length == 1:
        return ("reference",)
    return ("loop_forward",) if platform == "cpu" else ("chunked",)


def _check(k, v, log_decay, bonus, initial_state, segment_ids):
    if k.ndim != 3 or 0 in k.shape:
        raise ValueError(f"k: shape {k.shape}; expected [B, T, D] with nothing empty")
    batch, length, width = k.shape
    expected = {
        "v": (v, k.shape),
        "log_decay": (log_decay, (width,)),
        "bonus": (bonus, (width,)),
        "segment_ids": (segment_ids, (batch, length)),
    }
    if initial_state is not None:
        expected |= {f"initial_state.{name}": (leaf, (batch, width)) for name, leaf in initial_state._asdict().items()}
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name}: shape {array.shape}; expected {shape} beside k {k.shape}")
