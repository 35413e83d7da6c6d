#!/usr/bin/env python3
"""One mixture-of-experts layer of Moonlight-16B at full size: transformers' DeepseekV3DecoderLayer and `moonlight-model`, in turns.

    cargo build --release -p moonlight-model --example bench_block
    python scripts/bench/bench_block.py target/release/examples/bench_block --tokens 2048 --train --rounds 3
    python scripts/bench/bench_block.py target/release/examples/bench_block --tokens 1

The layer has 2,048 dimensions, 16 heads of MLA, 64 experts of 1,408 (a token visits 6) and 2 shared experts: 585 million parameters
with random values. `--train` is forward and backward for the input and every weight; without it only forward, as in inference.
Rounds, ratios and memory are defined in `bench_transformers.py`.

Needs: torch, transformers (group `bench`), the example `bench_block`, 8 GB of memory. Takes: some minutes; with `--train` and eager
experts half an hour.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from bench_transformers import (
    DTYPES,
    EXPERTS,
    prepared_config,
    run_in_turns,
    summary,
    timed,
    torch_dtype,
    way_name,
)

# moonshotai/Moonlight-16B-A3B, config.json; two layers; the second has experts.
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("ours", nargs="?", help="the `bench_block` example of moonlight-model, built for release")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps in a run")
    parser.add_argument(
        "--experts", choices=EXPERTS, help="only this `experts_implementation`; eager takes minutes to train"
    )
    parser.add_argument("--peer", choices=EXPERTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(transformers_run(options)))
        return
    given = ["--tokens", str(options.tokens), "--repeats", str(options.repeats), "--dtype", options.dtype]
    given += ["--train"] * options.train
    ways = [options.experts] if options.experts else EXPERTS
    programs = {way_name(way): [sys.executable, __file__, "--peer", way, *given] for way in ways}
    programs["ours"] = [options.ours, *given]
    runs = run_in_turns(programs, options.rounds)
    print(json.dumps({"tokens": options.tokens, "train": options.train, "dtype": options.dtype} | summary(runs)))


def transformers_run(options):
    import torch
    from transformers.masking_utils import create_causal_mask
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    before = common.memory_mib()
    config = prepared_config(SHAPE, options.peer)
    dtype = torch_dtype(options.dtype)
    torch.set_default_dtype(dtype)
    layer = deepseek.DeepseekV3DecoderLayer(config, 1).train(options.train)
    rotary = deepseek.DeepseekV3RotaryEmbedding(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        # A layer without its model is not initialized: the experts would contain arbitrary memory.
        for name, parameter in layer.named_parameters():
            parameter.fill_(1.0) if "layernorm" in name else parameter.normal_(0.0, 0.02)
        layer.mlp.gate.e_score_correction_bias.zero_()
    hidden = torch.randn(1, options.tokens, SHAPE["hidden_size"]).to(dtype)
    positions = torch.arange(options.tokens).unsqueeze(0)

    def forward(hidden):
        mask = create_causal_mask(
            config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
        )
        embeddings = rotary(hidden, positions)
        return layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=embeddings)

    def train():
        layer.zero_grad(set_to_none=True)
        forward(hidden.clone().requires_grad_()).sum().backward()

    def infer():
        with torch.inference_mode():
            forward(hidden)

    return timed(train if options.train else infer, options.repeats, options.tokens, before)


if __name__ == "__main__":
    main()
