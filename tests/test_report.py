# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The report of a run: what is read, what is said, and what a real browser makes of it."""

import base64
import gzip
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import browser
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import trl
import yaml
from datasets import Dataset
from test_cli import luffy, run_flags
from test_turns import ONE_CALL, PROMPT
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer, TrainerCallback

from luffy_trl import LuffyConfig, LuffyTrainer, cli
from luffy_trl.options import own_fields
from luffy_trl.report.__main__ import main
from luffy_trl.report.alarms import ALARMS, alarms_of
from luffy_trl.report.page import build_page, compare
from luffy_trl.report.reading import Run, read_run, sample_groups, without_paths
from luffy_trl.report.weights import split_text, token_weights
from luffy_trl.rewards import math_verify_reward


ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
HEALTHY = {  # a curve of docs/metrics.md's "healthy", from its first value to its last
    "reward": (0.1, 0.8),
    "reward_std": (0.4, 0.2),
    "frac_reward_zero_std": (0.8, 0.4),
    "on_policy/solve_none": (0.9, 0.2),
    "on_policy/solve_all": (0.0, 0.5),
    "on_policy/loss": (0.01, -0.01),
    "demonstrations/reward": (1.0, 1.0),
    "demonstrations/loss": (-0.5, -0.1),
    "demonstrations/dropped": (0, 0),
    "demonstrations/prob": (0.3, 0.6),
    "demonstrations/ratio": (0.6, 0.8),
    "demonstrations/fraction": (0.2, 0.2),
    "demonstrations/length": (120, 120),
    "entropy": (1.2, 0.6),
    "kl": (0.0, 0.3),
    "clip_ratio/region_mean": (0.0, 0.02),
    "completions/mean_length": (100, 140),
    "completions/clipped_ratio": (0.2, 0.05),
    "grad_norm": (0.5, 0.4),
    "aux_loss": (1.0, 1.0),
    "sampling/sampling_logp_difference/mean": (0.01, 0.01),
    "hints/helped": (0.2, 0.3),
    "step_time": (3.0, 3.0),
}
SICK = [  # a metric, its first and last value, and the beginning of the sentence
    ("demonstrations/reward", 0, 0, "No demonstration earns a reward"),
    ("demonstrations/loss", 0.1, 0.2, "The traces earn less than the rollouts"),
    ("demonstrations/dropped", 2, 2, "Traces are longer than"),
    ("demonstrations/prob", 0.3, 0.3, "The demonstrations' probability does not rise"),
    ("demonstrations/prob", 0.3, 1.0, "The policy copies"),
    ("demonstrations/ratio", 1, 40, "The demonstrations' ratio is far above 1"),
    ("demonstrations/fraction", 0.2, 0.99, "Nearly all tokens are of demonstrations"),
    ("demonstrations/fraction", 0, 0, "No trace is shown"),
    ("reward", None, None, "The reward falls after a rise"),
    ("reward_std", 0, 0, "All rollouts have had the same reward"),
    ("frac_reward_zero_std", 0.9, 1, "In nearly all groups all rollouts have the same reward"),
    ("on_policy/solve_none", 1, 1, "No rollout solves its problem"),
    ("on_policy/solve_all", 0.5, 1, "All rollouts solve their problems"),
    ("entropy", 1.2, 0, "Entropy falls to 0"),
    ("entropy", 1.2, 9, "Entropy rises without end"),
    ("kl", 0.1, 50, "The policy runs away"),
    ("clip_ratio/region_mean", 0, 0.5, "Many tokens are clipped"),
    ("completions/mean_length", 100, 2, "Rollouts shrink"),
    ("completions/clipped_ratio", 0.6, 0.9, "Rollouts are cut off"),
    ("grad_norm", 0, 0, "The gradient is 0"),
    ("aux_loss", 1, 2, "The load-balancing loss rises"),
    ("sampling/sampling_logp_difference/mean", 0.01, 0.5, "vLLM and the trainer disagree"),
    ("hints/helped", 0, 0, "The hints do not help"),
]
HOSTILE = {
    "script": "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>",
    "html": "<!-- <b>bold</b> --> &lt;i&gt; ]]> {{ 7 * 7 }} {% raw %} ${window.hacked = 3}",
    "ansi": "\x1b[31mred\x1b[0m \x1b]8;;http://example.com\x07link",
    "direction": "\u202eright-to-left\u2066 \u0634\u0643\u0631\u0627 \u2028 \u2029",
    "null": "before\x00after \x08\x7f\x85",
    "surrogate": "half \ud83d of a pair and \U0001f600",
    "long": "x" * 100_000,
}


def make_log(steps=30, **changed):
    """Records in which each metric goes from its first value to its last on a line, and stays there."""
    curves = {**HEALTHY, **changed}
    return [
        {key: first + (last - first) * min(i / (0.8 * (steps - 1)), 1.0) for key, (first, last) in curves.items()}
        | {"step": i + 1}
        for i in range(steps)
    ]


def write_run(folder, log=None, tables=(), about=None):
    """A run folder with completions of the given rows for each step."""
    (folder / "completions").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in (make_log() if log is None else log)]
    (folder / "_log.jsonl").write_text("".join(lines))
    (folder / "_run.json").write_text(json.dumps({"recipe": {}, **(about or {})}))
    for step, rows in dict(tables).items():
        path = folder / "completions" / f"completions_{step:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    return folder


