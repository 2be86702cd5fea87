import pytest
from lcr.training.config import (
    RULES,
    ConfigError,
    check_config,
    check_keys,
    default_config,
    differences,
    flatten,
    from_plain,
    to_plain,
)
from ml_collections import ConfigDict

from tests.training.toy import toy_config, toy_models


def changed(key, value):
    """The default configuration with one value, of whatever type, under a key that need not be there."""
    *sections, last = key.split(".")
    plain = to_plain(default_config())
    inner = plain
    for section in sections:
        inner = inner[section]
    inner[last] = value
    return ConfigDict(plain)


def test_the_default_configuration_is_sound():
    check_config(default_config())


def test_every_known_key_has_a_default():
    assert set(RULES) == {key for key in flatten(default_config()) if not key.startswith("task.")} | {"task.name"}


def test_the_default_configuration_is_locked():
    with pytest.raises(AttributeError, match="learning_rate"):
        default_config().optimizer.learnin_rate = 1.0


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'optimizer.learnin_rate'. Did you mean 'optimizer.learning_rate'\?"):
        check_config(changed("optimizer.learnin_rate", 1.0))


def test_a_missing_key_is_named():
    config = default_config().unlock()
    del config.optimizer.eps
    with pytest.raises(ConfigError, match="'optimizer.eps' is missing: expected a number above 0"):
        check_keys(config)


@pytest.mark.parametrize(
    "key, value",
    [
        ("name", ""),
        ("seed", -1),
        ("seed", True),
        ("model.d_model", 64.0),
        ("model.mixers", "mamba"),
        ("model.mixers", ()),
        ("model.d_ff", -4),
        ("model.tie_embeddings", 1),
        ("model.dtype", "float16"),
        ("model.remat", "some"),
        ("task.name", None),
        ("data.lengths", ()),
        ("data.lengths", (128, 0)),
        ("data.batch_tokens", 0),
        ("data.curriculum", ((100, 256),)),
        ("data.curriculum", ((0, (256,)),)),
        ("optimizer.learning_rate", "abc"),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.warmup_steps", -1),
        ("optimizer.final_fraction", 1.5),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.b1", 1.0),
        ("optimizer.eps", 0.0),
        ("optimizer.clip_norm", -1.0),
        ("optimizer.accumulation", 0),
        ("training.steps", 0),
        ("training.keep_last", 0),
        ("evaluation.depths", (0.5, 1.5)),
        ("evaluation.samples", 0),
        ("evaluation.max_length", -1),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(key, value):
    with pytest.raises(ConfigError) as caught:
        check_config(changed(key, value))
    assert str(caught.value).startswith(f"{key}=")
    assert f"expected {RULES[key][1]}" in str(caught.value)
    assert f"--config.{key}=" in str(caught.value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"optimizer.warmup_steps": 13}, "optimizer.warmup_steps=13 is longer than the run, training.steps=12"),
        ({"data.curriculum": ((9, (96,)), (9, (100,)))}, "data.curriculum=.* expected from_steps that rise"),
        ({"optimizer.accumulation": 5}, "optimizer.accumulation=5: .* length 100 has only 4 rows .* at most 4"),
        ({"data.lengths": (16, 128)}, "data.lengths: 16 is too short for the prompt of task 'passkey': .* at least"),
        ({"data.curriculum": ((9, (17,)),)}, "data.lengths: 17 is too short"),
        ({"evaluation.lengths": (20,)}, "evaluation.lengths: 20 is too short for the prompt"),
        ({"task.name": "paskey"}, "task: unknown task 'paskey'. Did you mean 'passkey'"),
        ({"task.haystack": "hay"}, "task: haystack: unknown value 'hay'"),
        ({"task.haystak": "repeat"}, "task: .*'haystak'. Did you mean 'haystack'"),
    ],
)
def test_what_does_not_fit_together_is_named(values, message):
    with toy_models(), pytest.raises(ConfigError, match=message):
        check_config(toy_config(**values))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model.mixers": ("mamba", "mambo")}, "model: unknown mixer 'mambo'. Did you mean 'mamba'"),
        ({"model.mixer_options": {"mamba": {"state_sice": 8}}}, "model: .*'state_sice'. Did you mean 'state_size'"),
        ({"model.mixer_options": {"mamba": {"state_size": 0}}}, "model: state_size=0: expected"),
        (
            {"model.d_model": 48, "model.mixers": ("mha",), "model.mixer_options": {"mha": {"num_heads": 5}}},
            "model: num_heads=5 .*48",
        ),
        (
            {"model.d_model": 48, "model.mixers": ("gqa",), "model.mixer_options": {"gqa": {"num_kv_heads": 5}}},
            "model: num_kv_heads=5 does not divide num_heads=",
        ),
    ],
)
def test_the_model_is_checked_without_compiling_anything(values, message):
    with pytest.raises(ConfigError, match=message):
        check_config(toy_config(**values))


def test_a_configuration_survives_json():
    config = toy_config(**{"data.curriculum": ((3, (96, 128)),)})
    again = from_plain(to_plain(config))
    assert again == config
    assert again.data.curriculum == ((3, (96, 128)),)
    assert again.is_locked


def test_differences_are_listed_by_key():
    old, new = to_plain(toy_config()), to_plain(toy_config(**{"seed": 1, "optimizer.b2": 0.9}))
    del new["training"]["steps"]
    assert differences(old, new) == {"seed": (0, 1), "optimizer.b2": (0.98, 0.9), "training.steps": (12, "absent")}
    assert differences(old, old) == {}
