# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
LUFFY (arXiv 2504.14945) is GRPO with three changes. They stand below in the order of a training step:

1. Mixed groups. `_generate_and_score_completions` opens slots of each group to demonstrations, which are not
   sampled. With `demonstration_policy="on_failure"`, `_generate` inserts them where the rollouts of a group fail.
2. Rewards and advantages. Both are scored alike, each completion once, and the advantages are those of the mixed
   group. TRL gets to see the rewards of rollouts only: its metrics skip what is NaN.
3. Policy shaping. `_compute_loss` reads the tokens, and the objective of the method (`methods`) makes their loss.

One [`~luffy_trl.groups.MixedBatch`] travels from the first to the last. What GRPOTrainer lacks beside that is in
`mixins`: sampling what is not given, micro-batches by length, exact resuming, guards of a run, model cards.

These are private methods of TRL 1.16, which is why luffy-trl pins its minor version.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc
from trl.trainer.utils import get_config_model_id

from . import metrics
from .batching import OF_IMAGES
from .checks import check_arguments, load_tokenizer
from .demonstrations import DEMONSTRATION_COLUMNS, without_demonstrations
from .groups import Caches, MixedBatch
from .losses import Denominators, TokenBatch, aggregate
from .luffy_config import LuffyConfig
from .methods import OPTIONS_OF_A_METHOD, Method
from .mixins.acting import ActingTrainer
from .mixins.length_aware import LengthAwareTrainer
from .mixins.measuring import MeasuringTrainer
from .mixins.model_cards import LUFFY_PAPER, CardTrainer
from .mixins.recording import RecordingTrainer
from .mixins.safety import SafeTrainer
from .scoring import score_once
from .turns import Tools


Rows: TypeAlias = Dataset | IterableDataset


