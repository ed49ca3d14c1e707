# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Streams: each prompt is shown its own traces, whatever the shards, and groups are of one prompt on all processes."""

import json

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset

from luffy_trl import LuffyTrainer
from luffy_trl.data import load_data


def rows_with_own_traces(num_rows):
    """A trace, its answer and its length belong to one row alone."""
    return [
        {"prompt": f"{i}+1=", "demonstrations": [f"A{i}" * (1 + i % 3)], "answer": str(i)} for i in range(num_rows)
    ]


def is_own(prompts, completions, answer, scored=None, **kwargs):
    """1.0 for the trace of the row, 0.5 for that of another, 0.0 for what a random model writes."""
    traces = {row["demonstrations"][0]: row["answer"] for row in rows_with_own_traces(48)}
    if scored is not None:
        scored.append(len(completions))
    return [
        0.0 if text not in traces else 1.0 if traces[text] == gold else 0.5
        for text, gold in zip(completions, answer, strict=True)
    ]


@pytest.mark.parametrize(
    "options", [{}, {"cache_demonstration_rewards": True}, {"demonstration_policy": "on_failure"}]
)
@pytest.mark.parametrize("num_shards", [4, 24])
def test_each_prompt_is_shown_its_own_traces(tmp_path, num_shards, options):
    tiny.save_tiny_model(tmp_path / "model")
    stream = Dataset.from_list(rows_with_own_traces(48)).to_iterable_dataset(num_shards=num_shards)
    args = tiny.make_args(tmp_path, per_device_train_batch_size=64, max_steps=9, **options)
    trainer = LuffyTrainer(str(tmp_path / "model"), is_own, args, stream)
    trainer.train()
    rewards = [log["demonstrations/reward"] for log in trainer.state.log_history if "reward" in log]
    assert rewards == [1.0] * 9  # three epochs


def test_reference_log_probs_are_of_the_trace_itself(tmp_path):
    """The cached log-probs of each trace equal those of the policy, which stays the reference."""
    tiny.save_tiny_model(tmp_path / "model")
    stream = Dataset.from_list(rows_with_own_traces(48)).to_iterable_dataset(num_shards=24)
    args = tiny.make_args(
        tmp_path,
        per_device_train_batch_size=64,
        max_steps=6,
        beta=0.1,
        learning_rate=0.0,
        cache_demonstration_ref_logps=True,
    )
    trainer = LuffyTrainer(str(tmp_path / "model"), is_own, args, stream)
    micro_batches, batches = tiny.record_micro_batches(trainer), tiny.record_batches(trainer)
    trainer.train()
    assert len(micro_batches) == 6
    for inputs in micro_batches:
        for row in inputs["demonstration_mask"].any(1).nonzero().flatten():
            with torch.no_grad():
                logps, _ = tiny.logps_and_entropies(trainer.model, *tiny.sequence(inputs, row))
            torch.testing.assert_close(inputs["ref_per_token_logps"][row, : len(logps)], logps, atol=1e-4, rtol=0)
    assert len(batches[-1][0].caches.ref_logps) == 48


def test_groups_of_two_processes(tmp_path):
    """Six rows for each process: the second group of four lies on both."""
    first, second = tiny.launch("streams", tmp_path)
    for num_shards in (1, 4):
        prompts = [a + b for a, b in zip(first[num_shards]["prompts"], second[num_shards]["prompts"], strict=True)]
        assert len(prompts) == 3 and all(len(batch) == 12 for batch in prompts)
        groups = [batch[i : i + 4] for batch in prompts for i in range(0, 12, 4)]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({group[0] for group in groups}) == 9  # no prompt twice in an epoch
        assert first[num_shards]["rewards"] == [1.0] * 3
    assert first[1]["prompts"] != first[4]["prompts"]  # shuffled over shards


def test_a_broken_line_far_into_a_stream(tmp_path):
    """The file and the line are named; what was trained until then is in a checkpoint, from which a run goes on."""
    tiny.save_tiny_model(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({**row, "filler": "x" * 200_000}) for row in rows_with_own_traces(200)]
    # Rows are read in parts of 10 MB, and tokenized 64 at a time: training gets to those before it
    file.write_text("\n".join([*lines[:140], lines[140][:10], *lines[141:]]) + "\n")

    def make(**kwargs):
        options = {"per_device_train_batch_size": 16, "shuffle_dataset": False, "save_strategy": "steps", **kwargs}
        args = tiny.make_args(tmp_path / "out", max_steps=30, save_steps=100, **options)
        rows = load_data(str(file), streaming=True).remove_columns("filler")
        return LuffyTrainer(str(tmp_path / "model"), tiny.share_of_digits, args, rows)

    with pytest.raises(ValueError, match="Line 141 of '.*rows.jsonl' is no JSON, .* Correct the line") as error:
        make(save_strategy="no").train()
    assert "\n" not in str(error.value) and not list((tmp_path / "out").glob("checkpoint-*"))
    with pytest.raises(ValueError, match="Line 141 of .* Correct the line, .* updates until then are in") as error:
        make().train()
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"are in {checkpoint.name} of" in str(error.value) and "\n" not in str(error.value)
    file.write_text("\n".join(lines) + "\n")
    trainer = make()
    trainer.train(resume_from_checkpoint=True)
    steps = [log["step"] for log in trainer.state.log_history if "reward" in log]
    assert steps == list(range(1, 31))


def test_a_stream_that_is_too_short(tmp_path):
    tiny.save_tiny_model(tmp_path / "model")
    rows = tiny.addition_rows(3)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    args = tiny.make_args(tmp_path, per_device_train_batch_size=16)
    trainer = LuffyTrainer(str(tmp_path / "model"), tiny.share_of_digits, args, stream)
    with pytest.raises(
        ValueError, match="ended before the first update: it has fewer rows than the 4 prompts that are"
    ):
        trainer.train()
