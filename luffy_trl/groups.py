# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What travels through a training step: demonstrations, and the generation batch that they are a part of.

Letters of shapes: N rows of all processes, B rows of this process, G completions of a group, F reward functions, T
tokens of the longest completion.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from .luffy_config import LuffyConfig
from .turns import Turns


@dataclass(frozen=True)
class Demonstration:
    """
    Tokens that a completion begins with and that the policy does not sample now.

    Args:
        ids (`list[int]`):
            Token ids: a complete trace, or a prefix of it.
        logps (`list[float]`, *optional*):
            Their log-probabilities under whoever wrote them, log pi_phi.
        is_complete (`bool`, *optional*, defaults to `True`):
            Whether this is the complete trace. If not, the policy continues.
        key (`Hashable`, *optional*):
            Equal for equal traces of equal rows: rewards and reference log-probs are computed once for each key.
        origin (`str`, *optional*, defaults to `"demonstration"`):
            What the completions table calls the row.
        turns ([`~luffy_trl.turns.Turns`], *optional*):
            What of the trace was acted, where tools have answered in it.
        scores (`list[float | None]`, *optional*):
            Its rewards, where the dataset gives them: one, or one for each reward function.
    """

    ids: list[int]
    logps: list[float] | None = None
    is_complete: bool = True
    key: Hashable = None
    origin: str = "demonstration"
    turns: Turns | None = None
    scores: list[float | None] | None = None

    @property
    def tool_mask(self) -> list[int]:
        """1 on the tokens that were acted, 0 on those of tools."""
        return self.turns.mask(len(self.ids)) if self.turns else [1] * len(self.ids)

    @property
    def source(self) -> str:
        """What the completions table calls the row."""
        return self.origin if self.is_complete else "prefix"


