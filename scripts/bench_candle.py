#!/usr/bin/env python3
"""candle's DeepSeek-V2 beside ours, f32: reading a prompt, and decoding, in turns.

    cargo build --release --workspace --examples
    (cd scripts/candle && cargo build --release)
    python scripts/bench_candle.py target/release/examples scripts/candle/target/release/candle-bench

Two shapes. `bench-small` whole: a prompt of 512 tokens by `bench --infer`, 48 tokens decoded by `bench_decoding`. One layer of
Moonlight-16B: 512 tokens by `bench_block`. A ratio is the median over rounds of ours over candle's. candle gives the logits of
a prompt's last token alone, ours those of every token; what else differs stands in `scripts/candle/src/main.rs`. One line of
JSON on stdout, progress on stderr.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

TOKENS = 512


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=pathlib.Path, help="where the examples of moonlight-model were built")
    parser.add_argument("candle", help="the program of scripts/candle")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ours = options.examples
    prompt = ["--repeats", "3"]
    programs = {
        ("bench-small", "prompt"): [ours / "bench", "--infer", "--batch", "1", "--sequence", str(TOKENS), *prompt],
        ("bench-small", "decoding"): [ours / "bench_decoding", "48"],
        ("moonlight-block", "prompt"): [ours / "bench_block", "--tokens", str(TOKENS), *prompt],
    }
    rates = {place: {"ours": [], "candle": []} for place in programs}
    for round_ in range(options.rounds):
        for who in ("ours", "candle")[:: 1 if round_ % 2 == 0 else -1]:
            if who == "ours":
                for place, program in programs.items():
                    rates[place]["ours"].append(said_by(program)["tokens_per_second"])
            else:
                for shape in ("bench-small", "moonlight-block"):
                    said = said_by([options.candle, "--shape", shape, "--tokens", str(TOKENS), *prompt])
                    rates[shape, "prompt"]["candle"].append(said["tokens_per_second"])
                    if (shape, "decoding") in rates:
                        rates[shape, "decoding"]["candle"].append(1e3 / said["milliseconds_per_step"])
        print(f"round {round_ + 1} of {options.rounds}", file=sys.stderr)
    print(json.dumps({" ".join(place): compared(**several) for place, several in rates.items()}))


def said_by(program):
    command = [str(part) for part in program]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def compared(ours, candle):
    ratios = [our / their for our, their in zip(ours, candle)]
    return {
        "ours, tokens/s": [round(rate, 1) for rate in ours],
        "candle, tokens/s": [round(rate, 1) for rate in candle],
        "speed": round(statistics.median(ratios), 2),
        "speed_of_rounds": [round(ratio, 2) for ratio in ratios],
    }


if __name__ == "__main__":
    main()
