#!/usr/bin/env python3
"""The quick start's model, trained by one worker that accumulates and by several workers: are they the same?

For each number of workers `N` a step is `N` micro-batches of `12 / N` sequences. One worker takes them one after the other;
`N` threads of a process, and `N` processes under `mpirun`, take one each. Losses are compared at every step, and the weights
at the end, relative to the largest of each tensor. The flat form (Algorithm 1 of the report) rounds momentum to bf16 on
however many workers, so that it is compared with one worker of the same form. Last, with `--before`, the time of a step
of one worker in turns with that of another build, such as the one before a change: one worker is the ordinary case of
many, and what that costs shows here against the last build that had a step of its own for it (commit f3ae5f9).

    cargo build --release --features moonlight-train/mpi --bin moonlight
    python3 scripts/compare_workers.py target/release/moonlight [--before PROGRAM]
"""

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none"] + (["--allow-run-as-root"] if os.geteuid() == 0 else [])
# The quick start, short.
SETS = {
    "data.sequence_length": 64,
    "data.max_bytes": 2_000_000,
    "schedule.warmup_steps": 10,
    "schedule.decay_steps": 20,
    "train.validate_every": 0,
    "train.validate_batches": 4,
    "train.checkpoint_every": 0,
    "train.plots": "false",
    "sample.prompt": '""',
}


def tensors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, memoryview(data)[8 + length + start : 8 + length + end].cast("f")


class Runs:
    def __init__(self, program, home, steps):
        self.program, self.home, self.steps = program, home, steps

    def train(self, name, workers, sets, processes=0, environment={}, program=None):
        sets = {
            **SETS, "run.name": name, "run.dir": json.dumps(str(self.home)), "train.steps": self.steps,
            "data.cache_dir": json.dumps(str(self.home / "cache")),
            "train.batch_size": 12 // workers, "train.gradient_accumulation": workers, **sets,
        }  # fmt: skip
        words = [str(program or self.program), "train", str(REPOSITORY / "configs/quickstart.toml")]
        words += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        if processes:
            words = [*MPIRUN, "-n", str(processes), *words]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        return self.home / name, done.stderr

    def processor_seconds(self, sets, program):
        name = f"time-{len(list(self.home.iterdir()))}"
        used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        before = used()
        self.train(name, 1, sets, environment={"RAYON_NUM_THREADS": "1"}, program=program)
        return used() - before

    def lines(self, run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["split"] == "train"]

    def compare(self, one, other):
        losses = [(a["loss"], b["loss"]) for a, b in zip(self.lines(one), self.lines(other), strict=True)]
        loss = max(abs(a - b) for a, b in losses)
        last = f"checkpoints/step-{self.steps:08}/model.safetensors"
        weights = 0.0
        for (name, a), (other_name, b) in zip(tensors(one / last), tensors(other / last), strict=True):
            assert name == other_name
            if a == b:
                continue
            largest = max(map(abs, a)) or 1.0
            weights = max(weights, max(abs(x - y) for x, y in zip(a, b)) / largest)
        return loss, weights


def compare_time(runs, before, turns):
    """Processor time of one thread, in turns, and of each build the least: what else the machine does takes no part in it."""
    sets = {"data.sequence_length": 256, "train.validate_batches": 1, "train.probe_every": 0}
    sets |= {"schedule.warmup_steps": 0, "schedule.decay_steps": 0}
    programs = {"before": before, "now": runs.program}
    # A run of one step is what every run takes besides its steps.
    seconds = lambda program, steps: runs.processor_seconds({**sets, "train.steps": steps}, program)
    start = {name: min(seconds(program, 1) for _ in range(2)) for name, program in programs.items()}
    times = [{name: seconds(program, 13) - start[name] for name, program in programs.items()} for _ in range(turns)]
    least = {name: min(turn[name] for turn in times) for name in programs}
    ratio = least["now"] / least["before"] - 1
    print(f"one worker, 12 steps: {least['before']:.2f} s before, {least['now']:.2f} s now: {ratio:+.2%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=lambda path: Path(path).resolve())
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=5, help="runs of each way for the time of a step")
    parser.add_argument("--no-mpi", action="store_true")
    parser.add_argument("--before", type=lambda path: Path(path).resolve(), help="another build, to time beside it")
    parser.add_argument("--only-time", action="store_true", help="with --before, nothing but that")
    arguments = parser.parse_args()
    if arguments.only_time and not arguments.before:
        parser.error("--only-time wants --before")
    failed = False
    with tempfile.TemporaryDirectory(prefix="moonlight-workers-") as folder:
        runs = Runs(arguments.program, Path(folder), arguments.steps)
        for form in () if arguments.only_time else ("whole-matrix", "flat"):
            chosen = {"distributed.form": json.dumps(form)}
            for workers in (1, 2, 3, 4):
                alone, _ = runs.train(f"{form}-{workers}-alone", workers, {} if form == "whole-matrix" else chosen)
                told = ""
                ways = {} if arguments.no_mpi else {"mpirun": (chosen, workers)}
                if workers in (2, 4):
                    ways["threads"] = ({**chosen, "distributed.devices": workers}, 0)
                for way, (sets, processes) in ways.items():
                    run, told = runs.train(f"{form}-{workers}-{way}", workers, sets, processes)
                    loss, weights = runs.compare(alone, run)
                    good = loss <= 1e-5 and weights <= 1e-5
                    failed |= not good
                    same = "bit for bit" if loss == weights == 0.0 else f"loss {loss:.1e}, weights {weights:.1e}"
                    print(f"{form}, {workers} workers by {way}: {same}{'' if good else '  TOO FAR'}", flush=True)
                told = [line for line in told.splitlines() if line.startswith(("sent", "by the", "against", "opt", "mom"))]
                print("    " + "\n    ".join(told), flush=True)
        if arguments.before:
            compare_time(runs, arguments.before, arguments.turns)
    sys.exit(failed)


if __name__ == "__main__":
    main()
