"""The format's reader: what is damaged is refused, with the file and the problem named; the writer's files are read."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lcr.pretrained.safetensors import TensorFile, write_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(3).astype(jnp.bfloat16),
    "empty": np.zeros((0, 4), np.float16),
    "scalar": np.array(7, np.int64),
}


def write(path, tensors=TENSORS):
    write_tensors(path, {name: (t.dtype, t.shape) for name, t in tensors.items()}, tensors.__getitem__)
    return path


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_what_was_written_is_read(tmp_path):
    file = TensorFile(write(tmp_path / "x"))
    assert file.entries.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        found = file.tensor(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
        found += 1  # a copy of one's own


def test_wider_types_stand_first_so_that_all_are_aligned(tmp_path):
    file = TensorFile(write(tmp_path / "x"))
    for entry in file.entries.values():
        assert entry.begin % entry.dtype.itemsize == 0


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": A}, b"\0" * 7, "7 bytes of tensors where its header says 8; it is truncated"),
        ({"a": A}, b"\0" * 9, "9 bytes of tensors where its header says 8"),
        (b"{", b"", "its header is no JSON object"),
        (b"\xff\xfe", b"", "its header is no JSON object"),
        (b"[1]", b"", "a JSON list, expected an object"),
        (b'{"a": {}, "a": {}}', b"", "'a' stands there twice"),
        ({"a": 3}, b"", "'a' is described by 3"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "expected dtype, shape and data_offsets"),
        ({"a": A | {"dtype": "F3"}}, b"\0" * 8, "the dtype 'F3'; supported: F64, F32"),
        ({"a": A | {"shape": [-2]}}, b"\0" * 8, r"the shape \[-2\]"),
        ({"a": A | {"shape": [2**62, 2**62]}}, b"\0" * 8, "has 8 bytes; expected"),
        ({"a": A | {"shape": [True, 2]}}, b"\0" * 8, "the shape"),
        ({"a": A | {"data_offsets": [0, 8, 9]}}, b"\0" * 8, "the data_offsets"),
        ({"a": A | {"data_offsets": [8, 0]}}, b"\0" * 8, "has -8 bytes; expected 8"),
        ({"a": A, "b": A}, b"\0" * 8, "begin at 0, expected 8: no holes, no overlaps"),
        ({"a": A | {"data_offsets": [8, 16]}}, b"\0" * 16, "begin at 8, expected 0"),
    ],
)
def test_damaged_headers(tmp_path, header, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        TensorFile(raw(tmp_path / "model.safetensors", header, data))
    assert "model.safetensors" in str(caught.value)


def test_too_short(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(ValueError, match="3 bytes; a safetensors file has at least 8"):
        TensorFile(tmp_path / "x")
    with pytest.raises(ValueError, match="a header of 1,000,000 bytes in a file of"):
        TensorFile(raw(tmp_path / "y", {}, length=1_000_000))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_change_of_bytes_does_more_than_be_refused_or_read(tmp_path_factory, data):
    """A changed file is refused with a ValueError, or gives arrays of the sizes that its header says."""
    path = tmp_path_factory.mktemp("fuzz") / "x"
    whole = bytearray(write(path).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    try:
        file = TensorFile(path)
    except ValueError:
        return
    for name, entry in file.entries.items():
        assert file.tensor(name).nbytes == entry.end - entry.begin


def test_the_writer_holds_tensors_to_what_was_said(tmp_path):
    with pytest.raises(TypeError, match="a: float32 of shape"):
        write_tensors(tmp_path / "x", {"a": (np.dtype(np.float32), (3,))}, lambda name: np.zeros(2, np.float32))
    with pytest.raises(TypeError, match="no dtype for complex64"):
        write(tmp_path / "x", {"a": np.zeros(2, np.complex64)})
