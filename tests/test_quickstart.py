# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The quickstart's task, and the warm model that is shipped with it."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
import prepare  # noqa: E402
import run  # noqa: E402
import task  # noqa: E402

from luffy_trl.rewards import math_verify_reward  # noqa: E402


def test_a_trace_by_hand():
    # 48+3: (4, 8) -> (8, 7); 87+4: (8, 7) -> (7, 2); 72+2: (2, 9); 29-7: (9, 2 - 7 = -5 = 5 mod 10)
    assert task.rewrite("48+3+4+2-7") == ["87+4+2-7", "72+2-7", "29-7", "95"]
    assert task.rewrite("34*7") == ["41"]
    completion = task.format_completion(["87+4", "72"], "72")
    assert completion == r"<think>87+4;72</think>\boxed{72}"
    assert task.is_correct(completion, "72") and not task.is_correct(completion, "73")


def test_splits():
    splits = task.make_splits(seed=3, num_problems=64)
    prompts = {name: set(split["prompt"]) for name, split in splits.items()}
    assert sum(map(len, prompts.values())) == 5 * 64 == len(set().union(*prompts.values()))

    def num_operations(prompt):
        return sum(prompt.count(symbol) for symbol in task.OPERATORS)

    assert {num_operations(p) for p in prompts["train"] | prompts["held_out"]} == {4}
    assert {num_operations(p) for p in prompts["longer"]} == {5, 6}
    assert all("*" in p for p in prompts["unseen_operator"])
    assert not any("*" in p for p in prompts["train"] | prompts["held_out"] | prompts["longer"])
    assert task.make_splits(seed=3, num_problems=64)["train"].to_list() == splits["train"].to_list()
    assert task.make_splits(seed=4, num_problems=64)["train"].to_list() != splits["train"].to_list()
    # the reward that the recipe uses accepts every trace
    traces = [trace for (trace,) in splits["train"]["demonstrations"]]
    assert math_verify_reward(traces, answer=splits["train"]["answer"], require_think=True) == [1.0] * 64


def test_the_tokenizer_survives_a_round_trip(tmp_path):
    tokenizer = task.build_tokenizer()
    prepare.build_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = r"48+3*4=<think>87*4;72</think>\boxed{72}"
    expected = ["4", "8", "+3", "*4", "=", "<think>", "8", "7", "*4", ";", "7", "2", "</think>", r"\boxed{"]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, loaded):
        ids = each(text)["input_ids"]
        assert each.convert_ids_to_tokens(ids) == [*expected, "7", "2", "}"]
        assert each.decode(ids, skip_special_tokens=True) == text


def test_the_shipped_model_knows_the_easy_skill_and_not_the_hard_one():
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "checkpoint" / "model")
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "checkpoint" / "model")
    splits = task.make_splits(seed=0)
    set_seed(0)

    def successes(split, num_samples):
        prompts, answers = splits[split]["prompt"], splits[split]["answer"]
        return prepare.count_successes(model, tokenizer, prompts, answers, num_samples)

    assert successes("train", 2000) == 0
    assert successes("easy", 256) >= 250


def test_prepare_uses_the_shipped_model(tmp_path, monkeypatch, capsys):
    command = [QUICKSTART / "prepare.py", "--output_dir", tmp_path, "--num_samples", "0"]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600, check=True)
    assert f"The warm model in {QUICKSTART / 'checkpoint'} was made with these settings" in result.stdout
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    prepare.main()  # the second time, what the first one left
    assert f"The warm model in {tmp_path} was made with these settings" in capsys.readouterr().out
    shipped = (QUICKSTART / "checkpoint" / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == shipped
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert rows == task.make_splits(0)["train"].to_list()


def test_the_warm_up_learns(tmp_path):
    """A few steps of it lower the loss by a quarter and more."""
    set_seed(0)
    tokenizer = task.build_tokenizer()
    model = prepare.build_model(tokenizer)
    config = prepare.WarmUpConfig(seed=0, num_steps=60)
    batch = next(prepare.sample_batches(tokenizer, config, set()))

    def loss():
        logits = model(batch[0]).logits[:, :-1].flatten(0, 1)
        return prepare.cross_entropy(logits, batch[1][:, 1:].flatten(), ignore_index=-100).item()

    before = loss()
    prepare.warm_up(model, tokenizer, config, set())
    assert loss() < 0.75 * before


def test_the_table_and_the_plot(tmp_path):
    folder = tmp_path / "seed_0" / "luffy"
    folder.mkdir(parents=True)
    records = [{"step": 0, "eval_held_out_loss": 0.0, "eval_reward": 0.25}, {"step": 5, "loss": 1.0, "reward": 0.5}]
    for split, reward in (("held_out", 0.5), ("longer", 0.125), ("unseen_operator", 0.75), ("easy", 1.0)):
        records.append({"step": 10, f"eval_{split}_loss": 0.0, "eval_reward": reward})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": records}))
    accuracies = pd.DataFrame(run.read_accuracies("luffy", 0, folder))
    row = run.table(accuracies).splitlines()[-1]
    assert row == "| LUFFY | 0 | 0.500 | 0.125 | 0.750 | 1.000 | 0: 0.25, 10: 0.50 |"
    run.plot(accuracies, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
