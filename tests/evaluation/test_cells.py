import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict
from stand_ins import DIGIT, Constant, Remembering, make_row

from lcr.evaluation.cells import evaluate_grid, evaluate_run
from lcr.evaluation.grid import (
    Grid,
    GridError,
    Subject,
    configuration_digest,
    grid_from_config,
    prompt_generator,
    subject_from_config,
)
from lcr.evaluation.progress import EvaluationProgress
from lcr.evaluation.results import append_row, read_rows
from lcr.evaluation.streaming import Reply, Streamer
from lcr.tasks import make_task
from lcr.training.config import default_config

PROMPT = (1963459761, 2113623174, 1782457318, 1443668659)  # recorded rows name these prompts
SUBJECT = Subject("stand-in", "repeat", "last", checkpoint_step=7, training_length=128)
GRID = Grid(lengths=(200, 90), depths=(1.0, 0.0, 0.5), samples=4, batch=5, piece=64)
MEASURED = ("tokens_per_second", "batch", "peak_memory_bytes", "date")  # differ from one time to the next


class NoProgress(EvaluationProgress):
    """Keeps what was said and counts what was read."""

    def __init__(self):
        super().__init__("test", shown=False)
        self.said, self.tokens = [], 0

    def say(self, text):
        self.said.append(text)

    def read(self, length, tokens):
        self.tokens += tokens


class Instant(Streamer):
    """Compiles nothing: every answer is 33333."""

    def __init__(self):
        self.piece = 64

    def programs(self, batch, length, answer_length):
        return None

    def state_bytes(self, capacity):
        return 24

    def answer(self, prompts, answer_length, on_piece=None):
        on_piece(prompts.shape[1])
        return Reply(np.full((len(prompts), answer_length), DIGIT + 3, np.int32), 0.5)


class Forbidden(Instant):
    def answer(self, prompts, answer_length, on_piece=None):
        raise AssertionError("nothing was left to compute")


class Interrupted(Instant):
    """Is stopped before its third batch."""

    batches = 0

    def answer(self, prompts, answer_length, on_piece=None):
        self.batches += 1
        if self.batches == 3:
            raise KeyboardInterrupt
        return super().answer(prompts, answer_length, on_piece)


def evaluate(path, streamer=None, grid=GRID, subject=SUBJECT, progress=None):
    task = make_task("passkey")
    return evaluate_grid(streamer or Instant(), task, subject, grid, path, progress or NoProgress())


def comparable(rows):
    return [{k: v for k, v in dataclasses.asdict(row).items() if k not in MEASURED} for row in rows]


def test_a_model_that_remembers_is_always_right(tmp_path):
    progress = NoProgress()
    rows = evaluate(tmp_path / "results.jsonl", Streamer(Remembering(), GRID.piece), progress=progress)
    assert [(row.length, row.depth) for row in rows] == [(length, d) for length in (90, 200) for d in (0.0, 0.5, 1.0)]
    for row in rows:
        assert (row.exact_match, row.digit_accuracy, row.samples) == (1.0, 1.0, 4)
        assert row.exact_match_low == pytest.approx(0.5101, abs=1e-4) and row.exact_match_high == 1.0
        assert row.digit_accuracy_low == pytest.approx(0.8389, abs=1e-4)
        assert row.state_bytes == 24 and row.tokens_per_second > 0 and row.peak_memory_bytes > 1e6
        assert (row.task, row.haystack, row.question, row.seed) == ("passkey", "repeat", "last", 0)
        assert (row.architecture, row.checkpoint_step, row.training_length) == ("stand-in", 7, 128)
    by_depth = [row.needle_position for row in rows if row.length == 200]
    assert by_depth == sorted(by_depth) and by_depth[0] < by_depth[1] < by_depth[2]
    assert read_rows(tmp_path / "results.jsonl")[0] == rows
    assert progress.tokens == 3 * 4 * (85 + 195)


def test_a_model_that_always_says_the_same_scores_about_chance(tmp_path):
    grid = dataclasses.replace(GRID, lengths=(90,), samples=60, batch=60)
    rows = evaluate(tmp_path / "results.jsonl", Streamer(Constant(), grid.piece), grid)
    right = sum(row.digit_accuracy for row in rows) / len(rows)
    assert 0.06 < right < 0.14, "900 digits, a tenth of which are right: standard deviation 0.01"
    assert all(row.exact_match == 0 for row in rows)
    assert all(row.digit_accuracy_low < 0.1 < row.digit_accuracy_high for row in rows)
    assert (rows[0].chance_exact_match, rows[0].chance_digit) == (1e-5, 0.1)


