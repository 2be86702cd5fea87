"""The decoder over any tuple of mixers, hybrids by name, and generation."""

from lcr.models.config import ModelConfig as ModelConfig
from lcr.models.decoder import Decoder as Decoder
from lcr.models.decoder import make_model as make_model
from lcr.models.generation import generate as generate
from lcr.models.hybrids import HYBRIDS as HYBRIDS
from lcr.models.hybrids import hybrid as hybrid
