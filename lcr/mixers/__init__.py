"""Every mixer by name. A new one costs one file beside this one and one line in `MIXERS`."""

import dataclasses
from typing import Any

from flax import nnx

from lcr.checks import check_whole, unknown_name
from lcr.mixers.attention import AttentionConfig, GQAConfig, MHAConfig, MQAConfig
from lcr.mixers.deltanet import DeltaNetConfig
from lcr.mixers.gated_deltanet import GatedDeltaNetConfig
from lcr.mixers.gla import GLAConfig
from lcr.mixers.infini import InfiniConfig
from lcr.mixers.interface import Mixer as Mixer
from lcr.mixers.interface import MixerConfig as MixerConfig
from lcr.mixers.interface import state_bytes as state_bytes
from lcr.mixers.mamba import MambaConfig
from lcr.mixers.mamba2 import Mamba2Config
from lcr.mixers.mla import MLAConfig
from lcr.mixers.retnet import RetNetConfig
from lcr.mixers.rglru import RGLRUConfig
from lcr.mixers.rwkv4 import RWKV4Config
from lcr.mixers.rwkv6 import RWKV6Config
from lcr.mixers.rwkv7 import RWKV7Config

MIXERS: dict[str, type[MixerConfig]] = {
    "attention": AttentionConfig,
    "mha": MHAConfig,
    "mqa": MQAConfig,
    "gqa": GQAConfig,
    "mla": MLAConfig,
    "infini": InfiniConfig,
    "retnet": RetNetConfig,
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    "gla": GLAConfig,
    "deltanet": DeltaNetConfig,
    "gated_deltanet": GatedDeltaNetConfig,
    "rwkv4": RWKV4Config,
    "rwkv6": RWKV6Config,
    "rwkv7": RWKV7Config,
    "rglru": RGLRUConfig,
}


def mixer_config(name: str, **options: Any) -> MixerConfig:
    """The configuration of the mixer `name`.

    Raises: ValueError for an unknown mixer or option (naming the nearest known one) and for a bad value.
    """
    if name not in MIXERS:
        raise ValueError(unknown_name("mixer", name, MIXERS))
    known = [field.name for field in dataclasses.fields(MIXERS[name])]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of mixer {name!r}:", option, known))
    return MIXERS[name](**options)


def make_mixer(name: str, d_model: int, *, rngs: nnx.Rngs, **options: Any) -> Mixer:
    """Builds the mixer `name` for `[B, T, d_model]`; defaults are sound for any multiple of 16.

    Parameters are float32, and so is the compute unless the option `dtype` says otherwise.
    Raises: ValueError for an unknown mixer or option (naming the nearest known one) and for a bad value.
    """
    check_whole(d_model=d_model)
    return mixer_config(name, **options).make(d_model, rngs=rngs)
