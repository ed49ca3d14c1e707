# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
A method of training on demonstrations and rollouts: where demonstrations come from, when they are shown, what rewards
are compared with, and what is minimised.

| recipe | sources | when | advantages | objective |
| --- | --- | --- | --- | --- |
| `qwen2.5_math_7b` (LUFFY) | traces of the row | always | group | policy gradient, shaped |
| `luffy_on_failure` | traces of the row | groups that fail | group | policy gradient, shaped |
| `mixed_no_shaping` | traces of the row | always | group | policy gradient |
| `rl_with_sft_loss` | traces of the row | always | rollouts | policy gradient on rollouts, cross-entropy |
| `chord` | traces of the row | always | rollouts | the same, interpolated, weighted by p (1 - p) |
| `exgrpo` | own successes | once rollouts succeed | group | policy gradient, shaped on replays |
| `luffy_then_exgrpo` | traces, then own successes | always | group | policy gradient, shaped |
| `hpt` | a trace of the row | groups that fail | rollouts | policy gradient elsewhere, cross-entropy there |
| `srft` | traces of the row | always | group | shaped on traces, likelihood by entropy on both |
| `rl_plus` | traces of the row | always | group | policy gradient over a mixture of policies |
| `prefix_rft` | a prefix of a trace | always | group | policy gradient, prefix tokens of high entropy |
| `ampo` | the trace that helps | groups that fail | group | policy gradient, shaped, by completion |
| `scaf_grpo` | the policy under a hint | groups that fail | group | policy gradient |
| `oapl` | none | - | r - V* | regression of the log-ratio |
| `grpo_baseline` | none | - | group | policy gradient, clipped |
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..groups import Demonstration, MixedBatch
from ..losses import CrossEntropy, KLPenalty, Objective, PolicyGradient, Shaping, Term, group_advantages
from ..luffy_config import LuffyConfig
from ..sources import Source
from ..sources.dataset import DatasetSource
from ..sources.hints import HintSource
from ..sources.replay import ReplaySource
from ..turns import Tools
from .oapl import OAPL, optimal_advantages
from .rl_plus import RLPlus
from .srft import SRFT, SRFTCrossEntropy


# By the names of `LuffyConfig.demonstration_sources`, which says when each is used
SOURCES: dict[str, Callable[[LuffyConfig], Source]] = {"dataset": DatasetSource, "replay": ReplaySource}

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
    "demonstration_choice",
    "demonstration_max_steps",
    "failed_rollouts",
    "objective",
    "oapl_value_beta",
    "replay_ratio",
    "hint_source",
    "hint_levels",
    "hint_placement",
    "hint_template",
    "hint_warmup_steps",
    "replay_choice",
    "replay_max_trajectories",
)


