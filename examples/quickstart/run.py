# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
The quickstart, from nothing to a plot: a warm model, then the same training script with and without demonstrations.

    python examples/quickstart/run.py                                                     # `make quickstart`
    python examples/quickstart/run.py --seeds 0 1 2 --methods luffy on_policy on_policy_entropy no_shaping

Every command that it runs is printed and can be run by hand. A run that has finished is not repeated.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import pandas as pd


matplotlib.use("Agg")
import matplotlib.pyplot as plt


HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
CONFIG = "examples/configs/quickstart.yaml"
METHODS = {
    "luffy": ("LUFFY", []),
    "on_policy": ("on-policy GRPO", ["--num_demonstrations", "0", "--ratio_clipping", "on_policy"]),
    "on_policy_entropy": (
        "on-policy GRPO with entropy bonus",
        ["--num_demonstrations", "0", "--ratio_clipping", "on_policy", "--entropy_coef", "0.001"],
    ),
    "no_shaping": ("mixed, no shaping", ["--policy_shaping", "none"]),
}
SPLITS = {
    "held_out": "new problems",
    "longer": "longer problems",
    "unseen_operator": "unseen operator",
    "easy": "easy problems",
}


def run(command: list[str]):
    print("\n$ " + shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command[1:]], cwd=REPOSITORY, check=True)


def train(method: str, seed: int, folder: Path):
    if (folder / "trainer_state.json").exists():
        print(f"\n{folder} holds a finished run, which is kept.")
        return
    data = folder.parent / "data"
    run(
        ["python", "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
        + ["examples/train_luffy.py", "--config", CONFIG]
        + ["--model_name_or_path", str(folder.parent / "model"), "--dataset_name", str(data / "train.jsonl")]
        + ["--eval_dataset_names", *(str(data / f"{split}.jsonl") for split in SPLITS)]
        + ["--output_dir", str(folder), "--seed", str(seed), *METHODS[method][1]]
    )


def read_accuracies(method: str, seed: int, folder: Path) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {
            "method": method,
            "seed": seed,
            "split": split,
            "step": record["step"],
            "accuracy": record["eval_reward"],
        }
        for record in history
        for split in SPLITS
        if f"eval_{split}_loss" in record
    ]


def plot(accuracies: pd.DataFrame, path: Path):
    figure, axes = plt.subplots(1, len(SPLITS), figsize=(3.2 * len(SPLITS), 3.5), sharey=True, layout="constrained")
    for axis, (split, title) in zip(axes, SPLITS.items(), strict=True):
        for color, method in enumerate(accuracies["method"].unique()):
            rows = accuracies[(accuracies["method"] == method) & (accuracies["split"] == split)]
            for number, (_, run_rows) in enumerate(rows.groupby("seed")):
                label = METHODS[method][0] if number == 0 else None
                axis.plot(run_rows["step"], run_rows["accuracy"], color=f"C{color}", marker=".", label=label)
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy at temperature 1")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    figure.savefig(path, dpi=120)


def table(accuracies: pd.DataFrame) -> str:
    """Accuracy on each split at the last update, and on new problems on the way, by method and seed (Markdown)."""
    lines = ["| method | seed | " + " | ".join(SPLITS.values()) + " | new problems by update |"]
    lines.append("| --- | --- |" + " --- |" * (len(SPLITS) + 1))
    for (method, seed), rows in accuracies.groupby(["method", "seed"], sort=False):
        last = rows[rows["step"] == rows["step"].max()].set_index("split")["accuracy"]
        course = rows[rows["split"] == "held_out"].sort_values("step")
        steps = ", ".join(
            f"{step}: {value:.2f}" for step, value in zip(course["step"], course["accuracy"], strict=True)
        )
        values = " | ".join(f"{last[split]:.3f}" for split in SPLITS)
        lines.append(f"| {METHODS[method][0]} | {seed} | {values} | {steps} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["luffy", "on_policy"])
    args = parser.parse_args()
    output_dir = args.output_dir.absolute()

    records = []
    for seed in args.seeds:
        folder = output_dir / f"seed_{seed}"
        run(["python", "examples/quickstart/prepare.py", "--output_dir", str(folder), "--seed", str(seed)])
        for method in args.methods:
            train(method, seed, folder / method)
            records += read_accuracies(method, seed, folder / method)
    accuracies = pd.DataFrame(records)
    accuracies.to_csv(output_dir / "accuracy.csv", index=False)
    plot(accuracies, output_dir / "accuracy.png")
    print("\n" + table(accuracies))
    print(f"\nThe plot is {args.output_dir / 'accuracy.png'}, its numbers are {args.output_dir / 'accuracy.csv'}.")


if __name__ == "__main__":
    main()
