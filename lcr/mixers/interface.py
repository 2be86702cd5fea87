"""The one interface: what every sequence mixer is, and what it promises.

    y, state = mixer(x, state, segment_ids=segment_ids)        # x, y: [B, T, D]; any T >= 1

Output first, state second (`jax.lax.scan` wants them the other way round: wrap once). The same call trains
(`state=None`), prefills piece by piece, and decodes (`T == 1`). The laws that every entry of `lcr.MIXERS` keeps
(split, causality, packing, padding, batch, reference, precision, transforms, cost) are `tests/mixers/test_laws.py`.
"""

from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from lcr.typing import Activations, SegmentIds, State


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
