#!/usr/bin/env python3
"""Compares the singular values that `moonlight spectrum` measures with numpy's.

    cargo build --release -p moonlight-train
    python scripts/parity/check_spectrum.py --moonlight target/release/moonlight [DIR ...]

DIR is a checkpoint in Hugging Face's layout, whose matrices are `[out, in]`, in f32, bf16 or f16: a published model, or a checkpoint of a
run. Without one, the small models in fixtures/ are compared. The script reads the safetensors files by itself and compares, for each
matrix, SVD entropy, stable rank, effective rank, the largest singular value (relative differences up to 1e-6) and the 17 quantiles, and
for each group the means. With `--experts 0`, which is the default here, no matrix of a decoder layer may be missing.

The exit code is 0 if every comparison holds.

Needs: numpy (group `parity` installs it). Takes: seconds for the fixtures, a second for each matrix of 2048 x 1408.
"""

import collections
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from common import late

np = late("numpy")

FAMILIES = ["moonlight-like", "deepseek-v3-like", "deepseek-v2-lite-like", "deepseek-v2-like", "llama", "qwen2"]
BUDGET = 1e-6
# Of a quantile, which is at most 1: the smallest singular value of a matrix without full rank is noise of the SVD.
NOISE = 1e-9
QUANTILES = 17
NUMBERS = ["entropy", "stable_rank", "effective_rank", "largest"]

checks = common.Checks()


