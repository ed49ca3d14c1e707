# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Metrics of mixed batches: sums over micro-batches and processes, and formulas over rollouts alone."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from trl.trainer.utils import nanmax, nanmin, nanstd

from .groups import MixedBatch
from .losses import TokenBatch, loss_mask


logger = get_logger(__name__)

_MANY = 4  # demonstrations of a batch of which not one earns a reward, before it is said


class RunningMetrics:
    """
    Metrics that are summed where they arise, and reduced over processes and divided once, when they are logged: so
    micro-batches and processes are weighted by what they hold, and nothing waits for a number.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self):
        """Forgets everything."""
        self.sums: dict[str, torch.Tensor] = {}
        self.minima: dict[str, torch.Tensor] = {}
        self.maxima: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float):
        """Adds the sum of some values, and how many they are, to a mean."""
        added = torch.stack(
            [torch.as_tensor(value, dtype=torch.float32, device=self.device).detach() for value in (total, count)]
        )
        self.sums[name] = self.sums[name] + added if name in self.sums else added

    def add_tokens(self, name: str, values: torch.Tensor, mask: torch.Tensor):
        """Adds the values of tokens to a mean, where a mask is 1; both of shape `(B, T)`."""
        self.add(name, (values.detach() * mask).sum(), mask.sum())

    def add_min(self, name: str, value: torch.Tensor):
        """Lowers a minimum; NaN is no value."""
        self.minima[name] = torch.fmin(self.minima.get(name, value), value)

    def add_max(self, name: str, value: torch.Tensor):
        """Raises a maximum; NaN is no value."""
        self.maxima[name] = torch.fmax(self.maxima.get(name, value), value)

    def collect(self, accelerator: Accelerator) -> dict[str, float]:
        """Reduces over all processes, which call this together, and begins again; without what has no value."""
        kinds = [self.sums, self.minima, self.maxima]
        names = gather_object([[list(kind) for kind in kinds]])
        sums, minima, maxima = (sorted({name for own in names for name in own[kind]}) for kind in range(3))
        metrics: dict[str, float] = {}
        if sums:
            nothing = torch.zeros(2, device=self.device)
            totals = accelerator.reduce(torch.stack([self.sums.get(name, nothing) for name in sums]), "sum").tolist()
            metrics |= {name: total / count for name, (total, count) in zip(sums, totals, strict=True) if count > 0}
        nothing = torch.full((), torch.nan, device=self.device)
        for extremes, own, reduce in ((minima, self.minima, nanmin), (maxima, self.maxima, nanmax)):
            for name in extremes:
                value = reduce(accelerator.gather(own.get(name, nothing).reshape(1))).item()
                if value == value:
                    metrics[name] = value
        self.clear()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"sums": self.sums, "minima": self.minima, "maxima": self.maxima}

    def load_state_dict(self, state: dict[str, Any]):
        """Goes on from a checkpoint."""
        state = send_to_device(state, self.device)
        self.sums = dict(state["sums"])
        self.minima, self.maxima = dict(state.get("minima", {})), dict(state.get("maxima", {}))
        if "clip_extremes" in state:  # of version 0.1
            self.minima["clip_ratio/low_min"], self.maxima["clip_ratio/high_max"] = state["clip_extremes"]


def add_micro_batch(
    metrics: RunningMetrics,
    inputs: dict[str, Any],
    tokens: TokenBatch,
    stats: dict[str, Any],
    accelerator: Accelerator,
    mode: str,
) -> dict[str, float]:
    """
    Adds the metrics of a micro-batch, and returns those that are not summed: numbers that the loss has given, and, of
    one of TRL's micro-batches, TRL's own metrics over rollout tokens.
    """
    mask, demonstration_mask, rollout_mask = tokens.mask, tokens.demonstration_mask, tokens.rollout_mask
    if mode == "train":
        demonstration_loss = stats.get("demonstration_loss", stats["loss"])
        metrics.add_tokens("demonstrations/loss", demonstration_loss, demonstration_mask)
        metrics.add_tokens("demonstrations/prob", tokens.logps.exp(), demonstration_mask)
        metrics.add_tokens("demonstrations/ratio", stats["coefficient"], demonstration_mask)
        metrics.add_tokens("demonstrations/fraction", demonstration_mask, mask)
        metrics.add_tokens("on_policy/loss", stats["loss"], rollout_mask)
    numbers = {name: value for name, value in stats.items() if isinstance(value, float)}
    if "num_sequences" not in inputs:
        return numbers | reduce_rollout_means(tokens, stats, accelerator)
    # Micro-batches are of unlike size
    if "policy_loss" in stats:
        metrics.add("policy_loss", stats["policy_loss"], mask.size(0) / inputs["num_sequences"])
    for name, values in rollout_means(tokens, stats).items():
        metrics.add_tokens(name, values, rollout_mask)
    low, high = clip_extremes(tokens, stats)
    metrics.add_min("clip_ratio/low_min", low)
    metrics.add_max("clip_ratio/high_max", high)
    return numbers


def rollout_means(tokens: TokenBatch, stats: dict[str, Any]) -> dict[str, torch.Tensor]:
    """TRL's metrics of a micro-batch that are means over rollout tokens, of shape `(B, T)`."""
    low, high = stats["low_clipped"], stats["high_clipped"]
    return {
        "entropy": tokens.entropies,
        **({"kl": stats["kl"]} if "kl" in stats else {}),
        "clip_ratio/low_mean": low.float(),
        "clip_ratio/high_mean": high.float(),
        "clip_ratio/region_mean": (low | high).float(),
    }


