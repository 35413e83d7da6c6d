#!/usr/bin/env python3
"""Prefill and decoding next to llama.cpp's own library: the same GGUF file, the same tokens, the same number of threads, in turns.

    cargo build --release -p moonlight-convert --bin moonlight-convert -p moonlight-infer --example bench_generate
    python scripts/bench/bench_llama_cpp.py --ours target/release/examples/bench_generate --converter target/release/moonlight-convert \\
        --models runs/llama-cpp

The shape `A` is `bench-small`; `B` is the first two layers of Moonlight-16B at full size with a vocabulary of 8,192. Their weights are random.
A file `SHAPE-TYPE.gguf` that is not in the folder `--models` is made: random weights by transformers, converted by `moonlight-convert`.

For each shape and type both programs load the file once. In every round each of them runs a prompt of 512 tokens, then 128 given tokens one
at a time after a context of 16 and of 4,096 tokens; the other one is stopped meanwhile. A token's time includes the choice of the next one.
The conditions are `idle`, `low` (another process keeps one core busy, at the lowest priority) and `equal` (at the same priority).
llama.cpp has the settings of its own programs (keys and values in f16, its choice of flash attention, repacked weights, threads that stay).

A line of JSON on stdout for each shape, type, condition and quantity: tokens per second of each round, and for each round the ratio of ours to
llama.cpp's. Then a table in Markdown with medians and spreads. Progress on stderr. `--require RATIO` fails if a median ratio is below that.
The share of equal most likely tokens is printed, too: with random weights many tokens are about equally likely, so that rounding changes it.
Each round also reports how many cores other processes used meanwhile, without the neighbor. `--others 0.1 --retries 5` repeats a round in which
that was more than a tenth of a core, up to five times.

Needs: llama.cpp's library (fetched by npm, or in `--llama`); torch, transformers (group `bench`) to make a shape. Takes: 10 minutes a shape.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "parity"))
import bench_block
import bench_transformers
import common
import llama_cpp

# Of both: transformers' own defaults are those of DeepSeek-V3.
COMMON = {"rope_theta": 50_000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "norm_topk_prob": True}
SHAPES = {
    "A": bench_transformers.SHAPE | COMMON,
    "B": bench_block.SHAPE | COMMON | {"vocab_size": 8192},
}
# For each type of file the dtype in which ours keeps what is not quantized; blocks of 8 and 4 bits stay as they are in the file.
TYPES = {"f32": "f32", "bf16": "bf16", "q8_0": "bf16", "q4_0": "bf16"}
PREFILL, DECODED, SHORT, LONG = 512, 128, 16, 4096
QUANTITIES = {"prefill": "prefill of 512", "short": "decoding after 16", "long": "decoding after 4,096"}
LOADS = {"idle": None, "low": 19, "equal": 0}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--ours", type=common.program, help="the example `bench_generate` of moonlight-infer")
    parser.add_argument("--converter", type=common.program, help="the built `moonlight-convert`, to make missing files")
    parser.add_argument("--models", type=pathlib.Path, help="the folder of the files `SHAPE-TYPE.gguf`")
    parser.add_argument("--llama", type=pathlib.Path, metavar="DIR", help="llama.cpp's libraries [default: from npm]")
    parser.add_argument("--shapes", type=names(SHAPES), default=list(SHAPES), help="e.g. A,B")
    parser.add_argument("--types", type=names(TYPES), default=list(TYPES), help="e.g. f32,q8_0")
    parser.add_argument("--loads", type=names(LOADS), default=list(LOADS), help="e.g. idle,low")
    parser.add_argument("--quantities", type=names(QUANTITIES), default=list(QUANTITIES), help="e.g. prefill,short")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--require", type=float, metavar="RATIO", help="fail if a median ratio is lower")
    parser.add_argument("--others", type=float, default=0.1, metavar="CORES", help="see --retries")
    parser.add_argument("--retries", type=int, default=0, help="of a round that other processes disturb")
    parser.add_argument("--lock", type=pathlib.Path, help="lock this file for each round, for machines that are shared")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return run_llama_cpp(options)
    if not (options.ours and options.models):
        parser.error("--ours and --models are needed")
    lines = []
    for shape in options.shapes:
        for kind in options.types:
            for line in compare(shape, kind, options):
                lines.append(line)
                print(json.dumps(line), flush=True)
    print(table(lines))
    low = [line for line in lines if options.require and line["ratio"] < options.require]
    for line in low:
        print(f"FAILED {line['shape']} {line['type']} {line['load']} {line['quantity']}: {line['ratio']:.2f}")
    sys.exit(bool(low))


def names(known):
    def parse(text):
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"`{unknown[0]}` is none of {', '.join(known)}")
        return found

    return parse


def compare(shape, kind, options):
    """The lines of one file."""
    file = model_file(shape, kind, options)
    given = tokens(SHAPES[shape]["vocab_size"])
    environment = common.thread_settings(options.threads)
    peer = [sys.executable, __file__, "--peer", file, "--threads", options.threads]
    peer += ["--llama", options.llama] if options.llama else []
    commands = {"ours": [options.ours, file, TYPES[kind]], "llama.cpp": peer}
    rates = {
        (load, quantity): {name: [] for name in commands} for load in options.loads for quantity in options.quantities
    }
    others = {key: {name: {} for name in commands} for key in rates}
    equal = {}
    with contextlib.ExitStack() as stack:
        programs = {name: stack.enter_context(Program(command, environment)) for name, command in commands.items()}
        for program in programs.values():  # pages and buffers
            program.ask(given["prefill"][:64], given["forced"][:4])
        # One quantity after the other, because the programs keep the context of the last prompt.
        for quantity in options.quantities:
            chosen = {}
            for load in options.loads:
                for number, name in common.in_turns(programs, options.rounds):
                    if quantity != "prefill":
                        programs[name].ask(given[quantity], given["forced"][:1])
                    found = undisturbed(programs[name], quantity, given, load, options)
                    rate, chosen[name], others[load, quantity][name][number] = found
                    rates[load, quantity][name].append(rate)
                    common.print_progress(
                        f"{shape} {kind} {load:5} {QUANTITIES[quantity]:20} round {number} {name:9} {rate:8.2f} tokens/s"
                    )
            pairs = list(zip(chosen["ours"], chosen["llama.cpp"]))
            equal[quantity] = sum(a == b for a, b in pairs) / len(pairs) if pairs else None
        memory = {name: program.peak_mib() for name, program in programs.items()}
    for (load, quantity), found in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(found["ours"], found["llama.cpp"])]
        yield {
            "shape": shape,
            "type": kind,
            "load": load,
            "quantity": quantity,
            "threads": options.threads,
            **{name: [round(rate, 2) for rate in several] for name, several in found.items()},
            "ratios": [round(ratio, 3) for ratio in ratios],
            "ratio": round(statistics.median(ratios), 3),
            "other_cores": {name: list(several.values()) for name, several in others[load, quantity].items()},
            "equal_tokens": equal[quantity],
            "peak_mib": memory,
        }


def undisturbed(program, quantity, given, load, options):
    """Tokens per second, the most likely tokens, and the cores that other processes used: the attempt with the least of that."""
    attempts = []
    for _ in range(options.retries + 1):
        with locked(options.lock), neighbor(LOADS[load]) as spinning:
            mine = [program.process.pid, *([spinning.pid] if spinning else [])]
            before, busy, own = time.perf_counter(), busy_seconds(), sum(map(cpu_seconds, mine))
            rate, chosen = measured(program, quantity, given)
            busy, own = busy_seconds() - busy, sum(map(cpu_seconds, mine)) - own
        others = max(0.0, (busy - own) / (time.perf_counter() - before))
        attempts.append((others, rate, chosen))
        if others <= options.others:
            break
    others, rate, chosen = min(attempts, key=lambda attempt: attempt[0])
    return rate, chosen, round(others, 2)


def busy_seconds():
    """Seconds of all cores that were not idle, since the system started."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, *rest = map(int, file.readline().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(program, quantity, given):
    """Tokens per second, and the most likely tokens."""
    if quantity == "prefill":
        return PREFILL / program.ask(given["prefill"], [])["prompt_seconds"], []
    answer = program.ask(given[quantity], given["forced"])
    return DECODED / answer["seconds"], answer["chosen"]


