# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What several processes of a run need that accelerate leaves to chance."""

import sys

from accelerate import PartialState
from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset


class OneStream(TorchIterableDataset):
    """
    A stream of which every process reads all rows, and takes its own part of each generation batch.

    accelerate gives each process shards of its own where a stream has enough of them. Then the rows of a group, which
    may lie on several processes, would belong to different prompts.

    Args:
        dataset ([`~datasets.IterableDataset`]):
            The stream.
    """

    def __init__(self, dataset: IterableDataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)

    def set_epoch(self, epoch: int):
        """Sets the epoch, on which the order of a shuffled stream depends."""
        self.dataset.set_epoch(epoch)


def end_processes():
    """
    Closes the process group when Python ends, as `trainer.end()` does.

    After an unhandled error it is left open: closing it may wait for processes that wait for this one.
    """
    if getattr(sys, "last_value", None) is None:
        PartialState().destroy_process_group()