def clip_extremes(tokens: TokenBatch, stats: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimum of `clip_ratio/low` and the maximum of `clip_ratio/high` over rows; NaN without rollouts."""
    mask = tokens.rollout_mask
    # NaN for a demonstration, and left out. Processes may hold different numbers of rows.
    lows, highs = ((stats[name] * mask).sum(-1) / mask.sum(-1) for name in ("low_clipped", "high_clipped"))
    return nanmin(lows), nanmax(highs)


def reduce_rollout_means(tokens: TokenBatch, stats: dict[str, Any], accelerator: Accelerator) -> dict[str, float]:
    """TRL's metrics of one of its micro-batches, over the rollout tokens of all processes."""
    metrics = {}
    if "policy_loss" in stats:
        metrics["policy_loss"] = accelerator.gather(stats["policy_loss"]).nanmean().item()
    means, rollout_mask, mask = rollout_means(tokens, stats), tokens.rollout_mask, tokens.mask
    extremes = torch.stack(clip_extremes(tokens, stats))
    sums = [(values.detach() * rollout_mask).sum() for values in means.values()]
    counts = [rollout_mask.sum().float(), mask.sum().float()]
    *totals, num_rollout_tokens, num_tokens = accelerator.reduce(torch.stack([*sums, *counts]), "sum")
    if num_rollout_tokens == 0 and num_tokens > 0:
        return metrics  # only demonstrations in this micro-batch, on any process
    extremes = accelerator.gather(extremes).view(-1, 2)
    return {
        **metrics,
        **{
            name: (total / num_rollout_tokens.clamp(min=1.0)).item() for name, total in zip(means, totals, strict=True)
        },
        "clip_ratio/low_min": nanmin(extremes[:, 0]).item(),
        "clip_ratio/high_max": nanmax(extremes[:, 1]).item(),
    }


def describe_batch(batch: MixedBatch, rewards: torch.Tensor, reward_weights: torch.Tensor) -> dict[str, float]:
    """
    Metrics of a generation batch that every process computes from what was gathered already: rewards and lengths of
    demonstrations, how many groups are solved, and what the sources have added.
    """
    metrics = dict(batch.metrics)
    if batch.is_mixed:
        metrics["demonstrations/reward"] = rewards[batch.is_demonstration].nanmean().item()
        metrics["demonstrations/length"] = batch.acted_lengths[batch.is_demonstration].float().mean().item()
        num_shown = int(batch.is_demonstration.sum())
        if num_shown >= _MANY and not (rewards > 0)[batch.is_demonstration].any():
            logger.warning_once(
                f"None of the {num_shown} demonstrations of a generation batch earns a reward: the policy learns to "
                "avoid them. See why with `luffy inspect`; most often the reward wants a form of answer that the "
                "traces do not have."
            )
    # A rollout solves its problem where it earns 1 from each reward function that applies to it. Rows that no
    # function scores have no say.
    full = full_rewards(batch.rollout_rewards, reward_weights)
    rollout_rewards = weighted_sum(batch.rollout_rewards, reward_weights)
    return metrics | describe_groups(rollout_rewards, full, batch.num_generations)


def describe_rollout_rewards(batch: MixedBatch, reward_weights: torch.Tensor) -> dict[str, float]:
    """TRL's `frac_reward_zero_std`, over rollouts."""
    groups = weighted_sum(batch.rollout_rewards, reward_weights).view(-1, batch.num_generations)
    is_single = (~groups.isnan()).sum(dim=1) == 1  # a single rollout does not differ from itself
    std = nanstd(groups, dim=1).masked_fill(is_single, 0.0)
    return {"frac_reward_zero_std": torch.isclose(std, torch.zeros_like(std)).float().mean().item()}


def weighted_sum(rewards_per_func: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The reward of each row, of shape `(N,)`, from those of shape `(N, F)`; NaN for a row that none applies to."""
    rewards = (rewards_per_func * weights.to(rewards_per_func.device).unsqueeze(0)).nansum(dim=1)
    return rewards.masked_fill(torch.isnan(rewards_per_func).all(dim=1), torch.nan)


def full_rewards(rewards_per_func: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What a row earns, of shape `(N,)`, that gets 1 from each reward function that applies to it."""
    return (~rewards_per_func.isnan() * weights.to(rewards_per_func.device)).sum(dim=1)


def is_solved(rewards: torch.Tensor, full_rewards: torch.Tensor) -> torch.Tensor:
    """Which rows earn their full reward, of shape `(N,)`. Where all reward weights are 0, nothing can be solved."""
    return (rewards >= full_rewards) & (full_rewards > 0)


def solves(rewards_per_func: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Which rows earn full reward, of shape `(N,)`, from the rewards of shape `(N, F)`."""
    return is_solved(weighted_sum(rewards_per_func, weights), full_rewards(rewards_per_func, weights))


def describe_rollouts(
    completion_ids: list[list[int]], tool_mask: list[list[int]] | None, ends: set[int], batch: MixedBatch
) -> dict[str, float]:
    """TRL's metrics of the length of completions, over the rollouts of all processes; answers of tools are no part."""
    lengths = [sum(mask) for mask in tool_mask] if tool_mask is not None else map(len, completion_ids)
    described = torch.tensor(
        [[length, ids[-1] not in ends] for length, ids in zip(lengths, completion_ids, strict=True)]
    )
    described = batch.accelerator.gather(described.to(batch.accelerator.device))[~batch.is_demonstration]
    return describe_lengths(described[:, 0], described[:, 1].bool())


def describe_completions(completion_ids: list[list[int]], ends: set[int], batch: MixedBatch) -> dict[str, list]:
    """Columns of the completions table, with B values: the tokens of each, and whether it is a rollout without end."""
    return {
        "tokens": [len(ids) for ids in completion_ids],
        "truncated": [
            not given and not ends.intersection(ids[-1:])
            for ids, given in zip(completion_ids, batch.is_given, strict=True)
        ],
    }


def describe_lengths(lengths: torch.Tensor, is_truncated: torch.Tensor) -> dict[str, float]:
    """TRL's metrics of the length of completions, by its formulas: of all, and of those that end by themselves."""
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
    Shares of groups in which all rollouts, or none, solve their problem; nothing where no rollout was scored. A reward
    is NaN where a row is no rollout, or no function scores it.
    """
    is_silent = rollout_rewards.isnan().view(-1, num_generations)
    has_solved = is_solved(rollout_rewards, full_rewards).view(-1, num_generations) | is_silent
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
    TRL's metrics of the difference between vLLM and the policy, over rollout tokens of all processes, which call this
    together.
    """
    is_rollout = loss_mask(batch).bool() & ~batch["demonstration_mask"]
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