def rows_of_a_group(prompt, rewards, texts=None, truncated=(), tokens=10):
    """A demonstration and its rollouts."""
    return [
        {
            "step": 1,
            "prompt": prompt,
            "completion": texts[i] if texts else f"{prompt} answer {i}",
            "right": float(reward),
            "source": "demonstration" if i == 0 else "rollout",
            "tokens": tokens + i,
            "truncated": i in truncated,
            "advantage": reward - sum(rewards) / len(rewards),
        }
        for i, reward in enumerate(rewards)
    ]


def with_reward(log):
    return [{**record, "rewards/right/mean": 0.5} for record in log]


def data_of(html):
    (packed,) = re.findall(r'id="data">([^<]*)<', html)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


# -- What is read


def run_of(log, **about):
    return Run("run", log, about, {}, [], [], False)


def test_a_healthy_run_has_no_alarm():
    assert alarms_of(run_of(make_log())) == []


@pytest.mark.parametrize(("key", "first", "last", "sentence"), SICK)
def test_alarms(key, first, last, sentence):
    log = make_log(**({} if first is None else {key: (first, last)}))
    if first is None:  # up, and down again
        log = make_log(**{key: (0.1, 0.8)}) + [{**r, "step": r["step"] + 30} for r in make_log(**{key: (0.8, 0.1)})]
    (alarm,) = alarms_of(run_of(log))
    assert alarm.key == key and alarm.text.startswith(sentence)
    page = (ROOT / "docs" / "metrics.md").read_text()
    (row,) = [line for line in page.splitlines() if re.match(rf"\| [^|]*`{key}`[^|]*\|", line)]
    assert row.split(" | ")[3].strip(" |"), "docs/metrics.md does not say what is sick"


def test_each_alarm_is_tested():
    assert len({text for *_, text in SICK}) == len(ALARMS)
    assert all(any(alarm.text.startswith(text) for *_, text in SICK) for alarm in ALARMS)


def test_another_loss_is_not_of_traces_that_are_pushed_down():
    log = make_log(**{"demonstrations/loss": (2.0, 1.0)})
    assert [alarm.key for alarm in alarms_of(run_of(log))] == ["demonstrations/loss"]
    for recipe in ({"demonstration_loss": "sft"}, {"objective": "srft"}):
        assert alarms_of(run_of(log, recipe=recipe)) == []


def test_what_is_no_run(tmp_path):
    for folder, message in ((tmp_path / "nowhere", "is no folder. Give"), (tmp_path, "is no folder of a run: it has")):
        with pytest.raises(ValueError, match=message):
            read_run(folder)
    (tmp_path / "trainer_state.json").write_text("{ cut")
    with pytest.raises(ValueError, match="is no folder of a run"):
        read_run(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    state = {"global_step": 3, "log_history": [{"step": 3, "reward": 0.5, "loss": float("nan")}]}
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state))
    run = read_run(tmp_path)
    assert run.log == [{"step": 3, "reward": 0.5, "loss": None}]
    assert run.notes[0] == "trainer_state.json cannot be read: left out."


def test_a_log_that_is_being_written(tmp_path):
    write_run(tmp_path, make_log(3))
    with (tmp_path / "_log.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    run = read_run(tmp_path)
    assert [record["step"] for record in run.log] == [1, 2, 3]
    assert run.notes == [
        "There are no groups: the run wrote no completions. `luffy train --log_completions true` writes them."
    ]


def test_metrics_of_several_evaluation_sets(tmp_path):
    log = [
        {"step": 1, "eval_hard_loss": 0.1, "eval_reward": 0.5},
        {"step": 1, "eval_easy_loss": 0, "eval_reward": 1.0},
    ]
    run = read_run(write_run(tmp_path, log))
    assert run.points("eval_hard_reward") == [(1, 0.5)] and run.points("eval_easy_reward") == [(1, 1.0)]


def test_groups(tmp_path):
    rows = [
        *rows_of_a_group("a", [1, 0, 0, 0]),
        *rows_of_a_group("b", [1, 1, 1, 1]),
        *rows_of_a_group("b", [0, 1, 0, 0], truncated=[2]),
    ]
    about = {"recipe": {"num_generations": 4}}
    broken = tmp_path / "completions" / "completions_00002.parquet"
    run = read_run(write_run(tmp_path, with_reward(make_log(3)), {1: rows, 9: rows}, about))
    assert run.notes == [
        "completions_00009.parquet is of a step that the run has not reached, so of an earlier run: left out."
    ]
    broken.write_bytes(b"PAR1 no parquet")
    run = read_run(tmp_path)
    groups = {tuple(row.reward for row in group.rows): group for group in sample_groups(run, 0)}
    assert {rewards: group.kinds for rewards, group in groups.items()} == {
        (1, 0, 0, 0): ["none"],
        (1, 1, 1, 1): ["all"],
        (0, 1, 0, 0): ["differs", "truncated"],
    }
    assert run.notes[-1] == "completions_00002.parquet is no complete table of prompts and completions: left out."


def test_what_trl_itself_writes(tmp_path):
    """Without the columns of this package: no source, no tokens, and conversations."""
    rows = [
        {
            "step": 1,
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
            "completion": [{"role": "assistant", "content": f"{i}"}],
            "right": None if i == 0 else float(i == 2),
            "advantage": 0.0,
        }
        for i in range(4)
    ]
    run = read_run(write_run(tmp_path, with_reward(make_log(3)), {1: rows}))
    (group,) = sample_groups(run, 0)
    assert group.prompt == "system: Be brief.\nuser: 1+1?" and [row.text for row in group.rows] == list("0123")
    assert [row.reward for row in group.rows] == [None, 0, 1, 0] and group.kinds == ["differs"]
    assert group.rows[0].source == "rollout" and group.rows[0].tokens is None


def test_tool_calls_of_prompts_and_completions(tmp_path):
    """Arguments are an object, in which parquet has those of all calls, or a JSON text."""
    called = {"name": "add", "arguments": '{"a": 1}'}
    prompt = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": called}]},
        {"role": "tool", "content": "2"},
    ]
    asked = [{"a": {"x": 1, "y": None}, "b": None}, {"a": {"x": None, "y": 2}, "b": [{"z": 3}]}]
    rows = [
        {
            "step": 1,
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": f"{i}", "tool_calls": [{"name": "f", "arguments": own}]}],
            "right": float(i),
            "advantage": 0.0,
        }
        for i, own in enumerate(asked)
    ]
    run = read_run(write_run(tmp_path, with_reward(make_log(3)), {1: rows}))
    (group,) = sample_groups(run, 0)
    assert group.prompt == 'user: 1?\nassistant: \n[add({"a": 1})]\ntool: 2'
    assert [row.text for row in group.rows] == [
        '0\n[f({"a": {"x": 1}})]',
        '1\n[f({"a": {"y": 2}, "b": [{"z": 3}]})]',
    ]


