# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import copy
from dataclasses import dataclass
from typing import Any, Literal

from trl import GRPOConfig

from .config_rules import check_numbers_of_trl, check_options
from .losses import Baseline, ShapingKind
from .options import described, explained_arguments
from .redaction import without_credentials


@described
@dataclass
class LuffyConfig(GRPOConfig):
    r"""
    Configuration class for the [`LuffyTrainer`].

    It has every parameter of [`~trl.GRPOConfig`], changes three defaults to those of LUFFY's objective (`loss_type`,
    `scale_rewards` and, as in TRL, `beta=0.0`), and adds the ones below. Batch sizes, schedules and optimizer settings
    of the paper are not defaults; they are in `examples/configs/qwen2.5_math_7b.yaml`.

    `num_demonstrations=0` together with `ratio_clipping="on_policy"` and `length_aware_batching=False` is plain GRPO,
    whatever TRL option is set.

    The first paragraph of each option is its `--help`.

    Parameters:
        loss_type (`str`, *optional*, defaults to `"dr_grpo"`):
            Loss type, as in GRPOConfig. With demonstrations, one of `"dr_grpo"` (no length normalisation, section 3.2
            of the paper), `"grpo"`, `"bnpo"` or `"dapo"`.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            What advantages are divided by, as in GRPOConfig. The paper does not divide them by the standard deviation
            (section 3.2).

        > Demonstrations

        num_demonstrations (`int`, *optional*, defaults to `1`):
            How many of the `num_generations` completions of a group are demonstrations from the dataset. They replace
            rollouts: G - k completions are generated. A row with fewer traces uses what it has; one with more uses k
            of them, drawn again at each step. 0 trains on rollouts alone.

            It is k of the paper, and `n_prefix` of the released code.
        demonstration_policy (`str`, *optional*, defaults to `"always"`):
            `"always"` gives demonstrations their slots before anything is generated. `"on_failure"` samples all G
            completions, and replaces k of them in groups whose mean reward is at most `failure_threshold`; the other
            groups are pure GRPO.

            `"on_failure"` costs the generation of what is replaced, and saves demonstrations that the policy no longer
            needs (`add_tgt_with_acc` and `add_full_target_when_none` of the released code).
        failure_threshold (`float`, *optional*, defaults to `0.0`):
            Maximum mean reward of a group that has failed, of `demonstration_policy="on_failure"`.
        demonstration_probability (`float`, *optional*, defaults to `1.0`):
            Probability with which a row shows its demonstrations at a step; otherwise it trains on rollouts alone.

            It is `sample_target_ratio` of the released code.
        demonstration_overflow (`str`, *optional*, defaults to `"drop"`):
            What happens to a trace of more than `max_completion_length` tokens: `"drop"` leaves it out (the metric
            `demonstrations/dropped` counts it), `"truncate"` cuts it and appends no end-of-sequence token, `"error"`
            raises a ValueError that names the row.
        demonstration_choice (`str`, *optional*, defaults to `"random"`):
            Which traces of a row with more than `num_demonstrations` are shown: `"random"` draws them at each step,
            `"comprehension"` takes those after which the policy gives the gold answer the highest mean probability.

            `"comprehension"` is AMPO's. It needs a column `answer` or `solution`, and costs a forward pass over each
            trace of such a row.
        demonstration_max_steps (`int`, *optional*):
            Number of updates after which no trace of the dataset is shown. None shows them always.

            With replay, the first updates are LUFFY and the others ExGRPO.
        failed_rollouts (`str`, *optional*, defaults to `"keep"`):
            What rollouts of failed groups do in the loss, of `demonstration_policy="on_failure"`: `"keep"` gives them
            their advantages, `"drop"` an advantage of 0.

            `"drop"` is HPT's (arXiv 2509.04419): such a group learns from its trace alone.

        > Loss

        objective (`str`, *optional*, defaults to `"luffy"`):
            What is minimised: the policy gradient of `"luffy"`, or the loss of `"rl_plus"`, `"srft"` or `"oapl"`.

            See [`~luffy_trl.methods.rl_plus.RLPlus`] (arXiv 2508.00222), [`~luffy_trl.methods.srft.SRFT`] (arXiv
            2506.19767) and [`~luffy_trl.methods.oapl.OAPL`] (arXiv 2602.19362).
        policy_shaping (`str`, *optional*, defaults to `"regularized"`):
            Shaping f of the ratio r of demonstration tokens (section 3.3): `"regularized"` is r / (r + gamma), which
            gives improbable tokens more weight; `"none"` is r itself. `"sqrt"`, `"power"`, `"log"` and `"linear_log"`
            are the further ones of the released code.

            It is `off_policy_reshape` there; see [`~luffy_trl.losses.policy_shaping`].
        policy_shaping_gamma (`float`, *optional*, defaults to `0.1`):
            The gamma of `policy_shaping="regularized"`, positive.
        ratio_clipping (`str`, *optional*, defaults to `"none"`):
            `"none"` does not clip the ratio of rollout tokens (the final recipe, appendix E.1); `"on_policy"` clips it
            with `epsilon` and `epsilon_high` as GRPO does, and `"until_mixed"` does so in generation batches without
            a demonstration. Demonstration tokens are never clipped.
        advantage_baseline (`str`, *optional*, defaults to `"group"`):
            What the mean reward is taken over: `"group"` is all G completions (section 3.2), `"on_policy"` only those
            of the policy (`"grpo_split"` of the released code).

        > Partial demonstrations

        prefix_ratio_min (`float`, *optional*, defaults to `1.0`):
            Minimum share of a trace that is shown, between 0 and 1. Where only a part of a trace is shown, the policy
            continues it.

            The row then holds demonstration tokens, and behind them rollout tokens, of at most `max_completion_length`
            together (`min_prefix_ratio` of the released code). A vLLM server needs a `--max-model-len` of the longest
            prompt plus twice `max_completion_length` then: a request is the prompt and the prefix, and asks for
            `max_completion_length` tokens, of which the row keeps what fits.
        prefix_ratio_max (`float`, *optional*, defaults to `1.0`):
            Maximum share of a trace that is shown, between 0 and 1.

            It is `max_prefix_ratio` of the released code.
        prefix_schedule (`str`, *optional*, defaults to `"random"`):
            How the share moves between the two: `"random"` draws it for each row and step, `"linear"` and `"cosine"`
            lower it from the maximum to the minimum over `prefix_schedule_steps`, `"reverse_linear"` raises it,
            `"random_cosine"` draws it between the maximum and what `"cosine"` has, and `"fixed"` spreads it evenly
            over the demonstrations of a group.

            It is `prefix_strategy` of the released code; `"random_cosine"` is Prefix-RFT's (arXiv 2507.01679).
        prefix_schedule_steps (`int`, *optional*):
            Number of updates that `"linear"`, `"cosine"`, `"reverse_linear"` and `"random_cosine"` take.

            It is `prefix_steps` of the released code.
        demonstration_entropy_share (`float`, *optional*, defaults to `1.0`):
            Share of the demonstration tokens of a completion that carry a loss, those of the highest entropy under the
            policy.

            Prefix-RFT has 0.2. Denominators do not change.

        > Cross-entropy on demonstrations

        demonstration_loss (`str`, *optional*, defaults to `"policy_gradient"`):
            `"policy_gradient"` is LUFFY. `"sft"` is the paper's baseline "RL w/ SFT loss": the policy gradient covers
            rollouts alone, and `sft_loss_coef` times the mean cross-entropy of the demonstration tokens of the update
            is added. It needs `advantage_baseline="on_policy"`.

            `"sft"` is `use_sft_multitask_loss` of the released code.
        sft_loss_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the cross-entropy of `demonstration_loss="sft"`: mu of CHORD, at its peak.

            CHORD is arXiv 2508.11408.
        sft_loss_coef_min (`float`, *optional*, defaults to `0.0`):
            What the weight decays to over `sft_loss_coef_decay_steps`.
        sft_loss_coef_warmup_steps (`int`, *optional*, defaults to `0`):
            Number of updates over which the weight rises linearly from 0 to `sft_loss_coef`.
        sft_loss_coef_decay_steps (`int`, *optional*):
            Number of updates, after those, over which it falls along a cosine to `sft_loss_coef_min`. None keeps it.
        sft_loss_combination (`str`, *optional*, defaults to `"add"`):
            `"add"` is RL + weight x SFT, and `"interpolate"` (1 - weight) x RL + weight x SFT, as in CHORD.
        sft_token_weight (`str`, *optional*, defaults to `"none"`):
            Weight of each demonstration token in the cross-entropy. `"chord"` is p (1 - p) of its probability p, which
            leaves out what the policy knows already and what is far from it.

            It is phi of CHORD.
        sft_loss_reduction (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"` is the mean over the demonstration tokens of the update, and `"loss_type"` divides the
            cross-entropy as `loss_type` divides the policy gradient.

            `"loss_type"` is HPT's, with `loss_type="dr_grpo"`.

        > Replay

        replay_ratio (`float`, *optional*, defaults to `0.0`):
            Share of the prompts of a generation batch that are replaced by problems that the policy has solved in
            part, each with one of its own successes in the group. 0 has no replay.

            It is rho of ExGRPO (arXiv 2510.02245), 0.5 there; see [`~luffy_trl.sources.replay.ReplaySource`].
        replay_start_solve_rate (`float`, *optional*, defaults to `0.35`):
            Successes are collected, and replayed, from the first generation batch on of which a greater share of
            rollouts earns full reward.

            Full reward is 1 from each reward function that applies to the row.
        replay_max_trajectories (`int`, *optional*, defaults to `4096`):
            Maximum number of successes that are kept, the latest ones, on each process and in each checkpoint (8 bytes
            a token).
        replay_choice (`str`, *optional*, defaults to `"entropy"`):
            Which success of a problem is replayed: `"entropy"` takes that of the lowest mean entropy under the policy
            as it is now, at the cost of a forward pass over each, `"logp"` that of the highest mean recorded
            log-probability.

        > Hints in the prompt

        hint_source (`str`, *optional*, defaults to `"none"`):
            Hints with which a group that fails is sampled once more, each row under one: those of the dataset's
            `"column"` `hints`, a list in ascending strength, or beginnings of the first `"trace"`. The success with
            the weakest hint replaces a rollout. It needs `demonstration_policy="on_failure"`.

            A group that no hint helps is shown its demonstrations, if `num_demonstrations` is above 0; see
            [`~luffy_trl.sources.hints.HintSource`] (Scaf-GRPO, arXiv 2510.19807, and GHPO).
        hint_levels (`int`, *optional*, defaults to `3`):
            Number of hints of `hint_source="trace"`, evenly spaced: 3 are 25, 50 and 75% of the trace.

            The completions of a group are spread evenly over its hints, from the weakest to the strongest. A row with
            more hints than `num_generations` has some of those between left out.
        hint_placement (`str`, *optional*, defaults to `"prompt"`):
            What the success is trained under: the `"prompt"` with the hint, as a rollout, or the `"plain"` one, as a
            demonstration with the log-probs under the hint as pi_phi.
        hint_template (`str`, *optional*, defaults to `"{prompt}\n\nHint: {hint}"`):
            The prompt, or its last message, with a hint.
        hint_warmup_steps (`int`, *optional*, defaults to `0`):
            Number of updates before the first hint.

            Scaf-GRPO has 50.

        > Other objectives

        rl_plus_focal (`float`, *optional*, defaults to `0.5`):
            The exponent of 1 - pi on the advantage of a demonstration token, of `objective="rl_plus"`.
        srft_sft_weight (`float`, *optional*, defaults to `0.5`):
            Weight of the cross-entropy on demonstrations of `objective="srft"`, before exp(-H).
        srft_success_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the likelihood of successes of `objective="srft"`, before exp(H).
        srft_min_logp (`float`, *optional*, defaults to `-20.0`):
            Log-probability below which `objective="srft"` no longer pushes down a token of a failure.

            The loss of a failure has no minimum: without a bound, it would go on where nothing is left to win.
        oapl_value_beta (`float`, *optional*, defaults to `1.0`):
            Temperature of the optimal value V* = beta log mean exp(r / beta) of `objective="oapl"`.
        oapl_policy_beta (`float`, *optional*, defaults to `0.001`):
            Weight of the log-ratio to the sampler of `objective="oapl"`.

        > Speed and memory

        length_aware_batching (`bool`, *optional*, defaults to `True`):
            Whether to sort the sequences of an optimizer step by length into `gradient_accumulation_steps`
            micro-batches of any number of rows, each padded to its own longest completion only. False is TRL's cut, to
            the last bit. It needs a `steps_per_generation` that is a multiple of `gradient_accumulation_steps`.

            Losses are divided by what the optimizer step has over all processes, so that the gradient does not depend
            on the cut; `"bnpo"` and the entropy bonus are means over the micro-batch in TRL, and over the optimizer
            step then.
        max_tokens_per_microbatch (`int`, *optional*):
            Maximum number of tokens, prompt and padding included, of a forward and backward pass. The optimizer step
            then makes as many passes as its sequences need, the same number on every process. A longer sequence goes
            alone. None makes `gradient_accumulation_steps` passes. It needs `length_aware_batching`.

            Gradients are synchronised in the last pass only; `gradient_accumulation_steps` times
            `per_device_train_batch_size` is still how many sequences an optimizer step has. With `None`, no pass has
            more padded tokens than TRL's.
        padding_free (`bool`, *optional*, defaults to `False`):
            Whether the sequences of a pass follow each other in one row, without any padding. It is for attention
            kernels with sequences of variable length (flash attention): others give the same numbers, and take more
            time and memory for it. It needs `length_aware_batching`.

            As in [`~trl.SFTConfig`]: `attn_implementation` is `"flash_attention_2"`, `"flash_attention_3"` or their
            like in `model_init_kwargs`.
        cache_demonstration_rewards (`bool`, *optional*, defaults to `False`):
            Whether to score each complete trace once, and keep its rewards. For reward functions that depend on the
            prompt, the completion and the columns of the row alone, not on the step, the other completions or chance.
        cache_demonstration_ref_logps (`bool`, *optional*, defaults to `False`):
            Whether to compute the reference's log-probabilities of each complete trace once, and keep them in memory
            (4 bytes a token). For beta > 0, without `sync_ref_model`.

            Each process keeps those of the traces that it meets.

        > Report

        report_to_hub (`bool`, *optional*, defaults to `False`):
            Whether the model card, written after training, links a report of the run beside it, `report.html`, which
            `push_to_hub` uploads. It shows prompts and completions if `log_completions` is set.

            It is the page of `luffy report`, and needs `pip install luffy-trl[report]`.

        > Ablations of the released code

        policy_shaping_power (`float`, *optional*, defaults to `0.5`):
            The exponent of `policy_shaping="power"`.

            It is `off_policy_reshape_pow_exp` there.
        policy_shaping_weight (`float`, *optional*, defaults to `1.0`):
            The weight of the logarithm in `policy_shaping="log"` and `"linear_log"`.

            It is `off_policy_reshape_weight` there.
        on_policy_shaping (`str`, *optional*, defaults to `"none"`):
            The same for rollout tokens, an ablation of the released code. `"regularized"` is f(pi_theta) / f(pi_old)
            there. It is applied before clipping.

            It is `on_policy_reshape` there. The ratio is 1 at the first update.
        on_policy_shaping_gamma (`float`, *optional*, defaults to `0.1`):
            The gamma of `on_policy_shaping="regularized"`, positive.
        on_policy_shaping_power (`float`, *optional*, defaults to `0.5`):
            The exponent of `on_policy_shaping="power"`.
        on_policy_shaping_weight (`float`, *optional*, defaults to `1.0`):
            The weight of the logarithm in `on_policy_shaping="log"` and `"linear_log"`.
        demonstration_ratio_min (`float`, *optional*):
            Lower bound that the coefficient of a demonstration token is clamped to, after shaping. A clamped token has
            no gradient.

            It is `off_policy_min_clip` there.
        demonstration_ratio_max (`float`, *optional*):
            Upper bound that the coefficient of a demonstration token is clamped to, after shaping.

            It is `off_policy_max_clip` there.
        max_token_prob (`float`, *optional*):
            Tokens of either kind that the policy gives a higher probability carry no policy loss. Denominators do not
            change.

            It is `all_max_clip` there.
        demonstration_advantage_weight (`float`, *optional*, defaults to `1.0`):
            Factor on the advantages of demonstration tokens.

            It is `prefix_reward_weight_alpha` there.
        rollout_advantage_weight (`float`, *optional*, defaults to `1.0`):
            Factor on the advantages of rollout tokens.

            It is `prefix_reward_weight_beta` there.
    """

    loss_type: str = "dr_grpo"
    scale_rewards: str = "none"

    # Demonstrations
    num_demonstrations: int = 1
    demonstration_policy: Literal["always", "on_failure"] = "always"
    failure_threshold: float = 0.0
    demonstration_probability: float = 1.0
    demonstration_overflow: Literal["drop", "truncate", "error"] = "drop"
    demonstration_choice: Literal["random", "comprehension"] = "random"
    demonstration_max_steps: int | None = None
    failed_rollouts: Literal["keep", "drop"] = "keep"

    # Loss
    objective: Literal["luffy", "rl_plus", "srft", "oapl"] = "luffy"
    policy_shaping: ShapingKind = "regularized"
    policy_shaping_gamma: float = 0.1
    ratio_clipping: Literal["none", "on_policy", "until_mixed"] = "none"
    advantage_baseline: Baseline = "group"

    # Partial demonstrations
    prefix_ratio_min: float = 1.0
    prefix_ratio_max: float = 1.0
    prefix_schedule: Literal["random", "linear", "cosine", "reverse_linear", "fixed", "random_cosine"] = "random"
    prefix_schedule_steps: int | None = None
    demonstration_entropy_share: float = 1.0

    # Cross-entropy on demonstrations
    demonstration_loss: Literal["policy_gradient", "sft"] = "policy_gradient"
    sft_loss_coef: float = 1.0
    sft_loss_coef_min: float = 0.0
    sft_loss_coef_warmup_steps: int = 0
    sft_loss_coef_decay_steps: int | None = None
    sft_loss_combination: Literal["add", "interpolate"] = "add"
    sft_token_weight: Literal["none", "chord"] = "none"
    sft_loss_reduction: Literal["tokens", "loss_type"] = "tokens"

    # Replay
    replay_ratio: float = 0.0
    replay_start_solve_rate: float = 0.35
    replay_max_trajectories: int = 4096
    replay_choice: Literal["entropy", "logp"] = "entropy"

    # Hints in the prompt
    hint_source: Literal["none", "column", "trace"] = "none"
    hint_levels: int = 3
    hint_placement: Literal["prompt", "plain"] = "prompt"
    hint_template: str = "{prompt}\n\nHint: {hint}"
    hint_warmup_steps: int = 0

    # Other objectives
    rl_plus_focal: float = 0.5
    srft_sft_weight: float = 0.5
    srft_success_weight: float = 0.1
    srft_min_logp: float = -20.0
    oapl_value_beta: float = 1.0
    oapl_policy_beta: float = 1e-3

    # Speed and memory
    length_aware_batching: bool = True
    max_tokens_per_microbatch: int | None = None
    padding_free: bool = False
    cache_demonstration_rewards: bool = False
    cache_demonstration_ref_logps: bool = False

    # Report
    report_to_hub: bool = False

    # Ablations of the released code
    policy_shaping_power: float = 0.5
    policy_shaping_weight: float = 1.0
    on_policy_shaping: ShapingKind = "none"
    on_policy_shaping_gamma: float = 0.1
    on_policy_shaping_power: float = 0.5
    on_policy_shaping_weight: float = 1.0
    demonstration_ratio_min: float | None = None
    demonstration_ratio_max: float | None = None
    max_token_prob: float | None = None
    demonstration_advantage_weight: float = 1.0
    rollout_advantage_weight: float = 1.0

    @property
    def is_plain_grpo(self) -> bool:
        """Whether this is GRPO without a change, for which the trainer leaves the loss to TRL."""
        return self.is_clipped_grpo and not self.length_aware_batching

    @property
    def is_clipped_grpo(self) -> bool:
        """Whether the loss is GRPO's, clipped and without demonstrations, in whatever micro-batches."""
        return not self.has_demonstrations and self.objective == "luffy" and self.ratio_clipping == "on_policy"

    @property
    def has_demonstrations(self) -> bool:
        """Whether groups hold more than rollouts: traces of the dataset, replays, or what hints have helped to."""
        return bool(self.demonstration_sources) or self.hint_source != "none"

    @property
    def has_demonstration_tokens(self) -> bool:
        """Whether completions may begin with tokens that the policy does not sample under their prompt."""
        has_plain_hints = self.hint_source != "none" and self.hint_placement == "plain"
        return bool(self.demonstration_sources) or has_plain_hints

    @property
    def demonstration_sources(self) -> list[str]:
        """Who opens slots for demonstrations, in that order: names of `luffy_trl.methods.SOURCES`."""
        is_used = {"dataset": self.num_demonstrations > 0, "replay": self.replay_ratio > 0}
        return [name for name in is_used if is_used[name]]

    @property
    def load_options(self) -> dict[str, Any]:
        """What of `model_init_kwargs` a tokenizer and a generation config are loaded with too."""
        revision = (self.model_init_kwargs or {}).get("revision")
        return {"revision": revision, "trust_remote_code": self.trust_remote_code}

    def __post_init__(self):
        check_numbers_of_trl(self)
        with explained_arguments(self):
            super().__post_init__()
        check_options(self)

    def is_set(self, name: str) -> bool:
        """Whether an option differs from its default."""
        return getattr(self, name) != self.__dataclass_fields__[name].default

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, for trackers and cards: without the login that an address may hold."""
        options = super().to_dict()
        if self.vllm_server_base_url:
            options["vllm_server_base_url"] = without_credentials(self.vllm_server_base_url)
        return options

    def __getstate__(self):
        # Trainers save their arguments by `torch.save` and push the file to the Hub.
        address = self.vllm_server_base_url and without_credentials(self.vllm_server_base_url)
        return {**self.__dict__, "hub_token": None, "vllm_server_base_url": address}

    # Copies within a process are no files, and keep the token.
    def __copy__(self):
        return self._with_state(self.__dict__)

    def __deepcopy__(self, memo):
        return self._with_state(copy.deepcopy(self.__dict__, memo))

    def _with_state(self, state):
        new = object.__new__(type(self))
        new.__dict__.update(state)
        return new
