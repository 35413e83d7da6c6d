#!/usr/bin/env python3
"""Forward plus backward of `bench-small`: transformers' DeepseekV3ForCausalLM, alone or side by side with ours.

    cargo build --release -p moonlight-model --example bench
    python scripts/bench_transformers.py --ours target/release/examples/bench --rounds 3
    python scripts/bench_transformers.py --experts eager           # transformers alone, one of its ways with experts

transformers computes experts in two ways that fit a CPU, and both are measured: `grouped_mm` (torch's grouped product;
it runs on the CPU in f32, but slowly) and `eager` (a loop over the experts that have tokens, which is the faster of the
two there). Its third, `batched_mm`, copies the weights of every chosen expert for every token: 12 GB here.

A round runs each program once, in a process of its own, so that neither sees the other's memory; the order changes from
round to round. Tokens a second are the batch over the median of a run's repeats (after one step to warm up), and a
ratio is the median over rounds of ours over theirs. Memory is the most that the process ever held (VmHWM); the part
that a process holds before it has a model is printed too. One line of JSON on stdout, progress on stderr.

Both take 2,048 random tokens in f32 and the threads that their libraries choose; neither updates weights.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", metavar="BINARY", help="the `bench` example of moonlight-model, built for release")
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the two programs")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps in a run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--experts", choices=EXPERTS, help="only this `experts_implementation`")
    parser.add_argument("--threads", type=int, help="torch's threads and Rayon's (default: what each chooses)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(transformers_run(options)))
        return

    ways = [options.experts] if options.experts else EXPERTS
    programs = {f"transformers {way}": [sys.executable, __file__, "--worker", *flags(options, way)] for way in ways}
    if options.ours:
        programs["ours"] = [options.ours, str(options.repeats), str(options.batch), str(options.sequence)]
    runs = {name: [] for name in programs}
    for round_ in range(options.rounds):
        for name in list(programs)[:: 1 if round_ % 2 == 0 else -1]:
            result = json.loads(output(programs[name], options.threads))
            runs[name].append(result)
            note = f"{result['tokens_per_second']:8.1f} tokens/s  {result['peak_rss_mib']:6} MiB"
            print(f"round {round_ + 1}  {name:23}  {note}", file=sys.stderr)
    print(json.dumps(summary(runs, options)))


def flags(options, experts):
    names = ("repeats", "batch", "sequence")
    given = [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
    return given + ["--experts", experts] + (["--threads", str(options.threads)] if options.threads else [])


def output(command, threads):
    environment = dict(os.environ)
    if threads:
        environment |= {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def summary(runs, options):
    result = {"batch": options.batch, "sequence": options.sequence, "rounds": options.rounds}
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

    transformers.utils.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    before = memory_mib("VmHWM")
    torch.manual_seed(1)
    config = transformers.DeepseekV3Config(**SHAPE)
    config._attn_implementation = "sdpa"
    config._experts_implementation = options.experts
    model = transformers.DeepseekV3ForCausalLM(config).float().train()
    assert model.config._attn_implementation == "sdpa" and model.config._experts_implementation == options.experts
    shape = (options.batch, options.sequence)
    tokens, targets = (torch.randint(0, SHAPE["vocab_size"], shape) for _ in range(2))

    def step():
        model.zero_grad(set_to_none=True)
        logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss.backward()

    step()
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    return {
        "tokens_per_second": options.batch * options.sequence / statistics.median(seconds),
        "seconds": seconds,
        "peak_rss_mib": memory_mib("VmHWM"),
        "rss_before_model_mib": before,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def memory_mib(key):
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