def main():
    parser = common.parser(__doc__)
    parser.add_argument(
        "directories", nargs="*", type=pathlib.Path, metavar="DIR", help="checkpoints [default: fixtures]"
    )
    parser.add_argument("--moonlight", type=common.program, required=True, help="the built `moonlight`")
    parser.add_argument("--experts", type=int, default=0, help="routed experts of each layer to measure; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="the seed that chooses the experts")
    options = parser.parse_args()
    common.print_versions("numpy")
    for directory in options.directories or [common.FIXTURES / family for family in FAMILIES]:
        check(directory.resolve(), options)
    checks.finish()


def check(directory, options):
    arguments = ["spectrum", "--model", directory, "--experts", options.experts, "--seed", options.seed, "--json"]
    ours = json.loads(common.call(options.moonlight, *arguments))
    tensors = Tensors(directory)
    name = directory.name
    if not options.experts:
        layers = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
        expected = {tensor for tensor in tensors.places if is_measured(tensor, tensors.shape(tensor), layers)}
        measured = {tensor_name(matrix) for matrix in ours["matrices"]}
        checks.expect(
            f"{name}: all {len(expected)} matrices of the layers are measured",
            measured == expected,
            "" if measured == expected else sorted(measured ^ expected),
        )

    worst = dict.fromkeys([*NUMBERS, "quantiles"], 0.0)
    shapes = []
    for matrix in ours["matrices"]:
        values = tensors.read(tensor_name(matrix))
        if matrix["shape"] != list(reversed(values.shape)):
            shapes.append(tensor_name(matrix))
        theirs = statistics(np.linalg.svd(values.astype(np.float64), compute_uv=False))
        for number in NUMBERS:
            worst[number] = max(worst[number], relative(matrix[number], theirs[number]))
        worst["quantiles"] = max(worst["quantiles"], quantile_difference(matrix["quantiles"], theirs["quantiles"]))
    count = len(ours["matrices"])
    checks.expect(
        f"{name}: {count} matrices, `[in, out]` for `[out, in]` of the file", count and not shapes, shapes or ""
    )
    for number, difference in worst.items():
        checks.expect(f"{name}: {number} of each matrix", difference <= BUDGET, f"largest difference {difference:.1e}")
    check_groups(name, ours)


def check_groups(name, ours):
    """The means over the matrices of a layer, then over the layers."""
    layers = collections.defaultdict(lambda: collections.defaultdict(list))
    for matrix in ours["matrices"]:
        layers[matrix["group"]][matrix["layer"]].append(matrix)
    found = [group["group"] for group in ours["groups"]]
    checks.expect(f"{name}: the groups", sorted(found) == sorted(layers), ", ".join(found))
    worst = 0.0
    for group in ours["groups"]:
        of_group = layers[group["group"]].values()
        for number in ["entropy", "stable_rank", "effective_rank", "quantiles"]:
            means = [np.mean([matrix[number] for matrix in matrices], axis=0) for matrices in of_group]
            mean = np.mean(means, axis=0)
            if number == "quantiles":
                worst = max(worst, quantile_difference(group[number], mean))
            else:
                worst = max(worst, relative(group[number], mean))
    checks.expect(f"{name}: the means of the groups", worst <= BUDGET, f"largest difference {worst:.1e}")


def statistics(sigma):
    """Of singular values in descending order; see moonlight-train/src/analysis/spectrum.rs for the equations."""
    squares = sigma**2 / np.sum(sigma**2)
    shares = sigma / np.sum(sigma)
    ranks = np.linspace(0, len(sigma) - 1, QUANTILES)
    return {
        "entropy": shannon(squares) / np.log(len(sigma)),
        "stable_rank": np.sum(sigma**2) / np.max(sigma) ** 2,
        "effective_rank": np.exp(shannon(shares)),
        "largest": np.max(sigma),
        "quantiles": np.interp(ranks, np.arange(len(sigma)), sigma) / np.max(sigma),
    }


def shannon(shares):
    shares = shares[shares > 0]
    return -np.sum(shares * np.log(shares))


def relative(ours, theirs):
    difference = abs(ours - theirs) / abs(theirs)
    # NaN would pass every comparison with `max`.
    return float(difference) if np.isfinite(difference) else float("inf")


def quantile_difference(ours, theirs):
    if len(ours) != QUANTILES or not np.isfinite(ours).all():
        return float("inf")
    excess = np.abs(np.array(ours) - theirs) - NOISE
    return float(np.max(np.maximum(excess, 0) / np.maximum(np.abs(theirs), NOISE)))


def tensor_name(matrix):
    """The tensor in the file: a routed expert's matrix is one of a stack for Burn and a tensor of its own for Hugging Face."""
    path = f"model.layers.{matrix['layer']}.{matrix['path']}".replace(".mlp.router.", ".mlp.gate.")
    return re.sub(r"\.experts\.(\w+)\[(\d+)\]$", r".experts.\2.\1.weight", path)


def is_measured(name, shape, layers):
    found = re.match(r"model\.layers\.(\d+)\.(self_attn|mlp)\..*weight$", name)
    return bool(found) and len(shape) == 2 and int(found[1]) < layers


class Tensors:
    """The tensors of a checkpoint. The safetensors package has no bf16 for numpy, so the files are read here."""

    def __init__(self, directory):
        index = directory / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        self.places = {}
        for file in files:
            with open(directory / file, "rb") as source:
                length = int.from_bytes(source.read(8), "little")
                header = json.loads(source.read(length))
            header.pop("__metadata__", None)
            self.places |= {name: (directory / file, 8 + length, entry) for name, entry in header.items()}

    def shape(self, name):
        return self.places[name][2]["shape"]

    def read(self, name):
        """A tensor in f32, `[out, in]`."""
        if name not in self.places:
            sys.exit(f"error: the checkpoint has no tensor `{name}`\nhint: convert it with `moonlight-convert convert`")
        path, start, entry = self.places[name]
        begin, end = entry["data_offsets"]
        with open(path, "rb") as source:
            source.seek(start + begin)
            data = source.read(end - begin)
        match entry["dtype"]:
            case "F32":
                values = np.frombuffer(data, dtype="<f4")
            case "F16":
                values = np.frombuffer(data, dtype="<f2").astype(np.float32)
            case "BF16":
                # The upper half of an f32.
                values = (np.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4")
            case other:
                sys.exit(f"error: `{name}` has the dtype {other}\nhint: dequantize it with `moonlight-convert convert`")
        return values.reshape(entry["shape"])


if __name__ == "__main__":
    main()
