"""The conformance suite on the device that is here: `python -m pallas_kernels.check --run`.

Every case by every implementation that supports it on this device, in the dtypes that the device is made for. The
memory that a result may come to lie in is filled with NaN before, so that what is never written shows; each case runs
twice, and nothing may differ.
"""

import time

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.attention import api, conformance
from pallas_kernels.tolerances import TOLERANCE

DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16", "float16"), "tpu": ("bfloat16", "float32")}
QUICK = ("ragged, grouped", "packed, window", "decode")
POISONED = 1 << 24  # bytes of a NaN array, where the device does not say how much memory it has


def run(quick: bool) -> int:
    """Prints a row for each case; 0 if all is right, else 1."""
    device = devices.current()
    print(f"{jax.devices()[0].device_kind} ({device.platform}), JAX {jax.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| implementation | dtype | case | errors | s |\n| --- | --- | --- | --- | --- |")
    wrong = unsupported = right = 0
    for implementation in api.IMPLEMENTATIONS:
        for dtype in DTYPES[device.platform] if implementation != "reference" else ():
            for name in QUICK if quick else conformance.CASES:
                start = time.perf_counter()
                try:
                    text, good = judge(conformance.CASES[name], implementation, jnp.dtype(dtype))
                except Exception as error:  # of whatever compiler: the other cases go on
                    if isinstance(error, ValueError) and str(error).startswith(f"implementation={implementation!r}"):
                        unsupported += 1
                        continue
                    text, good = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}", False
                right, wrong = right + good, wrong + (not good)
                seconds = time.perf_counter() - start
                print(f"| {implementation} | {dtype} | {name} | {text} | {seconds:.1f} |", flush=True)
    print(f"\n{right} right, {wrong} wrong, {unsupported} not supported by the implementation on this device")
    return 1 if wrong or not right else 0


def judge(case: conformance.Case, implementation: str, dtype: jnp.dtype) -> tuple[str, bool]:
    """Error and tolerance of every result, and whether all are within."""
    texts, good = [], True
    for what, error, kind in conformance.errors(case, implementation, dtype, poison=poison):
        within = error <= TOLERANCE[kind]
        good &= within
        if not (kind == "exact" and within):
            texts.append(f"{what} {error:.1e}{'' if within else ' WRONG'} (of {TOLERANCE[kind]:.0e})")
    return ", ".join(texts), good


def poison() -> None:
    """Fills half of the free memory with NaN, and gives it back."""
    stats = jax.devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 4 * POISONED) - stats.get("bytes_in_use", 0)
    piece = max(POISONED, free // 64)
    held = [jnp.full(piece // 4, jnp.nan, jnp.float32) for _ in range(free // 2 // piece)]
    jax.block_until_ready(held)
    for array in held:
        array.delete()
