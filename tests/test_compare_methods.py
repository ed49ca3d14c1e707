# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The comparison of methods: its second task, what a run records, and how budgets are made equal."""

import json
import random
import sys
from pathlib import Path

import pandas as pd
import pytest


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "compare_methods"))
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
import compare  # noqa: E402
import methods  # noqa: E402
import report  # noqa: E402
import sorting  # noqa: E402


def test_sorting_by_hand():
    assert sorting.select("7351", random.Random(0)) == (["1=735", "3=75", "5=7", "7="], "1357")
    lines, taken = sorting.select("7755", random.Random(0))
    assert (lines, taken) == (["5=775", "5=77", "7=7", "7="], "5577")
    slips = [sorting.select("735102", random.Random(i), slip_probability=0.7)[1] for i in range(2000)]
    assert all(sorted(taken) == sorted("735102") for taken in slips)
    # at each step: 0.3 + 0.7 / n of taking the least of n digits
    expected = 1.0
    for n in range(1, 7):
        expected *= 0.3 + 0.7 / n
    assert sum(taken == "012357" for taken in slips) / 2000 == pytest.approx(expected, abs=0.012)


def test_splits_of_the_second_task():
    splits = sorting.make_splits(seed=3, num_problems=64)
    prompts = {name: set(split["prompt"]) for name, split in splits.items()}
    assert sum(map(len, prompts.values())) == 5 * 64 == len(set().union(*prompts.values()))
    assert {len(p) for p in prompts["train"] | prompts["held_out"] | prompts["repeated"]} == {6 + 1}
    assert {len(p) for p in prompts["longer"]} == {7 + 1, 8 + 1}
    assert all(len(set(p)) < len(p) for p in prompts["repeated"])
    assert all(len(set(p)) == len(p) for p in prompts["train"] | prompts["held_out"] | prompts["longer"])
    train = splits["train"]
    assert methods.reward([traces[0] for traces in train["demonstrations"]], train["answer"]) == [1.0] * 64


def test_spoiled_traces():
    train = sorting.make_splits(seed=3, num_problems=32)["train"]

    def spoiled(quality):
        return methods.spoil(train, quality, seed=0).to_list()

    def is_right(row):
        return methods.reward(row["demonstrations"], [row["answer"]])[0] if row["demonstrations"] else None

    assert [is_right(row) for row in spoiled("good")] == [1.0] * 32
    assert [is_right(row) for row in spoiled("wrong_half")] == [1.0, 0.0] * 16
    assert [is_right(row) for row in spoiled("few")] == [1.0] * 16 + [None] * 16
    assert len(spoiled("few_problems")) == 16
    (trace,) = spoiled("skipping")[0]["demonstrations"]
    (whole,) = train[0]["demonstrations"]
    lines = whole.removeprefix("<think>").partition("</think>")[0].split(";")
    assert trace == f"<think>{lines[1]};{lines[3]};{lines[5]}</think>" + whole.partition("</think>")[2]


@pytest.mark.parametrize("method", ["luffy", "on_policy", "sft", "sft_then_rl"])
def test_a_run_records_what_the_report_needs(monkeypatch, method, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods, "NUM_UPDATES", 4)
    monkeypatch.setattr(methods, "EVAL_STEPS", 2)
    monkeypatch.setattr(methods, "SEQUENCES_PER_UPDATE", 16)
    monkeypatch.setattr(methods.Recorder, "sample", lambda self, model, split: (0.25, 3.0, 0.5))
    model_path = ROOT / "examples" / "quickstart" / "checkpoint" / "model"
    result = methods.run("chains", method, 1e-3, 0, model_path)
    assert not list(tmp_path.iterdir())  # runs at the same time share no folder
    assert [record["step"] for record in result["records"]] == [0, 2, 4]
    assert result["records"][0]["trained_tokens"] == 0
    assert result["records"][0]["demonstration_prob"] == pytest.approx(0.845, abs=0.01)
    num_tokens, weights = result["weights"]
    if method == "sft":  # traces of 24 tokens, and a weight of one in the mean of each update
        assert result["records"][-1]["trained_tokens"] == sum(num_tokens) == 4 * 16 * 24
        assert sum(weights) == pytest.approx(4.0, rel=1e-4)
    if method == "luffy":  # one demonstration in each of two groups
        assert sum(num_tokens) == 4 * 2 * 24
    if method == "on_policy":
        assert sum(num_tokens) == 0 and result["records"][-1]["trained_tokens"] == 4 * 16 * 17
    if method == "sft_then_rl":
        assert sum(num_tokens) == 2 * 16 * 24


def test_budgets_are_made_equal():
    run = pd.DataFrame({"step": [0, 10, 20], "trained_tokens": [0, 100, 300], "held_out": [0.0, 0.4, 0.8]})
    assert report.at_tokens(run, 100, "held_out") == pytest.approx(0.4)
    assert report.at_tokens(run, 150, "held_out") == pytest.approx(0.4 + 0.4 * 50 / 200)
    assert report.at_tokens(run, 300, "held_out") == pytest.approx(0.8)


def test_a_finished_run_is_not_repeated_and_the_report_reads_it(tmp_path, monkeypatch):
    done = []

    def run(*args):
        done.append(args)
        records = [
            {"step": step, "trained_tokens": 10 * step, "seconds": 1.0, "demonstration_prob": 0.5, "held_out": 0.1}
            | {"longer": 0.0, "unseen_operator": 0.2, "easy": 1.0, "length": 5.0, "entropy": 0.1}
            for step in (0, 10)
        ]
        return {"records": records, "weights": [[1.0] * 9, [2.0] * 9]}

    monkeypatch.setattr(methods, "run", run)
    monkeypatch.setattr(methods, "warm_model", lambda *args, **kwargs: tmp_path)
    runs = [compare.Run("compare", "chains", "standard", "luffy", 3e-4, seed) for seed in (1, 2)]
    compare.execute(runs[0], tmp_path)
    assert runs[0].file(tmp_path).exists() and not runs[1].file(tmp_path).exists()
    assert json.loads(runs[0].file(tmp_path).read_text())["seed"] == 1
    compare.execute(runs[1], tmp_path)
    records, weights = report.read(tmp_path, tmp_path)
    assert len(records) == 4 and len(weights) == 18
    table = report.comparison_table(report.at_budgets(records), "chains", "updates")
    row = "| LUFFY | 0.0003 | 0.100 ± 0.000 | 0.000 ± 0.000 | 0.200 ± 0.000 | 1.000 ± 0.000 | 0k |"
    assert table.splitlines()[-1] == row

    # Rows of other runs are kept, and those of a run that is done again are not
    committed = records.assign(commit="earlier", held_out=0.5)
    other = committed[committed["seed"] == 1].assign(method="sft")
    pd.concat([committed, other]).to_csv(tmp_path / "runs.csv", index=False)
    records, _ = report.read(tmp_path, tmp_path)
    assert len(records) == 4 + 2 and set(records.loc[records["method"] == "luffy", "held_out"]) == {0.1}
    assert set(records.loc[records["commit"] == "earlier", "method"]) == {"sft"}
