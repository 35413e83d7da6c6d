#!/usr/bin/env python3
"""Time and memory of forward plus backward at `bench-small` over the number of experts, or over the length of a sequence.

    cargo build --release -p moonlight-model --example bench
    python scripts/bench/bench_scaling.py target/release/examples/bench experts     # 4 x 512 tokens, top-4 of 8 to 256
    python scripts/bench/bench_scaling.py target/release/examples/bench sequence    # one sequence of 512 to 8,192 tokens

The activated weights of a step, and therefore its operations, do not depend on the number of experts; all weights and gradients do. The
table has the bytes of both. Each run is a process. The settings run `--rounds` times, in reverse order in every second round, and
each time is the median over rounds of a run's median. Prints a Markdown table.

Needs: only Python, the example `bench`. Takes: a quarter of an hour for `experts`, more for `sequence`.
"""

import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

EXPERTS = (8, 16, 32, 64, 128, 256)
SEQUENCES = (512, 1024, 2048, 4096, 8192)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("ours", help="the `bench` example of moonlight-model, built for release")
    parser.add_argument("over", choices=("experts", "sequence"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", type=int, nargs="+", help="only these settings")
    options = parser.parse_args()
    settings = options.only or (EXPERTS if options.over == "experts" else SEQUENCES)
    fixed = ["--repeats", str(options.repeats)] + (["--batch", "1"] if options.over == "sequence" else [])
    runs = {setting: [] for setting in settings}
    for number, setting in common.in_turns(settings, options.rounds):
        result = common.measure(options.ours, *fixed, f"--{options.over}", setting)
        runs[setting].append(result)
        note = f"{result['tokens_per_second']:8.1f} tokens/s  {result['peak_rss_mib']:6} MiB"
        common.print_progress(f"round {number}  {options.over} {setting:5}  {note}")
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
    print("| experts | s per step | of rounds | over the first | weights and gradients | peak memory |")
    print("|---|---|---|---|---|---|")
    for experts, several in runs.items():
        gib = several[0]["parameters"] * 4 * 2 / 2**30
        time = seconds(several)
        print(
            f"| {experts} | {time:.2f} | {spread(several)} | {time / first:.2f} | {gib:.2f} GiB | {memory(several)} MiB |"
        )


def sequence_table(runs):
    print("| tokens | s per step | of rounds | tokens/s | peak memory | MiB per further 1,024 tokens |")
    print("|---|---|---|---|---|---|")
    before = None
    for sequence, several in runs.items():
        time, peak = seconds(several), memory(several)
        slope = "" if before is None else f"{(peak - before[1]) * 1024 / (sequence - before[0]):.0f}"
        print(f"| {sequence} | {time:.2f} | {spread(several)} | {sequence / time:.0f} | {peak} MiB | {slope} |")
        before = (sequence, peak)


if __name__ == "__main__":
    main()
