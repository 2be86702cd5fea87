"""The tokenizer beside a checkpoint."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
import sentencepiece
import tokenizers
from lcr.pretrained.tokenizer import load_tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pretrained" / "llama_gqa"
TEXT = "the pass key is 04711"


def library(folder):
    """A byte-pair tokenizer.json of a few texts, with tokens to begin and end with."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>"], show_progress=False)
    made.train_from_iterator([TEXT] * 3, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')


def pieces(folder):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 5),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=9,
    )


def world(folder):
    lines = ["1 'the' 3", "2 ' pass' 5", "3 ' key is ' 8", "4 b'\\xe2\\x82' 2", "5 b'\\xac' 1"]
    lines += [f"{ord(digit)} {digit!r} 1" for digit in "0123456789"]
    (folder / "rwkv_vocab_v20230424.txt").write_text("\n".join(lines))


@pytest.mark.parametrize(("make", "ends"), [(library, (0, (1,))), (pieces, (1, (2,))), (world, (None, (0,)))])
def test_there_and_back(tmp_path, caplog, make, ends):
    make(tmp_path)
    tokenizer = load_tokenizer(tmp_path, 131)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and 0 < ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT
    np.testing.assert_array_equal(tokenizer.encode(TEXT.encode()), ids)
    assert (tokenizer.bos, tokenizer.eos) == ends and not set(ids) & set(ends[1])
    with pytest.raises(ValueError, match="ids from 0 to 9999"):
        tokenizer.decode(np.array([0, 9999]))
    load_tokenizer(tmp_path, 3)
    assert f"has ids up to {tokenizer.vocab_size - 1}, its model rows for 3" in caplog.text


@pytest.mark.parametrize("make", [library, pieces, world])
def test_several_tokens_may_end_a_text(tmp_path, make):
    make(tmp_path)
    before = load_tokenizer(tmp_path, 131)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [before.eos[0], 7, 9]}))
    assert load_tokenizer(tmp_path, 131).eos == (before.eos[0], 7, 9)


def test_the_ends_where_tokenizer_config_has_none(tmp_path):
    library(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    assert (load_tokenizer(tmp_path, 131).bos, load_tokenizer(tmp_path, 131).eos) == (None, ())
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 5, "eos_token_id": 6}')
    assert (load_tokenizer(tmp_path, 131).bos, load_tokenizer(tmp_path, 131).eos) == (5, (6,))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    assert (load_tokenizer(tmp_path, 131).bos, load_tokenizer(tmp_path, 131).eos) == (0, (1, 6))


def test_rwkv_takes_the_longest_token_that_fits(tmp_path):
    world(tmp_path)
    tokenizer = load_tokenizer(tmp_path, 131)
    assert tokenizer.encode("the pass key is 4").tolist() == [1, 2, 3, ord("4")]
    assert tokenizer.encode("€").tolist() == [4, 5] and tokenizer.decode(np.array([4, 5])) == "€"
    with pytest.raises(ValueError, match="no token for the byte 0x78"):
        tokenizer.encode("x")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: "),
        ("tokenizer.model", "nonsense", "tokenizer.model: no model of sentencepiece"),
        ("rwkv_vocab_x.txt", "1 'a' 2", "line 1: expected an id, a literal and its length: 'a' is not 2 bytes"),
        ("rwkv_vocab_x.txt", "1 __import__('os') 2", "line 1: expected an id"),
    ],
)
def test_damaged_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path, 131)


def test_load_generate_save(tmp_path):
    """What a user does: load, continue a text, save again; the tokenizer goes along."""
    source = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "source"))
    library(source)
    model, tokenizer = lcr.load_pretrained(source, progress=False)
    prompt = jnp.asarray(tokenizer.encode(TEXT))[None]
    tokens, _ = lcr.generate(model, prompt, max_new_tokens=2, temperature=1.0, key=jax.random.key(0))
    assert tokens.shape == (1, 2)
    lcr.save_pretrained(model, tmp_path / "out", tokenizer=tokenizer)
    again, same = lcr.load_pretrained(tmp_path / "out", progress=False)
    assert again.config == model.config and same.decode(same.encode(TEXT)) == TEXT


def test_bytes_where_there_is_none():
    _, tokenizer = lcr.load_pretrained(GOLDEN, progress=False)
    assert tokenizer.name == "bytes"
