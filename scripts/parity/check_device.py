#!/usr/bin/env python3
"""Compares the program on a GPU with the same program on the CPU: scores, a greedy continuation, training steps.

    cargo build --workspace --features moonlight-train/wgpu
    python3 scripts/parity/check_device.py target/debug/moonlight [--device wgpu] [--steps 3] [--dtype bf16] [--budget 1e-2] [--all]

Any Vulkan driver works; without a GPU, Mesa's llvmpipe runs it in software (Debian: `mesa-vulkan-drivers`, 25.0 from bookworm-backports). There the
first step takes minutes, because each process compiles each shader when it is first used.

The model is a small one of the quick start's family after six steps on the CPU, on texts of this repository; the steps compared are
Muon's. `--all` adds four steps each of LoRA, of LoRA on a base in 8 bits, of a run that was resumed after its first half, and of two
devices. `--quickstart N` compares N steps with the quick start's own model instead, with four sequences of 64 tokens, and prints both
losses of each.

Everything must agree within 1e-3 relative or `--budget` (tensor cores multiply f32 in TF32, which has 10 bits); with `--dtype bf16`
within 5e-2, and the continuation is printed and not compared, because two tokens may be equally likely. Prints one line for each
comparison; the exit code is 1 if one fails.

Needs: only Python, and the driver of the device. Takes: half a minute with a release build, minutes with a debug build or on
a device in software.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

ROOT = common.ROOT
BUDGETS = {"f32": 1e-3, "bf16": 5e-2}
# Steps of the runs of `--all`, and gradient norms that are compared.
FEW = 4
# A step of the quick start's own model takes a device in software half a minute.
SMALL = {
    "model.hidden_size": 64,
    "model.intermediate_size": 128,
    "model.moe_intermediate_size": 64,
    "model.num_hidden_layers": 3,
    "model.n_routed_experts": 8,
}
TEXTS = ["pub fn newton_schulz(matrix: &Tensor<2>) -> Tensor<2> {", "Moonlight for Burn"]


def main():
    parser = common.parser(__doc__)
    parser.add_argument("program", help="`moonlight`, built with the feature of the device")
    parser.add_argument("--device", default="wgpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", choices=BUDGETS, default="f32", help="of both devices")
    parser.add_argument("--budget", type=float, help="the largest relative difference [default: by the dtype]")
    parser.add_argument("--matmul", choices=("tf32", "f32"), help="`model.matmul` of the device's runs")
    parser.add_argument("--quickstart", type=int, metavar="N", help="compare N steps of the quick start alone")
    parser.add_argument("--all", action="store_true", help="also LoRA, a quantized base, a resumed run and two devices")
    options = parser.parse_args()
    options.budget = options.budget or BUDGETS[options.dtype]
    with tempfile.TemporaryDirectory() as home:
        good = (quickstart if options.quickstart else run)(options, pathlib.Path(home))
    sys.exit(0 if good else 1)


def run(options, home):
    train(options, home, "base", "cpu", 6, [ROOT / "configs/quickstart.toml"])
    model = home / "base/quickstart/checkpoints/step-00000006"
    data = home / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    results = {}
    # The device may be the CPU as well, to try the script.
    for folder, device in (("reference", "cpu"), ("device", options.device)):
        scores = home / f"{folder}.jsonl"
        call(options, "score", "--model", model, "--data", data, "--output", scores, *on(options, device))
        greedy = ["--max-new-tokens", 12, "--temperature", 0, "--json", *on(options, device)]
        output = call(options, "generate", "--model", model, "--prompt", "pub fn ", *greedy)
        training = train(options, home, f"{folder}-muon", device, options.steps, [recipe(home, model)])
        results[folder] = {
            "log-probabilities": [
                p for line in scores.read_text().splitlines() for p in json.loads(line)["logprobs"][1:]
            ],
            "losses of steps": [line["loss"] for line in training],
            # Later ones are of weights that rounding has led apart, which the losses show less.
            "gradient norms": [line["grad_norm"] for line in training if line["split"] == "train"][:FEW],
            "continuation": json.loads(output)["tokens"],
        }
        if options.all:
            results[folder] |= more(options, home, model, folder, device)
    cpu, other = results["reference"], results["device"]
    good = True
    for name, values in cpu.items():
        if name == "continuation":
            worst, fits = "identical", values == other[name]
            worst = worst if fits else f"{values} and {other[name]}"
            fits |= options.dtype != "f32"
        else:
            worst = max(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(values, other[name], strict=True))
            fits, worst = worst < options.budget, f"{worst:.1e} largest difference of {len(values)}"
        good &= fits
        print(f"{'ok' if fits else 'FAILED':6} {name}: {worst}")
    return good


def quickstart(options, home):
    # Weights are drawn by the device, so that both runs start from those of the CPU after a step.
    train(options, home, "first", "cpu", 1, [ROOT / "configs/quickstart.toml"])
    path = recipe(home, home / "first/quickstart/checkpoints/step-00000001")
    curves = []
    for folder, device in (("reference", "cpu"), ("device", options.device)):
        lines = train(options, home, folder, device, options.quickstart, [path], "train.batch_size=4")
        curves.append([line["loss"] for line in lines if line["split"] == "train"])
    worst = 0.0
    for step, (cpu, other) in enumerate(zip(*curves, strict=True), 1):
        worst = max(worst, abs(cpu - other) / cpu)
        print(f"step {step:3}: {cpu:.5f} on the CPU, {other:.5f} on {options.device}")
    good = worst < options.budget
    print(f"{'ok' if good else 'FAILED':6} losses of the quick start: {worst:.1e} largest difference")
    return good


def more(options, home, model, folder, device):
    """The losses of other kinds of training, by name."""

    def losses(name, recipe, *settings):
        lines = train(options, home, f"{folder}-{name}", device, FEW, [recipe], *settings)
        return [line["loss"] for line in lines]

    lora = recipe(home, model, '[lora]\nrank = 4\nalpha = 8\ntargets = ["all"]\n')
    full = recipe(home, model)
    found = {
        "losses of LoRA": losses("lora", lora, "moe.bias_update_rate=0"),
        "losses of LoRA on 8 bits": losses("int8", lora, "moe.bias_update_rate=0", 'model.quantize="int8"'),
    }
    # Burn moves a tensor between devices with the padding of its rows, which was not written: softcuda must not report that.
    os.environ["SOFTCUDA_CHECKS"] = "uninitialized,barriers"
    found["losses on two devices"] = losses("two", full, "distributed.devices=2")
    del os.environ["SOFTCUDA_CHECKS"]
    # The run is left with the checkpoint of its first half.
    half = FEW // 2
    losses("resumed", full, f"train.checkpoint_every={half}", "train.keep=0")
    checkpoints = home / f"{folder}-resumed/from-base/checkpoints"
    for checkpoint in checkpoints.glob("step-*"):
        if int(checkpoint.name.split("-")[1]) > half:
            shutil.rmtree(checkpoint)
    settings = [f"train.checkpoint_every={half}", "train.keep=0"]
    lines = train(options, home, f"{folder}-resumed", device, FEW, [full, "--resume"], *settings)
    found["losses of a resumed run"] = [line["loss"] for line in lines]
    return found


def recipe(home, model, more=""):
    path = home / f"from-base{'-lora' if more else ''}.toml"
    path.write_text(f"""
