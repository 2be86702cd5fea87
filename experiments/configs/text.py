"""Language modelling on the default corpus, the Python standard library's own source files, byte by byte.

    python -m experiments.train --config=experiments/configs/text.py:mamba --workdir=runs/text

Not run to the end yet: neither its cost nor the loss to expect is known.
"""

from ml_collections import ConfigDict

from lcr.training.config import default_config


def get_config(variant: str = "mamba") -> ConfigDict:
    """variant: the name of a mixer, of which the model has four layers."""
    config = default_config(task={"name": "text", "tokenizer": "bytes", "source": "stdlib"})
    config.name = variant
    config.model.mixers = (variant,) * 4
    config.data.lengths = (512,)
    config.data.batch_tokens = 8192
    config.optimizer.learning_rate = 2e-3
    config.training.steps = 1000
    config.evaluation.lengths = (512, 4096)
    return config
