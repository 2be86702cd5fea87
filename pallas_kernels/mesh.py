"""An op in a program for several devices: each of them runs the op on its own rows, and on its own heads.

    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        step(state, batch)                     # jitted; `state` and `batch` laid out over the mesh

XLA partitions a program by itself, but sees into no kernel: JAX refuses a Mosaic TPU kernel outside of `jax.shard_map`,
and a GPU's would be given all rows on every device; so would a loop over rows. Hence an op that is traced while a mesh is
in use runs inside of `jax.shard_map`. Rows are independent of one another, and so are heads (in a selective scan
channels): no device needs what another one has. Of what all rows share, the decays of heads or a bonus, every device has
its own copy, and the gradients are added up where the map is transposed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

MODEL = "model"  # the axis of a mesh over which heads are spread; rows are spread over all others
ROWS, HEADS = "B", "HGD"  # letters of an op's axes: rows; heads, heads of keys, channels


class Axes:
    """The letters of the axes of an op's arguments and results, in order: "BTHK".

    Letters left out at the end are not spread. "": no letter is, or it is no array. A tuple of letters: the one with as
    many as the array has axes. Of a pytree they are those of each leaf. An axis of size 1 beside larger ones of the same
    letter, or a single head of keys, is shared by all devices.
    """

    def __init__(self, *arguments: str | tuple[str, ...], results: tuple[str, ...]):
        self.arguments = arguments
        self.results = results


def on_each_device(run: Callable, arguments: Sequence[Any], axes: Axes) -> Any:
    """`run(*arguments)`; where the call is traced for several devices, that on each of them with its rows and heads.

    `run` gives a tuple of arrays, or of pytrees. What is no array (None, numbers, options) it gets as it is.

    Rows are spread over those axes of the mesh, in order, by which they divide; heads over the axis "model", if all of
    them divide by it. Along the others all devices do the same. Axes of the mesh that are manual already (inside of a
    `jax.shard_map`) or explicit are left alone; where no other is larger than 1, and without a mesh, it is a plain call.
    """
    if len(arguments) != len(axes.arguments):
        raise ValueError(f"{len(arguments)} arguments beside the axes of {len(axes.arguments)}: expected as many")
    mesh = jax.sharding.get_abstract_mesh()
    free = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    if math.prod(mesh.shape[name] for name in free) == 1:
        return run(*arguments)
    is_array = [any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(a)) for a in arguments]
    arrays, letters = [], []
    for argument, of_axes, array in zip(arguments, axes.arguments, is_array, strict=True):
        if array:
            arrays.append(argument)
            letters.append(of_axes if isinstance(of_axes, str) else next(a for a in of_axes if len(a) == argument.ndim))
    over = _over(mesh, free, _sizes(arrays, letters))

    def spec(letters: str, shape: tuple[int, ...] | None = None) -> PartitionSpec:
        shared = [shape is not None and shape[axis] == 1 for axis in range(len(letters))]
        return PartitionSpec(*(None if one else over.get(letter) for letter, one in zip(letters, shared, strict=True)))

    def on_one(*arrays):
        given = iter(arrays)
        return run(*(next(given) if array else other for array, other in zip(is_array, arguments, strict=True)))

    specs = [
        jax.tree.map(lambda leaf, of_axes=of_axes: spec(of_axes, leaf.shape), argument)
        for argument, of_axes in zip(arrays, letters, strict=True)
    ]
    # Kernels do not say over which axes of the mesh their results vary, which is what `check_vma` would check.
    return jax.shard_map(
        on_one, in_specs=tuple(specs), out_specs=tuple(map(spec, axes.results)), axis_names=set(free), check_vma=False
    )(*arrays)


def _sizes(arrays: Sequence[Any], letters: Sequence[str]) -> dict[str, int]:
    """How many there are of each letter: as many as the array with the most of them has."""
    sizes: dict[str, int] = {}
    for tree, of_axes in zip(arrays, letters, strict=True):
        for leaf in jax.tree.leaves(tree):
            for letter, size in zip(of_axes, leaf.shape, strict=False):
                sizes[letter] = max(size, sizes.get(letter, 1))
    return sizes


def _over(mesh: AbstractMesh, free: Sequence[str], sizes: dict[str, int]) -> dict[str, Any]:
    """The axes of the mesh over which each letter is spread."""
    chosen, devices = [], 1
    for name in free:
        if name != MODEL and sizes[ROWS] % (devices * mesh.shape[name]) == 0:
            chosen.append(name)
            devices *= mesh.shape[name]
    # query heads stay with the head of keys that they share; a single one goes to every device
    heads = [sizes[letter] for letter in HEADS if sizes.get(letter, 1) > 1]
    divide = MODEL in free and all(number % mesh.shape[MODEL] == 0 for number in heads)
    return {ROWS: tuple(chosen) or None} | dict.fromkeys(HEADS, MODEL if divide and heads else None)
