#!/usr/bin/env python3
"""Compares four readers of one tokenizer: `tiktoken` (Python) with the ranks and the family's pattern, transformers with the
`tokenizer.json` that `moonlight-convert tokenizer` makes of them, and `moonlight-infer` with both files.

    cargo build --release -p moonlight-convert && cargo build --release -p moonlight-infer --example tokenize
    python scripts/parity/check_tokenizer.py --ranks RANKS --convert moonlight-convert --tokenize tokenize [--text PATH]...
    python scripts/parity/check_tokenizer.py DIR --tokenize tokenize [--text PATH]...
    python scripts/parity/check_tokenizer.py --post-processors --tokenize tokenize

RANKS is a file in tiktoken's form; the crate `tiktoken-rs` contains OpenAI's (`assets/o200k_base.tiktoken`). The script makes a folder from
it, with the special tokens of the family, some that are not special (`<think>`, tools), some with flags, and a post-processor. DIR is any folder
with `tiktoken.model` and `tokenizer.json`. Each text (built in, random, or from the files and folders of `--text`) is encoded as
plain text, encoded with special tokens parsed, and decoded with and without them, as a whole and token by token. `--post-processors` checks
the tokens that begin and end a text. The exit code is 0 if everything is equal.

Needs: tiktoken, transformers, tokenizers (group `parity`). Takes: a minute for every 20 MB of text, and the built-in texts half a minute.
"""

import json
import pathlib
import random
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from common import late

tiktoken = late("tiktoken")
transformers = late("transformers")
Tokenizer = late("tokenizers", "Tokenizer")
decoders = late("tokenizers", "decoders")
models = late("tokenizers", "models")
pre_tokenizers = late("tokenizers", "pre_tokenizers")
processors = late("tokenizers", "processors")
load_tiktoken_bpe = late("tiktoken.load", "load_tiktoken_bpe")
PreTrainedTokenizerFast = late("transformers", "PreTrainedTokenizerFast")


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
# Not special, as in Kimi K2; and with flags, which tiktoken does not have.
PLAIN = {11: "<|tool_calls_section_begin|>", 13: "<|tool_call_begin|>", 22: "<think>", 23: "</think>"}
FLAGS = {
    24: {"content": "<|left|>", "lstrip": True},
    25: {"content": "<|right|>", "rstrip": True},
    26: {"content": "w_ord", "single_word": True},
}
NAMES = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    10: "<|im_system|>",
    17: "<|im_middle|>",
}
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
    "<|im_assistant|>assistant<|im_middle|><think>\nHm.</think>\n\n<|tool_calls_section_begin|><|tool_call_begin|>f:0",
    "<think></think><think> </think>\n<thin k></ think>",
    "a  <|left|>  b  <|right|>\n\n c word words sword word. \u3000<|left|><|right|>\t",
]
MARKS = [*NAMES.values(), *PLAIN.values(), *(token["content"] for token in FLAGS.values())]


def main():
    parser = common.parser(__doc__)
    parser.add_argument("directory", type=pathlib.Path, nargs="?", help="a folder with both files of a tokenizer")
    parser.add_argument("--ranks", type=pathlib.Path, help="a file of ranks in tiktoken's form")
    parser.add_argument("--convert", default="moonlight-convert", help="the program, for --ranks and --post-processors")
    parser.add_argument("--tokenize", help="the example `tokenize` of moonlight-infer, to compare our readers as well")
    parser.add_argument("--text", type=pathlib.Path, action="append", default=[], help="a text file, or a folder")
    parser.add_argument("--most", type=int, default=20_000_000, help="the most bytes of text that are compared")
    parser.add_argument(
        "--post-processors", action="store_true", help="the tokens that begin and end a text, against transformers"
    )
    options = parser.parse_args()
    if options.post_processors:
        result, failed = post_processors(options.tokenize)
    elif (options.directory is None) == (options.ranks is None):
        parser.error("give DIR, `--ranks` or `--post-processors`")
    elif options.directory:
        result, failed = compare(options.directory, texts(options), options.tokenize)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            result, failed = {}, False
            for flags in [False, True]:
                directory = made(pathlib.Path(scratch) / f"flags-{flags}", options.ranks, options.convert, flags)
                name = "with flags and BOS" if flags else "the family's"
                result[name], differs = compare(directory, texts(options), options.tokenize, flags)
                failed |= differs
    print(json.dumps(result, indent=2, ensure_ascii=False))
    sys.exit(failed)


