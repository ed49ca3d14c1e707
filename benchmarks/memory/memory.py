# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Memory and tokens of a training step, on paper: what fits on which GPUs, before renting them.

    python benchmarks/memory/memory.py            # prints the table of docs/multi_node.md
    python benchmarks/memory/memory.py --num_gpus 8 --max_completion_length 4096

Counted, for each GPU that trains (ZeRO-3 or FSDP2, gradient checkpointing, bf16 autocast over fp32 weights): weights,
gradients and AdamW's two moments in fp32, sharded; one layer's weights in bf16, gathered; the hidden states that are
kept for each layer, in bf16; one layer's activations, recomputed; and the logits of a micro-batch in fp32, three times
(logits, log-probabilities, gradient). Not counted: the CUDA context, fragmentation, and communication buffers. No
number here was measured.
"""

import argparse
from dataclasses import dataclass


GIB = 2**30


@dataclass(frozen=True)
class Model:
    """
    The shape of a policy.

    Args:
        name (`str`): Name.
        num_parameters (`float`): Number of parameters.
        num_layers (`int`): Number of layers.
        hidden_size (`int`): Width.
        intermediate_size (`int`): Width of the feed-forward layer.
        vocab_size (`int`): Number of tokens of the vocabulary.
        num_key_value_heads (`int`): Number of key and value heads.
        head_dim (`int`): Width of a head.
    """

    name: str
    num_parameters: float
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_key_value_heads: int
    head_dim: int


MODELS = (
    Model("Qwen2.5-1.5B", 1.54e9, 28, 1536, 8960, 151936, 2, 128),
    Model("Qwen2.5-7B", 7.62e9, 28, 3584, 18944, 152064, 4, 128),
    Model("Qwen2.5-32B", 32.8e9, 64, 5120, 27648, 152064, 8, 128),
)


def training_memory(model: Model, num_gpus: int, tokens: int) -> dict[str, float]:
    """
    Memory of a GPU that trains.

    Args:
        model ([`Model`]): The policy.
        num_gpus (`int`): GPUs that weights, gradients and optimizer state are sharded over.
        tokens (`int`): Tokens of a micro-batch, prompts included.

    Returns:
        `dict[str, float]`: GiB by what they hold.
    """
    layer = model.num_parameters / model.num_layers
    return {
        "states": model.num_parameters * (4 + 4 + 8) / num_gpus / GIB,
        "gathered layer": 2 * layer / GIB,
        "kept hidden states": 2 * tokens * model.hidden_size * model.num_layers / GIB,
        "one layer's activations": 2 * tokens * (8 * model.hidden_size + 3 * model.intermediate_size) / GIB,
        "logits": 3 * 4 * tokens * model.vocab_size / GIB,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--num_gpus", type=int, default=8, help="GPUs that train.")
    parser.add_argument("--num_prompts", type=int, default=64, help="Prompts of an update.")
    parser.add_argument("--num_generations", type=int, default=8, help="Completions of a prompt.")
    parser.add_argument("--max_prompt_length", type=int, default=1024)
    parser.add_argument("--max_completion_length", type=int, default=8192)
    parser.add_argument(
        "--mean_length", type=int, default=2048, help="Mean tokens of a completion, for the estimates."
    )
    parser.add_argument("--rows_per_micro_batch", type=int, default=1)
    args = parser.parse_args()
    tokens = args.rows_per_micro_batch * (args.max_prompt_length + args.max_completion_length)
    sequences = args.num_prompts * args.num_generations
    print(
        f"{args.num_gpus} GPUs that train, micro-batches of at most {tokens} tokens, {sequences} sequences for each "
        f"update ({sequences * args.mean_length / 1e6:.1f}M completion tokens at a mean of {args.mean_length}).\n"
    )
    parts = list(training_memory(MODELS[0], 1, 1))
    header = ["model", *(f"{part}, GiB" for part in parts), "sum, GiB", "weights to push, GiB (bf16)"]
    header += ["KV cache of a full-length rollout, GiB", "update, PFLOP"]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for model in MODELS:
        memory = training_memory(model, args.num_gpus, tokens)
        cache = 2 * 2 * model.num_layers * model.num_key_value_heads * model.head_dim
        cache *= (args.max_prompt_length + args.max_completion_length) / GIB
        # forward, backward and the recomputed forward: 2 + 4 + 2 operations for each parameter and token
        flops = 8 * model.num_parameters * sequences * args.mean_length / 1e15
        cells = [model.name, *(f"{value:.1f}" for value in memory.values()), f"{sum(memory.values()):.1f}"]
        cells += [f"{2 * model.num_parameters / GIB:.1f}", f"{cache:.2f}", f"{flops:.0f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
