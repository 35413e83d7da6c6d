"""Runs programs with a deadline, and samples the memory that they use on the device and on the host."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time

# Seconds between two looks at a program that runs.
PAUSE = 0.05
# Of a log that an error quotes.
QUOTED = 600


class OutOfTime(Exception):
    """The deadline came before the program ended."""


class Failed(Exception):
    """A program ended with an error, or its output is not what was expected."""


class Absent(Exception):
    """A program, a package or a device that a measurement needs is not there."""


class Refused(Exception):
    """The prediction is that a measurement does not fit."""


class DeviceMemory:
    """The largest memory in use on a card while the context is open, sampled by `nvidia-smi` every tenth of a second.

    `peak` is in bytes and without what was in use before; `None` where `nvidia-smi` is not there."""

    def __init__(self, index):
        self.index, self.peak, self.process = index, None, None

    def __enter__(self):
        if self.index is None or not shutil.which("nvidia-smi"):
            return self
        query = ["nvidia-smi", "-i", self.index, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        with contextlib.suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
            first = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
            self.before, self.largest = float(first.split()[0]), 0.0
            self.process = subprocess.Popen(
                [*query, "-lms", "100"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self.thread = threading.Thread(target=self.read, daemon=True)
            self.thread.start()
        return self

    def read(self):
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self.largest = max(self.largest, float(line))

    def __exit__(self, *_):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.thread.join(1)
            self.peak = max(0, int((self.largest - self.before) * 2**20)) if self.largest else None


class Done:
    """A program that ended, or that was ended because it had done enough."""

    def __init__(self, stdout, stderr, seconds, device_peak, host_peak):
        self.stdout, self.stderr, self.seconds = stdout, stderr, seconds
        self.device_peak, self.host_peak = device_peak, host_peak


class Runner:
    """Runs one program at a time. `deadline` is a time of `time.monotonic()`, set before each measurement."""

    def __init__(self, folder, card):
        self.folder, self.card, self.deadline, self.name = folder, card, float("inf"), ""
        folder.mkdir(parents=True, exist_ok=True)

    def left(self):
        return self.deadline - time.monotonic()

    def run(self, command, environment=None, enough=None, expected=(0,), words=None):
        """Runs a program to its end, or until `enough()`, and returns a `Done`. Its output goes to two files in the folder. `words`
        gets the seconds after the start at which each word was printed.

        The program has a process group of its own, which is killed if this function is left in any other way."""
        command = [str(part) for part in command]
        if self.left() <= 0:
            raise OutOfTime("no time was left to start it")
        out, err = (self.folder / f"{self.name}.{kind}.txt" for kind in ("stdout", "stderr"))
        start, killed, host = time.monotonic(), False, 0
        with DeviceMemory(self.card) as memory, open(out, "wb") as stdout, open(err, "ab") as stderr:
            stderr.write(f"$ {' '.join(command)}\n".encode())
            stderr.flush()
            beginning = stderr.tell()
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout if words is None else subprocess.PIPE,
                    stderr=stderr,
                    # A backtrace would push the message out of what an error quotes.
                    env=os.environ | {"RUST_BACKTRACE": "0"} | (environment or {}),
                    start_new_session=True,
                )
            except OSError as error:
                raise Failed(f"`{command[0]}` cannot be started: {error}") from None
            reader = None
            if words is not None:
                reader = threading.Thread(target=copy_words, args=(process.stdout, stdout, words), daemon=True)
                reader.start()
            try:
                while process.poll() is None:
                    host = max(host, resident(process.pid))
                    if enough and enough():
                        killed = True
                        break
                    if self.left() <= 0:
                        raise OutOfTime(f"it was ended after {time.monotonic() - start:.0f} s")
                    time.sleep(PAUSE)
            finally:
                end(process)
                if reader:
                    reader.join(2)
        seconds = time.monotonic() - start
        with open(err, "rb") as written:
            written.seek(beginning)
            errors = written.read().decode(errors="replace")
        text = out.read_text(encoding="utf-8", errors="replace")
        if not killed and process.returncode not in expected:
            # Rust's own lines about a panic come last, and say little.
            last = (errors.strip() or text.strip())[-QUOTED:]
            raise Failed(f"`{pathlib.Path(command[0]).name}` ended with {process.returncode}: {last}")
        return Done(text, errors, seconds, memory.peak, host or None)


def copy_words(source, target, times):
    """Copies an output, and notes when each word and its space came."""
    start = time.monotonic()
    while byte := source.read(1):
        target.write(byte)
        if byte == b" ":
            times.append(time.monotonic() - start)


def resident(process):
    """The largest resident memory of a process so far, in bytes; 0 once it has ended or where there is no `/proc`."""
    with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/{process}/status", encoding="ascii", errors="replace") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), 0)
    return 0


def end(process):
    """Ends a process and those that it started. What is left of a run is not needed, so nothing is asked to save it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
