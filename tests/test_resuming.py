# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""A run that is killed and resumed is the run that nobody has killed."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file

from luffy_trl import LuffyTrainer
from luffy_trl.mixins.resuming import find_last_checkpoint


def history(folder):
    """What the last checkpoint knows of the run, without what a clock has measured."""
    records = json.loads((folder / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in record.items() if "time" not in k and "per_second" not in k} for record in records]


KINDS = ("prefixes", "on_failure", "replay")
FAULTS = ("missing", "broken")


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory):
    """
    Two folders, for a number of processes: runs that nobody has killed, and the same runs killed and resumed.

    Of two processes there are also runs that resume with what a process has kept missing, or broken.
    """

    @functools.cache
    def of(num_processes):
        whole, resumed = (tmp_path_factory.mktemp(name) for name in ("whole", "resumed"))
        tiny.launch_several(whole, {kind: ("resumable", {"kind": kind}) for kind in KINDS}, num_processes)
        scenarios = {kind: ("resumable", {"kind": kind, "resume": True}) for kind in KINDS}
        for kind in KINDS:
            with pytest.raises(AssertionError, match="failed in"):
                tiny.launch("resumable", resumed / kind, num_processes, kind=kind, kill_at=7)
            checkpoints = sorted(path.name for path in (resumed / kind / "out").glob("checkpoint-*"))
            assert checkpoints == ["checkpoint-5"]
        for fault in FAULTS if num_processes == 2 else ():
            checkpoint = resumed / fault / "out" / "checkpoint-5"
            shutil.copytree(whole / "prefixes" / "out" / "checkpoint-5", checkpoint)
            file = checkpoint / "generation_1.pt"
            file.unlink() if fault == "missing" else file.write_bytes(file.read_bytes()[:1000])
            scenarios[fault] = "resumable", {"kind": "prefixes", "resume": True}
        tiny.launch_several(resumed, scenarios, num_processes)
        return whole, resumed

    return of


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed(runs_of, num_processes, kind):
    """
    Two updates for each generation and four for each epoch. Killed in the seventh update, the run resumes after the
    fifth: within a generation batch of the second epoch.
    """
    whole, killed = (folder / kind / "out" for folder in runs_of(num_processes))
    assert len(history(whole)) == 10 and history(killed) == history(whole)
    if kind == "replay":
        pools = [torch.load(run / "checkpoint-10" / "kept_by_all.pt")["ReplaySource"] for run in (whole, killed)]
        assert pools[0]["problems"] == pools[1]["problems"] and len(pools[0]["successes"]) > 4
        for expected, resumed in zip(pools[0]["successes"], pools[1]["successes"], strict=True):
            assert all(
                torch.equal(*map(torch.as_tensor, pair)) for pair in zip(expected[2:], resumed[2:], strict=True)
            )
    expected = load_file(whole / "checkpoint-10" / "model.safetensors")
    resumed = load_file(killed / "checkpoint-10" / "model.safetensors")
    assert expected.keys() == resumed.keys()
    for name, weights in expected.items():
        assert torch.equal(weights, resumed[name]), name


