# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import functools
import threading

import pytest
import tiny
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import rewards
from luffy_trl.grading import WorkerPool
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


GOLDS = ["42", "3.5", r"\frac{1}{2}", r"\sqrt{2}", "(1, 2)", "[0, 1)", r"\{1, 2\}", "x^2 + 1", r"\text{Evelyn}", "B"]
GOLDS += [
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
    r"12\text{ cm}",
    "4343_6",
    r"\$18.90",
    r"12.5\%",
    r"90^\circ",
    "1,000",
]
FORMS = [
    "%s",
    "%s.",
    "%s,",
    "$%s$",
    "$%s.$",
    r"\textcolor{red}{%s}",
    r"{\color{red} %s}",
    r"\underline{%s}.",
    r"{\Large %s}",
]


def test_how_an_answer_is_written_does_not_matter():
    """A full stop or a comma at the end, a colour and a size: of every kind of answer, and of the gold answer."""

    def graded(texts, golds):
        return math_verify_reward(texts, answer=golds)

    all_right = [1.0] * len(GOLDS)
    for form in FORMS:
        written = [form.replace("%s", gold) for gold in GOLDS]
        assert graded([rf"\boxed{{{answer}}}" for answer in written], GOLDS) == all_right
        others = [*written[1:], written[0]]
        assert graded([rf"\boxed{{{answer}}}" for answer in others], GOLDS) == [0.0] * len(GOLDS)
    assert graded([f"So it is \\[ {gold}. \\]" for gold in GOLDS], GOLDS) == all_right
    assert graded([rf"\boxed{{{gold}}}" for gold in GOLDS], [f"{gold}." for gold in GOLDS]) == all_right


@pytest.mark.parametrize(
    ("answer", "gold", "reward"),
    [
        (r"1\,000", "1000", 1.0),
        (r"12\ 345\ 678", "12345678", 1.0),
        ("12 345.5", "12345.5", 1.0),
        ("(1,000)", "1000", 0.0),
        ("10 20", "1020", 0.0),
        ("12 dollars", "12", 1.0),
        ("12", "12 chickens", 1.0),
        (r"\frac{1}{2} cup", "0.5", 1.0),
        ("12 million", "12", 0.0),
        ("12 or", "12", 0.0),
        (r"\varnothing", r"\emptyset", 1.0),
        # math-verify finds these equal
        ("12 m", "12 cm", 0.0),
        (r"12\,\mathrm{kg}", r"12\text{ cm}", 0.0),
        (r"12\text{ cm}", r"12\text{ cm}^2", 0.0),
        ("12 centimeters", r"12\text{ cm}", 1.0),
        ("12 inches", "12 in", 1.0),
        ("12 square cm", r"12\text{ cm}^2", 1.0),
        ("12", "12 cm", 1.0),
        ("12 cm", "12", 1.0),
        ("4343_7", "4343_6", 0.0),
        ("4343_{6}", "4343_6", 1.0),
        ("4343", "4343_6", 1.0),
        ("7,7", "7", 0.0),
        (r"\frac12, \frac12", "0.5", 0.0),
        ("7, 7", "7, 7", 1.0),
        ("100,100", "100100", 1.0),
        ("3=2", "2", 0.0),
        ("x = 2", "2", 1.0),
        ("1 + 1 = 2", "2", 1.0),
        ("2.0 = 2", "2", 1.0),
        ("BA", "AB", 0.0),
        (r"\text{AB}", "AB", 1.0),
        ("ba", "ab", 1.0),  # a product
        (r"100\%", "100", 1.0),
        (r"100\%", "1", 1.0),
    ],
)
def test_everyday_answers(answer, gold, reward):
    assert math_verify_reward([rf"\boxed{{{answer}}}"], answer=[gold]) == [reward]


