"""Text corpora by name, read through tensorflow-datasets (TFDS) without TensorFlow.

    tfds:<name>[/config][:version][:split]     any TFDS text dataset, downloaded by TFDS if it is not there yet
    files:<glob>                               local files, built into a TFDS dataset once (`lcr.data.files`)
    stdlib                                     the Python standard library's own source files, about 11 MB
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TFDS_SOURCE = re.compile(
    r"(?P<builder>\w+(/[\w.+-]+)?(:\d+\.(\d+|\*)\.(\d+|\*))?)(:(?P<split>[a-zA-Z_][^/]*))?", re.ASCII
)


@dataclass(frozen=True)
class TextSource:
    """Documents by index, each as its bytes in UTF-8: a random-access source for `grain.MapDataset.source`.

    fingerprint: names the contents; a run that goes on with another corpus than it began with can tell.
    """

    name: str
    fingerprint: str
    records: Sequence[dict[str, Any]]
    field: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes:
        return self.records[index][self.field]


def cache_dir(data_dir: str | os.PathLike | None = None) -> Path:
    """`data_dir`, else $LCR_DATA_DIR, else $XDG_CACHE_HOME/lcr, else ~/.cache/lcr."""
    chosen = data_dir or os.environ.get("LCR_DATA_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lcr"


def open_source(
    source: str, split: str = "train", field: str | None = None, data_dir: str | os.PathLike | None = None
) -> TextSource:
    """Opens a corpus.

    source:   see the head of this file. A split in it goes before the argument.
    split:    in the language of TFDS: "train", "test", "train[:90%]", "train[90%:]". Files are all "train".
    field:    which text of an example to take; None takes "text", or the only one there is.
    data_dir: where datasets are kept: of `files` and `stdlib`, see `cache_dir`; of `tfds:`, TFDS's own place if None.

    Raises ValueError for an unknown form, dataset, config, split or field, for a glob without a match, a file that
    cannot be read, a corpus without text, and a dataset prepared in a format without random access; OSError where
    there is no network or no room to prepare one.
    """
    # TFDS takes about a second to import: only programs that read text pay for it.
    import tensorflow_datasets as tfds

    from lcr.data.files import files_dataset, glob_files, stdlib_files

    if source.startswith("tfds:"):
        return open_tfds(source, split, field, data_dir)
    if source.startswith("files:"):
        files = glob_files(source.removeprefix("files:"))
    elif source == "stdlib":
        files = stdlib_files()
    else:
        raise ValueError(
            f"source={source!r}: expected 'tfds:<name>[/config][:version][:split]', 'files:<glob>' or 'stdlib'"
        )
    folder, corpus = files_dataset(files, cache_dir(data_dir), source)
    return read(tfds.builder_from_directory(folder), source, split, field, corpus.sha256[:16])


def open_tfds(source: str, split: str, field: str | None, data_dir: str | os.PathLike | None) -> TextSource:
    import tensorflow_datasets as tfds

    match = TFDS_SOURCE.fullmatch(source.removeprefix("tfds:"))
    if match is None:
        raise ValueError(f"source={source!r}: expected 'tfds:<name>[/config][:version][:split]'")
    name = match["builder"]
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        close = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=1)
        hint = f" Did you mean 'tfds:{close[0]}'?" if close else ""
        raise ValueError(f"source={source!r}: tensorflow-datasets knows no dataset {name!r}.{hint}") from error
    except ValueError as error:
        raise ValueError(f"source={source!r}: {error}") from error
    if not builder.is_prepared():
        try:
            builder.download_and_prepare(file_format="array_record")
        except OSError as error:  # no network, no room
            raise OSError(f"source={source!r}: could not be prepared in {builder.data_dir}: {error}") from error
    return read(builder, source, match["split"] or split, field, builder.info.full_name)


def read(builder: Any, source: str, split: str, field: str | None, fingerprint: str) -> TextSource:
    import tensorflow_datasets as tfds

    features = builder.info.features
    texts = [key for key in sorted(features) if isinstance(features[key], tfds.features.Text)]
    if field is None:
        field = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if field not in texts:
        raise ValueError(f"source={source!r}, field={field!r}: expected one of its text fields: {', '.join(texts)}")
    try:
        documents = builder.info.splits[split].num_examples
    except ValueError as error:
        names = ", ".join(builder.info.splits)
        raise ValueError(
            f"source={source!r}, split={split!r}: its splits are {names}, and a part is written 'train[:90%]'"
        ) from error
    if not documents:
        raise ValueError(f"source={source!r}, split={split!r}: it has no example")
    try:
        records = builder.as_data_source(split)
    except NotImplementedError as error:  # TFDS's own word for it
        raise ValueError(
            f"source={source!r} is prepared in {builder.data_dir} in a format without random access: delete it there, "
            "or give another data_dir, and it is prepared as array_record"
        ) from error
    return TextSource(source, f"{fingerprint}/{split}/{documents}", records, field)
