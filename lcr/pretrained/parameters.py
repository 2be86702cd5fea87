"""The parameters of a model that is loaded: a buffer on the host for each piece that a device is to hold."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcr.models.config import ModelConfig
from lcr.models.decoder import Decoder
from lcr.pretrained.tensors import Box, Path, Table

Shardings = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


class Buffers:
    """A parameter in pieces: one for each distinct part of it that `sharding` gives a device of this process; one piece
    for the default device where that is None."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None):
        self.shape, self.dtype, self.sharding = shape, dtype, sharding
        indices = {None: (slice(None),) * len(shape)}
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(shape)
        self.devices: dict[jax.Device | None, Box] = {
            device: tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
            for device, index in indices.items()
        }
        self.pieces = {
            _key(box): (box, _aligned(tuple(part.stop - part.start for part in box), dtype))
            for box in self.devices.values()
        }

    def put(self, box: Box, values: np.ndarray | float) -> None:
        """Writes the values of a box of the parameter, or one for all of it, into the pieces that have part of it."""
        for place, piece in self.pieces.values():
            common = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, place, strict=True)]
            if any(start >= stop for start, stop in common):
                continue
            into = tuple(slice(a - part.start, b - part.start) for (a, b), part in zip(common, place, strict=True))
            of = tuple(slice(a - part.start, b - part.start) for (a, b), part in zip(common, box, strict=True))
            piece[into] = values[of] if isinstance(values, np.ndarray) else values

    def array(self) -> jax.Array:
        """The parameter. JAX takes the pieces over on a CPU as they lie: nothing may be put there afterwards."""
        arrays = [
            jax.device_put(self.pieces[_key(box)][1], device, may_alias=True) for device, box in self.devices.items()
        ]
        if self.sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def choose_shardings(sharding: Shardings | None, table: Table) -> dict[Path, jax.sharding.Sharding | None]:
    """The sharding of each parameter by its path, None for the default device. Raises ValueError for one that does not
    fit its parameter."""
    if sharding is None:
        return dict.fromkeys(table.parameters)
    of_all = isinstance(sharding, jax.sharding.Sharding)
    if not of_all and not callable(sharding):
        raise ValueError(
            f"sharding={sharding!r}: expected a jax.sharding.Sharding, or a function of a name and a shape"
        )
    chosen = {}
    for path, parameter in table.parameters.items():
        name = ".".join(map(str, path))
        chosen[path] = sharding if of_all else sharding(name, parameter.shape)
        try:
            chosen[path].shard_shape(parameter.shape)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"sharding of {name} {parameter.shape}: {error}") from None
    return chosen


def allocate(
    table: Table, shardings: dict[Path, jax.sharding.Sharding | None], wide: set[Path]
) -> dict[Path, Buffers]:
    """Buffers for the parameters; empty, but for what no tensor is for.

    wide: which are float32 whatever the dtype of the compute.
    """
    buffers = {}
    for path, parameter in table.parameters.items():
        dtype = np.dtype(np.float32) if path in wide else parameter_dtype(path, parameter, table.config)
        buffers[path] = Buffers(parameter.shape, dtype, shardings[path])
    for path, box in table.unused:
        buffers[path].put(box, 0.0)
    return buffers


def parameter_dtype(path: Path, parameter: nnx.Param, config: ModelConfig) -> np.dtype:
    """Of a parameter of a loaded model: the compute's for matrices, float32 for what is in no way large."""
    matrix = parameter.ndim - (path[0] == "groups") >= 2 and parameter.get_metadata().get("group") is None
    return np.dtype(jnp.dtype(config.dtype) if matrix else np.float32)


def assemble(table: Table, buffers: dict[Path, Buffers]) -> Decoder:
    """The model of these parameters, each handed over to JAX as it is reached."""
    state = [(path, parameter.replace(buffers.pop(path).array())) for path, parameter in table.parameters.items()]
    return nnx.merge(table.graph, nnx.from_flat_state(state))


def _key(box: Box) -> tuple[tuple[int, int], ...]:
    return tuple((part.start, part.stop) for part in box)


def _aligned(shape: tuple[int, ...], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """An array that begins where JAX can take it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    bytes_ = np.empty(size + alignment, np.uint8)
    start = -bytes_.ctypes.data % alignment
    return bytes_[start : start + size].view(dtype).reshape(shape)
