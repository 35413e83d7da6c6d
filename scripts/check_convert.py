#!/usr/bin/env python3
"""Takes checkpoints through `moonlight-convert` and transformers, both ways.

    python scripts/check_convert.py --program target/release/moonlight-convert

For each architecture of fixtures/:

* what we write (from Hugging Face's files, through a burnpack file and back, and in shards of 30 kB) opens with
  `AutoModelForCausalLM.from_pretrained`, no key missing, unexpected or of another shape, and gives bitwise the logits of
  the original;
* what transformers saves (as stored and in bf16, in one file and in shards) is bitwise equal for `verify`.

For fixtures/quantized (FP8, and INT4 of compressed-tensors), what we write opens in the same way, and every weight is
bitwise the one that torch, or the compressed-tensors package, dequantises to.

Run it with each release of transformers that matters; it prints which one it was. Exit code 0 if all of it holds.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
FAMILIES = ["moonlight-like", "deepseek-v3-like", "deepseek-v2-lite-like", "deepseek-v2-like", "llama", "qwen2"]
BLOCK, GROUP = 128, 32

failures = []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=pathlib.Path, required=True, help="the built `moonlight-convert`")
    program = parser.parse_args().program.resolve()
    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as home:
        for family in FAMILIES:
            check_family(program, family, pathlib.Path(home) / family)
        for layout in ["fp8", "int4"]:
            check_quantised(program, layout, pathlib.Path(home) / layout)
    for failure in failures:
        print(f"FAILED {failure}")
    sys.exit(bool(failures))


def run(program, *arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def expect(name, holds, detail=""):
    print(f"{'ok    ' if holds else 'FAILED'} {name}{'' if holds else ': ' + str(detail)}")
    if not holds:
        failures.append(name)


def load(directory, dtype=torch.float32):
    eager = {"attn_implementation": "eager"}
    rope = json.loads((directory / "config.json").read_text()).get("rope_parameters")
    if transformers.__version__.startswith("4") and rope:
        # The spelling of transformers 5, which 4 passes over in silence; what we write has the one that both read.
        eager["rope_theta"] = rope["rope_theta"]
    if transformers.__version__.startswith("5"):
        # The plain loop over experts: torch's grouped product refuses rows that are not a multiple of 16 bytes.
        eager["experts_implementation"] = "eager"
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, trust_remote_code=False, output_loading_info=True, **eager
    )
    return model.eval(), {kind: sorted(map(str, found)) for kind, found in info.items() if found}


@torch.no_grad()
def logits(model):
    tokens = torch.arange(24).remainder(model.config.vocab_size).reshape(2, 12)
    return model(tokens, use_cache=False).logits


def check_family(program, family, home):
    original = FIXTURES / family
    reference = logits(load(original)[0])
    ways = {
        "files to files": [(original, home / "hf", [])],
        "small shards": [(original, home / "shards", ["--max-shard-size", "30KB"])],
        "burnpack and back": [(original, home / "pack", ["--format", "burnpack"]), (home / "pack", home / "back", [])],
    }
    for way, steps in ways.items():
        done = [run(program, "convert", *step[:2], *step[2]) for step in steps]
        expect(f"{family}: converts, {way}", all(ok for ok, _ in done), done)
        model, problems = load(steps[-1][1])
        expect(f"{family}: opens strictly, {way}", not problems, problems)
        expect(f"{family}: equal logits, {way}", torch.equal(logits(model), reference))
    for step in ["hf", "shards", "pack", "back"]:
        expect(f"{family}: verify says equal, {step}", *run(program, "verify", original, home / step))

    stored = torch.float32 if family == "llama" else torch.bfloat16
    for name, dtype, size in [("as stored", stored, "5GB"), ("in f32", torch.float32, "5GB"), ("in shards", stored, "30KB")]:
        saved = home / f"saved {name}"
        model = load(original, dtype)[0]
        model.save_pretrained(saved, max_shard_size=size)
        expect(f"{family}: what transformers saves {name} opens", *run(program, "inspect", saved))
        expect(f"{family}: what transformers saves {name} is bitwise equal", *run(program, "verify", original, saved))


def check_quantised(program, layout, home):
    original = FIXTURES / "quantized" / layout
    ok, said = run(program, "convert", original, home / "plain")
    expect(f"{layout}: converts", ok, said)
    model, problems = load(home / "plain", torch.bfloat16)
    expect(f"{layout}: opens strictly", not problems, problems)
    expected = dequantised(original, layout)
    written = tensors(home / "plain")
    expect(f"{layout}: the same tensors", written.keys() == expected.keys(), written.keys() ^ expected.keys())
    same = [name for name in expected if name in written and torch.equal(written[name], expected[name])]
    expect(f"{layout}: all {len(expected)} equal to the last bit", len(same) == len(expected), set(expected) - set(same))
    config = json.loads((home / "plain" / "config.json").read_text())
    expect(f"{layout}: no quantization_config is left", "quantization_config" not in config)
    expect(f"{layout}: verify says equal", *run(program, "verify", original, home / "plain", "--model-only"))
    ok, said = run(program, "convert", original, home / "pack", "--format", "burnpack")
    expect(f"{layout}: through burnpack", ok and run(program, "verify", home / "pack", home / "plain")[0], said)
    # And the forward pass of what torch dequantised, in f32, is that of what we wrote.
    model = load(home / "plain")[0]
    ours = logits(model)
    for key, value in model.state_dict().items():
        value.copy_(fused(key, expected, value).to(value.dtype))
    expect(f"{layout}: equal logits", torch.equal(logits(model), ours))


def fused(key, expected, like):
    """The value of a parameter, of transformers 5's stacks from the experts one by one."""
    if key in expected:
        return expected[key]
    stem, name = key.rsplit(".", 1)
    parts = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}[name]
    experts = [
        torch.cat([expected[f"{stem}.{expert}.{part}.weight"] for part in parts]) for expert in range(like.shape[0])
    ]
    return torch.stack(experts)


def tensors(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def dequantised(directory, layout):
    """The plain weights under their published names."""
    stored = tensors(directory)
    stored = {name.removeprefix("language_model."): value for name, value in stored.items()}
    plain = {}
    for name, value in stored.items():
        if re.search(r"layers\.2\.|vision_tower|_scale(_inv)?$|_shape$", name):
            continue
        if name.endswith("_packed"):
            plain[name.removesuffix("_packed")] = unpack(stored, name.removesuffix("_packed"))
        elif value.dtype == torch.float8_e4m3fn:
            rows, columns = value.shape
            scale = stored[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)
            plain[name] = (value.float() * scale[:, :columns]).bfloat16()
        else:
            plain[name] = value
    return plain


def unpack(stored, name):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, group_size=GROUP, strategy="group", symmetric=True, type="int")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    state = {f"weight_{part}": stored[f"{name}_{part}"] for part in ["packed", "scale", "shape"]}
    return PackedQuantizationCompressor.decompress(state, scheme)["weight"]


if __name__ == "__main__":
    main()
