import dataclasses
import json

import pytest
from stand_ins import make_row

from lcr.evaluation.results import ResultsError, Row, append_row, code_versions, parse_row, read_rows


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    rows = [make_row(length=length, depth=depth) for length in (512, 1024) for depth in (0.0, 1 / 3, 1.0)]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == (rows, "")
    assert len({row.key for row in rows}) == 6


def test_no_file_is_no_rows(tmp_path):
    assert read_rows(tmp_path / "results.jsonl") == ([], "")


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_a_half_written_last_line_is_dropped_with_a_notice_and_nothing_else(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    first, second = make_row(depth=0.0), make_row(depth=1.0)
    append_row(path, first)
    whole = path.read_bytes()
    append_row(path, second)
    path.write_bytes(path.read_bytes()[: len(whole) + cut if cut > 0 else cut])
    rows, notice = read_rows(path)
    assert rows == [first]
    assert "line 2" in notice and "half-written" in notice
    append_row(path, second)
    assert read_rows(path) == ([first, second], "")


def test_a_whole_last_line_without_its_line_break_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second = make_row(depth=0.0), make_row(depth=1.0)
    append_row(path, first)
    path.write_bytes(path.read_bytes().rstrip())
    assert read_rows(path) == ([first], "")
    append_row(path, second)
    assert read_rows(path) == ([first, second], "")


def test_an_unreadable_line_is_named_and_nothing_is_changed(tmp_path):
    path = tmp_path / "results.jsonl"
    append_row(path, make_row(depth=0.0))
    with path.open("a") as file:
        file.write('{"architecture": "mam\n')
    append_row(path, make_row(depth=1.0))
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=r"results.jsonl, line 2: not JSON .*Mend or delete"):
        read_rows(path)
    assert path.read_bytes() == before


def change(**changes) -> str:
    return json.dumps({**dataclasses.asdict(make_row()), **changes})


@pytest.mark.parametrize(
    "text, named",
    [
        ("[1, 2]", "JSON object"),
        ("{}", "no value for answer_length, architecture"),
        (change(length="1024"), "length='1024'"),
        (change(exact_match=None), "exact_match=None"),
        (change(samples=True), "samples=True"),
        (change(depth=float("nan")), "depth=nan"),
        (change(exact_match=1.5), "exact_match=1.5"),
        (change(samples=0), "samples=0"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(text, named):
    with pytest.raises(ValueError, match=named):
        parse_row(text)


def test_fields_of_a_later_version_are_ignored():
    assert parse_row(change(colour="blue")) == make_row()


def test_an_infinite_measurement_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_row(tmp_path / "results.jsonl", make_row(tokens_per_second=float("inf")))
    assert not (tmp_path / "results.jsonl").exists()


def test_versions_name_what_the_row_depends_on():
    commit, versions = code_versions()
    assert commit == "unknown" or len(commit.removesuffix("-dirty")) == 40
    assert set(versions) == {"python", "jax", "flax", "lcr"} and all(versions.values())


def test_the_key_is_what_a_resumed_sweep_compares():
    fields = {field.name for field in dataclasses.fields(Row)}
    in_key = "architecture task haystack question length depth samples seed configuration checkpoint_step".split()
    for name in fields:
        value = getattr(make_row(), name)
        other = {"new": "1"} if isinstance(value, dict) else value + ("x" if isinstance(value, str) else 1)
        assert (make_row(**{name: other}).key != make_row().key) == (name in in_key), name
