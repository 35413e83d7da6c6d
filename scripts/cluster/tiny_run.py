"""A run small enough to be killed a thousand times, for the scripts in this folder."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile

RECIPE = """\
[run]
name = "{name}"
dir = {runs}
seed = 11
device = "cpu"

[model]
vocab_size = 262
max_position_embeddings = 48
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
rms_norm_eps = 1e-5
kv_lora_rank = 8
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
n_routed_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 8
n_shared_experts = 1
first_k_dense_replace = 1
n_group = 1
topk_group = 1
routed_scaling_factor = 1.0
norm_topk_prob = true

[data]
train = [{texts}]
valid_fraction = 0.1
tokenizer = "bytes"
sequence_length = 24
cache_dir = {cache}

[optimizer]
learning_rate = 3e-3

[schedule]
name = "cosine"
warmup_steps = 2

[train]
steps = {steps}
batch_size = 2
gradient_accumulation = 2
validate_every = 10
validate_batches = 2
checkpoint_every = 2
keep = {keep}
plots = false
"""

# Metrics of time and memory, which differ between equal runs.
MEASURED = ("tokens_per_second", "memory_mib")


class Home:
    """A folder with texts, recipes, their runs and a token cache."""

    def __init__(self, moonlight, under=None, files=12, lines=16):
        self.moonlight = str(pathlib.Path(moonlight).resolve())
        under = under or ("/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="moonlight-", dir=under))
        (self.path / "texts").mkdir()
        for file in range(files):
            text = "".join(
                f"Note {line} of letter {file}: {(line * 37 + file * 11) % 101} ships, {line * file % 13} moons.\n"
                for line in range(lines)
            )
            (self.path / "texts" / f"{file:03}.txt").write_text(text)

    def recipe(self, name, steps=30, keep=2, cache="cache"):
        """Writes the recipe of a run `name`."""
        quoted = {
            "runs": json.dumps(str(self.path / "runs")),
            "texts": json.dumps(str(self.path / "texts" / "*.txt")),
            "cache": json.dumps(str(self.path / cache)),
        }
        path = self.path / f"{name}.toml"
        path.write_text(RECIPE.format(name=name, steps=steps, keep=keep, **quoted))
        return path

    def run(self, name):
        return self.path / "runs" / name

    def train(self, recipe, *more, before=()):
        """Starts training. Stderr goes to a file: a pipe that is not read would block the program."""
        log = tempfile.TemporaryFile(dir=self.path)
        command = [*before, self.moonlight, "train", str(recipe), "--device", "cpu", *more]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        process.log = log
        return process

    def remove(self):
        shutil.rmtree(self.path, ignore_errors=True)


def said(process):
    """What a process of `Home.train` has written to stderr."""
    process.log.seek(0)
    return process.log.read().decode(errors="replace")


def end(process, seconds=120):
    """Waits for the end of a process and returns its exit status; after `seconds` it is killed, and the result is None."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return None


def checkpoints(run):
    """The folders of a run's checkpoints, oldest first."""
    folder = pathlib.Path(run) / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []


def metrics(run):
    """The lines of `metrics.jsonl` without the measured metrics."""
    lines = (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def nameless(name, contents):
    """A file of a checkpoint without the names of its run, folder and cache."""
    if name == "trainer.json":
        state = json.loads(contents)
        recipe = state.get("identity", {}).get("recipe", {})
        recipe.pop("run", None)
        recipe.get("data", {}).pop("cache_dir", None)
        return state
    if name == "manifest.json":
        manifest = json.loads(contents)
        # The manifest's hash of the file that contains these names.
        manifest["files"].pop("trainer.json", None)
        return manifest
    return contents


def final(run):
    """The files of a run's newest checkpoint and its metrics, which must be equal bit for bit."""
    newest = checkpoints(run)[-1]
    files = {path.name: nameless(path.name, path.read_bytes()) for path in sorted(newest.iterdir()) if path.is_file()}
    return {"step": newest.name, "files": files, "metrics": metrics(run)}


def difference(found, expected):
    """The difference between two results of `final` as a sentence; None if they are equal."""
    if found["step"] != expected["step"]:
        return f"the newest checkpoint is {found['step']}, not {expected['step']}"
    if found["files"].keys() != expected["files"].keys():
        odd = sorted(found["files"].keys() ^ expected["files"].keys())
        return f"only one of the two has {', '.join(odd)}"
    unequal = [name for name, contents in expected["files"].items() if found["files"][name] != contents]
    if unequal:
        return f"{', '.join(unequal)} of {expected['step']} differ"
    if found["metrics"] != expected["metrics"]:
        pairs = zip(found["metrics"], expected["metrics"])
        line = next((place for place, (one, other) in enumerate(pairs, 1) if one != other), None)
        length = f"{len(found['metrics'])} lines, not {len(expected['metrics'])}"
        return f"metrics.jsonl differs: {length if line is None else f'line {line}'}"
    return None
