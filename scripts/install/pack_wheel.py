#!/usr/bin/env python3
"""Packs programs that are built already into a wheel, without a call of cargo.

    cargo build --workspace
    python3 scripts/install/pack_wheel.py target/debug wheels

The metadata is maturin's, from pyproject.toml. The tag is that of this machine (`linux_x86_64`), with which pip installs a wheel here, and PyPI refuses
it: a wheel for others is made by `maturin build`. Prints the wheel's path.

Needs: maturin and wheel. Takes: seconds.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

PROGRAMS = ["moonlight", "moonlight-convert"]


def main():
    parser = common.parser(__doc__)
    parser.add_argument("programs", type=pathlib.Path, help="the folder with the two programs")
    parser.add_argument("output", type=pathlib.Path, help="the folder for the wheel")
    options = parser.parse_args()
    ending = ".exe" if os.name == "nt" else ""
    programs = [common.program(options.programs / f"{name}{ending}") for name in PROGRAMS]
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        print(pack(programs, pathlib.Path(home), output))


def pack(programs, home, output):
    run("maturin", "pep517", "write-dist-info", "--metadata-directory", home)
    (info,) = home.glob("*.dist-info")
    scripts = home / f"{info.stem}.data" / "scripts"
    scripts.mkdir(parents=True)
    for program in programs:
        copy = scripts / program.name
        shutil.copy(program, copy)
        # A program of the dev profile is mostly debug information, which would take most of the time to compress.
        if shutil.which("strip"):
            run("strip", "--strip-debug", copy)
    run(sys.executable, "-m", "wheel", "pack", home, "--dest-dir", output)
    return max(output.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime_ns)


def run(*command):
    done = subprocess.run(
        list(map(str, command)), cwd=common.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        sys.exit(f"error: `{' '.join(map(str, command))}`\n{done.stdout}")


if __name__ == "__main__":
    main()
