#!/usr/bin/env python3
"""A training step of `bench-small` (forward, backward, Muon): `moonlight-train`, and transformers with torch.optim.Muon, in turns.

    cargo build --release --example bench_step
    python scripts/bench/bench_step.py --ours target/release/examples/bench_step --rounds 3
    python scripts/bench/bench_step.py --ours target/release/examples/bench_step --micro-batches 8    # more tokens per step

The other program is DeepseekV3ForCausalLM with grouped experts (`grouped_mm`, or `--experts eager`), torch.optim.Muon on every hidden
matrix and torch.optim.AdamW on embedding, head and norms. torch.optim.Muon takes only matrices, so each expert's matrices are passed
as views of the stacked weights, with gate and up separate; routers are matrices too, as in ours. It iterates in bf16 and has no
option to change that: `--newton-schulz f32` replaces the dtype, `bf16` keeps it, and ours is set to the same. Everything else is f32.

In a round each program runs once, in its own process, in an order that is reversed in every second round. A value is the median of a
run's repeats after one step to warm up, a ratio the median over rounds. The optimizer's share is its time over that of its step. Memory
is the peak of the process. One line of JSON on stdout, progress on stderr.

Needs: torch 2.9 or newer, transformers (group `bench`), the example `bench_step`. Takes: some minutes.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from bench_transformers import SHAPE


def main():
    parser = common.parser(__doc__)
    parser.add_argument(
        "--ours", metavar="BINARY", help="the `bench_step` example of moonlight-train, built for release"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps in a run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches per step, their gradients summed")
    parser.add_argument("--newton-schulz", choices=("f32", "bf16"), default="f32", help="dtype of its products")
    parser.add_argument("--experts", choices=("grouped_mm", "eager"), default="grouped_mm")
    parser.add_argument("--only-ours", action="store_true", help="only our program")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(torch_run(options)))
        return

    sizes = [options.repeats, options.batch, options.sequence, options.micro_batches]
    programs = {}
    if options.ours:
        programs["ours"] = [options.ours, *map(str, sizes), options.newton_schulz]
    if not options.only_ours:
        names = ("repeats", "batch", "sequence", "micro_batches", "newton_schulz", "experts")
        given = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
        programs["torch"] = [sys.executable, __file__, "--peer", *given]
    runs = {name: [] for name in programs}
    for number, name in common.in_turns(programs, options.rounds):
        result = common.measure(*programs[name])
        runs[name].append(result)
        common.print_progress(
            f"round {number}  {name:6} {statistics.median(result['seconds']):7.3f} s per step, the optimizer "
            f"{result['optimizer_share']:.1%} of it, {result['peak_rss_mib']} MiB"
        )
    print(json.dumps(summary(runs, options)))


def summary(runs, options):
    tokens = options.batch * options.sequence * options.micro_batches
    result = {"tokens": tokens, "newton_schulz": options.newton_schulz, "rounds": options.rounds}

    def middle(run, key):
        return statistics.median(run[key])

    for name, several in runs.items():
        result[name] = {
            "seconds": round(statistics.median(middle(run, "seconds") for run in several), 3),
            "seconds_of_rounds": [round(middle(run, "seconds"), 3) for run in several],
            "optimizer_seconds": round(statistics.median(middle(run, "optimizer_seconds") for run in several), 3),
            "optimizer_share": round(statistics.median(run["optimizer_share"] for run in several), 4),
            "peak_rss_mib": max(run["peak_rss_mib"] for run in several),
        }
    if len(runs) == 2:
        pairs = list(zip(runs["ours"], runs["torch"]))

        def of(key):
            return [middle(theirs, key) / middle(ours, key) for ours, theirs in pairs]

        result["ours over torch"] = {
            "step": round(statistics.median(of("seconds")), 3),
            "step_of_rounds": [round(ratio, 3) for ratio in of("seconds")],
            "optimizer": round(statistics.median(of("optimizer_seconds")), 3),
            "optimizer_of_rounds": [round(ratio, 3) for ratio in of("optimizer_seconds")],
            "memory": round(result["ours"]["peak_rss_mib"] / result["torch"]["peak_rss_mib"], 3),
        }
    return result


def muon_matrices(model):
    """The matrices of Muon, each a parameter that shares the model's memory, with the parameter whose gradient contains its own."""
    import torch

    views, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "embed_tokens" in name or "lm_head" in name:
            rest.append(parameter)
            continue
        stack = parameter if parameter.ndim == 3 else parameter[None]
        parts = 2 if "gate_up_proj" in name else 1
        size = stack.shape[1] // parts
        for expert in range(stack.shape[0]):
            for part in range(parts):
                rows = slice(part * size, (part + 1) * size)

                def cut(whole, expert=expert, rows=rows):
                    return (whole if whole.ndim == 3 else whole[None])[expert, rows]

                views.append((torch.nn.Parameter(cut(parameter.data)), parameter, cut))
    return views, rest


def torch_run(options):
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(1)
    config = transformers.DeepseekV3Config(**SHAPE)
    config._attn_implementation = "sdpa"
    config._experts_implementation = options.experts
    model = transformers.DeepseekV3ForCausalLM(config).float().train()
    assert model.config._experts_implementation == options.experts
    views, rest = muon_matrices(model)
    muon = torch.optim.Muon([view for view, _, _ in views], lr=3e-4, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    shape = (options.micro_batches, options.batch, options.sequence)
    tokens, targets = (torch.randint(0, SHAPE["vocab_size"], shape) for _ in range(2))

    def optimize():
        half = torch.bfloat16
        if options.newton_schulz == "f32":
            torch.bfloat16 = torch.float32
        try:
            for view, parameter, cut in views:
                view.grad = cut(parameter.grad)
            muon.step()
            adamw.step()
        finally:
            torch.bfloat16 = half

    def step():
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        for view, _, _ in views:
            view.grad = None
        for inputs, labels in zip(tokens, targets):
            logits = model(inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            (loss / tokens.numel()).backward()
            del logits, loss
        passed = time.perf_counter()
        optimize()
        end = time.perf_counter()
        return end - start, end - passed

    before = views[-1][1].detach().clone()
    step()
    assert not torch.equal(before, views[-1][1]), "the step reaches the model's own weights"
    times = sorted(step() for _ in range(options.repeats))
    shares = sorted(optimizer / whole for whole, optimizer in times)
    return {
        "seconds": [whole for whole, _ in times],
        "optimizer_seconds": [optimizer for _, optimizer in times],
        "optimizer_share": shares[len(shares) // 2],
        "peak_rss_mib": common.memory_mib(),
        "matrices": len(views),
    }


if __name__ == "__main__":
    main()
