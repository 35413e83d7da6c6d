#!/usr/bin/env python3
"""Makes the fixtures that our forward pass, decoding and gradients are held against.

    python scripts/make_fixtures.py fixtures

Needs torch and transformers from PyPI (`versions.json` beside the fixtures names those that the committed files were
made with). Six tiny random models, one a published family, each in a directory of its own:

    config.json, *.safetensors   the checkpoint in the layout that the family was published in
    expected.json                log-probabilities of whole sequences, a greedy continuation, the loss of one batch
    gradients.safetensors        gradient of that loss (mean over predicted tokens) for every parameter
    balance_gradients.safetensors  gradient of the sequence-wise balance loss of the same batch for the routers

The models are awkward on purpose: odd sizes, more experts than tokens, experts without a token, a sequence of one
token, positions past YaRN's original length. Weights are stored in bf16 (Llama's in f32), so the f32 that everything
is computed in is exact in the file. A draw whose choices hang on rounding (router, greedy) is refused and the next
seed is tried, so the files depend on nothing but this script and the library versions.
"""

import json
import pathlib
import platform
import re
import shutil
import sys

import safetensors.torch
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

NEW_TOKENS = 16
SEQUENCE_LENGTHS = (1, 2, 7, 23, 41)
BATCH_LENGTHS = (13, 8, 1, 5)
# Differences between two right f32 implementations are near 1e-6: a choice with this margin does not hang on them.
ROUTER_MARGIN = 5e-5
GREEDY_MARGIN = 1e-3

YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}

MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 94,
    "eos_token_id": 96,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 40,
    "initializer_range": 0.1,
    "intermediate_size": 51,
    "kv_lora_rank": 14,
    "max_position_embeddings": 64,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 11,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 10,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 3,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 9,
    "vocab_size": 97,
}

DEEPSEEK_V3 = MOONLIGHT | {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 44,
    "kv_lora_rank": 13,
    "n_group": 4,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 17,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "topk_group": 2,
    "v_head_dim": 6,
    "vocab_size": 101,
}

DEEPSEEK_V2_LITE = MOONLIGHT | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 39,
    "model_type": "deepseek_v2",
    "n_routed_experts": 11,
    "norm_topk_prob": False,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "vocab_size": 89,
}

# The large DeepSeek-V2: groups ranked by their best expert, a query latent; and biases, which no published file has.
DEEPSEEK_V2 = DEEPSEEK_V2_LITE | {
    "attention_bias": True,
    "hidden_size": 30,
    "intermediate_size": 33,
    "moe_intermediate_size": 7,
    "n_group": 4,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "q_lora_rank": 11,
    "routed_scaling_factor": 16.0,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
}

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
    "head_dim": 6,
    "hidden_act": "silu",
    "hidden_size": 45,
    "initializer_range": 0.1,
    "intermediate_size": 53,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "tie_word_embeddings": False,
    "vocab_size": 97,
}

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 42,
    "initializer_range": 0.1,
    "intermediate_size": 55,
    "max_position_embeddings": 64,
    "model_type": "qwen2",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 103,
}

# name, config, first seed, keyword arguments of `save`
FIXTURES = [
    ("moonlight-like", MOONLIGHT, 1000, {"bias_dtype": torch.bfloat16, "stale_inv_freq": True}),
    ("deepseek-v3-like", DEEPSEEK_V3, 2000, {"bias_dtype": torch.float32, "max_shard_size": 40_000}),
    ("deepseek-v2-lite-like", DEEPSEEK_V2_LITE, 3000, {}),
    ("deepseek-v2-like", DEEPSEEK_V2, 6000, {}),
    ("llama", LLAMA, 4000, {}),
    ("qwen2", QWEN2, 5000, {}),
]


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for name, config, seed, options in FIXTURES:
        make(out / name, config, seed, **options)
    write_json(out / "versions.json", versions())


