# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Micro-batches that waste little on padding: tensors in, tensors out, no trainer.

TRL pads every micro-batch to the longest completion of the generation batch. One long demonstration for each seven
shorter rollouts makes most of that padding. Here the sequences of one optimizer step, those of all processes, are
sorted by length, cut into micro-batches of any number of rows, each as wide as its own longest, and distributed to the
processes so that all have as much to do. Which sequences an optimizer step sees does not change.
"""

import inspect
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.functional import pad
from trl.trainer.utils import split_pixel_values_by_grid

from .losses import loss_mask


def round_up(lengths: torch.Tensor, multiple: int | None) -> torch.Tensor:
    """Lengths as TRL's `pad_to_multiple_of` makes them: multiples of it, none of them 0."""
    lengths = lengths.clamp(min=1)
    return lengths if multiple is None else -(-lengths // multiple) * multiple


# How many costs of micro-batches are kept in memory (8 bytes each). The others are computed again when needed.
MAX_STORED_COSTS = 2**23


def plan_micro_batches(
    prompt_lengths: list[int],
    completion_lengths: list[int],
    max_tokens: int,
    num_micro_batches: int | None = None,
    multiple_of: int = 1,
    padding_free: bool = False,
) -> list[list[int]]:
    """
    Cuts sequences, sorted by length, into micro-batches of at most `max_tokens` padded tokens, the longest first: into
    `num_micro_batches`, or as few as possible, a multiple of `multiple_of`. No other cut of the sorted sequences has
    fewer padded tokens. With `padding_free`, none has a smaller sum of squared tokens.
    """
    prompts = np.array(prompt_lengths, dtype=np.int64)
    completions = np.array(completion_lengths, dtype=np.int64)
    order = np.lexsort((-prompts, -completions))
    runs = Runs(prompts[order], completions[order], max_tokens, padding_free)
    fewest, cost_of_fewest = runs.cut_greedily()
    if num_micro_batches is None:
        num_micro_batches = -(-fewest // multiple_of) * multiple_of
    if not fewest <= num_micro_batches <= len(order):
        raise ValueError(
            f"{len(order)} sequences make between {fewest} and {len(order)} micro-batches of at most {max_tokens} "
            f"tokens, not {num_micro_batches}."
        )
    # Between these two numbers of micro-batches and what they cost, search for the price of a micro-batch at which the
    # cheapest cut has the right number of them.
    many, few = (len(order), runs.cost_alone), (fewest, cost_of_fewest)
    best: tuple[int, np.ndarray, int] | None = None
    while True:
        price = (few[1] - many[1]) // max(many[0] - few[0], 1)
        totals, number = runs.add_up(price)
        total = int(totals[-1])
        bound = total - price * num_micro_batches
        if best is None or bound > best[0]:
            best = bound, totals, price
        cost = total - price * number
        if number == num_micro_batches or (number, cost) in (many, few):
            break
        if number > num_micro_batches:
            many = number, cost
        else:
            few = number, cost
    cuts = runs.cut(*best[1:], num_micro_batches)
    return [order[start:end].tolist() for start, end in pairwise(cuts)]


class Runs:
    """
    The micro-batches that may be made of sorted sequences, and the cheapest cut of the sequences into them. A
    micro-batch is a run: sequences that follow each other.
    """

    # Where a run is allowed, every part of it is. So the runs that end before a sequence `end` start at `firsts[end]`
    # or later, and only these few dozen are looked at.
    #
    # To get a given number of micro-batches, each has a price. One pass (`add_up`) finds the cheapest cut at a price.
    # The right price leads to about the right number. The pass also tells, for each run, by how much every cut with
    # this run exceeds the cheapest one. `cut` searches the few runs where that is little, and finds the best cut of
    # exactly that number.

    def __init__(self, prompts: np.ndarray, completions: np.ndarray, max_tokens: int, padding_free: bool):
        self.prompts, self.completions, self.padding_free = prompts, completions, padding_free
        self.ends = np.concatenate([[0], np.cumsum(prompts + completions)])
        self.sizes = np.arange(len(prompts), 0, -1)
        self.firsts, num_stored = [0], 0
        self.stored: list[np.ndarray | None] = [None]
        for end in range(1, len(prompts) + 1):
            tokens = self._tokens(self.firsts[-1], end)
            # The later the start, the fewer the tokens. A sequence may stand alone, however long.
            num_allowed = max(1, int(np.searchsorted(tokens[::-1], max_tokens, side="right")))
            self.firsts.append(end - num_allowed)
            num_stored += num_allowed
            self.stored.append(self._costs(tokens[-num_allowed:]) if num_stored <= MAX_STORED_COSTS else None)
        self.cost_alone = int(self._costs(prompts + completions).sum())

    def _tokens(self, first: int, end: int) -> np.ndarray:
        """Tokens of the micro-batches that end before `end`, for each start from `first` on."""
        if self.padding_free:
            return self.ends[end] - self.ends[first:end]
        longest_prompts = np.maximum.accumulate(self.prompts[first:end][::-1])[::-1]
        return (longest_prompts + self.completions[first:end]) * self.sizes[len(self.sizes) - (end - first) :]

    def _costs(self, tokens: np.ndarray) -> np.ndarray:
        return tokens * tokens if self.padding_free else tokens

    def costs(self, end: int) -> np.ndarray:
        """Costs of the allowed micro-batches that end before `end`, by their starts."""
        stored = self.stored[end]
        return self._costs(self._tokens(self.firsts[end], end)) if stored is None else stored

    def cut_greedily(self) -> tuple[int, int]:
        """The smallest number of micro-batches, each as large as may be, and what they cost."""
        number, cost, start = 0, 0, 0
        while start < len(self.prompts):
            end = bisect_right(self.firsts, start) - 1
            cost += int(self.costs(end)[start - self.firsts[end]])
            number, start = number + 1, end
        return number, cost

    def add_up(self, price: int) -> tuple[np.ndarray, int]:
        """
        With a price of each micro-batch: the lowest cost of the sequences before each end, and how many micro-batches
        a cheapest cut has.
        """
        totals: np.ndarray = np.zeros(len(self.firsts), dtype=np.int64)
        numbers = [0] * len(self.firsts)
        for end in range(1, len(self.firsts)):
            first = self.firsts[end]
            candidates = totals[first:end] + self.costs(end)
            number = int(candidates.argmin())
            totals[end] = candidates[number] + price
            numbers[end] = numbers[first + number] + 1
        return totals, numbers[-1]

    def cut(self, totals: np.ndarray, price: int, num_micro_batches: int) -> list[int]:
        """
        The cheapest cut into a number of micro-batches: where each starts, and where the last one ends. `totals` are
        what `add_up` returned for a price that leads to about this number.
        """
        num_ends = len(self.firsts)
        rest = np.full(num_ends, np.iinfo(np.int64).max)  # the lowest cost of the sequences from each end on
        rest[-1] = 0
        for end in range(num_ends - 1, 0, -1):
            part = rest[self.firsts[end] : end]
            np.minimum(part, self.costs(end) + (price + rest[end]), out=part)
        excesses_of_ends = totals + rest - totals[-1]  # of every cut at this end, over the cheapest cut

        def excesses(end: int) -> np.ndarray:
            """By their starts, what the runs that end before `end` cost more than the cheapest way to it."""
            return totals[self.firsts[end] : end] + self.costs(end) + (price - totals[end])

        # The excess of a cut is the sum over its runs, and the best cut has 0 or about 1, save for unusual prompts. So
        # all cuts up to a limit are found, and the limit is raised until one of them has the right number.
        is_wanted, limit = (2 << num_micro_batches) - 1, 0
        while True:
            # For each end, by excess: into how many micro-batches the sequences before it can be cut, as bits
            found: list[dict[int, int]] = [{0: 1}]
            found_without: np.ndarray = np.zeros(num_ends, dtype=object)  # those without an excess
            found_without[0] = 1
            for end in range(1, num_ends):
                spare = int(limit - excesses_of_ends[end])
                at_end: dict[int, int] = {}
                found.append(at_end)
                if spare < 0:
                    continue
                of_runs = excesses(end)
                starts = np.flatnonzero(of_runs <= spare)
                of_starts = of_runs[starts]
                starts += self.firsts[end]
                if limit == 0:  # many runs, if many sequences are equally long
                    at_end[0] = np.bitwise_or.reduce(found_without[starts])
                else:
                    for start, excess in zip(starts.tolist(), of_starts.tolist(), strict=True):
                        for before, bits in found[start].items():
                            if excess + before <= spare:
                                at_end[excess + before] = at_end.get(excess + before, 0) | bits
                seen = 0
                for excess in sorted(at_end):  # only the lowest excess of each number matters
                    bits = at_end[excess] << 1 & is_wanted & ~seen
                    seen |= bits
                    at_end[excess] = bits
                found_without[end] = at_end.get(0, 0)
            is_found = [excess for excess, bits in found[-1].items() if bits >> num_micro_batches & 1]
            if is_found:
                break
            limit = max(1, 4 * limit)

        (excess,) = is_found
        cuts = [num_ends - 1]
        while num_micro_batches > 0:
            num_micro_batches -= 1
            of_runs = excesses(cuts[-1])
            for number in np.flatnonzero(of_runs <= excess).tolist():  # of equal ones, the longest micro-batch
                start, before = self.firsts[cuts[-1]] + number, excess - int(of_runs[number])
                if found[start].get(before, 0) >> num_micro_batches & 1:
                    break
            cuts.append(start)
            excess = before
        return cuts[::-1]


def distribute(micro_batches: list, tokens: list[int], num_processes: int) -> list[list]:
    """
    Distributes micro-batches to processes: each gets as many, and their tokens are about equal in each round and in
    sum.
    """
    order = sorted(range(len(micro_batches)), key=lambda number: -tokens[number])
    shares: list[list] = [[] for _ in range(num_processes)]
    totals = [0] * num_processes
    for start in range(0, len(order), num_processes):
        # The process with the fewest tokens so far takes the largest
        processes = sorted(range(num_processes), key=totals.__getitem__)
        for process, number in zip(processes, order[start : start + num_processes], strict=True):
            shares[process].append(micro_batches[number])
            totals[process] += tokens[number]
    return shares


# What TRL's inputs have of images; the first are of images or their parts, and not aligned with rows
OF_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "image_position_ids",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "num_images",
    "num_tiles",
    "token_type_ids",
    "mm_token_type_ids",
)
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # as wide as prompt and completion


def resize(batch: dict[str, torch.Tensor | None], prompt: int, completion: int) -> dict[str, torch.Tensor | None]:
    """
    Gives the sequences of a batch other widths, wider or narrower: `prompt_ids` and `prompt_mask` on the left,
    whatever else is as wide as `completion_ids` on the right.
    """
    width = batch["completion_ids"].size(1)

    def resized(key: str, value: torch.Tensor | None) -> torch.Tensor | None:
        if key.startswith("prompt_"):
            return pad(value, (prompt - value.size(1), 0))
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.size(1) == width:
            return pad(value, (0, completion - width))
        return value

    return {key: resized(key, value) for key, value in batch.items()}


def select(batch: dict[str, torch.Tensor | None], rows: list[int]) -> dict[str, torch.Tensor | None]:
    """Takes sequences out of a batch: rows of its tensors and lists, and the scalars that all rows share."""

    def selected(value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in rows]
        return value if value is None or value.dim() == 0 else value[rows]

    return {key: selected(value) for key, value in batch.items()}


def images_by_row(batch: dict[str, Any]) -> dict[str, Any]:
    """TRL's inputs with what is of images as a list with a value for each row, so that rows can be told apart."""
    num_rows, width = len(batch["prompt_ids"]), batch["prompt_ids"].size(1)
    rows: dict[str, Any] = {}
    for key, value in split_pixel_values_by_grid(batch).items():
        if key in TOKEN_TYPES:
            rows[f"prompt_{key}"], rows[f"completion_{key}"] = value[:, :width], value[:, width:]
        elif key in OF_IMAGES and isinstance(value, torch.Tensor):
            rows[key] = list(value.split(len(value) // num_rows))  # padded to as many images for each row
        else:
            rows[key] = value
    return rows


def images_together(batch: dict[str, Any]) -> dict[str, Any]:
    """The opposite of [`images_by_row`]. What no row has an image for is not there."""
    together: dict[str, Any] = {}
    for key, value in batch.items():
        name = key.removeprefix("prompt_")
        if name in TOKEN_TYPES:
            together[name] = torch.cat([value, batch[f"completion_{name}"]], dim=1)
        elif isinstance(value, list) and isinstance(value[0], torch.Tensor):
            if any(len(of_row) for of_row in value):
                together[key] = torch.cat(value)
        elif key.removeprefix("completion_") not in TOKEN_TYPES:
            together[key] = value
    return together


def with_all_keys(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of which images are by row, with what other processes have of images and this one has not."""
    own = {
        key: (value[0].shape[1:], value[0].dtype) if isinstance(value[0], torch.Tensor) else None
        for key, value in batch.items()
        if isinstance(value, list)
    }
    num_rows, device = len(batch["prompt_ids"]), batch["prompt_ids"].device
    batch = dict(batch)
    for described in gather_object([own]):
        for key, kind in described.items():
            if key not in batch:
                empty = 0 if kind is None else torch.zeros(0, *kind[0], dtype=kind[1], device=device)
                batch[key] = [empty] * num_rows
    types = [name for name in TOKEN_TYPES if f"prompt_{name}" in batch]
    for name in set(sum(gather_object([types]), [])) - set(types):
        batch |= {f"{part}_{name}": torch.zeros_like(batch[f"{part}_ids"]) for part in ("prompt", "completion")}
    return dict(sorted(batch.items()))  # all processes exchange them in the same order


def place(shares: list[list[int]], tokens: list[int]) -> list[int]:
    """
    For each process, the number of the share of sequences that it takes, so that many of their tokens are there
    already.
    """
    num_local = len(tokens) // len(shares)
    overlaps: Counter[tuple[int, int]] = Counter()
    for number, rows in enumerate(shares):
        for row in rows:
            overlaps[row // num_local, number] += tokens[row]
    share_of: dict[int, int] = {}
    placed: set[int] = set()
    for process, number in sorted(overlaps, key=lambda pair: (-overlaps[pair], pair)):  # the largest overlaps first
        if process not in share_of and number not in placed:
            share_of[process] = number
            placed.add(number)
    others = (number for number in range(len(shares)) if number not in placed)
    return [share_of[process] if process in share_of else next(others) for process in range(len(shares))]


def plan_processes(
    lengths: torch.Tensor,
    num_processes: int,
    num_micro_batches: int,
    max_tokens: int | None = None,
    padding_free: bool = False,
) -> list[list[tuple[list[int], list[int]]]]:
    """
    For each process its micro-batches of an optimizer step: the numbers of their sequences, and the widths of prompts
    and completions. `lengths`, of shape `(N, 2)`, are the tokens of prompts and completions, the first process's rows
    first. Without `max_tokens` there are as many micro-batches as before, and none is larger.
    """
    table = lengths.numpy()
    prompts, completions = lengths.T.tolist()
    if max_tokens is None:
        rows_before = len(lengths) // (num_processes * num_micro_batches)
        limits = rows_before * int(table.max(0).sum()), num_micro_batches * num_processes
    else:
        limits = max_tokens, None
    plan = plan_micro_batches(prompts, completions, *limits, num_processes, padding_free)
    sizes = np.array([len(rows) for rows in plan])
    table, starts = table[np.concatenate(plan)], np.cumsum(sizes) - sizes
    widths = np.maximum.reduceat(table, starts)
    tokens = np.add.reduceat(table.sum(1), starts) if padding_free else sizes * widths.sum(1)
    shares = distribute(list(zip(plan, widths.tolist(), strict=True)), tokens.tolist(), num_processes)
    numbers = place([[row for rows, _ in share for row in rows] for share in shares], lengths.sum(1).tolist())
    return [shares[number] for number in numbers]


def exchange(
    batch: dict[str, torch.Tensor | None], lengths: torch.Tensor, rows_of: list[list[int]], process: int
) -> dict[str, torch.Tensor | None]:
    """
    Sends each sequence to the process that takes it, and returns those of this one, in the order of their numbers. All
    processes call this together. Padding is not sent, and is 0 in what arrives; masks follow from `lengths`.
    """
    num_local, width = batch["completion_ids"].shape
    device = batch["completion_ids"].device
    # What is sent to a process, and what arrives from one, is in the order of the numbers.
    leaving = [sorted(row for row in rows if row // num_local == process) for rows in rows_of]
    arriving: list[list[int]] = [[] for _ in rows_of]
    for row in sorted(rows_of[process]):
        arriving[row // num_local].append(row)
    sent, own = ([row for rows in part for row in rows] for part in (leaving, arriving))
    local = [row - process * num_local for row in sent]

    def mask(rows: list[int], width: int, column: int) -> torch.Tensor:
        """Where sequences have tokens: prompts (column 0) at their end, completions (column 1) at their start."""
        positions = torch.arange(width, device=device)
        return (positions.flip(0) if column == 0 else positions) < lengths[rows, column, None].to(device)

    def pass_on(values: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Exchanges flat values, of which each of all sequences has as many as `sizes` says."""
        num_sent, num_received = ([sum(sizes[row] for row in rows) for rows in part] for part in (leaving, arriving))
        received = values.new_empty(sum(num_received))
        torch.distributed.all_to_all_single(received, values, num_received, num_sent)
        return received

    def pass_on_images(values: list) -> list:
        """Exchanges a list of numbers, or of tensors of as many rows as a sequence has images, or parts of them."""
        if not isinstance(values[0], torch.Tensor):
            numbers = torch.tensor(values, device=device)
            return pass_on(numbers[local], [1] * len(lengths)).tolist()
        num_own = torch.tensor([len(value) for value in values], device=device)
        num_rows = [torch.empty_like(num_own) for _ in rows_of]
        torch.distributed.all_gather(num_rows, num_own)
        counts, shape = torch.cat(num_rows).tolist(), values[0].shape[1:]
        flat = torch.cat([values[row].flatten() for row in local] or [values[0][:0].flatten()])
        received = pass_on(flat, [count * shape.numel() for count in counts])
        return list(received.view(-1, *shape).split([counts[row] for row in own]))

    sizes = lengths.T.tolist()
    result: dict[str, torch.Tensor | None] = {}
    for key, value in batch.items():
        column = 0 if key.startswith("prompt_") else 1
        if isinstance(value, list):
            result[key] = pass_on_images(value)
        elif value is None or value.dim() == 0:
            result[key] = value
        elif column == 0 or (value.dim() > 1 and value.size(1) == width):  # one value for each token
            is_real = mask(own, int(lengths[own, column].max().clamp(min=1)), column)
            if key in ("prompt_mask", "completion_mask"):
                result[key] = is_real.to(value.dtype)
                continue
            values = value[local][mask(sent, value.size(1), column)]
            if key in ("prompt_ids", "completion_ids"):
                values = values.int()  # half of what int64 takes
            values = pass_on(values, sizes[column]).to(value.dtype)
            result[key] = value.new_zeros(is_real.shape).masked_scatter(is_real, values)
        else:
            values = pass_on(value[local].flatten(), [value[0].numel()] * len(lengths))
            result[key] = values.view(len(own), *value.shape[1:])
    return result


def rebatch(
    micro_batches: list[dict[str, torch.Tensor | None]],
    accelerator: Accelerator,
    max_tokens: int | None = None,
    padding_free: bool = False,
    pad_to_multiple_of: int | None = None,
    sees_images: bool = False,
) -> list[dict[str, torch.Tensor | None]]:
    """
    Cuts the sequences of an optimizer step of all processes again, from TRL's micro-batches of equal widths. All
    processes call this together, make the same plan and get as many micro-batches. Each has `num_sequences` and
    `num_tokens` of the optimizer step, as the mean over processes, because gradients are averaged over them.
    """
    num_processes, process = accelerator.num_processes, accelerator.process_index
    if sees_images:
        micro_batches = [images_by_row(part) for part in micro_batches]

    def joined(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [of_row for part in micro_batches for of_row in part[key]]
        return value if value is None or value.dim() == 0 else torch.cat([part[key] for part in micro_batches])

    batch = {key: joined(key, value) for key, value in micro_batches[0].items()}
    if sees_images and num_processes > 1:
        batch = with_all_keys(batch)
    if batch.get("importance_sampling_ratio") is not None:  # one for each token, or for each sequence
        batch["importance_sampling_ratio"] = batch["importance_sampling_ratio"].expand_as(batch["completion_ids"])
    num_sequences = len(batch["prompt_ids"])
    masks = [batch["prompt_mask"], batch["completion_mask"]]
    if "tool_mask" in batch:
        masks.append(loss_mask(batch))
    lengths = accelerator.gather(torch.stack([mask.sum(1) for mask in masks], dim=1).int())
    num_tokens = lengths[:, -1].sum() / num_processes
    lengths = lengths[:, :2].long().cpu()
    shares = plan_processes(
        round_up(lengths, pad_to_multiple_of), num_processes, len(micro_batches), max_tokens, padding_free
    )
    rows_of = [[row for rows, _ in share for row in rows] for share in shares]
    if num_processes > 1:
        batch = exchange(batch, lengths, rows_of, process)
    position_of = {row: position for position, row in enumerate(sorted(rows_of[process]))}
    counts = {"num_sequences": torch.tensor(num_sequences), "num_tokens": num_tokens}
    cut = [
        {**resize(select(batch, [position_of[row] for row in rows]), *widths), **counts}
        for rows, widths in shares[process]
    ]
    return [images_together(part) for part in cut] if sees_images else cut


def needs_position_ids(model: nn.Module) -> bool:
    """Whether padding on the left moves the tokens of a model: it has absolute positions, and counts columns."""
    model = getattr(model, "get_base_model", lambda: model)()
    is_rotary = getattr(model.config.get_text_config(), "rope_parameters", None) is not None
    return "position_ids" in inspect.signature(model.forward).parameters and not is_rotary


def with_position_ids(model: Callable) -> Callable:
    """Makes a forward pass count positions from the first real token of each row, as generation does."""

    def forward(*args, attention_mask: torch.Tensor, **kwargs):
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return model(*args, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    return forward


def without_padding(model: Callable) -> Callable:
    """
    Makes a forward pass with TRL's fused LM head run on one row, in which all sequences of the batch follow each
    other. Flash attention tells them apart by position ids; other kernels mask what lies between them, and are no
    faster. Log-probs and entropies have the shape that the model itself returns, and are 0 on padding.
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
