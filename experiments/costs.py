"""What each architecture of a sweep costs, beside what it remembers: one table.

    python -m experiments.costs --sweep=experiments/sweeps/passkey.py --workdir=runs/comparison

Measures on this machine, for each architecture, and appends to <workdir>/costs.jsonl (the same command given again
measures only what is missing):

    parameters            all of the model's
    state bytes           of one sequence after 65,536 tokens, in bfloat16 (recurrent accumulators are float32)
    training tokens/s     median over the training run in <workdir>/<architecture>, compilation left out
    decoding tokens/s     one sequence, as configured, from a state that has room for 65,536 tokens
    decoding, late/early  time of a step at token 1,000,000 over that at token 1,000; of constant states only
    memory, 64K/4K        bytes that a training step needs beside its arguments, at 65,536 over 4,096 tokens

The table is printed and written to <workdir>/comparison.md, with the exact match of the sweep's rows at each length,
all depths together.

Exit codes: 0 all is done; 2 a mistake in the command.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments.flags import fail, load_sweep, run

SWEEP = flags.DEFINE_string("sweep", None, "The sweep: <file>.py or <file>.py:<architecture>,...")
WORKDIR = flags.DEFINE_string("workdir", None, "The sweep's folder; made if it is not there.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Timed calls of each kind; the median counts.", lower_bound=1)
flags.mark_flags_as_required(["sweep", "workdir"])

COSTS, TABLE = "costs.jsonl", "comparison.md"
HELD = 65_536  # tokens that a cache has room for
DECODED = 32  # tokens in one timed call


def main() -> None:
    from lcr.evaluation.grid import configuration_digest
    from lcr.evaluation.results import RESULTS, ResultsError, read_rows
    from lcr.evaluation.series import select_series

    configs, workdir = load_sweep(SWEEP.value), Path(WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        rows, _ = read_rows(workdir / RESULTS)
    except ResultsError as error:
        fail(str(error))
    known = {(row["name"], row["configuration"]): row for row in costs_in(workdir / COSTS)}
    for config in configs:
        key = config.name, configuration_digest(config)
        if key not in known:
            print(f"{config.name}: measuring", file=sys.stderr)
            known[key] = {"name": key[0], "configuration": key[1], **measure(config)}
            with (workdir / COSTS).open("a") as stream:
                stream.write(json.dumps(known[key]) + "\n")
    shown = [known[config.name, configuration_digest(config)] for config in configs]
    accuracy = {(one.row.architecture, one.row.configuration): one for one in select_series(rows)[0]}
    text = table(shown, accuracy, {row["name"]: training_rate(workdir / row["name"]) for row in shown})
    (workdir / TABLE).write_text(text + "\n")
    print(f"\n{text}\n\ntable  {workdir / TABLE}")


def costs_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of costs; ends the program where one cannot be read."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            fail(f"{path}, line {number} cannot be read ({error}); delete the line, its architecture is measured again")
    return rows


def measure(config: ConfigDict) -> dict[str, Any]:
    """The costs of one architecture, but for its training rate."""
    import jax
    from flax import nnx

    from lcr.training.run import make_abstract_model, make_run_model, make_run_task

    vocabulary = make_run_task(config).tokenizer.vocab_size
    rounded = config.copy_and_resolve_references()
    rounded.model.dtype = "bfloat16"
    abstract = make_abstract_model(config, vocabulary)
    model = make_run_model(config, vocabulary)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param))),
        "state_bytes": state_bytes(make_abstract_model(rounded, vocabulary), HELD),
        **decoding(model, vocabulary, constant=state_bytes(abstract, 512) == state_bytes(abstract, 1024)),
        "memory_ratio": training_memory(model, HELD) / training_memory(model, 4096),
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
    }


def state_bytes(model, capacity: int) -> int:
    import jax
    import lcr
    from flax import nnx

    graph, parameters = nnx.split(model)
    return lcr.state_bytes(jax.eval_shape(lambda p: nnx.merge(graph, p).init_states(1, capacity), parameters))


def decoding(model, vocabulary: int, *, constant: bool) -> dict[str, Any]:
    """Tokens per second of greedy decoding of one sequence, and how much a step costs late over early."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    graph, parameters = nnx.split(model)

    @jax.jit
    def decode(parameters, states, token):
        def step(carry, _):
            states, token = carry
            logits, states = nnx.merge(graph, parameters)(token, states)
            return (states, jnp.argmax(logits, axis=-1).astype(jnp.int32)), None

        return jax.lax.scan(step, (states, token), None, length=DECODED)[0]

    @jax.jit
    def read(parameters, tokens, states):
        return nnx.merge(graph, parameters)(tokens, states, logits_at=jnp.zeros((1, 0), jnp.int32))[1]

    tokens = jnp.asarray(np.random.default_rng(0).integers(1, vocabulary, (1, 1000), np.int32))
    early = read(parameters, tokens, model.init_states(1, HELD))
    # The counter alone is set on: no mixer does more for larger numbers in its state, and a cache reads all its slots.
    late = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full_like(leaf, 1_000_000) if "position" in str(path[-1]) else leaf, early
    )
    seconds: dict[str, list[float]] = {"early": [], "late": []}
    for repeat in range(REPEATS.value + 1):
        for name, states in (("early", early), ("late", late)):
            start = time.perf_counter()
            jax.block_until_ready(decode(parameters, states, tokens[:, :1]))
            if repeat:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "decoding_tokens_per_second": DECODED / medians["early"],
        "late_over_early": medians["late"] / medians["early"] if constant else None,
    }


def training_memory(model, length: int) -> int:
    """Bytes that XLA sets aside for the loss of one sequence and its gradients; nothing is run."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    graph, parameters = nnx.split(model)

    def loss(parameters, tokens):
        logits, _ = nnx.merge(graph, parameters)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.jit(jax.value_and_grad(loss)).lower(parameters, tokens).compile().memory_analysis().temp_size_in_bytes


def training_rate(folder: Path) -> float | None:
    """Median tokens per second of the run in `folder`; None if there is none."""
    from lcr.training.metrics import METRICS, read_rows

    rates = [row["tokens_per_second"] for row in read_rows(folder / METRICS)]
    return statistics.median(rates) if rates else None


def table(costs: list[dict], accuracy: dict, training: dict[str, float | None]) -> str:
    """A Markdown table, a line for each architecture."""
    from lcr.evaluation.tables import write_bytes, write_length, write_percent, write_rate

    lengths = sorted({length for one in accuracy.values() for length in one.lengths})
    columns = ["", "parameters", "state at 64K", "training tokens/s", "decoding tokens/s", "late/early", "memory 64K/4K"]
    lines = [[*columns, *(write_length(length) for length in lengths)], ["---"] + ["---:"] * (6 + len(lengths))]
    for row in costs:
        series, rate = accuracy.get((row["name"], row["configuration"])), training[row["name"]]
        cells = [write_percent(series.pooled(n).exact_match) if series and n in series.lengths else "–" for n in lengths]
        late = row["late_over_early"]
        lines.append([
            row["name"], f"{row['parameters']:,}", write_bytes(row["state_bytes"]), write_rate(rate) if rate else "–",
            write_rate(row["decoding_tokens_per_second"]), f"{late:.2f}" if late else "–", f"{row['memory_ratio']:.1f}",
            *cells,
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    run(main)
