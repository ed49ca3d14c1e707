# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Sampling where completions begin with given tokens, and processes have different numbers of them to sample."""

from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed
from accelerate.utils import broadcast_object_list, gather_object
from trl import GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from ..batching import TOKEN_TYPES
from ..groups import MixedBatch


_OF_IMAGES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


class UnevenSamplingTrainer(GRPOTrainer):
    """
    A [`~trl.GRPOTrainer`] that samples only what is not given.

    - Overrides `_generate_single_turn`, which calls TRL's own for the rows that are sampled.
    - Adds `_batch`, which a subclass sets while it makes a generation batch, and `continue_completions`.
    - Keeps TRL's sampling, to the last bit, without a batch, or where no row of it begins with a demonstration.
    """

    _batch: MixedBatch | None = None

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if self._batch is None or not self._batch.is_mixed:
            if self._batch is not None:
                self._batch.vision = images, multimodal_fields
            with self._naming_a_lost_server():
                return super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, has_tool_images
                )

        self._batch.vision = images, multimodal_fields
        given = self._batch.demonstrations
        # Sampled are rollouts, and what follows the prefix of a partial demonstration.
        sampled = [
            i for i, demonstration in enumerate(given) if demonstration is None or not demonstration.is_complete
        ]
        completion_ids = [list(demonstration.ids) if demonstration else [] for demonstration in given]
        # No sampler gave a demonstration log-probs: `None` becomes an importance-sampling ratio of exactly 1.
        logps = [[None] * len(ids) for ids in completion_ids] if self.use_vllm else None
        self.continue_completions(prompt_ids, completion_ids, logps, sampled)
        return completion_ids, logps

    def continue_completions(self, prompt_ids, completion_ids, logps, sampled: list[int]):
        """Samples what follows the completions of some rows, up to the budget of a row, in place."""
        sampled_prompt_ids = [prompt_ids[i] + completion_ids[i] for i in sampled]
        lengths = [len(ids) for ids in completion_ids]
        vision = select_images(*self._batch.vision, sampled, lengths)
        spare = prompt_ids[0], *select_images(*self._batch.vision, [0], [0])
        sampled_ids, sampled_logps = self._sample(sampled_prompt_ids, *vision, spare=spare)
        for number, i in enumerate(sampled):
            budget = self.max_completion_length - len(completion_ids[i])
            completion_ids[i] += sampled_ids[number][:budget]
            if self.use_vllm:
                logps[i] += sampled_logps[number][:budget]

    def _sample(self, prompt_ids, images, fields, spare, has_tool_images=False):
        """
        Samples one completion for each prompt of this process, of which other processes may have more or fewer.

        Where all have to take part, one without prompts samples a spare one, with its images, for nothing.
        """
        if self.use_vllm:
            with self._naming_a_lost_server():
                return self._sample_with_vllm(prompt_ids, images, spare)
        if prompt_ids:
            return super()._generate_single_turn(prompt_ids, images, fields, self.num_generations, has_tool_images)
        if self._is_sharded:
            super()._generate_single_turn([spare[0]], *spare[1:], self.num_generations)
        return [], None

    @contextmanager
    def _naming_a_lost_server(self):
        """Says what to do where the client of the vLLM server raises an error; those of rewards are not its."""
        try:
            yield
        except OSError as error:
            if not self.use_vllm or self.vllm_mode != "server":
                raise
            raise RuntimeError(
                f"The vLLM server was lost while completions for update {self.state.global_step + 1} were generated "
                f"({error}). Start it again, and resume from the last checkpoint in {self.args.output_dir!r} with "
                "`resume_from_checkpoint=True`."
            ) from error

    @property
    def _is_sharded(self) -> bool:
        """Whether all processes have to take part in a forward pass of the model."""
        plugin = self.accelerator.state.deepspeed_plugin
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def _sample_with_vllm(self, prompt_ids, images, spare) -> tuple[list[list[int]], list[list[float]]]:
        """Samples one completion for each prompt where processes hold different numbers of prompts."""
        # TRL's vLLM client gives each process the slice of completions that it would own if all of them held as many
        # prompts, in runs of `num_generations`. So one process passes the prompts of all and the others none, and then
        # each takes its own. Where a colocated engine has nothing to sample, it samples the spare prompt for nothing:
        # only after generating does it go to sleep and meet the barriers that other engines wait at.
        is_server = self.vllm_mode == "server"
        if not is_server and self.vllm_generation.tensor_parallel_size == 1:
            if prompt_ids:
                return super()._generate_single_turn(prompt_ids, images, {}, 1)
            super()._generate_single_turn([spare[0]], spare[1], {}, 1)
            return [], []

        group = None if is_server else self.vllm_generation.tp_group
        own = list(zip(prompt_ids, images or [None] * len(prompt_ids), strict=True))
        if is_server:
            prompts_of_rank = gather_object([own])
            rank = self.accelerator.process_index
        else:
            prompts_of_rank = [None] * self.vllm_generation.tensor_parallel_size
            torch.distributed.all_gather_object(prompts_of_rank, own, group=group)
            rank = torch.distributed.get_rank(group=group)
        everything = [prompt for prompts in prompts_of_rank for prompt in prompts]
        all_prompts, all_images = zip(*(everything or [(spare[0], (spare[1] or [None])[0])]), strict=True)

        # Where every group has as many rollouts, the server samples them from one request per prompt.
        runs = {len(list(equal)) for _, equal in groupby(all_prompts)} if is_server else {1}
        num_generations = runs.pop() if len(runs) == 1 else 1
        has_images = any(all_images)
        result = super()._generate_single_turn(
            *(list(all_prompts) if rank == 0 else [], list(all_images) if has_images and rank == 0 else None),
            *({}, num_generations),
        )
        if is_server:
            result = broadcast_object_list([result], from_process=0)[0]
        else:
            results = [None] * len(prompts_of_rank)
            torch.distributed.all_gather_object(results, result, group=group)
            result = results[0]
        start = sum(len(prompts) for prompts in prompts_of_rank[:rank])
        return tuple(values[start : start + len(prompt_ids)] for values in result)


