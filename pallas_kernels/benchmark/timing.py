"""How a call on a device is timed, and what the device itself can do."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

BEYOND_CACHE = 256 << 20  # bytes: of all inputs together, which calls use in turns; above any L2
SAMPLE = 0.02  # seconds that a sample of calls is to take, so that starting it does not count
SAMPLES = 15
LONGEST = 2.0  # seconds for all samples of a call


def median_seconds(call: Callable[[int], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Seconds of a call, of which many are started before the last is waited for: the median of many samples.

    call: starts a computation on its n-th inputs (of as many as it likes, in turns), and gives what to wait for.
    """
    wait(call(0))  # compiles
    wait(call(1))
    once = _seconds(call, 1, wait)
    calls = max(1, round(SAMPLE / max(once, 1e-7)))
    samples = max(3, min(SAMPLES, round(LONGEST / max(once * calls, 1e-7))))
    return statistics.median(_seconds(call, calls, wait) / calls for _ in range(samples))


def _seconds(call: Callable[[int], Any], calls: int, wait: Callable[[Any], Any]) -> float:
    start = time.perf_counter()
    for number in range(calls):
        result = call(number)
    wait(result)
    return time.perf_counter() - start


def inputs(shapes: Sequence[tuple[int, ...]], dtype: Any, sets: int) -> list[tuple[jax.Array, ...]]:
    """Standard normal arrays of the shapes, so many times."""
    make = jax.jit(
        lambda key: tuple(jax.random.normal(jax.random.fold_in(key, i), s, dtype) for i, s in enumerate(shapes))
    )
    return [make(jax.random.key(number)) for number in range(sets)]


def both(function: Callable, *arguments: jax.Array) -> tuple:
    """What the function gives for all arguments but the last, and their gradients, given that cotangent."""
    *arguments, cotangent = arguments
    o, pullback = jax.vjp(function, *arguments)
    return o, pullback(cotangent)


def supported(name: str, function: Callable, arguments: tuple[jax.Array, ...]) -> bool:
    """Whether the implementation `name`, which the function asks for, takes such arguments on this device."""
    try:
        jax.eval_shape(function, *arguments)
    except ValueError as error:
        if str(error).startswith(f"implementation={name!r}"):
            return False
        raise
    return True


def sets_of(shapes: Sequence[tuple[int, ...]], itemsize: int) -> int:
    """How many sets of inputs are larger than the cache, 16 at most."""
    size = itemsize * sum(_product(shape) for shape in shapes)
    return min(16, -(-BEYOND_CACHE // size) + 1)


def matrix_flops(side: int) -> float:
    """Operations per second of a square bfloat16 matrix product."""
    pairs = inputs([(side, side)] * 2, jnp.bfloat16, 2)
    product = jax.jit(lambda a, b: a @ b)
    return 2 * side**3 / median_seconds(lambda number: product(*pairs[number % 2]))


def copy_bandwidth(size: int) -> float:
    """Bytes per second, read and written, of copying so many bytes from the device's memory to itself."""
    (array,) = inputs([(size // 2,)], jnp.bfloat16, 1)[0]
    copy = jax.jit(lambda a: -a)  # a plain copy may be left out
    return 2 * size / median_seconds(lambda _: copy(array))


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
