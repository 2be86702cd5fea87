"""The conformance suites on the device that is here: `python -m pallas_kernels.check --run`.

Every case by every implementation that supports it on this device, in the dtypes that the device is made for. The
memory that a result may come to lie in is filled with NaN before, so that what is never written shows; each case runs
twice, and nothing may differ.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.attention import api as attention_api
from pallas_kernels.attention import conformance as attention
from pallas_kernels.conformance import Suite
from pallas_kernels.delta_rule import api as delta_rule_api
from pallas_kernels.delta_rule import conformance as delta_rule
from pallas_kernels.linear_attention import api as linear_attention_api
from pallas_kernels.linear_attention import conformance as linear_attention
from pallas_kernels.selective_scan import api as selective_scan_api
from pallas_kernels.selective_scan import conformance as selective_scan
from pallas_kernels.tolerances import TOLERANCE

DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16", "float16"), "tpu": ("bfloat16", "float32")}
POISONED = 1 << 24  # bytes of a NaN array, where the device does not say how much memory it has


class Op(NamedTuple):
    """api: the module with its IMPLEMENTATIONS. errors: of (case, implementation, dtype, poison=...). quick: cases."""

    api: Any
    cases: Mapping[str, Any]
    errors: Callable[..., Iterator[tuple[str, float, str]]]
    quick: tuple[str, ...]


def _op(api: Any, suite: Suite, *quick: str) -> Op:
    return Op(api, suite.cases, suite.errors, quick)


OPS = {
    "attention": Op(attention_api, attention.CASES, attention.errors, ("ragged, grouped", "packed, window", "decode")),
    "selective_scan": _op(selective_scan_api, selective_scan.SUITE, "one token", "packed"),
    "linear_attention": _op(linear_attention_api, linear_attention.SUITE, "one token", "packed", "channel, packed"),
    "delta_rule": _op(delta_rule_api, delta_rule.SUITE, "one token", "packed", "vector, packed"),
}


def run(names: list[str], quick: bool) -> int:
    """Prints a row for each case of the ops; 0 if all is right, else 1."""
    device = devices.current()
    print(f"{jax.devices()[0].device_kind} ({device.platform}), JAX {jax.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| op | implementation | dtype | case | errors | s |\n| --- | --- | --- | --- | --- | --- |")
    wrong = unsupported = right = 0
    for name, implementation, dtype, case in _rows(names, quick, device.platform):
        op, start = OPS[name], time.perf_counter()
        try:
            text, good = judge(op.errors(op.cases[case], implementation, jnp.dtype(dtype), poison=poison))
        except Exception as error:  # of whatever compiler: the other cases go on
            if isinstance(error, ValueError) and str(error).startswith(f"implementation={implementation!r}"):
                unsupported += 1
                continue
            text, good = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}", False
        right, wrong = right + good, wrong + (not good)
        seconds = time.perf_counter() - start
        print(f"| {name} | {implementation} | {dtype} | {case} | {text} | {seconds:.1f} |", flush=True)
    print(f"\n{right} right, {wrong} wrong, {unsupported} not supported by the implementation on this device")
    return 1 if wrong or not right else 0


def _rows(names: list[str], quick: bool, platform: str) -> Iterator[tuple[str, str, str, str]]:
    for name in names:
        for implementation in OPS[name].api.IMPLEMENTATIONS:
            for dtype in DTYPES[platform] if implementation != "reference" else ():
                for case in OPS[name].quick if quick else OPS[name].cases:
                    yield name, implementation, dtype, case


def judge(errors: Iterator[tuple[str, float, str]]) -> tuple[str, bool]:
    """Error and tolerance of every result, and whether all are within."""
    texts, good = [], True
    for what, error, kind in errors:
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
