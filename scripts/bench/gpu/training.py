"""Part 5: tokens a second and peak memory of training, next to what `moonlight plan` predicts."""

import contextlib
import json
import shutil
import statistics

from gpu import recipes, shapes
from gpu.day import config
from gpu.runner import Failed

STEPS, TINY_STEPS = 12, 4
# Steps whose time is not counted: kernels are compiled in the first, and memory is allocated in the first two.
WARM = 2


def items(day):
    weights = (1, 1, 2, 4, 4)
    return [
        (name, weight, lambda day, name=name: train(day, name, day.device))
        for name, weight in zip(runs(day), weights, strict=True)
    ]


def runs(day):
    return shapes.TINY if day.tiny else shapes.FULL


def train(day, name, device):
    run = runs(day)[name]
    folder = day.folder / "training"
    label = "".join(letter if letter.isalnum() else "-" for letter in f"{name} {device}").lower()
    if run.checkpoint:
        path = day.folder / f"checkpoint-{run.checkpoint}"
        # The published shape is known without the files, so that what does not fit is refused before they are written.
        if day.tiny:
            checkpoint(day, run.checkpoint)
        model = {"path": str(path)}
    else:
        model = {key: None for key in ("path", "preset", *quickstart_keys())} | run.model
    replaced = {
        "model": model,
        "data": {"sequence_length": run.sequence},
        "train": {"batch_size": run.batch, "gradient_accumulation": run.accumulation},
    }
    recipe = recipes.write(folder, label, config(run.recipe), replaced, run.vocab_size)
    plan = day.plan(recipe)
    day.fit(plan["peak_bytes"])
    if run.checkpoint and not day.tiny:
        checkpoint(day, run.checkpoint)
    place = folder / "runs" / label
    shutil.rmtree(place, ignore_errors=True)
    wanted = TINY_STEPS if day.tiny else STEPS

    def enough():
        count = len(steps(place))
        # Cut short, what was measured is kept.
        return count >= wanted or count > WARM + 1 and day.runner.left() < 1

    done = day.call("moonlight", "train", recipe, "--device", device, enough=enough, device=device.split(":")[0])
    found = steps(place)
    if len(found) <= WARM:
        raise Failed(f"the run ended after {len(found)} steps: {done.stderr[-600:]}")
    rate = statistics.median(step["tokens_per_second"] for step in found[WARM:])
    tokens = found[1]["tokens"] - found[0]["tokens"]
    # The optimizer's products are once a step.
    per_token = plan["operations_per_token"] + (plan.get("newton_schulz_operations") or 0) / tokens
    return {
        "tokens_per_second": rate,
        "milliseconds": tokens / rate * 1e3,
        **day.rate(per_token * rate, "f32" if name.endswith("f32") else "bf16"),
        **day.memory(done, plan["peak_bytes"]),
        "losses": [step["loss"] for step in found],
        "all_tokens_per_second": [step["tokens_per_second"] for step in found],
        "tokens_per_step": tokens,
        "steps": len(found),
        "note": "" if len(found) >= wanted else f"cut short after {len(found)} steps",
    }


def quickstart_keys():
    """The shape in the quick start's `[model]`, which a preset replaces."""
    import tomllib

    return tomllib.loads(config("quickstart.toml").read_text(encoding="utf-8"))["model"]


def steps(place):
    """The training steps that a run has logged so far. The last line may not be complete yet."""
    found = []
    with contextlib.suppress(OSError):
        for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return [line for line in found if line["split"] == "train"]


def checkpoint(day, kind):
    """The synthetic checkpoint of a kind, written when it is first needed; a file says that it is complete."""
    path = day.folder / f"checkpoint-{kind}"
    ready = path / "complete"
    if not ready.exists():
        options, size = shapes.CHECKPOINTS[day.tiny][kind]
        program = day.program("synthetic_checkpoint")
        shutil.rmtree(path, ignore_errors=True)
        day.disk(size)
        day.runner.run([program, path, *options])
        ready.touch()
    return path
