# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
The mathematics of LUFFY (arXiv 2504.14945): tensors in, tensors out, no trainer.

A GRPO group of G completions mixes demonstrations (tokens that somebody else wrote) with rollouts (tokens that the
policy sampled). [`group_advantages`] gives each completion of a group its advantage, [`policy_shaping`] is the paper's
f, and [`mixed_policy_loss`] puts both together token by token. Summing the per-token loss over a batch, and dividing
it, is the trainer's business.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch


ShapingKind = Literal["none", "regularized", "sqrt", "power", "log", "linear_log"]
Baseline = Literal["group", "on_policy"]
SHAPINGS = get_args(ShapingKind)
BASELINES = get_args(Baseline)
SCALES = ("none", "group", "batch")
# What metrics read of the main term of an objective, tensors of shape `(B, T)`: its losses, what multiplies the
# advantages, and which rollout tokens have their gradient clipped away
STATISTICS = ("loss", "coefficient", "low_clipped", "high_clipped")


def policy_shaping(
    ratio: torch.Tensor, kind: str = "regularized", gamma: float = 0.1, power: float = 0.5, weight: float = 1.0
) -> torch.Tensor:
    r"""
    Shapes an importance ratio r = pi_theta / pi_phi, before it multiplies the advantage (section 3.3 of the paper).

    | `kind` | f(r) | option of the released code |
    | --- | --- | --- |
    | `"none"` | r | `no_reshape` |
    | `"regularized"` | r / (r + gamma) | `p_div_p_0.1`, `p_div_p_0.3`, `p_div_p_0.5` |
    | `"sqrt"` | sqrt(r) | `square_root` |
    | `"power"` | r ^ power | `pow` |
    | `"log"` | weight * log(r) | `logp` |
    | `"linear_log"` | r + weight * log(r) | `p_logp` |

    The derivative of the regularized shaping, gamma / (r + gamma)^2, is what gives rare tokens their weight. A ratio
    that underflows (in float32 that of a token of log-probability < -87) has no gradient.

    Args:
        ratio (`torch.Tensor`):
            Importance ratios, any shape, not negative.
        kind (`str`, *optional*, defaults to `"regularized"`):
            One of the shapings of the table.
        gamma (`float`, *optional*, defaults to `0.1`):
            Used by `"regularized"`, positive.
        power (`float`, *optional*, defaults to `0.5`):
            Exponent of `"power"`.
        weight (`float`, *optional*, defaults to `1.0`):
            Weight of the logarithm in `"log"` and `"linear_log"`.

    Returns:
        `torch.Tensor`: The shaped ratio f(r), same shape as `ratio`.

    Raises:
        ValueError: If `kind` is unknown, or `gamma` is not positive where it is used.
    """
    if kind == "none":
        return ratio
    if kind == "regularized":
        if gamma <= 0:
            raise ValueError(f"`gamma` must be positive, got {gamma}. The paper uses 0.1.")
        return ratio / (ratio + gamma)
    # The functions below have an infinite derivative at 0, which an underflown ratio is.
    ratio = ratio.clamp_min(torch.finfo(ratio.dtype).tiny)
    if kind == "sqrt":
        return ratio.sqrt()
    if kind == "power":
        return ratio.pow(power)
    if kind == "log":
        return weight * ratio.log()
    if kind == "linear_log":
        return ratio + weight * ratio.log()
    raise ValueError(f"Unknown shaping {kind!r}. Choose one of {', '.join(SHAPINGS)}.")


@dataclass(frozen=True)
class Shaping:
    """
    A shaping and its parameters as one value; see [`policy_shaping`] for what they mean.

    Args:
        kind (`str`, *optional*, defaults to `"regularized"`):
            Name of the shaping.
        gamma (`float`, *optional*, defaults to `0.1`):
            Parameter of `"regularized"`.
        power (`float`, *optional*, defaults to `0.5`):
            Parameter of `"power"`.
        weight (`float`, *optional*, defaults to `1.0`):
            Parameter of `"log"` and `"linear_log"`.
    """

    kind: str = "regularized"
    gamma: float = 0.1
    power: float = 0.5
    weight: float = 1.0

    def __call__(self, ratio: torch.Tensor) -> torch.Tensor:
        return policy_shaping(ratio, **vars(self))


