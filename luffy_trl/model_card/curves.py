# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Curves of a run, drawn from the trainer's log."""

from pathlib import Path
from typing import Any

from ..eval.report import without_mathtext


# Panels of a picture: a title, and the metrics in it with their labels.
_PICTURES = {
    "curves_on_policy.png": [
        ("mean reward of rollouts", {"reward": "rollouts"}),
        (
            "share of groups whose rollouts",
            {"on_policy/solve_all": "all get the full reward", "on_policy/solve_none": "get no reward"},
        ),
        ("length of rollouts (tokens)", {"completions/mean_length": "mean", "completions/max_length": "longest"}),
        ("entropy of rollout tokens", {"entropy": "entropy"}),
    ],
    "curves_demonstrations.png": [
        ("mean reward", {"demonstrations/reward": "demonstrations", "reward": "rollouts"}),
        ("mean probability of a demonstration token", {"demonstrations/prob": "probability"}),
        ("mean coefficient of a demonstration token", {"demonstrations/ratio": "coefficient, after shaping"}),
        ("mean length (tokens)", {"demonstrations/length": "demonstrations", "completions/mean_length": "rollouts"}),
    ],
}
_CAPTIONS = {
    "curves_on_policy.png": "What the policy samples, by update",
    "curves_demonstrations.png": "What the policy makes of the demonstrations, by update",
    "curves_evaluation.png": "Accuracy on benchmarks, by update",
}


def draw_curves(log_history: list[dict], folder: Path, titles: dict[str, str]) -> dict[str, str]:
    """
    Draws the curves of rollouts, of demonstrations, and of the benchmarks in `titles` that
    [`~luffy_trl.callbacks.EvaluationCallback`] has logged; returns file names and captions. What has no records gets
    no picture.
    """
    from matplotlib.figure import Figure  # not pyplot: the backend is the user's

    pictures = dict(_PICTURES)
    if not any(key.startswith("demonstrations/") for record in log_history for key in record):
        del pictures["curves_demonstrations.png"]  # the rollouts' curves in it have a picture of their own
    pictures["curves_evaluation.png"] = [("accuracy", titles)]
    captions = {}
    for name, panels in pictures.items():
        drawn = []
        for title, metrics in panels:
            curves = {label: _points(log_history, key) for key, label in metrics.items()}
            if curves := {label: points for label, points in curves.items() if points}:
                drawn.append((title, curves))
        if not drawn:
            continue
        num_columns = min(2, len(drawn))
        num_rows = -(-len(drawn) // num_columns)
        figure = Figure(figsize=(4.8 * num_columns, 3 * num_rows), layout="constrained")
        all_axes: Any = figure.subplots(num_rows, num_columns, squeeze=False).flat
        for axes, (title, curves) in zip(all_axes, drawn, strict=False):
            for label, points in curves.items():
                marker = "." if len(points) < 40 else None
                axes.plot(*zip(*points, strict=True), label=without_mathtext(label), marker=marker)
            axes.set_title(title, fontsize="medium")
            axes.set_xlabel("update")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            if len(curves) > 1 or name == "curves_evaluation.png":
                axes.legend(fontsize="small")
        for axes in list(all_axes)[len(drawn) :]:
            axes.set_visible(False)
        figure.savefig(folder / name, dpi=120)
        captions[name] = _CAPTIONS[name]
    return captions


def _points(log_history: list[dict], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in log_history if record.get(key) is not None]
