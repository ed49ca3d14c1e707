# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The family: each loss against the released one or a computation per sequence, and what a method does to a group."""

import copy
import json
import math
import random
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from luffy_trl import LuffyTrainer, config_rules
from luffy_trl.groups import Caches, Demonstration, MixedBatch
from luffy_trl.losses import (
    CrossEntropy,
    Denominators,
    KLPenalty,
    Objective,
    PolicyGradient,
    Shaping,
    TokenBatch,
    high_entropy_mask,
    policy_shaping,
)
from luffy_trl.methods import Method
from luffy_trl.methods.oapl import OAPL, optimal_advantages
from luffy_trl.methods.rl_plus import RLPlus
from luffy_trl.methods.srft import SRFT, SRFTCrossEntropy
from luffy_trl.sources.dataset import SCHEDULES, prefix_ratio
from luffy_trl.sources.hints import with_hint
from luffy_trl.sources.replay import Problem, ReplaySource, draw_problems


REFERENCE = np.load(Path(__file__).parent / "data" / "methods_reference.npz")
CASES = json.loads(REFERENCE["meta"].tobytes())


@pytest.mark.parametrize("index", range(len(CASES)))
def test_the_released_losses(index):
    case = CASES[index]
    names = ("log_prob", "old_log_prob", "mask", "demonstration_mask", "rewards", "advantages", "entropies", "grad")
    arrays = {name: torch.from_numpy(REFERENCE[f"{index}/{name}"]) for name in names}
    logps = arrays["log_prob"].requires_grad_()
    mask, demonstration_mask = arrays["mask"].double(), arrays["demonstration_mask"] & arrays["mask"]
    tokens = TokenBatch(
        logps=logps,
        old_logps=arrays["old_log_prob"],
        mask=mask,
        demonstration_mask=demonstration_mask,
        advantages=arrays["advantages"],
        entropies=arrays["entropies"],
        is_solved=arrays["rewards"] == 1,
    )
    # Theirs is the mean over tokens, or the sum over tokens and completions divided by the maximum length
    one = torch.tensor(1.0)
    denominators = Denominators(1, mask.sum(), one, demonstration_mask.sum(), num_means=1.0)
    terms = (RLPlus(),) if case["method"] == "rl_plus" else (SRFT(), SRFTCrossEntropy())
    loss_type = {"token_mean": "bnpo", "sum_over_max_length": "dr_grpo"}[case["aggregation"]]
    loss, divisor, _ = Objective(terms, loss_type)(tokens, denominators, case["max_length"], step=0)
    assert divisor == 1.0
    (grad,) = torch.autograd.grad(loss, logps)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-6)
    torch.testing.assert_close(grad, arrays["grad"], atol=1e-6, rtol=0)


def random_tokens(seed=0, rows=3, length=5, **kwargs):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([length, length - 1, length - 2])
    mask = (torch.arange(length) < lengths[:, None]).double()
    return TokenBatch(
        **{
            "logps": (rand(rows, length) * -3).requires_grad_(),
            "old_logps": rand(rows, length) * -3,
            "mask": mask,
            "demonstration_mask": torch.tensor([[True], [False], [False]]) & mask.bool(),
            "advantages": rand(rows) - 0.5,
            "entropies": rand(rows, length) * 2,
            "is_solved": torch.tensor([True, True, False]),
            "is_mixed": torch.tensor(True),
            **kwargs,
        }
    )


def denominators_of(tokens, num_means=1.0):
    return Denominators(
        len(tokens.mask), tokens.mask.sum(), tokens.mask.sum(), tokens.demonstration_mask.sum(), num_means
    )


def test_the_loss_of_a_failure_is_bounded():
    tokens = random_tokens(
        logps=torch.tensor([[-1.0, -19.9, -20.1]] * 3, requires_grad=True),
        old_logps=torch.zeros(3, 3),
        mask=torch.ones(3, 3),
        demonstration_mask=torch.zeros(3, 3, dtype=torch.bool),
        entropies=torch.zeros(3, 3),
    )
    loss, _ = SRFT(success_weight=0.1, min_logp=-20.0)(tokens, 0)
    loss.sum().backward()
    # Solved: -0.1 exp(0) for each token; failed: +1, but for what is below the bound
    assert tokens.logps.grad.tolist() == [[pytest.approx(-0.1)] * 3, [pytest.approx(-0.1)] * 3, [1.0, 1.0, 0.0]]


