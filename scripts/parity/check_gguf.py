#!/usr/bin/env python3
"""Compares GGUF files of `moonlight-convert` with llama.cpp's own library, and with the Python package `gguf`.

    python scripts/parity/check_gguf.py --program target/release/moonlight --converter target/release/moonlight-convert
    python scripts/parity/check_gguf.py ... --real path/to/SmolLM2-135M     # a published model, too
    python scripts/parity/check_gguf.py ... --vocabularies path/to/llama.cpp/models --example target/release/examples/gguf_tokenizer

For a tiny checkpoint of each family (Moonlight without and with a low-rank query, DeepSeek-V2 with softmax routing, Llama with
grouped queries and Llama 3.1's frequencies, Llama with a tokenizer of SentencePiece's kind, Qwen2), made here with transformers and with
tokenizers trained here, and for each type of file:

* llama.cpp opens the file; in f32 its log-probabilities are those of `moonlight score` on the original (1e-3) and its greedy tokens those of
  `moonlight generate`; in the other types its logits have the cosine and the most likely tokens below, and those of `moonlight score` on the
  same file;
* `gguf` reads the file, and quantizes the f32 file's tensors to the same bytes (Q8_0, Q4_0);
* the f32 and bf16 files converted back have the weights of the original, bit for bit;
* llama.cpp, the original tokenizer and the one that the file is converted back to have equal tokens for a mixed corpus. Moonlight's are known
  to differ in llama.cpp for three kinds of text, and for each of the kinds they do;
* the chat template is the original's;
* a LoRA adapter as GGUF changes llama.cpp's log-probabilities as it changes those of `moonlight score`; adapters that llama.cpp ignores are
  refused.

DeepSeek-V2's choice of groups of experts is not llama.cpp's; the script checks that the converter says so.

The last form also makes a `tokenizer.json` of each of llama.cpp's own files of vocabularies (`ggml-vocab-*.gguf`, of published models), and
compares its tokens of the corpus and of the texts next to the files with those of llama.cpp.

Prints a table of the files, a line for each failure, and exits with 1 if there is one. Without the library (see llama_cpp.py) it prints why
and exits with 0, or with `--require` with 1.

Needs: npm; torch, transformers, peft, tokenizers, tiktoken, gguf, safetensors (group `parity`). Takes: two minutes with a release build.
"""

import base64
import json
import pathlib
import re
import sys
import tempfile
import unicodedata

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
import llama_cpp
from common import attempt, call, late
from models import read_scores, write_sequences

gguf = late("gguf")
np = late("numpy")
peft = late("peft")
safetensors = late("safetensors", "safe_open")
tiktoken = late("tiktoken")
tokenizers = late("tokenizers")
torch = late("torch")
transformers = late("transformers")

TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k"]
# The lowest cosine of a position's logits with those of the f32 file, and the share of positions with the same most likely token.
FLOORS = {
    "f32": (1 - 1e-6, 1.0),
    "f16": (0.9999, 0.9),
    # Rounding sends some tokens of the tiny mixtures, whose weights are random, to other experts.
    "bf16": (0.995, 0.85),
    "q8_0": (0.95, 0.8),
    "q4_0": (0.6, 0.2),
    "q4_k": (0.7, 0.2),
}
# The largest difference of a log-probability between llama.cpp and `moonlight score` on the same file. llama.cpp rounds activations to
# 8 bits for the quantized types, and to the type of the weights for the 16-bit ones.
SAME_FILE = {"f32": 1e-3, "f16": 0.02, "bf16": 0.1, "q8_0": 0.5, "q4_0": 0.5, "q4_k": 0.5}
BUDGET = 1e-3
LENGTH, NEW = 24, 16

MOONLIGHT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
LLAMA_3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2_PATTERN = LLAMA_3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK_3_PATTERNS = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
]

