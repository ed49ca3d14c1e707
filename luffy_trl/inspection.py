# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What a dataset gives a run: lengths, traces that drop out and why, and rewards of the traces. No weights are loaded.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerState
from trl.chat_template_utils import add_response_schema

from .checks import reward_name, without_options
from .demonstrations import (
    DemonstrationTokenizer,
    check_columns,
    check_prompt,
    decode_completion,
    tokenize_prompts,
)
from .errors import run_async
from .luffy_config import LuffyConfig
from .rewards import explain_math_verify_reward, math_verify_reward
from .turns import Tools, Turns


_ROWS_PER_BATCH = 64
_READ_BESIDE = ("demonstration_logprobs", "demonstration_rewards", "environment", "images", "image")


@dataclass
class Trace:
    """A trace as training would show it."""

    row: int
    name: str  # the column, and its number in the row
    length: int
    rewards: list[float | None] = field(default_factory=list)  # of each reward function
    total: float = math.nan  # their weighted sum; NaN if there is none
    reason: str = ""  # why it earns nothing, as far as it can be told
    turns: Turns | None = None  # where it has several
    given: list[float | None] | None = None  # the rewards that the dataset gives it


@dataclass
class Findings:
    """What [`inspect_dataset`] finds."""

    num_rows: int = 0
    prompt_lengths: list[int] = field(default_factory=list)  # of prompts that can be used
    num_traces: list[int] = field(default_factory=list)  # of each row whose prompt fits
    long_prompts: list[tuple[int, int]] = field(default_factory=list)  # rows that are left out, and their length
    without_traces: list[int] = field(default_factory=list)
    all_dropped: list[int] = field(default_factory=list)  # rows that have traces, and can show none
    too_long: list[Trace] = field(default_factory=list)
    repeated: list[Trace] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)  # what training shows
    suspicious: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # what training would refuse
    examples: list[tuple[int, str | list[dict], list[int], list[tuple[Trace, list[int]]]]] = field(
        default_factory=list
    )


def inspect_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
    args: LuffyConfig,
    reward_funcs: list[Callable | str],
    *,
    max_prompt_length: int | None = None,
    max_rows: int | None = None,
    num_examples: int = 1,
    console: Console | None = None,
    tools: Tools | None = None,
    processor: ProcessorMixin | None = None,
) -> Findings:
    """
    Does what training does with a dataset before and around a step, without the model. Reward models do not score
    here. Reads `max_rows` rows, keeps `num_examples` of them for display, and shows progress on `console`.
    """
    findings = Findings()
    field_name = check_columns(dataset, processor is not None) if args.num_demonstrations > 0 else None
    if tools is not None and tools.schemas and getattr(tokenizer, "response_template", None) is None:
        add_response_schema(processor or tokenizer)  # as TRL will
    if max_rows is not None:
        dataset = dataset.take(max_rows)
    function = DemonstrationTokenizer(
        tokenizer,
        field_name,
        eos_token_ids,
        args.max_completion_length,
        chat_template_kwargs=args.chat_template_kwargs or {},
        tools=tools or Tools(),
        processor=processor,
    )
    total = len(dataset) if isinstance(dataset, Dataset) else max_rows
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    batches = (
        (rows, *_read_batch(rows, findings, function, args, max_prompt_length, num_examples))
        for rows in dataset.iter(_ROWS_PER_BATCH)
    )
    failures: list[str] = []
    progress = Progress(*columns, console=console, transient=True, disable=console is None)
    with progress, ThreadPoolExecutor(1) as executor:
        task = progress.add_task("Reading rows", total=total)
        # Read in a thread, while reward functions score what was read before: these may need the main thread
        following = executor.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = executor.submit(next, batches, None)
            rows, shown, completions = batch
            _score(rows, shown, completions, args, reward_funcs, failures)
            progress.update(task, advance=len(rows["prompt"]))
    findings.problems += failures
    if findings.too_long and not findings.traces:
        findings.problems.append(
            f"All {len(findings.too_long)} traces have more tokens than `max_completion_length="
            f"{args.max_completion_length}`, so that none is left. Raise it, or set "
            "`demonstration_overflow='truncate'`."
        )
    return findings


