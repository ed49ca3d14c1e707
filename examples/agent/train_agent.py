# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.
"""
A model that never calls its tool learns it from traces: the same trainer with and without demonstrations.

    python examples/agent/train_agent.py                    # 3 seeds, some 25 minutes on a core
    python examples/agent/train_agent.py --seeds 0

1. A warm model of 200,000 parameters. Asked to use the tool it does, and copies what the tool answers; on a plain
   question it guesses a number. So it holds all it needs, and no rollout is ever right.
2. LUFFY: one completion of each group of 8 is a trace that calls the tool. And on-policy GRPO, the same without.
3. Accuracy on new questions, on longer ones than any trace has, and calls per completion, as a plot and a table.

What has finished is not repeated.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import matplotlib
import pandas as pd
from datasets import DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from luffy_trl import LuffyConfig, LuffyTrainer


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import products


sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import prepare


METHODS = {
    "luffy": ("LUFFY", {}),
    "on_policy": ("on-policy GRPO", {"num_demonstrations": 0, "ratio_clipping": "on_policy"}),
}
PANELS = {  # split and metric
    ("held_out", "eval_reward"): "new questions: accuracy",
    ("longer", "eval_reward"): "a factor more: accuracy",
    ("held_out", "eval_tools/call_frequency"): "new questions: calls per completion",
}
GUESSING = 0.9995  # share of plain questions that the warm-up answers with a guess; of those that call, it goes on


def sample_turn(rng: random.Random, tokenizer) -> tuple[str, str]:
    """Draws what the warm-up teaches: a conversation, and the turn that follows it."""
    factors = products.sample_factors(rng, rng.randint(2, products.NUM_FACTORS + 1))
    question, messages = "*".join(map(str, factors)), products.solve(factors)
    end = rng.randrange(0, len(messages), 2)
    if rng.random() < 0.5:
        question = products.ASKING + question
    elif end == 0 and rng.random() < GUESSING:
        length = len(messages[-1]["content"])
        messages = [{"role": "assistant", "content": str(rng.randrange(10 ** (length - 1), 10**length))}]
    context = products.render(tokenizer, question, messages[:end])
    following = products.render(tokenizer, question, messages[: end + 1]).removeprefix(context)
    return context, following.partition(products.END)[0] + products.END


def warm_model(seed: int, num_steps: int, folder: Path) -> Path:
    """Trains the warm model of a seed, unless it is there."""
    file, settings = folder / "warm_up.json", {"seed": seed, "num_steps": num_steps}
    if file.exists() and json.loads(file.read_text()) != settings:
        raise ValueError(f"{folder} holds a warm model of other settings. Give another `--output_dir`.")
    if not file.exists():
        set_seed(seed)
        tokenizer = products.build_tokenizer()
        model = prepare.build_model(tokenizer)
        config = prepare.WarmUpConfig(seed, num_steps)
        prepare.warm_up(model, tokenizer, config, set(), lambda rng, _: sample_turn(rng, tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        file.write_text(json.dumps(settings))
    return folder


def train(method: str, seed: int, num_updates: int, splits: DatasetDict, model: Path, folder: Path) -> list[dict]:
    """Trains with a method, unless a run has finished; the records of its evaluations."""
    if not (folder / "trainer_state.json").exists():
        trainer = LuffyTrainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            reward_funcs=products.product_is_right,
            args=LuffyConfig(
                output_dir=str(folder),
                max_steps=num_updates,
                per_device_train_batch_size=128,
                per_device_eval_batch_size=256,
                num_generations=8,
                num_generations_eval=1,
                max_completion_length=120,
                max_tool_calling_iterations=4,
                learning_rate=1e-3,
                adam_beta2=0.99,
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                eval_strategy="steps",
                eval_steps=10,
                eval_on_start=True,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                seed=seed,
                **METHODS[method][1],
            ),
            train_dataset=splits["train"],
            eval_dataset={name: splits[name] for name in ("held_out", "longer")},
            processing_class=AutoTokenizer.from_pretrained(model),
            tools=[products.multiply],
        )
        trainer.train()
        trainer.save_state()
    state = json.loads((folder / "trainer_state.json").read_text())
    if state["max_steps"] != num_updates:
        raise ValueError(f"{folder} holds a run of {state['max_steps']} updates. Give another `--output_dir`.")
    return [
        {"method": method, "seed": seed, "step": record["step"], "panel": title, "value": record[metric]}
        for record in state["log_history"]
        for (split, metric), title in PANELS.items()
        if f"eval_{split}_loss" in record
    ]


def plot(records: pd.DataFrame, path: Path):
    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 3.4), layout="constrained")
    for axis, title in zip(axes, PANELS.values(), strict=True):
        for color, (method, (label, _)) in enumerate(METHODS.items()):
            rows = records[(records["method"] == method) & (records["panel"] == title)]
            for number, (_, of_seed) in enumerate(rows.groupby("seed")):
                axis.plot(of_seed["step"], of_seed["value"], f"C{color}.-", label=None if number else label)
        axis.set(title=title, xlabel="update", ylim=(-0.03, 1.03 if "accuracy" in title else None))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    figure.savefig(path, dpi=120)


def table(records: pd.DataFrame) -> str:
    """What each run ends with (Markdown)."""
    lines = ["| method | seed | " + " | ".join(PANELS.values()) + " |", "| --- | --- |" + " --- |" * len(PANELS)]
    for (method, seed), rows in records.groupby(["method", "seed"], sort=False):
        last = rows[rows["step"] == rows["step"].max()].set_index("panel")["value"]
        values = " | ".join(f"{last[title]:.3f}" for title in PANELS.values())
        lines.append(f"| {METHODS[method][0]} | {seed} | {values} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/agent"), help="Folder to write to.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_warm_up_steps", type=int, default=3500, help="Optimizer steps of the warm-up.")
    parser.add_argument("--num_updates", type=int, default=80, help="Updates of each method.")
    args = parser.parse_args()
    records = []
    for seed in args.seeds:
        folder = args.output_dir / f"seed_{seed}"
        model = warm_model(seed, args.num_warm_up_steps, folder / "model")
        splits = products.make_splits(seed)
        for method in METHODS:
            records += train(method, seed, args.num_updates, splits, model, folder / method)
    frame = pd.DataFrame(records)
    frame.to_csv(args.output_dir / "agent.csv", index=False)
    plot(frame, args.output_dir / "agent.png")
    print("\n" + table(frame))
    print(f"\nThe plot is {args.output_dir / 'agent.png'}, its numbers are {args.output_dir / 'agent.csv'}.")


if __name__ == "__main__":
    main()
