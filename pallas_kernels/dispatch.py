"""How an op chooses among its implementations: a name is obeyed or raises; a default is logged once.

An implementation is whatever has `run` (most are modules), a function of the op's arguments as its public function has
checked them; where it does not take every call it has `supports`, of the same arguments, which gives the reason.
"""

import contextlib
import contextvars
import difflib
import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mesh import Axes, on_each_device

logger = logging.getLogger("pallas_kernels")


class Implementation(NamedTuple):
    """One that is no module."""

    run: Callable


def call(
    op: str,
    implementations: Mapping[str, Any],
    name: str | None,
    candidates: Collection[str],
    axes: Axes,
    *arguments: Any,
) -> Any:
    """What the implementation called `name` gives for the arguments; or, without a name, the first of the candidates
    that supports them (logged the first time it is chosen).

    axes: of the arguments and results, by which the call is spread over the devices of a mesh: `pallas_kernels.mesh`.
    Raises: ValueError for a name that the op does not have, naming the nearest and listing all, and for one that does
    not support the call, saying why.
    """

    def run(*arguments: Any) -> Any:
        def why_not(name: str) -> str | None:
            if name.startswith("mosaic_") and jax.config.jax_enable_x64:
                return "has kernels for JAX's 32-bit mode alone, and jax_enable_x64 is set"
            supports = getattr(implementations[name], "supports", None)
            return None if supports is None else supports(*arguments)

        return implementations[_choose(op, implementations, name, candidates, why_not)].run(*arguments)

    return on_each_device(run, arguments, axes)


def _choose(
    op: str,
    implementations: Collection[str],
    name: str | None,
    candidates: Iterable[str],
    why_not: Callable[[str], str | None],
) -> str:
    if name is None:
        chosen = next(candidate for candidate in candidates if why_not(candidate) is None)
        _log_once(op, chosen)
        if (defaults := _defaults.get()) is not None:
            defaults.append((op, chosen))
        return chosen
    if name not in implementations:
        close = difflib.get_close_matches(str(name), implementations, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"implementation={name!r}: {op} has {', '.join(sorted(implementations))}.{hint}")
    if (reason := why_not(name)) is not None:
        raise ValueError(f"implementation={name!r}: {op} {reason}; leave it out for one that supports the call")
    return name


_defaults: contextvars.ContextVar[list[tuple[str, str]] | None] = contextvars.ContextVar("defaults", default=None)


@contextlib.contextmanager
def recording_defaults() -> Iterator[list[tuple[str, str]]]:
    """A list of (op, implementation) to which each is appended that is taken inside where none was named."""
    token = _defaults.set([])
    try:
        yield _defaults.get()
    finally:
        _defaults.reset(token)


@functools.cache
def _log_once(op: str, name: str) -> None:
    logger.info("%s: using the %r implementation", op, name)


def check_dtypes(floats: Mapping[str, Any], segment_ids: Any) -> None:
    """Raises: ValueError for an array among `floats` (arrays by name, or None) that is no float, or ids that are no integers."""
    for name, array in floats.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} of dtype {array.dtype}: expected a float dtype; cast it")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids of dtype {segment_ids.dtype}: expected int32; cast them")


def compute_dtype(arguments: Mapping[str, Any]) -> Any:
    """float64 if any of the arrays is, else float32. arguments: arrays, or pytrees of them, by name; or None.

    Raises: ValueError for an array that is not of a float dtype: cast to one, it would be returned truncated.
    """
    dtypes = {(name, leaf.dtype) for name, tree in arguments.items() for leaf in jax.tree.leaves(tree)}
    for name, dtype in dtypes:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name}: dtype {dtype}; expected a float dtype; cast it")
    return np.dtype(np.float64 if any(dtype == np.float64 for _, dtype in dtypes) else np.float32)


def loop_forward(loop: Callable, chunked: Callable, scale_at: int | None = None) -> Callable:
    """The token loop, where it is the faster one forward, and the chunked form where a gradient is asked for.

    Both take the same positional arguments, all arrays (or None) but the number at `scale_at` (None: there is none).
    """

    def forward(*arguments):
        if scale_at is None:
            return jax.vjp(chunked, *arguments)
        before, scale, after = arguments[:scale_at], arguments[scale_at], arguments[scale_at + 1 :]
        return jax.vjp(lambda *arrays: chunked(*arrays[:scale_at], scale, *arrays[scale_at:]), *before, *after)

    def backward(*scale_pullback_cotangents):
        *_, pullback, cotangents = scale_pullback_cotangents
        return pullback(cotangents)

    run = jax.custom_vjp(loop, nondiff_argnums=() if scale_at is None else (scale_at,))
    run.defvjp(forward, backward)
    return run
