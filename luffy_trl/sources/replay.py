# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Unlike LUFFY, whose demonstrations come from the dataset, ExGRPO (arXiv 2510.02245) replays the policy's own successes:
a demonstration by an earlier self, with its recorded log-probs as pi_phi.

Once a batch is solved well enough, successes of groups that are solved in part are collected. From then on, a share of
the prompts of each batch are problems of the pool, drawn by how often they were solved, each with one replay in its
group. A problem that all rollouts solve is retired: it leaves the pool, and gives way to a replay when it comes again.
"""

import hashlib
import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object

from ..config_rules import num_replayed
from ..groups import Demonstration, MixedBatch
from ..luffy_config import LuffyConfig


@dataclass
class Problem:
    """A row of the dataset, its prompt, the number of its rollouts that were solved last, and keys of successes."""

    row: dict[str, Any]
    prompt_ids: list[int]
    num_solved: int
    keys: list[str] = field(default_factory=list)


class ReplaySource:
    """Opens a slot to a replay in the groups of some problems."""

    def __init__(self, args: LuffyConfig):
        self.args = args
        self.has_started = False
        self.retired: dict[str, None] = {}
        self.problems: dict[str, Problem] = {}
        self.successes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # token ids and log-probs, the oldest first
        self.owners: dict[str, str] = {}  # the problem of each success

    def prepare(self, dataset, tokenizer, model, tools):
        return dataset

    def count_dropped(self, batch: MixedBatch) -> int:
        return 0

    def open_slots(
        self, batch: MixedBatch, step: int, slots: list[Demonstration | None], is_open: list[bool]
    ) -> list[Demonstration | None]:
        keys = _keys_of_groups(batch)
        rng = random.Random(f"replay-{self.args.seed}-{step}")
        number = min(num_replayed(self.args.replay_ratio, len(keys)), len(self.problems))
        drawn = draw_problems(self.problems, number, batch.num_generations, rng)
        chosen = self._choose(drawn, batch)
        batch.metrics |= {
            "replay/share": len(drawn) / len(keys),
            "replay/problems": float(len(self.problems)),
            "replay/successes": float(len(self.successes)),
        }
        # A problem of the batch is replayed in its own group; the others take those of retired problems, or the last
        places = {key: keys.index(key) for key in drawn if key in keys}
        free = [group for group in range(len(keys)) if group not in places.values()]
        free.sort(key=lambda group: (keys[group] not in self.retired, -group))
        places |= dict(zip((key for key in drawn if key not in keys), free, strict=False))
        problem_of = {group: key for key, group in places.items()}
        for i in range(len(batch.rows)):
            key = problem_of.get((batch.local.start + i) // batch.num_generations)
            if key is not None:
                batch.rows[i] = dict(self.problems[key].row)
                slots[i] = chosen[key] if batch.slot(i) == 0 else None
        return slots

    def _choose(self, drawn: list[str], batch: MixedBatch) -> dict[str, Demonstration]:
        """The success of each problem that is replayed: of the lowest entropy under the policy as it is now."""
        candidates = [(key, success) for key in drawn for success in self.problems[key].keys]
        if self.args.replay_choice == "logp":
            costs = {success: -self.successes[success][1].mean().item() for _, success in candidates}
        else:
            sequences = [(self.problems[key].prompt_ids, self.successes[name][0].tolist()) for key, name in candidates]
            measured = batch.policy.measure(sequences)
            costs = {name: e.mean().item() for (_, name), (_, e) in zip(candidates, measured, strict=True)}
        chosen = {}
        for key in drawn:
            success = min(self.problems[key].keys, key=costs.__getitem__)
            ids, logps = (values.tolist() for values in self.successes[success])
            chosen[key] = Demonstration(ids, logps, key=success, origin="replay")
        return chosen

    def observe(self, batch: MixedBatch, output: dict[str, Any], is_solved: torch.Tensor):
        size = batch.num_generations
        is_rollout = ~batch.is_demonstration
        if not self.has_started and is_rollout.any():
            self.has_started = is_solved[is_rollout].float().mean().item() > self.args.replay_start_solve_rate
        if not self.has_started:
            return
        num_solved = (is_solved & is_rollout).view(-1, size).sum(1).tolist()
        num_rollouts = is_rollout.view(-1, size).sum(1).tolist()
        keys = _keys_of_groups(batch)
        for key, solved, rollouts in zip(keys, num_solved, num_rollouts, strict=True):
            if key in self.problems:
                self.problems[key].num_solved = solved
            if solved == rollouts:
                self.retired[key] = None
                for success in self.problems.pop(key).keys if key in self.problems else []:
                    del self.successes[success]
        found = []
        has_logps = "old_per_token_logps" in output
        for i, row in enumerate(batch.rows):
            number = batch.local.start + i
            group = number // size
            if is_solved[number] and is_rollout[number] and num_solved[group] < num_rollouts[group]:
                mask = output["completion_mask"][i].bool()
                ids = output["completion_ids"][i][mask].tolist()
                prompt_ids = output["prompt_ids"][i][output["prompt_mask"][i].bool()].tolist()
                logps = output["old_per_token_logps"][i][mask].cpu() if has_logps else None
                found.append((group, row, prompt_ids, ids, logps))
        new: dict[str, tuple] = {}
        for group, row, prompt_ids, ids, logps in gather_object(found):
            success = _digest([keys[group], ids])
            if ids and success not in self.successes:
                new.setdefault(success, (group, row, prompt_ids, ids, logps))
        if new and not has_logps:
            measured = batch.policy.measure([(prompt_ids, ids) for _, _, prompt_ids, ids, _ in new.values()])
            new = {key: (*entry[:4], logps) for (key, entry), (logps, _) in zip(new.items(), measured, strict=True)}
        for success, (group, row, prompt_ids, ids, logps) in new.items():
            problem = self.problems.setdefault(keys[group], Problem(row, prompt_ids, num_solved[group]))
            problem.keys.append(success)
            self.retired.pop(keys[group], None)
            self.successes[success] = (torch.tensor(ids, dtype=torch.int32), logps.float())
            self.owners[success] = keys[group]
        self._forget_the_oldest()
        for cache in (batch.caches.scores, batch.caches.ref_logps):
            for key in [key for key in cache or {} if isinstance(key, str) and key not in self.successes]:
                del cache[key]

    def _forget_the_oldest(self):
        self.owners = {success: key for success, key in self.owners.items() if success in self.successes}
        while len(self.successes) > self.args.replay_max_trajectories:
            success = next(iter(self.successes))
            key = self.owners.pop(success)
            del self.successes[success]
            self.problems[key].keys.remove(success)
            if not self.problems[key].keys:
                del self.problems[key]

    def state_dict(self) -> dict[str, Any]:
        problems = {
            key: {"row": json.dumps(problem.row), "prompt_ids": problem.prompt_ids, "num_solved": problem.num_solved}
            for key, problem in self.problems.items()
        }
        return {
            "has_started": self.has_started,
            "retired": list(self.retired),
            "problems": problems,
            "successes": [(self.owners[success], success, *entry) for success, entry in self.successes.items()],
        }

    def load_state_dict(self, state: dict[str, Any]):
        self.has_started = state.get("has_started", False)
        self.retired = dict.fromkeys(state.get("retired", []))
        self.problems = {
            key: Problem(json.loads(saved["row"]), saved["prompt_ids"], saved["num_solved"])
            for key, saved in state.get("problems", {}).items()
        }
        self.successes, self.owners = {}, {}
        for key, success, ids, logps in state.get("successes", []):
            self.successes[success], self.owners[success] = (ids, logps), key
            self.problems[key].keys.append(success)


def draw_problems(problems: dict[str, Problem], number: int, num_generations: int, rng: random.Random) -> list[str]:
    """Draws problems by buckets of `num_solved`: those solved by about half of the rollouts come first."""
    buckets: dict[int, list[str]] = {}
    for key, problem in problems.items():
        buckets.setdefault(problem.num_solved, []).append(key)
    drawn: list[str] = []
    for _ in range(number):
        costs = {k: (k - num_generations / 2) ** 2 / 2 for k in sorted(buckets)}
        lowest = min(costs.values())  # of large groups all weights would be 0
        weights = [math.exp(lowest - cost) for cost in costs.values()]
        bucket = buckets[rng.choices(list(costs), weights)[0]]
        drawn.append(bucket.pop(rng.randrange(len(bucket))))
        buckets = {k: keys for k, keys in buckets.items() if keys}
    return drawn


def _keys_of_groups(batch: MixedBatch) -> list[str]:
    """What stands for the problem of each group, over all processes."""
    return gather_object([_digest(row) for i, row in enumerate(batch.rows) if batch.slot(i) == 0])


def _digest(value: Any) -> str:
    try:
        text = json.dumps(value, sort_keys=True)
    except TypeError as error:
        raise ValueError(
            f"Replay keeps rows of the dataset in checkpoints, as JSON, and this row cannot be: {error}. Remove the "
            "column, or turn it into text."
        ) from error
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=12).hexdigest()
