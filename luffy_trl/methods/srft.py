# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Unlike LUFFY, which has one loss on demonstrations and rollouts, SRFT (arXiv 2506.19767) adds cross-entropy on traces,
and replaces the policy gradient of rollouts by weighted likelihood; the mean entropy of a completion weights both.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..losses import Shaping, TokenBatch


@dataclass(frozen=True)
class SRFTCrossEntropy:
    """Cross-entropy on demonstration tokens, weighted by weight * exp(-H) of the mean entropy H of the completion."""

    weight: float = 0.5
    reduction: ClassVar[str | None] = "demonstrations"
    in_evaluation: ClassVar[bool] = False

    def __call__(self, tokens: TokenBatch, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        loss = -self.weight * torch.exp(-tokens.mean_entropies) * tokens.logps * tokens.demonstration_mask
        return loss, {"demonstration_loss": -tokens.logps.detach()}

    def share(self, step: int) -> float:
        return 0.0


@dataclass(frozen=True)
class SRFT:
    """
    LUFFY's loss on demonstration tokens. On rollout tokens -c log pi, where c is success_weight * exp(H) if the
    completion earns full reward and -1 otherwise. The latter has no minimum: below `min_logp` a token of a failure is
    left alone.
    """

    shaping: Shaping = Shaping()
    success_weight: float = 0.1
    min_logp: float = -20.0
    reduction: ClassVar[str | None] = None
    in_evaluation: ClassVar[bool] = True

    def __call__(self, tokens: TokenBatch, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        is_solved = tokens.is_solved.unsqueeze(1)
        pushes_down = ~is_solved & (tokens.logps.detach() > self.min_logp)
        weights = torch.where(is_solved, self.success_weight * torch.exp(tokens.mean_entropies), -pushes_down.float())
        shaped = self.shaping(tokens.ratio)
        loss = (
            torch.where(tokens.demonstration_mask, -shaped * tokens.token_advantages, -weights * tokens.logps)
            * tokens.mask
        )
        return loss, tokens.unclipped_stats(loss, torch.where(tokens.demonstration_mask, shaped, weights))

    def share(self, step: int) -> float:
        return 0.0