def _read_batch(rows, findings, function, args, max_prompt_length, num_examples) -> tuple[list, list]:
    """The traces that training shows, each with the position of its row and its token ids; and their completions."""
    first, kept, prompt_ids = findings.num_rows, [], {}
    findings.num_rows += len(rows["prompt"])
    positions = range(len(rows["prompt"]))
    for position, ids in _tokenize_prompts(rows["prompt"], positions, first, function, findings.problems):
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            findings.long_prompts.append((first + position, len(ids)))
            continue
        findings.prompt_lengths.append(len(ids))
        prompt_ids[position] = ids
        kept.append(position)
    if function.field_name is None:
        findings.examples += [
            (first + position, rows["prompt"][position], prompt_ids[position], [])
            for position in kept[: num_examples - len(findings.examples)]
        ]
        return [], []

    shown = []
    for position, traces in _tokenize(rows, kept, first, function, findings.problems):
        row, seen, prompt = first + position, [], rows["prompt"][position]
        findings.num_traces.append(len(traces))
        hints = function.find_suspicious(prompt, rows[function.field_name][position], row) if traces else {}
        for name, ids, turns, given in traces:
            trace = Trace(row, name.partition(": ")[2].strip("`"), len(ids), turns=turns, given=given)
            if len(ids) > args.max_completion_length:
                findings.too_long.append(trace)
                if args.demonstration_overflow == "error":
                    findings.problems.append(f"{name} has {len(ids)} tokens, and `demonstration_overflow` is 'error'.")
                if args.demonstration_overflow != "truncate":
                    continue
                ids = ids[: turns.end_before(args.max_completion_length) if turns else args.max_completion_length]
            if ids in seen:
                findings.repeated.append(trace)
                continue
            seen.append(ids)
            shown.append((position, trace, ids))
            if name in hints:
                findings.suspicious.append(f"row {row}, {trace.name} {hints[name]}")
        if not traces:
            findings.without_traces.append(row)
        elif not seen:
            findings.all_dropped.append(row)
        if seen and len(findings.examples) < num_examples:
            example = [(trace, ids) for place, trace, ids in shown if place == position]
            findings.examples.append((row, prompt, prompt_ids[position], example))
    findings.traces += [trace for _, trace, _ in shown]
    environments = rows.get("environment")
    completions = [
        decode_completion(
            *(function.tokenizer, rows["prompt"][position], prompt_ids[position], ids, trace.turns),
            tools=function.tools.options(environments and environments[position]).get("tools"),
        )
        for position, trace, ids in shown
    ]
    return shown, completions


def _tokenize_prompts(prompts, positions, first, function, problems) -> Iterator[tuple[int, list[int]]]:
    """For each usable prompt its position and its ids. A bad one is a problem, and others go on."""
    try:
        for position in positions:
            check_prompt(prompts[position], first + position)
        options = {**function.tools.options(None), **function.chat_template_kwargs}
        ids = tokenize_prompts(function.tokenizer, [prompts[position] for position in positions], options)
    except Exception as error:  # a chat template may raise anything
        if len(positions) == 1:
            problems.append(_with_row(error, first + positions[0]))
            return
        for position in positions:
            yield from _tokenize_prompts(prompts, [position], first, function, problems)
        return
    yield from zip(positions, ids, strict=True)


def _tokenize(rows, kept, first, function, problems) -> Iterator[tuple[int, list[tuple]]]:
    """For each usable row its position, and its traces: name, ids, turns and given rewards. A bad row is a problem."""
    names = [name for name in ("prompt", function.field_name, *_READ_BESIDE) if name in rows]
    batch = {name: [rows[name][position] for position in kept] for name in names}
    traces: dict[int, list] = {position: [] for position in kept}
    try:
        for place, number, name, ids, turns in function.tokenize(batch, [first + position for position in kept]):
            if "demonstration_logprobs" in batch:
                function.check_logprobs(batch["demonstration_logprobs"][place], number, len(ids), name)
            given = None
            if "demonstration_rewards" in batch:
                given = function.check_scores(
                    *(batch["demonstration_rewards"][place], number, name, len(batch[function.field_name][place]))
                )
            traces[kept[place]].append((name, ids, turns, given))
    except ValueError as error:
        if len(kept) == 1:
            problems.append(str(error))
            return
        for position in kept:
            yield from _tokenize(rows, [position], first, function, problems)
        return
    yield from traces.items()


