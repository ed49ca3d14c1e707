# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What options of a [`LuffyConfig`] may not be, and not be together: a function for each rule, in the order in which they
are checked. Each raises a `ValueError` that names the options and says what to do.
"""

import math
import string
import warnings
from collections.abc import Callable
from dataclasses import Field
from importlib.util import find_spec
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args, get_origin

from trl import GRPOConfig

from .losses import SCALES
from .options import own_fields


Args: TypeAlias = Any  # a `LuffyConfig`, which imports this module

# Options of TRL that a group with demonstrations has no right meaning for yet: the value each must have, and why.
_REFUSED_WITH_DEMONSTRATIONS: dict[str, tuple[Any, str]] = {
    "importance_sampling_level": ("token", "a demonstration has a ratio per token, and none per sequence"),
    "delta": (None, "two-sided clipping is not defined for the shaped ratio of a demonstration"),
    "off_policy_mask_threshold": (None, "it would drop demonstrations, which are off-policy by design"),
    "top_entropy_quantile": (1.0, "the quantile would mix demonstration and rollout tokens"),
    "use_adaptive_entropy": (False, "its controller would follow the entropy on demonstrations; use `entropy_coef`"),
    "multi_objective_aggregation": ("sum_then_normalize", "it leaves no choice of the advantage baseline"),
    "use_transformers_continuous_batching": (False, "it is not tested with demonstrations; use `use_vllm`"),
}
# Counts of TRL, which divides by them, and the minimum of each
_COUNTS_OF_TRL = {
    "num_generations": 2,
    "num_generations_eval": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "generation_batch_size": 1,
    "num_iterations": 1,
    "max_completion_length": 1,
}
# Numbers of TRL: which are allowed, in code and in words. An infinite `epsilon` is a bound that is not there.
_NUMBERS_OF_TRL: dict[str, tuple[Callable[[float], bool], str]] = {
    "beta": (lambda value: 0 <= value < math.inf, "a finite number of at least 0; 0 has no penalty"),
    "epsilon": (lambda value: value >= 0, "a number of at least 0, such as 0.2"),
    "epsilon_high": (lambda value: value >= 0, "a number of at least 0, such as 0.28, or None for that of `epsilon`"),
    "temperature": (lambda value: 0 < value < math.inf, "a finite number above 0"),
}
_LOSS_TYPES = ("dr_grpo", "grpo", "bnpo", "dapo")
# Parameters of an option: the option, and its values with which the parameter means something.
PARAMETERS = {
    "policy_shaping_gamma": ("policy_shaping", ("regularized",)),
    "policy_shaping_power": ("policy_shaping", ("power",)),
    "policy_shaping_weight": ("policy_shaping", ("log", "linear_log")),
    "on_policy_shaping_gamma": ("on_policy_shaping", ("regularized",)),
    "on_policy_shaping_power": ("on_policy_shaping", ("power",)),
    "on_policy_shaping_weight": ("on_policy_shaping", ("log", "linear_log")),
    "prefix_schedule_steps": ("prefix_schedule", ("linear", "cosine", "reverse_linear", "random_cosine")),
    "failure_threshold": ("demonstration_policy", ("on_failure",)),
    "failed_rollouts": ("demonstration_policy", ("on_failure",)),
    "sft_loss_coef": ("demonstration_loss", ("sft",)),
    "sft_loss_coef_min": ("demonstration_loss", ("sft",)),
    "sft_loss_coef_warmup_steps": ("demonstration_loss", ("sft",)),
    "sft_loss_coef_decay_steps": ("demonstration_loss", ("sft",)),
    "sft_loss_combination": ("demonstration_loss", ("sft",)),
    "sft_token_weight": ("demonstration_loss", ("sft",)),
    "sft_loss_reduction": ("demonstration_loss", ("sft",)),
    "rl_plus_focal": ("objective", ("rl_plus",)),
    "srft_sft_weight": ("objective", ("srft",)),
    "srft_success_weight": ("objective", ("srft",)),
    "srft_min_logp": ("objective", ("srft",)),
    "oapl_value_beta": ("objective", ("oapl",)),
    "oapl_policy_beta": ("objective", ("oapl",)),
}
_HINT_OPTIONS = ("hint_levels", "hint_placement", "hint_template", "hint_warmup_steps")
_REPLAY_OPTIONS = ("replay_start_solve_rate", "replay_max_trajectories", "replay_choice")
# Options of the ratio and the advantage of demonstrations, which cross-entropy has not.
_POLICY_GRADIENT_OPTIONS = (
    "policy_shaping",
    "policy_shaping_gamma",
    "policy_shaping_power",
    "policy_shaping_weight",
    "demonstration_ratio_min",
    "demonstration_ratio_max",
    "demonstration_advantage_weight",
    "demonstration_entropy_share",
)
# Options that another objective than LUFFY's does not read.
_ROLLOUT_OPTIONS = ("on_policy_shaping", "max_token_prob", "ratio_clipping", "demonstration_loss")
_NOT_READ = {
    "rl_plus": (
        *_ROLLOUT_OPTIONS,
        *(name for name in _POLICY_GRADIENT_OPTIONS if name != "demonstration_advantage_weight"),
    ),
    "srft": (
        *_ROLLOUT_OPTIONS,
        *("demonstration_ratio_min", "demonstration_ratio_max", "demonstration_entropy_share"),
        *("rollout_advantage_weight", "failed_rollouts"),
    ),
    "oapl": (
        *_ROLLOUT_OPTIONS,
        *_POLICY_GRADIENT_OPTIONS,
        *("rollout_advantage_weight", "advantage_baseline", "failed_rollouts", "scale_rewards"),
    ),
}
# Options of traces of the dataset
_TRACE_OPTIONS = (
    "demonstration_probability",
    "demonstration_choice",
    "demonstration_max_steps",
    "demonstration_policy",
    "failure_threshold",
    "failed_rollouts",
    "demonstration_loss",
    "demonstration_overflow",
    "prefix_ratio_min",
    "prefix_ratio_max",
    "prefix_schedule",
    "prefix_schedule_steps",
)
CACHE_OPTIONS = ("cache_demonstration_rewards", "cache_demonstration_ref_logps")
_DEMONSTRATION_OPTIONS = (*_POLICY_GRADIENT_OPTIONS, *_TRACE_OPTIONS, "advantage_baseline", *CACHE_OPTIONS)


def num_replayed(replay_ratio: float, num_prompts: int) -> int:
    """How many prompts of a generation batch are replayed."""
    return math.floor(replay_ratio * num_prompts + 1e-9)


def check_numbers_of_trl(args: Args):
    """Numbers of TRL with which it would divide by 0, or fail at a step of training; before TRL reads them."""
    for name, minimum in _COUNTS_OF_TRL.items():
        value = getattr(args, name)
        if not _is_unset(name, value) and not (_is_a(Integral, value) and value >= minimum):
            raise ValueError(f"`{name}` is {value!r}. Set it to a whole number of at least {minimum}.")
    for name, (is_allowed, text) in _NUMBERS_OF_TRL.items():
        value = getattr(args, name)
        if not _is_unset(name, value) and not (_is_a(Real, value) and is_allowed(value)):
            raise ValueError(f"`{name}` is {value!r}. Set it to {text}.")
    weights = [] if args.reward_weights is None else args.reward_weights
    if not isinstance(weights, list | tuple) or not all(_is_a(Real, w) and math.isfinite(w) for w in weights):
        raise ValueError(
            f"`reward_weights` is {weights!r}. Set it to a list of finite numbers, one for each reward function, or "
            "remove it for 1 each."
        )
    if args.scale_rewards not in (True, False, *SCALES):
        raise ValueError(f"`scale_rewards` is {args.scale_rewards!r}. Choose one of {', '.join(map(repr, SCALES))}.")


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_unset(name: str, value: Any) -> bool:
    """Whether an option of TRL is None, where that means something. (Parsers change the types of fields.)"""
    default = GRPOConfig.__dataclass_fields__[name].default
    return value is None and (default is None or name == "max_completion_length")


def check_options(args: Args):
    """Checks all rules."""
    for rule in RULES:
        rule(args)


def _own_options() -> list[Field]:
    """The fields that `LuffyConfig` adds, and not those of a user's class that extends it."""
    from .luffy_config import LuffyConfig  # which imports this module

    return own_fields(LuffyConfig)


