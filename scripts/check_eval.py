#!/usr/bin/env python3
"""Compares `moonlight eval` with lm-evaluation-harness, and the mask of chat data with transformers.

    pip install lm_eval                       # beside torch and transformers
    python scripts/check_eval.py DIR --moonlight target/release/moonlight

DIR is a checkpoint of a model of bytes with `bytes-chat` tokenizer files (as `moonlight train` writes them). The rows are
made here, in the layouts of MMLU, ARC, HellaSwag and plain text, with awkward ones among them: letters beyond ASCII,
WikiHow's marks, a text longer than the context. Every figure, every standard error that the harness gives, and every
choice's log-likelihood must agree; the harness's own tasks are used, over these rows, with f32 weights. The mask: for
a template with `{% generation %}` blocks, the tokens that `moonlight data inspect` says are learned must be those of
`apply_chat_template(return_assistant_tokens_mask=True)`. Exit code 0 if all of it holds, 1 if not.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from transformers import AutoTokenizer

LOGPROB = 2e-3  # of a sum over a choice's tokens, f32
FIGURE = 1e-4  # relative

WORDS = ["moon", "light", "é", "tensor", "a man", "borrow", "lifetime", "of the", "月", "fn", "impl", "is", "not"]


def words(seed, count):
    return " ".join(WORDS[(seed * 7 + index * index * 3 + index) % len(WORDS)] for index in range(count))


def rows():
    mmlu, arc, hellaswag, text = [], [], [], []
    for n in range(24):
        choices = [words(n + 5 * index, 1 + (n + index) % 3) + str(index) for index in range(4)]
        mmlu.append({"question": f" {words(n, 4)}? ", "subject": "x_y", "choices": choices, "answer": n % 4})
        labels = ["A", "B", "C", "D"] if n % 2 else ["1", "2", "3", "4"]
        arc.append({"id": str(n), "question": words(n, 5) + "?", "choices": {"text": choices, "label": labels},
                    "answerKey": labels[(n * 3) % 4]})
        hellaswag.append({"activity_label": "Roof", "ctx_a": f"{words(n, 3)}. [header] {n}", "ctx_b": "the Man is",
                          "ctx": "unused", "endings": [f"{c}. [title] More [step] x" for c in choices],
                          "label": str(n % 4)})
        text.append({"text": words(n, 3 + 12 * n)})
    return {"mmlu": mmlu, "arc": arc, "hellaswag": hellaswag, "perplexity": text}


def harness(directory, folder, shots):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs

    files = lambda name: {"data_files": {"test": str(folder / f"{name}.jsonl")}}
    common = lambda name: {"task": name, "dataset_path": "json", "dataset_kwargs": files(name), "test_split": "test"}
    metrics = lambda *names: [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
    choice = {"output_type": "multiple_choice", "metric_list": metrics("acc", "acc_norm", "acc_bytes")}
    tasks = [
        common("mmlu") | choice | {
            "description": "The following are multiple choice questions (with answers) about x y.\n\n",
            "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
                           "D. {{choices[3]}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answer",
            "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": shots,
        },
        common("arc") | choice | {
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{choices.label.index(answerKey)}}", "doc_to_choice": "{{choices.text}}",
        },
        common("hellaswag") | choice | {
            "process_docs": process_docs, "doc_to_text": "{{query}}", "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
        },
        common("perplexity") | {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    ]
    model = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1,
                 attn_implementation="eager", experts_implementation="eager")
    result = lm_eval.simple_evaluate(model=model, tasks=tasks, log_samples=True, bootstrap_iters=0)
    return result


def eval_ours(moonlight, directory, folder, name, shots):
    output = folder / f"{name}.out"
    command = [moonlight, "eval", "--model", directory, "--dtype", "f32", "--device", "cpu", "--json",
               "--format", name, "--task", folder / f"{name}.jsonl", "--output", output, "--shots", str(shots)]
    found = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout)["metrics"], [json.loads(line) for line in output.read_text().splitlines()]


def check_eval(moonlight, directory, folder):
    worst = {"loglikelihood": 0.0, "figure": 0.0, "stderr": 0.0}
    compared = 0
    for name, lines in rows().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    result = harness(directory, folder, shots=0)
    for name in rows():
        ours, records = eval_ours(moonlight, directory, folder, name, 0)
        theirs = result["results"][name]
        for key, value in theirs.items():
            metric, _, _ = key.partition(",")
            if metric.endswith("_stderr"):
                mine, kind = ours.get(metric[: -len("_stderr")], {}).get("stderr"), "stderr"
            else:
                mine, kind = ours.get(metric, {}).get("value"), "figure"
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
    return worst, compared


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
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    different = 0
    for sample in found["samples"]:
        theirs = tokenizer.apply_chat_template(
            talks[sample["line"] - 1], chat_template=TEMPLATE, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )
        same = theirs["input_ids"] == sample["tokens"]
        different += not (same and theirs["assistant_masks"] == [int(weight > 0) for weight in sample["weights"]])
    return len(found["samples"]), different


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--moonlight", default="target/release/moonlight")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        conversations, different = check_mask(options.moonlight, options.directory, folder)
        worst, compared = check_eval(options.moonlight, options.directory, folder)
    ok = not different and conversations and compared > 100
    ok &= worst["loglikelihood"] <= LOGPROB and worst["figure"] <= FIGURE and worst["stderr"] <= FIGURE
    print(json.dumps({"conversations": conversations, "masks_that_differ": different, "compared": compared,
                      "worst": worst, "ok": bool(ok)}))
    sys.exit(int(not ok))


if __name__ == "__main__":
    main()