def tokens(vocab_size):
    """Pseudo-random tokens, the same for both programs."""
    numbers = random.Random(2024)
    lengths = {"prefill": PREFILL, "short": SHORT, "forced": DECODED, "long": LONG}
    return {name: [numbers.randrange(2, vocab_size) for _ in range(length)] for name, length in lengths.items()}


class Program:
    """A program that answers lines of JSON, and is stopped while it has no question."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.answer()
        self.process.send_signal(signal.SIGSTOP)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def ask(self, prompt, forced):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"prompt": prompt, "forced": forced}) + "\n")
        self.process.stdin.flush()
        answer = self.answer()
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[0]} ended with {self.process.wait()}")
        return json.loads(line)

    def peak_mib(self):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM:"))


def run_llama_cpp(options):
    """Answers as the example `bench_generate` does."""
    start = time.perf_counter()
    library = llama_cpp.Library(options.llama)
    model = llama_cpp.Model(library, options.peer, context=LONG + DECODED, threads=options.threads, exact=False)
    print(json.dumps({"load_seconds": time.perf_counter() - start}), flush=True)
    known = None

    def next_token(given):
        before = time.perf_counter()
        model.extend(given)
        best = model.most_likely()
        return time.perf_counter() - before, best

    for line in sys.stdin:
        request = json.loads(line)
        prompt, forced = request["prompt"], request["forced"]
        prompt_seconds = None
        if prompt == known and forced:
            model.forget(len(prompt))
        else:
            model.forget(0)
            prompt_seconds, _ = next_token(prompt)
        known = prompt
        found = [next_token([token]) for token in forced]
        seconds, chosen = sum(taken for taken, _ in found), [best for _, best in found]
        print(json.dumps({"prompt_seconds": prompt_seconds, "seconds": seconds, "chosen": chosen}), flush=True)


@contextlib.contextmanager
def neighbor(priority):
    """Another process that keeps one core busy, with that niceness; none for `None`."""
    if priority is None:
        yield None
        return
    spinning = subprocess.Popen([sys.executable, "-c", f"import os\nos.nice({priority})\nwhile True: pass"])
    time.sleep(0.2)
    try:
        yield spinning
    finally:
        spinning.kill()
        spinning.wait()


@contextlib.contextmanager
def locked(path):
    if path is None:
        yield
        return
    with open(path, "a", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def model_file(shape, kind, options):
    """The path of a shape's file, which is made if it is missing."""
    file = options.models / f"{shape}-{kind}.gguf"
    if file.is_file():
        return file
    if not options.converter:
        sys.exit(f"error: `{file}` does not exist\nhint: give `--converter` to make it")
    directory = options.models / f"hf-{shape}"
    if not (directory / "config.json").exists():
        common.print_progress(f"making {directory}")
        make_model(SHAPES[shape], directory)
    common.call(options.converter, "convert", directory, file, "--type", kind)
    return file


