# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Scoring traces with the model that wrote them."""

import pytest
import tiny
import torch
from datasets import Dataset, load_dataset
from test_acting import TEMPLATE, counts_24
from test_turns import ONE_CALL, PROMPT, multiply
from transformers import AutoModelForCausalLM

from luffy_trl import LuffyTrainer
from luffy_trl.data.score import ScoreArguments, main


ROWS = [
    {"prompt": "1+1=", "demonstrations": ["A7", "A7", "BBBBB"]},
    {"prompt": "22+2=", "demonstrations": []},
    {"prompt": "3+3=", "demonstrations": None},
    {"prompt": "4+4=", "demonstrations": ["8"]},
]


def score(folder, rows, teacher_seed=1, model=None, **kwargs):
    Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    args = ScoreArguments(
        dataset_name=str(folder / "rows.jsonl"),
        model_name_or_path=tiny.save_tiny_model(folder / "policy", **(model or {})),
        teacher_name_or_path=tiny.save_tiny_model(folder / "teacher", seed=teacher_seed, **(model or {})),
        output_file=str(folder / "scored.parquet"),
        **{"batch_size": 2, "dtype": "float32", **kwargs},
    )
    main(args)
    return load_dataset("parquet", data_files=args.output_file, split="train", cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_token_of_every_trace(tmp_path, temperature):
    scored = score(tmp_path, ROWS, temperature=temperature)
    assert scored["demonstrations"] == [row["demonstrations"] for row in ROWS]
    tokenizer = tiny.make_tokenizer()
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    for row, logprobs in zip(ROWS, scored["demonstration_logprobs"], strict=True):
        assert len(logprobs) == len(row["demonstrations"] or [])
        for trace, values in zip(row["demonstrations"] or [], logprobs, strict=True):
            prompt_ids = tokenizer(row["prompt"])["input_ids"]
            ids = [*tokenizer(trace)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = teacher(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
            expected = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(values), expected, atol=1e-5, rtol=0)


def test_the_trainer_takes_them(tmp_path):
    """A policy that is its own teacher has the ratio 1, and the coefficient 1 / (1 + gamma)."""
    scored = score(tmp_path, ROWS[:1], teacher_seed=0)
    args = tiny.make_args(tmp_path / "out")
    trainer = LuffyTrainer(str(tmp_path / "policy"), tiny.share_of_digits, args, scored)
    trainer.train()
    assert trainer.state.log_history[0]["demonstrations/ratio"] == pytest.approx(1 / 1.1, abs=1e-5)


def test_chat_prompts_and_completions(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}"}],
            "completion": [{"role": "assistant", "content": "A" * (i + 1)}] if i else None,
        }
        for i in range(3)
    ]
    logprobs = score(tmp_path, rows)["demonstration_logprobs"]
    assert [values and len(values) for values in logprobs] == [None, 2 + 1, 3 + 1]


def test_traces_that_call_tools(tmp_path):
    """A value for each token of a trace, those of the tools' answers too: the policy as teacher has the ratio 1."""
    rows = [{"prompt": PROMPT, "demonstrations": [ONE_CALL]}] * 2
    model = {"chat_template": TEMPLATE, "max_position_embeddings": 2048}
    scored = score(tmp_path, rows, teacher_seed=0, model=model, tools=["test_turns.multiply"])
    args = tiny.make_args(tmp_path / "out", max_completion_length=600)
    trainer = LuffyTrainer(str(tmp_path / "policy"), counts_24, args, scored, tools=[multiply])
    trainer.train()
    assert trainer.state.log_history[0]["demonstrations/ratio"] == pytest.approx(1 / 1.1, abs=1e-5)


def test_another_vocabulary_is_refused(tmp_path):
    def other_teacher(*args, **kwargs):
        tokenizer = tiny.make_tokenizer()
        tokenizer.add_tokens(["<extra>"])
        tokenizer.save_pretrained(tmp_path / "policy")

    score(tmp_path, ROWS)
    other_teacher()
    # a token more does no harm while it does not occur, and has no embedding where it does
    args = {"output_file": str(tmp_path / "again.jsonl"), "dtype": "float32"}
    names = {"model_name_or_path": str(tmp_path / "policy"), "teacher_name_or_path": str(tmp_path / "teacher")}
    main(ScoreArguments(dataset_name=str(tmp_path / "rows.jsonl"), **names, **args))
    Dataset.from_list([{"prompt": "1", "demonstrations": ["<extra>"]}]).to_json(tmp_path / "extra.jsonl")
    with pytest.raises(ValueError, match="token embeddings, and the policy's tokenizer gave the token .*<extra>"):
        main(ScoreArguments(dataset_name=str(tmp_path / "extra.jsonl"), **names, **args))

    vocab = tiny.make_tokenizer().get_vocab()
    swapped = tiny.make_tokenizer(merges=[("a", "b")])
    assert swapped.get_vocab()["<think>"] != vocab["<think>"]
    swapped.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="numbers 2 tokens unlike the policy, such as '</think>'"):
        main(ScoreArguments(dataset_name=str(tmp_path / "rows.jsonl"), **names, **args))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_file": "scored.csv"}, "`output_file` must end in .parquet or .jsonl, got 'scored.csv'"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
    ],
)
def test_mistakes(options, message):
    names = dict.fromkeys(("dataset_name", "model_name_or_path", "teacher_name_or_path"), "nowhere")
    with pytest.raises(ValueError, match=message):
        main(ScoreArguments(**{**names, "output_file": "scored.parquet", **options}))
