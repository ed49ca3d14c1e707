# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What `test_callbacks.py` runs in two processes: `accelerate launch tests/launched_eval.py OUTPUT_DIR`."""

import os
import sys
from pathlib import Path

import tiny
import torch
from datasets import Dataset

from luffy_trl import LuffyTrainer
from luffy_trl.callbacks import EvaluationCallback


def train(folder, evaluating=True, name="out", **kwargs):
    """Three steps, evaluated before the first, after the second and after the last; logged after the second."""
    trainer = LuffyTrainer(
        str(folder / "model"),
        tiny.share_of_digits,
        tiny.make_args(folder / name, max_steps=3, logging_steps=2, **kwargs),
        Dataset.from_list(tiny.addition_rows(8)),
    )
    callback = None
    if evaluating:
        callback = EvaluationCallback(
            trainer, data_files=[str(folder / "questions.parquet")], every_n_steps=2, num_samples=2, max_tokens=12
        )
        trainer.add_callback(callback)
    trainer.model.config.attention_dropout = 0.1
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1  # so that the mode and the random numbers matter
    trainer.train()
    weights = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    volatile = ("time", "runtime", "per_second")
    history = [
        {k: v for k, v in log.items() if not any(word in k for word in volatile)} for log in trainer.state.log_history
    ]
    return {"weights": weights, "log_history": history, "random": torch.rand(3)}, callback


if __name__ == "__main__":
    output_dir = Path(sys.argv[1])
    evaluated, callback = train(output_dir)
    results = {"evaluated": evaluated, "plain": train(output_dir, False)[0], "again": callback.evaluate()}
    torch.save(results, output_dir / f"rank_{os.environ['RANK']}.pt")
