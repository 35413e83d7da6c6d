#!/usr/bin/env python3
"""Compares the records that `moonlight` reads from files with those that Python's json and csv, pandas and datasets read.

    python scripts/parity/check_records.py --moonlight target/release/moonlight [--records 200] [--seed 0]

One table (texts with quotes, line breaks, separators, emoji) is written in every format of these libraries: JSON Lines, arrays, indented,
with a byte order mark, with CRLF, compressed, CSV and TSV, parquet (if the program reads it). The program reads them as in training
(`data inspect`, `format = "text"`, the tokenizer `bytes`), so that each document is the text of a record. Prints a line for each file, and
totals. A library that refuses a file is named and not counted. The exit code is 0 if nothing differs.

Needs: datasets, pandas, pyarrow (group `parity`). Takes: seconds.
"""

import csv
import gzip
import io
import json
import os
import pathlib
import random
import sys
import tempfile
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from common import late

datasets = late("datasets")
pandas = late("pandas")

os.environ["HF_DATASETS_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

RECIPE = """
[model]
model_type = "llama"
hidden_size = 8
intermediate_size = 8
num_hidden_layers = 1
num_attention_heads = 1
max_position_embeddings = 64
[data]
train = ["FILE"]
format = "text"
tokenizer = "bytes"
shuffle = false
sequence_length = 64
cache_dir = "CACHE"
[optimizer]
learning_rate = 1e-3
[train]
steps = 1
"""
PIECES = [
    "word",
    " ",
    "\n",
    "\r\n",
    '"',
    "''",
    ",",
    ";",
    "\t",
    "\\",
    "\\u0041",
    "ü",
    "月",
    "😀",
    "{",
    "}",
    "[",
    "]",
    ":",
    "</script>",
    "\u2028",
    "#",
    "=1+1",
]


def table(count, seed):
    draw = random.Random(seed)

    def text():
        return "x" + "".join(draw.choice(PIECES) for _ in range(draw.randint(0, 30)))

    return [{"id": number, "text": text(), "tag": draw.choice(["a", "b;c", 'd"e'])} for number in range(count)]


def delimited(rows, **how):
    to = io.StringIO(newline="")
    writer = csv.DictWriter(to, ["id", "text", "tag"], **how)
    writer.writeheader()
    writer.writerows(rows)
    return to.getvalue().encode()


def files(rows):
    """Names and contents."""

    def dumps(row, **how):
        return json.dumps(row, **how)

    lines = "".join(dumps(row) + "\n" for row in rows).encode()
    raw = "".join(dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    frame = pandas.DataFrame(rows)
    mark = b"\xef\xbb\xbf"
    crlf = b"\r\n".join(line for line in raw.split(b"\n"))
    yield "ascii.jsonl", lines
    yield "raw.jsonl", raw
    yield "mark.jsonl", mark + raw
    yield "crlf.jsonl", crlf
    yield "unended.jsonl", raw[:-1]
    yield "blank.jsonl", raw.replace(b"\n", b"\n\n")
    yield "nan.jsonl", raw.replace(b'{"id"', b'{"score": NaN, "low": -Infinity, "id"')
    yield "twice.jsonl", raw.replace(b'{"id"', b'{"text": "first", "id"')
    yield "packed.jsonl.gz", gzip.compress(raw)
    yield "array.json", dumps(rows).encode()
    yield "array-raw.json", dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
    yield "indented.json", dumps(rows, indent=2).encode()
    yield "indent-0.json", dumps(rows, indent=0, ensure_ascii=False).encode()
    yield "tabs.jsonl", dumps(rows, indent="\t").encode()
    yield "array-mark.json", mark + dumps(rows).encode()
    yield "pandas-lines.jsonl", frame.to_json(orient="records", lines=True).encode()
    yield "pandas-records.json", frame.to_json(orient="records", force_ascii=False, indent=1).encode()
    yield "minimal.csv", delimited(rows)
    yield "unix.csv", delimited(rows, dialect="unix")
    yield "semicolons.csv", delimited(rows, delimiter=";")
    yield "tabs.tsv", delimited(rows, delimiter="\t")
    yield "mark.csv", mark + delimited(rows)
    yield "pandas.csv", frame.to_csv().encode()
    yield "pandas-packed.csv.gz", gzip.compress(frame.to_csv(index=False).encode())
    of = datasets.Dataset.from_list(rows)
    for name, write in [
        ("datasets.jsonl", of.to_json),
        ("datasets.csv", of.to_csv),
        ("datasets.parquet", of.to_parquet),
    ]:
        to = io.BytesIO()
        write(to)
        yield name, to.getvalue()


def by_python(path, contents):
    if path.suffix == ".gz":
        path, contents = path.with_suffix(""), gzip.decompress(contents)
    if path.suffix == ".parquet":
        return None
    text = contents.decode("utf-8-sig")
    if path.suffix in (".csv", ".tsv"):
        separator = {"semicolons.csv": ";", "tabs.tsv": "\t"}.get(path.name, ",")
        return [row["text"] for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)]
    if text.lstrip()[0] == "[":
        return [row["text"] for row in json.loads(text)]
    return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]