def importance_ratio(
    per_token_logps: torch.Tensor,
    old_per_token_logps: torch.Tensor,
    demonstration_mask: torch.Tensor,
    behavior_logps: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    How much more probable each token is under the policy than under whoever wrote it.

    Args:
        per_token_logps, old_per_token_logps, demonstration_mask, behavior_logps (`torch.Tensor` of shape `(B, T)`):
            See [`mixed_policy_loss`].

    Returns:
        `torch.Tensor`: pi_theta / pi_phi on demonstration tokens, pi_theta / pi_old on rollout tokens; shape `(B, T)`.
    """
    if behavior_logps is None:
        behavior_logps = torch.zeros_like(old_per_token_logps)
    return torch.exp(per_token_logps - torch.where(demonstration_mask, behavior_logps, old_per_token_logps))


def mixed_policy_loss(
    per_token_logps: torch.Tensor,
    old_per_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    demonstration_mask: torch.Tensor,
    *,
    behavior_logps: torch.Tensor | None = None,
    shaping: Shaping = Shaping(),
    on_policy_shaping: Shaping = Shaping("none"),
    clip_range: tuple[float, float] | None = None,
    ratio_range: tuple[float | None, float | None] = (None, None),
    max_token_prob: float | None = None,
    ratio: torch.Tensor | None = None,
    is_clipped: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Policy-gradient loss of a batch that mixes demonstration tokens and rollout tokens (arXiv 2504.14945, section 3).

    A demonstration token has the ratio r = pi_theta / pi_phi and the loss -f(r) * A: shaped, never clipped to the
    trust region, and with a gradient for both signs of A. A rollout token has the ratio r = pi_theta / pi_old and the
    loss -r * A, or PPO's clipped one.

    Args:
        per_token_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the tokens under the policy, with gradient.
        old_per_token_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities under the policy that sampled the rollouts. Not read on demonstration tokens.
        advantages (`torch.Tensor` of shape `(B,)`, `(B, 1)` or `(B, T)`):
            Advantages, per completion or per token.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on the tokens that carry a loss, 0 on padding.
        demonstration_mask (`torch.Tensor` of shape `(B, T)`, bool):
            True where the token came from the dataset.
        behavior_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            Log-probabilities log pi_phi of the demonstration tokens under whoever wrote them. Not read on rollout
            tokens. `None` is the paper's pi_phi = 1.
        shaping ([`Shaping`], *optional*, defaults to the paper's `Shaping("regularized", gamma=0.1)`):
            Shaping of the demonstration ratio.
        on_policy_shaping ([`Shaping`], *optional*, defaults to `Shaping("none")`):
            Shaping of the rollout ratio. `"regularized"` is f(pi_theta) / f(pi_old) here, as in the released code, so
            that it is 1 before the first update.
        clip_range (`tuple[float, float]`, *optional*):
            Bounds of the rollout ratio in PPO's clipped objective, such as `(0.8, 1.2)`. `None` does not clip
            (appendix E.1).
        ratio_range (`tuple[float | None, float | None]`, *optional*, defaults to `(None, None)`):
            Bounds that the demonstration coefficient is clamped to after shaping. A clamped token has no gradient.
        max_token_prob (`float`, *optional*):
            Tokens of either kind that the policy gives a higher probability carry no loss.
        ratio (`torch.Tensor` of shape `(B, T)`, *optional*):
            The [`importance_ratio`], instead of `behavior_logps`, if another term of the loss uses it too: the sum of
            both gradients then goes through it once, as in TRL, and is the same to the last bit.
        is_clipped (`torch.Tensor` of shape `()`, bool, *optional*):
            Whether `clip_range` holds; `None` is always.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The loss of each token, of shape `(B, T)` and 0 where `mask`
        is 0, and detached statistics of the same shape: `coefficient` (what multiplies the advantage, after shaping
        and clamps), `low_clipped` and `high_clipped` (bool; rollout tokens whose gradient was clipped away).

    Raises:
        ValueError: If both `ratio` and `behavior_logps` are given.
    """
    if ratio is not None and behavior_logps is not None:
        raise ValueError("Give `behavior_logps` to `importance_ratio`, or to this function without `ratio`.")
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    if ratio is None:
        ratio = importance_ratio(per_token_logps, old_per_token_logps, demonstration_mask, behavior_logps)

    low, high = ratio_range
    demonstration_coefficient = shaping(ratio)
    if low is not None or high is not None:
        demonstration_coefficient = demonstration_coefficient.clamp(low, high)
    if on_policy_shaping.kind == "regularized":
        # On demonstration tokens, whose result is not used, 0 / 0 would still make the gradient NaN
        probs = per_token_logps.masked_fill(demonstration_mask, 0.0).exp()
        old_probs = old_per_token_logps.masked_fill(demonstration_mask, 0.0).exp()
        rollout_coefficient = on_policy_shaping(probs) / on_policy_shaping(old_probs)
    else:
        rollout_coefficient = on_policy_shaping(ratio)
    coefficient = torch.where(demonstration_mask, demonstration_coefficient, rollout_coefficient)

    objective = coefficient * advantages
    low_clipped = high_clipped = torch.zeros_like(demonstration_mask)
    if clip_range is not None:
        low, high = clip_range
        low_clipped = (rollout_coefficient < low) & (advantages < 0) & ~demonstration_mask
        high_clipped = (rollout_coefficient > high) & (advantages > 0) & ~demonstration_mask
        clipped_objective = rollout_coefficient.clamp(low, high) * advantages
        is_unclipped = demonstration_mask if is_clipped is None else demonstration_mask | ~is_clipped
        low_clipped, high_clipped = low_clipped & ~is_unclipped, high_clipped & ~is_unclipped
        objective = torch.min(objective, torch.where(is_unclipped, objective, clipped_objective))

    if max_token_prob is not None:
        mask = mask * (per_token_logps.exp() <= max_token_prob)
    per_token_loss = -objective * mask
    stats = {"coefficient": coefficient.detach(), "low_clipped": low_clipped, "high_clipped": high_clipped}
    return per_token_loss, stats


def high_entropy_mask(entropies: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
    """
    The share of the tokens under a mask that have the highest entropy in their completion (arXiv 2507.01679,
    Prefix-RFT); rounded up, so that it is never empty. Of equal entropies the first count.
    """
    wanted = (mask.sum(1, keepdim=True) * share).ceil()
    order = entropies.detach().masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(mask.size(1), device=mask.device).expand_as(order))
    return mask & (ranks < wanted)


def sft_coefficient(
    step: int, peak: float, minimum: float = 0.0, warmup_steps: int = 0, decay_steps: int | None = None
) -> float:
    """
    The weight mu of the cross-entropy beside the policy gradient, at a step of training (arXiv 2508.11408, CHORD).

    Args:
        step (`int`):
            Optimizer step, from 0.
        peak (`float`):
            Its value after the warm-up.
        minimum (`float`, *optional*, defaults to `0.0`):
            Its value after the decay.
        warmup_steps (`int`, *optional*, defaults to `0`):
            Steps over which it rises linearly from 0.
        decay_steps (`int`, *optional*):
            Steps after the warm-up over which it falls along half a cosine. `None` keeps the peak.

    Returns:
        `float`: The weight.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if decay_steps is None:
        return peak
    progress = min((step - warmup_steps) / decay_steps, 1.0)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2


def group_advantages(
    rewards: torch.Tensor,
    num_generations: int,
    demonstration_rows: torch.Tensor,
    *,
    baseline: str = "group",
    scale: str = "none",
) -> torch.Tensor:
    r"""
    Advantages of completions that come in groups, some of which are demonstrations (arXiv 2504.14945, section 3.2).

    A = r - mean, where the mean is over the group (the paper) or over its rollouts only (the released code's
    `grpo_split`). Without demonstrations both are GRPO's advantages, to the last bit.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Rewards of the completions, group after group. NaN stands for "no reward function applies": such a row has
            advantage 0 and does not count in the baseline.
        num_generations (`int`):
            Group size G; N is a multiple of it.
        demonstration_rows (`torch.Tensor` of shape `(N,)`, bool):
            True for completions with demonstration tokens.
        baseline (`str`, *optional*, defaults to `"group"`):
            `"group"` or `"on_policy"`: which rows of a group the mean and the standard deviation are taken over.
        scale (`str`, *optional*, defaults to `"none"`):
            What the advantages are divided by, as in [`~trl.GRPOConfig`]'s `scale_rewards`: `"none"`, `"group"` (the
            standard deviation of the group) or `"batch"` (that of all rows). With `baseline="on_policy"` the
            deviation is taken over rollouts, and where rollouts do not differ, a group with demonstrations is not
            divided: 1 / 1e-4 would drown all other groups.

    Returns:
        `torch.Tensor`: Advantages of shape `(N,)`.

    Raises:
        ValueError: If `baseline` or `scale` is unknown.
    """
    if baseline not in BASELINES:
        raise ValueError(f"Unknown advantage baseline {baseline!r}. Choose one of {', '.join(BASELINES)}.")
    if scale not in SCALES:
        raise ValueError(f"Unknown reward scale {scale!r}. Choose one of {', '.join(SCALES)}.")

    baseline_rewards = rewards.masked_fill(demonstration_rows, torch.nan) if baseline == "on_policy" else rewards
    baseline_groups = baseline_rewards.view(-1, num_generations)
    advantages = rewards - torch.nanmean(baseline_groups, dim=1).repeat_interleave(num_generations)
    if scale != "none":
        if scale == "group":
            std = _nanstd(baseline_groups, dim=1).repeat_interleave(num_generations)
        else:
            std = _nanstd(baseline_rewards, dim=0).expand_as(rewards)
        divisor = std + 1e-4
        if baseline == "on_policy":
            is_mixed = demonstration_rows.view(-1, num_generations).any(dim=1).repeat_interleave(num_generations)
            divisor = torch.where(is_mixed & ~(std > 1e-6), torch.ones_like(divisor), divisor)
        advantages = advantages / divisor
    return torch.nan_to_num(advantages, nan=0.0)


def _nanstd(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Unbiased standard deviation that ignores NaN, in TRL's order of operations; NaN where fewer than two count."""
    variance = torch.nanmean((values - torch.nanmean(values, dim=dim, keepdim=True)) ** 2, dim=dim)
    count = torch.sum(~torch.isnan(values), dim=dim)
    correction = torch.where(count > 1, count / (count - 1), torch.nan)
    return torch.sqrt(variance * correction)


def loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """Which tokens of TRL's inputs the loss is of, of shape `(B, T)`: not what tools have answered."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


@dataclass
class TokenBatch:
    """
    The completions of a micro-batch, token by token: what the terms of a loss are made from. Tensors have the shape
    `(B, T)` where nothing else is said, and a gradient where the policy's log-probs enter.
    """

    logps: torch.Tensor
    old_logps: torch.Tensor  # under the policy that sampled the rollouts
    mask: torch.Tensor  # 1 on tokens of the completions, 0 on padding
    demonstration_mask: torch.Tensor  # bool
    advantages: torch.Tensor  # (B,), or (B, T)
    behavior_logps: torch.Tensor | None = None  # of demonstration tokens; `None` is a probability of 1
    ref_logps: torch.Tensor | None = None
    sampling_ratio: torch.Tensor | None = None  # (B, T) or (B, 1): TRL's correction for rollouts of another engine
    entropies: torch.Tensor | None = None
    is_solved: torch.Tensor | None = None  # (B,), bool: earns full reward
    is_mixed: torch.Tensor | None = None  # (), bool: any process has a demonstration in the generation batch

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any], logps: torch.Tensor, entropies: torch.Tensor) -> "TokenBatch":
        """The tokens of TRL's inputs, under the policy. Where there was no pass of pi_old, it is the policy."""
        mask, old_logps = loss_mask(inputs), inputs.get("old_per_token_logps")
        return cls(
            logps=logps,
            old_logps=logps.detach() if old_logps is None else old_logps,
            mask=mask,
            demonstration_mask=inputs["demonstration_mask"] & mask.bool(),
            advantages=inputs["advantages"],
            behavior_logps=inputs.get("behavior_logps"),
            ref_logps=inputs.get("ref_per_token_logps"),
            sampling_ratio=inputs.get("importance_sampling_ratio"),
            entropies=entropies,
            is_solved=inputs.get("is_solved"),
            is_mixed=inputs["num_demonstration_tokens"] > 0,
        )

    def __post_init__(self):
        # The first of all operations, and made once: so the gradients of all terms add up in TRL's order, to the bit
        self.ratio = importance_ratio(self.logps, self.old_logps, self.demonstration_mask, self.behavior_logps)

    @property
    def rollout_mask(self) -> torch.Tensor:
        """1 on the tokens that the policy has sampled."""
        return self.mask * ~self.demonstration_mask

    @property
    def token_advantages(self) -> torch.Tensor:
        """The advantages, of shape `(B, 1)` or `(B, T)`."""
        return self.advantages.unsqueeze(1) if self.advantages.dim() == 1 else self.advantages

    def unclipped_stats(self, loss: torch.Tensor, coefficient: torch.Tensor) -> dict[str, torch.Tensor]:
        """Statistics of a term that clips nothing, from its losses and what multiplies the advantages."""
        nothing = torch.zeros_like(self.demonstration_mask)
        stats = {"coefficient": coefficient.detach(), "low_clipped": nothing, "high_clipped": nothing}
        return {**stats, "loss": loss.detach()}

    @property
    def mean_entropies(self) -> torch.Tensor:
        """The mean entropy of the tokens of each completion, detached, of shape `(B, 1)`."""
        entropies = (self.entropies.detach() * self.mask).sum(1, keepdim=True)
        return entropies / self.mask.sum(1, keepdim=True).clamp(min=1.0)


