"""The safetensors format: read by memory map, written one tensor at a time.

A file is eight bytes N (little endian), N bytes of JSON, and the tensors' bytes, one after another without holes. The
JSON maps a name to {"dtype", "shape", "data_offsets": [begin, end]}, counted from the end of the JSON, and the name
"__metadata__" to strings. (https://github.com/huggingface/safetensors; that library reads no bfloat16 into NumPy, and
wants all tensors of a file in memory to write it.)
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}
MAX_HEADER = 100_000_000  # bytes, as in the format's library
MAX_RANK = 64  # NumPy's


class Entry(NamedTuple):
    """A tensor of a file: its dtype and shape, and where in the file its bytes lie."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file: `entries` by name, and `tensor(name)`, which reads one.

    Raises: ValueError for a file that is truncated, or whose header is not what the format says; naming the file, and
    what is wrong. Nothing but the header is read before a tensor is asked for.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            if size < 8:
                self._refuse(f"{size} bytes; a safetensors file has at least 8")
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER):
                self._refuse(
                    f"a header of {length:,} bytes in a file of {size:,}; it is truncated or no safetensors file"
                )
            header = file.read(length)
        self.start = 8 + length
        self.entries = self._read_header(header, size - self.start)

    def tensor(self, name: str) -> np.ndarray:
        """The tensor `name`, read from the file's memory map; a copy, so that the map's pages go at once, and nothing
        breaks where the file is written anew."""
        entry = self.entries[name]
        page = entry.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        if entry.begin == entry.end:
            return np.zeros(entry.shape, entry.dtype)
        with open(self.path, "rb") as file:
            with mmap.mmap(file.fileno(), entry.end - page, access=mmap.ACCESS_READ, offset=page) as mapped:
                view = np.frombuffer(mapped, entry.dtype, math.prod(entry.shape), entry.begin - page)
                copy = view.reshape(entry.shape).copy()
                del view
        return copy

    def _read_header(self, header: bytes, data: int) -> dict[str, Entry]:
        try:
            fields = json.loads(header.decode("utf-8"), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            self._refuse(f"its header is no JSON object of distinct names: {error}")
        if not isinstance(fields, dict):
            self._refuse(f"its header is a JSON {type(fields).__name__}, expected an object")
        fields.pop("__metadata__", None)
        entries = {name: self._read_entry(name, described) for name, described in fields.items()}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != end:
                self._refuse(f"the bytes of {name!r} begin at {entry.begin}, expected {end}: no holes, no overlaps")
            end = entry.end
        if end != data:
            self._refuse(f"it has {data:,} bytes of tensors where its header says {end:,}; it is truncated or damaged")
        return {
            name: entry._replace(begin=entry.begin + self.start, end=entry.end + self.start)
            for name, entry in entries.items()
        }

    def _read_entry(self, name: str, described: Any) -> Entry:
        if not isinstance(described, dict) or not {"dtype", "shape", "data_offsets"} <= described.keys():
            self._refuse(f"{name!r} is described by {described!r}; expected dtype, shape and data_offsets")
        dtype, shape, offsets = (described[key] for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self._refuse(f"{name!r} has the dtype {dtype!r}; supported: {', '.join(DTYPES)}")
        if not _is_sizes(shape):
            self._refuse(f"{name!r} has the shape {shape!r}; expected a list of sizes")
        if not _is_sizes(offsets) or len(offsets) != 2:
            self._refuse(f"{name!r} has the data_offsets {offsets!r}; expected [begin, end]")
        count = math.prod(shape) if len(shape) <= MAX_RANK else -1
        if offsets[1] - offsets[0] != count * DTYPES[dtype].itemsize:
            self._refuse(
                f"{name!r}, {dtype} of shape {shape}, has {offsets[1] - offsets[0]:,} bytes; expected "
                f"{count * DTYPES[dtype].itemsize:,}"
            )
        return Entry(DTYPES[dtype], tuple(shape), *offsets)

    def _refuse(self, problem: str):
        raise ValueError(f"{self.path}: {problem}")


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensor: Callable[[str], np.ndarray],
) -> None:
    """Writes a safetensors file: tensors says what is in it (name: dtype and shape), tensor(name) gives each in turn.

    Raises: TypeError for a dtype that the format does not have, and for a tensor of another dtype or shape than said.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # wider types first, as the format's library has it, so that every tensor is aligned to its own
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name][0]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = np.dtype(tensors[name][0]), tensors[name][1]
        if dtype not in names:
            raise TypeError(f"{name}: safetensors has no dtype for {dtype}")
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            values = np.asarray(tensor(name), order="C")
            if (values.dtype, values.shape) != (np.dtype(tensors[name][0]), tuple(tensors[name][1])):
                raise TypeError(f"{name}: {values.dtype} of shape {values.shape}, expected {tensors[name]}")
            file.write(values.reshape(-1).view(np.uint8).data)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name!r} stands there twice")
        fields[name] = value
    return fields
