"""Rows of `results.jsonl`: one line per evaluated cell (architecture, length, depth), written once, never lost."""

import dataclasses
import functools
import json
import math
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

RESULTS = "results.jsonl"  # in the folder of a run or a sweep


class ResultsError(ValueError):
    """A file of results has a line that cannot be read, or no row at all; the message says how to mend it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured in one cell.

    architecture:      the label of the run (its configuration's `name`).
    task, haystack, question: what was asked ("" where the task has no such choice).
    length:            tokens of the whole example, answer included.
    depth:             where the needle was asked to be, from 0 (start) to 1 (end).
    needle_position:   index of the needle's first token: the mean over the samples, rounded.
    samples:           prompts in this cell.
    answer_length:     tokens (digits) of an answer.
    exact_match:       part of the samples whose answer is right in every digit, with its 95% interval (Wilson).
    digit_accuracy:    part of the answers' digits that are right, with the interval that independent digits would
                       have: digits of one answer fail together, so the true interval is wider.
    chance_exact_match, chance_digit: what guessing gives.
    state_bytes:       of one sequence's state at this length.
    tokens_per_second: prompt tokens read per second by a whole batch, compilation not counted.
    batch:             rows that were read together.
    peak_memory_bytes: most memory in use while this cell was computed (see `lcr.evaluation.memory`).
    seed:              of the prompts.
    configuration:     digest of what decided the training (see `subject_from_config`): a model trained anew in the same
                       folder is another one. "" in rows of before there was one.
    checkpoint_step, training_length: of the model: optimiser steps, and the longest example it was trained on.
    git_commit, versions, date: of the code, its libraries, and the row (UTC, ISO 8601).
    """

    architecture: str
    task: str
    haystack: str
    question: str
    length: int
    depth: float
    needle_position: int
    samples: int
    answer_length: int
    exact_match: float
    exact_match_low: float
    exact_match_high: float
    digit_accuracy: float
    digit_accuracy_low: float
    digit_accuracy_high: float
    chance_exact_match: float
    chance_digit: float
    state_bytes: int
    tokens_per_second: float
    batch: int
    peak_memory_bytes: int
    seed: int
    checkpoint_step: int
    training_length: int
    git_commit: str
    versions: dict[str, str]
    date: str
    configuration: str = ""

    @property
    def key(self) -> tuple:
        """What makes two rows the same measurement."""
        return (
            self.architecture,
            self.task,
            self.haystack,
            self.question,
            self.length,
            self.depth,
            self.samples,
            self.seed,
            self.configuration,
            self.checkpoint_step,
        )


_NUMBER = (int, float)
_KINDS = {str: str, int: int, float: _NUMBER, dict[str, str]: dict}


def parse_row(text: str) -> Row:
    """Reads one line. Raises ValueError saying what is wrong with it."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as problem:
        raise ValueError(f"not JSON ({problem})") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {type(values).__name__}")
    kinds = {field.name: _KINDS[field.type] for field in dataclasses.fields(Row)}
    values.setdefault("configuration", "")
    if missing := kinds.keys() - values.keys():
        raise ValueError(f"no value for {', '.join(sorted(missing))}")
    for name, kind in kinds.items():
        value = values[name]
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is _NUMBER and not math.isfinite(value)):
            raise ValueError(f"{name}={value!r} is of the wrong kind")
    for name in ("depth", "exact_match", "digit_accuracy"):
        if not 0 <= values[name] <= 1:
            raise ValueError(f"{name}={values[name]!r}: expected a number from 0 to 1")
    for name in ("length", "samples", "answer_length"):
        if values[name] < 1:
            raise ValueError(f"{name}={values[name]!r}: expected at least 1")
    # a later version's further fields are ignored
    return Row(**{name: float(values[name]) if kind is _NUMBER else values[name] for name, kind in kinds.items()})


def read_rows(path: str | os.PathLike) -> tuple[list[Row], str]:
    """Reads the rows of a file, oldest first (none if there is no file), and a notice ("" if all is well).

    A last line without its line break was being written when the writer was stopped: if it cannot be read it is
    left out, and the notice says so (`append_row` cuts it off). Raises ResultsError, with the line's number, for any
    other line that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return [], ""
    *lines, rest = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse_row(line))
        except ValueError as problem:
            raise ResultsError(f"{path}, line {number}: {problem}. Mend or delete that line.") from None
    if rest.strip():
        try:
            rows.append(parse_row(rest))
        except ValueError:
            return rows, f"{path}: dropped a half-written last line (line {len(lines) + 1}); its cell is computed again"
    return rows, ""


def append_row(path: str | os.PathLike, row: Row) -> None:
    """Appends one row and waits until it is on the disk. A half-written last line is cut off first."""
    path = Path(path)
    line = json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_last_line(path)
    with open(path, "ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _end_last_line(path: Path) -> None:
    """Makes the file end with a line break: completes a last line that holds a row, cuts off one that does not."""
    if not path.exists():
        return
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    rest = content[start:]
    if not rest:
        return
    try:
        parse_row(rest.decode("utf-8", errors="replace"))
    except ValueError:
        os.truncate(path, start)
        return
    with open(path, "ab") as file:
        file.write(b"\n")


@functools.cache
def code_versions() -> tuple[str, dict[str, str]]:
    """The git commit of this code ("unknown" outside a checkout; "-dirty" with changes on top) and its libraries."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # a package installed from a wheel may lie inside somebody else's repository
    tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
    commit = (tracked and git("rev-parse", "HEAD")) or "unknown"
    if commit != "unknown" and git("status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    versions = {"python": platform.python_version()}
    for package in ("jax", "flax", "lcr"):
        versions[package] = metadata.version(package)
    return commit, versions