def _with_row(error: Exception, row: int) -> str:
    return str(error) if str(error).startswith("row ") else f"row {row}: `prompt` cannot be rendered: {error}"


def _score(rows, shown, completions, args, reward_funcs, problems):
    """Rewards of the traces, from functions that are called as TRL calls them."""
    weights = args.reward_weights or [1.0] * len(reward_funcs)
    for _, trace, _ in shown:
        if trace.given is not None:
            trace.rewards = trace.given * (len(reward_funcs) if len(trace.given) == 1 else 1)
            pairs = [(w, r) for w, r in zip(weights, trace.rewards, strict=False) if r is not None]
            trace.total = sum(w * r for w, r in pairs) if pairs else math.nan
            trace.reason = "" if trace.total > 0 else f"`demonstration_rewards` gives {trace.given}"
    of_functions = [i for i, (_, trace, _) in enumerate(shown) if trace.given is None]
    shown, completions = ([values[i] for i in of_functions] for values in (shown, completions))
    if not shown:
        return
    prompts = [rows["prompt"][position] for position, _, _ in shown]
    columns = {
        name: [values[position] for position, _, _ in shown]
        for name, values in rows.items()
        if name not in ("prompt", "completion", "completion_ids")
    }
    for number, reward_func in enumerate(reward_funcs):
        if isinstance(reward_func, str):  # a reward model
            continue
        try:
            rewards = reward_func(
                prompts=prompts,
                completions=completions,
                completion_ids=[ids for _, _, ids in shown],
                trainer_state=TrainerState(),
                log_extra=lambda column, values: None,
                log_metric=lambda name, value: None,
                **columns,
            )
            rewards = run_async(rewards) if inspect.iscoroutine(rewards) else rewards
            rewards = [None if reward is None or reward != reward else float(reward) for reward in rewards]
            if len(rewards) != len(shown):
                raise ValueError(f"it returns {len(rewards)} rewards for {len(shown)} completions")
        except Exception as error:  # of the user's code
            problem = f"The reward function `{reward_name(reward_func)}` fails: {type(error).__name__}: {error}"
            if problem not in problems:
                problems.append(problem)
            rewards = [None] * len(shown)
        for (position, trace, ids), completion, reward in zip(shown, completions, rewards, strict=True):
            trace.rewards.append(reward)
            if trace.rewards[-1] is not None:
                total = 0.0 if math.isnan(trace.total) else trace.total
                trace.total = total + weights[number] * trace.rewards[-1]
            if not trace.reason and not (trace.rewards[-1] or 0.0) > 0:
                row = {name: values[position] for name, values in rows.items()}
                trace.reason = _reason(reward_func, completion, row, trace)
                if trace.length > len(ids):
                    trace.reason += f" (cut at {len(ids)} of {trace.length} tokens)"


def _reason(reward_func: Callable, completion: str | list[dict], row: dict, trace: Trace) -> str:
    if without_options(reward_func) is not math_verify_reward:
        return f"`{reward_name(reward_func)}` gives {trace.rewards[-1]}"
    text = completion if isinstance(completion, str) else completion[-1].get("content") or ""
    gold = row.get("answer") if row.get("answer") is not None else row.get("solution")
    require_think = getattr(reward_func, "keywords", {}).get("require_think", False)
    return explain_math_verify_reward(text, gold, trace.rewards[-1], require_think)


def sources_of_prompt(tokenizer, prompt: str | list[dict], ids: list[int]) -> list[tuple[str, str]]:
    """
    A rendered prompt in parts: a text, and whether it is of the `"prompt"` in the dataset or of the `"template"`.
    """
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    contents = [prompt] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    parts, start = [], 0
    for content in contents:
        content = content.strip() if isinstance(content, str) else ""
        place = text.find(content, start)
        if content and place >= 0:
            parts += [("template", text[start:place]), ("prompt", content)]
            start = place + len(content)
    return [(kind, part) for kind, part in (*parts, ("template", text[start:])) if part]
