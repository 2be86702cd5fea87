"""Reads prompts of any length piece by piece through a model's state, then decodes the answers greedily.

Only the state stays between pieces (its buffers are donated), and only the last position's logits are computed:
for a state of constant size the memory needed does not grow with the length. A prompt's first piece takes what is
left over when the rest is cut into whole pieces, with padding on its left, so that three programs serve every
length: the first piece, a whole piece, and the decoding of the answer (of states that grow with the length, each
length has three of its own).
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int32, Integer

from lcr.checks import check_whole
from lcr.mixers.interface import state_bytes
from lcr.models.token_loop import write
from lcr.typing import Array, Float, Int

NOT_FINITE = -1  # stands for the token where the logits have NaN or infinity: never a right answer


@dataclasses.dataclass(frozen=True)
class Reply:
    """tokens: the decoded answers; `NOT_FINITE` where a model's logits were not finite.
    seconds: what reading the prompts took, compilation and decoding not counted.
    """

    tokens: Int32[np.ndarray, "B P"]
    seconds: float


class Streamer:
    """Streams prompts through `model`, `piece` tokens per call.

    model: as `lcr.make_model` makes it: `model(tokens, states, segment_ids=..., logits_at=...)`, `init_states`.
    """

    def __init__(self, model: nnx.Module, piece: int):
        check_whole(piece=piece)
        self.piece = piece
        self._graph, self._parameters = nnx.split(model)
        self._init_states = model.init_states
        self._programs: dict[tuple, Callable] = {}

        def read(parameters, states, tokens, segment_ids):
            last = jnp.full((tokens.shape[0], 1), tokens.shape[1] - 1, jnp.int32)
            model = nnx.merge(self._graph, parameters)
            logits, states = model(tokens, states, segment_ids=segment_ids, logits_at=last)
            return greedy(logits), states

        def decode(parameters, states, token, steps):
            model = nnx.merge(self._graph, parameters)
            keys = jnp.zeros((steps, 0))  # nothing is drawn
            return write(model, token, states, lambda logits, _: greedy(logits), keys)

        self._read = jax.jit(read, donate_argnames="states")
        self._decode = jax.jit(decode, static_argnames="steps", donate_argnames="states")

    def state_bytes(self, capacity: int) -> int:
        """Bytes of one sequence's state with room for `capacity` tokens."""
        return state_bytes(jax.eval_shape(lambda: self._init_states(1, capacity)))

    def answer(
        self,
        prompts: Integer[np.ndarray, "B T"],
        answer_length: int,
        on_piece: Callable[[int], None] | None = None,
    ) -> Reply:
        """Reads the prompts and decodes `answer_length` tokens for each.

        prompts: one prompt per row, all of the same length, without padding.
        on_piece: called with the tokens per row that have just been read.

        Raises ValueError for an empty prompt.
        """
        batch, length = prompts.shape
        check_whole(length=length, answer_length=answer_length)
        read_first, read_whole, decode = self.programs(batch, length, answer_length)
        states = self._init_states(batch, length + answer_length)

        first = (length - 1) % self.piece + 1
        padding = self.piece - first
        tokens = np.pad(prompts[:, :first].astype(np.int32), ((0, 0), (padding, 0)))
        segment_ids = np.broadcast_to((np.arange(self.piece) >= padding).astype(np.int32), tokens.shape)

        started = time.perf_counter()
        token, states = read_first(self._parameters, states, tokens, segment_ids)
        unreported = first
        for start in range(first, length, self.piece):
            before = token
            tokens = prompts[:, start : start + self.piece].astype(np.int32)
            token, states = read_whole(self._parameters, states, tokens, None)
            # waits for the piece before this one: one call is in flight while the next is prepared, never more
            before.block_until_ready()
            if on_piece:
                on_piece(unreported)
            unreported = self.piece
        token.block_until_ready()
        seconds = time.perf_counter() - started
        if on_piece:
            on_piece(unreported)
        tokens, _ = decode(self._parameters, states, token)
        return Reply(np.asarray(tokens), seconds)

    def programs(self, batch: int, length: int, answer_length: int) -> tuple[Callable, Callable | None, Callable]:
        """The programs that answer `batch` prompts of `length` tokens, compiled if they are not yet.

        `answer` calls this by itself; call it before to keep compilation out of what you measure.
        """
        states = jax.eval_shape(lambda: self._init_states(batch, length + answer_length))
        first = self._program("first", states, batch)
        whole = self._program("whole", states, batch) if length > self.piece else None
        return first, whole, self._program("decode", states, batch, answer_length)

    def _program(self, kind: str, states: Any, batch: int, answer_length: int = 1) -> Callable:
        key = (kind, answer_length, *jax.tree.leaves(states), jax.tree.structure(states))
        if key not in self._programs:
            piece = jax.ShapeDtypeStruct((batch, self.piece), jnp.int32)
            token = jax.ShapeDtypeStruct((batch,), jnp.int32)
            match kind:
                case "first":
                    lowered = self._read.lower(self._parameters, states, piece, piece)
                case "whole":
                    lowered = self._read.lower(self._parameters, states, piece, None)
                case "decode":
                    lowered = self._decode.lower(self._parameters, states, token, steps=answer_length - 1)
            self._programs[key] = lowered.compile()
        return self._programs[key]


def greedy(logits: Float[Array, "B P vocab"]) -> Int[Array, "B"]:
    """The likeliest token at the last position, the lowest id among equals; `NOT_FINITE` if any logit is not finite."""
    last = logits[:, -1]
    token = jnp.argmax(last, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(last).all(axis=-1), token, NOT_FINITE)
