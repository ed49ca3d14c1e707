# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
The comparison's second task: sorting digits by selection, which the warm model does carelessly.

A problem is a row of digits such as `7351=`. A trace takes out the least digit, again and again, each time writing out
what is left:

```text
7351=<think>1=735;3=75;5=7;7=</think>\\boxed{1357}
```

The quickstart's model holds a skill and never uses it: its success is 0. This one knows what to do, and slips: in
longer rows its warm-up took any digit instead of the least one at many of the steps. It solves a few in a hundred, and
its own rollouts can teach it.
"""

import random
from dataclasses import dataclass

from datasets import Dataset, DatasetDict
from task import EOS_TOKEN, format_completion, format_prompt


EASY_LENGTHS = (2, 3, 4)
HARD_LENGTHS = (6,)
LONGER_LENGTHS = (7, 8)


@dataclass(frozen=True)
class WarmUpConfig:
    """
    Settings of the warm-up; those of `prepare.WarmUpConfig` but for the last.

    Args:
        seed (`int`): Seed of the data, of the initial weights and of the warm-up.
        num_steps (`int`, *optional*, defaults to `2000`): Number of optimizer steps.
        tokens_per_batch (`int`, *optional*, defaults to `1200`): Number of tokens per step.
        learning_rate (`float`, *optional*, defaults to `3e-3`): Peak learning rate; it decays linearly.
        slip_probability (`float`, *optional*, defaults to `0.7`):
            Probability that a step of a long row takes any digit that is left instead of the least one.
    """

    seed: int
    num_steps: int = 2000
    tokens_per_batch: int = 1200
    learning_rate: float = 3e-3
    slip_probability: float = 0.7


def select(digits: str, rng: random.Random, slip_probability: float = 0.0) -> tuple[list[str], str]:
    """
    Sorts a row of digits by selection.

    Args:
        digits (`str`): The row, such as `"7351"`.
        rng (`random.Random`): Source of slips.
        slip_probability (`float`, *optional*, defaults to `0.0`): Probability of taking any digit at a step.

    Returns:
        `tuple[list[str], str]`: One line for each step, such as `"1=735"`, and the digits in the order taken.
    """
    lines, taken = [], ""
    while digits:
        digit = rng.choice(digits) if rng.random() < slip_probability else min(digits)
        digits = digits.replace(digit, "", 1)
        taken += digit
        lines.append(f"{digit}={digits}")
    return lines, taken


def sample_row(rng: random.Random, length: int, is_repeated: bool) -> str:
    """Draws a row of distinct digits, or one in which at least one digit occurs twice."""
    digits = rng.sample("0123456789", length)
    if is_repeated:
        first, second = rng.sample(range(length), 2)
        digits[first] = digits[second]
    return "".join(digits)


def sample_document(rng: random.Random, config: WarmUpConfig) -> tuple[str, str]:
    """Draws a document of the warm-up: a short row that is sorted, or a longer one that is sorted with slips."""
    is_hard = rng.random() < 0.6
    length = rng.randint(max(EASY_LENGTHS) + 1, max(LONGER_LENGTHS)) if is_hard else rng.choice(EASY_LENGTHS)
    row = sample_row(rng, length, is_repeated=rng.random() < 0.3)
    lines, answer = select(row, rng, config.slip_probability if is_hard else 0.0)
    return format_prompt(row), format_completion(lines, answer) + EOS_TOKEN


def make_splits(seed: int, num_problems: int = 256) -> DatasetDict:
    """
    Builds the splits of the task. No problem is in two of them.

    - `train`: rows of six distinct digits, each with one demonstration
    - `held_out`: further rows of that kind
    - `longer`: seven or eight distinct digits
    - `repeated`: six digits, at least two of them equal, which no demonstration shows
    - `easy`: rows that the warm-up solves

    Args:
        seed (`int`): Seed of the draw; the same seed gives the same splits.
        num_problems (`int`, *optional*, defaults to `256`): Number of problems per split.

    Returns:
        [`~datasets.DatasetDict`]: Splits with the columns `prompt` (`str`) and `answer` (`str`); `train` also has
        `demonstrations` (`list[str]`).
    """
    rng, drawn = random.Random(seed), set()
    kinds = {
        "train": (HARD_LENGTHS, False),
        "held_out": (HARD_LENGTHS, False),
        "longer": (LONGER_LENGTHS, False),
        "repeated": (HARD_LENGTHS, True),
        "easy": (EASY_LENGTHS, False),
    }
    splits = {}
    for name, (lengths, is_repeated) in kinds.items():
        rows = []
        while len(rows) < num_problems:
            row = sample_row(rng, rng.choice(lengths), is_repeated)
            if row not in drawn:
                drawn.add(row)
                rows.append(row)
        splits[name] = {
            "prompt": [format_prompt(row) for row in rows],
            "answer": ["".join(sorted(row)) for row in rows],
        }
        if name == "train":
            splits[name]["demonstrations"] = [[format_completion(*select(row, rng))] for row in rows]
    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in splits.items()})