def types(args: Args):
    """Numbers are numbers, and switches are True or False."""
    for f in _own_options():
        value = getattr(args, f.name)
        if get_origin(f.type) is Literal or f.type is str or (value is None and f.default is None):
            continue
        if f.type is bool:
            if not isinstance(value, bool):
                raise ValueError(f"`{f.name}` must be True or False, got {value!r}.")
            continue
        is_integer = f.type in (int, int | None)
        is_number = isinstance(value, int if is_integer else int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            kind = "a whole number" if is_integer else "a number"
            raise ValueError(f"`{f.name}` must be {kind}, got {value!r}.")


def installed_extras(args: Args):
    """What an option needs is installed before a model is loaded."""
    for name in ("plotly", "jinja2") if args.report_to_hub else ():
        if find_spec(name) is None:
            raise ValueError(f"`report_to_hub=True` needs {name}: `pip install luffy-trl[report]`.")


def choices(args: Args):
    """An option with a choice has one of its values."""
    for f in _own_options():
        if get_origin(f.type) is Literal and getattr(args, f.name) not in get_args(f.type):
            raise ValueError(
                f"`{f.name}` is {getattr(args, f.name)!r}. Choose one of {', '.join(map(repr, get_args(f.type)))}."
            )


def a_rollout_in_each_group(args: Args):
    """There are fewer demonstrations than completions."""
    if not 0 <= args.num_demonstrations < args.num_generations:
        raise ValueError(
            f"`num_demonstrations` ({args.num_demonstrations}) must be at least 0 and less than `num_generations` "
            f"({args.num_generations}): each group needs a rollout. Lower it, or raise `num_generations`."
        )


def positive_parameters(args: Args):
    """Parameters of shapings are positive."""
    for name in ("policy_shaping_gamma", "on_policy_shaping_gamma", "policy_shaping_power", "on_policy_shaping_power"):
        if getattr(args, name) <= 0:
            raise ValueError(
                f"`{name}` must be positive, got {getattr(args, name)}. For no shaping set "
                f"`{name.rpartition('_')[0]}='none'`."
            )


def parameters_with_their_option(args: Args):
    """A parameter of an option is set only where that option reads it."""
    for name, (option, values) in PARAMETERS.items():
        if args.is_set(name) and getattr(args, option) not in values:
            raise ValueError(
                f"`{name}={getattr(args, name)}` has no effect with `{option}={getattr(args, option)!r}`. Remove "
                f"one of them, or set `{option}` to {' or '.join(map(repr, values))}."
            )


def ranges(args: Args):
    """Shares, probabilities and bounds are in their ranges."""
    low, high = args.demonstration_ratio_min, args.demonstration_ratio_max
    if low is not None and high is not None and low >= high:
        raise ValueError(f"`demonstration_ratio_min` ({low}) must be less than `demonstration_ratio_max` ({high}).")
    if high is not None and high <= 0 and args.policy_shaping not in ("log", "linear_log"):
        raise ValueError(
            f"`demonstration_ratio_max` must be positive, got {high}: with `policy_shaping={args.policy_shaping!r}` "
            "no coefficient is below 0, and no demonstration token would have a gradient. Raise it, or remove it."
        )
    if low is not None and low >= 1 and args.policy_shaping == "regularized":
        raise ValueError(
            f"`demonstration_ratio_min` must be less than 1 with `policy_shaping='regularized'`, got {low}: all "
            "coefficients are below 1, and no demonstration token would have a gradient. Lower it, or remove it."
        )
    if args.max_token_prob is not None and not 0 < args.max_token_prob < 1:
        raise ValueError(f"`max_token_prob` must be between 0 and 1, got {args.max_token_prob}.")
    if not 0 < args.demonstration_probability <= 1:
        raise ValueError(
            f"`demonstration_probability` must be above 0 and at most 1, got {args.demonstration_probability}. "
            "For no demonstrations set `num_demonstrations=0`."
        )
    if not 0 <= args.prefix_ratio_min <= args.prefix_ratio_max <= 1:
        raise ValueError(
            f"`prefix_ratio_min` ({args.prefix_ratio_min}) and `prefix_ratio_max` ({args.prefix_ratio_max}) must "
            "be between 0 and 1, the first not greater than the second."
        )
    # Hints of traces read what need not be shown
    if args.prefix_ratio_max == 0 and args.num_demonstrations > 0 and args.hint_source != "trace":
        raise ValueError(
            "`prefix_ratio_max=0` shows nothing of any trace. Raise it, or set `num_demonstrations=0` for no "
            "demonstrations."
        )
    if not 0 < args.demonstration_entropy_share <= 1:
        raise ValueError(
            f"`demonstration_entropy_share` must be above 0 and at most 1, got {args.demonstration_entropy_share}."
        )
    if args.demonstration_max_steps is not None and args.demonstration_max_steps < 1:
        raise ValueError(
            f"`demonstration_max_steps` must be at least 1, got {args.demonstration_max_steps}. For no demonstrations "
            "set `num_demonstrations=0`."
        )
    for name in ("oapl_value_beta", "oapl_policy_beta"):
        if getattr(args, name) <= 0:
            raise ValueError(f"`{name}` must be positive, got {getattr(args, name)}.")
    for name in ("rl_plus_focal", "srft_sft_weight", "srft_success_weight"):
        if getattr(args, name) < 0:
            raise ValueError(f"`{name}` must not be negative, got {getattr(args, name)}.")
    if args.srft_min_logp >= 0:
        raise ValueError(f"`srft_min_logp` is a log-probability, and so below 0, got {args.srft_min_logp}.")


def replay(args: Args):
    """Replay has a share, a bound and groups of its own."""
    if not 0 <= args.replay_ratio <= 1:
        raise ValueError(f"`replay_ratio` must be between 0 and 1, got {args.replay_ratio}.")
    for name in _REPLAY_OPTIONS:
        if args.is_set(name) and args.replay_ratio == 0:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` has no effect without replay (`replay_ratio=0`). Remove it, or set "
                "`replay_ratio`, which is 0.5 in ExGRPO."
            )
    if not 0 <= args.replay_start_solve_rate < 1:
        raise ValueError(
            f"`replay_start_solve_rate` must be at least 0 and less than 1, got {args.replay_start_solve_rate}."
        )
    if args.replay_max_trajectories < 1:
        raise ValueError(f"`replay_max_trajectories` must be at least 1, got {args.replay_max_trajectories}.")
    num_prompts = args.generation_batch_size // args.num_generations
    if 0 < args.replay_ratio and num_replayed(args.replay_ratio, num_prompts) < 1:
        raise ValueError(
            f"`replay_ratio={args.replay_ratio}` of the {num_prompts} prompts of a generation batch is less than one: "
            "nothing would be replayed. Raise it, or `steps_per_generation`."
        )
    if args.replay_ratio > 0 and args.num_generations - args.num_demonstrations < 2:
        raise ValueError(
            f"With `num_generations={args.num_generations}` and `num_demonstrations={args.num_demonstrations}` "
            "a group has one rollout, and is never solved in part: nothing would be replayed. Raise `num_generations`."
        )
    if args.replay_ratio > 0 and args.objective in ("rl_plus", "srft"):
        raise ValueError(
            f"`objective={args.objective!r}` has no place for the log-probs that a replay was recorded with. Set "
            "`replay_ratio=0`, or `objective='luffy'`."
        )
    if args.replay_ratio > 0 and args.demonstration_policy == "on_failure":
        raise ValueError(
            "`demonstration_policy='on_failure'` inserts demonstrations after rollouts were scored, and replays are "
            "inserted before. Set `replay_ratio=0`, or `demonstration_policy='always'`."
        )
    if args.replay_ratio > 0 and args.demonstration_loss == "sft":
        raise ValueError(
            "`demonstration_loss='sft'` would imitate replays, which have an advantage and a ratio. Set "
            "`replay_ratio=0`, or `demonstration_loss='policy_gradient'`."
        )


def hints(args: Args):
    """Hints have a failure to wait for, and options of their own."""
    for name in _HINT_OPTIONS:
        if args.is_set(name) and args.hint_source == "none":
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` has no effect without hints. Remove it, or set `hint_source` to "
                "'column' or 'trace'."
            )
    if args.hint_source == "none":
        return
    if args.demonstration_policy != "on_failure":
        raise ValueError(
            f"`hint_source={args.hint_source!r}` helps groups that fail. Set `demonstration_policy='on_failure'`."
        )
    if args.hint_source == "trace" and args.num_demonstrations == 0:
        raise ValueError(
            "`hint_source='trace'` takes beginnings of traces of the dataset, and there are none with "
            "`num_demonstrations=0`. Set it to 1, or `hint_source='column'`."
        )
    if args.hint_source == "column" and args.is_set("hint_levels"):
        raise ValueError(
            f"`hint_levels={args.hint_levels}` has no effect with `hint_source='column'`, whose rows have as many "
            "hints as they have. Remove it."
        )
    for name, minimum in (("hint_levels", 1), ("hint_warmup_steps", 0)):
        if getattr(args, name) < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(args, name)}.")
    if args.hint_source == "trace" and args.hint_levels > args.num_generations:
        raise ValueError(
            f"`hint_levels` ({args.hint_levels}) must be at most `num_generations` ({args.num_generations}): each "
            "completion of a group is sampled once more, under one hint."
        )
    if args.hint_source == "trace":
        for name in ("demonstration_max_steps", "demonstration_probability"):
            if args.is_set(name):
                raise ValueError(
                    f"`{name}={getattr(args, name)}` has no effect on hints, which `hint_source='trace'` takes from "
                    "the traces at every step. Remove it, or set `hint_source='column'`."
                )
    if 0 < args.max_steps <= args.hint_warmup_steps:
        raise ValueError(
            f"`hint_warmup_steps={args.hint_warmup_steps}` is no less than `max_steps={args.max_steps}`: no hint "
            "would be given. Lower it."
        )
    is_plain = args.hint_placement == "plain"
    if is_plain and (args.demonstration_loss == "sft" or args.objective in ("rl_plus", "srft")):
        name = "demonstration_loss" if args.demonstration_loss == "sft" else "objective"
        raise ValueError(
            f"`hint_placement='plain'` gives what a hint has helped to the log-probs under the hint as pi_phi, which "
            f"`{name}={getattr(args, name)!r}` does not read. Set `hint_placement='prompt'`."
        )
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(args.hint_template) if name is not None]
    except (ValueError, TypeError):
        names = []
    if sorted(names) != ["hint", "prompt"]:
        raise ValueError(
            f"`hint_template` is {args.hint_template!r}. It is a text with {{prompt}}, {{hint}} and no other braces."
        )


