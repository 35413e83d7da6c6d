#!/usr/bin/env python3
"""Writes the fixture of moonlight-optim's parity table: other people's Muons against ours, through a layer.

    python scripts/muon_parity.py moonlight-optim/tests/fixtures/muon_parity.json
    cargo test -p moonlight-optim --test parity -- --nocapture      # prints the table

Each case trains a linear layer without bias for a few steps on a fixed batch, by one definition of Muon with one scale,
coefficient table or variant, in f32. Definitions are restated here from their sources, named beside each; torch.optim.Muon
is the installed one (2.9 or newer). Weights are written as [in, out], the layout of Burn's Linear; the layer here is
PyTorch's, [out, in], so that a scale or a variant that takes one side for the other shows.

CANS is so steep that f32 shows in it: its cases carry the same training in f64 as well, against which both are held.

`config` of a case is the JSON of moonlight-optim's MuonConfig that says the same.
"""

import argparse
import contextlib
import json
import math
import platform

import torch

LEARNING_RATE = 0.3  # large, so that a difference between updates shows in the weight
TRAINING_STEPS = 3
BATCH = 60
MOMENTUM = 0.95
EPSILON = 1e-7
SHAPES = [("wide", 12, 18), ("tall", 18, 12), ("square", 12, 12)]  # in, out

