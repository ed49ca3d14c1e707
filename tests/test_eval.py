# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import importlib.util
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import TrlParser

from luffy_trl.demonstrations import tokenize_prompt
from luffy_trl.eval import (
    BENCHMARKS,
    SYSTEM_PROMPT,
    EvaluationArguments,
    Question,
    bootstrap_means,
    evaluate,
    extract_choice,
    grade,
    identity,
    load_questions,
    pass_at_k,
    render_prompt,
    summarize,
    to_markdown,
)
from luffy_trl.eval.backends import Request, Sampling, SeededSampling, TransformersBackend, generate_batch, sample_seed
from luffy_trl.eval.identity import identify
from luffy_trl.eval.report import plot_pass_at_k, plot_scores
from luffy_trl.eval.runner import file_name
from luffy_trl.eval.templates import render_question


# Data


def row(source, text, gold, index=0, system="Think."):
    messages = [{"role": "system", "content": system}] if system else []
    return {
        "data_source": source,
        "prompt": [*messages, {"role": "user", "content": text}],
        "ability": "math",
        "reward_model": {"ground_truth": gold, "style": "rule"},
        "extra_info": {"index": index, "split": "default"},
    }


CHOICES = "Which?\n\nA) one\nB) two\nC) three\nD) four\n"


def write_questions(path, rows=None):
    """Six questions of mathematics, of which three have the answer 4, and two of multiple choice."""
    rows = rows or [
        *(row("aime", f"{i}+{i}=", str(2 * i), i) for i in (1, 2)),
        *(row("math", f"{i}+1=", str(i + 1), i) for i in (1, 2, 3)),
        row("my_own", "2*2=", "4"),
        *(row("arc_c", CHOICES.replace("Which", f"Which {i}"), "C", i) for i in range(2)),
    ]
    Dataset.from_list(rows).to_parquet(path)
    return str(path)


def test_files_in_the_authors_format(tmp_path):
    file = write_questions(tmp_path / "a.parquet")
    questions = load_questions(data_files=[file], shuffle_options=False)
    # in the order of the table, and one's own at the end
    assert Counter(q.benchmark for q in questions) == {"aime24": 2, "math500": 3, "arc_c": 2, "my_own": 1}
    assert [q.benchmark for q in questions][-1] == "my_own"
    assert questions[1] == Question("aime24", 1, "2+2=", "4", "Think.")
    assert questions[5] == Question("arc_c", 0, "Which 0?", "C", "Think.", ("one", "two", "three", "four"))
    assert questions[5].content == "Which 0?\n\nA) one\nB) two\nC) three\nD) four"
    assert [q.text for q in load_questions(["math500"], [file], max_questions=2)] == ["1+1=", "2+1="]


def test_repeated_rows_count_once(tmp_path, caplog):
    rows = [row("aime", "1+1=", "2", 0)] * 32 + [row("aime", "1+1=", "2", 1)]
    questions = load_questions(data_files=[write_questions(tmp_path / "a.parquet", rows)])
    assert [q.index for q in questions] == [0, 1]
    assert "31 of 33 rows are repeats" in caplog.text


@pytest.mark.parametrize(
    ("text", "gold", "options", "letter"),
    [
        ("Q?\n\n1) a\n2) b\n3) c\n", "2", ("a", "b", "c"), "B"),
        ("Q: 1) x\n2) y\n\n\nA) a\nB) b\n\nC) c\nmore", "C", ("a", "b", "c\nmore"), "C"),
        ("1) x\n2) y\nA) a\nB) b", "A", ("a", "b"), "A"),
        ("A) x\nOr what?\nA) a\nB) b", "B", ("a", "b"), "B"),
    ],
)
def test_options_in_a_text(tmp_path, text, gold, options, letter):
    file = write_questions(tmp_path / "a.parquet", [row("gpqa", text, gold)])
    (question,) = load_questions(data_files=[file], shuffle_options=False)
    assert (question.options, question.gold) == (options, letter)


def test_shuffled_options(tmp_path):
    rows = [row("arc_c", CHOICES.replace("Which", f"Which {i}"), "C", i) for i in range(200)]
    file = write_questions(tmp_path / "a.parquet", rows)
    questions = load_questions(data_files=[file])
    for question in questions:  # the gold letter is still that of "three"
        assert question.options["ABCD".index(question.gold)] == "three"
        assert sorted(question.options) == ["four", "one", "three", "two"]
        assert f"{question.gold}) three" in question.content
    # about 50 each: a standard deviation is 6
    assert all(25 < count < 75 for count in Counter(q.gold for q in questions).values())
    assert len({q.options for q in questions}) == 24
    assert load_questions(data_files=[file], max_questions=20) == questions[:20]
    assert load_questions(data_files=[file], seed=1) != questions


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": [{"role": "assistant", "content": "1"}]}, "Row 1 of .*`prompt` must be a user message"),
        (row("aime", "", "2"), "Row 1 of .*the question is empty"),
        (row("aime", "1", " "), "Row 1 of .*the gold answer is empty"),
        (row("arc_c", CHOICES, "E"), "Row 1 of .*`ground_truth` is 'E', and the options are A, B, C, D"),
        (row("arc_c", "Which?\nA) one\nC) two", "A"), "Row 1 of .*must end in options"),
        (row("arc_c", "Which?", "A"), "Row 1 of .*must end in options"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, bad, message):
    file = write_questions(tmp_path / "a.parquet", [row("aime", "1+1=", "2"), {**row("aime", "1", "2"), **bad}])
    with pytest.raises(ValueError, match=message):
        load_questions(data_files=[file])


def test_data_that_cannot_be_used(tmp_path):
    file = write_questions(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="`benchmarks`: 'aime' is not known. Choose from aime24, .*my_own"):
        load_questions(["aime"], [file])
    with pytest.raises(ValueError, match="`max_questions` must be positive, got 0"):
        load_questions(data_files=[file], max_questions=0)
    Dataset.from_list([{"prompt": "1+1="}]).to_json(tmp_path / "b.jsonl")
    with pytest.raises(
        ValueError, match="b.jsonl has the columns prompt. It needs .* `prompt` and `answer`, or the au"
    ):
        load_questions(data_files=[str(tmp_path / "b.jsonl")])
    Dataset.from_list([row("math", "1+1=", "2")]).select([]).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="c.parquet' has no rows"):
        load_questions(data_files=[file, str(tmp_path / "c.parquet")])


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_with_the_columns_of_training(tmp_path):
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1="}]
    rows = [
        {"prompt": chat, "answer": "2", "demonstrations": ["2"]},
        {"prompt": "2+2=", "answer": 4},
        {"prompt": chat[1:], "answer": None, "solution": r"It is \boxed{2}."},
    ]
    file = write_lines(tmp_path / "held_out.jsonl", rows)
    assert load_questions(data_files=[file]) == [
        Question("held_out", 0, "1+1=", "2", "Think."),
        Question("held_out", 1, "2+2=", "4", is_chat=False),
        Question("held_out", 2, "1+1=", r"It is \boxed{2}."),
    ]
    other = write_lines(tmp_path / "rows.jsonl", [{**row, "data_source": "math"} for row in rows[:2]])
    assert Counter(q.benchmark for q in load_questions(data_files=[file, other])) == {"math500": 2, "held_out": 3}
    (tmp_path / "table.csv").write_text("prompt,answer\n1+1=,2\n")
    assert load_questions(data_files=[str(tmp_path / "table.csv")]) == [
        Question("table", 0, "1+1=", "2", is_chat=False)
    ]


