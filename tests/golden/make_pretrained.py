"""Makes cases of tests/golden/pretrained: python tests/golden/make_pretrained.py CASE... (needs the extra [parity])."""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "pretrained"
AT = [0, 1, 7, 8, 15, 16, 17, 31, 40, 48, 49, 50, 60, 64, 65, 66]
AT_LONG = [0, 50, 99, 100, 149, 150, 151, 200, 250, 290, 295, 296, 297, 298, 299]
CASES = {  # as most checkpoints have it: by the older names, what differs from the class's defaults alone
    "qwen2": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 131, "hidden_size": 54,
        "intermediate_size": 70, "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
        "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2,
    },
    "deepseek_v2_bias": {
        "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": 131, "hidden_size": 32,
        "intermediate_size": 40, "moe_intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "n_shared_experts": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "kv_lora_rank": 12, "q_lora_rank": 14, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10,
        "first_k_dense_replace": 1, "max_position_embeddings": 512, "mlp_bias": True, "attention_bias": True,
    },
    "rwkv4_epsilon": {
        "model_type": "rwkv", "architectures": ["RwkvForCausalLM"], "vocab_size": 131, "hidden_size": 32,
        "attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "context_length": 512,
        "rescale_every": 0, "layer_norm_epsilon": 0.1,
    },
}  # fmt: skip


def main(case: str) -> None:
    torch.manual_seed(0)
    hub, folder = CASES[case], FOLDER / case
    folder.mkdir(exist_ok=True)
    hub_config = json.dumps(hub | {"torch_dtype": "float32"}, indent=1) + "\n"
    (folder / "config.json").write_text(hub_config)
    config = transformers.AutoConfig.from_pretrained(folder)
    if hub["model_type"] != "rwkv":
        config._attn_implementation = "eager"
    model = getattr(transformers, hub["architectures"][0])(config).eval()
    with torch.no_grad():  # initial weights are too small to tell one model from another
        for name, parameter in model.named_parameters():
            norm = "norm" in name or (".ln" in name or "pre_ln" in name) and name.endswith("weight")
            if "time_mix" in name:
                parameter.copy_(torch.rand_like(parameter))
            elif parameter.ndim == 1:
                parameter.copy_(norm + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.hub.json").write_text(hub_config)
    rng = np.random.default_rng(0)
    saved = {}
    for end, shape, at in (("", (2, 67), AT), ("_long", (1, 300), AT_LONG)):
        tokens = rng.integers(3, hub["vocab_size"], shape)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        saved |= {f"tokens{end}": tokens.astype(np.int32), f"at{end}": np.array(at), f"logits{end}": logits[:, at]}
    np.savez(folder / "logits.npz", **saved)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
