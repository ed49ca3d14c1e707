# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Demonstrations after prompts with images: two architectures with unlike tensors of images."""

import pytest
import tiny
import tiny_vision
import torch
from datasets import Dataset
from test_acting import capture
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