def test_oapl_per_sequence():
    behavior = torch.full((3, 5), -0.7, dtype=torch.float64)
    tokens = random_tokens(behavior_logps=behavior)
    loss, divisor, _ = Objective((OAPL(beta=0.3),), "dr_grpo")(tokens, denominators_of(tokens, 4.0), 99, step=0)
    expected = 0.0
    for row, length in enumerate((5, 4, 3)):
        sampler = behavior if row == 0 else tokens.old_logps
        log_ratio = sum(tokens.logps[row, t] - sampler[row, t] for t in range(length))
        expected = expected + (0.3 * log_ratio - tokens.advantages[row]) ** 2 / 3
    torch.testing.assert_close(loss / divisor, expected / 4)
    grads = [
        torch.autograd.grad(value, tokens.logps, retain_graph=True)[0] for value in (loss / divisor, expected / 4)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_optimal_advantages_by_hand(beta):
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, math.nan, 0.0], dtype=torch.float64)
    first = beta * math.log((math.exp(1 / beta) + 3) / 4)
    second = beta * math.log((2 * math.exp(1 / beta) + 1) / 3)
    expected = [1 - first, -first, -first, -first, 1 - second, 1 - second, 0.0, -second]
    assert optimal_advantages(rewards, 4, beta).tolist() == pytest.approx(expected)


def test_rewards_that_differ_little_have_the_advantages_of_grpo():
    rewards = torch.rand(8, dtype=torch.float64)
    mean = rewards.view(2, 4).mean(1).repeat_interleave(4)
    torch.testing.assert_close(optimal_advantages(rewards, 4, 1e6), rewards - mean, atol=1e-6, rtol=0)


def test_tokens_of_high_entropy():
    entropies = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.3], [0.2, 0.2, 0.2, 0.2, 9.0]])
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    assert high_entropy_mask(entropies, mask, 0.4).int().tolist() == [[0, 1, 0, 1, 0], [1, 1, 0, 0, 0]]
    assert high_entropy_mask(entropies, mask, 0.01).int().tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert torch.equal(high_entropy_mask(entropies, mask, 1.0), mask)


def test_only_demonstration_tokens_of_high_entropy_carry_a_loss():
    tokens = random_tokens()
    loss, _ = PolicyGradient(entropy_share=0.4)(tokens, 0)
    full, _ = PolicyGradient()(tokens, 0)
    top = tokens.entropies[0].argsort(descending=True)[:2].tolist()
    for t in range(5):
        assert loss[0, t] == (full[0, t] if t in top else 0.0)
    assert torch.equal(loss[1:], full[1:])


def test_rollouts_are_clipped_until_a_batch_is_mixed():
    for is_mixed in (True, False):
        tokens = random_tokens(is_mixed=torch.tensor(is_mixed))
        until_mixed, stats = PolicyGradient(clip_range=(0.8, 1.2), clips_mixed=False)(tokens, 0)
        other, other_stats = PolicyGradient(clip_range=None if is_mixed else (0.8, 1.2))(tokens, 0)
        assert torch.equal(until_mixed, other)
        for name in ("low_clipped", "high_clipped"):
            assert torch.equal(stats[name], other_stats[name])
    assert stats["high_clipped"].any() or stats["low_clipped"].any()


def test_cross_entropy_divided_as_the_policy_gradient():
    tokens = random_tokens()
    terms = (PolicyGradient(on="rollouts"), CrossEntropy(0.3, reduction=None))
    loss, _, _ = Objective(terms, "dr_grpo")(tokens, denominators_of(tokens), 7, step=0)
    policy, _ = PolicyGradient(on="rollouts")(tokens, 0)
    expected = (policy.sum() - 0.3 * tokens.logps[0].sum()) / (3 * 7)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_the_penalty_of_a_demonstration_is_not_corrected(bias_correction):
    """It is no sample of the old policy: the ratio that weights rollouts has no meaning for it."""
    tokens = random_tokens(ref_logps=torch.full((3, 5), -1.3, dtype=torch.float64))
    loss, stats = KLPenalty(0.4, bias_correction)(tokens, 0)
    difference = -1.3 - tokens.logps
    kl = difference.exp() - difference - 1
    ratio = (tokens.logps - tokens.old_logps).exp()
    ratio[0] = 1.0
    torch.testing.assert_close(loss, 0.4 * kl * (ratio if bias_correction else 1.0))
    torch.testing.assert_close(stats["kl"], loss.detach() / 0.4)


def test_interpolated_cross_entropy_takes_its_share_from_the_rest():
    """mu SFT + (1 - mu) GRPO where the weight has decayed to 0.3."""
    tokens = random_tokens()
    cross_entropy = CrossEntropy(0.8, minimum=0.3, decay_steps=2, interpolate=True)
    terms = (PolicyGradient(on="rollouts"), cross_entropy)
    loss, divisor, stats = Objective(terms, "dr_grpo")(tokens, denominators_of(tokens, 2.0), 7, step=5)
    policy, _ = PolicyGradient(on="rollouts")(tokens, 0)
    # The cross-entropy is a mean over the optimizer step, the policy gradient one of two means
    expected = 0.7 * policy.sum() / (3 * 7) / 2 - 0.3 * tokens.logps[0].mean()
    torch.testing.assert_close(loss / divisor, expected)
    assert stats["sft_loss_coef"] == pytest.approx(0.3)


