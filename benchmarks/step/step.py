# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What an optimizer step costs: TRL's GRPOTrainer and LuffyTrainer in alternation, on the same canned completions.

    python benchmarks/step/step.py

Four contenders make the same updates of the same sequences, on the CPU, with one thread:

- `grpo`: stock `GRPOTrainer`, for which the demonstration is a rollout like the others;
- `luffy`: `LuffyTrainer`, with its micro-batches by length;
- `budget`: the same with `max_tokens_per_microbatch=2048`, about half of what the largest of TRL's have;
- `ideal`: `LuffyTrainer` with a micro-batch for each sequence, so that nothing is padded.

Nothing is generated. Lengths come from three mixes: `paper`, one trace for each seven shorter rollouts, at 1/8 of the
paper's lengths; `equal`; and `one_long`, a single long trace among all. Every run is a process of its own, and ratios
are of neighbouring runs.
"""

import argparse
import multiprocessing
import os
import random
import resource
import statistics
import time
from collections import defaultdict
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import pandas as pd
import psutil
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import LuffyConfig, LuffyTrainer


matplotlib.use("Agg")
import matplotlib.pyplot as plt


NUM_GENERATIONS, NUM_PROMPTS, ROWS_PER_MICRO_BATCH, MAX_LENGTH = 8, 4, 4, 1024
NUM_SEQUENCES = NUM_GENERATIONS * NUM_PROMPTS
SIZES = {"2x128": (2, 128), "4x256": (4, 256)}
MIXES = ("paper", "equal", "one_long")
CONTENDERS = ("grpo", "luffy", "budget", "ideal")
PHASES = ("update", "log_probs", "optimizer", "rewards", "rest")
TOKEN_BUDGET = 2048


def completion_length(mix: str, prompt: int, slot: int) -> int:
    """Tokens of the completion in a slot of a prompt's group; slot 0 is the demonstration."""
    rng = random.Random(f"{mix}-{prompt}-{slot}")
    if mix == "equal":
        return 256
    if mix == "one_long":
        return MAX_LENGTH if prompt % NUM_PROMPTS == 0 and slot == 0 else 64
    mean = 512 if slot == 0 else 200
    return max(16, min(MAX_LENGTH, round(rng.lognormvariate(0, 0.5) * mean / 1.133)))


def completion(mix: str, prompt: int, slot: int) -> list[int]:
    """Token ids of a completion; the last one ends it."""
    rng = random.Random(f"{mix}-{prompt}-{slot}-ids")
    return [*(rng.randrange(2, 90) for _ in range(completion_length(mix, prompt, slot) - 1)), 1]


def make_tokenizer() -> Qwen2Tokenizer:
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *(chr(c) for c in range(33, 127))])}
    return Qwen2Tokenizer(vocab, merges=[], unk_token=None, eos_token="<eos>", pad_token="<pad>", padding_side="left")