@dataclass(frozen=True)
class OnFailure:
    """The groups of which no rollout counts as a success: their mean reward is at most the threshold."""

    threshold: float

    def __call__(self, rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
        """Which of N rows are in a group that fails, from their rewards; both of shape `(N,)`."""
        mean_rewards = rewards.view(-1, num_generations).nanmean(dim=1)
        return (mean_rewards <= self.threshold).repeat_interleave(num_generations)


@dataclass(frozen=True)
class Method:
    """What a trainer with demonstrations does beyond GRPO."""

    sources: tuple[Source, ...]  # open slots in this order
    when: OnFailure | None  # `None` shows demonstrations always
    baseline: str  # of the mean reward; see [`group_advantages`]
    objective: Objective
    advantage_weights: tuple[float, float] = (1.0, 1.0)  # of demonstration tokens, and of rollout tokens
    value_beta: float | None = None  # compares rewards with an optimal value, not a mean; see [`optimal_advantages`]
    drops_failures: bool = False  # gives rollouts of groups that fail the advantage 0
    hints: HintSource | None = None  # another try for failed groups, before demonstrations are inserted
    hints_after: int = 0  # optimizer steps before the first hint

    @property
    def makes_advantages(self) -> bool:
        """Whether advantages are others than TRL's."""
        return bool(self.sources) or self.hints is not None or self.value_beta is not None

    def prepare(self, dataset, tokenizer, model, tools: Tools):
        """Lets each source read the training data; returns what the trainer loads rows from."""
        if self.hints is not None:
            self.hints.prepare(dataset)
        for source in self.sources:
            dataset = source.prepare(dataset, tokenizer, model, tools)
        return dataset

    def open_slots(self, batch: MixedBatch, step: int) -> int:
        """Fills the slots of a batch, unless they wait for failures; how many demonstrations were dropped."""
        batch.gives_hints = self.hints is not None and step >= self.hints_after
        batch.is_waiting = self.when is not None and (bool(self.sources) or batch.gives_hints)
        if self.sources and not batch.is_waiting:
            self.fill_slots(batch, step, [True] * len(batch.rows))
        return sum(source.count_dropped(batch) for source in self.sources)

    def retry(self, batch: MixedBatch, trainer: Any, *args) -> list[Demonstration | None]:
        """Gives failed groups another try under hints, where the method has them; see [`HintSource`]."""
        if self.hints is None or not batch.gives_hints:
            return [None] * len(batch.rows)
        return self.hints.retry(batch, trainer, *args)

    def fill_slots(
        self, batch: MixedBatch, step: int, is_open: list[bool], slots: list[Demonstration | None] | None = None
    ):
        """Inserts what the sources have for the local rows that are open, beside what is in slots already."""
        slots = [None] * len(batch.rows) if slots is None else slots
        for source in self.sources:
            slots = source.open_slots(batch, step, slots, is_open)
        batch.insert(slots)

    def advantages(self, rewards: torch.Tensor, batch: MixedBatch, scale: str) -> torch.Tensor:
        """The advantages of all rows, of shape `(N,)`, from their rewards."""
        if self.value_beta is not None:
            return optimal_advantages(rewards, batch.num_generations, self.value_beta)
        advantages = group_advantages(
            rewards, batch.num_generations, batch.is_demonstration, baseline=self.baseline, scale=scale
        )
        if self.drops_failures and batch.has_failed is not None:
            advantages = advantages.masked_fill(batch.has_failed & ~batch.is_demonstration, 0.0)
        return advantages

    def finish(self, batch: MixedBatch, output: dict[str, Any]):
        """Weights the advantages, from the shape `(B,)` to `(B, T)`, and lets the sources see what was earned."""
        if self.advantage_weights != (1.0, 1.0):
            weights = torch.where(output["demonstration_mask"], *self.advantage_weights)
            output["advantages"] = output["advantages"].unsqueeze(1) * weights
        for source in self.sources:
            source.observe(batch, output, batch.is_solved)

    @classmethod
    def from_args(cls, args: LuffyConfig) -> "Method":
        """The one place where options become a method."""
        sources = tuple(SOURCES[name](args) for name in args.demonstration_sources)
        hints = None
        if args.hint_source != "none":
            traces = next((source.traces_of for source in sources if isinstance(source, DatasetSource)), None)
            hints = HintSource(args, traces)
        return cls(
            sources=sources,
            when=OnFailure(args.failure_threshold) if args.demonstration_policy == "on_failure" else None,
            baseline=args.advantage_baseline,
            objective=Objective(tuple(_terms(args)), args.loss_type),
            advantage_weights=(args.demonstration_advantage_weight, args.rollout_advantage_weight),
            value_beta=args.oapl_value_beta if args.objective == "oapl" else None,
            drops_failures=args.failed_rollouts == "drop",
            hints=hints,
            hints_after=args.hint_warmup_steps,
        )


def _terms(args: LuffyConfig) -> list[Term]:
    """The terms of the objective. TRL adds the penalty first, so that sums agree to the bit."""
    terms: list[Term] = []
    if args.beta != 0.0:
        terms.append(KLPenalty(args.beta, args.use_bias_correction_kl))
    if args.objective == "rl_plus":
        return [*terms, RLPlus(args.rl_plus_focal)]
    if args.objective == "srft":
        shaped = SRFT(_shaping(args, "policy_shaping"), args.srft_success_weight, args.srft_min_logp)
        return [*terms, shaped, SRFTCrossEntropy(args.srft_sft_weight)]
    if args.objective == "oapl":
        return [*terms, OAPL(args.oapl_policy_beta)]
    is_sft = args.demonstration_loss == "sft"
    policy_gradient = PolicyGradient(
        shaping=_shaping(args, "policy_shaping"),
        on_policy_shaping=_shaping(args, "on_policy_shaping"),
        clip_range=_clip_range(args),
        ratio_range=(args.demonstration_ratio_min, args.demonstration_ratio_max),
        max_token_prob=args.max_token_prob,
        on="rollouts" if is_sft else "all",
        clips_mixed=args.ratio_clipping != "until_mixed",
        entropy_share=args.demonstration_entropy_share,
    )
    terms.append(policy_gradient)
    if is_sft:
        cross_entropy = CrossEntropy(
            peak=args.sft_loss_coef,
            minimum=args.sft_loss_coef_min,
            warmup_steps=args.sft_loss_coef_warmup_steps,
            decay_steps=args.sft_loss_coef_decay_steps,
            interpolate=args.sft_loss_combination == "interpolate",
            token_weight=args.sft_token_weight,
            reduction="demonstrations" if args.sft_loss_reduction == "tokens" else None,
        )
        terms.append(cross_entropy)
    return terms


def _shaping(args: LuffyConfig, name: str) -> Shaping:
    parameters = {f.name: getattr(args, f"{name}_{f.name}") for f in fields(Shaping) if f.name != "kind"}
    return Shaping(getattr(args, name), **parameters)


def _clip_range(args: LuffyConfig) -> tuple[float, float] | None:
    if args.ratio_clipping == "none":
        return None
    return 1 - args.epsilon, 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)
