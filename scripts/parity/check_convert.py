#!/usr/bin/env python3
"""Takes checkpoints through `moonlight-convert` and transformers, both ways.

    python scripts/parity/check_convert.py --program target/release/moonlight-convert

For each architecture of fixtures/:

* what `moonlight-convert` writes (from Hugging Face's files, through a burnpack file and back, and in shards of 30 kB) opens with
  `AutoModelForCausalLM.from_pretrained`, without missing, unexpected or mismatched keys, and gives the logits of the original bit for bit;
* what transformers saves (as stored and in bf16, in one file and in shards) is bitwise equal for `verify`.

For fixtures/quantized (FP8, and INT4 of compressed-tensors), the output opens in the same way, and every weight is bitwise equal to
the result of dequantizing with torch or the compressed-tensors package.

Run it with each release of transformers that matters; it prints the version. The exit code is 0 if every comparison holds.

Needs: torch, transformers, safetensors, compressed-tensors (group `quantized`). Takes: half a minute with a release build.
"""

import json
import pathlib
import re
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from common import late
from models import load_strictly

torch = late("torch")
transformers = late("transformers")
safe_open = late("safetensors", "safe_open")


FIXTURES = common.FIXTURES
FAMILIES = ["moonlight-like", "deepseek-v3-like", "deepseek-v2-lite-like", "deepseek-v2-like", "llama", "qwen2"]
BLOCK, GROUP = 128, 32

checks = common.Checks()


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--program", type=common.program, required=True, help="the built `moonlight-convert`")
    program = parser.parse_args().program
    transformers.utils.logging.disable_progress_bar()
    common.print_versions("transformers", "torch")
    with tempfile.TemporaryDirectory() as home:
        for family in FAMILIES:
            check_family(program, family, pathlib.Path(home) / family)
        for layout in ["fp8", "int4"]:
            check_quantized(program, layout, pathlib.Path(home) / layout)
    checks.finish()


def run(program, *arguments):
    done = common.attempt(program, *arguments)
    return done.returncode == 0, (done.stdout + done.stderr).strip()


@common.no_grad
def logits(model):
    tokens = torch.arange(24).remainder(model.config.vocab_size).reshape(2, 12)
    return model(tokens, use_cache=False).logits


def check_family(program, family, home):
    original = FIXTURES / family
    reference = logits(load_strictly(original)[0])
    ways = {
        "files to files": [(original, home / "hf", [])],
        "small shards": [(original, home / "shards", ["--max-shard-size", "30KB"])],
        "burnpack and back": [(original, home / "pack", ["--format", "burnpack"]), (home / "pack", home / "back", [])],
    }
    for way, steps in ways.items():
        done = [run(program, "convert", *step[:2], *step[2]) for step in steps]
        checks.expect(f"{family}: converts, {way}", all(ok for ok, _ in done), done)
        model, problems = load_strictly(steps[-1][1])
        checks.expect(f"{family}: opens strictly, {way}", not problems, problems)
        checks.expect(f"{family}: equal logits, {way}", torch.equal(logits(model), reference))
    for step in ["hf", "shards", "pack", "back"]:
        checks.expect(f"{family}: `verify` finds them equal, {step}", *run(program, "verify", original, home / step))

    stored = torch.float32 if family == "llama" else torch.bfloat16
    for name, dtype, size in [
        ("as stored", stored, "5GB"),
        ("in f32", torch.float32, "5GB"),
        ("in shards", stored, "30KB"),
    ]:
        saved = home / f"saved {name}"
        model = load_strictly(original, dtype)[0]
        model.save_pretrained(saved, max_shard_size=size)
        checks.expect(f"{family}: what transformers saves {name} opens", *run(program, "inspect", saved))
        checks.expect(
            f"{family}: what transformers saves {name} is bitwise equal", *run(program, "verify", original, saved)
        )


def check_quantized(program, layout, home):
    original = FIXTURES / "quantized" / layout
    ok, message = run(program, "convert", original, home / "plain")
    checks.expect(f"{layout}: converts", ok, message)
    model, problems = load_strictly(home / "plain", torch.bfloat16)
    checks.expect(f"{layout}: opens strictly", not problems, problems)
    expected = dequantized(original, layout)
    written = tensors(home / "plain")
    checks.expect(f"{layout}: the same tensors", written.keys() == expected.keys(), written.keys() ^ expected.keys())
    same = [name for name in expected if name in written and torch.equal(written[name], expected[name])]
    checks.expect(
        f"{layout}: all {len(expected)} equal to the last bit", len(same) == len(expected), set(expected) - set(same)
    )
    config = json.loads((home / "plain" / "config.json").read_text())
    checks.expect(f"{layout}: no quantization_config is left", "quantization_config" not in config)
    checks.expect(
        f"{layout}: `verify` finds them equal", *run(program, "verify", original, home / "plain", "--model-only")
    )
    ok, message = run(program, "convert", original, home / "pack", "--format", "burnpack")
    checks.expect(
        f"{layout}: through burnpack", ok and run(program, "verify", home / "pack", home / "plain")[0], message
    )
    # The forward pass in f32 with torch's weights must equal the one with our weights.
    model = load_strictly(home / "plain")[0]
    ours = logits(model)
    for key, value in model.state_dict().items():
        value.copy_(fused(key, expected, value).to(value.dtype))
    checks.expect(f"{layout}: equal logits", torch.equal(logits(model), ours))


def fused(key, expected, like):
    """The value of a parameter; a stack of experts in transformers 5 is made from the experts in the file."""
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


def dequantized(directory, layout):
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
