"""What arguments are held to: options of a configuration when it is made, and what a call is given.

Every function raises a ValueError that names the argument, its value and what was expected.
"""

import difflib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcr.typing import Array, State


def unknown_name(kind: str, name: object, known: Any) -> str:
    """The message for a name that is not known: names the nearest one, then lists them all."""
    names = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."


def check_choice(argument: str, value: object, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{argument}: " + unknown_name("value", value, known))


def check_whole(**arguments: object) -> None:
    """Each argument must be a whole number above zero."""
    for argument, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{argument}={value!r}: expected a whole number above 0")


def check_positive(**arguments: object) -> None:
    """Each argument must be a number above zero."""
    for argument, value in arguments.items():
        if not is_number(value) or value <= 0:
            raise ValueError(f"{argument}={value!r}: expected a number above 0")


def is_number(value: object) -> bool:
    """Whether it is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_flags(**arguments: object) -> None:
    """Each argument must be True or False."""
    for argument, value in arguments.items():
        if not isinstance(value, bool):
            raise ValueError(f"{argument}={value!r}: expected True or False")


def check_compute(dtype: object, implementation: object, known: Any) -> None:
    """`dtype` names a float type, and `implementation` (if any) is one of those that the mixer's op has."""
    try:
        good = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"dtype={dtype!r}: expected a float type, such as 'float32' or 'bfloat16'")
    if implementation is not None:
        check_choice("implementation", implementation, known)


def check_call(mixer: Any, x: Array, state: State | None, segment_ids: Array | None) -> None:
    """What every mixer asks of a call, before it reads anything: tokens, ids for them, and a state of its own.

    Raises: ValueError for x that is not [B, T, D] with a float dtype and nothing empty, for ids of another shape than
    x's first two axes, and for a state of another mixer, of another batch size or of other sizes or dtypes.
    """
    if x.ndim != 3 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: {x.dtype} of shape {x.shape}, expected floats of shape [B, T, D] with nothing empty")
    check_segment_ids(segment_ids, x, "x")
    if state is not None:
        check_state("state", state, functools.partial(mixer.init_state, x.shape[0]), f"x has {x.shape[0]} rows")


def check_segment_ids(segment_ids: Array | None, tokens: Array, name: str) -> None:
    """`segment_ids` must be int32 with the first two axes of `tokens`, the argument `name`. Raises: ValueError.

    (JAX reads NumPy's int64 as int32.)
    """
    if segment_ids is None:
        return
    if segment_ids.shape != tokens.shape[:2]:
        raise ValueError(
            f"segment_ids: of shape {segment_ids.shape}, expected {tokens.shape[:2]}, an id for each token: {name} has "
            f"shape {tokens.shape}"
        )
    if jax.dtypes.canonicalize_dtype(segment_ids.dtype) not in (jnp.int32, jnp.int64):
        raise ValueError(f"segment_ids: of dtype {segment_ids.dtype}, expected int32")


def check_state(
    argument: str, state: State, init_state: Callable[[int, Any], State], rows: str, batch_axis: int = 0
) -> None:
    """`state` must be of the kind that `init_state(capacity, dtype)` makes, for some capacity and dtype.

    rows: how many rows the call has, in words. batch_axis: of the state's leaves.
    Raises: ValueError naming the argument, what it is and what was expected.
    """
    small, large = [jax.eval_shape(functools.partial(init_state, *probe)) for probe in ((1, None), (2, jnp.float16))]
    # The kinds as well: two dataclasses with as many fields have equal structures.
    if _kind(state) != _kind(small) or jax.tree.structure(state) != jax.tree.structure(small):
        raise ValueError(f"{argument}: {_kind(state)}, expected {_kind(small)}, from this module's own initial state")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), one, two in zip(leaves, jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        if leaf.ndim > batch_axis and leaf.shape[batch_axis] != one.shape[batch_axis]:
            raise ValueError(f"{argument}: of a batch of {leaf.shape[batch_axis]} rows, {rows}")
        # None: an axis that grows with the capacity
        expected = tuple(a if a == b else None for a, b in zip(one.shape, two.shape, strict=True))
        if leaf.ndim != len(expected) or any(b not in (a, None) for a, b in zip(leaf.shape, expected, strict=True)):
            shape = "(" + ", ".join("any" if n is None else str(n) for n in expected) + ")"
            name = argument + jax.tree_util.keystr(path)
            raise ValueError(f"{name}: of shape {leaf.shape}, expected {shape}: a state of other sizes or options")
        any_float = one.dtype != two.dtype and jnp.issubdtype(leaf.dtype, jnp.floating)  # cached activations
        if leaf.dtype != one.dtype and not any_float:
            name = argument + jax.tree_util.keystr(path)
            raise ValueError(f"{name}: of dtype {leaf.dtype}, expected {one.dtype}: counters and sums keep theirs")


def _kind(state: State) -> str:
    """The types that a state is made of."""
    if isinstance(state, tuple):
        return "(" + ", ".join(_kind(part) for part in state) + ")"
    return f"a {type(state).__name__}"
