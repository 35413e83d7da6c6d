#!/usr/bin/env python3
"""candle's DeepSeek-V2 and `moonlight-model`, in turns, f32: prefill and decode.

    cargo build --release --workspace --examples
    (cd scripts/bench/candle && cargo build --release)
    python scripts/bench/bench_candle.py target/release/examples scripts/bench/candle/target/release/candle-bench

Two shapes: `bench-small` with a prompt of 512 tokens (`bench --infer`) and 48 decoded tokens (`bench_decoding`); and one layer of
Moonlight-16B with 512 tokens (`bench_block`). A ratio is the median over rounds of ours over candle's. candle computes the logits of a
prompt's last token only, ours those of every token; `scripts/bench/candle/src/main.rs` lists the other differences. One line of JSON on
stdout, progress on stderr.

Needs: only Python, and the programs above. Takes: some minutes, and ten to build candle.
"""

import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

TOKENS = 512


def main():
    parser = common.parser(__doc__)
    parser.add_argument("examples", type=pathlib.Path, help="the folder of the built examples")
    parser.add_argument("candle", help="the program of scripts/bench/candle")
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
    for number, which in common.in_turns(("ours", "candle"), options.rounds):
        common.print_progress(f"round {number} of {options.rounds}: {which}")
        if which == "ours":
            for place, program in programs.items():
                rates[place]["ours"].append(common.measure(*program)["tokens_per_second"])
        else:
            for shape in ("bench-small", "moonlight-block"):
                result = common.measure(options.candle, "--shape", shape, "--tokens", TOKENS, *prompt)
                rates[shape, "prompt"]["candle"].append(result["tokens_per_second"])
                if (shape, "decoding") in rates:
                    rates[shape, "decoding"]["candle"].append(1e3 / result["milliseconds_per_step"])
    print(json.dumps({" ".join(place): compared(**several) for place, several in rates.items()}))


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
