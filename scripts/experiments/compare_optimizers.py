#!/usr/bin/env python3
"""Repeats the Muon report's comparisons of optimizers at a small scale, on real text, with `moonlight train`.

    cargo build --release --bin moonlight
    python scripts/experiments/compare_optimizers.py tune --model dense    # each optimizer at each rate of a grid, one seed
    python scripts/experiments/compare_optimizers.py race --model dense    # Muon and AdamW, each at its best rate, three seeds
    python scripts/experiments/compare_optimizers.py table1                # Baseline, Update Norm, Adjusted LR (report, Table 1)
    python scripts/experiments/compare_optimizers.py table8                # a fixed RMS of the update (report, Table 8)
    python scripts/experiments/compare_optimizers.py time --model dense    # seconds per step, in turns, on an idle machine

A complete run is not repeated, so an interrupted comparison continues. Each command prints a Markdown table; `race` also draws loss over
steps and over seconds into an SVG (`--plot FILE`), where the seconds are the steps times the median of `time`. `+-` is the half width of a
95 % interval of the mean over seeds (Student's t).

The model is the quick start's (`--model moe`, configs/quickstart.toml) or a dense one (configs/dense-small.toml). The text is the Rust source
in cargo's registry on this machine, so results differ a little between machines. Both optimizers get the same text, order, schedule,
steps, clipping, weight decay and grid of rates. The report has another size (800 M parameters, 2 M here), another text, and in Table 1
another MLP (two matrices of [H, 4H], SwiGLU here).

Needs: torch and safetensors for the weights' RMS, matplotlib for `--plot` (group `experiments`). Takes: several hours on two cores.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

ROOT = common.ROOT
RECIPES = {"dense": "configs/dense-small.toml", "moe": "configs/quickstart.toml"}
STEPS = 300
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)
# Student's t at 97.5 % for one, two, three and four degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("what", choices=["tune", "race", "table1", "table8", "time"])
    parser.add_argument("--model", choices=RECIPES, default="dense")
    parser.add_argument("--program", default=str(ROOT / "target/release/moonlight"), help="the `moonlight` to run")
    parser.add_argument("--runs", default=str(ROOT / "runs/compare"), help="where the runs are kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--plot", metavar="FILE", help="with `race`, the SVG to draw")
    options = parser.parse_args()
    {"tune": tune, "race": race, "table1": table1, "table8": table8, "time": time_steps}[options.what](options)


def run(options, model, optimizer, rate, seed, **settings):
    """The folder of a run, which is trained unless it is complete."""
    extra = "".join(f"-{key}={value}" for key, value in sorted(settings.items()))
    name = f"{model}-{options.steps}-{optimizer}-{rate:g}-{seed}{extra}"
    folder = pathlib.Path(options.runs) / name
    if (folder / "done").exists():
        return folder
    sets = {
        "run.name": name,
        "run.dir": options.runs,
        "run.seed": seed,
        "optimizer.name": optimizer,
        "optimizer.learning_rate": rate,
        "schedule.name": "cosine",
        "schedule.decay_steps": 0,
        "schedule.warmup_steps": min(20, options.steps // 2),
        "schedule.final_fraction": 0.1,
        "train.steps": options.steps,
        "train.validate_every": 50,
        "train.checkpoint_every": 0,
        "train.keep": 1,
        "train.keep_best": "false",
        "train.plots": "false",
        "train.probe_every": 100,
        "sample.prompt": '""',
        **{f"optimizer.{key}": value for key, value in settings.items()},
    }
    command = [options.program, "train", str(ROOT / RECIPES[model]), "--device", "cpu", "--resume"]
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    print(f"{name} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    (folder / "done").touch()
    return folder


def metrics(folder, split):
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == split]


def final(folder):
    """Training loss (mean over the last 20 steps) and validation loss at the end."""
    train = [line["loss"] for line in metrics(folder, "train")[-20:]]
    return statistics.mean(train), metrics(folder, "valid")[-1]["loss"]


def spread(values, digits=4):
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.{digits}g}"
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.{digits}g} +- {half:.2g}"


def best_rate(rates, loss_of):
    """The loss at each rate, and the best rate; the grid grows by factors of two while the best rate is its first or last."""
    rates, losses = list(rates), {}
    while True:
        for rate in rates:
            if rate not in losses:
                losses[rate] = loss_of(rate)
        best = min(losses, key=losses.get)
        if best == max(losses):
            rates.append(best * 2)
        elif best == min(losses):
            rates.append(best / 2)
        else:
            return losses, best


def tuned(options, model, optimizer):
    """The validation loss at each rate, and the best rate."""
    return best_rate(RATES, lambda rate: final(run(options, model, optimizer, rate, SEEDS[0]))[1])


def tune(options):
    print(f"validation loss after {options.steps} steps, {options.model}, seed {SEEDS[0]}\n")
    results = {optimizer: tuned(options, options.model, optimizer) for optimizer in ("muon", "adamw")}
    rates = sorted({rate for losses, _ in results.values() for rate in losses})
    print("| learning rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    print("|---" * (len(rates) + 1) + "|")
    for optimizer, (losses, best) in results.items():
        cells = []
        for rate in rates:
            text = f"{losses[rate]:.4f}" if rate in losses else ""
            cells.append(f"**{text}**" if rate == best else text)
        print(f"| {optimizer} | " + " | ".join(cells) + " |")


def race(options):
    folders = {}
    for optimizer in ("muon", "adamw"):
        _, best = tuned(options, options.model, optimizer)
        folders[optimizer, best] = [run(options, options.model, optimizer, best, seed) for seed in SEEDS]
    print(f"{options.model}, {options.steps} steps, {len(SEEDS)} seeds\n")
    print("| optimizer | learning rate | training loss | validation loss | steps to AdamW's last validation loss |")
    print("|---|---|---|---|---|")
    (_, muon), (_, adamw) = folders.items()
    target = statistics.mean(final(folder)[1] for folder in adamw)
    for (optimizer, rate), several in folders.items():
        losses = [final(folder) for folder in several]
        reached = [steps_to(folder, target) for folder in several]
        reached = spread(reached, 3) if all(reached) else "not all reach it"
        print(
            f"| {optimizer} | {rate:g} | {spread([train for train, _ in losses])} "
            f"| {spread([valid for _, valid in losses])} | {reached} |"
        )
    if options.plot:
        draw(options, folders)


def steps_to(folder, target):
    """The step at which the validation loss first falls to `target`, interpolated linearly between validations."""
    before = None
    for line in metrics(folder, "valid"):
        if line["loss"] <= target:
            if before is None:
                return line["step"]
            share = (before["loss"] - target) / (before["loss"] - line["loss"])
            return before["step"] + share * (line["step"] - before["step"])
        before = line
    return None


def draw(options, folders):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moonlight"
    import matplotlib.pyplot as plt

    seconds = json.loads((pathlib.Path(options.runs) / f"time-{options.model}.json").read_text())
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for (optimizer, rate), several in folders.items():
        curves = [[line["loss"] for line in metrics(folder, "valid")] for folder in several]
        steps = [line["step"] for line in metrics(several[0], "valid")]
        mean = [statistics.mean(values) for values in zip(*curves)]
        low, high = ([pick(values) for values in zip(*curves)] for pick in (min, max))
        for axis, scale in ((by_step, 1.0), (by_time, seconds[optimizer])):
            x = [step * scale for step in steps]
            axis.plot(x, mean, marker="o", label=f"{optimizer}, rate {rate:g}")
            axis.fill_between(x, low, high, alpha=0.25)
    by_step.set(xlabel="steps", ylabel="validation loss, nats per byte")
    by_time.set(xlabel="seconds")
    by_step.legend()
    figure.tight_layout()
    figure.savefig(options.plot, metadata={"Date": None})


def table1(options):
    methods = {"Baseline": "hidden_size", "Update Norm": "update_norm", "Adjusted LR": "report"}
    _, rate = tuned(options, "dense", "muon")
    rows = {}
    for name, scale in methods.items():
        settings = {} if scale == "report" else {"scale": scale}
        rows[name] = [run(options, "dense", "muon", rate, seed, **settings) for seed in SEEDS]
    print(f"dense, learning rate {rate:g}, {options.steps} steps, {len(SEEDS)} seeds\n")
    weights_table(rows)


def table8(options):
    _, rate = tuned(options, "dense", "muon")
    rows = {"AdamW": [run(options, "dense", "adamw", rate, seed) for seed in SEEDS]}
    for rms in (0.05, 0.1, 0.2, 0.4, 0.8):
        settings = {"scale": "update_norm"} | ({} if rms == 0.2 else {"update_rms": rms})
        rows[f"{rms:g}"] = [run(options, "dense", "muon", rate, seed, **settings) for seed in SEEDS]
    print(f"dense, learning rate {rate:g}, {options.steps} steps, {len(SEEDS)} seeds\n")
    weights_table(rows)


def weights_table(rows):
    print("| | train loss | valid loss | query weight RMS | MLP weight RMS |")
    print("|---|---|---|---|---|")
    for name, folders in rows.items():
        losses = [final(folder) for folder in folders]
        query, mlp = (spread([rms(folder, part) for folder in folders], 3) for part in ("q_proj", "mlp"))
        train, valid = (spread(list(values)) for values in zip(*losses))
        print(f"| {name} | {train} | {valid} | {query} | {mlp} |")


def rms(folder, part):
    from safetensors import safe_open

    newest = sorted((folder / "checkpoints").iterdir())[-1]
    squares, count = 0.0, 0
    with safe_open(newest / "model.safetensors", "pt") as file:
        for name in file.keys():
            if f"{part}." in name and name.endswith("_proj.weight"):
                tensor = file.get_tensor(name).double()
                squares, count = squares + tensor.square().sum().item(), count + tensor.numel()
    return math.sqrt(squares / count)


def time_steps(options):
    """The median seconds per step: the optimizers in turns, three times ten steps each after two to warm up."""
    seconds = {"muon": [], "adamw": []}
    for turn, optimizer in common.in_turns(seconds, 3):
        timing = argparse.Namespace(**{**vars(options), "steps": 12, "runs": os.path.join(options.runs, "time")})
        folder = pathlib.Path(timing.runs) / f"{options.model}-12-{optimizer}-0.002-{turn}"
        shutil.rmtree(folder, ignore_errors=True)
        lines = metrics(run(timing, options.model, optimizer, 2e-3, turn), "train")[2:]
        seconds[optimizer] += [
            (line["tokens"] - before["tokens"]) / line["tokens_per_second"] for before, line in zip(lines, lines[1:])
        ]
    medians = {optimizer: statistics.median(times) for optimizer, times in seconds.items()}
    path = pathlib.Path(options.runs) / f"time-{options.model}.json"
    path.write_text(json.dumps(medians) + "\n")
    ratio = medians["muon"] / medians["adamw"]
    print(json.dumps({"model": options.model, "seconds_per_step": medians, "muon_over_adamw": ratio}))


if __name__ == "__main__":
    main()