class LuffyTrainer(LengthAwareTrainer, MeasuringTrainer, ActingTrainer, SafeTrainer, RecordingTrainer, CardTrainer):
    """
    Trainer for LUFFY: GRPO in which some completions of each group are demonstrations from the dataset, with a shaped
    importance ratio. It takes every argument of [`~trl.GRPOTrainer`], under the same names.

    Example:

    ```python
    from luffy_trl import LuffyConfig, LuffyTrainer
    from luffy_trl.rewards import math_verify_reward
    trainer = LuffyTrainer(
        model="Qwen/Qwen2.5-Math-1.5B",
        reward_funcs=math_verify_reward,
        args=LuffyConfig(output_dir="luffy", num_generations=8, num_demonstrations=1),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Args:
        args ([`LuffyConfig`], *optional*):
            Configuration. If `None`, the defaults of [`LuffyConfig`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            As in [`~trl.GRPOTrainer`], and with the traces: a column `demonstrations`, a list of traces for each
            prompt, or TRL's `completion` with one. A trace is a string, or a list of messages of the assistant and of
            the tools that it calls. A row without a trace trains on rollouts alone. `demonstration_rewards` gives
            traces their rewards, which are else scored as rollouts are.
        model, reward_funcs, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
        quantization_config, peft_config, tools, rollout_func, environment_factory:
            As in [`~trl.GRPOTrainer`]. `rollout_func` is refused together with demonstrations. `eval_dataset` is
            evaluated on the policy's own completions; demonstrations in it are not used.
    """

    args: LuffyConfig
    reward_funcs: list
    options_of_a_batch = (*LengthAwareTrainer.options_of_a_batch, *OPTIONS_OF_A_METHOD)
    _tag_names = ["trl", "luffy", "grpo"]
    _name = "LUFFY"
    _paper = LUFFY_PAPER

    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: LuffyConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | DatasetDict | IterableDatasetDict | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config=None,
        peft_config=None,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
    ):
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        args = args or LuffyConfig(f"{model_id.split('/')[-1]}-LUFFY")
        check_arguments(args, reward_funcs, train_dataset, tools, rollout_func, environment_factory)
        self.method = Method.from_args(args)
        if not args.is_plain_grpo:
            processing_class = load_tokenizer(processing_class, model_id, args)
            of_run = Tools.of_run(processing_class, tools, environment_factory)
            train_dataset = self.method.prepare(train_dataset, processing_class, model, of_run)
        super().__init__(
            *(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes),
            *(callbacks, optimizers, quantization_config, peft_config, tools, rollout_func, environment_factory),
        )
        if not args.is_plain_grpo:
            self.reward_funcs = [score_once(func, i, lambda: self._batch) for i, func in enumerate(self.reward_funcs)]
        self._ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        self._caches = Caches.from_args(args, self.reward_funcs)
        self.kept_by_all = {type(kept).__name__: kept for kept in (*self.method.sources, self._caches)}

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in DEMONSTRATION_COLUMNS if name not in self._signature_columns]

    # 1. Mixed groups

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor | Any]:
        self._pending_extra_logs.clear()  # of a generation that was interrupted
        self._pending_metrics.clear()
        if self.args.is_plain_grpo:
            return super()._generate_and_score_completions(inputs)
        rows = [without_demonstrations(row) for row in inputs]
        self._batch = batch = MixedBatch(
            rows, self.num_generations, self.accelerator, self._caches, self.name_passes(), inputs, policy=self
        )
        try:
            if self.model.training:
                num_dropped = self.method.open_slots(batch, self.state.global_step)
                is_counted = float(self.accelerator.is_main_process)  # the batch once, where processes are summed
                if self.method.sources:
                    self.running_metrics.add("demonstrations/dropped", num_dropped, is_counted)
            output = super()._generate_and_score_completions(rows)
            batch.is_solved = metrics.solves(batch.rewards, self.reward_weights)
            batch.add_to(output)
            if self.model.training:
                if self.method.makes_advantages:
                    self._replace_advantages(batch, output)
                self.method.finish(batch, output)
            return output
        finally:
            self._batch = None

    def _generate(self, prompts: list):
        result = super()._generate(prompts)
        if self._batch is not None and self._batch.is_waiting:
            self._replace_failures(self._batch, prompts, result)
        elif self._batch is not None and self._batch.is_mixed:
            # TRL has just described all completions; these are the same formulas over the policy's own.
            self._log_metrics(metrics.describe_rollouts(result[1], result[2], self._ends, self._batch), replace=True)
        return result

    def _replace_failures(self, batch: MixedBatch, prompts: list, generated: tuple):
        """
        Puts demonstrations, in place, into the groups whose rollouts have failed, in the slots that they take at other
        times: rollouts of a group are alike before they are scored, so that no choice is fairer.
        """
        prompt_ids, completion_ids, _, completions, logps, *_ = generated
        batch.rollout_rewards = super()._calculate_rewards(batch.rows, prompts, completions, completion_ids)
        rewards = metrics.weighted_sum(batch.rollout_rewards, self.reward_weights)
        batch.has_failed = self.method.when(rewards, self.num_generations)

        def score(completions, completion_ids):
            return super(LuffyTrainer, self)._calculate_rewards(batch.rows, prompts, completions, completion_ids)

        hinted = self.method.retry(batch, self, score, prompts, (prompt_ids, completion_ids, completions, logps))
        self.method.fill_slots(batch, self.state.global_step, batch.has_failed[batch.local].tolist(), hinted)
        self.replace_rollouts(prompts, *generated)

    # 2. Rewards and advantages

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        batch = self._batch
        if batch is None:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        scored = batch.rollout_rewards
        if scored is None or batch.is_replaced.any():
            scored = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            scored = batch.with_given_scores(scored)
        if batch.rollout_rewards is None:
            batch.rollout_rewards = scored.masked_fill(batch.is_demonstration.unsqueeze(1), torch.nan)
            batch.rewards = scored
        else:  # what was scored is not scored again
            batch.rewards = torch.where(batch.is_replaced.unsqueeze(1), scored, batch.rollout_rewards)
        described = metrics.describe_completions(completion_ids_list, self._ends, batch)
        # A column that a reward function logs under one of these names is the user's
        self._pending_extra_logs.update(described | self._pending_extra_logs | batch.extra_logs)
        self._pending_extra_logs["source"] = batch.sources
        return batch.rollout_rewards

    def _replace_advantages(self, batch: MixedBatch, output: dict[str, torch.Tensor | Any]):
        """Gives the rows of mixed groups their advantages, and the logs what TRL was not shown."""
        rewards = metrics.weighted_sum(batch.rewards, self.reward_weights)
        advantages = self.method.advantages(rewards, batch, self.scale_rewards)
        output["advantages"] = advantages[batch.local]

        # The deques of the completions table hold exactly one generation batch, so this replaces what TRL put there.
        for i, name in enumerate(self.reward_func_names):
            self._logs["rewards"][name].extend(batch.rewards[:, i].tolist())
        self._logs["advantages"].extend(advantages.tolist())
        self._log_metrics(metrics.describe_batch(batch, rewards, self.reward_weights.to(rewards.device)))
        if batch.is_mixed and self.scale_rewards != "batch":
            self._log_metrics(metrics.describe_rollout_rewards(batch, self.reward_weights), replace=True)
        if batch.is_mixed and "importance_sampling_ratio" in output:
            self._log_metrics(metrics.describe_sampling(output, self.accelerator), replace=True)

    # 3. Policy shaping

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor | Any]) -> torch.Tensor:
        if self.args.is_plain_grpo:
            return super()._compute_loss(model, inputs)  # with every loss and option that TRL has
        mode = "train" if self.model.training else "eval"
        step = self.state.global_step if mode == "train" else None
        mask = inputs["completion_mask"]
        logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            mask.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs[name] for name in OF_IMAGES if name in inputs},
        )
        tokens = TokenBatch.from_inputs(inputs, logps, entropies)
        num_means = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        updates = num_means / self.args.steps_per_generation if mode == "train" else 1.0
        denominators = Denominators.from_inputs(inputs, num_means, updates, self.accelerator.num_processes)
        loss, divisor, stats = self.method.objective(tokens, denominators, self.max_completion_length, step)
        policy_loss, loss = loss.detach(), loss / divisor
        if self._entropy_bonus_enabled:  # demonstration tokens included, as in the released code
            entropy = aggregate(entropies, tokens.mask, "bnpo", denominators, self.max_completion_length)
            loss = loss - self.entropy_coef * (entropy / denominators.num_means)
            stats["policy_loss"] = policy_loss
            if mode == "train" and self.accelerator.sync_gradients:
                stats["entropy_coef"] = self.entropy_coef
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / denominators.num_means
            stats["aux_loss"] = self.accelerator.gather_for_metrics(aux_loss).mean().item()
        self._log_metrics(
            metrics.add_micro_batch(self.running_metrics, inputs, tokens, stats, self.accelerator, mode), mode
        )
        return loss

    def _log_metrics(self, numbers: dict[str, float], mode: str = "train", replace: bool = False):
        """Appends to TRL's metrics, or overwrites what TRL has just appended."""
        for name, value in numbers.items():
            values = self._metrics[mode][name]
            values[-1 if replace else len(values) :] = [value]
