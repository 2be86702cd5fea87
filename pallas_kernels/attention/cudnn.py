"""cuDNN's fused attention, where it computes what is asked: `jax.nn.dot_product_attention`."""

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jaxtyping import Array, Float

from pallas_kernels import devices
from pallas_kernels.attention.options import Options
from pallas_kernels.attention.tiles import Index

GIVES_LOGSUMEXP = False  # JAX rounds it to the inputs' dtype, and drops its cotangent


def supports(q, k, v, slopes, index, options: Options) -> str | None:
    """None, or what about the call is not supported."""
    device = devices.current()
    if device.platform != "gpu" or device.interpreted or "NVIDIA" not in device.kind:
        return f"by cuDNN needs an NVIDIA GPU, and this is {device.kind or device.platform}"
    if not _at_least("8.0"):
        return f"by cuDNN needs an Ampere GPU (compute capability 8.0) or a later one, and this is {device.kind}"
    if q.dtype not in ("bfloat16", "float16") or k.dtype != q.dtype:
        return f"by cuDNN is for bfloat16 or float16 throughout, and q is {q.dtype}, k {k.dtype}"
    if options.with_logsumexp:
        return "by cuDNN has no log-sum-exp in float32 with a gradient"
    if not options.plain or slopes is not None or options.soft_cap is not None or options.value_width is not None:
        return "by cuDNN has no ids, positions, block mask, slopes, soft cap or values that are part of the keys"
    if options.causal and q.shape[1] != k.shape[1]:
        return f"by cuDNN, causal, needs as many queries as keys, and there are {q.shape[1]} and {k.shape[1]}"
    if options.window is not None and not options.causal:
        return "by cuDNN has windows for causal calls alone"
    width, value_width = q.shape[-1], v.shape[-1]
    if width != value_width:
        return f"by cuDNN has keys and values of one width, and these are {width} and {value_width}"
    most = 256 if _at_least("9.0") else 128
    if width % 8 or width > most:
        return f"by cuDNN has widths that are multiples of 8 up to {most} here, and these are {width}"
    return None


def _at_least(capability: str) -> bool:
    """What JAX itself asks before it calls cuDNN (and `targets.tracing` answers for a GPU that is not here)."""
    return fused_attention_stablehlo.check_compute_capability(capability)


def run(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"] | None,
    slopes: Float[Array, "H"] | None,
    index: Index,
    options: Options,
) -> tuple[Float[Array, "B T H V"], None]:
    """See `api.attention`; without the log-sum-exp."""
    window = None if options.window is None else (options.window - 1, 0)
    o = jax.nn.dot_product_attention(
        q, k, v, scale=options.scale, is_causal=options.causal, local_window_size=window, implementation="cudnn"
    )
    return o, None
