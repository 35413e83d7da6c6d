#!/usr/bin/env python3
"""Compares `moonlight eval` with lm-evaluation-harness, and the mask of chat data with transformers.

    python scripts/parity/check_eval.py [DIR] --moonlight target/release/moonlight

The script makes the rows, in the layouts of MMLU, ARC, HellaSwag and plain text, some of them awkward: letters beyond ASCII, WikiHow's marks,
contexts and texts longer than the model's context, empty ones, ones that spell BOS. It makes the models, too: byte-level Llamas whose
tokenizers begin texts with BOS, or have tokens that span the end of a context and the start of a choice. DIR adds a checkpoint of a byte-level
model with `bytes-chat` tokenizer files, as `moonlight train` writes them.

Every metric, every standard error that the harness gives, and every choice's log-likelihood must agree; the harness's own tasks are run over
these rows, with f32 weights. The result of `--fix-harness` is compared with torch. The mask is compared for DIR: for a template with
`{% generation %}` blocks, the tokens that `moonlight data inspect` reports as learned must be those of
`apply_chat_template(return_assistant_tokens_mask=True)`. Prints the largest differences; the exit code is 0 if every comparison holds.

Needs: torch, transformers, tokenizers, lm_eval (group `parity`). Takes: some minutes.
"""

import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from common import late

torch = late("torch")
Tokenizer = late("tokenizers", "Tokenizer")
decoders = late("tokenizers", "decoders")
models = late("tokenizers", "models")
pre_tokenizers = late("tokenizers", "pre_tokenizers")
ByteLevel = late("tokenizers.pre_tokenizers", "ByteLevel")
TemplateProcessing = late("tokenizers.processors", "TemplateProcessing")
AutoTokenizer = late("transformers", "AutoTokenizer")
LlamaConfig = late("transformers", "LlamaConfig")
LlamaForCausalLM = late("transformers", "LlamaForCausalLM")


LOGPROB = 2e-3  # of a sum over a choice's tokens, f32
METRIC = 1e-4  # relative

ROWS = 120
WORDS = ["moon", "light", "é", "tensor", "a man", "borrow", "lifetime", "of the", "月", "fn", "impl", "is", "not"]


def words(seed, count):
    return " ".join(WORDS[(seed * 7 + index * index * 3 + index) % len(WORDS)] for index in range(count))


def rows():
    mmlu, arc, hellaswag, text = [], [], [], []
    for n in range(ROWS):
        choices = [words(n + 5 * index, 1 + (n + index) % 3) + str(index) for index in range(4)]
        question = f" {words(n, 4)}? " if n % 9 else f"{words(n, 60)}\n\n{words(n, 3)}?\t"
        mmlu.append({"question": question, "subject": "x_y", "choices": choices, "answer": n % 4})
        labels = ["A", "B", "C", "D"] if n % 2 else ["1", "2", "3", "4"]
        asked = ("<s>" if n % 13 == 5 else "") + words(n, 5 if n % 7 else 70) + "?"
        arc.append(
            {
                "id": str(n),
                "question": asked,
                "choices": {"text": choices, "label": labels},
                "answerKey": labels[(n * 3) % 4],
            }
        )
        endings = [f"{c}. [title] More [step] x" for c in choices]
        if n % 5 == 0:
            # Some choices begin with characters that a token joins to the end of the context.
            endings = ["C", "Cat", "dog", ": C"]
        hellaswag.append(
            {
                "activity_label": "Roof",
                "ctx_a": f"{words(n, 3)}. [header] {n}",
                "ctx_b": ["the Man is", "ßtart:", "ǆ \u2003:", "he\x1c said:"][n % 4],
                "ctx": "unused",
                "endings": endings,
                "label": str(n % 4),
            }
        )
        text.append(
            {
                "text": ["", " ", "\n", "<s>", "a\u2028b\x1c c\u200b d", "月🌙 é\r\n"][n // 8 % 6]
                if n % 8 == 3
                else words(n, 3 + 2 * n) + "\n" * (n % 3)
            }
        )
    return {"mmlu": mmlu, "arc": arc, "hellaswag": hellaswag, "perplexity": text}


def harness_tasks(folder, shots=0):
    """The harness's definitions of the tasks, for the rows in a folder."""
    from lm_eval.tasks.hellaswag.utils import process_docs

    def files(name):
        return {"data_files": {"test": str(folder / f"{name}.jsonl")}}

    def task(name):
        return {"task": name, "dataset_path": "json", "dataset_kwargs": files(name), "test_split": "test"}

    def metrics(*names):
        return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]

    choice = {"output_type": "multiple_choice", "metric_list": metrics("acc", "acc_norm", "acc_bytes")}
    return [
        task("mmlu")
        | choice
        | {
            "description": "The following are multiple choice questions (with answers) about x y.\n\n",
            "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
            "D. {{choices[3]}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C", "D"],
            "doc_to_target": "answer",
            "fewshot_split": "test",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": shots,
        },
        task("arc")
        | choice
        | {
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{choices.label.index(answerKey)}}",
            "doc_to_choice": "{{choices.text}}",
        },
        task("hellaswag")
        | choice
        | {
            "process_docs": process_docs,
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
        },
        task("perplexity")
        | {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    ]


