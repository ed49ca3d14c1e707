# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Trains with each tracker, in a process whose environment says where they write. Run by `test_trackers.py`, as

    python tests/launched_trackers.py FOLDER

What they logged is read back there; this leaves each run's `log_history`, and every address that was connected to.
"""

import json
import os
import socket
import sys
from pathlib import Path

import tiny
import wandb
from datasets import Dataset

from luffy_trl import LuffyTrainer


TRACKERS = ("wandb", "trackio", "tensorboard")


def train(tracker: str, folder: Path) -> list[dict]:
    rows = tiny.addition_rows(8)
    args = tiny.make_args(
        folder / tracker,
        report_to=tracker,
        run_name="run",
        project="luffy",
        max_steps=3,
        log_completions=True,
        num_completions_to_print=0,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
    )
    trainer = LuffyTrainer(
        str(folder / "model"), tiny.is_demonstration_text, args, Dataset.from_list(rows), Dataset.from_list(rows[:2])
    )
    trainer.train()
    return trainer.state.log_history


def main(folder: Path):
    tiny.save_tiny_model(folder / "model")
    addresses = set()

    def watch(event, details):
        if event == "socket.connect" and details[0].family != socket.AF_UNIX:
            addresses.add(details[1][0])

    sys.addaudithook(watch)
    histories = {tracker: train(tracker, folder) for tracker in TRACKERS}
    wandb.finish()
    (folder / "histories.json").write_text(json.dumps(histories))
    (folder / "addresses.json").write_text(json.dumps(sorted(addresses)))


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    main(Path(sys.argv[1]))