def versions():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def make(directory, config, first_seed, **options):
    for seed in range(first_seed, first_seed + 50):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        save(draw(directory, config, seed), directory, config, **options)
        model = load(directory)
        expected, problem = observe(model, seed)
        if problem is None:
            break
        print(f"{directory.name}: seed {seed} refused: {problem}")
    else:
        raise SystemExit(f"{directory.name}: no seed will do")
    for file, values in expected.pop("files").items():
        safetensors.torch.save_file(values, directory / file)
    write_json(directory / "expected.json", expected)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory.name}: seed {seed}, loss {expected['batch']['loss']:.5f}, {size / 1e3:.0f} kB")
    print(f"  {json.dumps(expected['evidence'])}")


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def draw(directory, config, seed):
    """A random model whose every value is a bf16 number, in f32."""
    write_json(directory / "config.json", config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    tied = config["tie_word_embeddings"]
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif name.endswith("gate.weight"):  # the router: far from indifferent
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif name.endswith("embed_tokens.weight"):
                # A tied head that outweighs the layers would repeat one token for ever.
                parameter.copy_((0.1 if tied else 0.5) * torch.randn_like(parameter))
            else:
                parameter.copy_((0.25 if tied else 0.12) * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.15 * torch.randn_like(buffer))
                if config["n_group"] > 1:
                    # Most biased scores negative: masked groups are out (-inf), not merely at zero.
                    buffer.sub_(0.7)
                else:
                    buffer[0] = -2.0  # an expert that gets no token
        for tensor in list(model.parameters()) + list(model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16().float())
    return model


def save(model, directory, config, bias_dtype=None, stale_inv_freq=False, max_shard_size="5GB"):
    """`save_pretrained`, with config.json in the spelling that `config` has."""
    half = config.get("torch_dtype") == "bfloat16"
    if half:
        model.to(torch.bfloat16)
        for name, buffer in list(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = buffer.to(bias_dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if half:
        write_json(directory / "config.json", config)
    if stale_inv_freq:
        # As published: 27 tensors of a length that nothing in the model has, which every loader must skip.
        path = directory / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        for layer in range(config["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(7, dtype=torch.bfloat16)
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def load(directory, **options):
    """The checkpoint as transformers reads it, in f32, with eager attention and eager experts."""
    options = {"attn_implementation": "eager", "experts_implementation": "eager"} | options
    if "n_routed_experts" not in json.loads((directory / "config.json").read_text()):
        options.pop("experts_implementation")
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **options
    )
    strange = {key for key in info["unexpected_keys"] if not key.endswith("inv_freq")}
    assert not info["missing_keys"] and not strange and not info["mismatched_keys"], info
    model.eval()
    return model


# --- what transformers makes of it ------------------------------------------------------------------------------------


def observe(model, seed):
    """What `expected.json` holds, and why it may not serve (or None)."""
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size

    def sequence(length):
        return torch.randint(0, vocab, (length,), generator=generator).tolist()

    watch = RouterWatch(model)
    sequences = [{"tokens": tokens, "logprobs": logprobs(model, tokens)} for tokens in map(sequence, SEQUENCE_LENGTHS)]
    prompt = sequence(5)
    continuation, greedy_margin = greedy(model, prompt)
    batch = [sequence(length) for length in BATCH_LENGTHS]
    loss, gradients = loss_and_gradients(model, batch)
    watch.close()
    files = {"gradients.safetensors": gradients}
    expected_batch = {"sequences": batch, "loss": loss}
    if watch.routed:
        balance, balance_gradients = balance_loss(model, batch)
        expected_batch["balance_loss"] = balance
        files["balance_gradients.safetensors"] = balance_gradients

    evidence = {"greedy_margin": greedy_margin} | watch.evidence(gradients)
    expected = {
        "seed": seed,
        "sequences": sequences,
        "greedy": {"prompt": prompt, "continuation": continuation},
        "batch": expected_batch,
        "evidence": evidence,
        "files": files,
    }
    if greedy_margin < GREEDY_MARGIN:
        return expected, f"the greedy margin is {greedy_margin:.1e}"
    if len(set(continuation)) < 5:
        return expected, "the greedy continuation hardly changes"
    return expected, watch.problem(evidence)


@torch.no_grad()
def logprobs(model, tokens):
    """log p of each token given those before it; None for the first."""
    logits = model(torch.tensor([tokens])).logits[0].float()
    log_p = torch.log_softmax(logits, dim=-1)
    return [None] + [log_p[i, token].item() for i, token in enumerate(tokens[1:])]


@torch.no_grad()
def greedy(model, prompt):
    """The continuation, made with the cache and again without, and the smallest gap between the best two logits."""
    ids = torch.tensor([prompt])
    cached = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()
    tokens, margin = list(prompt), float("inf")
    for _ in range(NEW_TOKENS):
        best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        tokens.append(best.indices[0].item())
    assert cached == tokens or margin < GREEDY_MARGIN, (cached, tokens)
    return tokens[len(prompt):], margin


def pad(batch):
    """Right-padded ids, attention mask and labels (-100 where nothing is predicted)."""
    length = max(map(len, batch))
    ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in batch])
    mask = torch.tensor([[1] * len(tokens) + [0] * (length - len(tokens)) for tokens in batch])
    labels = torch.tensor([tokens[1:] + [-100] * (length - len(tokens) + 1) for tokens in batch])
    return ids, mask, labels


def mean_loss(model, batch):
    """-log p, averaged over the predicted tokens of the whole batch."""
    ids, mask, labels = pad(batch)
    logits = model(ids, attention_mask=mask).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = mean_loss(model, batch)
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients |= published(name, parameter.grad)
    model.zero_grad()
    return loss.item(), {name: gradient.contiguous() for name, gradient in gradients.items()}


def balance_loss(model, batch):
    """The sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437, eq. 17 to 20) with weight 1, which transformers
    leaves out: averaged over sequences, summed over layers; and its gradient for the routers' matrices."""
    top_k, total = model.config.num_experts_per_tok, torch.zeros(())
    routers = {name: module for name, module in model.named_modules() if name.endswith("mlp.gate")}
    for tokens in batch:  # one by one: no padding to think of
        seen = []
        note = lambda _module, _inputs, output: seen.append(output[0])
        hooks = [router.register_forward_hook(note) for router in routers.values()]
        model(torch.tensor([tokens]))
        for hook in hooks:
            hook.remove()
        for logits in seen:
            score = logits.sigmoid() if model.config.model_type == "deepseek_v3" else logits.softmax(-1)
            length, experts = score.shape
            chosen = torch.zeros_like(score).scatter_(1, score.topk(top_k).indices, 1.0)
            f = experts / (top_k * length) * chosen.sum(0)
            p = (score / score.sum(1, keepdim=True)).mean(0)
            total = total + (f * p).sum() / len(batch)
    total.backward()
    gradients = {f"{name}.weight": router.weight.grad.clone() for name, router in routers.items()}
    model.zero_grad()
    return total.item(), gradients


def published(name, tensor):
    """A parameter of transformers 5 under the names of the published file: stacked experts fall apart."""
    stem, _, kind = name.rpartition(".")
    if kind == "gate_up_proj":
        gate, up = tensor.chunk(2, dim=1)
        parts = {"gate_proj": gate, "up_proj": up}
    elif kind == "down_proj":
        parts = {"down_proj": tensor}
    else:
        return {name: tensor.clone()}
    return {
        f"{stem}.{expert}.{part}.weight": stack[expert].clone()
        for part, stack in parts.items()
        for expert in range(stack.shape[0])
    }


class RouterWatch:
    """Notes by how much each choice of a router was made, and that the bias and the groups matter to it."""

    def __init__(self, model):
        self.margin = float("inf")
        self.group_margin = float("inf")
        self.tokens = self.moved_by_bias = self.moved_by_groups = self.negative = 0
        gates = [(name, module) for name, module in model.named_modules() if name.endswith("mlp.gate")]
        self.routed = bool(gates)
        self.hooks = [module.register_forward_hook(self.note) for _, module in gates]
        self.config = model.config
        method = getattr(self.config, "topk_method", "noaux_tc")
        self.grouped = self.routed and method != "greedy" and self.config.n_group > 1

    def close(self):
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def note(self, module, _inputs, output):
        logits, _, chosen = output
        sigmoid = self.config.model_type == "deepseek_v3"
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        choice = scores + module.e_score_correction_bias if sigmoid else scores
        self.tokens += len(logits)
        self.negative += (choice < 0).sum().item()
        top_k = module.top_k
        allowed = choice
        if self.grouped:
            groups = choice.view(len(choice), module.num_group, -1)
            worth = groups.topk(2 if sigmoid else 1, dim=-1).values.sum(-1)
            ranked = worth.sort(descending=True).values
            gap = ranked[:, module.topk_group - 1] - ranked[:, module.topk_group]
            self.group_margin = min(self.group_margin, gap.min().item())
            keep = torch.zeros_like(worth).scatter_(1, worth.topk(module.topk_group).indices, 1).bool()
            allowed = groups.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(1)
        ranked = allowed.sort(descending=True)
        assert (ranked.indices[:, :top_k].sort().values == chosen.sort().values).all()
        self.margin = min(self.margin, (ranked.values[:, top_k - 1] - ranked.values[:, top_k]).min().item())
        chosen = chosen.sort().values
        self.moved_by_bias += (scores.topk(top_k).indices.sort().values != chosen).any(-1).sum().item()
        self.moved_by_groups += (choice.topk(top_k).indices.sort().values != chosen).any(-1).sum().item()

    def evidence(self, gradients):
        if not self.routed:
            return {}
        idle = [name for name, value in gradients.items() if ".mlp.experts." in name and not value.any()]
        evidence = {
            "routed_tokens": self.tokens,
            "router_margin": self.margin,
            "experts_without_a_token_in_the_batch": len(idle) // 3,
        }
        if self.config.model_type == "deepseek_v3":
            evidence |= {"choices_moved_by_bias": self.moved_by_bias, "negative_biased_scores": self.negative}
        if self.grouped:
            evidence |= {"choices_moved_by_groups": self.moved_by_groups, "group_margin": self.group_margin}
        return evidence

    def problem(self, evidence):
        if not self.routed:
            return None
        if min(self.margin, self.group_margin) < ROUTER_MARGIN:
            return f"a router's margin is {min(self.margin, self.group_margin):.1e}"
        if self.config.model_type == "deepseek_v3" and self.moved_by_bias == 0:
            return "the bias changes no choice"
        if evidence.get("choices_moved_by_groups", 1) == 0:
            return "the groups change no choice"
        return None


def write_json(path, value):
    text = json.dumps(value, indent=2)
    # A list of plain values on one line: a file that a person can read.
    plain = re.compile(r"\[[^\[\]{}\"]+\]")
    text = plain.sub(lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    path.write_text(text + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(pathlib.Path(sys.argv[1]))
