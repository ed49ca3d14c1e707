# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Supervised fine-tuning on the traces of a dataset: a baseline for LUFFY, and the first half of SFT then RL.

    luffy sft --accelerate_config zero3 --config sft --learning_rate 1e-5

It is TRL's SFTTrainer on the same rows, rendered and tokenized by the same code as LUFFY's demonstrations: each trace
follows its prompt as the policy would have sampled it, ends in one end-of-sequence token, and only it has a loss.
"""

import json
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoTokenizer
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    get_peft_config,
    get_quantization_config,
)

from ..arguments import Parser, load_tools
from ..checks import check_machine, check_model
from ..data import load_data, without_long_prompts
from ..demonstrations import (
    find_eos_token_ids,
    load_generation_config,
    to_supervised,
    tokenize_demonstrations,
)
from ..errors import TO_RESUME, in_one_line, in_one_line_if_interrupted, loading_model
from ..options import described, explained_arguments, own_fields
from ..printing import describe_memory, describe_model, describe_results, print_short_lines, set_up_output
from ..processes import check_output_dir, start_script
from ..turns import Tools


@described
@dataclass
class SFTScriptArguments(ScriptArguments):
    """
    Arguments of the script, beside those of [`~trl.SFTConfig`] and [`~trl.ModelConfig`]; as in `train.py`.

    Args:
        dataset_name (`str`):
            Training data: a dataset on the Hub, a local folder or a file, with `prompt` and `demonstrations` (or
            `completion`).
        max_prompt_length (`int`, *optional*, defaults to `1024`):
            Rows whose prompt has more tokens are left out.
        max_completion_length (`int`, *optional*, defaults to `8192`):
            Maximum number of tokens of a trace.
        demonstration_overflow (`str`, *optional*, defaults to `"drop"`):
            What happens to a longer trace: `"drop"`, `"truncate"` (no end-of-sequence token is appended) or `"error"`.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the chat template, as by [`LuffyConfig`].
        tools (`list[str]`, *optional*):
            Tools that the traces call: the dotted paths of functions, such as `my_tools.multiply`.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete the checkpoints of an earlier run in `output_dir`. Without it, and without
            `resume_from_checkpoint`, a run does not start where there are some.
        print_all_metrics (`bool`, *optional*, defaults to `False`):
            Whether to print all metrics of a record, as transformers does. Otherwise a line has those that matter.
    """

    max_prompt_length: int = 1024
    max_completion_length: int = 8192
    demonstration_overflow: Literal["drop", "truncate", "error"] = "drop"
    chat_template_kwargs: dict | str | None = None
    tools: list[str] | None = None
    overwrite_output_dir: bool = False
    print_all_metrics: bool = False

    def __post_init__(self):
        if isinstance(self.chat_template_kwargs, str):  # from the command line
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)


@described
@dataclass
class TraceSFTConfig(SFTConfig):
    """
    [`~trl.SFTConfig`] without a `max_length`: its 1024 would cut a trace, and with it the token that ends it.

    Args:
        max_length (`int`, *optional*):
            Not used: `max_prompt_length` and `max_completion_length` bound a row.
    """

    max_length: int | None = None

    def __post_init__(self):
        with explained_arguments(self):
            super().__post_init__()
        if self.max_length is not None:
            raise ValueError(
                f"`max_length={self.max_length}` would cut traces before their end. Set `max_prompt_length` and "
                "`max_completion_length` instead: what is longer is left out and counted."
            )


def main(script_args: SFTScriptArguments, training_args: TraceSFTConfig, model_args: ModelConfig):
    """Trains a model on the traces."""
    if script_args.dataset_name is None:
        raise ValueError("`dataset_name` is required: a dataset on the Hub, a local folder or a file.")
    set_up_output(training_args)
    check_model(model_args)
    check_machine(training_args)
    check_output_dir(training_args, script_args.overwrite_output_dir)
    load_options = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
    }
    with loading_model(model_args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **load_options)
    eos_token_ids = find_eos_token_ids(
        tokenizer, load_generation_config(model_args.model_name_or_path, **load_options)
    )

    tools = Tools.of_run(tokenizer, load_tools(script_args.tools), None)
    own_kwargs: Any = script_args.chat_template_kwargs  # parsed by now
    chat_template_kwargs = {**tools.options(None), **(own_kwargs or {})}

    def load(split):
        dataset = load_data(script_args.dataset_name, split, script_args.dataset_config, script_args.dataset_streaming)
        dataset = without_long_prompts(dataset, tokenizer, script_args.max_prompt_length, chat_template_kwargs)
        dataset = tokenize_demonstrations(
            dataset,
            tokenizer,
            eos_token_ids,
            max_length=script_args.max_completion_length,
            overflow=script_args.demonstration_overflow,
            chat_template_kwargs=own_kwargs,
            tools=tools,
        )
        return to_supervised(dataset, tokenizer, chat_template_kwargs)

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load(script_args.dataset_train_split),
        eval_dataset=load(script_args.dataset_test_split) if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if not script_args.print_all_metrics:
        dataset = trainer.train_dataset
        size = f"{len(dataset):,} rows" if isinstance(dataset, Sized) else "a stream"
        facts = {
            "model": describe_model(model_args.model_name_or_path, trainer),
            "data": f"{script_args.dataset_name}, {size} with a trace each",
            "memory": describe_memory(trainer),
            "results": describe_results(training_args),
        }
        print_short_lines(trainer, facts)
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"The model is in {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def make_parser(**kwargs) -> Parser:
    """The parser of the command line, for `luffy` as well."""
    return Parser((SFTScriptArguments, TraceSFTConfig, ModelConfig), **kwargs)


# What `luffy sft -h` shows: the options of this package, and those that every run sets
OWN_OPTIONS = {
    *(f.name for config in (SFTScriptArguments, TraceSFTConfig) for f in own_fields(config)),
    *("model_name_or_path", "use_peft", "dataset_name", "dataset_train_split", "dataset_test_split", "output_dir"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "learning_rate"),
    *("max_grad_norm", "bf16", "use_cpu", "seed", "logging_steps", "save_steps", "report_to", "push_to_hub"),
    "resume_from_checkpoint",
}


def run(args: list[str] | None = None, prog: str = "luffy sft"):
    """The command, in a process of its own or in that of `luffy`."""
    start_script()
    with in_one_line_if_interrupted(TO_RESUME), in_one_line():
        main(*make_parser(prog=prog).parse_args_and_config(args))


if __name__ == "__main__":
    run()
