#!/usr/bin/env python3
"""Measures what the first build takes: processor seconds of each crate, user and system, over all its processes.

    python scripts/bench/build_time.py --target /tmp/first-build [--output after.json] [--before before.json] [--jobs 2]

Builds `moonlight-train` and `moonlight-convert` in the release profile into a folder that must not exist yet, or with `--continue` on top of what is
there. Processor seconds depend little on other work on the machine, unlike time on the clock; a crate that is compiled twice (for the programs
and for build scripts) is one row. With `--before`, a file of an earlier call, both are printed with their ratio.

Needs: only Python, on Linux or macOS. Takes: 10 to 20 minutes on two cores.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

# Set for the calls of this script by cargo, as the wrapper of rustc.
LOG = "MOONLIGHT_BUILD_TIME_LOG"


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--target", type=pathlib.Path, required=True, help="the folder for the build")
    parser.add_argument("--continue", action="store_true", dest="again", help="the folder may exist")
    parser.add_argument("--output", type=pathlib.Path, help="write the seconds of each crate as JSON")
    parser.add_argument("--before", type=pathlib.Path, help="the output of an earlier call, to compare with")
    parser.add_argument("--features", default="", help="of moonlight-train, in addition to the default ones")
    parser.add_argument("--jobs", default="2")
    parser.add_argument("--rows", type=int, default=25, help="how many crates to print")
    options = parser.parse_args()
    if options.target.exists() and not options.again:
        sys.exit(f"error: `{options.target}` exists\nhint: choose another folder")
    crates = build(options)
    if options.output:
        options.output.write_text(json.dumps(crates, indent=1) + "\n")
    before = json.loads(options.before.read_text()) if options.before else None
    show(crates, before, options.rows)


def build(options):
    with tempfile.TemporaryDirectory() as home:
        log = pathlib.Path(home) / "log"
        log.touch()
        wrapper = pathlib.Path(home) / "rustc"
        wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{pathlib.Path(__file__).resolve()}" "$@"\n')
        wrapper.chmod(0o755)
        command = ["cargo", "build", "--release", "--locked", "-p", "moonlight-train", "-p", "moonlight-convert"]
        features = ",".join(f"moonlight-train/{name}" for name in options.features.split(",") if name)
        command += ["--features", features] if features else []
        command += ["--jobs", options.jobs]
        environment = os.environ | {
            "CARGO_TARGET_DIR": str(options.target.resolve()),
            "RUSTC_WRAPPER": str(wrapper),
            LOG: str(log),
        }
        start, before = time.monotonic(), seconds_of_children()
        subprocess.run(command, cwd=common.ROOT, env=environment, check=True)
        total = seconds_of_children() - before
        print(f"{total:.0f} s of processor time, {time.monotonic() - start:.0f} s on the clock", file=sys.stderr)
        crates = {}
        for line in log.read_text().splitlines():
            name, seconds = line.split()
            crates[name] = crates.get(name, 0) + float(seconds)
    crates["(build scripts, cargo)"] = total - sum(crates.values())
    return {name: round(seconds, 2) for name, seconds in crates.items()}


def show(crates, before, rows):
    if before is None:
        for name, seconds in sorted(crates.items(), key=lambda row: -row[1])[:rows]:
            print(f"{name:32} {seconds:8.1f}")
        print(f"{'total':32} {sum(crates.values()):8.1f}")
        return
    names = sorted(crates.keys() | before.keys(), key=lambda name: -before.get(name, 0))
    for name in names[:rows]:
        print(f"{name:32} {before.get(name, 0):8.1f} {crates.get(name, 0):8.1f}")
    first, second = sum(before.values()), sum(crates.values())
    print(f"{'total':32} {first:8.1f} {second:8.1f}   ratio {second / first:.2f}")


def seconds_of_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def rustc(command):
    """Runs rustc, and adds the line of a crate to the log; cargo also calls it with questions about the compiler."""
    code = subprocess.run(command).returncode
    if "--crate-name" in command:
        name = command[command.index("--crate-name") + 1]
        # One write of a short line is not mixed with those of other processes.
        with open(os.environ[LOG], "ab", buffering=0) as log:
            log.write(f"{name} {seconds_of_children():.3f}\n".encode())
    return code


if __name__ == "__main__":
    sys.exit(rustc(sys.argv[1:]) if LOG in os.environ and len(sys.argv) > 1 and "rustc" in sys.argv[1] else main())
