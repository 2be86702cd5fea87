"""Models with the decoder's interface whose answers are known beforehand, and rows made up from a formula."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcr.evaluation.results import Row
from lcr.evaluation.statistics import wilson_interval

DIGIT = 4  # id of the digit 0 in the tokenizer of words
VOCAB = 16


class Counter(nnx.Module):
    """What both have: logits that choose one token after each of this call's last positions."""

    def choose(self, token: jax.Array, logits_at: jax.Array | None, length: int) -> jax.Array:
        if logits_at is not None:
            assert logits_at.shape == (token.shape[0], 1)
            length = 1
        return jnp.tile(jax.nn.one_hot(token, VOCAB)[:, None], (1, length, 1))


class Remembering(Counter):
    """Answers a passkey prompt rightly, from the first five digits it ever saw."""

    def init_states(self, batch, capacity):
        return {"digits": jnp.zeros((1, batch, 5), jnp.int32), "seen": jnp.zeros((1, batch), jnp.int32)}

    def __call__(self, tokens, states, segment_ids=None, logits_at=None):
        is_digit = (tokens >= DIGIT) & (tokens < DIGIT + 10)
        if segment_ids is not None:
            is_digit &= segment_ids != 0
        seen = states["seen"][0]
        place = seen[:, None] + jnp.cumsum(is_digit, axis=1, dtype=jnp.int32) - 1
        place = jnp.where(is_digit & (place < 5), place, 5)  # 5: dropped
        rows = jnp.arange(tokens.shape[0])[:, None]
        digits = states["digits"][0].at[rows, place].set(tokens, mode="drop")
        seen = seen + is_digit.sum(axis=1, dtype=jnp.int32)
        answer = jnp.take_along_axis(digits, (seen % 5)[:, None], axis=1)[:, 0]
        logits = self.choose(answer, logits_at, tokens.shape[1])
        return logits, {"digits": digits[None], "seen": seen[None]}


class Constant(Counter):
    """Always answers with the same digit."""

    def init_states(self, batch, capacity):
        return {"seen": jnp.zeros((1, batch), jnp.int32)}

    def __call__(self, tokens, states, segment_ids=None, logits_at=None):
        answer = jnp.full((tokens.shape[0],), DIGIT + 3, jnp.int32)
        return self.choose(answer, logits_at, tokens.shape[1]), {"seen": states["seen"] + 1}


class Hashing(Counter):
    """Answers from a hash of all tokens in their order: one token more, less or elsewhere changes it."""

    def init_states(self, batch, capacity):
        return {"hash": jnp.zeros((1, batch), jnp.uint32), "capacity": jnp.full((1, batch), capacity, jnp.int32)}

    def __call__(self, tokens, states, segment_ids=None, logits_at=None):
        valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0

        def step(hash, item):
            token, valid = item
            return jnp.where(valid, mix(hash, token.astype(jnp.uint32)), hash), None

        hash, _ = jax.lax.scan(step, states["hash"][0], (tokens.T, valid.T))
        logits = self.choose((hash % jnp.uint32(VOCAB)).astype(jnp.int32), logits_at, tokens.shape[1])
        return logits, {**states, "hash": hash[None]}


def mix(hash: jax.Array, token: jax.Array) -> jax.Array:
    hash = hash * jnp.uint32(2654435761) + token + jnp.uint32(12345)
    return hash ^ (hash >> jnp.uint32(15))


def hashed_answer(prompt: np.ndarray, answer_length: int) -> list[int]:
    """What `Hashing` answers to a prompt read in one go."""
    answer: list[int] = []
    value = 0
    for token in prompt.tolist():
        value = mix_int(value, token)
    while len(answer) < answer_length:
        answer.append(value % VOCAB)
        value = mix_int(value, answer[-1])
    return answer


def mix_int(hash: int, token: int) -> int:
    hash = (hash * 2654435761 + token + 12345) % 2**32
    return hash ^ (hash >> 15)


def make_row(architecture: str = "mamba", length: int = 1024, depth: float = 0.5, right: int = 19, **changes) -> Row:
    """A row with 20 samples, `right` of them right."""
    values = {
        "architecture": architecture,
        "task": "passkey",
        "haystack": "repeat",
        "question": "last",
        "length": length,
        "depth": depth,
        "needle_position": round(length * depth),
        "samples": 20,
        "answer_length": 5,
        "exact_match": right / 20,
        "exact_match_low": wilson_interval(right, 20)[0],
        "exact_match_high": wilson_interval(right, 20)[1],
        "digit_accuracy": right / 20,
        "digit_accuracy_low": wilson_interval(5 * right, 100)[0],
        "digit_accuracy_high": wilson_interval(5 * right, 100)[1],
        "chance_exact_match": 1e-5,
        "chance_digit": 0.1,
        "state_bytes": 17408,
        "tokens_per_second": 123456.0,
        "batch": 20,
        "peak_memory_bytes": 512_000_000,
        "seed": 0,
        "checkpoint_step": 400,
        "training_length": 640,
        "git_commit": "0123456789abcdef",
        "versions": {"python": "3.12.0", "jax": "0.12.0", "flax": "0.12.12", "lcr": "0.1.0"},
        "date": "2026-11-23T06:40:12+00:00",
    }
    return Row(**{**values, **changes})