def test_groups_lie_over_the_run(tmp_path):
    tables = {step: rows_of_a_group(f"p{step}", [1, 0]) * 1 for step in range(1, 101)}
    run = read_run(write_run(tmp_path, with_reward(make_log(100)), tables))
    first = [group.step for group, _ in zip(sample_groups(run, 0), range(9), strict=False)]
    assert first[:2] == [100, 1] and sorted(first)[-1] == 100
    gaps = [b - a for a, b in zip(sorted(first), sorted(first)[1:], strict=False)]
    assert max(gaps) <= 30
    assert run.notes == ["Groups are of 60 of the 100 steps with completions."]


@pytest.mark.parametrize("num_groups", [12, 13])
def test_notes_are_of_what_is_left_out(tmp_path, num_groups):
    rows = [row for i in range(num_groups) for row in rows_of_a_group(f"p{i}", [1, 0])]
    run = read_run(write_run(tmp_path, with_reward(make_log(3)), {1: rows, 3: rows}))
    assert len(data_of(build_page([run]))["groups"]) == 24
    assert run.notes == (["2 groups: at most 12 of a step are here."] if num_groups == 13 else [])


def test_the_file_stays_below_its_size(tmp_path):
    rng = random.Random(0)
    tables = {
        step: rows_of_a_group(f"p{step}", [1, 0, 0], ["".join(rng.choices("abcdef 0123", k=60_000)) for _ in range(3)])
        for step in range(1, 31)
    }
    run = read_run(write_run(tmp_path, with_reward(make_log(30)), tables))
    html = build_page([run], max_bytes=3.5e6)
    assert 3.0e6 < len(html) <= 3.5e6
    num_groups = len(data_of(html)["groups"])
    assert 5 < num_groups < 30
    assert run.notes == [
        f"{num_groups} groups are here, spread over the run; the others would make the file larger than "
        "`--max_megabytes`."
    ]


def test_paths():
    for text, expected in (
        ("/home/me/models/base", "base"),
        ("saved in '/tmp/x y/z' and", "saved in 'x y/z' and"),
        ("~/secret/data.jsonl", "data.jsonl"),
        (r"C:\me\models\base", "base"),
        ("Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-1.5B"),
        ("['/a/b', '/a/c']", "['b', 'c']"),
        (r"1/2 \frac 3/4/5", r"1/2 \frac 3/4/5"),
    ):
        assert without_paths(text) == expected or text.startswith("saved"), text


# -- The command


def test_it_loads_no_torch_and_training_loads_none_of_it(tmp_path):
    write_run(tmp_path)
    code = (
        "import sys\nfrom luffy_trl.report.__main__ import main\nmain([sys.argv[1]])\n"
        "assert not {'torch', 'trl', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"The report is file://{tmp_path}/_report.html (2.0 MB).")
    code = "import sys, luffy_trl.report; assert not {'plotly', 'jinja2'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a RUN_FOLDER, the `output_dir` of a run, or `--model`"),
        (["nowhere"], "'nowhere' is no folder"),
        (
            ["x", "--model", "y", "--rows", "2"],
            "^`--model` makes a page of its own, without RUN_FOLDER. Give `luffy report --model y --rows 2 "
            "--dataset_name DATA` for it, and `luffy report x` for the run.$",
        ),
        (["--model", "y"], "`--dataset_name` is needed with `--model`"),
        (["x", "--learning_rate", "1"], "`luffy report` knows no argument '--learning_rate'"),
        (["--model", "y", "--watch"], "`--watch` is of a run that trains"),
        (["x", "--before", "y"], "`--before` is what `--model` is compared with"),
        (["x", "--every", "0"], "`--every` must be positive, got 0"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(arguments)


def test_a_run_behind_the_options_of_a_model(tmp_path, monkeypatch):
    """A folder is no value of an option before it."""
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    message = "Give `luffy report --dataset_name d.jsonl --model y` for it, and `luffy report run` for the run"
    with pytest.raises(ValueError, match=message):
        main(["--dataset_name", "d.jsonl", "--model", "y", "run"])


def test_where_files_are_written_and_how_large_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture = {"title": "", "prompt": "", "text": "", "tokens": [], "acted": [], "views": []}
    monkeypatch.setattr("luffy_trl.report.weights.weigh_rows", lambda *args: ([], [picture]))  # no model is needed
    main(["--model", "y"])
    assert [path.name for path in tmp_path.iterdir()] == ["_tokens.html"]
    assert re.search(r"_tokens.html \(1\d kB\)\.$", capsys.readouterr().out.strip())
    with pytest.raises(SystemExit):
        main(["-h"])
    assert "_tokens.html" in capsys.readouterr().out


def test_a_missing_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"For a report, plotly.* is needed: `pip install luffy-trl\[report\]`"):
        main([str(write_run(tmp_path))])


