"""PyTorch's files of tensors (.pth), read without unpickling: nothing that stands in one is ever called.

Such a file is a ZIP archive of data.pkl, a pickle that describes a dictionary of tensors, and data/0, data/1, ...,
their bytes. A pickle is a program for a small stack machine; Python's own runs it and calls what it names. The one
below knows the few instructions that a dictionary of tensors takes, and of the names in it the few that stand for a
tensor: it writes down what it is told, and refuses anything else.
"""

import math
import os
import pickletools
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
}
NAMES = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"} | {
    f"torch {storage}" for storage in STORAGES
}
LOCAL_HEADER = 30  # bytes before the name of a part; two bytes each at 26 and 28 say how long the name and extras are
MAX_PICKLE = 16_000_000  # bytes; the 61 layers of the largest RWKV-7 take 200,000
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError)  # of a ZIP archive


class Name(NamedTuple):
    """A global that the pickle names."""

    name: str


class Storage(NamedTuple):
    """The bytes of data/<key>."""

    key: str
    dtype: np.dtype
    size: int  # elements


class PthEntry(NamedTuple):
    """A tensor: `shape` elements of a storage from `offset` on, `stride` apart (in elements)."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype


class PthFile:
    """A .pth file with a dictionary of tensors: `entries` by name, and `tensor(name)`, which reads one.

    Raises: ValueError for what is no such file, and for one that would have anything called; naming both.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                listed = archive.infolist()
        except DAMAGE:
            self._refuse("no ZIP archive; expected what torch.save writes (version 1.6 or later), undamaged")
        # PyTorch compresses nothing, so no entry is larger than it looks
        self.parts = {
            info.filename: info
            for info in listed
            if info.compress_type == zipfile.ZIP_STORED and info.file_size <= self.path.stat().st_size
        }
        self.sizes = {name: info.file_size for name, info in self.parts.items()}
        described = [name for name in self.sizes if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(described) != 1 or self.sizes[described[0]] > MAX_PICKLE:
            self._refuse("no data.pkl that describes tensors; expected what torch.save writes (version 1.6 or later)")
        self.prefix = described[0].removesuffix("data.pkl")
        order = f"{self.prefix}byteorder"
        if order in self.sizes and self._read(order) != b"little":
            self._refuse("its numbers are big-endian; expected little-endian")
        try:
            tensors = self._run(self._read(described[0]))
        except (IndexError, KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
            self._refuse(f"its data.pkl describes no dictionary of tensors: {error}")
        self.entries: dict[str, PthEntry] = {name: self._check(name, entry) for name, entry in tensors.items()}

    def tensor(self, name: str) -> np.ndarray:
        """The tensor `name`; a copy."""
        entry = self.entries[name]
        stored = np.frombuffer(self._read(f"{self.prefix}data/{entry.storage.key}"), entry.dtype)
        strides = tuple(stride * entry.dtype.itemsize for stride in entry.stride)
        return np.lib.stride_tricks.as_strided(stored[entry.offset :], entry.shape, strides, writeable=False).copy()

    def _read(self, name: str) -> bytes:
        """The bytes of a part. The archive is opened for each, so that none stays open, and not read through again."""
        part = self.parts[name]
        with open(self.path, "rb") as file:
            file.seek(max(part.header_offset, 0))
            header = file.read(LOCAL_HEADER)
            file.seek(sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28)), os.SEEK_CUR)
            data = file.read(part.file_size)
        if not header.startswith(b"PK\3\4") or len(data) != part.file_size or zlib.crc32(data) != part.CRC:
            self._refuse(f"{name} is damaged")
        return data

    def _check(self, name: Any, entry: Any) -> PthEntry:
        """Refuses a tensor that leads out of its bytes."""
        if not isinstance(name, str) or not isinstance(entry, PthEntry):
            self._refuse(f"{name!r} is no tensor")
        numbers = (entry.offset, *entry.shape, *entry.stride)
        if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or len(entry.shape) != len(entry.stride):
            self._refuse(f"{name!r} has shape {entry.shape} and strides {entry.stride}")
        last = entry.offset + sum((size - 1) * stride for size, stride in zip(entry.shape, entry.stride, strict=True))
        held = self.sizes.get(f"{self.prefix}data/{entry.storage.key}", 0) // entry.dtype.itemsize
        if 0 not in entry.shape and (last >= held or math.prod(entry.shape) > held):
            self._refuse(f"{name!r} ends at element {last} of a storage of {held}; the file is truncated or damaged")
        return entry

    def _run(self, pickle: bytes) -> dict[Any, Any]:
        """What the pickle describes."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for instruction, argument, _ in pickletools.genops(pickle):
            match instruction.name:
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    marks.append(len(stack))
                case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    stack.append(argument)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(instruction.name == "NEWTRUE")
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(instruction.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    stack[-1].update(_named([(key, value)]))
                case "SETITEMS":
                    items = since_mark()
                    stack[-1].update(_named(zip(items[::2], items[1::2], strict=True)))
                case "GLOBAL":
                    stack.append(self._name(argument))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(self._name(f"{module} {name}"))
                case "BINPERSID":
                    kind, storage, key, _, size = stack.pop()
                    if kind != "storage" or not isinstance(storage, Name) or not str(key).isdigit():
                        raise ValueError(f"a reference to {kind!r} {key!r}")
                    stack.append(Storage(str(key), STORAGES[storage.name.removeprefix("torch ")], size))
                case "REDUCE":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(self._rebuild(function, arguments))
                case "BUILD":  # what a dictionary of PyTorch carries beside its tensors
                    stack.pop()
                case "STOP":
                    if not isinstance(stack[-1], dict):
                        raise ValueError(f"a {type(stack[-1]).__name__}")
                    return stack[-1]
                case other:
                    raise ValueError(f"the instruction {other}")
        raise ValueError("it does not end")

    def _name(self, name: str) -> Name:
        if name not in NAMES:
            raise ValueError(f"it names {name!r}, which is no part of a dictionary of tensors")
        return Name(name)

    def _rebuild(self, function: Any, arguments: Any) -> Any:
        """What is written down where PyTorch would call a function."""
        match function:
            case Name("torch._utils _rebuild_tensor_v2"):
                storage, offset, shape, stride, *_ = arguments
                if not isinstance(storage, Storage):
                    raise ValueError(f"a tensor of {storage!r}")
                return PthEntry(storage, offset, tuple(shape), tuple(stride))
            case Name("torch._utils _rebuild_parameter"):
                return arguments[0]
            case Name("collections OrderedDict"):
                return {}
        raise ValueError(f"a call of a {type(function).__name__}")

    def _refuse(self, problem: str):
        raise ValueError(f"{self.path}: {problem}")


def _named(items: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """A dictionary of these items. Raises: ValueError for a name that is no string."""
    fields = dict[str, Any]()
    for name, value in items:
        if not isinstance(name, str):
            raise ValueError(f"a name that is a {type(name).__name__}")
        fields[name] = value
    return fields
