# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The pure functions, against the authors' released loss and against numbers worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from luffy_trl.losses import (
    STATISTICS,
    CrossEntropy,
    Denominators,
    KLPenalty,
    Objective,
    PolicyGradient,
    Shaping,
    TokenBatch,
    group_advantages,
    mixed_policy_loss,
    policy_shaping,
    sft_coefficient,
)


REFERENCE = np.load(Path(__file__).parent / "data" / "luffy_loss_reference.npz")
CASES = json.loads(REFERENCE["meta"].tobytes())
KINDS = {"no_reshape": "none", "square_root": "sqrt", "pow": "power", "logp": "log", "p_logp": "linear_log"}


def shaping_of(case, side):
    """The released code's option as ours."""
    option = case[f"{side}_policy_reshape"]
    if option.startswith("p_div_p_"):
        return Shaping("regularized", gamma=float(option.removeprefix("p_div_p_")))
    weight = case[f"{side}_policy_reshape_weight"]
    if side == "on" and option == "logp":
        weight = 1.0  # the released code does not apply it there
    return Shaping(KINDS[option], power=case[f"{side}_policy_reshape_pow_exp"], weight=weight)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_mixed_policy_loss_equals_the_released_loss(index):
    case = CASES[index]

    def array(name):
        return torch.from_numpy(REFERENCE[f"{index}/{name}"])

    mask, demonstration_mask = array("completion_mask"), array("off_policy_mask")
    behavior_logps = None
    if f"{index}/behavior_probs" in REFERENCE:
        behavior_logps = torch.log(array("behavior_probs") + 1e-6)  # their guard against a division by 0
    logps = array("log_prob").requires_grad_()
    clip_range = None
    if not case["loss_remove_clip"]:
        clip_range = (1 - case["cliprange"], max(case["clip_upper_bound"], 1 + case["cliprange"]))
    per_token_loss, stats = mixed_policy_loss(
        logps,
        array("old_log_prob"),
        array("advantages"),
        mask,
        demonstration_mask,
        behavior_logps=behavior_logps,
        shaping=shaping_of(case, "off"),
        on_policy_shaping=shaping_of(case, "on"),
        clip_range=clip_range,
        ratio_range=(case["off_min_clip"], case["off_max_clip"]),
        max_token_prob=case["all_max_clip"],
    )

    # Their aggregation: the sum over tokens divided by the response length, or the mean over tokens.
    denominator = mask.size(1)
    if not case["loss_remove_token_mean"]:
        denominator = (mask & (logps.exp() <= (case["all_max_clip"] or 1))).sum()
    loss = per_token_loss.sum() / denominator
    (grad,) = torch.autograd.grad(loss, logps)
    outputs = case["outputs"]
    assert loss.item() == pytest.approx(outputs["pg_loss"], abs=1e-6)
    torch.testing.assert_close(grad, array("grad"), atol=1e-6, rtol=0)

    is_demonstration = mask & demonstration_mask
    assert stats["coefficient"][is_demonstration].mean().item() == pytest.approx(outputs["off_ratio_mean"], abs=1e-6)
    clipped = (stats["low_clipped"] | stats["high_clipped"])[mask & ~demonstration_mask].sum()
    if case["all_max_clip"] is None:
        for kind, name in ((is_demonstration, "off_pg_loss"), (mask & ~demonstration_mask, "on_pg_loss")):
            assert per_token_loss[kind].mean().item() == pytest.approx(outputs[name], abs=1e-6)
    if clip_range is None:
        assert clipped == 0


