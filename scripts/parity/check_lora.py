#!/usr/bin/env python3
"""Takes LoRA adapters through `moonlight` and peft, both ways.

    python scripts/parity/check_lora.py --program target/release/moonlight
    python scripts/parity/check_lora.py --write fixtures/lora

For each architecture of fixtures/ the first form trains adapters of every projection for some steps (`[lora]`), and then

* opens the base and the adapter in peft, checks that every tensor of the file is loaded, and compares the log-probabilities with those
  of `moonlight score` (1e-4);
* merges them (`moonlight merge`) and compares the merged model in transformers with the same;
* lets peft save the adapter again, and compares `moonlight score` of that.

Then peft makes an adapter of each kind that its config has (PiSSA, OLoRA, DoRA, `all-linear`, trained embeddings, biases, tokens,
patterns, ...). `moonlight score`, and transformers with the output of `moonlight merge`, are compared with `PeftModel.from_pretrained`. The
script prints the largest difference, or the error with which the program refuses the adapter.

The second form makes the fixtures of moonlight-convert/tests/peft_kinds.rs (DIR/kinds: an adapter of each kind with the log-probabilities
that peft gives) and of moonlight-train/tests/parity_lora.rs: an adapter as peft initializes and saves it, and the loss over forty steps of
torch's AdamW (attention, dense and shared MLPs, and the experts' down projections; gate and up of an expert share one A in peft and have
one each here, so they would train differently).

Run it with each release of peft and transformers that matters; it prints the versions. The exit code is 0 if every comparison holds.

Needs: torch, transformers, peft, safetensors (group `parity`). Takes: half a minute with a release build.
"""

import json
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from common import late
from models import distance, logprobs, score, try_score, write_sequences

sys.path.insert(0, str(common.SCRIPTS / "fixtures"))
from make_fixtures import load, pad, versions, write_json
from make_training_reference import RULES, STEPS, rate_at

peft = late("peft")
torch = late("torch")
transformers = late("transformers")
safe_open = late("safetensors", "safe_open")


FIXTURES = common.FIXTURES
FAMILIES = ["training/init", "moonlight-like", "deepseek-v3-like", "deepseek-v2-lite-like", "llama", "qwen2"]
BUDGET = 1e-4
SEED = 11
RATE = {"learning_rate": 0.02, "final_learning_rate": 0.002}

