"""Training that begins from a checkpoint: its configuration as a run has one, and its parameters."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lcr.models.config import ModelConfig
from lcr.pretrained.load import is_run, load_model, read_checkpoint_config, read_checkpoint_source
from lcr.pretrained.source import FILE, read_source, write_source

Parameters = Mapping[str, Any]  # by dotted name, as `lcr.training.step.parameter_values` has them


def model_section(path: str | os.PathLike) -> dict[str, Any]:
    """The section `model` of a training configuration for the model of a checkpoint, or of a run; its dtype float32.

    Reads no tensor. Raises as `lcr.load_pretrained` does.
    """
    if is_run(path):
        from lcr.training.run import read_config

        return read_config(Path(path)).model.to_dict()
    config = read_checkpoint_config(path, dtype="float32")
    section = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name in ("mixer_options", "feed_forward_options"):
        section[name] = _plain(section[name])
    return section


def keep_source(path: str | os.PathLike, workdir: Path) -> None:
    """Keeps in a run's folder what its export takes over from the checkpoint, or the run, that it begins from.

    Reads no tensor. Raises as `lcr.load_pretrained` does.
    """
    if (workdir / FILE).exists():
        return
    source = read_source(Path(path)) if is_run(path) else read_checkpoint_source(path)
    if source is not None:
        write_source(source, workdir)


def initial_parameters(path: str | os.PathLike, config: ModelConfig, parameters: Parameters) -> tuple[dict, list[str]]:
    """(the parameters, those that the checkpoint has taken from there; the names of the others).

    config: of the model whose parameters, freshly drawn, are given. A parameter is taken where the checkpoint has one
    of the same name in the same layer, of the same shape: what another mixer, width or vocabulary asks for stays drawn.
    Raises: ValueError where there is none; and as `lcr.load_pretrained` does.
    """
    theirs = dict(_theirs(path))
    taken, drawn = {}, []
    for name, array in parameters.items():
        places = list(_places(name, array, config))
        found = [theirs.get(place) for place, _ in places]
        fits = [one is not None and one.shape == array[index].shape for one, (_, index) in zip(found, places, strict=True)]
        drawn += [place for (place, _), fit in zip(places, fits, strict=True) if not fit]
        if not any(fits):
            taken[name] = array
            continue
        filled = np.array(array)
        for (_, index), one, fit in zip(places, found, fits, strict=True):
            if fit:
                filled[index] = one
        taken[name] = jnp.asarray(filled)
    if len(drawn) == sum(len(list(_places(name, array, config))) for name, array in parameters.items()):
        raise ValueError(f"{path}: none of its parameters has the name and the shape of one of this model")
    return taken, drawn


def _theirs(path: str | os.PathLike) -> Iterator[tuple[str, np.ndarray]]:
    from lcr.training.run import load_run
    from lcr.training.step import parameter_values

    model = load_run(path).model if is_run(path) else load_model(path, dtype="float32")
    for name, array in parameter_values(model).items():
        host = np.asarray(array)
        for place, index in _places(name, array, model.config):
            yield place, host[index]


def _places(name: str, array: Any, config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """("layers.<i>.<name in the layer>", index) of each layer that a stacked parameter has, or its own name."""
    if not name.startswith("groups.blocks."):
        yield name, ...
        return
    block, rest = name.removeprefix("groups.blocks.").split(".", 1)
    for repetition in range(array.shape[0]):
        yield f"layers.{repetition * len(config.pattern) + int(block)}.{rest}", repetition


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value
