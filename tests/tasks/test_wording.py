"""The passkey prompt in the tokenizers of published models: keys of a fixed number of tokens, as running text has them."""

import numpy as np
import pytest
import sentencepiece
import tokenizers
from lcr.data.tokenizers import make_tokenizer
from lcr.pretrained.tokenizer import RWKVTokenizer, find_tokenizer
from lcr.tasks import make_task
from lcr.tasks.haystacks import FILLER
from lcr.tasks.passkey import PasskeyTask
from lcr.tasks.wording import INTRODUCTION, NEEDLE, QUESTION

RNG = np.random.default_rng(0)
KEYS = [f"{RNG.integers(100_000):05}" for _ in range(300)]
CORPUS = [f"{INTRODUCTION}\n{FILLER}\n{NEEDLE.format(key=key)}\n{QUESTION} The pass key is {key}" for key in KEYS]


def byte_pairs(folder, digits=None):
    """GPT-2's way: a space belongs to the word after it, and any digits may merge; with digits=3 no more than three,
    and the space stands alone, as in Llama 3."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits is None)]
    if digits:
        pattern = tokenizers.Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
        steps.insert(0, tokenizers.pre_tokenizers.Split(pattern, "isolated"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(folder / "tokenizer.json"))


def three_digits(folder):
    byte_pairs(folder, digits=3)


def pieces(folder):
    """Llama 2's way: a mark for a space before every text, and a digit is a token."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
        split_digits=True, byte_fallback=True, minloglevel=9,
        user_defined_symbols=[], normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip


def world(folder):
    """RWKV's way: the longest string of the vocabulary."""
    words = sorted({word for word in " ".join(CORPUS[:1]).split(" ") if word.isalpha()})
    texts = [chr(i) for i in range(1, 128)] + [f" {word}" for word in words] + [f" {digit}" for digit in range(10)]
    lines = [f"{i} {text!r} {len(text)}" for i, text in enumerate(texts, start=1)]
    (folder / "rwkv_vocab_v20230424.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module", params=[byte_pairs, three_digits, pieces, world], ids=lambda make: make.__name__)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param.__name__)
    request.param(made)
    return made


@pytest.mark.parametrize("question", ["last", "first"])
@pytest.mark.parametrize("haystack", ["repeat", "words"])
def test_every_length_is_met_and_the_key_is_as_in_running_text(folder, haystack, question):
    tokenizer = find_tokenizer(folder)
    task = PasskeyTask(tokenizer, haystack=haystack, question=question)
    for extra in (0, 1, 2, 3, 50, 333):
        for depth in (0.0, 0.3, 1.0, None):
            example = task.example(np.random.default_rng([extra, 7]), task.min_length() + extra, depth)
            assert example.tokens.shape == (task.min_length() + extra,)
            assert len(example.tokens) - example.prompt_length == task.answer_length
            text = tokenizer.decode(example.tokens)
            key = tokenizer.decode(example.tokens[example.prompt_length :]).strip()
            assert len(key) == 5 and key.isdigit()
            assert text.count(NEEDLE.format(key=key) + "\n") == 1
            assert text.removeprefix("<s>").startswith(INTRODUCTION)
            end = ("" if question == "first" else QUESTION + " ") + f"The pass key is {key}"
            assert text.endswith("\n" + end)
            # token by token what the tokenizer makes of the text as a whole
            whole = tokenizer.encode("So here we are again\n" + end)
            tail = example.tokens[example.prompt_length - 4 :]
            np.testing.assert_array_equal(whole[-len(tail) :], tail)
            assert tokenizer.decode(example.tokens[example.needle_position :]).startswith("\nThe pass key is " + key)
    assert task.chance["exact_match"] == 1e-5
    assert task.chance["digit_accuracy"] == pytest.approx(10 ** (-5 / task.answer_length))


def test_filler_reads_as_running_text(folder):
    tokenizer = find_tokenizer(folder)
    task = PasskeyTask(tokenizer)
    example = task.example(np.random.default_rng(0), task.min_length() + 400, 1.0)
    assert tokenizer.decode(example.tokens).count(f"{FILLER} {FILLER}") >= 1
    unit = tokenizer.encode(f"{FILLER} {FILLER} {FILLER}")
    unit = unit[len(tokenizer.encode(f"{FILLER} {FILLER}")) :]  # one block, as it follows another
    windows = np.lib.stride_tricks.sliding_window_view(example.tokens, len(unit))
    assert (windows == unit).all(axis=1).sum() >= 2


def test_places_are_between_blocks_and_keys_differ(folder):
    tokenizer = find_tokenizer(folder)
    task = PasskeyTask(tokenizer)
    seen, keys = set(), set()
    for seed in range(60):
        example = task.example(np.random.default_rng(seed), task.min_length() + 150)
        seen.add(example.needle_position)
        keys.add(tuple(example.tokens[example.prompt_length :].tolist()))
    assert len(keys) > 50 and len(seen) >= 3
    first, last = (task.example(np.random.default_rng(0), task.min_length() + 150, depth) for depth in (0.0, 1.0))
    assert (first.depth, last.depth) == (0.0, 1.0) and last.needle_position - first.needle_position == 150


def test_the_text_task_and_real_haystacks_take_a_folder(folder, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(CORPUS[:20]))
    source = f"files:{tmp_path}/*.txt"
    task = make_task(
        "passkey", tokenizer=str(folder), haystack="text", source=source, data_dir=str(tmp_path / "cache")
    )
    example = task.example(np.random.default_rng(0), task.min_length() + 500, 0.5)
    assert 0.3 < example.depth < 0.7
    assert FILLER in task.tokenizer.decode(example.tokens)
    before = task.tokenizer.decode(example.tokens[: example.needle_position])
    assert before.endswith("\n"), "the needle goes between lines"
    text = make_task("text", tokenizer=str(folder), source=source, data_dir=str(tmp_path / "cache"))
    assert text.tokenizer.vocab_size == task.tokenizer.vocab_size


def test_digits_that_melt_into_the_words_are_refused(tmp_path):
    texts = [chr(i) for i in range(1, 128)] + [f" is {digit}" for digit in range(10)]
    (tmp_path / "rwkv_vocab_x.txt").write_text("\n".join(f"{i + 1} {t!r} {len(t)}" for i, t in enumerate(texts)))
    with pytest.raises(ValueError, match="tokenizer 'rwkv' merges a key's digits with the words before them"):
        PasskeyTask(RWKVTokenizer(tmp_path / "rwkv_vocab_x.txt"))


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="the folder has no tokenizer.json, tokenizer.model or rwkv_vocab"):
        make_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="'bites'.*bytes.*or the folder of a tokenizer"):
        make_tokenizer("bites")
