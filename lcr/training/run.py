"""A run on disk, read back: `load_run(workdir)` gives the model as some checkpoint left it, and its task."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

import lcr
from lcr.pretrained.source import read_source
from lcr.tasks import make_task
from lcr.training.checkpoints import CheckpointError, find_damage, list_steps, newest_good, read_checkpoint
from lcr.training.config import ConfigError, check_keys, from_plain
from lcr.training.step import Functional

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """model: with the parameters of checkpoint `step`, and the `source` of the checkpoint that the run began from, if it
    began from one. config: locked, as the run was last started with."""

    model: nnx.Module
    task: Any
    config: ConfigDict
    step: int
    workdir: Path


def load_run(workdir: str | Path, step: int | None = None) -> Run:
    """The model, task and configuration of a run.

    step: of the checkpoint to read; the newest good one if None (damaged newer ones are passed over, with a warning
        in the log; nothing on disk is changed).
    Raises ConfigError where the folder holds no run or one of another version, CheckpointError where there is no
    checkpoint, none of that step, or none that is whole.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    step = choose_step(workdir, step)
    task = make_run_task(config)
    functional = Functional(make_abstract_model(config, task.tokenizer.vocab_size))
    abstract = {name: variable.get_value() for name, variable in functional.variables.items()}
    arrays, _ = read_checkpoint(workdir / CHECKPOINTS / str(step), {"params": abstract})
    model = functional.model(arrays["params"])
    try:
        model.source = read_source(workdir)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Run(model, task, config, step, workdir)


def read_config(workdir: Path) -> ConfigDict:
    """The configuration of the run in `workdir`. Raises ConfigError."""
    path = workdir / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"workdir={str(workdir)!r}: there is no {CONFIG} in it; expected the folder of a run, as "
            "`python -m experiments.train --workdir=...` makes it"
        )
    config = from_plain(read_plain(path))
    check_keys(config)
    return config


def read_plain(path: Path) -> dict[str, Any]:
    """A configuration as JSON holds it. Raises ConfigError where the file is damaged."""
    mend = "restore it from a copy, or train in a new workdir"
    try:
        plain = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); {mend}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} is damaged (expected a JSON object, found {type(plain).__name__}); {mend}")
    return {"init_from": None, **plain}  # which runs of before do not have


def choose_step(workdir: Path, step: int | None) -> int:
    """The checkpoint to read. Raises CheckpointError as `load_run` says."""
    directory = workdir / CHECKPOINTS
    if step is None:
        newest, damaged = newest_good(directory)
        if newest is not None:
            return newest
        why = "; ".join(f"step {s}: {damage}" for s, damage in damaged.items()) or "none was written yet"
        raise CheckpointError(
            f"no usable checkpoint in {directory} ({why}); train first, or go on training, with "
            f"`python -m experiments.train --config=... --workdir={workdir}`"
        )
    steps = list_steps(directory)
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"step={step}: there is no such checkpoint in {directory}; the steps there: {known}")
    damage = find_damage(directory / str(step))
    if damage is not None:
        others = ", ".join(str(s) for s in steps if s != step) or "none"
        raise CheckpointError(
            f"step={step}: checkpoint {directory / str(step)} is damaged: {damage}; other steps there: {others}"
        )
    return step


def make_run_task(config: ConfigDict) -> Any:
    """The task of a configuration. Raises ConfigError for an unknown task or option, or a bad value."""
    try:
        return make_task(**config.task.to_dict())
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"task: {error}") from error


def make_run_model(config: ConfigDict, vocab_size: int) -> nnx.Module:
    """The freshly initialised model of a configuration, from its seed."""
    return lcr.make_model({"vocab_size": vocab_size, **config.model.to_dict()}, rngs=nnx.Rngs(config.seed))


def make_abstract_model(config: ConfigDict, vocab_size: int) -> nnx.Module:
    """The model with shapes for parameters: nothing is compiled. Raises ConfigError for options that do not fit."""
    try:
        return nnx.eval_shape(lambda: make_run_model(config, vocab_size))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from error