@dataclass(frozen=True)
class Denominators:
    """
    What the sums of a loss are divided by. TRL's micro-batches are alike: each is a mean, and the optimizer step is
    the mean over them. Micro-batches by length are not: each is divided by the total of the optimizer step, which is
    their sum.
    """

    num_sequences: int | torch.Tensor
    num_tokens: torch.Tensor
    num_update_tokens: torch.Tensor  # of a process in one optimizer step, for `loss_type="dapo"`
    num_update_demonstration_tokens: torch.Tensor  # likewise
    num_means: float  # over how many micro-batches the optimizer step is the mean; 1 where it is the sum

    @classmethod
    def from_inputs(
        cls, inputs: dict[str, Any], num_means: float, num_updates: float, num_processes: int
    ) -> "Denominators":
        """
        Those of TRL's inputs of a micro-batch, or of the optimizer step where they carry `num_sequences`.

        `num_updates` is the share of an optimizer step in the generation batch, whose tokens the inputs count.
        """

        def per_update(num_tokens: torch.Tensor) -> torch.Tensor:
            return num_tokens.clamp(min=1.0) / num_processes * num_updates

        num_update_tokens = per_update(inputs["num_items_in_batch"])
        num_update_demonstration_tokens = per_update(inputs["num_demonstration_tokens"])
        if "num_sequences" in inputs:
            num_sequences, num_tokens, num_means = inputs["num_sequences"], inputs["num_tokens"], 1.0
        else:
            num_sequences, num_tokens = inputs["completion_mask"].size(0), loss_mask(inputs).sum()
        return cls(
            num_sequences,
            num_tokens.clamp(min=1.0),
            num_update_tokens,
            num_update_demonstration_tokens,
            num_means,
        )


