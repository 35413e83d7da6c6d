#!/usr/bin/env python3
"""All of Moonlight-16B in 4 bits on a small machine: loading, decoding, LoRA steps, and peak memory next to what `moonlight plan` predicts.

    cargo build --release --workspace --bins --examples
    target/release/examples/synthetic_checkpoint runs/moonlight-16b-int4 --quantize int4       # 9 GB, random weights
    python scripts/bench/bench_moonlight_16b.py runs/moonlight-16b-int4 --moonlight target/release/moonlight \\
        --generate target/release/examples/bench_generate

The folder is a packed checkpoint of Moonlight-16B. With random weights the routers send random tokens to few experts, which the log shows as
`imbalance` and `dead`, so that fewer weights are read than with published ones. `--layers 3` in the second command makes a small model, to try the script.

* `first token`: from the start of `moonlight generate` to its end, for a prompt of 16 tokens and one new one; with the files in the page cache,
  and (as root) not in it.
* `decode`: tokens per second, 64 given tokens after a context of 16.
* `lora`: `configs/moonlight-16b-lora-cpu.toml` with sequences of 256 and of 1,024 random tokens and adapters on attention; 256 tokens with
  adapters on everything. Seconds of a step are those between two steps in `metrics.jsonl`, without the first. The largest resident memory of the
  process is compared with `peak_bytes` of `moonlight plan`.

One line of JSON for each on stdout, then a table in Markdown; exits with 1 if a peak is not within 5 % of its prediction. `--part` selects.

Needs: only Python; 24 GB of memory and 9 GB of disk. Takes: 15 minutes on two cores.
"""

import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

RECIPE = common.ROOT / "configs" / "moonlight-16b-lora-cpu.toml"
PARTS = ("first token", "decode", "lora")
# Sequence length and adapters.
LORA = [(256, "attention"), (1024, "attention"), (256, "all")]
# Of a peak from its prediction.
TOLERANCE = 0.05
PROMPT, DECODED = 16, 64


def main():
    parser = common.parser(__doc__)
    parser.add_argument("model", type=pathlib.Path, help="the folder of the packed checkpoint")
    parser.add_argument("--moonlight", type=common.program, required=True, help="the built `moonlight`")
    parser.add_argument("--generate", type=common.program, required=True, help="the example `bench_generate`")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each LoRA run")
    parser.add_argument("--quantize", default="int4", help="what the recipe and `bench_generate` get")
    options = parser.parse_args()
    options.model = options.model.resolve()
    vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
    measure = {"first token": first_token, "decode": decode, "lora": lora}
    lines = []
    for part in options.part or PARTS:
        for line in measure[part](options, random.Random(1), vocab_size):
            print(json.dumps(line), flush=True)
            lines.append(line)
    print(table(lines))
    wrong = [line["what"] for line in lines if abs(line.get("peak_over_plan", 1) - 1) > TOLERANCE]
    for what in wrong:
        print(f"FAILED {what}: the peak memory is not within 5 % of the prediction")
    sys.exit(bool(wrong))


def run(*command):
    """Runs a program; returns seconds and its largest resident memory in bytes. Ends the script if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=sys.stderr)
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} {command[1]} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


def first_token(options, numbers, vocab_size):
    prompt = ",".join(str(numbers.randrange(vocab_size)) for _ in range(PROMPT))
    command = [
        options.moonlight,
        "generate",
        "--model",
        options.model,
        "--dtype",
        "bf16",
        "--quantize",
        options.quantize,
    ]
    command += ["--prompt-tokens", prompt, "--max-new-tokens", "1", "--quiet"]
    for state in ("warm", "cold") if os.geteuid() == 0 else ("warm",):
        found = []
        for number in range(options.rounds + 1):
            if state == "cold":
                os.sync()
                pathlib.Path("/proc/sys/vm/drop_caches").write_text("1\n", encoding="ascii")
            seconds, peak = run(*command)
            # The first round with warm files only reads them.
            if state == "cold" or number > 0:
                found.append((seconds, peak))
            common.print_progress(f"first token, {state}: {seconds:.1f} s, {peak / 1e9:.2f} GB")
        seconds = [seconds for seconds, _ in found]
        yield {
            "what": f"first token, files {state}",
            "unit": "s",
            "values": seconds,
            "peak": max(peak for _, peak in found),
        }


def decode(options, numbers, vocab_size):
    command = [str(part) for part in [options.generate, options.model, "bf16", options.quantize]]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    load = json.loads(process.stdout.readline())["load_seconds"]
    common.print_progress(f"loaded in {load:.1f} s")
    rates, prompts = [], []
    for _ in range(options.rounds):
        request = {
            "prompt": [numbers.randrange(vocab_size) for _ in range(PROMPT)],
            "forced": [numbers.randrange(vocab_size) for _ in range(DECODED)],
        }
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        rates.append(DECODED / answer["seconds"])
        prompts.append(answer["prompt_seconds"])
        common.print_progress(f"decode: {rates[-1]:.2f} tokens/s, prompt of {PROMPT} tokens {prompts[-1]:.2f} s")
    process.stdin.close()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    yield {"what": "loading", "unit": "s", "values": [load]}
    yield {"what": f"prompt of {PROMPT} tokens", "unit": "s", "values": prompts}
    yield {"what": "decoding", "unit": "tokens/s", "values": rates, "peak": usage.ru_maxrss * 1024}


def lora(options, numbers, vocab_size):
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        lines = []
        for _ in range(64):
            lines.append(json.dumps({"tokens": [numbers.randrange(vocab_size) for _ in range(1100)]}) + "\n")
        (home / "tokens.jsonl").write_text("".join(lines))
        for length, targets in LORA:
            name = f"{targets}-{length}"
            settings = {
                "run.dir": str(home),
                "run.name": name,
                "model.path": str(options.model),
                "model.quantize": options.quantize,
                "lora.targets": [targets],
                "data.format": "tokens",
                "data.tokenizer": "none",
                "data.train": [str(home / "tokens.jsonl")],
                "data.valid_fraction": 0.0,
                "data.sequence_length": length,
                "data.cache_dir": str(home / "cache"),
                "train.steps": options.steps,
                "train.validate_every": 0,
                "train.checkpoint_every": 0,
                "schedule.warmup_steps": 0,
            }
            sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
            plan = json.loads(common.call(options.moonlight, "plan", RECIPE, *sets, "--json"))
            _, peak = run(options.moonlight, "train", RECIPE, *sets)
            metrics = [json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in metrics if line["split"] == "train"]
            seconds = [
                (after["tokens"] - before["tokens"]) / after["tokens_per_second"]
                for before, after in zip(steps, steps[1:])
            ]
            yield {
                "what": f"LoRA step of {length} tokens, adapters on {'everything' if targets == 'all' else targets}",
                "unit": "s",
                "values": seconds,
                "losses": [line["loss"] for line in steps],
                "peak": peak,
                "planned": plan["peak_bytes"],
                "peak_over_plan": peak / plan["peak_bytes"],
            }


def table(lines):
    text = "\n| | median | lowest to highest | peak memory | predicted |\n|---|---|---|---|---|\n"
    for line in lines:
        values = line["values"]
        cells = [
            line["what"],
            f"{statistics.median(values):.3g} {line['unit']}",
            f"{min(values):.3g} to {max(values):.3g}",
        ]
        cells.append(f"{line['peak'] / 1e9:.2f} GB" if "peak" in line else "")
        cells.append(f"{line['planned'] / 1e9:.2f} GB" if "planned" in line else "")
        text += f"| {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    main()
