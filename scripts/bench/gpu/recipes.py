"""Recipes for measurements, made from those in `configs/` by replacing keys, with random tokens as data."""

import json
import random
import tomllib

# Documents of random tokens in the file of a recipe. A run begins again when it has read them all.
DOCUMENTS = 64


def write(folder, name, base, replaced, vocab_size):
    """Writes `{name}.toml` and its tokens; returns the recipe's path. `replaced` is by table and key; `None` removes a key or a table."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = tomllib.loads(base.read_text(encoding="utf-8"))
    for table, keys in replaced.items():
        if keys is None:
            recipe.pop(table, None)
            continue
        values = recipe.setdefault(table, {})
        for key, value in keys.items():
            values.pop(key, None) if value is None else values.update({key: value})
    data = recipe["data"]
    tokens = folder / f"{name}.jsonl"
    tokens.write_text(documents(data["sequence_length"] + 1, vocab_size), encoding="ascii")
    recipe["run"] = {"name": name, "dir": str(folder / "runs"), "seed": 1}
    recipe["data"] = {
        "format": "tokens",
        "tokenizer": "none",
        "train": [str(tokens)],
        "sequence_length": data["sequence_length"],
        "cache_dir": str(folder / "token-cache"),
    }
    # A measurement ends its run after enough steps, so that no checkpoint is written.
    recipe["train"] = {"steps": 100_000, "checkpoint_every": 0, "validate_every": 0, "probe_every": 0} | {
        key: value
        for key, value in recipe["train"].items()
        if key in ("batch_size", "gradient_accumulation", "gradient_clip", "activation_checkpointing")
        or key in ("loss_chunk_tokens", "fuse_update", "freeze")
    }
    recipe["schedule"] = {"name": "constant"}
    for table in ("sample", "eval"):
        recipe.pop(table, None)
    path = folder / f"{name}.toml"
    path.write_text(toml(recipe), encoding="utf-8")
    return path


def documents(length, vocab_size):
    numbers = random.Random(1)
    lines = ({"tokens": [numbers.randrange(vocab_size) for _ in range(length)]} for _ in range(DOCUMENTS))
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def toml(recipe):
    """A recipe of tables whose values are texts, numbers, booleans and lists of them: these are the same in JSON."""
    text = []
    for table, values in recipe.items():
        text.append(f"[{table}]")
        text += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(text) + "\n"
