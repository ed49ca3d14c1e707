# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Unlike LUFFY, which puts a trace into the group, this puts a hint into the prompt where all rollouts of a group fail
(Scaf-GRPO, arXiv 2510.19807; GHPO): the policy samples once more, each row under a hint of another strength, and the
success with the weakest hint takes the place of the rollout of its row.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..demonstrations import decode_completion
from ..groups import Demonstration, MixedBatch, Policy
from ..luffy_config import LuffyConfig
from ..metrics import solves


class Sampler(Policy, Protocol):
    """What hints ask of a trainer beyond that. All processes ask together."""

    processing_class: PreTrainedTokenizerBase
    reward_weights: torch.Tensor

    def continue_completions(self, prompt_ids, completion_ids, logps, sampled: list[int]): ...


class HintSource:
    """
    Gives failed groups another try, with hints from the dataset, or with beginnings of the traces that `get_traces`
    returns.
    """

    def __init__(self, args: LuffyConfig, get_traces: Callable[[MixedBatch], list[dict[str, Any]]] | None = None):
        self.args, self.get_traces = args, get_traces

    def prepare(self, dataset: Dataset | IterableDataset):
        """Refuses a dataset without hints."""
        columns = dataset.column_names or []
        if self.args.hint_source == "column" and columns and "hints" not in columns:
            raise ValueError(
                f"`hint_source='column'` reads the column `hints`, and the dataset has only the columns {columns}. "
                "Give each row a list of texts, the weakest hint first, or set `hint_source='trace'`."
            )

    def hints_of(self, batch: MixedBatch, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
        """The hints of each of the B rows, the weakest first."""
        if self.args.hint_source == "column":
            for row in batch.rows:
                hints = row.get("hints", "missing")
                if hints is not None and (not isinstance(hints, list) or not all(isinstance(h, str) for h in hints)):
                    raise ValueError(
                        f"`hints` of the row with the prompt {row['prompt']!r} is {hints!r}. It is a list of texts, "
                        "the weakest hint first. (`remove_unused_columns=True` removes the column.)"
                    )
            return [row["hints"] or [] for row in batch.rows]
        assert self.get_traces is not None
        levels = self.args.hint_levels
        hints = []
        for row in self.get_traces(batch):
            ids: list[int] = next(iter(row["demonstration_ids"]), [])
            shares = (round(len(ids) * level / (levels + 1)) for level in range(1, levels + 1))
            hints.append([tokenizer.decode(ids[:length], skip_special_tokens=True) for length in shares if length])
        return hints

    def retry(
        self,
        batch: MixedBatch,
        trainer: Sampler,
        score: Callable[[list, list], torch.Tensor],
        prompts: list,
        generated: tuple[list, list, list, list | None],
    ) -> list[Demonstration | None]:
        """
        Samples the rows of failed groups once more and puts successes, in place, where rollouts were; with
        `hint_placement="plain"` it returns them as demonstrations. `score` returns the rewards of completions and
        their ids; `generated` are prompt ids, completion ids, completions and the sampler's log-probs.
        """
        prompt_ids, completion_ids, completions, logps = generated
        tokenizer = trainer.processing_class
        hints = self.hints_of(batch, tokenizer)
        tried = [i for i, failed in enumerate(batch.has_failed[batch.local].tolist()) if failed and hints[i]]
        slots: list[Demonstration | None] = [None] * len(batch.rows)
        # From the weakest to the strongest hint, evenly over the slots
        last = batch.num_generations - 1
        levels = [round(batch.slot(i) * (len(hints[i]) - 1) / last) if i in tried else -1 for i in range(len(slots))]
        all_levels = torch.tensor(gather_object(levels))
        if not (all_levels >= 0).any():
            return slots
        template = self.args.hint_template
        hinted = [
            with_hint(prompt, hints[i][levels[i]], template) if i in tried else prompt
            for i, prompt in enumerate(prompts)
        ]
        hinted_ids = trainer.tokenize(hinted)
        new_ids: list[list[int]] = [[] if i in tried else list(ids) for i, ids in enumerate(completion_ids)]
        new_logps = None if logps is None else [[] if i in tried else list(own) for i, own in enumerate(logps)]
        trainer.continue_completions(hinted_ids, new_ids, new_logps, tried)
        new_completions = list(completions)
        for i in tried:
            new_completions[i] = decode_completion(tokenizer, hinted[i], hinted_ids[i], new_ids[i])

        scores, extra_logs = list(batch.scores), {name: list(values) for name, values in batch.extra_logs.items()}
        for i in tried:
            batch.scores[i] = {}
        is_success = solves(score(new_completions, new_ids), trainer.reward_weights).cpu() & (all_levels >= 0)
        # The weakest hint of each group, and of several successes under it the first
        costs = torch.where(is_success, all_levels, len(all_levels)).view(-1, batch.num_generations)
        weakest = torch.zeros_like(is_success).view_as(costs).scatter_(1, costs.argmin(1, keepdim=True), True)
        helped = weakest.flatten() & is_success
        chosen = [i for i in tried if helped[batch.local.start + i]]
        for i in tried:
            if i not in chosen:
                batch.scores[i] = scores[i]
                for name, values in batch.extra_logs.items():
                    values[i] = extra_logs[name][i] if name in extra_logs else None
        # A group that was helped is shown no trace
        is_helped_group = helped.view(costs.shape).any(1).repeat_interleave(batch.num_generations)
        num_hinted = (all_levels >= 0).view(costs.shape).any(1).sum()
        batch.metrics["hints/helped"] = (helped.sum() / num_hinted).item()
        if helped.any():
            batch.metrics["hints/level"] = all_levels[helped].float().mean().item()
        batch.has_failed = batch.has_failed & ~is_helped_group.to(batch.has_failed.device)
        if self.args.hint_placement == "prompt":
            batch.is_helped = helped.to(batch.is_helped.device)
            for i in chosen:
                prompt_ids[i], completion_ids[i], completions[i] = hinted_ids[i], new_ids[i], new_completions[i]
                if logps is not None:
                    logps[i] = new_logps[i]
            return slots
        # Under the plain prompt nobody has sampled them: pi_phi is the policy under the hint
        sequences = gather_object([(batch.local.start + i, hinted_ids[i], new_ids[i]) for i in chosen])
        measured = trainer.measure([(prompt, ids) for _, prompt, ids in sequences])
        for (number, _, ids), (behavior_logps, _) in zip(sequences, measured, strict=True):
            if batch.local.start <= number < batch.local.stop:
                slots[number - batch.local.start] = Demonstration(ids, behavior_logps.tolist(), origin="hinted")
        return slots


def with_hint(prompt: Any, hint: str, template: str) -> Any:
    """The prompt with a hint: in the text, or in the last message of a chat."""
    if isinstance(prompt, str):
        return template.format(prompt=prompt, hint=hint)
    *before, last = prompt
    return [*before, {**last, "content": template.format(prompt=last["content"], hint=hint)}]
