#!/usr/bin/env python3
"""Opens a checkpoint that `moonlight` wrote with transformers, and compares the log-probabilities.

    moonlight score --model DIR --data tokens.jsonl --output scores.jsonl --dtype f32 --device cpu
    python scripts/parity/check_export.py DIR --scores scores.jsonl

DIR must load into transformers' own class (no remote code) without missing, unexpected or mismatched keys. With `--scores`,
every sequence of that file is scored again in f32 with eager attention, and the largest difference of a token's log-probability must be
within the budget. Prints one line of JSON; the exit code is 0 if every comparison holds.

Needs: torch, transformers (group `parity`). Takes: seconds for a small model.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from common import late
from models import load_strictly, logprobs

torch = late("torch")
transformers = late("transformers")


BUDGET = 2e-4


def main():
    parser = common.parser(__doc__)
    parser.add_argument("directory", type=pathlib.Path, help="the checkpoint")
    parser.add_argument("--scores", type=pathlib.Path, help="output of `moonlight score` in f32 for this checkpoint")
    parser.add_argument("--budget", type=float, default=BUDGET, help="the largest difference of a log-probability")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    model, problems = load_strictly(options.directory)
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


def compare(model, path):
    worst, place, tokens = 0.0, None, 0
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        record = json.loads(line)
        ids, ours = record["tokens"], record["logprobs"]
        assert len(ids) == len(ours) and ours[:1] in ([], [None]), f"line {number}: not a line of `moonlight score`"
        if len(ids) < 2:
            continue
        [theirs] = logprobs(model, [ids])
        difference = (theirs - torch.tensor(ours[1:])).abs()
        assert difference.isfinite().all(), f"line {number}: a log-probability is not finite"
        tokens += len(difference)
        if difference.max() > worst:
            worst, place = difference.max().item(), {"line": number, "token": int(difference.argmax()) + 1}
    assert tokens, f"{path} scores no token"
    return {"tokens": tokens, "worst_logprob_difference": worst, "at": place}


if __name__ == "__main__":
    main()
