#!/usr/bin/env python3
"""Compares the results of `moonlight` with transformers for variants of config.json.

    python scripts/parity/check_config.py --program target/release/moonlight --convert target/release/moonlight-convert

For each supported variant of a config (rope scalings in both spellings, biases, heads, routers, tied and partly tied heads, sliding
windows, absent keys) transformers saves a tiny random model, and its log-probabilities are compared with those of `moonlight score` (1e-4).
For each unsupported variant `moonlight score` must end with an error that names the key; the script prints how much the key changes the
result of transformers. FP8 matrices with one scale per tensor, row and block go through `moonlight-convert convert` and
are compared with torch's product bit by bit.

Run it with each release of transformers that matters; it prints the version. The exit code is 0 if every comparison holds.

Needs: torch, transformers, safetensors (group `parity`). Takes: half a minute with a release build.
"""

import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from common import late
from models import distance, logprobs, try_score, write_sequences

torch = late("torch")
transformers = late("transformers")
load_file = late("safetensors.torch", "load_file")
save_file = late("safetensors.torch", "save_file")
AutoConfig = late("transformers", "AutoConfig")
AutoModelForCausalLM = late("transformers", "AutoModelForCausalLM")
checks = common.Checks()


BUDGET = 1e-4
LENGTH = 40
VOCABULARY = 97

BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
LLAMA = BASE | {"model_type": "llama", "num_key_value_heads": 2}
QWEN2 = BASE | {"model_type": "qwen2", "num_key_value_heads": 2}
V3 = BASE | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 9,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
    "num_nextn_predict_layers": 0,
}
V2 = V3 | {"model_type": "deepseek_v2", "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
del V2["num_nextn_predict_layers"]

LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK_YARN = YARN | {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7}

SUPPORTED = {
    "llama": LLAMA,
    "llama, linear": LLAMA | {"rope_scaling": LINEAR},
    "llama, dynamic": LLAMA | {"rope_scaling": DYNAMIC},
    "llama, llama3": LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "llama, yarn": LLAMA | {"rope_scaling": YARN},
    "llama, yarn with every key": LLAMA
    | {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3, "truncate": False}},
    "llama, yarn without its length": LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "llama, attention_bias": LLAMA | {"attention_bias": True},
    "llama, mlp_bias": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama, head_dim": LLAMA | {"head_dim": 18},
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "qwen2": QWEN2,
    "qwen2, yarn": QWEN2 | {"rope_scaling": YARN, "rope_theta": 1e6},
    "qwen2, attention_bias false": QWEN2 | {"attention_bias": False},
    "qwen2, window off": QWEN2 | {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0},
    "qwen2, window as long as the context": QWEN2
    | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
    "qwen2, no layer with a window": QWEN2 | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
    "qwen2, window": QWEN2 | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    "qwen2, window from a layer on": QWEN2 | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen2, window of one token": QWEN2 | {"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 1},
    "qwen2, layer_types": QWEN2
    | {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "deepseek_v3": V3,
    "deepseek_v3, norm_topk_prob false": V3 | {"norm_topk_prob": False},
    "deepseek_v3, q_lora_rank and attention_bias": V3 | {"q_lora_rank": 15, "attention_bias": True},
    "deepseek_v3, groups": V3 | {"n_group": 4, "topk_group": 2},
    "deepseek_v3, rope_interleave false": V3 | {"rope_interleave": False},
    "deepseek_v3, yarn": V3 | {"rope_scaling": DEEPSEEK_YARN},
    "deepseek_v3, linear": V3 | {"rope_scaling": LINEAR},
    "deepseek_v3, llama3": V3 | {"rope_scaling": LLAMA3},
    "deepseek_v3, tied": V3 | {"tie_word_embeddings": True},
    "deepseek_v2": V2,
    "deepseek_v2, groups": V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v2, yarn": V2 | {"rope_scaling": DEEPSEEK_YARN},
    "deepseek_v2, q_lora_rank and attention_bias": V2 | {"q_lora_rank": 15, "attention_bias": True},
}

