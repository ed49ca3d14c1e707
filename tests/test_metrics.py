# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Metrics of mixed batches, by hand. That they are right over processes is in test_luffy_trainer.py."""

import pytest
import torch
from accelerate import Accelerator

from luffy_trl.metrics import RunningMetrics, describe_groups, describe_lengths, describe_sampling


NAN = torch.nan


def test_means_weigh_by_tokens():
    metrics = RunningMetrics(torch.device("cpu"))
    metrics.add_tokens("entropy", torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1, 1, 0]]))
    metrics.add_tokens("entropy", torch.tensor([[6.0]]), torch.tensor([[True]]))
    metrics.add_tokens("kl", torch.tensor([[6.0]]), torch.tensor([[0]]))
    metrics.add("demonstrations/dropped", 3, 2.0)
    for low, high in ((NAN, NAN), (0.5, 0.25), (0.75, 0.125)):
        metrics.add_min("clip_ratio/low_min", torch.tensor(low))
        metrics.add_max("clip_ratio/high_max", torch.tensor(high))
    metrics.add_max("nothing", torch.tensor(NAN))

    resumed = RunningMetrics(torch.device("cpu"))
    resumed.load_state_dict(metrics.state_dict())
    for each in (metrics, resumed):
        assert each.collect(Accelerator(cpu=True)) == {
            "demonstrations/dropped": 1.5,
            "entropy": 3.0,  # (1 + 2 + 6) / 3, and not the mean of 1.5 and 6
            "clip_ratio/low_min": 0.5,
            "clip_ratio/high_max": 0.25,
        }
        assert each.collect(Accelerator(cpu=True)) == {}


def test_sums_of_version_0_1():
    metrics = RunningMetrics(torch.device("cpu"))
    state = {"sums": {"entropy": torch.tensor([9.0, 3.0])}, "clip_extremes": torch.tensor([0.5, NAN])}
    metrics.load_state_dict(state)
    assert metrics.collect(Accelerator(cpu=True)) == {"entropy": 3.0, "clip_ratio/low_min": 0.5}


@pytest.mark.parametrize(
    ("is_truncated", "terminated"), [([True, False, False], (4.0, 2.0, 6.0)), ([True] * 3, (0.0, 0.0, 0.0))]
)
def test_lengths(is_truncated, terminated):
    metrics = describe_lengths(torch.tensor([7, 2, 6]), torch.tensor(is_truncated))
    assert metrics == {
        "completions/clipped_ratio": pytest.approx(sum(is_truncated) / 3),
        "completions/mean_length": 5.0,
        "completions/min_length": 2.0,
        "completions/max_length": 7.0,
        "completions/mean_terminated_length": terminated[0],
        "completions/min_terminated_length": terminated[1],
        "completions/max_terminated_length": terminated[2],
    }


def test_groups():
    # All solved beside a demonstration; one of two; none; nothing scored; a failure beside rows that nothing scores
    rewards = torch.tensor([NAN, 1.0, 1.0, 1.0, 0.5, 0.0, -1.0, 0.0, 0.0, NAN, NAN, NAN, NAN, 0.0, NAN])
    full = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    assert describe_groups(rewards, full, 3) == {"on_policy/solve_all": 0.25, "on_policy/solve_none": 0.5}
    # Reward weights of 0: nothing is earned, and so nothing is solved
    none_solved = {"on_policy/solve_all": 0.0, "on_policy/solve_none": 1.0}
    assert describe_groups(torch.zeros(4), torch.zeros(4), 2) == none_solved
    assert describe_groups(torch.tensor([NAN, NAN]), torch.zeros(2), 2) == {}


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ([[0.5, 2.0], [9.0, 9.0], [4.0, 7.0]], (6.5 / 3, 0.5, 4.0)),  # one for each token
        ([[0.5], [9.0], [4.0]], (2.25, 0.5, 4.0)),  # one for each sequence
    ],
)
def test_sampling(ratio, expected):
    batch = {
        "completion_mask": torch.tensor([[1, 1], [1, 1], [1, 0]]),
        "demonstration_mask": torch.tensor([[False, False], [True, True], [False, False]]),
        "old_per_token_logps": torch.tensor([[-1.0, -2.0], [0.0, 0.0], [-3.0, 5.0]]),
        "sampling_per_token_logps": torch.tensor([[-1.5, NAN], [7.0, 7.0], [-2.0, 0.0]]),
        "importance_sampling_ratio": torch.tensor(ratio),
    }
    assert describe_sampling(batch, Accelerator(cpu=True)) == {
        "sampling/sampling_logp_difference/mean": 0.75,  # of 0.5 and 1; NaN is left out
        "sampling/importance_sampling_ratio/mean": pytest.approx(expected[0]),
        "sampling/importance_sampling_ratio/min": expected[1],
        "sampling/importance_sampling_ratio/max": expected[2],
    }
