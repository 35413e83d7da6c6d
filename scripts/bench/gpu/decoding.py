"""Part 6: decoding token by token, and prefill."""

import json
import random
import statistics

from gpu import training
from gpu.runner import Absent, Failed


def items(day):
    # Tokens, sequences, dtype, context, prompt.
    if day.tiny:
        block = [(2, 1, "f32", 4, 8)]
    else:
        block = [
            (32, 1, "bf16", 512, 2048),
            (32, 1, "int4", 512, 2048),
            (32, 32, "bf16", 512, 0),
            (32, 32, "int4", 512, 0),
        ]
    shape = "bench-small" if day.tiny else "moonlight-block"
    found = [
        (f"{shape}, {dtype}, {batch} sequence{'s' * (batch > 1)}", 1, lambda day, size=size: layers(day, shape, *size))
        for size in block
        for _, batch, dtype, _, _ in [size]
    ]
    return [("Moonlight-16B, int4", 4, lambda day: whole(day, day.device)), *found]


def layers(day, shape, tokens, batch, dtype, context, prompt):
    found, done = day.last_json("bench_decoding", tokens, batch, dtype, shape, context, prompt)
    result = {"tokens_per_second": found["tokens_per_second"], "milliseconds": found["milliseconds_per_step"]}
    result["prefill_tokens_per_second"] = found["prompt_tokens_per_second"]
    if batch == 1:
        # Several sequences read more experts, and the bytes are those of one.
        result |= day.bandwidth(found["bytes_per_token"] / found["milliseconds_per_step"] * 1e3)
    return result | day.memory(done) | {"raw": found}


def whole(day, device):
    """`moonlight generate` on the packed checkpoint: the times at which tokens arrive, after a short prompt and after a long one.

    The first token of the long prompt comes later than that of the short one by what prefill takes. Each is run twice, because the
    first run compiles kernels."""
    model = training.checkpoint(day, "int4")
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    numbers = random.Random(1)
    short, long, new = (8, 64, 8) if day.tiny else (16, 4096, 128)
    best, steps = {}, []
    for _ in range(2):
        for length, count in ((short, new), (long, 1)):
            prompt = ",".join(str(numbers.randrange(vocab_size)) for _ in range(length))
            # Without `--json` each token is printed when it is there.
            command = [day.program("moonlight"), "generate", "--model", model, "--device", device, "--quiet"]
            command += [
                "--dtype",
                "bf16",
                "--quantize",
                "int4",
                "--prompt-tokens",
                prompt,
                "--max-new-tokens",
                str(count),
            ]
            times = []
            done = day.runner.run(command, words=times)
            if not times:
                raise Failed("no token was generated")
            best[length] = min(best.get(length, times[0]), times[0])
            if length == short:
                steps = [after - before for before, after in zip(times, times[1:])]
    if not steps:
        raise Absent("the model ended its text after one token")
    # The second half: the first tokens still compile kernels.
    step = statistics.median(steps[len(steps) // 2 :])
    prefill = best[long] - best[short]
    return {
        "device": device,
        "tokens_per_second": 1 / step,
        "milliseconds": step * 1e3,
        "prefill_tokens_per_second": (long - short) / prefill if prefill > 0 else None,
        "first_token_seconds": {str(length): seconds for length, seconds in best.items()},
        "note": f"prefill of {long} tokens; first token after {best[short]:.1f} s with loading",
    } | day.memory(done)