# Texts in which every tokenizer agrees.
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what they've said, isn't it? I'M SURE WE'LL SEE 'em.",
    "def total(xs, *, start=0):\n    for x in xs:\n        start += x ** 2  # squares\n    return start\n\n\nprint(total([1, 2, 3]))\n",
    '#include <stdio.h>\r\nint main(void) {\r\n\tprintf("%d\\n", 0x1F << 3);\r\n\treturn 0;\r\n}\r\n',
    "let map: HashMap<String, Vec<u8>> = x.iter().map(|(a, b)| (a.clone(), b[..4].to_vec())).collect();",
    '{"a": [1, 2.5e-3, null, true], "b": "\\u00e9\\n"}',
    "日本語のテキストと中文文本，以及混合English单词。東京は2025年に晴れ。",
    "한국어 문장입니다. 안녕하세요 세계!",
    "Привет, мир! Съешь ещё этих мягких французских булок. Ωμέγα καὶ ἄλφα.",
    "שלום עולם مرحبا بالعالم ١٢٣٤٥",
    "naïve café, façade, Zürich, Łódź, smörgåsbord",
    "🚀🦙😀 plain, then 👩‍🚀🏳️‍🌈 joined, and 🇩🇪 flags ✅",
    "1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 ½ ² Ⅷ",
    "  two\n   three\n\n    four\t\ttabs \t mixed   \n \n  \r\n end   ",
    "<|im_end|> [BOS] </s> <s> <|im_user|> <|endoftext|> spelled out",
    "http://example.org/path?x=1&y=%20#part user@example.com -- === ~~~ ***!!!??? ... ''''``\"\"",
    " ",
    "\n\n\n",
    "x",
]
# Only where a pre-tokenizer joins letters and combining marks, or the texts have none.
INDIC = ["हिन्दी में यह वाक्य है।", "বাংলা ভাষা", "தமிழ் மொழி", "ภาษาไทย", "cafe\u0301 re\u0301sume\u0301"]
# The kinds of text that llama.cpp's `kimi-k2` splits otherwise than Moonlight's tokenizer.
KINDS = {
    "a lower-case letter before an upper-case one": (
        r"[a-zß-öø-ÿ][A-Z]",
        ["getServer", "parseJSON and myVariable", "iPhone"],
    ),
    "combining marks": (
        r"[\u0300-\u036f\u0900-\u0903\u093a-\u094f\u0981-\u0983\u09bc-\u09cd\u0bbe-\u0bcd\u0e31\u0e34-\u0e4e\ufe0f]",
        INDIC,
    ),
    "々, 〇 and radicals": (r"[々〇\u2e80-\u2fdf]", ["人々の時々", "二〇二五年"]),
}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


class Failures:
    def __init__(self):
        self.list, self.count = [], 0

    def expect(self, name, holds, detail=""):
        self.count += 1
        if not holds:
            self.list.append(f"{name}{f': {detail}' if detail else ''}")
            common.print_progress(f"FAILED {self.list[-1]}")
        return holds


failures = Failures()


# --- tokenizers ----------------------------------------------------------------------------------------------------------------


def texts_for_training():
    kinds = [text for _, texts in KINDS.values() for text in texts]
    return (CORPUS + INDIC + kinds) * 3


