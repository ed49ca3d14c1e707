# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import json
import subprocess
import sys
import time

import pytest
import tiny
from datasets import Dataset, load_dataset

from luffy_trl.chat_templates import SYSTEM_PROMPT
from luffy_trl.data.openr1 import (
    Contamination,
    OpenR1Arguments,
    ParquetFolder,
    locked,
    main,
    to_row,
    write_training_data,
)


def trace(answer, thought="Let me see."):
    return f"<think>\n{thought}\n</think>\n\nIt is \\boxed{{{answer}}}."


def authors_row(question, answer, text):
    """A row of `Elliott/Openr1-Math-46k-8192`."""
    return {
        "data_source": "",
        "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}],
        "target": [{"role": "assistant", "content": text}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": "default", "index": 0},
    }


def openr1_row(problem, answer, texts, complete=None, correct=None):
    """A row of `open-r1/OpenR1-Math-220k`."""
    return {
        "problem": problem,
        "solution": "worked out",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": "0",
        "is_reasoning_complete": complete or [True] * len(texts),
        "generations": texts,
        "correctness_math_verify": correct or [True] * len(texts),
        "correctness_llama": None,
        "finish_reasons": ["stop"] * len(texts),
        "correctness_count": len(texts),
        "messages": [{"role": "user", "content": problem}],
    }


def run(tmp_path, rows, name="data", **kwargs):
    Dataset.from_list(rows).to_parquet(tmp_path / "raw" / "train.parquet")
    args = OpenR1Arguments(dataset_name=str(tmp_path / "raw"), output_dir=str(tmp_path / name), **kwargs)
    main(args)
    report = json.loads((tmp_path / name / "report.json").read_text())
    for counts in (report["rows"], report["traces"]):
        assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    return load_dataset(str(tmp_path / name), split="train")[:], report


def test_the_authors_dataset(tmp_path):
    rows = [
        authors_row("What is 1 + 1?", "2", trace(2)),
        authors_row("What is 1 + 2?", "3", trace(4)),
        authors_row("What is 1 / 2?", "0.5", trace(r"\frac{1}{2}")),
    ]
    data, report = run(tmp_path, rows)
    assert data == {
        "prompt": [rows[0]["prompt"], rows[2]["prompt"]],
        "demonstrations": [[trace(2)], [trace(r"\frac{1}{2}")]],
        "answer": ["2", "0.5"],
    }
    assert report["rows"] == {"read": 3, "kept": 2, "dropped": {"no trace left": 1}}
    assert report["traces"] == {"read": 3, "kept": 2, "dropped": {"wrong answer": 1}}


def test_openr1_math(tmp_path, capsys):
    rows = [
        openr1_row("1 + 1?", "2", [trace(2), trace(2, "Two."), trace(2), trace(3)]),
        openr1_row("1 + 2?", "3", [trace(3), trace(3, "Three.")], complete=[False, True]),
        openr1_row("1 +  1 ?", "2", [trace(2)]),  # the first again
        openr1_row("1 - 1?", "0", [trace(0)]),  # differs from it by a symbol
        openr1_row("1 + 3?", "4", [r"\boxed{4}", "  "]),
        openr1_row("1 + 4?", None, [trace(5)]),
        openr1_row("1 + 5?", "6", []),
        openr1_row("1 + 6?", "", [trace(7)]),
    ]
    data, report = run(tmp_path, rows)
    assert data["demonstrations"] == [[trace(2), trace(2, "Two.")], [trace(3, "Three.")], [trace(0)]]
    assert data["prompt"][0] == [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "1 + 1?"}]
    assert report["rows"]["dropped"] == {
        "no trace left": 2,
        "repeats another problem": 1,
        "no gold answer": 1,
        "no trace": 1,
    }
    assert report["traces"] == {
        "read": 12,
        "kept": 4,
        "dropped": {
            "repeats another trace": 1,
            "wrong answer": 1,
            "unfinished": 1,
            "repeats another problem": 1,
            "no </think>": 1,
            "empty": 1,
            "no gold answer": 1,
            "gold answer cannot be read": 1,
        },
    }
    table = capsys.readouterr().out
    assert "| read | 8 | 12 |" in table
    assert "| dropped: unfinished | 0 | 1 |" in table
    assert "| **kept** | **3** | **4** |" in table
    assert table.split("\n\n")[0] in (tmp_path / "data" / "report.md").read_text()


