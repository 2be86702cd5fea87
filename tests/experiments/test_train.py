"""What the command line says: help, mistakes, and exit codes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags
from experiments import train as program
from experiments.configs.passkey import VARIANTS
from experiments.flags import exit_code, explain, load_config, message_of, parse_flags, reported_errors
from flax import nnx
from lcr.training.checkpoints import CheckpointError
from lcr.training.config import ConfigError, check_config, check_keys
from lcr.training.run import make_abstract_model, make_run_task
from lcr.training.signals import Stopped
from lcr.training.trainer import NonFiniteError

ROOT = Path(__file__).parents[2]
CONFIG = "--config=experiments/configs/passkey.py:mamba"


def mistake(monkeypatch, capsys, *arguments):
    """The message with which the program ends before it runs, given these arguments."""
    argv = ["train", *arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv)
    flags.FLAGS.unparse_flags()
    with pytest.raises(SystemExit) as caught:
        parse_flags(argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.optimizer.learnin_rate=1"], "'optimizer.learnin_rate'. Did you mean 'optimizer.learning_rate'?"),
        (["--config.trainin.steps", "3"], "'trainin.steps'. Did you mean 'training.steps'?"),
        (["--config.task.haystak=words"], "'task.haystak'. Did you mean 'task.haystack'?"),
        (["--config.optimizer.learning_rate=abc"], "optimizer.learning_rate='abc': expected a number above 0; set it"),
        (["--config.training.steps=1.5"], "training.steps='1.5': expected an integer above 0"),
        (["--config.model.tie_embeddings=maybe"], "model.tie_embeddings='maybe': expected True or False"),
        (["--config.model.mixer_options.retnet.num_heads=8"], """"{'retnet': {'num_heads': ...}}\""""),
        (["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        ([], "workdir"),
    ],
)
def test_a_mistake_in_a_flag_is_one_message(monkeypatch, capsys, arguments, message):
    assert message in mistake(monkeypatch, capsys, CONFIG, *arguments)


@pytest.mark.parametrize(
    "config, message",
    [
        ("experiments/configs/paskey.py", "there is no file 'experiments/configs/paskey.py'; expected"),
        ("experiments/configs/passkey.py:mamb", "unknown variant 'mamb'. Did you mean 'mamba'?"),
        ("experiments/flags.py", "defines no get_config"),
    ],
)
def test_a_configuration_that_is_not_there_is_one_message(monkeypatch, capsys, config, message):
    assert message in mistake(monkeypatch, capsys, f"--config={config}", "--workdir=x")


def test_a_key_without_a_configuration_is_one_message(monkeypatch, capsys):
    assert "expected --config=<file> before it" in mistake(monkeypatch, capsys, "--config.seed=1", "--workdir=x")


def test_values_reach_the_configuration(monkeypatch):
    argv = ["train", CONFIG, "--workdir=x", "--config.optimizer.eps=1e-3", "--config.data.lengths=200,300"]
    argv += ["--config.model.mixer_options={'mamba': {'state_size': 8}}", "--config.model.d_ff=32"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv)
    flags.FLAGS.unparse_flags()
    parse_flags(argv)
    config = program.CONFIG.value
    assert (config.optimizer.eps, config.data.lengths, config.model.d_ff) == (1e-3, (200, 300), 32)
    assert config.model.mixer_options.mamba.state_size == 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_passkey_configuration_can_be_run(variant):
    """And has as many parameters as Mamba's, but for Jamba's eight layers."""
    config = load_config(f"{ROOT}/experiments/configs/passkey.py:{variant}")
    check_config(config)
    assert config.name == variant and config.is_locked
    model = make_abstract_model(config, make_run_task(config).tokenizer.vocab_size)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert abs(parameters / 72_064 - 1) <= (0.25 if variant == "jamba" else 0.05)


def test_the_text_configuration_has_known_keys_and_sound_values():
    config = load_config(f"{ROOT}/experiments/configs/text.py")
    check_keys(config)
    assert config.task.source == "stdlib"


def run_program(*arguments, **settings):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, **settings
    )


def test_help_says_what_it_does_with_examples():
    result = run_program("-m", "experiments.train", "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert "python -m experiments.train --config=experiments/configs/passkey.py:mamba --workdir=" in result.stdout
    assert "--workdir" in result.stdout and "Exit codes" in result.stdout


def test_help_imports_nothing_heavy():
    heavy = ("jax", "flax", "optax", "orbax", "grain", "tensorboardX", "matplotlib", "lcr")
    code = f"import sys, experiments.train; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_program("-c", code).stdout == "[]\n"


def test_an_error_of_the_users_making_has_exit_code_2_and_no_traceback(tmp_path):
    arguments = [CONFIG, f"--workdir={tmp_path}/run", "--config.data.lengths=20,640"]
    result = run_program("-m", "experiments.train", *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: data.lengths: 20 is too short for the prompt of task 'passkey'")
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_errors_have_exit_codes_and_messages():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    stopped = [Stopped(number, 5, "here") for number in (signal.SIGTERM, signal.SIGINT)]
    errors = [ConfigError("x"), CheckpointError("x"), NonFiniteError("x"), full, *stopped]
    assert [exit_code(error) for error in errors] == [2, 1, 1, 1, 143, 130]
    assert all(isinstance(error, reported_errors()) for error in errors)
    assert message_of(errors[0]) == "x"
    assert "No space left on device; free disk space and give the same command again" in message_of(full)


def test_a_flag_that_is_no_configuration_key_is_explained_as_it_is():
    assert explain("flag --workdir=None: must be set.", []) == "flag --workdir=None: must be set. See --help."


def test_a_value_that_holds_a_colon_is_shown_whole():
    value = "{'mamba': 3"
    message = f"flag --config.model.mixer_options={value}: not a mapping"
    assert f"model.mixer_options={value!r}" in explain(message, [f"--config.model.mixer_options={value}"])
