#!/usr/bin/env python3
"""Loads `moonlight serve`: speed with many clients, memory over many requests, and clients that misbehave.

    python scripts/serve/load_test.py --moonlight target/release/moonlight --model DIR --output load
    python scripts/serve/load_test.py --parts flat --requests 10000
    python scripts/serve/load_test.py --parts hostile

Parts:
* `speed`: 1, 8 and 32 clients send prompts of 16 to 512 words one after the other and read streamed answers of 16 to 128 tokens. Tokens per second
  over all clients, time to the first token, time between two pieces of an answer, memory. No two prompts share a beginning.
* `flat`: short requests from 16 clients, the server's memory after every hundred. Fails if it grows.
* `hostile`: see `hostile.py`: clients that vanish, send nonsense, read slowly, or flood. Fails if a place, a file descriptor or a thread is not
  given back, if the server stops answering or ends, or if memory grows.

Writes OUTPUT.json and OUTPUT.md. Needs: the built `moonlight`, Linux. Takes: 10 minutes with SmolLM2-135M on two cores, 2 with the tiny model
that is trained without `--model`.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import platform
import random
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
import hostile
import server as serving
import tiny_model
from http_client import Connection

WORDS = "the moon light tensor ship of a man is not borrow lifetime sea under small river stone open letter".split()


def requests_of(seed, count, words=(16, 512), tokens=(16, 128)):
    """Requests of mixed lengths. The first words differ, so that no prompt is a prefix that was computed before."""
    choose = random.Random(seed)
    found = []
    for number in range(count):
        length = int(2 ** choose.uniform(*(n.bit_length() - 1 for n in words)))
        text = f"{seed} {number} " + " ".join(choose.choices(WORDS, k=length))
        new = int(2 ** choose.uniform(*(n.bit_length() - 1 for n in tokens)))
        found.append({"prompt": text, "max_tokens": new, "temperature": 0.8, "seed": number})
    return found


def lengths(model):
    """Ranges of words of a prompt and of new tokens that fit the context of a model; its tokens may be bytes."""
    config = pathlib.Path(model) / "config.json"
    context = json.loads(config.read_text())["max_position_embeddings"] if config.is_file() else 8192
    return {"words": (16, 512), "tokens": (16, 128)} if context > 4096 else {"words": (4, 64), "tokens": (16, 128)}


def quantile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


async def sample_memory(server, samples, every=0.1):
    while True:
        samples.append(server.memory_mib())
        await asyncio.sleep(every)


@contextlib.asynccontextmanager
async def memory_of(server):
    """Samples the server's memory in MiB until the context ends."""
    samples = []
    task = asyncio.create_task(sample_memory(server, samples))
    try:
        yield samples
    finally:
        task.cancel()


async def measure(server, clients, requests, extra):
    """All requests, from that many clients; each client has one request at a time."""
    waiting = list(reversed(requests))
    first, between, tokens, prompts, failed = [], [], [0], [0], []

    async def client():
        connection = Connection(server.host, server.port, server.key)
        while waiting:
            request = waiting.pop() | extra | {"stream": True, "stream_options": {"include_usage": True}}
            started = time.perf_counter()
            answer = await connection.request("POST", "/v1/completions", request)
            if answer.status != 200 or not answer.events:
                failed.append(f"{answer.status} {answer.body[:200]}")
                continue
            times = [now for now, event in answer.events if event["choices"] and event["choices"][0]["text"]]
            usage = answer.events[-1][1].get("usage") or {}
            tokens[0] += usage.get("completion_tokens", 0)
            prompts[0] += usage.get("prompt_tokens", 0)
            if times:
                first.append(times[0] - started)
                between.extend(later - earlier for earlier, later in zip(times, times[1:]))
        connection.close()

    async with memory_of(server) as samples:
        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - started
    return {
        "clients": clients,
        "requests": len(requests),
        "failed": failed,
        "seconds": round(seconds, 2),
        "prompt_tokens": prompts[0],
        "new_tokens": tokens[0],
        "new_tokens_per_second": round(tokens[0] / seconds, 1),
        "tokens_per_second": round((tokens[0] + prompts[0]) / seconds, 1),
        "first_token_median_ms": milliseconds(quantile(first, 0.5)),
        "first_token_p99_ms": milliseconds(quantile(first, 0.99)),
        "between_tokens_median_ms": milliseconds(quantile(between, 0.5)),
        "between_tokens_p99_ms": milliseconds(quantile(between, 0.99)),
        "memory_mib": round(max(samples), 1) if samples else None,
    }


def milliseconds(seconds):
    return None if seconds is None else round(1e3 * seconds, 1)


def speed(server, options, model):
    """One line for each number of clients, after a warm-up."""
    extra, ranges = {"model": model_name(server), "ignore_eos": True}, lengths(model)
    asyncio.run(measure(server, 2, requests_of(99, 4, **ranges), extra))
    lines = []
    for clients in options.clients:
        count = max(options.per_client * clients, options.least)
        line = asyncio.run(measure(server, clients, requests_of(clients, count, **ranges), extra))
        common.print_progress(json.dumps(line))
        lines.append(line)
    return lines


def model_name(server):
    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    return json.loads(server.get("/v1/models", headers=headers)[2])["data"][0]["id"]


