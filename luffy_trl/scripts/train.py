# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Train a model with LUFFY, or with plain GRPO, from a YAML recipe and command-line flags:

    luffy train --accelerate_config zero3 --config qwen2.5_math_7b --learning_rate 2e-6

What differs from TRL's `trl grpo`: a dataset may be a single file; rows with long prompts are left out, and counted;
there may be several evaluation sets; and an argument that nobody knows is an error.
"""

import functools
from collections.abc import Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import AutoProcessor, ProcessorMixin
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward, reasoning_accuracy_reward, think_format_reward

from ..arguments import Parser, load_object, load_tools
from ..checks import (
    check_acting,
    check_machine,
    check_model,
    check_reward_columns,
    check_vllm_server,
    tokenizer_of,
    without_options,
)
from ..data import load_data, without_long_prompts
from ..demonstrations import find_eos_token_ids, load_generation_config
from ..errors import TO_RESUME, in_one_line, in_one_line_if_interrupted, loading_model
from ..inspection import inspect_dataset
from ..luffy_config import LuffyConfig
from ..luffy_trainer import LuffyTrainer
from ..options import described, own_fields
from ..printing import describe_memory, describe_model, describe_results, print_short_lines, set_up_output
from ..processes import check_output_dir, start_script
from ..rewards import math_verify_reward
from ..turns import Tools


logger = get_logger(__name__)

_ROWS_SCORED = 64
REWARD_FUNCS = {
    "math_verify_reward": math_verify_reward,
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
}


@described
@dataclass
class LuffyScriptArguments(ScriptArguments):
    """
    Arguments of the script, beside those of [`LuffyConfig`] and [`~trl.ModelConfig`].

    Args:
        dataset_name (`str`):
            Training data: a dataset on the Hub, a local folder, or a `.jsonl`, `.json`, `.parquet` or `.csv` file. It
            needs the columns `prompt` and `demonstrations` (or `completion`), and what the reward reads.
        eval_dataset_names (`list[str]`, *optional*):
            Data to evaluate on: Hub names, folders or files. Each gets a record of its own in the log. Without it,
            `eval_strategy` evaluates on `dataset_test_split` of `dataset_name`.

            As in TRL, a record has its `eval_reward` and, from the name of the file `data/held_out.jsonl`, its
            `eval_held_out_loss`.
        max_prompt_length (`int`, *optional*, defaults to `1024`):
            Rows whose prompt has more tokens are left out.
        reward_funcs (`list[str]`, *optional*, defaults to `["math_verify_reward"]`):
            Reward functions: `math_verify_reward`, `accuracy_reward`, `reasoning_accuracy_reward`,
            `think_format_reward`, or the dotted path of your own, such as `my_rewards.exact_match`.
        require_think (`bool`, *optional*, defaults to `False`):
            The `require_think` of `math_verify_reward`: an answer counts only behind `</think>`.
        reward_model_name_or_path (`str`, *optional*):
            A reward model to add to the reward functions.
        tools (`list[str]`, *optional*):
            Tools that the policy can call: the dotted paths of functions, such as `my_tools.multiply`.
        environment_factory (`str`, *optional*):
            The dotted path of a class of environments, such as `my_tools.Maze`.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete the checkpoints of an earlier run in `output_dir`. Without it, and without
            `resume_from_checkpoint`, a run does not start where there are some.
        print_all_metrics (`bool`, *optional*, defaults to `False`):
            Whether to print all metrics of a record, as transformers does. Otherwise a line has those that matter.

            With `log_completions`, `num_completions_to_print` prints a table of so many completions beside it.
    """

    eval_dataset_names: list[str] | None = None
    max_prompt_length: int | None = 1024
    reward_funcs: list[str] = field(default_factory=lambda: ["math_verify_reward"])
    require_think: bool = False
    reward_model_name_or_path: str | None = None
    tools: list[str] | None = None
    environment_factory: str | None = None
    overwrite_output_dir: bool = False
    print_all_metrics: bool = False

    def __post_init__(self):
        for name in ("eval_dataset_names", "reward_funcs"):  # a single one in a YAML file is no list
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        stems = [Path(name).stem for name in self.eval_dataset_names or []]
        if len(set(stems)) < len(stems):
            raise ValueError(
                f"`eval_dataset_names` has two that are called {max(stems, key=stems.count)!r} in the log. Rename one."
            )


def get_tools(args: LuffyScriptArguments) -> tuple[list | None, Any]:
    """The tools and the environment that the arguments name."""
    tools = load_tools(args.tools) or None
    factory = args.environment_factory
    return tools, factory and load_object(factory, "environment_factory")


def get_reward_funcs(args: LuffyScriptArguments) -> list:
    """The reward functions and models that the arguments name."""
    reward_funcs = []
    for name in args.reward_funcs:
        if name in REWARD_FUNCS:
            reward_func = REWARD_FUNCS[name]
        elif "." in name:
            reward_func = load_object(name, "reward_funcs")
        else:
            raise ValueError(
                f"Unknown reward function {name!r}. Choose from {', '.join(REWARD_FUNCS)}, or give the dotted path of "
                "a function, such as my_rewards.exact_match."
            )
        if reward_func is math_verify_reward and args.require_think:
            reward_func = functools.partial(math_verify_reward, require_think=True)
        reward_funcs.append(reward_func)
    if args.require_think and "math_verify_reward" not in args.reward_funcs:
        raise ValueError(
            "`require_think` is an option of `math_verify_reward`, which is not in `reward_funcs`. If a recipe sets "
            "it, add `--require_think false`."
        )
    if args.reward_model_name_or_path:
        reward_funcs.append(args.reward_model_name_or_path)
    return reward_funcs


def check_first_rows(
    dataset,
    tokenizer,
    training_args: LuffyConfig,
    model_args: ModelConfig,
    reward_funcs: list,
    tools: Tools,
    processor,
):
    """Scores the traces of the first rows: data that no reward function likes is found before the model is loaded."""
    generation_config = load_generation_config(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    eos_token_ids = find_eos_token_ids(tokenizer, generation_config)
    findings = inspect_dataset(
        dataset,
        tokenizer,
        eos_token_ids,
        training_args,
        reward_funcs,
        max_rows=_ROWS_SCORED,
        tools=tools,
        processor=processor,
    )
    if findings.problems:
        raise ValueError(findings.problems[0])
    traces = findings.traces
    if traces and not any(isinstance(func, str) for func in reward_funcs) and not any(t.total > 0 for t in traces):
        message = (
            f"The reward rejects all {len(traces)} traces of the first {findings.num_rows} rows, such as row "
            f"{traces[0].row}, {traces[0].name}: {traces[0].reason}. A demonstration without a reward teaches "
            "nothing: fix the traces, `reward_funcs` or `require_think`. `luffy inspect` shows what each trace earns."
        )
        if all(without_options(func) in REWARD_FUNCS.values() for func in reward_funcs):
            raise ValueError(message)
        logger.warning(message)  # zero may be the best that a reward function of the user's gives


def main(script_args: LuffyScriptArguments, training_args: LuffyConfig, model_args: ModelConfig):
    """Trains a model."""
    if script_args.dataset_name is None:
        raise ValueError("`dataset_name` is required: a dataset on the Hub, a local folder or a file.")
    set_up_output(training_args)
    check_model(model_args)
    reward_funcs = get_reward_funcs(script_args)
    check_machine(training_args)
    check_output_dir(training_args, script_args.overwrite_output_dir)
    if training_args.process_index == 0:
        check_vllm_server(training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    with loading_model(model_args.model_name_or_path):
        processing_class = AutoProcessor.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
            truncation_side="left",
            padding_side="left",
        )

    processor = processing_class if isinstance(processing_class, ProcessorMixin) else None
    tokenizer = tokenizer_of(processing_class)
    tools, environment_factory = get_tools(script_args)
    of_run = Tools.of_run(processing_class, tools, environment_factory)

    def load(name, split):
        dataset = load_data(name, split, script_args.dataset_config, script_args.dataset_streaming)
        if script_args.max_prompt_length is not None:
            dataset = without_long_prompts(
                *(dataset, tokenizer, script_args.max_prompt_length),
                {**of_run.options(None), **(training_args.chat_template_kwargs or {})},
            )
        return dataset

    train_dataset = load(script_args.dataset_name, script_args.dataset_train_split)
    passed = {"environments"} if environment_factory else None
    check_reward_columns(reward_funcs, train_dataset.column_names, passed)
    if training_args.num_demonstrations > 0:
        check_acting(training_args, train_dataset.column_names, tools, environment_factory)
        check_first_rows(train_dataset, tokenizer, training_args, model_args, reward_funcs, of_run, processor)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        if script_args.eval_dataset_names:
            eval_dataset = {
                Path(name).stem: load(name, script_args.dataset_test_split) for name in script_args.eval_dataset_names
            }
        else:
            eval_dataset = load(script_args.dataset_name, script_args.dataset_test_split)

    if training_args.num_completions_to_print is None and not script_args.print_all_metrics:
        training_args.num_completions_to_print = 0  # the table of completions is a file; printed, it hides the lines
    trainer = LuffyTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        tools=tools,
        environment_factory=environment_factory,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if not script_args.print_all_metrics:
        facts = {
            "model": describe_model(model_args.model_name_or_path, trainer),
            "data": _describe_data(script_args, trainer),
            "step": _describe_step(trainer),
            "memory": describe_memory(trainer),
            "results": describe_results(training_args),
        }
        print_short_lines(trainer, facts)
    # A local folder or file means nothing to the readers of a model card
    hub_dataset = None if Path(script_args.dataset_name).exists() else script_args.dataset_name
    trainer.create_model_card(dataset_name=hub_dataset)  # for the cards that are pushed with checkpoints too
    resume = training_args.resume_from_checkpoint
    # "true" takes the last checkpoint in `output_dir`
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)

    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.create_model_card(dataset_name=hub_dataset)
    trainer.accelerator.print(f"The model is in {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=hub_dataset)
        trainer.accelerator.print(f"It is also at https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


def _describe_data(script_args: LuffyScriptArguments, trainer: LuffyTrainer) -> str:
    """The data, their size and the rewards."""
    dataset = trainer.train_dataset
    size = f"{len(dataset):,} rows" if isinstance(dataset, Sized) else "a stream"
    return f"{script_args.dataset_name}, {size}, scored by {', '.join(trainer.reward_func_names)}"


def _describe_step(trainer: LuffyTrainer) -> str:
    """What is sampled at once, and for how many updates."""
    args = trainer.args
    updates = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    given = f", up to {args.num_demonstrations} of them demonstrations" if args.num_demonstrations else ""
    steps = f"{args.max_steps} updates" if args.max_steps > 0 else f"{args.num_train_epochs:g} passes over the data"
    return (
        f"{args.generation_batch_size // args.num_generations} prompts x {args.num_generations} completions{given}, "
        f"of at most {args.max_completion_length} tokens, for {updates:g} update{'' if updates == 1 else 's'}; {steps}"
    )


def make_parser(**kwargs) -> Parser:
    """The parser of the command line, for `luffy` as well."""
    return Parser((LuffyScriptArguments, LuffyConfig, ModelConfig), **kwargs)


# What `luffy train -h` shows: the options of this package, and those that every run sets
OWN_OPTIONS = {
    *(f.name for config in (LuffyScriptArguments, LuffyConfig) for f in own_fields(config)),
    *("model_name_or_path", "use_peft", "dataset_name", "dataset_train_split", "dataset_test_split", "output_dir"),
    *("num_generations", "max_completion_length", "temperature", "beta", "loss_type", "use_vllm", "vllm_mode"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "max_steps"),
    *("num_train_epochs", "learning_rate", "max_grad_norm", "bf16", "use_cpu", "seed", "logging_steps", "save_steps"),
    *("eval_strategy", "eval_steps", "report_to", "log_completions"),
    *("num_completions_to_print", "log_level", "resume_from_checkpoint", "push_to_hub"),
}


def run(args: list[str] | None = None, prog: str = "luffy train"):
    """The command, in a process of its own or in that of `luffy`."""
    start_script()
    with in_one_line_if_interrupted(TO_RESUME), in_one_line():
        main(*make_parser(prog=prog).parse_args_and_config(args))


if __name__ == "__main__":
    run()
