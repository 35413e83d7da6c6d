#!/usr/bin/env python3
"""Kills a run at random moments and resumes it until it is complete, again and again. In the end weights, optimizer state,
trainer state and metrics must equal those of an uninterrupted run, bit for bit.

    scripts/cluster/kill_runs.py --moonlight target/debug/moonlight --kills 1000

Four of five kills are SIGKILL, the others SIGTERM, after which a run must end with a checkpoint. Prints one JSON object; the exit code is 1
if a check fails.

Needs: only Python. Takes: a few minutes for 1,000 kills with a release build.
"""

import concurrent.futures
import json
import pathlib
import random
import shutil
import signal
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
import tiny_run


class Killer:
    def __init__(self, arguments):
        self.home = tiny_run.Home(arguments.moonlight, arguments.dir)
        self.steps, self.wanted, self.seed = arguments.steps, arguments.kills, arguments.seed
        self.lock = threading.Lock()
        self.counts = {"kills": 0, "sigkill": 0, "sigterm": 0, "before_a_checkpoint": 0, "rounds": 0, "starts": 0}
        self.faults = []

    def prepare(self):
        """Makes the uninterrupted run; measures how long it takes, and how long it takes to start, by a resume after the last step."""
        recipe, seconds = self.home.recipe("uninterrupted", self.steps), []
        for more in ([], ["--resume"]):
            begun = time.monotonic()
            process = self.home.train(recipe, *more)
            if tiny_run.end(process) != 0:
                sys.exit(f"the uninterrupted run fails:\n{tiny_run.said(process)}")
            seconds.append(time.monotonic() - begun)
        self.whole, self.start = max(seconds), min(seconds)
        self.expected = tiny_run.final(self.home.run("uninterrupted"))

    def longest(self, run):
        """The latest time to kill a run that resumes now, chosen so that most kills are before its end."""
        done = [int(path.name.removeprefix("step-")) for path in tiny_run.checkpoints(run)[-1:]]
        left = 1 - (done[0] if done else 0) / self.steps
        return self.start + 0.9 * left * (self.whole - self.start)

    def fault(self, name, what, log=""):
        with self.lock:
            self.faults.append({"round": name, "what": what, "stderr": log[-2000:]})

    def another(self, signum, newest):
        """Counts a kill; False after the wanted number."""
        with self.lock:
            if self.counts["kills"] >= self.wanted:
                return False
            self.counts["kills"] += 1
            self.counts["sigkill" if signum == signal.SIGKILL else "sigterm"] += 1
            self.counts["before_a_checkpoint"] += not newest
            return True

    def round(self, number):
        """One run from its beginning to its end, killed on the way."""
        chance = random.Random(f"{self.seed}/{number}")
        name = f"round-{number}"
        recipe, run = self.home.recipe(name, self.steps), self.home.run(name)
        killed = 0
        while True:
            process = self.home.train(recipe, "--resume")
            with self.lock:
                self.counts["starts"] += 1
            signum = signal.SIGTERM if chance.random() < 0.2 else signal.SIGKILL
            # A run that has not ended after so many kills has lost its checkpoints.
            wait = None if killed >= 200 else chance.uniform(0, self.longest(run))
            try:
                code = process.wait(120 if wait is None else wait)
                by_us = False
            except tiny_run.subprocess.TimeoutExpired:
                if wait is None:
                    self.fault(name, "does not end", tiny_run.said(process))
                    signum = signal.SIGKILL
                by_us = self.another(signum, tiny_run.checkpoints(run)) or wait is None
                if by_us:
                    killed += 1
                    process.send_signal(signum)
                code = tiny_run.end(process)
            log = tiny_run.said(process)
            process.log.close()
            if code == 0:
                break
            if code is None:
                self.fault(name, "neither ends nor reacts to SIGTERM within two minutes", log)
                return True
            expected = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (130, 143, -signal.SIGTERM)}[signum]
            if not by_us or code not in expected:
                how = f"after {killed} kills, the last by signal {signum}" if by_us else "without a kill"
                self.fault(name, f"ends with code {code}, {how}", log)
                return True
        try:
            wrong = tiny_run.difference(tiny_run.final(run), self.expected)
        except (OSError, IndexError, ValueError) as error:
            wrong = f"cannot be read: {error}"
        if wrong:
            self.fault(name, f"complete after {killed} kills, and {wrong}", log)
            return True
        with self.lock:
            self.counts["rounds"] += 1
        shutil.rmtree(run)
        return True

    def work(self, first, jobs):
        number = first
        while self.counts["kills"] < self.wanted and len(self.faults) < 20:
            self.round(number)
            number += jobs


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--moonlight", required=True, help="the program")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=30, help="steps of the run; every second one is saved")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", help="where the runs go [default: /dev/shm]")
    arguments = parser.parse_args()
    begun = time.monotonic()
    killer = Killer(arguments)
    killer.prepare()
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda first: killer.work(first, arguments.jobs), range(arguments.jobs)))
    report = {**killer.counts, "seconds": round(time.monotonic() - begun, 1), "faults": killer.faults}
    if killer.faults:
        report["kept"] = str(killer.home.path)
    else:
        killer.home.remove()
    print(json.dumps(report, indent=2))
    return 1 if killer.faults else 0


if __name__ == "__main__":
    sys.exit(main())
