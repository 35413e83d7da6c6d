#!/usr/bin/env python3
"""Writes the fixture that moonlight-optim's tests hold a Muon step against.

    python scripts/muon_reference.py moonlight-optim/tests/fixtures/muon_reference.json

Needs torch; 2.9 or newer also adds what torch.optim.Muon does. The fixture in the repository was made with the versions
that stand in it.

Each case is a linear layer (or a stack of them) trained for a few steps on a fixed batch: Muon takes the weight, AdamW
the bias. Muon is the update rule of "Muon is Scalable for LLM Training" (arXiv 2502.16982, 2.1 and 2.2), written out
below in f32. Weights are written as [in, out], the layout of Burn's Linear; the layer here is PyTorch's, [out, in].
"""

import argparse
import contextlib
import json
import math
import platform

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95
STEPS = 5
EPSILON = 1e-7
# Large, so that an update is about as long as the weight and a difference between updates shows in the weight.
LEARNING_RATE = 0.5
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-8
TRAINING_STEPS = 4
BATCH = 40

# name, number of stacked matrices (0: a plain matrix), in, out
CASES = [("wide", 0, 7, 13), ("tall", 0, 13, 7), ("square", 0, 9, 9), ("row", 0, 1, 6), ("experts", 3, 5, 8)]


def newton_schulz(matrix):
    """X <- a X + b (X X^T) X + c (X X^T)^2 X, from M / ||M||, on the short side."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + EPSILON)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class ReportMuon:
    """Nesterov momentum, orthogonalised, at 0.2 sqrt(max(A, B)); decay at the unadjusted rate."""

    def __init__(self, matrices):
        self.matrices = matrices
        self.buffers = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self):
        for matrix, buffer in zip(self.matrices, self.buffers):
            buffer.mul_(MOMENTUM).add_(matrix.grad)
            update = newton_schulz(matrix.grad + MOMENTUM * buffer)
            matrix.mul_(1 - LEARNING_RATE * WEIGHT_DECAY)
            matrix.sub_(LEARNING_RATE * 0.2 * math.sqrt(max(matrix.shape)) * update)


@contextlib.contextmanager
def full_precision_products():
    """torch.optim.Muon iterates in `torch.bfloat16` without a switch; inside this, that name means f32."""
    original = torch.bfloat16
    torch.bfloat16 = torch.float32
    try:
        yield
    finally:
        torch.bfloat16 = original


def torch_muon(matrices):
    return torch.optim.Muon(
        matrices,
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        momentum=MOMENTUM,
        nesterov=True,
        ns_coefficients=COEFFICIENTS,
        eps=EPSILON,
        ns_steps=STEPS,
        adjust_lr_fn="match_rms_adamw",
    )


def train(problem, make_optimizer):
    """The weights [in, out] and biases after each step."""
    weights = [weight.clone().requires_grad_() for weight in problem["weights"]]
    biases = [bias.clone().requires_grad_() for bias in problem["biases"]]
    muon = make_optimizer(weights)
    adamw = torch.optim.AdamW(biases, lr=LEARNING_RATE, betas=BETAS, eps=ADAM_EPSILON, weight_decay=WEIGHT_DECAY)
    history = []
    for _ in range(TRAINING_STEPS):
        for tensor in weights + biases:
            tensor.grad = None
        loss = sum(
            torch.nn.functional.linear(problem["x"], weight, bias).sub(target).square().mean()
            for weight, bias, target in zip(weights, biases, problem["targets"])
        )
        loss.backward()
        muon.step()
        adamw.step()
        history.append(([weight.detach().clone() for weight in weights], [bias.detach().clone() for bias in biases]))
    return history


def distance(one, other):
    """The largest relative difference of the weights of two runs."""
    return max(
        ((a - b).norm() / b.norm()).item() for (x, _), (y, _) in zip(one, other) for a, b in zip(x, y)
    )


def numbers(tensor):
    # Nine digits tell every f32 from its neighbours.
    return [float(f"{value:.9g}") for value in tensor.contiguous().flatten().tolist()]


def in_out(weights):
    """PyTorch's [out, in] matrices as one list in [in, out]."""
    return [value for weight in weights for value in numbers(weight.T)]


def case(name, stack, inputs, outputs):
    count = max(stack, 1)
    problem = {
        "x": torch.randn(BATCH, inputs),
        "weights": [torch.randn(outputs, inputs) / math.sqrt(inputs) for _ in range(count)],
        "biases": [torch.randn(outputs) for _ in range(count)],
        "targets": [torch.randn(BATCH, outputs) for _ in range(count)],
    }
    history = train(problem, ReportMuon)
    result = {
        "name": name,
        "stack": stack,
        "inputs": inputs,
        "outputs": outputs,
        "x": numbers(problem["x"]),
        "targets": [numbers(target) for target in problem["targets"]],
        "weight": in_out(problem["weights"]),
        "bias": [value for bias in problem["biases"] for value in numbers(bias)],
        "weight_after": [in_out(weights) for weights, _ in history],
        "bias_after": [[value for bias in biases for value in numbers(bias)] for _, biases in history],
    }
    if hasattr(torch.optim, "Muon"):
        with full_precision_products():
            wide = train(problem, torch_muon)
        result["torch_weight_after"] = [in_out(weights) for weights, _ in wide]
        print(
            f"{name:8} torch.optim.Muon against the report's: f32 {distance(wide, history):.1e}, "
            f"bf16 as shipped {distance(train(problem, torch_muon), history):.1e}"
        )
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the file to write")
    arguments = parser.parse_args()
    torch.manual_seed(2502)
    fixture = {
        "made_with": {"torch": torch.__version__, "python": platform.python_version()},
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "batch": BATCH,
        "cases": [case(*description) for description in CASES],
    }
    with open(arguments.output, "w", encoding="utf-8") as file:
        json.dump(fixture, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
