#!/usr/bin/env python3
"""Two runs at once in one folder, and two with one token cache.

    scripts/cluster/two_runs.py --moonlight target/debug/moonlight

* Two runs in one folder, new ones and resumed ones alternately: exactly one continues and ends as if it had been alone; the other ends with an
  error that names the first one's process and host.
* Two runs that tokenize the same texts into one cache, each as process 1 of its own PID namespace, as in containers: both end as if they
  had been alone.

Prints one JSON object; the exit code is 1 if a check fails.

Needs: only Python; `unshare` for the second part. Takes: a minute or two with a release build.
"""

import json
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
import tiny_run

NAMESPACES = [
    ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"],
    ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"],
]


def in_one_folder(home, rounds, steps, chance, faults):
    alone = home.train(home.recipe("alone", steps))
    if tiny_run.end(alone) != 0:
        sys.exit(f"the run alone fails:\n{tiny_run.said(alone)}")
    expected = tiny_run.final(home.run("alone"))
    host = socket.gethostname()
    well = 0
    for number in range(rounds):
        name = f"pair-{number}"
        recipe = home.recipe(name, steps)
        more = []
        if number % 2 == 1:
            first = home.train(recipe)
            while len(tiny_run.checkpoints(home.run(name))) == 0 and first.poll() is None:
                time.sleep(0.005)
            first.kill()
            first.wait()
            more = ["--resume"]
        pair = [home.train(recipe, *more)]
        time.sleep(chance.choice([0, 0, chance.uniform(0, 0.3)]))
        pair.append(home.train(recipe, *more))
        codes = [tiny_run.end(process) for process in pair]
        logs = [tiny_run.said(process) for process in pair]
        what = None
        if sorted(code == 0 for code in codes) != [False, True]:
            what = f"{codes.count(0)} of the two end without an error"
        else:
            winner = codes.index(0)
            refusal = logs[1 - winner]
            if codes[1 - winner] != 1:
                what = f"the other ends with code {codes[1 - winner]}"
            elif not re.search(rf"\b{pair[winner].pid}\b", refusal) or host not in refusal:
                what = f"the refusal does not name process {pair[winner].pid} on {host}"
            else:
                try:
                    wrong = tiny_run.difference(tiny_run.final(home.run(name)), expected)
                except (OSError, IndexError, ValueError) as error:
                    wrong = f"what it left cannot be read: {error}"
                what = wrong and f"the winner is complete, but {wrong}"
        if what:
            faults.append({"pair": number, "resumed": bool(more), "what": what, "stderr": [log[-300:] for log in logs]})
        else:
            well += 1
            shutil.rmtree(home.run(name))
    return well


def with_one_cache(home, rounds, steps, faults):
    """How many pairs ended without an error; None where namespaces are not permitted."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        works = (before for before in NAMESPACES if subprocess.run([*before, "true"], **quiet).returncode == 0)
        before = next(works, None)
    except FileNotFoundError:
        before = None
    if before is None:
        print("SKIPPED: two runs with one cache and process id 1 each: unshare is not permitted here", file=sys.stderr)
        return None
    alone = home.train(home.recipe("alone-with-a-cache", steps, cache="cache-alone"))
    if tiny_run.end(alone) != 0:
        sys.exit(f"the run alone fails:\n{tiny_run.said(alone)}")
    expected = tiny_run.final(home.run("alone-with-a-cache"))
    well = 0
    for number in range(rounds):
        names = [f"cached-{number}-{which}" for which in "ab"]
        recipes = [home.recipe(name, steps, cache=f"cache-{number}") for name in names]
        pair = [home.train(recipe, before=before) for recipe in recipes]
        codes = [tiny_run.end(process) for process in pair]
        what = None if codes == [0, 0] else f"they end with the codes {codes}"
        for name in names if what is None else []:
            wrong = tiny_run.difference(tiny_run.final(home.run(name)), expected)
            what = what or (wrong and f"{name} is complete, but {wrong}")
        if what:
            logs = [tiny_run.said(process)[-300:] for process in pair]
            faults.append({"pair with one cache": number, "what": what, "stderr": logs})
        else:
            well += 1
            for name in names:
                shutil.rmtree(home.run(name))
        shutil.rmtree(home.path / f"cache-{number}", ignore_errors=True)
    return well


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--moonlight", required=True, help="the program")
    parser.add_argument("--folders", type=int, default=50, help="pairs in one folder")
    parser.add_argument("--caches", type=int, default=20, help="pairs with one cache")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", help="where the runs go [default: /dev/shm]")
    arguments = parser.parse_args()
    begun = time.monotonic()
    faults = []
    home = tiny_run.Home(arguments.moonlight, arguments.dir)
    folders = in_one_folder(home, arguments.folders, arguments.steps, random.Random(arguments.seed), faults)
    # More text, so that both tokenize at the same time.
    texts = tiny_run.Home(arguments.moonlight, arguments.dir, files=60, lines=600)
    caches = with_one_cache(texts, arguments.caches, 6, faults)
    report = {
        "one_folder": {"pairs": arguments.folders, "without_fault": folders},
        "one_cache": "skipped" if caches is None else {"pairs": arguments.caches, "without_fault": caches},
        "seconds": round(time.monotonic() - begun, 1),
        "fault_count": len(faults),
        "faults": faults[:10],
    }
    if faults:
        report["kept"] = [str(home.path), str(texts.path)]
    else:
        home.remove()
        texts.remove()
    print(json.dumps(report, indent=2))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