def test_tokens_per_second_are_those_of_a_batch(tmp_path):
    rows = evaluate(tmp_path / "results.jsonl")  # three batches of four prompts a length, half a second each
    speeds = {row.length: row.tokens_per_second for row in rows}
    assert speeds == {90: 4 * 85 / 0.5, 200: 4 * 195 / 0.5}


def test_a_model_trained_in_another_way_is_evaluated_anew(tmp_path):
    path = tmp_path / "results.jsonl"
    evaluate(path)
    rows = evaluate(path, subject=dataclasses.replace(SUBJECT, configuration="0123456789ab"))
    assert len(read_rows(path)[0]) == 2 * len(rows)


def test_the_digest_of_a_configuration_is_of_what_decides_the_training():
    def digest(**changes):
        config = default_config()
        config.update_from_flattened_dict(changes)
        return subject_from_config(config, 7).configuration

    assert len(digest()) == 12
    assert digest() == digest(**{"evaluation.samples": 3, "training.steps": 9, "name": "other"})
    others = {"seed": 1}, {"optimizer.learning_rate": 1e-4}, {"model.d_ff": 0}
    assert len({digest(), *(digest(**changes) for changes in others)}) == 4


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_rows_do_not_depend_on_the_batch(tmp_path, batch):
    grid = dataclasses.replace(GRID, lengths=(90,))
    expected = evaluate(tmp_path / "expected.jsonl", grid=grid)
    rows = evaluate(tmp_path / "results.jsonl", grid=dataclasses.replace(grid, batch=batch))
    assert comparable(rows) == comparable(expected)


def test_what_is_there_is_not_computed_again(tmp_path):
    path = tmp_path / "results.jsonl"
    rows = evaluate(path)
    before = path.read_bytes()
    assert evaluate(path, streamer=Forbidden()) == rows
    assert path.read_bytes() == before


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(tmp_path):
    whole = evaluate(tmp_path / "whole.jsonl")
    path = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(path, streamer=Interrupted())
    kept = read_rows(path)[0]
    assert comparable(kept) == comparable(whole)[: len(kept)] and 0 < len(kept) < len(whole)
    with path.open("a") as file:
        file.write('{"architecture": "stand-i')
    progress = NoProgress()
    assert comparable(evaluate(path, progress=progress)) == comparable(whole)
    assert comparable(read_rows(path)[0]) == comparable(whole)
    assert any("half-written" in text for text in progress.said)
    assert read_rows(path)[0][: len(kept)] == kept


@pytest.mark.parametrize(
    "change", [{"architecture": "other"}, {"haystack": "words"}, {"question": "first"}, {"checkpoint_step": 8}]
)
def test_rows_of_another_subject_do_not_count(tmp_path, change):
    path = tmp_path / "results.jsonl"
    grid = dataclasses.replace(GRID, lengths=(90,), depths=(0.5,))
    evaluate(path, grid=grid)
    evaluate(path, grid=grid, subject=dataclasses.replace(SUBJECT, **change))
    assert len(read_rows(path)[0]) == 2


@pytest.mark.parametrize("change", [{"samples": 5}, {"seed": 1}])
def test_other_samples_and_seeds_are_other_rows(tmp_path, change):
    path = tmp_path / "results.jsonl"
    grid = dataclasses.replace(GRID, lengths=(90,), depths=(0.5,))
    evaluate(path, grid=grid)
    evaluate(path, grid=dataclasses.replace(grid, **change))
    assert len(read_rows(path)[0]) == 2