@dataclass
class Caches:
    """
    What is computed once for each demonstration, by its key; `None` where it is computed each time.

    Args:
        scores (`dict[Hashable, dict[int, float]]`, *optional*):
            Rewards, by the number of the reward function.
        ref_logps (`dict[Hashable, torch.Tensor]`, *optional*):
            Log-probabilities under the reference model.
        has_old_logps (`bool`, *optional*, defaults to `False`):
            Whether the loss reads the old log-probs of demonstrations; otherwise they are not computed.
        num_rewards (`int`, *optional*, defaults to `1`):
            How many reward functions there are.
        has_reward_model (`bool`, *optional*, defaults to `False`):
            Whether one of them is a model, which TRL calls with all rows.
    """

    scores: dict[Hashable, dict[int, float]] | None = None
    ref_logps: dict[Hashable, torch.Tensor] | None = None
    has_old_logps: bool = False
    num_rewards: int = 1
    has_reward_model: bool = False

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint does not keep them."""
        return {}

    def load_state_dict(self, _: dict[str, Any]):
        """Empties them, as what is not kept."""
        for cache in (self.scores, self.ref_logps):
            if cache is not None:
                cache.clear()

    @classmethod
    def from_args(cls, args: LuffyConfig, reward_funcs: list) -> "Caches":
        """Those that a configuration asks for."""
        return cls(
            scores={} if args.cache_demonstration_rewards else None,
            ref_logps={} if args.cache_demonstration_ref_logps else None,
            has_old_logps=args.objective == "rl_plus",
            num_rewards=len(reward_funcs),
            has_reward_model=any(isinstance(func, nn.Module) for func in reward_funcs),
        )


class Policy(Protocol):
    """What a source may ask of the model that is trained. All processes ask together."""

    def tokenize(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts of this process, as they are for its rollouts."""

    def measure(self, sequences: list[tuple[list[int], list[int]]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Log-probs and entropies of the tokens of completions under the policy as it is now.

        `sequences`, prompt ids and completion ids, are the same on all processes, and so is the result.
        """


class MixedBatch:
    """
    A generation batch: its rows, what each begins with, and what each has earned.

    Row i of this process is slot `(local.start + i) % G` of its group, from the dataset to TRL's shuffle. What has N
    rows is equal on all processes. Demonstrations are inserted once: before sampling, or after rollouts were scored.

    Args:
        rows (`list[dict[str, Any]]`):
            The B rows of this process, without the columns of the demonstrations.
        num_generations (`int`):
            G.
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.
        caches ([`Caches`]):
            Of the trainer.
        passes (`list[str]`, *optional*):
            The passes over the batch that TRL will make, in their order: `"old"`, `"reference"`.
        inputs (`list[dict[str, Any]]`, *optional*):
            The rows with the columns of the demonstrations.
        policy ([`Policy`], *optional*):
            The policy.

    Attributes:
        demonstrations (`list[Demonstration | None]`): What each of the B rows begins with.
        is_waiting, gives_hints (`bool`): Whether demonstrations are inserted after rollouts were scored, and whether
            groups that fail are sampled again before that.
        has_failed, is_solved (`torch.Tensor` of shape `(N,)`, bool, or `None`): Which rows are in a group that has
            failed, and which earn full reward.
        vision (`tuple[list | None, dict]`): Images of the B prompts, and what the processor has made of them.
        traces (`list[dict[str, Any]]` or `None`): The B rows with their tokenized traces, once they are loaded.
        metrics (`dict[str, float]`): What a source adds to the log, equal on all processes.
        is_helped (`torch.Tensor` of shape `(N,)`, bool): Which rows were sampled again, under a prompt with a hint.
        lengths, acted_lengths (`torch.Tensor` of shape `(N,)`): Tokens of the demonstration of each row, and how many
            of them were acted.
        rewards, rollout_rewards (`torch.Tensor` of shape `(N, F)` or `None`): What each row has earned, and what each
            rollout has: NaN where there was none. They differ where rollouts were replaced.
        scores (`list[dict[int, float]]`): For each of the B rows, its reward by the number of the reward function.
        extra_logs (`dict[str, list]`): Columns that reward functions log, with B values.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        num_generations: int,
        accelerator: Accelerator,
        caches: Caches,
        passes: list[str] | None = None,
        inputs: list[dict[str, Any]] | None = None,
        policy: Policy | None = None,
    ):
        self.caches = caches
        self.inputs, self.policy = inputs, policy
        self.rows, self.num_generations, self.accelerator = rows, num_generations, accelerator
        self.passes = passes or []
        self.current_pass: str | None = None
        start = accelerator.process_index * len(rows)  # groups span processes
        self.local = slice(start, start + len(rows))
        self.demonstrations: list[Demonstration | None] = [None] * len(rows)
        self.is_waiting = self.gives_hints = False
        self.has_failed: torch.Tensor | None = None
        self.is_solved: torch.Tensor | None = None
        self.lengths = torch.zeros(len(rows) * accelerator.num_processes, dtype=torch.long, device=accelerator.device)
        self.acted_lengths = self.lengths
        self.vision: tuple[list | None, dict[str, Any]] = (None, {})
        self.traces: list[dict[str, Any]] | None = None
        self.metrics: dict[str, float] = {}
        self.is_helped = torch.zeros_like(self.lengths, dtype=torch.bool)
        self.has_behavior_logps = False
        self.rewards: torch.Tensor | None = None
        self.rollout_rewards: torch.Tensor | None = None
        self.scores: list[dict[int, float]] = [{} for _ in rows]
        self.extra_logs: dict[str, list] = {}

    def slot(self, row: int) -> int:
        """The slot of a local row in its group."""
        return (self.local.start + row) % self.num_generations

    def insert(self, demonstrations: list[Demonstration | None]):
        """Sets what the local rows begin with. All processes call this together."""
        self.is_waiting = False
        self.demonstrations = demonstrations
        described = [
            (len(shown.ids), sum(shown.tool_mask), bool(shown.logps)) if shown else (0, 0, False)
            for shown in demonstrations
        ]
        described = self.accelerator.gather(torch.tensor(described, device=self.accelerator.device))
        self.lengths, self.acted_lengths, has_logps = described.unbind(1)
        self.has_behavior_logps = bool(has_logps.any())
        for row, key in enumerate(self.keys):
            shown = demonstrations[row]
            # What a replaced rollout has earned is not of the demonstration; what a hint helped to was scored already
            if shown and shown.origin != "hinted":
                is_kept = self.caches.scores is not None and key is not None
                self.scores[row] = self.caches.scores.setdefault(key, {}) if is_kept else {}
            if shown and shown.is_complete and shown.scores is not None:
                self.scores[row] = self._given_scores(shown.scores, self.rows[row])

    def _given_scores(self, scores: list[float | None], row: dict[str, Any]) -> dict[int, float | None]:
        """The rewards that the dataset gives a trace, by the number of the reward function."""
        number = self.caches.num_rewards
        if len(scores) not in (1, number):
            raise ValueError(
                f"`demonstration_rewards` of the row with the prompt {row.get('prompt')!r} has {len(scores)} numbers "
                f"for a trace, and there are {number} reward functions. Give one number, or one for each function."
            )
        return dict(enumerate(scores if len(scores) == number else scores * number))

    def with_given_scores(self, rewards: torch.Tensor) -> torch.Tensor:
        """Rewards, of shape `(N, F)`, with those that the dataset gives in place of a reward model's."""
        if not self.caches.has_reward_model:
            return rewards
        given = torch.zeros(len(self.rows), rewards.size(1), 2, device=rewards.device)
        for i, shown in enumerate(self.demonstrations):
            if shown and shown.is_complete and shown.scores is not None:
                values = [torch.nan if score is None else score for score in self.scores[i].values()]
                given[i] = torch.tensor([values, [1.0] * len(values)], device=rewards.device).T
        given = self.accelerator.gather(given)
        return torch.where(given[..., 1] > 0, given[..., 0].to(rewards.dtype), rewards)

    def replace(self, completion_ids: list[list[int]], logps: list[list] | None) -> list[int]:
        """Puts the demonstrations, in place, where rollouts were; returns the local rows."""
        replaced = [i for i, shown in enumerate(self.demonstrations) if shown]
        for i in replaced:
            completion_ids[i] = list(self.demonstrations[i].ids)
            if logps is not None:
                logps[i] = [None] * len(completion_ids[i])
        return replaced

    @property
    def is_given(self) -> list[bool]:
        """Which local rows are complete demonstrations: nothing is sampled for them."""
        return [shown is not None and shown.is_complete for shown in self.demonstrations]

    @property
    def is_mixed(self) -> bool:
        """Whether any row of any process begins with a demonstration."""
        return bool(self.is_demonstration.any())

    @property
    def is_replaced(self) -> torch.Tensor:
        """Which rows are no longer what was sampled first, of shape `(N,)`."""
        return self.is_demonstration | self.is_helped

    @property
    def is_demonstration(self) -> torch.Tensor:
        """Which rows begin with demonstration tokens, of shape `(N,)`."""
        return self.lengths > 0

    @property
    def keys(self) -> list[Hashable | None]:
        """The key of each local row that is a complete demonstration."""
        return [shown.key if shown and shown.is_complete else None for shown in self.demonstrations]

    @property
    def sources(self) -> list[str]:
        """What each local row is, for the completions table."""
        rollouts = ["hinted" if helped else "rollout" for helped in self.is_helped[self.local].tolist()]
        return [shown.source if shown else rollouts[i] for i, shown in enumerate(self.demonstrations)]

    def next_pass(self) -> list[torch.Tensor | None]:
        """For each local row, the log-probs that need no forward pass in the next pass over the batch."""
        self.current_pass = self.passes.pop(0)
        if self.current_pass == "reference":
            return [(self.caches.ref_logps or {}).get(key) for key in self.keys]
        if self.caches.has_old_logps:
            return [None] * len(self.rows)
        return [None if key is None else torch.zeros(0) for key in self.keys]

    def keep_logps(self, logps: torch.Tensor):
        """Keeps the reference's log-probs of complete demonstrations, from those of the pass, of shape `(B, T)`."""
        if self.current_pass == "reference" and self.caches.ref_logps is not None:
            for row, key in enumerate(self.keys):
                if key is not None and key not in self.caches.ref_logps:
                    self.caches.ref_logps[key] = logps[row, : len(self.demonstrations[row].ids)].cpu()

    def add_to(self, output: dict[str, torch.Tensor | Any]):
        """Adds what the loss needs of the demonstrations to what TRL has made of the batch."""
        ids = output["completion_ids"]
        positions = torch.arange(ids.size(1), device=ids.device)
        output["demonstration_mask"] = positions < self.lengths[self.local].unsqueeze(1)
        if "tool_mask" in output:
            output["demonstration_mask"] &= output["tool_mask"].bool()
        output["num_demonstration_tokens"] = self.acted_lengths.sum()
        output["is_solved"] = self.is_solved[self.local]
        if self.has_behavior_logps:
            output["behavior_logps"] = torch.zeros_like(ids, dtype=torch.float32)
            for i, shown in enumerate(self.demonstrations):
                if shown and shown.logps:
                    output["behavior_logps"][i, : len(shown.logps)] = torch.tensor(shown.logps, device=ids.device)
