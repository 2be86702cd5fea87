"""From the rows of a file to what is shown: one series for each architecture and question asked of it."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property

from lcr.evaluation.results import Row
from lcr.evaluation.statistics import wilson_interval

REACH = 0.95  # exact match at every depth up to here counts as reached


@dataclasses.dataclass(frozen=True)
class Pooled:
    """The cells of one length taken together, weighted by their samples, with 95% intervals (see `Row`)."""

    samples: int
    exact_match: float
    exact_match_low: float
    exact_match_high: float
    digit_accuracy: float
    digit_accuracy_low: float
    digit_accuracy_high: float
    state_bytes: int
    tokens_per_second: float
    peak_memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Series:
    """One architecture's cells, `(length, depth) -> Row`, all of one checkpoint and one seed."""

    label: str
    cells: dict[tuple[int, float], Row]

    @cached_property
    def lengths(self) -> list[int]:
        return sorted({length for length, _ in self.cells})

    @cached_property
    def depths(self) -> list[float]:
        return sorted({depth for _, depth in self.cells})

    @property
    def row(self) -> Row:
        """Any of the rows, for what they have in common."""
        return next(iter(self.cells.values()))

    @property
    def training_length(self) -> int:
        return self.row.training_length

    def at(self, length: int) -> list[Row]:
        """The rows of one length, by depth."""
        return [self.cells[length, depth] for depth in self.depths if (length, depth) in self.cells]

    def pooled(self, length: int) -> Pooled:
        rows = self.at(length)
        samples = sum(row.samples for row in rows)
        exact = sum(round(row.exact_match * row.samples) for row in rows)
        digit_accuracy = sum(row.digit_accuracy * row.samples for row in rows) / samples
        digits = samples * rows[0].answer_length
        return Pooled(
            samples,
            exact / samples,
            *wilson_interval(exact, samples),
            digit_accuracy,
            *wilson_interval(round(digit_accuracy * digits), digits),
            state_bytes=max(row.state_bytes for row in rows),
            tokens_per_second=sum(row.tokens_per_second for row in rows) / len(rows),
            peak_memory_bytes=max(row.peak_memory_bytes for row in rows),
        )

    def reach(self) -> int:
        """The longest length up to which every depth of every evaluated length has `REACH` exact match; 0 if none."""
        reached = 0
        for length in self.lengths:
            if any(row.exact_match < REACH for row in self.at(length)):
                break
            reached = length
        return reached


def select_series(rows: Sequence[Row]) -> tuple[list[Series], list[str]]:
    """Groups the rows, oldest first, into series, in the order in which they first appear.

    Of each architecture and question the configuration, checkpoint and seed of the newest row are shown, and of a cell
    that was evaluated more than once the row with the most samples (the newest among equals). The second result says, a
    sentence for each series concerned, what is therefore not shown.
    """
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.architecture, row.task, row.haystack, row.question), []).append(row)
    names = label_groups(list(groups))
    series, notes = [], []
    for name, group in zip(names, groups.values(), strict=True):
        newest = group[-1]
        model = (newest.configuration, newest.checkpoint_step, newest.seed)
        shown = [row for row in group if (row.configuration, row.checkpoint_step, row.seed) == model]
        cells: dict[tuple[int, float], Row] = {}
        for row in shown:
            cell = (row.length, row.depth)
            if cell not in cells or row.samples >= cells[cell].samples:
                cells[cell] = row
        series.append(Series(name, dict(sorted(cells.items()))))
        if len(cells) < len(group):
            notes.append(
                f"{name}: {len(cells)} of {len(group)} rows are shown, those of the newest "
                f"configuration, checkpoint step {newest.checkpoint_step} and seed {newest.seed} with the most samples."
            )
    return series, notes


def label_groups(groups: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """The architecture's name, followed by as much of (task, haystack, question) as differs between the groups."""
    labels = []
    for group in groups:
        parts = [group[0]]
        for i, form in ((1, "{}"), (2, "{} haystack"), (3, "question {}")):
            if len({other[i] for other in groups}) > 1 and group[i]:
                parts.append(form.format(group[i]))
        labels.append(", ".join(parts))
    return labels
