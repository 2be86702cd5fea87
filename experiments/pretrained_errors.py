"""How far each family's logits are from those of the library that wrote the checkpoint: one table.

    python -m experiments.pretrained_errors

Reads the tiny random checkpoints of tests/golden/pretrained (tests/golden/README.md says how they were made). An error
is the largest difference of a logit over the largest logit, in float32: of 67 tokens in one call, in pieces of 1, 30
and 36, and token by token; and of 300 tokens in one call where the golden file has them. "exported": whether what
`lcr.save_pretrained` writes is the source, bit for bit.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

CASES = flags.DEFINE_string("cases", "tests/golden/pretrained", "The folder of checkpoints with their logits.npz.")


def main(argv: list[str]) -> None:
    folders = sorted(path for path in Path(CASES.value).iterdir() if (path / "logits.npz").exists())
    if not folders:
        raise app.UsageError(f"--cases={CASES.value}: no folder in it has a logits.npz")
    rows = [measure(folder) for folder in folders]
    titles = list(rows[0])
    for cells in (titles, ["---"] * len(titles), *(list(row.values()) for row in rows)):
        print("| " + " | ".join(cells) + " |")


def measure(folder: Path) -> dict[str, str]:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from lcr.pretrained.load import load_model, open_files
    from lcr.pretrained.save import save_model

    expected = dict(np.load(folder / "logits.npz"))
    model = load_model(folder, progress=False)
    graph, parameters = nnx.split(model)
    call = jax.jit(lambda tokens, states: nnx.merge(graph, parameters)(tokens, states))

    def error(pieces: list[np.ndarray], end: str = "") -> str:
        batch, length = expected[f"tokens{end}"].shape
        states, parts = model.init_states(batch, length), []
        for piece in pieces:
            logits, states = call(jnp.asarray(piece, jnp.int32), states)
            parts.append(np.asarray(logits))
        found = np.concatenate(parts, axis=1)[:, expected[f"at{end}"]]
        wanted = expected[f"logits{end}"]
        return f"{np.abs(found - wanted).max() / np.abs(wanted).max():.1e}"

    tokens = expected["tokens"]
    return {
        "checkpoint": folder.name,
        "model_type": json.loads((folder / "config.json").read_text())["model_type"],
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(parameters)):,}",
        "67 tokens": error([tokens]),
        "in pieces": error(np.split(tokens, [1, 31], axis=1)),
        "by the token": error(np.split(tokens, tokens.shape[1], axis=1)),
        "300 tokens": error([expected["tokens_long"]], "_long") if "tokens_long" in expected else "–",
        "exported": _exported(model, folder, save_model, open_files),
    }


def _exported(model: Any, folder: Path, save_model: Any, open_files: Any) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        save_model(model, Path(temporary) / "out")
        source, written = open_files(folder), open_files(Path(temporary) / "out")
        same = source.keys() == written.keys() and all(
            written[name].tensor(name).tobytes() == file.tensor(name).tobytes() for name, file in source.items()
        )
    return "the same bits" if same else "differs"


if __name__ == "__main__":
    app.run(main)
