# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""A run that keeps to its own folder, stops at a number that is not finite, and ends when its work is done."""

import atexit

from accelerate.logging import get_logger
from datasets import IterableDataset
from transformers.trainer_utils import SaveStrategy
from trl import GRPOTrainer

from ..checks import check_finite
from ..processes import OneStream, end_processes, locked


logger = get_logger(__name__)


class SafeTrainer(GRPOTrainer):
    """
    A [`~trl.GRPOTrainer`] that guards a run.

    - Overrides `train`: no other run may write to the folder, a stream that is too short is an error, and the process
      group is closed when Python ends.
    - Overrides `_get_dataloader`: on several processes the rows of a group in a stream belong to one prompt.
    - Overrides `get_batch_samples`: where a row of a stream cannot be used, what was trained until then is saved.
    - Overrides `_calculate_rewards`: a batch that no reward function gives a reward is a warning that names them.
    - Overrides `compute_loss` and `_get_grad_norm`: what is not finite does not reach the weights.
    - Keeps every number of TRL.
    """

    _has_warned_of_no_rewards = False

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        try:
            with locked(self.args.output_dir):
                result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.is_in_train = False  # also where it was interrupted
        if result.global_step == 0 and isinstance(self.train_dataset, IterableDataset):
            raise ValueError(
                "The stream `train_dataset` ended before the first update: it has fewer rows than the "
                f"{self.args.generation_batch_size // self.num_generations} prompts that are generated for at once."
            )
        if self.accelerator.num_processes > 1:
            # Threads of a process group that is left open can abort the process while Python ends.
            atexit.unregister(end_processes)
            atexit.register(end_processes)
        return result

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if isinstance(dataset, IterableDataset) and self.accelerator.num_processes > 1:
            dataset = OneStream(dataset)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        try:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        except ValueError as error:  # of the data, and so on all processes: each reads all of a stream
            is_kept = self.args.save_strategy == SaveStrategy.NO or self.state.global_step == 0
            if is_kept or not isinstance(self.train_dataset, IterableDataset):
                raise
            step = self.state.global_step
            self._save_checkpoint(self.model, trial=None)
            raise ValueError(
                f"{error} The {step} updates until then are in checkpoint-{step} of {self.args.output_dir!r}, from "
                "which `resume_from_checkpoint` continues."
            ) from error

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not self._has_warned_of_no_rewards and rewards.isnan().all():
            self._has_warned_of_no_rewards = True
            names = "`, `".join(dict.fromkeys(self.reward_func_names))
            logger.warning(
                f"No completion of a batch of {len(rewards)} got a reward from `{names}`: all are None or NaN. Such a "
                "batch has the loss 0 and teaches nothing. Check what the reward functions return, and the columns "
                "that they read, such as the gold answers. `luffy inspect` shows what each trace earns."
            )
        return rewards

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.is_deepspeed_enabled:  # it updates the weights right after its backward pass
            check_finite("loss", loss, self.state.global_step + 1, self.args.output_dir)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if grad_norm is not None and self.accelerator.scaler is None:  # a scaler of fp16 skips such an update itself
            check_finite("gradient", grad_norm, self.state.global_step + 1, self.args.output_dir)
        return grad_norm
