#!/usr/bin/env python3
"""Makes the parquet files that the tests of `--features moonlight-train/parquet` read, by pyarrow, as Hugging Face does.

    pip install pyarrow
    python scripts/make_parquet_fixtures.py [fixtures/parquet]

Beside each file stands a `.jsonl` with its rows as pyarrow reads them back. Between them they have what data sets on the
Hub are kept in: snappy (the default there), zstd, gzip and no compression, dictionaries and plain pages, pages of both
versions, several groups of rows, both names that pyarrow has given to the elements of lists, and values that are absent at
every depth. The same pyarrow gives the same files.
"""

import json
import pathlib
import random
import sys

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = "the moon lights a long road, 月 was über Öl; 🌙 and `<|im_end|>` are words\n".split(" ")


def write(folder, name, table, **settings):
    path = folder / f"{name}.parquet"
    pq.write_table(table, path, **settings)
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for row in pq.read_table(path).to_pylist():
            # pyarrow gives maps as lists of pairs.
            row |= {"map": dict(row["map"])} if row.get("map") is not None else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "fixtures/parquet"
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(16)
    text = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))
    perhaps = lambda value, share=0.3: None if draw.random() < share else value

    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.float32())])
    schema = pa.schema([("prompt_id", pa.int64()), ("messages", pa.list_(turn)), ("source", pa.string())])
    rows = []
    for index in range(23):
        messages = [{"role": "system", "content": text(), "weight": None}] if index % 3 == 0 else []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": text(), "weight": None})
            messages.append({"role": "assistant", "content": text(), "weight": perhaps(0.5)})
        rows.append({"prompt_id": index, "messages": messages, "source": perhaps("made")})
    messages = pa.Table.from_pylist(rows, schema)
    write(folder, "messages-snappy", messages, compression="snappy", row_group_size=7)

    turn = pa.struct([("from", pa.string()), ("value", pa.large_string())])
    rows = [
        {"conversations": [{"from": "human", "value": text()}, {"from": "gpt", "value": text()}], "id": str(index)}
        for index in range(9)
    ]
    table = pa.Table.from_pylist(rows, pa.schema([("conversations", pa.list_(turn)), ("id", pa.string())]))
    settings = {"compression": "zstd", "data_page_version": "2.0", "use_compliant_nested_type": False}
    write(folder, "sharegpt-zstd", table, use_dictionary=False, **settings)

    pairs = pa.list_(pa.list_(pa.string()))
    schema = pa.schema([("instruction", pa.large_string()), ("input", pa.string()), ("output", pa.string()), ("history", pairs)])
    history = lambda: [[text(), text()] for _ in range(draw.randint(0, 2))]
    rows = [
        {"instruction": text(), "input": perhaps(text()), "output": text(), "history": perhaps(history())}
        for _ in range(11)
    ]
    table = pa.Table.from_pylist(rows, schema)
    compression = {"instruction": "none", "input": "none", "output": "gzip", "history.list.element.list.element": "snappy"}
    write(folder, "alpaca-gzip", table, compression=compression)

    # Everything that may be absent is, somewhere; no conversation.
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    deep = pa.struct([("a", pa.int8()), ("b", pa.list_(pa.uint32())), ("c", pa.list_(part))])
    columns = [
        ("deep", pa.list_(deep)),
        ("alone", deep),
        ("lists", pa.list_(pa.list_(pa.float64()))),
        ("map", pa.map_(pa.string(), pa.list_(pa.int32()))),
        ("yes", pa.bool_()),
        ("half", pa.float16()),
        ("nothing", pa.list_(pa.string())),
    ]
    several = lambda make: perhaps([make() for _ in range(draw.randint(0, 3))])
    a_part = lambda: perhaps({"type": perhaps("text"), "text": perhaps(text())})
    a_deep = lambda: perhaps(
        {"a": perhaps(draw.randint(-9, 9)), "b": several(lambda: perhaps(draw.randint(0, 2**32 - 1))), "c": several(a_part)}
    )
    rows = [
        {
            "deep": several(a_deep),
            "alone": a_deep(),
            "lists": several(lambda: several(lambda: perhaps(draw.random()))),
            "map": perhaps([(key, several(lambda: draw.randint(0, 9))) for key in draw.sample("abcd", draw.randint(0, 3))]),
            "yes": perhaps(draw.random() < 0.5),
            "half": perhaps(draw.randint(-8, 8) / 4),
            "nothing": None,
        }
        for _ in range(200)
    ]
    write(folder, "awkward", pa.Table.from_pylist(rows, pa.schema(columns)), row_group_size=64, data_page_size=256)

    # Rows that are no conversations: without an assistant, of an unknown role, without a message.
    good = messages.slice(0, 2).to_pylist()
    user = {"role": "user", "content": "Q", "weight": None}
    bad = [[user], [user, {"role": "robot", "content": "A", "weight": None}], None]
    rows = good + [{"prompt_id": 9, "messages": one, "source": None} for one in bad] + good
    write(folder, "bad-records", pa.Table.from_pylist(rows, messages.schema), compression="snappy")

    write(folder, "text", pa.table({"id": [1, 2], "text": ["one", "two"]}), compression="snappy")
    # A string that is none, in the second row.
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    raw = pa.array([b"fine", b"no\xfftext"], pa.binary()).view(pa.string())
    content = pa.StructArray.from_arrays([pa.array(["assistant"] * 2), raw], fields=list(turn))
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), content)
    pq.write_table(pa.table({"messages": lists}), folder / "not-utf8.parquet", compression="none", use_dictionary=False)


if __name__ == "__main__":
    main()
