"""Parts 2 to 4: the kernel tests on the device, the program's parity with the CPU, and the kernels' rates."""

import re
import sys

import common
from bench_block import SHAPE as BLOCK
from bench_transformers import SHAPE as SMALL
from gpu import operations
from gpu.runner import Absent, Failed

TIMES = "kernels_of_one_pass_are_faster_than_the_reference"
# Of the kernel tests at tiny shapes.
ONE_TEST = "cube::tests::cross_entropy"


def test_items(day):
    if not day.tests:
        return [("kernel tests", 1, no_tests)]
    # A hang of one program does not take the time of the other.
    return [(path.name.split("-")[0], 4, lambda day, path=path: run_tests(day, path)) for path in day.tests]


def no_tests(day):
    raise Absent("there is no test program (`moonlight_model-*`) in the folder of programs")


def run_tests(day, path):
    if day.kind == "cpu":
        raise Absent("the tests are for CubeCL devices, and the device is the CPU")
    name = ONE_TEST if day.tiny and path.name.startswith("moonlight_model") else "cube"
    command = [path, "--ignored", name, "--skip", TIMES, "--test-threads", "1"]
    done = day.runner.run(command, expected=(0, 101))
    results = dict(re.findall(r"^test (\S+) \.\.\. (ok|FAILED)", done.stdout, re.M))
    # Output of a test may be between its name and its result.
    summary = re.search(r"(\d+) passed; (\d+) failed", done.stdout)
    if not summary:
        raise Failed(f"the test program printed no result: {done.stdout[-300:]}{done.stderr[-300:]}")
    passed, failed = map(int, summary.groups())
    if failed:
        wrong = ", ".join(name for name, result in results.items() if result != "ok")
        raise Failed(f"{failed} of {passed + failed} tests failed: {wrong}\n{done.stdout[-3000:]}")
    if not passed:
        raise Failed(f"no test matches `{name}`")
    return {"passed": passed, "failed": failed, "tests": results}


def parity_items(day):
    return [(dtype, 1, lambda day, dtype=dtype: parity(day, dtype, day.device)) for dtype in ("f32", "bf16")]


def parity(day, dtype, device):
    """`check_device.py` in a process of its own, so that a device that hangs is ended in time."""
    script = common.SCRIPTS / "parity" / "check_device.py"
    command = [sys.executable, script, day.program("moonlight"), "--device", device, "--dtype", dtype]
    done = day.runner.run([*command, "--steps", "1" if day.tiny else "3"], expected=(0, 1))
    found = re.findall(r"^(ok|FAILED) +([^:]+): (.*)$", done.stdout, re.M)
    wrong = [f"{name}: {text}" for result, name, text in found if result != "ok"]
    if wrong or not found:
        raise Failed("\n".join(wrong) or f"no comparison was made: {done.stderr[-600:]}")
    return {"lines": [{"what": name, "worst": text} for _, name, text in found]}


def rate_items(day):
    items = [("kernels of the small model, f32", 4, kernel_times)]
    small = (
        ["--batch", "1", "--sequence", "16", "--repeats", "1"] if day.tiny else ["--batch", "8", "--sequence", "1024"]
    )
    for dtype in ("f32", "bf16"):
        for infer in (False, True):
            what = f"bench-small, {'forward' if infer else 'forward and backward'}, {dtype}"
            items.append((what, 2, lambda day, dtype=dtype, infer=infer: bench(day, small, dtype, infer)))
    for dtype in ("bf16", "f32"):
        for train in (True, False):
            what = f"a layer of Moonlight-16B, {'forward and backward' if train else 'forward'}, {dtype}"
            items.append((what, 2, lambda day, dtype=dtype, train=train: bench_layer(day, dtype, train)))
    for dtype in ("bf16", "f32"):
        items.append((f"Muon on a layer's experts, {dtype}", 2, lambda day, dtype=dtype: muon(day, dtype)))
    return items


