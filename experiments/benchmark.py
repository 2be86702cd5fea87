"""Times the ops on this machine against their rivals, in one run: python -m experiments.benchmark cpu

    attention   ours, jax.nn.dot_product_attention, and PyTorch's SDPA where PyTorch is installed
    scans       every recurrence (scan_cases.py): the default, the chunked form, the token loop, an associative scan,
                and the plain-JAX forms of jax-linear-attention where it is installed
    streaming   peak memory of reading 65,536 and 1,048,576 tokens through the state

Times are medians in milliseconds, forms of one shape taken in turns, so that the ratios hold on a noisy machine;
peak memory is the process's high-water mark during the calls, above what it held before them, inputs included.
The results go to experiments/benchmarks/cpu.json; the tables of README.md are columns of what this prints.
"""

import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

ATTENTION_LENGTHS = (2048, 4096, 8192, 16_384)
RIVALS = ("token loop", "associative", "jla")  # of a recurrence's default
LONG = 5.0  # seconds, see `in_turns`
DENSE_BYTES = 4 << 30  # a rival that would hold more than this in T x T scores, or in states, is left out

PARTS = flags.DEFINE_list("parts", ["attention", "scans", "streaming"], "Which parts to run.")
OPS = flags.DEFINE_list("ops", None, "Of the scans, these alone ('RWKV-7', ...); other rows of the file stay.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each form; the median counts.", lower_bound=1)
OUT = flags.DEFINE_string("out", "experiments/benchmarks/cpu.json", "Where the results go.")


def main(argv: list[str]) -> None:
    if argv[1:] not in ([], ["cpu"]):
        sys.exit(f"error: {argv[1:]}: the benchmark known here is 'cpu': python -m experiments.benchmark cpu")
    os.environ["JAX_PLATFORMS"] = "cpu"
    runs = {"attention": attention, "scans": scans, "streaming": streaming}
    for part in PARTS.value:
        if part not in runs:
            sys.exit(f"error: --parts={part}: expected some of {', '.join(runs)}")
    out = Path(OUT.value)
    results = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in PARTS.value:
        rows = results.get(part, {}).get("rows", []) if part == "scans" and OPS.value is not None else []
        for row in runs[part]():
            print(row, file=sys.stderr, flush=True)
            rows = put(rows, row)
            results[part] = {"machine": machine(), "rows": rows}
            whole = out.with_suffix(".tmp")  # an interruption leaves the old file, or the new one
            whole.write_text(json.dumps(results, indent=1) + "\n")
            whole.replace(out)
        print(f"\n{part}\n\n{table(rows)}\n", flush=True)


def put(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with this one for the one of the same op, shape and pass, where it was; or at the end."""
    keys = [[old.get(key) for key in ("op", "shape", "pass")] for old in rows]
    key = [row.get(key) for key in ("op", "shape", "pass")]
    if key[0] is None or key not in keys:
        return [*rows, row]
    return [row if old == key else before for old, before in zip(keys, rows, strict=True)]


def machine() -> dict[str, Any]:
    import jax

    versions = {"python": platform.python_version(), "jax": jax.__version__}
    if "torch" in sys.modules:
        versions["torch"] = sys.modules["torch"].__version__
    return {"cores": len(os.sched_getaffinity(0)), "versions": versions, "date": time.strftime("%Y-%m-%d")}


def in_turns(forms: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """(median milliseconds, peak MB) of each form; every form once, then every form again, and so on.

    Each timed call has an untimed one before it: the first call after a rival that held gigabytes pays for memory that
    the rival gave back to the system. A form that takes more than five seconds is timed once, and one that runs out of
    memory is left out.
    """
    import jax

    times: dict[str, list[float]] = {name: [] for name in forms}
    peaks = dict.fromkeys(forms, 0)
    for turn in range(1 + REPEATS.value):  # the first compiles, and shows how long it takes
        for name in list(times):
            if turn and times[name] and times[name][0] > LONG:
                continue
            try:
                forms[name]()
                seconds, peak = timed(forms[name])
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or name == next(iter(forms)):
                    raise
                print(f"{name}: out of memory", file=sys.stderr, flush=True)
                del times[name]
                continue
            if turn or seconds > LONG:
                times[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
    return {name: (1e3 * statistics.median(t), peaks[name] / 1e6) for name, t in times.items()}


def timed(call: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of one call, and how far the process's memory rose in it."""
    from lcr.evaluation.memory import peak_bytes, reset_peak

    reset_peak()
    before = peak_bytes()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start, peak_bytes() - before


def forms_of(functions: dict[str, Callable], arguments: tuple, backward: bool) -> dict[str, Callable[[], Any]]:
    """Each function jitted on the arguments: its value, or the gradient of its first output's squares too."""
    import jax

    def timed(function):
        def loss(*arguments):
            return (jax.tree.leaves(function(*arguments))[0] ** 2).sum()

        call = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))) if backward else jax.jit(function)
        return lambda: jax.block_until_ready(call(*arguments))

    return {name: timed(function) for name, function in functions.items()}


