#!/usr/bin/env python3
"""Writes the inputs that fuzzing begins with, `fuzz/corpus/TARGET/NAME`, from the fixtures and from what is below. Standard library
only. What the parts of an input are is said in fuzz/src/lib.rs.

    scripts/make_fuzz_corpus.py
"""

import base64
import gzip
import json
import pathlib
import shutil
import struct

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
CORPUS = ROOT / "fuzz" / "corpus"


def write(target, **inputs):
    folder = CORPUS / target
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, contents in inputs.items():
        (folder / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())


def text(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def joined(*parts):
    return b"\0".join(part if isinstance(part, bytes) else text(part).encode() for part in parts)


def safetensors(tensors, metadata=None):
    """A file of f32 tensors `{name: shape}` whose values are all 1/2."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape in tensors.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = text(header).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<f", 0.5) * (end // 4)


def adapters():
    settings = {
        "peft_type": "LORA", "r": 1, "lora_alpha": 2, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": ["q_proj"], "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
    }
    layer = "base_model.model.model.layers.1"
    query = {f"{layer}.self_attn.q_proj.lora_A.weight": [1, 16], f"{layer}.self_attn.q_proj.lora_B.weight": [24, 1]}
    stack = {
        f"{layer}.mlp.experts.base_layer.lora_A.weight": [4, 16],
        f"{layer}.mlp.experts.base_layer.lora_B.weight": [48, 4],
    }
    note = [{"path": "layers.1.self_attn.q_proj", "rank": 1, "alpha": 2.0, "rslora": False, "dropout": 0.0}]
    patterns = {**settings, "rank_pattern": {"layers\\.1.*q_proj": 1}, "alpha_pattern": {"^.*(q|k)_proj$": 4}}
    write(
        "adapter",
        ours=joined(settings, safetensors(query, {"format": "pt", "moonlight_adapters": text(note)})),
        patterns=joined(patterns, safetensors(query)),
        experts=joined({**settings, "target_parameters": ["mlp.experts.gate_up_proj"]}, safetensors(stack)),
        empty=joined(settings, safetensors({f"{layer}.self_attn.q_proj.lora_A.weight": [0, 16]})),
    )


CONVERSATION = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                             {"role": "assistant", "content": "Hello."}]}


def templates():
    shared = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0.5}]}
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    moonlight = (
        "{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}"
        "<|im_system|>system<|im_middle|>You are helpful.<|im_end|>{%- endif -%}"
        "<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>{{ message['content'] }}<|im_end|>{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
    )
    blocks = (
        "{% macro say(m) %}{{ m.role | upper }}: {{ m.content | trim }}{% endmacro %}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ say(m) }}{% endif %}{{ ns.n }}{% endfor %}"
    )
    loops = (
        "{% if not messages %}{{ raise_exception('none') }}{% endif %}{% for i in range(3) %}{% for m in messages[::-1] %}"
        "{{ m['content'].split(' ') | join('-') }}{{ '%s' | format(i) }}{{ 'x' * 3 }}{% endfor %}{% endfor %}"
        "{{ messages | tojson(indent=2) }}{{ bos_token }}"
    )
    write(
        "chat_template",
        moonlight=joined(moonlight, CONVERSATION),
        blocks=joined(blocks, shared),
        loops=joined(loops, alpaca),
        # The end of a tag within its beginning.
        tag=joined("{%}{% generation %}a{% endgeneration %}", CONVERSATION),
    )


def records():
    chat = "\n".join(text(record) for record in [CONVERSATION, {"instruction": "a", "input": "", "output": "b"}])
    tokens = "\n".join(text({"tokens": list(range(start, start + 20))}) for start in (1, 40))
    write(
        "data_records",
        chat="cj" + chat,
        chat_json="ct" + text([CONVERSATION]),
        chat_array="ca[\n" + chat.strip().replace("\n", ",\n") + "]",
        chat_csv='cvid,instruction,output\n1,"say ""I""",O\n2,I,"O\nP"\n',
        text_json='ta[{"text": "cut \\ud83d", "n": NaN}, {"text": "b"}]',
        text_csv="tvtext;n\n\"a;\nb\";1\nc;2\n",
        tokens="kj" + tokens,
        text="tt" + "The ships of letter three, and moons. 月\n" * 3,
        text_lines="tj" + '{"text": "The ships of letter three"}\n{"text": "and moons"}\n',
        gzip=b"cg" + gzip.compress(chat.encode(), mtime=0),
        # One raw block, without a checksum.
        zstd=b"tz" + bytes.fromhex("28b52ffd2008410000") + b'{"a":"b"}'[:8],
    )


def figures():
    lines = (FIXTURES / "compat/pretrain/metrics.jsonl").read_text().splitlines()
    write("metrics", run="\n".join(lines[:3] + lines[-1:]) + "\n", cut='{"split":"train","step":1,"loss":2.5}\n{"split":"tr')