[run]
name = "from-base"
[model]
path = "{model}"
[data]
train = ["{ROOT}/README.md", "{ROOT}/ARCHITECTURE.md"]
valid = ["{ROOT}/CONTRIBUTING.md"]
tokenizer = "bytes"
sequence_length = 64
[optimizer]
name = "muon"
learning_rate = 2e-3
weight_decay = 0.1
[schedule]
name = "constant"
[train]
batch_size = 2
gradient_clip = 1.0
validate_batches = 2
[moe]
bias_update_rate = 1e-3
sequence_balance_weight = 1e-4
{more}""")
    return path


def train(options, home, folder, device, steps, recipes, *more):
    """The lines of the metrics of a run."""
    settings = {
        "run.dir": f'"{home / folder}"',
        "train.steps": steps,
        "train.checkpoint_every": steps,
        "train.validate_every": steps,
        "train.validate_batches": 2,
    }
    own = recipes[0].name == "quickstart.toml"
    if own:
        settings |= SMALL if folder == "base" else {}
        settings |= {
            "data.train": f'["{ROOT}/README.md", "{ROOT}/ARCHITECTURE.md"]',
            "data.valid": f'["{ROOT}/CONTRIBUTING.md"]',
            "schedule.warmup_steps": min(2, steps // 2),
            "schedule.decay_steps": min(2, steps // 2),
        }
    if options.matmul and device != "cpu":
        settings["model.matmul"] = f'"{options.matmul}"'
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    # The base model is the same for every dtype.
    precision = ["--device", device] if own else on(options, device)
    call(options, "train", *recipes, *precision, *flags, *(part for setting in more for part in ("--set", setting)))
    name = "quickstart" if own else "from-base"
    return [json.loads(line) for line in (home / folder / name / "metrics.jsonl").read_text().splitlines()]


def on(options, device):
    return ["--device", device, "--dtype", options.dtype]


def call(options, *arguments):
    return common.call(options.program, *arguments)


if __name__ == "__main__":
    main()
