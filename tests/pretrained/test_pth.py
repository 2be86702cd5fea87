"""RWKV-7 in its author's format: equal to his package, and nothing in the file is ever called."""

import collections
import dataclasses
import functools
import io
import os
import pathlib
import pickle
import zipfile

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.pretrained.load import load_model
from lcr.pretrained.pth import PthFile
from lcr.pretrained.save import save_model
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pretrained_pth"


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "rwkv7.pth", progress=False)


@functools.partial(jax.jit, static_argnums=0)
def call(graph, parameters, tokens, states):
    return nnx.merge(graph, parameters)(tokens, states)


def run(model, tokens, states=None):
    return call(*nnx.split(model), jnp.asarray(tokens, jnp.int32), states)


def test_equals_the_authors_package(model):
    """Texts of 67 and 300 tokens side by side, filled up with tokens that come later."""
    expected = np.load(GOLDEN / "rwkv7.npz")
    texts = [np.pad(expected[name], ((0, 0), (0, 320 - expected[name].shape[1]))) for name in ("tokens", "tokens_long")]
    logits, _ = run(model, np.concatenate(texts))
    for end, found in zip(("", "_long"), np.split(np.asarray(logits), [len(texts[0])]), strict=True):
        assert_close(found[:, expected[f"at{end}"]], expected[f"logits{end}"], "pretrained")


@pytest.mark.parametrize("cuts", [[1, 2, 3, 35], range(1, 67)], ids=["uneven pieces", "token by token"])
def test_in_pieces_it_is_the_same(model, cuts):
    expected = np.load(GOLDEN / "rwkv7.npz")
    tokens = expected["tokens"]
    states, parts = model.init_states(*tokens.shape), []
    for piece in np.split(tokens, cuts, axis=1):
        logits, states = run(model, piece, states)
        parts.append(logits)
    assert_close(np.concatenate(parts, axis=1)[:, expected["at"]], expected["logits"], "pretrained")


def test_goes_out_in_the_other_format(model, tmp_path):
    """flash-linear-attention's format ties the eps of the heads' norm to their width: as the author's only for 64."""
    with pytest.raises(ValueError, match=r"(?s)rwkv7 would have mixer_options.*norm_eps: 0.00016"):
        save_model(model, tmp_path / "out")
    options = {"rwkv7": {**model.config.mixer_options["rwkv7"], "num_heads": 1}}
    wide = lcr.make_model(dataclasses.replace(model.config, mixer_options=options), rngs=nnx.Rngs(0))
    tokens = np.load(GOLDEN / "rwkv7.npz")["tokens"][:, :32]
    save_model(wide, tmp_path / "out", family="rwkv7")
    again = load_model(tmp_path / "out", progress=False)
    np.testing.assert_array_equal(np.asarray(run(again, tokens)[0]), np.asarray(run(wide, tokens)[0]))


def archive(path, pickled, storages=None):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", pickled)
        for key, data in (storages or {}).items():
            file.writestr(f"model/data/{key}", data)
    return path


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, pickle.loads, collections.OrderedDict], ids=lambda f: f.__name__
)
def test_a_malicious_pickle_does_nothing(tmp_path, protocol, function):
    """Whatever it names and however it is written, nothing is called."""
    owned = tmp_path / "owned"
    arguments = {os.system: f"touch {owned}", pickle.loads: b"."}.get(function, f"open({str(owned)!r}, 'w')")
    evil = Evil(function, Evil(os.mkdir, str(owned)) if function is collections.OrderedDict else arguments)
    path = archive(tmp_path / "model.pth", pickle.dumps({"emb.weight": evil}, protocol))
    with pytest.raises(ValueError, match="describes no dictionary of tensors: (it names|the instruction)"):
        load_model(path, progress=False)
    assert not owned.exists()


def test_our_machine_is_not_pythons(tmp_path, monkeypatch):
    """Loading does not go through Python's unpickler at all."""
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_: pytest.fail("unpickled"))
    assert "emb.weight" in PthFile(GOLDEN / "rwkv7.pth").entries


@pytest.mark.parametrize("fault", ["big-endian", "compressed"])
def test_archives_that_pytorch_does_not_write(tmp_path, fault):
    """Numbers the other way round; and entries that would be larger than they look."""
    path = tmp_path / "model.pth"
    method = zipfile.ZIP_DEFLATED if fault == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(GOLDEN / "rwkv7.pth") as source, zipfile.ZipFile(path, "w", method) as copy:
        for name in source.namelist():
            if not name.endswith("/byteorder"):
                copy.writestr(name, source.read(name))
        prefix = source.namelist()[0].split("/")[0]
        copy.writestr(f"{prefix}/byteorder", "big" if fault == "big-endian" else "little")
    message = {"big-endian": "big-endian; expected little-endian", "compressed": "no data.pkl that describes tensors"}
    with pytest.raises(ValueError, match=message[fault]):
        PthFile(path)


