"""Folders that are not what they should be; and that what was there stays until the new one is whole."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.data.tokenizers import ByteTokenizer
from lcr.pretrained import save as saving
from lcr.pretrained.load import INDEX, load_model, open_files
from lcr.pretrained.safetensors import TensorFile, write_tensors
from lcr.pretrained.save import save_model

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pretrained" / "llama_gqa"
SHARD = 200_000
UNKNOWN_ACTIVATIONS = ("gelu_10", "laplace", "xielu", "prelu")  # of transformers; two of them have parameters


@pytest.fixture
def folder(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "source"))


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN, progress=False)


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder, edit):
    """The folder's tensors after edit(tensors), a dictionary that it may change."""
    path = folder / "model.safetensors"
    file = TensorFile(path)
    tensors = {name: file.tensor(name) for name in file.entries}
    edit(tensors)
    write_tensors(path, {name: (t.dtype, t.shape) for name, t in tensors.items()}, tensors.__getitem__)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'. Did you mean 'llama'"),
        ({"model_type": "gemma3", "text_config": {}}, "only the text model is supported.*gemma3_text.*save_pretrained"),
        ({"model_type": None}, "expected a JSON object with a 'model_type'"),
        ({"hidden_size": 10**30}, f"hidden_size={10**30}; expected a whole number of at most 2,147,483,647"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*; expected None"),
        *[({"hidden_act": name}, f"hidden_act='{name}' is not supported") for name in UNKNOWN_ACTIVATIONS],
        ({"hidden_act": "snake"}, "hidden_act='snake' is not supported; supported: silu, gelu"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0; expected a whole number of at least 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; expected at most the 29 tensors"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3'; expected a whole number"),
        ({"attention_bias": "no"}, "attention_bias='no'; expected true or false"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps='tiny'; expected a number"),
        ({"num_key_value_heads": 4}, "num_kv_heads=4 does not divide num_heads=6"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral' is not supported here; supported: default"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\]; expected an object"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": [1]}}, r"rope_theta=\[1\]"),
        ({"rope_parameters": {"rope_type": "linear"}}, "expected the field 'factor' of 'linear' too"),
    ],
)
def test_configurations_that_are_refused(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder, progress=False)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "of no use to LlamaForCausalLM .*: extra"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}),
            r"model.norm.weight has shape \(3,\), expected \(72,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(72, np.int8)}),
            "model.norm.weight is int8; expected one of float64, float32.*not quantised",
        ),
    ],
)
def test_tensors_that_are_not_as_they_should_be(folder, monkeypatch, edit, message):
    rewrite(folder, edit)
    monkeypatch.setattr("lcr.pretrained.load.allocate", lambda *arguments: pytest.fail("allocated before all was checked"))
    with pytest.raises(ValueError, match=message):
        load_model(folder, progress=False)


def test_tensors_that_say_nothing_are_passed_over(folder, model):
    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # tied, and there all the same

    rewrite(folder, edit)
    same(load_model(folder, progress=False), model)


def test_a_head_that_is_not_the_embedding(folder):
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding, although config.json says so"):
        load_model(folder, progress=False)


def same(a, b):
    for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_folders_without_a_checkpoint(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_model(tmp_path / "nowhere", progress=False)
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        load_model(tmp_path, progress=False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors and no model.safetensors.index.json"):
        load_model(folder, progress=False)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ValueError, match="holds pytorch_model.bin and no safetensors.*save_pretrained"):
        load_model(folder, progress=False)
    (folder / "pytorch_model.bin").rename(folder / "rwkv7.pth")
    with pytest.raises(ValueError, match=f"holds rwkv7.pth .* loaded by the name of the file, {folder}/rwkv7.pth"):
        load_model(folder, progress=False)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: no JSON"):
        load_model(folder, progress=False)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(ValueError, match="config.json: is no file"):
        load_model(folder, progress=False)


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: it has .* it is truncated"):
        load_model(folder, progress=False)


def test_shards_with_an_index(tmp_path, model):
    save_model(model, tmp_path / "out", shard_bytes=SHARD)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(
        entry.end - entry.begin for file in files for entry in TensorFile(tmp_path / "out" / file).entries.values()
    )
    assert open_files(tmp_path / "out").keys() == open_files(GOLDEN).keys()
    same(load_model(tmp_path / "out", progress=False), model)


@pytest.mark.parametrize("name", ["../source/model.safetensors", "/etc/passwd", "..", "", "a/../b", "sub\\x"])
def test_an_index_that_leads_out_of_its_folder(tmp_path, model, name):
    folder = tmp_path / "out"
    save_model(model, folder, shard_bytes=SHARD)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected the name of one in the same folder"):
        load_model(folder, progress=False)


def test_an_index_that_is_wrong(tmp_path, model):
    folder = tmp_path / "out"
    save_model(model, folder, shard_bytes=SHARD)
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(name for name, file in index["weight_map"].items() if file == first)
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {name: second}}))
    with pytest.raises(ValueError, match=f"{name} not in the files"):
        load_model(folder, progress=False)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], "pytorch_model.bin")}))
    with pytest.raises(ValueError, match="holds pytorch_model.bin .* pickles"):
        load_model(folder, progress=False)
    (folder / INDEX).write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(ValueError, match="expected a JSON object with a 'weight_map'"):
        load_model(folder, progress=False)
    (folder / INDEX).write_text(json.dumps(index))
    (folder / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"{first}: no such file, but"):
        load_model(folder, progress=False)


