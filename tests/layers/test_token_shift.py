"""The token shift: padding passed over, boundaries forgotten, any cut through its state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lcr.layers.segments import read_segments
from lcr.layers.token_shift import token_shift
from tolerances import assert_close

IDS = np.array([[0, 3, 3, 0, 0, 3, 5, 0, 5, 5], [1, 1, 2, 1, 0, 0, 0, 0, 0, 0], [0] * 10, [4] * 10], np.int32)
ROWS, LENGTH = IDS.shape


def expected(x, last, ids, segment_id, position):
    """Token by token: what a reader of one row would write down."""
    previous, last, here, position = np.zeros_like(x), last.copy(), segment_id.copy(), position.copy()
    for b in range(len(x)):
        for t in range(x.shape[1]):
            if ids[b, t] == 0:
                continue
            if here[b] not in (0, ids[b, t]):
                position[b] = 0
            previous[b, t] = last[b] if position[b] else 0
            last[b], here[b], position[b] = x[b, t], ids[b, t], position[b] + 1
    return previous, last


def inputs(batch=ROWS):
    x, last = jax.random.normal(jax.random.key(0), (2, batch, LENGTH, 3))
    return x, last[:, 0]


@pytest.mark.parametrize("read", [0, 7])
def test_the_previous_real_token_of_the_document(read):
    x, last = inputs()
    last = last if read else jnp.zeros_like(last)
    segment_id = np.array([3, 9, 3, 4], np.int32) * (read > 0)
    position = np.full(ROWS, read, np.int32)
    segments = read_segments(jnp.asarray(IDS), jnp.asarray(segment_id), jnp.asarray(position), LENGTH)
    found = token_shift(x, last, segments)
    assert_close(found, expected(np.asarray(x), np.asarray(last), IDS, segment_id, position), "exact")


@pytest.mark.parametrize("cuts", [(1, 4, 7), (3, 8, 9)])
@pytest.mark.parametrize("packed", [False, True])
def test_pieces_equal_the_whole(packed, cuts):
    x, last = inputs()
    ids = jnp.asarray(IDS) if packed else None
    segment_id, position = jnp.array([3, 9, 3, 4], jnp.int32), jnp.full((ROWS,), 7, jnp.int32)
    whole = token_shift(x, last, read_segments(ids, segment_id, position, LENGTH))
    outputs = []
    for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        part = None if ids is None else ids[:, start:end]
        segments = read_segments(part, segment_id, position, end - start)
        previous, last = token_shift(x[:, start:end], last, segments)
        segment_id, position = segments.segment_id, segments.position
        outputs.append(previous)
    assert_close((jnp.concatenate(outputs, axis=1), last), whole, "exact")


def test_the_state_keeps_its_dtype():
    x, last = inputs()
    nothing = jnp.zeros((ROWS,), jnp.int32)
    segments = read_segments(jnp.asarray(IDS), nothing, nothing, LENGTH)
    previous, after = token_shift(x.astype(jnp.bfloat16), last, segments)
    assert (previous.dtype, after.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(after[2], last[2], "exact", "a row of padding")
