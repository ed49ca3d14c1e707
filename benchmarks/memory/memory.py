# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Memory and tokens of a training step, on paper: what fits on which GPUs, before renting them.

    python benchmarks/memory/memory.py            # prints the table of docs/multi_node.md
    python benchmarks/memory/memory.py --num_gpus 8 --max_completion_length 4096

It is for ZeRO-3 or FSDP2, gradient checkpointing and bf16 autocast over fp32 weights, and counts what
`luffy_trl/estimates.py` names. No number here was measured. For a model and a dataset at hand: `luffy inspect`.
"""

import argparse

from luffy_trl.estimates import GIB, Model, cache_memory, training_memory, training_operations


MODELS = (
    Model("Qwen2.5-1.5B", 1.54e9, 28, 1536, 8960, 151936, 2, 128),
    Model("Qwen2.5-7B", 7.62e9, 28, 3584, 18944, 152064, 4, 128),
    Model("Qwen2.5-32B", 32.8e9, 64, 5120, 27648, 152064, 8, 128),
)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
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
        cache = cache_memory(model, args.max_prompt_length + args.max_completion_length)
        flops = training_operations(model, sequences * args.mean_length) / 1e15
        cells = [model.name, *(f"{value:.1f}" for value in memory.values()), f"{sum(memory.values()):.1f}"]
        cells += [f"{2 * model.num_parameters / GIB:.1f}", f"{cache:.2f}", f"{flops:.0f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
