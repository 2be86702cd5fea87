"""Loads a checkpoint: config.json and safetensors, in one file or in shards with an index; or an RWKV-7's .pth file."""

import collections
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lcr.checks import check_choice, unknown_name
from lcr.models.config import DTYPES, ModelConfig
from lcr.models.decoder import Decoder
from lcr.pretrained import rwkv7_author
from lcr.pretrained.families import FAMILIES
from lcr.pretrained.family import Family
from lcr.pretrained.fields import Fields
from lcr.pretrained.parameters import Shardings, allocate, assemble, choose_shardings
from lcr.pretrained.pth import PthFile
from lcr.pretrained.safetensors import TensorFile
from lcr.pretrained.source import Source
from lcr.pretrained.tensors import Line, Table, check_range
from lcr.pretrained.tensors import Path as ParameterPath

INDEX = "model.safetensors.index.json"
FLOATS = ("float64", "float32", "float16", "bfloat16")


class Stored(NamedTuple):
    """A tensor in a file, and its name there."""

    file: TensorFile | PthFile
    name: str

    @property
    def entry(self) -> Any:
        return self.file.entries[self.name]

    def read(self) -> np.ndarray:
        return self.file.tensor(self.name)


class Checkpoint(NamedTuple):
    """What is known of a checkpoint before a tensor is read.

    where: what errors name. config: our configuration, in the dtype asked for. stored: its tensors, by the names of
    `family`, whose table is `lines`. fields: of its config.json.
    """

    where: Path
    config: ModelConfig
    stored: dict[str, Stored]
    lines: Callable[[ModelConfig], Iterable[Line]]
    family: Family
    fields: dict[str, Any]


def load_model(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    sharding: Shardings | None = None,
    progress: bool = True,
) -> Decoder:
    """The model of a checkpoint: a folder with config.json and safetensors, or an RWKV-7 in its author's .pth file.

    dtype: of the compute and of the matrices, "float32" or "bfloat16"; None: the checkpoint's (float32 for float16),
        where matrices that it has in float32 beside others in bfloat16 stay so. Norms, biases, decays and gates are
        float32 whatever it is, as in every model here.
    sharding: of all parameters, or a function that gives the sharding of one by its dotted name and shape; None: the
        default device. progress: whether to show a bar.

    Tensors are read by memory map, one at a time, straight into what each device of this process is to hold of the
    parameters, in the target dtype: host memory holds these pieces and one tensor.

    Raises: FileNotFoundError for what is not there; ValueError for an unknown `model_type` or an unsupported field
    (naming it, and what is supported), for tensors that are missing, of no use, or of a wrong shape (all are named),
    and for a damaged file; before any parameter is allocated. And, when it is read, for a number that the parameter's
    dtype does not hold.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    checkpoint = open_checkpoint(path, dtype)
    table, stored = make_table(checkpoint), checkpoint.stored
    shardings = choose_shardings(sharding, table)
    buffers = allocate(table, shardings, wide_parameters(table, stored) if dtype is None else set())
    total = sum(stored_bytes(stored[name]) for name in table.shapes)
    label = f"loading {checkpoint.where.name}"
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=not progress) as bar:
        for name in table.shapes:
            for parameter, box, values in table.parts(name, stored[name].read()):
                check_range(name, values, buffers[parameter].dtype)
                buffers[parameter].put(box, values)
            bar.update(stored_bytes(stored[name]))
    model = assemble(table, buffers)
    model.source = source_of(checkpoint, table)
    return model


def open_checkpoint(path: str | os.PathLike, dtype: str | None) -> Checkpoint:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path={path!r}: expected the name of a folder, or of an RWKV-7's .pth file")
    path = Path(path)
    if path.suffix == ".pth":
        return open_pth(path, dtype)
    if path.is_file():
        refuse_pickles(path, [path.name] if path.suffix in (".bin", ".pt") else [])
        raise ValueError(f"{path}: is a file; expected the folder that it is in")
    return open_folder(path, dtype)


def read_checkpoint_config(path: str | os.PathLike, dtype: str | None = None) -> ModelConfig:
    """The configuration of a checkpoint's model, its tensors' names and shapes checked. Raises as `load_model` does."""
    checkpoint = open_checkpoint(path, dtype)
    make_table(checkpoint)
    return checkpoint.config


def read_checkpoint_source(path: str | os.PathLike) -> Source:
    """What a model loaded from there would have as its `source`. Raises as `load_model` does."""
    checkpoint = open_checkpoint(path, None)
    return source_of(checkpoint, make_table(checkpoint))


def source_of(checkpoint: Checkpoint, table: Table) -> Source:
    kinds = {name: checkpoint.stored[name].entry.dtype.name for name in table.shapes}
    common = common_dtype(checkpoint.stored)
    return Source(
        family=checkpoint.family.model_type,
        fields=json.dumps(checkpoint.fields),
        dtype=common,
        dtypes=tuple(sorted((name, kind) for name, kind in kinds.items() if kind != common)),
    )


def is_run(path: str | os.PathLike) -> bool:
    """Whether a folder is a run of this project."""
    if not isinstance(path, (str, os.PathLike)) or not (Path(path) / "checkpoints").is_dir():
        return False
    return not any(Path(path).glob("*.safetensors*"))


def open_folder(folder: Path, dtype: str | None) -> Checkpoint:
    """A folder as Hugging Face has them."""
    fields, family = read_config(folder)
    stored = {name: Stored(file, name) for name, file in open_files(folder).items()}
    where = folder / "config.json"
    reader = Fields(fields, str(where), tensors=len(stored))
    try:
        if "quantization_config" in fields:
            reader.only("quantization_config", None)  # its tensors are in another format, whatever the family
        options = family.read(reader)
        config = ModelConfig(**options, dtype=dtype or compute_dtype(stored))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(where)) else f"{where}: {error}") from None
    except (TypeError, KeyError, AttributeError, ArithmeticError, IndexError, RecursionError) as error:
        raise ValueError(f"{where}: is no configuration of {family.architecture}: {error!r}") from None
    reader.done()
    return Checkpoint(folder, config, stored, family.lines, family, fields)


def open_pth(path: Path, dtype: str | None) -> Checkpoint:
    """An RWKV-7 of its author."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    file = PthFile(path)
    stored = {name: Stored(file, name) for name in file.entries}
    try:
        options = rwkv7_author.read({name: entry.shape for name, entry in file.entries.items()})
        config = ModelConfig(**options, dtype=dtype or compute_dtype(stored))
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    family = dataclasses.replace(FAMILIES["rwkv7"], ignored=rwkv7_author.IGNORED)
    return Checkpoint(path, config, stored, rwkv7_author.lines, family, {})