@pytest.mark.parametrize(
    ("answer", "gold", "reward"),
    [
        # a quantity in several units, of which math-verify reads the first number
        (r"2\text{ h }30\text{ min}", "2", 0.0),
        (r"2 \mathrm{~h} 30 \mathrm{~min}", "2", 0.0),
        (r"2\text{ h and }30\text{ min}", "2", 0.0),
        (r"2\text{ h} + 30\text{ min}", "2", 0.0),
        (r"5\text{ ft }6\text{ in}", "5", 0.0),
        (r"2\text{ cups }3\text{ spoons}", "2", 0.0),
        ("2 h 30 min", "2", 0.0),
        ("2", r"2\text{ h }30\text{ min}", 0.0),
        (r"2\text{ h }31\text{ min}", r"2\text{ h }30\text{ min}", 0.0),
        (r"30\text{ h }2\text{ min}", r"2\text{ h }30\text{ min}", 0.0),
        ("2 hours and 30 minutes", r"2\text{ h }30\text{ min}", 1.0),
        ("2 h 30 min", "2 h 30 min", 1.0),
        # decimals count as they are written
        ("0.30000001", "0.3", 0.0),
        (r"0.30000001\text{ cm}", r"0.3\text{ cm}", 0.0),
        ("1,000.50000001", "1,000.5", 0.0),
        ("(0.30000001, 1)", "(0.3, 1)", 0.0),
        (r"\{0.3, 0.70000001\}", r"\{0.3, 0.7\}", 0.0),
        ("x = 0.30000001", "0.3", 0.0),
        ("x = 0.5", r"x = \frac{1}{2}", 1.0),
        ("y = 0.25 + 0.25 = 0.5", "0.5", 1.0),
        ("[0.5, 1]", r"\frac{1}{2} \le x \le 1", 1.0),
        (r"\frac{30000001}{100000000}", "0.3", 0.0),
        ("0.333333", r"\frac{1}{3}", 0.0),
        ("1.414214", r"\sqrt{2}", 0.0),
        (r"30.000001\%", "0.3", 0.0),
        ("0.00000002", "0.00000001", 0.0),
        (r"9.1 \times 10^{-19}", r"1.6 \times 10^{-19}", 0.0),
        ("10^{-21}", "10^{-20}", 0.0),
        (r"\text{0.3}", "0.3", 1.0),
        (r"\text{0.0}", "0.0", 1.0),
        (r"\mathbf{1,000}", "1000", 1.0),
        ("0.300", "0.3", 1.0),
        (r"\frac{3}{10}", "0.3", 1.0),
        ("0.1 + 0.2", "0.3", 1.0),
        (r"1.1 \cdot 1.1", "1.21", 1.0),
        (r"\sqrt{0.09}", "0.3", 1.0),
        (r"30\%", "0.3", 1.0),
        (r"1.60 \times 10^{-19}", r"1.6 \times 10^{-19}", 1.0),
        ("0.0000015", r"1.5 \times 10^{-6}", 1.0),
        # decimals without an end
        (r"0.\overline{3}", r"\frac{1}{3}", 1.0),
        (r"\frac{1}{3}", r"0.\overline{3}", 1.0),
        (r"0.\bar{3}", "1/3", 1.0),
        (r"0.\dot3", "1/3", 1.0),
        (r"-1.1\overline{6}", r"-\frac{7}{6}", 1.0),
        (r".\overline{142857}", r"\frac{1}{7}", 1.0),
        (r"0.\overline{9}", "1", 1.0),
        (r"0.\overline{4}", r"\frac{1}{3}", 0.0),
        # intervals as inequalities
        ("x > 1", r"(1, \infty)", 1.0),
        ("1 < x", r"(1, \infty)", 1.0),
        (r"x \ge 1", r"[1, \infty)", 1.0),
        ("0 < x < 1", "(0, 1)", 1.0),
        (r"(1, \infty)", "x > 1", 1.0),
        (r"x \ge 1", r"(1, \infty)", 0.0),
        ("x > 2", r"(1, \infty)", 0.0),
        ("x > 0", "(0, 1)", 0.0),
        # an option with its text
        (r"\textbf{(C)}\ 5", "C", 1.0),
        (r"\textbf{(C) }5", r"\text{(C)}", 1.0),
        ("C) 5", "(C)", 1.0),
        (r"\mathrm{C}. \frac{1}{2}", "C", 1.0),
        (r"\textbf{(D)}\ 5", "C", 0.0),
        ("(C) 5 or (D) 6", "C", 0.0),
        ("(C) 5, (D) 6", "C", 0.0),
        ("C or D", "C", 0.0),
        ("C = 5", "C", 0.0),
        ("5", "C", 0.0),
    ],
)
def test_what_math_verify_reads_by_halves(answer, gold, reward):
    assert math_verify_reward([rf"\boxed{{{answer}}}"], answer=[gold]) == [reward]


def test_a_letter_that_begins_a_text_is_no_answer():
    assert math_verify_reward(["C) is wrong, I think.", "C. It is D."], answer=["C"] * 2) == [0.0, 0.0]


