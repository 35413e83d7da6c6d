#!/usr/bin/env python3
"""The first hour on a machine with a GPU: checks and measures the built programs there, and writes one JSON and one page.

    cargo build --release --workspace --bins --examples --features moonlight-train/cuda,moonlight-train/vulkan
    cargo test --release -p moonlight-model --lib --features cuda --no-run     # prints the path of the test program
    scripts/bench/gpu_day.sh PROGRAMS                                          # a folder with the files of both
    python scripts/bench/gpu_day.py PROGRAMS --device cpu --tiny               # tries the script, without a GPU

PROGRAMS contains `moonlight` and what else is there of `bench`, `bench_block`, `bench_decoding`, `muon_bench`, `synthetic_checkpoint`
and the test programs (`moonlight_model-*`, `hostile_kernels-*`); a measurement whose program is missing is left out by name. No
network is used, and no weights: those of Moonlight-16B are random, and written when they are first needed (10 GB, and 32 GB if
training all parameters is predicted to fit).

* `facts`: card, driver, clocks, PCIe, what `moonlight doctor` finds.
* `tests`: the kernel tests, each result against the reference on the CPU.
* `parity`: scores, a continuation and training steps of the program against the CPU, in f32 and bf16.
* `rates`: operations and bytes a second of kernels, of models and of Muon, as shares of the card's peaks by data sheet.
* `training`: tokens a second and peak memory, next to the prediction of `moonlight plan`. What is predicted not to fit is refused.
* `decoding`: tokens a second one by one, and of prefill.
* `torch`: transformers and torch.optim.Muon in the same shapes, with torch.compile too, if torch is installed for this Python.
* `vulkan`: some of it again with Vulkan on the same card, if `moonlight` was built with it.

The most valuable comes first. Time is shared by weight among the parts and measurements that are left; a measurement that exceeds
twice its share is ended and recorded, as is one that fails, and the rest is measured. `OUT/gpu_day.json` and `OUT/gpu_day.md` are written
after each. A second start with the same OUT keeps what is done and measures the rest; `--again` repeats it. OUT/logs contains the
output of the programs. The exit code is 1 if something failed or had no time, 130 if it was interrupted.

The device's peak memory is what `nvidia-smi` counts ten times a second, without what was in use before: with the driver's context and
what memory pools hold. Shares of f32 are of the peak in TF32, which Burn uses on cards with tensor cores.

Needs: only Python; torch and transformers for the part `torch`. Takes: ten minutes (`--minutes`), with `--tiny` on a CPU too.
"""

import json
import pathlib
import signal
import sys
import time

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[at]) for at in (0, 1)]
import common
from gpu import decoding, facts, kernels, peers, report, training
from gpu.day import Day
from gpu.runner import Absent, Failed, OutOfTime, Refused, Runner

# Name, title, share of the time, what is measured, a line for the page.
PARTS = [
    ("facts", "Device", 2, facts.items, ""),
    ("tests", "Kernel tests on the device", 8, kernels.test_items, ""),
    ("parity", "Parity with the CPU", 8, kernels.parity_items, "Largest relative differences."),
    (
        "rates",
        "Rates",
        10,
        kernels.rate_items,
        "Peaks are those of the data sheet, for dense products; f32 against TF32.",
    ),
    ("training", "Training", 28, training.items, "Random tokens; predictions are those of `moonlight plan`."),
    ("decoding", "Decoding and prefill", 14, decoding.items, ""),
    (
        "torch",
        "torch and transformers",
        20,
        peers.torch_items,
        "Shapes of the parts above; weights without f32 masters.",
    ),
    ("vulkan", "Vulkan on the same card", 10, peers.vulkan_items, ""),
]
# A part may take 1.5 times its share of the time that is left, and a measurement twice its share of the part's: what comes
# first is worth more, most measurements need less than their share, and the first ones compile kernels.
LENIENCE = {"part": 1.5, "measurement": 2}
# State of a measurement by the error that ended it.
STATES = {OutOfTime: "out of time", Absent: "absent", Refused: "refused"}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("programs", type=folder, help="the folder with the built programs")
    parser.add_argument("--device", default="cuda", help="cuda[:N], vulkan, wgpu, or cpu to try the script")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu-day"), help="the folder of the results")
    parser.add_argument("--minutes", type=float, default=10, help="for what is left")
    parser.add_argument(
        "--part", choices=[part[0] for part in PARTS], action="append", help="only this; may be repeated"
    )
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script; no value is a speed")
    parser.add_argument("--memory-gb", type=float, help="of the device, if the driver cannot be asked, or to use less")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"device": options.device, "tiny": options.tiny}
    parts = load(options.out, settings)
    # Ends like Ctrl-C, so that no program is left running and the files are written.
    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.default_int_handler)
    day = Day(options, Runner(options.out / "logs", facts.index(options.device)))
    try:
        measure(day, options, settings, parts)
    except KeyboardInterrupt:
        report.save(options.out, settings, list(parts.values()))
        common.print_progress(f"interrupted; the same command continues; see {options.out}/gpu_day.md")
        sys.exit(130)
    states = [item["state"] for part in parts.values() for item in part["items"].values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"{counts}: {options.out}/gpu_day.md")
    sys.exit(any(state in ("failed", "out of time") for state in states))


