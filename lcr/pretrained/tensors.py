"""Tensors of a checkpoint and parameters of a model: one table says how each becomes the other.

A family describes its checkpoints by lines (`Line`): a tensor, or part of it, is a parameter, or part of it, up to the
order of its axes. Both sides are views of NumPy arrays, so one line serves to load (ours[...] = theirs) and to export
(theirs[...] = ours), and a table that leaves out an element on either side is found before anything is allocated.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from lcr.models.config import ModelConfig
from lcr.models.decoder import Decoder

View = Callable[[np.ndarray], np.ndarray]
Path = tuple[Any, ...]


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
    along which layers are stacked.
    """

    name: str | None
    shape: tuple[int, ...]
    parameter: str
    theirs: View = whole
    ours: View = whole
    layer: int | None = None


class Table:
    """The lines of a model, held against its parameters.

    shapes: of the checkpoint's tensors by name. parameters: by path, as `jax.ShapeDtypeStruct`.
    Raises: AssertionError where the lines and the parameters do not cover one another: the family's table is wrong.
    """

    def __init__(self, config: ModelConfig, lines: Iterable[Line]):
        self.config = config
        self.graph, self.parameters = abstract_model(config)
        self.lines: dict[str, list[tuple[Line, Path, int | None]]] = collections.defaultdict(list)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.unused: list[tuple[Path, int | None]] = []
        seen: collections.Counter = collections.Counter()
        for line in lines:
            path, repetition = self._place(line)
            assert path in self.parameters, f"{line.name}: the model has no parameter {path}"
            if line.name is None:
                self.unused.append((path, repetition))
                seen[path] += self.parameters[path].size // (
                    1 if repetition is None else self.parameters[path].shape[0]
                )
                continue
            assert self.shapes.setdefault(line.name, line.shape) == line.shape, f"{line.name}: two shapes"
            ours = line.ours(_dummy(self.parameters[path].shape[0 if repetition is None else 1 :]))
            theirs = line.theirs(_dummy(line.shape))
            assert ours.shape == theirs.shape, f"{line.name} as {theirs.shape} for {path}, which is {ours.shape}"
            seen[path] += ours.size
            seen[line.name] += theirs.size
            self.lines[line.name].append((line, path, repetition))
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

    def load(self, name: str, tensor: np.ndarray, into: Mapping[Path, np.ndarray]) -> None:
        """Puts a tensor into its place in the parameters' arrays, in their dtypes."""
        for line, path, repetition in self.lines[name]:
            array = into[path] if repetition is None else into[path][repetition]
            line.ours(array)[...] = line.theirs(tensor)

    def export(self, name: str, parameters: Mapping[Path, np.ndarray], dtype: np.dtype) -> np.ndarray:
        """The tensor `name` of these parameters."""
        tensor = np.empty(self.shapes[name], dtype)
        for line, path, repetition in self.lines[name]:
            array = parameters[path] if repetition is None else parameters[path][repetition]
            line.theirs(tensor)[...] = line.ours(array)
        return tensor


def abstract_model(config: ModelConfig) -> tuple[Any, dict[Path, Any]]:
    """A model's graph, and its parameters by path, with shapes for values; nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    return graph, dict(nnx.to_flat_state(state))


def _dummy(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.int8(0), shape)
