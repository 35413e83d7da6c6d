"""Makes conversations for fine-tuning from real text: the Rust source in cargo's registry on this machine.

    python scripts/experiments/make_conversations.py runs/conversations [--most 20000] [--source DIR]

There are four kinds of question, each about a documented function in a crate's source:

* what it does: the first sentence of its documentation (which can only be memorized, so only the loss matters);
* the name of the function in a line of code;
* the type that a signature returns;
* how many parameters a signature has.

The last three have one right answer that can be read from the question, so an exact match is meaningful. Crates are assigned to
training or validation by a hash of their names, so no line of a crate is in both. The last three kinds, from held-out crates, are also
written to `exact.jsonl`, for `moonlight eval --format chat`. The same source gives the same files.

Needs: only Python. Takes: a minute.
"""

import hashlib
import json
import os
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

SYSTEM = "You answer questions about Rust."
SIGNATURE = re.compile(
    r"^\s*pub (?:const |async |unsafe )*fn (?P<name>[a-z_][a-z0-9_]*)\s*(?P<generics><[^(]*>)?\((?P<inside>[^()]*)\)"
    r"(?:\s*->\s*(?P<output>[^{;]+?))?\s*(?:where\b.*)?[{;]\s*$"
)
LONGEST_LINE = 110
LONGEST_SENTENCE = 160


def hashed(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def crates(source):
    """The folders of crates in the registry's folders, one for each name (the last by name)."""
    found = {}
    for registry in sorted(source.iterdir()):
        for folder in sorted(registry.iterdir()) if registry.is_dir() else []:
            name = re.sub(r"-\d+\.\d+\.\d+.*$", "", folder.name)
            found[name] = folder
    return sorted(found.items())


def first_sentence(lines):
    """The first sentence of documentation lines, if it is short and in plain words."""
    words = []
    for line in lines:
        if not line or line.startswith(("#", "```", "|", "*", "-", "<", "[")):
            break
        words.append(line)
    text = " ".join(words)
    match = re.match(r"(.+?[.!])(?:\s|$)", text)
    if not match:
        return None
    sentence = match.group(1)
    plain = sentence.isascii() and "](" not in sentence and "TODO" not in sentence
    return sentence if plain and 12 <= len(sentence) <= LONGEST_SENTENCE else None


def functions(path):
    """The public functions of a file whose signature is one line: line, match, first sentence of the documentation."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError):
        return
    documentation = []
    for line in lines:
        stripped = line.strip()
        if stripped.startswith("///"):
            documentation.append(stripped[3:].strip())
            continue
        if stripped.startswith("#[") and stripped.endswith("]"):
            continue
        match = SIGNATURE.match(line)
        if match and len(stripped) <= LONGEST_LINE and stripped.isascii():
            yield stripped.rstrip("{; ").strip(), match, first_sentence(documentation)
        documentation = []


def parameters(inside):
    """How many parameters there are between the parentheses, `self` not counted."""
    depth, count, current = 0, 0, ""
    for character in inside + ",":
        depth += character in "<[("
        depth -= character in ">])"
        if character == "," and depth == 0:
            parameter = current.strip()
            count += bool(parameter) and not re.fullmatch(r"(&('\w+ )?)?(mut )?self(: .*)?", parameter)
            current = ""
        else:
            current += character
    return count


def questions(crate, line, match, sentence):
    name = match["name"]
    if sentence:
        yield "documentation", f"What does `{name}` of the crate `{crate}` do?\n{line}", sentence
    yield "name", f"What is the name of the function in this line?\n{line}", name
    if "->" in line.split(")")[-1] or match["output"]:
        yield "type", f"Which type does this function return?\n{line}", " ".join(match["output"].split())
    if "->" not in match["inside"]:
        count = parameters(match["inside"])
        yield "count", f"How many parameters does this function take, without self?\n{line}", str(count)


def conversation(turns):
    messages = [{"role": "system", "content": SYSTEM}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("output", type=pathlib.Path, help="the folder to write")
    home = os.environ.get("CARGO_HOME") or os.path.expanduser("~/.cargo")
    parser.add_argument(
        "--source", type=pathlib.Path, default=pathlib.Path(home) / "registry" / "src", help="a folder of crates"
    )
    parser.add_argument("--most", type=int, default=20_000, help="the most training conversations")
    arguments = parser.parse_args()

    asked = {"train": {}, "valid": {}}
    for crate, folder in crates(arguments.source):
        split = "valid" if hashed(crate) % 10 == 0 else "train"
        for path in sorted(folder.rglob("src/**/*.rs")):
            for line, match, sentence in functions(path):
                for kind, question, answer in questions(crate, line, match, sentence):
                    asked[split].setdefault((kind, question), answer)
    # A line that occurs in crates of both parts belongs to training.
    lines = {question.split("\n", 1)[1] for _, question in asked["train"]}
    valid = {key: answer for key, answer in asked["valid"].items() if key[1].split("\n", 1)[1] not in lines}

    def ordered(questions):
        return sorted(questions.items(), key=lambda item: (hashed(item[0][1] + item[0][0]), item))

    arguments.output.mkdir(parents=True, exist_ok=True)

    def write(name, conversations):
        path = arguments.output / name
        with path.open("w", encoding="utf-8") as file:
            for one in conversations:
                file.write(json.dumps(one, ensure_ascii=False) + "\n")
        print(f"{path}: {len(conversations)} conversations")

    train, at = [], 0
    questions_in_order = [((question, answer)) for (_, question), answer in ordered(asked["train"])]
    while at < len(questions_in_order) and len(train) < arguments.most:
        # Every fourth conversation has two questions.
        turns = 2 if len(train) % 4 == 3 else 1
        train.append(conversation(questions_in_order[at : at + turns]))
        at += turns
    held_out = ordered(valid)
    write("train.jsonl", train)
    write("valid.jsonl", [conversation([(question, answer)]) for (_, question), answer in held_out[:1000]])
    exact = [((kind, question), answer) for (kind, question), answer in held_out[1000:] if kind != "documentation"]
    write("exact.jsonl", [conversation([(question, answer)]) for (_, question), answer in exact[:300]])


if __name__ == "__main__":
    main()
