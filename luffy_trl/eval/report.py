# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Scores and how sure they are; tables and plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .backends import sample_seed
from .benchmarks import BENCHMARKS, is_multiple_choice


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is right: 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"`k` must be between 1 and the number of samples, {num_samples}, got {k}.")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def bootstrap_means(values: Sequence[float], num_resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of resamples of questions, with replacement, of shape `(num_resamples,)`."""
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    return np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(num_resamples)])


def _interval(means: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def summarize(rows: dict[str, list[dict]], num_resamples: int = 2000, seed: int = 0) -> dict[str, dict]:
    """
    Scores of a model, from a row with `samples` for each question of each benchmark: for each of the `benchmarks` the
    score, its 95% interval by bootstrap over questions, pass@k, lengths and the share that was cut off; and `averages`
    over mathematics and over the rest, if there is more than one of each.
    """
    benchmarks, means = {}, {}
    for name, questions in rows.items():
        samples = [sample for question in questions for sample in question["samples"]]
        n = len(questions[0]["samples"])
        counts = [sum(sample["correct"] for sample in question["samples"]) for question in questions]
        means[name] = bootstrap_means([count / n for count in counts], num_resamples, sample_seed(seed, name, 0, 0))
        ks = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
        benchmarks[name] = {
            "metric": "pass@1" if n == 1 else f"avg@{n}",
            "score": sum(counts) / (n * len(counts)),
            "interval": _interval(means[name]),
            "pass_at_k": {str(k): float(np.mean([pass_at_k(n, count, k) for count in counts])) for k in ks},
            "num_questions": len(questions),
            "num_samples": n,
            "length": sum(sample["num_tokens"] for sample in samples) / len(samples),
            "cut_off": sum(sample["finish_reason"] == "length" for sample in samples) / len(samples),
        }
    averages = {}
    for title, wanted in (("mathematics", False), ("out of distribution", True)):
        group = [name for name in rows if is_multiple_choice(name) is wanted]
        if len(group) > 1:
            averages[title] = {
                "score": float(np.mean([benchmarks[name]["score"] for name in group])),
                "interval": _interval(np.mean([means[name] for name in group], axis=0)),
            }
    return {"benchmarks": benchmarks, "averages": averages}


def _title(benchmark: str) -> str:
    return BENCHMARKS[benchmark].title if benchmark in BENCHMARKS else benchmark


def without_mathtext(text: str) -> str:
    """A name from the data as matplotlib shall write it, which reads what stands between dollar signs."""
    return text.replace("$", r"\$")


def to_markdown(summary: dict[str, dict]) -> str:
    """
    A table in percent, with a row for each benchmark and a group of columns for each model, from their [`summarize`].
    """
    models = list(summary)
    benchmarks = summary[models[0]]["benchmarks"]
    with_curve = any(entry["num_samples"] > 1 for entry in benchmarks.values())
    columns = ["", "95% interval", *(["pass@k"] if with_curve else []), "tokens", "cut off"]
    header = [f"{model} {column}".strip() for model in models for column in columns]
    lines = [["benchmark", "questions", "metric", *header], ["---"] * (3 + len(header))]
    for name, entry in benchmarks.items():
        line = [_title(name), str(entry["num_questions"]), entry["metric"]]
        for model in models:
            entry = summary[model]["benchmarks"][name]
            line += [_percent(entry["score"]), " to ".join(map(_percent, entry["interval"]))]
            if with_curve:
                k, value = list(entry["pass_at_k"].items())[-1]
                line.append(f"{_percent(value)} (k={k})")
            line += [f"{entry['length']:.0f}", f"{_percent(entry['cut_off'])}%"]
        lines.append(line)
    for title in summary[models[0]]["averages"]:
        line = [f"**average, {title}**", "", ""]
        for model in models:
            entry = summary[model]["averages"][title]
            line += [f"**{_percent(entry['score'])}**", " to ".join(map(_percent, entry["interval"]))]
            line += [""] * (len(columns) - 2)
        lines.append(line)
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def plot_scores(summary: dict[str, dict], path: str | Path):
    """Draws the scores of models as bars, with their 95% intervals."""
    from matplotlib.figure import Figure  # not pyplot: the backend is the user's

    benchmarks = list(next(iter(summary.values()))["benchmarks"])
    figure = Figure(figsize=(2 + 1.2 * len(benchmarks), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(summary)
    for number, (model, entry) in enumerate(summary.items()):
        scores = np.array([100 * entry["benchmarks"][name]["score"] for name in benchmarks])
        bounds = 100 * np.array([entry["benchmarks"][name]["interval"] for name in benchmarks])
        positions = np.arange(len(benchmarks)) + (number - (len(summary) - 1) / 2) * width
        # the interval of percentiles need not hold the score itself, and a bar of errors has no negative length
        errors = np.maximum([scores - bounds[:, 0], bounds[:, 1] - scores], 0)
        axes.bar(positions, scores, width, yerr=errors, capsize=3, label=without_mathtext(model))
    titles = [without_mathtext(_title(name)) for name in benchmarks]
    axes.set_xticks(range(len(benchmarks)), titles, rotation=30, ha="right")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("score (%), 95% interval")
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=150)


def plot_pass_at_k(summary: dict[str, dict], path: str | Path) -> bool:
    """Draws pass@k against k, a panel for each benchmark with more than one sample; returns whether there is any."""
    first = next(iter(summary.values()))["benchmarks"]
    benchmarks = [name for name, entry in first.items() if entry["num_samples"] > 1]
    if not benchmarks:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3 * len(benchmarks), 3.5), layout="constrained")
    panels: Any = figure.subplots(1, len(benchmarks), squeeze=False, sharey=True)
    for axes, name in zip(panels[0], benchmarks, strict=True):
        for model, entry in summary.items():
            curve = entry["benchmarks"][name]["pass_at_k"]
            values = [100 * value for value in curve.values()]
            axes.plot([int(k) for k in curve], values, marker="o", label=without_mathtext(model))
        axes.set_xscale("log", base=2)
        axes.set_title(without_mathtext(_title(name)))
        axes.set_xlabel("k")
    panels[0][0].set_ylabel("pass@k (%)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path, dpi=150)
    return True
