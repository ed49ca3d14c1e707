# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Micro-batches that waste little on padding: tensors in, tensors out, no trainer.

TRL pads every micro-batch to the longest completion of the generation batch. One long demonstration for each seven
shorter rollouts makes most of that padding. Here the sequences of one optimizer step, those of all processes, are
sorted by length, cut into micro-batches of any number of rows, each as wide as its own longest, and dealt to the
processes so that all have as much to do. Which sequences an optimizer step sees does not change.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import pad


def round_up(lengths: torch.Tensor, multiple: int | None) -> torch.Tensor:
    """
    Lengths as TRL's `pad_to_multiple_of` makes them.

    Args:
        lengths (`torch.Tensor`):
            Lengths in tokens.
        multiple (`int`, *optional*):
            What they become a multiple of.

    Returns:
        `torch.Tensor`: The lengths, none of them 0.
    """
    lengths = lengths.clamp(min=1)
    return lengths if multiple is None else -(-lengths // multiple) * multiple


def plan_micro_batches(
    prompt_lengths: list[int],
    completion_lengths: list[int],
    max_tokens: int,
    num_micro_batches: int | None = None,
    multiple_of: int = 1,
    padding_free: bool = False,
) -> list[list[int]]:
    """
    Cuts sequences, sorted by length, into micro-batches with the fewest padded tokens.

    Args:
        prompt_lengths (`list[int]`):
            Tokens of each prompt.
        completion_lengths (`list[int]`):
            Tokens of each completion, at least 1.
        max_tokens (`int`):
            Most tokens that a micro-batch of several sequences may have: number of rows, times the longest prompt plus
            the longest completion.
        num_micro_batches (`int`, *optional*):
            How many micro-batches to make, at most as many as there are sequences, and enough for `max_tokens`. None
            is empty. If `None`, as few as `max_tokens` allows.
        multiple_of (`int`, *optional*, defaults to `1`):
            Without `num_micro_batches`, their number is a multiple of it. There must be as many sequences.
        padding_free (`bool`, *optional*, defaults to `False`):
            Whether a micro-batch has no padding, and its tokens are those of its sequences. Then the cut is the most
            even one.

    Returns:
        `list[list[int]]`: Numbers of the sequences of each micro-batch, the longest first.
    """
    prompts, completions = np.array(prompt_lengths), np.array(completion_lengths)
    order = np.lexsort((-prompts, -completions))
    prompts, completions = prompts[order], completions[order]
    # tokens[i, j]: those of a micro-batch of the sequences from i to j
    starts = np.arange(len(order))
    is_run = starts[None] >= starts[:, None]
    if padding_free:
        ends = np.cumsum(prompts + completions)
        tokens = ends[None] - ends[:, None] + (prompts + completions)[:, None]
    else:
        longest_prompts = np.maximum.accumulate(np.where(is_run, prompts[None], 0), axis=1)
        tokens = (longest_prompts + completions[:, None]) * (starts[None] - starts[:, None] + 1)
    is_allowed = is_run & ((tokens <= max_tokens) | (starts[None] == starts[:, None]))
    if num_micro_batches is None:
        start, num_micro_batches = 0, 0
        while start < len(order):  # each takes as many as fit, which makes the fewest
            start += is_allowed[start].sum()
            num_micro_batches += 1
        num_micro_batches = -(-num_micro_batches // multiple_of) * multiple_of
    weights = np.where(is_allowed, tokens.astype(float) ** (2 if padding_free else 1), np.inf)

    # costs[j]: least cost of the sequences before j in as many micro-batches as there have been rounds
    costs = np.full(len(order) + 1, np.inf)
    costs[0] = 0.0
    cuts = []
    for _ in range(num_micro_batches):
        totals = costs[:-1, None] + weights
        cuts.append(totals.argmin(axis=0))
        costs = np.concatenate([[np.inf], totals.min(axis=0)])

    end, micro_batches = len(order), []
    for cut in reversed(cuts):
        start = cut[end - 1]
        micro_batches.append(order[start:end].tolist())
        end = start
    return micro_batches[::-1]


def deal(micro_batches: list, tokens: list[int], num_processes: int) -> list[list]:
    """
    Deals micro-batches to processes, so that all have as many, much alike in each round and in sum.

    Args:
        micro_batches (`list`):
            The micro-batches, as many as a multiple of the processes.
        tokens (`list[int]`):
            Tokens of each.
        num_processes (`int`):
            Number of processes.

    Returns:
        `list[list]`: The micro-batches of each process, in the order in which it takes them.
    """
    order = sorted(range(len(micro_batches)), key=lambda number: -tokens[number])
    shares: list[list] = [[] for _ in range(num_processes)]
    totals = [0] * num_processes
    for start in range(0, len(order), num_processes):
        # The process that has had the least takes the largest
        processes = sorted(range(num_processes), key=totals.__getitem__)
        for process, number in zip(processes, order[start : start + num_processes], strict=True):
            shares[process].append(micro_batches[number])
            totals[process] += tokens[number]
    return shares


def resize(batch: dict[str, torch.Tensor | None], prompt: int, completion: int) -> dict[str, torch.Tensor | None]:
    """
    Gives the sequences of a batch other widths, wider or narrower.

    Args:
        batch (`dict[str, torch.Tensor | None]`):
            What TRL makes: tensors with a row for each sequence (`prompt_ids` and `prompt_mask` padded on the left,
            whatever else is as wide as `completion_ids` on the right), and scalars.
        prompt (`int`):
            Columns of the prompts.
        completion (`int`):
            Columns of the completions.

    Returns:
        `dict[str, torch.Tensor | None]`: The batch.
    """
    width = batch["completion_ids"].size(1)

    def resized(key: str, value: torch.Tensor | None) -> torch.Tensor | None:
        if key in ("prompt_ids", "prompt_mask"):
            return pad(value, (prompt - value.size(1), 0))
        if value is not None and value.dim() > 1 and value.size(1) == width:
            return pad(value, (0, completion - width))
        return value

    return {key: resized(key, value) for key, value in batch.items()}


def select(batch: dict[str, torch.Tensor | None], rows: list[int]) -> dict[str, torch.Tensor | None]:
    """
    Takes sequences out of a batch.

    Args:
        batch (`dict[str, torch.Tensor | None]`):
            Tensors with a row for each sequence, and scalars that all share.
        rows (`list[int]`):
            Numbers of the sequences.

    Returns:
        `dict[str, torch.Tensor | None]`: The batch of these sequences.
    """
    return {key: value if value is None or value.dim() == 0 else value[rows] for key, value in batch.items()}


def rebatch(
    micro_batches: list[dict[str, torch.Tensor | None]],
    accelerator: Accelerator,
    max_tokens: int | None = None,
    padding_free: bool = False,
    pad_to_multiple_of: int | None = None,
) -> list[dict[str, torch.Tensor | None]]:
    """
    Cuts the sequences of an optimizer step anew, those of all processes together.

    Args:
        micro_batches (`list[dict[str, torch.Tensor | None]]`):
            Those of this process, as TRL makes them: of equally many rows and equal widths.
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer. All processes must call this together.
        max_tokens (`int`, *optional*):
            Most tokens of a micro-batch. If `None`, as many micro-batches as before, and none larger.
        padding_free (`bool`, *optional*, defaults to `False`):
            Whether the forward pass leaves padding out.
        pad_to_multiple_of (`int`, *optional*):
            Widths are multiples of it.

    Returns:
        `list[dict[str, torch.Tensor | None]]`: Micro-batches for this process, as many as every other has. Each also
        has `num_sequences` and `num_tokens` of the optimizer step, as the mean over processes, whose gradients are
        averaged.
    """
    num_processes = accelerator.num_processes
    batch = {
        key: value if value is None or value.dim() == 0 else torch.cat([part[key] for part in micro_batches])
        for key, value in micro_batches[0].items()
    }
    if batch.get("importance_sampling_ratio") is not None:  # one for each token, or for each sequence
        batch["importance_sampling_ratio"] = batch["importance_sampling_ratio"].expand_as(batch["completion_ids"])
    num_sequences = len(batch["prompt_ids"])
    lengths = torch.stack([batch["prompt_mask"].sum(1), batch["completion_mask"].sum(1)], dim=1)
    lengths = accelerator.gather(lengths)
    num_tokens = lengths[:, 1].sum() / num_processes
    lengths = round_up(lengths, pad_to_multiple_of).cpu()
    if num_processes > 1:
        batch = resize(batch, *lengths.amax(0).tolist())
        batch = {
            key: value if value is None or value.dim() == 0 else accelerator.gather(value)
            for key, value in batch.items()
        }

    prompts, completions = lengths.T.tolist()
    if max_tokens is None:
        most_rows = num_sequences // len(micro_batches)
        limits = most_rows * int(lengths.amax(0).sum()), len(micro_batches) * num_processes
    else:
        limits = max_tokens, None
    plan = plan_micro_batches(prompts, completions, *limits, num_processes, padding_free)
    widths = [lengths[rows].amax(0).tolist() for rows in plan]
    if padding_free:
        tokens = [int(lengths[rows].sum()) for rows in plan]
    else:
        tokens = [len(rows) * sum(width) for rows, width in zip(plan, widths, strict=True)]
    own = deal(list(zip(plan, widths, strict=True)), tokens, num_processes)[accelerator.process_index]
    counts = {"num_sequences": torch.tensor(num_sequences), "num_tokens": num_tokens}
    return [{**resize(select(batch, rows), *width), **counts} for rows, width in own]


def without_padding(model: Callable) -> Callable:
    """
    Makes a forward pass with a fused LM head run on one row, in which all sequences of the batch follow each other.

    Attention kernels for sequences of variable length (flash attention) tell them apart by their position ids. Others
    are as right, and no faster: they mask what lies between the sequences of one long row.

    Args:
        model (`Callable`):
            A model with TRL's fused LM head.

    Returns:
        `Callable`: Takes `input_ids`, `attention_mask` and `labels` of shape `(B, L)`, and returns an object with
        `log_probs` and `entropy` of shape `(B, L - 1)`, 0 where there is padding, as the model itself would.
    """

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **kwargs):
        is_real = attention_mask.bool()
        outputs = model(
            input_ids=input_ids[is_real][None],
            position_ids=(attention_mask.cumsum(1) - 1)[is_real][None],
            labels=labels[is_real][None],
            **kwargs,
        )

        def unpack(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            # The first token of the row, which nothing predicts, has no value
            return values.new_zeros(is_real.shape).masked_scatter(is_real, pad(values, (1, 0)))[:, 1:]

        return SimpleNamespace(log_probs=unpack(outputs.log_probs), entropy=unpack(outputs.entropy))

    return forward
