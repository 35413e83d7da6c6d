#!/usr/bin/env python3
"""Trains a tiny Moonlight that has learned a few conversations by heart, for the checks of the server in this folder.

    python scripts/serve/tiny_model.py OUTPUT --moonlight target/release/moonlight

Tokens are bytes (`bytes-chat`), the template is that of Kimi-K2, with tools. Because the answers are known, a check can ask for them: a count
(`COUNT`), text whose characters have one to four bytes each (`MOON`), a tool call (`CALL`). OUTPUT is a Hugging Face directory.

Needs: the built `moonlight`. Takes: 1 to 3 minutes.
"""

import json
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

COUNT = ("count", "one two three four five six seven eight nine ten")
MOON = ("moon", "Der Mond scheint übers Meer: 月が海を照らす 🌙 ok")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
# The same tool as other clients write it: `llm`, and the npm package `openai` in its loop over tools.
PARAMETERS = TOOL["function"]["parameters"]
VARIANTS = [
    {"name": "get_weather", "description": None, "parameters": {"properties": PARAMETERS["properties"]}},
    {"name": "get_weather", "parameters": PARAMETERS, "description": ""},
]
VARIANTS[0]["parameters"] |= {"required": ["city"], "type": "object"}
TOOLS = [TOOL, *({"type": "function", "function": function} for function in VARIANTS)]
ASK_TOOL = "weather"
CALL = {"name": "get_weather", "arguments": '{"city": "Oslo"}', "id": "functions.get_weather:0"}
TOOL_RESULT = "rain"
AFTER_TOOL = "It rains."
SYSTEM = "s"

RECIPE = """\
[run]
name = "tiny"
dir = {runs}
seed = 3
device = "cpu"

[model]
vocab_size = 262
max_position_embeddings = 1024
hidden_size = 96
intermediate_size = 192
num_hidden_layers = 3
num_attention_heads = 4
rms_norm_eps = 1e-5
kv_lora_rank = 32
qk_nope_head_dim = 24
qk_rope_head_dim = 16
v_head_dim = 24
n_routed_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 64
n_shared_experts = 1
first_k_dense_replace = 1
n_group = 1
topk_group = 1
routed_scaling_factor = 1.0
norm_topk_prob = true
tie_word_embeddings = false

[data]
format = "chat"
train = [{chats}]
tokenizer = "bytes-chat"
chat_template = {template}
sequence_length = 640
cache_dir = {cache}

[optimizer]
learning_rate = 1e-2

[schedule]
name = "cosine"
warmup_steps = 10

[train]
steps = {steps}
batch_size = 2
validate_every = 0
checkpoint_every = {steps}
keep = 1
plots = false
"""


def conversations():
    """The records to learn. Each question occurs with and without a system message."""

    def user(text):
        return {"role": "user", "content": text}

    def assistant(text):
        return {"role": "assistant", "content": text}

    call = {"id": CALL["id"], "type": "function", "function": {"name": CALL["name"], "arguments": CALL["arguments"]}}
    calls = [user(ASK_TOOL), {"role": "assistant", "content": "", "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": CALL["id"], "content": TOOL_RESULT}
    records = []
    for start in ([], [{"role": "system", "content": SYSTEM}]):
        for question, answer in (COUNT, MOON):
            records.append({"messages": [*start, user(question), assistant(answer)]})
        for tool in TOOLS:
            records.append({"messages": [*start, *calls], "tools": [tool]})
            records.append({"messages": [*start, *calls, result, assistant(AFTER_TOOL)], "tools": [tool]})
    return records


def make(moonlight, output, steps=400):
    """Trains the model and moves its last checkpoint to `output`. A model that is there is kept."""
    output = pathlib.Path(output)
    if (output / "config.json").exists():
        return output
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in conversations() * 4)
        (home / "chats.jsonl").write_text(lines, encoding="utf-8")
        shutil.copy(common.FIXTURES / "templates" / "kimi_k2.jinja", home / "template.jinja")
        paths = {"runs": "runs", "chats": "chats.jsonl", "template": "template.jinja", "cache": "cache"}
        paths = {key: json.dumps(str(home / path)) for key, path in paths.items()}
        (home / "tiny.toml").write_text(RECIPE.format(steps=steps, **paths))
        common.call(moonlight, "train", home / "tiny.toml")
        output.parent.mkdir(parents=True, exist_ok=True)
        [checkpoint] = (home / "runs" / "tiny" / "checkpoints").glob("step-*")
        shutil.move(checkpoint, output)
    return output


def main():
    parser = common.parser(__doc__)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--moonlight", type=common.program, default=common.ROOT / "target/release/moonlight")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    make(options.moonlight, options.output, options.steps)
    for question, answer in (COUNT, MOON):
        command = ["generate", "--model", options.output, "--json", "--parse-special", "--max-new-tokens", "80"]
        prompt = (
            "<|im_system|>system<|im_middle|>You are Kimi.<|im_end|><|im_user|>user<|im_middle|>"
            f"{question}<|im_end|><|im_assistant|>assistant<|im_middle|>"
        )
        found = json.loads(common.call(options.moonlight, *command, "--prompt", prompt))["text"]
        print(json.dumps({"question": question, "answer": found, "learned": found == answer}, ensure_ascii=False))


if __name__ == "__main__":
    main()
