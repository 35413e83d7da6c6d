#!/usr/bin/env python3
"""Trains a tiny Moonlight for 40 steps by the report's rules, in torch: what our trainer is held against.

    python scripts/train_reference.py fixtures/training

transformers' DeepseekV3ForCausalLM is the model; everything else is written here from the report (arXiv 2502.16982) and
shares no code with ours:

* Muon for every matrix but embedding and head: Nesterov momentum 0.95, five Newton-Schulz steps in f32, the update
  scaled by 0.2 sqrt(max(A, B)), decay 0.1 at the unadjusted rate; each expert's gate, up and down by itself;
* torch's AdamW (0.9, 0.95, 1e-8) for embedding, head and norms, decay 0.1 on all of them;
* the router's bias: b += u (sign(e) - mean(sign(e))), e = mean load - load, u = 1e-3, after each step;
* global-norm clipping at 1, warm-up, cosine.

Writes `init/` (the checkpoint before the first step), `tokens.jsonl` (a line is a sequence; a batch is the next four
lines) and `reference.json` (the rules, and for each step the loss, the gradient norm before clipping, the rate); and
`one_step.safetensors`: the weights of `../moonlight-like` after one step, not clipped, at the rate 0.02 with the
gradients beside that checkpoint.
"""

import json
import math
import pathlib
import shutil
import sys

import safetensors.torch
import torch
import transformers

from make_fixtures import MOONLIGHT, draw, load, pad, published, save, versions, write_json

SEED = 7
STEPS = 40
BATCH = 4
VOCAB = 61
RULES = {
    "learning_rate": 0.01,
    "final_learning_rate": 0.001,
    "warmup_steps": 5,
    "weight_decay": 0.1,
    "momentum": 0.95,
    "betas": [0.9, 0.95],
    "epsilon": 1e-8,
    "gradient_clip": 1.0,
    "bias_update_rate": 1e-3,
}
CONFIG = MOONLIGHT | {
    "bos_token_id": 58,
    "eos_token_id": 60,
    "hidden_size": 36,
    "intermediate_size": 45,
    "moe_intermediate_size": 13,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "vocab_size": VOCAB,
}


def main(out):
    shutil.rmtree(out, ignore_errors=True)
    (out / "init").mkdir(parents=True)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    sequences = markov_text(STEPS * BATCH)
    (out / "tokens.jsonl").write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in sequences))
    save(initial(out / "init"), out / "init", CONFIG, bias_dtype=torch.float32)
    model = load(out / "init")
    batches = [sequences[step * BATCH:(step + 1) * BATCH] for step in range(STEPS)]
    steps, bias = train(model, batches)
    head = {"seed": SEED, "batch_size": BATCH, "rules": RULES, "versions": versions()}
    write_json(out / "reference.json", head | {"steps": steps, "router_bias": bias})
    print(f"loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}")
    safetensors.torch.save_file(one_step(out.parent / "moonlight-like"), out / "one_step.safetensors")


def markov_text(count):
    """Sequences of a random first-order chain (each token has three likely successors), of 9 to 26 tokens."""
    generator = torch.Generator().manual_seed(SEED)
    successors = torch.randint(0, VOCAB, (VOCAB, 3), generator=generator)
    texts = []
    for _ in range(count):
        length = int(torch.randint(9, 27, (1,), generator=generator))
        token = int(torch.randint(0, VOCAB, (1,), generator=generator))
        text = [token]
        for draw_ in torch.randint(0, 10, (length - 1,), generator=generator).tolist():
            # One step in ten goes anywhere.
            token = int(successors[token, draw_ % 3]) if draw_ < 9 else int(
                torch.randint(0, VOCAB, (1,), generator=generator)
            )
            text.append(token)
        texts.append(text)
    texts[9] = texts[9][:1]  # a sequence that predicts nothing
    return texts


def initial(directory):
    model = draw(directory, CONFIG, SEED)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
    return model


