# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Unlike LUFFY, which divides by pi_phi = 1 and shapes the ratio, RL-PLUS (arXiv 2508.00222) divides by a mixture of the
policy before the update and a uniform one, and weights the advantage by what the policy does not yet believe.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..losses import TokenBatch


@dataclass(frozen=True)
class RLPlus:
    """
    The policy gradient of RL-PLUS, unclipped. A demonstration token has the loss -A (1 - sg pi)^focal * 2 pi / (pi_old
    + 0.5 (pi_old + 1)), a rollout token -A pi / pi_old.
    """

    focal: float = 0.5
    reduction: ClassVar[str | None] = None
    in_evaluation: ClassVar[bool] = True

    def __call__(self, tokens: TokenBatch, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        probs, old_probs = tokens.logps.exp(), tokens.old_logps.exp()
        shaped = 2 * probs / (old_probs + 0.5 * (old_probs + 1)) * (1 - probs.detach()).clamp(min=0.0) ** self.focal
        ratio = tokens.ratio if tokens.sampling_ratio is None else tokens.ratio * tokens.sampling_ratio
        coefficient = torch.where(tokens.demonstration_mask, shaped, ratio)
        loss = -coefficient * tokens.token_advantages * tokens.mask
        return loss, tokens.unclipped_stats(loss, coefficient)

    def share(self, step: int) -> float:
        return 0.0
