# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import copy
import warnings
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from trl import GRPOConfig

from .losses import BASELINES, SHAPINGS


# Options of TRL that a group with demonstrations has no right meaning for yet: the value each must have, and why.
_REFUSED_WITH_DEMONSTRATIONS = {
    "importance_sampling_level": ("token", "a demonstration has a ratio per token, and none per sequence"),
    "delta": (None, "two-sided clipping is not defined for the shaped ratio of a demonstration"),
    "off_policy_mask_threshold": (None, "it would drop demonstrations, which are off-policy by design"),
    "top_entropy_quantile": (1.0, "the quantile would mix demonstration and rollout tokens"),
    "use_adaptive_entropy": (False, "its controller would follow the entropy on demonstrations; use `entropy_coef`"),
    "multi_objective_aggregation": ("sum_then_normalize", "it leaves no choice of the advantage baseline"),
    "use_transformers_continuous_batching": (False, "it is not tested with demonstrations; use `use_vllm`"),
}
_LOSS_TYPES = ("dr_grpo", "grpo", "bnpo", "dapo")
_CHOICES = {
    "policy_shaping": SHAPINGS,
    "on_policy_shaping": SHAPINGS,
    "ratio_clipping": ("none", "on_policy"),
    "advantage_baseline": BASELINES,
    "demonstration_overflow": ("drop", "truncate", "error"),
    "prefix_schedule": ("random", "linear", "cosine", "reverse_linear", "fixed"),
    "demonstration_policy": ("always", "on_failure"),
    "demonstration_loss": ("policy_gradient", "sft"),
    "sft_token_weight": ("none", "chord"),
    "sft_loss_combination": ("add", "interpolate"),
}
# Parameters of an option: the option, and its values with which the parameter means something.
_PARAMETERS = {
    "policy_shaping_gamma": ("policy_shaping", ("regularized",)),
    "policy_shaping_power": ("policy_shaping", ("power",)),
    "policy_shaping_weight": ("policy_shaping", ("log", "linear_log")),
    "on_policy_shaping_gamma": ("on_policy_shaping", ("regularized",)),
    "on_policy_shaping_power": ("on_policy_shaping", ("power",)),
    "on_policy_shaping_weight": ("on_policy_shaping", ("log", "linear_log")),
    "prefix_schedule_steps": ("prefix_schedule", ("linear", "cosine", "reverse_linear")),
    "failure_threshold": ("demonstration_policy", ("on_failure",)),
    "sft_loss_coef": ("demonstration_loss", ("sft",)),
    "sft_loss_coef_min": ("demonstration_loss", ("sft",)),
    "sft_loss_coef_warmup_steps": ("demonstration_loss", ("sft",)),
    "sft_loss_coef_decay_steps": ("demonstration_loss", ("sft",)),
    "sft_loss_combination": ("demonstration_loss", ("sft",)),
    "sft_token_weight": ("demonstration_loss", ("sft",)),
}
# Options of the ratio and the advantage of demonstrations, which cross-entropy has not.
_POLICY_GRADIENT_OPTIONS = (
    "policy_shaping",
    "policy_shaping_gamma",
    "policy_shaping_power",
    "policy_shaping_weight",
    "demonstration_ratio_min",
    "demonstration_ratio_max",
    "demonstration_advantage_weight",
)
_DEMONSTRATION_OPTIONS = (
    *_POLICY_GRADIENT_OPTIONS,
    "demonstration_probability",
    "demonstration_policy",
    "demonstration_loss",
    "demonstration_overflow",
    "advantage_baseline",
    "prefix_ratio_min",
    "prefix_ratio_max",
    "prefix_schedule",
    "cache_demonstration_rewards",
    "cache_demonstration_ref_logps",
)


