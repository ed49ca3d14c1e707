# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Trains and pushes to the Hub of `hub_server.py`, in a process of its own as `huggingface_hub` reads `HF_ENDPOINT` when
it is imported. What was saved at each step stays in a folder, beside what a download of the pushed repository gives.
"""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import tiny
import torch
from datasets import Dataset
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig
from transformers import TrainerCallback

from luffy_trl import LuffyTrainer
from luffy_trl.callbacks import EvaluationCallback


class CopyAtSave(TrainerCallback):
    """Waits for the push of a checkpoint, and keeps what it should have pushed."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        self.trainer.push_in_progress.wait_until_done()
        copy = Path(args.output_dir).with_name(f"saved-{state.global_step}")
        shutil.copytree(args.output_dir, copy)


def answer(model, tokenizer):
    """What the model says to a prompt, greedily."""
    ids = tokenizer("7+1=", return_tensors="pt")
    with torch.no_grad():
        return model.eval().generate(**ids, do_sample=False, max_new_tokens=12)[0].tolist()


def train(folder, **options):
    args = tiny.make_args(
        folder / f"my-{folder.name}",
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        save_only_model=False,
        push_to_hub=True,
        hub_token="hf_secret",
        warmup_steps=1,
        **options.pop("args", {}),
    )
    torch.manual_seed(0)  # LoRA's weights
    trainer = LuffyTrainer(
        str(folder.parent / "model"),
        tiny.share_of_digits,
        args,
        Dataset.from_list(tiny.addition_rows(4)),
        **options,
    )
    trainer.add_callback(CopyAtSave(trainer))
    return trainer


def finish(trainer, folder):
    """Pushes, though the Hub fails the first time; what the trained and the downloaded model say."""
    failures = []
    for _ in range(2):
        try:
            trainer.push_to_hub(dataset_name="someone/additions", tags="math")
        except HfHubHTTPError as error:
            failures.append(error.response.status_code)
    if (
        int(version("huggingface_hub").partition(".")[0]) >= 2
    ):  # earlier ones ask huggingface.co, whatever the endpoint
        ModelCard.load(folder / f"my-{folder.name}" / "README.md").validate()
    snapshot_download(trainer.hub_model_id, local_dir=folder / "downloaded")
    result = {
        "repo": trainer.hub_model_id,
        "failures": failures,
        "answer": answer(trainer.model, trainer.processing_class),
    }
    (folder / "result.json").write_text(json.dumps(result))


def full(folder):
    """Every save is pushed. Benchmarks are evaluated in training."""
    trainer = train(folder)
    callback = EvaluationCallback(
        trainer, ["sums"], [str(folder.parent / "questions.jsonl")], every_n_steps=2, max_tokens=8, temperature=0
    )
    trainer.add_callback(callback)
    trainer.create_model_card(dataset_name="someone/additions", tags="math")
    trainer.train()
    finish(trainer, folder)


def lora(folder):
    """The last checkpoint is pushed with each save. Nobody mends the push of the last one."""
    peft_config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
    trainer = train(folder, args={"hub_strategy": "checkpoint", "steps_per_generation": 2}, peft_config=peft_config)
    trainer.train()
    finish(trainer, folder)


if __name__ == "__main__":
    for name in ("full", "lora"):
        globals()[name](Path(sys.argv[1]) / name)
