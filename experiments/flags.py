"""What the programs share: reading a configuration or a sweep from the command line, and telling a user what is wrong.

Nothing here imports JAX, so that `--help` answers at once; the programs import what is heavy inside `main`.
"""

import errno
import json
import logging
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

flags.disclaim_key_flags()  # a flag defined here belongs to the program that asked for it, and to its --help

USAGE_ERROR = 2  # exit code of what the user can put right; a run that failed exits with 1


def run(main: Callable[[], None]) -> None:
    """Runs a program: flags, logging, `main`, and an exit code.

    Errors of the user's making print one message and exit with 2; a run that cannot go on (a full disk, a loss that
    is not finite) with 1; one stopped by a signal with 128 plus the signal's number, as a shell counts.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: every argument is a flag, --name=value; see --help")
        log_briefly()
        try:
            main()
        except reported_errors() as error:
            fail(message_of(error), exit_code(error))
        except KeyboardInterrupt:
            fail("stopped by Ctrl-C", 130)

    app.run(guarded, flags_parser=parse_flags)


def define_config() -> flags.FlagHolder:
    """The flag --config, and with it --config.<key> for every key of the file's configuration."""
    holder = config_flags.DEFINE_config_file(
        "config", None, "The configuration: <file>.py or <file>.py:<variant>; see experiments/configs/."
    )
    # ml_collections' own way to load the file needs what Python has deprecated, and hides errors in a traceback
    flags.FLAGS["config"].parser = ConfigParser()
    return holder


class ConfigParser(flags.ArgumentParser):
    def parse(self, argument: str) -> ConfigDict:
        return load_config(argument).lock()


def fail(message: str, code: int = USAGE_ERROR) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none if there is no file; ends the program where one cannot be read."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            fail(f"{path}, line {number} cannot be read ({error}); delete the line, what it held is measured again")
    return rows


def reported_errors() -> tuple[type[Exception], ...]:
    """The errors whose message is all that a user needs. Imported late: it is asked only once one was raised."""
    from lcr.training.checkpoints import CheckpointError
    from lcr.training.config import ConfigError
    from lcr.training.signals import Stopped
    from lcr.training.trainer import NonFiniteError

    return (ConfigError, CheckpointError, NonFiniteError, Stopped, OSError)


def exit_code(error: Exception) -> int:
    from lcr.training.config import ConfigError
    from lcr.training.signals import Stopped

    if isinstance(error, Stopped):
        return 128 + error.signal
    return USAGE_ERROR if isinstance(error, ConfigError) else 1


def message_of(error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return f"{error}; free disk space and give the same command again, it goes on" if full else str(error)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a flag that is wrong ends the program with one message."""
    if {"--help", "-help", "-h"} & set(argv):
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    if "config" in flags.FLAGS:
        check_overrides(argv)
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        fail(explain(str(error), argv))


def explain(message: str, argv: Sequence[str]) -> str:
    """A flag's error, in terms of the configuration where it is about one of its keys."""
    wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if wrong is None:
        return f"{message} See --help."
    from lcr.training.config import RULES

    key, value = wrong.groups()
    given = [arg.partition("=")[2] for arg in argv if arg.lstrip("-").startswith(f"config.{key}=")]
    value = next((whole for whole in given if whole.startswith(value)), value)  # it may itself hold a colon
    expected = RULES[key][1] if key in RULES else "a value of the type that the key has"
    return f"{key}={value!r}: expected {expected}; set it with --config.{key}=VALUE"


def check_overrides(argv: Sequence[str]) -> None:
    """The configuration file exists, and every `--config.<key>` is a key of it. Ends the program otherwise."""
    from lcr.checks import unknown_name
    from lcr.training.config import flatten

    values = [b if a in ("--config", "-config") else a.split("=", 1)[1] for a, b in config_arguments(argv)]
    keys = [found[1] for arg in argv if (found := re.match(r"--?(?:no)?config\.([^=]+)", arg))]
    if not values:
        if keys:
            fail(f"--config.{keys[0]}: expected --config=<file> before it, such as experiments/configs/passkey.py")
        return
    flat = flatten(load_config(values[-1]))
    options = ("model.mixer_options", "model.feed_forward_options")
    sections = {key.rsplit(".", i)[0] for key in flat for i in range(1, key.count(".") + 1)} | set(options)
    for key in keys:
        for section in options:
            if key.startswith(section + ".") and key not in flat:
                part, _, option = key.removeprefix(section + ".").partition(".")
                fail(f"--config.{key}: give options as --config.{section}=\"{{'{part}': {{'{option}': ...}}}}\"")
        if key not in flat and key not in sections:
            fail(unknown_name("configuration key", key, flat))


def config_arguments(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Each argument that gives the configuration file, with the one after it."""
    following = [*argv[1:], ""]
    return [(a, b) for a, b in zip(argv, following, strict=True) if re.match(r"--?config(=|$)", a)]


def load_config(name: str) -> ConfigDict:
    """The configuration of `<file>.py` or `<file>.py:<variant>`: what its `get_config` returns.

    Ends the program with a message where there is no such file, it has no `get_config`, or no such variant.
    """
    path, *variant = name.split(":", 1)
    if not Path(path).is_file():
        known = ", ".join(sorted(f"experiments/configs/{p.name}" for p in Path(__file__).parent.glob("configs/*.py")))
        fail(f"--config={name}: there is no file {path!r}; expected <file>.py or <file>.py:<variant>, such as {known}")
    names = runpy.run_path(path)
    if "get_config" not in names:
        fail(f"--config={name}: {path} defines no get_config(variant); expected a function that returns a ConfigDict")
    try:
        return names["get_config"](*variant)
    except ValueError as error:
        fail(f"--config={name}: {error}")


class BriefHandler(logging.Handler):
    """Log records as plain lines on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def log_briefly() -> None:
    """This project's news and everyone's warnings; not Orbax's own account of an error, which ours replaces."""
    handler = BriefHandler()
    handler.addFilter(
        lambda record: (record.name.startswith("lcr") or record.levelno >= logging.WARNING)
        and "orbax" not in Path(record.pathname).parts
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def load_sweep(name: str) -> list[ConfigDict]:
    """The configurations of `<file>.py` or `<file>.py:<architecture>,...`: what its `get_sweep` returns.

    Ends the program with a message where there is no such file, it has no `get_sweep`, an architecture is unknown, or
    two configurations would share a folder.
    """
    path, _, only = name.partition(":")
    if not Path(path).is_file():
        known = sorted(p.name for p in Path(__file__).parent.glob("sweeps/*.py") if p.name != "__init__.py")
        fail(
            f"--sweep={name}: there is no file {path!r}; expected <file>.py or <file>.py:<architecture>,..., such as "
            + ", ".join(f"experiments/sweeps/{file}" for file in known)
        )
    names = runpy.run_path(path)
    if "get_sweep" not in names:
        fail(f"--sweep={name}: {path} defines no get_sweep(only); expected a function that returns configurations")
    try:
        configs = names["get_sweep"](only)
    except ValueError as error:
        fail(f"--sweep={name}: {error}")
    labels = [config.name for config in configs]
    for label in labels:
        if labels.count(label) > 1:
            fail(f"--sweep={name}: two configurations are called {label!r}: expected a `name` of its own for each")
        if label != Path(label).name or label in ("", ".", "..", "report"):
            fail(f"--sweep={name}: the name {label!r} cannot be a folder's in the workdir: expected letters and digits")
    if not labels:
        fail(f"--sweep={name}: {path} gives no configuration; expected at least one")
    return configs
