# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What several processes of a run need that accelerate leaves to chance."""

import ctypes
import gc
import os
import shutil
import signal
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from filelock import FileLock, Timeout
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .files import LOCK_FILE


_SET_PARENT_DEATH_SIGNAL = 1  # of Linux' prctl


class OneStream(TorchIterableDataset):
    """
    A stream of which every process reads all rows, and takes its own part of each generation batch. accelerate gives
    processes shards of their own; the rows of a group that lies on several processes would be of different prompts.
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
    Closes the process group when Python ends, as `trainer.end()` does. Threads that still hold tensors of the last
    collective would abort the process. After an error it stays open: closing may wait for processes that wait for this
    one.
    """
    if getattr(sys, "last_value", None) is None:
        PartialState().destroy_process_group()
        gc.collect()  # a DDP model holds the group too, and its threads end with the last that does
        time.sleep(0.2)  # for those that are held on to all the same


def start_script():
    """What a training script does first, whether in a process of its own or in that of the command line."""
    os.environ.pop("PYTHONSAFEPATH", None)  # see `luffy_trl.cli`
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # A launcher that is killed cannot end its children
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed finds out too, with a warning
    # TRL calls methods of transformers by names that have changed
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning, "transformers.modeling_utils")


def find_checkpoints(output_dir: str) -> list[Path]:
    """The checkpoints of a folder, the last one first."""
    paths = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [path for path in paths if path.name.rpartition("-")[2].isdigit()]
    return sorted(numbered, key=lambda path: -int(path.name.rpartition("-")[2]))


def check_output_dir(args: TrainingArguments, overwrite: bool):
    """
    Raises a `ValueError` if a new run would mix its checkpoints with those of another, which `overwrite` deletes.
    """
    checkpoints = find_checkpoints(args.output_dir)
    if overwrite and args.resume_from_checkpoint:
        raise ValueError(
            "`overwrite_output_dir=True` deletes the checkpoints that `resume_from_checkpoint` may need. Remove one."
        )
    if not checkpoints or args.resume_from_checkpoint:
        return
    if not overwrite:
        raise ValueError(
            f"`output_dir` {args.output_dir!r} has checkpoints of an earlier run, up to {checkpoints[0].name}. Go "
            "on with `--resume_from_checkpoint true`, choose another `output_dir`, or delete them with "
            "`--overwrite_output_dir true`."
        )
    if args.process_index == 0:
        with _lock(args.output_dir):  # of a run that writes to them, nothing is deleted
            for path in checkpoints:
                shutil.rmtree(path)


@contextmanager
def holding(file: Path, refusal: str):
    """Holds a lock file, which ends with the process; a `ValueError` with this message if another process does."""
    lock = FileLock(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(refusal) from None
    except NotImplementedError:
        pass  # a file system without locks
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _lock(output_dir: str):
    """Holds the lock of a folder in this process; a `ValueError` if another run does."""
    file = Path(output_dir) / LOCK_FILE
    refusal = f"Another run writes to `output_dir` {output_dir!r}. Wait for its end, or choose another folder."
    with holding(file, refusal):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@contextmanager
def locked(output_dir: str):
    """Keeps other runs out of a folder while this one writes to it. All processes must enter together."""
    state = PartialState()
    with ExitStack() as stack:
        error: ValueError | None = None
        if state.is_main_process:
            try:
                stack.enter_context(_lock(output_dir))
            except ValueError as refused:
                error = refused
        if state.num_processes > 1:
            error = broadcast_object_list([error], from_process=0)[0]
        if error is not None:
            raise error
        yield