@pytest.mark.parametrize(
    ("kind", "parameters", "values", "derivatives"),
    [
        ("none", {}, [0.1, 0.5, 1.0], [1.0, 1.0, 1.0]),
        # r / (r + 0.1) and 0.1 / (r + 0.1)^2
        ("regularized", {"gamma": 0.1}, [0.5, 5 / 6, 10 / 11], [2.5, 0.1 / 0.36, 0.1 / 1.21]),
        ("regularized", {"gamma": 0.5}, [1 / 6, 0.5, 2 / 3], [0.5 / 0.36, 0.5, 0.5 / 2.25]),
        ("sqrt", {}, [math.sqrt(0.1), math.sqrt(0.5), 1.0], [0.5 / math.sqrt(0.1), 0.5 / math.sqrt(0.5), 0.5]),
        ("power", {"power": 2.0}, [0.01, 0.25, 1.0], [0.2, 1.0, 2.0]),
        ("log", {"weight": 0.3}, [0.3 * math.log(0.1), 0.3 * math.log(0.5), 0.0], [3.0, 0.6, 0.3]),
        ("linear_log", {"weight": 0.2}, [0.1 + 0.2 * math.log(0.1), 0.5 + 0.2 * math.log(0.5), 1.0], [3.0, 1.4, 1.2]),
    ],
)
def test_policy_shaping_by_hand(kind, parameters, values, derivatives):
    ratio = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    shaped = policy_shaping(ratio, kind, **parameters)
    (grad,) = torch.autograd.grad(shaped.sum(), ratio)
    torch.testing.assert_close(shaped.detach(), torch.tensor(values, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(grad, torch.tensor(derivatives, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["regularized", "sqrt", "power", "log", "linear_log"])
def test_policy_shaping_of_an_underflown_ratio_has_a_finite_gradient(kind):
    logp = torch.tensor([-120.0, -1.0], requires_grad=True)  # exp(-120) is 0 in float32
    policy_shaping(logp.exp(), kind).sum().backward()
    assert torch.isfinite(logp.grad).all()
    assert logp.grad[0] == 0


def test_policy_shaping_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="Unknown shaping 'cubic'. Choose one of none, regularized, sqrt"):
        policy_shaping(torch.ones(1), "cubic")
    with pytest.raises(ValueError, match="`gamma` must be positive, got 0"):
        policy_shaping(torch.ones(1), "regularized", gamma=0)


def test_an_improbable_demonstration_token_beside_shaped_rollouts_has_a_finite_gradient():
    logps = torch.tensor([[-110.0, -1.0]], requires_grad=True)
    per_token_loss, _ = mixed_policy_loss(
        logps,
        torch.tensor([[torch.nan, -1.0]]),  # not read on demonstration tokens
        torch.tensor([1.0]),
        torch.ones(1, 2),
        torch.tensor([[True, False]]),
        on_policy_shaping=Shaping("regularized"),
    )
    per_token_loss.sum().backward()
    # d/dlogp of f(pi) / f(pi_old) at pi_old = pi is gamma / (pi + gamma)
    assert logps.grad[0].tolist() == pytest.approx([0.0, -0.1 / (math.exp(-1) + 0.1)], abs=1e-6)


def test_a_ratio_is_not_given_twice():
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1)
    with pytest.raises(ValueError, match="Give `behavior_logps` to `importance_ratio`"):
        mixed_policy_loss(zeros, zeros, zeros, mask, mask.bool(), behavior_logps=zeros, ratio=mask)


@pytest.mark.parametrize("advantage", [-0.75, 0.25])
@pytest.mark.parametrize("prob", [0.02, 0.3, 0.95])
def test_gradient_of_a_demonstration_token(prob, advantage):
    """d loss / d log pi = -A gamma pi / (pi + gamma)^2, for both signs of A: neither is clipped away."""
    logps = torch.tensor([[math.log(prob)]], dtype=torch.float64, requires_grad=True)
    per_token_loss, _ = mixed_policy_loss(
        logps,
        logps.detach(),
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, 1),
        torch.ones(1, 1, dtype=torch.bool),
        clip_range=(0.8, 1.2),
    )
    per_token_loss.sum().backward()
    assert logps.grad.item() == pytest.approx(-advantage * 0.1 * prob / (prob + 0.1) ** 2, abs=1e-12)


