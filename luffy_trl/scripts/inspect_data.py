# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Show what a run would train on, before it does: a prompt with its traces as the policy sees them, lengths, traces that
drop out and why, rewards of the traces, and memory and tokens of a step. No weights are loaded.

    luffy inspect my_data.jsonl --model Qwen/Qwen2.5-Math-1.5B --config my_recipe.yaml

It takes every option of `luffy train`. The exit status is 1 if training would refuse the data.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import yaml
from rich.console import Console
from rich.text import Text
from transformers import AutoConfig, AutoProcessor, ProcessorMixin
from trl import ModelConfig, get_peft_config

from ..arguments import Parser
from ..checks import check_reward_columns, reward_name, tokenizer_of
from ..cli import PACKAGE
from ..data import load_data
from ..demonstrations import find_eos_token_ids, load_generation_config
from ..errors import in_one_line, loading_model
from ..estimates import model_from_config, training_memory
from ..inspection import Findings, Trace, inspect_dataset, sources_of_prompt
from ..luffy_config import LuffyConfig
from ..options import described
from ..turns import Tools
from .train import LuffyScriptArguments, get_reward_funcs, get_tools


_STYLES = {"prompt": "cyan", "template": "magenta", "trace": "green", "answer": "yellow", "end": "bold red"}
_ZERO_STAGES = {"FSDP": 3, "DEEPSPEED": None, "MULTI_GPU": 0, "NO": 0}


@described
@dataclass
class InspectArguments:
    """
    Arguments of the command, beside those of `luffy train`.

    Args:
        num_examples (`int`, *optional*, defaults to `1`):
            Rows to show with their traces.
        max_tokens_shown (`int`, *optional*, defaults to `400`):
            Maximum number of tokens to show of a prompt or a trace; its middle is left out. `0` shows all.
        max_listed (`int`, *optional*, defaults to `20`):
            Maximum number of lines of a list of rows or traces. `0` lists all.
        max_rows (`int`, *optional*):
            Rows to read; all if not given.
    """

    num_examples: int = 1
    max_tokens_shown: int = 400
    max_listed: int = 20
    max_rows: int | None = None


@described
@dataclass
class PlannedConfig(LuffyConfig):
    """
    The [`LuffyConfig`] of a run that happens elsewhere: it is read without its devices and processes.

    Args:
        accelerate_config (`str`, *optional*):
            The accelerate configuration of the run, as of `luffy train`: a file, or the name of a shipped one.
        num_processes (`int`, *optional*):
            Processes of the run. If not given, those of `accelerate_config`, or 1.
    """

    accelerate_config: str = ""
    num_processes: int | None = None

    def __post_init__(self):
        self.use_cpu = True  # a recipe for GPUs is read on any machine
        self.zero_stage = 0
        if self.accelerate_config:
            path = Path(self.accelerate_config)
            if not path.is_file():
                path = PACKAGE / "accelerate_configs" / f"{self.accelerate_config}.yaml"
            if not path.is_file():
                raise ValueError(
                    f"`accelerate_config` {self.accelerate_config!r} is neither a file nor one of "
                    f"{', '.join(sorted(file.stem for file in path.parent.glob('*.yaml')))}."
                )
            launch = yaml.safe_load(path.read_text())
            self.num_processes = self.num_processes or launch.get("num_processes")
            stage = _ZERO_STAGES.get(launch.get("distributed_type"), 0)
            self.zero_stage = launch["deepspeed_config"]["zero_stage"] if stage is None else stage
        self.num_processes = self.num_processes or 1
        super().__post_init__()

    @property
    def world_size(self) -> int:
        return self.num_processes


