# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
LUFFY (arXiv 2504.14945) on TRL's GRPOTrainer. What differs from GRPO, in the order of a training step:

1. `_generate_and_score_completions` gives the first k slots of each group to demonstrations from the dataset.
2. `_generate_single_turn` samples the other G - k slots only, and puts the demonstrations' tokens between them. With
   `demonstration_policy="on_failure"` it samples all of them, and `_generate` replaces k in each group that fails.
3. `_calculate_rewards` scores both alike. TRL gets to see the rollouts' rewards only: its metrics skip what is NaN.
4. The advantages are those of the mixed group (`losses.group_advantages`).
5. `_prepare_inputs` cuts the sequences of an optimizer step into micro-batches by length (`batching`), and
   `training_step` runs as many of them as a token budget asks for.
6. `_compute_loss` shapes the ratio of demonstration tokens (`losses.mixed_policy_loss`); the rest of it (loss types,
   KL, entropy bonus, metrics) is TRL's, with every TRL metric taken over rollout tokens.

The metrics `demonstrations/*` and `on_policy/*` are kept as sums and divided when they are logged, so that processes
and micro-batches weigh as many tokens as they hold.

These are private methods of TRL 1.16, which is why luffy-trl pins its minor version.
"""

import atexit
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import (
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc
from trl.trainer.utils import get_config_model_id, nanmax, nanmin, nanstd

from .batching import (
    needs_position_ids,
    plan_micro_batches,
    rebatch,
    round_up,
    with_position_ids,
    without_padding,
)
from .checks import check_finite, check_machine, check_number_of_rows, check_reward_columns
from .demonstrations import (
    DEMONSTRATION_COLUMNS,
    Demonstration,
    choose_demonstrations,
    decode_completion,
    find_eos_token_ids,
    load_generation_config,
    tokenize_demonstrations,
)
from .losses import Shaping, group_advantages, importance_ratio, mixed_policy_loss, sft_coefficient
from .luffy_config import LuffyConfig
from .metrics import RunningMetrics, describe_groups, describe_lengths, describe_sampling
from .model_card import save_model_card
from .processes import OneStream, end_processes, locked
from .resuming import (
    ResumableRepeatSampler,
    find_last_checkpoint,
    forget_generation,
    load_generation,
    save_generation,
)


logger = get_logger(__name__)


class LuffyTrainer(GRPOTrainer):
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
            As in [`~trl.GRPOTrainer`], and with the traces: either a column `demonstrations`, a list of traces for
            each prompt, or TRL's prompt-completion format with one trace in `completion`. A trace is a string, or, with
            conversational prompts, a list with one assistant message. A row without a trace (an empty list or `None`)
            trains on rollouts alone.
        model, reward_funcs, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
        quantization_config, peft_config, tools, rollout_func, environment_factory:
            As in [`~trl.GRPOTrainer`]. The last three are refused together with demonstrations. `eval_dataset` is
            evaluated on the policy's own completions; demonstrations in it are not used.

    Raises:
        ValueError: If an option has no meaning with demonstrations, or a row of the dataset cannot be used. The
            message names the option, or the row and the field.
    """

    args: LuffyConfig
    _buffered_inputs: list[Any] | None  # TRL's micro-batches, or lists of them under a token budget

    _tag_names = ["trl", "luffy", "grpo"]
    _card_details: dict[str, Any] = {}
    _name = "LUFFY"
    _paper = {
        "title": "Learning to Reason under Off-Policy Guidance",
        "id": "2504.14945",
        "citation": """\
@article{yan2025learning,
    title        = {{Learning to Reason under Off-Policy Guidance}},
    author       = {Jianhao Yan and Yafu Li and Zican Hu and Zhi Wang and Ganqu Cui and Xiaoye Qu and Yu Cheng and Yue Zhang},
    year         = 2025,
    eprint       = {arXiv:2504.14945},
}""",
    }

    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: LuffyConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
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
        if args is None:
            args = LuffyConfig(f"{model_id.split('/')[-1]}-LUFFY")
        if not isinstance(args, LuffyConfig):
            raise ValueError(f"`args` must be a `LuffyConfig`, got `{type(args).__name__}`. It takes the same fields.")

        if not args.is_plain_grpo:
            refused = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
            for name, value in refused.items():
                if value:
                    raise ValueError(
                        f"`{name}` is not supported together with demonstrations: a trace from the dataset has not "
                        f"interacted with it. Remove `{name}`, or train plain GRPO (`num_demonstrations=0`, "
                        "`ratio_clipping='on_policy'`, `length_aware_batching=False`)."
                    )
        check_number_of_rows(train_dataset, args)
        if not args.is_plain_grpo:
            # Everything that can be wrong with the machine, the tokenizer and the data is found before a model is loaded.
            check_machine(args)
            check_reward_columns(reward_funcs, getattr(train_dataset, "column_names", None))
            load_options = {
                "revision": (args.model_init_kwargs or {}).get("revision"),
                "trust_remote_code": args.trust_remote_code,
            }
            if processing_class is None:
                processing_class = AutoProcessor.from_pretrained(
                    model_id, truncation_side="left", padding_side="left", **load_options
                )
            if isinstance(processing_class, ProcessorMixin):
                raise ValueError(
                    "`processing_class` is a multimodal processor, and image prompts are supported by plain GRPO only "
                    "(`num_demonstrations=0`, `ratio_clipping='on_policy'`, `length_aware_batching=False`). Pass "
                    "`processing_class=AutoTokenizer.from_pretrained(...)` to train on text."
                )
        if args.num_demonstrations > 0:
            if isinstance(model, str):
                generation_config = load_generation_config(model_id, **load_options)
            else:
                generation_config = model.generation_config
            train_dataset = tokenize_demonstrations(
                train_dataset,
                processing_class,
                find_eos_token_ids(processing_class, generation_config),
                max_length=args.max_completion_length,
                overflow=args.demonstration_overflow,
                chat_template_kwargs=args.chat_template_kwargs,
            )

        # Rows are loaded anew for each micro-batch, and traces are needed once for each generation.
        self._traces: Dataset | None = None
        if args.num_demonstrations > 0 and isinstance(train_dataset, Dataset):
            self._traces = train_dataset.select_columns(list(DEMONSTRATION_COLUMNS))
            train_dataset = train_dataset.remove_columns(list(DEMONSTRATION_COLUMNS.keys() - {"demonstration_row"}))

        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        if args.length_aware_batching and self.aux_loss_enabled:
            raise ValueError(
                "`length_aware_batching=True` makes micro-batches of unlike size, over which the load-balancing loss of a "
                "mixture of experts has no mean. Set `length_aware_batching=False`, or leave that loss out with "
                "`output_router_logits=False` in the model's config."
            )
        unwrapped_model = self.accelerator.unwrap_model(self.model)
        self._needs_position_ids = not args.is_plain_grpo and needs_position_ids(unwrapped_model)
        attention = unwrapped_model.config._attn_implementation
        if args.padding_free and "flash" not in (attention or ""):
            logger.warning(
                f"`padding_free=True` is made for flash attention, and the model has {attention!r}: the numbers are the "
                "same, but it masks the long row in full. Set `attn_implementation` in `model_init_kwargs`, or "
                "`padding_free=False`."
            )
        scores_unevenly = args.demonstration_policy == "on_failure" or args.cache_demonstration_rewards
        if scores_unevenly and self._is_sharded:
            reward_models = [
                name
                for name, func in zip(self.reward_func_names, self.reward_funcs, strict=True)
                if isinstance(func, nn.Module)
            ]
            if reward_models:
                raise ValueError(
                    f"`reward_funcs` has the model {reward_models[0]!r}, which is sharded: all processes have to score "
                    "together, and with `demonstration_policy='on_failure'` or `cache_demonstration_rewards=True` they "
                    "score different numbers of rows. Use DDP or ZeRO-2, a reward function, or neither of the options."
                )
        self._loss_options: dict[str, Any] = {
            "shaping": Shaping(
                args.policy_shaping,
                gamma=args.policy_shaping_gamma,
                power=args.policy_shaping_power,
                weight=args.policy_shaping_weight,
            ),
            "on_policy_shaping": Shaping(
                args.on_policy_shaping,
                gamma=args.on_policy_shaping_gamma,
                power=args.on_policy_shaping_power,
                weight=args.on_policy_shaping_weight,
            ),
            "clip_range": (1 - self.epsilon_low, 1 + self.epsilon_high)
            if args.ratio_clipping == "on_policy"
            else None,
            "ratio_range": (args.demonstration_ratio_min, args.demonstration_ratio_max),
            "max_token_prob": args.max_token_prob,
        }
        self._sft_coefficient = partial(
            sft_coefficient,
            peak=args.sft_loss_coef,
            minimum=args.sft_loss_coef_min,
            warmup_steps=args.sft_loss_coef_warmup_steps,
            decay_steps=args.sft_loss_coef_decay_steps,
        )
        self._running_metrics = RunningMetrics(self.accelerator.device)
        # State of the generation batch at hand: the demonstration of each local row (or None), and over all processes
        # which rows are local, how many demonstration tokens rows have, which have any, and what rewards rows and
        # rollouts got: these differ where rollouts were sampled and replaced.
        self._demonstrations: list[Demonstration | None] = []
        self._local_rows = slice(0)
        self._demonstration_lengths: torch.Tensor | None = None
        self._is_demonstration: torch.Tensor | None = None
        self._has_behavior_logps = False
        self._rewards_per_func: torch.Tensor | None = None
        self._rollout_rewards_per_func: torch.Tensor | None = None
        self._has_old_pass = False  # whether the next pass over a generation batch is that of pi_old
        # What is computed once for each trace, by `Demonstration.trace`
        self._reward_cache: dict[tuple[int, int], torch.Tensor] = {}
        self._ref_logps_cache: dict[tuple[int, int], torch.Tensor] = {}
        # With `demonstration_policy="on_failure"`: the rows of the batch, and what each would show if its group fails.
        self._fallback: tuple[list[dict[str, Any]], list[Demonstration | None]] | None = None

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in DEMONSTRATION_COLUMNS if name not in self._signature_columns]

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """
        As in [`~transformers.Trainer`], but that `resume_from_checkpoint=True` passes over a checkpoint that was not
        written to its end, and that a resumed run continues within a generation batch.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Path of a checkpoint, or `True` for the last one in `args.output_dir`.
            trial, ignore_keys_for_eval:
                As in [`~transformers.Trainer`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: The result.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`output_dir` {self.args.output_dir!r} has no complete checkpoint to resume from. Train without "
                    "`resume_from_checkpoint`, or give the path of one."
                )
        forget_generation(self)
        with locked(self.args.output_dir):
            result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
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

    def _get_train_sampler(self, dataset: Dataset | None = None) -> ResumableRepeatSampler:
        sampler = super()._get_train_sampler(dataset)
        return ResumableRepeatSampler(
            data_source=sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            count_epochs=lambda: int(self.state.epoch or 0),
        )

    def _save_checkpoint(self, model, trial):
        if not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_generation(self, folder)
        super()._save_checkpoint(model, trial)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        result = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            if self.state.global_step >= max_steps:
                raise ValueError(
                    f"{resume_from_checkpoint} has made {self.state.global_step} updates, and the run has {max_steps}: "
                    "nothing is left to train. Raise `max_steps` or `num_train_epochs`, or use the checkpoint as it is."
                )
            load_generation(self, Path(resume_from_checkpoint))
        return result

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.args.max_tokens_per_microbatch is None:
            return super().training_step(model, inputs, num_items_in_batch)
        # Under a token budget, the last of the calls for an optimizer step makes all of its passes, and syncs gradients
        # in the last of these.
        started = time.perf_counter()
        model.train()
        micro_batches = self._prepare_inputs(inputs)
        loss = torch.zeros((), device=self.accelerator.device)
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED  # has its own way to wait
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
                )
                # One for each call of `training_step`; under a token budget, all for the last one
                self._buffered_inputs += (
                    micro_batches if max_tokens is None else [[] for _ in range(num_calls - 1)] + [micro_batches]
                )
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
        # Old or reference log-probs, over the whole generation batch
        num_prompt_tokens = input_ids.size(1) - logits_to_keep
        masks = attention_mask.split([num_prompt_tokens, logits_to_keep], dim=1)
        lengths = round_up(torch.stack([mask.sum(1) for mask in masks], dim=1), self.pad_to_multiple_of).cpu()
        lengths = lengths.minimum(torch.tensor([num_prompt_tokens, logits_to_keep]))
        is_reference, self._has_old_pass = not self._has_old_pass, False
        known = self._find_known_logps(is_reference)
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
        # Forward passes of a sharded model are joint work: all processes make as many, over known rows where need be
        num_batches = int(self.accelerator.gather(torch.tensor(num_batches, device=input_ids.device)).max())
        rows = rows[: max(num_rows, num_batches)]
        prompts, completions = lengths[rows].T.tolist()
        plan = plan_micro_batches(prompts, completions, max_tokens, num_batches, padding_free=self.args.padding_free)
        all_logps = torch.zeros(masks[1].shape, device=input_ids.device)
        for numbers in plan:
            chunk = [rows[number] for number in numbers]
            prompt, completion = lengths[chunk].amax(0).tolist()
            columns = slice(num_prompt_tokens - prompt, num_prompt_tokens + completion)
            logps, _, _ = super()._get_per_token_logps_and_entropies(
                model, input_ids[chunk, columns], attention_mask[chunk, columns], completion
            )
            all_logps[chunk, :completion] = logps.float()
        for row, trace in enumerate(self._whole_traces):
            if known[row] is not None:
                all_logps[row, : len(known[row])] = known[row].to(all_logps.device)
            elif is_reference and trace and self.args.cache_demonstration_ref_logps:
                self._ref_logps_cache[trace] = all_logps[row, : len(self._demonstrations[row].ids)].cpu()
        return all_logps, None, None

    def _find_known_logps(self, is_reference: bool) -> list[torch.Tensor | None]:
        """For each local row, the log-probs that need no forward pass: none of a demonstration are used as old ones."""
        if is_reference:
            return [self._ref_logps_cache.get(trace) for trace in self._whole_traces]
        return [None if trace is None else torch.zeros(0) for trace in self._whole_traces]

    @property
    def _whole_traces(self) -> list[tuple[int, int] | None]:
        """For each local row that shows a whole trace, which one."""
        return [shown.trace if shown and shown.is_complete else None for shown in self._demonstrations]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor | Any]:
        mode = "train" if self.model.training else "eval"
        device = self.accelerator.device
        self._fallback = None  # an interrupted generation may have left its own
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        first_row = self.accelerator.process_index * len(inputs)  # groups span processes
        self._local_rows = slice(first_row, first_row + len(inputs))
        is_used = mode == "train" and self.args.num_demonstrations > 0
        nothing: list[Demonstration | None] = [None] * len(inputs)
        chosen = self._choose_demonstrations(inputs) if is_used else nothing
        inputs = [{key: value for key, value in row.items() if key not in DEMONSTRATION_COLUMNS} for row in inputs]
        if is_used and self.args.demonstration_policy == "on_failure":
            self._fallback = inputs, chosen
            chosen = nothing  # until the rollouts have failed
        self._show(chosen)
        self._rewards_per_func = None
        # TRL computes old log-probs where updates lag behind generation, and then those of the reference
        generate_every = self.args.steps_per_generation * self.num_iterations
        self._has_old_pass = self.args.gradient_accumulation_steps % generate_every != 0 or (
            self.use_vllm and self.vllm_importance_sampling_correction
        )
        output = super()._generate_and_score_completions(inputs)

        positions = torch.arange(output["completion_ids"].size(1), device=device)
        output["demonstration_mask"] = positions < self._demonstration_lengths[self._local_rows].unsqueeze(1)
        output["num_demonstration_tokens"] = self._demonstration_lengths.sum()
        if self._has_behavior_logps:
            output["behavior_logps"] = torch.zeros_like(output["completion_ids"], dtype=torch.float32)
            for i, shown in enumerate(self._demonstrations):
                if shown and shown.logps:
                    output["behavior_logps"][i, : len(shown.logps)] = torch.tensor(shown.logps, device=device)
        if is_used:
            self._replace_advantages(output)
        weights = self.args.demonstration_advantage_weight, self.args.rollout_advantage_weight
        if mode == "train" and weights != (1.0, 1.0):
            per_token_weights = torch.where(output["demonstration_mask"], *weights)
            output["advantages"] = output["advantages"].unsqueeze(1) * per_token_weights
        return output

    def _choose_demonstrations(self, inputs: list[dict[str, Any]]) -> list[Demonstration | None]:
        """Decides for each row of the generation batch whether, and what, it shows of a trace."""
        demonstrations, num_dropped = [], 0
        if self._traces is not None:
            traces = {number: self._traces[number] for number in {row["demonstration_row"] for row in inputs}}
            inputs = [traces[row["demonstration_row"]] for row in inputs]
        for i, row in enumerate(inputs):
            slot = (self._local_rows.start + i) % self.num_generations
            chosen = choose_demonstrations(row, self.args, self.state.global_step)
            demonstrations.append(chosen[slot] if slot < len(chosen) else None)
            if slot == 0:
                num_dropped += row["demonstrations_dropped"]
        # The batch is counted once, where processes are summed
        self._running_metrics.add("demonstrations/dropped", num_dropped, float(self.accelerator.is_main_process))
        return demonstrations

    def _show(self, demonstrations: list[Demonstration | None]):
        """Sets the demonstrations of the local rows, and what all processes know of each other's."""
        self._demonstrations = demonstrations
        known = [(len(shown.ids), bool(shown.logps)) if shown else (0, False) for shown in demonstrations]
        known = self.accelerator.gather(torch.tensor(known, device=self.accelerator.device))
        self._demonstration_lengths, self._has_behavior_logps = known[:, 0], bool(known[:, 1].any())
        self._is_demonstration = self._demonstration_lengths > 0

    def _replace_advantages(self, output: dict[str, torch.Tensor | Any]):
        """Gives the rows of mixed groups their advantages, and the logs what TRL was not shown."""
        rewards_per_func = self._rewards_per_func
        rewards = self._weigh(rewards_per_func)
        rollout_rewards = self._weigh(self._rollout_rewards_per_func)
        advantages = group_advantages(
            rewards,
            self.num_generations,
            self._is_demonstration,
            baseline=self.args.advantage_baseline,
            scale=self.scale_rewards,
        )
        output["advantages"] = advantages[self._local_rows]

        # The deques of the completions table hold exactly one generation batch, so this replaces what TRL put there.
        for i, name in enumerate(self.reward_func_names):
            self._logs["rewards"][name].extend(rewards_per_func[:, i].tolist())
        self._logs["advantages"].extend(advantages.tolist())
        self._log_group_metrics(rewards, rollout_rewards)
        if self._is_demonstration.any():
            self._describe_rollouts_only(rollout_rewards, output)

    def _weigh(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        """The sum of the reward functions' rewards, by their weights; NaN for a row that none applies to."""
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device).unsqueeze(0)).nansum(dim=1)
        return rewards.masked_fill(torch.isnan(rewards_per_func).all(dim=1), torch.nan)

    def _log_group_metrics(self, rewards: torch.Tensor, rollout_rewards: torch.Tensor):
        """Metrics of the generation batch that every process can compute from what has been gathered anyway."""
        metrics = self._metrics["train"]
        if self._is_demonstration.any():
            demonstration_reward = rewards[self._is_demonstration].nanmean().item()
            metrics["demonstrations/reward"].append(demonstration_reward)
            if demonstration_reward <= 0 and not (rewards > 0)[self._is_demonstration].any():
                logger.warning_once(
                    "No demonstration of a generation batch earns a reward: the policy learns to avoid them. See why with "
                    "`luffy inspect`; most often the reward wants a form of answer that the traces do not have."
                )
            lengths = self._demonstration_lengths[self._is_demonstration]
            metrics["demonstrations/length"].append(lengths.float().mean().item())
        # A rollout solves its problem where it earns 1 from each reward function that applies to it. Rows that no
        # function scores have no say.
        full_rewards = (~self._rollout_rewards_per_func.isnan() * self.reward_weights.to(rewards.device)).sum(dim=1)
        for name, value in describe_groups(rollout_rewards, full_rewards, self.num_generations).items():
            metrics[name].append(value)

    def _describe_rollouts_only(self, rollout_rewards: torch.Tensor, output: dict[str, torch.Tensor | Any]):
        """Replaces the metrics of TRL for which it is not enough that demonstrations have the reward NaN."""
        metrics = self._metrics["train"]
        if self.scale_rewards != "batch":
            groups = rollout_rewards.view(-1, self.num_generations)
            is_single = (~groups.isnan()).sum(dim=1) == 1  # a single rollout does not differ from itself
            std = nanstd(groups, dim=1).masked_fill(is_single, 0.0)
            metrics["frac_reward_zero_std"][-1] = torch.isclose(std, torch.zeros_like(std)).float().mean().item()

        if "importance_sampling_ratio" in output:
            for name, value in describe_sampling(output, self.accelerator).items():
                metrics[name][-1] = value

    def _generate(self, prompts: list):
        result = super()._generate(prompts)
        if self._fallback is not None:
            self._replace_failures(prompts, *result[:2], *result[3:5])
        elif self._is_demonstration.any():
            # TRL has just described all completions; these are the same formulas over the policy's own.
            metrics = self._metrics["train"]
            completion_ids = result[1]
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            described = torch.tensor([[len(ids), ids[-1] not in ends] for ids in completion_ids])
            lengths, is_truncated = self.accelerator.gather(described.to(self.accelerator.device)).T
            is_rollout = ~self._is_demonstration
            for name, value in describe_lengths(lengths[is_rollout], is_truncated[is_rollout].bool()).items():
                metrics[name][-1] = value
        return result

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if not self._is_demonstration.any():
            with self._naming_a_lost_server():
                return super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, has_tool_images
                )

        # A rollout follows the prompt, and what follows a partial demonstration its prefix.
        shown = self._demonstrations
        sampled = [i for i in range(len(prompt_ids)) if shown[i] is None or not shown[i].is_complete]
        completion_ids = [list(demonstration.ids) if demonstration else [] for demonstration in shown]
        # No sampler gave a demonstration log-probs: `None` becomes an importance-sampling ratio of exactly 1.
        logps = [[None] * len(ids) for ids in completion_ids] if self.use_vllm else None
        self._continue(prompt_ids, completion_ids, logps, sampled)
        return completion_ids, logps

    def _continue(self, prompt_ids, completion_ids, logps, sampled: list[int]):
        """Samples what follows the completions of some rows, up to the budget of a row, in place."""
        sampled_prompt_ids = [prompt_ids[i] + completion_ids[i] for i in sampled]
        sampled_ids: list[list[int]] = []
        if self.use_vllm:
            with self._naming_a_lost_server():
                sampled_ids, sampled_logps = self._generate_rollouts_with_vllm(sampled_prompt_ids, prompt_ids[0])
        elif sampled:
            sampled_ids, _ = super()._generate_single_turn(sampled_prompt_ids, None, {}, self.num_generations)
        elif self._is_sharded:
            # Sharded models generate together: a process without rollouts has to take part, or the others hang.
            super()._generate_single_turn(prompt_ids[:1], None, {}, self.num_generations)

        for number, i in enumerate(sampled):
            budget = self.max_completion_length - len(completion_ids[i])
            completion_ids[i] += sampled_ids[number][:budget]
            if self.use_vllm:
                logps[i] += sampled_logps[number][:budget]

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
        """Whether a forward pass of a model is a joint work of all processes."""
        plugin = self.accelerator.state.deepspeed_plugin
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def _generate_rollouts_with_vllm(
        self, prompt_ids: list[list[int]], spare_prompt_ids: list[int]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """
        Samples one completion for each prompt where processes hold different numbers of prompts.

        TRL's vLLM client gives each process the slice of completions that it would own if all of them held as many
        prompts, in runs of `num_generations`. So one process passes the prompts of all and the others none, and then
        each takes its own. Where a colocated engine has nothing to sample, it samples the spare prompt for nothing:
        only after generating does it go to sleep and meet the barriers that other engines wait at.
        """
        is_server = self.vllm_mode == "server"
        if not is_server and self.vllm_generation.tensor_parallel_size == 1:
            result = super()._generate_single_turn(prompt_ids or [spare_prompt_ids], None, {}, 1)
            return result if prompt_ids else ([], [])

        group = None if is_server else self.vllm_generation.tp_group
        if is_server:
            prompts_of_rank = gather_object([prompt_ids])
            rank = self.accelerator.process_index
        else:
            prompts_of_rank = [None] * self.vllm_generation.tensor_parallel_size
            torch.distributed.all_gather_object(prompts_of_rank, prompt_ids, group=group)
            rank = torch.distributed.get_rank(group=group)
        all_prompts = [ids for prompts in prompts_of_rank for ids in prompts] or [spare_prompt_ids]

        # Where every group has as many rollouts, the server samples them from one request per prompt.
        run = self.num_generations - self.args.num_demonstrations
        in_runs = len(all_prompts) % run == 0 and all(
            ids == all_prompts[i - i % run] for i, ids in enumerate(all_prompts)
        )
        result = super()._generate_single_turn(
            all_prompts if rank == 0 else [], None, {}, run if is_server and in_runs else 1
        )
        if is_server:
            result = broadcast_object_list([result], from_process=0)[0]
        else:
            results = [None] * len(prompts_of_rank)
            torch.distributed.all_gather_object(results, result, group=group)
            result = results[0]
        start = sum(len(prompts) for prompts in prompts_of_rank[:rank])
        return tuple(values[start : start + len(prompt_ids)] for values in result)

    def _replace_failures(self, prompts, prompt_ids, completion_ids, completions, logps):
        """
        Puts demonstrations, in place, into the groups whose rollouts have failed (`demonstration_policy="on_failure"`).

        They take the slots that they would have taken from the start: rollouts of a group are alike before they are
        scored, so that no choice is fairer. What has been scored is not scored again.
        """
        (inputs, chosen), self._fallback = self._fallback, None
        rollout_rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        self._rollout_rewards_per_func = self._rewards_per_func = rollout_rewards_per_func
        mean_rewards = self._weigh(rollout_rewards_per_func).view(-1, self.num_generations).nanmean(dim=1)
        has_failed = (mean_rewards <= self.args.failure_threshold).repeat_interleave(self.num_generations)
        has_failed = has_failed[self._local_rows].tolist()
        self._show([shown if failed else None for shown, failed in zip(chosen, has_failed, strict=True)])
        if not self._is_demonstration.any():
            return

        replaced = [i for i, shown in enumerate(self._demonstrations) if shown]
        for i in replaced:
            completion_ids[i] = list(self._demonstrations[i].ids)
            if self.use_vllm:
                logps[i] = [None] * len(completion_ids[i])
        prefixes = [i for i in replaced if not self._demonstrations[i].is_complete]
        if any(gather_object([len(prefixes)])):
            self._continue(prompt_ids, completion_ids, logps, prefixes)
        for i in replaced:
            completions[i] = decode_completion(self._tokenizer, prompts[i], prompt_ids[i], completion_ids[i])

        rewards_per_func = rollout_rewards_per_func[self._local_rows].clone()
        self._score(replaced, rewards_per_func, inputs, prompts, completions, completion_ids)
        self._rewards_per_func = self.accelerator.gather(rewards_per_func)

    def _score(self, rows: list[int], rewards_per_func: torch.Tensor, *batch: list):
        """Scores some local rows of what `_calculate_rewards` takes, into `rewards_per_func` of shape `(B, F)`."""
        traces = self._whole_traces
        for row in rows:
            if traces[row] in self._reward_cache:
                rewards_per_func[row] = self._reward_cache[traces[row]]
        rows = [row for row in rows if traces[row] not in self._reward_cache]
        if not rows:
            return
        extra_logs = {column: list(values) for column, values in self._pending_extra_logs.items()}
        self._pending_extra_logs.clear()
        # Processes score different numbers of rows, so that TRL must not gather what it has scored.
        with patch.object(grpo_trainer, "gather", lambda rewards: rewards):
            rewards_per_func[rows] = super()._calculate_rewards(*([values[row] for row in rows] for values in batch))
        for column, values in self._pending_extra_logs.items():
            extra_logs.setdefault(column, [None] * len(batch[0]))
            for row, value in zip(rows, values, strict=True):
                extra_logs[column][row] = value
        self._pending_extra_logs.update(extra_logs)
        if self.args.cache_demonstration_rewards:
            self._reward_cache |= {traces[row]: rewards_per_func[row].clone() for row in rows if traces[row]}

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # TRL makes its metrics from what this returns: the rewards of rollouts, and NaN, which they skip, for rows that
        # never were one. The advantages that it makes too are replaced, from the rewards that are kept here.
        if self._rewards_per_func is None:
            batch = inputs, prompts, completions, completion_ids_list
            if self.args.cache_demonstration_rewards:
                rewards_per_func = torch.zeros(len(prompts), len(self.reward_funcs), device=self.accelerator.device)
                self._score(list(range(len(prompts))), rewards_per_func, *batch)
                self._rewards_per_func = self.accelerator.gather(rewards_per_func)
            else:
                self._rewards_per_func = super()._calculate_rewards(*batch)
            self._rollout_rewards_per_func = self._rewards_per_func.masked_fill(
                self._is_demonstration.unsqueeze(1), torch.nan
            )
        self._pending_extra_logs["source"] = [
            "rollout" if shown is None else "demonstration" if shown.is_complete else "prefix"
            for shown in self._demonstrations
        ]
        return self._rollout_rewards_per_func

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor | Any]) -> torch.Tensor:
        if self.args.is_plain_grpo:
            return super()._compute_loss(model, inputs)  # plain GRPO, with every loss and option that TRL has

        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"]
        demonstration_mask = inputs["demonstration_mask"] & mask.bool()
        rollout_mask = mask * ~demonstration_mask
        per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            mask.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        old_per_token_logps = inputs.get("old_per_token_logps")
        old_per_token_logps = per_token_logps.detach() if old_per_token_logps is None else old_per_token_logps
        ratio = importance_ratio(
            per_token_logps, old_per_token_logps, demonstration_mask, inputs.get("behavior_logps")
        )
        rollout_means = {"entropy": entropies}
        if self.beta != 0.0:
            ref_per_token_logps = inputs["ref_per_token_logps"]
            per_token_kl = (
                torch.exp(ref_per_token_logps - per_token_logps) - (ref_per_token_logps - per_token_logps) - 1
            )
            if self.args.use_bias_correction_kl:
                # The correction turns samples of pi_old into samples of pi_theta. A demonstration is neither.
                per_token_kl = per_token_kl * torch.where(demonstration_mask, torch.ones_like(ratio), ratio)
            rollout_means["kl"] = per_token_kl

        is_sft = self.args.demonstration_loss == "sft"
        per_token_loss, stats = mixed_policy_loss(
            per_token_logps,
            old_per_token_logps,
            inputs["advantages"],
            rollout_mask if is_sft else mask,
            demonstration_mask,
            ratio=ratio,
            **self._loss_options,
        )
        if "importance_sampling_ratio" in inputs:
            # A ratio per sequence speaks of what was sampled, and not of the prefix that it continues
            corrected_loss = per_token_loss * inputs["importance_sampling_ratio"]
            per_token_loss = torch.where(demonstration_mask, per_token_loss, corrected_loss)
        if mode == "train":
            metrics = self._running_metrics
            demonstration_loss = -per_token_logps if is_sft else per_token_loss
            metrics.add_tokens("demonstrations/loss", demonstration_loss, demonstration_mask)
            metrics.add_tokens("demonstrations/prob", per_token_logps.exp(), demonstration_mask)
            metrics.add_tokens("demonstrations/ratio", stats["coefficient"], demonstration_mask)
            metrics.add_tokens("demonstrations/fraction", demonstration_mask, mask)
            metrics.add_tokens("on_policy/loss", per_token_loss, rollout_mask)
        if self.beta != 0.0:
            per_token_loss = per_token_loss + self.beta * per_token_kl

        # The denominators are TRL's: demonstrations are completions of the batch like any other.
        accumulation_steps = self.current_gradient_accumulation_steps if mode == "train" else 1.0

        def per_update(num_tokens):
            """The share of one update and process in the tokens of the generation batch."""
            num_tokens = num_tokens.clamp(min=1.0) / self.accelerator.num_processes
            return num_tokens * accumulation_steps / self.args.steps_per_generation if mode == "train" else num_tokens

        num_means = accumulation_steps  # TRL averages what it takes over micro-batches
        num_sequences, num_tokens = mask.size(0), mask.sum().clamp(min=1.0)
        if "num_sequences" in inputs:  # micro-batches are unlike, and divide by what the optimizer step has in all
            num_means, num_sequences, num_tokens = 1.0, inputs["num_sequences"], inputs["num_tokens"].clamp(min=1.0)
        normalizer = 1.0 if self.loss_type == "dapo" else num_means  # "dapo" has it in its denominator
        if self.loss_type == "grpo":
            loss = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).sum() / num_sequences
        elif self.loss_type == "bnpo":
            loss = (per_token_loss * mask).sum() / num_tokens
        elif self.loss_type == "dr_grpo":
            loss = (per_token_loss * mask).sum() / (num_sequences * self.max_completion_length)
        else:  # "dapo"
            loss = (per_token_loss * mask).sum() / per_update(inputs["num_items_in_batch"])
        if is_sft and mode == "train":  # the mean over the demonstration tokens of the update
            sft_loss = -per_token_logps * demonstration_mask
            if self.args.sft_token_weight == "chord":
                probs = per_token_logps.detach().exp()
                sft_loss = sft_loss * probs * (1 - probs)
            sft_loss = sft_loss.sum() / per_update(inputs["num_demonstration_tokens"])
            coefficient = self._sft_coefficient(self.state.global_step)
            self._metrics["train"]["sft_loss_coef"].append(coefficient)
            if self.args.sft_loss_combination == "interpolate":
                loss = (1 - coefficient) * loss
            loss = loss + coefficient * sft_loss * normalizer
        policy_loss = loss.detach()
        loss = loss / normalizer

        is_summed = "num_sequences" in inputs
        if self._entropy_bonus_enabled:  # demonstration tokens included, as in the released code
            entropy_loss = (entropies * mask).sum() / num_tokens / num_means
            loss = loss - self.entropy_coef * entropy_loss
            if is_summed:
                self._running_metrics.add("policy_loss", policy_loss, mask.size(0) / num_sequences)
            else:
                self._metrics[mode]["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
            if mode == "train" and self.accelerator.sync_gradients:
                self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation_steps
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())

        rollout_means |= {
            "clip_ratio/low_mean": stats["low_clipped"].float(),
            "clip_ratio/high_mean": stats["high_clipped"].float(),
            "clip_ratio/region_mean": (stats["low_clipped"] | stats["high_clipped"]).float(),
        }
        # NaN for a demonstration, and left out. Processes may hold different numbers of rows.
        lows, highs = (
            (stats[name] * rollout_mask).sum(-1) / rollout_mask.sum(-1) for name in ("low_clipped", "high_clipped")
        )
        extremes = torch.stack([nanmin(lows), nanmax(highs)])
        if is_summed:
            for name, values in rollout_means.items():
                self._running_metrics.add_tokens(name, values, rollout_mask)
            self._running_metrics.add_clip_extremes(extremes)
        else:
            self._log_rollout_means(mode, rollout_means, extremes, rollout_mask, mask)
        return loss

    def _log_rollout_means(self, mode, means, clip_extremes, rollout_mask, mask):
        """TRL's metrics of one of its micro-batches, over rollout tokens."""
        sums = [(values.detach() * rollout_mask).sum() for values in means.values()]
        counts = [rollout_mask.sum().float(), mask.sum().float()]
        *totals, num_rollout_tokens, num_tokens = self.accelerator.reduce(torch.stack([*sums, *counts]), "sum")
        if num_rollout_tokens == 0 and num_tokens > 0:
            return  # only demonstrations in this micro-batch, on any process
        for name, total in zip(means, totals, strict=True):
            self._metrics[mode][name].append((total / num_rollout_tokens.clamp(min=1.0)).item())
        extremes = self.accelerator.gather(clip_extremes).view(-1, 2)
        self._metrics[mode]["clip_ratio/low_min"].append(nanmin(extremes[:, 0]).item())
        self._metrics[mode]["clip_ratio/high_max"].append(nanmax(extremes[:, 1]).item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            for name, value in self._running_metrics.collect(self.accelerator).items():
                self._metrics["train"][name].append(value)
        super().log(logs, start_time)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.is_world_process_zero():
            # PEFT's own card, whose base model the Hub refuses if it is a local folder
            (Path(checkpoint_folder) / "README.md").unlink(missing_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self):
        super()._finish_current_push()
        push = getattr(self, "push_in_progress", None)
        # Checkpoints are pushed in the background, where an error is seen by nobody.
        for job in [] if push is None else push.jobs:
            if error := job.exception():
                logger.warning(
                    f"The push of a checkpoint failed. All files are in {self.args.output_dir}, and "
                    f"`trainer.push_to_hub()` pushes them. The error was: {error}"
                )
        self.push_in_progress = None

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ):
        """
        Writes the model card, `README.md` in the output folder: method, data, recipe, curves, results of the evaluation,
        versions and citations. `dataset_name` and `tags` hold for later cards too, such as those of checkpoints.

        Args:
            model_name (`str`, *optional*):
                Name of the model.
            dataset_name (`str`, *optional*):
                Name of the dataset used for training. If it is on the Hub, the metadata name it too.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        details = {"dataset_name": dataset_name, "tags": tags}
        self._card_details = {**self._card_details, **{name: value for name, value in details.items() if value}}
        if self.is_world_process_zero():
            save_model_card(self, model_name, **self._card_details)