@pytest.mark.parametrize("prob", [0.02, 0.3, 0.95])
def test_a_step_on_a_failed_demonstration_lowers_its_probability(prob):
    """The token's probability under a softmax, before and after a step of gradient descent."""
    logits = torch.tensor([[math.log(prob), math.log(1 - prob)]], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(-1)[:, :1]
    per_token_loss, _ = mixed_policy_loss(
        logps,
        logps.detach(),
        torch.tensor([-0.5], dtype=torch.float64),
        torch.ones(1, 1),
        torch.ones(1, 1, dtype=torch.bool),
    )
    per_token_loss.sum().backward()
    after = (logits - 0.1 * logits.grad).softmax(-1)[0, 0].item()
    assert after < prob - 1e-5


def test_rollout_tokens_by_hand():
    ratios = torch.tensor([[0.5, 1.0, 1.5]], dtype=torch.float64)
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    mask, demonstration_mask = torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool)

    def loss(advantage, clip_range):
        logps = ratios.log().requires_grad_()
        values, stats = mixed_policy_loss(
            logps, zeros, torch.tensor([advantage]), mask, demonstration_mask, clip_range=clip_range
        )
        values.sum().backward()
        return values.tolist()[0], logps.grad.tolist()[0], stats

    approx = pytest.approx
    # not clipped: -r A, gradient -r A
    values, grad, _ = loss(2.0, None)
    assert values == approx([-1.0, -2.0, -3.0])
    assert grad == approx([-1.0, -2.0, -3.0])
    # PPO, A > 0: 1.5 is cut to 1.2 and has no gradient
    values, grad, stats = loss(2.0, (0.8, 1.2))
    assert values == approx([-1.0, -2.0, -2.4])
    assert grad == approx([-1.0, -2.0, 0.0])
    assert stats["high_clipped"].tolist() == [[False, False, True]]
    # PPO, A < 0: 0.5 is lifted to 0.8 and has no gradient
    values, grad, stats = loss(-2.0, (0.8, 1.2))
    assert values == approx([1.6, 2.0, 3.0])
    assert grad == approx([0.0, 2.0, 3.0])
    assert stats["low_clipped"].tolist() == [[True, False, False]]


def test_one_row_may_hold_both_kinds_of_token():
    probs = torch.tensor([[0.2, 0.4]], dtype=torch.float64)
    per_token_loss, stats = mixed_policy_loss(
        probs.log(),
        torch.tensor([[0.9, 0.5]], dtype=torch.float64).log(),
        torch.tensor([0.5], dtype=torch.float64),
        torch.ones(1, 2),
        torch.tensor([[True, False]]),
    )
    assert stats["coefficient"].tolist()[0] == pytest.approx([0.2 / 0.3, 0.8])
    assert per_token_loss.tolist()[0] == pytest.approx([-0.5 * 0.2 / 0.3, -0.4])


def test_padding_carries_no_loss_and_no_gradient():
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    per_token_loss, _ = mixed_policy_loss(
        logps, logps.detach(), torch.tensor([1.0, -1.0]), mask, torch.tensor([[True] * 3, [False] * 3])
    )
    per_token_loss.sum().backward()
    assert (per_token_loss != 0).int().tolist() == mask.tolist()
    assert (logps.grad != 0).int().tolist() == mask.tolist()


NAN = float("nan")


@pytest.mark.parametrize(
    ("rewards", "demonstrations", "baseline", "expected"),
    [
        # one demonstration succeeds, three rollouts fail: mean 1/4
        ([1, 0, 0, 0], [1, 0, 0, 0], "group", [0.75, -0.25, -0.25, -0.25]),
        # mean over rollouts 0
        ([1, 0, 0, 0], [1, 0, 0, 0], "on_policy", [1, 0, 0, 0]),
        # a demonstration that fails where rollouts succeed is pushed down: mean over rollouts 2/3
        ([0, 1, 1, 0], [1, 0, 0, 0], "on_policy", [-2 / 3, 1 / 3, 1 / 3, -2 / 3]),
        # a single rollout is its own baseline (the released code takes 0 for it)
        ([1, 1, 1, 1], [1, 1, 1, 0], "on_policy", [0, 0, 0, 0]),
        ([1, 1, 0, 1], [1, 1, 1, 0], "on_policy", [0, 0, -1, 0]),
        # no demonstrations: GRPO
        ([1, 0, 0, 1], [0, 0, 0, 0], "on_policy", [0.5, -0.5, -0.5, 0.5]),
        # a row without a reward has no advantage and no say
        ([1, NAN, 0, 1], [1, 0, 0, 0], "group", [1 / 3, 0, -2 / 3, 1 / 3]),
        ([1, NAN, 0, 1], [1, 0, 0, 0], "on_policy", [0.5, 0, -0.5, 0.5]),
        # no rollout has a reward: there is no baseline to judge by
        ([1, NAN, NAN, NAN], [1, 0, 0, 0], "on_policy", [0, 0, 0, 0]),
    ],
)
def test_group_advantages_by_hand(rewards, demonstrations, baseline, expected):
    other_group = [4.0, 2.0, 2.0, 0.0]
    advantages = group_advantages(
        torch.tensor(rewards + other_group, dtype=torch.float64),
        4,
        torch.tensor(demonstrations + [0] * 4, dtype=torch.bool),
        baseline=baseline,
    )
    assert advantages.tolist() == pytest.approx([*expected, 2.0, 0.0, 0.0, -2.0], abs=1e-12)


