# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Draws the figures of docs/algorithm.md from the functions that training calls:

    python docs/figures/draw.py
"""

import argparse
from pathlib import Path

import matplotlib
import torch

from luffy_trl.losses import Shaping, group_advantages, mixed_policy_loss


matplotlib.use("Agg")
import matplotlib.pyplot as plt


PROBABILITIES = torch.logspace(-5, 0, 401, dtype=torch.float64)
SHAPINGS = {
    "none: r": Shaping("none"),
    "regularized: r / (r + 0.1)": Shaping("regularized"),
    "sqrt": Shaping("sqrt"),
    "log": Shaping("log"),
}
GROUPS = {
    "no rollout is right": [1, 0, 0, 0, 0, 0, 0, 0],
    "three rollouts are right": [1, 1, 1, 1, 0, 0, 0, 0],
    "all are right": [1, 1, 1, 1, 1, 1, 1, 1],
}


def token_gradient(probs: torch.Tensor, advantage: float, shaping: Shaping, is_demonstration: bool = True):
    """
    Gradient of the objective with respect to a token's log-probability.

    Args:
        probs (`torch.Tensor` of shape `(N,)`):
            Probabilities of the token.
        advantage (`float`):
            Its advantage.
        shaping ([`Shaping`]):
            Shaping of demonstrations.
        is_demonstration (`bool`, *optional*, defaults to `True`):
            Whether it comes from the dataset. A rollout token is one that this policy has just sampled.

    Returns:
        `torch.Tensor`: The gradients, of shape `(N,)`.
    """
    logps = probs.log()[:, None].requires_grad_()
    mask = torch.ones_like(logps)
    loss, _ = mixed_policy_loss(
        logps, logps.detach(), mask * advantage, mask, mask.bool() & is_demonstration, shaping=shaping
    )
    return -torch.autograd.grad(loss.sum(), logps)[0][:, 0]


def draw_shapings(path: Path):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, shaping in SHAPINGS.items():
        if shaping.kind != "log":
            axes[0].plot(PROBABILITIES, shaping(PROBABILITIES), label=name)
        axes[1].loglog(PROBABILITIES, token_gradient(PROBABILITIES, 1.0, shaping), label=name)
    axes[0].set(title="f(r)", xlabel="probability of the token")
    axes[1].set(title="weight of its gradient, r f'(r)", xlabel="probability of the token", ylim=(1e-5, 2))
    axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_groups(path: Path):
    figure, axes = plt.subplots(1, len(GROUPS), figsize=(9, 3), sharey=True, layout="constrained")
    is_demonstration = torch.arange(8) == 0
    for axis, (title, rewards) in zip(axes, GROUPS.items(), strict=True):
        advantages = group_advantages(torch.tensor(rewards, dtype=torch.float32), 8, is_demonstration)
        bars = axis.bar(range(8), advantages, color=["C1", *["C0"] * 7])
        axis.bar_label(bars, [f"{value:+.3g}" if value else "0" for value in advantages.tolist()], fontsize=6)
        axis.set(title=title, xticks=range(8), ylim=(-1.05, 1.05))
        axis.set_xticklabels(["demo", *(f"o{i}" for i in range(1, 8))], fontsize=8)
        axis.axhline(0, color="gray", linewidth=0.8)
    axes[0].set_ylabel("advantage")
    figure.savefig(path, dpi=120)


def draw_gradients(path: Path):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    kinds = {
        "demonstration, shaped": (Shaping(), True),
        "demonstration, not shaped": (Shaping("none"), True),
        "rollout": (Shaping(), False),
    }
    for axis, advantage in zip(axes, (1.0, -1.0), strict=True):
        for name, (shaping, is_demonstration) in kinds.items():
            gradients = token_gradient(PROBABILITIES, advantage, shaping, is_demonstration)
            axis.semilogx(PROBABILITIES, gradients, label=name)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.set(title=f"A = {advantage:+.0f}", xlabel="probability of the token", ylim=(-1.1, 1.1))
    axes[0].set_ylabel("gradient of the objective, d / d log p")
    axes[1].legend(loc="upper left")
    figure.savefig(path, dpi=120)


def main(output_dir: Path):
    draw_shapings(output_dir / "shaping.png")
    draw_groups(output_dir / "groups.png")
    draw_gradients(output_dir / "gradients.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    main(parser.parse_args().output_dir)