def test_ways_to_verify(tmp_path):
    rows = [
        openr1_row("1 + 1?", "2", [trace(2), trace(3)], correct=[False, True]),
        openr1_row("1 + 2?", "3", [r"\boxed{3}"]),
    ]
    assert run(tmp_path, rows, "a")[0]["demonstrations"] == [[trace(2)]]
    assert run(tmp_path, rows, "b", verify="flags")[0]["demonstrations"] == [[trace(3)], [r"\boxed{3}"]]
    assert run(tmp_path, rows, "c", verify="none")[0]["demonstrations"] == [[trace(2), trace(3)], [r"\boxed{3}"]]
    assert run(tmp_path, rows, "d", require_think=False)[0]["demonstrations"] == [[trace(2)], [r"\boxed{3}"]]
    with pytest.raises(ValueError, match="`verify='flags'` needs the column `correctness_math_verify`"):
        run(tmp_path, [authors_row("1 + 1?", "2", trace(2))], "e", verify="flags")


def test_lengths_are_those_of_the_trainer(tmp_path):
    model = tiny.save_tiny_model(tmp_path / "model", tiny.THINKING_CHATML)  # a token per character
    fits = "a" * 50 + "</think>" + r"\boxed{2}"  # `<think>\n` is in the prompt; `</think>` and the end are tokens
    rows = [
        openr1_row("1 + 1?", "2", [f"<think>\n{fits}", f"<think>\na{fits}"]),
        openr1_row("1 + 2?" + "?" * 100, "3", [trace(3)]),
    ]
    kwargs = {"model_name_or_path": model, "system_prompt": "", "max_prompt_length": 60, "max_completion_length": 61}
    data, report = run(tmp_path, rows, **kwargs)
    assert data["demonstrations"] == [[f"<think>\n{fits}"]]
    assert data["prompt"] == [[{"role": "user", "content": "1 + 1?"}]]
    assert report["rows"]["dropped"] == {"prompt too long": 1}
    assert report["traces"]["dropped"] == {"too long": 1, "prompt too long": 1}


def test_contamination():
    question = "A box has three red balls and five blue balls; how many ways are there to draw two?"
    contamination = Contamination([question, r"Compute $2^{10}$."], ngram_size=8)
    assert contamination.find("So: three RED balls\nand five blue balls, how many?") == question  # eight of its words
    assert contamination.find("So: three red balls and five blue balls, or not?") is None  # seven
    assert contamination.find(r"compute  $2^{10}$.") == r"Compute $2^{10}$."
    assert contamination.find(r"Compute $2^{10}$. Then add one.") is None  # short questions are compared whole
    assert contamination.find(r"Compute $2^{-10}$.") is None


def test_contaminated_rows(tmp_path):
    question = "Find the number of ordered pairs of integers whose product is twelve and whose sum is odd."
    benchmark = [authors_row(question, "4", "")]
    Dataset.from_list(benchmark).remove_columns("target").to_parquet(tmp_path / "valid.parquet")
    Dataset.from_list([{"problem": "What is one and one?"}]).to_json(tmp_path / "more.jsonl")
    rows = [
        openr1_row(f"Please: {question}", "4", [trace(4), trace(4, "Well.")]),
        openr1_row("What is ONE and one?", "2", [trace(2)]),
        openr1_row("What is one and two?", "3", [trace(3)]),
    ]
    files = [str(tmp_path / "valid.parquet"), str(tmp_path / "more.jsonl")]
    data, report = run(tmp_path, rows, evaluation_files=files)
    assert data["answer"] == ["3"]
    assert report["rows"]["dropped"] == {"found in a benchmark": 2}
    assert report["traces"]["dropped"] == {"found in a benchmark": 3}
    assert report["contaminated"] == [
        {"problem": f"Please: {question}", "question": question},
        {"problem": "What is ONE and one?", "question": "What is one and one?"},
    ]
    assert "Compared with 2 benchmark questions by 13-grams" in (tmp_path / "data" / "report.md").read_text()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "row 7: the columns text are of no dataset that is known here"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "row 7: `prompt` must hold a question"),
        ({"prompt": None}, "row 7: `prompt` must hold a question"),
        ({"prompt": [{"role": "human", "content": "x"}]}, "row 7: `prompt` has the roles 'human'. Call them 'user'"),
        (
            {"prompt": [{"from": "human", "value": "x"}]},
            "row 7: `prompt` must .* Call `from` and `value` of a message",
        ),
        (
            {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "row 7: `prompt` ends with a message of the assistant",
        ),
        (
            openr1_row("1?", "1", ["a", "b"], complete=[True]),
            "row 7: `is_reasoning_complete` has 1 values for 2 traces",
        ),
    ],
)
def test_rows_that_cannot_be_read(row, message):
    with pytest.raises(ValueError, match=message):
        to_row(row, 7)


