# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Demonstrations after prompts with images: two architectures with unlike tensors of images."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_vision
import torch
from datasets import Dataset
from peft import LoraConfig
from test_acting import capture
from test_cli import luffy
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import LuffyConfig, LuffyTrainer


MAKERS = [tiny_vision.make_qwen, tiny_vision.make_llava]


def rows_with(
    num_images=lambda i: 1 + i % 2, demonstrations=lambda i: [f"It is {i}."], size=lambda i: 16 + 8 * (i % 2)
):
    """Rows with one image or two, of several sizes."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Which, {i}?"}],  # so that rows can be told apart
            "images": [tiny_vision.picture(10 * i + j, size(i + j)) for j in range(num_images(i))],
            "demonstrations": demonstrations(i),
        }
        for i in range(4)
    ]


def make_trainer(folder, make, rows, cls=LuffyTrainer, rewards=tiny.share_of_digits, peft_config=None, **kwargs):
    model, processor = make()
    options = {"max_completion_length": 12, "gradient_accumulation_steps": 2, **kwargs}
    args = tiny.make_args(folder, GRPOConfig if cls is GRPOTrainer else LuffyConfig, **options)
    dataset = Dataset.from_list(rows)
    return cls(model, rewards, args, dataset, processing_class=processor, peft_config=peft_config)


def expected(trainer, make, made, rows):
    """Loss and gradient, row by row, each with its own images through the processor."""
    model, processor = make()
    parts, num_tokens = [], 0
    for batch in made:
        for i in range(len(batch["prompt_ids"])):
            ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
            prompt_ids = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            num_tokens += len(ids)
            parts.append((prompt_ids, ids, batch["advantages"][i], batch["demonstration_mask"][i, : len(ids)]))
    total = 0.0
    for prompt_ids, ids, advantage, shown in parts:
        inputs = None
        for row in rows:  # the row whose prompt this is
            parts_of_prompt = [{"type": "image", "image": image} for image in row["images"]]
            parts_of_prompt.append({"type": "text", "text": row["prompt"][0]["content"]})
            encoded = processor.apply_chat_template(
                [[{"role": "user", "content": parts_of_prompt}]],
                **{"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"},
            )
            if torch.equal(encoded["input_ids"][0], prompt_ids):
                inputs = dict(encoded)
        assert inputs is not None
        inputs["input_ids"] = torch.cat([prompt_ids, ids])[None]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.zeros_like(ids)[None]], dim=1)
        logps = model(**inputs).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1).gather(1, ids[:, None])[:, 0]
        probs = logps.exp()
        weights = torch.where(shown, probs / (probs + 0.1), probs / probs.detach())
        total = total - (advantage * weights).sum()
    loss = total / num_tokens
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return loss.item(), norm.item()


@pytest.mark.parametrize(
    "options", [{}, {"max_tokens_per_microbatch": 120}, {"length_aware_batching": False}], ids=str
)
@pytest.mark.parametrize("make", MAKERS)
def test_loss_and_gradient(tmp_path, make, options):
    rows = rows_with()[1:3] if make is tiny_vision.make_qwen else rows_with(num_images=lambda i: 1)[1:3]
    trainer = make_trainer(tmp_path, make, rows, learning_rate=0.0, loss_type="dapo", max_grad_norm=1e9, **options)
    made, completions = capture(trainer)
    trainer.train()
    assert sum("It is" in completion[0]["content"] for completion in completions[0]) == 2
    loss, norm = expected(trainer, make, made, rows)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-6)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("make", ["make_qwen", "make_llava"])
def test_images_go_with_their_sequences_to_another_process(tmp_path, make):
    """Cut again by length, and sent to where they belong, the loss and gradient are those of TRL's own cut."""
    options = {"make": make, "per_device_train_batch_size": 4, "num_generations": 4, "loss_type": "dapo"}
    scenarios = {
        name: ("sees", {**options, **own})
        for name, own in {
            "trl": {"length_aware_batching": False},
            "by length": {},
            "budget": {"max_tokens_per_microbatch": 150},
        }.items()
    }
    runs = tiny.launch_several(tmp_path, scenarios, env={"ACCELERATE_USE_CPU": "true"})
    expected = torch.tensor(runs["trl"][0])
    assert expected.abs().min() > 1e-4
    for name in ("by length", "budget"):
        for rank in runs[name]:
            torch.testing.assert_close(torch.tensor(rank), expected, atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_without_traces_it_is_trls_own_to_the_bit(tmp_path, make):
    weights = []
    rows = rows_with(demonstrations=lambda i: [])
    for cls, options in (
        (GRPOTrainer, {}),
        (LuffyTrainer, {"length_aware_batching": False, "ratio_clipping": "on_policy"}),
    ):
        given = (
            rows if cls is LuffyTrainer else [{k: v for k, v in row.items() if k != "demonstrations"} for row in rows]
        )
        own = {"scale_rewards": "none", "loss_type": "dapo", "beta": 0.0, **options}
        trainer = make_trainer(tmp_path / cls.__name__, make, given, cls, **own)
        trainer.train()
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("make", MAKERS)
def test_failures_prefixes_adapters_and_the_reference(tmp_path, make):
    """Everything at once: images of prefixes that the policy continues, old and reference passes, LoRA."""
    options = {"demonstration_policy": "on_failure", "failure_threshold": 2.0, "prefix_ratio_min": 0.5}
    options |= {"prefix_schedule": "fixed", "num_demonstrations": 2, "num_iterations": 2, "beta": 0.1, "max_steps": 2}
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    traces = rows_with(demonstrations=lambda i: [f"It is {i}.", f"It must be {i}."])
    trainer = make_trainer(tmp_path, make, traces, peft_config=adapter, max_completion_length=40, **options)
    made, completions = capture(trainer)
    trainer.train()
    assert sum(completion[0]["content"].startswith("It ") for completion in completions[-1]) == 4
    assert "kl" in trainer.state.log_history[0] and "old_per_token_logps" in made[0]


def test_prompts_that_say_where_images_are(tmp_path):
    """The same tokens as where TRL finds them a place."""
    images, trace = [tiny_vision.picture(0), tiny_vision.picture(1)], [{"role": "assistant", "content": "It is 0."}]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    rows = [
        {"prompt": [{"role": "user", "content": content}], "images": images, "demonstrations": [trace]}
        for content in (parts, "Which?")
    ]
    logs = []
    for row in rows:
        trainer = make_trainer(tmp_path, tiny_vision.make_qwen, [row] * 2, max_steps=1)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0]["demonstrations/prob"] == logs[1]["demonstrations/prob"] > 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1+1="}, "row 0: `prompt` is a text, and images need chat messages"),
        (
            {"prompt": [{"role": "user", "content": [*[{"type": "image"}] * 2, {"type": "text", "text": "?"}]}]},
            "row 0: `prompt` and its images do not match: ",
        ),
    ],
)
def test_images_without_a_place(tmp_path, row, message):
    rows = [{"images": [tiny_vision.picture(0)], "demonstrations": ["2"], **row}] * 2
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_vision.make_qwen, rows)


