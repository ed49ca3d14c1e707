# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What TRL's trainer forgets at a checkpoint, so that a resumed run is the run that was interrupted.

GRPO generates for several updates at once. A checkpoint between them has to keep the completions that are left, the
position among them, and the metrics that have not been logged yet; and the order of the data after the first epoch has
to be drawn again as it was.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import RepeatSampler


if TYPE_CHECKING:
    from .luffy_trainer import LuffyTrainer


logger = get_logger(__name__)


class ResumableRepeatSampler(RepeatSampler):
    """
    TRL's sampler, which in the second epoch of a resumed run draws the order of the second epoch, not of the first.

    Args:
        *args, **kwargs:
            Passed to [`~trl.trainer.utils.RepeatSampler`].
        count_epochs (`Callable[[], int]`):
            Returns how many epochs have ended, in this run or in the one that it resumes.
    """

    def __init__(self, *args, count_epochs: Callable[[], int], **kwargs):
        super().__init__(*args, **kwargs)
        self.count_epochs = count_epochs
        self.num_drawn = 0

    def __iter__(self):
        while self.shuffle and self.num_drawn < self.count_epochs():
            torch.randperm(self.num_samples, generator=self.generator)
            self.num_drawn += 1
        self.num_drawn += 1
        yield from super().__iter__()


def save_generation(trainer: "LuffyTrainer", folder: Path):
    """
    Writes what is left of the generation batch, and the metrics that have not been logged, for this process.

    Args:
        trainer ([`LuffyTrainer`]):
            The trainer.
        folder (`Path`):
            The checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "geometry": _geometry(trainer),
        "buffered_inputs": trainer._buffered_inputs if _is_within_generation(trainer) else None,
        "metrics": dict(trainer._metrics["train"]),
        "running_metrics": trainer._running_metrics.state_dict(),
    }
    file = _generation_file(trainer, folder)
    torch.save(state, file.with_suffix(".partial"))
    file.with_suffix(".partial").rename(file)


def load_generation(trainer: "LuffyTrainer", folder: Path):
    """
    Restores what [`save_generation`] has written, and the position in the generation batch.

    Args:
        trainer ([`LuffyTrainer`]):
            The trainer, whose state is that of the checkpoint.
        folder (`Path`):
            The checkpoint.
    """
    trainer._step = trainer.state.global_step * trainer.args.gradient_accumulation_steps
    file = _generation_file(trainer, folder)
    state = torch.load(file, map_location="cpu") if file.exists() else None
    if state is None or state["geometry"] != _geometry(trainer):
        if _is_within_generation(trainer):
            logger.warning(
                f"{folder} lies within a generation batch, and has none for this number of processes and these batch "
                "sizes. It is generated again, by the policy of the checkpoint."
            )
        return
    state = send_to_device(state, trainer.accelerator.device)
    trainer._buffered_inputs = state["buffered_inputs"]
    trainer._metrics["train"].update(state["metrics"])
    trainer._running_metrics.load_state_dict(state["running_metrics"])


def find_last_checkpoint(output_dir: str) -> str | None:
    """
    The last checkpoint that was written to its end: a run that dies while it saves leaves one that was not.

    Args:
        output_dir (`str`):
            Folder with the checkpoints of a run.

    Returns:
        `str` or `None`: Path of the checkpoint, or `None` if there is none.
    """
    checkpoints = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()
    ]
    for path in sorted(checkpoints, key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((path / "trainer_state.json").read_text())  # written last
            return str(path)
        except (OSError, ValueError):
            logger.warning(f"{path} was not written to its end, and is passed over.")
    return None


def _generation_file(trainer: "LuffyTrainer", folder: Path) -> Path:
    return folder / f"generation_{trainer.accelerator.process_index}.pt"


def _is_within_generation(trainer: "LuffyTrainer") -> bool:
    """Whether updates of the generation batch are left after this one."""
    step = trainer.state.global_step * trainer.args.gradient_accumulation_steps
    return step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0


def _geometry(trainer: "LuffyTrainer") -> list[int]:
    """What a generation batch must have in common with the one that was saved."""
    args = trainer.args
    return [
        trainer.accelerator.num_processes,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.steps_per_generation,
        trainer.num_iterations,
        trainer.num_generations,
    ]
