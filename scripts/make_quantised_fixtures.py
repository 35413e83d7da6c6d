#!/usr/bin/env python3
"""Makes the fixtures that the reading of quantised weights is held against.

    pip install torch safetensors compressed-tensors
    python scripts/make_quantised_fixtures.py fixtures/quantized

Two tiny random checkpoints in the layouts that were published, and beside each `expected.json` with the SHA-256 digest of
every weight after dequantising, in bf16 and (for the product that is not rounded) in f32:

    fp8    DeepSeek-V3, Kimi-K2: E4M3 with one f32 `weight_scale_inv` for each block of 128 x 128, the blocks at the edges
           partial; dequantised by torch, `(fp8.float() * scale).to(bfloat16)`; a prediction layer behind the last one
    int4   Kimi-K2.5: routed experts packed by the compressed-tensors package itself (`pack-quantized`, groups of 32) and
           dequantised by it; names below `language_model.`, a vision tower's tensor beside, configuration in `text_config`
"""

import hashlib
import json
import pathlib
import sys

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

BLOCK = 128
GROUP = 32

BASE = {
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "vocab_size": 40,
}

FP8 = BASE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 136,
    "intermediate_size": 20,
    "kv_lora_rank": 16,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 130,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "v_head_dim": 8,
}

INT4 = BASE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 48,
    "kv_lora_rank": 16,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 96,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "quantization_config": {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "group_size": GROUP,
                    "num_bits": 4,
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    },
    "v_head_dim": 8,
}


def main():
    target = pathlib.Path(sys.argv[1])
    torch.manual_seed(20250222)
    make_fp8(target / "fp8")
    make_int4(target / "int4")


def weights(config):
    """Every weight of the model in f32, by its published name."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    rank, latent = config["q_lora_rank"], config["kv_lora_rank"]

    def mlp(prefix, width):
        return {
            f"{prefix}.gate_proj.weight": (width, hidden),
            f"{prefix}.up_proj.weight": (width, hidden),
            f"{prefix}.down_proj.weight": (hidden, width),
        }

    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_a_proj.weight": (rank, hidden),
            f"{prefix}.self_attn.q_a_layernorm.weight": (rank,),
            f"{prefix}.self_attn.q_b_proj.weight": (heads * (nope + rope), rank),
            f"{prefix}.self_attn.kv_a_proj_with_mqa.weight": (latent + rope, hidden),
            f"{prefix}.self_attn.kv_a_layernorm.weight": (latent,),
            f"{prefix}.self_attn.kv_b_proj.weight": (heads * (nope + value), latent),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * value),
        }
        if layer < config["first_k_dense_replace"]:
            shapes |= mlp(f"{prefix}.mlp", config["intermediate_size"])
            continue
        width, experts = config["moe_intermediate_size"], config["n_routed_experts"]
        shapes[f"{prefix}.mlp.gate.weight"] = (experts, hidden)
        shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (experts,)
        for expert in range(experts):
            shapes |= mlp(f"{prefix}.mlp.experts.{expert}", width)
        shapes |= mlp(f"{prefix}.mlp.shared_experts", width * config["n_shared_experts"])
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


def make_fp8(target):
    stored, expected = {}, {}
    for name, weight in weights(FP8).items():
        if "_proj" not in name:
            stored[name] = weight if name.endswith("bias") else weight.bfloat16()
            expected[name] = digests(stored[name].float())
            continue
        rows, columns = weight.shape
        grid = (-(-rows // BLOCK), -(-columns // BLOCK))
        scale = torch.empty(grid)
        for row in range(grid[0]):
            for column in range(grid[1]):
                block = weight[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
                scale[row, column] = block.abs().max() / 448.0
        wide = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        stored[name] = (weight / wide).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        expected[name] = digests(stored[name].float() * wide)
    # The prediction layer is skipped whatever it holds.
    stored["model.layers.2.eh_proj.weight"] = torch.zeros(2, 4).to(torch.float8_e4m3fn)
    stored["model.layers.2.eh_proj.weight_scale_inv"] = torch.ones(1, 1)
    write(target, FP8, stored, expected)


def make_int4(target):
    arguments = QuantizationArgs(num_bits=4, group_size=GROUP, strategy="group", symmetric=True, type="int")
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    stored, expected = {}, {}
    for name, weight in weights(INT4).items():
        if ".mlp.experts." not in name:
            stored[name] = weight if name.endswith("bias") else weight.bfloat16()
            expected[name] = digests(stored[name].float())
            continue
        weight = weight.bfloat16()
        groups = weight.float().reshape(weight.shape[0], -1, GROUP)
        scale = (groups.abs().amax(-1) / 7.5).bfloat16()
        packed = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        stem = name.removesuffix("weight")
        # Kimi's files hold the shape in 32 bits.
        packed["weight_shape"] = packed["weight_shape"].to(torch.int32)
        stored |= {f"{stem}{key}": value for key, value in packed.items()}
        restored = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        assert restored.dtype == torch.bfloat16 and restored.shape == weight.shape
        nibbles = torch.stack([(packed["weight_packed"] >> (4 * place)) & 0xF for place in range(8)], -1)
        exact = (nibbles.reshape(weight.shape) - 8).float() * scale.float().repeat_interleave(GROUP, 1)
        assert torch.equal(exact.bfloat16(), restored)
        expected[name] = digests(exact)
    renamed = {f"language_model.{name}": value for name, value in stored.items()}
    renamed["vision_tower.patch_embed.proj.weight"] = torch.zeros(2, dtype=torch.bfloat16)
    write(target, {"model_type": "kimi_k25", "text_config": INT4, "vision_config": {"hidden_size": 8}}, renamed, expected)


def digests(exact):
    """Of f32 values: of their bytes, and of their bytes once rounded."""

    def digest(tensor):
        return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()

    return {"bf16": digest(exact.bfloat16()), "f32": digest(exact)}


def write(target, config, stored, expected):
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, target / "model.safetensors")


if __name__ == "__main__":
    main()