def by_pandas(path, _):
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        separator = {"semicolons.csv": ";", "tabs.tsv": "\t"}.get(name, ",")
        frame = pandas.read_csv(path, sep=separator, keep_default_na=False)
    elif name.endswith(".parquet"):
        frame = pandas.read_parquet(path)
    else:
        text = gzip.open(path).read(9) if path.suffix == ".gz" else path.read_bytes()[:9]
        frame = pandas.read_json(path, lines=b"[" not in text, dtype=False, convert_dates=False)
    return list(frame["text"])


def by_datasets(path, _):
    name = path.name.removesuffix(".gz")
    kind = {"csv": "csv", "tsv": "csv", "parquet": "parquet"}.get(name.rsplit(".", 1)[1], "json")
    how = {"sep": {"semicolons.csv": ";", "tabs.tsv": "\t"}.get(name, ",")} if kind == "csv" else {}
    return list(
        datasets.load_dataset(
            kind, data_files=str(path), split="train", cache_dir=str(path.parent / "datasets"), **how
        )["text"]
    )


def ours(program, path):
    recipe = path.parent / "recipe.toml"
    recipe.write_text(RECIPE.replace("FILE", str(path)).replace("CACHE", str(path.parent / "cache")))
    done = common.attempt(program, "data", "inspect", recipe, "--json", "--samples", 1000000000)
    if done.returncode != 0:
        return done.stderr.strip().splitlines()[0]
    samples = json.loads(done.stdout)["samples"]
    return [bytes(token for token in sample["tokens"] if token < 256).decode() for sample in samples]


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--moonlight", type=common.program, required=True, help="the built `moonlight`")
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    rows = table(arguments.records, arguments.seed)
    readers = {"python": by_python, "pandas": by_pandas, "datasets": by_datasets}
    sums = {name: [0, 0, 0] for name in readers}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, contents in files(rows):
            path = pathlib.Path(folder) / name
            path.write_bytes(contents)
            mine = ours(arguments.moonlight, path)
            notes = []
            if isinstance(mine, str) and "parquet" in mine and path.suffix == ".parquet":
                print(f"{name:24} not read by this build")
                continue
            for reader, read in readers.items():
                try:
                    theirs = read(path, contents)
                except Exception as error:
                    theirs = None
                    sums[reader][2] += 1
                    notes.append(f"{reader} refuses ({type(error).__name__})")
                if theirs is None:
                    continue
                same = mine == theirs
                sums[reader][0 if same else 1] += 1
                notes.append(f"{reader} {'same' if same else 'OTHER'}")
                if not same:
                    # Where they differ, the table shows which one is right.
                    whole = [row["text"] for row in rows]
                    notes.append(
                        f"(ours {'as written' if mine == whole else 'not as written'}, theirs {'as written' if theirs == whole else 'not as written'})"
                    )
                    wrong += mine != whole
            count = len(mine) if isinstance(mine, list) else mine
            print(f"{name:24} {count} records: {', '.join(notes)}")
    for reader, (same, other, refused) in sums.items():
        print(f"{reader}: {same} files read alike, {other} differently, {refused} refused by {reader}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
