# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
From runs to one HTML file. The browser gets two packed parts, plotly's script and the data, as base64 that nothing in
a prompt can break out of; the page's own script shows texts by `textContent` alone, and a policy in its head keeps all
others from running.
"""

import base64
import gzip
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .alarms import Alarm, alarms_of, too_few
from .reading import Group, Run, sample_groups, without_paths


# Panels of the page: a title, and the metrics in it with their labels
PANELS = [
    ("Reward", {"reward": "rollouts", "demonstrations/reward": "demonstrations"}),
    ("Groups whose rollouts", {"on_policy/solve_none": "all fail", "on_policy/solve_all": "all succeed"}),
    ("Probability of a demonstration token", {"demonstrations/prob": "probability"}),
    ("What multiplies the advantage of a demonstration token", {"demonstrations/ratio": "coefficient"}),
    ("Entropy of rollout tokens", {"entropy": "entropy"}),
    ("Tokens of a completion", {"completions/mean_length": "rollouts", "demonstrations/length": "demonstrations"}),
    ("Rollouts that are cut off", {"completions/clipped_ratio": "share"}),
    ("Spread of rewards", {"reward_std": "deviation", "frac_reward_zero_std": "groups without any"}),
    ("Loss of a token", {"demonstrations/loss": "demonstrations", "on_policy/loss": "rollouts"}),
    ("Share of demonstration tokens", {"demonstrations/fraction": "share"}),
    ("Norm of the gradient", {"grad_norm": "before clipping"}),
    ("Seconds of a step", {"step_time": "seconds"}),
]
_POINTS = 1000  # of a curve; a file of 100,000 steps stays small
_COLORS = ("#4455aa", "#cc6622", "#228855", "#aa3377", "#888800", "#2299bb", "#663399", "#995533")
_DASHES = ("solid", "dash", "dot", "dashdot")
_FIXED = 0.25e6  # bytes of the template, the recipe and the curves, beside plotly and groups


def build_page(
    runs: list[Run],
    max_bytes: float = 10e6,
    refresh: float | None = None,
    pictures: list[dict[str, Any]] | None = None,
    about: list[tuple[str, str]] | None = None,
) -> str:
    """
    Makes the page.

    Args:
        runs (`list[Run]`):
            The runs, drawn over each other.
        max_bytes (`float`, *optional*, defaults to `10e6`):
            Size of the file that groups are sampled for.
        refresh (`float`, *optional*):
            Seconds after which the page loads itself again.
        pictures (`list[dict]`, *optional*):
            Traces with the weights of their tokens; see [`~luffy_trl.report.weights.weigh_rows`].
        about (`list[tuple[str, str]]`, *optional*):
            Names and values of what these are made of.

    Returns:
        `str`: HTML.
    """
    try:
        from jinja2 import Environment, PackageLoader
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(f"For a report, {error.name} is needed: `pip install luffy-trl[report]`.") from error

    template = Environment(loader=PackageLoader("luffy_trl.report", "."), autoescape=True).get_template(
        "template.html"
    )
    figures, others = draw(runs)
    data: dict[str, Any] = {
        "runs": [run.name for run in runs],
        "act": [any("tools/call_frequency" in record for record in run.log) for run in runs],
        "figures": figures,
        "others": others,
        "weights": pictures or [],
        "refresh": refresh,
    }
    plotly = _pack(get_plotlyjs().encode()) if runs else ""
    size = max_bytes - len(plotly) - len(_pack(_to_json(data))) - _FIXED
    data["groups"] = [asdict(group) for group in _within(size, runs)]
    return template.render(
        title=" and ".join(run.name for run in runs) or "Which tokens teach",
        runs=[_describe(run) for run in runs],
        compared=compare(runs) if len(runs) > 1 else [],
        about=about or [],
        has_groups=bool(data["groups"]),
        nonce=secrets.token_hex(16),
        plotly=plotly,
        data=_pack(_to_json(data)),
    )


def write_page(path: Path, html: str):
    """Writes a file that is there when it is complete: a browser may read it at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(html, encoding="utf-8", errors="replace")
    partial.replace(path)


def _to_json(data: Any) -> bytes:
    # ASCII: a lone surrogate, of a token that is half a character, has no UTF-8
    return json.dumps(data, allow_nan=False, separators=(",", ":")).encode("ascii")