def attention() -> Iterator[dict[str, Any]]:
    """Causal attention, float32, batch 1, 8 heads of 64."""
    import jax
    from pallas_kernels import attention as ours

    heads, width = 8, 64
    for length in ATTENTION_LENGTHS:
        q, k, v = (jax.random.normal(key, (1, length, heads, width)) for key in jax.random.split(jax.random.key(0), 3))
        for backward in (False, True):
            functions = {"lcr": ours}
            if 4 * heads * length**2 * (3 if backward else 2) <= 2 * DENSE_BYTES:
                functions["jax.nn"] = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
            forms = forms_of(functions, (q, k, v), backward) | torch_sdpa((q, k, v), backward)
            found = in_turns(forms)
            flops = 2 * heads * width * length**2 * (3.5 if backward else 1)
            row = {"tokens": length, "pass": "forward + backward" if backward else "forward"}
            row |= {f"{name} ms": round(t, 1) for name, (t, _) in found.items()}
            row["lcr GFLOP/s"] = round(flops / found["lcr"][0] / 1e6)
            row |= {f"lcr / {name}": round(found["lcr"][0] / t, 2) for name, (t, _) in found.items() if name != "lcr"}
            yield row | {f"{name} peak MB": round(peak) for name, (_, peak) in found.items()}


def torch_sdpa(arrays: tuple, backward: bool) -> dict[str, Callable[[], Any]]:
    """PyTorch's scaled_dot_product_attention on the same numbers, if PyTorch is installed."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        return {}
    import numpy as np
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tensors = [torch.from_numpy(np.array(a)).transpose(1, 2).contiguous() for a in arrays]

    def forward():
        with torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)

    def both():
        leaves = [t.detach().requires_grad_() for t in tensors]
        torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True).square().sum().backward()

    return {"SDPA": both if backward else forward}


def scans() -> Iterator[dict[str, Any]]:
    """The recurrences: our default beside its chunked form, its token loop, an associative scan and another package."""
    from experiments.scan_cases import OPS as KNOWN
    from experiments.scan_cases import all_cases

    for op in OPS.value or ():
        if op not in KNOWN:
            sys.exit(f"error: --ops={op}: expected some of {', '.join(KNOWN)}")
    for case in all_cases():
        for backward in (False, True) if OPS.value is None or case.op in OPS.value else ():
            functions = {
                name: functools.partial(case.ours, implementation=implementation)
                for name, implementation in (("default", None), ("chunked", "chunked"), ("token loop", "reference"))
            }
            if backward and 2 * case.state_bytes > DENSE_BYTES:
                del functions["token loop"]
            if case.state_bytes * (4 if backward else 2) <= DENSE_BYTES:
                functions["associative"] = case.associative
            if case.jla is not None:
                functions["jla"] = case.jla
            found = in_turns(forms_of(functions, case.arguments, backward))
            row = {"op": case.op, "shape": case.shape, "pass": "forward + backward" if backward else "forward"}
            row["date"] = time.strftime("%Y-%m-%d")
            row |= {f"{form} ms": round(t, 1) for form, (t, _) in found.items()}
            rivals = [t for form, (t, _) in found.items() if form in RIVALS]
            if rivals:
                row["default / best rival"] = round(found["default"][0] / min(rivals), 2)
            yield row | {f"{form} peak MB": round(peak) for form, (_, peak) in found.items()}


def streaming() -> Iterator[dict[str, Any]]:
    """Peak resident memory of streaming a prompt through a two-layer decoder of width 64, in pieces of 4,096."""
    import jax
    import jax.numpy as jnp
    import lcr
    import numpy as np
    from flax import nnx

    from lcr.evaluation.memory import peak_bytes, reset_peak

    for mixer in ("mamba", "retnet"):
        model = lcr.make_model({"vocab_size": 256, "d_model": 64, "mixers": (mixer,) * 2}, rngs=nnx.Rngs(0))
        graph, parameters = nnx.split(model)

        @jax.jit
        def piece(parameters, tokens, states, graph=graph):
            last = jnp.full((1, 1), tokens.shape[1] - 1, jnp.int32)
            return nnx.merge(graph, parameters)(tokens, states, logits_at=last)

        peaks = {}
        for length in (65_536, 1_048_576):
            reset_peak()
            start = time.perf_counter()
            tokens = np.random.default_rng(0).integers(1, 256, (1, length), np.int32)
            states = model.init_states(1, length)
            for at in range(0, length, 4096):
                logits, states = piece(parameters, tokens[:, at : at + 4096], states)
            jax.block_until_ready(logits)
            peaks[length] = peak_bytes()
            seconds = time.perf_counter() - start
            row = {
                "mixer": mixer, "tokens": length, "peak MB": round(peaks[length] / 1e6, 1),
                "state bytes": lcr.state_bytes(states), "tokens/s, compilation included": round(length / seconds),
            }  # fmt: skip
            yield row | ({"peak / peak at 65,536": round(peaks[length] / peaks[65_536], 3)} if len(peaks) > 1 else {})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; a value that a row lacks is shown as not run."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row.get(column, "–") for column in columns]
        lines.append("| " + " | ".join(f"{c:,}" if isinstance(c, (int, float)) else c for c in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