def made(directory, ranks, convert, flags):
    directory.mkdir()
    (directory / "tiktoken.model").write_bytes(ranks.read_bytes())
    first = len(load_tiktoken_bpe(str(ranks)))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {str(first + place): plain | {"content": name, "special": True} for place, name in NAMES.items()}
    added |= {str(first + place): plain | {"content": name, "special": False} for place, name in PLAIN.items()}
    config = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": added}
    if flags:
        added |= {str(first + place): plain | {"special": False} | token for place, token in FLAGS.items()}
        config |= {"add_bos_token": True, "add_eos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    subprocess.run([convert, "tokenizer", str(directory)], check=True)
    return directory


def post_processors(tokenize):
    """Texts under each kind of post-processor, class and `add_bos_token`: ours and `AutoTokenizer`'s."""
    special = [("<s>", 256), ("</s>", 257)]

    def template(single):
        return processors.TemplateProcessing(single=single, special_tokens=special)

    levels = processors.ByteLevel(trim_offsets=False)
    kinds = {
        "none": None,
        "ByteLevel": levels,
        "<s> $A": template("<s> $A"),
        "<s> $A </s>": template("<s> $A </s>"),
        "Sequence": processors.Sequence([levels, template("<s> $A")]),
        "RobertaProcessing": processors.RobertaProcessing(("</s>", 257), ("<s>", 256)),
        "BertProcessing": processors.BertProcessing(("</s>", 257), ("<s>", 256)),
    }
    says = [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
    classes = ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer"]
    result, different = {}, []
    for kind, processor in kinds.items():
        inner = Tokenizer(
            models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
        )
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens(["<s>", "</s>"])
        if processor is not None:
            inner.post_processor = processor
        for name in classes:
            for say in says:
                with tempfile.TemporaryDirectory() as scratch:
                    inner.save(scratch + "/tokenizer.json")
                    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": name} | say
                    pathlib.Path(scratch, "tokenizer_config.json").write_text(json.dumps(config))
                    theirs = transformers.AutoTokenizer.from_pretrained(scratch)("Hi <s>")["input_ids"]
                    ours = next(of_ours(tokenize, scratch, ["Hi <s>"]))["parsed"] if tokenize else theirs
                result[kind] = theirs
                if ours != theirs:
                    different.append([kind, name, say, ours, theirs])
    return {"transformers": transformers.__version__, "transformers makes": result, "different": different}, bool(
        different
    )


def of_ours(tokenize, directory, texts):
    """What the example `tokenize` prints for each text."""
    program = subprocess.Popen([tokenize, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for text in texts:
        program.stdin.write(json.dumps(text) + "\n")
        program.stdin.flush()
        yield json.loads(program.stdout.readline())
    program.stdin.close()
    if program.wait() != 0:
        sys.exit(f"{tokenize} failed")


def texts(options):
    yield from TEXTS
    generator = random.Random(0)
    kinds = [(32, 126), (0x4E00, 0x9FFF), (0x300, 0x36F), (0x1F300, 0x1FAFF), (0xA0, 0x24F), (0, 0x10FFFF)]
    for _ in range(5000):
        points = [generator.randint(*generator.choice(kinds)) for _ in range(generator.randint(1, 80))]
        text = "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)
        for _ in range(generator.randint(0, 3)):
            place = generator.randint(0, len(text))
            text = text[:place] + generator.choice(["", " ", "\n"]) + generator.choice(MARKS) + text[place:]
        yield text
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
                # The same with special tokens of a conversation.
                at = generator.randint(0, len(part))
                yield "".join([part[:at][-2000:], *generator.choices(MARKS, k=3), part[at:][:2000]])


def compare(directory, texts, tokenize, flags=False):
    ranks = load_tiktoken_bpe(str(directory / "tiktoken.model"))
    first = len(ranks)
    names = {first + place: f"<|reserved_token_{first + place}|>" for place in range(SPECIALS)}
    names |= {first + place: name for place, name in NAMES.items()}
    config = directory / "tokenizer_config.json"
    special = dict.fromkeys(names, True)
    if config.exists():
        for id, token in json.loads(config.read_text()).get("added_tokens_decoder", {}).items():
            names[int(id)], special[int(id)] = token["content"], token["special"]
    ids = {name: id for id, name in names.items()}
    not_special = {names[id] for id, special in special.items() if not special}
    theirs = tiktoken.Encoding("moonlight", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=ids)
    hugging_face = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    auto = type(transformers.AutoTokenizer.from_pretrained(directory)).__name__ if not remote(config) else None
    json_only = None
    if tokenize:
        json_only = tempfile.TemporaryDirectory()
        for file in directory.iterdir():
            if file.name != "tiktoken.model":
                pathlib.Path(json_only.name, file.name).write_bytes(file.read_bytes())
        tiktoken_only = tempfile.TemporaryDirectory()
        for file in directory.iterdir():
            if file.name != "tokenizer.json":
                pathlib.Path(tiktoken_only.name, file.name).write_bytes(file.read_bytes())

    count = {"texts": 0, "bytes": 0, "tokens": 0, "added tokens in them": 0}
    differences = []
    if len(hugging_face) != len(names) + first:
        differences.append(f"{len(hugging_face)} tokens, not {len(names) + first}")
    differences += [name for name, id in ids.items() if hugging_face.convert_tokens_to_ids(name) != id]

    texts = list(texts)
    ours = [of_ours(tokenize, folder.name, texts) for folder in (tiktoken_only, json_only)] if tokenize else []
    for text in texts:
        around = hugging_face(text)["input_ids"]
        inner = hugging_face(text, add_special_tokens=False)["input_ids"]
        plain = hugging_face(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        decoded = hugging_face.decode(around, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        with_special = hugging_face.decode(around, clean_up_tokenization_spaces=False)
        count["texts"] += 1
        count["bytes"] += len(text.encode())
        count["tokens"] += len(plain)
        count["added tokens in them"] += sum(id >= first for id in inner)
        same = True
        if not flags:
            same = inner == theirs.encode(text, allowed_special="all") and with_special == text
            same &= plain == theirs.encode(text, allowed_special=not_special, disallowed_special=())
        for program in ours:
            made = next(program)
            same &= made["tokens"] == plain and made["parsed"] == around
            same &= made["decoded"] == made["streamed"] == decoded and made["decoded_with_special"] == with_special
        if not same:
            differences.append(text[:80])
    versions = {"transformers": transformers.__version__, "tiktoken": tiktoken.__version__}
    readers = (
        ["tiktoken"] * (not flags)
        + ["transformers"]
        + ["ours of tiktoken.model", "ours of tokenizer.json"] * bool(ours)
    )
    result = versions | {"ranks": first, "auto_tokenizer": auto, "equal readers": readers} | count
    return result | {"different": len(differences), "first_differences": differences[:5]}, bool(differences)


def remote(config):
    """Whether `AutoTokenizer` would run code of the model's repository."""
    return config.exists() and "auto_map" in json.loads(config.read_text())


if __name__ == "__main__":
    main()