def common_dtype(stored: Mapping[str, Stored]) -> str:
    """That of most of the elements."""
    counts: collections.Counter = collections.Counter()
    for tensor in stored.values():
        counts[tensor.entry.dtype.name] += math.prod(tensor.entry.shape)
    return counts.most_common(1)[0][0] if counts else "float32"


def compute_dtype(stored: Mapping[str, Stored]) -> str:
    return "bfloat16" if common_dtype(stored) == "bfloat16" else "float32"


def stored_bytes(tensor: Stored) -> int:
    return math.prod(tensor.entry.shape) * tensor.entry.dtype.itemsize


def read_config(folder: Path) -> tuple[dict[str, Any], Family]:
    """The fields of a folder's config.json, and the family of its `model_type`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with config.json and *.safetensors")
    where = folder / "config.json"
    if where.exists() and not where.is_file():
        raise ValueError(f"{where}: is no file; expected the configuration of a Hugging Face checkpoint")
    if not where.exists():
        raise FileNotFoundError(f"{where}: no such file; expected the configuration of a Hugging Face checkpoint")
    try:
        fields = json.loads(where.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{where}: expected a JSON object with a 'model_type'")
    if fields["model_type"] not in FAMILIES and "text_config" in fields:
        raise ValueError(
            f"{where}: model_type={fields['model_type']!r} has a 'text_config': a model of text and images, say, of "
            f"which only the text model is supported, as a folder of its own ({', '.join(FAMILIES)}). With transformers, "
            "for gemma3: whole = Gemma3ForConditionalGeneration.from_pretrained(folder); text = "
            "Gemma3ForCausalLM(whole.config.text_config); text.model = whole.model.language_model; text.tie_weights(); "
            "text.save_pretrained(another)"
        )
    if fields["model_type"] not in FAMILIES:
        raise ValueError(f"{where}: " + unknown_name("model_type", fields["model_type"], FAMILIES))
    return fields, FAMILIES[fields["model_type"]]


def open_files(folder: Path) -> dict[str, TensorFile]:
    """Which file of the folder holds each tensor: by the index, or by the headers of model.safetensors, of its shards,
    or of whatever safetensors are there."""
    if (folder / INDEX).exists():
        return _indexed(folder)
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    single = [path for path in found if path.name == "model.safetensors"]
    shards = [path for path in found if re.fullmatch(r"model-\d+-of-\d+\.safetensors", path.name)]
    files: dict[str, TensorFile] = {}
    for path in single or shards or found:
        file = TensorFile(path)
        if twice := files.keys() & file.entries.keys():
            twice = _listed(sorted(twice))
            raise ValueError(f"{folder}: {twice} in more than one file; expected {INDEX} to say in which")
        files |= dict.fromkeys(file.entries, file)
    if not found:
        refuse_pickles(folder, sorted(f.name for pattern in ("*.bin", "*.pth", "*.pt") for f in folder.glob(pattern)))
        raise FileNotFoundError(f"{folder}: no *.safetensors and no {INDEX}")
    return files


def refuse_pickles(where: Path, pickles: list[str]) -> None:
    if authors := [name for name in pickles if name.endswith(".pth")]:
        raise ValueError(
            f"{where}: holds {', '.join(authors)} and no safetensors; an RWKV-7 in its author's format is loaded by "
            f"the name of the file, {where / authors[0]}"
        )
    if pickles:
        raise ValueError(
            f"{where}: holds {', '.join(pickles)} and no safetensors. Such files are pickles, which can run code of "
            "their author when they are read, so they are not. Where you trust them, convert the folder once with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another)"
        )


def _indexed(folder: Path) -> dict[str, TensorFile]:
    where = folder / INDEX
    try:
        names = json.loads(where.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError):
        names = None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{where}: expected a JSON object with a 'weight_map' of tensors' names to files")
    refuse_pickles(where, sorted({file for file in names.values() if file.endswith((".bin", ".pt", ".pth"))}))
    files = {}
    for file in sorted(set(names.values())):
        # also a link, which leads out of the folder in the Hub's own cache, is a name in it
        if file != os.path.basename(file) or file in ("", ".", "..") or "\\" in file:
            raise ValueError(f"{where}: names the file {file!r}; expected the name of one in the same folder")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: no such file, but {INDEX} names it")
        files[file] = TensorFile(folder / file)
    missing = [name for name, file in names.items() if name not in files[file].entries]
    if missing:
        raise ValueError(f"{where}: {_listed(missing)} not in the files that it names for them")
    return {name: files[file] for name, file in names.items()}


def make_table(checkpoint: Checkpoint) -> Table:
    """The checkpoint's table, once the tensors that are there are those that the model needs. All that is wrong is told
    at once."""
    config, stored, family = checkpoint.config, checkpoint.stored, checkpoint.family
    try:
        table = Table(config, checkpoint.lines(config))
    except ValueError as error:  # options that do not go together
        raise ValueError(f"{checkpoint.where / 'config.json'}: {error}") from None
    for name in [name for name in stored if name not in table.shapes]:
        ours = name
        for pattern, replacement in family.renamed:
            ours = re.sub(pattern, replacement, ours)
        stored.setdefault(ours, stored.pop(name))
    wrong = []
    if missing := [name for name in table.shapes if name not in stored]:
        wrong.append(f"missing: {_listed(missing)}")
    if extra := [name for name in stored if name not in table.shapes and not passed_over(name, checkpoint)]:
        wrong.append(f"of no use to {family.architecture} as it is configured: {_listed(extra)}")
    for name, shape in table.shapes.items():
        if name in stored and (entry := stored[name].entry):
            if entry.shape != shape:
                wrong.append(f"{name} has shape {entry.shape}, expected {shape}")
            if entry.dtype.name not in FLOATS:
                wrong.append(f"{name} is {entry.dtype.name}; expected one of {', '.join(FLOATS)} (not quantised)")
    if wrong:
        raise ValueError(f"{checkpoint.where}: " + "; ".join(wrong[:20]) + ("; ..." if len(wrong) > 20 else ""))
    if config.tie_embeddings and family.head in stored:
        embedding = next(name for name, places in table.places.items() if places[0].path == ("embedding",))
        if not np.array_equal(stored[family.head].read(), stored[embedding].read()):
            raise ValueError(
                f"{checkpoint.where}: {family.head} is not the embedding, although config.json says so; expected "
                "'tie_word_embeddings': false, or a file without it"
            )
    return table


def passed_over(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor that no parameter is made of may be there."""
    family, config = checkpoint.family, checkpoint.config
    if family.extra_layers and (found := re.match(r"model\.layers\.(\d{1,9})\.", name)):
        return int(found[1]) >= len(config.mixers)
    return bool(re.search(family.ignored, name)) or (config.tie_embeddings and name == family.head)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def wide_parameters(table: Table, stored: Mapping[str, Stored]) -> set[ParameterPath]:
    """The parameters of which a tensor is stored in float32 (or float64)."""
    wide = [name for name in table.shapes if stored[name].entry.dtype.itemsize >= 4]
    return {place.path for name in wide for place in table.places[name]}
