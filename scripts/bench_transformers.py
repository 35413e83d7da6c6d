#!/usr/bin/env python3
"""Forward plus backward of `bench-small`: transformers' DeepseekV3ForCausalLM, alone or side by side with ours.

    cargo build --release -p moonlight-model --example bench
    python scripts/bench_transformers.py --ours target/release/examples/bench --rounds 3 [--dtype bf16]
    python scripts/bench_transformers.py --experts eager           # transformers alone, one of its ways with experts

transformers computes experts in two ways that fit a CPU, and both are measured: `grouped_mm` (torch's grouped product)
and `eager` (a loop over the experts that have tokens). Its third, `batched_mm`, copies the weights of every chosen
expert for every token: 12 GB here.

A round runs each program once, in a process of its own, so that neither sees the other's memory; the order changes from
round to round. Tokens a second are the batch over the median of a run's repeats (after one step to warm up), and a
ratio is the median over rounds of ours over theirs. Memory is the most that the process ever held (VmHWM); the part
that a process holds before it has a model is printed too. One line of JSON on stdout, progress on stderr.

Both take 2,048 random tokens and the threads that their libraries choose; neither updates weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", metavar="BINARY", help="the `bench` example of moonlight-model, built for release")
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the programs")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps in a run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--experts", choices=EXPERTS, help="only this `experts_implementation`")
    parser.add_argument("--threads", type=int, help="torch's threads and Rayon's (default: what each chooses)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(transformers_run(options)))
        return

    shape = [part for name in ("repeats", "batch", "sequence", "dtype") for part in (f"--{name}", str(getattr(options, name)))]
    ways = [options.experts] if options.experts else EXPERTS
    programs = {way_name(way): [sys.executable, __file__, "--worker", *shape, "--experts", way] for way in ways}
    if options.ours:
        programs["ours"] = [options.ours, *shape]
    runs = in_turns(programs, options.rounds, options.threads)
    print(json.dumps({"dtype": options.dtype, "batch": options.batch, "sequence": options.sequence} | summary(runs)))


def way_name(way):
    return f"transformers {way}"


def in_turns(programs, rounds, threads=None):
    """What each program said of itself in each round, by name; the order of the programs changes from round to round."""
    environment = dict(os.environ)
    if threads:
        environment |= {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    runs = {name: [] for name in programs}
    for round_ in range(rounds):
        for name in list(programs)[:: 1 if round_ % 2 == 0 else -1]:
            said = subprocess.run(programs[name], check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            result = json.loads(said)
            runs[name].append(result)
            note = f"{result['tokens_per_second']:8.1f} tokens/s  {result['peak_rss_mib']:6} MiB"
            print(f"round {round_ + 1}  {name:23}  {note}", file=sys.stderr)
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

    before = memory_mib("VmHWM")
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
    """transformers' configuration of a shape; the random numbers begin anew."""
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
    """Runs a step of so many tokens, once to warm up and then `repeats` times, and says what `in_turns` wants."""
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
        "peak_rss_mib": memory_mib("VmHWM"),
        "rss_before_model_mib": before,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def memory_mib(key):
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
