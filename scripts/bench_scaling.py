#!/usr/bin/env python3
"""Time and memory of forward plus backward at `bench-small` over numbers of experts, and over lengths of a sequence.

    cargo build --release -p moonlight-model --example bench
    python scripts/bench_scaling.py target/release/examples/bench experts     # 4 x 512 tokens, top-4 of 8 to 256
    python scripts/bench_scaling.py target/release/examples/bench sequence    # one sequence of 512 to 8,192 tokens

A step's activated weights, and so its products, are the same whatever the number of experts; its weights and their gradients
are not. Beside the time stand the bytes of both together. A run is a process of its own; the settings are gone through
`--rounds` times, forwards and backwards in turns, and each time is the median over rounds of a run's median. Prints a
Markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys

EXPERTS = (8, 16, 32, 64, 128, 256)
SEQUENCES = (512, 1024, 2048, 4096, 8192)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", help="the `bench` example of moonlight-model, built for release")
    parser.add_argument("over", choices=("experts", "sequence"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", type=int, nargs="+", help="these settings alone")
    options = parser.parse_args()
    settings = options.only or (EXPERTS if options.over == "experts" else SEQUENCES)
    fixed = ["--repeats", str(options.repeats)] + (["--batch", "1"] if options.over == "sequence" else [])
    runs = {setting: [] for setting in settings}
    for round_ in range(options.rounds):
        for setting in settings[:: 1 if round_ % 2 == 0 else -1]:
            command = [options.ours, *fixed, f"--{options.over}", str(setting)]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            runs[setting].append(result)
            note = f"{result['tokens_per_second']:8.1f} tokens/s  {result['peak_rss_mib']:6} MiB"
            print(f"round {round_ + 1}  {options.over} {setting:5}  {note}", file=sys.stderr)
    (experts_table if options.over == "experts" else sequence_table)(runs)


def seconds(several):
    return statistics.median(statistics.median(run["seconds"]) for run in several)


def spread(several):
    of_runs = [statistics.median(run["seconds"]) for run in several]
    return f"{min(of_runs):.2f} to {max(of_runs):.2f}"


def memory(several):
    return max(run["peak_rss_mib"] for run in several)


def experts_table(runs):
    first = seconds(next(iter(runs.values())))
    print("| experts | s a step | of rounds | over the first | weights and gradients | peak memory |")
    print("|---|---|---|---|---|---|")
    for experts, several in runs.items():
        gib = several[0]["parameters"] * 4 * 2 / 2**30
        time = seconds(several)
        print(f"| {experts} | {time:.2f} | {spread(several)} | {time / first:.2f} | {gib:.2f} GiB | {memory(several)} MiB |")


def sequence_table(runs):
    print("| tokens | s a step | of rounds | tokens/s | peak memory | MiB a further 1,024 tokens |")
    print("|---|---|---|---|---|---|")
    before = None
    for sequence, several in runs.items():
        time, peak = seconds(several), memory(several)
        slope = "" if before is None else f"{(peak - before[1]) * 1024 / (sequence - before[0]):.0f}"
        print(f"| {sequence} | {time:.2f} | {spread(several)} | {sequence / time:.0f} | {peak} MiB | {slope} |")
        before = (sequence, peak)


if __name__ == "__main__":
    main()