def test_names_of_files_that_say_too_little(tmp_path):
    rows = [{"prompt": "1+1=", "answer": "2"}]
    with pytest.raises(
        ValueError, match="math500.jsonl is called like a benchmark of the paper, and has no column `da"
    ):
        load_questions(data_files=[write_lines(tmp_path / "math500.jsonl", rows)])
    files = [write_lines(tmp_path / folder / "test.jsonl", rows) for folder in "ab"]
    with pytest.raises(ValueError, match="a/test.jsonl and .*b/test.jsonl have the same name, and no column"):
        load_questions(data_files=files)


GOOD = {"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}
AUTHORS = {"data_source": "sums", "prompt": GOOD["prompt"], "reward_model": {"ground_truth": "2"}}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (AUTHORS, {"data_source": None}, "`data_source` must be the name of a benchmark, got None"),
        (AUTHORS, {"data_source": 3}, "`data_source` must be the name of a benchmark, got 3"),
        (AUTHORS, {"data_source": " "}, "`data_source` must be the name of a benchmark, got ' '"),
        (AUTHORS, {"reward_model": "2"}, "`reward_model` must hold the gold answer as `ground_truth`, got '2'"),
        (AUTHORS, {"reward_model": None}, "the gold answer is empty"),
        (AUTHORS, {"reward_model": {"ground_truth": ["2"]}}, "the gold answer in `reward_model` must be one text or"),
        (AUTHORS, {"reward_model": {"ground_truth": True}}, "the gold answer in `reward_model` must be one text or"),
        (GOOD, {"answer": ["2"]}, r"the gold answer in `answer` must be one text or number, got \['2'\]"),
        (GOOD, {"answer": None}, "the gold answer is empty"),
        (
            GOOD,
            {"prompt": None},
            "`prompt` must be a user message, perhaps after a system message, or a text. Got 'No",
        ),
        (GOOD, {"prompt": ""}, "the question is empty"),
        (GOOD, {"prompt": ["1+1="]}, "`prompt` must be a user message"),
        (GOOD, {"prompt": [{"role": "user"}]}, "`prompt` has a message whose `content` is no text"),
        (GOOD, {"prompt": [{"role": "user", "content": ["1"]}]}, "`prompt` has a message whose `content` is no text"),
        (GOOD, {"prompt": [{"role": "human", "content": "1"}]}, "`prompt` must be a user message"),
        (
            GOOD,
            {"prompt": [*GOOD["prompt"], {"role": "assistant", "content": "1"}]},
            "`prompt` must be a user message",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, good, bad, message):
    """In a file of its own: what a column holds is up to `datasets`, which reads all rows in one form if it can."""
    file = write_lines(tmp_path / "rows.jsonl", [{**good, **bad}])
    with pytest.raises(ValueError, match=f"Row 0 of {file}: {message}"):
        load_questions(data_files=[file])
    file = write_lines(tmp_path / "more.jsonl", [good, {**good, **bad}])
    with pytest.raises(ValueError, match=f"Row 1 of {file}: "):
        load_questions(data_files=[file])


def test_an_index_that_is_none(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [{**AUTHORS, "extra_info": "x"}])
    assert load_questions(data_files=[file]) == [Question("sums", 0, "1+1=", "2")]


# Rows with the columns that these datasets have on the Hub.
HUB_ROWS = {
    "aime24": ({"id": 60, "problem": "1+1=", "solution": "so", "answer": "002"}, "1+1=", "002"),
    "aime25": ({"problem": "1+1=", "answer": "2", "id": "0"}, "1+1=", "2"),
    "amc": ({"id": 0, "problem": "1+1=", "answer": 2.0, "url": "u"}, "1+1=", "2.0"),
    "math500": ({"problem": "1+1=", "solution": "so", "answer": "2", "subject": "s", "level": 1}, "1+1=", "2"),
    "minerva": ({"question": "1+1=", "answer": "2"}, "1+1=", "2"),
    "olympiadbench": ({"id": 0, "question": "1+1=", "final_answer": ["$2$"]}, "1+1=", "$2$"),
    "arc_c": (
        {"id": "x", "question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        "Q?\n\nA) a\nB) b\n\nAnswer with the letter of the right option, in \\boxed{}.",
        "B",
    ),
    "gpqa_diamond": (
        {
            "Question": "Q?\n",
            "Correct Answer": "a\n",
            **{f"Incorrect Answer {i}": f"b{i}" for i in (1, 2, 3)},
        },
        "Q?\n\nA) a\nB) b1\nC) b2\nD) b3\n\nAnswer with the letter of the right option, in \\boxed{}.",
        "A",
    ),
    "mmlu_pro": (
        {"question_id": 1, "question": "Q?", "options": list("abcdefghij"), "answer": "J", "answer_index": 9},
        "Q?\n\n"
        + "\n".join(f"{letter.upper()}) {letter}" for letter in "abcdefghij")
        + "\n\nAnswer with the letter of the right option, in \\boxed{}.",
        "J",
    ),
}


def test_datasets_of_the_hub(tmp_path):
    # Local copies stand in for the Hub: `load_dataset` reads both by what the card in README.md says.
    for name, (hub_row, _, _) in HUB_ROWS.items():
        benchmark = BENCHMARKS[name]
        folder = tmp_path / benchmark.dataset
        folder.mkdir(parents=True)
        Dataset.from_list([hub_row]).to_parquet(folder / "data.parquet")
        config = {"config_name": benchmark.config or "default"}
        config["data_files"] = [{"split": benchmark.split, "path": "data.parquet"}]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n")
    questions = load_questions(datasets_dir=str(tmp_path), shuffle_options=False)
    assert {q.benchmark: (q.content, q.gold) for q in questions} == {n: v[1:] for n, v in HUB_ROWS.items()}
    assert list(HUB_ROWS) == list(BENCHMARKS)
    assert {q.system_prompt for q in questions} == {SYSTEM_PROMPT}

    folder = tmp_path / "other" / BENCHMARKS["minerva"].dataset
    folder.mkdir(parents=True)
    Dataset.from_list([{"text": "?"}]).to_parquet(folder / "test.parquet")
    with pytest.raises(ValueError, match="Row 0 of .*minervamath cannot be read as minerva: KeyError 'answer'"):
        load_questions(["minerva"], datasets_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="`datasets_dir`: there is no folder '.*nowhere'"):
        load_questions(["minerva"], datasets_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="hf download math-ai/minervamath --repo-type dataset --local-dir"):
        load_questions(["minerva"], datasets_dir=str(tmp_path / "HuggingFaceH4"))


