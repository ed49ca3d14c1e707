# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import copy
import dataclasses
import pickle
import re
import warnings
from typing import Any, Literal, get_args

import pytest
import tiny
from trl import GRPOConfig

from luffy_trl import LuffyConfig, config_rules
from luffy_trl.checks import check_arguments
from luffy_trl.methods import SOURCES, Method


ON_FAILURE = {"demonstration_policy": "on_failure"}
REPLAY = {"replay_ratio": 0.5, "per_device_train_batch_size": 8}
HINTS = {"hint_source": "column", "demonstration_policy": "on_failure"}
SFT = {"demonstration_loss": "sft", "advantage_baseline": "on_policy"}


def test_defaults_are_the_papers_recipe(tmp_path):
    args = tiny.make_args(tmp_path, num_generations=8, per_device_train_batch_size=8)
    assert (args.num_demonstrations, args.policy_shaping, args.policy_shaping_gamma) == (1, "regularized", 0.1)
    assert (args.ratio_clipping, args.advantage_baseline, args.demonstration_overflow) == ("none", "group", "drop")
    assert (args.loss_type, args.scale_rewards, args.beta, args.temperature) == ("dr_grpo", "none", 0.0, 1.0)


def test_only_the_algorithms_defaults_differ_from_grpo():
    stock = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    changed = {f.name for f in dataclasses.fields(LuffyConfig) if f.name in stock and f.default != stock[f.name]}
    assert changed == {"loss_type", "scale_rewards"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_shaping": "cubic"}, "`policy_shaping` is 'cubic'. Choose one of 'none', 'regularized', 'sqrt'"),
        ({"ratio_clipping": "all"}, "`ratio_clipping` is 'all'. Choose one of 'none', 'on_policy'"),
        ({"advantage_baseline": "batch"}, "`advantage_baseline` is 'batch'. Choose one of 'group', 'on_policy'"),
        ({"demonstration_overflow": "cut"}, "`demonstration_overflow` is 'cut'. Choose one of 'drop', 'truncate'"),
        ({"policy_shaping_gamma": 0.0}, "`policy_shaping_gamma` must be positive, got 0.0"),
        ({"policy_shaping_gamma": -0.1}, "`policy_shaping_gamma` must be positive, got -0.1"),
        ({"policy_shaping": "none", "policy_shaping_gamma": 0.3}, "has no effect with `policy_shaping='none'`"),
        ({"policy_shaping": "sqrt", "policy_shaping_power": 0.3}, "no effect with `policy_shaping='sqrt'`"),
        ({"policy_shaping_weight": 0.3}, "or set `policy_shaping` to 'log' or 'linear_log'"),
        ({"policy_shaping": "power", "policy_shaping_power": 0.0}, "`policy_shaping_power` must be positive, got 0.0"),
        ({"on_policy_shaping": "cubic"}, "`on_policy_shaping` is 'cubic'"),
        ({"on_policy_shaping_gamma": 0.3}, "no effect with `on_policy_shaping='none'`"),
        (
            {"demonstration_ratio_min": 0.9, "demonstration_ratio_max": 0.1},
            "`demonstration_ratio_min` (0.9) must be l",
        ),
        ({"max_token_prob": 1.0}, "`max_token_prob` must be between 0 and 1, got 1.0"),
        ({"demonstration_probability": 0.0}, "`demonstration_probability` must be above 0 and at most 1, got 0.0"),
        ({"prefix_ratio_min": 0.9, "prefix_ratio_max": 0.5}, "must be between 0 and 1, the first not greater than"),
        ({"prefix_ratio_max": 1.5}, "must be between 0 and 1"),
        ({"prefix_schedule": "step"}, "`prefix_schedule` is 'step'. Choose one of 'random', 'linear'"),
        ({"prefix_ratio_min": 0.0, "prefix_schedule": "linear"}, "needs `prefix_schedule_steps`"),
        ({"prefix_schedule": "fixed"}, "`prefix_schedule='fixed'` has no effect while"),
        ({"prefix_ratio_min": 0.0, "prefix_schedule_steps": 9}, "no effect with `prefix_schedule='random'`"),
        ({"sft_loss_coef": 0.5}, "no effect with `demonstration_loss='policy_gradient'`"),
        (
            {"demonstration_policy": "sometimes"},
            "`demonstration_policy` is 'sometimes'. Choose one of 'always', 'on_f",
        ),
        ({"failure_threshold": 0.5}, "no effect with `demonstration_policy='always'`"),
        ({"sft_token_weight": "chord"}, "no effect with `demonstration_loss='policy_gradient'`"),
        ({**SFT, "sft_loss_coef": 0.1, "sft_loss_coef_min": 0.2}, "must be between 0 and `sft_loss_coef` (0.1)"),
        ({**SFT, "sft_loss_coef_min": 0.2}, "has no effect without `sft_loss_coef_decay_steps`"),
        ({**SFT, "sft_loss_coef_decay_steps": 0}, "`sft_loss_coef_decay_steps` (0) at least 1"),
        ({**SFT, "sft_loss_coef": 2.0, "sft_loss_combination": "interpolate"}, "would turn the sign of the policy gr"),
        ({"demonstration_loss": "sft"}, "Set `advantage_baseline='on_policy'`"),
        (
            {"demonstration_loss": "sft", "advantage_baseline": "on_policy", "policy_shaping": "none"},
            "`policy_shaping='none'` has no effect with `demonstration_loss='sft'`",
        ),
        (
            {"num_demonstrations": 0, "ratio_clipping": "on_policy", "max_token_prob": 0.9},
            "`max_token_prob=0.9` has no effect on plain GRPO",
        ),
        (
            {"use_vllm": True, "generation_kwargs": {"seed": 1}},
            "A `seed` in `generation_kwargs` would make all rollouts",
        ),
        ({"length_aware_batching": "yes"}, "`length_aware_batching` must be True or False, got 'yes'"),
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 3},
            "`steps_per_generation` (3) is no multiple of `gradient_accumulation_steps` (2)",
        ),
        ({"num_demonstrations": 0, "ratio_clipping": "on_policy", "delta": 2.0}, "and `length_aware_batching=False`"),
        (
            {"length_aware_batching": False, "max_tokens_per_microbatch": 64},
            "`max_tokens_per_microbatch=64` cuts the optimizer step anew, and `length_aware_batching=False`",
        ),
        ({"length_aware_batching": False, "padding_free": True}, "`padding_free=True` cuts the optimizer step anew"),
        ({"max_tokens_per_microbatch": 0}, "`max_tokens_per_microbatch` must be positive, got 0"),
        ({"cache_demonstration_ref_logps": True}, "there is no reference with `beta=0`. Remove it"),
        (
            {"cache_demonstration_ref_logps": True, "beta": 0.1, "sync_ref_model": True},
            "and `sync_ref_model` changes them",
        ),
        (
            {"cache_demonstration_ref_logps": True, "beta": 0.1, "length_aware_batching": False},
            "`length_aware_batching=False` leaves to TRL. Remove one of them",
        ),
        ({"num_demonstrations": "1"}, "`num_demonstrations` must be a whole number, got '1'"),
        ({"num_demonstrations": 1.5}, "`num_demonstrations` must be a whole number, got 1.5"),
        ({"policy_shaping_gamma": "0.1"}, "`policy_shaping_gamma` must be a number, got '0.1'"),
        ({"policy_shaping_gamma": float("nan")}, "`policy_shaping_gamma` must be a number, got nan"),
        ({"max_token_prob": "0.9"}, "`max_token_prob` must be a number, got '0.9'"),
        ({"max_completion_length": None}, "`max_completion_length=None` is not supported"),
        ({"num_demonstrations": 4}, "`num_demonstrations` (4) must be at least 0 and less than `num_generations` (4)"),
        ({"num_demonstrations": -1}, "`num_demonstrations` (-1) must be at least 0"),
        ({"loss_type": "cispo"}, "`loss_type='cispo'` is not supported with `num_demonstrations=1`"),
        ({"loss_type": "sapo", "num_demonstrations": 0}, "`loss_type='sapo'` is not supported"),
        ({"importance_sampling_level": "sequence"}, "`importance_sampling_level='sequence'` is not supported"),
        ({"delta": 2.0}, "`delta=2.0` is not supported"),
        ({"off_policy_mask_threshold": 0.1}, "`off_policy_mask_threshold=0.1` is not supported"),
        ({"top_entropy_quantile": 0.2}, "`top_entropy_quantile=0.2` is not supported"),
        ({"use_adaptive_entropy": True}, "`use_adaptive_entropy=True` is not supported"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "`multi_objective_aggregation='normalize_then_sum'`"),
        ({"use_transformers_continuous_batching": True}, "`use_transformers_continuous_batching=True` is not support"),
        ({"epsilon": 0.3}, "`epsilon=0.3` and `epsilon_high=None` clip nothing with `ratio_clipping='none'`"),
        ({"epsilon_high": 0.3}, "clip nothing with `ratio_clipping='none'`. Set `ratio_clipping='on_policy'`"),
        ({"mask_truncated_completions": True, "demonstration_overflow": "truncate"}, "would mask the demonstrations"),
        ({"objective": "grpo"}, "`objective` is 'grpo'. Choose one of 'luffy', 'rl_plus', 'srft', 'oapl'"),
        ({"rl_plus_focal": 1.0}, "`rl_plus_focal=1.0` has no effect with `objective='luffy'`"),
        ({"objective": "rl_plus", "policy_shaping": "none"}, "no effect with `objective='rl_plus'`"),
        ({"objective": "rl_plus", "num_demonstrations": 0}, "is a loss on demonstrations, and there are none"),
        ({"objective": "rl_plus", "rl_plus_focal": -1.0}, "`rl_plus_focal` must not be negative, got -1.0"),
        ({"objective": "srft", "max_token_prob": 0.9}, "`max_token_prob=0.9` has no effect with `objective='srft'`"),
        ({"objective": "oapl", "advantage_baseline": "on_policy"}, "no effect with `objective='oapl'`"),
        ({"objective": "oapl", "loss_type": "dapo"}, "which is a mean over completions. Remove it"),
        ({"objective": "oapl", "oapl_value_beta": 0.0}, "`oapl_value_beta` must be positive, got 0.0"),
        ({"ratio_clipping": "until_mixed", "num_demonstrations": 0}, "waits for demonstrations, and there are none"),
        ({"failed_rollouts": "drop"}, "`failed_rollouts=drop` has no effect with `demonstration_policy='always'`"),
        ({"sft_loss_reduction": "loss_type"}, "no effect with `demonstration_loss='policy_gradient'`"),
        ({"demonstration_entropy_share": 0.0}, "`demonstration_entropy_share` must be above 0 and at most 1, got 0.0"),
        ({"demonstration_max_steps": 0}, "`demonstration_max_steps` must be at least 1, got 0"),
        ({"prefix_ratio_min": 0.0, "prefix_schedule": "random_cosine"}, "needs `prefix_schedule_steps`"),
        ({"replay_ratio": 1.5}, "`replay_ratio` must be between 0 and 1, got 1.5"),
        ({"replay_choice": "logp"}, "`replay_choice='logp'` has no effect without replay"),
        ({**REPLAY, "replay_start_solve_rate": 1.0}, "at least 0 and less than 1, got 1.0"),
        ({**REPLAY, "replay_max_trajectories": 0}, "`replay_max_trajectories` must be at least 1, got 0"),
        ({**REPLAY, "demonstration_policy": "on_failure"}, "replays are inserted before"),
        ({**REPLAY, **SFT}, "would imitate replays"),
        ({"replay_ratio": 0.5}, "`replay_ratio=0.5` of the 1 prompts of a generation batch is less than one"),
        ({**REPLAY, "num_demonstrations": 3}, "a group has one rollout, and is never solved in part"),
        ({**REPLAY, "objective": "rl_plus"}, "has no place for the log-probs that a replay was recorded with"),
        ({**SFT, "sft_loss_combination": "interpolate", "sft_loss_reduction": "loss_type"}, "Remove one of the two"),
        ({"objective": "srft", "srft_min_logp": 0.0}, "`srft_min_logp` is a log-probability, and so below 0, got 0.0"),
        ({"objective": "oapl", "oapl_value_beta": float("inf")}, "`oapl_value_beta` must be a number, got inf"),
        (
            {"objective": "srft", **ON_FAILURE, "failed_rollouts": "drop"},
            "`failed_rollouts='drop'` has no effect with",
        ),
        ({**HINTS, "num_demonstrations": 0, "objective": "srft"}, "is a loss on demonstrations, and there are none"),
        ({**HINTS, "hint_placement": "plain", **SFT}, "which `demonstration_loss='sft'` does not read"),
        ({**ON_FAILURE, "hint_source": "trace", "hint_levels": 5}, "`hint_levels` (5) must be at most"),
        ({**ON_FAILURE, "hint_source": "trace", "demonstration_max_steps": 5}, "has no effect on hints"),
        ({**HINTS, "max_steps": 5, "hint_warmup_steps": 5}, "no hint would be given. Lower it"),
        ({**HINTS, "hint_template": "Problem: {hint}"}, "`hint_template` is 'Problem: {hint}'. It is a text with"),
        ({**HINTS, "hint_template": 5}, "`hint_template` is 5. It is a text with"),
        ({"hint_levels": 2}, "`hint_levels=2` has no effect without hints"),
        ({"hint_source": "column"}, "helps groups that fail. Set `demonstration_policy='on_failure'`"),
        ({**HINTS, "hint_source": "trace", "num_demonstrations": 0}, "there are none with `num_demonstrations=0`"),
        ({**HINTS, "hint_levels": 2}, "`hint_levels=2` has no effect with `hint_source='column'`"),
        ({**HINTS, "hint_warmup_steps": -1}, "`hint_warmup_steps` must be at least 0, got -1"),
        ({**HINTS, "hint_template": "{prompt} {help}"}, "It is a text with {prompt}, {hint} and no other braces"),
        ({**HINTS, "hint_template": "{prompt}"}, "`hint_template` is '{prompt}'. It is a text with"),
        ({"prefix_ratio_min": 0.0, "prefix_ratio_max": 0.0}, "`prefix_ratio_max=0` shows nothing of any trace"),
        ({"prefix_ratio_min": 0.0, "prefix_schedule": "fixed"}, "`prefix_ratio_min=0.0` has no effect with `prefix_"),
        ({"demonstration_ratio_max": 0.0}, "`demonstration_ratio_max` must be positive, got 0.0"),
        ({"demonstration_ratio_min": 1.0}, "`demonstration_ratio_min` must be less than 1 with"),
        ({**SFT, "sft_loss_coef": 0.0}, "`sft_loss_coef` must be positive, got 0.0: it is the peak of the weight"),
        ({**SFT, "sft_loss_coef": 0.0, "sft_loss_coef_warmup_steps": 5}, "`sft_loss_coef` must be positive, got 0.0"),
        (
            {"reward_weights": [1.0, float("nan")]},
            "`reward_weights` is [1.0, nan]. Set it to a list of finite numbers",
        ),
        ({"reward_weights": [float("inf")]}, "`reward_weights` is [inf]. Set it to a list of finite numbers"),
        ({"reward_weights": 1.0}, "`reward_weights` is 1.0. Set it to a list of finite numbers, one for each"),
        ({"scale_rewards": "std"}, "`scale_rewards` is 'std'. Choose one of 'none', 'group', 'batch'"),
        ({"per_device_train_batch_size": "4"}, "`per_device_train_batch_size` is '4'. Set it to a whole number"),
    ],
)
def test_refused_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny.make_args(tmp_path, **options)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("name", "minimum"),
    [
        ("num_generations", 2),
        ("num_generations_eval", 1),
        ("per_device_train_batch_size", 1),
        ("per_device_eval_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("steps_per_generation", 1),
        ("generation_batch_size", 1),
        ("num_iterations", 1),
        ("max_completion_length", 1),
    ],
)
def test_counts_of_trl(tmp_path, name, minimum, plain):
    """What TRL divides by, or fails on at a step of training, is refused by name in every method."""
    for value in (0, -5, minimum - 1, True, 1.5):
        message = f"`{name}` is {value!r}. Set it to a whole number of at least {minimum}."
        with pytest.raises(ValueError, match=re.escape(message)):
            tiny.make_args(tmp_path, **{**(tiny.PLAIN_GRPO if plain else {}), name: value})


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["beta", "epsilon", "epsilon_high", "temperature"])
def test_numbers_of_trl(tmp_path, name, plain):
    options = tiny.PLAIN_GRPO if plain else {"ratio_clipping": "on_policy"}
    values = [float("nan"), -1.0, "0.1", *([float("inf")] if name in ("beta", "temperature") else [])]
    for value in [*values, *([None] if name != "epsilon_high" else [])]:
        with pytest.raises(ValueError, match=re.escape(f"`{name}` is {value!r}. Set it to a ")):
            tiny.make_args(tmp_path, **{**options, name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0, "epsilon": 0.0, "epsilon_high": None, "num_generations_eval": 1},
        {"epsilon_high": float("inf"), "scale_rewards": True, "reward_weights": [0, -0.5], "generation_batch_size": 8},
        {
            "scale_rewards": "batch",
            "reward_weights": (1.0,),
            "steps_per_generation": None,
            "gradient_checkpointing": True,
        },
        {**HINTS, "num_generations": 2},
        {**HINTS, "hint_source": "trace", "prefix_ratio_min": 0.0, "prefix_ratio_max": 0.0},
        {"policy_shaping": "log", "demonstration_ratio_max": -0.5},
        {"policy_shaping": "none", "demonstration_ratio_min": 2.0},
        {"num_demonstrations": 2, "prefix_ratio_min": 0.0, "prefix_schedule": "fixed"},
        {**SFT, "sft_loss_coef": 0.1, "sft_loss_coef_warmup_steps": 5, "sft_loss_coef_decay_steps": 5},
    ],
)
def test_accepted_options(tmp_path, options):
    """Neighbours of what is refused."""
    tiny.make_args(tmp_path, **{"ratio_clipping": "on_policy", **options})


