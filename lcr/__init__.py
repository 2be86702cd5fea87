"""Long-context sequence architectures in JAX and Flax behind one interface."""

from lcr.mixers import MIXERS as MIXERS
from lcr.mixers import make_mixer as make_mixer
from lcr.mixers import state_bytes as state_bytes
from lcr.models import ModelConfig as ModelConfig
from lcr.models import generate as generate
from lcr.models import hybrid as hybrid
from lcr.models import make_model as make_model
from lcr.pretrained import load_pretrained as load_pretrained
from lcr.pretrained import save_pretrained as save_pretrained

__version__ = "0.1.0"