@pytest.mark.parametrize("num_demonstrations", [0, 2])
def test_options_of_the_loss_reach_it(tmp_path, num_demonstrations):
    """The loss put together by hand from the log-probs, for options that are all set."""
    options = {"policy_shaping": "regularized"}
    if num_demonstrations:
        options = {"policy_shaping": "linear_log", "policy_shaping_weight": 0.2}
        options |= {"demonstration_ratio_min": -0.6, "demonstration_ratio_max": -0.5}
        options |= {"demonstration_advantage_weight": 3.0}
    args = tiny.make_args(
        tmp_path,
        num_demonstrations=num_demonstrations,
        on_policy_shaping="power",
        on_policy_shaping_power=0.25,
        rollout_advantage_weight=0.5,
        max_token_prob=0.3,
        **options,
    )
    method, tokens = Method.from_args(args), random_tokens()
    if not num_demonstrations:
        tokens = random_tokens(demonstration_mask=torch.zeros(3, 5, dtype=torch.bool))
    output = {"demonstration_mask": tokens.demonstration_mask, "advantages": tokens.advantages}
    method.finish(make_batch([0, 0])[0], output)
    weight = torch.where(tokens.demonstration_mask, 3.0, 0.5)
    assert torch.equal(output["advantages"], tokens.advantages[:, None] * weight)

    tokens.advantages = output["advantages"]
    loss, divisor, _ = method.objective(tokens, denominators_of(tokens, 2.0), 16, step=0)
    prob, ratio = tokens.logps.exp(), (tokens.logps - tokens.old_logps).exp()
    shaped = (prob + 0.2 * tokens.logps).clamp(-0.6, -0.5)
    coefficient = torch.where(tokens.demonstration_mask, shaped, ratio**0.25)
    is_kept = tokens.mask * (prob <= 0.3)
    assert 0 < is_kept.sum() < tokens.mask.sum() and divisor == 2.0
    torch.testing.assert_close(loss, -(coefficient * tokens.advantages * is_kept).sum() / (3 * 16))


@pytest.mark.parametrize("shape", [(1,), (5,)])
def test_the_sampler_correction_leaves_demonstration_tokens_alone(tmp_path, shape):
    """TRL's ratio for another sampler, of a sequence or of a token, beside a prefix that the policy has continued."""
    tokens = random_tokens()
    tokens.demonstration_mask[0, 3:] = False
    inputs = {
        "completion_mask": tokens.mask,
        "old_per_token_logps": tokens.old_logps,
        "demonstration_mask": tokens.demonstration_mask,
        "num_demonstration_tokens": tokens.demonstration_mask.sum(),
        "advantages": tokens.advantages,
        "importance_sampling_ratio": torch.tensor([0.0, 0.5, 2.0]).view(3, 1).repeat(1, *shape),
    }
    objective = Method.from_args(tiny.make_args(tmp_path, prefix_ratio_min=0.5, prefix_ratio_max=0.5)).objective
    corrected = TokenBatch.from_inputs(inputs, tokens.logps, tokens.entropies)
    loss, _, _ = objective(corrected, denominators_of(tokens), 16, step=0)
    prob, ratio = tokens.logps.exp(), (tokens.logps - tokens.old_logps).exp()
    ratio = ratio * torch.tensor([0.0, 0.5, 2.0])[:, None]
    coefficient = torch.where(tokens.demonstration_mask, prob / (prob + 0.1), ratio)
    expected = -(coefficient * tokens.advantages[:, None] * tokens.mask).sum() / (3 * 16)
    torch.testing.assert_close(loss, expected)
    assert loss != 0


def make_trainer(tmp_path, reward=None, rows=4, **options):
    path = tiny.save_tiny_model(tmp_path / "model")
    data = Dataset.from_list(rows if isinstance(rows, list) else tiny.addition_rows(rows))
    return LuffyTrainer(path, reward or tiny.share_of_digits, tiny.make_args(tmp_path, **options), data, data)


HPT = {
    "demonstration_policy": "on_failure",
    "failed_rollouts": "drop",
    "demonstration_loss": "sft",
    "advantage_baseline": "on_policy",
    "sft_loss_reduction": "loss_type",
}
REPLAY = {"replay_ratio": 0.5, "replay_start_solve_rate": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "rl_plus"},
        {"objective": "rl_plus", "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 3},
        {"objective": "srft", "loss_type": "dapo", "eval_strategy": "steps", "eval_steps": 1},
        {"objective": "oapl", "num_demonstrations": 0, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
        {"objective": "oapl", "num_demonstrations": 0, "max_tokens_per_microbatch": 64, "beta": 0.1},
        {**HPT, "failure_threshold": 2.0},
        {
            "prefix_ratio_min": 0.1,
            "prefix_ratio_max": 0.9,
            "prefix_schedule": "random_cosine",
            "prefix_schedule_steps": 9,
            "demonstration_entropy_share": 0.2,
        },
        {
            **REPLAY,
            "num_demonstrations": 0,
            "max_steps": 4,
            "ratio_clipping": "until_mixed",
            "per_device_train_batch_size": 8,
        },
    ],
)
def test_a_step(tmp_path, options):
    trainer = make_trainer(tmp_path, rows=16, **options)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    losses = [value for logs in trainer.state.log_history for name, value in logs.items() if name.endswith("loss")]
    assert losses and all(math.isfinite(loss) for loss in losses)
    assert any("eval_loss" in logs for logs in trainer.state.log_history) == ("eval_strategy" in options)
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_the_old_log_probs_of_demonstrations(tmp_path):
    """RL-PLUS reads them; the second update of a generation batch has others than the policy."""
    trainer = make_trainer(tmp_path, objective="rl_plus", gradient_accumulation_steps=1, steps_per_generation=2)
    recorded = tiny.record_micro_batches(trainer)
    trainer.train()
    (inputs,) = recorded
    shown = inputs["demonstration_mask"] & inputs["completion_mask"].bool()
    assert shown.any() and (inputs["old_per_token_logps"][shown] < 0).all()


