# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Where the time of a step goes: a profile of LuffyTrainer on the paper's mix of lengths, by kind of operation.

    python benchmarks/step/breakdown.py

One thread of a CPU, canned completions as in `step.py`. The limit is the time that the matrix products of the model
would take on their real tokens at the speed of a large product on this machine; attention is not in it.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from step import NUM_GENERATIONS, NUM_PROMPTS, SIZES, completion_length, make_trainer
from torch.profiler import ProfilerActivity, profile


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# By the names of operators, the first that fits
KINDS = {
    "attention": ("attention",),
    "matrix products": ("mm", "linear", "matmul"),
    "optimizer and gradient norm": ("adam", "foreach", "norm_except", "vector_norm", "linalg", "lerp", "addcdiv"),
    "embedding": ("embedding", "index_put", "index_add"),
    "copies and views": (
        "copy",
        "cat",
        "clone",
        "to",
        "view",
        "reshape",
        "slice",
        "contiguous",
        "pad",
        "fill",
        "zero",
    ),
    "elementwise and sums": ("aten::",),
}


def kind_of(operator: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), "other")


def product_speed() -> float:
    """Floating-point operations in a second of a product of 1024 x 1024 matrices, the best of ten."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="4x256", help="Layers x width of the model.")
    parser.add_argument("--num_updates", type=int, default=4, help="Updates of the run.")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    speed = product_speed()
    trainer = make_trainer("luffy", args.size, "paper", args.num_updates, "outputs/step")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer.train()
    total = trainer.seconds["total"] / args.num_updates
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profiled.key_averages():
        kind = kind_of(event.key.lower())
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6 / args.num_updates
    seconds["Python"] = max(total - sum(seconds.values()), 0.0)

    # 2 operations a weight and token forward, 4 backward, and 2 for old log-probs of rollouts
    num_weights = sum(p.numel() for name, p in trainer.model.named_parameters() if p.dim() > 1 and "embed" not in name)
    lengths = [[completion_length("paper", p, s) + 4 for s in range(NUM_GENERATIONS)] for p in range(2 * NUM_PROMPTS)]
    num_tokens, num_rollout_tokens = (sum(map(sum, (group[s:] for group in lengths))) / 2 for s in (0, 1))
    limit = num_weights * (6 * num_tokens + 2 * num_rollout_tokens) / speed

    rows = pd.DataFrame({"kind": list(seconds), "seconds": list(seconds.values())})
    rows["share"] = rows["seconds"] / total
    rows = rows[rows["seconds"] > 0].sort_values("seconds", ascending=False)
    lines = ["| kind of operation | seconds of an update | share |", "| --- | --- | --- |"]
    lines += [f"| {row.kind} | {row.seconds:.3f} | {row.share:.1%} |" for row in rows.itertuples()]
    lines += [
        f"| all | {total:.3f} | 100% |",
        f"| limit: matrix products of real tokens | {limit:.3f} | {limit / total:.1%} |",
    ]
    args.results_dir.mkdir(parents=True, exist_ok=True)
    (args.results_dir / "breakdown.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    axis.barh(rows["kind"][::-1], rows["seconds"][::-1])
    axis.axvline(limit, color="black", linestyle="--", label="limit: matrix products of real tokens")
    axis.set_xlabel(f"seconds of an update ({args.size}, the paper's mix)")
    axis.legend()
    figure.savefig(args.results_dir / "breakdown.png", dpi=110)


if __name__ == "__main__":
    main()