def objectives(args: Args):
    """An objective reads the options that are set."""
    for name in _NOT_READ.get(args.objective, ()):
        if args.is_set(name):
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` has no effect with `objective={args.objective!r}`. Remove one of "
                "them."
            )
    if args.objective in ("rl_plus", "srft") and not args.has_demonstration_tokens:
        raise ValueError(
            f"`objective={args.objective!r}` is a loss on demonstrations, and there are none. Set "
            "`num_demonstrations`, or `objective='luffy'`."
        )
    if args.objective == "oapl" and args.is_set("loss_type") and args.beta == 0.0:
        raise ValueError(
            f"`loss_type={args.loss_type!r}` has no effect with `objective='oapl'`, which is a mean over completions. "
            "Remove it."
        )
    if args.ratio_clipping == "until_mixed" and not args.has_demonstration_tokens:
        raise ValueError(
            "`ratio_clipping='until_mixed'` waits for demonstrations, and there are none. Set "
            "`ratio_clipping='on_policy'`."
        )


def prefix_schedules(args: Args):
    """A schedule has its number of updates, and something to move."""
    has_steps = args.prefix_schedule in PARAMETERS["prefix_schedule_steps"][1]
    if has_steps and not (args.prefix_schedule_steps or 0) > 0:
        raise ValueError(
            f"`prefix_schedule={args.prefix_schedule!r}` needs `prefix_schedule_steps`, the number of updates "
            "that it takes."
        )
    if args.is_set("prefix_schedule") and args.prefix_ratio_min == args.prefix_ratio_max:
        raise ValueError(
            f"`prefix_schedule={args.prefix_schedule!r}` has no effect while `prefix_ratio_min` and "
            f"`prefix_ratio_max` are both {args.prefix_ratio_max}. Lower `prefix_ratio_min`, or remove it."
        )
    if args.prefix_schedule == "fixed" and args.num_demonstrations == 1:
        raise ValueError(
            f"`prefix_ratio_min={args.prefix_ratio_min}` has no effect with `prefix_schedule='fixed'` and "
            "`num_demonstrations=1`: a single demonstration has the share `prefix_ratio_max`. Raise "
            "`num_demonstrations`, or set both ratios to that share without a schedule."
        )


def cross_entropy(args: Args):
    """Cross-entropy has no ratio and no advantage, and its weight has a schedule that makes sense."""
    if args.demonstration_loss != "sft":
        return
    for name in _POLICY_GRADIENT_OPTIONS:
        if args.is_set(name):
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` has no effect with `demonstration_loss='sft'`, which has no "
                "ratio and no advantage. Remove it."
            )
    if args.sft_loss_coef <= 0:
        raise ValueError(
            f"`sft_loss_coef` must be positive, got {args.sft_loss_coef}: it is the peak of the weight, and traces "
            "would teach nothing. Raise it, or set `num_demonstrations=0`."
        )
    if not 0 <= args.sft_loss_coef_min <= args.sft_loss_coef:
        raise ValueError(
            f"`sft_loss_coef_min` ({args.sft_loss_coef_min}) must be between 0 and `sft_loss_coef` "
            f"({args.sft_loss_coef})."
        )
    if args.sft_loss_combination == "interpolate" and args.sft_loss_coef > 1:
        raise ValueError(
            f"`sft_loss_coef={args.sft_loss_coef}` would turn the sign of the policy gradient with "
            "`sft_loss_combination='interpolate'`. Choose it between 0 and 1."
        )
    decay_steps = args.sft_loss_coef_decay_steps
    if args.sft_loss_coef_warmup_steps < 0 or (decay_steps is not None and decay_steps < 1):
        raise ValueError(
            f"`sft_loss_coef_warmup_steps` ({args.sft_loss_coef_warmup_steps}) must be at least 0 and "
            f"`sft_loss_coef_decay_steps` ({decay_steps}) at least 1, or None."
        )
    if args.is_set("sft_loss_coef_min") and decay_steps is None:
        raise ValueError(
            f"`sft_loss_coef_min={args.sft_loss_coef_min}` has no effect without `sft_loss_coef_decay_steps`, the "
            "number of updates over which the weight falls to it."
        )
    if args.sft_loss_combination == "interpolate" and args.sft_loss_reduction == "loss_type":
        raise ValueError(
            "`sft_loss_combination='interpolate'` weights two losses that are reduced on their own, and "
            "`sft_loss_reduction='loss_type'` makes one of them. Remove one of the two."
        )
    if args.advantage_baseline != "on_policy":
        raise ValueError(
            "`demonstration_loss='sft'` gives demonstrations no advantage, so they should not raise the baseline "
            "of rollouts either. Set `advantage_baseline='on_policy'`."
        )


