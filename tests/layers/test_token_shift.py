"""The token shift: padding passed over, boundaries forgotten, any cut through its state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lcr.layers.segments import read_segments
from lcr.layers.token_shift import token_shift
from pallas_kernels.tolerances import assert_close

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


def inputs():
    x, last = np.random.default_rng(0).standard_normal((2, ROWS, LENGTH, 3), np.float32)
    return x, last[:, 0]


@jax.jit
def shift(x, last, ids, segment_id, position):
    segments = read_segments(ids, segment_id, position, x.shape[1])
    return *token_shift(x, last, segments), segments.segment_id, segments.position


@pytest.mark.parametrize("read", [0, 7])
def test_the_previous_real_token_of_the_document(read):
    x, last = inputs()
    last = last if read else np.zeros_like(last)
    segment_id = np.array([3, 9, 3, 4], np.int32) * (read > 0)
    position = np.full(ROWS, read, np.int32)
    found = shift(x, last, IDS, segment_id, position)[:2]
    assert_close(found, expected(x, last, IDS, segment_id, position), "exact")


@pytest.mark.parametrize("cuts", [(1, 4, 7), (3, 6, 9)])
@pytest.mark.parametrize("packed", [False, True])
def test_pieces_equal_the_whole(packed, cuts):
    x, last = inputs()
    ids = IDS if packed else None
    segment_id, position = np.array([3, 9, 3, 4], np.int32), np.full((ROWS,), 7, np.int32)
    whole = shift(x, last, ids, segment_id, position)[:2]
    outputs = []
    for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        part = None if ids is None else ids[:, start:end]
        previous, last, segment_id, position = shift(x[:, start:end], last, part, segment_id, position)
        outputs.append(previous)
    assert_close((np.concatenate(outputs, axis=1), last), whole, "exact")


def test_the_state_keeps_its_dtype():
    x, last = inputs()
    nothing = np.zeros((ROWS,), np.int32)
    previous, after, _, _ = jax.device_get(shift(x.astype(jnp.bfloat16), last, IDS, nothing, nothing))
    assert (previous.dtype, after.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(after[2], last[2], "exact", "a row of padding")