# Models with the defaults of their classes, and the keys that are then removed from config.json.
V3_DEFAULTS = {
    "n_group": 8,
    "topk_group": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
V2_DEFAULTS = {
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
}
ABSENT = {
    "deepseek_v3": (V3 | {"num_hidden_layers": 5, "n_routed_experts": 16} | V3_DEFAULTS, list(V3_DEFAULTS)),
    "deepseek_v3, q_lora_rank": (V3 | {"q_lora_rank": 1536}, ["q_lora_rank"]),
    "deepseek_v2": (V2 | V2_DEFAULTS, [*V2_DEFAULTS, "topk_method", "norm_topk_prob"]),
    "qwen2": (
        QWEN2 | {"num_attention_heads": 32, "hidden_size": 64, "num_key_value_heads": 32},
        ["num_key_value_heads"],
    ),
    "llama": (
        LLAMA | {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
        [
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "rope_parameters",
            "attention_bias",
            "mlp_bias",
            "hidden_act",
        ],
    ),
}

# The base config, the changed keys, and the key that the error must name.
REFUSED = [
    (LLAMA, {"sliding_window": 3}, "sliding_window"),
    (QWEN2, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    (V2, {"mlp_bias": True}, "mlp_bias"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (LLAMA, {"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor"),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}},
        "rope_scaling",
    ),
    (LLAMA, {"rope_scaling": YARN | {"alpha": 8.0}}, "rope_scaling.alpha"),
    (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    (LLAMA, {"logits_scaling": 8.0}, "logits_scaling"),
    (LLAMA, {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    (LLAMA, {"use_qk_norm": True}, "use_qk_norm"),
    (LLAMA, {"is_causal": False}, "is_causal"),
    (LLAMA, {"attention_chunk_size": 8}, "attention_chunk_size"),
    (LLAMA, {"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    (V3, {"head_dim": 7}, "head_dim"),
    (LLAMA, {"a_key_of_next_year": 1}, "a_key_of_next_year"),
]


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--program", type=common.program, required=True, help="the built `moonlight`")
    parser.add_argument("--convert", type=common.program, required=True, help="the built `moonlight-convert`")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    common.print_versions("transformers", "torch")
    program, convert = arguments.program, arguments.convert
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        for number, (name, config) in enumerate(SUPPORTED.items()):
            supported(program, name, config, home / str(number))
        for number, (name, (config, keys)) in enumerate(ABSENT.items()):
            absent(program, name, config, keys, home / f"absent-{number}")
        partly_tied(program, convert, home)
        for number, (base, over, key) in enumerate(REFUSED):
            refused(program, base, over, key, home / f"refused-{number}")
        for shape in ["tensor", "row", "block"]:
            quantized(convert, shape, home)
    checks.finish()


def tokens():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, VOCABULARY, (LENGTH,), generator=generator).tolist()


def build(config, folder):
    """A random model of a configuration, saved by transformers."""
    torch.manual_seed(7)
    keys = json.loads(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys))
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith((".bias", "correction_bias")):
                value.copy_(torch.randn_like(value) * 0.3)
            elif "norm" in name:
                value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder)


def theirs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return logprobs(model, [tokens()])


def score(program, folder):
    data = write_sequences(folder.parent / "tokens.jsonl", [tokens()])
    return try_score(program, data, "--model", folder)


def greedy(program, name, folder):
    """Greedy text with the KV cache, compared with transformers without a cache."""
    prompt, new = tokens()[:9], 24
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        # The whole sequence each time.
        ids = list(prompt)
        for _ in range(new):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    prompt = ",".join(map(str, prompt))
    arguments = ["--model", folder, "--prompt-tokens", prompt, "--max-new-tokens", str(new), "--json"]
    ran = common.attempt(program, "generate", *arguments)
    if ran.returncode:
        return checks.expect(f"{name}, greedy", False, ran.stderr.strip())
    ours, expected = json.loads(ran.stdout)["tokens"], ids[-new:]
    end = BASE["eos_token_id"]
    if ours != expected[: len(ours)] or (len(ours) < new and end not in expected[len(ours) - 1 : len(ours) + 1]):
        checks.expect(f"{name}, greedy", False, f"{ours}, not {expected}")


def change(folder, over, without=()):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key in without:
        config.pop(key, None)
    file.write_text(json.dumps(config | over, indent=2))


def supported(program, name, config, folder):
    build(config, folder)
    expected = theirs(folder)
    ours, message = score(program, folder)
    if ours is None:
        return checks.expect(name, False, message)
    checks.expect(name, distance(ours, expected) < BUDGET, f"{distance(ours, expected):.1e}")
    greedy(program, name, folder)
    # The same in the spelling of transformers 4, and unchanged.
    saved = json.loads((folder / "config.json").read_text())
    rope = saved.pop("rope_parameters", None) or {}
    theta = rope.pop("rope_theta", 10000.0)
    scaling = None if rope.get("rope_type") == "default" else rope | {"type": rope["rope_type"]}
    old = saved | {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": saved.pop("dtype", None)}
    for spelling, content in {"transformers 4's spelling": old, "as written": config}.items():
        (folder / "config.json").write_text(json.dumps(content))
        again, message = score(program, folder)
        if again is None:
            checks.expect(f"{name}, {spelling}", False, message)
        elif distance(again, ours) != 0:
            checks.expect(f"{name}, {spelling}", False, f"{distance(again, ours):.1e}")


def absent(program, name, config, keys, folder):
    build(config, folder)
    with_keys = theirs(folder)
    change(folder, {}, without=keys)
    expected = theirs(folder)
    checks.expect(f"{name}, the defaults of transformers", distance(expected, with_keys) == 0)
    ours, message = score(program, folder)
    far = message if ours is None else f"{distance(ours, expected):.1e}"
    checks.expect(f"{name} without {', '.join(keys)}", ours is not None and distance(ours, expected) < BUDGET, far)


def partly_tied(program, convert, home):
    """`tie_word_embeddings` with a head that differs, one that repeats the embedding, and one without an embedding."""
    for name in ["a head that differs", "a head that repeats", "a head alone"]:
        folder = home / name.replace(" ", "-")
        build(LLAMA, folder)
        change(folder, {"tie_word_embeddings": True})
        weights = load_file(folder / "model.safetensors")
        if name != "a head that differs":
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        if name == "a head alone":
            del weights["model.embed_tokens.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        expected = theirs(folder)
        for which in ["", " converted"]:
            if which:
                common.call(convert, "convert", folder, f"{folder}-converted")
                folder = pathlib.Path(f"{folder}-converted")
                checks.expect(f"tied, {name}, converted, in transformers", distance(theirs(folder), expected) < BUDGET)
            ours, message = score(program, folder)
            far = "" if ours is None else f"{distance(ours, expected):.1e}"
            checks.expect(
                f"tied, {name}{which}", ours is not None and distance(ours, expected) < BUDGET, far or message
            )


def refused(program, base, over, key, folder):
    build(base, folder)
    plain = theirs(folder)
    # A key that the file already has would take precedence.
    change(folder, over, without=["rope_parameters"] if "rope_scaling" in over else ["layer_types"])
    try:
        moved = f"transformers moves by {distance(theirs(folder), plain):.1e}"
    except Exception as error:
        moved = f"transformers: {str(error).splitlines()[0][:60] if str(error) else type(error).__name__}"
    ours, message = score(program, folder)
    checks.expect(
        f"refused: {json.dumps(over)}", ours is None and f"`{key}`" in message, f"{message or ours} [{moved}]"
    )


def quantized(convert, shape, home):
    """FP8 matrices as compressed-tensors and DeepSeek store them, compared with torch's product."""
    folder = home / f"fp8-{shape}"
    build(V3 | {"q_lora_rank": 15}, folder)
    weights, expected = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            weights[name] = expected[name] = value
            continue
        rows, columns = value.shape
        if shape == "tensor":
            scale = (value.abs().max() / 448).reshape(1)
            wide = scale
        elif shape == "row":
            scale = wide = value.abs().amax(1, keepdim=True) / 448
        else:
            high, across = -(-rows // 16), -(-columns // 16)
            scale = torch.rand(high, across) * 0.01 + 0.001
            wide = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[:rows, :columns]
        small = (value / wide).to(torch.float8_e4m3fn)
        weights[name] = small
        weights[name + ("_scale_inv" if shape == "block" else "_scale")] = scale
        expected[name] = (small.float() * wide).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    strategy = {"tensor": "tensor", "row": "channel"}.get(shape)
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": strategy}}}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    if shape == "block":
        config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    change(folder, {"quantization_config": config})
    ran = common.attempt(convert, "convert", folder, f"{folder}-plain")
    if ran.returncode:
        return checks.expect(f"FP8, a scale per {shape}", False, ran.stderr)
    written = load_file(f"{folder}-plain/model.safetensors")
    wrong = [name for name, value in expected.items() if not torch.equal(written[name], value)]
    checks.expect(f"FP8, a scale per {shape}, {len(expected)} tensors bit by bit", not wrong, wrong[:3] or "")


if __name__ == "__main__":
    main()
