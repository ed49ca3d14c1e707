# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What a run writes down of itself while it goes on, for `luffy report`."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from ..files import LOG_FILE, RUN_FILE
from ..provenance import library_versions
from ..recipe import differing


# Trainers do not push what begins with an underscore
# Options that a reader looks for first, beside those that differ from their defaults
_RECIPE = (
    *("num_generations", "num_demonstrations", "objective", "policy_shaping", "policy_shaping_gamma"),
    *("demonstration_policy", "demonstration_loss", "advantage_baseline", "loss_type", "max_completion_length"),
    *("temperature", "learning_rate", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("steps_per_generation", "num_iterations", "seed"),
)
DERIVED = ("generation_batch_size", "steps_per_generation")  # set from others where the user has not set them

# Options of every trainer that a user changes, and that [`differing`] leaves to the table of a model card
_OF_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "gradient_checkpointing", "fp16", "seed", "label_smoothing_factor"),
    *("torch_compile", "eval_strategy", "eval_steps", "logging_strategy", "logging_steps", "save_strategy"),
    *("save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
)


class RecordingTrainer(GRPOTrainer):
    """
    A [`~trl.GRPOTrainer`] whose log can be read while it trains, and before it has a checkpoint.

    - Overrides `__init__`, which adds a [`RunRecorder`].
    - Keeps every number of TRL.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(RunRecorder(self))


class RunRecorder(TrainerCallback):
    """
    Writes the log to `_log.jsonl` of the output folder, a line for each record, and what the run is to `_run.json`.

    A resumed run begins the file with what its checkpoint remembers, so that no step is in it twice.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / RUN_FILE, json.dumps(self._describe(), default=str))
            _write(folder / LOG_FILE, "".join(json.dumps(record) + "\n" for record in state.log_history))

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.trainer.is_in_train:
            with (Path(args.output_dir) / LOG_FILE).open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")

    def _describe(self) -> dict[str, Any]:
        trainer, args = self.trainer, self.trainer.args
        model, weights = get_config_model_id(trainer.model.config), trainer.reward_weights.tolist()
        return {
            "model": Path(model).name if Path(model).exists() else model,  # a folder here says nothing to others
            "reward_weights": dict(zip(trainer.reward_func_names, weights, strict=True)),
            "recipe": {name: getattr(args, name) for name in _RECIPE if hasattr(args, name)},
            "differing": _changed_training(args) + differing(type(args), vars(args), left_out=DERIVED),
            "num_processes": args.world_size,
            "log_completions": args.log_completions,
            "versions": library_versions(),
        }


def _write(file: Path, text: str):
    """Writes a file that is there when it is complete."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)


def _changed_training(args: TrainingArguments) -> list[tuple[str, str, str]]:
    """Name, value and default of those that differ."""
    rows = []
    for name in _OF_TRAINING:
        values = getattr(args, name), type(args).__dataclass_fields__[name].default
        value, default = (str(getattr(own, "value", own)) for own in values)  # of an enum
        if value != default:
            rows.append((name, value, default))
    return rows
