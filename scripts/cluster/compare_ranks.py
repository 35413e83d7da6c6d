#!/usr/bin/env python3
"""Trains the quick start's model on one rank that accumulates and on several ranks, and compares losses and weights.

    cargo build --release --features moonlight-train/mpi --bin moonlight
    python3 scripts/cluster/compare_ranks.py target/release/moonlight [--before PROGRAM]

For each world size `N` a step has `N` micro-batches of `12 / N` sequences. One rank runs them one after the other; `N` threads of a
process, and `N` processes under `mpirun`, run one each. Losses are compared at every step, and the weights at the end, relative to the
largest of each tensor. The flat form (Algorithm 1 of the report) rounds momentum to bf16 at every world size, so it is compared with one
rank of the same form.

With `--before`, the time of a step on one rank is measured in turns with that of another build. One rank runs the same
distributed step; commit f3ae5f9 is the last one with a separate step for it.

Needs: only Python, `mpirun` (or `--no-mpi`). Takes: half an hour on two cores.
"""

import json
import os
import pathlib
import resource
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

ROOT = common.ROOT
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

    def train(self, name, ranks, sets, processes=0, environment=None, program=None):
        if environment is None:
            environment = {}
        sets = {
            **SETS, "run.name": name, "run.dir": json.dumps(str(self.home)), "train.steps": self.steps,
            "data.cache_dir": json.dumps(str(self.home / "cache")),
            "train.batch_size": 12 // ranks, "train.gradient_accumulation": ranks, **sets,
        }  # fmt: skip
        words = [str(program or self.program), "train", str(ROOT / "configs/quickstart.toml")]
        words += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        if processes:
            words = [*MPIRUN, "-n", str(processes), *words]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        return self.home / name, done.stderr

    def processor_seconds(self, sets, program):
        name = f"time-{len(list(self.home.iterdir()))}"

        def used():
            return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

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
    """CPU time of one thread, in turns; the minimum of each build, which other programs on the machine influence least."""
    sets = {"data.sequence_length": 256, "train.validate_batches": 1, "train.probe_every": 0}
    sets |= {"schedule.warmup_steps": 0, "schedule.decay_steps": 0}
    programs = {"before": before, "now": runs.program}

    # A run of one step measures the time of a run besides its steps.
    def seconds(program, steps):
        return runs.processor_seconds({**sets, "train.steps": steps}, program)

    start = {name: min(seconds(program, 1) for _ in range(2)) for name, program in programs.items()}
    times = [{name: seconds(program, 13) - start[name] for name, program in programs.items()} for _ in range(turns)]
    least = {name: min(turn[name] for turn in times) for name in programs}
    ratio = least["now"] / least["before"] - 1
    print(f"one rank, 12 steps: {least['before']:.2f} s before, {least['now']:.2f} s now: {ratio:+.2%}")


def main():
    parser = common.parser(__doc__)
    parser.add_argument("program", type=lambda path: Path(path).resolve())
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=5, help="runs of each build for the time of a step")
    parser.add_argument("--no-mpi", action="store_true")
    parser.add_argument(
        "--before", type=lambda path: Path(path).resolve(), help="another build to compare the time of a step with"
    )
    parser.add_argument("--only-time", action="store_true", help="with --before, only the time")
    arguments = parser.parse_args()
    if arguments.only_time and not arguments.before:
        parser.error("`--only-time` needs `--before`")
    failed = False
    with tempfile.TemporaryDirectory(prefix="moonlight-ranks-") as folder:
        runs = Runs(arguments.program, Path(folder), arguments.steps)
        for form in () if arguments.only_time else ("whole-matrix", "flat"):
            chosen = {"distributed.form": json.dumps(form)}
            for ranks in (1, 2, 3, 4):
                alone, _ = runs.train(f"{form}-{ranks}-alone", ranks, {} if form == "whole-matrix" else chosen)
                log = ""
                ways = {} if arguments.no_mpi else {"mpirun": (chosen, ranks)}
                if ranks in (2, 4):
                    ways["threads"] = ({**chosen, "distributed.devices": ranks}, 0)
                for way, (sets, processes) in ways.items():
                    run, log = runs.train(f"{form}-{ranks}-{way}", ranks, sets, processes)
                    loss, weights = runs.compare(alone, run)
                    good = loss <= 1e-5 and weights <= 1e-5
                    failed |= not good
                    same = "bit for bit" if loss == weights == 0.0 else f"loss {loss:.1e}, weights {weights:.1e}"
                    print(f"{form}, {ranks} ranks by {way}: {same}{'' if good else '  TOO FAR'}", flush=True)
                traffic = [
                    line for line in log.splitlines() if line.startswith(("sent", "predicted", "over a", "opt", "mom"))
                ]
                print("    " + "\n    ".join(traffic), flush=True)
        if arguments.before:
            compare_time(runs, arguments.before, arguments.turns)
    sys.exit(failed)


if __name__ == "__main__":
    main()
