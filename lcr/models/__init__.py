"""The decoder over any tuple of mixers, and generation from it."""

from lcr.models.config import ModelConfig as ModelConfig
from lcr.models.decoder import Decoder as Decoder
from lcr.models.decoder import make_model as make_model
from lcr.models.generation import generate as generate