def select_images(
    images: list | None, fields: dict[str, Any], rows: list[int], lengths: list[int]
) -> tuple[list | None, dict[str, Any]]:
    """
    The images of some rows, and what the processor has made of them.

    Args:
        images (`list`, *optional*):
            Images of each row, or `None`.
        fields (`dict[str, Any]`):
            What the processor has made, as TRL passes it to `generate`: not aligned with rows.
        rows (`list[int]`):
            Rows.
        lengths (`list[int]`):
            Tokens that follow the prompt of each row.

    Returns:
        `tuple[list | None, dict[str, Any]]`: The same of these rows.
    """
    if not fields or not rows:
        return images and [images[i] for i in rows], {}
    # The processor has made lists of arrays
    fields = {
        name: value if name in TOKEN_TYPES or isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
        for name, value in fields.items()
    }
    if images is not None:
        fields = {**fields, "num_images": [len(of_row) if of_row else 0 for of_row in images]}
    split = split_pixel_values_by_grid(fields)
    selected: dict[str, Any] = {}
    for name, values in split.items():
        if name == "num_images":
            continue
        part = [values[i] for i in rows]
        if name in TOKEN_TYPES:
            part = [[*map(int, ids), *([0] * lengths[i])] for ids, i in zip(part, rows, strict=True)]
        elif isinstance(values, torch.Tensor):
            part = torch.stack(part)
        selected[name] = part
    selected = unsplit_pixel_values_by_grid(selected)
    if isinstance(selected.get("pixel_values"), torch.Tensor) and selected["pixel_values"].numel() == 0:
        selected = {name: value for name, value in selected.items() if name not in _OF_IMAGES}
    return images and [images[i] for i in rows], selected
