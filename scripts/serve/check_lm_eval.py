#!/usr/bin/env python3
"""Runs lm-evaluation-harness, unchanged, through `moonlight serve`, and compares the results with transformers and `moonlight eval`.

    python scripts/serve/check_lm_eval.py --moonlight target/release/moonlight
    python scripts/serve/check_lm_eval.py --moonlight target/release/moonlight --model DIR --rows 24

The harness's `local-completions` sends token ids with `echo` and `logprobs` (multiple choice, perplexity) and reads texts (`generate_until`);
`local-chat-completions` sends conversations. The rows are those of `parity/check_eval.py`, in the layouts of MMLU, ARC, HellaSwag and plain text.
Compared are every log-likelihood, every metric and every generated text: harness through the server, harness with transformers (`hf`), and
`moonlight eval`, all in f32. Without `--model` the tiny model of `tiny_model.py` is used, whose answers to the questions are known.

Rows are kept shorter than the context: the harness truncates longer ones to one token more with `hf` than with a server, which needs room
for the token that it generates.

Needs: torch, transformers, lm_eval, aiohttp, tenacity (group `serve`), the built `moonlight`. Takes: 3 minutes.
"""

import json
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "parity"))
import check_eval
import common
import server as serving
import tiny_model

LOGPROB = 1e-3  # of a sum over a choice's tokens or a text, f32
METRIC = 1e-4  # relative, of perplexities; shares of right answers must be equal
KEY = "secret-of-the-check"


def write_rows(folder, count, longest):
    """The rows of `check_eval.py` that fit the context, and questions for texts."""
    for name, lines in check_eval.rows().items():
        short = [line for line in lines if len(json.dumps(line, ensure_ascii=False).encode()) < longest][:count]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in short)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    questions = [tiny_model.COUNT, tiny_model.MOON, ("Name three colors.", ""), ("What is the capital of France?", "")]
    lines = [{"question": question, "answer": answer} for question, answer in questions]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def text_task(folder, until):
    return {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": until, "max_gen_toks": 60, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def evaluate(model, tasks, **options):
    import lm_eval

    return lm_eval.simple_evaluate(model=model, tasks=tasks, log_samples=True, bootstrap_iters=10, **options)


def samples(result, name):
    return sorted(result["samples"][name], key=lambda sample: sample["doc_id"])


def values(sample):
    """The log-likelihoods of a row, as numbers."""
    found = []
    for response in sample["filtered_resps"]:
        response = response[0] if isinstance(response, (list, tuple)) else response
        found.append(float(response))
    return found


def greedy(sample):
    return [bool(response[1]) for response in sample["filtered_resps"] if isinstance(response, (list, tuple))]


def compare_scores(check, folder, moonlight, directory, hf, served):
    """Log-likelihoods and metrics of the four tasks."""
    compared = 0
    for name in check_eval.rows():
        metrics, records, _ = check_eval.eval_ours(moonlight, directory, folder, name)
        theirs, through = samples(hf, name), samples(served, name)
        worst, ours_worst, other = 0.0, 0.0, 0
        for a, b, record in zip(theirs, through, records, strict=True):
            ours = record.get("loglikelihoods", [record.get("loglikelihood")])
            for x, y, z in zip(values(a), values(b), ours, strict=True):
                worst, ours_worst = max(worst, abs(x - y)), max(ours_worst, abs(y - z))
                compared += 1
            other += greedy(a) != greedy(b)
        detail = f"{worst:.1e} from transformers, {ours_worst:.1e} from `moonlight eval`, {len(theirs)} rows"
        check.expect(f"{name}: log-likelihoods", max(worst, ours_worst) < LOGPROB and not other, detail)
        for key, value in hf["results"][name].items():
            metric = key.partition(",")[0]
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            found = [served["results"][name][key], metrics[metric]["value"]]
            if metric.startswith("acc"):
                same = all(other == value for other in found)
            else:
                same = all(abs(other - value) <= METRIC * value for other in found)
            check.expect(f"{name}: {metric}", same, f"{value!r}, through the server and `eval` {found}")
    check.expect("log-likelihoods were compared", compared > 50, compared)


def compare_texts(check, name, hf, served):
    for a, b in zip(samples(hf, "texts"), samples(served, "texts"), strict=True):
        ours, theirs = b["filtered_resps"][0], a["filtered_resps"][0]
        check.expect(f"{name}: the text for {a['doc']['question']!r}", ours == theirs, f"{ours!r} {theirs!r}")


def main():
    parser = common.parser(__doc__)
    serving.add_arguments(parser)
    parser.add_argument("--rows", type=int, default=60, help="rows of each task")
    options = parser.parse_args()
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    torch.set_num_threads(1 if os.getloadavg()[0] > 4 else 2)
    os.environ["OPENAI_API_KEY"] = KEY
    check = common.Checks()
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        directory = options.model or tiny_model.make(options.moonlight, home / "tiny")
        context = json.loads((directory / "config.json").read_text())["max_position_embeddings"]
        write_rows(home, options.rows, min(context, 4096) * 3 // 5)
        tasks, until = check_eval.harness_tasks(home), ["five", "\n\n\n", "照"]
        model = HFLM(
            pretrained=str(directory), dtype="float32", device="cpu", batch_size=1, attn_implementation="eager"
        )
        hf = evaluate(model, tasks)
        hf_texts = evaluate(model, [text_task(home, until)])
        hf_chat = evaluate(model, [text_task(home, until)], apply_chat_template=True)
        with serving.Server.moonlight(
            options.moonlight, directory, "--dtype", "f32", "--api-key", KEY, key=KEY
        ) as server:
            name = json.loads(server.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})[2])["data"][0]["id"]
            common_options = {"model": name, "num_concurrent": 8, "max_length": context}
            completions = LocalCompletionsAPI(
                base_url=f"{server.url}/v1/completions", tokenizer=str(directory), batch_size=4, **common_options
            )
            compare_scores(check, home, options.moonlight, directory, hf, evaluate(completions, tasks))
            compare_texts(check, "generate_until", hf_texts, evaluate(completions, [text_task(home, until)]))
            chat = LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", **common_options)
            compare_texts(check, "chat", hf_chat, evaluate(chat, [text_task(home, until)], apply_chat_template=True))
    check.finish()


if __name__ == "__main__":
    main()
