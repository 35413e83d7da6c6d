#!/usr/bin/env python3
"""Compares the operations that `moonlight plan` counts with those that torch counts while transformers and torch.optim.Muon run.

    cargo build --release -p moonlight-train
    python scripts/parity/check_flops.py --moonlight target/release/moonlight

torch's FlopCounterMode records every matrix product of a forward and a backward pass of the small models in fixtures/, in transformers'
own classes, and of torch.optim.Muon's step. The counts must be equal, to the last operation, after two corrections:

* transformers' eager attention multiplies all pairs of positions; `moonlight` counts those that a causal model needs
* `moonlight` counts each weight of a norm and each bias as two operations a token; they are in no matrix product

Studies state operations by this count. The exit code is 0 if every comparison holds.

Needs: torch 2.9 or later, transformers (group `parity` installs them). Takes: under a minute.
"""

import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from common import late
from models import load_strictly

torch = late("torch")

FAMILIES = ["moonlight-like", "deepseek-v3-like", "deepseek-v2-lite-like", "deepseek-v2-like", "llama", "qwen2"]

checks = common.Checks()


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--moonlight", type=common.program, required=True, help="the built `moonlight`")
    options = parser.parse_args()
    common.print_versions("torch", "transformers")
    for family in FAMILIES:
        check(common.FIXTURES / family, options.moonlight)
    checks.finish()


def check(directory, moonlight):
    name = directory.name
    config = json.loads((directory / "config.json").read_text())
    length = config["max_position_embeddings"]
    ours = json.loads(common.call(moonlight, "plan", "--model", directory, "--json"))["operations_per_token"]
    model, _ = load_strictly(directory)
    forward, backward = passes(model, config, length)
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    vectors += [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    products = (ours - 2 * sum(vector.numel() for vector in vectors)) * length
    checks.expect(f"{name}: forward", products == forward, f"{products} and {forward}")
    # The backward pass has two products for each of the forward pass.
    checks.expect(f"{name}: backward", 2 * forward == backward, f"{2 * forward} and {backward}")
    planned = newton_schulz(moonlight, directory)
    counted = muon(model)
    checks.expect(f"{name}: Newton-Schulz", planned == counted, f"{planned} and {counted}")


def passes(model, config, length):
    """The operations of a forward and of a backward pass of one sequence, with attention to the positions before."""
    ids = torch.arange(length)[None] % config["vocab_size"]
    with counter() as forward:
        loss = model(ids, labels=ids, use_cache=False).loss
    with counter() as backward:
        loss.backward()
    return causal(forward, length), causal(backward, length)


def causal(counted, length):
    """The operations, if attention multiplied only the pairs that a causal model needs."""
    total = 0
    for operation, count in counted.get_flop_counts()["Global"].items():
        if "bmm" in str(operation):
            assert count % (2 * length) == 0, (operation, count)
            count = count // (2 * length) * (length + 1)
        total += count
    return total


def newton_schulz(moonlight, directory):
    """What `moonlight plan` says of a step on a GPU, which computes all of each symmetric product."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = pathlib.Path(folder, "recipe.toml")
        text = pathlib.Path(folder, "text.txt")
        text.write_text("text")
        recipe.write_text(
            f'[run]\nname = "plan"\n[model]\npath = "{directory}"\n'
            f'[data]\ntrain = ["{text}"]\ntokenizer = "bytes"\nsequence_length = 8\n'
            '[optimizer]\nlearning_rate = 1e-3\nform = "direct"\n[train]\nsteps = 1\n'
        )
        plan = common.call(moonlight, "plan", recipe, "--device", "cuda", "--json")
    return json.loads(plan)["newton_schulz_operations"]


def muon(model):
    """The operations of torch.optim.Muon's step. It takes matrices, so stacks of experts are taken apart."""
    matrices = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith(("embed_tokens.weight", "lm_head.weight")):
            continue
        # transformers stores two matrices of a checkpoint in one.
        parts = parameter.detach().chunk(2, dim=-2) if name.endswith("gate_up_proj") else [parameter.detach()]
        matrices.extend(matrix for part in parts for matrix in part.reshape(-1, *part.shape[-2:]))
    matrices = [torch.nn.Parameter(matrix) for matrix in matrices]
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    optimizer = torch.optim.Muon(matrices, lr=1e-3, ns_steps=5)
    with counter() as counted:
        optimizer.step()
    return counted.get_total_flops()


def counter():
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


if __name__ == "__main__":
    main()