def test_templates():
    tokenizer = tiny.make_tokenizer()
    prompt, ids = render_prompt(tokenizer, "1+1=", system_prompt="Think.")
    assert prompt == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(ids) == prompt
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|im_start|>"
    assert render_prompt(tokenizer, "1+1=")[0].startswith("<|im_start|>user\n1+1=<|im_end|>")
    assert render_prompt(tokenizer, "50% of {x}", "none")[0] == "50% of {x}"
    assert render_prompt(tokenizer, "1+1=", "qwen")[0] == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "<|im_start|>user\n1+1=\nPlease reason step by step" in render_prompt(tokenizer, "1+1=", "simplerl")[0]
    prompt = render_prompt(tokenizer, "50%", "prime")[0]
    assert prompt.endswith("User: 50%\n\nPresent the answer in LaTex format: \\boxed{Your answer}. Assistant:")
    with pytest.raises(ValueError, match="`template` must be one of own, qwen, simplerl, prime, none, got 'x'"):
        render_prompt(tokenizer, "1+1=", "x")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        render_prompt(tokenizer, "1+1=")


def test_a_question_is_asked_as_training_asks_it():
    tokenizer = tiny.make_tokenizer()
    chat, plain = Question("sums", 0, "1+1=", "2", "Think."), Question("sums", 0, "1+1=", "2", is_chat=False)
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1="}]
    assert render_question(tokenizer, chat)[1] == tokenize_prompt(tokenizer, messages)
    assert render_question(tokenizer, chat, system_prompt="")[1] == tokenize_prompt(tokenizer, messages[1:])
    assert render_question(tokenizer, plain) == ("1+1=", tokenize_prompt(tokenizer, "1+1="))
    assert render_question(tokenizer, plain, system_prompt="") == render_question(tokenizer, plain)
    assert render_question(tokenizer, plain, "qwen") == render_question(tokenizer, chat, "qwen")
    with pytest.raises(ValueError, match="`system_prompt` needs chat messages, and question 0 of sums is a text"):
        render_question(tokenizer, plain, system_prompt="Think.")
    tokenizer.chat_template = None
    assert render_question(tokenizer, plain)[0] == "1+1="


# Grading


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"So \boxed{C}.", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{\textbf{(C)}}", "C"),
        (r"\boxed{\text{(C)}\ }", "C"),
        (r"\boxed{\textbf{(C)}\ 5}", "C"),
        (r"\boxed{C) a long \frac{1}{2} option, with A}", "C"),
        (r"\boxed{\text{C: A planet}}", "C"),
        (r"\boxed{Option C}", "C"),
        (r"\boxed {J}", "J"),
        (r"\boxed{C} and again \boxed{(C)}", "C"),
        (r"\boxed{\textcolor{red}{C}}", "C"),
        (r"\boxed{\color{red}\text{C}.}", "C"),
        (r"\fbox{\underline{(C)}}", "C"),
        ("The answer is (C).", "C"),
        ("the correct answer is: **C**", "C"),
        ("Therefore, the answer is therefore option C.", "C"),
        (r"The answer is $\text{C}$", "C"),
        (r"The answer is \(C\)", "C"),
        ("ANSWER: C", "C"),
        ("Answer:\nC", "C"),
        ("The correct option is C, I think.", "C"),
        ("The answer is C because A plane cannot.", "C"),
        ("Option B is wrong, so the answer is C.", "C"),
        ("The answer is C. A plane cannot.", "C"),
        (r"\boxed{10^{-4} \text{ eV}}, so the answer is (A).", "A"),  # no letter in the box
        ("C", "C"),
        ("It must be\n\n**(C)**", "C"),
        # hedging
        (r"\boxed{A} or \boxed{B}", None),
        (r"\fbox{A} or \boxed{B}", None),
        (r"\boxed{A or B}", None),
        (r"\boxed{\text{A or B}}", None),
        (r"\boxed{(A) \text{ or } (B)}", None),
        (r"\boxed{A, B}", None),
        (r"\boxed{A, or B} The answer is A.", None),
        (r"\boxed{A/B}", None),
        (r"\boxed{\textbf{(A)}\ 5 \text{ or } \textbf{(B)}\ 6}", None),
        ("The answer is (A) or (B).", None),
        ("The answer is A, or else B? The answer is A and B are right", None),
        ("The answer is A. No, the answer is B.", None),
        ("ANSWER: A/B", None),
        # no choice
        ("", None),
        (r"\boxed{}", None),
        (r"\boxed{E = mc^2}", None),
        (r"\boxed{AB}", None),
        (r"\boxed{c}", None),
        (r"\boxed{Cat}", None),
        ("The answer is Cats.", None),
        ("The answer is not C.", None),
        ("A plane cannot fly to C", None),
        ("It is either A or B", None),
    ],
)
def test_extract_choice(text, letter):
    assert extract_choice(text) == letter


def test_grading_of_multiple_choice():
    question = Question("arc_c", 0, "Which?", "C", options=("a", "b", "c"))
    texts = [
        r"<think>\boxed{A}</think>The answer is (C)",
        r"A is \boxed{A}</think>\boxed{C}",
        r"<think>\boxed{C}",
        r"\boxed{C}",
        r"\boxed{A}",
    ]
    assert grade(question, texts) == [True, True, False, True, False]
    assert grade(question, texts, opened=True) == [True, True, False, False, False]
    assert grade(question, texts, require_think=True) == [True, True, False, False, False]


def test_grading_of_mathematics(caplog):
    question = Question("aime24", 0, "1+3=", "004")
    texts = [r"<think>\boxed{5}</think>\boxed{4}", r"<think>\boxed{4}", r"\boxed{4}", r"\boxed{4} or \boxed{5}"]
    assert grade(question, texts) == [True, False, True, False]
    assert grade(question, texts, opened=True) == [True, False, False, False]
    assert grade(question, texts, require_think=True) == [True, False, False, False]
    assert grade(replace(question, benchmark="my_own"), texts) == [True, False, True, False]
    # one of Minerva's answers; math-verify reads nothing in it
    gold = r"x_{0} \cos (\omega t)+$ $\dot{x}_{0} \sin (\omega t) / \omega"
    assert grade(Question("minerva", 72, "?", gold), [r"\boxed{4}"]) == [False]
    assert "Question 72 of minerva counts as wrong" in caplog.text


# Scores


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            picks = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(max, picks)) / len(picks))
    with pytest.raises(ValueError, match="`k` must be between 1 and the number of samples, 4, got 5"):
        pass_at_k(4, 1, 5)


def test_bootstrap():
    values = [1.0] * 30 + [0.0] * 70
    means = bootstrap_means(values, 4000)
    assert means.mean() == pytest.approx(0.3, abs=0.005)
    assert means.std() == pytest.approx(math.sqrt(0.3 * 0.7 / 100), rel=0.05)
    assert np.array_equal(means, bootstrap_means(values, 4000)) and not np.array_equal(
        means, bootstrap_means(values, 4000, seed=1)
    )


