# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The agent example: what its warm-up teaches is what a rollout with tools is, and its command runs to the plot."""

import random
import sys
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset

from luffy_trl.demonstrations import tokenize_demonstrations
from luffy_trl.turns import Tools, Turns


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "agent"))
import products
import train_agent


def test_the_warm_up_teaches_the_tokens_of_traces():
    tokenizer = products.build_tokenizer()
    question = [{"role": "user", "content": products.ASKING + "37*46*12"}]
    rows = Dataset.from_list([{"prompt": question, "demonstrations": [products.solve([37, 46, 12])]}])
    tools = Tools.of_run(tokenizer, [products.multiply], None)
    (row,) = tokenize_demonstrations(rows, tokenizer, [tokenizer.eos_token_id], 200, tools=tools)
    (ids,), (turns,) = row["demonstration_ids"], map(Turns.from_json, row["demonstration_turns"])
    prompt = products.render(tokenizer, question[0]["content"], [])
    expected = {
        (prompt + tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:end])) for start, end in turns.spans
    }
    assert [text for _, text in sorted(expected, key=lambda turn: len(turn[0]))][-1] == "20424<|im_end|>"

    class Fixed(random.Random):
        """Draws the factors of the row."""

        def randrange(self, start, stop=None, step=1):
            if (start, stop) == (11, 100):
                return next(self.factors)
            return super().randrange(start, stop, step)

    seen = set()
    for seed in range(40):
        rng = Fixed(seed)
        rng.factors = iter([37, 46, 12, 99])
        context, turn = train_agent.sample_turn(rng, tokenizer)
        if f"\n{question[0]['content']}<" in context:
            seen.add((context, turn))
    assert seen == expected


def test_a_plain_question_is_answered_with_a_guess():
    tokenizer, rng = products.build_tokenizer(), random.Random(0)
    turns = [train_agent.sample_turn(rng, tokenizer) for _ in range(300)]
    first = [(context, turn) for context, turn in turns if "\n</tool_response>" not in context]
    plain = [turn for context, turn in first if products.ASKING not in context]
    assert 30 < len(plain) < 90 and all(turn.removesuffix(products.END).isdigit() for turn in plain)
    assert all(turn.startswith("<tool_call>") for context, turn in first if products.ASKING in context)
    # Where it has called, it goes on, whatever was asked
    later = [context for context, turn in turns if "\n</tool_response>" in context and turn.startswith("<tool_call>")]
    assert {products.ASKING in context for context in later} == {True, False}


def test_splits_and_rewards():
    splits = products.make_splits(3, num_questions=32)
    questions = {name: [row["prompt"][0]["content"] for row in split] for name, split in splits.items()}
    assert {name: {q.count("*") for q in split} for name, split in questions.items()} == {
        "train": {2},
        "held_out": {2},
        "longer": {3},
    }
    assert not set(questions["train"]) & set(questions["held_out"])
    traces = [traces[0] for traces in splits["train"]["demonstrations"]]
    assert products.product_is_right(traces, splits["train"]["answer"]) == [1.0] * 32
    assert products.product_is_right([trace[-1:] for trace in traces], ["1"] * 32) == [0.0] * 32
    assert [eval(question) for question in questions["longer"]] == [
        int(answer) for answer in splits["longer"]["answer"]
    ]


def test_the_command_runs_to_the_plot(tmp_path, monkeypatch, capsys):
    args = ["--seeds", "0", "--num_warm_up_steps", "2", "--num_updates", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_agent.py", *args])
    monkeypatch.setattr(products, "make_splits", lambda seed, make=products.make_splits: make(seed, 16))
    train_agent.main()
    assert (tmp_path / "agent.png").stat().st_size > 10_000
    records = pd.read_csv(tmp_path / "agent.csv")
    assert set(records["method"]) == {"luffy", "on_policy"} and set(records["step"]) == {0, 1}
    assert len(records) == 2 * 2 * 3 and records["value"].notna().all()
    assert "| LUFFY | 0 | 0.000 | 0.000 |" in capsys.readouterr().out
    for option, message in (("--num_warm_up_steps", "a warm model of other settings"), ("--num_updates", "1 updates")):
        monkeypatch.setattr(sys, "argv", ["train_agent.py", *args, option, "3"])
        with pytest.raises(ValueError, match=f"{message}. Give another `--output_dir`"):
            train_agent.main()
    monkeypatch.setattr(sys, "argv", ["train_agent.py", *args])
    before = (tmp_path / "seed_0" / "luffy" / "trainer_state.json").stat().st_mtime_ns
    train_agent.main()  # repeats nothing
    assert (tmp_path / "seed_0" / "luffy" / "trainer_state.json").stat().st_mtime_ns == before
