"""What each architecture of a sweep costs, beside what it remembers: one table.

    python -m experiments.costs --sweep=experiments/sweeps/passkey.py --workdir=runs/comparison

Measures on this machine, for each architecture, and appends to <workdir>/costs.jsonl (the same command given again
measures only what is missing):

    parameters            all of the model's
    state bytes           of one sequence after 65,536 tokens, in bfloat16 (recurrent accumulators are float32)
    training tokens/s     of an update by a batch of the longest training length; reading data is left out
    decoding tokens/s     one sequence, as configured, from a state that has room for 65,536 tokens
    decoding, late/early  time of a step at token 1,000,000 over that at token 1,000; of constant states only
    memory, 64K/4K        bytes that a training step needs beside its arguments, at 65,536 over 4,096 tokens

The table is printed and written to <workdir>/comparison.md, with the exact match of the sweep's rows at each length,
all depths together.

Exit codes: 0 all is done; 1 an architecture could not be measured; 2 a mistake in the command; 143 or 130 stopped by a
signal.
"""

import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments.flags import fail, load_sweep, read_json_lines, run

SWEEP = flags.DEFINE_string("sweep", None, "The sweep: <file>.py or <file>.py:<architecture>,...")
WORKDIR = flags.DEFINE_string("workdir", None, "The sweep's folder; made if it is not there.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Timed calls of each kind; the median counts.", lower_bound=1)
flags.mark_flags_as_required(["sweep", "workdir"])

COSTS, TABLE = "costs.jsonl", "comparison.md"
HELD = 65_536  # tokens that a cache has room for
EARLY, LATE = 1000, 1_000_000  # after so many tokens a step is timed
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
    known = {(row["name"], row["configuration"]): row for row in read_json_lines(workdir / COSTS)}
    for config in configs:
        key = config.name, configuration_digest(config)
        if key not in known:
            print(f"{config.name}: measuring", file=sys.stderr)
            known[key] = {"name": key[0], "configuration": key[1], **measure(config)}
            with (workdir / COSTS).open("a") as stream:
                stream.write(json.dumps(known[key]) + "\n")
    shown = [known[config.name, configuration_digest(config)] for config in configs]
    accuracy = {(one.row.architecture, one.row.configuration): one for one in select_series(rows)[0]}
    text = table(shown, accuracy)
    (workdir / TABLE).write_text(text + "\n")
    print(f"\n{text}\n\ntable  {workdir / TABLE}")


def measure(config: ConfigDict) -> dict[str, Any]:
    """The costs of one architecture."""
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
        "training_tokens_per_second": training(config, model, vocabulary),
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


def training(config: ConfigDict, model, vocabulary: int) -> float:
    """Tokens per second of updates, as the trainer makes them."""
    import jax
    import numpy as np

    from lcr.training.optimizer import make_optimizer, parameter_groups
    from lcr.training.step import Functional, init_state, make_step, parameter_values, select_predictions

    functional = Functional(model)
    optimizer = make_optimizer(config.optimizer, config.training.steps, parameter_groups(functional.variables))
    # the update is given its state to overwrite, so a copy of the parameters
    state = init_state(jax.tree.map(lambda leaf: leaf.copy(), parameter_values(model)), optimizer, functional)
    update = make_step(functional, optimizer, config.optimizer.accumulation)
    length = max(config.data.lengths)
    rows = max(1, config.data.batch_tokens // length)
    tokens = np.random.default_rng(0).integers(1, vocabulary, (rows, length), np.int32)
    predicted = np.zeros(tokens.shape, np.bool_)
    predicted[:, -5:] = True
    batch = select_predictions({"tokens": tokens, "loss_mask": predicted}, config.optimizer.accumulation)
    seconds = []
    for repeat in range(REPEATS.value + 1):
        start = time.perf_counter()
        state = jax.block_until_ready(update(state, batch))
        if repeat:  # the first compiles
            seconds.append(time.perf_counter() - start)
    return tokens.size / statistics.median(seconds)


def decoding(model, vocabulary: int, *, constant: bool) -> dict[str, Any]:
    """Tokens per second of greedy decoding of one sequence, and how much a step costs late over early."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from lcr.models.token_loop import write

    graph, parameters = nnx.split(model)

    @jax.jit
    def decode(parameters, states, token):
        def choose(logits, _):
            return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

        return write(nnx.merge(graph, parameters), token, states, choose, jnp.zeros((DECODED, 0)))

    @functools.partial(jax.jit, static_argnames="times")
    def read(parameters, tokens, states, times):
        def once(states, _):
            return nnx.merge(graph, parameters)(tokens, states, logits_at=jnp.zeros((1, 0), jnp.int32))[1], None

        return jax.lax.scan(once, states, None, length=times)[0]

    tokens = jnp.asarray(np.random.default_rng(0).integers(1, vocabulary, (1, EARLY), np.int32))
    held = {"early": read(parameters, tokens, model.init_states(1, HELD), 1)}
    if constant:
        held["late"] = read(parameters, tokens, held["early"], LATE // EARLY - 1)
    seconds: dict[str, list[float]] = {name: [] for name in held}
    for repeat in range(REPEATS.value + 1):
        for name, states in held.items():
            start = time.perf_counter()
            jax.block_until_ready(decode(parameters, states, tokens[:, 0]))
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


def table(costs: list[dict], accuracy: dict) -> str:
    """A Markdown table, a line for each architecture."""
    from lcr.evaluation.tables import write_bytes, write_length, write_percent, write_rate

    lengths = sorted({length for one in accuracy.values() for length in one.lengths})
    columns = ["", "parameters", "state at 64K", "training tokens/s", "decoding tokens/s", "late/early", "memory 64K/4K"]
    lines = [[*columns, *(write_length(length) for length in lengths)], ["---"] + ["---:"] * (6 + len(lengths))]
    for row in costs:
        series = accuracy.get((row["name"], row["configuration"]))
        cells = [write_percent(series.pooled(n).exact_match) if series and n in series.lengths else "–" for n in lengths]
        late = row["late_over_early"]
        lines.append([
            row["name"], f"{row['parameters']:,}", write_bytes(row["state_bytes"]),
            write_rate(row["training_tokens_per_second"]), write_rate(row["decoding_tokens_per_second"]),
            f"{late:.2f}" if late else "–", f"{row['memory_ratio']:.1f}",
            *cells,
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    run(main)
