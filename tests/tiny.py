# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""A tiny model, a tokenizer and arguments that the tests share. Nothing is downloaded."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from luffy_trl import LuffyConfig
from luffy_trl.groups import Caches, MixedBatch
from luffy_trl.methods import Method


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING_CHATML = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


# With this the trainer is TRL's own
PLAIN_GRPO = {"num_demonstrations": 0, "ratio_clipping": "on_policy", "length_aware_batching": False}


def make_tokenizer(chat_template=CHATML, merges=()):
    """Qwen2's byte-level tokenizer on ASCII without merges: a token per character, and a turn ends in `<|im_end|>`."""
    specials = ["<|pad|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"]
    characters = ["Ċ", "Ġ", *(chr(c) for c in range(33, 127))]  # newline, space and what they print as themselves
    vocab = {token: i for i, token in enumerate([*specials, *characters, *("".join(pair) for pair in merges)])}
    tokenizer = Qwen2Tokenizer(
        vocab,
        list(merges),
        unk_token=None,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<|endoftext|>"],
        padding_side="left",
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(tokenizer, seed=0, **kwargs):
    torch.manual_seed(seed)
    config = Qwen2Config(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "initializer_range": 0.3,  # a spread-out distribution, so that ratios and gradients are not all alike
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            **kwargs,
        }
    )
    return Qwen2ForCausalLM(config)


def save_tiny_model(path, chat_template=CHATML, seed=0, **kwargs):
    """A local folder with the model and the tokenizer, as `from_pretrained` wants it."""
    tokenizer = make_tokenizer(chat_template)
    make_model(tokenizer, seed, **kwargs).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_args(output_dir, cls=LuffyConfig, **kwargs):
    return cls(
        **{
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 16,
            "max_steps": 1,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": "PRETEND" not in os.environ,  # see cpu_engines.py
            "bf16": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **kwargs,
        }
    )


def share_of_digits(completions, **kwargs):
    """A reward that differs between random completions."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ch.isdigit() or ch.isupper() for ch in text) / max(len(text), 1) for text in texts]


def is_even(completions, **kwargs):
    """A reward of 0 or 1 that a random model earns about half of the time."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 2 == 0) for text in texts]


def addition_rows(num_rows, demonstrations=lambda i: [f"<think>\n{i} and 1</think>A{i + 1}"]):
    return [{"prompt": f"{i}+1=", "demonstrations": demonstrations(i), "answer": str(i + 1)} for i in range(num_rows)]


def count_generated_rows(model):
    """Records the number of rows of every call of `model.generate`, in a list that it returns."""
    rows, generate = [], model.generate

    def counting_generate(*args, **kwargs):
        rows.append(len(kwargs["input_ids"]))
        return generate(*args, **kwargs)

    model.generate = counting_generate
    return rows


def record_micro_batches(trainer):
    """The inputs of every loss, and the update that it belongs to as `step`, in a list that fills during training."""
    micro_batches, compute_loss = [], trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        batch = {key: value.clone() for key, value in inputs.items() if value is not None}
        micro_batches.append({**batch, "step": trainer.state.global_step})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    return micro_batches


def record_batches(trainer, describe=lambda batch, output: (batch, dict(output))):
    """Every generation batch and what TRL has made of it, or another description, in a list that training fills."""
    recorded = []

    class Recording(Method):
        def finish(self, batch, output):
            super().finish(batch, output)
            recorded.append(describe(batch, output))

    trainer.method = Recording(**{field.name: getattr(trainer.method, field.name) for field in fields(Method)})
    return recorded


def sequence(batch, row):
    """Prompt ids and completion ids of a row, without padding."""
    return tuple(batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()] for part in ("prompt", "completion"))


def logps_and_entropies(model, prompt_ids, completion_ids):
    """Log-probs of the tokens of a completion, and the entropies before each: one sequence, without padding."""
    prompt_ids, completion_ids = torch.as_tensor(prompt_ids), torch.as_tensor(completion_ids)
    logps = model(torch.cat([prompt_ids, completion_ids])[None]).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, completion_ids[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def trace_ids(trainer):
    """The tokens of the traces of each row, as the source of a trainer shows them."""
    rows = list(trainer.train_dataset)
    batch = MixedBatch(rows, 1, trainer.accelerator, Caches(), inputs=rows)
    return [row["demonstration_ids"] for row in trainer.method.sources[0].traces_of(batch)]


def exit_of(module, *arguments):
    """What `python -m module` ends with, run in this process: the status, or the line on stderr of status 1."""
    with patch.object(sys, "argv", [module, *map(str, arguments)]):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            return error.code or 0
    return 0


def launch(function, output_dir, num_processes=2, config_file=None, env=None, timeout=900, **scenario):
    """
    Runs a function of `launched.py`, with a scenario as its keyword arguments, under a real `accelerate launch`.

    Returns what it returns, one item per process.
    """
    save_tiny_model(Path(output_dir) / "model")
    script = Path(__file__).with_name("launched.py")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    # On a machine without GPUs, accelerate's multi-process launcher ("multi_gpu") runs gloo on the CPU.
    if config_file:
        command += ["--config_file", str(config_file), "--mixed_precision", "no"]
    elif num_processes > 1:
        command += ["--multi_gpu"]
    command += ["--num_processes", str(num_processes), "--num_machines", "1", "--main_process_port", "0"]
    result = subprocess.run(
        [*command, str(script), function, str(output_dir), json.dumps(scenario)],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if result.returncode != 0:
        raise AssertionError(f"`{function}` failed in {num_processes} processes:\n{result.stdout[-6000:]}")
    return [
        torch.load(Path(output_dir) / f"{function}_{rank}.pt", weights_only=False) for rank in range(num_processes)
    ]


def launch_several(output_dir, scenarios, num_processes=2, **kwargs):
    """
    Runs functions of `launched.py` one after the other under one `accelerate launch`, from their names and keyword
    arguments. Each has a folder of its own, by the name of its scenario.

    Returns, for each scenario, what its function returns, one item per process.
    """
    for name in scenarios:
        model = Path(output_dir) / name / "model"
        model.parent.mkdir(parents=True, exist_ok=True)
        if not model.exists():
            model.symlink_to(Path(output_dir) / "model")
    ranks = launch("several", output_dir, num_processes, scenarios=scenarios, **kwargs)
    return {name: [rank[name] for rank in ranks] for name in scenarios}


def is_demonstration_text(completions, **kwargs):
    """1.0 for the traces of `addition_rows`, 0.0 for what a random model writes."""
    return [float(text.startswith("<think>\n") and "and 1</think>A" in text) for text in completions]