class Stopwatch(TrainerCallback):
    """Times the training loop, without what comes before it, and the optimizer."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def on_train_begin(self, *args, **kwargs):
        self.seconds["total"] -= time.perf_counter()

    def on_train_end(self, *args, **kwargs):
        self.seconds["total"] += time.perf_counter()

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.seconds["optimizer"] -= time.perf_counter()

    def on_optimizer_step(self, *args, **kwargs):
        self.seconds["optimizer"] += time.perf_counter()


def make_trainer(contender: str, size: str, mix: str, num_updates: int, output_dir: str):
    """A trainer whose completions are canned and whose phases are timed, in `trainer.seconds`."""
    tokenizer = make_tokenizer()
    layers, width = SIZES[size]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    rows_per_batch = 1 if contender == "ideal" else ROWS_PER_MICRO_BATCH
    config_class = GRPOConfig if contender == "grpo" else LuffyConfig
    args = config_class(
        output_dir=output_dir,
        num_generations=NUM_GENERATIONS,
        per_device_train_batch_size=rows_per_batch,
        gradient_accumulation_steps=NUM_SEQUENCES // rows_per_batch,
        steps_per_generation=2 * NUM_SEQUENCES // rows_per_batch,  # two updates for each generation, as in the paper
        max_completion_length=MAX_LENGTH,
        max_steps=num_updates,
        loss_type="dr_grpo",
        scale_rewards="none",
        learning_rate=1e-6,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **({"max_tokens_per_microbatch": TOKEN_BUDGET} if contender == "budget" else {}),
    )
    prompts = [f"{number:03d}?" for number in range(2 * NUM_PROMPTS)]
    number_of = {tuple(tokenizer(prompt)["input_ids"]): number for number, prompt in enumerate(prompts)}
    rows = [
        {"prompt": prompt, "demonstrations": [tokenizer.decode(completion(mix, number, 0)[:-1])]}
        for number, prompt in enumerate(prompts)
    ]
    seconds = defaultdict(float)

    def reward(completions, **kwargs):
        return [float(len(text) % 2) for text in completions]

    if contender == "grpo":
        trainer = GRPOTrainer(model, reward, args, Dataset.from_list(rows), processing_class=tokenizer)

        def generate(prompt_ids, *args, **kwargs):
            ids = [completion(mix, number_of[tuple(p)], i % NUM_GENERATIONS) for i, p in enumerate(prompt_ids)]
            return ids, None

        trainer._generate_single_turn = generate
    else:
        trainer = LuffyTrainer(model, reward, args, Dataset.from_list(rows), processing_class=tokenizer)

        def answer(prompt_ids, completion_ids, logps, sampled):
            for i in sampled:
                completion_ids[i] += completion(mix, number_of[tuple(prompt_ids[i])], i % NUM_GENERATIONS)

        trainer.continue_completions = answer
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Stopwatch(seconds))

    def timed(phase, function):
        def call(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[phase] += time.perf_counter() - started
            return result

        return call

    log_probs = trainer._get_per_token_logps_and_entropies

    def timed_log_probs(model, input_ids, *args, **kwargs):
        trainer.padded_tokens[-1].append(input_ids.numel()) if torch.is_grad_enabled() else None
        if torch.is_grad_enabled():
            return log_probs(model, input_ids, *args, **kwargs)
        return timed("log_probs", log_probs)(model, input_ids, *args, **kwargs)

    trainer.padded_tokens = [[]]
    trainer._get_per_token_logps_and_entropies = timed_log_probs
    trainer._calculate_rewards = timed("rewards", trainer._calculate_rewards)
    trainer._generate_and_score_completions = timed("generation", trainer._generate_and_score_completions)
    trainer.training_step = timed("step", trainer.training_step)
    trainer.seconds = seconds
    return trainer


def measure(contender: str, size: str, mix: str, num_updates: int, output_dir: str) -> dict:
    """Seconds of each phase for an update, padded and real tokens, and the largest micro-batch."""
    trainer = make_trainer(contender, size, mix, num_updates, output_dir)
    before = psutil.Process().memory_info().rss
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = trainer.seconds
    real = sum(4 + completion_length(mix, p, s) for p in range(2 * NUM_PROMPTS) for s in range(NUM_GENERATIONS)) / 2
    micro_batches = trainer.padded_tokens[0]
    return {
        "contender": contender,
        "size": size,
        "mix": mix,
        "update": (seconds["step"] - seconds["generation"]) / num_updates,
        "log_probs": seconds["log_probs"] / num_updates,
        "optimizer": seconds["optimizer"] / num_updates,
        "rewards": seconds["rewards"] / num_updates,
        # Blending, tokenizing, masks, advantages, metrics, data: what is neither model nor optimizer nor reward
        "rest": (
            seconds["total"]
            - (seconds["step"] - seconds["generation"])
            - sum(seconds[phase] for phase in ("log_probs", "optimizer", "rewards"))
        )
        / num_updates,
        "total": seconds["total"] / num_updates,
        "memory_mib": (peak - before) / 2**20,
        "real_tokens": real,
        "padded_tokens": sum(micro_batches) / num_updates,
        "largest_micro_batch": max(micro_batches),
    }


def table(rows: pd.DataFrame) -> str:
    """Ratios to `grpo` and to `ideal` of neighbouring runs: median, least and greatest (Markdown)."""
    lines = [
        "| model | mix | real / padded tokens, grpo | luffy | update, grpo / luffy | grpo / budget | luffy / ideal | "
        "total, grpo / luffy | rest of a step, luffy | peak memory, luffy / grpo | budget / grpo |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def ratio(values: pd.Series) -> str:
        return f"{values.median():.2f} ({values.min():.2f}-{values.max():.2f})"

    for (size, mix), group in rows.groupby(["size", "mix"], sort=False):
        by = {name: part.set_index("repetition") for name, part in group.groupby("contender")}
        share = {name: part["real_tokens"].mean() / part["padded_tokens"].mean() for name, part in by.items()}
        grpo, luffy, budget, ideal = (by[name] for name in CONTENDERS)
        cells = [
            f"{share['grpo']:.0%}",
            f"{share['luffy']:.0%}",
            ratio(grpo["update"] / luffy["update"]),
            ratio(grpo["update"] / budget["update"]),
            ratio(luffy["update"] / ideal["update"]),
            ratio(grpo["total"] / luffy["total"]),
            f"{statistics.median(luffy['rest'] / luffy['total']):.1%}",
            ratio(luffy["memory_mib"] / grpo["memory_mib"]),
            ratio(budget["memory_mib"] / grpo["memory_mib"]),
        ]
        lines.append(f"| {size} | {mix} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: pd.DataFrame, path: Path):
    figure, axes = plt.subplots(1, len(SIZES), figsize=(14, 4), layout="constrained")
    for axis, size in zip(axes, SIZES, strict=True):
        medians = rows[rows["size"] == size].groupby(["mix", "contender"])[list(PHASES)].median()
        labels = [f"{mix}\n{contender}" for mix in MIXES for contender in CONTENDERS]
        bottom = 0.0
        for phase in PHASES:
            values = pd.Series([medians.loc[(mix, c), phase] for mix in MIXES for c in CONTENDERS])
            axis.bar(labels, values, bottom=bottom, label=phase.replace("_", "-"))
            bottom = values + bottom
        axis.set_title(f"{size} layers x width")
        axis.set_ylabel("seconds for an update")
        axis.tick_params(axis="x", labelsize=6)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3, help="How often each contender runs, in alternation.")
    parser.add_argument("--num_updates", type=int, default=4, help="Updates of a run.")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    plan = [
        (size, mix, repetition, contender)
        for size in SIZES
        for mix in MIXES
        for repetition in range(args.repetitions)
        for contender in CONTENDERS
    ]
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        for size, mix, repetition, contender in tqdm(plan):
            row = pool.apply(measure, (contender, size, mix, args.num_updates, "outputs/step"))
            rows.append({"repetition": repetition, **row})
    rows = pd.DataFrame(rows)
    args.results_dir.mkdir(parents=True, exist_ok=True)
    rows.round(5).to_csv(args.results_dir / "step.csv", index=False)
    (args.results_dir / "table.md").write_text(table(rows) + "\n")
    plot(rows, args.results_dir / "step.png")
    print(table(rows))


if __name__ == "__main__":
    main()
