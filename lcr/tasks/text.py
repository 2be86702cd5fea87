"""Language modelling on real text: documents of a corpus, packed into rows, every token but a document's first."""

import os

import grain

from lcr.data.sources import TextSource, open_source
from lcr.data.tokenizers import check_writes_any_text, make_tokenizer


class TextTask:
    """Predict the next token of a corpus.

    source:    "stdlib", "files:<glob>" or "tfds:<name>"; split, field, data_dir: see `lcr.data.sources.open_source`.
    tokenizer: one that can write any text: "bytes".

    Raises ValueError for a source that cannot be opened, and for the tokenizer "words", whose closed vocabulary would
    make nearly every word of a real text the unknown one.
    """

    name = "text"

    def __init__(
        self,
        source: str = "stdlib",
        tokenizer: str = "bytes",
        split: str = "train",
        field: str | None = None,
        data_dir: str | os.PathLike | None = None,
    ):
        self.tokenizer = make_tokenizer(tokenizer)
        check_writes_any_text(self.tokenizer.name, "the text task")
        self._source: TextSource = open_source(source, split, field, data_dir)

    def documents(self) -> grain.MapDataset:
        return grain.MapDataset.source(self._source).map(self.tokenizer.encode)

    def fingerprint(self) -> str:
        return self._source.fingerprint
