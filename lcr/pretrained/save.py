"""Saves a model as `transformers` loads it: config.json and safetensors, in shards with an index above 5 GB."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcr.checks import check_choice
from lcr.data.tokenizers import Tokenizer
from lcr.models.config import ModelConfig
from lcr.models.decoder import Decoder
from lcr.pretrained.families import FAMILIES
from lcr.pretrained.family import Family
from lcr.pretrained.fields import Fields
from lcr.pretrained.load import FLOATS, INDEX
from lcr.pretrained.safetensors import write_tensors
from lcr.pretrained.source import Source
from lcr.pretrained.tensors import Table
from lcr.pretrained.tokenizer import FILES
from lcr.pretrained.written_out import written_out

SHARD_BYTES = 5_000_000_000
# of its checkpoint's config.json, what stays of a model that was changed, and what does not of one that was not: the
# authors' own code, and layers, that are not exported, and the other of two names that a norm has (fla.UNFUSED)
KEPT = (
    "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "context_length", "initializer_range",
    "use_cache", "attention_dropout", "tokenizer_class",
)  # fmt: skip
DROPPED = ("auto_map", "num_nextn_predict_layers", "num_mtp_layers", "fuse_norm")


def save_model(
    model: Decoder,
    path: str | os.PathLike,
    *,
    tokenizer: Tokenizer | None = None,
    family: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes `path`, a folder that `transformers` loads.

    tokenizer: its files are copied, if it came from any. family: a `model_type` of `FAMILIES`; None: that of the
        checkpoint which the model was loaded from (or that its run began from) if it still has its form, else the first
        whose form it has. dtype: of the tensors; None: that of the checkpoint it came from, else of the embedding.
    overwrite: whether the folder may be there already: an empty one, or a checkpoint's (it has a config.json), which is
        replaced as a whole. With tokenizer None the files of the tokenizer that is there, and generation_config.json
        and the chat template, stay; nothing else does.

    Everything is written to a folder beside it, which takes its name at the end: what was there stays until then.
    Killed between the two renames that this takes, the old folder lies beside it whole, as `.<name>.old.*/<name>`.
    Raises: FileExistsError for a folder that is there, without overwrite, or that is no checkpoint's; OSError where it
    cannot be made; ValueError for what is no model or no tokenizer, for an unknown family or dtype, for a folder in
    which the program runs, for numbers that the dtype does not hold, and for a model that no family, or not this one,
    has the form of (naming what differs).
    """
    if not isinstance(model, Decoder):
        raise ValueError(f"model={model!r}: expected a model, as lcr.make_model and lcr.load_pretrained give it")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"tokenizer={tokenizer!r}: expected what lcr.load_pretrained gave with the model, or None")
    target = checked_target(path)
    check_replaceable(target, overwrite)
    source = getattr(model, "source", None)
    if dtype is not None:
        check_choice("dtype", dtype, FLOATS)
    config = written_out(model.config)
    if len(config.pattern) != len(model.config.pattern):
        raise ValueError(f"mixers={model.config.mixers!r}: expected one name for layers that are alike")
    fields, chosen = export_config(config, family, source)
    same = source is not None and source.family == chosen.model_type
    if same:
        fields = kept_fields(config, chosen, fields, json.loads(source.fields))
    table = Table(config, chosen.lines(config))
    parameters = {p: v[...] for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    common = dtype or (source.dtype if source else parameters[("embedding",)].dtype.name)
    dtypes = {name: jnp.dtype(common) for name in table.shapes}
    if dtype is None and same:
        dtypes |= {name: jnp.dtype(kind) for name, kind in source.dtypes}
    fields |= {"model_type": chosen.model_type, "architectures": [chosen.architecture]}
    names = ("dtype", "torch_dtype")  # the newer and the older
    fields |= {name: common for name in fields.keys() & names or names}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:  # of its parent, or of a temporary name
        mend = "expected a folder that can be written to"
        raise OSError(f"{target}: cannot be made: {error.strerror}; {mend}") from error
    try:
        (temporary / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        write_shards(temporary, table, parameters, dtypes, shard_bytes)
        copy_tokenizer(target if tokenizer is None else getattr(tokenizer, "folder", None), temporary)
        replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def checked_target(path: str | os.PathLike) -> Path:
    """The folder that `path` leads to. Raises ValueError for one that cannot be replaced."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ValueError(f"path={path!r}: expected the name of a folder")
    target = Path(path).resolve()
    if target == target.parent or Path.cwd().is_relative_to(target):
        raise ValueError(f"path={str(path)!r}: is the folder in which this runs, or above it; expected another")
    return target


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raises FileExistsError for what is there and is not to be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target}: is no folder")
    if not overwrite:
        raise FileExistsError(f"{target}: exists already; expected a new folder, or overwrite=True")
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise FileExistsError(
            f"{target}: has no config.json, so it is no checkpoint's folder; expected one, an empty one or a new one"
        )


def export_config(config: ModelConfig, family: str | None, source: Source | None) -> tuple[dict[str, Any], Family]:
    """The config.json of a model written out, and the family whose form it has."""
    if family is not None:
        check_choice("family", family, FAMILIES)
        return _as_family(config, FAMILIES[family]), FAMILIES[family]
    reasons = []
    for name in dict.fromkeys([*([source.family] if source else []), *FAMILIES]):
        try:
            return _as_family(config, FAMILIES[name]), FAMILIES[name]
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("the model has the form of no family: " + "; ".join(reasons))


def kept_fields(config: ModelConfig, family: Family, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """config.json for a model that came from one of the same family: `theirs` where it says the same model, else `ours`
    and what says nothing of the model."""
    try:
        unchanged = _read_again(config, family, theirs) == config
    except ValueError:  # what a .pth file has none of
        unchanged = False
    if unchanged:
        return {name: value for name, value in theirs.items() if name not in DROPPED}
    return {name: value for name, value in theirs.items() if name in KEPT} | ours


def _read_again(config: ModelConfig, family: Family, fields: dict[str, Any]) -> ModelConfig:
    return written_out(ModelConfig(**family.read(Fields(fields)), dtype=config.dtype, remat=config.remat))


def _as_family(config: ModelConfig, family: Family) -> dict[str, Any]:
    """config.json for a family, which must read it as the same model."""
    mixers = {name.partition(":")[0] for name in config.mixers}
    if not mixers <= set(family.mixers):
        raise ValueError(f"{family.model_type} has layers of {' and '.join(family.mixers)}, the model of {mixers}")
    try:
        fields = family.write(config)
        again = _read_again(config, family, fields)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{family.model_type}: {error}") from None
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(config, field.name), getattr(again, field.name)
        if ours != theirs:
            raise ValueError(f"{family.model_type} would have {field.name}={theirs!r} where the model has {ours!r}")
    return fields


def write_shards(
    folder: Path, table: Table, parameters: Mapping[Any, Any], dtypes: Mapping[str, np.dtype], shard_bytes: int
) -> None:
    """model.safetensors, or shards of at most so many bytes (of one tensor at least) and their index."""
    shards: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
    used = total = 0
    for name, shape in table.shapes.items():
        size = int(np.prod(shape)) * dtypes[name].itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = dtypes[name], shape
        used, total = used + size, total + size
    arrays = {path: np.asarray(value) for path, value in parameters.items()}

    def tensor(name: str) -> np.ndarray:
        return table.export(name, arrays, dtypes[name])

    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0], tensor)
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(folder / file, shard, tensor)
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    for name in [] if source is None else [*FILES, *(path.name for path in source.glob("rwkv_vocab*.txt"))]:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def replace(temporary: Path, target: Path) -> None:
    """Gives the folder its name; what had it goes when nothing can fail any more."""
    umask = os.umask(0)  # which can only be read so
    os.umask(umask)
    os.chmod(temporary, 0o777 & ~umask)  # a temporary folder is its owner's alone
    if not target.exists():
        os.rename(temporary, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    old = aside / target.name
    try:
        os.rename(target, old)
        os.rename(temporary, target)
    except BaseException:  # Ctrl-C too
        if old.exists() and not target.exists():
            os.rename(old, target)
        if not old.exists():
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
