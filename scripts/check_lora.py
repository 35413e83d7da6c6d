#!/usr/bin/env python3
"""Takes LoRA adapters through `moonlight` and peft, both ways.

    python scripts/check_lora.py --program target/release/moonlight
    python scripts/check_lora.py --write fixtures/lora

For each architecture of fixtures/ the first form trains adapters of every projection for some steps (`[lora]`), and then

* opens the base and the adapter in peft, every tensor of the file in its place, and holds its log-probabilities to those of
  `moonlight score` (1e-4);
* merges them (`moonlight merge`) and holds what transformers makes of the result to the same;
* has peft save the adapter anew, and `moonlight score` that.

The second form makes the fixture of moonlight-train/tests/parity_lora.rs: an adapter as peft initialises and saves it, and
what forty steps of torch's AdamW do to the loss (attention, dense and shared MLPs, and the experts' down projections; the
experts' gate and up share one A in peft and have one each here, so that they train otherwise).

Run it with each release of peft and transformers that matters; it prints which they were. Exit code 0 if all of it holds.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import peft
import torch
import transformers
from safetensors import safe_open

from make_fixtures import load, pad, versions, write_json
from train_reference import RULES, STEPS, rate_at

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
FAMILIES = ["training/init", "moonlight-like", "deepseek-v3-like", "deepseek-v2-lite-like", "llama", "qwen2"]
BUDGET = 1e-4
SEED = 11
RATE = {"learning_rate": 0.02, "final_learning_rate": 0.002}

failures = []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=pathlib.Path, help="the built `moonlight`")
    parser.add_argument("--write", type=pathlib.Path, metavar="DIR", help="make the fixture there")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    if arguments.write:
        write_reference(arguments.write)
    if arguments.program:
        with tempfile.TemporaryDirectory() as home:
            for family in FAMILIES:
                check(arguments.program.resolve(), family, pathlib.Path(home) / family.replace("/", "-"))
    if not arguments.write and not arguments.program:
        parser.error("give --program or --write")
    for failure in failures:
        print(f"FAILED {failure}")
    sys.exit(bool(failures))


def expect(name, holds, detail=""):
    print(f"{'ok    ' if holds else 'FAILED'} {name}{f': {detail}' if detail != '' else ''}")
    if not holds:
        failures.append(name)


# --- ours in peft -----------------------------------------------------------------------------------------------------

RECIPE = """
[run]
name = "run"
dir = "{home}/runs"
device = "cpu"
[model]
path = "{base}"
dtype = "f32"
[lora]
rank = 3
alpha = 7
targets = ["all"]
rslora = {rslora}
[data]
train = ["{tokens}"]
format = "tokens"
tokenizer = "none"
sequence_length = 48
pack = false
cache_dir = "{home}/cache"
[optimizer]
name = "{optimizer}"
learning_rate = 0.02
[train]
steps = 12
batch_size = 4
plots = false
"""


def run(program, *arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program.name} {' '.join(map(str, arguments))}\n{done.stderr}")
    return done.stdout


def check(program, family, home):
    base = FIXTURES / family
    home.mkdir(parents=True)
    sequences = [json.loads(line)["tokens"] for line in (FIXTURES / "training/tokens.jsonl").open()][:6]
    data = home / "data.jsonl"
    data.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in sequences))
    # Both scales and both optimizers, over the families.
    number = FAMILIES.index(family)
    recipe = home / "recipe.toml"
    recipe.write_text(
        RECIPE.format(
            home=home,
            base=base,
            tokens=FIXTURES / "training/tokens.jsonl",
            rslora="true" if number % 2 else "false",
            optimizer="muon" if number % 3 else "adamw",
        )
    )
    run(program, "train", recipe)
    adapter = home / "runs/run/checkpoints/step-00000012"
    ours = scored(program, data, "--model", adapter, "--dtype", "f32")
    plain = scored(program, data, "--model", base, "--dtype", "f32")
    moved = apart(ours, plain)
    expect(f"{family}: the adapter does something", moved > 0.05, f"{moved:.1e}")

    model = peft.PeftModel.from_pretrained(load(base), adapter).eval()
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        wrong = [name for name in file.keys() if not placed(model, name, file.get_tensor(name))]
        expect(f"{family}: peft has every tensor of the file", not wrong, wrong or "")
        count = len(list(file.keys()))
    trained = [name for name, _ in model.named_parameters() if "lora_" in name]
    expect(f"{family}: and no other adapter", len(trained) == count, f"{count} tensors")
    distance = apart(logprobs(model, sequences), ours)
    expect(f"{family}: equal log-probabilities in peft", distance < BUDGET, f"{distance:.1e}")

    run(program, "merge", "--adapter", adapter, "--output", home / "merged", "--dtype", "f32")
    distance = apart(logprobs(load(home / "merged"), sequences), ours)
    expect(f"{family}: equal log-probabilities merged, in transformers", distance < BUDGET, f"{distance:.1e}")

    model.save_pretrained(home / "again")
    distance = apart(scored(program, data, "--model", base, "--adapter", home / "again", "--dtype", "f32"), ours)
    expect(f"{family}: equal log-probabilities of what peft saves", distance < BUDGET, f"{distance:.1e}")


def placed(model, name, value):
    name = name.replace(".weight", ".default.weight")
    found = dict(model.named_parameters()).get(name)
    return found is not None and torch.equal(found, value)


def scored(program, data, *arguments):
    lines = run(program, "score", "--data", data, *arguments).splitlines()
    return [torch.tensor(json.loads(line)["logprobs"][1:]) for line in lines]


@torch.no_grad()
def logprobs(model, sequences):
    found = []
    for tokens in sequences:
        ids = torch.tensor([tokens])
        logs = model(ids, use_cache=False).logits.float().log_softmax(-1)[0, :-1]
        found.append(logs.gather(1, ids[0, 1:, None])[:, 0])
    return found


def apart(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True) if len(x))


# --- peft's training --------------------------------------------------------------------------------------------------


def write_reference(out):
    shutil.rmtree(out, ignore_errors=True)
    (out / "init").mkdir(parents=True)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    lines = (FIXTURES / "training/tokens.jsonl").open()
    sequences = [json.loads(line)["tokens"] for line in lines]
    batch = len(sequences) // STEPS
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        # A module called `gate_proj` would be taken for the experts': the other MLPs are named by their parameters.
        target_parameters=[
            f"mlp.{where}{which}_proj.weight" for where in ("", "shared_experts.") for which in ("gate", "up", "down")
        ]
        + ["mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    base = load(FIXTURES / "training/init")
    base.name_or_path = "../../training/init"
    model = peft.get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = "../../training/init"
    model.save_pretrained(out / "init")
    (out / "init/README.md").unlink(missing_ok=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas, epsilon, decay = (RULES[key] for key in ("betas", "epsilon", "weight_decay"))
    adamw = torch.optim.AdamW(trained, betas=betas, eps=epsilon, weight_decay=decay)
    rules = RULES | RATE
    steps = []
    for step in range(STEPS):
        ids, mask, labels = pad(sequences[step * batch:(step + 1) * batch])
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, rules["gradient_clip"])
        # The same warm-up and cosine, at another height.
        rate = rate_at(step, STEPS) * RATE["learning_rate"] / RULES["learning_rate"]
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        steps.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": rate})
    head = {"seed": SEED, "batch_size": batch, "rules": rules, "versions": versions() | {"peft": peft.__version__}}
    write_json(out / "reference.json", head | {"steps": steps})
    print(f"loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}")


if __name__ == "__main__":
    main()