def folder(path):
    found = pathlib.Path(path).resolve()
    if not (found / "moonlight").is_file():
        raise common.argparse.ArgumentTypeError(f"`{path}` contains no `moonlight`: build it first (see --help)")
    return found


def load(out, settings):
    """The parts of an earlier start, or new ones."""
    parts = {
        name: {"part": name, "title": title, "about": about, "state": "not started", "seconds": 0, "items": {}}
        for name, title, _, _, about in PARTS
    }
    for name, part in parts.items():
        path = out / "parts" / f"{name}.json"
        if path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["settings"] != settings:
                sys.exit(
                    f"error: `{out}` has results of `{saved['settings']['device']}`, tiny: {saved['settings']['tiny']}\n"
                    "hint: choose another folder by `--out`"
                )
            part |= saved["part"]
    return parts


def measure(day, options, settings, parts):
    end = time.monotonic() + options.minutes * 60
    chosen = [part for part in PARTS if not options.part or part[0] in options.part]
    for at, (name, _, weight, items, _) in enumerate(chosen):
        left = max(0.0, end - time.monotonic())
        limit = time.monotonic() + left * share_of(weight, [part[2] for part in chosen[at:]], LENIENCE["part"])
        if name != "facts":
            facts.learn(day, parts["facts"]["items"])
        part, wanted = parts[name], items(day)
        if options.again:
            part["items"] = {}
        if name == "vulkan" and day.kind == "cuda":
            part["items"] |= peers.beside_cuda(parts)
        todo = [item for item in wanted if part["items"].get(item[0], {}).get("state") != "done"]
        part["state"] = "started"
        start, before = time.monotonic(), part["seconds"]
        for number, (what, own, run) in enumerate(todo):
            rest = max(0.0, limit - time.monotonic())
            share = share_of(own, [item[1] for item in todo[number:]], LENIENCE["measurement"])
            day.runner.deadline = time.monotonic() + rest * share
            part["items"][what] = one(day, name, what, run)
            part["seconds"] = round(before + time.monotonic() - start, 1)
            save(options.out, settings, parts, part)
        part["state"] = "finished"
        save(options.out, settings, parts, part)
    report.save(options.out, settings, list(parts.values()))


def share_of(weight, weights, lenience):
    """The share of what is left that the first of several may take."""
    return min(1.0, lenience * weight / sum(weights))


def one(day, part, what, run):
    """One measurement, as it is kept: its state, with a result or an error."""
    day.runner.name = "".join(letter if letter.isalnum() else "-" for letter in f"{part}-{what}").lower()
    start = time.monotonic()
    try:
        item = {"state": "done", "result": {key: value for key, value in run(day).items() if value is not None}}
    except (OutOfTime, Absent, Refused, Failed) as error:
        item = {"state": STATES.get(type(error), "failed"), "error": str(error)}
    # A mistake in reading one program's output must not cost the measurements that follow.
    except Exception as error:
        item = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
    item["seconds"] = round(time.monotonic() - start, 1)
    common.print_progress(f"{part:9} {item['state']:12} {item['seconds']:6.1f} s  {what}{first_line(item)}")
    return item


def first_line(item):
    return f": {item['error'].splitlines()[0][:150]}" if item.get("error") else ""


def save(out, settings, parts, part):
    (out / "parts").mkdir(exist_ok=True)
    kept = {"settings": settings, "part": part}
    report.write(out / "parts" / f"{part['part']}.json", json.dumps(kept, indent=1) + "\n")
    report.save(out, settings, list(parts.values()))


if __name__ == "__main__":
    main()