def test_group_advantages_divided_by_a_standard_deviation():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    rows = torch.tensor([True, False, False, False] * 2)
    # group: std of (1, 0, 0, 0) is 0.5, of (1, 1, 0, 0) it is sqrt(1/3)
    deviations = [0.5 + 1e-4] * 4 + [math.sqrt(1 / 3) + 1e-4] * 4
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5]) / torch.tensor(deviations)
    advantages = group_advantages(rewards, 4, rows, scale="group")
    torch.testing.assert_close(advantages, expected.double(), atol=1e-6, rtol=0)
    # batch: std of three ones and five zeros is sqrt(15/56)
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5]) / (math.sqrt(15 / 56) + 1e-4)
    advantages = group_advantages(rewards, 4, rows, scale="batch")
    torch.testing.assert_close(advantages, expected.double(), atol=1e-6, rtol=0)
    # rollouts only: those of the first group do not differ, so it is not divided; those of the second are (1, 0, 0)
    deviation = math.sqrt(1 / 3) + 1e-4
    advantages = group_advantages(rewards, 4, rows, baseline="on_policy", scale="group")
    expected = [1.0, 0.0, 0.0, 0.0, 2 / 3 / deviation, 2 / 3 / deviation, -1 / 3 / deviation, -1 / 3 / deviation]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-9)


def has_our_advantages(case):
    """
    The released split estimator is wrong for a single rollout, and TRL, whose arithmetic is ours, adds 1e-4 to the
    standard deviation where the released code adds 1e-6.
    """
    return not case["use_std"] and (case["estimator"] == "grpo" or case["group_size"] - case["n_off"] > 1)


@pytest.mark.parametrize("index", [i for i, case in enumerate(CASES) if has_our_advantages(case)])
def test_group_advantages_equal_the_released_ones(index):
    case = CASES[index]
    mask = torch.from_numpy(REFERENCE[f"{index}/completion_mask"])
    rows = torch.from_numpy(REFERENCE[f"{index}/off_policy_mask"]).any(dim=1)
    advantages = group_advantages(
        torch.from_numpy(REFERENCE[f"{index}/rewards"]),
        case["group_size"],
        rows,
        baseline="group" if case["estimator"] == "grpo" else "on_policy",
    )
    expected = torch.from_numpy(REFERENCE[f"{index}/advantages"])
    torch.testing.assert_close(advantages.unsqueeze(1) * mask, expected * mask, atol=1e-6, rtol=0)


def test_group_advantages_refuses_what_it_does_not_know():
    rewards, rows = torch.zeros(4), torch.zeros(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="Unknown advantage baseline 'median'"):
        group_advantages(rewards, 4, rows, baseline="median")
    with pytest.raises(ValueError, match="Unknown reward scale 'max'"):
        group_advantages(rewards, 4, rows, scale="max")


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (1, 0.225), (4, 0.9), (9, 0.05 + 0.85 / 2), (14, 0.05), (1000, 0.05)],
)
def test_sft_coefficient_by_hand(step, expected):
    coefficient = sft_coefficient(step, 0.9, minimum=0.05, warmup_steps=4, decay_steps=10)
    assert coefficient == pytest.approx(expected, abs=1e-12)


def test_sft_coefficient_without_a_schedule():
    assert [sft_coefficient(step, 0.3) for step in (0, 1, 1000)] == [0.3] * 3


def test_the_main_term_returns_what_metrics_read():
    tokens = TokenBatch(
        *(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)),
        advantages=torch.ones(2),
        ref_logps=torch.zeros(2, 3),
    )
    denominators = Denominators(2, torch.tensor(6.0), torch.tensor(6.0), torch.tensor(1.0), 1.0)
    _, _, stats = Objective((KLPenalty(0.1), PolicyGradient()))(tokens, denominators, 3, 0)
    assert set(stats) == {*STATISTICS, "kl"}
    assert set(tokens.unclipped_stats(tokens.logps, tokens.ratio)) == set(STATISTICS)
    message = (
        r"terms of the objective \(KLPenalty, CrossEntropy\) none returns loss, coefficient, low_clipped, high_cl"
    )
    with pytest.raises(TypeError, match=message):
        Objective((KLPenalty(0.1), CrossEntropy(1.0)))(tokens, denominators, 3, 0)
    with pytest.raises(TypeError, match=r"\(KLPenalty\) none returns loss, .*in evaluation too"):
        Objective((KLPenalty(0.1), CrossEntropy(1.0)))(tokens, denominators, 3, None)