def micro_batches(args: Args):
    """The cut into micro-batches fits the optimizer step, and what depends on it is set with it only."""
    if args.length_aware_batching and args.steps_per_generation % args.gradient_accumulation_steps != 0:
        raise ValueError(
            "`length_aware_batching=True` sorts the sequences of an optimizer step, and `steps_per_generation` "
            f"({args.steps_per_generation}) is no multiple of `gradient_accumulation_steps` "
            f"({args.gradient_accumulation_steps}). Change one of them, or set `length_aware_batching=False`."
        )
    for name in ("max_tokens_per_microbatch", "padding_free"):
        if args.is_set(name) and not args.length_aware_batching:
            raise ValueError(
                f"`{name}={getattr(args, name)}` cuts the optimizer step anew, and `length_aware_batching=False` "
                "leaves the cut to TRL. Remove one of them."
            )
    if args.max_tokens_per_microbatch is not None and args.max_tokens_per_microbatch < 1:
        raise ValueError(f"`max_tokens_per_microbatch` must be positive, got {args.max_tokens_per_microbatch}.")


def cached_ref_logps(args: Args):
    """Log-probabilities of the reference are kept where there is one that does not change."""
    if args.cache_demonstration_ref_logps and (args.beta == 0.0 or args.sync_ref_model):
        reason = "there is no reference with `beta=0`" if args.beta == 0.0 else "`sync_ref_model` changes them"
        raise ValueError(
            f"`cache_demonstration_ref_logps=True` keeps log-probabilities of the reference, and {reason}. Remove it."
        )
    if args.cache_demonstration_ref_logps and not args.length_aware_batching:
        raise ValueError(
            "`cache_demonstration_ref_logps=True` leaves traces out of the passes over a generation batch, which "
            "`length_aware_batching=False` leaves to TRL. Remove one of them."
        )


