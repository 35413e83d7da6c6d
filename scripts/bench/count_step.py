#!/usr/bin/env python3
"""Counts what a training step does on a GPU, on a CUDA device in software: launches, waits of the host, copies, bytes, operations.

    scripts/parity/cuda_smoke.sh        # builds the program and the device
    LD_LIBRARY_PATH=... SOFTCUDA_SM=80 python3 scripts/bench/count_step.py moonlight SHAPE [--dtype bf16] [--json FILE]

Runs SHAPE on `--device cuda` for one and for two steps of Muon, without validation, and subtracts: what is left is one step. For each
kernel that matters it also prints the least time on two cards by their data sheets: the larger of bytes by bandwidth (each
sector of 32 bytes once for each launch, which is what a perfect cache leaves) and operations by peak rate. The sum of these
times is a bound from below for the step, not a prediction: it has no launches' overhead and no latency. Numbers of a small
model say which kernels wait for memory there, and nothing of a large one.

The device is slow, so that the shapes have few experts and layers, and steps few tokens. The number of experts has no effect on launches and
waits, that of the layers a linear one, which two runs with other `--layers` show.

`softcuda/README.md` describes the variables of the device; checks are turned off here. Needs: only Python. Takes: minutes.
"""

import json
import os
import pathlib
import sys
import tempfile

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[at]) for at in (0, 1)]
import common
from gpu import cards, recipes, shapes, training

WAITS = ("cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize")
ON = ("H100 SXM", "RTX 4090")
SHOWN = 20

# The keys of `[model]`.
SHAPES = {
    "quickstart": {"vocab_size": 256},
    "bench-small": {"preset": "bench-small", "n_routed_experts": 8, "num_hidden_layers": 3},
    # Its widths are a fraction of the real ones, which has no effect on launches and waits.
    "moonlight-block": shapes.TINY_BLOCK,
}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("program", help="`moonlight`, built with cuda")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"))
    parser.add_argument("--json", type=pathlib.Path, help="write all counts to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        one, two = (count(options, pathlib.Path(home), steps) for steps in (1, 2))
    step = difference(two, one)
    if options.json:
        options.json.write_text(json.dumps(step, indent=1) + "\n")
    show(step)


def count(options, home, steps):
    shape = dict(SHAPES[options.shape])
    if "preset" in shape:
        shape = dict.fromkeys(training.quickstart_keys()) | shape
    if options.layers:
        shape["num_hidden_layers"] = options.layers
    replaced = {
        "model": shape | {"dtype": options.dtype},
        "data": {"sequence_length": options.sequence},
        "train": {"batch_size": options.batch},
    }
    if options.optimizer == "adamw":
        replaced["optimizer"] = {"name": "adamw"}
    recipe = recipes.write(home, f"{steps}-steps", common.ROOT / "configs/quickstart.toml", replaced, 256)
    file = home / f"{steps}.json"
    environment = os.environ | {"SOFTCUDA_COUNTS": str(file)}
    environment.setdefault("SOFTCUDA_CHECKS", "none")
    common.call(options.program, "train", recipe, "--device", "cuda", "--set", f"train.steps={steps}", env=environment)
    return json.loads(file.read_text())


def difference(more, less):
    """The counts of `more` without those of `less`, which has one step fewer."""
    if not isinstance(more, dict):
        return more - (less or 0)
    return {key: difference(value, (less or {}).get(key)) for key, value in more.items()}


def show(step):
    host, kernels, total = step["host"], step["kernels"], step["total"]
    print("a step:")
    print(f"  launches                 {total['launches']:12,}")
    print(f"  waits of the host        {host['synchronizations']:12,}")
    for name, call in host.items():
        if isinstance(call, dict) and call["calls"] and name not in WAITS:
            print(f"  {name:24} {call['calls']:12,}   {call['bytes']:,} bytes")
    for name in ("distinct_bytes_read", "distinct_bytes_written"):
        print(f"  {name:24} {total[name]:12,}")
    for name, value in total.items():
        if name.startswith("matrix_flops") and value:
            print(f"  {name:24} {value:12,}")
    chosen = [card for card in dict.fromkeys(card for _, card in cards.CARDS) if card.name in ON]
    rows = []
    for name, counts in kernels.items():
        if counts["launches"]:
            bounds = [bound(counts, card) for card in chosen]
            rows.append((max(seconds for seconds, _ in bounds), name, counts, bounds))
    rows.sort(key=lambda row: -row[0])
    print(f"\n{'kernel':44} {'launches':>8} {'MB':>9} {'MFLOP':>9}", *(f"{card.name:>16}" for card in chosen))
    for _, name, counts, bounds in rows[:SHOWN]:
        megabytes = (counts["distinct_bytes_read"] + counts["distinct_bytes_written"]) / 1e6
        times = (f"{seconds * 1e6:9.1f} us {what:3}" for seconds, what in bounds)
        print(f"{name[:44]:44} {counts['launches']:8} {megabytes:9.2f} {flops(counts) / 1e6:9.1f}", *times)
    for index, card in enumerate(chosen):
        least = sum(row[3][index][0] for row in rows)
        print(f"least time of all kernels on {card.name}: {least * 1e3:.3f} ms")


def flops(counts):
    return sum(value for name, value in counts.items() if "flops" in name)


def bound(counts, card):
    """The least seconds on a card, and what they are spent on: `mem`, `mma` or `alu`."""
    halves = counts.get("matrix_flops_f16", 0) + counts.get("matrix_flops_bf16", 0)
    matrix = halves / card.bf16 + counts.get("matrix_flops_tf32", 0) / card.tf32
    plain = sum(value for name, value in counts.items() if name in ("flops_f32", "flops_f16", "flops_bf16")) / card.f32
    memory = (counts["distinct_bytes_read"] + counts["distinct_bytes_written"]) / (card.bandwidth * 1e9)
    return max((memory, "mem"), (matrix / 1e12, "mma"), (plain / 1e12, "alu"))


if __name__ == "__main__":
    main()
