# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
How the time and memory of an optimizer step grow: with G, with the length of traces, with k, and with the dataset.

    python benchmarks/step/growth.py

As in `step.py` nothing is generated, every run is a process of its own, and the CPU has one thread. The model has two
layers of width 64, so that what grows for other reasons than the model is seen.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import psutil
import torch
from datasets import Dataset, disable_progress_bars
from step import make_tokenizer
from tqdm import tqdm
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from luffy_trl import LuffyConfig, LuffyTrainer


matplotlib.use("Agg")
import matplotlib.pyplot as plt


BASE = {"num_generations": 8, "trace_length": 256, "num_demonstrations": 1, "num_rows": 1000}
AXES = {
    "num_generations": [2, 4, 8, 16, 32, 64],
    "trace_length": [256, 512, 1024, 2048, 4096, 8192],
    "num_demonstrations": [0, 1, 2, 3, 4],
    "num_rows": [1_000, 10_000, 100_000, 1_000_000],
}
ROLLOUT_LENGTH, PROMPTS_PER_UPDATE = 64, 2


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, its share of the generation batch included."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)


def rows(num_rows: int, trace_length: int, num_traces: int) -> Iterator[dict]:
    """Rows with traces of so many tokens, one for each character."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * (trace_length // 26 + 2)
    for number in range(num_rows):
        starts = [(number + trace) % 26 for trace in range(num_traces)]
        yield {"prompt": f"{number}?", "demonstrations": [letters[start:][: trace_length - 1] for start in starts]}


def measure(num_generations: int, trace_length: int, num_demonstrations: int, num_rows: int) -> dict[str, float]:
    """Least seconds of a step, its peak memory over what was there before, and seconds of tokenizing the dataset."""
    disable_progress_bars()
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16384,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    args = LuffyConfig(
        output_dir="outputs/growth",
        num_generations=num_generations,
        num_demonstrations=num_demonstrations,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=PROMPTS_PER_UPDATE * num_generations // 2,
        max_completion_length=trace_length,
        max_steps=8,
        learning_rate=1e-6,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    dataset = Dataset.from_generator(
        rows,
        gen_kwargs={"num_rows": num_rows, "trace_length": trace_length, "num_traces": max(num_demonstrations, 1)},
        cache_dir="outputs/growth/datasets",
    )
    started = time.perf_counter()
    times = StepTimes()
    trainer = LuffyTrainer(
        model,
        lambda completions, **kwargs: [float(len(text) % 2) for text in completions],
        args,
        dataset,
        processing_class=tokenizer,
        callbacks=[times],
    )
    tokenizing = time.perf_counter() - started

    rollout = [*(2 + j % 90 for j in range(ROLLOUT_LENGTH - 1)), 1]

    def answer(prompt_ids, completion_ids, logps, sampled):
        for i in sampled:
            completion_ids[i] += rollout

    trainer.continue_completions = answer
    if num_demonstrations == 0:  # then generation is TRL's
        trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: ([rollout for _ in prompt_ids], None)
    trainer.remove_callback(PrinterCallback)
    before = psutil.Process().memory_info().rss
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        # The first draws the order of the epoch, and others may have been disturbed
        "seconds": min(times.seconds[1:]),
        "memory_mib": (peak - before) / 2**20,
        "tokenizing": tokenizing,
    }


def exponent(x: pd.Series, y: pd.Series) -> float:
    """Slope of log y over log x in the upper half of x, where what is constant weighs least."""
    half = len(x) // 2 - 1
    return float(np.polyfit(np.log(x.iloc[half:]), np.log(y.iloc[half:]), 1)[0])


def table(results: pd.DataFrame) -> str:
    """Exponents of time and memory, for each axis (Markdown)."""
    lines = [
        "| grows | from | to | seconds of a step | exponent | peak memory, MiB | exponent |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for axis in AXES:
        part = results[results["axis"] == axis]
        cells = [axis, part[axis].iloc[0], part[axis].iloc[-1]]
        for column in ("seconds", "memory_mib"):
            has_exponent = part[axis].min() > 0
            cells += [
                f"{part[column].iloc[0]:.3g} to {part[column].iloc[-1]:.3g}",
                f"{exponent(part[axis], part[column]):.2f}" if has_exponent else "",
            ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def plot(results: pd.DataFrame, path: Path):
    figure, axes = plt.subplots(2, len(AXES), figsize=(14, 6), layout="constrained")
    for column, axis in enumerate(AXES):
        part = results[results["axis"] == axis]
        for row, (name, label) in enumerate((("seconds", "seconds of a step"), ("memory_mib", "peak memory, MiB"))):
            panel = axes[row, column]
            panel.plot(part[axis], part[name], marker="o")
            if axis != "num_demonstrations":
                panel.set_xscale("log", base=10 if axis == "num_rows" else 2)
                panel.set_yscale("log")
            panel.set_ylim(bottom=part[name].min() / 2, top=part[name].max() * 2)
            panel.set_xlabel(axis)
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="What grows.")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    short = {"num_rows": {"trace_length": ROLLOUT_LENGTH}}  # a million rows of them
    plan = [(axis, {**BASE, **short.get(axis, {}), axis: value}) for axis in args.axes for value in AXES[axis]]
    results = []
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        for axis, setting in tqdm(plan):
            results.append({"axis": axis, **setting, **pool.apply(measure, (), setting)})
    results = pd.DataFrame(results)
    args.results_dir.mkdir(parents=True, exist_ok=True)
    file = args.results_dir / "growth.csv"
    if file.exists():  # of an earlier run, what has not been measured again
        earlier = pd.read_csv(file)
        results = pd.concat([earlier[~earlier["axis"].isin(args.axes)], results])
    results = results.sort_values("axis", key=lambda names: names.map(list(AXES).index), kind="stable")
    results.round(5).to_csv(file, index=False)
    plot(results, args.results_dir / "growth.png")
    (args.results_dir / "growth.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
