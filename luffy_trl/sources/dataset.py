# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Demonstrations from the dataset: which traces a row shows at a step, and how much of them."""

import math
import random
from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..demonstrations import (
    DEMONSTRATION_COLUMNS,
    find_eos_token_ids,
    load_generation_config,
    tokenize_demonstrations,
)
from ..groups import Demonstration, MixedBatch
from ..luffy_config import LuffyConfig


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

    def prepare(
        self, dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, model: str | PreTrainedModel
    ) -> Dataset | IterableDataset:
        """Tokenizes the traces of a dataset, and keeps them; returns the dataset that the trainer loads rows from."""
        generation_config = load_generation_config(model, **self.args.load_options)
        dataset = tokenize_demonstrations(
            dataset,
            tokenizer,
            find_eos_token_ids(tokenizer, generation_config),
            max_length=self.args.max_completion_length,
            overflow=self.args.demonstration_overflow,
            chat_template_kwargs=self.args.chat_template_kwargs,
        )
        if not isinstance(dataset, Dataset):
            return dataset
        # Rows are loaded again for each micro-batch, and traces are needed once for each generation
        self._traces = dataset.select_columns(list(DEMONSTRATION_COLUMNS))
        return dataset.remove_columns(list(DEMONSTRATION_COLUMNS.keys() - {"demonstration_row"}))

    def open_slots(
        self, rows: list[dict[str, Any]], batch: MixedBatch, step: int
    ) -> tuple[list[Demonstration | None], int]:
        """
        Decides for each row of this process whether, and what, it shows of a trace.

        Args:
            rows (`list[dict[str, Any]]`):
                The B rows, with `demonstration_row`.
            batch ([`MixedBatch`]):
                Their batch.
            step (`int`):
                Optimizer step.

        Returns:
            `tuple[list[Demonstration | None], int]`: A demonstration for each row, and how many traces of the groups
            that begin here were dropped.
        """
        if self._traces is not None:
            traces = {number: self._traces[number] for number in {row["demonstration_row"] for row in rows}}
            rows = [traces[row["demonstration_row"]] for row in rows]
        demonstrations, num_dropped = [], 0
        for i, row in enumerate(rows):
            slot = batch.slot(i)
            chosen = choose_demonstrations(row, self.args, step)
            demonstrations.append(chosen[slot] if slot < len(chosen) else None)
            if slot == 0:
                num_dropped += row["demonstrations_dropped"]
        return demonstrations, num_dropped


def choose_demonstrations(row: dict[str, Any], args: LuffyConfig, step: int) -> list[Demonstration | None]:
    """
    Chooses what a row shows at a step. Every process, and a resumed run, makes the same choice.

    Args:
        row (`dict[str, Any]`):
            A row of the tokenized dataset.
        args ([`LuffyConfig`]):
            Configuration of the run.
        step (`int`):
            Optimizer step at which the group is generated.

    Returns:
        `list[Demonstration | None]`: At most `args.num_demonstrations` demonstrations of distinct traces, in the order
        of the slots of the group; `None` for one of which no token is shown.
    """
    rng = random.Random(f"{args.seed}-{step}-{row['demonstration_row']}")
    if rng.random() >= args.demonstration_probability:
        return []
    numbers = list(range(len(row["demonstration_ids"])))
    if len(numbers) > args.num_demonstrations:
        numbers = rng.sample(numbers, args.num_demonstrations)
    demonstrations = []
    for slot, number in enumerate(numbers):
        ids = row["demonstration_ids"][number]
        logps = row["demonstration_logps"][number] if row["demonstration_logps"] else None
        length = round(len(ids) * prefix_ratio(args, step, slot, rng))
        demonstration = Demonstration(
            ids[:length],
            logps and logps[:length],
            is_complete=length == len(ids),
            key=(row["demonstration_row"], number),
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
            Source of `prefix_schedule="random"`.

    Returns:
        `float`: A ratio between `args.prefix_ratio_min` and `args.prefix_ratio_max`.
    """
    low, high = args.prefix_ratio_min, args.prefix_ratio_max
    if args.prefix_schedule == "random":
        share = rng.random()
    elif args.prefix_schedule == "fixed":
        share = slot / (args.num_demonstrations - 1) if args.num_demonstrations > 1 else 1.0
    else:
        share = SCHEDULES[args.prefix_schedule](min(step / args.prefix_schedule_steps, 1.0))
    return low + (high - low) * share
