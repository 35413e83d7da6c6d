#!/usr/bin/env python3
r"""Fine-tunes a small model on conversations in four ways, each at its best learning rate, and compares the results.

    cargo build --release --bin moonlight
    moonlight train configs/quickstart.toml --set train.steps=900 --set schedule.decay_steps=300 --set train.batch_size=8 \
        --set data.sequence_length=512 --set optimizer.learning_rate=8e-3 --set data.max_bytes=16000000      # the base
    moonlight data corpus --output runs/corpus
    python scripts/experiments/compare_finetuning.py tune      # each method at each rate of a grid: one seed, a third of the steps
    python scripts/experiments/compare_finetuning.py race      # each method at its best rate: three seeds, all steps, exact answers

The methods are all parameters or LoRA on all projections (configs/sft-small.toml, configs/lora-small.toml), each with Muon and AdamW. All have
the same conversations and the same schedule (ten steps of warm-up, then linear to zero); weight decay is the recipes' (0.1, and none for
LoRA). The grid of rates has factors of two and grows until the best rate is not at its edge. A seed determines the order of the conversations and
the initial adapters; the base model is the same.

A complete run is not repeated, so an interrupted comparison continues. Each command prints a Markdown table. `+-` is the half width of a
95 % interval of the mean over seeds (Student's t). The questions are the same for all seeds, so that interval does not include the
uncertainty from the choice of questions; the standard error over questions is a separate column.

Needs: only Python. Takes: several hours on two cores.
"""

import json
import pathlib
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from compare_optimizers import best_rate, metrics, spread

ROOT = common.ROOT
SEEDS = (1, 2, 3)
# Name in the table: recipe, optimizer, first rate of the grid.
WAYS = {
    "all parameters, Muon": ("configs/sft-small.toml", "muon", (1e-3, 2e-3, 4e-3)),
    "all parameters, AdamW": ("configs/sft-small.toml", "adamw", (5e-4, 1e-3, 2e-3)),
    "LoRA on everything, Muon": ("configs/lora-small.toml", "muon", (5e-3, 1e-2, 2e-2)),
    "LoRA on everything, AdamW": ("configs/lora-small.toml", "adamw", (2.5e-3, 5e-3, 1e-2)),
}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("what", choices=["tune", "race"])
    parser.add_argument("--program", default=str(ROOT / "target/release/moonlight"), help="the `moonlight` to run")
    parser.add_argument("--base", default=str(ROOT / "runs/quickstart"), help="the model that is fine-tuned")
    parser.add_argument(
        "--conversations", default=str(ROOT / "runs/corpus/conversations"), help="from `moonlight data corpus`"
    )
    parser.add_argument("--runs", default=str(ROOT / "runs/compare-sft"), help="where the runs are kept")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tune-steps", type=int, default=40)
    options = parser.parse_args()
    {"tune": tune, "race": race}[options.what](options)


def run(options, way, rate, seed, steps):
    """The folder of a run, which is trained unless it is complete."""
    recipe, optimizer, _ = WAYS[way]
    kind = pathlib.Path(recipe).stem
    name = f"{kind}-{optimizer}-{rate:g}-{steps}-{seed}"
    folder = pathlib.Path(options.runs) / name
    done = folder / "done"
    if done.exists():
        return folder
    conversations = pathlib.Path(options.conversations).resolve()
    sets = {
        "run.name": name,
        "run.dir": options.runs,
        "run.seed": seed,
        "model.path": str(pathlib.Path(options.base).resolve()),
        "data.train": [str(conversations / "train.jsonl")],
        "data.valid": [str(conversations / "valid.jsonl")],
        "optimizer.name": optimizer,
        "optimizer.learning_rate": rate,
        "schedule.name": "linear",
        "schedule.warmup_steps": 10,
        "schedule.final_fraction": 0.0,
        "train.steps": steps,
        "train.validate_every": 0,
        "train.validate_batches": 32,
        "train.checkpoint_every": 0,
        "train.keep": 1,
        "train.plots": False,
        "eval.tasks": [str(conversations / "exact.jsonl")],
    }
    command = [options.program, "train", str(ROOT / recipe), "--device", "cpu", "--resume"]
    for key, value in sets.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    print(f"{name} ...", file=sys.stderr, flush=True)
    finished = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if finished.returncode != 0:
        sys.exit(f"{name}: {finished.stderr.strip()}")
    done.touch()
    return folder


def held_out(folder):
    return metrics(folder, "valid")[-1]["loss"]


def tuned(options, way):
    """The held-out loss at each rate, and the best rate."""
    return best_rate(WAYS[way][2], lambda rate: held_out(run(options, way, rate, SEEDS[0], options.tune_steps)))


def tune(options):
    print(f"held-out loss after {options.tune_steps} steps, seed {SEEDS[0]}\n")
    print("| how | rate: held-out loss |")
    print("|---|---|")
    for way in WAYS:
        losses, best = tuned(options, way)
        cells = [
            f"**{rate:g}: {loss:.4f}**" if rate == best else f"{rate:g}: {loss:.4f}"
            for rate, loss in sorted(losses.items())
        ]
        print(f"| {way} | {', '.join(cells)} |")


def race(options):
    rows, before = [], None
    for way in WAYS:
        _, rate = tuned(options, way)
        folders = [run(options, way, rate, seed, options.steps) for seed in SEEDS]
        evaluations = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
        before = evaluations[0]["before"][0]["metrics"]
        after = [one["after"][0]["metrics"] for one in evaluations]
        exact = [one["exact_match"]["value"] for one in after]
        error = statistics.mean(one["exact_match"]["stderr"] for one in after)
        nats = [one["nll"]["value"] for one in after]
        loss = [held_out(folder) for folder in folders]
        rows.append(f"| {way} | {rate:g} | {spread(loss)} | {spread(exact, 3)} | {error:.3f} | {spread(nats, 3)} |")
    print(f"{options.steps} steps, {len(SEEDS)} seeds\n")
    print(
        "| method | rate | held-out loss | exact answers | standard error over questions | nats per token of the answers |"
    )
    print("|---|---|---|---|---|---|")
    exact, nats = before["exact_match"], before["nll"]
    print(f"| before | | | {exact['value']:.3g} | {exact['stderr']:.3f} | {nats['value']:.3g} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
