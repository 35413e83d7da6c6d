"""What was measured, as JSON and as a page in Markdown. Both are written again after every measurement."""

import json
import os

# Key of a value, title of its column, and how it is written. Other keys are in the JSON only.
COLUMNS = [
    ("device", "device", str),
    ("tokens_per_second", "tokens/s", "{:,.5g}".format),
    ("prefill_tokens_per_second", "prefill, tokens/s", "{:,.5g}".format),
    ("milliseconds", "ms", "{:.4g}".format),
    ("reference_milliseconds", "reference, ms", "{:.4g}".format),
    ("first_milliseconds", "first time, ms", "{:.4g}".format),
    ("tflops", "TFLOP/s", "{:.4g}".format),
    ("share_of_peak", "of the card's peak", "{:.1%}".format),
    ("gb_per_second", "GB/s", "{:.4g}".format),
    ("share_of_bandwidth", "of its bandwidth", "{:.1%}".format),
    ("peak_device_bytes", "peak, device", lambda value: f"{value / 1e9:.3g} GB"),
    ("peak_host_bytes", "peak, host", lambda value: f"{value / 1e9:.3g} GB"),
    ("predicted_bytes", "predicted", lambda value: f"{value / 1e9:.3g} GB"),
    ("peak_over_predicted", "peak / predicted", "{:.3f}".format),
    ("losses", "losses", lambda values: f"{values[0]:.4f} to {values[-1]:.4f}" if values else ""),
    ("passed", "passed", str),
    ("failed", "failed", str),
    ("worst", "largest difference", str),
    ("note", "", str),
]


def write(path, text):
    """Replaces a file in one step, so that a reader, or a second start, never sees half of it."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def save(folder, settings, parts):
    """Writes `gpu_day.json` and `gpu_day.md`. `parts` are dictionaries as `gpu_day.py` keeps them, in their order."""
    write(folder / "gpu_day.json", json.dumps({"settings": settings, "parts": parts}, indent=1) + "\n")
    write(folder / "gpu_day.md", page(settings, parts))


def page(settings, parts):
    text = ["# First measurements on this machine", ""]
    text += [f"Device `{settings['device']}`{', tiny shapes: no value is a speed' if settings['tiny'] else ''}.", ""]
    text += ["| part | state | seconds |", "|---|---|---|"]
    text += [f"| {part['title']} | {state(part)} | {part.get('seconds', 0):.0f} |" for part in parts]
    for part in parts:
        if part["state"] == "not started":
            continue
        text += ["", f"## {part['title']}", ""]
        if part.get("about"):
            text += [part["about"], ""]
        text += table(part["items"])
        text += problems(part["items"])
    return "\n".join(text) + "\n"


def state(part):
    counts = {}
    for item in part["items"].values():
        counts[item["state"]] = counts.get(item["state"], 0) + 1
    found = ", ".join(f"{count} {name}" for name, count in counts.items())
    return found if part["state"] != "not started" else "not started"


def lines(items):
    """Name and values of each line: a measurement has one, or several in `lines`, and facts in `facts`."""
    for name, item in items.items():
        result = item.get("result", {})
        if "lines" in result:
            yield from ((f"{name}: {line['what']}", line) for line in result["lines"])
        elif item["state"] == "done" and "facts" not in result:
            yield name, result


def table(items):
    text = []
    for name, item in items.items():
        facts = item.get("result", {}).get("facts")
        if facts:
            text += [f"| {name} | |", "|---|---|"]
            text += [f"| {key} | {cell(value)} |" for key, value in facts.items()] + [""]
    rows = list(lines(items))
    used = [column for column in COLUMNS if any(row.get(column[0]) not in (None, "", []) for _, row in rows)]
    if rows and used:
        text += [f"| | {' | '.join(title for _, title, _ in used)} |", f"|---|{'---|' * len(used)}"]
        for name, row in rows:
            cells = [form(row[key]) if row.get(key) not in (None, "", []) else "" for key, _, form in used]
            text.append(f"| {name} | {' | '.join(cell(value) for value in cells)} |")
    return text


def cell(value):
    return str(value).replace("|", "\\|").replace("\n", " ")


def problems(items):
    """What was not measured, and why; the output of a program that failed is quoted."""
    text = []
    for name, item in items.items():
        if item.get("error"):
            first, *more = item["error"].splitlines()
            text += ["", f"{name}: **{item['state']}**: {first}"]
            if more:
                text += ["", *(f"    {line}" for line in more)]
    return text
