"""Falcon-Mamba (arXiv 2410.05355): Mamba with norms without a scale inside."""

from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained import mamba
from lcr.pretrained.family import Family
from lcr.pretrained.fields import Fields


def read(c: Fields) -> dict[str, Any]:
    fields = mamba.read(c)
    norms = {"inner_norm": "plain", "inner_norm_eps": c.number("mixer_rms_eps", 1e-6)}
    return fields | {"mixer_options": {"mamba": fields["mixer_options"]["mamba"] | norms}}


def write(config: ModelConfig) -> dict[str, Any]:
    return mamba.write(config) | {"mixer_rms_eps": config.mixer("mamba").inner_norm_eps}


FAMILY = Family("falcon_mamba", "FalconMambaForCausalLM", read, write, mamba.lines, ("mamba",), renamed=mamba.OLD_NAME)
