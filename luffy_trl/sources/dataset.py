# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Demonstrations from the dataset: which traces a row shows at a step, and how much of them."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..checks import tokenizer_of
from ..demonstrations import (
    DEMONSTRATION_COLUMNS,
    find_eos_token_ids,
    load_generation_config,
    tokenize_demonstrations,
)
from ..groups import Demonstration, MixedBatch
from ..luffy_config import LuffyConfig
from ..turns import Tools, Turns
from .comprehension import rank_by_comprehension


logger = get_logger(__name__)

# The share of the way from `prefix_ratio_min` to `prefix_ratio_max`, from the progress of the schedule (0 to 1)
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "reverse_linear": lambda progress: progress,
}


class DatasetSource:
    """
    Opens the first k slots of each group to traces of its row.

    Args:
        args ([`LuffyConfig`]):
            Configuration of the run.
    """

    def __init__(self, args: LuffyConfig):
        self.args = args
        self._traces: Dataset | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def prepare(
        self,
        dataset: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        model: str | PreTrainedModel,
        tools: Tools,
    ) -> Dataset | IterableDataset:
        """Tokenizes the traces of a dataset, and keeps them; returns the dataset that the trainer loads rows from."""
        processor = tokenizer if isinstance(tokenizer, ProcessorMixin) else None
        self._tokenizer = tokenizer = tokenizer_of(tokenizer)
        columns = dataset.column_names or []
        if self.args.demonstration_overflow == "truncate" and "demonstration_rewards" in columns:
            raise ValueError(
                "`demonstration_overflow='truncate'` with the column `demonstration_rewards`: a trace that is cut has "
                "not earned what the complete one has. Set it to 'drop', or remove the column."
            )
        if self.args.demonstration_choice == "comprehension" and columns and not {"answer", "solution"} & set(columns):
            raise ValueError(
                "`demonstration_choice='comprehension'` measures the probability of the gold answer, and the dataset "
                f"has only the columns {columns}. Give it a column `answer` or `solution`."
            )
        if self.args.objective == "oapl" and columns and "demonstration_logprobs" not in columns:
            raise ValueError(
                "`objective='oapl'` fits the log-ratio to whoever wrote a completion, and the dataset has no column "
                "`demonstration_logprobs`. Give it one (`luffy prepare-data score`), or set `num_demonstrations=0`."
            )
        reads_logprobs = self.args.objective not in ("rl_plus", "srft") and self.args.demonstration_loss != "sft"
        if "demonstration_logprobs" in columns and not reads_logprobs:
            logger.warning(
                "The column `demonstration_logprobs` is not read: a loss with "
                f"`objective={self.args.objective!r}` and `demonstration_loss={self.args.demonstration_loss!r}` has "
                "no ratio to whoever wrote a trace."
            )
        generation_config = load_generation_config(model, **self.args.load_options)
        dataset = tokenize_demonstrations(
            dataset,
            tokenizer,
            find_eos_token_ids(tokenizer, generation_config),
            max_length=self.args.max_completion_length,
            overflow=self.args.demonstration_overflow,
            chat_template_kwargs=self.args.chat_template_kwargs,
            tools=tools,
            processor=processor,
        )
        if not isinstance(dataset, Dataset):
            return dataset
        # Rows are loaded again for each micro-batch, and traces are needed once for each generation
        self._traces = dataset.select_columns(list(DEMONSTRATION_COLUMNS))
        return dataset.remove_columns(list(DEMONSTRATION_COLUMNS.keys() - {"demonstration_row"}))

    def traces_of(self, batch: MixedBatch) -> list[dict[str, Any]]:
        """The B rows with their traces, which are loaded once for a batch."""
        assert batch.inputs is not None
        if batch.traces is None and self._traces is None:
            batch.traces = batch.inputs
        elif batch.traces is None:
            traces = {number: self._traces[number] for number in {row["demonstration_row"] for row in batch.inputs}}
            batch.traces = [traces[row["demonstration_row"]] for row in batch.inputs]
        return batch.traces

    def count_dropped(self, batch: MixedBatch) -> int:
        return sum(row["demonstrations_dropped"] for i, row in enumerate(self.traces_of(batch)) if batch.slot(i) == 0)

    def open_slots(
        self, batch: MixedBatch, step: int, slots: list[Demonstration | None], is_open: list[bool]
    ) -> list[Demonstration | None]:
        last = self.args.demonstration_max_steps
        if last is not None and step >= last:
            return slots
        rows = self.traces_of(batch)
        ranks: list[list[int] | None] = [None] * len(rows)
        if self.args.demonstration_choice == "comprehension":
            ranks = rank_by_comprehension(rows, batch, is_open, self._tokenizer)
        for i, row in enumerate(rows):
            slot = batch.slot(i)
            chosen = choose_demonstrations(row, self.args, step, ranks[i]) if is_open[i] else []
            if slot < len(chosen):
                slots[i] = chosen[slot]
                if self.args.objective == "oapl" and chosen[slot] and not chosen[slot].logps:
                    raise ValueError(
                        "`objective='oapl'` fits the log-ratio to whoever wrote a completion, and the row with the "
                        f"prompt {batch.rows[i]['prompt']!r} has no `demonstration_logprobs`. Give it some, or set "
                        "`num_demonstrations=0`."
                    )
        return slots

    def observe(self, batch: MixedBatch, output: dict[str, Any], is_solved: torch.Tensor):
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]):
        pass


