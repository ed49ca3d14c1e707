# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The recipe of a run: the settings that decide what comes out."""

from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

from accelerate.utils import is_peft_model
from transformers import TrainingArguments
from trl import GRPOTrainer


# Arguments of every trainer that belong to a recipe. The others are about the machine, the log or the Hub.
_TRAINING_ARGUMENTS = {
    "auto_find_batch_size",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "data_seed",
    "full_determinism",
    "lr_scheduler_kwargs",
    "max_grad_norm",
    "neftune_noise_alpha",
    "optim",
    "optim_args",
    "optim_target_modules",
    "tf32",
    "train_sampling_strategy",
    "use_liger_kernel",
    "warmup_steps",
    "weight_decay",
}
# Arguments of TRL that do not: where vLLM runs, what is logged, and `model_init_kwargs`, which may hold a token.
_NOT_OF_THE_RECIPE = {
    "ds3_gather_for_generation",
    "log_completions",
    "log_completions_hub_repo",
    "log_multimodal",
    "log_unique_prompts",
    "model_init_kwargs",
    "num_completions_to_print",
    "num_generations_eval",
    "pad_to_multiple_of",
    "trust_remote_code",
    "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization",
    "vllm_group_port",
    "vllm_max_model_length",
    "vllm_mode",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_tensor_parallel_size",
}
# Settings of the table that every card has, in `template.md`.
_CORE = {
    "advantage_baseline",
    "beta",
    "entropy_coef",
    "epsilon",
    "epsilon_high",
    "generation_batch_size",
    "loss_type",
    "max_completion_length",
    "num_demonstrations",
    "num_generations",
    "policy_shaping",
    "policy_shaping_gamma",
    "policy_shaping_power",
    "policy_shaping_weight",
    "ratio_clipping",
    "scale_rewards",
    "steps_per_generation",
    "temperature",
}


def changed_settings(args) -> list[tuple[str, str, str]]:
    """Name, value and default of the settings that differ from their defaults, beside those of the core table."""
    of_every_trainer = {field.name for field in fields(TrainingArguments)} - _TRAINING_ARGUMENTS
    left_out = of_every_trainer | _NOT_OF_THE_RECIPE | _CORE
    rows = []
    for field in fields(args):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(args, field.name)
        if field.name not in left_out and value != default:
            rows.append((field.name, _cell(value), _cell(default)))
    return rows


def describe_adapter(model) -> str | None:
    """
    An adapter of PEFT in a few words, such as `"LoRA, r 8, alpha 16 on q_proj, v_proj"`; `None` if all weights are
    trained.
    """
    if not is_peft_model(model):
        return None
    config = model.peft_config[model.active_adapter]
    words = [{"LORA": "LoRA"}.get(config.peft_type.value, config.peft_type.value)]
    names = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    words += [f"{word} {getattr(config, name)}" for name, word in names.items() if getattr(config, name, None)]
    modules = getattr(config, "target_modules", None)
    if modules:
        words[-1] += f" on {modules if isinstance(modules, str) else ', '.join(sorted(modules))}"
    return ", ".join(words)


def describe_precision(trainer: GRPOTrainer) -> str:
    """Precision of the weights that are trained and of the computation, such as `"float32 weights, bf16 autocast"`."""
    dtypes = {
        str(weight.dtype).removeprefix("torch.") for weight in trainer.model.parameters() if weight.requires_grad
    }
    autocast = trainer.accelerator.mixed_precision
    return f"{', '.join(sorted(dtypes))} weights" + ("" if autocast == "no" else f", {autocast} autocast")


def _cell(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value).replace("|", "\\|").replace("\n", " ")
