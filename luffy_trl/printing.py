# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What a training script prints: a few lines before the first step, and one short line for each record of the log."""

import logging
import sys
import time
from datetime import timedelta
from typing import Any

import datasets
import transformers
from huggingface_hub.utils import disable_progress_bars
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from .estimates import GIB


WIDTH = 120
# Of a record, in this order: the metric, what the line calls it, and its format
_COLUMNS = (
    ("reward", "reward", ".3f"),
    ("on_policy/solve_none", "none", ".2f"),
    ("on_policy/solve_all", "all", ".2f"),
    ("demonstrations/prob", "prob", ".3f"),
    ("completions/mean_length", "length", ".0f"),
    ("mean_token_accuracy", "accuracy", ".3f"),
    ("entropy", "entropy", ".2f"),
)


class ShortLines(ProgressCallback):
    """
    Of each record the numbers that matter, in one line; the others are in the log. And the progress bar of
    transformers, which knows the time that is left, in a terminal and unless `disable_tqdm` is set.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.began = state.global_step, time.monotonic()
        self.is_quiet = args.disable_tqdm or not sys.stderr.isatty()
        if not self.is_quiet:
            super().on_train_begin(args, state, control, **kwargs)
            self.current_step = state.global_step
            if self.training_bar is not None:
                self.training_bar.initial = self.training_bar.n = self.training_bar.last_print_n = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if not self.is_quiet:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            tqdm.write(short_line(logs, state.global_step, state.max_steps, self._seconds_left(state)))
            sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if not self.is_quiet:
            super().on_train_end(args, state, control, **kwargs)

    def _seconds_left(self, state) -> float | None:
        done = state.global_step - self.first_step
        return (time.monotonic() - self.began) / done * (state.max_steps - state.global_step) if done > 0 else None


def short_line(logs: dict[str, Any], step: int, num_steps: int, seconds_left: float | None = None) -> str:
    """
    A record of the log as a line.

    Args:
        logs (`dict[str, Any]`):
            The record.
        step, num_steps (`int`):
            The optimizer step, and how many there are.
        seconds_left (`float`, *optional*):
            Time until the end.

    Returns:
        `str`: At most 120 characters.
    """
    if "train_runtime" in logs:
        return f"ended after {num_steps} steps, {_clock(logs['train_runtime'])}, mean loss {logs['train_loss']:.4g}"
    parts = [f"{step}/{num_steps}"]
    benchmarks = [key for key in logs if key.startswith("eval/")]
    name = next((key[5:-5] for key in logs if key.startswith("eval_") and key.endswith("_loss")), "")
    if benchmarks:
        parts += [f"{key} {logs[key]:.3f}" for key in benchmarks]
    elif any(key.startswith("eval_") for key in logs):
        values = {key.removeprefix(f"eval_{name}_" if name else "eval_"): value for key, value in logs.items()}
        values |= {key.removeprefix("eval_"): value for key, value in logs.items()}
        parts += [f"eval {name}".strip(), *_fields(values)]
        if "runtime" in values:
            parts.append(f"{values['runtime']:.1f} s")
    elif "loss" in logs or "reward" in logs:
        parts += _fields(logs)
        if "step_time" in logs:
            parts.append(f"{logs['step_time']:.1f} s")
        if seconds_left is not None:
            parts.append(f"left {_clock(seconds_left)}")
    else:  # of a callback of the user's own
        parts += [f"{key} {value}" for key, value in logs.items() if key != "epoch"]
    line = "  ".join(parts)
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _fields(logs: dict[str, Any]) -> list[str]:
    shown = [(label, logs[key], form) for key, label, form in _COLUMNS if logs.get(key) is not None]
    if "reward" not in logs and logs.get("loss") is not None:
        shown.insert(0, ("loss", logs["loss"], ".4g"))
    return [f"{label} {value:{form}}" for label, value, form in shown]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def set_up_output(args: TrainingArguments):
    """
    Makes `log_level` hold for this package and TRL too, and progress bars be drawn in a terminal only.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The arguments of the run.
    """
    if args.log_level != "passive":
        level = args.get_process_log_level()
        if level < logging.WARNING:  # which Python prints without a handler
            logging.basicConfig(format="%(levelname)s:%(name)s: %(message)s")
        for name in ("luffy_trl", "trl"):
            logging.getLogger(name).setLevel(level)
        datasets.utils.logging.set_verbosity(level)
    if not sys.stderr.isatty() or args.process_index != 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        disable_progress_bars()


def print_short_lines(trainer, facts: dict[str, str]):
    """
    Says what a run is, and has its records printed in short lines.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, before it trains.
        facts (`dict[str, str]`):
            What the trainer does not know, such as its data, by the first word of the line.
    """
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ShortLines())
    if trainer.is_world_process_zero():
        for name, fact in facts.items():
            print(f"{name:<8} {fact}")
        sys.stdout.flush()


def describe_model(name: str, trainer) -> str:
    """Name, size and precision of the model, and where it is."""
    parameters = list(trainer.model.parameters())
    total, trained = (sum(map(_size, part)) for part in (parameters, [p for p in parameters if p.requires_grad]))
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.requires_grad}))
    autocast = trainer.accelerator.mixed_precision
    words = [name, f"{_large(total)} parameters" + (f", {_large(trained)} trained" if trained < total else "")]
    words += [f"{dtypes} weights" + ("" if autocast == "no" else f", {autocast} autocast")]
    num = trainer.accelerator.num_processes
    words += [f"{num} process{'es' if num > 1 else ''} on {trainer.accelerator.device.type}"]
    return ", ".join(words)


def describe_memory(trainer) -> str:
    """Weights, gradients and the moments of AdamW, of a model whose states are not sharded; activations on top."""
    sizes = [(_size(p) * p.element_size(), p.requires_grad) for p in trainer.model.parameters()]
    states = sum(size for size, _ in sizes) + 3 * sum(size for size, is_trained in sizes if is_trained)
    where = "a device" if trainer.accelerator.num_processes == 1 else "each device, or all that share them"
    return f"{states / GIB:.3g} GiB of weights, gradients and AdamW's state on {where}; activations come on top"


def describe_results(args: TrainingArguments) -> str:
    """The output folder, what goes to it and when."""
    saves = {"no": "the model at the end", "steps": f"a checkpoint every {args.save_steps:g} steps"}
    kept = saves.get(str(getattr(args.save_strategy, "value", args.save_strategy)), "a checkpoint every epoch")
    return f"{args.output_dir}: {kept}, a line of the log every {args.logging_steps:g} steps"


def _size(parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # of ZeRO-3, which leaves nothing in its place


def _large(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(int(number))