def choose_demonstrations(
    row: dict[str, Any], args: LuffyConfig, step: int, ranking: list[int] | None = None
) -> list[Demonstration | None]:
    """
    Chooses what a row shows at a step. Every process, and a resumed run, makes the same choice.

    Args:
        row (`dict[str, Any]`):
            A row of the tokenized dataset.
        args ([`LuffyConfig`]):
            Configuration of the run.
        step (`int`):
            Optimizer step at which the group is generated.
        ranking (`list[int]`, *optional*):
            Numbers of the traces, the best first. If `None`, traces are drawn.

    Returns:
        `list[Demonstration | None]`: At most `args.num_demonstrations` demonstrations of distinct traces, in the order
        of the slots of the group; `None` for one of which no token is shown.
    """
    rng = random.Random(f"{args.seed}-{step}-{row['demonstration_row']}")
    if rng.random() >= args.demonstration_probability:
        return []
    numbers = list(range(len(row["demonstration_ids"])))
    if ranking is not None:
        numbers = ranking[: args.num_demonstrations]
    elif len(numbers) > args.num_demonstrations:
        numbers = rng.sample(numbers, args.num_demonstrations)
    demonstrations = []
    for slot, number in enumerate(numbers):
        ids = row["demonstration_ids"][number]
        logps = row["demonstration_logps"][number] if row["demonstration_logps"] else None
        written = row["demonstration_turns"][number] if row.get("demonstration_turns") else ""
        turns = Turns.from_json(written) if written else None
        length = round(len(ids) * prefix_ratio(args, step, slot, rng))
        if turns and length < len(ids):  # where the policy can go on
            length = turns.nearest_border(length)
        demonstration = Demonstration(
            ids[:length],
            logps and logps[:length],
            is_complete=length == len(ids),
            key=(row["demonstration_row"], number),
            turns=turns,
            scores=row["demonstration_scores"][number] if row.get("demonstration_scores") else None,
        )
        demonstrations.append(demonstration if length > 0 else None)
    return demonstrations


def prefix_ratio(args: LuffyConfig, step: int, slot: int, rng: random.Random) -> float:
    """
    The share of a trace that is shown.

    Args:
        args ([`LuffyConfig`]):
            Configuration of the run.
        step (`int`):
            Optimizer step.
        slot (`int`):
            Slot of the demonstration in its group.
        rng (`random.Random`):
            Source of `prefix_schedule="random"` and `"random_cosine"`.

    Returns:
        `float`: A ratio between `args.prefix_ratio_min` and `args.prefix_ratio_max`.
    """
    low, high = args.prefix_ratio_min, args.prefix_ratio_max
    if args.prefix_schedule == "random":
        share = rng.random()
    elif args.prefix_schedule == "fixed":
        share = slot / (args.num_demonstrations - 1) if args.num_demonstrations > 1 else 1.0
    elif args.prefix_schedule == "random_cosine":
        low += (high - low) * SCHEDULES["cosine"](min(step / args.prefix_schedule_steps, 1.0))
        share = rng.random()
    else:
        share = SCHEDULES[args.prefix_schedule](min(step / args.prefix_schedule_steps, 1.0))
    return low + (high - low) * share