def samples_of(corrects, num_tokens=10, finish_reason="stop"):
    return {"samples": [{"correct": c, "num_tokens": num_tokens, "finish_reason": finish_reason} for c in corrects]}


def make_rows():
    return {
        "aime24": [samples_of([True, False, False, False]), samples_of([True, True, False, False], 30, "length")],
        "math500": [samples_of([True]), samples_of([True])],
        "arc_c": [samples_of([False]), samples_of([True])],
    }


def test_summary_by_hand():
    summary = summarize(make_rows(), num_resamples=200)
    aime = summary["benchmarks"]["aime24"]
    assert aime["metric"] == "avg@4" and aime["score"] == 0.375
    assert aime["interval"] == [0.25, 0.5]  # both the first, both the second
    assert aime["pass_at_k"] == pytest.approx({"1": 0.375, "2": (1 / 2 + 5 / 6) / 2, "4": 1.0})
    assert (aime["num_questions"], aime["num_samples"], aime["length"], aime["cut_off"]) == (2, 4, 20, 0.5)
    assert summary["benchmarks"]["math500"]["metric"] == "pass@1"
    assert summary["benchmarks"]["math500"]["interval"] == [1, 1]
    assert summary["averages"] == {"mathematics": {"score": 0.6875, "interval": [0.625, 0.75]}}


def test_table_and_plots(tmp_path):
    other = make_rows()
    other["aime24"] = [samples_of([False] * 4)] * 2
    summary = {"ours": summarize(make_rows(), 200), "theirs": summarize(other, 200)}
    assert to_markdown(summary).splitlines() == [
        "| benchmark | questions | metric | ours | ours 95% interval | ours pass@k | ours tokens | ours cut off "
        "| theirs | theirs 95% interval | theirs pass@k | theirs tokens | theirs cut off |",
        "| " + " | ".join(["---"] * 13) + " |",
        "| AIME24 | 2 | avg@4 | 37.5 | 25.0 to 50.0 | 100.0 (k=4) | 20 | 50.0% "
        "| 0.0 | 0.0 to 0.0 | 0.0 (k=4) | 10 | 0.0% |",
        "| MATH-500 | 2 | pass@1 | 100.0 | 100.0 to 100.0 | 100.0 (k=1) | 10 | 0.0% "
        "| 100.0 | 100.0 to 100.0 | 100.0 (k=1) | 10 | 0.0% |",
        "| ARC-c | 2 | pass@1 | 50.0 | 0.0 to 100.0 | 50.0 (k=1) | 10 | 0.0% "
        "| 50.0 | 0.0 to 100.0 | 50.0 (k=1) | 10 | 0.0% |",
        "| **average, mathematics** |  |  | **68.8** | 62.5 to 75.0 |  |  |  | **50.0** | 50.0 to 50.0 |  |  |  |",
    ]
    plot_scores(summary, tmp_path / "scores.png")
    assert plot_pass_at_k(summary, tmp_path / "curves.png")
    for name in ("scores.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    single = {"ours": summarize({"math500": make_rows()["math500"]}, 200)}
    assert not plot_pass_at_k(single, tmp_path / "none.png")
    assert "pass@k" not in to_markdown(single)


# Generation


def test_seeded_sampling_draws_from_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -torch.inf])
    sampling = SeededSampling(list(range(4)), torch.device("cpu"))
    draws = [sampling(None, logits.repeat(4, 1)).argmax(-1) for _ in range(2000)]
    shares = torch.bincount(torch.stack(draws).flatten(), minlength=4) / 8000
    assert shares.tolist() == pytest.approx(logits.softmax(-1).tolist(), abs=0.02)
    assert shares[3] == 0


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    r"""A tiny model, trained until it says `\boxed{4}` whatever the question; so the questions with 4 are right."""
    path = tmp_path_factory.mktemp("speaker")
    return tiny_speaker(path)


