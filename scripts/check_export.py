#!/usr/bin/env python3
"""Opens a checkpoint of ours with transformers and compares what the two make of it.

    moonlight score --model DIR --data tokens.jsonl --output scores.jsonl --dtype f32 --device cpu
    python scripts/check_export.py DIR --scores scores.jsonl

DIR must load into transformers' own class (no remote code) with no key missing, none unexpected and none of another
shape. With `--scores`, every sequence of that file is scored again in f32 with eager attention, and the worst
difference of a token's log-probability must be within the budget. Exit code 0 if all of it holds, 1 if not.
"""

import argparse
import json
import pathlib
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM

BUDGET = 2e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--scores", type=pathlib.Path, help="output of `moonlight score` in f32 for this checkpoint")
    parser.add_argument("--budget", type=float, default=BUDGET)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    model, problems = load(options.directory)
    result = {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "problems": problems,
    }
    failed = bool(problems)
    if options.scores:
        result |= compare(model, options.scores)
        failed |= not result["worst_logprob_difference"] <= options.budget
    result["ok"] = not failed
    print(json.dumps(result))
    sys.exit(int(failed))


def load(directory):
    # The plain loop over experts: torch's grouped product refuses rows that are not a multiple of 16 bytes.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **eager
    )
    assert type(model).__module__.startswith("transformers.models."), type(model)
    problems = {kind: sorted(map(str, found)) for kind, found in info.items() if found}
    return model.eval(), problems


@torch.no_grad()
def compare(model, path):
    worst, place, tokens = 0.0, None, 0
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        record = json.loads(line)
        ids, ours = record["tokens"], record["logprobs"]
        assert len(ids) == len(ours) and ours[:1] in ([], [None]), f"line {number}: not a line of `moonlight score`"
        if len(ids) < 2:
            continue
        log_p = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
        theirs = log_p[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        difference = (theirs - torch.tensor(ours[1:])).abs()
        assert difference.isfinite().all(), f"line {number}: a log-probability is not finite"
        tokens += len(difference)
        if difference.max() > worst:
            worst, place = difference.max().item(), {"line": number, "token": int(difference.argmax()) + 1}
    assert tokens, f"{path} scores no token"
    return {"tokens": tokens, "worst_logprob_difference": worst, "at": place}


if __name__ == "__main__":
    main()
