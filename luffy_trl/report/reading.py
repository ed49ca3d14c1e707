# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""A run folder, read: one [`Run`] travels from here to the page. Nothing here needs torch."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import LOCK_FILE, LOG_FILE, RUN_FILE
from ..messages import without_none


_GIVEN = ("demonstration", "prefix", "replay")  # sources of rows that are no rollouts
_STEPS_READ = 60  # completions of more steps than these are left out; one file may have 100 MB
_GROUPS_OF_A_STEP = 12
_PATH = re.compile(r"(?:(?<=[\s'\"=:,(\[])|^)(?:~|[A-Za-z]:)?[/\\](?:[^\s'\",)\]/\\]+[/\\])+([^\s'\",)\]/\\]*)")


@dataclass
class Row:
    """
    A completion of a group.

    Args:
        text (`str`):
            Its text.
        source (`str`):
            `"rollout"`, `"demonstration"`, or another source of the completions table.
        rewards (`dict[str, float | None]`):
            What each reward function gave it.
        reward (`float`, *optional*):
            The weighted sum; `None` where no function applies.
        advantage (`float`, *optional*):
            Its advantage.
        tokens (`int`, *optional*):
            Its length, where the table has it.
        truncated (`bool`, *optional*):
            Whether it does not end by itself.
    """

    text: str
    source: str
    rewards: dict[str, float | None]
    reward: float | None
    advantage: float | None
    tokens: int | None = None
    truncated: bool | None = None


@dataclass
class Group:
    """
    A prompt and its completions at a step.

    Args:
        run (`int`):
            Number of the run, where a page has several.
        step (`int`):
            The step.
        prompt (`str`):
            The prompt.
        rows (`list[Row]`):
            Its completions, in the order of the group.
        kinds (`list[str]`):
            What the page can filter by.
    """

    run: int
    step: int
    prompt: str
    rows: list[Row]
    kinds: list[str] = field(default_factory=list)


@dataclass
class Run:
    """
    What a run wrote.

    Args:
        name (`str`):
            Name of its folder, without the path.
        log (`list[dict]`):
            Records of the trainer's log, with numbers that are finite, or `None`.
        about (`dict`):
            `model`, `recipe`, `differing`, `reward_weights`, `versions`; empty where the run is of another trainer.
        completions (`dict[int, Path]`):
            The completions table of each step that has one.
        evaluation (`list[tuple[str, str, float]]`):
            Model, benchmark and score of `luffy eval`.
        notes (`list[str]`):
            What could not be read, or was left out, and how to get it.
        is_over (`bool`):
            Whether training has ended.
        has_died (`bool`, *optional*, defaults to `False`):
            Whether its process has ended before training did.
    """

    name: str
    log: list[dict[str, Any]]
    about: dict[str, Any]
    completions: dict[int, Path]
    evaluation: list[tuple[str, str, float]]
    notes: list[str]
    is_over: bool
    has_died: bool = False

    def points(self, key: str) -> list[tuple[int, float]]:
        """Step and value of a metric."""
        return [(record["step"], record[key]) for record in self.log if record.get(key) is not None]

    @property
    def reward_names(self) -> list[str]:
        """The reward functions, as the log has them."""
        names = (re.fullmatch(r"rewards/(.+)/mean", key) for record in self.log for key in record)
        return list(dict.fromkeys(match[1] for match in names if match))


