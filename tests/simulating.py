"""Simulated kernels in half the time: JAX's interpreters are Python functions that a program calls back, some ten
thousand times a kernel, and what they are called with is put on a device each time, although they only read numbers
from it."""

import types

import numpy as np
from jax._src import callback


def without_devices() -> None:
    """Callbacks get NumPy arrays. Of no effect where JAX has changed so that this does not fit."""
    if not hasattr(callback, "api"):
        return
    callback.api = types.SimpleNamespace(device_put=lambda arguments, device: arguments)
    try:
        from jax._src.pallas.mosaic_gpu.interpret import shared_memory
    except ImportError:
        return
    to_int = getattr(shared_memory, "_to_int", None)
    if to_int is not None:  # which takes arrays of JAX alone
        shared_memory._to_int = lambda x: int(x) if isinstance(x, np.ndarray) else to_int(x)