def test_watching(tmp_path):
    """From before the folder is there to the end, in another process; the page loads itself again until then."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "luffy_trl", "report", str(folder), "--watch", "--every", "0.2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stderr.readline().startswith("Waiting for the first step: ")
        write_run(folder, make_log(3))
        assert process.stdout.readline().startswith("The report is file://")
        assert data_of((folder / "_report.html").read_text())["refresh"] == 0.2
        write_run(folder, [*make_log(4), {"step": 4, "train_runtime": 1.0}])
        assert process.wait(60) == 0
    data = data_of((folder / "_report.html").read_text())
    assert data["refresh"] is None and len(data["figures"][0]["figure"]["data"][0]["x"]) >= 4


@pytest.mark.parametrize("end", ["killed", "by an error"])
def test_watching_a_run_that_dies(tmp_path, end):
    """It has held its lock, which is free where it was killed, and gone where it has ended by an error."""
    folder = write_run(tmp_path / "run", make_log(3))
    code = "import sys, time\nfrom luffy_trl import processes\nwith processes._lock(sys.argv[1]):\n"
    code += "    print(flush=True)\n    sys.stdin.readline()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "luffy_trl", "report", str(folder), "--watch", "--every", "0.2"]
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], **pipes) as run:
        run.stdout.readline()
        assert not read_run(folder).has_died
        with subprocess.Popen(command, **pipes) as watch:
            watch.stdout.readline()
            assert data_of((folder / "_report.html").read_text())["refresh"] == 0.2
            if end == "killed":
                run.kill()
            else:
                run.communicate("\n")
            assert watch.wait(60) == 0
            assert watch.stderr.read() == "The run 'run' has stopped before its end.\n"
    assert (folder / "_run.lock").exists() == read_run(folder).has_died == (end == "killed")
    html = (folder / "_report.html").read_text()
    assert data_of(html)["refresh"] is None and "step 3, stopped before its end" in html


def test_watching_a_run_that_was_killed_before_its_first_step(tmp_path):
    (tmp_path / "_run.lock").touch()
    with pytest.raises(ValueError, match="^The run has stopped before its first step: "):
        main([str(tmp_path), "--watch"])


def test_few_records(tmp_path):
    """Alarms about trends need 20, and all need 3: the page says so where a run has fewer."""
    for log, sentence in (
        (make_log(20), None),
        (make_log(19), "19 records: alarms about trends need 20."),
        (make_log(2), "2 records: alarms need 3, those of trends 20."),
        (
            [{**record, "step": 10 * record["step"]} for record in make_log(3)],
            "3 records: alarms about trends need 20. Lower `logging_steps`.",
        ),
        ([*make_log(2)[:1], {"step": 1, "train_runtime": 1.0}], "1 record: alarms need 3, those of trends 20."),
    ):
        found = re.findall('class="soft too-few">([^<]*)<', build_page([read_run(write_run(tmp_path, log))]))
        assert found == ([sentence] if sentence else [])


def test_what_differs_between_runs(tmp_path):
    """In one table, with the default where a run has not changed what another has."""
    recipe = {"learning_rate": 1e-6, "max_steps": 5}
    differing = [["learning_rate", "0.01", "1e-06"], ["beta", "0.1", "0.0"], ["seed", "7", "42"]]
    first = {"model": "/home/me/one", "recipe": {**recipe, "learning_rate": 0.01}, "differing": differing}
    second = {"model": "two", "recipe": recipe, "differing": [["seed", "7", "42"]]}
    runs = [read_run(write_run(tmp_path / name, about=about)) for name, about in (("a", first), ("b", second))]
    rows = [("model", ["one", "two"]), ("learning_rate", ["0.01", "1e-06"]), ("beta", ["0.1", "0.0"])]
    assert compare(runs) == rows
    (table,) = re.findall('class="compared">(.*?)</table>', build_page(runs), re.DOTALL)
    assert re.findall("<t[hd]>([^<]*)", table)[:6] == ["option", "a", "b", "model", "one", "two"]
    assert 'class="compared"' not in build_page(runs[:1])


def test_the_page_knows_which_runs_act(tmp_path):
    """The tokens of their completions count the tools' answers, and their curves do not."""
    log = [{**record, "tools/call_frequency": 1.0} for record in make_log(3)]
    runs = [read_run(write_run(tmp_path / str(len(own)), own)) for own in (log, make_log(4))]
    assert data_of(build_page(runs))["act"] == [True, False]


def test_several_runs_over_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a/luffy", "b/luffy"):
        write_run(Path(name), with_reward(make_log(5)), {2: rows_of_a_group(name, [1, 0])})
    main(["a/luffy", "b/luffy"])
    data = data_of(Path("_report.html").read_text())
    assert data["runs"] == ["luffy", "luffy (2)"]
    names = [trace["name"] for trace in data["figures"][0]["figure"]["data"]]
    assert names == ["luffy, rollouts", "luffy (2), rollouts", "luffy, demonstrations", "luffy (2), demonstrations"]
    assert {(group["run"], group["prompt"]) for group in data["groups"]} == {(0, "a/luffy"), (1, "b/luffy")}