def read_run(folder: str | Path) -> Run:
    """
    Reads what a run wrote to its output folder.

    Args:
        folder (`str` or `Path`):
            The `output_dir` of the run.

    Returns:
        [`Run`]: The run.

    Raises:
        ValueError: If the folder is not there, or no run has written a log to it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder. Give the `output_dir` of `luffy train`.")
    notes: list[str] = []
    is_free = lock_is_free(folder)  # before the log is read: a run writes its last record, and then frees it
    log = _read_log(folder, notes)
    if log is None:
        raise ValueError(
            f"{str(folder)!r} is no folder of a run: it has no {LOG_FILE} or trainer_state.json, nor a checkpoint "
            "with one. Give the `output_dir` of `luffy train`, after its first step."
        )
    about = _read_json(folder / RUN_FILE)
    if not isinstance(about, dict):
        about = {}
        notes.append(f"There is no {RUN_FILE}, so the recipe and the versions are missing.")
    last = max((record["step"] for record in log), default=0)
    completions = {}
    for path in sorted(folder.glob("completions/completions_*.parquet")):
        number = path.stem.rpartition("_")[2]
        if number.isdigit() and int(number) <= last:
            completions[int(number)] = path
        else:
            notes.append(f"{path.name} is of a step that the run has not reached, so of an earlier run: left out.")
    if not completions:
        notes.append(
            "There are no groups: the run wrote no completions. `luffy train --log_completions true` writes them."
        )
    is_over = any("train_runtime" in record for record in log)
    return Run(
        name=folder.resolve().name,
        log=log,
        about=about,
        completions=completions,
        evaluation=_read_evaluation(folder),
        notes=notes,
        is_over=is_over,
        has_died=is_free and not is_over,
    )


def lock_is_free(folder: Path) -> bool:
    """Whether a run has left its lock file behind, as one does whose process is killed."""
    file = folder / LOCK_FILE
    if not file.exists():
        return False
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError, NotImplementedError):  # a run holds it, or nobody can tell
        return False
    lock.release()
    return True


def _read_log(folder: Path, notes: list[str]) -> list[dict[str, Any]] | None:
    """The log, of which a line may be written this very moment; of runs without one, the newest trainer state."""
    try:
        lines = (folder / LOG_FILE).read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            notes.append(f"Line {number} of {LOG_FILE} cannot be read: left out.")
    if records:
        return [_finite(record) for record in records]
    states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    logs = []
    for path in states:
        state = _read_json(path)
        if isinstance(state, dict) and isinstance(state.get("log_history"), list):
            logs.append((state.get("global_step", 0), path == states[0], state["log_history"]))
        elif path.exists():
            notes.append(f"{path.relative_to(folder)} cannot be read: left out.")
    if not logs:
        return None
    return [_finite(r) for r in max(logs, key=lambda entry: entry[:2])[2] if isinstance(r.get("step"), int)]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_json(path: Path) -> Any:
    try:
        return _parse(path.read_text("utf-8", errors="replace"))
    except OSError:
        return None


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """A record with finite numbers, or `None`. Of several evaluation sets, each metric has the name of its set."""
    values = {key: number(value) for key, value in record.items() if isinstance(value, int | float)}
    of_a_set = next((match[1] for key in values if (match := re.fullmatch("eval_(.+)_loss", key))), None)
    if of_a_set is None:
        return values
    prefix = f"eval_{of_a_set}_"
    return {key if key.startswith(prefix) else re.sub("^eval_", prefix, key): value for key, value in values.items()}


def number(value: Any) -> float | None:
    """A number that JSON has, or `None`."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _read_evaluation(folder: Path) -> list[tuple[str, str, float]]:
    summary = _read_json(folder / "_evaluation" / "summary.json")
    rows = []
    for label, entry in summary.items() if isinstance(summary, dict) else ():
        for name, result in entry.get("benchmarks", {}).items() if isinstance(entry, dict) else ():
            if number(result.get("score")) is not None:
                rows.append((without_paths(label), name, result["score"]))
    return rows


def without_paths(text: Any) -> str:
    """A text in which an absolute path is the name of its file: a report may be sent to others."""
    return _PATH.sub(lambda match: match[1] or "...", str(text))


# -- Groups


def sample_groups(run: Run, number_of_run: int) -> Iterator[Group]:
    """
    Groups of a run, such that the first few lie evenly over its steps, and more of them lie closer.

    Args:
        run ([`Run`]):
            The run; what cannot be read is noted there.
        number_of_run (`int`):
            What `Group.run` is to be.

    Returns:
        `Iterator[Group]`: The groups. A step is read when its first group is asked for.
    """
    steps = sorted(run.completions)
    if len(steps) > _STEPS_READ:
        places = [round(i * (len(steps) - 1) / (_STEPS_READ - 1)) for i in range(_STEPS_READ)]
        run.notes.append(f"Groups are of {_STEPS_READ} of the {len(steps)} steps with completions.")
        steps = [steps[place] for place in places]
    read: dict[int, list[Group]] = {}
    num_left_out = 0
    order = _spread(len(steps))
    for turn in range(_GROUPS_OF_A_STEP):
        for place in order:
            step = steps[place]
            if step not in read:
                read[step], left_out = _read_step(run, number_of_run, step)
                num_left_out += left_out
            if turn < len(read[step]):
                yield read[step][turn]
    if num_left_out:
        run.notes.append(f"{num_left_out} groups: at most {_GROUPS_OF_A_STEP} of a step are here.")


