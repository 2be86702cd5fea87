"""Checkpoints of others in the experiments: training from them, evaluating them, converting them there and back."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.evaluation.checkpoints import fingerprint, stated_length
from lcr.models.config import model_config
from lcr.pretrained.safetensors import TensorFile, write_tensors
from lcr.pretrained.start import initial_parameters, model_section
from lcr.training.config import ConfigError, check_config, from_plain, to_plain
from lcr.training.run import load_run
from lcr.training.step import parameter_values
from lcr.training.trainer import train, write_first_checkpoint

from experiments.configs.finetune import get_config
from tests.experiments.calling import call_program

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pretrained"
LLAMA, MAMBA, JAMBA = GOLDEN / "llama_gqa", GOLDEN / "mamba", GOLDEN / "jamba"


def small(path, task="passkey"):
    config = get_config(f"{path},{task}")
    with config.unlocked():
        config.task.tokenizer = "words" if task == "passkey" else "bytes"
        config.model.vocab_size = max(config.model.vocab_size, 257)
    config.data.lengths, config.data.batch_tokens = (96,), 192
    config.training.steps = config.optimizer.warmup_steps = 2
    return config


def with_a_tokenizer(source, folder):
    """The checkpoint with an embedding for each byte: a copy that has a tokenizer of its own."""
    shutil.copytree(source, folder)
    texts = [chr(i) for i in range(1, 128)]
    (folder / "rwkv_vocab_x.txt").write_text("\n".join(f"{i} {t!r} 1" for i, t in enumerate(texts, start=1)))
    return folder


@pytest.mark.parametrize("path", [LLAMA, JAMBA, GOLDEN / "gemma2", GOLDEN / "phi3_longrope"], ids=lambda p: p.name)
def test_a_configuration_is_the_checkpoints_own(path):
    section = model_section(path)
    again = model_config(from_plain({"model": json.loads(json.dumps(section))}).model)
    model, _ = lcr.load_pretrained(path, dtype="float32", progress=False)
    assert again == model.config
    assert to_plain(get_config(str(path)))["model"]["d_model"] == model.config.d_model


def test_training_begins_where_the_checkpoint_is(tmp_path):
    config = get_config(f"{LLAMA},text")
    config.data.lengths, config.data.batch_tokens, config.training.steps = (64,), 128, 1
    config.optimizer.warmup_steps, config.optimizer.learning_rate = 1, 1e-9
    (tmp_path / "corpus.txt").write_text("only seven bits\n" * 100)
    vocab = with_a_tokenizer(LLAMA, tmp_path / "llama")
    with config.unlocked():
        config.task.tokenizer, config.task.source = str(vocab), f"files:{tmp_path}/*.txt"
        config.task.data_dir = str(tmp_path / "cache")
    train(config, tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    theirs, _ = lcr.load_pretrained(LLAMA, dtype="float32", progress=False)
    ours, theirs = parameter_values(run.model), parameter_values(theirs)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-6, err_msg=name)


def test_a_tokenizer_too_large_for_the_checkpoint_is_an_error(tmp_path):
    config = get_config(f"{LLAMA},text")  # 131 tokens, no tokenizer of its own: bytes
    with pytest.raises(ConfigError, match=r"task.tokenizer='bytes': it has 257 tokens, the model 131"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_swapped_mixer_is_drawn_and_the_rest_is_kept(caplog):
    config = get_config(str(LLAMA))
    layers = len(config.model.mixers)
    section = model_section(LLAMA)
    mixers = ("gla", *section["mixers"][1:])
    changed = model_config(section | {"mixers": mixers})
    drawn_at_random = parameter_values(lcr.make_model(changed, rngs=nnx.Rngs(0)))
    parameters, drawn = initial_parameters(LLAMA, changed, drawn_at_random)
    assert layers > 1 and drawn and all(name.startswith("layers.0.mixer.") for name in drawn)
    theirs = parameter_values(lcr.load_pretrained(LLAMA, dtype="float32", progress=False)[0])
    np.testing.assert_array_equal(parameters["embedding"], theirs["embedding"])
    # layers were stacked there, and are layers of their own here
    np.testing.assert_array_equal(
        parameters["groups.blocks.1.mixer.query.kernel"][0], theirs["groups.blocks.0.mixer.query.kernel"][1]
    )


def test_nothing_in_common_is_an_error(tmp_path):
    config = small(LLAMA)
    with config.unlocked(), config.ignore_type():
        config.init_from = str(tmp_path)
    with pytest.raises(ConfigError, match=r"init_from=.*config\.json: no such file"):
        check_config(config)
    other = model_config({"vocab_size": 11, "d_model": 24, "mixers": ("mamba",), "d_ff": 0})
    model = lcr.make_model(other, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="none of its parameters has the name and the shape"):
        initial_parameters(LLAMA, other, parameter_values(model))


def test_convert_there_and_back(tmp_path, capfd):
    source = with_a_tokenizer(LLAMA, tmp_path / "llama")
    assert call_program("convert", f"--source={source}", f"--target={tmp_path / 'run'}") == 0
    run = load_run(tmp_path / "run")
    assert run.step == 0 and run.task.tokenizer.name == "rwkv"
    assert call_program("convert", f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'back'}") == 0
    ours, theirs = TensorFile(tmp_path / "back" / "model.safetensors"), TensorFile(source / "model.safetensors")
    assert ours.entries.keys() == theirs.entries.keys()
    for name in theirs.entries:
        assert ours.tensor(name).dtype == theirs.tensor(name).dtype, name
        np.testing.assert_array_equal(ours.tensor(name), theirs.tensor(name), err_msg=name)
    same_fields(tmp_path / "back", source)
    assert (tmp_path / "back" / "rwkv_vocab_x.txt").exists()
    capfd.readouterr()
    for arguments, message in [
        ((f"--source={source}", f"--target={tmp_path / 'run'}"), "exists already"),
        ((f"--source={tmp_path / 'none'}", f"--target={tmp_path / 'new'}"), "no such folder"),
        ((f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'new'}", "--format=orbax"), "in Orbax already"),
        ((f"--source={source}", f"--target={tmp_path / 'new'}", "--dtype=bfloat16"), "are of --format=huggingface"),
        ((f"--source={source}", f"--target={tmp_path / 'new'}", "--step=3"), "is no run and has no steps"),
    ]:
        assert call_program("convert", *arguments) == 2
        assert message in capfd.readouterr().err
        assert not (tmp_path / "new").exists()


FIELDS = {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 0, "max_position_embeddings": 777}


def in_bfloat16(source, folder, **fields):
    """The checkpoint in bfloat16, but for its norms; with what says nothing of the model in its config.json."""
    shutil.copytree(source, folder)
    theirs = TensorFile(source / "model.safetensors")
    tensors = {name: theirs.tensor(name) for name in theirs.entries}
    tensors = {name: t if "norm" in name else t.astype(jnp.bfloat16) for name, t in tensors.items()}
    shapes = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    write_tensors(folder / "model.safetensors", shapes, tensors.__getitem__)
    config = json.loads((source / "config.json").read_text()) | fields | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same_fields(one, other):
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())


@pytest.mark.parametrize("case", ["phi3_longrope", "mistral_swa", "llama_gqa"])
def test_what_began_from_a_checkpoint_goes_back_as_it_came(tmp_path, case):
    """Family, fields, names, dtypes and bits: through one run, and through a second that begins from it."""
    fields = FIELDS if case != "phi3_longrope" else FIELDS | {"max_position_embeddings": 400}  # of its long factors
    source = in_bfloat16(GOLDEN / case, tmp_path / "source", **fields)
    assert call_program("convert", f"--source={source}", f"--target={tmp_path / 'run'}") == 0
    write_first_checkpoint(get_config(str(tmp_path / "run")), tmp_path / "second")
    ours = lcr.load_pretrained(tmp_path / "run")[0].source
    assert ours == lcr.load_pretrained(source, progress=False)[0].source
    theirs = TensorFile(source / "model.safetensors")
    for run in ("run", "second"):
        back = tmp_path / f"{run}_back"
        assert call_program("convert", f"--source={tmp_path / run}", f"--target={back}") == 0
        same_fields(back, source)
        written = TensorFile(back / "model.safetensors")
        assert written.entries.keys() == theirs.entries.keys()
        for name in theirs.entries:
            assert written.tensor(name).dtype == theirs.tensor(name).dtype, name
            assert written.tensor(name).tobytes() == theirs.tensor(name).tobytes(), name


def test_a_changed_model_does_not_claim_the_old_family(tmp_path):
    """Phi-3's attention exchanged for GLA: the form of GLA's family; what says nothing of the model is left out."""
    source = in_bfloat16(GOLDEN / "phi3_longrope", tmp_path / "source", bos_token_id=5)
    config = get_config(str(source))
    with config.unlocked(), config.ignore_type():
        config.model.mixers, config.model.mixer_options = ("gla",) * len(config.model.mixers), {}
    write_first_checkpoint(config, tmp_path / "run")
    lcr.save_pretrained(lcr.load_pretrained(tmp_path / "run")[0], tmp_path / "back")
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (fields["model_type"], fields["dtype"], "bos_token_id" in fields) == ("gla", "bfloat16", False)


def test_a_changed_model_of_the_same_family_keeps_what_says_nothing_of_it(tmp_path):
    source = in_bfloat16(LLAMA, tmp_path / "source", **FIELDS)
    config = get_config(str(source))
    with config.unlocked(), config.ignore_type():
        config.model.mixers = config.model.mixers[:2]
    write_first_checkpoint(config, tmp_path / "run")
    lcr.save_pretrained(lcr.load_pretrained(tmp_path / "run")[0], tmp_path / "back")
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert fields["num_hidden_layers"] == 2 and FIELDS.items() <= fields.items()


def test_a_damaged_source_is_named(tmp_path):
    write_first_checkpoint(get_config(str(MAMBA)), tmp_path / "run")
    (tmp_path / "run" / "source.json").write_text('{"family": "mamba"}')
    with pytest.raises(ConfigError, match="source.json is damaged .*; remove it"):
        load_run(tmp_path / "run")


def test_a_checkpoint_is_swept_for_passkeys(tmp_path, capfd):
    source = with_a_tokenizer(LLAMA, tmp_path / "llama")
    command = ("evaluate", f"--model={source}", f"--workdir={tmp_path / 'rows'}", "--lengths=500,640")
    command += ("--depths=0,1", "--samples=2", "--piece=256")
    assert call_program(*command) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows" / "results.jsonl").read_text().splitlines()]
    assert [(row["length"], row["depth"], row["samples"]) for row in rows] == [
        (500, 0.0, 2), (500, 1.0, 2), (640, 0.0, 2), (640, 1.0, 2),
    ]  # fmt: skip
    stated = json.loads((source / "config.json").read_text())["max_position_embeddings"]
    assert {(row["architecture"], row["training_length"]) for row in rows} == {("llama", stated)}
    capfd.readouterr()
    assert call_program(*command) == 0
    assert "every cell is there already" in capfd.readouterr().err
    assert call_program(*command[:3], "--step=1") == 2
    assert call_program("evaluate", f"--workdir={tmp_path / 'rows'}", "--haystack=words") == 2
    assert call_program("evaluate", f"--model={MAMBA}", f"--workdir={tmp_path / 'rows'}", "--training_length=64") == 2
    messages = capfd.readouterr().err
    for message in ("--step: a model given by --model", "--haystack: a run has its own", "expected the files of"):
        assert message in messages


def test_generate(tmp_path, capfd, monkeypatch):
    """Prompts that cannot be read are an error, not a traceback; any of several tokens may end a text."""
    source = with_a_tokenizer(LLAMA, tmp_path / "llama")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for arguments, message in [
        (("--prompt=\N{SNOWMAN}",), "the prompt: the vocabulary has no token for the byte 0xe2"),
        ((f"--prompt_file={tmp_path / 'latin.txt'}",), "latin.txt: no UTF-8 at byte 3"),
        ((f"--prompt_file={tmp_path / 'none.txt'}",), "none.txt: No such file or directory"),
    ]:
        assert call_program("generate", f"--model={source}", *arguments) == 2
        assert message in capfd.readouterr().err
    written = jnp.asarray([[ord("a"), ord("b"), ord("c"), ord("d")]], jnp.int32)
    monkeypatch.setattr(lcr, "generate", lambda *arguments, **options: (written, None))
    for ends, text in (([], "abcd"), ([ord("d"), ord("c")], "ab")):
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert call_program("generate", f"--model={source}", "--prompt=x") == 0
        assert capfd.readouterr().out == text + "\n"


def test_a_fingerprint_tells_models_apart():
    model, _ = lcr.load_pretrained(MAMBA, progress=False)
    one = fingerprint(model, "bytes")
    assert one == fingerprint(lcr.load_pretrained(MAMBA, progress=False)[0], "bytes")
    assert one != fingerprint(model, "words")
    model.embedding[...] = model.embedding[...] * jnp.float32(1.001)
    assert one != fingerprint(model, "bytes")


def test_the_stated_length():
    assert stated_length(MAMBA) is None
    assert stated_length(LLAMA) == json.loads((LLAMA / "config.json").read_text())["max_position_embeddings"]
