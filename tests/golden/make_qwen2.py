"""Makes tests/golden/pretrained/qwen2: python tests/golden/make_qwen2.py (needs the extra [parity])."""

import json
import pathlib

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

FOLDER = pathlib.Path(__file__).parent / "pretrained" / "qwen2"
AT = [0, 1, 7, 8, 15, 16, 17, 31, 40, 48, 49, 50, 60, 64, 65, 66]
AT_LONG = [0, 50, 99, 100, 149, 150, 151, 200, 250, 290, 295, 296, 297, 298, 299]
HUB = {  # as most checkpoints have it: by the older names, what differs from the class's defaults alone
    "vocab_size": 131, "hidden_size": 54, "intermediate_size": 70, "num_hidden_layers": 4, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2,
}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    options = {name: value for name, value in HUB.items() if name != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": HUB["rope_theta"]}
    config = Qwen2Config(**options, rope_parameters=rope, attn_implementation="eager")
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():  # initial weights are too small to tell one model from another
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(("norm" in name) + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    hub = HUB | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "float32"}
    (FOLDER / "config.hub.json").write_text(json.dumps(hub, indent=1) + "\n")
    rng = np.random.default_rng(0)
    saved = {}
    for end, shape, at in (("", (2, 67), AT), ("_long", (1, 300), AT_LONG)):
        tokens = rng.integers(3, HUB["vocab_size"], shape)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        saved |= {f"tokens{end}": tokens.astype(np.int32), f"at{end}": np.array(at), f"logits{end}": logits[:, at]}
    np.savez(FOLDER / "logits.npz", **saved)


if __name__ == "__main__":
    main()
