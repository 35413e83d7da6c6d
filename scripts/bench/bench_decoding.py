#!/usr/bin/env python3
"""Decoding with batch 1: `moonlight-model` and transformers' DeepseekV3ForCausalLM with its cache, in turns.

    cargo build --release --workspace --example bench_decoding
    python scripts/bench/bench_decoding.py target/release/examples/bench_decoding [--dtype bf16] [--shape moonlight-block]

`moonlight-block` is the first dense and the first mixture-of-experts layer of Moonlight-16B at full size, with a vocabulary of 8,192.
Milliseconds per token are the median of a run. A ratio is the median over rounds of theirs over ours. transformers is measured with
both implementations of experts that fit a CPU. One line of JSON on stdout, progress on stderr.

Needs: torch, transformers (group `bench`), the example `bench_decoding`. Takes: some minutes.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import bench_block
import bench_transformers
import common
from bench_transformers import DTYPES, EXPERTS, prepared_config, torch_dtype, way_name

PROMPT, TOKENS = 16, 48
SHAPES = {"bench-small": bench_transformers.SHAPE, "moonlight-block": bench_block.SHAPE | {"vocab_size": 8192}}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("ours", nargs="?", help="the `bench_decoding` example of moonlight-model, built for release")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--shape", choices=SHAPES, default="bench-small")
    parser.add_argument("--peer", choices=EXPERTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps({"milliseconds_per_step": transformers_run(options)}))
        return
    given = ["--dtype", options.dtype, "--shape", options.shape]
    programs = {way_name(way): [sys.executable, __file__, "--peer", way, *given] for way in EXPERTS}
    programs["ours"] = [options.ours, str(TOKENS), "1", options.dtype, options.shape]
    runs = {name: [] for name in programs}
    for number, name in common.in_turns(programs, options.rounds):
        result = common.measure(*programs[name])
        runs[name].append(result)
        common.print_progress(f"round {number}  {name:23}  {result['milliseconds_per_step']:7.2f} ms per token")
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
    model = transformers.DeepseekV3ForCausalLM(prepared_config(shape, options.peer)).eval()
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