def harness(directory, folder, shots, **options):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tasks = harness_tasks(folder, shots)
    model = HFLM(
        pretrained=str(directory), dtype="float32", device="cpu", batch_size=1, attn_implementation="eager", **options
    )
    return model, lm_eval.simple_evaluate(model=model, tasks=tasks, log_samples=True, bootstrap_iters=10)


def eval_ours(moonlight, directory, folder, name, *more):
    output = folder / f"{name}.out"
    command = [
        moonlight,
        "eval",
        "--model",
        directory,
        "--dtype",
        "f32",
        "--device",
        "cpu",
        "--json",
        "--format",
        name,
        "--task",
        folder / f"{name}.jsonl",
        "--output",
        output,
        *more,
    ]
    found = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    found = json.loads(found.stdout)
    return found["metrics"], [json.loads(line) for line in output.read_text().splitlines()], found.get("notes", [])


def check_eval(moonlight, directory, folder, *more, **options):
    """The worst differences from the harness; what it can be compared in; rows with a token across the seam."""
    worst = {"loglikelihood": 0.0, "metric": 0.0, "stderr": 0.0}
    compared, notes = 0, []
    for name, lines in rows().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    model, result = harness(directory, folder, shots=0, **options)
    for name in rows():
        ours, records, noted = eval_ours(moonlight, directory, folder, name, *more)
        notes += [f"{name}: {note.split(':')[0]}" for note in noted]
        theirs = result["results"][name]
        for key, value in theirs.items():
            metric, _, _ = key.partition(",")
            if metric.endswith("_stderr"):
                mine, kind = ours.get(metric[: -len("_stderr")], {}).get("stderr"), "stderr"
            else:
                mine, kind = ours.get(metric, {}).get("value"), "metric"
            if isinstance(value, float) and mine is not None and not (kind == "stderr" and name == "perplexity"):
                worst[kind] = max(worst[kind], abs(mine - value) / max(abs(value), 1e-9) if value else abs(mine))
                compared += 1
        samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
        for record, sample in zip(records, samples, strict=True):
            if name == "perplexity":
                pairs = [(record["loglikelihood"], sample["filtered_resps"][0])]
            else:
                pairs = zip(record["loglikelihoods"], [response[0] for response in sample["filtered_resps"]])
            for mine, value in pairs:
                value = float(value[0]) if isinstance(value, (tuple, list)) else float(value)
                worst["loglikelihood"] = max(worst["loglikelihood"], abs(mine - value) / max(1, abs(value) / 100))
                compared += 1
    worst["fixed"], fixed = check_fixed(moonlight, directory, folder, model, result, *more)
    return worst, compared + fixed, notes


@common.no_grad
def check_fixed(moonlight, directory, folder, model, result, *more):
    """`--fix-harness` against torch: whole texts, scored from the first token in which any choice differs from the context;
    texts with one BOS."""

    def score(tokens, start):
        tokens = tokens[-(model.max_length + 1) :]
        start = max(1, start - max(0, score.length - model.max_length - 1))
        logs = model.model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        return logs[start - 1 :].gather(1, torch.tensor(tokens[start:])[:, None]).sum().item()

    worst, compared = 0.0, 0
    for name in ("mmlu", "arc", "hellaswag", "perplexity"):
        _, records, _ = eval_ours(moonlight, directory, folder, name, "--fix-harness", *more)
        samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
        for record, sample in zip(records, samples, strict=True):
            if name == "perplexity":
                tokens = model.tok_encode(sample["arguments"][0][0])
                tokens = tokens[tokens[:1] == [model.prefix_token_id] :]
                if not 0 < len(tokens) <= model.max_length:
                    continue
                score.length = len(tokens) + 1
                pairs = [(record["loglikelihood"], score([model.prefix_token_id, *tokens], 1))]
            else:
                wholes = [model.tok_encode(context + choice) for context, choice in sample["arguments"]]
                alone = model.tok_encode(sample["arguments"][0][0].rstrip())
                start = min(len(common_tokens(whole, alone)) for whole in wholes)
                pairs = []
                for mine, whole in zip(record["loglikelihoods"], wholes):
                    score.length = len(whole)
                    pairs.append((mine, score(whole, start)))
            for mine, value in pairs:
                worst = max(worst, abs(mine - value) / max(1, abs(value) / 100))
                compared += 1
    return worst, compared