# https://kellerjordan.github.io/posts/muon/
JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
# https://leloykun.github.io/ponder/muon-opt-coeffs/, default of microsoft/dion (dion/muon.py)
QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
# arXiv 2505.16932, Algorithm 1; the safety factor as it says, on all but the last of the eight
POLAR_EXPRESS = [
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ]
]
# NVIDIA-NeMo/Emerging-Optimizers, muon_utils.py, "cans"
CANS = [
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
]
# the same file, "deepseekv4"
DEEPSEEK_V4 = [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2
# microsoft/dion, newton_schulz_triton_fast, from thib-s/flash-newton-schulz
AOL = [
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
]


def newton_schulz(matrix, table, aol=False):
    """On the short side, after the Frobenius norm or the rescaling of almost orthogonal layers."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    if aol:
        x = x * torch.rsqrt((x @ x.T).abs().sum(dim=-1, keepdim=True))
    else:
        x = x / (x.norm() + EPSILON)
    for a, b, c in table:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


# Scales, of an update [out, in].


def kimi(update, factor=0.2):
    """MoonshotAI/Moonlight, examples/toy_train.py, adjust_lr_for_muon; microsoft/dion, adjust_lr_rms_norm."""
    return factor * math.sqrt(max(update.shape)) * update


def jordan(update):
    """KellerJordan/Muon, muon_update: max(1, rows / columns) ** 0.5."""
    return max(1, update.shape[0] / update.shape[1]) ** 0.5 * update


def spectral(update):
    """microsoft/dion, adjust_lr_spectral_norm: sqrt(fan_out / fan_in)."""
    return math.sqrt(update.shape[0] / update.shape[1]) * update


def update_norm(update):
    """arXiv 2502.16982, equation 6."""
    return 0.2 * update / update.square().mean().sqrt()


def hidden_size(update, hidden=16):
    """arXiv 2502.16982, equation 5."""
    return 0.2 * math.sqrt(hidden) * update


def unscaled(update):
    return update


class Restated:
    """Momentum, orthogonalisation, scale, decay; what varies is handed in."""

    def __init__(
        self,
        weight,
        table=JORDAN,
        aol=False,
        scale=kimi,
        ema=False,
        nesterov=True,
        weight_decay=0.1,
        decay="coupled",
        share=lambda step: 1.0,
        momentum=lambda step: MOMENTUM,
        adapt=None,
        sign=False,
        heads=1,
    ):
        self.weight, self.table, self.aol, self.scale, self.ema = weight, table, aol, scale, ema
        self.nesterov, self.weight_decay, self.decay, self.share = nesterov, weight_decay, decay, share
        self.momentum, self.adapt, self.sign, self.heads = momentum, adapt, sign, heads
        self.buffer = torch.zeros_like(weight)
        self.seconds = [None] * heads
        self.steps = 0

    def direction(self, matrix, head):
        update = newton_schulz(matrix.sign() if self.sign else matrix, self.table, self.aol)
        if self.adapt:
            update, self.seconds[head] = self.adapt(update, self.seconds[head])
        return self.scale(update)

    @torch.no_grad()
    def step(self):
        weight, grad, mu = self.weight, self.weight.grad, self.momentum(self.steps)
        if self.ema:  # KellerJordan/Muon: lerp, and lerp again
            self.buffer.lerp_(grad, 1 - mu)
            matrix = grad.lerp(self.buffer, mu) if self.nesterov else self.buffer
        else:  # MoonshotAI/Moonlight, microsoft/dion
            self.buffer.mul_(mu).add_(grad)
            matrix = grad + mu * self.buffer if self.nesterov else self.buffer
        # microsoft/dion, num_heads: blocks of rows of [out, in]
        parts = matrix.chunk(self.heads, dim=0)
        update = torch.cat([self.direction(part, head) for head, part in enumerate(parts)], dim=0)
        rate = self.weight_decay * self.share(self.steps)
        if self.decay == "coupled":
            weight.mul_(1 - LEARNING_RATE * rate)
        elif self.decay == "independent":  # Emerging-Optimizers, weight_decay_method "independent"
            weight.mul_(1 - rate)
        elif self.decay == "cautious":  # microsoft/dion, muon_update_post_orthogonalize
            weight.sub_(LEARNING_RATE * rate * weight * ((weight * update).sign() + 1).clamp(max=1))
        weight.sub_(LEARNING_RATE * update)
        self.steps += 1


def nor_muon(beta_2=0.95):
    """microsoft/dion, normuon.py, _normuon_normalization_core: a moment for each row of [out, in], the norm kept."""

    def adapt(update, second):
        second = torch.zeros_like(update[:, :1]) if second is None else second
        second = torch.lerp(second, update.square().mean(dim=-1, keepdim=True), 1 - beta_2)
        adapted = update / (second.sqrt() + 1e-8)
        return adapted * (update.norm() / adapted.norm()), second

    return adapt


def nor_muon_paper(beta_2=0.95):
    """arXiv 2510.05491, Algorithm 1, without its last factor, 0.2 sqrt(m n) / norm, which `update_norm` is."""

    def adapt(update, second):
        second = 0 if second is None else second
        second = beta_2 * second + (1 - beta_2) * update.square().mean(dim=1, keepdim=True)
        return update / (second.sqrt() + 1e-8), second

    return adapt


def ada_muon_paper(beta_2=0.95):
    """arXiv 2507.11005, Algorithm 1, likewise."""

    def adapt(update, second):
        second = 0 if second is None else second
        second = beta_2 * second + (1 - beta_2) * update.square()
        return update / (second.sqrt() + 1e-8), second

    return adapt


@contextlib.contextmanager
def full_precision_products():
    """torch.optim.Muon iterates in `torch.bfloat16` without a switch; inside this, that name means f32."""
    original = torch.bfloat16
    torch.bfloat16 = torch.float32
    try:
        yield
    finally:
        torch.bfloat16 = original


def torch_muon(adjust):
    def make(weight):
        return torch.optim.Muon(
            [weight], lr=LEARNING_RATE, weight_decay=0.1, momentum=MOMENTUM, nesterov=True, adjust_lr_fn=adjust
        )

    return make


def restated(**settings):
    return lambda weight: Restated(weight, **settings)


NOR = {"nor_muon": {"beta_2": 0.95, "epsilon": 1e-8}}
ADA = {"ada_muon": {"beta_2": 0.95, "epsilon": 1e-8, "sign": True}}
ADA_WITHOUT_SIGN = {"ada_muon": {"beta_2": 0.95, "epsilon": 1e-8, "sign": False}}
UPDATE_NORM = {"update_norm": {"factor": 0.2}}

# source, what, MuonConfig, definition
CASES = [
    ("torch.optim.Muon", "original", {"scale": "keller_jordan"}, torch_muon("original")),
    ("torch.optim.Muon", "match_rms_adamw", {}, torch_muon("match_rms_adamw")),
    (
        "KellerJordan/Muon",
        "as shipped",
        {"scale": "keller_jordan", "weight_decay": 0.0},
        restated(ema=True, scale=jordan, weight_decay=0.0),
    ),
    ("MoonshotAI/Moonlight", "toy_train", {}, restated()),
    ("MoonshotAI/Moonlight", "without Nesterov", {"nesterov": False}, restated(nesterov=False)),
    ("report", "equation 5, Baseline", {"scale": {"hidden_size": {"factor": 0.2, "hidden": 16}}}, restated(scale=hidden_size)),
    ("report", "equation 6, Update Norm", {"scale": UPDATE_NORM}, restated(scale=update_norm)),
    ("report", "factor 0.4", {"scale": {"report": {"factor": 0.4}}}, restated(scale=lambda x: kimi(x, 0.4))),
    ("report", "no scale", {"scale": "unit"}, restated(scale=unscaled)),
    ("microsoft/dion", "spectral_norm", {"scale": "spectral", "coefficients": "quintic"}, restated(scale=spectral, table=QUINTIC)),
    ("microsoft/dion", "rms_norm", {"coefficients": "quintic"}, restated(table=QUINTIC)),
    ("microsoft/dion", "cautious_wd", {"coefficients": "quintic", "decay": {"cautious": True}}, restated(table=QUINTIC, decay="cautious")),
    (
        "microsoft/dion",
        "NorMuon",
        {"coefficients": "quintic", "adaptive": NOR, "scale": "spectral"},
        restated(table=QUINTIC, adapt=nor_muon(), scale=spectral),
    ),
    (
        "microsoft/dion",
        "num_heads 3",
        {"coefficients": "quintic", "blocks": {"columns": [-1]}},
        restated(table=QUINTIC, heads=3),
    ),
    (
        "microsoft/dion",
        "NorMuon, num_heads 3",
        {"coefficients": "quintic", "blocks": {"columns": [-1]}, "adaptive": NOR},
        restated(table=QUINTIC, heads=3, adapt=nor_muon()),
    ),
    ("microsoft/dion", "AOL, newton_schulz_triton_fast", {"coefficients": "aol"}, restated(table=AOL, aol=True)),
    ("Polar Express", "5 steps", {"coefficients": "polar_express"}, restated(table=POLAR_EXPRESS)),
    ("Emerging-Optimizers", "cans", {"coefficients": "cans"}, restated(table=CANS)),
    ("Emerging-Optimizers", "deepseekv4", {"coefficients": "deepseek_v4"}, restated(table=DEEPSEEK_V4)),
    (
        "Emerging-Optimizers",
        "independent decay",
        {"weight_decay": 0.05, "decay": {"independent": True}},
        restated(weight_decay=0.05, decay="independent"),
    ),
    ("NorMuon", "Algorithm 1", {"adaptive": NOR, "scale": UPDATE_NORM}, restated(adapt=nor_muon_paper(), scale=update_norm)),
    (
        "AdaMuon",
        "Algorithm 1",
        {"adaptive": ADA, "scale": UPDATE_NORM},
        restated(adapt=ada_muon_paper(), scale=update_norm, sign=True),
    ),
    (
        "AdaMuon",
        "without signs",
        {"adaptive": ADA_WITHOUT_SIGN, "scale": UPDATE_NORM},
        restated(adapt=ada_muon_paper(), scale=update_norm),
    ),
    (
        "modded-nanogpt",
        "momentum warm-up",
        {"momentum_warmup": {"start": 0.85, "steps": 4}},
        restated(momentum=lambda step: 0.85 + (MOMENTUM - 0.85) * min(step / 4, 1)),
    ),
    (
        "nanochat",
        "cosine decay",
        {"decay": {"schedule": {"cosine": {"steps": 4, "last": 0.1}}}},
        restated(share=lambda step: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(step / 4, 1)))),
    ),
    (
        "inverse square",
        "decay",
        {"decay": {"schedule": {"inverse_square": {"hold": 1}}}},
        restated(share=lambda step: 1 if step <= 1 else (1 / step) ** 2),
    ),
]


def train(problem, make):
    weight = problem["weight"].clone().requires_grad_()
    optimizer = make(weight)
    for _ in range(TRAINING_STEPS):
        weight.grad = None
        torch.nn.functional.linear(problem["x"], weight).sub(problem["target"]).square().mean().backward()
        optimizer.step()
    return weight.detach()


def numbers(tensor):
    # Nine digits tell every f32 from its neighbours.
    return [float(f"{value:.9g}") for value in tensor.contiguous().flatten().tolist()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the file to write")
    arguments = parser.parse_args()
    torch.manual_seed(16982)
    problems, cases = [], []
    for index, (name, inputs, outputs) in enumerate(SHAPES):
        problem = {
            "x": torch.randn(BATCH, inputs),
            "target": torch.randn(BATCH, outputs),
            "weight": torch.randn(outputs, inputs) / math.sqrt(inputs),
        }
        problems.append(
            {
                "name": name,
                "inputs": inputs,
                "outputs": outputs,
                "x": numbers(problem["x"]),
                "target": numbers(problem["target"]),
                "weight": numbers(problem["weight"].T),
            }
        )
        for source, what, config, make in CASES:
            if "blocks" in config:
                config = {**config, "blocks": {"columns": [outputs // 3]}}
            with full_precision_products():
                after = train(problem, make)
            case = {"problem": index, "source": source, "what": what, "config": config, "weight_after": numbers(after.T)}
            if what == "cans":
                exact = train({key: value.double() for key, value in problem.items()}, make)
                case["exact"] = [float(f"{value:.13g}") for value in exact.T.contiguous().flatten().tolist()]
            cases.append(case)
    fixture = {
        "made_with": {"torch": torch.__version__, "python": platform.python_version()},
        "learning_rate": LEARNING_RATE,
        "steps": TRAINING_STEPS,
        "batch": BATCH,
        "problems": problems,
        "cases": cases,
    }
    with open(arguments.output, "w", encoding="utf-8") as file:
        json.dump(fixture, file, separators=(",", ":"))
        file.write("\n")
    print(f"{len(cases)} cases of {TRAINING_STEPS} steps")


if __name__ == "__main__":
    main()