def test_failed_groups_learn_from_their_trace_alone(tmp_path):
    """Of two groups one fails, though one of its rollouts earns something."""

    def reward(completions, prompts, **kwargs):
        fails = [prompt.startswith("0") for prompt in prompts]
        return [
            1.0 if "A" in text and "and 1" in text else (0.3 if failing else 1.0) * (len(text) % 2)
            for text, failing in zip(completions, fails, strict=True)
        ]

    for drop in (True, False):
        options = {**HPT, "failed_rollouts": "drop" if drop else "keep", "failure_threshold": 0.25}
        trainer = make_trainer(tmp_path, reward, rows=2, per_device_train_batch_size=8, seed=3, **options)
        seen = record_batches(trainer)
        trainer.train()
        ((batch, _),) = seen
        failed = batch.has_failed & ~batch.is_demonstration
        assert batch.has_failed.tolist().count(True) == 4 and batch.is_demonstration.sum() == 1
        rewards = batch.rewards[:, 0]
        expected = torch.zeros(8)
        for group in (slice(0, 4), slice(4, 8)):
            rollouts = ~batch.is_demonstration[group]
            expected[group] = rewards[group] - rewards[group][rollouts].mean()
        assert expected[failed].abs().max() > 0.01
        if drop:
            expected[failed] = 0.0
        torch.testing.assert_close(batch.advantages, expected)


def logps_and_entropy(model, prompt, ids):
    """Log-probs of the tokens of a completion, and their mean entropy, one sequence at a time."""
    with torch.no_grad():
        logps, entropies = tiny.logps_and_entropies(model, prompt, ids)
    return logps, entropies.mean().item()


def record_batches(trainer):
    """Of each generation batch: itself, and prompt ids, completion ids, log-probs and pi_phi of each row."""

    def describe(batch, output):
        rows = []
        for i in range(len(batch.rows)):
            prompt, ids = (part.tolist() for part in tiny.sequence(output, i))
            behavior = output["behavior_logps"][i][: len(ids)] if "behavior_logps" in output else None
            rows.append((prompt, tuple(ids), logps_and_entropy(trainer.model, prompt, ids)[0], behavior))
        batch.advantages = output["advantages"].clone()
        return batch, rows

    return tiny.record_batches(trainer, describe)


def test_replays_are_own_successes(tmp_path):
    rows = [{**row, "demonstrations": []} for row in tiny.addition_rows(8)]
    options = {**REPLAY, "num_demonstrations": 0, "per_device_train_batch_size": 16, "max_steps": 5}
    trainer = make_trainer(tmp_path, tiny.is_even, rows, **options)
    seen = record_batches(trainer)
    trainer.train()
    collected = {}  # of each prompt, its successes: the step at which they were sampled, and their log-probs then
    num_replays = 0
    for step, (batch, sequences) in enumerate(seen):
        solved = batch.rewards[:, 0] == 1
        for start in range(0, 16, 4):
            prompt = batch.rows[start]["prompt"]
            assert [row["prompt"] for row in batch.rows[start : start + 4]] == [prompt] * 4
            rollouts = [i for i in range(start, start + 4) if batch.sources[i] == "rollout"]
            if len(rollouts) < 4:
                num_replays += 1
                assert batch.sources[start] == "replay" and rollouts == [start + 1, start + 2, start + 3]
                _, ids, _, behavior = sequences[start]
                before, logps = collected[prompt, ids]
                assert before < step and solved[start]
                torch.testing.assert_close(behavior, logps, atol=1e-5, rtol=0)
            if 0 < solved[rollouts].sum() < len(rollouts):
                for i in rollouts:
                    if solved[i]:
                        collected.setdefault((prompt, sequences[i][1]), (step, sequences[i][2]))
        assert batch.sources.count("replay") == (0 if step == 0 else 2)
    assert num_replays == 8


