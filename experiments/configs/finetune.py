"""Training that goes on from a checkpoint: a Hugging Face folder, or a run of this project.

    python -m experiments.train --config=experiments/configs/finetune.py:path/to/folder --workdir=runs/finetuned
    python -m experiments.train --config=experiments/configs/finetune.py:path/to/folder,passkey --workdir=runs/passkey

After the folder comes the task: text (the default; `--config.task.source=files:<glob>` names another corpus) or
passkey, both in the checkpoint's own tokenizer. The section `model` is the checkpoint's. What a copy of this file
changes in it, a mixer for another or its options, is trained from its initial values where the checkpoint has no
parameter of that name and shape; the log lists them.
"""

from pathlib import Path

from ml_collections import ConfigDict

from lcr.training.config import default_config

TASKS = {
    "text": {"name": "text", "source": "stdlib"},
    "passkey": {"name": "passkey", "haystack": "repeat", "question": "last", "loss": "answer"},
}


def get_config(variant: str = "") -> ConfigDict:
    from lcr.pretrained.start import model_section

    path, _, task = variant.partition(",")
    if not path or task not in ("", *TASKS):
        raise ValueError(f"variant {variant!r}: expected <checkpoint's folder>, or <folder>,text or <folder>,passkey")
    config = default_config(TASKS[task or "text"] | {"tokenizer": tokenizer_of(path)})
    config.name = Path(path).name
    config.init_from = path
    try:
        section = model_section(path)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    with config.unlocked(), config.ignore_type():
        config.model.update(section)
        # the defaults' mappings are no checkpoint's
        config.model.mixer_options = section["mixer_options"]
        config.model.feed_forward_options = section["feed_forward_options"]
    config.data.lengths = (512,)
    config.optimizer.learning_rate = 1e-4
    config.evaluation.lengths = (512, 4096)
    return config


def tokenizer_of(path: str) -> str:
    """The task's `tokenizer` for a checkpoint: its folder, or "bytes" where it has none; a run's own."""
    from lcr.pretrained.load import is_run
    from lcr.pretrained.tokenizer import find_tokenizer

    if is_run(path):
        from lcr.training.run import read_config

        return read_config(Path(path)).task.tokenizer
    folder = path if Path(path).is_dir() else str(Path(path).parent)
    return folder if find_tokenizer(folder) else "bytes"
