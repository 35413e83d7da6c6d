#!/usr/bin/env python3
"""Forward plus backward of `bench-small`: transformers' DeepseekV3ForCausalLM, alone or in turns with `moonlight-model`.

    cargo build --release -p moonlight-model --example bench
    python scripts/bench/bench_transformers.py --ours target/release/examples/bench --rounds 3 [--dtype bf16]
    python scripts/bench/bench_transformers.py --experts eager     # transformers alone, with one implementation of experts

transformers has two implementations of experts that fit a CPU, and both are measured: `grouped_mm` (torch's grouped product) and
`eager` (a loop over the experts that have tokens). A third, `batched_mm`, copies the weights of every chosen expert for every
token, which is 12 GB here.

In a round each program runs once, in its own process, so that neither sees the other's memory; the order is reversed in every
second round. Tokens per second are the tokens of a batch over the median of a run's repeats, after one step to warm up. A ratio is
the median over rounds of ours over theirs. Memory is the peak of the process (VmHWM); its memory before the model is loaded is
printed as well. One line of JSON on stdout, progress on stderr.

Both programs process 2,048 random tokens with the number of threads that their libraries choose. Neither updates weights.

Needs: torch, transformers (group `bench`), the example `bench`. Takes: some minutes.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "moe_intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 2,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "num_mtp_layers": 0,
}
EXPERTS = ("grouped_mm", "eager")
DTYPES = ("f32", "bf16")


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--ours", metavar="BINARY", help="the `bench` example of moonlight-model, built for release")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps in a run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--experts", choices=EXPERTS, help="only this `experts_implementation` of transformers")
    parser.add_argument("--threads", type=int, help="threads of torch and of Rayon [default: each library's own]")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(transformers_run(options)))
        return

    shape = [
        part
        for name in ("repeats", "batch", "sequence", "dtype")
        for part in (f"--{name}", str(getattr(options, name)))
    ]
    ways = [options.experts] if options.experts else EXPERTS
    programs = {way_name(way): [sys.executable, __file__, "--peer", *shape, "--experts", way] for way in ways}
    if options.ours:
        programs["ours"] = [options.ours, *shape]
    runs = run_in_turns(programs, options.rounds, options.threads)
    print(json.dumps({"dtype": options.dtype, "batch": options.batch, "sequence": options.sequence} | summary(runs)))


def way_name(way):
    return f"transformers {way}"


def run_in_turns(programs, rounds, threads=None):
    """The measurements of each program in each round, by name."""
    runs = {name: [] for name in programs}
    for number, name in common.in_turns(programs, rounds):
        result = common.measure(*programs[name], env=common.thread_settings(threads))
        runs[name].append(result)
        note = f"{result['tokens_per_second']:8.1f} tokens/s  {result['peak_rss_mib']:6} MiB"
        common.print_progress(f"round {number}  {name:23}  {note}")
    return runs


def summary(runs):
    result = {"rounds": len(next(iter(runs.values())))}
    for name, several in runs.items():
        result[name] = {
            "tokens_per_second": round(statistics.median(run["tokens_per_second"] for run in several), 1),
            "tokens_per_second_of_rounds": [round(run["tokens_per_second"], 1) for run in several],
            "peak_rss_mib": max(run["peak_rss_mib"] for run in several),
        }
        if name != "ours":
            result[name] |= {key: several[0][key] for key in ("rss_before_model_mib", "threads", "versions")}
        if name != "ours" and "ours" in runs:
            ratios = [
                ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in zip(runs["ours"], several)
            ]
            ours_peak = max(run["peak_rss_mib"] for run in runs["ours"])
            result[f"ours over {name}"] = {
                "speed": round(statistics.median(ratios), 3),
                "speed_of_rounds": [round(ratio, 3) for ratio in ratios],
                "memory": round(ours_peak / result[name]["peak_rss_mib"], 3),
            }
    return result


def transformers_run(options):
    import torch
    import transformers

    before = common.memory_mib()
    config = prepared_config(SHAPE, options.experts)
    model = transformers.DeepseekV3ForCausalLM(config).to(torch_dtype(options.dtype)).train()
    assert model.config._attn_implementation == "sdpa" and model.config._experts_implementation == options.experts
    shape = (options.batch, options.sequence)
    tokens, targets = (torch.randint(0, SHAPE["vocab_size"], shape) for _ in range(2))

    def step():
        model.zero_grad(set_to_none=True)
        logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss.backward()

    return timed(step, options.repeats, options.batch * options.sequence, before)


def prepared_config(shape, experts):
    """The config of a shape for transformers. Seeds torch, so that every program draws the same weights."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(1)
    config = transformers.DeepseekV3Config(**shape)
    config._attn_implementation = "sdpa"
    config._experts_implementation = experts
    return config


def torch_dtype(name):
    import torch

    return {"f32": torch.float32, "bf16": torch.bfloat16}[name]


def timed(step, repeats, tokens, before):
    """Runs a step over that many tokens, once to warm up and then `repeats` times, and returns the dictionary that `run_in_turns` reads."""
    import torch
    import transformers

    step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    return {
        "tokens_per_second": tokens / statistics.median(seconds),
        "seconds": seconds,
        "peak_rss_mib": common.memory_mib(),
        "rss_before_model_mib": before,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    main()
