#!/usr/bin/env python3
"""The Muon step of `moonlight-optim` and of torch.optim.Muon, in turns.

    cargo build --release -p moonlight-optim --example muon_bench
    python scripts/bench/bench_muon.py target/release/examples/muon_bench [--rounds 2] [--workloads dense,small,experts]

The workloads are those of `moonlight-optim/examples/muon_bench.rs`. torch.optim.Muon takes one matrix at a time, with as many threads
as there are processors. It computes its products in bf16; its f32 column is the same code with that dtype replaced. Each value is the
fastest step of all rounds; every round is a new process.

FLOPs are those that each program computes: PyTorch all of each product, ours half of the symmetric ones, and in the Gram form where
that is cheaper. The share is relative to a [2048, 2048] matmul of the same dtype in PyTorch, measured in the same run. Memory
is the peak of the process.

Needs: torch 2.9 or newer (group `bench`), the example `muon_bench`. Takes: some minutes.
"""

import argparse
import json
import os
import pathlib
import resource
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

WORKLOADS = {
    "dense": [(48, (768, 768)), (24, (768, 2048)), (12, (2048, 768))],
    "experts": [(64, (2048, 1408))],
    "small": [(1000, (64, 128))],
}


def quickest(steps, run):
    run()
    best = float("inf")
    for _ in range(steps):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def torch_step(workload, dtype, steps):
    """Runs in its own process, so that the peak memory is that of PyTorch alone."""
    import torch

    torch.set_num_threads(os.cpu_count())
    parameters = []
    for count, shape in WORKLOADS[workload]:
        for _ in range(count):
            parameter = torch.nn.Parameter(torch.randn(shape))
            parameter.grad = torch.randn(shape)
            parameters.append(parameter)
    optimizer = torch.optim.Muon(parameters, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    if dtype == "f32":
        torch.bfloat16 = torch.float32
    seconds = quickest(steps, optimizer.step)
    flops = 0
    for count, (rows, columns) in WORKLOADS[workload]:
        n, m = min(rows, columns), max(rows, columns)
        flops += count * 5 * (4 * n * n * m + 2 * n**3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "flops": flops, "peak_mib": round(peak)}))


def matmul_peak(dtype):
    import torch

    torch.set_num_threads(os.cpu_count())
    a = torch.randn(2048, 2048).to(torch.float32 if dtype == "f32" else torch.bfloat16)
    return 2 * 2048**3 / quickest(5, lambda: a @ a)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("program", help="the built example `muon_bench`")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process, after one to warm up")
    parser.add_argument("--workloads", default="dense,small,experts")
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--torch-step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_step:
        workload, dtype, steps = arguments.torch_step
        return torch_step(workload, dtype, int(steps))
    rate = {dtype: matmul_peak(dtype) for dtype in arguments.dtypes.split(",")}
    print("matmul [2048, 2048]: " + ", ".join(f"{dtype} {peak / 1e9:.0f} GFLOP/s" for dtype, peak in rate.items()))
    print(
        "| workload | type | ours, s | torch, s | ratio | ours, GFLOP | torch, GFLOP | ours, share | torch, share | ours, MiB | torch, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for workload in arguments.workloads.split(","):
        for dtype in arguments.dtypes.split(","):
            ours, theirs = [], []
            for _ in range(arguments.rounds):
                ours.append(common.measure(arguments.program, workload, dtype, arguments.steps))
                own = [sys.executable, __file__, "-", "--torch-step", workload, dtype, str(arguments.steps)]
                theirs.append(common.measure(*own))
            one = min(ours, key=lambda result: result["seconds"])
            other = min(theirs, key=lambda result: result["seconds"])

            def share(result):
                return f"{result['flops'] / result['seconds'] / rate[dtype]:.0%}"

            print(
                f"| {workload} | {dtype} | {one['seconds']:.3f} | {other['seconds']:.3f} | "
                f"{other['seconds'] / one['seconds']:.2f} | {one['flops'] / 1e9:.1f} | {other['flops'] / 1e9:.1f} | "
                f"{share(one)} | {share(other)} | {one['peak_mib']} | {other['peak_mib']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