def _pack(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def _within(size: float, runs: list[Run]) -> Iterator[Group]:
    """Groups of all runs in turn, until their size is used up; what is left out is noted."""
    sources = [sample_groups(run, number) for number, run in enumerate(runs)]
    kept = [0] * len(runs)
    for groups in zip_longest(*sources):
        for group in groups:
            if group is None:
                continue
            size -= len(_pack(_to_json(asdict(group))))
            if size < 0:
                for run, count in zip(runs, kept, strict=True):
                    run.notes.append(
                        f"{count} groups are here, spread over the run; the others would make the file larger than "
                        "`--max_megabytes`."
                    )
                return
            kept[group.run] += 1
            yield group


def _describe(run: Run) -> dict[str, Any]:
    """What the template says of a run."""
    about = run.about
    last = run.log[-1]["step"] if run.log else 0
    return {
        "name": run.name,
        "model": without_paths(about.get("model", "")) or None,
        "step": last,
        "state": "ended" if run.is_over else "stopped before its end" if run.has_died else None,
        "too_few": too_few(run),
        "alarms": [{"key": alarm.key, "text": alarm.text} for alarm in alarms_of(run)],
        "notes": run.notes,
        "recipe": [(name, without_paths(value)) for name, value in about.get("recipe", {}).items()],
        "differing": [tuple(map(without_paths, row)) for row in about.get("differing", [])],
        "versions": [(name, str(value)) for name, value in about.get("versions", {}).items()],
        "evaluation": run.evaluation,
    }


def compare(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """The options in which runs differ, each with its value in each run."""
    defaults = {name: default for run in runs for name, _, default in run.about.get("differing", [])}
    settings = []
    for run in runs:
        own = {"model": run.about.get("model"), "processes": run.about.get("num_processes")}
        own |= {f"weight of {name}": weight for name, weight in run.about.get("reward_weights", {}).items()}
        own |= run.about.get("recipe", {}) | {name: value for name, value, _ in run.about.get("differing", [])}
        own |= run.about.get("versions", {})
        if run.about:  # or nothing is told of it
            own |= {name: default for name, default in defaults.items() if name not in own}
        settings.append(own)
    rows = []
    for name in dict.fromkeys(name for own in settings for name in own):
        values = [without_paths(own[name]) if own.get(name) is not None else "" for own in settings]
        if len(set(values)) > 1:
            rows.append((name, values))
    return rows


# -- Curves


def draw(runs: list[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    The figures of the page.

    Args:
        runs (`list[Run]`):
            The runs.

    Returns:
        `tuple[list[dict], list[dict]]`: Figures of the panels, and of all other metrics: `title`, `figure` in
        plotly's JSON, and the sentences of the alarms that are met.
    """
    met = [(run, alarm) for run in runs for alarm in alarms_of(run)]
    panels = list(PANELS)
    for title, pattern in (("Reward in evaluation", "eval_(.+_)?reward"), ("Accuracy on benchmarks", "eval/.+")):
        keys = dict.fromkeys(key for run in runs for record in run.log for key in record if re.fullmatch(pattern, key))
        panels.append((title, {key: key.removeprefix("eval/").removeprefix("eval_") for key in keys}))
    drawn = {key for _, metrics in panels for key in metrics} | {"step", "epoch"}
    others = dict.fromkeys(key for run in runs for record in run.log for key in record if key not in drawn)
    further = [(key, {key: key}) for key in sorted(others)]
    return tuple(  # type: ignore[return-value]
        [panel for title, metrics in part if (panel := _panel(title, metrics, runs, met))]
        for part in (panels, further)
    )


def _panel(title: str, metrics: dict[str, str], runs: list[Run], met: list[tuple[Run, Alarm]]) -> dict | None:
    import plotly.graph_objects as go

    traces = []
    for place, (key, label) in enumerate(metrics.items()):
        for number, run in enumerate(runs):
            points = run.points(key)
            if not points:
                continue
            points = points[:: -(-len(points) // _POINTS)] + points[-1:]  # with the last
            # Of one run a colour is a metric; of several it is a run, and metrics differ by their dashes
            color, dash = (place, 0) if len(runs) == 1 else (number, place)
            name = label if len(runs) == 1 else run.name if len(metrics) == 1 else f"{run.name}, {label}"
            traces.append(
                go.Scatter(
                    x=[step for step, _ in points],
                    y=[value for _, value in points],
                    name=_escaped(name),
                    mode="lines+markers" if len(points) < 40 else "lines",
                    line={"color": _COLORS[color % len(_COLORS)], "dash": _DASHES[dash % len(_DASHES)], "width": 1.6},
                    marker={"size": 4},
                )
            )
    if not traces:
        return None
    layout = go.Layout(
        title={"text": _escaped(title), "font": {"size": 14}, "x": 0.02},
        margin={"l": 44, "r": 12, "t": 34, "b": 34},
        height=230,
        hovermode="x unified",
        showlegend=len(traces) > 1,
        legend={"orientation": "h", "y": -0.16, "font": {"size": 11}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={"gridcolor": "#8883", "zeroline": False},
        yaxis={"gridcolor": "#8883", "zeroline": False, "rangemode": "tozero"},
        font={"color": "#777"},
        template="none",
    )
    figure = go.Figure(traces, layout).to_dict()
    sentences = [
        {"run": run.name if len(runs) > 1 else "", "text": alarm.text} for run, alarm in met if alarm.key in metrics
    ]
    return {"title": title, "figure": _plain(figure), "alarms": sentences}


def _escaped(text: str) -> str:
    """Plotly reads some HTML in names and titles."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("$", "&#36;")


def _plain(value: Any) -> Any:
    """A figure without the tuples and numbers of other libraries."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
