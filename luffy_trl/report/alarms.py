# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What docs/metrics.md calls sick, as conditions on a curve, each with a sentence that says what it means and what to do.

An alarm is a hint from a few numbers, and no verdict: it speaks of the last tenth of the curve.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from .reading import Run


_FEW, _MANY = 3, 20  # records before a level, or the lack of a trend, means something


@dataclass(frozen=True)
class Curve:
    """The values of a metric, in the order of the log."""

    values: list[float]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def _window(self) -> int:
        return max(_FEW, len(self) // 10)

    @property
    def first(self) -> float:
        """The mean of its first tenth."""
        return mean(self.values[: self._window])

    @property
    def last(self) -> float:
        """The mean of its last tenth."""
        return mean(self.values[-self._window :])

    @property
    def best(self) -> float:
        """The greatest mean of as many values in a row."""
        size = self._window
        return max(mean(self.values[i : i + size]) for i in range(max(len(self) - size, 0) + 1))

    @property
    def is_zero(self) -> bool:
        """Whether it has been 0 from the start."""
        return not any(self.values)


@dataclass(frozen=True)
class Alarm:
    """
    A row of the table.

    Args:
        key (`str`):
            The metric.
        text (`str`):
            The sentence.
        is_met (`Callable[[Curve], bool]`):
            The condition.
        after (`int`, *optional*, defaults to `3`):
            Records that the curve has before it is asked.
        unless (`Callable[[Run], bool]`, *optional*):
            Runs that the sentence is not true of.
    """

    key: str
    text: str
    is_met: Callable[[Curve], bool]
    after: int = _FEW
    unless: Callable[[Run], bool] = lambda run: False


def _has_another_loss(run: Run) -> bool:
    recipe = run.about.get("recipe", {})
    return recipe.get("objective", "luffy") != "luffy" or recipe.get("demonstration_loss", "rl") == "sft"


ALARMS = (
    Alarm(
        "demonstrations/reward",
        "No demonstration earns a reward: the reward rejects the traces, which then teach nothing or are pushed down. "
        "`luffy inspect` lists them.",
        lambda curve: curve.last <= 0,
    ),
    Alarm(
        "demonstrations/loss",
        "The traces earn less than the rollouts, and are pushed down. Read some groups.",
        lambda curve: curve.last > 0,
        after=_MANY,
        unless=_has_another_loss,
    ),
    Alarm(
        "demonstrations/dropped",
        "Traces are longer than `max_completion_length`, and are dropped. Raise it, or shorten the traces.",
        lambda curve: curve.last > 0,
    ),
    Alarm(
        "demonstrations/prob",
        "The demonstrations' probability does not rise: nothing is learned from them. Look at the learning rate and "
        "`max_grad_norm`.",
        lambda curve: curve.last <= curve.first * 1.02 and curve.last < 0.9,
        after=_MANY,
    ),
    Alarm(
        "demonstrations/prob",
        "The policy copies the demonstrations: their probability is 1.",
        lambda curve: curve.last > 0.99,
    ),
    Alarm(
        "demonstrations/ratio",
        "The demonstrations' ratio is far above 1: `demonstration_logprobs` are of other tokens, or of another "
        "temperature.",
        lambda curve: curve.last > 3,
        unless=_has_another_loss,
    ),
    Alarm(
        "demonstrations/fraction",
        "Nearly all tokens are of demonstrations: rollouts have collapsed to a few tokens.",
        lambda curve: curve.last > 0.95,
    ),
    Alarm(
        "demonstrations/fraction",
        "No trace is shown: no row has demonstrations, or all are dropped.",
        lambda curve: curve.is_zero,
    ),
    Alarm(
        "reward",
        "The reward falls after a rise: the learning rate is too high, or the reward was gamed. Read some groups.",
        lambda curve: curve.best > 0.1 and curve.last < 0.6 * curve.best and curve.first < 0.9 * curve.best,
        after=_MANY,
    ),
    Alarm(
        "reward_std",
        "All rollouts have had the same reward from the start: there is nothing to learn but from demonstrations.",
        lambda curve: curve.is_zero,
        after=_MANY,
    ),
    Alarm(
        "frac_reward_zero_std",
        "In nearly all groups all rollouts have the same reward: the problems are too hard or too easy.",
        lambda curve: curve.last > 0.95,
        after=_MANY,
    ),
    Alarm(
        "on_policy/solve_none",
        "No rollout solves its problem: the traces are out of reach. Take easier problems, or prefixes of traces.",
        lambda curve: curve.last > 0.95,
        after=_MANY,
    ),
    Alarm(
        "on_policy/solve_all",
        "All rollouts solve their problems: nothing is left to learn.",
        lambda curve: curve.last > 0.95,
    ),
    Alarm(
        "entropy",
        "Entropy falls to 0: no exploration is left. See `entropy_coef`.",
        lambda curve: curve.last < 0.01,
    ),
    Alarm(
        "entropy",
        "Entropy rises without end: `entropy_coef` or the learning rate is too large.",
        lambda curve: curve.last > 3 * curve.first and curve.last > 0.95 * curve.best and curve.last > 1,
        after=_MANY,
    ),
    Alarm(
        "kl",
        "The policy runs away from the reference model.",
        lambda curve: curve.last > 10 and curve.last > 3 * curve.first,
    ),
    Alarm(
        "clip_ratio/region_mean",
        "Many tokens are clipped: steps are too big for one generation.",
        lambda curve: curve.last > 0.2,
    ),
    Alarm(
        "completions/mean_length",
        "Rollouts shrink to a few tokens.",
        lambda curve: curve.last < 0.1 * curve.first,
        after=_MANY,
    ),
    Alarm(
        "completions/clipped_ratio",
        "Rollouts are cut off: `max_completion_length` is too small, or the EOS token is not what traces end in.",
        lambda curve: curve.last > 0.5,
    ),
    Alarm(
        "grad_norm",
        "The gradient is 0: there is no advantage anywhere.",
        lambda curve: curve.is_zero,
    ),
    Alarm(
        "aux_loss",
        "The load-balancing loss rises: experts are left out.",
        lambda curve: curve.last > 1.5 * curve.first,
        after=_MANY,
    ),
    Alarm(
        "sampling/sampling_logp_difference/mean",
        "vLLM and the trainer disagree more and more: weights do not arrive, or the precisions differ.",
        lambda curve: curve.last > 3 * curve.first and curve.last > 0.05,
        after=_MANY,
    ),
    Alarm(
        "hints/helped",
        "The hints do not help, or the reward does not see it.",
        lambda curve: curve.is_zero,
    ),
)


def records_of(run: Run) -> int:
    """How many records the longest of the curves has."""
    return max((len(run.points(alarm.key)) for alarm in ALARMS), default=0)


def too_few(run: Run) -> str | None:
    """What is not asked of a run yet, in a sentence; `None` if its log is long enough for all alarms."""
    number = records_of(run)
    if number >= _MANY:
        return None
    needed = f"alarms about trends need {_MANY}" if number >= _FEW else f"alarms need {_FEW}, those of trends {_MANY}"
    is_sparse = bool(run.log) and run.log[-1]["step"] > number
    return f"{number} {'record' if number == 1 else 'records'}: {needed}." + (
        " Lower `logging_steps`." if is_sparse else ""
    )


def alarms_of(run: Run) -> list[Alarm]:
    """The alarms that a run meets, in the order of the table."""
    met = []
    for alarm in ALARMS:
        curve = Curve([value for _, value in run.points(alarm.key)])
        if len(curve) >= alarm.after and not alarm.unless(run) and alarm.is_met(curve):
            met.append(alarm)
    return met
