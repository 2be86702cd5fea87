"""Packing: nothing lost, nothing mixed, documents cut at the ends of rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lcr.data.packing import DocumentStream, as_rows, pack

FIXED = settings(max_examples=100, deadline=None, derandomize=True, database=None)
LENGTHS = st.lists(st.integers(0, 12), max_size=12)


def documents_of(lengths):
    """Documents whose tokens are all different, so that order and origin can be told."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(start + 1, end + 1, dtype=np.int32) for start, end in zip(ends[:-1], ends[1:], strict=True)]


def test_a_small_case_in_full():
    rows = pack(documents_of([4, 2, 6]), 5)
    np.testing.assert_array_equal(rows.tokens, [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 0, 0, 0]])
    np.testing.assert_array_equal(rows.segment_ids, [[1, 1, 1, 1, 2], [1, 2, 2, 2, 2], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.loss_mask, [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]])


@given(lengths=LENGTHS, length=st.integers(1, 9))
@FIXED
def test_no_token_is_lost_and_only_the_end_is_padded(lengths, length):
    documents = documents_of(lengths)
    rows = pack(documents, length)
    real = rows.segment_ids > 0
    np.testing.assert_array_equal(rows.tokens[real], np.arange(1, sum(lengths) + 1))
    np.testing.assert_array_equal(rows.tokens[~real], 0)
    assert real.ravel()[: sum(lengths)].all() and rows.tokens.size - sum(lengths) < length


@given(lengths=LENGTHS, length=st.integers(1, 9))
@FIXED
def test_segments_are_documents_numbered_from_one(lengths, length):
    rows = pack(documents_of(lengths), length)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for row, segments, mask in zip(rows.tokens, rows.segment_ids, rows.loss_mask, strict=True):
        owners = owner[row[segments > 0] - 1]
        changes = np.flatnonzero(np.diff(owners, prepend=-1))
        np.testing.assert_array_equal(segments[segments > 0], np.searchsorted(changes, np.arange(len(owners)), "right"))
        expected = segments > 0
        expected[changes] = False
        np.testing.assert_array_equal(mask, expected)


@given(lengths=LENGTHS.filter(any), takes=st.lists(st.integers(1, 15), max_size=6))
@FIXED
def test_a_stream_taken_in_pieces_is_the_documents_end_to_end(lengths, takes):
    documents = documents_of(lengths)
    stream = DocumentStream(documents * 200, len(documents))
    resumed = DocumentStream(documents * 200, len(documents))
    tokens = np.tile(np.arange(1, sum(lengths) + 1), 200)
    first = np.concatenate([document[:1] for document in documents])
    taken = 0
    for count in takes:
        resumed.position = stream.position
        piece, starts = stream.take(count)
        np.testing.assert_array_equal(piece, tokens[taken : taken + count])
        np.testing.assert_array_equal(starts, np.isin(piece, first))
        np.testing.assert_array_equal(resumed.take(count)[0], piece)
        taken += count


def test_stream_and_pack_agree_on_rows():
    documents = documents_of([4, 2, 6, 3])
    stream = as_rows(*DocumentStream(documents, 4).take(15), length=5, count=15)
    for one, other in zip(stream, pack(documents, 5), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bad_lengths_and_empty_epochs_are_named():
    with pytest.raises(ValueError, match="length=0"):
        pack([], 0)
    empty = [np.zeros(0, np.int32)] * 10
    with pytest.raises(ValueError, match="each of its 3 documents is empty"):
        DocumentStream(empty, 3).take(1)
