# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Tools and environments in batches in which some completions are given."""

import copy
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object
from trl.chat_template_utils import parse_response

from ..demonstrations import decode_completion
from ..groups import Demonstration
from .sampling import UnevenSamplingTrainer, select_images


class Spectator:
    """What stands for the environment of a demonstration, which has acted already: nothing is started for it."""

    def reset(self, **kwargs) -> None:
        """Starts nothing."""


class ActingTrainer(UnevenSamplingTrainer):
    """
    A [`~trl.GRPOTrainer`] whose loop over tool calls leaves out what is given.

    - Overrides `_tool_call_loop`, which calls TRL's own for the rows that are sampled, `_generate_single_turn`, which
      all processes call as often within it, and `_generate_and_score_completions`.
    - Adds `replace_rollouts`.
    - Keeps TRL's rollouts, to the last bit, without a batch, or where no row of it begins with a demonstration.
    """

    _spare: tuple | None = None  # what a process without prompts samples, while TRL's loop runs
    _environment_pool: dict[str | None, list]

    def _generate_and_score_completions(self, inputs):
        with self._spectators(inputs):
            return super()._generate_and_score_completions(inputs)

    @contextmanager
    def _spectators(self, inputs: list[dict[str, Any]]):
        """Puts spectators into the pool of environments, at the places of the demonstrations of the batch."""
        batch = self._batch
        if batch is None or self.environment_factories is None or not any(batch.is_given):
            yield
            return
        pools, self._environment_pool = self._environment_pool, {name: [] for name in self._environment_pool}
        taken = dict.fromkeys(pools, 0)
        for row, is_given in zip(inputs, batch.is_given, strict=True):
            name = row.get("environment") if self._multi_environment else None
            if name not in pools:
                continue  # TRL says which there are
            if not is_given:
                if taken[name] == len(pools[name]):
                    pools[name].append(self.environment_factories[name]())
                taken[name] += 1
            self._environment_pool[name].append(Spectator() if is_given else pools[name][taken[name] - 1])
        try:
            yield
        finally:
            self._environment_pool = pools

    def _generate(self, prompts: list):
        batch = self._batch
        if batch is not None and self.environment_factories is not None and batch.is_mixed:
            self._share_observations(batch, prompts)
        result = super()._generate(prompts)
        if batch is not None and self.tools and batch.is_mixed:  # TRL counts all rows, and what is given calls nothing
            num_given = sum(gather_object([sum(batch.is_given)]))
            calls = self._metrics["train"]["tools/call_frequency"]
            calls[-1] *= len(batch.lengths) / max(len(batch.lengths) - num_given, 1)
        return result

    def _share_observations(self, batch, prompts: list):
        """Gives demonstrations the prompt of a rollout of their group: what the environment has shown is in it."""
        size = batch.num_generations
        own: dict[int, Any] = {}
        for i, prompt in enumerate(prompts):
            if not batch.is_given[i]:
                own.setdefault((batch.local.start + i) // size, prompt)
        shown = {group: prompt for process in gather_object([own]) for group, prompt in process.items()}
        for i in range(len(prompts)):
            if batch.is_given[i]:
                prompts[i] = shown.get((batch.local.start + i) // size, prompts[i])

    def _tool_call_loop(self, prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields):
        batch = self._batch
        if batch is None:
            return super()._tool_call_loop(
                prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields
            )
        given = batch.demonstrations if batch.is_mixed else [None] * len(prompts)
        return self._act(given, prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields)

    def _act(self, given, prompts, prompt_ids, completion_ids, completions, logprobs, images, fields):
        """TRL's loop where rows begin with what is given, and where processes may make it differently often."""
        for i, shown in enumerate(given):
            if shown is None:
                continue
            num_given = len(shown.ids) if shown.turns is not None else 0  # of messages that are there already
            prefix, own_ids = prompt_ids[i] + shown.ids[:num_given], completion_ids[i][num_given:]
            if shown.is_complete or not own_ids:
                completions[i] = [{"role": "assistant", "content": ""}]  # which calls nothing
            elif num_given:
                completions[i] = [parse_response(self._tokenizer, own_ids, prefix=prefix, tools=self._tools_of(i))]
        self._spare = prompt_ids[0], *select_images(images, fields, [0], [0])
        try:
            mask, completions, completion_ids, logprobs, *rest = super()._tool_call_loop(
                prompts, prompt_ids, completion_ids, completions, logprobs, images, fields
            )
            while self._loops_together and any(gather_object([False])):
                self._sample([], None, {}, spare=self._spare)
        finally:
            self._spare = None
        for i, shown in enumerate(given):
            if shown is None:
                continue
            mask[i][: len(shown.ids)] = shown.tool_mask
            if shown.turns is not None:
                messages = shown.turns.messages(self._tokenizer, prompt_ids[i], shown.ids, self._tools_of(i))
                is_over = len(completion_ids[i]) == len(shown.ids)
                completions[i] = messages if is_over else [*messages, *completions[i]]
            elif shown.is_complete:
                completions[i] = [
                    parse_response(self._tokenizer, shown.ids, prefix=prompt_ids[i], tools=self._tools_of(i))
                ]
        return mask, completions, completion_ids, logprobs, *rest

    def replace_rollouts(
        self, prompts: list, prompt_ids, completion_ids, tool_mask, completions, logprobs, _, images, seen
    ):
        """Puts the demonstrations of the batch, in place, where rollouts were. All processes call this together."""
        batch = self._batch
        replaced = batch.replace(completion_ids, logprobs)
        prefixes = [i for i in replaced if batch.sources[i] == "prefix"]
        if any(gather_object([len(prefixes)])):
            self.continue_completions(prompt_ids, completion_ids, logprobs, prefixes)
        for i in replaced:
            completions[i] = decode_completion(self._tokenizer, prompts[i], prompt_ids[i], completion_ids[i])
        if tool_mask is not None:
            self._act_again(
                *(replaced, prompts, prompt_ids, completion_ids, tool_mask, completions, logprobs, images, seen)
            )

    def _act_again(
        self, replaced: list[int], prompts, prompt_ids, completion_ids, tool_mask, completions, logprobs, images, seen
    ):
        """Describes what has replaced rollouts, and lets the policy act after partial demonstrations."""
        batch = self._batch
        for i in replaced:
            shown, num_own = batch.demonstrations[i], len(completion_ids[i]) - len(batch.demonstrations[i].ids)
            tool_mask[i] = shown.tool_mask + [1] * num_own
            if shown.turns is not None:
                completions[i] = shown.turns.messages(
                    self._tokenizer, prompt_ids[i], completion_ids[i], self._tools_of(i)
                )
            if seen:  # images that tools have shown to the rollout
                seen[i] = []
            if images is not None:
                images[i] = batch.vision[0] and batch.vision[0][i]
        goes_on = [not shown.is_complete if shown else False for shown in batch.demonstrations]
        if not any(gather_object([any(goes_on)])):
            return
        given = [
            shown if own else Demonstration(completion_ids[i])
            for i, (shown, own) in enumerate(zip(batch.demonstrations, goes_on, strict=True))
        ]
        texts = [
            decode_completion(self._tokenizer, prompts[i], prompt_ids[i], ids, tools=self._tools_of(i))
            for i, ids in enumerate(completion_ids)
        ]
        acted = self._act(
            *(given, copy.deepcopy(prompts), prompt_ids, list(completion_ids), texts, logprobs, *batch.vision)
        )
        for i, own in enumerate(goes_on):
            if own:
                tool_mask[i], completions[i], completion_ids[i] = (values[i] for values in acted[:3])

    def _tools_of(self, row: int) -> list | None:
        """The tools of a row, as TRL gives them to its parser."""
        if self.environment_factories is not None:
            return self._env_tools[self._batch_environments[row]]
        return self.tools

    @property
    def _loops_together(self) -> bool:
        """Whether all processes have to sample together."""
        return self.accelerator.num_processes > 1 and (self.use_vllm or self._is_sharded)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if self._spare is None:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        if self._loops_together:
            gather_object([True])  # answered by those that have left their loop
        return self._sample(prompt_ids, images, multimodal_fields, self._spare, has_tool_images)