def make_trainer(folder, rows=None, is_stream=False, **kwargs):
    options = {"steps_per_generation": 4, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = tiny.make_args(folder / "out", **{**options, **kwargs})
    dataset = Dataset.from_list(rows or tiny.addition_rows(8))
    dataset = dataset.to_iterable_dataset() if is_stream else dataset
    return LuffyTrainer(str(folder / "model"), tiny.share_of_digits, args, dataset)


@pytest.fixture(scope="module")
def train_twice(tmp_path_factory):
    """Copies a model and two updates of a run into a folder. The second lies within a generation batch."""

    @functools.cache
    def train(**options):
        folder = tmp_path_factory.mktemp("trained")
        tiny.save_tiny_model(folder / "model")
        make_trainer(folder, max_steps=2, **options).train()
        return folder

    return lambda folder, **options: shutil.copytree(train(**options), folder, dirs_exist_ok=True)


def test_metrics_that_were_not_logged_are_kept(tmp_path):
    """Three updates are logged together; the checkpoint lies after the second of them."""
    tiny.save_tiny_model(tmp_path / "model")

    def log_after(max_steps, resume=None):
        trainer = make_trainer(tmp_path, max_steps=max_steps, logging_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        return [log for log in trainer.state.log_history if log["step"] == 3 and "reward" in log]

    (whole,) = log_after(3)
    (resumed,) = log_after(3, str(tmp_path / "out" / "checkpoint-2"))
    # the Trainer's own mean loss begins anew, and a clock is a clock
    differing = {key for key, value in whole.items() if resumed.get(key, "none") != value}
    assert differing <= {"loss", "step_time"}
    assert "reward" in whole and "demonstrations/prob" in whole and "entropy" in whole


def test_another_batch_size_generates_again(tmp_path, caplog, train_twice):
    train_twice(tmp_path)
    trainer = make_trainer(tmp_path, max_steps=3, steps_per_generation=3, per_device_train_batch_size=8)
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2 lies within a generation batch, which cannot be used: it was saved with" in caplog.text
    assert "`per_device_train_batch_size`, `steps_per_generation`" in caplog.text
    assert generated == [3 * 8 // 4 * 3]

    trainer = make_trainer(tmp_path, max_steps=4)
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert generated == []  # what is left of the batch is enough


def test_a_checkpoint_without_an_end_is_passed_over(tmp_path, caplog):
    assert find_last_checkpoint(str(tmp_path)) is None
    for step, text in ((9, '{"epoch"'), (10, None), (8, "{}"), (2, "{}")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-best").mkdir()
    assert Path(find_last_checkpoint(str(tmp_path))).name == "checkpoint-8"
    assert "checkpoint-9 was not written to its end" in caplog.text and "checkpoint-10" in caplog.text


def test_nothing_to_resume_from(tmp_path):
    tiny.save_tiny_model(tmp_path / "model")
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="has no complete checkpoint to resume from. Train without"):
        trainer.train(resume_from_checkpoint=True)


CUTS = [
    ({}, {"max_tokens_per_microbatch": 40}, "max_tokens_per_microbatch"),
    ({"max_tokens_per_microbatch": 60}, {}, "max_tokens_per_microbatch"),
    ({"max_tokens_per_microbatch": 60}, {"max_tokens_per_microbatch": 40}, "max_tokens_per_microbatch"),
    ({}, {"beta": 0.1}, "beta"),
    ({}, {"length_aware_batching": False}, "length_aware_batching"),
    ({}, {"num_demonstrations": 2}, "num_demonstrations"),
]


@pytest.mark.parametrize(("before", "after", "name"), CUTS)
def test_options_of_a_batch_that_change(tmp_path, caplog, train_twice, before, after, name):
    """What a checkpoint keeps of a generation batch was made under other options, and is made again."""
    train_twice(tmp_path, **before)
    trainer = make_trainer(tmp_path, max_steps=3, **after)
    generated = tiny.count_generated_rows(trainer.model)
    micro_batches = tiny.record_micro_batches(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert f"it was saved with other values of `{name}`" in caplog.text
    assert sum(generated) == 4 * 3  # a trace for each of four rows
    assert sum(len(inputs["prompt_ids"]) for inputs in micro_batches) == 4  # the sequences of one update, once each


@pytest.mark.parametrize("budget", [None, 60])
def test_a_checkpoint_of_version_0_1(tmp_path, caplog, train_twice, budget):
    """Its generation batches name six numbers, and no options."""
    train_twice(tmp_path, **({"max_tokens_per_microbatch": budget} if budget else {}))
    file = tmp_path / "out" / "checkpoint-2" / "generation_0.pt"
    torch.save({**torch.load(file), "geometry": [1, 4, 1, 4, 1, 4]}, file)

    def generated_rows(**options):
        trainer = make_trainer(tmp_path, max_steps=3, save_strategy="no", **options)
        rows = tiny.count_generated_rows(trainer.model)
        trainer.train(resume_from_checkpoint=str(file.parent))
        return sum(rows)

    assert generated_rows(max_tokens_per_microbatch=budget) == 0 and not caplog.text
    assert generated_rows(max_tokens_per_microbatch=60 if budget is None else None) == 12
    assert generated_rows(max_tokens_per_microbatch=budget, beta=0.1) == 12


@pytest.mark.parametrize("fault", ["a list", "no metrics", "too few batches"])
def test_a_file_that_no_checkpoint_keeps(tmp_path, caplog, train_twice, fault):
    train_twice(tmp_path)
    file = tmp_path / "out" / "checkpoint-2" / "generation_0.pt"
    state = torch.load(file)
    if fault == "no metrics":
        del state["metrics"]
    elif fault == "too few batches":
        state["buffered_inputs"] = state["buffered_inputs"][:1]
    torch.save([1, 2] if fault == "a list" else state, file)
    trainer = make_trainer(tmp_path, max_steps=3)
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train(resume_from_checkpoint=True)
    assert "lies within a generation batch, which cannot be used: generation_0.pt" in caplog.text
    assert generated == [12]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_process_without_its_file(runs_of, fault):
    """Both processes generate again, instead of one waiting for the other for ever."""
    _, resumed = runs_of(2)
    assert len(history(resumed / fault / "out")) == 10


class Interrupt(BaseException):
    """What a notebook's stop button raises, and not an `Exception`."""


def interrupted_scoring(fails_at):
    """The reward of other tests, which is interrupted in one of its calls, after it has logged a column."""
    calls = []

    def reward(completions, log_extra, **kwargs):
        calls.append(1)
        log_extra("call", [len(calls)] * len(completions))
        if len(calls) == fails_at:
            raise Interrupt
        return tiny.share_of_digits(completions)

    return reward


@pytest.mark.parametrize(
    ("policy", "fails_at"),
    [
        *[("always", call) for call in (1, 2)],
        *[("on_failure", call) for call in (1, 2, 3, 4)],
        *[("cached", call) for call in (1, 2)],
    ],
)
def test_after_an_interrupt(tmp_path, policy, fails_at):
    """`evaluate` and `train` after an interrupted `train` do what they do on a fresh trainer."""
    tiny.save_tiny_model(tmp_path / "model")
    options = {
        "always": {},
        "on_failure": {"failure_threshold": 1.0, "demonstration_policy": "on_failure"},
        "cached": {"cache_demonstration_rewards": True, "cache_demonstration_ref_logps": True, "beta": 0.1},
    }[policy]

    def make(reward):
        args = tiny.make_args(
            tmp_path / "out",
            steps_per_generation=2,
            gradient_accumulation_steps=1,
            max_steps=3,
            per_device_eval_batch_size=4,
            **options,
        )
        rows = tiny.addition_rows(4)
        held_out = Dataset.from_list([{"prompt": "7+7=", "answer": "14"}])
        return LuffyTrainer(str(tmp_path / "model"), reward, args, Dataset.from_list(rows), held_out)

    def run(trainer):
        torch.manual_seed(1)
        evaluated = trainer.evaluate()
        del evaluated["eval_num_tokens"], evaluated["epoch"]  # they count what was trained before
        trainer.model.load_state_dict(fresh_weights)
        trainer.state.log_history.clear()
        torch.manual_seed(2)
        trainer.train()
        records = [evaluated, *trainer.state.log_history]
        return [{k: v for k, v in record.items() if "time" not in k and "per_second" not in k} for record in records]

    fresh = make(interrupted_scoring(None))
    fresh_weights = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    expected = run(fresh)
    trainer = make(interrupted_scoring(fails_at))
    with pytest.raises(Interrupt):
        trainer.train()
    trainer.model.load_state_dict(fresh_weights)
    trainer.state.global_step = 0
    trainer.optimizer = trainer.lr_scheduler = None  # a Trainer keeps these from one `train` to the next
    assert run(trainer) == expected
    assert not trainer.is_in_train


def test_after_an_interrupted_evaluation(tmp_path):
    """Numbers of its batches are not of the next."""
    tiny.save_tiny_model(tmp_path / "model")
    held_out = Dataset.from_list([{"prompt": f"{i}+7=", "answer": "14"} for i in range(4)])
    evaluated = []
    for fails_at in (None, 2):
        args = tiny.make_args(tmp_path / "out", per_device_eval_batch_size=4, num_generations_eval=2)
        rows = Dataset.from_list(tiny.addition_rows(4))
        trainer = LuffyTrainer(str(tmp_path / "model"), interrupted_scoring(fails_at), args, rows, held_out)
        if fails_at:
            torch.manual_seed(3)
            with pytest.raises(Interrupt):
                trainer.evaluate()
        torch.manual_seed(1)
        metrics = trainer.evaluate()
        evaluated.append({k: v for k, v in metrics.items() if "time" not in k and "second" not in k})
    del evaluated[0]["eval_num_tokens"], evaluated[1]["eval_num_tokens"]  # all that were ever generated
    assert evaluated[1] == evaluated[0]


def other_rows(kind):
    rows = tiny.addition_rows(8)
    return {
        "fewer rows": rows[:7],
        "another prompt": [*rows[:5], {**rows[5], "prompt": "2+3="}, *rows[6:]],
        "another order": rows[::-1],
        "other traces": [{**row, "demonstrations": ["A0"]} for row in rows],
    }[kind]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("kind", ["fewer rows", "another prompt", "another order", "other traces"])
def test_another_dataset(tmp_path, caplog, train_twice, kind, is_stream):
    """Other prompts are refused, or begun with as the user says; corrected traces of the same prompts are not."""
    train_twice(tmp_path, **({"is_stream": True} if is_stream else {}))
    resumed = make_trainer(tmp_path, other_rows(kind), is_stream, max_steps=3)
    if kind == "other traces":
        resumed.train(resume_from_checkpoint=True)
        assert not caplog.text
        return
    with pytest.raises(ValueError, match="checkpoint-2 was trained on another `train_dataset` .* `ignore_data_skip="):
        resumed.train(resume_from_checkpoint=True)
    resumed = make_trainer(tmp_path, other_rows(kind), is_stream, max_steps=3, ignore_data_skip=True)
    generated = tiny.count_generated_rows(resumed.model)
    resumed.train(resume_from_checkpoint=True)
    assert "it was saved with other values of `train_dataset`. It is generated again" in caplog.text
    assert sum(generated) == 12


def test_a_checkpoint_that_does_not_name_its_dataset(tmp_path, caplog, train_twice):
    train_twice(tmp_path)
    file = tmp_path / "out" / "checkpoint-2" / "generation_0.pt"
    state = torch.load(file)
    assert state.pop("dataset").startswith("8 rows, digest of prompts ")
    torch.save(state, file)
    trainer = make_trainer(tmp_path, max_steps=3)
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train(resume_from_checkpoint=True)
    assert generated == [] and not caplog.text