def clipped_grpo(args: Args):
    """GRPO that is clipped and has no demonstrations leaves the loss to TRL, which does not have these."""
    if not args.is_clipped_grpo:
        return
    for name in ("on_policy_shaping", "max_token_prob", "rollout_advantage_weight"):
        if args.is_set(name):
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` has no effect on plain GRPO (`num_demonstrations=0` with "
                "`ratio_clipping='on_policy'`). Remove it."
            )


def options_of_trl(args: Args):
    """Options of TRL that the loss of this package does not have."""
    if args.is_plain_grpo:
        return
    if args.loss_type not in _LOSS_TYPES:
        raise ValueError(
            f"`loss_type={args.loss_type!r}` is not supported with `num_demonstrations={args.num_demonstrations}` "
            f"and `ratio_clipping={args.ratio_clipping!r}`. Choose one of {', '.join(map(repr, _LOSS_TYPES))}, or "
            "train plain GRPO with `num_demonstrations=0`, `ratio_clipping='on_policy'` and "
            "`length_aware_batching=False`."
        )
    for name, (value, reason) in _REFUSED_WITH_DEMONSTRATIONS.items():
        if getattr(args, name) != value:
            if not args.has_demonstrations:
                reason = "only plain GRPO in TRL's micro-batches has it"
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` is not supported with "
                f"`num_demonstrations={args.num_demonstrations}` and `ratio_clipping={args.ratio_clipping!r}`: "
                f"{reason}. Set `{name}={value!r}`, or train plain GRPO with `num_demonstrations=0`, "
                "`ratio_clipping='on_policy'` and `length_aware_batching=False`."
            )
    if args.use_vllm and args.has_demonstrations and "seed" in (args.generation_kwargs or {}):
        raise ValueError(
            "A `seed` in `generation_kwargs` would make all rollouts of a prompt alike, as with demonstrations "
            "vLLM gets them as requests of their own. Remove it; `seed` of the configuration seeds the rest."
        )
    if args.max_completion_length is None:
        raise ValueError(
            "`max_completion_length=None` is not supported: it bounds demonstrations, and 'dr_grpo' divides by "
            "it. Set it to the longest completion in tokens."
        )
    if args.ratio_clipping == "none" and (args.is_set("epsilon") or args.is_set("epsilon_high")):
        raise ValueError(
            f"`epsilon={args.epsilon}` and `epsilon_high={args.epsilon_high}` clip nothing with "
            "`ratio_clipping='none'`. Set `ratio_clipping='on_policy'`, or remove them."
        )
    if args.mask_truncated_completions and args.demonstration_overflow == "truncate":
        raise ValueError(
            "`mask_truncated_completions=True` would mask the demonstrations that "
            "`demonstration_overflow='truncate'` cuts. Set `demonstration_overflow='drop'`, or turn it off."
        )