@pytest.mark.parametrize("name", ["cache_demonstration_rewards", "cache_demonstration_ref_logps"])
def test_a_cache_that_would_stay_empty(tmp_path, name):
    def check(tools=None, **options):
        args = tiny.make_args(tmp_path, beta=0.1, **{name: True, "prefix_ratio_min": 0.0, **options})
        check_arguments(args, [], None, tools, None, None)

    with pytest.raises(ValueError, match=f"`{name}=True` has no effect with `prefix_ratio_max=0.5`"):
        check(prefix_ratio_max=0.5)
    check()
    check(prefix_ratio_max=0.5, **REPLAY)  # replays are complete
    check(prefix_ratio_max=0.5, tools=[len])  # the last turn may be nearest
    with pytest.warns(UserWarning, match=f"so {name} have no effect"):
        tiny.make_args(tmp_path, beta=0.1, **{**HINTS, "hint_placement": "plain", "num_demonstrations": 0, name: True})


@dataclasses.dataclass
class Extended(LuffyConfig):
    """What a user adds, of every type that a dataclass takes."""

    rate: float = 0.5
    texts: list = dataclasses.field(default_factory=list)
    table: dict = None
    names: list[str] | None = None
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    anything: Any = 1
    policy_shaping_gamma: float = 0.3


