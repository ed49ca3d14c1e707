# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from launched_eval import train

from luffy_trl import LuffyTrainer
from luffy_trl.callbacks import EvaluationCallback


def write_folder(path, golds="4554"):
    r"""A model that says `\boxed{4}` half of the time or more, and questions."""
    rows = [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": f"{i}+{source[0]}="}],
            "reward_model": {"ground_truth": gold},
        }
        for source in ("math", "my_own")
        for i, gold in enumerate(golds if source == "math" else "444")
    ]
    Dataset.from_list(rows).to_parquet(path / "questions.parquet")
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer, hidden_size=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    texts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) for row in rows]
    answer = tokenizer(r"\boxed{4}")["input_ids"] + [tokenizer.eos_token_id]
    for _ in range(80):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        width = batch["input_ids"].shape[1]
        ids = torch.cat([batch["input_ids"], torch.tensor([answer] * len(rows))], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(len(rows), len(answer), dtype=torch.long)], dim=1)
        labels = ids.clone()
        labels[:, :width] = -100
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("callback"))


def make_trainer(folder, tmp_path, **kwargs):
    return LuffyTrainer(
        str(folder / "model"),
        tiny.share_of_digits,
        tiny.make_args(tmp_path / "out", **kwargs),
        Dataset.from_list(tiny.addition_rows(8)),
    )


def without_evaluations(result):
    return [log for log in result["log_history"] if not any(key.startswith("eval/") for key in log)]


def assert_same_training(evaluated, plain):
    assert without_evaluations(evaluated) == plain["log_history"]
    assert torch.equal(evaluated["random"], plain["random"])
    for name, weight in plain["weights"].items():
        assert torch.equal(evaluated["weights"][name], weight), name


@pytest.mark.parametrize("kwargs", [{}, {"gradient_checkpointing": True}])
def test_training_goes_on_as_if_nothing_had_happened(folder, kwargs):
    evaluated, _ = train(folder, **kwargs)
    plain, _ = train(folder, False, **kwargs)
    assert_same_training(evaluated, plain)
    evaluations = [log for log in evaluated["log_history"] if "eval/math500" in log]
    assert [log["step"] for log in evaluations] == [0, 2, 3]
    assert all(set(log) == {"eval/math500", "eval/my_own", "epoch", "step"} for log in evaluations)
    assert any(key.startswith("rewards/") for key in plain["log_history"][0])


def test_accuracy(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    files = {"data_files": [str(folder / "questions.parquet")]}
    greedy = EvaluationCallback(trainer, **files, temperature=0.0)
    assert greedy.evaluate() == {"math500": 0.5, "my_own": 1.0}  # 4 is right twice in four
    assert EvaluationCallback(trainer, ["math500"], **files, temperature=0.0, max_questions=1).evaluate() == {
        "math500": 1
    }
    assert EvaluationCallback(trainer, **files, temperature=0.0, require_think=True).evaluate() == {
        "math500": 0,
        "my_own": 0,
    }
    # a mean over samples, which does not depend on the batches
    hot = {**files, "temperature": 1.6, "num_samples": 8}
    score = EvaluationCallback(trainer, **hot, batch_size=3).evaluate()
    assert score == EvaluationCallback(trainer, **hot, batch_size=64).evaluate()
    assert 0 < score["my_own"] < 1 and score["my_own"] * 24 == pytest.approx(round(score["my_own"] * 24))
    assert score != EvaluationCallback(trainer, **hot, seed=1).evaluate()


def test_modes_and_random_numbers_are_restored(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    trainer.model.train()
    trainer.model.get_submodule("model.layers.0").eval()  # with a mode of its own
    modes = [module.training for module in trainer.model.modules()]
    assert any(modes) and not all(modes)
    seen = []
    trainer.model.register_forward_pre_hook(lambda model, _: seen.append({m.training for m in model.modules()}))
    # what draws numbers while it evaluates
    trainer.model.register_forward_hook(lambda *_: [torch.rand(1), random.random(), np.random.rand()] and None)
    callback = EvaluationCallback(trainer, data_files=[str(folder / "questions.parquet")])
    draws = []
    for evaluating in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        if evaluating:
            callback.evaluate()
        draws.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]
    assert seen and all(mode == {False} for mode in seen)
    assert [module.training for module in trainer.model.modules()] == modes


def test_when(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, max_steps=3)
    files = {"data_files": [str(folder / "questions.parquet")]}
    trainer.add_callback(EvaluationCallback(trainer, **files, every_n_steps=5, on_start=False, max_questions=1))
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "eval/math500" in log] == [3]


def test_two_processes(folder, tmp_path):
    script = Path(__file__).with_name("launched_eval.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    result = subprocess.run(
        [*command, "--num_machines", "1", "--main_process_port", "0", str(script), str(folder)],
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    ranks = [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]
    for rank in ranks:
        assert_same_training(rank["evaluated"], rank["plain"])
        assert rank["again"] == ranks[0]["again"]
    evaluations = [[log for log in r["evaluated"]["log_history"] if "eval/math500" in log] for r in ranks]
    assert evaluations[0] == evaluations[1] and [log["step"] for log in evaluations[0]] == [0, 2, 3]
    # Before training, it is what one process finds. 7 questions of 2 samples are 7 for each process.
    trainer = make_trainer(folder, tmp_path)
    files = {"data_files": [str(folder / "questions.parquet")]}
    callback = EvaluationCallback(trainer, **files, num_samples=2, max_tokens=12)
    alone = callback.evaluate()
    assert {name: evaluations[0][0][f"eval/{name}"] for name in alone} == alone


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be positive, got 0"),
        (
            {"temperature": 0.0, "num_samples": 2},
            "`temperature` must not be negative, nor 0 with more than one sample",
        ),
        ({"top_p": 2.0}, r"`top_p` must be in \(0, 1\], got 2.0"),
        ({"template": "qwen", "system_prompt": "x"}, "`system_prompt` is for the template 'own'; 'qwen' has its own"),
        ({"template": "x"}, "`template` must be one of own, qwen, simplerl, prime, none, got 'x'"),
        ({"benchmarks": ["aime"]}, "`benchmarks`: 'aime' is not known"),
        ({"max_tokens": 250}, "Question 0 of math500 .* leaves no room for `max_tokens`=250 in .* context of 256"),
    ],
)
def test_arguments_that_cannot_be_used(folder, tmp_path, kwargs, message):
    trainer = make_trainer(folder, tmp_path)
    with pytest.raises(ValueError, match=message):
        EvaluationCallback(trainer, data_files=[str(folder / "questions.parquet")], **kwargs)