# -- Which tokens teach


def weights_of(probs, **options):
    args = tiny.make_args("out", **options)
    return token_weights(args, torch.tensor(probs, dtype=torch.float64).log())


def test_weights_by_hand():
    probs = torch.tensor([1e-4, 0.1, 0.5, 1.0], dtype=torch.float64)
    for options, expected in (
        ({}, 0.1 * probs / (probs + 0.1) ** 2),
        ({"loss_type": "grpo"}, 0.1 * probs / (probs + 0.1) ** 2),
        ({"policy_shaping_gamma": 0.5}, 0.5 * probs / (probs + 0.5) ** 2),
        ({"policy_shaping": "none"}, probs),
        ({"policy_shaping": "sqrt"}, probs.sqrt() / 2),
        ({"demonstration_advantage_weight": 3.0}, 0.3 * probs / (probs + 0.1) ** 2),
        ({"demonstration_loss": "sft", "advantage_baseline": "on_policy"}, torch.ones(4)),
        ({"max_token_prob": 0.6}, 0.1 * probs / (probs + 0.1) ** 2 * (probs < 0.6)),
        ({"beta": 0.1}, 0.1 * probs / (probs + 0.1) ** 2),  # the reference is where the policy is
        ({"objective": "rl_plus", "rl_plus_focal": 0.5}, 2 * probs / (1.5 * probs + 0.5) * (1 - probs).sqrt()),
    ):
        weights = weights_of(probs.tolist(), **options)
        torch.testing.assert_close(weights, expected.double(), msg=str(options))
    for name in ("chord", "srft"):
        options = yaml.safe_load((cli.PACKAGE / "recipes" / f"{name}.yaml").read_text())
        kept = {key: value for key, value in options.items() if key in {f.name for f in own_fields(LuffyConfig)}}
        assert (weights_of([0.1, 0.5], **kept) > 0).all()


