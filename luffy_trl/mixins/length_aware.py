# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Micro-batches by length, under a token budget where there is one; the arithmetic is in `luffy_trl.batching`."""

import time
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from trl import GRPOTrainer

from ..batching import (
    needs_position_ids,
    plan_micro_batches,
    rebatch,
    round_up,
    with_position_ids,
    without_padding,
)
from ..groups import MixedBatch
from ..metrics import RunningMetrics
from .resuming import ResumingTrainer


logger = get_logger(__name__)


class LengthAwareTrainer(ResumingTrainer):
    """
    A [`~trl.GRPOTrainer`] that cuts the sequences of an optimizer step into micro-batches by length.

    - Needs the options `length_aware_batching`, `max_tokens_per_microbatch` and `padding_free` in `args`; and of a
      subclass that `_compute_loss` divides by `num_sequences` and `num_tokens` of its inputs where they are there, and
      adds its means to `running_metrics`: micro-batches are of unlike size.
    - Overrides `_prepare_inputs`, `training_step` and `_get_per_token_logps_and_entropies`; `log`.
    - Adds `running_metrics`, `name_passes`, and `_batch`, which a subclass sets while it makes a generation batch: it
      knows the log-probs of some rows, and these are left out of the passes over the batch.
    - Keeps TRL's micro-batches, to the last bit, with `length_aware_batching=False`.
    """

    _batch: MixedBatch | None = None
    options_of_a_batch = (
        *ResumingTrainer.options_of_a_batch,
        "length_aware_batching",
        "max_tokens_per_microbatch",
        "padding_free",
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.running_metrics = RunningMetrics(self.accelerator.device)
        if self.args.length_aware_batching and self.aux_loss_enabled:
            raise ValueError(
                "`length_aware_batching=True` makes micro-batches of unlike size, over which the load-balancing loss "
                "of a mixture of experts has no mean. Set `length_aware_batching=False`, or leave that loss out with "
                "`output_router_logits=False` in the model's config."
            )
        unwrapped_model = self.accelerator.unwrap_model(self.model)
        # With TRL's micro-batches the numbers must be those of TRL, which passes none
        self._needs_position_ids = self.args.length_aware_batching and needs_position_ids(unwrapped_model)
        attention = unwrapped_model.config._attn_implementation
        if self.args.padding_free and "flash" not in (attention or ""):
            logger.warning(
                f"`padding_free=True` is made for flash attention, and the model has {attention!r}: the numbers are "
                "the same, but it masks the long row in full. Set `attn_implementation` in `model_init_kwargs`, or "
                "`padding_free=False`."
            )

    def name_passes(self) -> list[str]:
        """TRL computes old log-probs where updates lag behind generation, and then those of the reference."""
        generate_every = self.args.steps_per_generation * self.num_iterations
        is_old = self.args.gradient_accumulation_steps % generate_every != 0 or (
            self.use_vllm and self.vllm_importance_sampling_correction
        )
        return [*(["old"] if is_old else []), *(["reference"] if self.beta != 0.0 else [])]

    def generation_state(self) -> dict[str, Any]:
        return {**super().generation_state(), "running_metrics": self.running_metrics.state_dict()}

    def load_generation_state(self, state: dict[str, Any]):
        super().load_generation_state(state)
        if "running_metrics" in state:
            self.running_metrics.load_state_dict(state["running_metrics"])

    def forget_generation(self):
        super().forget_generation()
        self.running_metrics.clear()

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.args.max_tokens_per_microbatch is None:
            return super().training_step(model, inputs, num_items_in_batch)
        # Under a token budget, the last of the calls for an optimizer step makes all of its passes, and syncs
        # gradients in the last of these.
        started = time.perf_counter()
        model.train()
        micro_batches = self._prepare_inputs(inputs)
        loss = torch.zeros((), device=self.accelerator.device)
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED  # waits by itself
        for batch in micro_batches[:-1]:
            with nullcontext() if is_deepspeed else self.accelerator.no_sync(model):
                self.accelerator.gradient_state._set_sync_gradients(False)
                loss += super(GRPOTrainer, self).training_step(model, batch, num_items_in_batch)
            self.accelerator.gradient_state._set_sync_gradients(True)
        self._current_train_step_time += time.perf_counter() - started
        if not micro_batches:
            self._step += 1
            return loss
        return loss + super().training_step(model, micro_batches[-1], num_items_in_batch)

    def _prepare_inputs(self, generation_batch):
        if isinstance(generation_batch, dict):
            return generation_batch  # a micro-batch that `training_step` has prepared
        buffered_inputs = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or not self.args.length_aware_batching:
            return inputs
        if self._buffered_inputs is not buffered_inputs:  # just generated
            num_calls, max_tokens = self.args.gradient_accumulation_steps, self.args.max_tokens_per_microbatch
            buffered_inputs, self._buffered_inputs = self._buffered_inputs, []
            for start in range(0, len(buffered_inputs), num_calls):
                micro_batches = rebatch(
                    buffered_inputs[start : start + num_calls],
                    self.accelerator,
                    max_tokens,
                    self.args.padding_free,
                    self.pad_to_multiple_of,
                    sees_images=self._is_vlm,
                )
                if max_tokens is None:
                    self._buffered_inputs += micro_batches  # one for each call of `training_step`
                else:
                    self._buffered_inputs += [*([] for _ in range(num_calls - 1)), micro_batches]  # all in the last
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, *args, **kwargs
    ):
        if self.args.padding_free:
            model = without_padding(model)
        elif self._needs_position_ids:
            model = with_position_ids(model)
        is_text = not args and all(value is None for value in kwargs.values())
        if not (self.args.length_aware_batching and batch_size is not None and is_text):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, *args, **kwargs
            )
        # Old or reference log-probs, over the generation batch
        num_prompt_tokens = input_ids.size(1) - logits_to_keep
        masks = attention_mask.split([num_prompt_tokens, logits_to_keep], dim=1)
        lengths = round_up(torch.stack([mask.sum(1) for mask in masks], dim=1), self.pad_to_multiple_of).cpu()
        lengths = lengths.minimum(torch.tensor([num_prompt_tokens, logits_to_keep]))
        all_logps = torch.zeros(masks[1].shape, device=input_ids.device)
        known = self._batch.next_pass() if self._batch is not None else [None] * len(lengths)
        for chunk in self._plan_pass(lengths, known, batch_size):
            prompt, completion = lengths[chunk].amax(0).tolist()
            columns = slice(num_prompt_tokens - prompt, num_prompt_tokens + completion)
            logps, _, _ = super()._get_per_token_logps_and_entropies(
                model, input_ids[chunk, columns], attention_mask[chunk, columns], completion
            )
            all_logps[chunk, :completion] = logps.float()
        for row, logps in enumerate(known):
            if logps is not None:
                all_logps[row, : len(logps)] = logps.to(all_logps.device)
        if self._batch is not None:
            self._batch.keep_logps(all_logps)
        return all_logps, None, None

    def _plan_pass(self, lengths: torch.Tensor, known: list[torch.Tensor | None], batch_size: int) -> list[list[int]]:
        """The rows of each forward pass over a generation batch, from their lengths of shape `(B, 2)`."""
        rows = sorted(range(len(known)), key=lambda row: known[row] is not None)
        num_rows = sum(logps is None for logps in known)
        if self.args.max_tokens_per_microbatch is None:
            max_tokens = batch_size * int(lengths.amax(0).sum())
            num_batches = -(-num_rows // batch_size)
        else:
            max_tokens = self.args.max_tokens_per_microbatch
            prompts, completions = lengths[rows[:num_rows]].T.tolist()
            num_batches = len(
                plan_micro_batches(prompts, completions, max_tokens, padding_free=self.args.padding_free)
            )
        # All processes take part in a forward pass of a sharded model: all make as many, over cached rows if need be
        num_batches = int(self.accelerator.gather(torch.tensor(num_batches, device=self.accelerator.device)).max())
        rows = rows[: max(num_rows, num_batches)]
        prompts, completions = lengths[rows].T.tolist()
        plan = plan_micro_batches(prompts, completions, max_tokens, num_batches, padding_free=self.args.padding_free)
        return [[rows[number] for number in numbers] for numbers in plan]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            for name, value in self.running_metrics.collect(self.accelerator).items():
                self._metrics["train"][name].append(value)
        super().log(logs, start_time)
