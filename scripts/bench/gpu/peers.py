"""Parts 7 and 8: torch and transformers on the same device and shapes, and Vulkan on the same card."""

import importlib.util
import json
import sys

import common
from bench_block import SHAPE as BLOCK
from bench_transformers import SHAPE as SMALL
from gpu import decoding, kernels, operations, shapes, training
from gpu.runner import Absent, Failed

PEER = common.SCRIPTS / "bench/gpu/torch_peer.py"


def torch_items(day):
    found = [("torch's products and copies", 1, rates)]
    ways = [("grouped_mm", False), ("grouped_mm", True), ("eager", False)]
    for dtype in ("bf16", "f32"):
        for experts, compiled in ways:
            more = ", torch.compile" if compiled else ""
            found.append(
                (
                    f"bench-small, {dtype}, transformers {experts}{more}",
                    2,
                    lambda day, dtype=dtype, experts=experts, compiled=compiled: step(day, dtype, experts, compiled),
                )
            )
    for compiled in (False, True):
        more = ", torch.compile" if compiled else ""
        found.append((f"a layer of Moonlight-16B, bf16, transformers grouped_mm{more}", 2, layer_of(compiled)))
    return [*found, ("Muon on a layer's experts, torch.optim.Muon", 1, muon)]


def peer(day, *arguments):
    """Runs `torch_peer.py`. Whether torch sees the device is asked there, because it takes seconds to import."""
    if not importlib.util.find_spec("torch"):
        raise Absent("torch is not installed for this Python")
    if day.kind not in ("cuda", "cpu"):
        raise Absent(f"torch is not compared on `{day.kind}`")
    if day.kind == "cuda":
        check = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 9)"
        try:
            day.runner.run([sys.executable, "-c", check])
        except Failed as error:
            raise Absent(f"torch sees no CUDA device: {error}") from None
    command = [sys.executable, PEER, *arguments, "--device", day.device, *(["--tiny"] if day.tiny else [])]
    done = day.runner.run(command)
    return json.loads(done.stdout.strip().splitlines()[-1]), done


def need_transformers():
    if not importlib.util.find_spec("transformers"):
        raise Absent("transformers is not installed for this Python")


def rates(day):
    found, _ = peer(day, "rates")
    lines = [{"what": f"product of [8192, 8192] in {name}", "tflops": found[name]} for name in ("bf16", "tf32", "f32")]
    for line, name in zip(lines, ("bf16", "tf32", "f32")):
        line["share_of_peak"] = day.card and round(found[name] / getattr(day.card, name), 4)
    lines.append({"what": "copy"} | day.bandwidth(found["copy_bytes_per_second"]))
    return {"lines": lines, "versions": found["versions"]}


def step(day, dtype, experts, compiled):
    need_transformers()
    run = training.runs(day)[f"bench-small, {dtype}"]
    size = ["--batch", run.batch, "--sequence", run.sequence]
    found, done = peer(day, "step", "--dtype", dtype, "--experts", experts, *size, *(["--compile"] if compiled else []))
    rate = found["tokens_per_second"]
    per_token = 3 * operations.model(SMALL, run.sequence)
    return {"tokens_per_second": rate} | day.rate(per_token * rate, dtype) | day.memory(done) | {"raw": found}


def layer_of(compiled):
    def layer(day):
        need_transformers()
        sequence = 64 if day.tiny else 2048
        found, done = peer(day, "layer", "--sequence", sequence, *(["--compile"] if compiled else []))
        rate = found["tokens_per_second"]
        per_token = 3 * operations.block(BLOCK, sequence)
        return {"tokens_per_second": rate} | day.rate(per_token * rate, "bf16") | day.memory(done) | {"raw": found}

    return layer


def muon(day):
    found, done = peer(day, "muon")
    rate = found["operations"] / found["seconds"]
    return {"milliseconds": found["seconds"] * 1e3} | day.rate(rate, "bf16") | day.memory(done) | {"raw": found}


# What Vulkan is compared in: part, measurement, and how it is measured on another device.
def vulkan_items(day):
    small = "bench-small, f32"
    return [
        ("parity with the CPU, f32", 2, on_vulkan(lambda day, device: kernels.parity(day, "f32", device))),
        (f"training {small}", 2, on_vulkan(lambda day, device: training.train(day, small, device))),
        ("Moonlight-16B, int4, decoding", 3, on_vulkan(decoding.whole)),
    ]


def on_vulkan(measure):
    def item(day):
        if day.kind != "cuda":
            raise Absent("the day's device is not a CUDA device, so that there is nothing to compare")
        names = [name for name in ("vulkan", "wgpu") if name in day.backends]
        if not names:
            raise Absent("`moonlight` was built without `vulkan` and `wgpu`")
        found = measure(day, names[0])
        return found if "lines" in found else found | {"device": names[0]}

    return item


def beside_cuda(parts):
    """What CUDA had in the measurements that Vulkan repeats, for the page."""
    kept = (("training", "bench-small, f32"), ("decoding", "Moonlight-16B, int4"))
    found = [(name, parts[part]["items"].get(name, {}).get("result")) for part, name in kept if part in parts]
    return {
        f"{name} (CUDA)": {"state": "done", "result": result | {"device": "cuda"}} for name, result in found if result
    }


assert shapes.FULL.keys() == shapes.TINY.keys()
