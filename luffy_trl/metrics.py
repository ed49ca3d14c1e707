# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Metrics of mixed batches: sums over micro-batches and processes, and formulas over rollouts alone."""

from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from trl.trainer.utils import nanmax, nanmin


# Every process must know all names: one that has seen no demonstration takes part in their sums.
_MEANS = (
    "demonstrations/dropped",
    "demonstrations/loss",
    "demonstrations/prob",
    "demonstrations/ratio",
    "demonstrations/fraction",
    "on_policy/loss",
    # TRL's own, with `length_aware_batching`
    "entropy",
    "kl",
    "policy_loss",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
)


class RunningMetrics:
    """
    Metrics that are summed where they arise, and reduced over processes and divided once, when they are logged: so
    micro-batches and processes weigh as much as they hold, and nothing waits for a number.

    Args:
        device (`torch.device`):
            Where the sums are kept.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, torch.Tensor] = {}
        self.clear()

    def clear(self):
        """Forgets everything."""
        self.sums = defaultdict(lambda: torch.zeros(2, device=self.device))
        self.clip_extremes = torch.full((2,), torch.nan, device=self.device)

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float):
        """
        Adds to a mean.

        Args:
            name (`str`):
                Name of the metric.
            total (`torch.Tensor` or `float`):
                Sum of its values.
            count (`torch.Tensor` or `float`):
                How many they are.
        """
        self.sums[name] = self.sums[name] + torch.stack(
            [torch.as_tensor(value, dtype=torch.float32, device=self.device).detach() for value in (total, count)]
        )

    def add_tokens(self, name: str, values: torch.Tensor, mask: torch.Tensor):
        """
        Adds the values of tokens to a mean.

        Args:
            name (`str`):
                Name of the metric.
            values (`torch.Tensor`):
                A value for each token, of shape `(B, T)`.
            mask (`torch.Tensor`):
                Which of them count, of shape `(B, T)`.
        """
        self.add(name, (values.detach() * mask).sum(), mask.sum())

    def add_clip_extremes(self, extremes: torch.Tensor):
        """
        Adds to `clip_ratio/low_min` and `clip_ratio/high_max`.

        Args:
            extremes (`torch.Tensor`):
                The two of a micro-batch, of shape `(2,)`; NaN where it has no rollout.
        """
        (low, high), (new_low, new_high) = self.clip_extremes, extremes
        self.clip_extremes = torch.stack([torch.fmin(low, new_low), torch.fmax(high, new_high)])

    def collect(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Divides what has been summed on all processes, which must call this together, and begins anew.

        Args:
            accelerator ([`~accelerate.Accelerator`]):
                Of the trainer.

        Returns:
            `dict[str, float]`: The metrics, without those that nothing was added to.
        """
        totals = accelerator.reduce(torch.stack([self.sums[name] for name in _MEANS]), "sum").tolist()
        extremes = accelerator.gather(self.clip_extremes).view(-1, 2)
        extremes = {
            "clip_ratio/low_min": nanmin(extremes[:, 0]).item(),
            "clip_ratio/high_max": nanmax(extremes[:, 1]).item(),
        }
        self.clear()
        means = {name: total / count for name, (total, count) in zip(_MEANS, totals, strict=True) if count > 0}
        return means | {name: value for name, value in extremes.items() if value == value}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"sums": dict(self.sums), "clip_extremes": self.clip_extremes}

    def load_state_dict(self, state: dict[str, Any]):
        """Goes on from a checkpoint."""
        state = send_to_device(state, self.device)
        self.sums.update(state["sums"])
        self.clip_extremes = state["clip_extremes"]