def train(pre_tokenizer, size, special, normalizer=None, **model):
    """A byte-level tokenizer with its special tokens after the vocabulary."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts_for_training(), trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def splits(*patterns, by_byte_level=False):
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    steps = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=by_byte_level)])


def add_bos(tokenizer, bos):
    identifier = tokenizer.token_to_id(bos)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, identifier)]
    )


def settings(**names):
    return {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **names}


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1))


def llama_3(directory):
    tokenizer = train(splits(LLAMA_3_PATTERN), 700, ["<|begin|>", "<|end|>", "<|im_end|>"], ignore_merges=True)
    add_bos(tokenizer, "<|begin|>")
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", settings(bos_token="<|begin|>", eos_token="<|end|>"))
    return tokenizer


def qwen_2(directory):
    nfc = tokenizers.normalizers.NFC()
    tokenizer = train(splits(QWEN_2_PATTERN), 700, ["<|endoftext|>", "<|im_end|>"], normalizer=nfc)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = settings(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    del names["chat_template"]
    write_json(directory / "tokenizer_config.json", names)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return tokenizer


def deepseek_3(directory):
    tokenizer = train(splits(*DEEPSEEK_3_PATTERNS), 700, ["<｜begin｜>", "<｜end｜>"])
    add_bos(tokenizer, "<｜begin｜>")
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", settings(bos_token="<｜begin｜>", eos_token="<｜end｜>"))
    return tokenizer


def moonlight(directory):
    """Ranks for tiktoken. `tS` comes first, so that it matters whether `getServer` is one piece."""
    trained = train(splits(MOONLIGHT_PATTERN), 700, [])
    decoder = {character: byte for byte, character in bytes_to_characters().items()}
    texts = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    tokens = [bytes([byte]) for byte in range(256)] + [b"tS", b"eJ", b"yV", b"iP"]
    tokens += [found for text in texts if (found := bytes(decoder[c] for c in text)) not in tokens]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (directory / "tiktoken.model").write_text("".join(lines))
    first = len(tokens)
    names = {"[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<|im_user|>": 3, "<|im_assistant|>": 4, "[PAD]": 255}
    added = {str(first + at): {"content": name, "special": True} for name, at in names.items()}
    write_json(
        directory / "tokenizer_config.json",
        {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": added, "chat_template": TEMPLATE},
    )
    ranks = {token: rank for rank, token in enumerate(tokens)}
    # tiktoken has no class intersection with the same syntax; the `regex` module's is `--`.
    pattern = re.sub(r"\[([^\[\]]*)&&\[\^\\p\{Han\}\]\]", r"(?:(?!\\p{Han})[\1])", MOONLIGHT_PATTERN)
    encoding = tiktoken.Encoding("moonlight", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    encoding.size = first + 256
    return encoding


def bytes_to_characters():
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def sentence_piece(directory):
    """A tokenizer of SentencePiece's kind. Its merges are all pairs that form a token, as those of converted models."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = "▁"
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend(space), tokenizers.normalizers.Replace(" ", space)]
    )
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, show_progress=False, limit_alphabet=200, max_token_length=12
    )
    tokenizer.train_from_iterator(texts_for_training(), trainer)
    value = json.loads(tokenizer.to_str())
    vocab = value["model"]["vocab"]
    pairs = [
        [text[:at], text[at:]]
        for text in sorted(vocab, key=vocab.get)
        if vocab[text] >= len(special)
        for at in sorted(range(1, len(text)), key=lambda at: (vocab.get(text[:at], 0), vocab.get(text[at:], 0)))
        if text[:at] in vocab and text[at:] in vocab
    ]
    value["model"]["merges"] = pairs
    value["added_tokens"] = [token for token in value["added_tokens"] if token["id"] < 3]
    value["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": space}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(value))
    add_bos(tokenizer, "<s>")
    tokenizer.save(str(directory / "tokenizer.json"))
    names = settings(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    write_json(directory / "tokenizer_config.json", names)
    return tokenizer


# --- checkpoints ---------------------------------------------------------------------------------------------------------------

DENSE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    # Small, so that rounding does not choose other experts in layer after layer.
    "initializer_range": 0.03,
}
LATENT = {
    **DENSE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.446,
    "norm_topk_prob": True,
}
ROPE = {"rope_type": "default", "rope_theta": 50000.0}
LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SOFTMAX = {
    **LATENT,
    "q_lora_rank": None,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_parameters": ROPE,
}
# llama.cpp ranks the groups by their two best experts, DeepSeek-V2 by the best one.
GROUPS = {**SOFTMAX, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
# Name: (class of the config, its settings, the tokenizer).
FAMILIES = {
    "moonlight": (
        "DeepseekV3Config",
        {**LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": ROPE},
        moonlight,
    ),
    "moonlight-q-lora": (
        "DeepseekV3Config",
        {**LATENT, "q_lora_rank": 96, "n_group": 2, "topk_group": 1, "rope_parameters": ROPE},
        deepseek_3,
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        {**SOFTMAX, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
        deepseek_3,
    ),
    "llama": ("LlamaConfig", {**DENSE, "num_key_value_heads": 2, "rope_parameters": LLAMA_31}, llama_3),
    "llama-spm": (
        "LlamaConfig",
        {**DENSE, "num_key_value_heads": 4, "rope_parameters": ROPE, "tie_word_embeddings": True},
        sentence_piece,
    ),
    "qwen2": ("Qwen2Config", {**DENSE, "num_key_value_heads": 2, "rope_parameters": ROPE}, qwen_2),
}


def make(family, directory, settings=None):
    """Writes a checkpoint with random weights in f32 and its tokenizer, which is returned."""
    directory.mkdir()
    kind, values, make_tokenizer = FAMILIES[family]
    values = settings or values
    tokenizer = make_tokenizer(directory)
    size = tokenizer.size if family == "moonlight" else tokenizer.get_vocab_size()
    size = -(-(size + 3) // 32) * 32
    config = getattr(transformers, kind)(**values, vocab_size=size, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    torch.manual_seed(len(family))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif name.endswith("bias"):
                tensor.normal_(std=0.3)
        for name, tensor in model.named_buffers():
            if "correction_bias" in name:
                tensor.normal_(std=0.05)
    model.save_pretrained(directory)
    return tokenizer


# --- comparisons ---------------------------------------------------------------------------------------------------------------


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def token_logprobs(logits, tokens):
    return np.array([row[token] for row, token in zip(log_softmax(logits), tokens[1:])])


def cosines(a, b):
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def largest(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def ours(programs, model, tokens, *arguments):
    """The log-probabilities of `moonlight score`."""
    with tempfile.TemporaryDirectory() as home:
        data = write_sequences(pathlib.Path(home) / "tokens.jsonl", [tokens])
        output = call(programs.program, "score", "--model", model, "--device", "cpu", "--data", data, *arguments)
    return read_scores(output)[0].numpy()


def our_tokens(programs, model, texts):
    """The tokens of `moonlight score`, special tokens spelled out being text."""
    with tempfile.TemporaryDirectory() as home:
        data = pathlib.Path(home) / "texts.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        output = call(programs.program, "score", "--model", model, "--device", "cpu", "--no-bos", "--data", data)
    return [json.loads(line)["tokens"] for line in output.splitlines()]


def greedy(programs, model, tokens):
    """The tokens of `moonlight generate`, with the one that ended it."""
    prompt = ",".join(map(str, tokens))
    arguments = ["--prompt-tokens", prompt, "--max-new-tokens", NEW, "--json", "--device", "cpu"]
    found = json.loads(call(programs.program, "generate", "--model", model, *arguments))
    stop = found.get("stop_token")
    return found["tokens"] + ([stop] if stop is not None else [])


def weights(directory):
    found = {}
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        with safetensors(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def read_with_package(path):
    """The tensors of a file by the package `gguf`: types and bytes."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: (tensor.tensor_type.name, tensor.shape.tolist(), tensor.data.copy()) for tensor in reader.tensors
    }


def check_bytes(name, tensors, plain):
    """Whether the package quantizes the f32 file's tensors to the same bytes."""
    for tensor, (kind, shape, data) in tensors.items():
        if kind in ("Q8_0", "Q4_0"):
            values = plain[tensor][2].reshape(shape[::-1])
            made = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
            if not failures.expect(f"{name}: bytes of {tensor}", np.array_equal(made.ravel(), data.ravel())):
                return False
    return True


def check_round_trip(programs, name, source, path, home):
    """The weights of a file that is converted back; returns its directory."""
    back = home / f"{path.stem}-back"
    call(programs.converter, "convert", path, back)
    original, found = weights(source), weights(back)
    dtype = torch.bfloat16 if path.stem == "bf16" else torch.float32
    same = original.keys() == found.keys() and all(
        # Norms, router and biases are f32 in every file.
        torch.equal(original[key].to(dtype if found[key].ndim > 1 else found[key].dtype).float(), found[key].float())
        for key in original
        if "mlp.gate.weight" not in key
    )
    failures.expect(f"{name}: {path.stem} converted back", same, original.keys() ^ found.keys())
    return back


def check_tokens(programs, name, tokenizer, model, path, back):
    """Tokens of the corpus; returns how many texts were compared."""
    plain = tokenizers.Tokenizer.from_file(str(back / "tokenizer.json"))
    plain.encode_special_tokens = True
    is_moonlight = name == "moonlight"
    if is_moonlight:
        reference = tokenizer.encode_ordinary
    else:
        tokenizer.encode_special_tokens = True

        def reference(text):
            return tokenizer.encode(text, add_special_tokens=False).ids

    texts = [*CORPUS, *(text for _, texts in KINDS.values() for text in texts)]
    for text, own in zip(texts, our_tokens(programs, path, texts)):
        expected, llama = reference(text), model.tokenize(text)
        found = plain.encode(text, add_special_tokens=False).ids
        failures.expect(f"{name}: converted-back tokenizer on {text!r}", found == expected, f"{found} {expected}")
        failures.expect(f"{name}: own tokenizer of the file on {text!r}", own == expected, f"{own} {expected}")
        kinds = [kind for kind, (pattern, _) in KINDS.items() if re.search(pattern, text)]
        if is_moonlight and kinds:
            continue
        if name == "qwen2" and text != (normal := unicodedata.normalize("NFC", text)):
            llama = model.tokenize(normal)
        failures.expect(f"{name}: llama.cpp's tokens of {text!r}", llama == expected, f"{llama} {expected}")
    if is_moonlight:
        for kind, (_, examples) in KINDS.items():
            differ = [text for text in examples if model.tokenize(text) != reference(text)]
            failures.expect(f"{name}: llama.cpp splits otherwise: {kind}", differ, "all texts have equal tokens")
    return len(texts)


def check_template(name, directory, model):
    file = directory / "chat_template.jinja"
    own = json.loads((directory / "tokenizer_config.json").read_text()).get("chat_template")
    expected = file.read_text() if file.exists() else own
    failures.expect(f"{name}: chat template", model.template() == expected, model.template())


def check_adapter(programs, library, name, directory, path, home, tokens):
    """An adapter of every projection that llama.cpp supports."""
    is_latent = name not in ("llama", "llama-spm", "qwen2")
    targets = ["o_proj"] if is_latent else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = home / "adapter"
    make_adapter(directory, adapter, targets)
    file = home / "adapter.gguf"
    call(programs.converter, "convert", adapter, file, "--base", directory)
    with llama_cpp.Model(library, path) as model:
        before = token_logprobs(model.logits(tokens), tokens)
        model.set_adapter(file)
        after = token_logprobs(model.logits(tokens), tokens)
    expected = ours(programs, directory, tokens, "--adapter", adapter)
    difference = largest(after, expected)
    failures.expect(f"{name}: adapter", difference <= BUDGET, difference)
    failures.expect(f"{name}: the adapter has an effect", largest(before, after) > 0.05)
    back = home / "adapter-back"
    call(programs.converter, "convert", file, back, "--base", directory)
    again = ours(programs, directory, tokens, "--adapter", back)
    failures.expect(f"{name}: adapter converted back", largest(again, expected) <= 1e-5, largest(again, expected))
    if is_latent:
        make_adapter(directory, home / "ignored", ["kv_a_proj_with_mqa"])
        refused = attempt(programs.converter, "convert", home / "ignored", home / "ignored.gguf", "--base", directory)
        said = "llama.cpp ignores adapters of that projection" in refused.stderr
        failures.expect(
            f"{name}: an adapter that llama.cpp ignores is refused", refused.returncode and said, refused.stderr
        )
    return difference


def make_adapter(directory, target, targets):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter_name, tensor in model.named_parameters():
            if "lora_B" in parameter_name:
                tensor.normal_(std=0.05)
    model.save_pretrained(target)


class Table:
    """The rows that are printed at the end."""

    COLUMNS = ["model", "type", "MB", "cosine", "top 1", "same file", "greedy", "other"]

    def __init__(self):
        self.rows = []

    def print(self):
        rows = [self.COLUMNS, *self.rows]
        widths = [max(len(str(row[at])) for row in rows) for at in range(len(self.COLUMNS))]
        for row in rows:
            print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())


def check_types(programs, library, name, directory, home, types, table, tokens):
    """Converts to each type and compares the logits; returns the files."""
    files = {}
    reference, plain = None, None
    for kind in types:
        files[kind] = path = home / f"{kind}.gguf"
        call(programs.converter, "convert", directory, path, "--type", kind)
        tensors = read_with_package(path)
        other = f"{len(tensors)} tensors"
        with llama_cpp.Model(library, path) as model:
            logits = model.logits(tokens)
            new = model.greedy(tokens, NEW)
        if kind == "f32":
            reference, plain = logits, tensors
        cosine = float(cosines(logits, reference).min())
        top = float((logits.argmax(-1) == reference.argmax(-1)).mean())
        floor = FLOORS[kind]
        failures.expect(f"{name}: cosine of {kind}", cosine >= floor[0], cosine)
        failures.expect(f"{name}: most likely tokens of {kind}", top >= floor[1], top)
        own = ours(programs, path, tokens)
        same_file = largest(token_logprobs(logits, tokens), own)
        failures.expect(f"{name}: log-probabilities of the {kind} file", same_file <= SAME_FILE[kind], same_file)
        text = ""
        if kind == "f32":
            difference = largest(token_logprobs(logits, tokens), ours(programs, directory, tokens))
            failures.expect(f"{name}: log-probabilities", difference <= BUDGET, difference)
            expected = greedy(programs, directory, tokens)
            same = expected == new[: len(expected)]
            failures.expect(f"{name}: greedy tokens", same, f"{new} {expected}")
            text = "equal" if same else "DIFFER"
            other += f", original {difference:.1e}"
        if kind in ("q8_0", "q4_0") and check_bytes(f"{name} {kind}", tensors, plain):
            other += ", bytes as gguf's"
        size = f"{path.stat().st_size / 1e6:.1f}"
        table.rows.append([name, kind, size, f"{cosine:.6f}", f"{top:.2f}", f"{same_file:.1e}", text, other])
    return files


def check_family(programs, library, name, home, table):
    home.mkdir()
    directory = home / "model"
    tokenizer = make(name, directory)
    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    tokens = np.random.default_rng(3).integers(3, size - 40, LENGTH).tolist()
    files = check_types(programs, library, name, directory, home, TYPES, table, tokens)
    back = check_round_trip(programs, name, directory, files["f32"], home)
    check_round_trip(programs, name, directory, files["bf16"], home)
    with llama_cpp.Model(library, files["q8_0"], vocabulary_only=True) as model:
        count = check_tokens(programs, name, tokenizer, model, files["q8_0"], back)
        check_template(name, directory, model)
    adapter = check_adapter(programs, library, name, directory, files["f32"], home, tokens)
    table.rows.append([name, "", "", "", "", "", "", f"{count} texts tokenized, adapter {adapter:.1e}"])


def check_groups(programs, library, home, table):
    """DeepSeek-V2's choice of groups, which llama.cpp does not have: the converter says so, and it is so."""
    home.mkdir()
    directory = home / "model"
    make("deepseek-v2", directory, GROUPS)
    path = home / "f32.gguf"
    printed = attempt(programs.converter, "convert", directory, path, "--type", "f32").stderr
    tokens = np.random.default_rng(3).integers(3, 600, LENGTH).tolist()
    with llama_cpp.Model(library, path) as model:
        found = token_logprobs(model.logits(tokens), tokens)
    difference = largest(found, ours(programs, directory, tokens))
    failures.expect("deepseek-v2 in groups: the difference is noted", "two best experts" in printed, printed)
    failures.expect("deepseek-v2 in groups: there is a difference", difference > BUDGET, difference)
    own = largest(ours(programs, path, tokens), ours(programs, directory, tokens))
    failures.expect("deepseek-v2 in groups: the file itself is equal", own <= 1e-5, own)
    table.rows.append(
        ["deepseek-v2 in groups", "f32", "", "", "", f"{own:.1e}", "", f"llama.cpp {difference:.1e}, noted"]
    )


def check_real(programs, library, directory, home, table):
    """A published model with a byte-level tokenizer."""
    home.mkdir()
    name = directory.name
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "The capital of France is Paris. In 1789, the people of the city"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    files = check_types(programs, library, name, directory, home, ["f32", "q8_0", "q4_k"], table, tokens)
    back = check_round_trip(programs, name, directory, files["f32"], home)
    with llama_cpp.Model(library, files["q8_0"], vocabulary_only=True) as model:
        count = check_tokens(programs, name, tokenizer, model, files["q8_0"], back)
        check_template(name, directory, model)
    table.rows.append([name, "", "", "", "", "", "", f"{count} texts tokenized"])


def check_vocabularies(library, program, directory, home, table):
    """llama.cpp's files of vocabularies: those whose pre-tokenizer is known have equal tokens, the others are refused by name."""
    for path in sorted(directory.glob("ggml-vocab-*.gguf")):
        name = path.stem.removeprefix("ggml-vocab-")
        made = attempt(program, path, home / name)
        if made.returncode:
            reason = made.stderr.strip().splitlines()[-1]
            refused = "which is not known" in reason or "does not name its pre-tokenizer" in reason
            failures.expect(f"{name}: is converted or refused by name", refused or "not supported" in reason, reason)
            table.rows.append([name, "", "", "", "", "", "", f"refused: {reason[-60:]}"])
            continue
        tokenizer = tokenizers.Tokenizer.from_file(str(home / name / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        is_nfc = type(tokenizer.normalizer).__name__ == "NFC"
        own = pathlib.Path(f"{path}.inp")
        texts = [*CORPUS, *(text for _, texts in KINDS.values() for text in texts)]
        texts += own.read_text().split("__ggml_vocab_test__\n") if own.exists() else []
        with llama_cpp.Model(library, path, vocabulary_only=True) as model:
            for text in texts:
                found = tokenizer.encode(text, add_special_tokens=False).ids
                # llama.cpp does not normalize; and it knows by name that Phi-3's `</s>` takes the white space after it.
                expected = model.tokenize(unicodedata.normalize("NFC", text) if is_nfc else text)
                if name != "phi-3" or "</s>" not in text:
                    failures.expect(f"{name}: tokens of {text!r}", found == expected, f"{found} {expected}")
        table.rows.append([name, "", "", "", "", "", "", f"{len(texts)} texts tokenized"])


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--program", type=common.program, required=True, help="the built `moonlight`")
    parser.add_argument("--converter", type=common.program, required=True, help="the built `moonlight-convert`")
    parser.add_argument("--real", type=pathlib.Path, metavar="DIR", help="a published model with a tokenizer.json")
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="only this; may be repeated")
    parser.add_argument("--vocabularies", type=pathlib.Path, metavar="DIR", help="llama.cpp's folder `models`")
    parser.add_argument("--example", type=common.program, help="the built example `gguf_tokenizer`")
    parser.add_argument("--require", action="store_true", help="fail if llama.cpp's library cannot be had")
    programs = parser.parse_args()
    try:
        library = llama_cpp.Library()
    except llama_cpp.Unavailable as reason:
        print(f"skipped: {reason}")
        sys.exit(programs.require)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    common.print_versions("gguf", "peft", "tokenizers", "torch", "transformers") if hasattr(
        gguf, "__version__"
    ) else None
    table = Table()
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        for family in programs.family or FAMILIES:
            common.print_progress(family)
            check_family(programs, library, family, home / family, table)
            if family == "deepseek-v2":
                check_groups(programs, library, home / "groups", table)
        if programs.real:
            common.print_progress(programs.real.name)
            check_real(programs, library, programs.real, home / "real", table)
        if programs.vocabularies:
            if not programs.example:
                parser.error("--vocabularies needs --example")
            check_vocabularies(library, programs.example, programs.vocabularies, home, table)
    table.print()
    for failure in failures.list:
        print(f"FAILED {failure}")
    print(f"{failures.count - len(failures.list)} of {failures.count} comparisons hold")
    sys.exit(bool(failures.list))


if __name__ == "__main__":
    main()
