# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""A run that is killed and resumed is the run that nobody has killed."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file

from luffy_trl import LuffyTrainer
from luffy_trl.resuming import find_last_checkpoint


def history(folder):
    """What the last checkpoint knows of the run, without what a clock has measured."""
    records = json.loads((folder / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in record.items() if "time" not in k and "per_second" not in k} for record in records]


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("kind", ["prefixes", "on_failure"])
def test_killed_and_resumed(tmp_path, num_processes, kind):
    """
    Two updates for each generation and four for each epoch. Killed in the seventh update, the run resumes after the
    fifth: within a generation batch of the second epoch.
    """
    env = {"RESUMED_KIND": kind}
    tiny.launch("resumable", tmp_path / "whole", num_processes, env=env)
    with pytest.raises(AssertionError, match="failed in"):
        tiny.launch("resumable", tmp_path / "killed", num_processes, env={**env, "KILL_AT": "7"})
    checkpoints = sorted(path.name for path in (tmp_path / "killed" / "out").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-5"]
    tiny.launch("resumable", tmp_path / "killed", num_processes, env={**env, "RESUME": "1"})

    whole, killed = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    assert len(history(whole)) == 10 and history(killed) == history(whole)
    expected = load_file(whole / "checkpoint-10" / "model.safetensors")
    resumed = load_file(killed / "checkpoint-10" / "model.safetensors")
    assert expected.keys() == resumed.keys()
    for name, weights in expected.items():
        assert torch.equal(weights, resumed[name]), name


def make_trainer(folder, **kwargs):
    options = {"steps_per_generation": 4, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = tiny.make_args(folder / "out", **{**options, **kwargs})
    return LuffyTrainer(str(folder / "model"), tiny.share_of_digits, args, Dataset.from_list(tiny.addition_rows(8)))


def test_metrics_that_were_not_logged_are_kept(tmp_path):
    """Three updates are logged together; the checkpoint lies after the second of them."""
    tiny.save_tiny_model(tmp_path / "model")

    def log_after(max_steps, resume=None):
        trainer = make_trainer(tmp_path, max_steps=max_steps, logging_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        return [log for log in trainer.state.log_history if log["step"] == 3 and "reward" in log]

    (whole,) = log_after(3)
    (resumed,) = log_after(3, str(tmp_path / "out" / "checkpoint-2"))
    # the Trainer's own mean loss begins anew, and a clock is a clock
    differing = {key for key, value in whole.items() if resumed.get(key, "none") != value}
    assert differing <= {"loss", "step_time"}
    assert "reward" in whole and "demonstrations/prob" in whole and "entropy" in whole


def test_another_batch_size_generates_again(tmp_path, caplog):
    tiny.save_tiny_model(tmp_path / "model")
    make_trainer(tmp_path, max_steps=2).train()
    trainer = make_trainer(tmp_path, max_steps=3, steps_per_generation=3, per_device_train_batch_size=8)
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2 lies within a generation batch, and has none for this number of processes" in caplog.text
    assert generated == [3 * 8 // 4 * 3]

    trainer = make_trainer(tmp_path, max_steps=4)
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert generated == []  # what is left of the batch is enough


def test_a_checkpoint_without_an_end_is_passed_over(tmp_path, caplog):
    assert find_last_checkpoint(str(tmp_path)) is None
    for step, text in ((9, '{"epoch"'), (10, None), (8, "{}"), (2, "{}")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-best").mkdir()
    assert Path(find_last_checkpoint(str(tmp_path))).name == "checkpoint-8"
    assert "checkpoint-9 was not written to its end" in caplog.text and "checkpoint-10" in caplog.text


def test_nothing_to_resume_from(tmp_path):
    tiny.save_tiny_model(tmp_path / "model")
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="has no complete checkpoint to resume from. Train without"):
        trainer.train(resume_from_checkpoint=True)
