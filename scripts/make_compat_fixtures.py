"""Run folders as a given build of `moonlight` writes them, for the test that later builds still open them.

    python scripts/make_compat_fixtures.py target/debug/moonlight fixtures/compat

Run it with the program of the commit whose files are to be kept, not with the current one: `fixtures/compat/README.md` says
which that was. Needs no package. `moonlight-train/tests/compat.rs` reads the result.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

RECIPE = """
[run]
name = "{name}"
dir = "."
seed = 5

[model]
{model}
[data]
train = ["text/*.txt"]
valid_fraction = 0.2
tokenizer = "bytes"
sequence_length = 24
cache_dir = "cache"

[optimizer]
learning_rate = {learning_rate}
{optimizer}
[schedule]
name = "cosine"
warmup_steps = 1
total_steps = 9

[train]
steps = 6
batch_size = 2
gradient_accumulation = 2
validate_every = 3
validate_batches = 2
checkpoint_every = 3
probe_every = 2
keep = 0
plots = false
{more}"""

SHAPE = """hidden_size = 16
intermediate_size = 24
num_hidden_layers = 2
num_attention_heads = 2
vocab_size = 262
max_position_embeddings = 48
rms_norm_eps = 1e-5
kv_lora_rank = 8
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
n_routed_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 12
n_shared_experts = 1
first_k_dense_replace = 1
n_group = 1
topk_group = 1
routed_scaling_factor = 1.0
norm_topk_prob = true
"""

BASE = 'path = "pretrain/checkpoints/step-00000006"\n'
# Newton-Schulz in f32: what it computes in bf16 depends on the instructions that the CPU has.
F32 = 'newton_schulz_dtype = "f32"\n'

RUNS = {
    "pretrain": {"model": SHAPE, "optimizer": F32},
    "workers": {"model": SHAPE, "optimizer": F32, "more": "[distributed]\ndevices = 2\n"},
    "bf16": {"model": 'dtype = "bf16"\n' + SHAPE, "optimizer": 'rounding = "master"\n'},
    "lora": {
        "model": BASE,
        "optimizer": F32,
        "learning_rate": 2e-2,
        "more": '[lora]\nrank = 2\nalpha = 4\ndropout = 0.1\ntargets = ["all"]\n',
    },
}
# How each model is named on the command line of `moonlight generate`.
MODELS = {
    "pretrain": ["--model", "pretrain"],
    "workers": ["--model", "workers"],
    "bf16": ["--model", "bf16", "--dtype", "f32"],
    "lora": ["--model", "pretrain/checkpoints/step-00000006", "--adapter", "lora"],
}
FEATURES = ["avx2", "fma", "avx512f", "avx512bw", "avx512_bf16"]


def text(folder: Path) -> None:
    folder.mkdir()
    for file in range(10):
        lines = [f"File {file} says {(file * 31 + line) % 17} and {line * file % 7} of {line}." for line in range(8)]
        (folder / f"{file}.txt").write_text("\n".join(lines))


def run(program: str, home: Path, arguments: list[str]) -> str:
    done = subprocess.run([program, *arguments], cwd=home, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    return done.stdout


def cpu() -> dict:
    """The machine that it ran on: results are equal to the last bit on such a one, and nearly so on others."""
    flags = set()
    if Path("/proc/cpuinfo").exists():
        flags = set(next((l for l in open("/proc/cpuinfo") if l.startswith("flags")), "").split())
    return {"architecture": platform.machine(), "features": [name for name in FEATURES if name in flags]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="the `moonlight` whose files are kept")
    parser.add_argument("output", type=Path, help="the folder to make, or to make anew")
    arguments = parser.parse_args()
    program = os.path.abspath(arguments.program)
    # A folder of its own with a neutral name: adapters record where their base is.
    home = Path(tempfile.mkdtemp(prefix="moonlight-compat-"))
    text(home / "text")
    generated = {}
    for name, parts in RUNS.items():
        values = {"name": name, "learning_rate": 1e-2, "optimizer": "", "more": "", **parts}
        (home / f"{name}.toml").write_text(RECIPE.format(**values))
        run(program, home, ["train", f"{name}.toml", "--device", "cpu"])
        request = ["generate", *MODELS[name], "--prompt", "File 3 says", "--max-new-tokens", "12", "--json"]
        generated[name] = {"arguments": request, **json.loads(run(program, home, [*request, "--device", "cpu"]))}
        (home / f"{name}.toml").unlink()
    shutil.rmtree(home / "cache")
    expected = {"cpu": cpu(), "generated": generated}
    (home / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    # Only what an earlier run of this script made is replaced.
    arguments.output.mkdir(parents=True, exist_ok=True)
    for old in arguments.output.iterdir():
        if old.name in {path.name for path in home.iterdir()}:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copytree(home, arguments.output, dirs_exist_ok=True)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
