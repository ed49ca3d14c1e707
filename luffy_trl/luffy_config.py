# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import warnings
from dataclasses import dataclass, field, fields

from trl import GRPOConfig

from .losses import BASELINES


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
    "policy_shaping": ("none", "regularized"),
    "ratio_clipping": ("none", "on_policy"),
    "advantage_baseline": BASELINES,
    "demonstration_overflow": ("drop", "truncate", "error"),
}


@dataclass
class LuffyConfig(GRPOConfig):
    r"""
    Configuration class for the [`LuffyTrainer`].

    It has every parameter of [`~trl.GRPOConfig`], changes three defaults to those of LUFFY's objective (`loss_type`,
    `scale_rewards` and, as in TRL, `beta=0.0`), and adds the ones below. Batch sizes, schedules and optimizer settings
    of the paper are not defaults; they are in `examples/configs/qwen2.5_math_7b.yaml`.

    `num_demonstrations=0` together with `ratio_clipping="on_policy"` is plain GRPO, whatever TRL option is set.

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
            gives improbable tokens more weight; `"none"` is r itself.
        policy_shaping_gamma (`float`, *optional*, defaults to `0.1`):
            The gamma of `policy_shaping="regularized"`, positive.
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
            "gamma), which gives improbable tokens more weight; 'none' is r itself."
        },
    )
    policy_shaping_gamma: float = field(
        default=0.1,
        metadata={"help": "The gamma of policy_shaping='regularized', positive."},
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

    def __post_init__(self):
        super().__post_init__()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` is {value!r}. Choose one of {', '.join(map(repr, choices))}.")
        if not 0 <= self.num_demonstrations < self.num_generations:
            raise ValueError(
                f"`num_demonstrations` ({self.num_demonstrations}) must be at least 0 and less than `num_generations` "
                f"({self.num_generations}): each group needs a rollout. Lower it, or raise `num_generations`."
            )
        if self.policy_shaping_gamma <= 0:
            raise ValueError(
                f"`policy_shaping_gamma` must be positive, got {self.policy_shaping_gamma}. The paper uses 0.1; for "
                "no shaping set `policy_shaping='none'`."
            )
        if self.policy_shaping != "regularized" and self._is_set("policy_shaping_gamma"):
            raise ValueError(
                f"`policy_shaping_gamma={self.policy_shaping_gamma}` has no effect with "
                f"`policy_shaping={self.policy_shaping!r}`. Remove one of them."
            )

        is_plain_grpo = self.num_demonstrations == 0 and self.ratio_clipping == "on_policy"
        if not is_plain_grpo:
            self._check_trl_options()
        if self.num_demonstrations == 0:
            without_effect = [
                name
                for name in (
                    "policy_shaping",
                    "policy_shaping_gamma",
                    "advantage_baseline",
                    "demonstration_overflow",
                )
                if self._is_set(name)
            ]
            if without_effect:
                warnings.warn(
                    f"`num_demonstrations=0` trains without demonstrations, so {', '.join(without_effect)} have no "
                    "effect.",
                    stacklevel=3,
                )

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) != next(f.default for f in fields(self) if f.name == name)

    def _check_trl_options(self):
        if self.loss_type not in _LOSS_TYPES:
            raise ValueError(
                f"`loss_type={self.loss_type!r}` is not supported with `num_demonstrations={self.num_demonstrations}` "
                f"and `ratio_clipping={self.ratio_clipping!r}`. Choose one of {', '.join(map(repr, _LOSS_TYPES))}."
            )
        for name, (value, reason) in _REFUSED_WITH_DEMONSTRATIONS.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is not supported with "
                    f"`num_demonstrations={self.num_demonstrations}` and `ratio_clipping={self.ratio_clipping!r}`: "
                    f"{reason}. Set `{name}={value!r}`, or train plain GRPO with `num_demonstrations=0` and "
                    "`ratio_clipping='on_policy'`."
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