def test_the_success_of_lowest_entropy_is_replayed(tmp_path):
    trainer = make_trainer(tmp_path, tiny.is_even, 2, **REPLAY, num_demonstrations=0, per_device_train_batch_size=8)
    source, prompt = trainer.method.sources[0], trainer.tokenize(["0+1="])[0]
    ids = [trainer.processing_class(text)["input_ids"] for text in ("A", "0+1=2", "zzz Q", "9")]
    measured = [logps_and_entropy(trainer.model, prompt, sequence) for sequence in ids]
    torch.testing.assert_close(
        [logps for logps, _ in trainer.measure([(prompt, sequence) for sequence in ids])],
        [logps for logps, _ in measured],
        atol=1e-5,
        rtol=0,
    )
    source.problems["p"] = Problem({"prompt": "0+1="}, prompt, 1, [str(i) for i in range(4)])
    batch = MixedBatch([{}] * 8, 4, trainer.accelerator, Caches(), policy=trainer)
    for choice, costs in (("entropy", [e for _, e in measured]), ("logp", [0.1, 0.3, 0.2, 0.5])):
        source.args.replay_choice = choice
        source.successes = {
            str(i): (torch.tensor(sequence), torch.full((len(sequence),), -cost))
            for i, (sequence, cost) in enumerate(zip(ids, costs, strict=True))
        }
        best = min(range(4), key=costs.__getitem__)
        slots = source.open_slots(batch, 0, [None] * 8, [True] * 8)
        assert [slot.ids for slot in slots if slot] == [ids[best]]


def test_problems_are_drawn_by_how_often_they_were_solved():
    problems = {str(number): Problem({}, [], num_solved=number % 3 + 1) for number in range(30)}
    rng = random.Random(0)
    counts = Counter(int(key) % 3 + 1 for _ in range(4000) for key in draw_problems(problems, 1, 4, rng))
    weights = {k: math.exp(-((k - 2) ** 2) / 2) for k in (1, 2, 3)}
    for k, weight in weights.items():
        assert counts[k] / 4000 == pytest.approx(weight / sum(weights.values()), abs=0.03)
    assert sorted(draw_problems(problems, 30, 4, rng), key=int) == list(problems)  # each once


