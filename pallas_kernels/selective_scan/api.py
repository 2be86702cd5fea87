"""The public `selective_scan`: shapes, choice of an implementation."""

from jaxtyping import Array, Float, Int

from pallas_kernels import devices, dispatch
from pallas_kernels.mesh import Axes
from pallas_kernels.selective_scan import chunked, mosaic_gpu, mosaic_tpu, reference

IMPLEMENTATIONS = {"reference": reference, "chunked": chunked, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}

# What is taken on a platform: the first that supports the call.
PREFERRED = {"cpu": ("chunked",), "gpu": ("mosaic_gpu", "chunked"), "tpu": ("mosaic_tpu", "chunked")}

# Of x, dt, A, B, C, D, initial_state, segment_ids and gate; and of the results
AXES = Axes("BTD", "BTD", "DN", "BTN", "BTN", "D", "BDN", "BT", "BTD", results=("BTD", "BDN"))


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, "D"] | None = None,
    *,
    gate: Float[Array, "B T D"] | None = None,
    initial_state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Diagonal state-space recurrence with input-dependent steps (Mamba, arXiv 2312.00752, algorithm 2).

        h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d]
        y_t[d]    = sum_n C_t[n] h_t[d, n] + D[d] x_t[d]

    or, with a gate z,

        y_t[d]    = silu(z_t[d]) (sum_n C_t[n] h_t[d, n] + D[d] x_t[d])          silu(z) = z / (1 + exp(-z))

    x:  inputs. dt: step sizes >= 0, after softplus. A: < 0, so that every decay lies in (0, 1].
    B, C: input and output weights of each token, shared by all channels. D: skip weights (None: no skip).
    gate: z, before its silu (None: no gate). The kernels read it where they write y, and nothing of y's size is kept
        for its gradient.
    initial_state: h before the first token (None: zero). segment_ids: see `pallas_kernels.segments`.
    implementation: "chunked", "reference", "mosaic_gpu", "mosaic_tpu", or None: the best one on this device that
        supports the call.

    Computes in float32 (float64 if any argument is), whatever the dtypes given. Returns `(y, final_state)`: y in
    x's dtype, final_state in the dtype of the computation. Differentiable (reverse mode) in every float argument, the
    kernels once; with a gate Hopper's backward rounds the cotangent times silu(z), and times silu'(z), to the dtypes of
    y and z. Memory: one chunk's [C, B, N, D] and, for the backward pass, a state per chunk; never [B, T, D, N].

    Raises: ValueError for shapes that do not agree, for arguments that are no floats, and for an unknown
    implementation.
    """
    if x.ndim != 3 or 0 in x.shape or A.ndim != 2 or 0 in A.shape:
        raise ValueError(f"x: shape {x.shape}, A: shape {A.shape}; expected [B, T, D] and [D, N] with nothing empty")
    batch, length, width = x.shape
    states = A.shape[-1]
    expected = {
        "dt": (dt, (batch, length, width)),
        "A": (A, (width, states)),
        "B": (B, (batch, length, states)),
        "C": (C, (batch, length, states)),
        "D": (D, (width,)),
        "gate": (gate, (batch, length, width)),
        "initial_state": (initial_state, (batch, width, states)),
        "segment_ids": (segment_ids, (batch, length)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name}: shape {array.shape}; expected {shape} beside x {x.shape} and A {A.shape}")
    dispatch.check_dtypes({}, segment_ids)
    floats = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "gate": gate, "initial_state": initial_state}
    dispatch.compute_dtype(floats)
    call = x, dt, A, B, C, D, initial_state, segment_ids, gate
    candidates = PREFERRED.get(devices.current().platform, ("chunked",))
    return dispatch.call("selective_scan", IMPLEMENTATIONS, implementation, candidates, AXES, *call)
