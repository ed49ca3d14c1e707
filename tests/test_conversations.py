# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Conversations with tools, as people have them, and the command line with tools."""

import json
from pathlib import Path

import pytest
import tiny
from datasets import Dataset, load_dataset
from test_acting import TEMPLATE
from test_cli import luffy
from test_turns import PROMPT, multiply

from luffy_trl.data.conversations import to_demonstration
from luffy_trl.demonstrations import to_supervised, tokenize_demonstrations
from luffy_trl.turns import Tools


OPENAI = [
    *PROMPT,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "multiply", "arguments": '{"a": 2, "b": 3}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "6"},
    {"role": "assistant", "content": "It is 24."},
]
TRL = json.loads(json.dumps(OPENAI))
TRL[1]["tool_calls"][0]["function"]["arguments"] = {"a": 2, "b": 3}
SHAREGPT = [
    {"from": "human", "value": "2*3*4?"},
    {"from": "function_call", "value": '{"name": "multiply", "arguments": {"a": 2, "b": 3}}'},
    {"from": "observation", "value": "6"},
    {"from": "gpt", "value": "It is 24."},
]


@pytest.mark.parametrize(
    "row", [{"messages": OPENAI}, {"messages": TRL}, {"conversations": SHAREGPT}], ids=["openai", "trl", "sharegpt"]
)
def test_formats(row):
    shown = to_demonstration(row, 0)
    assert [(message["role"], message["content"]) for message in shown["prompt"]] == [("user", "2*3*4?")]
    ((called, answered, said),) = shown["demonstrations"]
    (call,) = called["tool_calls"]
    assert call["function"]["name"] == "multiply" and json.loads(call["function"]["arguments"]) == {"a": 2, "b": 3}
    assert (answered["role"], answered["content"]) == ("tool", "6")
    assert (said["role"], said["content"], said["tool_calls"]) == ("assistant", "It is 24.", None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"row 3 has no list of messages in `messages` or `conversations`, only \['text'\]"),
        ({"messages": PROMPT}, "row 3: no message follows one of the user"),
        ({"messages": OPENAI[1:]}, "row 3: no message follows one of the user"),
        ({"messages": ["x"]}, "row 3, message 0 has neither `role` nor `from`"),
        (
            {"conversations": [SHAREGPT[0], {"from": "function_call", "value": "{"}]},
            "message 1 is a call, and no JSON",
        ),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "{}"}]}, "message 1: a call has no"),
    ],
)
def test_what_is_no_conversation(row, message):
    with pytest.raises(ValueError, match=message):
        to_demonstration(row, 3)


def test_the_command_line(tmp_path):
    """From conversations to a run with tools; `luffy inspect` shows what was acted and what was answered."""
    tokenizer = tiny.make_tokenizer(TEMPLATE)
    tiny.make_model(tokenizer, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    dataset = Dataset.from_list([{"messages": OPENAI}] * 4)
    dataset = dataset.map(to_demonstration, with_indices=True, remove_columns=dataset.column_names)
    dataset.to_json(tmp_path / "data.jsonl")
    (tmp_path / "my_tools.py").write_text(
        'def multiply(a: int, b: int) -> int:\n    """\n    Multiplies.\n\n    Args:\n        a: One.\n'
        '        b: Two.\n    """\n    return a * b\n\n\n'
        'def right(completions, **kwargs):\n    return [float("24" in c[-1]["content"]) for c in completions]\n'
    )
    flags = ["--reward_funcs", "my_tools.right", "--max_completion_length", "600", "--use_cpu", "true"]
    flags += ["--bf16", "false", "--dataset_name", "data.jsonl", "--model_name_or_path", "model"]
    inspected = luffy("inspect", *flags, "--tools", "my_tools.multiply", cwd=tmp_path)
    assert inspected.returncode == 0, inspected.stderr
    parts = [line.split(maxsplit=1) for line in inspected.stdout.splitlines() if line.startswith("  ")]
    acted = [part[1] for part in parts if part[0] == "trace"]
    assert acted[-2:] == ["</tool_call><|im_end|>", "It is 24."]
    assert [part[1] for part in parts if part[0] == "answer"][2:4] == ["<tool_response>\\n", "6\\n"]
    assert "# Tools" in "".join(part[1] for part in parts if part[0] == "prompt")

    flags += ["--max_steps", "1", "--per_device_train_batch_size", "4", "--num_generations", "4"]
    flags += ["--report_to", "none", "--output_dir", "out", "--save_strategy", "no", "--logging_steps", "1"]
    without = luffy("train", *flags, cwd=tmp_path)
    assert without.returncode == 1
    assert (
        "row 0: `demonstrations[0]`[0]: `tool_calls[0]` calls 'multiply', and the run has no tools" in without.stderr
    )
    trained = luffy("train", *flags, "--tools", "my_tools.multiply", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    (log,) = [
        log
        for log in json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        if "loss" in log
    ]
    assert log["demonstrations/reward"] == 1.0
    assert load_dataset("json", data_files=str(tmp_path / "data.jsonl"), split="train").num_rows == 4
    assert Path(tmp_path / "out" / "model.safetensors").exists()


def test_sft_learns_what_was_acted(tmp_path):
    """Not what tools have answered; the command takes tools too."""
    tokenizer = tiny.make_tokenizer(TEMPLATE)
    dataset = Dataset.from_list([to_demonstration({"messages": OPENAI}, 0), {"prompt": PROMPT, "demonstrations": []}])
    tools = Tools.of_run(tokenizer, [multiply], None)
    tokens = tokenize_demonstrations(dataset, tokenizer, [tokenizer.eos_token_id], 1000, tools=tools)
    (row,) = to_supervised(tokens, tokenizer, tools.options(None))
    assert "# Tools" in tokenizer.decode(row["input_ids"])
    learned = tokenizer.decode([label for label in row["labels"] if label != -100])
    called = '<tool_call>\n{"name": "multiply", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
    assert learned == f"{called}It is 24.<|im_end|>"

    tiny.make_model(tokenizer, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    dataset.to_json(tmp_path / "data.jsonl")
    (tmp_path / "my_tools.py").write_text(
        'def multiply(a: int, b: int) -> int:\n    """\n    Multiplies.\n\n    Args:\n        a: One.\n'
        '        b: Two.\n    """\n    return a * b\n'
    )
    flags = [
        "--dataset_name",
        "data.jsonl",
        "--model_name_or_path",
        "model",
        "--output_dir",
        "out",
        "--max_steps",
        "1",
    ]
    flags += ["--max_steps", "1", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    result = luffy("sft", *flags, "--tools", "my_tools.multiply", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