def tiny_speaker(path, says=r"\boxed{4}"):
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer, hidden_size=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    prompts = [f"{i}{op}{j}=" for i in range(1, 4) for j in range(1, 4) for op in "+*"]
    answer = tokenizer(says)["input_ids"] + [tokenizer.eos_token_id]
    for step in range(150):
        batch = [
            render_prompt(tokenizer, text, system_prompt=system)[1]
            for text in prompts[step % 3 :: 3]
            for system in (None, "Think.")
        ]
        batch += [prompt + tokenizer("<think>\n")["input_ids"] for prompt in batch]
        width = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p + answer for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * (len(p) + len(answer)) for p in batch])
        labels = ids.clone()
        labels[:, :width] = -100
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    model.generation_config.update(temperature=0.01, top_k=1, repetition_penalty=5.0, do_sample=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    path = tiny.save_tiny_model(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def make_requests(tokenizer, num=7, max_tokens=8):
    return [Request(i, 0, tokenizer("ab" * (1 + i % 3))["input_ids"], 100 + i, max_tokens) for i in range(num)]


def test_a_sample_does_not_depend_on_its_batch(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    sampling = Sampling(1.0, 1.0, (tokenizer.eos_token_id,))
    requests = make_requests(tokenizer)
    together = generate_batch(model, tokenizer, requests, sampling)
    assert [generate_batch(model, tokenizer, [r], sampling)[0] for r in requests] == together
    assert len({c.text for c in together}) == 7  # equal prompts, but other seeds
    other = generate_batch(model, tokenizer, [replace(r, seed=r.seed + 1) for r in requests], sampling)
    assert all(a.text != b.text for a, b in zip(together, other, strict=True))


def test_greedy_sampling_and_nucleus(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    requests = make_requests(tokenizer, 1)
    ids = torch.tensor([requests[0].prompt_ids])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    for temperature, top_p in ((0.0, 1.0), (1.0, 1e-6)):
        sampling = Sampling(temperature, top_p, (tokenizer.eos_token_id,))
        assert generate_batch(model, tokenizer, requests, sampling)[0].text == text


def test_the_end_of_a_completion(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    request = make_requests(tokenizer, 1)[0]
    whole = generate_batch(model, tokenizer, [request], Sampling(0.0))[0]
    assert (whole.num_tokens, whole.finish_reason, len(whole.text)) == (8, "length", 8)
    stop = tokenizer(whole.text[3])["input_ids"][0]
    assert whole.text.index(whole.text[3]) == 3
    stopped = generate_batch(model, tokenizer, [request], Sampling(0.0, eos_token_ids=(stop,)))[0]
    assert (stopped.text, stopped.num_tokens, stopped.finish_reason) == (whole.text[:3], 4, "stop")
    short, long = generate_batch(model, tokenizer, [replace(request, max_tokens=2), request], Sampling(0.0))
    assert (short.text, short.num_tokens, short.finish_reason) == (whole.text[:2], 2, "length")
    assert long == whole


def test_sampling_options_of_the_generation_config_are_not_used(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    requests, sampling = make_requests(tokenizer), Sampling(1.0, 1.0, (tokenizer.eos_token_id,))
    before = generate_batch(model, tokenizer, requests, sampling)
    stored = model.generation_config.to_dict()
    options = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "do_sample": True, "top_k": 1, "temperature": 9.0}
    model.generation_config.update(**options, min_length=500)
    try:
        assert generate_batch(model, tokenizer, requests, sampling) == before
    finally:
        model.generation_config.update(**stored)


def test_seeds_of_samples():
    keys = list(itertools.product(range(3), ("aime24", "amc"), range(30), range(32)))
    seeds = {sample_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(0, "aime24", 0, 0) == 981378134  # the same in every process, today and tomorrow


# The whole


def make_args(tmp_path, model, **kwargs):
    return EvaluationArguments(
        **{
            "model_name_or_path": [model],
            "output_dir": str(tmp_path / "out"),
            "data_files": [str(tmp_path / "data.parquet")],
            "backend": "transformers",
            "max_tokens": 12,
            "dtype": "float32",
            "num_resamples": 100,
            **kwargs,
        }
    )


def read_rows(folder, model="*"):
    """What was stored, by benchmark and question."""
    rows = [json.loads(line) for file in folder.glob(f"{model}/*.jsonl") for line in file.read_text().splitlines()]
    keys = [(row["benchmark"], row["question"]) for row in rows]
    assert len(keys) == len(set(keys))
    return dict(zip(keys, rows, strict=True))


def test_end_to_end(tmp_path, speaker):
    write_questions(tmp_path / "data.parquet")
    other = tiny.save_tiny_model(tmp_path / "other")
    models = {"model_name_or_path": [speaker, other]}
    summary = evaluate(make_args(tmp_path, None, num_samples=4, temperature=0.1, **models))
    scores = {name: entry["score"] for name, entry in summary[speaker.split("/")[-1]]["benchmarks"].items()}
    assert scores == {"aime24": 0.5, "math500": 1 / 3, "my_own": 1.0, "arc_c": 0.0}
    assert summary["other"]["averages"]["mathematics"]["score"] == 0
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary
    assert (tmp_path / "out/table.md").read_text() == to_markdown(summary)
    assert (tmp_path / "out/scores.png").exists() and (tmp_path / "out/pass_at_k.png").exists()
    assert len(read_rows(tmp_path / "out", "*other")) == 8
    rows = read_rows(tmp_path / "out", "*speaker*")
    assert len(rows) == 8
    right = rows["aime24", 1]
    assert right["prompt"].startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n2+2=")
    assert [sample["correct"] for sample in right["samples"]] == [True] * 4
    assert right["samples"][0] == {
        "text": "\\boxed{4}",
        "num_tokens": 10,
        "finish_reason": "stop",
        "seed": sample_seed(0, "aime24", 1, 0),
        "correct": True,
    }


class Counted:
    """Counts what is asked of the transformers backend."""

    def __init__(self, monkeypatch):
        self.asked, generate = [], TransformersBackend.generate

        def counting(backend, requests):
            self.asked += [(request.question, request.sample) for request in requests]
            return generate(backend, requests)

        monkeypatch.setattr(TransformersBackend, "generate", counting)


def test_resuming_after_a_kill(tmp_path, monkeypatch):
    rows = [row("math", f"{i}+1=", str(i + 1), i) for i in range(15)]
    write_questions(tmp_path / "data.parquet", rows)
    model = tiny.save_tiny_model(tmp_path / "model")
    options = {"num_samples": 2, "batch_size": 1, "max_tokens": 30, "temperature": 1.0}
    options["output_dir"] = str(tmp_path / "killed")
    config = tmp_path / "config.yaml"
    args = make_args(tmp_path, model, **options)
    config.write_text(json.dumps({k: v for k, v in vars(args).items() if v is not None}))  # JSON is YAML
    process = subprocess.Popen(
        [sys.executable, "-m", "luffy_trl.eval", "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 600
        files = []
        while not (files and files[0].read_text().count("\n") >= 3):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
            files = list((tmp_path / "killed").glob("*/*.jsonl"))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = files[0].read_text().count("\n")
    assert 3 <= done < 15
    with files[0].open("a") as file:
        file.write('{"benchmark": "math500", "question": 39, "samp')
    kept = files[0].read_text()[: files[0].read_text().rindex("\n") + 1]

    counted = Counted(monkeypatch)
    args.batch_size = 4  # batches are no setting
    evaluate(args)
    assert files[0].read_text().startswith(kept)
    assert len(read_rows(tmp_path / "killed")) == 15
    assert len(counted.asked) == len(set(counted.asked)) == 2 * (15 - done)
    stored = {json.loads(line)["question"] for line in kept.splitlines()}
    assert stored.isdisjoint(question for question, _ in counted.asked)
    # in one go, and in other batches: the same
    evaluate(make_args(tmp_path, model, **{**options, "batch_size": 7, "output_dir": str(tmp_path / "whole")}))
    assert read_rows(tmp_path / "whole") == read_rows(tmp_path / "killed")
    whole, killed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    assert whole == killed


def test_what_is_done_needs_no_model(tmp_path, speaker, monkeypatch):
    write_questions(tmp_path / "data.parquet")
    first = evaluate(make_args(tmp_path, speaker, num_samples=1, max_questions=1))
    counted = Counted(monkeypatch)
    evaluate(make_args(tmp_path, speaker, num_samples=1))  # more questions are no other settings
    assert len(counted.asked) == 4
    monkeypatch.setattr(TransformersBackend, "__init__", None)  # it cannot be loaded
    assert evaluate(make_args(tmp_path, speaker, num_samples=1, max_questions=1)) == first


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("temperature", 1.0, "`temperature` is 1.0, and .* was generated with 0.6"),
        ("num_samples", 2, "`num_samples` is 2, and .* was generated with 1"),
        ("seed", 1, "`seed` is 1"),
        ("max_tokens", 11, "`max_tokens` is 11"),
        ("system_prompt", "", "`system_prompt` is '', and .* was generated with None"),
        ("require_think", True, "`require_think` is True"),
        ("shuffle_options", False, "`shuffle_options` is False"),
        ("dtype", "bfloat16", "`dtype` is 'bfloat16'"),
    ],
)
def test_settings_are_not_mixed(tmp_path, speaker, name, value, shown):
    write_questions(tmp_path / "data.parquet")
    evaluate(make_args(tmp_path, speaker, num_samples=1, benchmarks=["my_own"]))
    with pytest.raises(ValueError, match=shown):
        evaluate(make_args(tmp_path, speaker, **{"num_samples": 1, "benchmarks": ["my_own"], name: value}))


def update_once(path, base=None, lr=1e-6):
    """One update of a model in a folder, or of a LoRA adapter of `base`, as small as those of a fine-tuning."""
    model = AutoModelForCausalLM.from_pretrained(base or path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, path, is_trainable=True) if base else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    model.save_pretrained(path)


@pytest.mark.parametrize("kind", ["model", "checkpoint", "adapter", "base", "tokenizer", "eos", "configuration"])
def test_scores_stay_with_the_weights_that_they_were_measured_on(tmp_path, kind):
    write_questions(tmp_path / "data.parquet", [row("math", "2+2=", "4")])
    base = tiny.save_tiny_model(tmp_path / "base")
    path = str(tmp_path / "my_model" / "checkpoint-10") if kind == "checkpoint" else str(tmp_path / "my_model")
    tiny.save_tiny_model(path)
    if kind in ("adapter", "base"):
        path = str(tmp_path / "adapter")
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(path)
        tiny.make_tokenizer().save_pretrained(path)
    args = make_args(tmp_path, path, temperature=0.0)
    summary = evaluate(args)
    os.utime(path)
    for file in (tmp_path / "my_model").rglob("*"):
        os.utime(file)  # when a file was written says nothing
    assert evaluate(args) == summary

    if kind in ("model", "checkpoint", "base"):
        update_once(base if kind == "base" else path)
    elif kind == "adapter":
        update_once(path, base)
    elif kind == "configuration":
        config = AutoConfig.from_pretrained(path)
        config.rope_parameters["rope_theta"] = 5.0
        config.save_pretrained(path)
    elif kind == "eos":
        GenerationConfig(eos_token_id=[1, 3]).save_pretrained(path)
    else:
        tiny.make_tokenizer(merges=[("2", "+")]).save_pretrained(path)
    what = {"tokenizer": "tokenizers", "eos": "end-of-sequence tokens"}.get(kind, "weights or configurations")
    with pytest.raises(
        ValueError, match=f"The {what} of '{path}' now .* and when .*math500.jsonl was generated .* dif"
    ):
        evaluate(args)
    args.output_dir = str(tmp_path / "again")
    assert list(evaluate(args).values())[0]["model"] != list(summary.values())[0]["model"]


def test_the_identity_of_big_tensors_is_cheap(tmp_path, monkeypatch):
    """Of 40 MB: every part of a tensor counts, and few bytes are read."""
    tokenizer = tiny.make_tokenizer()
    weight = torch.randn(5, 4_000_000, generator=torch.Generator().manual_seed(0)).bfloat16()

    def weights(changed):
        tensors = {str(i): tensor for i, tensor in enumerate(changed)}
        save_file(tensors, tmp_path / "model.safetensors")
        return identify(str(tmp_path), tokenizer, [1])["weights"]

    before = weights(weight)
    assert weights(weight) == before
    read, sample = [], identity._sample
    monkeypatch.setattr(identity, "_sample", lambda *args: (read.append(len(b)) or b for b in sample(*args)))
    for number in range(5):  # one in a thousand, as by an update in bfloat16 with a learning rate of 1e-7
        changed = weight.clone()
        generator = torch.Generator().manual_seed(number)
        changed[number, torch.randint(4_000_000, (4_000,), generator=generator)] += 1
        assert weights(changed) != before
    assert sum(read) / 5 < 100_000
    for place in (0, -1):
        changed = weight.clone()
        changed[2, place] += 1
        assert weights(changed) != before
    (tmp_path / "model.safetensors").write_bytes(b"")  # loading it says what is wrong
    assert identify(str(tmp_path), tokenizer, [1])["weights"] != before


HOSTILE = [
    "../../../escaped",
    "/absolute",
    "..",
    ".",
    "a\0b",
    "x" * 300,
    "é" * 150,
    "A",
    "a",
    "a/b",
    "a_b",
    "a\nb|c",
    "$\\foo$",
]
HOSTILE += [file_name("a/b"), "con fusion", "-rf", "\ud800"]


def test_names_of_benchmarks_do_not_lead_out_of_the_folder(tmp_path, speaker, monkeypatch):
    rows = [row(name, f"{i % 3}+1=", str(i)) for i, name in enumerate(HOSTILE[:-1])]
    write_questions(tmp_path / "data.parquet", rows)
    args = make_args(tmp_path, speaker, output_dir=str(tmp_path / "deep" / "est" / "out"), temperature=0.0)
    before = set(tmp_path.parent.rglob("*"))
    summary = evaluate(args)
    written = {path for path in set(tmp_path.parent.rglob("*")) - before if path.is_file()}
    assert all(path.is_relative_to(args.output_dir) for path in written) and not Path("/absolute.jsonl").exists()
    assert len(read_rows(Path(args.output_dir))) == len(rows)  # each in a file of its own
    names = [path.name.lower() for path in written if path.suffix == ".jsonl"]
    assert len(set(names)) == len(rows) and max(map(len, names)) < 130
    counted = Counted(monkeypatch)
    assert evaluate(args) == summary and not counted.asked
    lines = (Path(args.output_dir) / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows) + 1 and len({line.count(" | ") for line in lines}) == 1


def test_file_names():
    assert [file_name(name) for name in ("aime24", "my_own", "a-b.c")] == ["aime24", "my_own", "a-b.c"]
    names = {file_name(name).lower() for name in HOSTILE}
    assert len(names) == len(HOSTILE) and all(re.fullmatch("[a-z0-9._-]+", name) for name in names)


@pytest.mark.parametrize("name", ["..", ".", "x" * 250])
def test_names_of_models_do_not_lead_out_of_the_folder(tmp_path, monkeypatch, name):
    write_questions(tmp_path / "data.parquet", [row("math", "2+2=", "4")])
    model = tmp_path / name if len(name) > 2 else tmp_path / "my_model"
    tiny.save_tiny_model(model)
    (model / "inner").mkdir()
    monkeypatch.chdir({"..": model / "inner", ".": model}.get(name, tmp_path))
    summary = evaluate(make_args(tmp_path, name, temperature=0.0))
    assert list(summary) == [name if len(name) > 2 else "my_model"]
    (file,) = tmp_path.rglob("math500.jsonl")
    assert file.parent.parent == tmp_path / "out"


def test_files_that_cannot_be_gone_on_with(tmp_path, speaker):
    rows = [row("math", "1+1=", "2"), row("math", "2+1=", "3")]
    write_questions(tmp_path / "data.parquet", rows)
    args = make_args(tmp_path, speaker)
    evaluate(args)
    for changed, field in ((row("math", "1+2=", "2"), "prompt"), (row("math", "1+1=", "3"), "gold")):
        write_questions(tmp_path / "data.parquet", [changed, rows[1]])
        with pytest.raises(ValueError, match=f"`{field}` of question 0 is not what it was"):
            evaluate(args)
    write_questions(tmp_path / "data.parquet", rows)
    (file,) = (tmp_path / "out").glob("*/math500.jsonl")
    content = file.read_text()
    file.write_text("{]\n" + content)
    with pytest.raises(ValueError, match="Line 1 of .*math500.jsonl is damaged"):
        evaluate(args)
    file.write_text(content)
    file.with_suffix(".settings.json").unlink()
    with pytest.raises(ValueError, match="has lost its math500.settings.json"):
        evaluate(args)


def test_the_context_of_the_model(tmp_path, caplog):
    model = tiny.save_tiny_model(tmp_path / "model")  # 256 tokens
    rows = [row("math", "1" * 200, "2", system=None), row("math", "1+1=", "2", system=None)]
    write_questions(tmp_path / "data.parquet", rows)
    args = make_args(tmp_path, model, template="none", max_tokens=100, temperature=0.0)
    evaluate(args)
    stored = read_rows(tmp_path / "out")
    assert stored["math500", 0]["samples"][0]["num_tokens"] <= 56
    assert "1 of 2 samples get less than `max_tokens`, 100 tokens: the context of" in caplog.text
    write_questions(tmp_path / "data.parquet", [row("math", "1" * 256, "2", system=None)])
    args.output_dir = str(tmp_path / "long")
    with pytest.raises(
        ValueError, match="Question 0 of math500 has a prompt of 256 tokens, and the context of .* is 256"
    ):
        evaluate(args)


def test_a_prompt_that_opens_the_reasoning(tmp_path, speaker):
    tokenizer = AutoTokenizer.from_pretrained(speaker)
    model = AutoModelForCausalLM.from_pretrained(speaker)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{%", "assistant\n<think>\n{%")
    tokenizer.save_pretrained(tmp_path / "thinking")
    model.save_pretrained(tmp_path / "thinking")
    write_questions(tmp_path / "data.parquet", [row("math", "2+2=", "4")])
    summary = evaluate(make_args(tmp_path, str(tmp_path / "thinking"), temperature=0.0))
    (stored,) = read_rows(tmp_path / "out").values()
    assert stored["prompt"].endswith("assistant\n<think>\n")
    assert stored["samples"][0]["text"].endswith(r"\boxed{4}")  # but it is still reasoning
    assert summary["thinking"]["benchmarks"]["math500"]["score"] == 0


def test_templates_side_by_side(tmp_path, speaker):
    write_questions(tmp_path / "data.parquet", [row("math", "2+2=", "4")])
    twice = {"model_name_or_path": [speaker, speaker]}
    args = make_args(tmp_path, None, template=["own", "none"], temperature=0.0, **twice)
    name = speaker.split("/")[-1]
    assert list(evaluate(args)) == [name, f"{name}-none"]
    args.template = ["own", "own"]
    with pytest.raises(ValueError, match="`model_name_or_path` has a model twice, with the same template"):
        evaluate(args)


# A server


class Handler(BaseHTTPRequestHandler):
    """The two calls of a vLLM server that are used, answered by transformers: with seeds, the same samples."""

    def log_message(self, *args):
        pass

    def _answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0.01")  # heeded where the status is one to ask again after
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        assert self.path == "/v1/models"
        self.server.headers.append(dict(self.headers))
        if self.server.redirect:
            self.send_response(308)
            self.send_header("Location", self.server.redirect)
            return self.end_headers()
        if self.server.locked and self.headers["Authorization"] is None:
            return self._answer(401, {"error": "no key"})
        if self.server.locked == "echo":
            return self._answer(403, {"error": dict(self.headers)})
        self._answer(200, {"data": [{"id": self.server.name, "max_model_len": 200, "root": self.server.root}]})

    def do_POST(self):
        assert self.path == "/v1/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.headers.append(dict(self.headers))
            self.server.bodies.append(body)
            number = len(self.server.bodies)
            if number in self.server.failing:
                return self._answer(self.server.failing[number], {"error": "busy"})
            request = Request(0, 0, body["prompt"], body["seed"], body["max_tokens"])
            sampling = Sampling(body["temperature"], body["top_p"], tuple(body["stop_token_ids"]))
            (done,) = generate_batch(self.server.model, self.server.tokenizer, [request], sampling)
        choice = {"text": done.text, "finish_reason": done.finish_reason}
        self._answer(200, {"choices": [choice], "usage": {"completion_tokens": done.num_tokens}})


@pytest.fixture
def server(speaker):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.name, server.bodies, server.failing, server.lock = speaker, [], {}, threading.Lock()
    server.headers = []
    server.root, server.redirect, server.locked = speaker, None, False
    server.model = AutoModelForCausalLM.from_pretrained(speaker).eval()
    server.tokenizer = AutoTokenizer.from_pretrained(speaker)
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def make_server_args(tmp_path, server, **kwargs):
    return make_args(
        tmp_path, server.name, **{"backend": "vllm", "base_url": server.url, "dtype": "bfloat16", **kwargs}
    )


def test_a_server_gives_what_transformers_gives(tmp_path, server):
    write_questions(tmp_path / "data.parquet")
    server.failing = {2: 503}  # asked again
    options = {"num_samples": 3, "temperature": 1.0, "num_concurrent": 3}
    options["output_dir"] = str(tmp_path / "served")
    summary = evaluate(make_server_args(tmp_path, server, **options))
    del options["num_concurrent"], options["output_dir"]
    assert summary == evaluate(make_args(tmp_path, server.name, **options))
    assert read_rows(tmp_path / "served") == read_rows(tmp_path / "out")
    assert len(server.bodies) == 8 * 3 + 1
    bodies = server.bodies
    assert len({body["seed"] for body in bodies}) == 24
    settings = {(b["temperature"], b["top_p"], b["top_k"], b["repetition_penalty"], b["max_tokens"]) for b in bodies}
    assert settings == {(1.0, 1.0, -1, 1.0, 12)}


@pytest.mark.parametrize(("status", "error"), [(400, ValueError), (500, RuntimeError)])
def test_a_server_that_refuses(tmp_path, server, status, error):
    write_questions(tmp_path / "data.parquet")
    server.failing = dict.fromkeys(range(3, 9), status)  # a 500 is asked five times again
    options = {"num_samples": 1, "num_concurrent": 1}
    with pytest.raises(error, match=f'answers {status}: {{"error": "busy"}}'):
        evaluate(make_server_args(tmp_path, server, **options))
    assert [body["seed"] for body in server.bodies].count(server.bodies[2]["seed"]) == {400: 1, 500: 6}[status]
    assert len(read_rows(tmp_path / "out")) == 2  # nothing of what came before is lost
    asked = len(server.bodies)
    server.failing = {}
    evaluate(make_server_args(tmp_path, server, **options, base_url=server.url + "/v1/"))
    assert len(read_rows(tmp_path / "out")) == 8
    assert len(server.bodies) == asked + 6


def test_another_server(tmp_path, server):
    write_questions(tmp_path / "data.parquet")
    server.name, name = "served", server.name
    with pytest.raises(ValueError, match="`base_url`: the server at .*/v1 serves 'served', not '.*speaker"):
        evaluate(make_server_args(tmp_path, server, model_name_or_path=[name]))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as free:
        url = f"http://127.0.0.1:{free.server_port}"
    # shortened: a server that starts is waited for
    from luffy_trl.eval.backends import ServerBackend

    with pytest.raises(ValueError, match="`base_url`: no server answers at"):
        ServerBackend(name, Sampling(), url, num_retries=0)


def test_a_server_with_other_weights(tmp_path, server, caplog):
    write_questions(tmp_path / "data.parquet", [row("math", "2+2=", "4"), row("math", "3+3=", "6")])
    server.root = None  # not every server says it
    evaluate(make_server_args(tmp_path, server, max_questions=1))
    server.root = "/models/a"
    args = make_server_args(tmp_path, server, output_dir=str(tmp_path / "other"))
    summary = evaluate(args)
    evaluate(make_server_args(tmp_path, server))
    server.root = "/models/b"
    with pytest.raises(ValueError, match="`served_from` is '/models/b', and .* was generated with '/models/a'"):
        evaluate(args)
    # what is done needs no server, but is told
    server.name = "another"
    args.base_url = [server.url]
    assert evaluate(args) == summary
    assert "was generated before. `base_url`: the server at" in caplog.text
    # and the weights of a folder here are what they were
    tiny.save_tiny_model(tmp_path / "mine")
    server.name = str(tmp_path / "mine")
    args = make_server_args(tmp_path, server, output_dir=str(tmp_path / "mine_out"))
    evaluate(args)
    update_once(tmp_path / "mine")
    with pytest.raises(ValueError, match="The weights or configurations of '.*mine' now .* differ"):
        evaluate(args)


def test_a_server_that_redirects_or_repeats_the_password(tmp_path, server):
    write_questions(tmp_path / "data.parquet")
    server.redirect = "https://elsewhere:8443/v1/models?token=pa55word-of-mine"
    with pytest.raises(
        ValueError, match=r"redirects to https://elsewhere:8443/v1/models\. Set `base_url` to where it is"
    ):
        evaluate(make_server_args(tmp_path, server))
    server.redirect, server.locked = None, "echo"
    url = server.url.replace("://", "://me:pa55word-of-mine@")
    with pytest.raises(ValueError, match="answers 403") as error:
        evaluate(make_server_args(tmp_path, server, base_url=url))
    assert "Basic [key]" in str(error.value) and "pa55" not in str(error.value)
    server.locked = True
    evaluate(make_server_args(tmp_path, server, base_url=url))
    assert not any(b"pa55" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_what_a_server_learns(tmp_path, server, monkeypatch):
    """A login of this server from `~/.netrc`, and nothing of what the client finds in the environment."""
    write_questions(tmp_path / "data.parquet", [row("math", "2+2=", "4")])
    secrets = {"OPENAI_API_KEY": "sk-mine", "OPENAI_ORG_ID": "org-mine", "OPENAI_CUSTOM_HEADERS": "X-Mine: x-mine"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    options = {"num_samples": 1}
    evaluate(make_server_args(tmp_path, server, **options))
    assert [headers.get("Authorization") for headers in server.headers] == [None] * 2
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pa55word-of-mine\n")
    evaluate(make_server_args(tmp_path, server, **options, output_dir=str(tmp_path / "other")))
    logins = [headers.get("Authorization") for headers in server.headers[2:]]
    assert logins == ["Basic bWU6cGE1NXdvcmQtb2YtbWluZQ=="] * 2
    assert "mine" not in str([{**headers, "Authorization": ""} for headers in server.headers])
    server.locked = "echo"
    with pytest.raises(ValueError, match="answers 403") as error:
        evaluate(make_server_args(tmp_path, server, **options, output_dir=str(tmp_path / "third")))
    assert "Basic [key]" in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm(tmp_path, speaker):
    write_questions(tmp_path / "data.parquet")
    with pytest.raises(ImportError, match=r"pip install luffy-trl\[vllm\]"):
        evaluate(make_args(tmp_path, speaker, backend="vllm"))


def test_an_adapter(tmp_path):
    write_questions(tmp_path / "data.parquet")
    base = tiny.save_tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapter = str(tmp_path / "adapter")
    model.save_pretrained(adapter)
    merged = str(tmp_path / "merged")
    model.merge_and_unload().save_pretrained(merged)
    for folder in (adapter, merged):
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    models = {"model_name_or_path": [base, adapter, merged]}
    evaluate(make_args(tmp_path, None, num_samples=1, temperature=0.0, **models))
    texts = [
        {key: row["samples"][0]["text"] for key, row in read_rows(tmp_path / "out", f"*{name}").items()}
        for name in ("base", "adapter", "merged")
    ]
    assert len(texts[0]) == 8 and texts[0] != texts[1] == texts[2]
    with pytest.raises(ValueError, match=f"adapter' is a LoRA adapter of '{base}'. Evaluate it with `--backend trans"):
        evaluate(make_args(tmp_path, adapter, backend="vllm"))


# Arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backend": "sglang"}, "`backend` must be 'vllm' or 'transformers', got 'sglang'"),
        ({"base_url": "http://x"}, "`base_url` is for `backend='vllm'`"),
        ({"template": ["own", "qwen"]}, "`template` has 2 values for 1 models"),
        ({"template": ["owen"]}, "`template` must be one of own, qwen, simplerl, prime, none, got 'owen'"),
        (
            {"template": ["qwen"], "system_prompt": "x"},
            "`system_prompt` is for the template 'own'; 'qwen' has its own",
        ),
        ({"num_samples": 0}, "`num_samples` must be positive, got 0"),
        ({"temperature": -1.0}, "`temperature` must not be negative"),
        ({"temperature": 0.0, "num_samples": 2}, "`temperature` is 0, so all of the `num_samples`"),
        ({"backend": "vllm", "vllm_kwargs": "{x"}, "`vllm_kwargs` must be JSON, got '{x'"),
        ({"vllm_kwargs": {"enforce_eager": True}}, "`vllm_kwargs` is read by vllm only"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
        ({"tensor_parallel_size": 2}, "`tensor_parallel_size` is read by vllm only, not by transformers"),
        ({"num_concurrent": 2}, "`num_concurrent` is read by server only"),
        ({"backend": "vllm", "batch_size": 2}, "`batch_size` is read by transformers only, not by vllm"),
        ({"backend": "vllm", "base_url": "http://x"}, "`dtype` is read by transformers and vllm only, not by server"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, "model", **kwargs)


def test_command_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model_name_or_path: [A, B]\noutput_dir: out\ntemplate: [own, qwen]\nmax_tokens: 16\n")
    flags = ["--config", str(config), "--benchmarks", "aime24", "math500", "--no_shuffle_options", "--max_tokens", "8"]
    flags += ["--vllm_kwargs", '{"enforce_eager": true}']
    (args,) = TrlParser(EvaluationArguments).parse_args_and_config(flags)
    assert args.model_name_or_path == ["A", "B"] and args.template == ["own", "qwen"]
    assert args.benchmarks == ["aime24", "math500"] and args.vllm_kwargs == {"enforce_eager": True}
    assert (args.max_tokens, args.temperature, args.top_p, args.shuffle_options) == (8, 0.6, 1.0, False)
    defaults = EvaluationArguments(["A"], "out")
    assert (defaults.max_tokens, defaults.num_samples, defaults.backend) == (8192, None, "vllm")
    assert {name: b.num_samples for name, b in BENCHMARKS.items() if b.num_samples > 1} == {
        "aime24": 32,
        "aime25": 32,
        "amc": 32,
    }
