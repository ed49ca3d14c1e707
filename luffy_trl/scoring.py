# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Each completion is scored once.

TRL calls a reward function with all rows of a process. A wrapper calls the user's function for those rows that have no
score yet: where rollouts of failed groups were replaced, or traces were scored before. Reward models are called by TRL
itself, with all rows each time.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from trl.trainer.utils import is_async_callable

from .checks import reward_name
from .groups import MixedBatch


def score_once(reward_func: Callable | nn.Module, number: int, get_batch: Callable[[], MixedBatch | None]) -> Callable:
    """
    Wraps reward function `number` so that it is called only for the rows of the batch without a score. A model is
    returned as it is.
    """
    if isinstance(reward_func, nn.Module):
        return reward_func

    def before(kwargs: dict[str, Any]) -> tuple[MixedBatch, list[int], dict[str, Any]]:
        batch = get_batch()
        rows = [i for i, scores in enumerate(batch.scores) if number not in scores]

        def log_extra(column: str, values: list):
            logged = batch.extra_logs.setdefault(column, [None] * len(batch.scores))
            for i, value in zip(rows, values, strict=True):
                logged[i] = value

        selected = {
            name: [values[i] for i in rows]
            if isinstance(values, list) and len(values) == len(batch.scores)
            else values
            for name, values in kwargs.items()
        }
        return batch, rows, {**selected, "log_extra": log_extra}

    def after(batch: MixedBatch, rows: list[int], rewards: Iterable) -> list:
        rewards, name = list(rewards), reward_name(reward_func)
        if len(rewards) != len(rows):
            # TRL, which counts all rows, could not tell
            raise ValueError(
                f"The reward function '{name}' returned {len(rewards)} rewards, but {len(rows)} were expected."
            )
        for i, reward in zip(rows, rewards, strict=True):
            if isinstance(reward, str) or (reward is not None and math.isinf(reward)):
                raise ValueError(
                    f"The reward function `{name}` returned {reward!r}. A reward is a finite number, or None."
                )
            batch.scores[i][number] = reward
        return [scores[number] for scores in batch.scores]

    if is_async_callable(reward_func):

        @functools.wraps(reward_func)
        async def scored_once(**kwargs):
            batch, rows, selected = before(kwargs)
            return after(batch, rows, await reward_func(**selected) if rows else [])
    else:

        @functools.wraps(reward_func)
        def scored_once(**kwargs):
            batch, rows, selected = before(kwargs)
            return after(batch, rows, reward_func(**selected) if rows else [])

    return scored_once