def own_fields(config: type) -> list[Field]:
    """The fields of a dataclass that none of its bases has."""
    inherited = {name for base in config.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
    return [f for f in fields(config) if f.name not in inherited]


@contextmanager
def explained_arguments(args: TrainingArguments):
    """Around the checks of transformers: what YAML reads otherwise than it is meant, and what to do without a GPU."""
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if getattr(args, name) is False:  # YAML's `no`
            setattr(args, name, "no")
    # TRL's default, under the name that transformers does not warn of
    if args.gradient_checkpointing and getattr(args, "activation_checkpointing", True) is None:
        args.activation_checkpointing = True
    try:
        yield
    except ValueError as error:
        if "support bf16" not in str(error):
            raise
        raise ValueError(
            "`bf16=True`, the default, needs a GPU with bf16, and there is none. On a CPU set `use_cpu=True` and "
            "`bf16=False` (`--use_cpu --bf16 false`); on an older GPU `bf16=False`."
        ) from error


@dataclass
class LuffyConfig(GRPOConfig):
    r"""
    Configuration class for the [`LuffyTrainer`].

    It has every parameter of [`~trl.GRPOConfig`], changes three defaults to those of LUFFY's objective (`loss_type`,
    `scale_rewards` and, as in TRL, `beta=0.0`), and adds the ones below. Batch sizes, schedules and optimizer settings
    of the paper are not defaults; they are in `examples/configs/qwen2.5_math_7b.yaml`.

    `num_demonstrations=0` together with `ratio_clipping="on_policy"` and `length_aware_batching=False` is plain GRPO,
    whatever TRL option is set.

    Parameters:
        loss_type (`str`, *optional*, defaults to `"dr_grpo"`):
            As in [`~trl.GRPOConfig`]. With demonstrations, one of `"dr_grpo"` (no length normalisation, section 3.2 of
            the paper), `"grpo"`, `"bnpo"` or `"dapo"`.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"none"`):
            As in [`~trl.GRPOConfig`]. The paper does not divide advantages by the standard deviation (section 3.2).

        > Parameters of LUFFY

        num_demonstrations (`int`, *optional*, defaults to `1`):
            How many of the `num_generations` completions of a group are demonstrations from the dataset (k of the
            paper, `n_prefix` of the released code). They replace rollouts: G - k completions are generated. A row
            with fewer traces uses what it has; one with more uses k of them, chosen anew at each step. `0` trains on
            rollouts alone.
        policy_shaping (`str`, *optional*, defaults to `"regularized"`):
            Shaping f of the ratio r of demonstration tokens (section 3.3): `"regularized"` is r / (r + gamma), which
            gives improbable tokens more weight; `"none"` is r itself. `"sqrt"`, `"power"`, `"log"` and `"linear_log"`
            are the further ones of the released code (`off_policy_reshape`); see [`~luffy_trl.losses.policy_shaping`].
        policy_shaping_gamma (`float`, *optional*, defaults to `0.1`):
            The gamma of `policy_shaping="regularized"`, positive.
        policy_shaping_power (`float`, *optional*, defaults to `0.5`):
            The exponent of `policy_shaping="power"` (`off_policy_reshape_pow_exp` of the released code).
        policy_shaping_weight (`float`, *optional*, defaults to `1.0`):
            The weight of the logarithm in `policy_shaping="log"` and `"linear_log"` (`off_policy_reshape_weight` of
            the released code).
        on_policy_shaping (`str`, *optional*, defaults to `"none"`):
            The same for rollout tokens, an ablation of the released code (`on_policy_reshape`). `"regularized"` is
            f(pi_theta) / f(pi_old) there, so that it is 1 at the first update. It is applied before clipping.
        on_policy_shaping_gamma (`float`, *optional*, defaults to `0.1`):
            The gamma of `on_policy_shaping="regularized"`, positive.
        on_policy_shaping_power (`float`, *optional*, defaults to `0.5`):
            The exponent of `on_policy_shaping="power"`.
        on_policy_shaping_weight (`float`, *optional*, defaults to `1.0`):
            The weight of the logarithm in `on_policy_shaping="log"` and `"linear_log"`.
        demonstration_ratio_min (`float`, *optional*):
            Lower bound that the coefficient of a demonstration token is clamped to, after shaping
            (`off_policy_min_clip` of the released code). A clamped token has no gradient.
        demonstration_ratio_max (`float`, *optional*):
            Upper bound, likewise (`off_policy_max_clip` of the released code).
        max_token_prob (`float`, *optional*):
            Tokens of either kind that the policy gives a higher probability carry no policy loss (`all_max_clip` of
            the released code). Denominators do not change.
        demonstration_probability (`float`, *optional*, defaults to `1.0`):
            Probability with which a row shows its demonstrations at a step; otherwise it trains on rollouts alone
            (`sample_target_ratio` of the released code).
        demonstration_policy (`str`, *optional*, defaults to `"always"`):
            `"always"` gives demonstrations their slots before anything is generated. `"on_failure"` samples all G
            completions, and replaces k of them in groups whose mean reward is at most `failure_threshold`; the other
            groups are pure GRPO (`add_tgt_with_acc` and `add_full_target_when_none` of the released code). It costs
            the generation of what is replaced, and saves demonstrations that the policy no longer needs.
        failure_threshold (`float`, *optional*, defaults to `0.0`):
            Greatest mean reward of a group that has failed, of `demonstration_policy="on_failure"`.
        demonstration_advantage_weight (`float`, *optional*, defaults to `1.0`):
            Factor on the advantages of demonstration tokens (`prefix_reward_weight_alpha` of the released code).
        rollout_advantage_weight (`float`, *optional*, defaults to `1.0`):
            Factor on the advantages of rollout tokens (`prefix_reward_weight_beta` of the released code).
        ratio_clipping (`str`, *optional*, defaults to `"none"`):
            `"none"` does not clip the ratio of rollout tokens (the final recipe, appendix E.1); `"on_policy"` clips it
            with `epsilon` and `epsilon_high` as GRPO does. Demonstration tokens are never clipped.
        advantage_baseline (`str`, *optional*, defaults to `"group"`):
            What the mean reward is taken over: `"group"` is all G completions (section 3.2), `"on_policy"` only those
            of the policy (`grpo_split` of the released code).
        demonstration_overflow (`str`, *optional*, defaults to `"drop"`):
            What happens to a trace of more than `max_completion_length` tokens: `"drop"` leaves it out (the metric
            `demonstrations/dropped` counts it), `"truncate"` cuts it and appends no end-of-sequence token, `"error"`
            raises a `ValueError` that names the row.
        prefix_ratio_min (`float`, *optional*, defaults to `1.0`):
            Least share of a trace that is shown, between 0 and 1 (`min_prefix_ratio` of the released code). Of a trace
            that is not shown whole, the policy continues the prefix: the row holds demonstration tokens, then rollout
            tokens, of at most `max_completion_length` together. A vLLM server needs a `--max-model-len` of the longest
            prompt plus twice `max_completion_length` then: a request is the prompt and the prefix, and asks for
            `max_completion_length` tokens, of which the row keeps what fits.
        prefix_ratio_max (`float`, *optional*, defaults to `1.0`):
            Greatest share of a trace that is shown (`max_prefix_ratio` of the released code).
        prefix_schedule (`str`, *optional*, defaults to `"random"`):
            How the share moves between the two (`prefix_strategy` of the released code): `"random"` draws it anew for
            each row and step, `"linear"` and `"cosine"` lower it from the greatest to the least over
            `prefix_schedule_steps`, `"reverse_linear"` raises it, and `"fixed"` spreads it evenly over the
            demonstrations of a group.
        prefix_schedule_steps (`int`, *optional*):
            Number of updates that `"linear"`, `"cosine"` and `"reverse_linear"` take (`prefix_steps` of the released
            code).
        length_aware_batching (`bool`, *optional*, defaults to `True`):
            Whether to sort the sequences of an optimizer step by length into `gradient_accumulation_steps`
            micro-batches of any number of rows, each padded to its own longest completion only. Losses are divided by
            what the optimizer step has over all processes, so that the gradient does not depend on the cut; `"bnpo"`
            and the entropy bonus are means over the micro-batch in TRL, and over the optimizer step then. `False` is
            TRL's cut, to the last bit. It needs a `steps_per_generation` that is a multiple of
            `gradient_accumulation_steps`.
        max_tokens_per_microbatch (`int`, *optional*):
            Most tokens, prompt and padding included, of a forward and backward pass. The optimizer step then makes as
            many passes as its sequences need, the same number on every process, with gradients synchronised in the
            last one only; `gradient_accumulation_steps` times `per_device_train_batch_size` is still how many
            sequences it has. A longer sequence goes alone. `None` makes `gradient_accumulation_steps` passes, none of
            them with more padded tokens than TRL's. It needs `length_aware_batching`.
        padding_free (`bool`, *optional*, defaults to `False`):
            Whether the sequences of a pass follow each other in one row, without any padding, as in
            [`~trl.SFTConfig`]. It is for attention kernels with sequences of variable length (`attn_implementation`
            `"flash_attention_2"`, `"flash_attention_3"` and their like in `model_init_kwargs`): others give the same
            numbers, and take more time and memory for it. It needs `length_aware_batching`.
        cache_demonstration_rewards (`bool`, *optional*, defaults to `False`):
            Whether to score each whole trace once, and keep its rewards. For reward functions that depend on the
            prompt, the completion and the columns of the row alone, not on the step, the other completions or chance.
        cache_demonstration_ref_logps (`bool`, *optional*, defaults to `False`):
            Whether to compute the reference's log-probabilities of each whole trace once, and keep them in memory (4
            bytes a token on each process that meets the trace). For `beta > 0`, without `sync_ref_model`.
        demonstration_loss (`str`, *optional*, defaults to `"policy_gradient"`):
            `"policy_gradient"` is LUFFY. `"sft"` is the paper's baseline "RL w/ SFT loss" (`use_sft_multitask_loss` of
            the released code): the policy gradient covers rollouts alone, and `sft_loss_coef` times the mean
            cross-entropy of the demonstration tokens of the update is added. It needs
            `advantage_baseline="on_policy"`.
        sft_loss_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the cross-entropy of `demonstration_loss="sft"`: mu of CHORD (arXiv 2508.11408), at its peak.
        sft_loss_coef_min (`float`, *optional*, defaults to `0.0`):
            What the weight decays to over `sft_loss_coef_decay_steps`.
        sft_loss_coef_warmup_steps (`int`, *optional*, defaults to `0`):
            Number of updates over which the weight rises linearly from 0 to `sft_loss_coef`.
        sft_loss_coef_decay_steps (`int`, *optional*):
            Number of updates, after those, over which it falls along a cosine to `sft_loss_coef_min`. `None` keeps it.
        sft_loss_combination (`str`, *optional*, defaults to `"add"`):
            `"add"` is RL + weight x SFT, and `"interpolate"` (1 - weight) x RL + weight x SFT, as in CHORD.
        sft_token_weight (`str`, *optional*, defaults to `"none"`):
            Weight of each demonstration token in the cross-entropy. `"chord"` is p (1 - p) of its probability p, which
            leaves out what the policy knows already and what is far from it (phi of CHORD).
    """

    loss_type: str = field(
        default="dr_grpo",
        metadata={
            "help": "Loss type, as in GRPOConfig. With demonstrations, one of 'dr_grpo' (no length normalisation, "
            "section 3.2 of the paper), 'grpo', 'bnpo' or 'dapo'."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "What advantages are divided by, as in GRPOConfig. The paper does not divide them by the standard "
            "deviation (section 3.2)."
        },
    )
    num_demonstrations: int = field(
        default=1,
        metadata={
            "help": "How many of the num_generations completions of a group are demonstrations from the dataset. They "
            "replace rollouts: G - k completions are generated. A row with fewer traces uses what it has; one with "
            "more uses k of them, chosen anew at each step. 0 trains on rollouts alone."
        },
    )
    policy_shaping: str = field(
        default="regularized",
        metadata={
            "help": "Shaping f of the ratio r of demonstration tokens (section 3.3): 'regularized' is r / (r + "
            "gamma), which gives improbable tokens more weight; 'none' is r itself. 'sqrt', 'power', 'log' and "
            "'linear_log' are the further ones of the released code."
        },
    )
    policy_shaping_gamma: float = field(
        default=0.1,
        metadata={"help": "The gamma of policy_shaping='regularized', positive."},
    )
    policy_shaping_power: float = field(
        default=0.5,
        metadata={"help": "The exponent of policy_shaping='power'."},
    )
    policy_shaping_weight: float = field(
        default=1.0,
        metadata={"help": "The weight of the logarithm in policy_shaping='log' and 'linear_log'."},
    )
    on_policy_shaping: str = field(
        default="none",
        metadata={
            "help": "The same for rollout tokens, an ablation of the released code. 'regularized' is f(pi_theta) / "
            "f(pi_old) there. It is applied before clipping."
        },
    )
    on_policy_shaping_gamma: float = field(
        default=0.1,
        metadata={"help": "The gamma of on_policy_shaping='regularized', positive."},
    )
    on_policy_shaping_power: float = field(
        default=0.5,
        metadata={"help": "The exponent of on_policy_shaping='power'."},
    )
    on_policy_shaping_weight: float = field(
        default=1.0,
        metadata={"help": "The weight of the logarithm in on_policy_shaping='log' and 'linear_log'."},
    )
    demonstration_ratio_min: float | None = field(
        default=None,
        metadata={
            "help": "Lower bound that the coefficient of a demonstration token is clamped to, after shaping. A "
            "clamped token has no gradient."
        },
    )
    demonstration_ratio_max: float | None = field(
        default=None,
        metadata={"help": "Upper bound that the coefficient of a demonstration token is clamped to, after shaping."},
    )
    max_token_prob: float | None = field(
        default=None,
        metadata={
            "help": "Tokens of either kind that the policy gives a higher probability carry no policy loss. "
            "Denominators do not change."
        },
    )
    demonstration_probability: float = field(
        default=1.0,
        metadata={
            "help": "Probability with which a row shows its demonstrations at a step; otherwise it trains on rollouts "
            "alone."
        },
    )
    demonstration_policy: str = field(
        default="always",
        metadata={
            "help": "'always' gives demonstrations their slots before anything is generated. 'on_failure' samples all "
            "G completions, and replaces k of them in groups whose mean reward is at most failure_threshold; the "
            "other groups are pure GRPO."
        },
    )
    failure_threshold: float = field(
        default=0.0,
        metadata={"help": "Greatest mean reward of a group that has failed, of demonstration_policy='on_failure'."},
    )
    demonstration_advantage_weight: float = field(
        default=1.0,
        metadata={"help": "Factor on the advantages of demonstration tokens."},
    )
    rollout_advantage_weight: float = field(
        default=1.0,
        metadata={"help": "Factor on the advantages of rollout tokens."},
    )
    ratio_clipping: str = field(
        default="none",
        metadata={
            "help": "'none' does not clip the ratio of rollout tokens (the final recipe, appendix E.1); 'on_policy' "
            "clips it with epsilon and epsilon_high as GRPO does. Demonstration tokens are never clipped."
        },
    )
    advantage_baseline: str = field(
        default="group",
        metadata={
            "help": "What the mean reward is taken over: 'group' is all G completions (section 3.2), 'on_policy' only "
            "those of the policy ('grpo_split' of the released code)."
        },
    )
    demonstration_overflow: str = field(
        default="drop",
        metadata={
            "help": "What happens to a trace of more than max_completion_length tokens: 'drop' leaves it out (the "
            "metric demonstrations/dropped counts it), 'truncate' cuts it and appends no end-of-sequence token, "
            "'error' raises a ValueError that names the row."
        },
    )

    prefix_ratio_min: float = field(
        default=1.0,
        metadata={
            "help": "Least share of a trace that is shown, between 0 and 1. Of a trace that is not shown whole, the "
            "policy continues the prefix."
        },
    )
    prefix_ratio_max: float = field(
        default=1.0,
        metadata={"help": "Greatest share of a trace that is shown, between 0 and 1."},
    )
    prefix_schedule: str = field(
        default="random",
        metadata={
            "help": "How the share moves between the two: 'random' draws it anew for each row and step, 'linear' and "
            "'cosine' lower it from the greatest to the least over prefix_schedule_steps, 'reverse_linear' raises it, "
            "and 'fixed' spreads it evenly over the demonstrations of a group."
        },
    )
    prefix_schedule_steps: int | None = field(
        default=None,
        metadata={"help": "Number of updates that 'linear', 'cosine' and 'reverse_linear' take."},
    )
    length_aware_batching: bool = field(
        default=True,
        metadata={
            "help": "Whether to sort the sequences of an optimizer step by length into gradient_accumulation_steps "
            "micro-batches of any number of rows, each padded to its own longest completion only. False is TRL's cut, "
            "to the last bit. It needs a steps_per_generation that is a multiple of gradient_accumulation_steps."
        },
    )
    max_tokens_per_microbatch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens, prompt and padding included, of a forward and backward pass. The optimizer step "
            "then makes as many passes as its sequences need, the same number on every process. A longer sequence "
            "goes alone. None makes gradient_accumulation_steps passes. It needs length_aware_batching."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Whether the sequences of a pass follow each other in one row, without any padding. It is for "
            "attention kernels with sequences of variable length (flash attention): others give the same numbers, and "
            "take more time and memory for it. It needs length_aware_batching."
        },
    )
    cache_demonstration_rewards: bool = field(
        default=False,
        metadata={
            "help": "Whether to score each whole trace once, and keep its rewards. For reward functions that depend "
            "on the prompt, the completion and the columns of the row alone, not on the step, the other completions "
            "or chance."
        },
    )
    cache_demonstration_ref_logps: bool = field(
        default=False,
        metadata={
            "help": "Whether to compute the reference's log-probabilities of each whole trace once, and keep them in "
            "memory (4 bytes a token). For beta > 0, without sync_ref_model."
        },
    )
    demonstration_loss: str = field(
        default="policy_gradient",
        metadata={
            "help": "'policy_gradient' is LUFFY. 'sft' is the paper's baseline 'RL w/ SFT loss': the policy gradient "
            "covers rollouts alone, and sft_loss_coef times the mean cross-entropy of the demonstration tokens of the "
            "update is added. It needs advantage_baseline='on_policy'."
        },
    )
    sft_loss_coef: float = field(
        default=1.0,
        metadata={"help": "Weight of the cross-entropy of demonstration_loss='sft': mu of CHORD, at its peak."},
    )
    sft_loss_coef_min: float = field(
        default=0.0,
        metadata={"help": "What the weight decays to over sft_loss_coef_decay_steps."},
    )
    sft_loss_coef_warmup_steps: int = field(
        default=0,
        metadata={"help": "Number of updates over which the weight rises linearly from 0 to sft_loss_coef."},
    )
    sft_loss_coef_decay_steps: int | None = field(
        default=None,
        metadata={
            "help": "Number of updates, after those, over which it falls along a cosine to sft_loss_coef_min. None "
            "keeps it."
        },
    )
    sft_loss_combination: str = field(
        default="add",
        metadata={
            "help": "'add' is RL + weight x SFT, and 'interpolate' (1 - weight) x RL + weight x SFT, as in CHORD."
        },
    )
    sft_token_weight: str = field(
        default="none",
        metadata={
            "help": "Weight of each demonstration token in the cross-entropy. 'chord' is p (1 - p) of its probability "
            "p, which leaves out what the policy knows already and what is far from it."
        },
    )

    @property
    def is_plain_grpo(self) -> bool:
        """Whether this is GRPO without a change, for which the trainer leaves the loss to TRL."""
        return self.num_demonstrations == 0 and self.ratio_clipping == "on_policy" and not self.length_aware_batching

    @property
    def load_options(self) -> dict[str, Any]:
        """What of `model_init_kwargs` a tokenizer and a generation config are loaded with too."""
        revision = (self.model_init_kwargs or {}).get("revision")
        return {"revision": revision, "trust_remote_code": self.trust_remote_code}

    def __post_init__(self):
        try:
            with explained_arguments(self):
                super().__post_init__()
        except ValueError as error:  # says what is wrong, and not what to do
            if "divisible by num_generations" in str(error):
                raise ValueError(
                    f"`num_generations={self.num_generations}` does not divide the {self.generation_batch_size} "
                    f"completions that are generated at once: `per_device_train_batch_size` "
                    f"({self.per_device_train_batch_size}) times {self.world_size} process(es) times "
                    f"`steps_per_generation` ({self.steps_per_generation}). Change one of them."
                ) from error
            raise
        self._check_types()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` is {value!r}. Choose one of {', '.join(map(repr, choices))}.")
        if not 0 <= self.num_demonstrations < self.num_generations:
            raise ValueError(
                f"`num_demonstrations` ({self.num_demonstrations}) must be at least 0 and less than `num_generations` "
                f"({self.num_generations}): each group needs a rollout. Lower it, or raise `num_generations`."
            )
        for name in (
            "policy_shaping_gamma",
            "on_policy_shaping_gamma",
            "policy_shaping_power",
            "on_policy_shaping_power",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"`{name}` must be positive, got {getattr(self, name)}. For no shaping set "
                    f"`{name.rpartition('_')[0]}='none'`."
                )
        for name, (option, values) in _PARAMETERS.items():
            if self._is_set(name) and getattr(self, option) not in values:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` has no effect with `{option}={getattr(self, option)!r}`. Remove "
                    f"one of them, or set `{option}` to {' or '.join(map(repr, values))}."
                )
        low, high = self.demonstration_ratio_min, self.demonstration_ratio_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"`demonstration_ratio_min` ({low}) must be less than `demonstration_ratio_max` ({high})."
            )
        if self.max_token_prob is not None and not 0 < self.max_token_prob < 1:
            raise ValueError(f"`max_token_prob` must be between 0 and 1, got {self.max_token_prob}.")
        if not 0 < self.demonstration_probability <= 1:
            raise ValueError(
                f"`demonstration_probability` must be above 0 and at most 1, got {self.demonstration_probability}. "
                "For no demonstrations set `num_demonstrations=0`."
            )
        if not 0 <= self.prefix_ratio_min <= self.prefix_ratio_max <= 1:
            raise ValueError(
                f"`prefix_ratio_min` ({self.prefix_ratio_min}) and `prefix_ratio_max` ({self.prefix_ratio_max}) must "
                "be between 0 and 1, the first not greater than the second."
            )
        if (
            self.prefix_schedule in _PARAMETERS["prefix_schedule_steps"][1]
            and not (self.prefix_schedule_steps or 0) > 0
        ):
            raise ValueError(
                f"`prefix_schedule={self.prefix_schedule!r}` needs `prefix_schedule_steps`, the number of updates "
                "that it takes."
            )
        if self._is_set("prefix_schedule") and self.prefix_ratio_min == self.prefix_ratio_max:
            raise ValueError(
                f"`prefix_schedule={self.prefix_schedule!r}` has no effect while `prefix_ratio_min` and "
                f"`prefix_ratio_max` are both {self.prefix_ratio_max}. Lower `prefix_ratio_min`, or remove it."
            )
        if self.demonstration_loss == "sft":
            self._check_sft()

        self._check_batching()
        if self.num_demonstrations == 0 and self.ratio_clipping == "on_policy":
            self._check_grpo()
        if not self.is_plain_grpo:
            self._check_trl_options()
        if self.num_demonstrations == 0:
            without_effect = [name for name in _DEMONSTRATION_OPTIONS if self._is_set(name)]
            if without_effect:
                warnings.warn(
                    f"`num_demonstrations=0` trains without demonstrations, so {', '.join(without_effect)} have no "
                    "effect.",
                    stacklevel=3,
                )

    def __getstate__(self):
        # Trainers save their arguments by `torch.save` and push the file to the Hub.
        return {**self.__dict__, "hub_token": None}

    # Copies within a process are no files, and keep the token.
    def __copy__(self):
        return self._with_state(self.__dict__)

    def __deepcopy__(self, memo):
        return self._with_state(copy.deepcopy(self.__dict__, memo))

    def _with_state(self, state):
        new = object.__new__(type(self))
        new.__dict__.update(state)
        return new

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) != next(f.default for f in fields(self) if f.name == name)

    def _check_types(self):
        inherited = {f.name for f in fields(GRPOConfig)}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in inherited or f.type is str or (value is None and f.default is None):
                continue
            if f.type is bool:
                if not isinstance(value, bool):
                    raise ValueError(f"`{f.name}` must be True or False, got {value!r}.")
                continue
            is_integer = f.type in (int, int | None)
            if isinstance(value, bool) or not isinstance(value, int if is_integer else int | float) or value != value:
                kind = "a whole number" if is_integer else "a number"
                raise ValueError(f"`{f.name}` must be {kind}, got {value!r}.")

    def _check_batching(self):
        if self.length_aware_batching and self.steps_per_generation % self.gradient_accumulation_steps != 0:
            raise ValueError(
                "`length_aware_batching=True` sorts the sequences of an optimizer step, and `steps_per_generation` "
                f"({self.steps_per_generation}) is no multiple of `gradient_accumulation_steps` "
                f"({self.gradient_accumulation_steps}). Change one of them, or set `length_aware_batching=False`."
            )
        for name in ("max_tokens_per_microbatch", "padding_free"):
            if self._is_set(name) and not self.length_aware_batching:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` cuts the optimizer step anew, and `length_aware_batching=False` "
                    "leaves the cut to TRL. Remove one of them."
                )
        if self.max_tokens_per_microbatch is not None and self.max_tokens_per_microbatch < 1:
            raise ValueError(f"`max_tokens_per_microbatch` must be positive, got {self.max_tokens_per_microbatch}.")
        if self.cache_demonstration_ref_logps and (self.beta == 0.0 or self.sync_ref_model):
            reason = "there is no reference with `beta=0`" if self.beta == 0.0 else "`sync_ref_model` changes them"
            raise ValueError(
                f"`cache_demonstration_ref_logps=True` keeps log-probabilities of the reference, and {reason}. Remove "
                "it."
            )
        if self.cache_demonstration_ref_logps and not self.length_aware_batching:
            raise ValueError(
                "`cache_demonstration_ref_logps=True` leaves traces out of the passes over a generation batch, which "
                "`length_aware_batching=False` leaves to TRL. Remove one of them."
            )

    def _check_grpo(self):
        for name in ("on_policy_shaping", "max_token_prob", "rollout_advantage_weight"):
            if self._is_set(name):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` has no effect on plain GRPO (`num_demonstrations=0` with "
                    "`ratio_clipping='on_policy'`). Remove it."
                )

    def _check_sft(self):
        for name in _POLICY_GRADIENT_OPTIONS:
            if self._is_set(name):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` has no effect with `demonstration_loss='sft'`, which has no "
                    "ratio and no advantage. Remove it."
                )
        if not 0 <= self.sft_loss_coef_min <= self.sft_loss_coef:
            raise ValueError(
                f"`sft_loss_coef_min` ({self.sft_loss_coef_min}) must be between 0 and `sft_loss_coef` "
                f"({self.sft_loss_coef})."
            )
        if self.sft_loss_combination == "interpolate" and self.sft_loss_coef > 1:
            raise ValueError(
                f"`sft_loss_coef={self.sft_loss_coef}` would turn the sign of the policy gradient with "
                "`sft_loss_combination='interpolate'`. Choose it between 0 and 1."
            )
        decay_steps = self.sft_loss_coef_decay_steps
        if self.sft_loss_coef_warmup_steps < 0 or (decay_steps is not None and decay_steps < 1):
            raise ValueError(
                f"`sft_loss_coef_warmup_steps` ({self.sft_loss_coef_warmup_steps}) must be at least 0 and "
                f"`sft_loss_coef_decay_steps` ({decay_steps}) at least 1, or None."
            )
        if self._is_set("sft_loss_coef_min") and decay_steps is None:
            raise ValueError(
                f"`sft_loss_coef_min={self.sft_loss_coef_min}` has no effect without `sft_loss_coef_decay_steps`, the "
                "number of updates over which the weight falls to it."
            )
        if self.advantage_baseline != "on_policy":
            raise ValueError(
                "`demonstration_loss='sft'` gives demonstrations no advantage, so they should not raise the baseline "
                "of rollouts either. Set `advantage_baseline='on_policy'`."
            )

    def _check_trl_options(self):
        if self.loss_type not in _LOSS_TYPES:
            raise ValueError(
                f"`loss_type={self.loss_type!r}` is not supported with `num_demonstrations={self.num_demonstrations}` "
                f"and `ratio_clipping={self.ratio_clipping!r}`. Choose one of {', '.join(map(repr, _LOSS_TYPES))}, or "
                "train plain GRPO with `num_demonstrations=0`, `ratio_clipping='on_policy'` and "
                "`length_aware_batching=False`."
            )
        for name, (value, reason) in _REFUSED_WITH_DEMONSTRATIONS.items():
            if getattr(self, name) != value:
                if self.num_demonstrations == 0:
                    reason = "only plain GRPO in TRL's micro-batches has it"
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is not supported with "
                    f"`num_demonstrations={self.num_demonstrations}` and `ratio_clipping={self.ratio_clipping!r}`: "
                    f"{reason}. Set `{name}={value!r}`, or train plain GRPO with `num_demonstrations=0`, "
                    "`ratio_clipping='on_policy'` and `length_aware_batching=False`."
                )
        if self.use_vllm and self.num_demonstrations > 0 and "seed" in (self.generation_kwargs or {}):
            raise ValueError(
                "A `seed` in `generation_kwargs` would make all rollouts of a prompt alike, as with demonstrations "
                "vLLM gets them as requests of their own. Remove it; `seed` of the configuration seeds the rest."
            )
        if self.max_completion_length is None:
            raise ValueError(
                "`max_completion_length=None` is not supported: it bounds demonstrations, and 'dr_grpo' divides by "
                "it. Set it to the longest completion in tokens."
            )
        if self.ratio_clipping == "none" and (self._is_set("epsilon") or self._is_set("epsilon_high")):
            raise ValueError(
                f"`epsilon={self.epsilon}` and `epsilon_high={self.epsilon_high}` clip nothing with "
                "`ratio_clipping='none'`. Set `ratio_clipping='on_policy'`, or remove them."
            )
        if self.mask_truncated_completions and self.demonstration_overflow == "truncate":
            raise ValueError(
                "`mask_truncated_completions=True` would mask the demonstrations that "
                "`demonstration_overflow='truncate'` cuts. Set `demonstration_overflow='drop'`, or turn it off."
            )
