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
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from trl.trainer.utils import RepeatSampler

from .processes import find_checkpoints


if TYPE_CHECKING:
    from .luffy_trainer import LuffyTrainer


logger = get_logger(__name__)

_OF_VERSION_0_1 = (
    "num_processes",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
)
# Options that the completions of a generation batch, their advantages or their micro-batches depend on
_OPTIONS_OF_A_BATCH = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "max_completion_length",
    "mask_truncated_completions",
    "pad_to_multiple_of",
    "length_aware_batching",
    "max_tokens_per_microbatch",
    "padding_free",
    "beta",
    "use_vllm",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_cap",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "reward_weights",
    "scale_rewards",
    "advantage_baseline",
    "rollout_advantage_weight",
    "num_demonstrations",
    "demonstration_policy",
    "failure_threshold",
    "demonstration_probability",
    "demonstration_overflow",
    "demonstration_advantage_weight",
    "prefix_ratio_min",
    "prefix_ratio_max",
    "prefix_schedule",
    "prefix_schedule_steps",
)


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
    state, problem = _read_generation(trainer, _generation_file(trainer, folder))
    # What a process generates for, it generates together with the others: all use what they have, or none
    problems = sorted({other for other in gather_object([problem]) if other})
    if problems:
        if _is_within_generation(trainer):
            logger.warning(
                f"{folder} lies within a generation batch, which cannot be used: {'; '.join(problems)}. It is "
                "generated again, by the policy of the checkpoint."
            )
        return
    state = send_to_device(state, trainer.accelerator.device)
    trainer._buffered_inputs = state["buffered_inputs"]
    trainer._metrics["train"].update(state["metrics"])
    trainer._running_metrics.load_state_dict(state["running_metrics"])


def forget_generation(trainer: "LuffyTrainer"):
    """
    Takes away what an earlier, or interrupted, call of `train` has left, so that the next begins as the first did.

    Args:
        trainer ([`LuffyTrainer`]):
            The trainer.
    """
    trainer._step = 0
    trainer._current_train_step_time = 0.0
    trainer._buffered_inputs = None
    trainer._last_loaded_step = -1  # vLLM gets the weights at the first generation
    trainer._metrics["train"].clear()
    trainer._running_metrics.clear()


def find_last_checkpoint(output_dir: str) -> str | None:
    """
    The last checkpoint that was written to its end: a run that dies while it saves leaves one that was not.

    Args:
        output_dir (`str`):
            Folder with the checkpoints of a run.

    Returns:
        `str` or `None`: Path of the checkpoint, or `None` if there is none.
    """
    for path in find_checkpoints(output_dir):
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


def _geometry(trainer: "LuffyTrainer") -> dict[str, Any]:
    """What a generation batch must have in common with the one that was saved."""
    return {
        "num_processes": trainer.accelerator.num_processes,
        "num_generations": trainer.num_generations,
        "num_iterations": trainer.num_iterations,
        **{name: getattr(trainer.args, name) for name in _OPTIONS_OF_A_BATCH},
    }


def _read_generation(trainer: "LuffyTrainer", file: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What a process has saved, or why it cannot be used."""
    if not file.exists():
        return None, f"{file.name} is missing"
    try:
        state = torch.load(file, map_location="cpu")
    except Exception as error:  # of pickle, zip and torch
        return None, f"{file.name} cannot be read ({error})"
    saved, wanted = state["geometry"], _geometry(trainer)
    if isinstance(saved, list):  # of version 0.1, which names no options: those that shape the batch can be seen in it
        saved = dict(zip(_OF_VERSION_0_1, saved, strict=True))
        if state["buffered_inputs"]:
            is_budget, first = isinstance(state["buffered_inputs"][0], list), state["buffered_inputs"][-1]
            first = first[0] if is_budget else first
            args = trainer.args
            saved["max_tokens_per_microbatch"] = (args.max_tokens_per_microbatch or "a budget") if is_budget else None
            saved["length_aware_batching"] = "num_sequences" in first
            saved["beta"] = args.beta if (args.beta != 0.0) == ("ref_per_token_logps" in first) else None
    differing = [name for name, value in saved.items() if wanted[name] != value]
    if differing:
        return None, f"it was saved with other values of `{'`, `'.join(differing)}`"
    return state, None
