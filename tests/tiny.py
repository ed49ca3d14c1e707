# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""A tiny model, a tokenizer and arguments that the tests share. Nothing is downloaded."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from luffy_trl import LuffyConfig


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING_CHATML = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def make_tokenizer(chat_template=CHATML):
    """One token per character, plus `<think>` and `</think>`; ends a turn with `<|im_end|>`."""
    specials = ["<|pad|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"]
    characters = sorted({chr(c) for c in range(32, 127)} | {"\n"})
    vocab = {token: i for i, token in enumerate([*specials, *characters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
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


def save_tiny_model(path, chat_template=CHATML, seed=0):
    """A local folder with the model and the tokenizer, as `from_pretrained` wants it."""
    tokenizer = make_tokenizer(chat_template)
    make_model(tokenizer, seed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_args(output_dir, cls=LuffyConfig, **kwargs):
    return cls(
        **{
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 12,
            "max_steps": 1,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
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
