import json

import jax
import jax.numpy as jnp
import lcr
import pytest
from flax import nnx
from lcr.training.checkpoints import CheckpointError
from lcr.training.config import ConfigError
from lcr.training.run import load_run
from lcr.training.step import parameter_values
from lcr.training.trainer import train

from pallas_kernels.tolerances import assert_close
from tests.training.toy import compiled_programs_kept_in, toy_config, toy_models


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory):
    with toy_models(), compiled_programs_kept_in(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture
def workdir(tmp_path):
    """A run with the checkpoints 2 and 4."""
    config = toy_config(**{"training.steps": 4, "training.checkpoint_every": 2, "data.lengths": (96,)})
    train(config, tmp_path, progress=False)
    return tmp_path


def damage(workdir, step):
    largest = max((workdir / "checkpoints" / str(step) / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.unlink()


def test_the_newest_checkpoint_is_loaded_with_its_task_and_configuration(workdir):
    run = load_run(str(workdir))
    assert run.step == 4 and run.workdir == workdir
    assert run.config.training.steps == 4 and run.config.is_locked
    assert run.task.name == "passkey"
    fresh = lcr.make_model({**run.config.model, "vocab_size": run.task.tokenizer.vocab_size}, rngs=nnx.Rngs(0))
    trained, untrained = parameter_values(run.model), parameter_values(fresh)
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, untrained)
    assert not jnp.array_equal(trained["embedding"], untrained["embedding"])
    logits, _ = run.model(jnp.ones((1, 3), jnp.int32))
    assert logits.shape == (1, 3, run.task.tokenizer.vocab_size)


def test_a_checkpoint_may_be_chosen(workdir):
    second, fourth = (parameter_values(load_run(workdir, step).model) for step in (2, 4))
    assert not jnp.array_equal(second["embedding"], fourth["embedding"])
    assert_close(parameter_values(load_run(workdir).model), fourth, "exact")


def test_a_damaged_newest_checkpoint_is_passed_over_and_left_as_it_is(workdir, caplog):
    damage(workdir, 4)
    assert load_run(workdir).step == 2
    assert "checkpoints/4 cannot be used" in caplog.text
    assert (workdir / "checkpoints" / "4").is_dir()


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(workdir):
    damage(workdir, 4)
    with pytest.raises(CheckpointError, match="step=4: .* is damaged: .* is missing; other steps there: 2"):
        load_run(workdir, 4)


def test_a_step_without_a_checkpoint_is_an_error_that_lists_those_there_are(workdir):
    with pytest.raises(CheckpointError, match="step=3: there is no such checkpoint in .*; the steps there: 2, 4"):
        load_run(workdir, 3)


def test_no_usable_checkpoint_is_an_error_that_says_why_and_what_to_do(workdir):
    damage(workdir, 2)
    damage(workdir, 4)
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*step 4: .*step 2: .*; train first"):
        load_run(workdir)


def test_a_run_without_any_checkpoint_is_an_error(workdir):
    (workdir / "checkpoints").rename(workdir / "elsewhere")
    with pytest.raises(CheckpointError, match="no usable checkpoint in .*none was written yet"):
        load_run(workdir)


def test_a_folder_that_holds_no_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="there is no config.json in it; expected the folder of a run"):
        load_run(tmp_path)


def test_a_damaged_configuration_is_an_error(workdir):
    (workdir / "config.json").write_text('{"name": "mam')
    with pytest.raises(ConfigError, match="config.json is damaged"):
        load_run(workdir)
    (workdir / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="config.json is damaged .expected a JSON object, found list"):
        load_run(workdir)


def test_a_configuration_of_another_version_is_an_error_that_names_the_key(workdir):
    config = json.loads((workdir / "config.json").read_text())
    config["optimizer"]["momentum"] = 0.9
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="unknown configuration key 'optimizer.momentum'"):
        load_run(workdir)