def options_of_demonstrations(args: Args):
    """Warns of options that read demonstrations where there are none."""
    if args.num_demonstrations > 0:
        return
    names: tuple[str, ...] = _TRACE_OPTIONS if args.has_demonstration_tokens else _DEMONSTRATION_OPTIONS
    if args.has_demonstration_tokens and not args.demonstration_sources:  # what a hint has helped to is kept nowhere
        names = (*_TRACE_OPTIONS, *CACHE_OPTIONS)
    read_by_hints = set()
    if args.hint_source != "none":
        read_by_hints = {"demonstration_policy", "failure_threshold", "failed_rollouts"}
    without_effect = [name for name in names if args.is_set(name) and name not in read_by_hints]
    if without_effect:
        what = "demonstrations" if not args.has_demonstration_tokens else "traces of the dataset"
        warnings.warn(
            f"`num_demonstrations=0` trains without {what}, so {', '.join(without_effect)} have no effect.",
            stacklevel=5,
        )


RULES: tuple[Callable[[Args], None], ...] = (
    types,
    choices,
    installed_extras,
    a_rollout_in_each_group,
    positive_parameters,
    parameters_with_their_option,
    ranges,
    objectives,
    replay,
    hints,
    prefix_schedules,
    cross_entropy,
    micro_batches,
    cached_ref_logps,
    clipped_grpo,
    options_of_trl,
    options_of_demonstrations,
)