def configs():
    names = ["moonlight-like", "deepseek-v2-lite-like", "llama", "qwen2"]
    inputs = {name: (FIXTURES / name / "config.json").read_text() for name in names}
    write("model_config", **{name: text(json.loads(value)) for name, value in inputs.items()})


def states():
    folder = FIXTURES / "optimizer-state"
    names = ["f32-single.bpk", "f32-burn.bpk", "f32-flat-3/0.bpk"]
    write("optimizer_state", **{name.replace("/", "-"): (folder / name).read_bytes() for name in names})
    folder = FIXTURES / "compat/pretrain/checkpoints"
    state = (folder / "step-00000006/trainer.json").read_text()
    files = {"config.json": {"bytes": 936, "xxh3": "00112233445566778899aabbccddeeff"}}
    write(
        "trainer_state",
        pretrain=state,
        manifest=joined(state, {"version": 1, "files": files}),
        null='{"version":1,"step":1,"tokens":8,"data":{"epoch":0,"sequence":4,"data":7},"best":{"step":1,"loss":null}}',
    )


def recipes():
    write(
        "recipe",
        pretrain=(FIXTURES / "compat/pretrain/recipe.toml").read_text(),
        lora=(ROOT / "configs/lora-small.toml").read_text(),
        stages=(ROOT / "configs/moonlight-16b-pretrain.toml").read_text(),
    )


def weights():
    def header(path):
        contents = (FIXTURES / path).read_bytes()
        length = struct.unpack("<Q", contents[:8])[0]
        return contents[8 : 8 + length].rstrip(b" "), len(contents) - 8 - length

    whole, length = header("compat/pretrain/checkpoints/step-00000003/model.safetensors")
    small = {"norm.weight": {"dtype": "BF16", "shape": [16], "data_offsets": [0, 32]}}
    index = {"metadata": {"total_size": 32}, "weight_map": {"model.norm.weight": "model-1.safetensors",
                                                            "lm_head.weight": "model-2.safetensors"}}
    scaled = {"model.embed_tokens.weight": {"dtype": "F8_E4M3", "shape": [262, 16], "data_offsets": [0, 4192]},
              "model.embed_tokens.weight_scale_inv": {"dtype": "F32", "shape": [3, 1], "data_offsets": [4192, 4204]}}
    write(
        "safetensors",
        whole=joined(b"", whole, str(length)),
        indexed=joined(index, small, "32"),
        scaled=joined(b"", scaled, "4204"),
        claim=joined(b"", small, "32,18446744073709551615"),
    )


def ranks():
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"he", b"the", b" t", b" the", b"in", "月".encode(), b"\r\n"]
    model = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    settings = {"added_tokens_decoder": {"264": {"content": "[BOS]", "special": True}, "266": {"content": "<|im_end|>"}},
                "bos_token": "[BOS]", "chat_template": "{{ messages }}"}
    write("tiktoken_model", ranks=joined(model, settings), bare=model)


def tokenizers():
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

    def tokenizer(model, **more):
        parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": 0, "content": "<s>", **special}],
                 "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
        return {**parts, **more, "model": model}

    letters = ["<s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "the", "Ġthe"]
    bpe = {"type": "BPE", "vocab": {token: id for id, token in enumerate(letters)}, "dropout": None, "unk_token": None,
           "merges": [["t", "h"], ["th", "e"], ["Ġ", "the"]], "byte_fallback": False, "ignore_merges": False}
    split = {"type": "Split", "pattern": {"Regex": "\\p{L}+| ?[^\\s]+|\\s+(?!\\S)"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pieces = [["<unk>", 0.0], ["▁", -2.0], ["▁the", -3.0], *[[letter, -5.0] for letter in "abcdehmnot"]]
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    normal = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"},
                                                  {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                                                  {"type": "Precompiled", "precompiled_charsmap": ""}]}
    word = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 1, "the": 2, "moon": 3, "##s": 4}}
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                         {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}
    settings = {"bos_token": "<s>", "eos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}"}
    layers = {"type": "Sequence", "pretokenizers": [split, level]}
    write(
        "tokenizer_json",
        bpe=joined(tokenizer(bpe, pre_tokenizer=layers, decoder=level), settings),
        unigram=joined(tokenizer(unigram, normalizer=normal, pre_tokenizer=meta, decoder=meta)),
        wordpiece=joined(tokenizer(word, pre_tokenizer={"type": "BertPreTokenizer"}, post_processor=template)),
        wordlevel=joined(tokenizer({"type": "WordLevel", "vocab": {"<s>": 0, "a": 1}, "unk_token": "<s>"},
                                   truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0})),
    )


def main():
    adapters()
    templates()
    records()
    figures()
    configs()
    states()
    recipes()
    weights()
    ranks()
    tokenizers()
    write("kernels", single=bytes([0, 40, 33, 70, 1, 2, 3, 6]), half=bytes([1, 9, 16, 139, 2, 1, 1, 4]), least=b"\0" * 8)


if __name__ == "__main__":
    main()
