"""The one interface: what every sequence mixer is, and what it promises.

    y, state = mixer(x, state, segment_ids=segment_ids)        # x, y: [B, T, D]; any T >= 1

Output first, state second (`jax.lax.scan` wants them the other way round: wrap once). The same call trains
(`state=None`), prefills piece by piece, and decodes (`T == 1`). The laws that every entry of `lcr.MIXERS` keeps
(split, causality, packing, padding, batch, reference, precision, transforms, cost) are `tests/mixers/test_laws.py`.
"""

import difflib
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from lcr.typing import Activations, Array, SegmentIds, State


@runtime_checkable
class Mixer(Protocol):
    """A sequence mixer: a Flax module from `[B, T, D]` to `[B, T, D]` that reads strictly from the past."""

    def __call__(
        self, x: Activations, state: State | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, State]:
        """Mixes `T` more tokens.

        x: activations, cast to the mixer's compute dtype; the output has that dtype.
        state: what an earlier call (or `init_state`) returned; None starts fresh, with room for these T tokens.
        segment_ids: 0 is padding (state untouched, output zero); a change of id is a document boundary (everything
            from before is forgotten, positions restart); None: all tokens belong to the document in hand. What
            stands in padding does not matter, as long as it is finite.
        """
        ...

    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> State:
        """An empty state: a small immutable pytree with axis 0 the batch.

        capacity: how many tokens a growing cache must hold; past it the oldest entry is dropped, so the cache
            becomes a sliding window. Constant-size states ignore it.
        dtype: of cached activations; the mixer's compute dtype if None. Recurrent accumulators are float32.
        """
        ...


@runtime_checkable
class MixerConfig(Protocol):
    """What `MIXERS` holds: a frozen dataclass of options, every one with a sound default."""

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> Mixer: ...


def state_bytes(state: State) -> int:
    """Bytes that a state (any pytree of arrays, or of `jax.ShapeDtypeStruct`) holds."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def check_call(mixer: Mixer, x: Array, state: State | None, segment_ids: Array | None) -> None:
    """What every mixer asks of a call, before it reads anything: ids for the tokens of x, and a state of its own.

    Raises: ValueError for ids of another shape than x's first two axes, and for a state of another mixer, of another
    batch size or of other sizes.
    """
    check_segment_ids(segment_ids, x, "x")
    if state is not None:
        check_state("state", state, functools.partial(mixer.init_state, x.shape[0]), f"x has {x.shape[0]} rows")


def check_segment_ids(segment_ids: Array | None, tokens: Array, name: str) -> None:
    """`segment_ids` must have the first two axes of `tokens`, the argument `name`. Raises: ValueError."""
    if segment_ids is not None and segment_ids.shape != tokens.shape[:2]:
        raise ValueError(
            f"segment_ids: of shape {segment_ids.shape}, expected {tokens.shape[:2]}, an id for each token: {name} has "
            f"shape {tokens.shape}"
        )


def check_state(
    argument: str, state: State, init_state: Callable[[int], State], rows: str, batch_axis: int = 0
) -> None:
    """`state` must be of the kind that `init_state(capacity)` makes, for some capacity.

    rows: how many rows the call has, in words. batch_axis: of the state's leaves.
    Raises: ValueError naming the argument, what it is and what was expected.
    """
    small, large = [jax.eval_shape(functools.partial(init_state, capacity)) for capacity in (1, 2)]
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


def _kind(state: State) -> str:
    """The types that a state is made of."""
    if isinstance(state, tuple):
        return "(" + ", ".join(_kind(part) for part in state) + ")"
    return f"a {type(state).__name__}"


def unknown_name(kind: str, name: object, known: Any) -> str:
    """The message for a name that is not known: names the nearest one, then lists them all."""
    names = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."


def check_choice(argument: str, value: object, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{argument}: " + unknown_name("value", value, known))


def check_positive(**arguments: object) -> None:
    """Each argument must be a number above zero."""
    for argument, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{argument}={value!r}: expected a number above 0")


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


def check_whole(**arguments: object) -> None:
    """Each argument must be a whole number above zero."""
    for argument, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{argument}={value!r}: expected a whole number above 0")