def describe_lengths(lengths: torch.Tensor, is_truncated: torch.Tensor) -> dict[str, float]:
    """
    TRL's metrics of the length of completions, by its formulas.

    Args:
        lengths (`torch.Tensor`):
            Tokens of each completion, of shape `(N,)`.
        is_truncated (`torch.Tensor`):
            Whether it does not end by itself, of shape `(N,)`.

    Returns:
        `dict[str, float]`: `completions/clipped_ratio`, and the mean, least and greatest length of all and of those
        that end by themselves.
    """
    lengths = lengths.float()
    terminated = lengths[~is_truncated] if not is_truncated.all() else torch.zeros(1)
    metrics = {"completions/clipped_ratio": is_truncated.float().mean().item()}
    for kind, values in (("", lengths), ("terminated_", terminated)):
        metrics[f"completions/mean_{kind}length"] = values.mean().item()
        metrics[f"completions/min_{kind}length"] = values.min().item()
        metrics[f"completions/max_{kind}length"] = values.max().item()
    return metrics


def describe_groups(
    rollout_rewards: torch.Tensor, full_rewards: torch.Tensor, num_generations: int
) -> dict[str, float]:
    """
    Shares of groups in which all rollouts, or none, solve their problem.

    Args:
        rollout_rewards (`torch.Tensor`):
            Reward of each row, of shape `(N,)`; NaN where it is no rollout, or nothing scores it.
        full_rewards (`torch.Tensor`):
            What a row earns that gets 1 from each reward function that applies to it, of shape `(N,)`.
        num_generations (`int`):
            G, rows of a group.

    Returns:
        `dict[str, float]`: `on_policy/solve_all` and `on_policy/solve_none`, or nothing where no rollout was scored.
    """
    is_silent = rollout_rewards.isnan().view(-1, num_generations)
    # Where all reward weights are 0, nothing can be solved
    is_solved = (rollout_rewards >= full_rewards) & (full_rewards > 0)
    has_solved = is_solved.view(-1, num_generations) | is_silent
    has_failed = ~(rollout_rewards > 0).view(-1, num_generations) | is_silent
    is_scored = ~is_silent.all(dim=1)
    if not is_scored.any():
        return {}
    return {
        "on_policy/solve_all": has_solved.all(dim=1)[is_scored].float().mean().item(),
        "on_policy/solve_none": has_failed.all(dim=1)[is_scored].float().mean().item(),
    }


def describe_sampling(batch: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, float]:
    """
    TRL's metrics of the difference between vLLM and the policy, over rollout tokens of all processes.

    Args:
        batch (`dict[str, torch.Tensor]`):
            The generation batch: `completion_mask`, `demonstration_mask`, `old_per_token_logps`,
            `sampling_per_token_logps` of shape `(B, T)`, `importance_sampling_ratio` of shape `(B, T)` or `(B, 1)`.
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer. All processes must call this together.

    Returns:
        `dict[str, float]`: `sampling/sampling_logp_difference/mean`, and the mean, least and greatest of
        `sampling/importance_sampling_ratio`.
    """
    is_rollout = batch["completion_mask"].bool() & ~batch["demonstration_mask"]
    delta = torch.abs(batch["old_per_token_logps"] - batch["sampling_per_token_logps"])
    delta = delta[is_rollout & ~delta.isnan()]
    ratio = batch["importance_sampling_ratio"]
    ratio = ratio[is_rollout.any(dim=1)].flatten() if ratio.size(1) == 1 else ratio[is_rollout]
    sums = [torch.stack([values.sum(), values.new_tensor(values.numel())]) for values in (delta, ratio)]
    (delta_sum, num_deltas), (ratio_sum, num_ratios) = accelerator.reduce(torch.stack(sums), "sum").tolist()
    nan = ratio.new_tensor([torch.nan, torch.nan])
    extremes = accelerator.gather(torch.stack(ratio.aminmax()) if ratio.numel() else nan).view(-1, 2)
    return {
        "sampling/sampling_logp_difference/mean": delta_sum / max(num_deltas, 1),
        "sampling/importance_sampling_ratio/mean": ratio_sum / max(num_ratios, 1),
        "sampling/importance_sampling_ratio/min": nanmin(extremes[:, 0]).item(),
        "sampling/importance_sampling_ratio/max": nanmax(extremes[:, 1]).item(),
    }
