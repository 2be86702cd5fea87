"""Round trips, the reserved padding id, and digits as tokens of their own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lcr.data.tokenizers import PROMPT_WORDS, RANDOM_WORDS, TOKENIZERS, WordTokenizer, make_tokenizer

TEXT = st.text(st.sampled_from("aZ é✓😀\n\r\0.?_-09"))
FIXED = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@given(text=TEXT)
@FIXED
def test_bytes_round_trip_any_text(text):
    tokenizer = make_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and (ids > 0).all() and (ids < tokenizer.vocab_size).all()
    assert tokenizer.decode(ids) == text


@given(data=st.binary())
@FIXED
def test_bytes_round_trip_any_bytes(data):
    tokenizer = make_tokenizer("bytes")
    ids = tokenizer.encode(data)
    np.testing.assert_array_equal(ids, [byte + 1 for byte in data])
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)


@given(ids=st.lists(st.integers(2, WordTokenizer.vocab_size - 1)))
@FIXED
def test_words_round_trip_their_vocabulary(ids):
    tokenizer = make_tokenizer("words")
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(np.array(ids, np.int32))), ids)


@given(text=TEXT)
@FIXED
def test_words_take_any_text(text):
    ids = make_tokenizer("words").encode(text)
    assert ids.dtype == np.int32 and (ids > 0).all() and (ids < WordTokenizer.vocab_size).all()


def test_words_are_a_small_vocabulary_without_doubles():
    assert len(set(WordTokenizer.entries)) == len(WordTokenizer.entries) == WordTokenizer.vocab_size == 183
    assert len(RANDOM_WORDS) == 128 and {len(word) for word in RANDOM_WORDS} == {4}
    assert not set(RANDOM_WORDS) & {word.lower() for word in PROMPT_WORDS}


def test_every_digit_is_a_token():
    tokenizer = make_tokenizer("words")
    ids = tokenizer.encode("The lock is 00420.")
    np.testing.assert_array_equal(ids[3:], [4, 4, 8, 6, 4, 2])
    assert tokenizer.decode(ids) == "The <unknown> is 00420."


@pytest.mark.parametrize("name", TOKENIZERS)
def test_padding_is_never_encoded_and_not_decoded(name):
    tokenizer = make_tokenizer(name)
    assert tokenizer.name == name
    assert 0 not in tokenizer.encode("\0 a")
    ids = tokenizer.encode("The sky is blue.")
    assert tokenizer.decode(np.pad(ids, 3)) == "The sky is blue."


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_outside_the_vocabulary_are_named(name):
    tokenizer = make_tokenizer(name)
    for bad in (tokenizer.vocab_size, -1):
        with pytest.raises(ValueError, match=f"the '{name}' tokenizer has ids 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode(np.array([1, bad]))


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(ValueError, match="Did you mean 'words'"):
        make_tokenizer("word")
