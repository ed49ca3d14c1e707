# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Micro-batches that waste little on padding: tensors in, tensors out, no trainer.

TRL pads every micro-batch to the longest completion of the generation batch. One long demonstration for each seven
shorter rollouts makes most of that padding. Here the sequences of one optimizer step are sorted by length, cut into as
many micro-batches as before, of any number of rows, and each is trimmed to its own width. Which sequences an optimizer
step sees does not change.
"""

import numpy as np
import torch


def plan_micro_batches(
    prompt_lengths: list[int], completion_lengths: list[int], num_micro_batches: int, max_tokens: int
) -> list[list[int]]:
    """
    Cuts sequences, sorted by length, into micro-batches with the fewest padded tokens.

    Args:
        prompt_lengths (`list[int]`):
            Tokens of each prompt.
        completion_lengths (`list[int]`):
            Tokens of each completion.
        num_micro_batches (`int`):
            How many micro-batches to make, at most as many as there are sequences. None is empty.
        max_tokens (`int`):
            Most padded tokens that a micro-batch may have: number of rows, times the longest prompt plus the longest
            completion. Micro-batches of equally many rows, padded to the longest of all, must fit.

    Returns:
        `list[list[int]]`: Numbers of the sequences of each micro-batch, the longest first.
    """
    prompts, completions = np.array(prompt_lengths), np.array(completion_lengths)
    order = np.lexsort((-prompts, -completions))
    num_sequences = len(order)
    # widths[i, j]: that of a micro-batch of the sequences from i to j; what does not come after i has no meaning
    starts = np.arange(num_sequences)
    longest_prompts = np.maximum.accumulate(np.where(starts[None] >= starts[:, None], prompts[order][None], 0), axis=1)
    widths = longest_prompts + np.maximum(completions[order], 1)[:, None]
    tokens = np.where(starts[None] >= starts[:, None], widths * (starts[None] - starts[:, None] + 1.0), np.inf)
    tokens[tokens > max_tokens] = np.inf

    # costs[j]: fewest padded tokens of the sequences before j in as many micro-batches as there have been rounds
    costs = np.full(num_sequences + 1, np.inf)
    costs[0] = 0.0
    cuts = []
    for _ in range(num_micro_batches):
        totals = costs[:-1, None] + tokens
        cuts.append(totals.argmin(axis=0))
        costs = np.concatenate([[np.inf], totals.min(axis=0)])

    end, micro_batches = num_sequences, []
    for cut in reversed(cuts):
        start = cut[end - 1]
        micro_batches.append(order[start:end].tolist())
        end = start
    return micro_batches[::-1]


def rebatch(
    micro_batches: list[dict[str, torch.Tensor | None]], pad_to_multiple_of: int | None = None
) -> list[dict[str, torch.Tensor | None]]:
    """
    Distributes the sequences of the micro-batches of one optimizer step anew, and trims the padding.

    Args:
        micro_batches (`list[dict[str, torch.Tensor | None]]`):
            What TRL makes: tensors of equal shapes with a row for each sequence (`prompt_ids` and `prompt_mask` padded
            on the left, whatever else is as wide as `completion_ids` on the right), and scalars that all share.
        pad_to_multiple_of (`int`, *optional*):
            Widths are multiples of it.

    Returns:
        `list[dict[str, torch.Tensor | None]]`: As many micro-batches.
    """
    merged = {
        key: value if value is None or value.dim() == 0 else torch.cat([batch[key] for batch in micro_batches])
        for key, value in micro_batches[0].items()
    }
    prompt_width, completion_width = merged["prompt_ids"].size(1), merged["completion_ids"].size(1)
    prompt_lengths = merged["prompt_mask"].sum(1).tolist()
    completion_lengths = merged["completion_mask"].sum(1).tolist()
    rows_per_batch = micro_batches[0]["prompt_ids"].size(0)
    plan = plan_micro_batches(
        prompt_lengths,
        completion_lengths,
        len(micro_batches),
        rows_per_batch * (max(prompt_lengths) + max(*completion_lengths, 1)),
    )

    def round_up(length: int, limit: int) -> int:
        multiple = pad_to_multiple_of or 1
        return min(-(-max(length, 1) // multiple) * multiple, limit)

    def trim(key: str, value: torch.Tensor | None, rows: torch.Tensor, prompt: int, completion: int):
        if value is None or value.dim() == 0:
            return value
        value = value[rows]
        if key in ("prompt_ids", "prompt_mask"):
            return value[:, prompt_width - prompt :]
        if value.dim() > 1 and value.size(1) == completion_width:
            return value[:, :completion]
        return value

    result = []
    for rows in plan:
        prompt = round_up(max(prompt_lengths[row] for row in rows), prompt_width)
        completion = round_up(max(completion_lengths[row] for row in rows), completion_width)
        index = torch.tensor(rows, device=merged["prompt_ids"].device)
        result.append({key: trim(key, value, index, prompt, completion) for key, value in merged.items()})
    return result