def test_prompts_differ_from_cell_to_cell_and_are_the_same_every_time():
    def draw(*key):
        return tuple(prompt_generator(*key).integers(0, 2**31, 4).tolist())

    keys = [(seed, length, depth, i) for seed in (0, 1) for length in (90, 200) for depth in (0.0, 0.5) for i in (0, 1)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(*keys[3]) == draw(*keys[3])
    assert draw(0, 90, 0.25, 0) == PROMPT


def test_answers_that_are_not_finite_are_counted_as_wrong_and_told(tmp_path):
    class Broken(Instant):
        def answer(self, prompts, answer_length, on_piece=None):
            return Reply(np.full((len(prompts), answer_length), -1, np.int32), 1.0)

    progress = NoProgress()
    grid = dataclasses.replace(GRID, lengths=(90,), depths=(0.5,))
    (row,) = evaluate(tmp_path / "results.jsonl", grid=grid, streamer=Broken(), progress=progress)
    assert row.digit_accuracy == 0
    assert any("not finite in 4 of 4 answers" in text for text in progress.said)


def test_fewer_samples_where_the_tokens_would_be_too_many(tmp_path):
    grid = dataclasses.replace(GRID, max_tokens=3 * 200)
    assert [grid.samples_at(length) for length in (10, 90, 200, 10_000)] == [4, 2, 1, 1]
    rows = evaluate(tmp_path / "results.jsonl", grid=grid)
    assert [row.samples for row in rows] == [2, 2, 2, 1, 1, 1]


def test_too_short_a_length_is_refused_before_anything_is_computed(tmp_path):
    shortest = make_task("passkey").min_length()
    with pytest.raises(GridError, match=f"length={shortest - 1} is too short .* at least {shortest} tokens"):
        evaluate(tmp_path / "results.jsonl", grid=dataclasses.replace(GRID, lengths=(shortest - 1, 200)))
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"lengths": ()}, "lengths is empty"),
        ({"lengths": (0, 10)}, "lengths="),
        ({"depths": ()}, "depths is empty"),
        ({"depths": (0.5, 1.5)}, "depth=1.5"),
        ({"depths": (-0.1,)}, "depth=-0.1"),
        ({"samples": 0}, "samples=0"),
        ({"batch": 0}, "batch=0"),
        ({"piece": -1}, "piece=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"max_tokens": -1}, "max_tokens=-1"),
    ],
)
def test_a_grid_out_of_range_names_what_is_wrong(change, named):
    with pytest.raises(GridError, match=named):
        dataclasses.replace(GRID, **change)


def make_config(**evaluation) -> ConfigDict:
    section = {"lengths": (100, 200), "depths": (0, 0.5), "samples": 3, "batch": 4, "piece": 8, "max_length": 0}
    return ConfigDict(
        {
            "name": "mine",
            "seed": 5,
            "task": {"name": "passkey", "haystack": "words", "question": "first"},
            "data": {"lengths": (64, 96), "batch_tokens": 512, "curriculum": ((10, (128,)), (20, (32, 256)))},
            "evaluation": {**section, "max_tokens": 0, **evaluation},
        }
    )


def test_the_configuration_gives_the_grid():
    assert grid_from_config(make_config()) == Grid((100, 200), (0.0, 0.5), 3, 0, 4, 8, 5)
    assert grid_from_config(make_config(max_length=150, max_tokens=999)).lengths == (100,)
    with pytest.raises(GridError, match="max_length=50 leaves none"):
        grid_from_config(make_config(max_length=50))


def test_the_training_length_is_the_longest_met_up_to_the_checkpoint():
    lengths = [subject_from_config(make_config(), step).training_length for step in (0, 10, 11, 20, 21)]
    assert lengths == [96, 96, 128, 128, 256]
    assert subject_from_config(make_config(), 9) == Subject(
        "mine", "words", "first", 9, 96, configuration_digest(make_config())
    )


def test_a_task_without_questions_is_refused(tmp_path):
    @dataclasses.dataclass
    class TextRun:
        model = Remembering()
        config = make_config()
        step = 1

        @dataclasses.dataclass
        class task:
            name = "text"

    with pytest.raises(GridError, match="task='text' asks no questions"):
        evaluate_run(TextRun(), GRID, tmp_path / "results.jsonl", shown=False)


def test_progress_shows_rate_and_time_left(capsys):
    progress = EvaluationProgress("mamba")
    progress.start(2, 1000)
    progress.compiled(2.0)
    progress.read(500, 600)
    progress.read(500, 400)
    progress.close()
    shown = capsys.readouterr().err
    assert "mamba: 2 cells to do, 1,000 prompt tokens" in shown
    assert "mamba: compiled for 2.0 s" in shown
    assert "100% of the tokens, length 500" in shown and "tokens/s" in shown and "left" in shown
    assert "60%" not in shown, "lines on a log are far between"


def test_a_row_without_a_partner_in_the_grid_is_left_alone(tmp_path):
    path = tmp_path / "results.jsonl"
    append_row(path, make_row("retnet"))
    rows = evaluate(path, grid=dataclasses.replace(GRID, lengths=(90,), depths=(0.5,)))
    assert [row.architecture for row in rows] == ["stand-in"]
    assert [row.architecture for row in read_rows(path)[0]] == ["retnet", "stand-in"]
