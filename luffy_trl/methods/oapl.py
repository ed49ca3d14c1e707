# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Unlike LUFFY and GRPO, which follow a policy gradient, OAPL (arXiv 2602.19362) is a regression: the log-ratio of a
completion to the policy that sampled it is fitted to its advantage over the optimal value of the problem.

The sampler lags behind by design: `steps_per_generation` is the number of micro-batches of all the updates that one
generation batch serves, after which it is sampled again and the former is dropped.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..losses import TokenBatch


def optimal_advantages(rewards: torch.Tensor, num_generations: int, beta: float) -> torch.Tensor:
    """
    r - V* with V* = beta log mean exp(r / beta) over a group: the mean reward for a large beta, the maximum for a
    small one. NaN does not count, and has advantage 0.
    """
    groups = rewards.view(-1, num_generations)
    counts = (~groups.isnan()).sum(1).to(rewards.dtype)
    values = beta * (torch.logsumexp((groups / beta).nan_to_num(nan=-torch.inf), dim=1) - counts.log())
    return (rewards - values.repeat_interleave(num_generations)).nan_to_num(nan=0.0, neginf=0.0, posinf=0.0)


@dataclass(frozen=True)
class OAPL:
    """(beta sum_t (log pi - log pi_sampler) - A)^2 of each completion, and the mean over completions."""

    beta: float = 1e-3
    reduction: ClassVar[str | None] = "sequences"
    in_evaluation: ClassVar[bool] = True

    def __call__(self, tokens: TokenBatch, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        sampler_logps = tokens.old_logps
        if tokens.behavior_logps is not None:
            sampler_logps = torch.where(tokens.demonstration_mask, tokens.behavior_logps, sampler_logps)
        log_ratio = ((tokens.logps - sampler_logps) * tokens.mask).sum(1)
        errors = (self.beta * log_ratio - tokens.advantages) ** 2
        # Spread evenly over the tokens, so that their sum is the error of the completion
        loss = errors.unsqueeze(1) * tokens.mask / tokens.mask.sum(1, keepdim=True).clamp(min=1.0)
        return loss, tokens.unclipped_stats(loss, tokens.ratio)

    def share(self, step: int) -> float:
        return 0.0
