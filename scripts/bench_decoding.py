#!/usr/bin/env python3
"""Decoding, batch 1: ours and transformers' DeepseekV3ForCausalLM with its cache, in turns.

    cargo build --release --workspace --example bench_decoding
    python scripts/bench_decoding.py target/release/examples/bench_decoding [--dtype bf16] [--shape moonlight-block]

`moonlight-block` is Moonlight-16B's first dense and first mixture layer at their own size, with a vocabulary of 8192.
Milliseconds a token are the median of a run; a ratio is the median over rounds of theirs over ours. transformers is
measured with each of its two ways with experts that fit a CPU. One line of JSON on stdout, progress on stderr.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import bench_block
import bench_transformers
from bench_transformers import DTYPES, EXPERTS, prepared_config, torch_dtype, way_name

PROMPT, TOKENS = 16, 48
SHAPES = {"bench-small": bench_transformers.SHAPE, "moonlight-block": bench_block.SHAPE | {"vocab_size": 8192}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", nargs="?", help="the `bench_decoding` example of moonlight-model, built for release")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--shape", choices=SHAPES, default="bench-small")
    parser.add_argument("--worker", choices=EXPERTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps({"milliseconds_per_step": transformers_run(options)}))
        return
    given = ["--dtype", options.dtype, "--shape", options.shape]
    programs = {way_name(way): [sys.executable, __file__, "--worker", way, *given] for way in EXPERTS}
    programs["ours"] = [options.ours, str(TOKENS), "1", options.dtype, options.shape]
    runs = {name: [] for name in programs}
    for round_ in range(options.rounds):
        for name in list(programs)[:: 1 if round_ % 2 == 0 else -1]:
            result = json.loads(subprocess.run(programs[name], check=True, stdout=subprocess.PIPE, text=True).stdout)
            runs[name].append(result)
            print(f"round {round_ + 1}  {name:23}  {result['milliseconds_per_step']:7.2f} ms a token", file=sys.stderr)
    summary = {"shape": options.shape, "dtype": options.dtype, "rounds": options.rounds}
    ours = [run["milliseconds_per_step"] for run in runs["ours"]]
    summary["share of the bound"] = [round(run["share_of_bound"], 3) for run in runs["ours"]]
    summary["ours, ms"] = [round(value, 2) for value in ours]
    for name, several in runs.items():
        if name != "ours":
            theirs = [run["milliseconds_per_step"] for run in several]
            ratios = [their / our for their, our in zip(theirs, ours)]
            summary[name] = {
                "ms": [round(value, 2) for value in theirs],
                "over ours": round(statistics.median(ratios), 2),
                "of rounds": [round(ratio, 2) for ratio in ratios],
            }
    print(json.dumps(summary))


def transformers_run(options):
    import torch
    import transformers

    shape = SHAPES[options.shape]
    torch.set_default_dtype(torch_dtype(options.dtype))
    model = transformers.DeepseekV3ForCausalLM(prepared_config(shape, options.worker)).eval()
    torch.set_default_dtype(torch.float32)
    model = model.to(torch_dtype(options.dtype))
    tokens = torch.randint(0, shape["vocab_size"], (1, PROMPT + TOKENS))
    milliseconds = []
    with torch.inference_mode():
        cache = model(tokens[:, :PROMPT], use_cache=True).past_key_values
        for index in range(PROMPT, PROMPT + TOKENS):
            start = time.perf_counter()
            output = model(tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            milliseconds.append(1e3 * (time.perf_counter() - start))
    return statistics.median(milliseconds[1:])


if __name__ == "__main__":
    main()