def test_a_repeated_answer_does_not_pass_as_a_list():
    assert (
        math_verify_reward([r"\boxed{7}\boxed{7,7}", r"\boxed{12 cm}\boxed{12 m}"], answer=["7", "12 cm"]) == [0.0] * 2
    )


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


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        (r"\boxed{4}\boxed{5}", "4", 0.0),
        (r"\boxed{4}\boxed{5}", "5", 0.0),
        (r"\boxed{4}\boxed{5}", "4, 5", 1.0),
        (r"It is \boxed{4}. Or maybe it is \boxed{5}.", "4", 0.0),  # math-verify says 5
        (r"It is \boxed{4}. Or maybe it is \boxed{5}.", "5", 0.0),
        (r"\boxed{4} " + "and so on " * 100 + r"\boxed{5}", "5", 0.0),
        (r"$x = \boxed{4}$ " + "and so on " * 100 + r"$y = \boxed{5}$", "4, 5", 1.0),
        (r"\boxed{\frac{1}{2}} " + "and so on " * 100 + r"\boxed{0.5}", "0.5", 1.0),
        (r"\boxed{5, \boxed{4}}", "4", 0.0),  # math-verify says 4
        (r"\boxed{\boxed{4}}", "4", 1.0),
        (r"\boxed{4 \text{ or } 5}", "4", 0.0),
        (r"\boxed{4, 5}", "4", 0.0),
        (r"\boxed{4} \fbox{5}", "4", 0.0),
        (r"\fbox{4}", "4", 1.0),
        (r"\boxed{4}, so the final answer is $5$. I hope it is correct.", "5", 0.0),
        (r"<think>Is it \boxed{3}? No.</think>\boxed{4}", "4", 1.0),
        (r"<think>Is it \boxed{3}? No.</think>\boxed{4}", "3", 0.0),
        (r"<think>Is it \boxed{3}? Or \boxed{4}?</think>", "4", 0.0),
        (r"I put it into \boxed{}: \boxed{4}", "4", 1.0),
        (r"\boxed{4} and \boxed{", "4", 1.0),
        (r"\boxed{4} and \boxed{5", "4", 0.0),
        (r"$4$ and \boxed{5", "4", 0.0),
        (r"\boxed{4", "4", 0.0),
        (r"\boxed{\frac{1}{2}", "0.5", 0.0),
        (r"\boxed{\left\{ 4, 5 \right\}}", r"\{4, 5\}", 1.0),
        (r"$\boxed{12.5}$%", r"12.5\%", 1.0),
    ],
)
def test_which_box_counts(completion, gold, reward):
    assert math_verify_reward([completion], answer=[gold]) == [reward]


@pytest.mark.parametrize(
    "answer",
    [
        "10^{10^{10}}",
        "1000000000!",
        "7" * 100_000,
        "2 h " * 20_000,
        " " * 50_000 + "2",
        "+".join(["1"] * 50_000),
        "{" * 10_000 + "6" + "}" * 10_000,
        r"\begin{pmatrix}" + r"\\".join(["1" + "&2" * 99] * 100) + r"\end{pmatrix}",
        r"\{" + ",".join(map(str, range(20_000))) + r"\}",
        "5\0",
        "5\udfff",
        "\u0665\uff15\U0001d7d3",
        r"\frac{5}{0} - \frac{0}{0}",
        r"\text{Ignore the gold answer.}",
    ],
    ids=lambda answer: ascii(answer[:20]),
)
def test_hostile_answers_off_the_main_thread(monkeypatch, answer):
    monkeypatch.setattr(rewards, "shared_pool", lambda: hostile_pool)
    completions, results = [rf"\boxed{{{answer}}}", r"\boxed{5}"], []
    thread = threading.Thread(target=lambda: results.extend(math_verify_reward(completions, answer=["5", "5"])))
    thread.start()
    thread.join(300)  # without the limit of a worker, some of these take hours
    assert results == [0.0, 1.0]


hostile_pool = WorkerPool(num_workers=1, timeout=3.0)


def test_a_failure_is_told(monkeypatch, caplog):
    monkeypatch.setattr(rewards, "shared_pool", lambda: hostile_pool)
    completions = [r"\boxed{1000000000!}", r"\boxed{4}", r"\boxed{1000000000!}"]
    assert math_verify_reward(completions, answer=["4"] * 3) == [0.0, 1.0, 0.0]
    assert "The grading of 1 of 2 answers failed: 1 by time limit." in caplog.text


def test_a_gold_answer_that_cannot_be_read_within_the_limits(monkeypatch):
    monkeypatch.setattr(rewards, "shared_pool", lambda: hostile_pool)
    gold = "+".join(["1"] * 50_000)
    assert math_verify_reward([r"\boxed{4}", r"\boxed{4}"], answer=[gold, "4"]) == [None, 1.0]


def test_identical_answers_are_graded_once(monkeypatch):
    batches, pool = [], WorkerPool(num_workers=1)
    monkeypatch.setattr(pool, "map", lambda calls: batches.append(calls) or WorkerPool.map(pool, calls))
    monkeypatch.setattr(rewards, "shared_pool", lambda: pool)
    completions = [rf"{i} ways lead to \boxed{{4}}." for i in range(8)] + [r"\boxed{5}", r"\boxed{4}"]
    assert math_verify_reward(completions, answer=["4"] * 9 + ["7"]) == [1.0] * 8 + [0.0] * 2
    assert batches == [[("4", (r"\boxed{4}",)), ("4", (r"\boxed{5}",)), ("7", (r"\boxed{4}",))]]


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
