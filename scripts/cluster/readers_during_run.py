#!/usr/bin/env python3
"""Four readers in a loop during a run that saves every second step: `generate`, `score`, `plan`, and `moonlight-convert` with
`inspect` and `verify`.

    scripts/cluster/readers_during_run.py --moonlight target/debug/moonlight --convert target/debug/moonlight-convert

The run and every reader must end without an error, and the run must leave the same files as a run without readers. `inspect` and `verify`
get a checkpoint by name, which the run may remove before they end; only then may they report an error. Prints one JSON object; the exit
code is 1 if a check fails.

Needs: only Python. Takes: half a minute with a release build.
"""

import json
import pathlib
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
import tiny_run


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--moonlight", required=True, help="the program that trains")
    parser.add_argument("--convert", required=True, help="moonlight-convert")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--keep", type=int, default=2, help="checkpoints that the run keeps")
    parser.add_argument("--dir", help="where the run goes [default: /dev/shm]")
    arguments = parser.parse_args()
    convert = str(pathlib.Path(arguments.convert).resolve())
    home = tiny_run.Home(arguments.moonlight, arguments.dir)
    begun = time.monotonic()
    alone = home.train(home.recipe("alone", arguments.steps, arguments.keep))
    if tiny_run.end(alone, 1800) != 0:
        sys.exit(f"the run without readers fails:\n{tiny_run.said(alone)}")

    run = home.run("read")
    texts = home.path / "texts.jsonl"
    texts.write_text('{"text": "Note 3 of letter"}\n{"text": "moons"}\n')
    moonlight, cpu = home.moonlight, ["--device", "cpu"]

    def newest():
        return str(tiny_run.checkpoints(run)[-1])

    def generate():
        return [[moonlight, "generate", "--model", str(run), "--prompt", "Note", "--max-new-tokens", "4", *cpu]]

    def score():
        return [[moonlight, "score", "--model", str(run), "--data", str(texts), *cpu]]

    def plan():
        return [[moonlight, "plan", "--model", str(run), "--json"]]

    def inspect_and_verify():
        checkpoint = newest()
        return [[convert, "inspect", checkpoint], [convert, "verify", checkpoint, checkpoint]]

    counts, faults, lock = {}, [], threading.Lock()
    over = threading.Event()

    def loop(reader):
        while not over.is_set():
            for command in reader():
                done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
                with lock:
                    counts[reader.__name__] = counts.get(reader.__name__, 0) + 1
                    named = command[0] == convert and not pathlib.Path(command[-1]).exists()
                    if done.returncode != 0 and named:
                        counts["removed_meanwhile"] = counts.get("removed_meanwhile", 0) + 1
                    elif done.returncode != 0:
                        faults.append(
                            {"reader": reader.__name__, "code": done.returncode, "stderr": done.stderr[-1000:]}
                        )

    process = home.train(home.recipe("read", arguments.steps, arguments.keep))
    while not tiny_run.checkpoints(run) and process.poll() is None:
        time.sleep(0.01)
    readers = [threading.Thread(target=loop, args=(reader,)) for reader in (generate, score, plan, inspect_and_verify)]
    for reader in readers:
        reader.start()
    code = tiny_run.end(process, 1800)
    over.set()
    for reader in readers:
        reader.join()
    if code != 0:
        faults.append({"run": code, "stderr": tiny_run.said(process)[-2000:]})
    else:
        wrong = tiny_run.difference(tiny_run.final(run), tiny_run.final(home.run("alone")))
        if wrong:
            faults.append({"run": f"it ended without an error, but {wrong}"})
    report = {"steps": arguments.steps, "readings": counts, "seconds": round(time.monotonic() - begun, 1)}
    report["fault_count"], report["faults"] = len(faults), faults[:10]
    if faults:
        report["kept"] = str(home.path)
    else:
        home.remove()
    print(json.dumps(report, indent=2))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