def kernel_times(day):
    """The test that prints the time of each kernel and of Burn's operations. That it fails, because ours are slower, is a result."""
    tests = [path for path in day.tests if path.name.startswith("moonlight_model")]
    if not tests or day.kind == "cpu":
        raise Absent("it needs the test program of moonlight-model and a CubeCL device")
    if day.tiny:
        raise Absent("its shapes are fixed, and take minutes on a device in software")
    command = [tests[0], "--ignored", "--nocapture", "--test-threads", "1", TIMES]
    done = day.runner.run(command, expected=(0, 101))
    lines = []
    for name, ours, plain, first, _ in re.findall(r"^(\S.{15}) +([\d.]+) +([\d.]+) +(\d+) +(\d+)$", done.stdout, re.M):
        what, seconds = name.strip(), float(ours) / 1e3
        line = {"what": what, "milliseconds": float(ours), "reference_milliseconds": float(plain)}
        line["first_milliseconds"] = float(first)
        if seconds and what in OPERATIONS:
            line |= day.rate(OPERATIONS[what] / seconds, "f32")
        if seconds and what in BYTES:
            line |= day.bandwidth(BYTES[what] / seconds)
        lines.append(line)
    if not lines:
        raise Failed(f"the test printed no times: {(done.stdout + done.stderr)[-600:]}")
    return {"lines": lines, "test": "passed" if " 1 passed" in done.stdout else "failed: ours are slower"}


# The shapes of that test: 512 tokens, each to 4 of 32 experts; 8 heads of 96 and 64. Every kernel runs within tens of microseconds
# on a large card, so that launches count.
TOKENS, ROWS, HIDDEN, WIDTH, VOCAB, HEADS = 512, 2048, 512, 352, 8192, 8
PRODUCT = 2 * ROWS * HIDDEN * WIDTH
CAUSAL = HEADS * TOKENS * (TOKENS + 1)
OPERATIONS = {
    "grouped product": PRODUCT,
    "its gradients": 2 * PRODUCT,
    "attention": CAUSAL * (96 + 64),
    # The forward pass, the scores again, and the gradients of values, weights, queries and keys.
    "with gradients": CAUSAL * (96 + 64) + CAUSAL * (3 * 96 + 2 * 64),
}
# What each must read and write once.
BYTES = {
    "rows": 4 * HIDDEN * 3 * (ROWS + TOKENS) + 4 * HIDDEN * (2 * ROWS + TOKENS),
    "SwiGLU": 4 * ROWS * WIDTH * (3 + 5),
    "RMSNorm": 4 * TOKENS * HIDDEN * (2 + 3),
    "rotation": 4 * TOKENS * HEADS * 96 * 2,
    "loss": 4 * TOKENS * VOCAB * (1 + 2),
}


def bench(day, size, dtype, infer):
    found, done = day.last_json("bench", *size, "--dtype", dtype, *(["--infer"] if infer else []))
    passes = 1 if infer else 3
    per_token = passes * operations.model(SMALL, found["sequence"])
    rate = found["tokens_per_second"]
    return {"tokens_per_second": rate} | day.rate(per_token * rate, dtype) | day.memory(done) | {"raw": found}


def bench_layer(day, dtype, train):
    if day.tiny:
        raise Absent("its shape is fixed: 585 million parameters")
    found, done = day.last_json("bench_block", "--tokens", 2048, "--dtype", dtype, *(["--train"] if train else []))
    per_token = (3 if train else 1) * operations.block(BLOCK, found["tokens"])
    rate = found["tokens_per_second"]
    return {"tokens_per_second": rate} | day.rate(per_token * rate, dtype) | day.memory(done) | {"raw": found}


def muon(day, dtype):
    if day.tiny:
        raise Absent("its shapes are fixed: 64 matrices of [2048, 1408]")
    found, done = day.last_json("muon_bench", "experts", dtype, 3)
    seconds = found["seconds"]
    return {"milliseconds": seconds * 1e3} | day.rate(found["flops"] / seconds, dtype) | day.memory(done)
