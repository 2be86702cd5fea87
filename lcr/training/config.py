"""What a run is told: one configuration, its defaults, and the checks made before anything is compiled.

    config = default_config()                    # locked: an unknown key raises
    config.optimizer.learning_rate = 2e-3
    check_config(config)                         # raises ConfigError naming key, value, what was expected, the remedy

The sections: `model` (what `lcr.ModelConfig` takes, of which a file may add what has no key here; the vocabulary is the
tokenizer's unless it is given), `task` (`name` and that task's options), `data`, `optimizer`, `training`, `evaluation`.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

OPEN_SECTIONS = ("task", "model.mixer_options", "model.feed_forward_options")  # their keys are known elsewhere

# What may change when a run goes on in its workdir; every other difference is an error.
FREE_ON_RESUME = ("training.", "evaluation.")


class ConfigError(ValueError):
    """The configuration cannot be run; the message says which key, which value, and how to mend it."""


def default_config(task: Mapping[str, Any] | None = None) -> ConfigDict:
    """Every known key with its default, locked.

    task: the task's name and options; passkey retrieval if None.
    """
    passkey = {"name": "passkey", "tokenizer": "words", "haystack": "repeat", "question": "last", "loss": "answer"}
    return ConfigDict(
        {
            "name": "mamba",  # the architecture's label in results and plots
            "seed": 0,
            "init_from": config_dict.placeholder(str),  # a checkpoint, or a run, whose parameters are the first ones
            "model": {
                "d_model": 64,
                "mixers": ("mamba", "mamba"),
                "mixer_options": {},  # {"mamba": {"state_size": 8}}
                "d_ff": config_dict.placeholder(int),  # None: the model's default; 0: no feed-forward
                "feed_forward": "swiglu",  # or "moe", "channel_mixing", "none"; or a tuple, one for each mixer
                "feed_forward_options": {},  # {"moe": {"num_experts": 8}}
                "tie_embeddings": True,
                "dtype": "float32",
                "remat": "none",
            },
            "task": dict(passkey if task is None else task),
            "data": {
                "lengths": (128, 256),
                "batch_tokens": 8192,
                "curriculum": (),  # ((from_step, lengths), ...)
            },
            "optimizer": {
                "learning_rate": 3e-3,  # at its peak
                "gate_learning_rate": 1e-2,  # at its peak, of gates of a memory (Infini-attention)
                "warmup_steps": 50,
                "final_fraction": 0.1,  # of the peak, at the last step
                "weight_decay": 0.1,
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "clip_norm": 1.0,  # of the whole gradient; 0: no clipping
                "accumulation": 1,  # pieces that a batch is cut into, one after another
            },
            "training": {
                "steps": 500,
                "log_every": 10,
                "checkpoint_every": 100,
                "keep_last": 2,  # checkpoints, beside the best
            },
            "evaluation": {
                "lengths": (256, 1024, 4096),
                "depths": (0.0, 0.25, 0.5, 0.75, 1.0),
                "samples": 20,  # for each cell
                "batch": 20,  # prompts fed side by side
                "piece": 4096,  # tokens fed in one call
                "max_length": 0,  # longer cells are left out; 0: none are
                "max_tokens": 0,  # read for all samples of one length, which then has fewer of them; 0: no limit
            },
        }
    ).lock()


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_positive_integer(value: Any) -> bool:
    return is_integer(value) and value > 0


def is_natural(value: Any) -> bool:
    return is_integer(value) and value >= 0


def is_fraction(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def is_below_one(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def all_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (tuple, list)) and len(value) > 0 and all(check(item) for item in value)


def is_stage(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and is_positive_integer(value[0])
        and all_of(is_positive_integer)(value[1])
    )


Rule = tuple[Callable[[Any], bool], str]

POSITIVE_INTEGER: Rule = (is_positive_integer, "an integer above 0")
NATURAL: Rule = (is_natural, "an integer, 0 or above")
POSITIVE: Rule = (lambda value: is_number(value) and value > 0, "a number above 0")
NOT_NEGATIVE: Rule = (lambda value: is_number(value) and value >= 0, "a number, 0 or above")
FRACTION: Rule = (is_fraction, "a number from 0 to 1")
BELOW_ONE: Rule = (is_below_one, "a number from 0 to below 1")
TEXT: Rule = (lambda value: isinstance(value, str) and value != "", "a text that is not empty")
LENGTHS: Rule = (all_of(is_positive_integer), "at least one length, each an integer above 0, such as (128, 256)")

RULES: dict[str, Rule] = {
    "name": TEXT,
    "seed": NATURAL,
    "init_from": (lambda value: value is None or TEXT[0](value), "None, or a checkpoint's folder"),
    "model.d_model": POSITIVE_INTEGER,
    "model.mixers": (all_of(TEXT[0]), 'at least one mixer\'s name, such as ("mamba", "mamba")'),
    "model.d_ff": (lambda value: value is None or is_natural(value), "None, or an integer, 0 or above"),
    "model.feed_forward": (
        lambda value: TEXT[0](value) or all_of(TEXT[0])(value),
        'a feed-forward\'s name, or one for each mixer, such as ("swiglu", "moe")',
    ),
    "model.tie_embeddings": (lambda value: isinstance(value, bool), "True or False"),
    "model.dtype": (lambda value: value in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
    "model.remat": (lambda value: value in ("none", "full", "dots"), "'none', 'full' or 'dots'"),
    "task.name": TEXT,
    "data.lengths": LENGTHS,
    "data.batch_tokens": POSITIVE_INTEGER,
    "data.curriculum": (
        lambda value: isinstance(value, (tuple, list)) and all(is_stage(stage) for stage in value),
        "stages of (from_step, lengths), such as ((100, (256, 512)),)",
    ),
    "optimizer.learning_rate": POSITIVE,
    "optimizer.gate_learning_rate": POSITIVE,
    "optimizer.warmup_steps": NATURAL,
    "optimizer.final_fraction": FRACTION,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.b1": BELOW_ONE,
    "optimizer.b2": BELOW_ONE,
    "optimizer.eps": POSITIVE,
    "optimizer.clip_norm": NOT_NEGATIVE,
    "optimizer.accumulation": POSITIVE_INTEGER,
    "training.steps": POSITIVE_INTEGER,
    "training.log_every": POSITIVE_INTEGER,
    "training.checkpoint_every": POSITIVE_INTEGER,
    "training.keep_last": POSITIVE_INTEGER,
    "evaluation.lengths": LENGTHS,
    "evaluation.depths": (all_of(is_fraction), "at least one depth from 0 to 1, such as (0.0, 0.5, 1.0)"),
    "evaluation.samples": POSITIVE_INTEGER,
    "evaluation.batch": POSITIVE_INTEGER,
    "evaluation.piece": POSITIVE_INTEGER,
    "evaluation.max_length": NATURAL,
    "evaluation.max_tokens": NATURAL,
}


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optimizer.learning_rate": 0.001, ...}`: every value under its dotted key."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def in_open_section(key: str) -> bool:
    return any(key.startswith(section + ".") for section in OPEN_SECTIONS)


def check_keys(config: ConfigDict) -> None:
    """Every key is known, none is missing, and every value is of the right kind. Raises ConfigError."""
    from lcr.checks import unknown_name  # it imports JAX, which the program's --help must not
    from lcr.models.config import ModelConfig

    flat = flatten(config)
    of_model = {f"model.{field.name}" for field in dataclasses.fields(ModelConfig)}
    for key in flat:
        if key not in RULES and key not in of_model and not in_open_section(key):
            raise ConfigError(unknown_name("configuration key", key, RULES))
    for key, (holds, expected) in RULES.items():
        if key not in flat:
            raise ConfigError(
                f"configuration key {key!r} is missing: expected {expected}; begin from default_config(), which has it"
            )
        if not holds(flat[key]):
            raise ConfigError(f"{key}={flat[key]!r}: expected {expected}; set it with --config.{key}=VALUE")


def check_config(config: ConfigDict) -> None:
    """Checks keys, values, and what ties them to one another, to the task and to the model, before any compilation.

    Raises ConfigError.
    """
    from lcr.training.run import make_abstract_model, make_run_task

    check_keys(config)
    optimizer, steps = config.optimizer, config.training.steps
    if optimizer.warmup_steps > steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is longer than the run, training.steps={steps}: "
            f"expected at most {steps}; lower the one or raise the other"
        )
    last = 0
    for start, _ in config.data.curriculum:
        if start <= last:
            raise ConfigError(
                f"data.curriculum={config.data.curriculum!r}: expected from_steps that rise, each above 0; sort them"
            )
        last = start
    lengths = sorted({*config.data.lengths, *(n for _, stage in config.data.curriculum for n in stage)})
    rows = max(1, config.data.batch_tokens // lengths[-1])
    if rows < optimizer.accumulation:
        raise ConfigError(
            f"optimizer.accumulation={optimizer.accumulation}: a batch of length {lengths[-1]} has only {rows} rows "
            f"(data.batch_tokens={config.data.batch_tokens}), which cannot be cut into that many; expected at most "
            f"{rows}: lower it, or raise data.batch_tokens to {optimizer.accumulation * lengths[-1]}"
        )
    task = make_run_task(config)
    if hasattr(task, "min_length"):
        for section, shortest in (("data", lengths[0]), ("evaluation", min(config.evaluation.lengths))):
            if shortest < task.min_length():
                raise ConfigError(
                    f"{section}.lengths: {shortest} is too short for the prompt of task {config.task.name!r}: expected "
                    f"at least {task.min_length()} tokens, answer included; leave out shorter lengths"
                )
    make_abstract_model(config, task.tokenizer.vocab_size)
    if config.init_from is not None:
        from lcr.pretrained.start import model_section

        try:
            model_section(config.init_from)
        except (ValueError, OSError, RuntimeError) as error:
            raise ConfigError(f"init_from={config.init_from!r}: {error}") from error


def to_plain(config: ConfigDict) -> dict[str, Any]:
    """The configuration as JSON holds it: nested dicts of numbers, texts, lists and None."""
    return json.loads(json.dumps(config.to_dict()))


def from_plain(plain: Mapping[str, Any]) -> ConfigDict:
    """The configuration from what JSON held, locked; every sequence is a tuple again."""

    def restore(value):
        if isinstance(value, Mapping):
            return {key: restore(item) for key, item in value.items()}
        return tuple(restore(item) for item in value) if isinstance(value, list) else value

    return ConfigDict(restore({"init_from": None, **plain})).lock()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys of two plain configurations whose values differ, with both values ("absent" where missing)."""
    old, new = flatten(old), flatten(new)
    keys = sorted({*old, *new})
    values = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in keys}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}