@pytest.mark.parametrize(
    "options",
    [{"padding_free": True}, {"num_demonstrations": 0, "replay_ratio": 0.5, "per_device_train_batch_size": 8}],
)
def test_what_has_no_images_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="is not supported with a multimodal processor"):
        make_trainer(tmp_path, tiny_vision.make_qwen, rows_with(), **options)


def test_the_example_from_the_command_line(tmp_path):
    """`examples/vision` makes a model and data, and `luffy train` trains on them, with the processor of the model."""
    root = Path(__file__).parent.parent
    shutil.copytree(root / "examples" / "vision", tmp_path / "examples" / "vision")
    script = tmp_path / "examples" / "vision" / "prepare.py"
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=True, capture_output=True)
    command = re.search(r"luffy train (.*?)\n\"\"\"", script.read_text(), re.DOTALL)[1].replace("\\\n", " ").split()
    result = luffy("train", *command, "--report_to", "none", "--logging_steps", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    state = json.loads((tmp_path / "outputs" / "vision" / "run" / "trainer_state.json").read_text())
    assert state["log_history"][0]["demonstrations/reward"] == 1.0


@pytest.mark.parametrize("make", MAKERS)
def test_resumed_it_is_the_same_run(tmp_path, make):
    """Models that see save their weights under other names than they have: all of them come back."""
    options = {"max_steps": 4, "steps_per_generation": 4, "save_strategy": "steps", "save_steps": 2, "adam_beta2": 0.9}
    weights = []
    for resume in (None, True):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, make, rows_with(), per_device_train_batch_size=4, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_row_without_an_image(tmp_path):
    rows = rows_with(num_images=lambda i: int(i != 2))
    with pytest.raises(ValueError, match="row 2 has no image, and processors take none among rows that have some"):
        make_trainer(tmp_path, tiny_vision.make_qwen, rows)