def one_step(directory, rate=0.02):
    model = load(directory)
    gradients = safetensors.torch.load_file(directory / "gradients.safetensors")
    for name, parameter in model.named_parameters():
        # The stacks are put together again: gate above up.
        stem, _, kind = name.rpartition(".")
        kinds = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        if kind in kinds:
            experts = [
                torch.cat([gradients[f"{stem}.{expert}.{part}.weight"] for part in kinds[kind]])
                for expert in range(parameter.shape[0])
            ]
            parameter.grad = torch.stack(experts)
        else:
            parameter.grad = gradients[name]
    matrices, adamw = divided(model)
    apply(matrices, adamw, {}, rate)
    weights = {}
    for name, parameter in model.named_parameters():
        weights |= published(name, parameter.detach())
    return {name: weight.contiguous() for name, weight in weights.items()}


# --- the rules --------------------------------------------------------------------------------------------------------


def divided(model):
    """Muon's matrices by name, and AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.startswith(("model.embed_tokens", "lm_head")):
            rest.append(parameter)
        else:
            matrices.append((name, parameter))
    betas, epsilon, decay = (RULES[key] for key in ("betas", "epsilon", "weight_decay"))
    return matrices, torch.optim.AdamW(rest, betas=betas, eps=epsilon, weight_decay=decay)


def apply(matrices, adamw, momenta, rate):
    for group in adamw.param_groups:
        group["lr"] = rate
    adamw.step()
    for name, parameter in matrices:
        muon_step(name, parameter, momenta, rate)


def train(model, batches):
    matrices, adamw = divided(model)
    momenta = {}
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    chosen = {}
    for router in routers:
        router.register_forward_hook(lambda module, _inputs, output: chosen.__setitem__(module, output[2]))

    history = []
    for step, batch in enumerate(batches):
        ids, mask, labels = pad(batch)
        logits = model(ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loads = [
            torch.bincount(chosen[router][mask.flatten().bool()].flatten(), minlength=router.num_experts)
            for router in routers
        ]
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), RULES["gradient_clip"])
        rate = rate_at(step, len(batches))
        apply(matrices, adamw, momenta, rate)
        for router, load_ in zip(routers, loads):
            update_bias(router, load_)
        history.append({"step": step, "loss": loss.item(), "grad_norm": norm.item(), "lr": rate})
    return history, [router.e_score_correction_bias.tolist() for router in routers]


def rate_at(step, steps):
    """Linear warm-up that reaches the peak at its last step, then half a cosine that ends in the last step."""
    peak, final, warmup = (RULES[key] for key in ("learning_rate", "final_learning_rate", "warmup_steps"))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step + 1 - warmup) / (steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def muon_step(name, parameter, momenta, rate):
    for place, matrix, gradient in pieces(name, parameter):
        momentum = momenta.setdefault(place, torch.zeros_like(gradient))
        momentum.mul_(RULES["momentum"]).add_(gradient)
        update = orthogonalised(gradient + RULES["momentum"] * momentum)
        scale = 0.2 * math.sqrt(max(matrix.shape))
        matrix.copy_(matrix - rate * (scale * update + RULES["weight_decay"] * matrix))


def pieces(name, parameter):
    """The matrices that a parameter is made of, as views: stacks fall apart, gate and up are two."""
    if parameter.ndim == 2:
        yield name, parameter, parameter.grad
        return
    for expert in range(parameter.shape[0]):
        parts = 2 if name.endswith("gate_up_proj") else 1
        for part, (matrix, gradient) in enumerate(
            zip(parameter[expert].chunk(parts), parameter.grad[expert].chunk(parts))
        ):
            yield (name, expert, part), matrix, gradient


def orthogonalised(matrix):
    """Newton-Schulz with the report's coefficients, in f32."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


@torch.no_grad()
def update_bias(router, load_):
    sign = torch.sign(load_.double().mean() - load_.double())
    router.e_score_correction_bias += (RULES["bias_update_rate"] * (sign - sign.mean())).float()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(pathlib.Path(sys.argv[1]))
