"""One training step, as the trainer makes it, compiled for devices that are not there; nothing of it is ever in memory."""

import dataclasses
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

MEMORY = ("argument", "output", "alias", "temp")  # bytes of a device, as the compiler says; alias: of outputs in arguments


def compile_step(config: ConfigDict, target: targets.Gpu | targets.Tpu, batch: int, length: int) -> dict[str, Any]:
    """The step of a configuration for a batch of so many rows, all of whose tokens are predicted.

    Returns parameters (how many), implementations (those taken where none was named), memory ({name: bytes of a device}),
    limit (the device's), seconds (lowering and compiling), devices. Raises what the compiler raises.
    """
    config = config.copy_and_resolve_references()
    model = make_abstract_model(config, make_run_task(config).tokenizer.vocab_size)
    functional = Functional(model)
    optimizer = make_optimizer(config.optimizer, config.training.steps, parameter_groups(functional.variables))
    parameters = {name: variable.get_value() for name, variable in functional.variables.items()}
    state = jax.eval_shape(lambda p: init_state(p, optimizer, functional), parameters)
    start = time.perf_counter()
    mesh = targets.mesh(target)
    with targets.tracing(target), dispatch.recording_defaults() as chosen:
        step = make_step(functional, optimizer, config.optimizer.accumulation)
        rows = abstract_batch(batch, length)
        lowered = step.lower(
            placed(state, state_shardings(state, mesh)), placed(rows, batch_shardings(rows, mesh))
        )
    lowering = time.perf_counter() - start
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
        "implementations": list(dict.fromkeys(chosen)),
        "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in MEMORY},
        "limit": target.memory,
        "devices": target.devices,
        "seconds": time.perf_counter() - start,
        "lowering": lowering,
    }


def abstract_batch(batch: int, length: int) -> dict[str, Any]:
    """The shapes of what `select_predictions` gives for a text without padding."""

    def array(width, dtype):
        return jax.ShapeDtypeStruct((batch, width), dtype)

    return {
        "tokens": array(length, jnp.int32),
        "segment_ids": None,
        "positions": None,
        "targets": array(length - 1, jnp.int32),
        "weights": array(length - 1, bool),
    }


def placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)