class Printer:
    """
    Writes findings to a console: in colour to a terminal, and plain to a file or a pipe. A maximum of 0 shows
    everything.
    """

    def __init__(self, console: Console, max_listed: int = 20, max_tokens_shown: int = 400):
        self.console, self.max_listed, self.max_tokens_shown = console, max_listed, max_tokens_shown

    def line(self, text: str = "", style: str = ""):
        self.console.print(Text(text, style=style))

    def title(self, text: str):
        self.line()
        self.line(text, "bold")

    def table(self, header: list[str], rows: list[list]):
        cells = [header, *([str(cell) for cell in row] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        for number, row in enumerate(cells):
            aligned = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            self.line("  " + "  ".join([row[0].ljust(widths[0]), *aligned]).rstrip(), "dim" if number == 0 else "")

    def listing(self, lines: list[str], style: str = ""):
        limit = self.max_listed or len(lines)
        for text in lines[:limit]:
            self.line(f"  {text}", style)
        if len(lines) > limit:
            self.line(f"  ... and {len(lines) - limit} more (`--max_listed 0` lists all)")

    def part(self, kind: str, text: str):
        """A part of a rendered sequence, its name on each line: colours do not pass a pipe."""
        text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)
        for part in text.splitlines(keepends=True) if "\n" in text else [text]:
            shown = Text(part.removesuffix("\n"), style=_STYLES[kind])
            if part.endswith("\n"):
                shown.append("\\n", style="dim")
            self.console.print(Text.assemble((f"  {kind:<9}", "dim"), shown))

    def ids(self, tokenizer, kind: str, ids: list[int]):
        limit = self.max_tokens_shown or len(ids)
        if len(ids) <= limit:
            self.part(kind, tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            return
        head, tail = ids[: limit - limit // 3], ids[len(ids) - limit // 3 :]
        self.part(kind, tokenizer.decode(head, clean_up_tokenization_spaces=False))
        self.line(f"  {'':<9}... {len(ids) - limit} tokens not shown (`--max_tokens_shown 0` shows all) ...", "dim")
        self.part(kind, tokenizer.decode(tail, clean_up_tokenization_spaces=False))


def statistics(values: list[int]) -> list[str]:
    """Count, minimum, median, mean, 95% quantile, maximum and sum."""
    if not values:
        return ["0", *["-"] * 5, "0"]
    ordered = sorted(values)
    percentile = ordered[math.ceil(0.95 * len(ordered)) - 1]
    numbers = [ordered[0], median(ordered), mean(ordered), percentile, ordered[-1]]
    return [str(len(values)), *(f"{number:.0f}" for number in numbers), str(sum(values))]


def write_report(
    printer: Printer, findings: Findings, tokenizer, eos_token_ids, args, reward_funcs, max_prompt_length
):
    """Writes everything but the estimates of a step."""
    for row, prompt, prompt_ids, traces in findings.examples:
        printer.title(f"Row {row}: {len(prompt_ids)} tokens of prompt")
        limit = printer.max_tokens_shown
        if limit and len(prompt_ids) > limit:
            printer.ids(tokenizer, "prompt", prompt_ids)
        else:
            for kind, text in sources_of_prompt(tokenizer, prompt, prompt_ids):
                printer.part(kind, text)
        for trace, ids in traces:
            printer.line(f"  {trace.name}: {len(ids)} tokens", "bold")
            ends = ids[-1] in eos_token_ids
            length = len(ids) - ends
            for is_acted, start, end in trace.turns.parts(length) if trace.turns else [(True, 0, length)]:
                printer.ids(tokenizer, "trace" if is_acted else "answer", ids[start:end])
            if ends:
                printer.part("end", tokenizer.decode(ids[-1:]))
            else:
                printer.line("  cut: no token ends it", _STYLES["end"])

    num_too_long = len(findings.too_long)
    printer.title("Tokens")
    printer.table(
        ["", "count", "min", "median", "mean", "95%", "max", "sum"],
        [
            ["prompts", *statistics(findings.prompt_lengths)],
            ["traces", *statistics([t.length for t in findings.traces])],
            ["traces too long", *statistics([t.length for t in findings.too_long])],
            ["traces of a row", *statistics(findings.num_traces)],
        ],
    )

    printer.title("What training uses")
    cut = args.demonstration_overflow == "truncate"
    printer.table(
        ["", "count"],
        [
            ["rows", findings.num_rows],
            [f"rows left out: prompt longer than max_prompt_length={max_prompt_length}", len(findings.long_prompts)],
            ["rows without a trace (rollouts alone)", len(findings.without_traces)],
            ["rows whose traces all drop out (rollouts alone)", len(findings.all_dropped)],
            ["traces", sum(findings.num_traces)],
            [
                f"traces {'cut at' if cut else 'dropped: longer than'} max_completion_length="
                f"{args.max_completion_length}",
                num_too_long,
            ],
            ["traces dropped: the same as another of the row", len(findings.repeated)],
            ["traces that training shows", len(findings.traces)],
        ],
    )
    printer.listing([f"row {row}: prompt of {length} tokens" for row, length in findings.long_prompts])
    printer.listing([f"row {t.row}, {t.name}: {t.length} tokens" for t in findings.too_long])
    printer.listing([f"row {t.row}, {t.name}: repeated" for t in findings.repeated])
    if findings.too_long:
        longest = max(trace.length for trace in findings.too_long)
        printer.line(f"  `max_completion_length={longest}` keeps all traces.", "yellow")

    if findings.traces:
        _write_rewards(printer, findings.traces, reward_funcs)
    if findings.suspicious:
        printer.title(f"Suspicious traces: {len(findings.suspicious)}")
        printer.listing(findings.suspicious, "yellow")
    if findings.problems:
        printer.title(f"Training would stop with these problems: {len(findings.problems)}")
        printer.listing(findings.problems, "red")


def _write_rewards(printer: Printer, traces: list[Trace], reward_funcs: list[Callable | str]):
    printer.title("Rewards of the traces")
    scored = [func for func in reward_funcs if not isinstance(func, str)]
    rows = []
    for number, func in enumerate(scored):
        values = [t.rewards[number] for t in traces if t.rewards[number] is not None]
        numbers = [f"{f(values):.3g}" if values else "-" for f in (min, mean, max)]
        rows.append([reward_name(func), len(values), *numbers, sum(value == 0 for value in values)])
    printer.table(["", "scored", "min", "mean", "max", "zero"], rows)
    for model in reward_funcs:
        if isinstance(model, str):
            printer.line(f"  {reward_name(model)} is a model, and not loaded.")
    nothing = [t for t in traces if not t.total > 0]
    if scored and nothing:
        printer.line(f"  Without a positive reward, {len(nothing)} of {len(traces)}:", "yellow")
        printer.listing([f"row {t.row}, {t.name}: {t.reason}" for t in nothing])


def write_estimates(printer: Printer, findings: Findings, args: PlannedConfig, model_args: ModelConfig):
    """Writes tokens and memory of a step."""
    if not findings.prompt_lengths:
        return
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_processes
    prompts = sequences / args.num_generations
    shown = min(args.num_demonstrations, args.num_generations) if findings.traces else 0
    trace_length = mean(min(t.length, args.max_completion_length) for t in findings.traces) if findings.traces else 0
    prompt_length, longest = mean(findings.prompt_lengths), max(findings.prompt_lengths) + args.max_completion_length
    printer.title(f"An update, on {args.num_processes} process{'es' * (args.num_processes > 1)}")
    printer.table(
        ["", "count"],
        [
            ["prompts of a generation", args.generation_batch_size // args.num_generations],
            ["updates for each generation", f"{args.steps_per_generation / args.gradient_accumulation_steps:g}"],
            ["sequences of an update", sequences],
            [f"  of them demonstrations, at most {shown} of {args.num_generations}", f"{prompts * shown:g}"],
            ["tokens of prompts, on average", f"{sequences * prompt_length:.0f}"],
            ["tokens of demonstrations, on average", f"{prompts * shown * trace_length:.0f}"],
            [
                "tokens of rollouts, at most",
                f"{prompts * (args.num_generations - shown) * args.max_completion_length:.0f}",
            ],
        ],
    )
    tokens = args.per_device_train_batch_size * longest
    if args.max_tokens_per_microbatch is not None:
        tokens = max(args.max_tokens_per_microbatch, longest)
    printer.title(f"Memory of a process on paper, GiB, with a micro-batch of {tokens} tokens")
    try:
        config = AutoConfig.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=args.trust_remote_code,
        )
        model = model_from_config(
            model_args.model_name_or_path, config, get_peft_config(model_args), args.trust_remote_code
        )
    except (ValueError, AttributeError) as error:  # an architecture of another kind
        printer.line(f"  No estimate for this model: {error}")
        return
    memory = training_memory(
        model,
        args.num_processes,
        tokens,
        zero_stage=args.zero_stage,
        weight_bytes=4 if model_args.dtype in ("float32", "auto", None) else 2,
        compute_bytes=2 if args.bf16 or args.fp16 or model_args.dtype in ("bfloat16", "float16") else 4,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    trained = "" if model.num_trainable is None else f", {model.num_trainable / 1e6:.4g}M trained"
    rows = [[f"{name}", f"{value:.4g}"] for name, value in memory.items()]
    printer.table(
        [f"{model.num_parameters / 1e6:.4g}M parameters{trained}", "GiB"],
        [*rows, ["sum", f"{sum(memory.values()):.4g}"]],
    )
    if args.use_vllm and args.vllm_mode == "colocate":
        printer.line(f"  vLLM takes {args.vllm_gpu_memory_utilization:.0%} of the GPU beside it.")


def make_parser(**kwargs) -> Parser:
    """The parser of the command line."""
    parser = Parser((InspectArguments, LuffyScriptArguments, PlannedConfig, ModelConfig), **kwargs)
    parser.add_argument("dataset", nargs="?", help="Short for --dataset_name.")
    parser.add_argument("--model", help="Short for --model_name_or_path.")
    return parser


def main(args: list[str] | None = None) -> int:
    """Inspects a dataset. Returns 1 if training would refuse the data, else 0."""
    own_args, script_args, training_args, model_args, short = make_parser(prog="luffy inspect").parse_args_and_config(
        args
    )
    script_args.dataset_name = short.dataset or script_args.dataset_name
    model_args.model_name_or_path = short.model or model_args.model_name_or_path
    if script_args.dataset_name is None or model_args.model_name_or_path is None:
        missing = "A dataset" if script_args.dataset_name is None else "`--model`"
        raise ValueError(f"{missing} is required: `luffy inspect my_data.jsonl --model Qwen/Qwen2.5-Math-1.5B`.")
    reward_funcs = get_reward_funcs(script_args)
    options = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    with loading_model(model_args.model_name_or_path):
        processing_class = AutoProcessor.from_pretrained(model_args.model_name_or_path, **options)
    tokenizer = tokenizer_of(processing_class)
    tools, environment_factory = get_tools(script_args)
    of_run = Tools.of_run(processing_class, tools, environment_factory)
    eos_token_ids = find_eos_token_ids(tokenizer, load_generation_config(model_args.model_name_or_path, **options))
    dataset = load_data(
        script_args.dataset_name,
        script_args.dataset_train_split,
        script_args.dataset_config,
        script_args.dataset_streaming,
    )
    findings = inspect_dataset(
        dataset,
        tokenizer,
        eos_token_ids,
        training_args,
        reward_funcs,
        max_prompt_length=script_args.max_prompt_length,
        max_rows=own_args.max_rows,
        num_examples=own_args.num_examples,
        console=Console(stderr=True),
        tools=of_run,
        processor=processing_class if isinstance(processing_class, ProcessorMixin) else None,
    )
    try:
        check_reward_columns(reward_funcs, dataset.column_names, {"environments"} if environment_factory else None)
    except ValueError as error:
        if not findings.problems:  # no function was called: `demonstration_rewards` scores all traces
            findings.problems.append(str(error))
    printer = Printer(Console(highlight=False, soft_wrap=True), own_args.max_listed, own_args.max_tokens_shown)
    printer.line(f"{script_args.dataset_name} for {model_args.model_name_or_path}", "bold")
    write_report(
        printer, findings, tokenizer, eos_token_ids, training_args, reward_funcs, script_args.max_prompt_length
    )
    write_estimates(printer, findings, training_args, model_args)
    return 1 if findings.problems else 0


if __name__ == "__main__":
    with in_one_line():
        sys.exit(main())
