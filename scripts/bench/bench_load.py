#!/usr/bin/env python3
"""Loading a checkpoint into a model and reading its files, in turns, with the page cache warm and (as root) cold.

    cargo build --release -p moonlight-convert --examples
    target/release/examples/synthetic_checkpoint DIR --layers 2           # 2.7 GB of bf16, two of Moonlight's layers
    python scripts/bench/bench_load.py target/release/examples/load_time DIR [--dtype f32]

Reading is `cat FILES > /dev/null`. Rates are bytes of the files per second, the median over rounds; one line of JSON on stdout.
The host of a virtual machine may reclaim free memory, and returns it far more slowly than a disk reads. `--touch N` writes to
N GiB and frees them before each run, so that the memory is there. `--other` names another build to compare.

Needs: only Python, the example `load_time`; root for the cold cache. Takes: some minutes for 2.7 GB.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

TOUCH = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]) << 30)
if hasattr(mmap, "MADV_HUGEPAGE"):
    memory.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, len(memory), 4096):
    memory[at] = 1
"""


def main():
    parser = common.parser(__doc__)
    parser.add_argument("program", help="the `load_time` example of moonlight-convert, built for release")
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--dtype", choices=("f32", "bf16"), help="in memory (default: as stored)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--touch", type=int, default=0, metavar="GIB", help="memory to touch and free before each run")
    parser.add_argument("--other", metavar="PROGRAM", help="another `load_time`, for example of the previous commit")
    options = parser.parse_args()
    files = sorted(options.dir.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    arguments = [str(options.dir)] + (["--dtype", options.dtype] if options.dtype else [])
    ways = {"cat": ["cat", *map(str, files)], "load": [options.program, *arguments]}
    if options.other:
        ways["other"] = [options.other, *arguments]
    states = ("warm", "cold") if os.geteuid() == 0 else ("warm",)
    rates = {f"{state} {way}": [] for state in states for way in ways}
    peaks = {way: 0 for way in ways if way != "cat"}
    for number, (state, way) in common.in_turns([(state, way) for state in states for way in ways], options.rounds):
        if state == "warm":
            subprocess.run(ways["cat"], check=True, stdout=subprocess.DEVNULL)
        else:
            os.sync()
            pathlib.Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
        if options.touch:
            subprocess.run([sys.executable, "-c", TOUCH, str(options.touch)], check=True)
        start = time.perf_counter()
        if way == "cat":
            subprocess.run(ways[way], check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
        else:
            result = common.measure(*ways[way])
            seconds, peaks[way] = result["seconds"], max(peaks[way], result["peak_rss_mib"])
        rates[f"{state} {way}"].append(size / seconds / 1e9)
        common.print_progress(f"round {number}  {state} {way}  {size / seconds / 1e9:6.2f} GB/s")
    print(
        json.dumps(
            {"bytes": size, "peak_rss_mib": peaks}
            | {
                name: {"gb_per_second": round(statistics.median(r), 2), "of_rounds": [round(x, 2) for x in r]}
                for name, r in rates.items()
            }
        )
    )


if __name__ == "__main__":
    main()
