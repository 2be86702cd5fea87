"""Every family: equal to the implementation that wrote the checkpoint, in one call, in pieces and by the token; and
exported as it came."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.pretrained.families import FAMILIES
from lcr.pretrained.load import load_model, open_files
from lcr.pretrained.safetensors import write_tensors
from lcr.pretrained.save import save_model
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pretrained"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())
LEFT_PADDED = [name for name in CASES if "tokens_leftpad" in np.load(GOLDEN / name / "logits.npz").files]
# Experts, values handed on, windows by turns, mixed layers
WRITTEN_OUT = ("deepseek_v3", "fla_rwkv7", "gemma2", "jamba")
WITH_OLDER_NAMES = [name for name in CASES if (GOLDEN / name / "config.hub.json").exists()]


class Loaded:
    """A golden checkpoint, loaded, and its programs. Nearly all the tests' time is compiling them: one for whole texts,
    one for pieces, one for single tokens."""

    def __init__(self, name):
        self.folder = GOLDEN / name
        self.expected = dict(np.load(self.folder / "logits.npz"))
        self.model = load_model(self.folder, progress=False)
        graph, self.parameters = nnx.split(self.model)
        self.call = jax.jit(lambda parameters, *arguments: nnx.merge(graph, parameters)(*arguments))

    def __call__(self, tokens, states=None, segment_ids=None):
        return self.call(self.parameters, jnp.asarray(tokens, jnp.int32), states, segment_ids)

    def depends_on_length(self):
        """Whether the frequencies of its positions depend on how long a call is."""
        rope = json.loads((self.folder / "config.json").read_text()).get("rope_parameters") or {}
        return rope.get("rope_type") in ("dynamic", "longrope")


@pytest.fixture(scope="module", params=CASES)
def loaded(request):
    return Loaded(request.param)


def test_one_call(loaded):
    """Short texts and the long one, side by side: filled up with tokens that come later, and so change nothing. (To a
    whole number of chunks: a rest at the end makes programs of twice the size, and is for the ops' tests.)"""
    texts = {end: loaded.expected[f"tokens{end}"] for end in ("", "_long")}
    if loaded.depends_on_length():
        logits = {end: loaded(tokens)[0] for end, tokens in texts.items()}
    else:
        filled = (np.pad(tokens, ((0, 0), (0, 320 - tokens.shape[1])), constant_values=7) for tokens in texts.values())
        both, _ = loaded(np.concatenate(list(filled)))
        logits = dict(zip(texts, np.split(both, [len(texts[""])]), strict=True))
    for end in texts:
        at = loaded.expected[f"at{end}"]
        assert_close(np.asarray(logits[end])[:, at], loaded.expected[f"logits{end}"], "pretrained")


def test_uneven_pieces(loaded):
    tokens = loaded.expected["tokens"]
    states, parts = loaded.model.init_states(*tokens.shape), []
    for piece in np.split(tokens, [1, 2, 3, 35], axis=1):  # three times one, and twice 32
        logits, states = loaded(piece, states)
        parts.append(logits)
    logits = np.concatenate(parts, axis=1)[:, loaded.expected["at"]]
    assert_close(logits, loaded.expected["logits"], "pretrained")


def test_token_by_token(loaded):
    tokens = loaded.expected["tokens"]
    states, parts = loaded.model.init_states(*tokens.shape), []
    for t in range(tokens.shape[1]):
        logits, states = loaded(tokens[:, t : t + 1], states)
        parts.append(logits)
    logits = np.concatenate(parts, axis=1)[:, loaded.expected["at"]]
    assert_close(logits, loaded.expected["logits"], "pretrained")


@pytest.mark.parametrize("loaded", LEFT_PADDED, indirect=True)
def test_padding_on_the_left(loaded):
    """Rows of unequal length, the shorter one padded on the left, as `transformers` has them in a batch."""
    at, mask = loaded.expected["at"], loaded.expected["segment_ids_leftpad"]
    logits, _ = loaded(loaded.expected["tokens_leftpad"], None, jnp.asarray(mask, jnp.int32))
    real = mask[:, at] != 0  # what stands at padding means nothing
    assert 0 < (~real).sum() < real.sum()
    assert_close(np.asarray(logits)[:, at][real], loaded.expected["logits_leftpad"][real], "pretrained")


def test_export_is_the_source_bit_for_bit(loaded, tmp_path):
    save_model(loaded.model, tmp_path / "out")
    source, exported = open_files(loaded.folder), open_files(tmp_path / "out")
    assert source.keys() == exported.keys()
    for name, file in source.items():
        ours, theirs = exported[name].tensor(name), file.tensor(name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert ours.tobytes() == theirs.tobytes(), name
    again = load_model(tmp_path / "out", progress=False)
    assert again.config == loaded.model.config
    # transformers tells 3 from 3.0
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (loaded.folder, tmp_path / "out"))
    for name in theirs.keys() & ours.keys() - {"rope_parameters"}:
        assert type(theirs[name]) is type(ours[name]) or None in (theirs[name], ours[name]), name


@pytest.mark.parametrize("loaded", WITH_OLDER_NAMES, indirect=True)
def test_the_hubs_older_names_say_the_same(loaded, tmp_path):
    """config.json as version 5 of transformers writes it, and as most checkpoints have it (but for those of
    flash-linear-attention, which has one way to write it)."""
    for file in loaded.folder.iterdir():
        shutil.copy(file, tmp_path)
    shutil.copy(loaded.folder / "config.hub.json", tmp_path / "config.json")
    assert load_model(tmp_path, progress=False).config == loaded.model.config


def test_generates(loaded):
    """Traced for every family, as compiling it takes longer than all else here; for some the tokens are those that are
    likeliest after one another."""
    prompt = jnp.asarray(loaded.expected["tokens"][:, :32], jnp.int32)
    states = loaded.model.init_states(*loaded.expected["tokens"].shape)

    def generate(prompt, states):
        return lcr.generate(loaded.model, prompt, max_new_tokens=3, states=states)

    assert jax.eval_shape(generate, prompt, states)[0].shape == (2, 3)
    if loaded.folder.name in WRITTEN_OUT:
        tokens, written = generate(prompt, states)
        logits, states = loaded(prompt, states)
        for t in range(3):
            np.testing.assert_array_equal(tokens[:, t], np.argmax(logits[:, -1], axis=-1))
            logits, states = loaded(tokens[:, t : t + 1], states)
        assert_close(written, states, "float32")


@pytest.mark.parametrize("every", [0, 2])
def test_rwkv4_is_computed_as_in_training(tmp_path, caplog, every):
    """transformers rescales in evaluation against overflow; said once, where a checkpoint asks for it."""
    shutil.copytree(GOLDEN / "rwkv4", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_every": every}))
    with caplog.at_level("INFO", "lcr.pretrained"):
        model = load_model(tmp_path / "source", progress=False)
    assert caplog.text.count("is left out, as transformers does in training") == (every > 0)
    assert model.config == load_model(GOLDEN / "rwkv4", progress=False).config
    save_model(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rescale_every"] == every


def test_every_family_has_a_case():
    kinds = {json.loads((GOLDEN / case / "config.json").read_text())["model_type"] for case in CASES}
    assert FAMILIES.keys() == kinds


@pytest.mark.parametrize("null", ["null", "missing"])
def test_qwen2_without_windows_and_with_them(tmp_path, null):
    """With biases of zero and no window it is Llama; from max_window_layers on in a window, if it is said to use one."""
    llama = Loaded("llama_gqa")
    fields = json.loads((llama.folder / "config.hub.json").read_text()) | {"model_type": "qwen2"}
    del fields["head_dim"]  # not a field of Qwen2
    fields |= {"hidden_size": 96, "use_sliding_window": False} | ({"sliding_window": None} if null == "null" else {})
    config = {"vocab_size": 131, "d_model": 96, "mixers": ("attention",) * 3, "d_ff": 77, "norm_epsilon": 1e-5}
    heads = {"num_heads": 6, "num_kv_heads": 2, "rope_base": 5e5}
    plain = lcr.make_model(config | {"mixer_options": {"attention": heads}}, rngs=nnx.Rngs(0))
    save_model(plain, tmp_path / "llama", family="llama")
    stored = open_files(tmp_path / "llama")
    tensors = {name: file.tensor(name) for name, file in stored.items()}
    for name in list(tensors):
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            tensors[name.replace("weight", "bias")] = np.zeros(len(tensors[name]), np.float32)
    folder = tmp_path / "qwen2"
    folder.mkdir()
    shapes = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    write_tensors(folder / "model.safetensors", shapes, tensors.__getitem__)
    (folder / "config.json").write_text(json.dumps(fields))
    tokens = jnp.asarray(llama.expected["tokens"], jnp.int32)
    model = load_model(folder, progress=False)
    np.testing.assert_array_equal(np.asarray(model(tokens)[0]), np.asarray(plain(tokens)[0]))
    save_model(model, tmp_path / "again")
    assert load_model(tmp_path / "again", progress=False).config == model.config

    (folder / "config.json").write_text(
        json.dumps(fields | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2})
    )
    windowed = load_model(folder, progress=False)
    assert [windowed.config.mixer(name).window for name in windowed.config.mixers] == [None, None, 8]
    save_model(windowed, tmp_path / "windowed")
    assert load_model(tmp_path / "windowed", progress=False).config == windowed.config