def aggregate(
    per_token_loss: torch.Tensor, mask: torch.Tensor, loss_type: str, denominators: Denominators, max_length: int
) -> torch.Tensor:
    """
    Reduces the losses of tokens to that of a micro-batch, before it is divided by the number of micro-batches: as
    TRL's loss types do, or as the mean over the `"demonstrations"` tokens of the optimizer step, or over `"sequences"`
    of the sum of their tokens. The only reduction of a loss.
    """
    if loss_type == "grpo":
        return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).sum() / denominators.num_sequences
    if loss_type == "bnpo":
        return (per_token_loss * mask).sum() / denominators.num_tokens
    if loss_type == "dr_grpo":
        return (per_token_loss * mask).sum() / (denominators.num_sequences * max_length)
    if loss_type == "dapo":
        return (per_token_loss * mask).sum() / denominators.num_update_tokens
    if loss_type == "sequences":
        return (per_token_loss * mask).sum() / denominators.num_sequences
    return (per_token_loss * mask).sum() / denominators.num_update_demonstration_tokens


class Term(Protocol):
    """
    A summand of an objective: from the tokens of a micro-batch, at an optimizer step, to a loss for each of them.

    One term of an objective, the main one, returns the [`STATISTICS`] that metrics read, in evaluation too:
    [`TokenBatch.unclipped_stats`] makes them for a term that clips nothing.
    """

    @property
    def reduction(self) -> str | None:
        """`None` adds its losses to those of other terms, to be reduced by the loss type; or see [`aggregate`]."""

    @property
    def in_evaluation(self) -> bool:
        """Whether it needs neither demonstrations nor a step, which evaluation does not have."""

    def __call__(self, tokens: TokenBatch, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        The losses, of shape `(B, T)`, and statistics: numbers, which are logged under their name, and detached tensors
        of that shape under the names that `metrics.add_micro_batch` reads: `kl`, `demonstration_loss`, [`STATISTICS`].
        """

    def share(self, step: int) -> float:
        """Between 0 and 1: the other terms are multiplied by 1 minus this."""


@dataclass(frozen=True)
class PolicyGradient:
    """The policy gradient of [`mixed_policy_loss`], on `"all"` tokens or those of `"rollouts"`."""

    shaping: Shaping = Shaping()
    on_policy_shaping: Shaping = Shaping("none")
    clip_range: tuple[float, float] | None = None
    ratio_range: tuple[float | None, float | None] = (None, None)
    max_token_prob: float | None = None
    on: str = "all"
    clips_mixed: bool = True  # clips rollouts in a generation batch with demonstrations too
    entropy_share: float = 1.0  # of each completion's demonstration tokens: those of the highest entropy carry a loss
    reduction: ClassVar[str | None] = None
    in_evaluation: ClassVar[bool] = True

    def __call__(self, tokens: TokenBatch, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        mask = tokens.rollout_mask if self.on == "rollouts" else tokens.mask
        if self.entropy_share < 1.0:
            high = high_entropy_mask(tokens.entropies, tokens.demonstration_mask, self.entropy_share)
            mask = mask * (high | ~tokens.demonstration_mask)
        loss, stats = mixed_policy_loss(
            tokens.logps,
            tokens.old_logps,
            tokens.advantages,
            mask,
            tokens.demonstration_mask,
            ratio=tokens.ratio,
            shaping=self.shaping,
            on_policy_shaping=self.on_policy_shaping,
            clip_range=self.clip_range,
            ratio_range=self.ratio_range,
            max_token_prob=self.max_token_prob,
            is_clipped=None if self.clips_mixed else ~tokens.is_mixed,
        )
        if tokens.sampling_ratio is not None:
            # A ratio per sequence speaks of what was sampled, and not of the prefix that it continues
            loss = torch.where(tokens.demonstration_mask, loss, loss * tokens.sampling_ratio)
        return loss, {**stats, "loss": loss.detach()}

    def share(self, step: int) -> float:
        return 0.0


@dataclass(frozen=True)
class KLPenalty:
    """
    TRL's estimate of the divergence from the reference. The bias correction weights samples of pi_old as samples of
    pi_theta; a demonstration is neither.
    """

    beta: float
    bias_correction: bool = False
    reduction: ClassVar[str | None] = None
    in_evaluation: ClassVar[bool] = True

    def __call__(self, tokens: TokenBatch, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        kl = torch.exp(tokens.ref_logps - tokens.logps) - (tokens.ref_logps - tokens.logps) - 1
        if self.bias_correction:
            kl = kl * torch.where(tokens.demonstration_mask, torch.ones_like(tokens.ratio), tokens.ratio)
        return self.beta * kl, {"kl": kl.detach()}

    def share(self, step: int) -> float:
        return 0.0


@dataclass(frozen=True)
class CrossEntropy:
    """
    Cross-entropy on demonstration tokens, times the weight of [`sft_coefficient`]; `"chord"` weights each token with p
    (1 - p) too.
    """

    peak: float
    minimum: float = 0.0
    warmup_steps: int = 0
    decay_steps: int | None = None
    interpolate: bool = False  # multiplies the other terms by 1 minus the weight
    token_weight: str = "none"
    reduction: str | None = "demonstrations"  # `None` reduces its losses as the loss type says
    in_evaluation: ClassVar[bool] = False

    def _weight(self, step: int) -> float:
        return sft_coefficient(step, self.peak, self.minimum, self.warmup_steps, self.decay_steps)

    def __call__(self, tokens: TokenBatch, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        loss = -tokens.logps * tokens.demonstration_mask
        if self.token_weight == "chord":
            probs = tokens.logps.detach().exp()
            loss = loss * probs * (1 - probs)
        weight = self._weight(step)
        return weight * loss, {"demonstration_loss": -tokens.logps.detach(), "sft_loss_coef": weight}

    def share(self, step: int) -> float:
        return self._weight(step) if self.interpolate else 0.0


@dataclass(frozen=True)
class Objective:
    """A loss as a sum of terms over masks."""

    terms: tuple[Term, ...]
    loss_type: str = "dr_grpo"

    def __call__(
        self, tokens: TokenBatch, denominators: Denominators, max_length: int, step: int | None
    ) -> tuple[torch.Tensor, float, dict[str, Any]]:
        """
        The loss of a micro-batch, what it remains to be divided by, and the statistics of the terms. In evaluation
        `step` is `None`, and terms that are not `in_evaluation` are left out.
        """
        # "dapo" has the number of micro-batches in its denominator
        divisor = 1.0 if self.loss_type == "dapo" else denominators.num_means
        stats: dict[str, Any] = {}
        shared, others = None, []
        for term in self.terms:
            if step is None and not term.in_evaluation:
                continue
            per_token_loss, term_stats = term(tokens, step)
            stats |= term_stats
            if term.reduction is not None:
                others.append((term, per_token_loss))
            else:
                shared = per_token_loss if shared is None else shared + per_token_loss
        if missing := [name for name in STATISTICS if name not in stats]:
            names = ", ".join(type(term).__name__ for term in self.terms if step is not None or term.in_evaluation)
            raise TypeError(
                f"Of the terms of the objective ({names}) none returns {', '.join(missing)}. The main term returns "
                "these statistics, in evaluation too; `tokens.unclipped_stats(loss, coefficient)` makes them."
            )
        loss = tokens.logps.new_zeros(())
        if shared is not None:
            loss = aggregate(shared, tokens.mask, self.loss_type, denominators, max_length)
        for term, per_token_loss in others:
            if share := term.share(step):
                loss = (1 - share) * loss
            # A mean over the optimizer step must not be divided by the number of micro-batches too
            mask, factor = tokens.mask, divisor / denominators.num_means
            if term.reduction == "demonstrations":
                mask, factor = tokens.demonstration_mask, divisor
            loss = loss + factor * aggregate(per_token_loss, mask, term.reduction, denominators, max_length)
        return loss, divisor, stats
