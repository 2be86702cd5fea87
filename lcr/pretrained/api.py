"""`lcr.load_pretrained` and `lcr.save_pretrained`."""

import os

from lcr.data.tokenizers import Tokenizer
from lcr.models.decoder import Decoder
from lcr.pretrained.load import Shardings, is_run, load_model
from lcr.pretrained.save import save_model
from lcr.pretrained.tokenizer import load_tokenizer


def load_pretrained(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    sharding: Shardings | None = None,
    progress: bool = True,
) -> tuple[Decoder, Tokenizer]:
    """`(model, tokenizer)` of a Hugging Face folder, an RWKV-7 .pth file of its author, or a run of this project.

    dtype: "float32" or "bfloat16"; None: the checkpoint's own (float32 for float16; that of its configuration for a
        run).
    sharding, progress: as in `load_model`. The tokenizer of a folder without one is bytes (which the log says where the
    model's vocabulary is smaller).

    Raises: FileNotFoundError and ValueError as `load_model` and `load_tokenizer` do; for a run, what `load_run` raises.
    """
    if is_run(path):
        from lcr.training.run import load_run

        run = load_run(path)
        if dtype not in (None, run.config.model.dtype):
            raise ValueError(f"dtype={dtype!r}: this run's is {run.config.model.dtype!r}; expected None, or that")
        return run.model, run.task.tokenizer
    model = load_model(path, dtype=dtype, sharding=sharding, progress=progress)
    return model, load_tokenizer(path, model.config.vocab_size)


def save_pretrained(
    model: Decoder,
    path: str | os.PathLike,
    *,
    tokenizer: Tokenizer | None = None,
    family: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `transformers` loads (flash-linear-attention's families: with that library beside it).

    tokenizer: what `load_pretrained` gave with the model; its files are copied. The others: as in `save_model`, which
    also says what is raised.
    """
    save_model(model, path, tokenizer=tokenizer, family=family, dtype=dtype, overwrite=overwrite)
