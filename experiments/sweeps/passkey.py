"""Which architecture finds a passkey how far beyond its training length, and at what size of state?

    python -m experiments.sweep --sweep=experiments/sweeps/passkey.py --workdir=runs/passkey
    python -m experiments.sweep --sweep=experiments/sweeps/passkey.py:mamba,retnet --workdir=runs/passkey

Every architecture gets the configuration that experiments/configs/passkey.py has for it, and the same prompts, of up to
256 times the training length; Mamba also those of a million tokens. `python -m experiments.costs` adds what each
costs, and makes the table of README.md.
"""

from ml_collections import ConfigDict

from experiments.configs.passkey import ARCHITECTURES, get_config
from lcr.checks import unknown_name

MAX_LENGTH = 65_536
MAX_TOKENS = 327_680  # of one length: at 65,536 tokens one prompt for each depth, at 16,384 four
A_MILLION = ("mamba",)


def get_sweep(only: str = "") -> list[ConfigDict]:
    """The configurations, in order. only: names of architectures, parted by commas; all if empty.

    Raises ValueError for an unknown name, naming the nearest.
    """
    names = [name.strip() for name in only.split(",") if name.strip()] or ARCHITECTURES
    configs = []
    for name in names:
        if name not in ARCHITECTURES:
            raise ValueError(unknown_name("architecture", name, ARCHITECTURES))
        config = get_config(name)
        config.evaluation.max_length = 0 if name in A_MILLION else MAX_LENGTH
        config.evaluation.max_tokens = MAX_TOKENS
        configs.append(config)
    return configs
