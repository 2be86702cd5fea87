"""Local text files as a TFDS dataset, built once and kept: one example per file, in array_record, no TensorFlow."""

import contextlib
import glob
import hashlib
import io
import json
import logging
import os
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tensorflow_datasets as tfds

FORMAT = 1  # raise it when what is built from the same files changes
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """What is known about a built dataset, kept beside it as corpus.json.

    documents, text_bytes: files in it, and their size.
    skipped:               files left out, being empty or not UTF-8.
    sha256:                of names (relative to the folder that all files share) and contents, in order of names.
    """

    documents: int
    text_bytes: int
    skipped: int
    sha256: str


class TextFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS dataset of `(name, contents)` pairs; `text` and `name` are its features, "train" its split."""

    name = "text_files"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; the inherited property looks for checksums beside this file

    def __init__(self, documents: Iterator[tuple[str, bytes]], data_dir: str):
        self._documents = documents
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": text, "name": text}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for name, contents in self._documents:
            yield name, {"text": contents, "name": name}


def glob_files(pattern: str) -> list[str]:
    """The files that a glob matches, `**` for any depth, sorted. Raises ValueError if there are none."""
    matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    # A dangling link is kept, to be reported by whoever reads it.
    files = sorted({os.path.abspath(match) for match in matches if os.path.isfile(match) or not os.path.exists(match)})
    if not files:
        raise ValueError(f"'files:{pattern}' matches no file: expected a glob such as 'files:~/notes/**/*.md'")
    return files


def stdlib_files() -> list[str]:
    """The Python standard library's own source files, its tests and installed packages left out, sorted."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY]
        found += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise ValueError(f"'stdlib': there is no source file under {root}: give a corpus of your own, 'files:<glob>'")
    return sorted(found)


def files_dataset(files: Sequence[str], cache: Path, source: str) -> tuple[Path, Corpus]:
    """The folder of the dataset built from these files: an earlier one if no path, size or time of change differs.

    It is built beside its place and moved there when complete, so that a run that is killed leaves nothing half
    done and several may build at once. Datasets of earlier contents stay in the cache until someone deletes them.

    Raises ValueError naming the file that cannot be read, or where no file has any text.
    """
    folder = cache / "files" / fingerprint(files, source)
    if not folder.exists():
        build(files, folder, source)
    return folder, Corpus(**json.loads((folder / "corpus.json").read_text()))


def fingerprint(files: Sequence[str], source: str) -> str:
    digest = hashlib.sha256(f"{FORMAT}\n".encode())
    for path in files:
        try:
            status = os.stat(path)
        except OSError as error:
            raise unreadable(source, path, error) from error
        digest.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def build(files: Sequence[str], folder: Path, source: str) -> None:
    logging.info("%s: building a dataset of %d files in %s (once)", source, len(files), folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as temporary:
        reader = Reader(files, source)
        builder = TextFiles(reader.documents(), temporary)
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS would speak of downloads and of the temporary folder
                builder.download_and_prepare()
        finally:
            tfds.enable_progress_bar()
        built = Path(builder.data_dir)
        (built / "corpus.json").write_text(json.dumps(asdict(reader.corpus())))
        try:
            built.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, with the same contents
                raise


class Reader:
    """Reads files one after another and keeps the tally."""

    def __init__(self, files: Sequence[str], source: str):
        self.files = files
        self.source = source
        self.read = self.text_bytes = self.empty = 0
        self.not_utf8: list[str] = []
        self.digest = hashlib.sha256()

    def documents(self) -> Iterator[tuple[str, bytes]]:
        root = os.path.dirname(os.path.commonprefix([os.path.dirname(path) + os.sep for path in self.files]))
        for path in self.files:
            try:
                contents = Path(path).read_bytes()
            except OSError as error:
                raise unreadable(self.source, path, error) from error
            if not contents:
                self.empty += 1
                continue
            if not is_utf8(contents):
                self.not_utf8.append(path)
                continue
            name = os.path.relpath(path, root)
            self.read += 1
            self.text_bytes += len(contents)
            self.digest.update(os.fsencode(name) + b"\0" + hashlib.sha256(contents).digest())
            yield name, contents
        if self.not_utf8:
            shown = ", ".join(self.not_utf8[:5]) + (", ..." if len(self.not_utf8) > 5 else "")
            logging.warning(
                "%s: left out %d of %d files, not UTF-8: %s", self.source, len(self.not_utf8), len(self.files), shown
            )
        if not self.read:
            raise ValueError(f"'{self.source}': each of its {len(self.files)} files is empty or not UTF-8 text")

    def corpus(self) -> Corpus:
        return Corpus(self.read, self.text_bytes, self.empty + len(self.not_utf8), self.digest.hexdigest())


def is_utf8(contents: bytes) -> bool:
    try:
        contents.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def unreadable(source: str, path: str, error: OSError) -> ValueError:
    return ValueError(f"'{source}': cannot read {path}: {error.strerror}. Mend the file or leave it out of the glob")
