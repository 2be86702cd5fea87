"""Tensors of a checkpoint and parameters of a model: one table says how each becomes the other.

A family describes its checkpoints by lines (`Line`): a tensor, or part of it, is a parameter, or part of it, up to the
order of its axes. Both sides are views of NumPy arrays, so one line serves to load (ours = theirs) and to export
(theirs = ours), and a table that leaves out an element on either side is found before anything is allocated. A
parameter may lie in pieces on several devices: a line knows which box of it is its own, and each piece gets its part.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcr.models.config import ModelConfig
from lcr.models.decoder import Decoder

View = Callable[[np.ndarray], np.ndarray]
Path = tuple[Any, ...]
Box = tuple[slice, ...]


def whole(array: np.ndarray) -> np.ndarray:
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    return array.T


@dataclasses.dataclass(frozen=True)
class Line:
    """theirs(tensor) is ours(parameter).

    name, shape: of the tensor; None where the checkpoint has none for the parameter, which then is zero (and not used).
    parameter: its path in the model ("final_norm.scale"), or where `layer` is given in that
    layer ("mixer.query.kernel"). theirs, ours: views of equal shapes; a parameter of a layer is seen without the axis
    along which layers are stacked. `ours` is a box of the parameter, in the order of its axes, which may be split: it
    only slices and reshapes; whatever transposition there is stands in `theirs`.
    """

    name: str | None
    shape: tuple[int, ...]
    parameter: str
    theirs: View = whole
    ours: View = whole
    layer: int | None = None


class Place(NamedTuple):
    """Where a line leads: a box of the parameter at `path`, in the layer `repetition` of those stacked in it."""

    line: Line
    path: Path
    repetition: int | None
    box: Box


class Table:
    """The lines of a model, held against its parameters.

    shapes: of the checkpoint's tensors by name. parameters: by path, as `jax.ShapeDtypeStruct`.
    Raises: AssertionError where the lines and the parameters do not cover one another: the family's table is wrong.
    """

    def __init__(self, config: ModelConfig, lines: Iterable[Line]):
        self.config = config
        self.graph, self.parameters = abstract_model(config)
        self.places: dict[str, list[Place]] = collections.defaultdict(list)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.unused: list[tuple[Path, Box]] = []
        seen: collections.Counter = collections.Counter()
        for line in lines:
            path, repetition = self._place(line)
            assert path in self.parameters, f"{line.name}: the model has no parameter {path}"
            whole_shape = self.parameters[path].shape
            shape = whole_shape if repetition is None else whole_shape[1:]
            layer = () if repetition is None else (slice(repetition, repetition + 1),)
            if line.name is None:
                self.unused.append((path, (*layer, *(slice(0, size) for size in shape))))
                seen[path] += math.prod(shape)
                continue
            assert self.shapes.setdefault(line.name, line.shape) == line.shape, f"{line.name}: two shapes"
            ours = line.ours(_dummy(shape))
            theirs = line.theirs(_dummy(line.shape))
            assert ours.shape == theirs.shape, f"{line.name} as {theirs.shape} for {path}, which is {ours.shape}"
            seen[path] += ours.size
            seen[line.name] += theirs.size
            box = (*layer, *_box(line.ours, shape))
            assert math.prod(part.stop - part.start for part in box) == ours.size, f"{line.name}: no box of {path}"
            self.places[line.name].append(Place(line, path, repetition, box))
        sizes = {path: parameter.size for path, parameter in self.parameters.items()}
        sizes |= {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        for name, size in sizes.items():
            assert seen[name] == size, f"{name}: {size} elements, of which the table has {seen[name]}"

    def _place(self, line: Line) -> tuple[Path, int | None]:
        names = tuple(line.parameter.split("."))
        if line.layer is None:
            return names, None
        repetition, block = divmod(line.layer, len(self.config.pattern))
        return ("groups", "blocks", block, *names), repetition

    def parts(self, name: str, tensor: np.ndarray) -> Iterator[tuple[Path, Box, np.ndarray]]:
        """(parameter, box in it, the box's values) of each part of a tensor."""
        for line, path, _, box in self.places[name]:
            yield path, box, line.theirs(tensor).reshape([part.stop - part.start for part in box])

    def export(self, name: str, parameters: Mapping[Path, np.ndarray], dtype: np.dtype) -> np.ndarray:
        """The tensor `name` of these parameters. Raises: ValueError for numbers that `dtype` does not hold."""
        tensor = np.empty(self.shapes[name], dtype)
        for line, path, repetition, _ in self.places[name]:
            array = parameters[path] if repetition is None else parameters[path][repetition]
            values = line.ours(array)
            check_range(name, values, dtype)
            line.theirs(tensor)[...] = values
        return tensor


def check_range(name: str, values: np.ndarray, dtype: np.dtype) -> None:
    """Raises: ValueError where a finite number of a tensor is infinite in `dtype`."""
    largest = float(jnp.finfo(dtype).max)
    if 2 * largest >= float(jnp.finfo(values.dtype).max):  # bfloat16 holds what float32 does
        return
    with np.errstate(over="ignore"):
        over = np.isinf(values.astype(dtype)) & np.isfinite(values)
    if over.any():
        wider = ", or dtype bfloat16 or float32" if dtype == np.float16 else ""
        raise ValueError(
            f"{name}: {values[over][0]} is more than {largest:.5g}, the most that {dtype.name} holds; expected smaller "
            f"numbers{wider}"
        )


def abstract_model(config: ModelConfig) -> tuple[Any, dict[Path, Any]]:
    """A model's graph, and its parameters by path, with shapes for values; nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    return graph, dict(nnx.to_flat_state(state))


def _box(view: View, shape: tuple[int, ...]) -> Iterator[slice]:
    """The box of an array of this shape that `view` shows: its first element is one corner, its last the other."""
    for axis, size in enumerate(shape):
        along = np.arange(size).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        seen = view(np.broadcast_to(along, shape))
        yield slice(int(seen[(0,) * seen.ndim]), int(seen[(-1,) * seen.ndim]) + 1)


def _dummy(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.int8(0), shape)