def test_bfloat16_in_and_out(tmp_path, model):
    """A bfloat16 checkpoint is computed with in bfloat16, and exported as it came."""
    save_model(model, tmp_path / "half", dtype="bfloat16")
    half = load_model(tmp_path / "half", progress=False)
    assert half.config.dtype == "bfloat16" and half.embedding.dtype == jnp.bfloat16
    assert half.final_norm.scale.dtype == jnp.float32  # small, and held exactly
    save_model(half, tmp_path / "again")
    for name, file in open_files(tmp_path / "half").items():
        assert file.tensor(name).tobytes() == open_files(tmp_path / "again")[name].tensor(name).tobytes()
    logits, _ = half(jnp.ones((1, 3), jnp.int32))
    assert logits.dtype == jnp.float32


def test_a_folder_that_is_there_is_replaced_whole_or_not_at_all(tmp_path, model, monkeypatch):
    target = tmp_path / "out"
    save_model(model, target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(FileExistsError, match="exists already; expected a new folder, or overwrite=True"):
        save_model(model, target)

    def fail(*arguments):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", fail)
        with pytest.raises(OSError, match="the disk is full"):
            save_model(model, target, overwrite=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    (target / "stale").write_text("of an older export")
    save_model(model, target, overwrite=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before


def test_only_a_checkpoints_folder_is_replaced(tmp_path, model):
    target = tmp_path / "thesis"
    target.mkdir()
    save_model(model, target, overwrite=True)  # an empty one
    (target / "config.json").unlink()
    with pytest.raises(FileExistsError, match="has no config.json, so it is no checkpoint's folder"):
        save_model(model, target, overwrite=True)
    assert (target / "model.safetensors").exists()


def test_the_tokenizer_of_a_folder_that_is_replaced_stays(tmp_path, folder):
    """Load, change, save where it came from: without tokenizer= too, its files are still there."""
    files = {"tokenizer_config.json": "{}", "generation_config.json": '{"eos_token_id": [1, 2]}'}
    files |= {"rwkv_vocab_x.txt": "1 'a' 1", "notes.txt": "mine"}
    for name, text in files.items():
        (folder / name).write_text(text)
    loaded = load_model(folder, progress=False)
    save_model(loaded, folder, overwrite=True)
    assert {name: (folder / name).read_text() for name in list(files)[:3]} == dict(list(files.items())[:3])
    assert not (folder / "notes.txt").exists()
    save_model(loaded, folder, tokenizer=ByteTokenizer(), overwrite=True)  # another one, which has no files
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_places_that_cannot_be_written_to(tmp_path, model):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "out", pathlib.Path("/proc/out"), tmp_path / ("x" * 255)):
        with pytest.raises(OSError, match="cannot be made: .*; expected a folder that can be written to") as caught:
            save_model(model, path)
        assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(FileExistsError, match="is no folder"):
        save_model(model, tmp_path / "file", overwrite=True)


def test_the_umask_is_honoured(tmp_path, model):
    for mask, mode in ((0o077, 0o700), (0o002, 0o775)):
        before = os.umask(mask)
        try:
            save_model(model, tmp_path / str(mask))
        finally:
            os.umask(before)
        assert (tmp_path / str(mask)).stat().st_mode & 0o777 == mode


def test_arguments_that_are_something_else(tmp_path):
    """Outside of the tests annotations are not checked: the errors are ours."""
    script = """
import sys, lcr
from flax import nnx
model = lcr.make_model({"vocab_size": 9, "d_model": 16, "mixers": ("mha",)}, rngs=nnx.Rngs(0))
for arguments, options, message in [
    ((None, sys.argv[1]), {}, "model=None: expected a model"),
    ((model, sys.argv[1]), {"tokenizer": "abc"}, "tokenizer='abc': expected what lcr.load_pretrained gave"),
    ((model, None), {}, "path=None: expected the name of a folder"),
]:
    try:
        lcr.save_pretrained(*arguments, **options)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=True)
    assert not (tmp_path / "out").exists()


def test_routing_that_its_authors_and_transformers_take_for_two_things(tmp_path):
    folder = pathlib.Path(shutil.copytree(GOLDEN.with_name("deepseek_v2_lite"), tmp_path / "source"))
    change(folder, norm_topk_prob=True)
    with pytest.raises(ValueError, match="norm_topk_prob=True; expected False"):
        load_model(folder, progress=False)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_numbers_that_a_dtype_does_not_hold(tmp_path, folder, dtype):
    rewrite(folder, lambda t: t.update({"model.norm.weight": np.full(72, 66_000, dtype)}))
    loaded = load_model(folder, progress=False)
    with pytest.raises(ValueError, match="model.norm.weight: .* is more than 65504, .* or dtype bfloat16 or float32"):
        save_model(loaded, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    rewrite(folder, lambda t: t.update({"model.norm.weight": np.full(72, 1e39, np.float64)}))
    with pytest.raises(ValueError, match="model.norm.weight: 1e.39 is more than 3.4028e.38, the most that float32"):
        load_model(folder, progress=False)


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        ({"mixers": ("mha", "mha")}, "llama"),
        ({"mixers": ("gqa",), "mixer_options": {"gqa": {"window": 3}}}, "mistral"),
        ({"mixers": ("mqa",), "feed_forward": "moe"}, "mixtral"),
        (
            {
                "mixers": ("mla", "mla"),
                "feed_forward": ("swiglu", "moe"),
                "feed_forward_options": {"moe": {"normalize": False}},
            },
            "deepseek_v2",
        ),
        ({"mixers": ("mamba",), "d_ff": 0}, "mamba"),
        ({"mixers": ("mamba2",), "d_ff": 0}, "mamba2"),
        ({**lcr.hybrid("jamba", num_layers=8, num_experts=4, d_expert=96), "norm_epsilon": 1e-6}, "jamba"),
        ({"mixers": ("gla",)}, "gla"),
        ({"mixers": ("deltanet",)}, "delta_net"),
        ({"mixers": ("gated_deltanet",)}, "gated_deltanet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_of_our_own_go_out(tmp_path, config, model_type):
    """A model that was made here, by its defaults, has the form of a family; what comes back computes the same."""
    model = lcr.make_model({"vocab_size": 11, "d_model": 32, **config}, rngs=nnx.Rngs(0))
    save_model(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == model_type
    tokens = jnp.asarray([[1, 2, 3, 4]])
    again = load_model(tmp_path / "out", progress=False)
    np.testing.assert_array_equal(np.asarray(again(tokens)[0]), np.asarray(model(tokens)[0]))


def same_again(model, folder, tokens):
    """Whether what is exported computes the same when it is loaded; gives its fields and the names of its tensors."""
    save_model(model, folder)
    again = load_model(folder, progress=False)
    np.testing.assert_array_equal(np.asarray(again(tokens)[0]), np.asarray(model(tokens)[0]))
    save_model(again, folder.with_name("again"))
    assert load_model(folder.with_name("again"), progress=False).config == again.config
    return json.loads((folder / "config.json").read_text()), open_files(folder).keys()


@pytest.mark.parametrize(
    ("kinds", "first", "frequency"),
    [("sssm", 3, 1), ("mssm", 0, 3), ("ssms", 2, 2), ("msss", 0, 4), ("ssss", 4, 1), ("smmm", 1, 1)],
)
def test_mixtures_in_some_layers(tmp_path, kinds, first, frequency):
    """DeepSeek's moe_layer_freq: mixtures in every so many layers, from some layer on."""
    names = {"s": "swiglu", "m": "moe"}
    config = {"vocab_size": 11, "d_model": 32, "mixers": ("mla",) * len(kinds), "d_ff": 24}
    config |= {"feed_forward": tuple(names[kind] for kind in kinds)}
    if "m" in kinds:
        config |= {"feed_forward_options": {"moe": {"normalize": False, "num_experts": 3}}}
    model = lcr.make_model(config, rngs=nnx.Rngs(0))
    fields, _ = same_again(model, tmp_path / "out", jnp.asarray([[1, 2, 3, 4]]))
    assert (fields["first_k_dense_replace"], fields["moe_layer_freq"]) == (first, frequency)


def test_mixtures_in_other_layers_than_deepseek_has_them(tmp_path):
    config = {"vocab_size": 11, "d_model": 32, "mixers": ("mla",) * 4, "d_ff": 24}
    config |= {"feed_forward": ("swiglu", "moe") * 2, "feed_forward_options": {"moe": {"normalize": False}}}
    with pytest.raises(ValueError, match="deepseek_v2 would have feed_forward="):  # of multiples of 2 alone
        save_model(lcr.make_model(config, rngs=nnx.Rngs(0)), tmp_path / "out", family="deepseek_v2")


@pytest.mark.parametrize("mixer", ["gla", "retnet"])
@pytest.mark.parametrize(("gate", "norm_scale"), [(False, True), (True, False), (False, False)])
def test_heads_without_a_gate_or_a_scale(tmp_path, mixer, gate, norm_scale):
    options = {"gate": gate, "norm_scale": norm_scale}
    if mixer == "retnet":  # as flash-linear-attention rotates heads of width 16
        options |= {"num_heads": 2, "value_factor": 2.0, "rotation_base": 10_000.0 ** (1 - 2 / 16)}
    config = {"vocab_size": 11, "d_model": 32, "mixers": (mixer,) * 2, "mixer_options": {mixer: options}}
    model = lcr.make_model(config | {"norm_epsilon": 1e-6 if mixer == "retnet" else 1e-5}, rngs=nnx.Rngs(0))
    fields, names = same_again(model, tmp_path / "out", jnp.asarray([[1, 2, 3, 4]]))
    assert (fields["use_output_gate"], fields["elementwise_affine"]) == (gate, norm_scale)
    norms = {name.split(".attn.")[1] for name in names if ".attn.g_norm" in name}
    assert norms == ({"g_norm_swish_gate.weight" if gate else "g_norm.weight"} if norm_scale else set())


def test_a_norm_of_the_other_name_goes_out_with_the_field_for_it(tmp_path):
    """Where flash-linear-attention computes norm and gate apart, the norm has another name, which no export has."""
    folder = pathlib.Path(shutil.copytree(GOLDEN.with_name("fla_gla"), tmp_path / "source"))
    other = {"g_norm_swish_gate": "g_norm"}

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(*next(iter(other.items())))] = tensors.pop(name)

    rewrite(folder, rename)
    change(folder, fuse_norm=False)
    loaded = load_model(folder, progress=False)
    save_model(loaded, tmp_path / "out")
    assert open_files(tmp_path / "out").keys() == open_files(GOLDEN.with_name("fla_gla")).keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("fuse_norm", True)


def test_models_that_no_family_has_the_form_of(tmp_path):
    model = lcr.make_model({"vocab_size": 9, "d_model": 16, "mixers": ("mamba", "mha")}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the model has the form of no family: llama"):
        save_model(model, tmp_path / "out")
    with pytest.raises(ValueError, match="family: unknown value 'lama'. Did you mean 'llama'"):
        save_model(model, tmp_path / "out", family="lama")
    assert not list(tmp_path.iterdir())


def test_fields_that_nothing_is_made_of_are_told(folder, caplog):
    change(folder, rope_thetta=3.0)
    load_model(folder, progress=False)
    assert "no use was made of rope_thetta" in caplog.text


def test_shards_without_an_index(tmp_path, model):
    save_model(model, tmp_path / "out", shard_bytes=SHARD)
    (tmp_path / "out" / INDEX).unlink()
    again = load_model(tmp_path / "out", progress=False)
    for (path, ours), (_, theirs) in zip(*(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(ours[...], theirs[...], err_msg=str(path))
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    shutil.copyfile(shards[0], shards[0].with_name("model-00009-of-00009.safetensors"))
    with pytest.raises(ValueError, match=rf"in more than one file; expected {INDEX} to say in which"):
        load_model(tmp_path / "out", progress=False)
    for shard in shards[1:]:
        shard.unlink()
    (shards[0].with_name("model-00009-of-00009.safetensors")).unlink()
    with pytest.raises(ValueError, match="missing: "):
        load_model(tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("case", "kept"),
    [("mixtral", "gate.weight"), ("jamba", "router.weight"), ("mamba2", "conv1d.weight"), ("llama_gqa", "embed_tokens")],
)
def test_float32_among_bfloat16_stays(tmp_path, case, kept):
    folder = pathlib.Path(shutil.copytree(GOLDEN.with_name(case), tmp_path / "source"))

    def narrow(tensors):
        for name in tensors:
            if kept not in name:
                tensors[name] = tensors[name].astype(jnp.bfloat16)

    rewrite(folder, narrow)
    loaded = load_model(folder, progress=False)
    assert loaded.config.dtype == "bfloat16"
    logits, _ = nnx.jit(lambda model, tokens: model(tokens))(loaded, jnp.arange(1, 9, dtype=jnp.int32)[None])
    assert jnp.isfinite(logits).all()
    save_model(loaded, tmp_path / "out")
    source, written = open_files(folder), open_files(tmp_path / "out")
    assert source.keys() == written.keys()
    assert any(source[name].entries[name].dtype == np.float32 for name in source)
    for name in source:
        assert source[name].tensor(name).tobytes() == written[name].tensor(name).tobytes(), name


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path, model, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("mine")
    rename = os.rename

    def failing(source, destination):
        if str(destination) == str(target) and ".old." not in str(source):
            raise OSError("no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        save_model(model, target, overwrite=True)
    assert (target / "config.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folder_in_which_it_runs_is_not_replaced(tmp_path, model, monkeypatch):
    work = tmp_path / "work"
    (work / "deep").mkdir(parents=True)
    (work / "thesis.tex").write_text("years")
    monkeypatch.chdir(work / "deep")
    for path in (".", "..", work, "/", ""):
        with pytest.raises(ValueError, match="path="):
            save_model(model, path, overwrite=True)
    assert (work / "thesis.tex").read_text() == "years"
    (work / "link").symlink_to(tmp_path / "elsewhere")
    save_model(model, work / "link")
    assert load_model(tmp_path / "elsewhere", progress=False).config == model.config


def test_shardings(model):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    asked = []

    def by_shape(name, shape):
        asked.append(name)
        return jax.sharding.NamedSharding(mesh, jax.P("x") if len(shape) > 1 else jax.P())

    for sharding in (jax.sharding.NamedSharding(mesh, jax.P()), by_shape):
        loaded = load_model(GOLDEN, sharding=sharding, progress=False)
        for (path, ours), (_, theirs) in zip(
            *(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (model, loaded)), strict=True
        ):
            np.testing.assert_array_equal(ours[...], theirs[...])
            expected = sharding if sharding is not by_shape else by_shape("", theirs[...].shape)
            assert theirs[...].sharding == expected, path
    assert "groups.blocks.0.mixer.query.kernel" in asked
    with pytest.raises(ValueError, match="sharding of embedding"):
        load_model(GOLDEN, sharding=lambda name, shape: None, progress=False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json"])
def test_a_file_is_no_folder(folder, name):
    (folder / name).touch()
    with pytest.raises(ValueError, match="pickles" if name.endswith("bin") else "is a file; expected the folder"):
        lcr.load_pretrained(folder / name)


@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_gemma_without_windows_goes_out_with_a_width_for_them(tmp_path, case):
    """transformers makes a mask of every kind that it knows, and wants the width for it."""
    folder = pathlib.Path(shutil.copytree(GOLDEN.with_name(case), tmp_path / "source"))
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    change(folder, layer_types=["full_attention"] * layers)
    loaded = load_model(folder, progress=False)
    save_model(loaded, tmp_path / "out")
    assert isinstance(json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"], int)
    assert load_model(tmp_path / "out", progress=False).config == loaded.config


def test_gemma3_with_scaled_windows_goes_out(tmp_path):
    folder = pathlib.Path(shutil.copytree(GOLDEN.with_name("gemma3"), tmp_path / "source"))
    given = json.loads((folder / "config.json").read_text())["rope_parameters"]
    given["sliding_attention"] |= {"rope_type": "linear", "factor": 4.0}
    change(folder, rope_parameters=given)
    loaded = load_model(folder, progress=False)
    save_model(loaded, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]["sliding_attention"]["factor"] == 4.0
    assert load_model(tmp_path / "out", progress=False).config == loaded.config