LLAMA, QWEN2, MOONLIGHT, DEEPSEEK = "llama", "qwen2", "moonlight-like", "deepseek-v3-like"
QO = ["q_proj", "o_proj"]
# Name: (base, settings in addition to r=2, lora_alpha=4, target_modules=QO; a part of the error where it is refused).
KINDS = {
    "plain": (LLAMA, {}),
    "rslora": (LLAMA, {"use_rslora": True, "r": 3}),
    "gaussian": (LLAMA, {"init_lora_weights": "gaussian"}),
    "orthogonal": (LLAMA, {"init_lora_weights": "orthogonal"}),
    "mica": (LLAMA, {"init_lora_weights": "mica"}),
    "pissa": (LLAMA, {"init_lora_weights": "pissa"}),
    "pissa-rslora": (QWEN2, {"init_lora_weights": "pissa", "use_rslora": True, "r": 3, "target_modules": "all-linear"}),
    "olora": (LLAMA, {"init_lora_weights": "olora", "target_modules": "all-linear"}),
    "olora-mla": (DEEPSEEK, {"init_lora_weights": "olora", "target_modules": ["q_a_proj", "kv_b_proj", "o_proj"]}),
    "dora": (LLAMA, {"use_dora": True}),
    "dora-bias": (QWEN2, {"use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "dora-pissa": (LLAMA, {"use_dora": True, "init_lora_weights": "pissa"}),
    "dora-head": (LLAMA, {"use_dora": True, "target_modules": ["q_proj", "lm_head"]}),
    "all-linear": (LLAMA, {"target_modules": "all-linear"}),
    "all-linear-qwen2": (QWEN2, {"target_modules": "all-linear"}),
    "all-linear-moonlight": (MOONLIGHT, {"target_modules": "all-linear"}),
    "all-linear-deepseek": (DEEPSEEK, {"target_modules": "all-linear"}),
    "latents": (DEEPSEEK, {"target_modules": ["q_a_proj", "kv_a_proj_with_mqa"]}),
    "router": (MOONLIGHT, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "parameters": (
        MOONLIGHT,
        {
            "target_modules": ["q_proj"],
            "target_parameters": [
                "mlp.up_proj.weight",
                "shared_experts.gate_proj.weight",
                "experts.down_proj",
                "experts.gate_up_proj",
            ],
        },
    ),
    "patterns": (
        LLAMA,
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"k_proj": 4, r".*\.1\..*up_proj": 3},
            "alpha_pattern": {"self_attn.q_proj": 9, "up_proj": 1},
        },
    ),
    "layers": (LLAMA, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "expression": (LLAMA, {"target_modules": r".*\.(?:0|2)\.self_attn\.(?:q|v)_proj"}),
    "exclude": (LLAMA, {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "modules-to-save": (LLAMA, {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "modules-to-save-projection": (
        MOONLIGHT,
        {"target_modules": ["o_proj"], "modules_to_save": ["kv_b_proj", "mlp.gate"]},
    ),
    "bias-all": (QWEN2, {"bias": "all"}),
    "bias-lora-only": (QWEN2, {"bias": "lora_only"}),
    "embedding": (LLAMA, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tokens": (LLAMA, {"trainable_token_indices": [12, 44]}),
    "tokens-by-module": (LLAMA, {"trainable_token_indices": {"embed_tokens": [12, 3], "lm_head": [5]}}),
    "tokens-tied": ("tied", {"trainable_token_indices": [12, 44]}),
    "alora": (LLAMA, {"alora_invocation_tokens": [12, 44]}, "`alora_invocation_tokens`"),
    "pissa-niter": (LLAMA, {"init_lora_weights": "pissa_niter_4"}, "`pissa_niter_4`"),
    "lora-bias": (QWEN2, {"target_modules": ["q_proj"], "lora_bias": True}, "`lora_bias`"),
    "layer-replication": (LLAMA, {"layer_replication": [(0, 2), (1, 3)]}, "`layer_replication`"),
    "embedding-tied": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}, "`tie_word_embeddings`"),
    "pissa-experts": (
        MOONLIGHT,
        {"init_lora_weights": "olora", "target_modules": ["q_proj", "gate"]},
        "neither DoRA nor PiSSA",
    ),
}
# Those whose fixtures are in the repository.
KEPT = [
    "pissa-rslora",
    "olora",
    "olora-mla",
    "dora",
    "dora-bias",
    "dora-pissa",
    "dora-head",
    "all-linear-moonlight",
    "all-linear-deepseek",
    "router",
    "patterns",
    "layers",
    "expression",
    "modules-to-save",
    "modules-to-save-projection",
    "bias-all",
    "bias-lora-only",
    "embedding",
    "tokens",
    "tokens-by-module",
    "alora",
    "mica",
]

checks = common.Checks()


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--program", type=common.program, help="the built `moonlight`")
    parser.add_argument("--write", type=pathlib.Path, metavar="DIR", help="make the fixture there")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    common.print_versions("peft", "transformers", "torch")
    if arguments.write:
        write_reference(arguments.write)
        write_kinds(arguments.write / "kinds")
    if arguments.program:
        with tempfile.TemporaryDirectory() as home:
            check_kinds(arguments.program, pathlib.Path(home) / "kinds")
            for family in FAMILIES:
                check(arguments.program, family, pathlib.Path(home) / family.replace("/", "-"))
    if not arguments.write and not arguments.program:
        parser.error("give --program or --write")
    checks.finish()


# --- our adapters in peft -----------------------------------------------------------------------------------------------------

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


def check(program, family, home):
    base = FIXTURES / family
    home.mkdir(parents=True)
    sequences = [json.loads(line)["tokens"] for line in (FIXTURES / "training/tokens.jsonl").open()][:6]
    data = write_sequences(home / "data.jsonl", sequences)
    # The families take turns in both scales and both optimizers.
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
    common.call(program, "train", recipe)
    adapter = home / "runs/run/checkpoints/step-00000012"
    ours = score(program, data, "--model", adapter, "--dtype", "f32")
    plain = score(program, data, "--model", base, "--dtype", "f32")
    moved = distance(ours, plain)
    checks.expect(f"{family}: the adapter does something", moved > 0.05, f"{moved:.1e}")

    model = peft.PeftModel.from_pretrained(load(base), adapter).eval()
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        wrong = [name for name in file.keys() if not placed(model, name, file.get_tensor(name))]
        checks.expect(f"{family}: peft has every tensor of the file", not wrong, wrong or "")
        count = len(list(file.keys()))
    trained = [name for name, _ in model.named_parameters() if "lora_" in name]
    checks.expect(f"{family}: and no other adapter", len(trained) == count, f"{count} tensors")
    far = distance(logprobs(model, sequences), ours)
    checks.expect(f"{family}: equal log-probabilities in peft", far < BUDGET, f"{far:.1e}")

    common.call(program, "merge", "--adapter", adapter, "--output", home / "merged", "--dtype", "f32")
    far = distance(logprobs(load(home / "merged"), sequences), ours)
    checks.expect(f"{family}: equal log-probabilities merged, in transformers", far < BUDGET, f"{far:.1e}")

    model.save_pretrained(home / "again")
    far = distance(score(program, data, "--model", base, "--adapter", home / "again", "--dtype", "f32"), ours)
    checks.expect(f"{family}: equal log-probabilities of what peft saves", far < BUDGET, f"{far:.1e}")


def placed(model, name, value):
    name = name.replace(".weight", ".default.weight")
    found = dict(model.named_parameters()).get(name)
    return found is not None and torch.equal(found, value)


# --- every kind of adapter that peft makes ----------------------------------------------------------------------------

SAMPLE = [5, 9, 31, 7, 12, 44, 3, 8, 61, 2]


def base_of_kind(family, home):
    """The folder of a base; `tied` is the Llama with its embedding as the head."""
    if family != "tied":
        return FIXTURES / family
    folder = home / "tied"
    if not folder.exists():
        model = load(FIXTURES / LLAMA)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(folder)
    return folder


def make_kind(name, home):
    """Lets peft make the adapter and changes all its trained values; returns the log-probabilities of peft with a new base."""
    family, change = KINDS[name][:2]
    base = base_of_kind(family, home)
    torch.manual_seed(SEED)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": QO, "task_type": "CAUSAL_LM"} | change
    model = peft.get_peft_model(load(base), peft.LoraConfig(**settings))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.peft_config["default"].base_model_name_or_path = f"../../../{family}"
    model.save_pretrained(home / name)
    (home / name / "README.md").unlink(missing_ok=True)
    loaded = peft.PeftModel.from_pretrained(load(base), home / name).eval()
    return base, logprobs(loaded, [SAMPLE])[0]


def check_kinds(program, home):
    home.mkdir()
    data = write_sequences(home / "data.jsonl", [SAMPLE])
    for name, (_, _, *refusal) in KINDS.items():
        base, theirs = make_kind(name, home)
        plain = score(program, data, "--model", base, "--dtype", "f32")
        ours, message = try_score(program, data, "--model", base, "--adapter", home / name, "--dtype", "f32")
        if refusal:
            checks.expect(f"peft's {name} is refused", ours is None and refusal[0] in message, message)
            continue
        if ours is None:
            checks.expect(f"peft's {name}", False, message)
            continue
        far, moved = distance(ours, [theirs]), distance(ours, plain)
        checks.expect(f"peft's {name}", far < BUDGET and moved > 1e-2, f"{far:.1e} (it moves them by {moved:.1e})")
        merged = home / f"{name}-merged"
        common.call(program, "merge", "--model", base, "--adapter", home / name, "--output", merged, "--dtype", "f32")
        far = distance(logprobs(load(merged), [SAMPLE]), [theirs])
        checks.expect(f"peft's {name} merged, in transformers", far < BUDGET, f"{far:.1e}")


def write_kinds(out):
    """The adapters in the repository, each with the log-probabilities that peft gives."""
    out.mkdir()
    expected = {}
    for name in KEPT:
        _, found = make_kind(name, out)
        expected[name] = {"base": KINDS[name][0], "logprobs": found.tolist()}
    head = {"tokens": SAMPLE, "versions": versions() | {"peft": peft.__version__}}
    write_json(out / "expected.json", head | {"kinds": expected})


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
        # The module name `gate_proj` would match the experts, too, so the other MLPs are named by their parameters.
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
        ids, mask, labels = pad(sequences[step * batch : (step + 1) * batch])
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, rules["gradient_clip"])
        # The same warm-up and cosine with another peak.
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