def _spread(size: int) -> list[int]:
    """0 to size - 1: the last, the first, the middle, then between, by the bits of the number reversed."""
    bits = max(size - 1, 1).bit_length()
    order = sorted(range(size), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return [size - 1, *(i for i in order if i != size - 1)] if size else []


def _read_step(run: Run, number_of_run: int, step: int) -> tuple[list[Group], int]:
    """The groups of a step, and how many more it has."""
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(run.completions[step])
        columns = {name: table.column(name) for name in table.column_names}
        prompts = [_text(value.as_py()) for value in columns.pop("prompt")]
        is_complete = bool(prompts) and "completion" in columns
    except Exception:  # of the file system and Arrow
        is_complete = False
    if not is_complete:
        run.notes.append(f"{run.completions[step].name} is no complete table of prompts and completions: left out.")
        return [], 0
    size = run.about.get("recipe", {}).get("num_generations")
    bounds = _bounds(prompts, size if isinstance(size, int) and size > 0 else None)
    num_left_out = max(len(bounds) - _GROUPS_OF_A_STEP, 0)
    if num_left_out:
        places = _spread(len(bounds))[:_GROUPS_OF_A_STEP]
        bounds = [bounds[place] for place in places]
    groups = []
    for start, end in bounds:
        values = {name: column.slice(start, end - start).to_pylist() for name, column in columns.items()}
        rows = [_row(run, {name: cells[i] for name, cells in values.items()}) for i in range(end - start)]
        groups.append(Group(number_of_run, step, prompts[start], rows, _kinds(rows, run)))
    return groups, num_left_out


def _bounds(prompts: list[str], size: int | None) -> list[tuple[int, int]]:
    """First row of each group, and the one behind it: rows of a group follow each other and have one prompt."""
    bounds, start = [], 0
    for _, same in groupby(prompts):
        length = len(list(same))
        step = size if size and length % size == 0 else length
        bounds += [(first, first + step) for first in range(start, start + length, step)]
        start += length
    return bounds


def _row(run: Run, cells: dict[str, Any]) -> Row:
    rewards = {name: number(cells[name]) for name in run.reward_names if name in cells}
    weights = run.about.get("reward_weights", {})
    given = [value * weights.get(name, 1.0) for name, value in rewards.items() if value is not None]
    tokens, truncated = cells.get("tokens"), cells.get("truncated")
    return Row(
        text=_text(cells["completion"]),
        source=str(cells.get("source") or "rollout"),
        rewards=rewards,
        reward=sum(given) if given else None,
        advantage=number(cells.get("advantage")),
        tokens=int(tokens) if number(tokens) is not None else None,
        truncated=truncated if isinstance(truncated, bool) else None,
    )


def _kinds(rows: list[Row], run: Run) -> list[str]:
    """As `on_policy/solve_none` and `on_policy/solve_all` have it: of rollouts that are scored."""
    rollouts = [row for row in rows if row.source not in _GIVEN]
    scored = [row for row in rollouts if row.reward is not None]
    weights = run.about.get("reward_weights", {})
    full = [sum(weights.get(name, 1.0) for name, value in row.rewards.items() if value is not None) for row in scored]
    kinds = []
    if scored and all(row.reward <= 0 for row in scored):
        kinds.append("none")
    if scored and all(row.reward >= best > 0 for row, best in zip(scored, full, strict=True)):
        kinds.append("all")
    if len({row.reward for row in scored}) > 1:
        kinds.append("differs")
    if any(row.truncated for row in rollouts):
        kinds.append("truncated")
    return kinds


def _calls(message: dict[str, Any]) -> str:
    """The tool calls of a message, whose arguments are an object or a JSON text."""
    shown = []
    for call in message.get("tool_calls") or []:
        function = (call.get("function") or call) if isinstance(call, dict) else {}
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(without_none(arguments or {}), default=str)
        shown.append(f"\n[{function.get('name')}({arguments})]")
    return "".join(shown)


def _text(value: Any) -> str:
    """A prompt or completion as text; of messages, each behind its role."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "assistant":
            return _text(value[0].get("content")) + _calls(value[0])
        parts = [
            f"{item.get('role', '')}: {_text(item.get('content', item.get('text')))}{_calls(item)}"
            if isinstance(item, dict) and "role" in item
            else _text(item.get("text") if isinstance(item, dict) else item)
            for item in value
        ]
        return "\n".join(parts)
    return "" if value is None else str(value)
