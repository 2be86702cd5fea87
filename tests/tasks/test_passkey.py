"""The passkey task: the prompt as text, exact lengths, the needle's place, keys, scoring, bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lcr.tasks import make_task
from lcr.tasks.haystacks import FILLER
from lcr.tasks.wording import INTRODUCTION

CASES = [("words", "repeat"), ("words", "words"), ("bytes", "repeat"), ("bytes", "words")]
TASKS = {case: make_task("passkey", tokenizer=case[0], haystack=case[1]) for case in CASES}
BYTES = TASKS["bytes", "repeat"]
WORDS = TASKS["words", "repeat"]


def fixed(task, length, depth):
    return task.example(np.random.default_rng(0), length, depth)


def text(task, example):
    return task.tokenizer.decode(example.tokens)


def key_of(task, example):
    return task.tokenizer.decode(example.tokens[example.prompt_length :])


def test_the_prompt_is_the_published_pieces_joined_by_newlines():
    # Two blocks of filler, each with the separator that follows it.
    length = BYTES.min_length() + 2 * len(FILLER + " ")
    example = BYTES.example(np.random.default_rng(0), length, 0.5)
    key = key_of(BYTES, example)
    assert text(BYTES, example) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz "
        "you about the important information there.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
        f"The pass key is {key}. Remember it. {key} is the pass key.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
        f"What is the pass key? The pass key is {key}"
    )
    assert example.prompt_length == length - 5
    assert example.depth == 0.5


def test_blocks_of_one_part_are_joined_by_spaces_and_an_empty_part_is_left_out():
    length = BYTES.min_length() + 2 * len(FILLER + " ")
    example = BYTES.example(np.random.default_rng(0), length, 0.0)
    key = key_of(BYTES, example)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    question = f"What is the pass key? The pass key is {key}"
    assert text(BYTES, example).split("\n") == [INTRODUCTION, needle, f"{FILLER} {FILLER}", question]


def test_without_room_for_filler_there_is_none():
    example = BYTES.example(np.random.default_rng(0), BYTES.min_length())
    assert len(text(BYTES, example).split("\n")) == 3
    assert example.depth == 0.0


def test_the_tail_of_a_block_fills_what_whole_blocks_leave():
    tail = "There and back again."
    length = BYTES.min_length() + len(f"{FILLER} {tail} ")
    parts = [text(BYTES, fixed(BYTES, length, depth)).split("\n") for depth in (0.0, 0.2, 1.0)]
    assert parts[0][2] == f"{tail} {FILLER}"
    assert (parts[1][1], parts[1][3]) == (tail, FILLER)
    assert parts[2][1] == f"{tail} {FILLER}"


def test_the_question_may_come_first():
    task = make_task("passkey", tokenizer="bytes", question="first")
    length = task.min_length() + len(FILLER + " ")
    example = task.example(np.random.default_rng(0), length, 1.0)
    key = key_of(task, example)
    assert text(task, example).split("\n") == [
        INTRODUCTION,
        "What is the pass key?",
        FILLER,
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        f"The pass key is {key}",
    ]


def test_words_write_the_same_text_without_newlines():
    task, in_bytes = WORDS, BYTES
    block = len(task.tokenizer.encode(FILLER))
    example = fixed(task, task.min_length() + 3 * block, 0.34)
    other = fixed(in_bytes, in_bytes.min_length() + 3 * len(FILLER + " "), 0.34)
    assert text(task, example) == text(in_bytes, other).replace("\n", " ")
    assert task.tokenizer.unknown not in example.tokens


@pytest.mark.parametrize("case", CASES)
@given(extra=st.integers(0, 700), depth=st.one_of(st.none(), st.floats(0, 1)), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_every_length_is_met_and_nothing_but_the_haystack_is_cut(case, extra, depth, seed):
    task = TASKS[case]
    length = task.min_length() + extra
    example = task.example(np.random.default_rng(seed), length, depth)
    assert example.tokens.shape == example.loss_mask.shape == (length,)
    assert (example.tokens > 0).all() and (example.tokens < task.tokenizer.vocab_size).all()
    written = text(task, example)
    key = key_of(task, example)
    assert len(key) == 5 and key.isdigit()
    assert written.startswith(INTRODUCTION)
    assert written.count(f"The pass key is {key}. Remember it. {key} is the pass key.") == 1
    assert written.endswith(f"What is the pass key? The pass key is {key}")
    needle = task.tokenizer.decode(example.tokens[example.needle_position :])
    assert needle.startswith(f"The pass key is {key}. Remember")
    if depth is not None and extra:
        # No place is further away than half a unit, the longest of which is a block.
        assert abs(example.depth - depth) * extra <= len(FILLER + " ") / 2


@pytest.mark.parametrize("case", CASES)
def test_depths_0_and_1_are_the_ends_of_the_haystack(case):
    task = TASKS[case]
    head = len(task.tokenizer.encode(INTRODUCTION + "\n"))
    first, last = fixed(task, 700, 0.0), fixed(task, 700, 1.0)
    assert (first.needle_position, first.depth) == (head, 0.0)
    assert last.needle_position == head + 700 - task.min_length()
    assert last.depth == 1.0


def test_without_a_depth_every_place_is_drawn():
    task = WORDS
    block = len(task.tokenizer.encode(FILLER))
    length = task.min_length() + 3 * block + 7
    seen = {task.example(np.random.default_rng(seed), length).needle_position for seed in range(200)}
    head = len(task.tokenizer.encode(INTRODUCTION))
    assert seen == {head + place for place in (0, 7, 7 + block, 7 + 2 * block, 7 + 3 * block)}


def test_keys_have_leading_zeros_and_use_every_digit():
    task = WORDS
    keys = [key_of(task, task.example(np.random.default_rng(seed), 80)) for seed in range(300)]
    for position in range(5):
        assert {key[position] for key in keys} == set("0123456789")
    assert len(set(keys)) > 290


@pytest.mark.parametrize("case", CASES)
def test_an_example_depends_on_the_generator_and_on_nothing_made_before(case):
    task, other = TASKS[case], make_task("passkey", tokenizer=case[0], haystack=case[1])
    one = task.example(np.random.default_rng([3, 300]), 300, 0.5)
    task.example(np.random.default_rng(0), 5000)
    two = task.example(np.random.default_rng([3, 300]), 300, 0.5)
    three = other.example(np.random.default_rng([3, 300]), 300, 0.5)
    different = task.example(np.random.default_rng([4, 300]), 300, 0.5)
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.tokens, three.tokens)
    assert (one.tokens != different.tokens).any()


def test_random_words_differ_between_samples_and_are_whole():
    task = TASKS["bytes", "words"]
    parts = text(task, fixed(task, task.min_length() + 50, 1.0)).split("\n")
    words = parts[1].split(" ")
    assert len(words) == 10 and {len(word) for word in words} == {4}
    assert len(set(words)) > 3


@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
def test_the_loss_is_on_the_answer_or_on_all_but_the_first(tokenizer):
    answer = fixed(make_task("passkey", tokenizer=tokenizer), 300, 0.5).loss_mask
    everything = fixed(make_task("passkey", tokenizer=tokenizer, loss="all"), 300, 0.5).loss_mask
    assert answer[-5:].all() and answer.sum() == 5
    assert not everything[0] and everything.sum() == 299


def test_real_text_is_lines_of_the_corpus(tmp_path):
    lines = [f"line {i:04d} of a text" for i in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines[:20]))  # without a newline at its end
    (tmp_path / "b.txt").write_text("\n".join(lines[20:]) + "\n")
    task = make_task(
        "passkey", tokenizer="bytes", haystack="text", source=f"files:{tmp_path}/*.txt", data_dir=tmp_path / "cache"
    )
    for extra, depth in ((200, 0.5), (4000, 0.0), (4000, 1.0)):  # 4000 is more than the corpus has
        example = task.example(np.random.default_rng(extra), task.min_length() + extra, depth)
        assert example.tokens.shape == (task.min_length() + extra,)
        parts = text(task, example).split("\n")
        assert parts[0] == INTRODUCTION
        hay = [part for part in parts[1:-1] if "pass key" not in part]
        assert len(parts) - len(hay) == 3
        tail = hay.pop(0)
        assert set(hay) <= set(lines) and any(line.endswith(tail) for line in lines)
        assert abs(example.depth - depth) <= 15 / extra
    assert len(set(hay)) == 50


def test_a_million_tokens_are_exactly_met():
    for case in (("words", "repeat"), ("bytes", "words")):
        example = TASKS[case].example(np.random.default_rng(1), 1 << 20, 0.25)
        assert example.tokens.shape == (1 << 20,)
        assert abs(example.depth - 0.25) < 1e-4


def test_scores():
    task = WORDS
    expected = np.array([[4, 5, 6, 7, 8]] * 3)
    predicted = np.array([[4, 5, 6, 7, 8], [4, 5, 6, 7, 9], [0, 0, 0, 0, 0]])
    scores = task.score(predicted, expected)
    np.testing.assert_array_equal(scores["exact_match"], [1, 0, 0])
    np.testing.assert_allclose(scores["digit_accuracy"], [1, 0.8, 0])
    assert scores.keys() == task.chance.keys()
    with pytest.raises(ValueError, match="samples, 5"):
        task.score(predicted[:, :4], expected[:, :4])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("passkye", {}, "Did you mean 'passkey'"),
        ("passkey", {"haystak": "words"}, "Did you mean 'haystack'"),
        ("passkey", {"haystack": "word"}, "Did you mean 'words'"),
        ("passkey", {"question": "middle"}, "question: unknown value 'middle'"),
        ("passkey", {"loss": "answers"}, "Did you mean 'answer'"),
        ("passkey", {"tokenizer": "byte"}, "Did you mean 'bytes'"),
        ("passkey", {"haystack": "text"}, "use tokenizer='bytes'"),
        ("text", {"tokenizer": "words"}, "use tokenizer='bytes'"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **options)


def test_bad_lengths_and_depths_are_named():
    task = WORDS
    with pytest.raises(ValueError, match=f"length=66 .* at least {task.min_length()} tokens"):
        task.example(np.random.default_rng(0), 66)
    with pytest.raises(ValueError, match=r"depth=1\.5"):
        task.example(np.random.default_rng(0), 100, 1.5)
    with pytest.raises(ValueError, match="depth=nan"):
        task.example(np.random.default_rng(0), 100, float("nan"))