def test_our_own_columns():
    row = to_row({"prompt": "1 + 1?", "completion": [{"role": "assistant", "content": "2"}], "solution": 2}, 0)
    assert (row["prompt"], row["demonstrations"], row["answer"]) == ("1 + 1?", ["2"], "2")


def test_a_trace_on_which_math_verify_hangs(tmp_path):
    rows = [openr1_row("1 + 1?", "2", [trace("9^{9^{9}}"), trace(2)])]
    data, report = run(tmp_path, rows)
    assert data["demonstrations"] == [[trace(2)]]
    assert report["traces"]["dropped"] == {"wrong answer": 1}


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("luffy_trl.data.openr1.SHARD_BYTES", 4_000)
    rows = [openr1_row(f"{i} + 1?", str(i + 1), [trace(i + 1)]) for i in range(250)]
    data, _ = run(tmp_path, rows)
    names = sorted(path.name for path in (tmp_path / "data").glob("*.parquet"))
    assert names == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert data["answer"] == [str(i + 1) for i in range(250)]


def test_two_runs_on_one_output(tmp_path):
    Dataset.from_list([openr1_row("1 + 1?", "2", [trace(2)])]).to_parquet(tmp_path / "raw.parquet")
    args = OpenR1Arguments(dataset_name=str(tmp_path / "raw.parquet"), output_dir=str(tmp_path / "data"))
    with locked("output_dir", str(tmp_path / "other" / ".." / "data") + "/"):  # the same, written otherwise
        with pytest.raises(ValueError, match="`output_dir`: another run is writing '.*data', and holds .*.data.lock"):
            main(args)
        main(OpenR1Arguments(dataset_name=str(tmp_path / "raw.parquet"), output_dir=str(tmp_path / "another")))
    (tmp_path / "data").mkdir()  # by a run that ended after the arguments were checked
    with pytest.raises(ValueError, match="is there already"):
        main(args)
    (tmp_path / "data").rmdir()
    main(args)  # which nothing stands in the way of


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path):
    rows = [openr1_row(f"{i} + 1?", str(i + 1), [trace(i + 1)]) for i in range(2_000)]
    Dataset.from_list(rows).to_parquet(tmp_path / "raw.parquet")
    command = [sys.executable, "-m", "luffy_trl.data.openr1", "--dataset_name", str(tmp_path / "raw.parquet")]
    command += ["--output_dir", str(tmp_path / "out" / "data")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any((tmp_path / "out").glob(".data.partial/*.parquet")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".data.partial", ".data.lock"}
    # what it left does not stand in the way
    args = OpenR1Arguments(dataset_name=str(tmp_path / "raw.parquet"), output_dir=str(tmp_path / "out" / "data"))
    short = (to_row(row, number) for number, row in enumerate(rows[:3]))
    write_training_data(short, args, "a test")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"data", ".data.lock"}
    assert len(load_dataset(str(tmp_path / "out" / "data"), split="train")) == 3


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), ParquetFolder(str(tmp_path / "data")) as folder:
        folder.write({"prompt": "1?", "demonstrations": ["1"], "answer": "1"})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_nothing_left(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)No row of .* is left:.*\| dropped: wrong answer \| 0 \| 1 \|"):
        run(tmp_path, [openr1_row("1 + 1?", "2", [trace(3)])])
    assert not (tmp_path / "data").exists()


def test_arguments(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="`output_dir` .* is there already"):
        OpenR1Arguments(dataset_name="x", output_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="`ngram_size` must be at least 1, got 0"):
        OpenR1Arguments(dataset_name="x", output_dir=str(tmp_path / "new"), ngram_size=0)


def test_overwriting(tmp_path):
    run(tmp_path, [openr1_row("1 + 1?", "2", [trace(2)])])
    data, _ = run(tmp_path, [openr1_row("1 + 2?", "3", [trace(3)])], overwrite_output_dir=True)
    assert data["answer"] == ["3"]
