#!/usr/bin/env python3
"""What torch and transformers do on the device, for `gpu_day.py`: one measurement, printed as a line of JSON.

    python scripts/bench/gpu/torch_peer.py rates --device cuda
    python scripts/bench/gpu/torch_peer.py step --dtype bf16 --experts grouped_mm --batch 8 --sequence 1024

* `rates`: products of two large matrices by dtype, and a copy in the device's memory.
* `step`: a training step of `bench-small`: DeepseekV3ForCausalLM, torch.optim.Muon on every hidden matrix, AdamW on the rest. With
  `--compile` the model is compiled by torch.compile. Weights have the given dtype, without f32 masters.
* `layer`: forward and backward of a layer of experts of Moonlight-16B.
* `muon`: a step of torch.optim.Muon on the experts' matrices of a layer, one after the other, with its products in bf16.

Needs: torch 2.9 or newer, transformers (group `bench`). Takes: a minute on a GPU.
"""

import json
import pathlib
import statistics
import sys
import time

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[at]) for at in (1, 2)]
import common


def main():
    parser = common.parser(__doc__)
    parser.add_argument("what", choices=("rates", "step", "layer", "muon"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="bf16")
    parser.add_argument("--experts", choices=("grouped_mm", "eager"), default="grouped_mm")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--tiny", action="store_true", help="small shapes, whose times say nothing")
    options = parser.parse_args()
    result = {"rates": rates, "step": step, "layer": layer, "muon": muon}[options.what](options)
    print(json.dumps(result | {"versions": versions()}))


def versions():
    import torch

    try:
        import transformers
    except ImportError:
        return {"torch": torch.__version__}
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def dtype_of(options):
    import torch

    # As Burn on cards with tensor cores.
    torch.set_float32_matmul_precision("high")
    return {"f32": torch.float32, "bf16": torch.bfloat16}[options.dtype]


def seconds(options, run, repeats=None):
    """The median of several runs after two to warm up; each waits for the device."""
    import torch

    def once():
        start = time.perf_counter()
        run()
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        once()
    return statistics.median(once() for _ in range(repeats or options.repeats))


def allocated(options):
    import torch

    return torch.cuda.max_memory_allocated() if options.device.startswith("cuda") else None


def rates(options):
    import torch

    size = 256 if options.tiny else 8192
    found = {}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "high"),
        ("tf32", torch.float32, "high"),
        ("f32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        one, other = (torch.randn(size, size, device=options.device, dtype=dtype) for _ in range(2))
        found[name] = 2 * size**3 / seconds(options, lambda: one @ other) / 1e12
    source = torch.empty(size * size, device=options.device)
    target = torch.empty_like(source)
    found["copy_bytes_per_second"] = 8 * size * size / seconds(options, lambda: target.copy_(source))
    return found


def small_shape(options):
    from bench_transformers import SHAPE

    if not options.tiny:
        return SHAPE
    small = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    return (
        SHAPE | small | {"vocab_size": 256, "n_routed_experts": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    )


def step(options):
    import torch
    import transformers

    from bench_step import muon_matrices
    from bench_transformers import prepared_config

    shape, dtype = small_shape(options), dtype_of(options)
    model = transformers.DeepseekV3ForCausalLM(prepared_config(shape, options.experts)).to(dtype)
    model = model.to(options.device).train()
    views, rest = muon_matrices(model)
    muon = torch.optim.Muon([view for view, _, _ in views], lr=3e-4, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    size = (options.batch, options.sequence)
    tokens, targets = (torch.randint(0, shape["vocab_size"], size, device=options.device) for _ in range(2))
    forward = torch.compile(model) if options.compile else model

    def one():
        model.zero_grad(set_to_none=True)
        logits = forward(tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()
        for view, parameter, cut in views:
            view.grad = cut(parameter.grad)
        muon.step()
        adamw.step()

    count = options.batch * options.sequence
    return {"tokens_per_second": count / seconds(options, one), "allocated_bytes": allocated(options)}


def layer(options):
    import torch
    from transformers.masking_utils import create_causal_mask
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    from bench_block import SHAPE
    from bench_transformers import prepared_config

    shape = SHAPE | {"hidden_size": 64, "moe_intermediate_size": 64, "kv_lora_rank": 32} if options.tiny else SHAPE
    config, dtype = prepared_config(shape, options.experts), dtype_of(options)
    with torch.device(options.device):
        block = deepseek.DeepseekV3DecoderLayer(config, 1).to(dtype).train()
        rotary = deepseek.DeepseekV3RotaryEmbedding(config)
        with torch.no_grad():
            # A layer without its model is not initialized: the experts would contain arbitrary memory.
            for name, parameter in block.named_parameters():
                parameter.fill_(1.0) if "layernorm" in name else parameter.normal_(0.0, 0.02)
            block.mlp.gate.e_score_correction_bias.zero_()
        hidden = torch.randn(1, options.sequence, shape["hidden_size"], dtype=dtype)
        positions = torch.arange(options.sequence).unsqueeze(0)
    forward = torch.compile(block) if options.compile else block

    def one():
        block.zero_grad(set_to_none=True)
        inputs = hidden.clone().requires_grad_()
        mask = create_causal_mask(
            config=config, inputs_embeds=inputs, attention_mask=None, past_key_values=None, position_ids=positions
        )
        embeddings = rotary(inputs, positions)
        forward(inputs, attention_mask=mask, position_ids=positions, position_embeddings=embeddings).sum().backward()

    return {"tokens_per_second": options.sequence / seconds(options, one), "allocated_bytes": allocated(options)}


def muon(options):
    import torch

    count, shape = (2, (64, 32)) if options.tiny else (64, (2048, 1408))
    parameters = [torch.nn.Parameter(torch.randn(shape, device=options.device)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn(shape, device=options.device)
    optimizer = torch.optim.Muon(parameters, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rows, columns = min(shape), max(shape)
    operations = count * 5 * (4 * rows * rows * columns + 2 * rows**3)
    return {"seconds": seconds(options, optimizer.step), "operations": operations}


if __name__ == "__main__":
    main()