def make_batch(num_solved, num_rows=8, demonstrations=0):
    """Groups of 4, of whose rollouts the first ones are solved."""
    rows = [{"prompt": str(i // 4), "answer": None} for i in range(num_rows)]
    batch = MixedBatch(rows, 4, Accelerator(cpu=True), Caches())
    batch.insert([Demonstration([1]) if i % 4 < demonstrations else None for i in range(num_rows)])
    solved = torch.tensor([i % 4 < num_solved[i // 4] for i in range(num_rows)])
    ids = torch.arange(num_rows * 3).view(num_rows, 3)
    output = {
        "completion_ids": ids,
        "completion_mask": torch.tensor([[1, 1, 0]] * num_rows),
        "prompt_ids": ids,
        "prompt_mask": torch.tensor([[0, 1, 1]] * num_rows),
        "old_per_token_logps": -ids.float(),
    }
    return batch, output, solved


def test_what_is_collected_and_retired(tmp_path):
    options = {
        "replay_ratio": 0.5,
        "replay_start_solve_rate": 0.25,
        "replay_max_trajectories": 4,
        "per_device_train_batch_size": 8,
    }
    source = ReplaySource(tiny.make_args(tmp_path, num_generations=4, **options))
    source.observe(*make_batch([1, 1]))
    assert not source.has_started and not source.problems  # a quarter is not more than a quarter
    source.observe(*make_batch([3, 0]))
    assert source.has_started
    (problem,) = source.problems.values()
    assert problem.row == {"prompt": "0", "answer": None} and problem.prompt_ids == [1, 2] and problem.num_solved == 3
    assert [ids.tolist() for ids, _ in source.successes.values()] == [[0, 1], [3, 4], [6, 7]]
    assert [logps.tolist() for _, logps in source.successes.values()] == [[0, -1], [-3, -4], [-6, -7]]

    source.observe(*make_batch([2, 2]))  # the same texts again, and two of another problem: one too many
    assert [problem.num_solved for problem in source.problems.values()] == [2, 2]
    assert [ids.tolist() for ids, _ in source.successes.values()] == [[3, 4], [6, 7], [12, 13], [15, 16]]
    state = source.state_dict()
    other = ReplaySource(tiny.make_args(tmp_path, num_generations=4, **options))
    other.load_state_dict(torch.load(_saved(state, tmp_path)))
    assert other.problems == source.problems and other.owners == source.owners

    source.observe(*make_batch([0, 4]))  # all rollouts of the second
    assert [problem.row["prompt"] for problem in source.problems.values()] == ["0"] and len(source.retired) == 1
    assert source.problems.popitem()[1].num_solved == 0 and len(source.successes) == 2
    # A demonstration is no success of the policy's own
    other.load_state_dict({})
    other.has_started = True
    other.observe(*make_batch([1, 4], demonstrations=1))
    assert not other.successes and len(other.retired) == 1


@pytest.mark.parametrize(("num_solved", "place"), [([1, 4, 0, 0], 1), ([1, 0, 0, 0], 3)])
def test_a_replay_takes_the_group_of_a_retired_problem_or_the_last(tmp_path, num_solved, place):
    """Its own problem is not in the batch; the second problem of the first batch is, as the second."""
    options = {**REPLAY, "per_device_train_batch_size": 16, "replay_choice": "logp"}
    source = ReplaySource(tiny.make_args(tmp_path, **options))
    source.observe(*make_batch(num_solved, num_rows=16))
    batch, *_ = make_batch([0] * 4, num_rows=16)
    prompts = ["7", "1", "8", "9"]
    batch.rows = [{"prompt": prompts[i // 4], "answer": None} for i in range(16)]
    slots = source.open_slots(batch, 1, [None] * 16, [True] * 16)
    assert [i for i, slot in enumerate(slots) if slot] == [4 * place]
    assert [row["prompt"] for row in batch.rows[::4]] == ["0" if i == place else prompts[i] for i in range(4)]


def _saved(state, folder):
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_a_pool_that_cannot_be_restored(tmp_path):
    options = {**REPLAY, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 8}
    make_trainer(tmp_path, tiny.is_even, **options).train()
    file = tmp_path / "checkpoint-1" / "kept_by_all.pt"
    state = torch.load(file)
    torch.save({"Other": {}}, file)
    for message in (
        "cannot be read.*it has no state of ReplaySource",
        "the state of ReplaySource: it was saved by a run",
    ):
        with pytest.raises(ValueError, match=f"kept_by_all.pt.*{message}"):
            make_trainer(tmp_path, tiny.is_even, **options, max_steps=2).train(resume_from_checkpoint=True)
        file.unlink(missing_ok=True)
    torch.save(state, file)
    make_trainer(tmp_path, tiny.is_even, **{**options, "max_steps": 2}).train(resume_from_checkpoint=True)


def test_the_trace_that_helps_is_shown(tmp_path):
    rows = tiny.addition_rows(2, lambda i: [f"{i} and 1", "z", "QQQ"])
    options = {"demonstration_choice": "comprehension", "per_device_train_batch_size": 8}
    trainer = make_trainer(tmp_path, rows=rows, **options)
    seen, tokenizer = record_batches(trainer), trainer.processing_class
    before = copy.deepcopy(trainer.model)
    trainer.train()
    ((batch, sequences),) = seen
    for start in (0, 4):
        row, (prompt, shown, _, _) = batch.rows[start], sequences[start]
        probs = []
        for trace in rows[int(row["prompt"][0])]["demonstrations"]:
            context = prompt + tokenizer(trace + "\n\nThe final answer is ")["input_ids"]
            logps, _ = logps_and_entropy(before, context, tokenizer(row["answer"])["input_ids"])
            probs.append(logps.exp().mean().item())
        best = rows[0 if row["prompt"][0] == "0" else 1]["demonstrations"][probs.index(max(probs))]
        assert list(shown) == [*tokenizer(best)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("answer", [None, ""])
def test_comprehension_needs_an_answer(tmp_path, answer):
    rows = [{**row, "answer": answer} for row in tiny.addition_rows(4, lambda i: ["A", "B"])]
    with pytest.raises(ValueError, match="the row with the prompt '.*' has none in `answer` or `solution`"):
        make_trainer(tmp_path, rows=rows, demonstration_choice="comprehension").train()


def test_a_stream_without_log_probs(tmp_path):
    path = tiny.save_tiny_model(tmp_path / "model")
    stream = IterableDataset.from_generator(lambda: iter(tiny.addition_rows(4)))
    trainer = LuffyTrainer(path, tiny.share_of_digits, tiny.make_args(tmp_path, objective="oapl"), stream)
    with pytest.raises(ValueError, match="has no `demonstration_logprobs`. Give it some"):
        trainer.train()


def test_large_groups_are_drawn_too():
    problems = {"a": Problem({}, [], num_solved=1), "b": Problem({}, [], num_solved=89)}
    assert sorted(draw_problems(problems, 2, 90, random.Random(0))) == ["a", "b"]


def test_what_is_forgotten_leaves_the_caches(tmp_path):
    source = ReplaySource(tiny.make_args(tmp_path, **{**REPLAY, "per_device_train_batch_size": 8}))
    batch, output, solved = make_batch([1, 0])
    batch.caches = Caches(scores={"gone": {}, ("row", 0): {}}, ref_logps={"gone": None})
    source.observe(batch, output, solved)
    assert list(batch.caches.scores) == [("row", 0)] and batch.caches.ref_logps == {}
    (key,) = (problem for problem in source.problems)
    source.observe(*make_batch([4, 0]))
    assert key in source.retired
    source.observe(*make_batch([1, 0]))
    assert key not in source.retired and key in source.problems


def test_every_parameter_of_a_shaping_is_an_option(tmp_path):
    for name in (f.name for f in fields(Shaping) if f.name != "kind"):
        for prefix, attribute in (("policy_shaping", "shaping"), ("on_policy_shaping", "on_policy_shaping")):
            option = f"{prefix}_{name}"
            assert option in config_rules.PARAMETERS
            kind = config_rules.PARAMETERS[option][1][0]
            args = tiny.make_args(tmp_path, **{prefix: kind, option: 0.25})
            (term,) = Method.from_args(args).objective.terms
            assert getattr(getattr(term, attribute), name) == 0.25
            assert getattr(term, attribute)(torch.tensor(0.3)) == policy_shaping(
                torch.tensor(0.3), kind, **{name: 0.25}
            )


def test_every_schedule_has_its_steps():
    assert set(config_rules.PARAMETERS["prefix_schedule_steps"][1]) == {*SCHEDULES, "random_cosine"}


def test_traces_are_shown_for_some_updates(tmp_path):
    trainer = make_trainer(tmp_path, rows=8, demonstration_max_steps=2, max_steps=4)
    seen = record_batches(trainer)
    trainer.train()
    assert [batch.sources.count("demonstration") for batch, _ in seen] == [1, 1, 0, 0]


def test_the_minimum_of_a_random_prefix_falls_along_a_cosine(tmp_path):
    options = {"prefix_ratio_min": 0.2, "prefix_ratio_max": 1.0, "prefix_schedule_steps": 8}
    args = tiny.make_args(tmp_path, prefix_schedule="random_cosine", **options)
    for step, low in ((0, 1.0), (4, 0.6), (8, 0.2), (99, 0.2)):
        drawn = [prefix_ratio(args, step, 0, random.Random(seed)) for seed in range(400)]
        assert min(drawn) == pytest.approx(low, abs=0.01) and max(drawn) == pytest.approx(1.0, abs=0.01)
        assert sum(drawn) / 400 == pytest.approx((low + 1.0) / 2, abs=0.03)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"answer"}, {"demonstration_choice": "comprehension"}, "give it a column `answer` or `solution`"),
        (set(), {"objective": "oapl"}, "has no column `demonstration_logprobs`"),
    ],
)
def test_columns_that_a_method_needs(tmp_path, columns, options, message):
    rows = [{name: value for name, value in row.items() if name not in columns} for row in tiny.addition_rows(4)]
    with pytest.raises(ValueError, match=f"(?i){re.escape(message)}"):
        make_trainer(tmp_path, rows=rows, **options)


@pytest.mark.parametrize(
    ("switched_off", "plain"),
    [
        # It never begins
        ({"replay_ratio": 1.0, "replay_start_solve_rate": 0.99}, {}),
        ({"demonstration_entropy_share": 0.999999}, {}),
        ({"demonstration_max_steps": 99}, {}),
        ({"ratio_clipping": "until_mixed"}, {}),
        (
            {"demonstration_policy": "on_failure", "failed_rollouts": "drop", "failure_threshold": -1.0},
            {"demonstration_policy": "on_failure", "failure_threshold": -1.0},
        ),
    ],
)
def test_switched_off_it_is_what_it_extends(tmp_path, switched_off, plain):
    weights = []
    for options in (switched_off, plain):
        trainer = make_trainer(tmp_path, tiny.is_even, 8, max_steps=3, **options)
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


HINTED = {"demonstration_policy": "on_failure", "hint_source": "column"}


def hint_rows(num_rows=4, num_hints=3):
    rows = tiny.addition_rows(num_rows, lambda i: [f"A{i}"])
    return [{**row, "hints": [f"h{level}" for level in range(num_hints)]} for row in rows]


def hinted_run(tmp_path, monkeypatch, helps, placement="prompt", **options):
    """
    A run in which rollouts fail, and what is sampled under hint h1 or a stronger one succeeds where `helps` says so.
    Returns the batch, its sequences, the prompts that were sampled, and the texts that were scored.
    """
    scored, sampled = [], []

    def reward(completions, **kwargs):
        scored.extend(completions)
        return [float(text == "good") for text in completions]

    options = {**HINTED, "num_demonstrations": 0, "hint_placement": placement, **options}
    trainer = make_trainer(tmp_path, reward, hint_rows(), per_device_train_batch_size=8, **options)
    tokenizer = trainer.processing_class
    good, bad = (tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in ("good", "bad"))

    def answer(prompt_ids, *args):
        texts = tokenizer.batch_decode(prompt_ids)
        sampled.append(texts)
        return [list(good if helps(text) else bad) for text in texts], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda self, prompt_ids, *args: answer(prompt_ids))
    seen = record_batches(trainer)
    trainer.train()
    ((batch, sequences),) = seen
    return trainer, batch, sequences, sampled, scored


def helps_one_group():
    """Of the two groups, the first one that is sampled succeeds under h1 and h2."""
    first = None

    def helps(text):
        nonlocal first
        prompt, _, hint = text.partition("\n\nHint: ")
        first = first or prompt
        return prompt == first and hint in ("h1", "h2")

    return helps


def test_a_group_that_was_helped_is_not_shown_its_trace(tmp_path, monkeypatch):
    _, batch, *_ = hinted_run(tmp_path, monkeypatch, helps_one_group(), num_demonstrations=1)
    assert batch.sources == ["rollout", "hinted", "rollout", "rollout", "demonstration", *["rollout"] * 3]


@pytest.mark.parametrize("placement", ["prompt", "plain"])
def test_the_success_with_the_weakest_hint_enters_the_group(tmp_path, monkeypatch, placement):
    helps = helps_one_group()
    trainer, batch, sequences, sampled, scored = hinted_run(tmp_path, monkeypatch, helps, placement)
    tokenizer = trainer.processing_class
    assert len(sampled) == 2 and all("Hint" not in text for text in sampled[0])
    others = [row["prompt"] for row in batch.rows]
    assert sampled[1] == [f"{prompt}\n\nHint: h{(0, 1, 1, 2)[i % 4]}" for i, prompt in enumerate(others)]
    # Of the first group, slots 1 and 2 had h1 and slot 3 had h2; the second group has no success
    assert batch.metrics == {"hints/helped": 0.5, "hints/level": 1.0}
    assert batch.sources == ["rollout", "hinted", *["rollout"] * 6]
    assert scored.count("good") == 3  # once each
    assert batch.rewards[:, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert batch.rollout_rewards[:, 0].tolist() == [0] * 8
    assert [scores[0] for scores in batch.scores] == batch.rewards[:, 0].tolist()  # not those of tries in vain
    assert batch.advantages.tolist() == [-0.25, 0.75, -0.25, -0.25, 0, 0, 0, 0]
    for i, (prompt, ids, *_) in enumerate(sequences):
        plain = batch.rows[i]["prompt"]
        hinted = f"{plain}\n\nHint: h1"
        assert tokenizer.decode(ids, skip_special_tokens=True) == ("good" if i == 1 else "bad")
        assert tokenizer.decode(prompt) == (hinted if i == 1 and placement == "prompt" else plain)
    assert batch.is_demonstration.tolist() == [placement == "plain" and i == 1 for i in range(8)]


def test_the_policy_under_the_hint_is_the_behaviour_policy(tmp_path, monkeypatch):
    trainer, batch, sequences, _, _ = hinted_run(tmp_path, monkeypatch, lambda text: "Hint: h2" in text, "plain")
    # The weights have moved since: by another route, from those that the run began with
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for i in (3, 7):
        prompt, ids, _, behavior = sequences[i]
        hinted = trainer.processing_class(batch.rows[i]["prompt"] + "\n\nHint: h2")["input_ids"]
        torch.testing.assert_close(behavior, logps_and_entropy(before, hinted, list(ids))[0], atol=1e-5, rtol=0)
    assert batch.sources == [*["rollout"] * 3, "hinted"] * 2


def test_what_no_hint_helps_is_shown_its_trace(tmp_path, monkeypatch):
    options = {"hint_source": "trace", "hint_levels": 1, "num_demonstrations": 1}
    _, batch, sequences, sampled, _ = hinted_run(tmp_path, monkeypatch, lambda text: False, **options)
    assert [text.partition("Hint: ")[2] for text in sampled[1]] == [
        f"A{row['prompt'][0]}"
        for row in batch.rows  # half of three tokens, rounded to the even number
    ]
    assert batch.sources == ["demonstration", *["rollout"] * 3] * 2


def test_hints_wait(tmp_path):
    args = tiny.make_args(tmp_path, **HINTED, num_demonstrations=0, hint_warmup_steps=2, max_steps=3)
    method = Method.from_args(args)
    for step, is_given in ((0, False), (1, False), (2, True)):
        batch = MixedBatch([{}] * 4, 4, Accelerator(cpu=True), Caches())
        method.open_slots(batch, step)
        assert (batch.gives_hints, batch.is_waiting) == (is_given, is_given)


def test_columns_of_a_reward_after_hints_in_vain(tmp_path, monkeypatch):
    """What a reward function logs of a try that is not kept is not shown beside another completion."""

    def reward(completions, log_extra, **kwargs):
        log_extra("text", list(completions))
        return [0.0] * len(completions)

    trainer = make_trainer(tmp_path, reward, hint_rows(), **HINTED, num_demonstrations=0)
    batches = tiny.record_batches(trainer)
    trainer.train()
    ((batch, output),) = batches
    texts = trainer.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True)
    assert batch.extra_logs["text"] == texts and batch.metrics == {"hints/helped": 0.0}


def test_hints_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="reads the column `hints`, and the dataset has only the columns"):
        make_trainer(tmp_path, **HINTED, num_demonstrations=0)
    rows = [{**row, "hints": "a text"} for row in hint_rows()]
    with pytest.raises(ValueError, match="`hints` of the row with the prompt '.*' is 'a text'. It is a list of texts"):
        make_trainer(tmp_path, lambda completions, **kwargs: [0.0] * len(completions), rows, **HINTED).train()


def test_hints_in_chat_prompts():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "{x}"}]
    assert with_hint(chat, "h", "{hint}: {prompt}") == [chat[0], {"role": "user", "content": "h: {x}"}]
