# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
A method of training on demonstrations and rollouts: where demonstrations come from, when they are shown, what rewards
are compared with, and what is minimised.

| recipe | source | when | baseline | objective |
| --- | --- | --- | --- | --- |
| `qwen2.5_math_7b` (LUFFY) | traces of the row | always | group | policy gradient, shaped |
| `luffy_on_failure` | traces of the row | groups that fail | group | policy gradient, shaped |
| `mixed_no_shaping` | traces of the row | always | group | policy gradient |
| `rl_with_sft_loss` | traces of the row | always | rollouts | policy gradient on rollouts, cross-entropy |
| `chord` | traces of the row | always | rollouts | the same, interpolated, weighted by p (1 - p) |
| `grpo_baseline` | none | - | group | policy gradient, clipped |
"""

from dataclasses import dataclass
from typing import Any

import torch

from .losses import CrossEntropy, KLPenalty, Objective, PolicyGradient, Shaping, Term
from .luffy_config import LuffyConfig
from .sources.dataset import DatasetSource


# Options that the demonstrations and advantages of a generation batch depend on
OPTIONS_OF_A_METHOD = (
    "advantage_baseline",
    "rollout_advantage_weight",
    "num_demonstrations",
    "demonstration_policy",
    "failure_threshold",
    "demonstration_probability",
    "demonstration_overflow",
    "demonstration_advantage_weight",
    "prefix_ratio_min",
    "prefix_ratio_max",
    "prefix_schedule",
    "prefix_schedule_steps",
)


@dataclass(frozen=True)
class OnFailure:
    """
    Demonstrations are shown where the rollouts of a group fail.

    Args:
        threshold (`float`):
            A group fails where the mean reward of its rollouts is not above this.
    """

    threshold: float

    def __call__(self, rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
        """Which of N rows are in a group that fails, from their rewards; both of shape `(N,)`."""
        mean_rewards = rewards.view(-1, num_generations).nanmean(dim=1)
        return (mean_rewards <= self.threshold).repeat_interleave(num_generations)


@dataclass(frozen=True)
class Method:
    """
    What a trainer with demonstrations does beyond GRPO.

    Args:
        source ([`DatasetSource`], *optional*):
            Who opens slots for demonstrations. `None` where there are none.
        when ([`OnFailure`], *optional*):
            When they are shown; `None` is always.
        baseline (`str`):
            What the mean reward is taken over; see [`group_advantages`].
        objective ([`Objective`]):
            What is minimised.
        advantage_weights (`tuple[float, float]`, *optional*, defaults to `(1.0, 1.0)`):
            Of the advantages of demonstration tokens and of rollout tokens.
    """

    source: DatasetSource | None
    when: OnFailure | None
    baseline: str
    objective: Objective
    advantage_weights: tuple[float, float] = (1.0, 1.0)

    def weight_advantages(self, output: dict[str, Any]):
        """Weights the advantages of a generation batch; from the shape `(B,)` they become `(B, T)`."""
        if self.advantage_weights != (1.0, 1.0):
            weights = torch.where(output["demonstration_mask"], *self.advantage_weights)
            output["advantages"] = output["advantages"].unsqueeze(1) * weights

    @classmethod
    def from_args(cls, args: LuffyConfig) -> "Method":
        """The one place where options become a method."""
        is_sft = args.demonstration_loss == "sft"
        policy_gradient = PolicyGradient(
            shaping=_shaping(args, "policy_shaping"),
            on_policy_shaping=_shaping(args, "on_policy_shaping"),
            clip_range=_clip_range(args),
            ratio_range=(args.demonstration_ratio_min, args.demonstration_ratio_max),
            max_token_prob=args.max_token_prob,
            on="rollouts" if is_sft else "all",
        )
        terms: list[Term] = [policy_gradient]
        if args.beta != 0.0:
            terms.insert(0, KLPenalty(args.beta, args.use_bias_correction_kl))
        if is_sft:
            cross_entropy = CrossEntropy(
                peak=args.sft_loss_coef,
                minimum=args.sft_loss_coef_min,
                warmup_steps=args.sft_loss_coef_warmup_steps,
                decay_steps=args.sft_loss_coef_decay_steps,
                interpolate=args.sft_loss_combination == "interpolate",
                token_weight=args.sft_token_weight,
            )
            terms.append(cross_entropy)
        return cls(
            source=DatasetSource(args) if args.num_demonstrations > 0 else None,
            when=OnFailure(args.failure_threshold) if args.demonstration_policy == "on_failure" else None,
            baseline=args.advantage_baseline,
            objective=Objective(tuple(terms), args.loss_type),
            advantage_weights=(args.demonstration_advantage_weight, args.rollout_advantage_weight),
        )


def _shaping(args: LuffyConfig, name: str) -> Shaping:
    kind, *parameters = (getattr(args, f"{name}{suffix}") for suffix in ("", "_gamma", "_power", "_weight"))
    return Shaping(kind, *parameters)


def _clip_range(args: LuffyConfig) -> tuple[float, float] | None:
    if args.ratio_clipping != "on_policy":
        return None
    return 1 - args.epsilon, 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)
