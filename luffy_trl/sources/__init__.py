# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Who opens slots for demonstrations: a file for each source."""

from typing import Any, Protocol

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..groups import Demonstration, MixedBatch
from ..turns import Tools


class Source(Protocol):
    """Where demonstrations come from. All processes call each method together."""

    def prepare(
        self,
        dataset: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        model: str | PreTrainedModel,
        tools: Tools,
    ) -> Dataset | IterableDataset:
        """Reads the training data once; returns what the trainer loads rows from."""

    def count_dropped(self, batch: MixedBatch) -> int:
        """How many demonstrations of the groups that begin on this process were left out for their length."""

    def open_slots(
        self, batch: MixedBatch, step: int, slots: list[Demonstration | None], is_open: list[bool]
    ) -> list[Demonstration | None]:
        """Fills the slots of the B rows of this process that are open, from those that a source before has filled."""

    def observe(self, batch: MixedBatch, output: dict[str, Any], is_solved: torch.Tensor):
        """Sees a generation batch that has been scored; `is_solved` has the shape `(N,)`."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, equal on all processes; empty if nothing."""

    def load_state_dict(self, state: dict[str, Any]):
        """Goes on from there; from an empty state, as a new source."""
