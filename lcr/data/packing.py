"""Documents laid end to end and cut into rows, each token knowing its document by `segment_ids`.

    documents   aaaa bb cccccc            tokens       a a a a b     segment_ids   1 1 1 1 2
    length 5                                           b c c c c                   1 2 2 2 2
                                                       c c . . .                   1 1 0 0 0

A document that reaches the end of a row is cut and goes on in the next row as a new document: rows stand alone, no
token is lost, and only the last row is padded (id 0, segment 0).
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from lcr.data.tokenizers import PADDING


class Rows(NamedTuple):
    """loss_mask: True at the tokens to be predicted from their document: all but its first, and but padding."""

    tokens: Int32[np.ndarray, "B T"]
    loss_mask: Bool[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]


def pack(documents: Iterable[Int32[np.ndarray, "_"]], length: int) -> Rows:
    """All the documents in rows of `length` tokens, in their order; the last row is padded. Empty documents vanish."""
    if length < 1:
        raise ValueError(f"length={length}: expected at least 1")
    documents = [document for document in documents if len(document)]
    count = sum(map(len, documents))
    filled = -(-count // length) * length
    tokens = np.full(filled, PADDING, np.int32)
    starts = np.zeros(filled, np.bool_)
    end = 0
    for document in documents:
        tokens[end : end + len(document)] = document
        starts[end] = True
        end += len(document)
    return as_rows(tokens, starts, length, count)


def as_rows(
    tokens: Int32[np.ndarray, "total"], starts: Bool[np.ndarray, "total"], length: int, count: int
) -> Rows:
    """Rows of a stream of which `count` tokens are real and `starts` marks the first of each document."""
    starts = starts.reshape(-1, length).copy()
    starts[:, :1] = True
    real = (np.arange(starts.size) < count).reshape(-1, length)
    segment_ids = np.where(real, np.cumsum(starts, axis=1, dtype=np.int32), np.int32(0))
    return Rows(tokens.reshape(-1, length), real & ~starts, segment_ids)


class Position(NamedTuple):
    """Where a reader stands: before token `offset` of document number `document`."""

    document: int
    offset: int


@runtime_checkable
class Documents(Protocol):
    """Documents by index: a list, a `grain.MapDataset`."""

    def __getitem__(self, index: int) -> Int32[np.ndarray, "_"]: ...


class DocumentStream:
    """Documents read by the token, epoch after epoch.

    documents: random access to the token ids of every document of every epoch, by one index that goes on rising.
    epoch:     how many documents an epoch has.

    Raises ValueError where a whole epoch has no token.
    """

    def __init__(self, documents: Documents, epoch: int):
        self.documents = documents
        self.epoch = epoch
        self.position = Position(0, 0)
        self._held = (-1, np.zeros(0, np.int32))

    def take(self, count: int) -> tuple[Int32[np.ndarray, "total"], Bool[np.ndarray, "total"]]:
        """The next `count` tokens, and True where the first token of a document stands."""
        tokens = np.empty(count, np.int32)
        starts = np.zeros(count, np.bool_)
        taken = empty = 0
        while taken < count:
            index, offset = self.position
            if self._held[0] != index:
                self._held = (index, self.documents[index])
            piece = self._held[1][offset : offset + count - taken]
            if len(piece):
                tokens[taken : taken + len(piece)] = piece
                starts[taken] = offset == 0
                taken += len(piece)
                empty = 0
                self.position = Position(index, offset + len(piece))
            else:
                empty += offset == 0
                if empty >= self.epoch:
                    raise ValueError(f"the corpus has no text: each of its {self.epoch} documents is empty")
                self.position = Position(index + 1, 0)
        return tokens, starts