def make_model(shape, directory):
    import torch
    import transformers

    torch.manual_seed(1234)
    torch.set_default_dtype(torch.bfloat16)
    settings = {"first_k_dense_replace": 1, "num_mtp_layers": 0, "tie_word_embeddings": False}
    config = transformers.DeepseekV3Config(**(shape | settings), bos_token_id=0, eos_token_id=1)
    model = transformers.DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("norm.weight"):
                values.normal_(1.0, 0.1)
            elif name.endswith("e_score_correction_bias"):
                values.normal_(0.0, 0.02)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)


def table(lines):
    """Medians of tokens per second with the lowest and highest, and the median ratio with those of the rounds."""
    text = "\n| shape | type | load | | ours, tokens/s | llama.cpp | ratio | of rounds | equal tokens |\n"
    text += "|---|---|---|---|---|---|---|---|---|\n"
    for line in lines:
        cells = [line["shape"], line["type"], line["load"], QUANTITIES[line["quantity"]]]
        for name in ("ours", "llama.cpp"):
            rates = line[name]
            cells.append(f"{statistics.median(rates):.4g} ({min(rates):.4g} to {max(rates):.4g})")
        cells += [f"**{line['ratio']:.2f}**", f"{min(line['ratios']):.2f} to {max(line['ratios']):.2f}"]
        cells.append("" if line["equal_tokens"] is None else f"{line['equal_tokens']:.2f}")
        text += f"| {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    main()
