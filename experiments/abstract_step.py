"""One training step, as the trainer makes it, compiled for devices that are not there; nothing of it is ever in memory.

`python -m experiments.abstract_step <task as JSON>` is what experiments/compile_training.py starts for each of its
rows: a compiler that ends its process ends that row alone.
"""

import json
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from pallas_kernels import dispatch, targets

from lcr.training.optimizer import make_optimizer, parameter_groups
from lcr.training.run import make_abstract_model, make_run_task
from lcr.training.sharding import batch_shardings, state_shardings
from lcr.training.step import Functional, init_state, make_step

MEMORY = ("argument", "output", "alias", "temp")  # alias: what of the output lies where the arguments were


def main(task: dict[str, Any]) -> None:
    """task: variant, target, rows, length; one line of JSON goes to stdout, and nothing else."""
    from experiments.configs.billion import get_config

    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers say
    try:
        target = targets.find(task["target"])
        found = compile_step(get_config(task["variant"]), target, task["rows"] * target.devices, task["length"])
    except Exception as error:  # whatever a compiler raises
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), file=results, flush=True)


def compile_step(config: ConfigDict, target: targets.Gpu | targets.Tpu, rows: int, length: int) -> dict[str, Any]:
    """The step of a configuration for a batch of so many rows in all, of whose tokens all are predicted.

    Returns parameters: how many. by: ["op: implementation", ...], those taken where none was named. memory: bytes of a
    device by name. limit: bytes that a device has. seconds: of tracing and compiling. Raises what a compiler raises.
    """
    model = make_abstract_model(config, make_run_task(config).tokenizer.vocab_size)
    functional = Functional(model)
    optimizer = make_optimizer(config.optimizer, config.training.steps, parameter_groups(functional.variables))
    parameters = {name: variable.get_value() for name, variable in functional.variables.items()}
    state = jax.eval_shape(lambda parameters: init_state(parameters, optimizer, functional), parameters)
    batch, mesh = abstract_batch(rows, length), targets.mesh(target)
    start = time.perf_counter()
    with targets.tracing(target), dispatch.recording_defaults() as chosen:
        step = make_step(functional, optimizer, config.optimizer.accumulation)
        lowered = step.lower(placed(state, state_shardings(state, mesh)), placed(batch, batch_shardings(batch, mesh)))
    memory = lowered.compile().memory_analysis()
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
        "by": list(dict.fromkeys(f"{op}: {name}" for op, name in chosen)),
        "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in MEMORY},
        "limit": target.memory,
        "seconds": time.perf_counter() - start,
    }


def abstract_batch(rows: int, length: int) -> dict[str, Any]:
    """The shapes of what `select_predictions` makes of a text that fills its rows."""

    def array(width, dtype):
        return jax.ShapeDtypeStruct((rows, width), dtype)

    return {
        "tokens": array(length, jnp.int32),
        "segment_ids": None,
        "positions": None,
        "targets": array(length - 1, jnp.int32),
        "weights": array(length - 1, jnp.bool_),
    }


def placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
