# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What TRL's trainer forgets at a checkpoint, so that a resumed run is the run that was interrupted.

GRPO generates for several updates at once. A checkpoint between them has to keep the completions that are left, the
position among them, and the metrics that have not been logged yet; and the order of the data after the first epoch has
to be drawn again as it was.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from ..processes import find_checkpoints


logger = get_logger(__name__)

_KEPT_BY_ALL = "kept_by_all.pt"
_PROMPTS_DIGESTED = 1000
_PROMPTS_OF_A_STREAM = 8
_OF_VERSION_0_1 = (
    "num_processes",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
)


class ResumableRepeatSampler(RepeatSampler):
    """
    TRL's sampler, which in the second epoch of a resumed run draws the order of the second epoch, not of the first.
    `count_epochs` returns how many epochs have ended, in this run or in the one that it resumes.
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


class ResumingTrainer(GRPOTrainer):
    """
    A [`~trl.GRPOTrainer`] of which a resumed run is the run that was interrupted, to the last bit.

    - Overrides `train`, `evaluate`, `_get_train_sampler`, `_save_checkpoint` and `_init_training_state`.
    - Adds `generation_state` and `load_generation_state`, which a subclass extends by what it keeps from one
      optimizer step to the next; `forget_generation`; `options_of_a_batch`, which it extends by its options; and
      `kept_by_all`, objects with `state_dict` and `load_state_dict` whose state is equal on all processes.
    - Keeps every number of TRL, and the files of a checkpoint, beside which it puts `generation_<process>.pt`.
    """

    kept_by_all: dict[str, Any] = {}
    # Options that the completions of a generation batch, their advantages or their micro-batches depend on
    options_of_a_batch: tuple[str, ...] = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "max_completion_length",
        "mask_truncated_completions",
        "pad_to_multiple_of",
        "beta",
        "use_vllm",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_clip_max",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "generation_kwargs",
        "reward_weights",
        "scale_rewards",
    )

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """
        As in [`~transformers.Trainer`], but that `resume_from_checkpoint=True` passes over a checkpoint that was not
        written to its end, and that a resumed run continues within a generation batch.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Path of a checkpoint, or `True` for the last one in `args.output_dir`.
            trial, ignore_keys_for_eval:
                As in [`~transformers.Trainer`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: The result.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`output_dir` {self.args.output_dir!r} has no complete checkpoint to resume from. Train without "
                    "`resume_from_checkpoint`, or give the path of one."
                )
        self.forget_generation()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> ResumableRepeatSampler:
        sampler = super()._get_train_sampler(dataset)
        return ResumableRepeatSampler(
            data_source=sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            count_epochs=lambda: int(self.state.epoch or 0),
        )

    def _save_checkpoint(self, model, trial):
        if not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            file = self._generation_file(folder)
            state = {
                "geometry": self._geometry(),
                "dataset": self._dataset_fingerprint,
                "buffered_inputs": self._buffered_inputs if self._is_within_generation() else None,
                **self.generation_state(),
            }
            _save(state, file)
            if self.args.should_save and (kept := self._kept_states()):
                _save(kept, folder / _KEPT_BY_ALL)
        super()._save_checkpoint(model, trial)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        result = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            if self.state.global_step >= max_steps:
                raise ValueError(
                    f"{resume_from_checkpoint} has made {self.state.global_step} updates, and the run has "
                    f"{max_steps}: nothing is left to train. Raise `max_steps` or `num_train_epochs`, or use the "
                    "checkpoint as it is."
                )
            self._load_kept(Path(resume_from_checkpoint) / _KEPT_BY_ALL)
            self._load_generation(Path(resume_from_checkpoint))
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.model if model is None else model
        folder = Path(resume_from_checkpoint)
        has_other_names = isinstance(self.processing_class, ProcessorMixin)  # models that see save under other names
        is_complete = isinstance(model, PreTrainedModel) and not (folder / "adapter_config.json").exists()
        if not (has_other_names and is_complete) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # transformers would leave out, with a warning, what is not there under the names of the model
        model.load_state_dict(type(model).from_pretrained(folder, dtype="auto").state_dict())

    def _kept_states(self) -> dict[str, dict[str, Any]]:
        states = {name: kept.state_dict() for name, kept in self.kept_by_all.items()}
        return {name: state for name, state in states.items() if state}

    def _load_kept(self, file: Path):
        names = list(self._kept_states())
        if not names:
            return
        states, problem = {}, None
        if file.exists():
            try:
                states = torch.load(file, map_location="cpu")
                missing = [name for name in names if name not in states]
                reason = f"it has no state of {', '.join(missing)}" if missing else None
            except Exception as error:  # of the file system, pickle, zip and torch
                reason = str(error)
            if reason:
                problem = (
                    f"{file} cannot be read, and without it the run cannot go on as it was: {reason}. Resume from "
                    "another checkpoint, or begin again from the weights: `model_name_or_path` takes the folder."
                )
        else:
            problem = (
                f"{file.parent} has no {file.name}, the state of {', '.join(names)}: it was saved by a run without. "
                "Resume with the options of that run, or begin again from the weights: `model_name_or_path` takes the "
                "folder."
            )
        # If one process cannot read its file, all stop: a process that went on would wait for it
        if problems := [other for other in gather_object([problem]) if other]:
            raise ValueError(problems[0])
        for name in names:
            self.kept_by_all[name].load_state_dict(states[name])

    def generation_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the generation batch: the metrics that have not been logged."""
        return {"metrics": dict(self._metrics["train"])}

    def load_generation_state(self, state: dict[str, Any]):
        """Goes on from what `generation_state` has returned."""
        self._metrics["train"].update(state["metrics"])

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self._metrics["eval"].clear()  # of an evaluation that was interrupted
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def forget_generation(self):
        """Takes away what an earlier, or interrupted, `train` has left, so that the next begins as the first did."""
        self._step = 0
        self._current_train_step_time = 0.0
        self._buffered_inputs = None
        self._last_loaded_step = -1  # vLLM gets the weights at the first generation
        self._metrics["train"].clear()
        for kept in self.kept_by_all.values():
            kept.load_state_dict({})

    def _load_generation(self, folder: Path):
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        state, problem = self._read_generation(self._generation_file(folder))
        self._check_dataset(folder, (state or {}).get("dataset"))
        # Processes generate together: either all use what they have kept, or all generate again
        problems = sorted({other for other in gather_object([problem]) if other})
        if problems:
            if self._is_within_generation():
                logger.warning(
                    f"{folder} lies within a generation batch, which cannot be used: {'; '.join(problems)}. It is "
                    "generated again, by the policy of the checkpoint."
                )
            return
        state = send_to_device(state, self.accelerator.device)
        self._buffered_inputs = state["buffered_inputs"]
        self.load_generation_state(state)

    def _check_dataset(self, folder: Path, saved: str | None):
        """Raises a `ValueError`, on all processes, if a checkpoint is of other data. Older ones do not say."""
        is_another = saved is not None and saved != self._dataset_fingerprint
        if any(gather_object([is_another])) and not self.args.ignore_data_skip:
            raise ValueError(
                f"{folder} was trained on another `train_dataset` ({saved}, and this one has "
                f"{self._dataset_fingerprint}), and a resumed run goes on at the same row of the same prompts. Give "
                "it that data, with the same `max_prompt_length`; or set `ignore_data_skip=True`, to begin with the "
                "first row of this one."
            )

    @cached_property
    def _dataset_fingerprint(self) -> str:
        """The number of rows and a digest of some of the prompts; of a stream, of the first."""
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset):
            size, prompts = "a stream", [row["prompt"] for row in islice(dataset, _PROMPTS_OF_A_STREAM)]
        else:
            size = f"{len(dataset)} rows"
            numbers = range(0, len(dataset), max(len(dataset) // _PROMPTS_DIGESTED, 1))
            prompts = dataset.select_columns("prompt").select([*numbers, len(dataset) - 1])["prompt"][:]
        text = json.dumps(prompts, sort_keys=True, default=repr)
        return f"{size}, digest of prompts {hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def _generation_file(self, folder: Path) -> Path:
        return folder / f"generation_{self.accelerator.process_index}.pt"

    def _is_within_generation(self) -> bool:
        """Whether updates of the generation batch are left after this one."""
        step = self.state.global_step * self.args.gradient_accumulation_steps
        return step % (self.args.steps_per_generation * self.num_iterations) != 0

    def _geometry(self) -> dict[str, Any]:
        """What a generation batch must have in common with the one that was saved."""
        return {
            "num_processes": self.accelerator.num_processes,
            "num_generations": self.num_generations,
            "num_iterations": self.num_iterations,
            **{name: getattr(self.args, name) for name in self.options_of_a_batch},
        }

    def _read_generation(self, file: Path) -> tuple[dict[str, Any] | None, str | None]:
        """What a process has saved, as far as it can be read, and why its batch cannot be used."""
        if not file.exists():
            return None, f"{file.name} is missing"
        try:
            state = torch.load(file, map_location="cpu")
        except Exception as error:  # of pickle, zip and torch
            return None, f"{file.name} cannot be read ({error})"
        if not isinstance(state, dict) or not {"geometry", "buffered_inputs", "metrics"} <= state.keys():
            return None, f"{file.name} is not what a checkpoint keeps"
        saved, wanted = state["geometry"], self._geometry()
        if isinstance(saved, list):  # of version 0.1
            saved = _options_of_version_0_1(saved, state["buffered_inputs"], self.args)
        differing = [name for name, value in saved.items() if wanted.get(name) != value]
        if state.get("dataset", self._dataset_fingerprint) != self._dataset_fingerprint:
            differing.append("train_dataset")
        if differing:
            return state, f"it was saved with other values of `{'`, `'.join(differing)}`"
        if state["buffered_inputs"] is not None and len(state["buffered_inputs"]) != self.args.steps_per_generation:
            return state, f"{file.name} has {len(state['buffered_inputs'])} batches"
        return state, None


def _save(state: dict[str, Any], file: Path):
    """Writes a file that is there when it is complete."""
    torch.save(state, file.with_suffix(".partial"))
    file.with_suffix(".partial").rename(file)


def find_last_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint that was written to its end: a run that is killed while it saves leaves one that was not."""
    for path in find_checkpoints(output_dir):
        try:
            json.loads((path / "trainer_state.json").read_text())  # written last
            return str(path)
        except (OSError, ValueError):
            logger.warning(f"{path} was not written to its end, and is passed over.")
    return None


def _options_of_version_0_1(geometry: list[int], buffered_inputs: list | None, args: Any) -> dict[str, Any]:
    """That version names six numbers. The other options that shape a batch can be seen in it."""
    options: dict[str, Any] = dict(zip(_OF_VERSION_0_1, geometry, strict=True))
    if buffered_inputs:
        is_budget, first = isinstance(buffered_inputs[0], list), buffered_inputs[-1]
        first = first[0] if is_budget else first
        options["max_tokens_per_microbatch"] = (args.max_tokens_per_microbatch or "a budget") if is_budget else None
        options["length_aware_batching"] = "num_sequences" in first
        options["beta"] = args.beta if (args.beta != 0.0) == ("ref_per_token_logps" in first) else None
    return options
