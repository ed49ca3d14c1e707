# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Memory and operations of a training step, on paper: what fits on which GPUs, before renting them.

Counted, for each GPU that trains: weights, gradients and AdamW's two moments; one layer's weights as it computes; the
hidden states that gradient checkpointing keeps for each layer; one layer's activations, recomputed (without
checkpointing, every layer's); and the logits of a micro-batch in fp32, three times (logits, log-probabilities,
gradient). Not counted: the CUDA context, fragmentation, communication buffers, and what generates.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig


GIB = 2**30


@dataclass(frozen=True)
class Model:
    """The shape of a policy."""

    name: str
    num_parameters: float
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_key_value_heads: int
    head_dim: int
    num_trainable: float | None = None  # with an adapter; `None` is all of them


def model_from_config(name: str, config: PreTrainedConfig, peft_config=None, trust_remote_code: bool = False) -> Model:
    """The shape of a model of which only the config is there. It is built without memory for weights, and counted."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        num_parameters, num_trainable = model.num_parameters(), None
        if peft_config is not None:
            from peft import get_peft_model

            num_trainable = get_peft_model(model, peft_config).num_parameters(only_trainable=True)
    text_config = config.get_text_config()
    num_heads = text_config.num_attention_heads
    return Model(
        name,
        num_parameters,
        text_config.num_hidden_layers,
        text_config.hidden_size,
        getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size,
        text_config.vocab_size,
        getattr(text_config, "num_key_value_heads", None) or num_heads,
        getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads,
        num_trainable,
    )


def training_memory(
    model: Model,
    num_gpus: int,
    tokens: int,
    *,
    zero_stage: int = 3,
    weight_bytes: int = 4,
    compute_bytes: int = 2,
    gradient_checkpointing: bool = True,
) -> dict[str, float]:
    """
    GiB of a GPU that trains micro-batches of `tokens` tokens, by what they hold. `zero_stage` says what is sharded
    over the GPUs: nothing (0), optimizer state (1), gradients too (2), weights too (3, or FSDP2). `weight_bytes` are
    those of a weight, of its gradient and of each moment.
    """
    num_trainable = model.num_parameters if model.num_trainable is None else model.num_trainable
    weights, gradients, moments = model.num_parameters, num_trainable, 2 * num_trainable
    shards = [num_gpus if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    states = sum(part / count for part, count in zip((weights, gradients, moments), shards, strict=True))
    activations = compute_bytes * tokens * (8 * model.hidden_size + 3 * model.intermediate_size)
    kept = compute_bytes * tokens * model.hidden_size * model.num_layers
    memory = {
        "states": weight_bytes * states,
        "gathered layer": compute_bytes * model.num_parameters / model.num_layers,
        **(
            {"kept hidden states": kept, "one layer's activations": activations}
            if gradient_checkpointing
            else {"all layers' activations": activations * model.num_layers}
        ),
        "logits": 3 * 4 * tokens * model.vocab_size,
    }
    return {name: value / GIB for name, value in memory.items()}


def cache_memory(model: Model, tokens: int) -> float:
    """GiB of the keys and values of a sequence, in bf16."""
    return 2 * 2 * model.num_layers * model.num_key_value_heads * model.head_dim * tokens / GIB


def training_operations(model: Model, tokens: float) -> float:
    """Operations of forward, backward and the recomputed forward: 2 + 4 + 2 for each parameter and token."""
    return 8 * model.num_parameters * tokens
