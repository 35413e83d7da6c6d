#!/usr/bin/env python3
"""Opens a `tokenizer.json` of ours with transformers and compares it with what `tiktoken` makes of the ranks.

    moonlight-convert tokenizer DIR
    python scripts/check_tokenizer.py DIR [--text PATH]...
    python scripts/check_tokenizer.py --ranks cl100k_base.tiktoken --convert moonlight-convert [--text PATH]...

DIR holds `tiktoken.model`, `tokenizer.json` and, where there is one, `tokenizer_config.json`. With `--ranks`, a directory
is made of a file of ranks in tiktoken's form (the `tiktoken-rs` crate carries some), with Moonlight's special tokens, and
the program given by `--convert` writes the `tokenizer.json`. Every text (files, or all files of folders; some are built
in) is encoded with and without special tokens by both, and decoded again. Exit code 0 if all of it is equal, 1 if not.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import tiktoken
import transformers
from tiktoken.load import load_tiktoken_bpe
from transformers import PreTrainedTokenizerFast

# As in the published `tokenization_moonshot.py`.
PATTERN = "|".join(
    [
        r"""[\p{Han}]+""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
SPECIALS = 256
NAMES = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_system|>", 17: "<|im_middle|>"}
TEXTS = [
    "",
    "Hello, world's  end\r\n\r\n  I'LL WE'VE don't",
    "月光下的凤尾竹 漢字かな交じり文 한국어 中文English混排123数字",
    "Ελληνικά русский עברית العربية हिन्दी தமிழ் ไทย",
    "e\u0301 A\u030a \u1112\u1161\u11ab",
    "👩‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 ❤️",
    " " * 5000 + "x" + "\n" * 1000,
    "0123456789 １２３４ ½ 3.14e-10",
    "<|im_user|>user<|im_middle|>hi<|im_end|><|im_assistant|>assistant<|im_middle|>",
    "<|im_end <|im_end|>> [EOS][BOS]",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, nargs="?")
    parser.add_argument("--ranks", type=pathlib.Path, help="a file of ranks to make a directory of")
    parser.add_argument("--convert", default="moonlight-convert", help="the program, for --ranks")
    parser.add_argument("--text", type=pathlib.Path, action="append", default=[], help="a text file, or a folder")
    parser.add_argument("--most", type=int, default=20_000_000, help="bytes of text that are compared")
    options = parser.parse_args()
    if (options.directory is None) == (options.ranks is None):
        parser.error("give DIR or --ranks")
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.directory or made(pathlib.Path(scratch), options.ranks, options.convert)
        result, failed = compare(directory, texts(options))
    print(json.dumps(result, indent=2, ensure_ascii=False))
    sys.exit(failed)


def made(directory, ranks, convert):
    (directory / "tiktoken.model").write_bytes(ranks.read_bytes())
    first = len(load_tiktoken_bpe(str(ranks)))
    added = {str(first + place): {"content": name, "special": True} for place, name in NAMES.items()}
    config = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": added}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    subprocess.run([convert, "tokenizer", str(directory)], check=True)
    return directory


def texts(options):
    yield from TEXTS
    generator = random.Random(0)
    kinds = [(32, 126), (0x4E00, 0x9FFF), (0x300, 0x36F), (0x1F300, 0x1FAFF), (0xA0, 0x24F), (0, 0x10FFFF)]
    for _ in range(5000):
        points = [generator.randint(*generator.choice(kinds)) for _ in range(generator.randint(1, 80))]
        yield "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)
    left = options.most
    for path in options.text:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in (file for file in files if file.is_file()):
            try:
                text = file.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            for start in range(0, len(text), 50_000):
                part = text[start : start + 50_000]
                left -= len(part.encode())
                if left < 0:
                    return
                yield part


def compare(directory, texts):
    ranks = load_tiktoken_bpe(str(directory / "tiktoken.model"))
    first = len(ranks)
    names = {first + place: f"<|reserved_token_{first + place}|>" for place in range(SPECIALS)}
    names |= {first + place: name for place, name in NAMES.items()}
    config = directory / "tokenizer_config.json"
    if config.exists():
        added = json.loads(config.read_text()).get("added_tokens_decoder", {})
        names |= {int(id): token["content"] for id, token in added.items() if int(id) in names}
    special = {name: id for id, name in names.items()}
    theirs = tiktoken.Encoding("moonlight", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    ours = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    auto = type(transformers.AutoTokenizer.from_pretrained(directory)).__name__ if not remote(config) else None

    count = {"texts": 0, "bytes": 0, "tokens": 0}
    differences = []
    if len(ours) != first + SPECIALS:
        differences.append(f"{len(ours)} tokens, not {first + SPECIALS}")
    differences += [name for name, id in special.items() if ours.convert_tokens_to_ids(name) != id]
    for text in texts:
        with_special = ours(text, add_special_tokens=False)["input_ids"]
        without = ours(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        count["texts"] += 1
        count["bytes"] += len(text.encode())
        count["tokens"] += len(without)
        same = (
            with_special == theirs.encode(text, allowed_special="all")
            and without == theirs.encode_ordinary(text)
            and ours.decode(with_special, clean_up_tokenization_spaces=False) == text
        )
        if not same:
            differences.append(text[:80])
    versions = {"transformers": transformers.__version__, "tiktoken": tiktoken.__version__}
    result = versions | {"ranks": first, "auto_tokenizer": auto} | count
    return result | {"different": len(differences), "first_differences": differences[:5]}, bool(differences)


def remote(config):
    """Whether `AutoTokenizer` would run the repository's own code."""
    return config.exists() and "auto_map" in json.loads(config.read_text())


if __name__ == "__main__":
    main()