def test_a_class_that_extends_it_has_fields_of_its_own(tmp_path):
    own = {"texts": ["a"], "table": {"a": 1}, "names": ["a"], "name": "a", "kind": "c", "anything": object, "rate": 1}
    args = tiny.make_args(tmp_path, Extended, **own)
    assert {name: getattr(args, name) for name in own} == own
    assert (args.policy_shaping_gamma, args.is_set("policy_shaping_gamma")) == (0.3, False)
    for options, message in (
        ({"policy_shaping_gamma": "0.3"}, "`policy_shaping_gamma` must be a number, got '0.3'"),
        ({"policy_shaping": "cubic"}, "`policy_shaping` is 'cubic'"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.make_args(tmp_path, Extended, **options)


def test_a_class_with_types_as_texts(tmp_path):
    """As a module has them under `from __future__ import annotations`."""
    fields = [("flag", "bool", False), ("rate", "float", 0.5), ("name", "str", "a"), ("kind", "Literal['a']", "a")]
    cls = dataclasses.make_dataclass("Postponed", fields, bases=(LuffyConfig,))
    args = tiny.make_args(tmp_path, cls, flag=True, name="b")
    assert (args.flag, args.rate, args.name, args.kind) == (True, 0.5, "b", "a")


def test_every_objective_says_what_it_does_not_read():
    (field,) = [f for f in dataclasses.fields(LuffyConfig) if f.name == "objective"]
    assert {"luffy", *config_rules._NOT_READ} == set(get_args(field.type))


def test_every_source_counts_as_demonstrations(tmp_path):
    used = {"dataset": {}, "replay": {**REPLAY, "num_demonstrations": 0}}
    assert set(used) == set(SOURCES)
    for name, options in used.items():
        args = tiny.make_args(tmp_path, ratio_clipping="on_policy", length_aware_batching=False, **options)
        assert args.demonstration_sources == [name]
        assert args.has_demonstrations and args.has_demonstration_tokens and not args.is_plain_grpo
        assert [type(source) for source in Method.from_args(args).sources] == [SOURCES[name]]
    assert tiny.make_args(tmp_path, **REPLAY).demonstration_sources == ["dataset", "replay"]
    assert tiny.make_args(tmp_path, **tiny.PLAIN_GRPO).demonstration_sources == []


@pytest.mark.parametrize(
    "options", [{"loss_type": "cispo"}, {"delta": 2.0}, {"top_entropy_quantile": 0.2}, {"epsilon": 0.3}]
)
def test_plain_grpo_takes_every_option_of_trl(tmp_path, options):
    own = {"num_demonstrations": 0, "ratio_clipping": "on_policy", "length_aware_batching": False}
    assert tiny.make_args(tmp_path, **own, **options).is_plain_grpo


def test_options_without_effect_are_named(tmp_path):
    with pytest.warns(UserWarning, match="`num_demonstrations=0` trains without.*so policy_shaping, advantage_baseli"):
        tiny.make_args(tmp_path, num_demonstrations=0, policy_shaping="none", advantage_baseline="on_policy")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny.make_args(tmp_path, num_demonstrations=0)


def test_every_field_is_documented_twice():
    own = {f.name: f for f in dataclasses.fields(LuffyConfig)}.keys() - {
        f.name for f in dataclasses.fields(GRPOConfig)
    }
    for field in dataclasses.fields(LuffyConfig):
        if field.name in own | {"loss_type", "scale_rewards"}:
            # Python 3.13 takes the indentation of docstrings away
            (text,) = re.findall(rf"^ *{field.name} \(`(.*)$", LuffyConfig.__doc__, re.MULTILINE)
            default = field.default
            if isinstance(default, str):
                default = '"' + default.replace("\n", "\\n") + '"'
            default = "" if field.default is None else f", defaults to `{default}`"
            assert text.endswith(f"*optional*{default}):")
            assert len(field.metadata["help"]) > 20


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_keep_the_token(tmp_path, copied):
    args = LuffyConfig(str(tmp_path), hub_token="hf_secret", use_cpu=True, bf16=False, reward_weights=[1.0])
    other = copied(args)
    assert type(other) is LuffyConfig and other.hub_token == "hf_secret" and other.to_dict() == args.to_dict()
    assert (other.reward_weights is args.reward_weights) == (copied is not copy.deepcopy)
    assert pickle.loads(pickle.dumps(args)).hub_token is None  # `training_args.bin` is pushed


def test_the_login_of_an_address_is_in_no_file(tmp_path):
    args = tiny.make_args(tmp_path, vllm_server_base_url="http://user:secret@host:8000/base")
    assert args.vllm_server_base_url == "http://user:secret@host:8000/base"
    assert "secret" not in args.to_json_string() and args.to_dict()["vllm_server_base_url"] == "http://host:8000/base"
    assert pickle.loads(pickle.dumps(args)).vllm_server_base_url == "http://host:8000/base"
    assert copy.deepcopy(args).vllm_server_base_url == args.vllm_server_base_url
