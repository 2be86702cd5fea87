"""How a training state and its batches are laid out over a mesh of devices: fully sharded data parallelism.

    mesh = jax.make_mesh((8,), ("data",))
    state = jax.device_put(state, state_shardings(state, mesh))
    batch = jax.device_put(batch, batch_shardings(batch, mesh))
    with jax.set_mesh(mesh):                    # around every call of the step, so that kernels find it when it is traced
        state = step(state, batch)              # `make_step`'s, as on one device

Each device has its rows of the batch and a part of every large parameter and of what the optimizer keeps of it (arXiv
1910.02054, stage 3); XLA's partitioner gathers a layer's parameters where they are used and scatters the sums of their
gradients. The state that `make_step` gives is laid out as the one it was given. Kernels run on each device's rows:
`pallas_kernels.mesh`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

DATA = "data"
LARGE = 2**16  # elements; a smaller array is kept whole on every device

Shardings = Any  # a pytree of `NamedSharding`


def state_shardings(state: Any, mesh: Mesh | AbstractMesh) -> Shardings:
    """For each leaf of a training state (arrays, or their shapes): cut along its longest axis that the devices divide.

    Never along the first one of the stacked layers: the scan over layers takes them one by one.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        stacked = any(name.startswith("groups.") for name in names)
        return NamedSharding(mesh, _cut(leaf.shape, mesh.shape[DATA], int(stacked)))

    return jax.tree.map_with_path(place, state)


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> Shardings:
    """For what `select_predictions` gives: each device has its rows."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec(DATA)), batch)


def _cut(shape: tuple[int, ...], devices: int, first: int) -> PartitionSpec:
    axes = [axis for axis in range(first, len(shape)) if shape[axis] % devices == 0]
    if math.prod(shape[first:]) < LARGE or not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(DATA if axis == longest else None for axis in range(len(shape))))
