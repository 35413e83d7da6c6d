"""Code that the scripts share: arguments, running programs, measurements in turns, checks. It imports only the standard library,
so that `--help` of every script works without its packages.

A script finds this file relative to itself, in any working directory:

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys

SCRIPTS = pathlib.Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
FIXTURES = ROOT / "fixtures"


def parser(description):
    """An argument parser whose help is the script's docstring, unchanged."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def program(path):
    """The absolute path of a program, as the type of an argument."""
    found = pathlib.Path(path).resolve()
    if not found.is_file():
        raise argparse.ArgumentTypeError(f"`{path}` is not a file: build it first (see --help)")
    return found


class Late:
    """A module, or a name of it, that is imported when it is first used."""

    def __init__(self, module, name):
        self._module, self._name = module, name

    def _load(self):
        try:
            loaded = importlib.import_module(self._module)
        except ModuleNotFoundError as error:
            sys.exit(
                f"error: the package `{error.name}` is not installed\nhint: see the extras of scripts/pyproject.toml"
            )
        return getattr(loaded, self._name) if self._name else loaded

    def __getattr__(self, attribute):
        return getattr(self._load(), attribute)

    def __call__(self, *arguments, **keywords):
        return self._load()(*arguments, **keywords)


def late(module, name=None):
    """`import module`, or `from module import name`, delayed until it is first used."""
    return Late(module, name)


def no_grad(function):
    """`torch.no_grad()` as a decorator that does not import torch before the function is called."""

    @functools.wraps(function)
    def without_gradients(*arguments, **keywords):
        import torch

        with torch.no_grad():
            return function(*arguments, **keywords)

    return without_gradients


@contextlib.contextmanager
def full_precision_products():
    """torch.optim.Muon always iterates in `torch.bfloat16`; within this context that name means f32."""
    import torch

    original = torch.bfloat16
    torch.bfloat16 = torch.float32
    try:
        yield
    finally:
        torch.bfloat16 = original


def attempt(*command, **options):
    """Runs a program; the result has its exit status, stdout and stderr as text."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)


def call(*command, **options):
    """Runs a program and returns its stdout. Ends this script with the program's stderr if it fails."""
    done = attempt(*command, **options)
    if done.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)}\n{done.stderr[-4000:]}")
    return done.stdout


def measure(*command, **options):
    """Runs a program that prints one line of JSON on stdout; its stderr stays on the terminal."""
    command = [str(part) for part in command]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout
    return json.loads(output.strip().splitlines()[-1])


def in_turns(names, rounds):
    """Rounds over several alternatives, as pairs of the number of a round and a name.

    Every second round has the reverse order, so that a drift of the machine's speed does not favor one of them."""
    names = list(names)
    for number in range(1, rounds + 1):
        for name in names if number % 2 else reversed(names):
            yield number, name


def thread_settings(threads):
    """The environment for a program that uses that many threads; unchanged for `None`."""
    environment = dict(os.environ)
    if threads:
        environment |= {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    return environment


def memory_mib(key="VmHWM"):
    """Memory of this process in MiB: the peak so far, or another line of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith(f"{key}:"))


def print_progress(text):
    """Prints to stderr, because stdout contains only the result."""
    print(text, file=sys.stderr, flush=True)


def print_versions(*packages):
    """Prints the versions of the packages that a result depends on."""
    print(", ".join(f"{name} {importlib.import_module(name).__version__}" for name in packages), flush=True)


class Checks:
    """Comparisons, each printed as a line; `finish` ends the script with 1 if one failed."""

    def __init__(self):
        self.count, self.failures = 0, []

    def expect(self, name, holds, detail=""):
        """Prints a comparison and returns whether it holds."""
        self.count += 1
        print(f"{'ok    ' if holds else 'FAILED'} {name}{f': {detail}' if detail != '' else ''}", flush=True)
        if not holds:
            self.failures.append(name)
        return holds

    def finish(self):
        for failure in self.failures:
            print(f"FAILED {failure}")
        print(f"{self.count - len(self.failures)} of {self.count} comparisons hold")
        sys.exit(bool(self.failures))