async def many(server, count, clients=16):
    """Short requests, and the server's memory after every hundredth of them."""
    model, every = model_name(server), max(1, count // 100)
    done, samples, failed = [0], [], [0]
    choose = random.Random(5)

    async def client(number):
        connection = Connection(server.host, server.port, server.key)
        while done[0] < count:
            done[0] += 1
            turn = done[0]
            text = f"{turn} " + " ".join(choose.choices(WORDS, k=choose.randrange(2, 24)))
            request = {"model": model, "max_tokens": choose.randrange(1, 9), "temperature": 1, "seed": turn}
            if turn % 3 == 0:
                request |= {"messages": [{"role": "user", "content": text}]}
            else:
                request |= {"prompt": text}
            if turn % 2:
                request["stream"] = True
            if turn % 5 == 0:
                request |= {"logprobs": True, "top_logprobs": 3} if turn % 3 == 0 else {"logprobs": 3}
            path = "/v1/chat/completions" if turn % 3 == 0 else "/v1/completions"
            answer = await connection.request("POST", path, request)
            failed[0] += answer.status != 200
            if turn % every == 0:
                samples.append((turn, server.memory_mib()))
        connection.close()

    started = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    seconds = time.perf_counter() - started
    # The first tenth fills caches and the allocator's pools.
    late = samples[len(samples) // 10 :]
    slope = statistics.linear_regression([turn for turn, _ in late], [memory for _, memory in late]).slope
    return {
        "requests": count,
        "failed": failed[0],
        "seconds": round(seconds, 1),
        "memory_first_mib": round(samples[0][1], 1),
        "memory_after_a_tenth_mib": round(late[0][1], 1),
        "memory_last_mib": round(samples[-1][1], 1),
        "memory_max_mib": round(max(memory for _, memory in samples), 1),
        "growth_per_1000_requests_mib": round(1000 * slope, 3),
        "samples": [(turn, round(memory, 1)) for turn, memory in samples],
    }


def flat(server, options, check):
    line = asyncio.run(many(server, options.requests))
    check.expect("flat: every request is answered", not line["failed"], line["failed"])
    growth = line["memory_last_mib"] - line["memory_after_a_tenth_mib"]
    # Less than a twentieth: what is kept for each request would add up to more.
    limit = max(8, 0.05 * line["memory_after_a_tenth_mib"])
    check.expect(
        f"flat: memory over {options.requests} requests", growth < limit, f"{growth:+.1f} MiB, limit {limit:.1f}"
    )
    return line


def table(lines):
    """The lines of `speed` as Markdown."""
    if not lines:
        return ""
    single = lines[0]["new_tokens_per_second"]
    text = (
        "| clients | requests | new tokens/s in all | over one client | first token, median; p99, ms | between tokens, median; p99, ms "
        "| memory, MiB |\n|---|---|---|---|---|---|---|\n"
    )
    for line in lines:
        text += (
            f"| {line['clients']} | {line['requests']} | {line['new_tokens_per_second']} "
            f"| {line['new_tokens_per_second'] / single:.2f} "
            f"| {line['first_token_median_ms']}; {line['first_token_p99_ms']} "
            f"| {line['between_tokens_median_ms']}; {line['between_tokens_p99_ms']} | {line['memory_mib']} |\n"
        )
    return text


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    load = os.getloadavg()[0]
    return {"cpu": names[0] if names else platform.processor(), "cores": len(names), "load_before": round(load, 2)}


def add_load_arguments(parser):
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--per-client", type=int, default=3, help="requests of each client")
    parser.add_argument("--least", type=int, default=12, help="requests of a line at least")


def main():
    parser = common.parser(__doc__)
    serving.add_arguments(parser)
    add_load_arguments(parser)
    parser.add_argument(
        "--parts", nargs="+", choices=["speed", "flat", "hostile"], default=["speed", "flat", "hostile"]
    )
    parser.add_argument("--requests", type=int, default=10_000, help="of the part `flat`")
    parser.add_argument("--short", action="store_true", help="fewer rounds of the part `hostile`")
    parser.add_argument("--serve", nargs="*", default=[], help="more arguments of `moonlight serve`, without `--`")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("load"))
    options = parser.parse_args()
    check, result = common.Checks(), {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as home:
        model = options.model or tiny_model.make(options.moonlight, pathlib.Path(home, "tiny"))
        more = [f"--{part}" if index % 2 == 0 else part for index, part in enumerate(options.serve)]
        with serving.Server.moonlight(options.moonlight, model, *more) as server:
            if "speed" in options.parts:
                result["speed"] = speed(server, options, model)
                for line in result["speed"]:
                    check.expect(
                        f"{line['clients']} clients: every request", not line["failed"], line["failed"][:2] or ""
                    )
            if "flat" in options.parts:
                result["flat"] = flat(server, options, check)
            if "hostile" in options.parts:
                result["hostile"] = hostile.run(server, check, options.short)
            check.expect("the server lives", server.alive())
            result["peak_memory_mib"] = round(server.memory_mib("VmHWM"), 1)
            check.expect("SIGTERM ends it with 0", server.terminate() == 0, server.process.returncode)
    options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(result.get("speed")))
    print(table(result.get("speed")))
    print(json.dumps({key: value for key, value in result.get("flat", {}).items() if key != "samples"}))
    check.finish()


if __name__ == "__main__":
    main()