def common_tokens(a, b):
    return [x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b))]


def make_models(home):
    """Llamas of bytes whose tokenizers begin texts with BOS, join the end of a context to a choice, or both."""
    alphabet = sorted(ByteLevel.alphabet())
    joined = [(":", "\u0120"), (":\u0120", "C"), ("\u0120", "d"), ("e", "s")]
    torch.manual_seed(1)
    for name, merges, bos in [("bos", [], True), ("seam", joined, False), ("bos-seam", joined, True)]:
        vocab = {token: index for index, token in enumerate(alphabet)}
        for left, right in merges:
            vocab[left + right] = len(vocab)
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        if bos:
            begin = ("<s>", tokenizer.token_to_id("<s>"))
            tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
        config = LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=200,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(home / name)
        tokenizer.save(str(home / name / "tokenizer.json"))
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (home / name / "tokenizer_config.json").write_text(json.dumps(names))
        yield home / name


TEMPLATE = """{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_assistant|>assistant<|im_middle|>' }}
        {%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- '<|im_user|>' + message['role'] + '<|im_middle|>' + message['content'] + '<|im_end|>' }}
    {%- endif %}
{% endfor %}"""

RECIPE = """
[model]
preset = "bench-small"
[data]
format = "chat"
train = ["FOLDER/talk.jsonl"]
tokenizer = "bytes-chat"
chat_template = "FOLDER/template.jinja"
sequence_length = 2048
cache_dir = "FOLDER/cache"
[optimizer]
learning_rate = 1e-3
[train]
steps = 1
"""


def check_mask(moonlight, directory, folder):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    talks = []
    for n in range(30):
        messages = [{"role": "system", "content": words(n, 2)}] if n % 2 else []
        for turn in range(1 + n % 3):
            messages.append({"role": "user", "content": words(n + turn, 5)})
            messages.append({"role": "assistant", "content": words(n * turn, 1 + n % 4) + "\n" * (n % 2)})
        talks.append(messages)
    lines = "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in talks)
    (folder / "talk.jsonl").write_text(lines, encoding="utf-8")
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "recipe.toml").write_text(RECIPE.replace("FOLDER", str(folder)), encoding="utf-8")
    command = [moonlight, "data", "inspect", str(folder / "recipe.toml"), "--samples", str(len(talks)), "--json"]
    found = json.loads(common.call(*command))
    different = 0
    for sample in found["samples"]:
        theirs = tokenizer.apply_chat_template(
            talks[sample["line"] - 1],
            chat_template=TEMPLATE,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        same = theirs["input_ids"] == sample["tokens"]
        different += not (same and theirs["assistant_masks"] == [int(weight > 0) for weight in sample["weights"]])
    return len(found["samples"]), different


def main():
    parser = common.parser(__doc__)
    parser.add_argument("directory", type=pathlib.Path, nargs="?", help="a checkpoint of a byte-level model")
    default = common.ROOT / "target/release/moonlight"
    parser.add_argument("--moonlight", type=common.program, default=default, help="the built `moonlight`")
    options = parser.parse_args()
    torch.set_num_threads(2)
    program = options.moonlight
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        runs = [(directory, (), {}) for directory in make_models(home)]
        runs.append((home / "bos", ("--no-bos",), {"add_bos_token": False}))
        if options.directory:
            runs.append((options.directory, (), {"experts_implementation": "eager"}))
        ok = True
        for directory, more, settings in runs:
            worst, compared, notes = check_eval(program, directory, home, *more, **settings)
            good = compared > 100 and max(worst["loglikelihood"], worst["fixed"]) <= LOGPROB
            good &= worst["metric"] <= METRIC and worst["stderr"] <= METRIC
            ok &= good
            print(
                json.dumps(
                    {
                        "model": directory.name,
                        "options": more,
                        "compared": compared,
                        "worst": worst,
                        "notes": notes,
                        "ok": bool(good),
                    },
                    ensure_ascii=False,
                )
            )
        if options.directory:
            conversations, different = check_mask(program, options.directory, home)
            good = bool(conversations) and not different
            ok &= good
            print(json.dumps({"conversations": conversations, "masks_that_differ": different, "ok": good}))
    sys.exit(int(not ok))


if __name__ == "__main__":
    main()
