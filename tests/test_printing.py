# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What a run prints: few lines, short ones, and everything where it is asked for."""

import json
import logging
import os
import pty
import re
import select
import subprocess
import sys

import pytest
from test_cli import run_flags

from luffy_trl import cli
from luffy_trl.printing import WIDTH, short_line


STEP = {
    "loss": 0.1,
    "reward": 0.25,
    "on_policy/solve_none": 0.5,
    "on_policy/solve_all": 0.125,
    "demonstrations/prob": 0.4119,
    "completions/mean_length": 1023.6,
    "entropy": 0.512,
    "step_time": 12.34,
    "grad_norm": 1.0,
}


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (
            STEP,
            "12/500  reward 0.250  none 0.50  all 0.12  prob 0.412  length 1024  entropy 0.51  12.3 s  left 1:40:12",
        ),
        ({"loss": 0.5, "mean_token_accuracy": 0.75, "entropy": 1.0}, "12/500  loss 0.5  accuracy 0.750  entropy 1.00"),
        ({**STEP, "reward": None}, "12/500  none 0.50  all 0.12"),
        (
            {"eval_hard_loss": 0.1, "eval_reward": 0.5, "eval_completions/mean_length": 9, "eval_runtime": 2.5},
            "12/500  eval hard  reward 0.500  length 9  2.5 s",
        ),
        ({"eval/aime24": 0.1, "eval/math500": 0.725}, "12/500  eval/aime24 0.100  eval/math500 0.725"),
        ({"train_runtime": 3723.4, "train_loss": 0.123456}, "ended after 500 steps, 1:02:03, mean loss 0.1235"),
        ({"mine": "hello", "epoch": 1.0}, "12/500  mine hello"),
    ],
)
def test_lines(logs, line):
    assert short_line(logs, 12, 500, 6012.0).startswith(line)


def test_a_line_is_short():
    numbers = dict.fromkeys(STEP, -12345.678)
    assert len(short_line(numbers, 1_000_000, 1_000_000, 1e7)) <= WIDTH
    assert len(short_line({f"eval/{i}": 0.5 for i in range(50)}, 1, 2)) == WIDTH


def run(tmp_path, monkeypatch, **options):
    arguments = [*map(str, run_flags(tmp_path, max_steps=2, log_completions="true", **options))]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 0
    return json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]


def test_the_table_is_an_option(tmp_path, monkeypatch, capsys):
    log = run(tmp_path, monkeypatch, num_completions_to_print=8)
    printed = capsys.readouterr().out
    assert printed.count("Step 1 ") == 1 and "demonstration" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("2/2  ")]
    shown = dict(re.findall(r"(\w+) (\d+\.?\d*)(?:  |$)", line))
    assert float(shown["prob"]) == round(log[1]["demonstrations/prob"], 3)
    assert float(shown["entropy"]) == round(log[1]["entropy"], 2) and "left 0:00:00" in line


def test_all_metrics_are_an_option(tmp_path, monkeypatch, capsys):
    log = run(tmp_path, monkeypatch, print_all_metrics="true", disable_tqdm="true")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(lines) == 3 and all(f"'{key}'" in lines[1] for key in log[1] if key != "step")


def test_warnings_are_kept_and_the_level_holds(tmp_path, monkeypatch, caplog):
    """A reward function of the user's that warns, by `warnings` and by `logging`, and this package's own notes."""
    (tmp_path / "loud_rewards.py").write_text(
        "import logging, warnings\n\n\ndef one(completions, **kwargs):\n    warnings.warn('mine, by warnings')\n"
        "    logging.getLogger('mine').warning('mine, by logging')\n    return [1.0] * len(completions)\n"
    )
    logger = logging.getLogger("luffy_trl")
    with pytest.warns(UserWarning, match="mine, by warnings"):
        run(tmp_path, monkeypatch, reward_funcs="loud_rewards.one", log_level="error")
    assert "mine, by logging" in caplog.messages
    assert logger.level == logging.ERROR
    logger.setLevel(logging.NOTSET)
    logging.getLogger("trl").setLevel(logging.NOTSET)


def test_a_terminal_has_a_bar_with_the_time_left(tmp_path):
    arguments = [*map(str, run_flags(tmp_path, max_steps=3))]
    main, other = pty.openpty()
    subprocess.run(["stty", "rows", "40", "cols", "130"], stdin=other, check=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "luffy_trl", "train", *arguments], cwd=tmp_path, stdout=other, stderr=other
    )
    os.close(other)
    printed = b""
    while select.select([main], [], [], 120)[0]:
        try:
            printed += os.read(main, 4096)
        except OSError:  # the other end is closed
            break
    assert process.wait(60) == 0
    text = printed.decode()
    assert re.search(r"\| 2/3 \[\d\d:\d\d<\d\d:\d\d", text)
    before = re.split(r"[\r\n]1/3  reward", text)[0]
    assert len(before) < len(text) and len([line for line in before.split("\n") if line.strip()]) == 10