def test_tokens_of_two_checkpoints(tmp_path, monkeypatch):
    """The probabilities are those of the trainer's forward pass, and each token is one span of the picture."""
    run_flags(tmp_path)
    tiny.save_tiny_model(tmp_path / "later", seed=1)
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset_name", "train.jsonl", "--max_completion_length", "32", "--policy_shaping_gamma", "0.2"]
    assert cli.main(["report", "--model", "later", "--before", "model", "--rows", "2", *flags]) == 0
    html = Path("_tokens.html").read_text()
    pictures = data_of(html)["weights"]
    assert len(pictures) == 2 and all(all(picture["acted"]) for picture in pictures)
    about = dict(re.findall("<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", html))
    assert (about["before training"], about["after training"]) == ("model", "later")
    assert about["policy_shaping_gamma"] == "0.2"
    labels = [view["title"].partition(", ")[2] for view in pictures[0]["views"][::3]]
    assert labels == ["before training: model", "after training: later"]
    tokens = ["<think>", "0", "</think>", "\\", *"boxed{1}", "<|im_end|>"]
    assert "".join(pictures[0]["tokens"]) == "".join(tokens) and "0+1=" in pictures[0]["prompt"]
    titles = [view["title"].partition(",")[0] for view in pictures[0]["views"]]
    assert titles == ["Probability", "Weight", "Weight x (1 - probability)"] * 2
    tokenizer = AutoTokenizer.from_pretrained("model")
    for view, path in zip(pictures[0]["views"][1::3], ("model", "later"), strict=True):
        model = AutoModelForCausalLM.from_pretrained(path)
        ids = tokenizer("0+1=")["input_ids"] + tokenizer("<think>0</think>\\boxed{1}<|im_end|>")["input_ids"]
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        probs = torch.stack([logps[place - 1, ids[place]] for place in range(4, len(ids))]).exp().detach()
        torch.testing.assert_close(torch.tensor(view["probs"]), probs, rtol=1e-4, atol=1e-6)
        expected = 0.2 * probs / (probs + 0.2) ** 2
        torch.testing.assert_close(torch.tensor(view["weights"]), expected, rtol=1e-4, atol=1e-6)
        assert view["values"] == view["weights"]
    for view in pictures[0]["views"][2::3]:
        expected = [weight * (1 - prob) for weight, prob in zip(view["weights"], view["probs"], strict=True)]
        assert view["values"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    with pytest.raises(ValueError, match="All 8 traces have more tokens than .* `luffy inspect` says more"):
        main(["--model", "model", "--dataset_name", "train.jsonl", "--max_completion_length", "2"])


def test_answers_of_tools_do_not_teach(tmp_path, monkeypatch):
    """What a tool has answered, and the template between turns, has weight 0 in every picture of the trace."""
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    tiny.save_tiny_model(tmp_path / "models" / "model", template, max_position_embeddings=2048)
    rows = [{"prompt": PROMPT, "demonstrations": [ONE_CALL]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    docstring = '"""\n    Multiplies.\n\n    Args:\n        a: One.\n        b: Two.\n    """'
    code = f"def multiply(a: int, b: int) -> int:\n    {docstring}\n    return a * b\n"
    (tmp_path / "report_tools.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--dataset_name", "data.jsonl", "--tools", "report_tools.multiply", "--max_completion_length", "600"]
    main(["--model", str(tmp_path / "models" / "model"), *options])
    html = Path("_tokens.html").read_text()
    (picture,) = data_of(html)["weights"]
    parts = ["", ""]
    for token, acted in zip(picture["tokens"], picture["acted"], strict=True):
        parts[acted] += token
    answer = "<|im_start|>user\n<tool_response>\n6\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert parts[0] == f"\n{answer}" and "<tool_call>" in parts[1] and parts[1].endswith("<|im_end|>")
    assert picture["text"] == "".join(picture["tokens"])
    for view in picture["views"]:
        assert [weight != 0 for weight in view["weights"]] == picture["acted"]
    for view in picture["views"][1:]:
        assert [value != 0 for value in view["values"]] == picture["acted"]
    assert picture["title"] == "Row 0 (the first is 0), demonstrations[0]"
    about = dict(re.findall("<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", html))
    assert about["model"] == "model" and about["data"] == "data.jsonl" and about["policy_shaping"] == "regularized"
    assert about["max_completion_length"] == "600" and str(tmp_path) not in html + json.dumps(picture)


def test_characters_of_several_tokens():
    """Each is at the token that completes it; bytes that are no character do not hold back what follows."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer({letter: i for i, letter in enumerate(["<|pad|>", *letters])}, [], unk_token=None)
    for text in ("a é b", "Сумма ✅", "🍎🍎 田中"):
        texts = split_text(tokenizer, tokenizer(text)["input_ids"])
        assert texts == [part for letter in text for part in [""] * (len(letter.encode()) - 1) + [letter]]
    ids = tokenizer("🍎")["input_ids"]
    assert split_text(tokenizer, ids[:2]) == ["", "\ufffd"]  # a trace that is cut
    assert split_text(tokenizer, [*ids[:1], *tokenizer("abc")["input_ids"]]) == ["", "\ufffda", "b", "c"]
    texts = split_text(tokenizer, ids[1:2] * 9)
    assert max(map(len, "".join(text or " " for text in texts).split("\ufffd"))) <= 3


# -- What training writes


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def test_a_resumed_run_has_each_step_once(tmp_path):
    model = tiny.save_tiny_model(tmp_path / "model")

    def make():
        args = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "log_completions": True}
        args = tiny.make_args(tmp_path / "out", num_completions_to_print=0, **args)
        return LuffyTrainer(model, tiny.is_even, args, Dataset.from_list(tiny.addition_rows(8)))

    trainer = make()
    trainer.add_callback(KillAt(3))
    with pytest.raises(Killed):
        trainer.train()
    assert [record["step"] for record in read_run(tmp_path / "out").log] == [1, 2, 3]  # with no checkpoint of step 3
    trainer = make()
    trainer.train(resume_from_checkpoint=True)
    run = read_run(tmp_path / "out")
    assert [record["step"] for record in run.log] == [1, 2, 3, 4, 5, 5] and run.is_over
    assert [r.get("reward") for r in run.log] == [r.get("reward") for r in trainer.state.log_history]
    assert sorted(run.completions) == [1, 2, 3, 4, 5] and run.notes == []
    group = next(sample_groups(run, 0))
    assert [row.source for row in group.rows] == ["demonstration", *["rollout"] * 3]
    assert group.rows[0].tokens == len(group.rows[0].text) - len("<think></think>") + 2 + 1 and group.step == 5
    assert [row.truncated for row in group.rows][0] is False
    about = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert about["recipe"]["num_generations"] == 4 and about["reward_weights"] == {"is_even": 1.0}
    assert {
        *(("num_generations", "4", "8"), ("learning_rate", "0.01", "1e-06"), ("max_steps", "5", "-1")),
        *(("per_device_train_batch_size", "4", "8"), ("logging_steps", "1", "10"), ("save_steps", "2", "500")),
    } <= {tuple(row) for row in about["differing"]}
    assert not {"output_dir", "use_cpu", "seed"} & {name for name, *_ in about["differing"]}
    assert "trl" in about["versions"]


def test_a_column_of_the_users_is_kept(tmp_path):
    def counting(completions, log_extra=None, **kwargs):
        log_extra("tokens", ["mine"] * len(completions))
        return [1.0] * len(completions)

    model = tiny.save_tiny_model(tmp_path / "model")
    args = tiny.make_args(tmp_path / "out", log_completions=True, num_completions_to_print=0)
    LuffyTrainer(model, counting, args, Dataset.from_list(tiny.addition_rows(4))).train()
    table = pq.read_table(tmp_path / "out" / "completions" / "completions_00001.parquet")
    assert table.column("tokens").to_pylist() == ["mine"] * 4 and len(table.column("truncated")) == 4
    group = next(sample_groups(read_run(tmp_path / "out"), 0))
    assert [row.tokens for row in group.rows] == [None] * 4


def test_the_card_links_the_report(tmp_path):
    """What goes to the Hub names neither the token nor a path of this machine, also where files are unpacked."""
    model = tiny.save_tiny_model(tmp_path / "model")
    options = {"log_completions": True, "num_completions_to_print": 0, "hub_token": "hf_verysecrettoken"}
    for is_linked in (False, True):
        folder = tmp_path / f"out_{is_linked}"
        args = tiny.make_args(folder, report_to_hub=is_linked, **options)
        trainer = LuffyTrainer(model, tiny.is_even, args, Dataset.from_list(tiny.addition_rows(8)))
        trainer.train()
        trainer.create_model_card()
        assert ("](report.html)" in (folder / "README.md").read_text()) == is_linked
        assert (folder / "report.html").exists() == is_linked
    html = (tmp_path / "out_True" / "report.html").read_text()
    data = data_of(html)
    assert len(data["groups"]) == 1 and data["refresh"] is None and "from model:" in html
    for text in (html, json.dumps(data)):
        assert "verysecret" not in text and str(tmp_path) not in text


def test_a_report_for_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ValueError, match=r"`report_to_hub=True` needs plotly: `pip install luffy-trl\[report\]`"):
        tiny.make_args("out", report_to_hub=True)


# -- In a browser

needs_browser = pytest.mark.skipif(browser.why_not() is not None, reason=str(browser.why_not()))


@pytest.fixture(scope="module")
def driver():
    with browser.chromium() as driver:
        yield driver


def open_report(driver, folder, *options):
    main([str(folder), *options])
    messages = browser.open_page(driver, Path(folder) / "_report.html")
    assert messages == []


def texts(driver, selector):
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )


def click(driver, selector, number=0):
    driver.execute_script("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, number)


def choose(driver, selector, value):
    script = "const node = document.querySelector(arguments[0]); node.value = arguments[1]; "
    driver.execute_script(script + "node.dispatchEvent(new Event('input'))", selector, value)


def lines_drawn(driver):
    """Width and height of each curve that is drawn."""
    return driver.execute_script(
        "return [...document.querySelectorAll('#panels .scatterlayer path.js-line')].map((path) => "
        "[path.getBBox().width, path.getBBox().height])"
    )


@needs_browser
def test_curves_groups_and_filters(tmp_path, driver):
    rows = [
        *rows_of_a_group("hard", [1, 0, 0, 0], truncated=[3]),
        *rows_of_a_group("easy", [1, 1, 1, 1]),
        *rows_of_a_group("middle", [1, 0, 1, 0], texts=["trace", "one", "Needle " + "x" * 2000 + " END", "three"]),
    ]
    log = with_reward(make_log(30, **{"completions/clipped_ratio": (0.7, 0.9)}))
    write_run(tmp_path, log, {1: rows, 5: rows_of_a_group("later", [1, 0])}, {"differing": [["beta", "0.1", "0.0"]]})
    open_report(driver, tmp_path)
    drawn = lines_drawn(driver)
    assert len(drawn) == len([key for _, keys in draw_titles() for key in keys]) == 17
    # all but the curves of two constants are as wide as their panel, and rise or fall in it
    assert min(width for width, _ in drawn) > 300 and sum(height > 20 for _, height in drawn) >= 12
    assert texts(driver, "#panels .alarm") == texts(driver, "body > .alarm") != []
    assert texts(driver, "body > .alarm")[0].startswith("Rollouts are cut off")
    assert texts(driver, ".differing td") == ["beta", "0.1", "0.0"]

    assert texts(driver, "#count") == ["4 of 4 groups"] and texts(driver, ".rows") == []
    for kind, expected in (
        *(("none", ["hard", "later"]), ("all", ["easy"]), ("differs", ["middle"]), ("truncated", ["hard"])),
        ("", ["hard", "easy", "middle", "later"]),
    ):
        choose(driver, "#kind", kind)
        assert sorted(texts(driver, ".group .one-line")) == sorted(expected)
    choose(driver, "#step", "5")
    assert texts(driver, ".group .one-line") == ["later"]
    choose(driver, "#step", "")
    choose(driver, "#search", "needle")
    assert texts(driver, ".group .one-line") == ["middle"]
    click(driver, ".group > button")
    assert texts(driver, ".row strong") == ["demonstration", "rollout", "rollout", "rollout"]
    assert texts(driver, ".row .soft")[1] == "reward 1, advantage 0.5, 12 tokens"
    assert len(texts(driver, ".row .text")[1]) == 600
    click(driver, ".row", 1)
    assert texts(driver, ".row .text")[1].endswith(" END")
    click(driver, ".group > button")
    assert texts(driver, ".rows") == []
    assert driver.get_log("browser") == []


def draw_titles():
    from luffy_trl.report.page import PANELS

    return PANELS


@needs_browser
def test_hostile_text(tmp_path, driver):
    """In prompts, completions and the names of metrics and runs: shown as text, and never run."""
    folder = tmp_path / "run <script>window.hacked=4<"
    names = list(HOSTILE)
    texts_written = [text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for text in HOSTILE.values()]
    rows = rows_of_a_group(HOSTILE["script"], [1, 0, 0, 0, 0, 0, 0], texts_written)
    log = [{**record, "<img src=x onerror=window.hacked=5>": 1.0} for record in with_reward(make_log(5))]
    about = {"differing": [["<b>x</b>", "</table><script>window.hacked=6</script>", "0"]], "model": "/home/me/<i>m"}
    write_run(folder, log, {1: rows}, about)
    open_report(driver, folder)
    click(driver, "#others > summary")
    click(driver, ".group > button")
    for number in range(len(names)):
        click(driver, ".row", number)
    shown = dict(zip(names, texts(driver, ".row .text"), strict=True))
    assert (
        shown["script"] == HOSTILE["script"] and shown["html"] == HOSTILE["html"] and shown["long"] == HOSTILE["long"]
    )
    assert shown["ansi"].startswith("\u241b[31mred\u241b[0m") and "\x1b" not in shown["ansi"]
    assert "\u202e" not in shown["direction"] and "\u27e8U+202e\u27e9right-to-left" in shown["direction"]
    assert shown["null"].startswith("before\u2400after")
    assert texts(driver, ".prompt .text") == [HOSTILE["script"]]
    time.sleep(0.5)  # what would load, loads
    assert driver.execute_script("return window.hacked") is None
    assert driver.execute_script("return document.querySelectorAll('img, b, i, svg image, iframe').length") == 0
    widths = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1]
    html = (folder / "_report.html").read_text()
    assert "/home/me" not in html and html.count("<script") == 3
    assert driver.get_log("browser") == []


def test_a_lone_surrogate_and_numbers_that_json_lacks(tmp_path):
    """What Arrow does not hold comes in prompts of a picture."""
    picture = {"prompt": HOSTILE["surrogate"], "tokens": ["\ud83d"], "views": []}
    html = build_page([], pictures=[picture])
    html.encode("ascii")
    assert data_of(html)["weights"] == [picture]


@needs_browser
def test_tokens_in_colour(tmp_path, driver):
    values = {"probs": [0.1, 0.9, 0.5, 0.5], "weights": [0.5, -0.5, 0.0, 0.5]}
    views = [{"title": "Weight", "values": values["weights"], "scale": 0.5, "hue": 35, **values}]
    tokens = ["</script>", "\x1b", "24", ""]
    picture = {"title": "Row 3", "prompt": "<i>", "text": "<b>é", "tokens": tokens, "views": views}
    picture["acted"] = [True, True, False, True]
    (tmp_path / "page.html").write_text(build_page([], pictures=[picture]))
    assert browser.open_page(driver, tmp_path / "page.html") == []
    assert texts(driver, ".tokens span") == ["</script>", "\u241b", "24", "\u00b7"]
    assert texts(driver, ".weights .text:not(.tokens)") == ["<i>", "<b>é"]
    assert texts(driver, ".weights h2") == ["Row 3"]
    look = "(s) => [getComputedStyle(s).backgroundColor, s.title]"
    script = f"return [...document.querySelectorAll('.tokens span')].map({look})"
    (orange, title), (red, _), (grey, of_answer), _ = driver.execute_script(script)
    assert grey == "rgba(136, 136, 136, 0.133)" and of_answer == "probability 0.500, answer of a tool: weight 0"
    assert orange != red != "rgb(255, 255, 255)" and title == "probability 0.100, weight 0.500"


@needs_browser
def test_nothing_is_fetched(tmp_path, driver):
    write_run(tmp_path, make_log(5))
    html = build_page([read_run(tmp_path)])
    own = html.partition('id="plotly"')[0] + html.rpartition('id="data"')[2].partition("</script>")[2]
    assert "http://" not in own and "https://" not in own and " src=" not in own
    open_report(driver, tmp_path)
    resources = driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in resources if not name.startswith("data:")] == []


@needs_browser
def test_a_quickstart_run(tmp_path, driver):
    sys.path.insert(0, str(QUICKSTART))
    import task

    recipe = {"learning_rate": 3e-4, "max_completion_length": 48, "per_device_train_batch_size": 32, "max_steps": 3}
    args = {**recipe, "num_generations": 8, "log_completions": True, "num_completions_to_print": 0, "bf16": False}
    args |= {"use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    trainer = LuffyTrainer(
        str(QUICKSTART / "checkpoint" / "model"),
        math_verify_reward,
        LuffyConfig(str(tmp_path / "out"), **args, gradient_checkpointing=False),
        task.make_splits(seed=0, num_problems=64)["train"],
    )
    trainer.train()
    open_report(driver, tmp_path / "out")
    assert len(lines_drawn(driver)) == 17
    choose(driver, "#kind", "none")
    assert texts(driver, "#count") == ["12 of 12 groups"]  # three steps, four prompts each, and the model solves none
    click(driver, ".group > button")
    assert texts(driver, ".row strong") == ["demonstration", *["rollout"] * 7]
    assert texts(driver, ".row .text")[0].startswith("<think>")


@needs_browser
def test_a_run_of_two_processes(tmp_path, driver):
    arguments = run_flags(tmp_path, max_steps=2, log_completions="true", steps_per_generation=1)
    launch = ["--num_processes", 2, "--multi_gpu", "--main_process_port", 0]
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = luffy("train", *arguments, *launch, cwd=tmp_path, env=env, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = result.stdout.splitlines()  # of one process
    assert [line.split()[0] for line in lines] == [*"model data step memory results 1/2 2/2 ended The".split()]
    assert lines[0].endswith("2 processes on cpu") and max(map(len, lines[5:])) <= 120
    open_report(driver, tmp_path / "out")
    assert texts(driver, "#count") == ["4 of 4 groups"]  # two steps of two processes with a group each
    log = [json.loads(line) for line in (tmp_path / "out" / "_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 2]
    assert len(lines_drawn(driver)) == 17 and os.path.getsize(tmp_path / "out" / "_report.html") < 3e6


@needs_browser
def test_a_long_run_opens_quickly(tmp_path, driver):
    """500 steps, completions of 8,192 tokens: a file of nearly 10 MB, and under 3 seconds of the browser's time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    text = " ".join(rng.choices(words, k=200_000))

    def completion():
        start = rng.randrange(len(text) - 36_000)
        return text[start : start + 36_000]

    tables = {
        step: [
            row
            for group in range(2)
            for row in rows_of_a_group(f"{step} {group}", [1, *[0] * 7], [completion() for _ in range(8)], tokens=8192)
        ]
        for step in range(10, 501, 10)
    }
    write_run(tmp_path, with_reward(make_log(500)), tables)
    main([str(tmp_path)])
    assert 8e6 < os.path.getsize(tmp_path / "_report.html") < 10e6
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})  # not what other processes take
    assert browser.open_page(driver, tmp_path / "_report.html") == []
    metrics = {m["name"]: m["value"] for m in driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    assert metrics["TaskDuration"] < 3.0
    assert len(texts(driver, ".group")) > 25
