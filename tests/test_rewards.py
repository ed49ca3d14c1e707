# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import functools
import threading

import pytest
import tiny
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from luffy_trl.rewards import math_verify_reward


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        (r"\boxed{4}", "4", 1.0),
        (r"\boxed{5}", "4", 0.0),
        (r"So the answer is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"\boxed{\frac12}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.333}", r"\frac{1}{3}", 0.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0),
        (r"\boxed{x^2+1}", "1+x^2", 1.0),
        (r"\boxed{4}", r"The answer is \boxed{4}, as shown.", 1.0),
        (r"\boxed{4}", "$4$", 1.0),
        (r"$4$", "4", 1.0),
        ("4", "4", 0.0),  # no LaTeX, no answer
        (r"\boxed{3} or \boxed{4}", "4", 0.0),  # a guess too many
        (r"\boxed{\$18.90}", r"\$18.90", 1.0),
        ("", "4", 0.0),
        (r"\boxed{4}", 4, 1.0),
        (r"\boxed{4}", None, None),
        (r"\boxed{72}", "#### 72", 1.0),
        (r"\boxed{72}", "The answer is 72.", 1.0),
        (r"\boxed{72}", "72 clips", 1.0),
        (r"\boxed{\text{Evelyn}}", "Evelyn", 1.0),
        (r"\boxed{2ab+3}", "2ab+3", 1.0),
        (r"\boxed{3}", "2ab+3", 0.0),
        (r"\boxed{4}", "", None),
    ],
)
def test_answers(completion, gold, reward):
    assert math_verify_reward([completion], answer=[gold]) == [reward]
    assert math_verify_reward([[{"role": "assistant", "content": completion}]], solution=[gold]) == [reward]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (r"<think>2 and 2</think>\boxed{4}", 1.0),
        (r"2 and 2</think>\boxed{4}", 1.0),  # the opening tag was in the prompt
        (r"\boxed{4}", 0.0),
        (r"<think>\boxed{4}", 0.0),
        (r"<think>\boxed{4}</think>", 0.0),
        (r"<think>\boxed{4}</think>\boxed{5}", 0.0),
        (r"x</think>\boxed{5}</think>\boxed{4}", 0.0),  # only what stands before the second closing tag counts
        (r"x</think>\boxed{4}</think>\boxed{5}", 1.0),
    ],
)
def test_require_think(completion, reward):
    assert math_verify_reward([completion], answer=["4"], require_think=True) == [reward]


def test_without_require_think_the_whole_text_is_judged():
    assert math_verify_reward([r"<think>\boxed{4}</think>"], answer=["4"]) == [1.0]


def test_the_answer_goes_before_the_solution():
    assert math_verify_reward([r"\boxed{4}"] * 2, solution=["5", "4"], answer=["4", None]) == [1.0, 1.0]


@pytest.mark.parametrize("require_think", [False, True])
def test_a_message_without_content(require_think):
    completion = [{"role": "assistant", "content": None}]
    assert math_verify_reward([completion], answer=["4"], require_think=require_think) == [0.0]


def test_off_the_main_thread():
    results = []
    thread = threading.Thread(
        target=lambda: results.extend(math_verify_reward([r"\boxed{4}", r"\boxed{3}"], answer=["4", "4"]))
    )
    thread.start()
    thread.join()
    assert results == [1.0, 0.0]


def test_a_dataset_without_gold_answers():
    with pytest.raises(ValueError, match="give the dataset a column `answer` or `solution`"):
        math_verify_reward([r"\boxed{4}"])


def test_in_the_stock_trainer(tmp_path):
    trainer = GRPOTrainer(
        tiny.save_tiny_model(tmp_path / "model"),
        functools.partial(math_verify_reward, require_think=True),
        tiny.make_args(tmp_path, cls=GRPOConfig),
        Dataset.from_list([{"prompt": "2+2=", "answer": "4"}]),
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/math_verify_reward/mean"] == 0
