# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What wandb (offline), trackio and TensorBoard have on disk is what the trainer logged. Nothing is sent."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record


END_OF_RUN = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trackers")
    places = {"WANDB_DIR": folder, "TRACKIO_DIR": folder / "trackio_dir", "TENSORBOARD_LOGGING_DIR": folder / "events"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launched_trackers.py")), str(folder)],
        env={**os.environ, "WANDB_MODE": "offline", **{name: str(path) for name, path in places.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return folder


def read_history(folder, tracker):
    """The trainer's records under the trackers' names: (step, values), where the sums of the run stand apart."""
    history = json.loads((folder / "histories.json").read_text())[tracker]
    assert [record["step"] for record in history] == [1, 2, 2, 3, 3, 3]
    assert [any(name.startswith("eval_") for name in record) for record in history] == [0, 0, 1, 0, 1, 0]
    records = []
    for record in history:
        step = record.pop("step")
        names = {
            name: name.replace("eval_", "eval/", 1) if name[:5] == "eval_" else f"train/{name}" for name in record
        }
        records.append((step, {names[name]: value for name, value in record.items() if name not in END_OF_RUN}))
    return records, {name: value for name, value in history[-1].items() if name in END_OF_RUN}


def check_tables(tables):
    """The completions of each record: columns, steps, and who wrote them."""
    for table in tables:
        assert set(table[0]) == {"step", "prompt", "completion", "is_demonstration_text", "source", "advantage"}
    summaries = [({row["step"] for row in table}, [row["source"] for row in table]) for table in tables]
    training, evaluation = ["demonstration", *["rollout"] * 3], ["rollout"] * 4  # TRL keeps one generation batch
    # the record of the end of the run repeats the last table
    expected = [(1, training), (2, training), (2, evaluation), (3, training), (3, evaluation), (3, evaluation)]
    assert summaries == [({step}, sources) for step, sources in expected]
    first = tables[0][0]
    assert first["completion"].startswith("<think>\n") and first["advantage"] == 0.75


def read_wandb(path):
    """Records of an offline run's file: blocks of 32 KiB, and in them pieces with checksum, length and kind."""
    data, place, buffer = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        buffer += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(buffer)
            buffer = b""


def test_wandb(folder):
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows, table_files, summary = [], [], {}
    for record in read_wandb(path):
        items = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in [*record.history.item, *record.summary.update]
        }
        if record.WhichOneof("record_type") == "summary":
            summary |= items
        elif "completions/path" in items:
            table_files.append(items["completions/path"])
        elif "train/epoch" in items or "eval/loss" in items:
            rows.append(items)
    expected, end = read_history(folder, "wandb")
    assert [row.pop("train/global_step") for row in rows] == [step for step, _ in expected]
    assert [{name: v for name, v in row.items() if name[0] != "_"} for row in rows] == [row for _, row in expected]
    assert {name: summary[name] for name in end} == end
    tables = [json.loads((path.parent / "files" / name).read_text()) for name in table_files]
    check_tables([[dict(zip(table["columns"], row, strict=True)) for row in table["data"]] for table in tables])


def test_trackio(folder):
    with sqlite3.connect(folder / "trackio_dir" / "luffy.db") as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _ in rows} == {"run"}
    rows = [json.loads(metrics) for _, metrics in rows]
    expected, _ = read_history(folder, "trackio")
    logged = [row for row in rows if "train/global_step" in row]
    assert [(row.pop("train/global_step"), row) for row in logged] == expected
    check_tables([row["completions"]["_value"] for row in rows if "completions" in row])


def test_tensorboard(folder):
    events = EventAccumulator(str(folder / "events")).Reload()
    logged = {(name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    expected, end = read_history(folder, "tensorboard")
    expected.append((3, {f"train/{name}": value for name, value in end.items()}))  # which it keeps beside the others
    assert logged == {
        (name, step, float(np.float32(value))) for step, values in expected for name, value in values.items()
    }


def test_nothing_is_sent(folder):
    assert json.loads((folder / "addresses.json").read_text()) == []