class Pickled(io.BytesIO):
    """Writes the pickle of {"a": a tensor} by hand, with what a test would have wrong."""

    def __init__(self, storage="FloatStorage", key="0", size=6, offset=0, shape=(2, 3), stride=(3, 1)):
        super().__init__()

        def text(value):
            self.write(b"X" + len(value).to_bytes(4, "little") + value.encode())

        def whole(value):
            self.write(b"\x8a\x08" + value.to_bytes(8, "little", signed=True))

        self.write(b"\x80\x02}(")
        text("a")
        self.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        text("storage")
        self.write(b"ctorch\n" + storage.encode() + b"\n")
        text(key)
        text("cpu")
        whole(size)
        self.write(b"tQ")
        whole(offset)
        for values in (shape, stride):
            self.write(b"(")
            for value in values:
                whole(value)
            self.write(b"t")
        self.write(b"\x89ccollections\nOrderedDict\n)Rt")
        self.write(b"Ru.")


def test_strides_and_offsets(tmp_path):
    data = np.arange(7, dtype=np.float32)
    pickled = Pickled(size=7, offset=1, shape=(3, 2), stride=(1, 3)).getvalue()  # a transposed view
    file = PthFile(archive(tmp_path / "x.pth", pickled, {"0": data.tobytes()}))
    np.testing.assert_array_equal(file.tensor("a"), data[1:].reshape(2, 3).T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 1}, "'a' ends at element 6 of a storage of 6; the file is truncated"),
        ({"stride": (2**40, 1)}, "ends at element"),
        ({"shape": (10**9, 10**9), "stride": (0, 0)}, "ends at element 0 of a storage of 6"),
        ({"shape": (-1, 3)}, "'a' has shape"),
        ({"stride": (1,)}, "'a' has shape"),
        ({"storage": "LongStorage"}, "it names 'torch LongStorage'"),
        ({"key": "../../etc/passwd"}, "a reference to 'storage'"),
        ({"key": "7"}, "of a storage of 0"),
    ],
)
def test_tensors_that_lead_out_of_their_bytes(tmp_path, changes, message):
    data = np.zeros(6, np.float32).tobytes()
    with pytest.raises(ValueError, match=message):
        PthFile(archive(tmp_path / "x.pth", Pickled(**changes).getvalue(), {"0": data}))


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="x.pth: no ZIP archive; expected what torch.save writes"):
        load_model(tmp_path / "x.pth", progress=False)
    with zipfile.ZipFile(tmp_path / "y.pth", "w") as file:
        file.writestr("readme", "")
    with pytest.raises(ValueError, match="no data.pkl that describes tensors"):
        load_model(tmp_path / "y.pth", progress=False)
    data = np.zeros(6, np.float32).tobytes()
    with pytest.raises(ValueError, match="no tensor emb.weight, .* expected an RWKV-7"):
        load_model(archive(tmp_path / "z.pth", Pickled().getvalue(), {"0": data}), progress=False)
    with pytest.raises(ValueError, match="describes no dictionary of tensors: the instruction EMPTY_LIST"):
        PthFile(archive(tmp_path / "w.pth", b"\x80\x02]."))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(tmp_path / "none.pth", progress=False)


def test_the_archive_does_not_stay_open(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes((GOLDEN / "rwkv7.pth").read_bytes())
    file = PthFile(path)
    assert file.tensor("emb.weight").shape
    if pathlib.Path("/proc/self/fd").exists():
        held = [os.readlink(link) for link in pathlib.Path("/proc/self/fd").iterdir() if link.is_symlink()]
        assert str(path) not in held


def test_damaged_bytes_of_a_tensor(tmp_path):
    path, data = tmp_path / "x.pth", bytearray((GOLDEN / "rwkv7.pth").read_bytes())
    tensor = PthFile(GOLDEN / "rwkv7.pth").tensor("emb.weight").tobytes()
    data[data.index(tensor) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="data/[0-9]+ is damaged"):
        PthFile(path).tensor("emb.weight")


@pytest.mark.parametrize("cut", [1000, 200_000])
def test_truncated(tmp_path, cut):
    (tmp_path / "x.pth").write_bytes((GOLDEN / "rwkv7.pth").read_bytes()[:cut])
    with pytest.raises(ValueError, match="no ZIP archive"):
        load_model(tmp_path / "x.pth", progress=False)
