"""Corpora: local files built once and rebuilt on change, TFDS datasets by name, the standard library, bad input."""

import json
import os
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from lcr.data.files import stdlib_files
from lcr.data.sources import TFDS_SOURCE, cache_dir, open_source


class LcrTinyPairs(tfds.core.GeneratorBasedBuilder):
    """A dataset that TFDS knows by name: two texts and a number to an example."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        text = tfds.features.Text()
        features = {"question": text, "answer": text, "score": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"question": f"what is {i}?", "answer": f"it is {i}", "score": i}


def texts(source):
    return sorted(source[i] for i in range(len(source)))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "one.txt").write_text("the first\n")
    (folder / "deep" / "er" / "two.txt").write_text("the second ✓\n")
    (folder / "other.md").write_text("not matched")
    return folder


def built(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "files").iterdir())


def open_files(corpus, pattern="**/*.txt", **options):
    return open_source(f"files:{corpus}/{pattern}", data_dir=corpus.parent / "cache", **options)


def test_files_are_read_by_recursive_glob(corpus):
    source = open_files(corpus)
    assert texts(source) == [b"the first\n", "the second ✓\n".encode()]
    assert "tensorflow" not in sys.modules


def test_files_are_built_once_and_again_when_they_change(corpus, tmp_path):
    first = open_files(corpus)
    folder = tmp_path / "cache" / "files" / built(tmp_path)[0]
    built_at = folder.stat().st_mtime_ns
    again = open_files(corpus)
    assert len(built(tmp_path)) == 1 and folder.stat().st_mtime_ns == built_at
    assert again.fingerprint == first.fingerprint

    (corpus / "one.txt").write_text("the FIRST\n")
    changed = open_files(corpus)
    assert b"the FIRST\n" in texts(changed) and len(built(tmp_path)) == 2
    assert changed.fingerprint != first.fingerprint

    (corpus / "three.txt").write_text("a third\n")
    assert len(open_files(corpus)) == 3


def test_the_fingerprint_is_of_the_contents_wherever_they_lie(corpus, tmp_path):
    before = open_files(corpus).fingerprint
    os.utime(corpus / "one.txt", (1, 1))
    assert open_files(corpus).fingerprint == before
    corpus.rename(tmp_path / "moved")
    assert open_files(tmp_path / "moved").fingerprint == before


def test_a_build_that_fails_leaves_nothing_and_the_next_one_works(corpus, tmp_path, monkeypatch):
    def full_disk(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lcr.data.files.TextFiles._generate_examples", full_disk)
        with pytest.raises(OSError, match="No space left"):
            open_files(corpus)
    assert built(tmp_path) == []
    assert len(open_files(corpus)) == 2


def test_a_faster_builder_wins(corpus, tmp_path, monkeypatch):
    from lcr.data import files

    build = files.build

    def twice(*args):
        build(*args)
        build(*args)  # the second finds the folder in its place

    monkeypatch.setattr(files, "build", twice)
    assert len(open_files(corpus)) == 2
    assert len(built(tmp_path)) == 1


def test_splits_are_parts_of_the_files(corpus):
    for i in range(8):
        (corpus / f"{i}.txt").write_text(str(i))
    parts = [texts(open_files(corpus, split=split)) for split in ("train[:50%]", "train[50%:]")]
    assert [len(part) for part in parts] == [5, 5]
    assert sorted(parts[0] + parts[1]) == texts(open_files(corpus))


def test_files_that_are_not_utf8_are_left_out_and_named(corpus, tmp_path, caplog):
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "empty.txt").touch()
    assert len(open_files(corpus)) == 2
    assert "left out 1 of 4 files, not UTF-8" in caplog.text and "latin.txt" in caplog.text
    folder = tmp_path / "cache" / "files" / built(tmp_path)[0]
    facts = json.loads((folder / "corpus.json").read_text())
    assert (facts["documents"], facts["skipped"], facts["text_bytes"]) == (2, 2, 25)


def test_the_standard_library_is_a_corpus():
    names = [os.path.basename(path) for path in stdlib_files()]
    assert len(names) > 300 and {"argparse.py", "textwrap.py"} <= set(names)
    assert not any("site-packages" in path or f"{os.sep}test{os.sep}" in path for path in stdlib_files())


def test_any_tfds_dataset_opens_by_name(tmp_path):
    answers = open_source("tfds:lcr_tiny_pairs", field="answer", data_dir=tmp_path)
    assert texts(answers) == [f"it is {i}".encode() for i in range(4)]
    tested = open_source("tfds:lcr_tiny_pairs:1.2.0:test", field="question", data_dir=tmp_path)
    assert texts(tested) == [b"what is 0?", b"what is 1?"]
    assert answers.fingerprint != tested.fingerprint


def test_a_source_is_parted_into_name_config_version_and_split():
    def parts(source):
        match = TFDS_SOURCE.fullmatch(source)
        return match and (match["builder"], match["split"])

    assert parts("lm1b") == ("lm1b", None)
    assert parts("wikipedia/20230601.en") == ("wikipedia/20230601.en", None)
    assert parts("wikipedia/20230601.en:train[:90%]") == ("wikipedia/20230601.en", "train[:90%]")
    assert parts("glue/cola:1.0.0:test") == ("glue/cola:1.0.0", "test")
    assert parts("two words") is None


def test_the_cache_is_where_it_is_told_to_be(tmp_path, monkeypatch):
    monkeypatch.delenv("LCR_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "lcr"
    monkeypatch.setenv("LCR_DATA_DIR", str(tmp_path / "env"))
    assert cache_dir() == tmp_path / "env"
    assert cache_dir(tmp_path / "argument") == tmp_path / "argument"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("files:{}/nothing/**/*.txt", {}, "matches no file"),
        ("files:{}/*.txt", {"split": "test"}, "split='test': its splits are train"),
        ("files:{}/*.txt", {"split": "train[:x]"}, r"split='train\[:x\]'"),
        ("files:{}/*.txt", {"split": "train[:0]"}, "it has no example"),
        ("files:{}/*.txt", {"field": "body"}, "field='body': expected one of its text fields: name, text"),
        ("tfds:lcr_tiny_pears", {}, "Did you mean 'tfds:lcr_tiny_pairs'"),
        ("tfds:lcr_tiny_pairs/german", {}, "tfds:lcr_tiny_pairs/german'.*german not found"),
        ("tfds:lcr_tiny_pairs", {}, "field=None: expected one of its text fields: answer, question"),
        ("tfds:lcr_tiny_pairs", {"field": "score"}, "field='score'"),
        ("tfds:", {}, "source='tfds:': expected 'tfds:<name>"),
        ("stdlob", {}, "expected 'tfds:<name>.* or 'stdlib'"),
    ],
)
def test_bad_sources_are_named(source, options, message, corpus, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_source(source.format(corpus), data_dir=tmp_path / "cache", **options)


def test_an_unreadable_file_is_named(corpus):
    (corpus / "gone.txt").symlink_to(corpus / "no such file")
    with pytest.raises(ValueError, match=r"cannot read .*gone\.txt: No such file"):
        open_files(corpus)


def test_a_corpus_without_text_is_named(corpus):
    (corpus / "a.bin").write_bytes(b"\xff\xfe")
    (corpus / "b.bin").touch()
    with pytest.raises(ValueError, match="each of its 2 files is empty or not UTF-8"):
        open_files(corpus, "*.bin")


def test_a_dataset_that_cannot_be_prepared_is_named(tmp_path, monkeypatch):
    def no_network(self, dl_manager):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(LcrTinyPairs, "_split_generators", no_network)
    with pytest.raises(OSError, match="source='tfds:lcr_tiny_pairs': could not be prepared in .*not known"):
        open_source("tfds:lcr_tiny_pairs", field="answer", data_dir=tmp_path)


def test_a_dataset_without_random_access_is_named(tmp_path):
    open_source("tfds:lcr_tiny_pairs", field="answer", data_dir=tmp_path)
    facts = next(tmp_path.glob("lcr_tiny_pairs/*/dataset_info.json"))
    facts.write_text(facts.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="without random access: delete it there"):
        open_source("tfds:lcr_tiny_pairs", field="answer", data_dir=tmp_path)
