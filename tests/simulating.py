"""Simulated kernels in half the time: JAX's interpreters are Python functions that a program calls back, some ten
thousand times a kernel, and what they are called with is put on a device each time, although they only read numbers
from it."""

import types

import numpy as np
from jax._src import callback


def without_devices() -> None:
    """Callbacks, all of the process, get NumPy arrays. Of no effect where JAX has no such place any more."""
    if not hasattr(callback, "api"):
        return
    callback.api = types.SimpleNamespace(**vars(callback.api) | {"device_put": lambda arguments, device: arguments})
    try:
        from jax._src.pallas.mosaic_gpu.interpret import shared_memory
    except ModuleNotFoundError:  # another JAX than the ones looked at: its interpreter shows what it takes
        return
    to_int = getattr(shared_memory, "_to_int", None)
    if to_int is not None:  # which takes arrays of JAX alone
        shared_memory._to_int = lambda x: int(x) if isinstance(x, np.ndarray) else to_int(x)
