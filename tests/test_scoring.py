# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Each completion is scored once: the wrapper of a reward function, without a trainer."""

import asyncio
import functools

import pytest
from accelerate import Accelerator

from luffy_trl.groups import Caches, MixedBatch
from luffy_trl.scoring import score_once


def make_batch(known):
    """A batch of four rows, some of which the reward function with number 0 has scored."""
    batch = MixedBatch([{}] * 4, 4, Accelerator(cpu=True), Caches())
    for row, reward in known.items():
        batch.scores[row][0] = reward
    return batch


def call(reward_func, batch):
    wrapped = score_once(reward_func, 0, lambda: batch)
    return wrapped(completions=["a", "b", "c", "d"], answer=[1, 2, 3, 4], trainer_state="state")


def test_a_function_is_called_for_rows_without_a_score():
    calls = []

    def reward(completions, answer, trainer_state, log_extra):
        calls.append((completions, answer, trainer_state))
        log_extra("seen", completions)
        return (float(gold) for gold in answer)  # TRL takes whatever can be iterated over

    batch = make_batch({1: 0.5})
    assert call(reward, batch) == [1.0, 0.5, 3.0, 4.0] == call(reward, batch)
    assert calls == [(["a", "c", "d"], [1, 3, 4], "state")]
    assert batch.extra_logs == {"seen": ["a", None, "c", "d"]}


def test_an_async_function():
    async def reward(completions, answer, **kwargs):
        return [None if gold == 4 else float(gold) for gold in answer]

    assert asyncio.run(call(reward, make_batch({0: 7.0}))) == [7.0, 2.0, 3.0, None]


@pytest.mark.parametrize("number", [1, 4])
def test_another_number_of_rewards(number):
    """As many as there are rows in all would be taken for those of all rows."""

    def reward(completions, **kwargs):
        return [1.0] * number

    message = rf"The reward function 'reward' returned {number} rewards, but 3 were expected"
    with pytest.raises(ValueError, match=message):
        call(functools.partial(reward), make_batch({1: 0.5}))
