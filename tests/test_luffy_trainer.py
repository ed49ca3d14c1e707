# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The trainer: that it is GRPO where it should be, and LUFFY, computed another way, where it should not."""

import inspect
import math
import re

import pandas as pd
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, Qwen2ForSequenceClassification, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import LuffyConfig, LuffyTrainer, metrics


LOSS_TYPES = ("dr_grpo", "grpo", "bnpo", "dapo")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny.save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What functions of `launched.py` return, one item per process, and their folder: all of them in one launch."""
    folder = tmp_path_factory.mktemp("two_processes")
    return folder, tiny.launch_several(
        folder, {name: (name, {}) for name in ("count", "gradients", "on_failure", "metrics")}
    )


class Gradients(TrainerCallback):
    """The weights before each optimizer step, and the gradients that it used."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})


def row_logps(model, batch, row):
    """Log-probs of the completion of a row of a micro-batch, by itself and without padding."""
    return tiny.logps_and_entropies(model, *tiny.sequence(batch, row))[0]


def train(trainer):
    trainer.train()
    return trainer


# ---------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("num_demonstrations", [0, 1, 2])
def test_demonstrations_are_not_generated(model_path, tmp_path, num_demonstrations):
    rows = tiny.addition_rows(8, lambda i: ["AB", "CD"])
    args = tiny.make_args(tmp_path, num_demonstrations=num_demonstrations, gradient_accumulation_steps=2, max_steps=3)
    trainer = LuffyTrainer(model_path, tiny.share_of_digits, args, Dataset.from_list(rows))
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train()
    assert generated == [2 * (4 - num_demonstrations)] * 3  # two groups of four for each of three steps


def test_demonstrations_are_not_generated_by_two_processes(two_processes):
    ranks = two_processes[1]["count"]
    # Half a group each, for two steps: rank 0 has slots 0 and 1, and with two demonstrations nothing to generate.
    assert [rank[1, 2] for rank in ranks] == [[1, 1], [2, 2]]
    assert [rank[2, 2] for rank in ranks] == [[], [2, 2]]
    # A whole group each
    assert [rank[1, 4] for rank in ranks] == [[3, 3], [3, 3]]
    assert [rank[2, 4] for rank in ranks] == [[2, 2], [2, 2]]


def test_a_row_without_traces_trains_on_rollouts(model_path, tmp_path):
    rows = tiny.addition_rows(2, lambda i: ["AB"] if i == 0 else [])
    trainer = LuffyTrainer(
        model_path,
        tiny.share_of_digits,
        tiny.make_args(tmp_path, gradient_accumulation_steps=2, log_completions=True),
        Dataset.from_list(rows),
    )
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train()
    assert generated == [3 + 4]
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table[table.prompt == "0+1="].source.tolist() == ["demonstration"] + ["rollout"] * 3
    assert table[table.prompt == "1+1="].source.tolist() == ["rollout"] * 4


def test_traces_are_loaded_once_for_each_generation(model_path, tmp_path, monkeypatch):
    """The dataloader loads the rows of a generation batch again for each micro-batch: without the tokens."""
    trainer = LuffyTrainer(
        model_path,
        tiny.share_of_digits,
        tiny.make_args(tmp_path, gradient_accumulation_steps=4, max_steps=2),
        Dataset.from_list(tiny.addition_rows(16)),
    )
    assert not {"demonstration_ids", "demonstration_logps"} & set(trainer.train_dataset.column_names)
    loaded, load = [], Dataset.__getitem__

    def counting(dataset, number):
        if "demonstration_ids" in dataset.column_names:
            loaded.append(number)
        return load(dataset, number)

    monkeypatch.setattr(Dataset, "__getitem__", counting)
    trainer.train()
    assert len(loaded) == len(set(loaded)) == 8  # two generations of four groups


def test_the_choice_of_traces_depends_on_seed_step_and_row(model_path, tmp_path):
    def shown(seed):
        trainer = LuffyTrainer(
            model_path,
            tiny.share_of_digits,
            tiny.make_args(tmp_path, num_demonstrations=2, max_steps=6, seed=seed, log_completions=True),
            Dataset.from_list(tiny.addition_rows(1, lambda i: ["A", "B", "C", "D"])),
        )
        trainer.train()
        tables = [pd.read_parquet(p) for p in sorted((tmp_path / "completions").glob("*.parquet"))]
        return [tuple(table[table.source == "demonstration"].completion) for table in tables]

    first = shown(seed=1)
    assert len(first) == 6
    assert all(len(set(traces)) == 2 for traces in first)  # distinct ones in a group
    assert len(set(first)) > 1  # and others at other steps
    assert shown(seed=1) == first
    assert shown(seed=2) != first


def test_no_demonstration_is_used_in_evaluation(model_path, tmp_path):
    dataset = Dataset.from_list(tiny.addition_rows(4))
    trainer = LuffyTrainer(
        model_path,
        tiny.is_demonstration_text,
        tiny.make_args(tmp_path, per_device_eval_batch_size=4),
        dataset,
        eval_dataset=dataset,
    )
    generated = tiny.count_generated_rows(trainer.model)
    metrics = trainer.evaluate()
    assert generated == [4] * 4
    assert metrics["eval_reward"] == 0
    assert not any("demonstrations/" in key for key in metrics)


# ---------------------------------------------------------------------------------------------- plain GRPO


def run(cls, config_cls, model_path, tmp_path, rows, **kwargs):
    args = tiny.make_args(tmp_path, cls=config_cls, scale_rewards="none", max_steps=6, **kwargs)
    trainer = cls(model_path, tiny.share_of_digits, args, Dataset.from_list(rows))
    trainer.train()
    history = [
        {k: v for k, v in log.items() if "time" not in k and "per_second" not in k}
        for log in trainer.state.log_history
    ]
    return trainer.model.state_dict(), history


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_demonstrations_it_is_stock_grpo_bit_for_bit(model_path, tmp_path, loss_type):
    kwargs = {
        "loss_type": loss_type,
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "beta": 0.2,
        "entropy_coef": 0.03,
        "epsilon": 0.05,  # so that some ratios are clipped
        "learning_rate": 0.05,
    }
    rows = tiny.addition_rows(16, lambda i: [])
    weights, history = run(GRPOTrainer, GRPOConfig, model_path, tmp_path, rows, **kwargs)
    assert all(log["loss"] != 0 and log["kl"] != 0 or log["step"] == 1 for log in history[:-1])
    assert any(log["clip_ratio/region_mean"] > 0 for log in history[:-1])

    for num_demonstrations in (0, 1):
        luffy_weights, luffy_history = run(
            LuffyTrainer,
            LuffyConfig,
            model_path,
            tmp_path,
            rows,
            num_demonstrations=num_demonstrations,
            ratio_clipping="on_policy",
            length_aware_batching=False,
            **kwargs,
        )
        for name, value in weights.items():
            assert torch.equal(value, luffy_weights[name]), name
        assert [{key: log[key] for key in expected} for expected, log in zip(history, luffy_history, strict=True)] == (
            history
        )


@pytest.mark.parametrize(
    "options",
    [
        {"scale_rewards": "group"},
        {"scale_rewards": "batch", "use_bias_correction_kl": False, "beta": 0.2},
        {"mask_truncated_completions": True},
    ],
)
def test_other_options_of_trl_are_bit_for_bit_too(model_path, tmp_path, options):
    def final_weights(cls, config_cls, **kwargs):
        args = tiny.make_args(tmp_path, cls=config_cls, max_steps=3, max_completion_length=40, **kwargs, **options)
        dataset = Dataset.from_list(tiny.addition_rows(8, lambda i: []))
        return train(cls(model_path, tiny.share_of_digits, args, dataset)).model.state_dict()

    expected = final_weights(
        GRPOTrainer, GRPOConfig, loss_type="grpo", **({} if "scale_rewards" in options else {"scale_rewards": "none"})
    )
    own = {"ratio_clipping": "on_policy", "length_aware_batching": False}
    weights = final_weights(LuffyTrainer, LuffyConfig, loss_type="grpo", **own)
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


# ---------------------------------------------------------------------------------------------- mixed batches


def plain_gradient(
    loss_type, cut, weights, first_weights, generation_weights, steps_of_ranks, model, generation_batches
):
    """
    The gradient of one optimizer step, without batching, padding, processes or accumulation: each sequence on its own.

    `steps_of_ranks[rank]` are the micro-batches of the step, `generation_batches[rank]` those of its whole generation.
    """
    beta, entropy_coef, max_length = 0.3, 0.05, 16

    def logits_of(prompt_ids, completion_ids):
        ids = torch.cat([prompt_ids, completion_ids]).unsqueeze(0)
        return model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]

    def logps_with(state, *ids):
        model.load_state_dict(state)
        with torch.no_grad():
            return logits_of(*ids).log_softmax(-1).gather(-1, ids[1].unsqueeze(-1)).squeeze(-1)

    num_processes = len(steps_of_ranks)
    generation_tokens = sum(int(b["completion_mask"].sum()) for batches in generation_batches for b in batches)
    tokens_per_step = generation_tokens / 2  # two updates for each generation
    step_batches = [batch for batches in steps_of_ranks for batch in batches]
    tokens_of_rank = sum(int(b["completion_mask"].sum()) for b in step_batches) / num_processes
    num_rows = sum(len(b["prompt_ids"]) for b in step_batches) / num_processes
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    for micro_batches in steps_of_ranks:
        for batch in micro_batches:
            # TRL's means over the tokens of each micro-batch, or one over those of the optimizer step
            num_tokens = len(micro_batches) * int(batch["completion_mask"].sum()) if cut == "trl" else tokens_of_rank
            for row in range(len(batch["prompt_ids"])):
                prompt_ids = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
                is_real = batch["completion_mask"][row].bool()
                completion_ids = batch["completion_ids"][row][is_real]
                is_demonstration = batch["demonstration_mask"][row][is_real]
                advantage = batch["advantages"][row]
                ref_logps = logps_with(first_weights, prompt_ids, completion_ids)
                old_logps = logps_with(generation_weights, prompt_ids, completion_ids)
                model.load_state_dict(weights)
                model.zero_grad()
                logps = logits_of(prompt_ids, completion_ids).log_softmax(-1)
                entropy = -(logps.exp() * logps).sum(-1)
                logps = logps.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)

                prob, ratio = logps.exp(), (logps - old_logps).exp()
                kl = (ref_logps - logps).exp() - (ref_logps - logps) - 1
                if is_demonstration.all():
                    token_loss = -prob / (prob + 0.1) * advantage + beta * kl
                else:
                    assert not is_demonstration.any()
                    token_loss = -ratio * advantage + beta * kl * ratio  # TRL's bias-corrected KL
                divisor = {
                    "dr_grpo": num_rows * max_length,
                    "grpo": len(completion_ids) * num_rows,
                    "bnpo": num_tokens,
                    "dapo": tokens_per_step / num_processes,
                }[loss_type]
                bonus = entropy_coef * entropy.sum() / num_tokens
                ((token_loss.sum() / divisor - bonus) / num_processes).backward()
                for name, parameter in model.named_parameters():
                    total[name] += parameter.grad
    return total


def test_gradients_of_mixed_batches_in_two_processes(two_processes):
    ranks = two_processes[1]["gradients"]
    model = AutoModelForCausalLM.from_pretrained(two_processes[0] / "model", dtype=torch.float32)
    for loss_type, cut in ranks[0]:
        results = [rank[loss_type, cut] for rank in ranks]
        weights = results[0]["weights"]
        assert len(weights) == 4

        def of_steps(*steps):
            return [[b for b in r["micro_batches"] if b["step"] in steps] for r in results]  # noqa: B023

        for step in range(4):
            generation = step // 2 * 2
            gradient = plain_gradient(
                loss_type,
                cut,
                weights[step],
                weights[0],
                weights[generation],
                of_steps(step),
                model,
                of_steps(generation, generation + 1),
            )
            # Both kinds of token, and demonstrations of both signs, are in what is compared.
            for name, value in results[0]["gradients"][step].items():
                torch.testing.assert_close(value, gradient[name], atol=2e-6, rtol=2e-4)
                torch.testing.assert_close(value, results[1]["gradients"][step][name], atol=0, rtol=0)
        batches = [batch for r in results for batch in r["micro_batches"]]
        rows = torch.cat([batch["demonstration_mask"].any(1) for batch in batches])
        assert rows.sum() * 4 == len(rows)
        advantages = torch.cat([batch["advantages"] for batch in batches])
        assert (advantages[rows] > 0.01).any() and (advantages[rows] < -0.01).any()

        for first, second in zip(*(r["micro_batches"] for r in results), strict=True):  # as many on both processes
            assert first["step"] == second["step"]
        for step in range(4):
            shares = of_steps(step)
            lengths = [[(b["prompt_mask"].sum(1) + b["completion_mask"].sum(1)).tolist() for b in s] for s in shares]
            assert sum(len(of_batch) for of_rank in lengths for of_batch in of_rank) == 16
            if cut in ("trl", "by length"):
                assert [len(of_rank) for of_rank in lengths] == [2, 2]
                continue
            for batch, of_batch in zip(sum(shares, []), sum(lengths, []), strict=True):
                widths = batch["prompt_ids"].size(1) + batch["completion_ids"].size(1)
                tokens = sum(of_batch) if cut == "padding free" else len(of_batch) * widths
                assert tokens <= 60
            assert len(shares[0]) > 2 and abs(sum(sum(lengths[0], [])) - sum(sum(lengths[1], []))) <= 40


def test_a_micro_batch_by_length_waits_for_nothing(model_path, tmp_path, monkeypatch):
    """No gather, no reduction and no number taken from a device between the updates' forward passes."""
    trainer = LuffyTrainer(
        model_path,
        tiny.share_of_digits,
        tiny.make_args(tmp_path, entropy_coef=0.01, beta=0.1, gradient_accumulation_steps=2),
        Dataset.from_list(tiny.addition_rows(4)),
    )
    calls, compute_loss = [], trainer.compute_loss

    def compute_counted_loss(model, inputs, *args, **kwargs):
        with monkeypatch.context() as patched:
            patched.setattr(trainer.accelerator, "gather", lambda *args: calls.append("gather"))
            patched.setattr(trainer.accelerator, "reduce", lambda *args: calls.append("reduce"))
            patched.setattr(torch.Tensor, "item", lambda *args: calls.append("item"))
            patched.setattr(torch.Tensor, "tolist", lambda *args: calls.append("tolist"))
            loss = compute_loss(model, inputs, *args, **kwargs)
        calls.append("loss")
        return loss

    trainer.compute_loss = compute_counted_loss
    trainer.train()
    assert calls == ["loss", "loss"]
    assert {"entropy", "kl", "policy_loss", "clip_ratio/low_min"} <= trainer.state.log_history[0].keys()


def test_what_is_cached_is_not_computed_again(model_path, tmp_path):
    """Old log-probs are those of rollouts; a trace's reference log-probs and rewards are computed once."""
    runs = {}
    for is_cached in (False, True):
        scored = []

        def reward(completions, log_extra, **kwargs):
            scored.extend(completions)  # noqa: B023
            log_extra("length", [len(text) for text in completions])
            return tiny.share_of_digits(completions)

        trainer = LuffyTrainer(
            model_path,
            reward,
            tiny.make_args(
                tmp_path,
                beta=0.3,
                steps_per_generation=2,
                num_demonstrations=2,
                max_steps=8,
                num_train_epochs=2,
                shuffle_dataset=False,
                cache_demonstration_rewards=is_cached,
                cache_demonstration_ref_logps=is_cached,
                log_completions=True,
            ),
            Dataset.from_list(tiny.addition_rows(4, lambda i: [f"A7{i}", f"B{i}{i}"])),
        )
        rows = {"policy": [], "reference": []}
        for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):

            def count(module, args, kwargs, rows=rows[name]):
                if not torch.is_grad_enabled() and kwargs.get("fused_lm_head"):
                    rows.append(len(kwargs["input_ids"]))

            model.register_forward_pre_hook(count, with_kwargs=True)
        trainer.train()
        runs[is_cached] = rows, scored, trainer.state.log_history

    # Four generations, two of each of the two groups of four, of which two rows are demonstrations
    (rows, scored, log_history), (cached_rows, cached_scored, cached_log_history) = runs[False], runs[True]
    assert rows == {"policy": [4] * 4, "reference": [4, 4] * 4}
    assert cached_rows == {"policy": [4] * 4, "reference": [4, 4, 4, 4, 4, 4]}
    assert len(scored) == 32 and len(cached_scored) == 24
    traces = [text for i in range(4) for text in (f"A7{i}", f"B{i}{i}")]
    assert [cached_scored.count(trace) for trace in traces] == [1] * 8
    assert [scored.count(trace) for trace in traces] == [2] * 8
    table = pd.read_parquet(sorted((tmp_path / "completions").glob("*.parquet"))[-1])
    assert table.length.isna().tolist() == [True, True, False, False] * 2
    for log, cached_log in zip(log_history, cached_log_history, strict=True):
        for key in log.keys() - {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time"}:
            assert cached_log[key] == pytest.approx(log[key], rel=1e-5, abs=1e-7)


def test_reference_log_probs_of_an_adapter(model_path, tmp_path):
    """With LoRA policy and reference are one model: what is skipped for the one is computed for the other."""
    from peft import LoraConfig

    trainer = LuffyTrainer(
        model_path,
        tiny.share_of_digits,
        tiny.make_args(tmp_path, beta=0.3, steps_per_generation=2, max_steps=4),
        Dataset.from_list(tiny.addition_rows(4)),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=4),
    )
    batches = tiny.record_micro_batches(trainer)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for batch in batches:
        for row, mask in enumerate(batch["completion_mask"].bool()):
            expected = row_logps(model, batch, row)
            torch.testing.assert_close(batch["ref_per_token_logps"][row][mask], expected, atol=1e-5, rtol=1e-5)
            if batch["demonstration_mask"][row].any():
                assert (batch["old_per_token_logps"][row] == 0).all()
            elif len(batches) == 4:
                assert (batch["old_per_token_logps"][row][mask] < 0).all()


def test_padding_free_passes_without_flash_attention_are_named(model_path, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        LuffyTrainer(
            model_path,
            tiny.share_of_digits,
            tiny.make_args(tmp_path, padding_free=True),
            Dataset.from_list(tiny.addition_rows(4)),
        )
    assert "`padding_free=True` is made for flash attention, and the model has 'sdpa'" in caplog.text


@pytest.mark.parametrize("baseline", ["group", "on_policy"])
def test_advantages_and_tokens_of_a_group(model_path, tmp_path, baseline):
    trainer = LuffyTrainer(
        model_path,
        tiny.share_of_digits,
        tiny.make_args(tmp_path, gradient_accumulation_steps=2, advantage_baseline=baseline, log_completions=True),
        Dataset.from_list(tiny.addition_rows(2, lambda i: ["A7"])),
    )
    batches = tiny.record_batches(trainer)
    trainer.train()
    ((_, output),) = batches
    tokenizer = tiny.make_tokenizer()
    expected_ids = tokenizer("A7")["input_ids"] + [tokenizer.eos_token_id]
    assert output["demonstration_mask"].sum(1).tolist() == [3, 0, 0, 0] * 2
    for row in (0, 4):
        assert output["completion_ids"][row][output["demonstration_mask"][row]].tolist() == expected_ids

    texts = [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)
    ]
    rewards = torch.tensor(tiny.share_of_digits(texts)).view(2, 4)
    mean = rewards.mean(1, keepdim=True) if baseline == "group" else rewards[:, 1:].mean(1, keepdim=True)
    torch.testing.assert_close(output["advantages"], (rewards - mean).flatten(), atol=1e-6, rtol=0)

    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table.completion.tolist() == texts
    assert table.share_of_digits.tolist() == pytest.approx(rewards.flatten().tolist(), abs=1e-6)
    assert table.advantage.tolist() == pytest.approx(output["advantages"].tolist(), abs=1e-6)


def test_a_failed_demonstration_becomes_less_probable(model_path, tmp_path):
    """The whole trainer: the reward prefers rollouts, and the probability of the trace falls."""
    trainer = LuffyTrainer(
        model_path,
        lambda completions, **kwargs: [0.0 if text == "AB" else 1.0 for text in completions],
        tiny.make_args(tmp_path, max_steps=8, learning_rate=3e-3, lr_scheduler_type="constant"),
        Dataset.from_list(tiny.addition_rows(1, lambda i: ["AB"])),
    )
    trainer.train()
    logs = trainer.state.log_history[:-1]
    assert logs[0]["demonstrations/reward"] == 0 and logs[0]["reward"] == 1
    assert logs[-1]["demonstrations/prob"] < 0.8 * logs[0]["demonstrations/prob"]


def test_weighted_advantages_reach_the_loss(model_path, tmp_path):
    """The loss of a second update, whose ratios are not 1, put together from the log-probs of each sequence."""
    trainer = LuffyTrainer(
        model_path,
        tiny.share_of_digits,
        tiny.make_args(
            tmp_path,
            num_demonstrations=2,
            policy_shaping="linear_log",
            policy_shaping_weight=0.2,
            demonstration_ratio_min=-0.6,
            demonstration_ratio_max=-0.5,
            demonstration_advantage_weight=3.0,
            rollout_advantage_weight=0.5,
            on_policy_shaping="power",
            on_policy_shaping_power=0.25,
            max_token_prob=0.1,
            gradient_accumulation_steps=1,
            steps_per_generation=2,
            max_steps=2,
            log_completions=True,
        ),
        Dataset.from_list(tiny.addition_rows(2, lambda i: ["A7", "7A"])),
    )
    micro_batches = tiny.record_micro_batches(trainer)
    losses, logps, compute_loss = [], [], trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        with torch.no_grad():
            logps.append([row_logps(model, inputs, row) for row in range(4)])
        losses.append(compute_loss(model, inputs, *args, **kwargs))
        return losses[-1]

    trainer.compute_loss = recording
    trainer.train()
    table = pd.read_parquet(sorted((tmp_path / "completions").glob("*.parquet"))[-1])
    inputs, total, ratios = micro_batches[1], 0.0, []
    assert inputs["demonstration_mask"].any(1).sum() == 2
    for row in range(4):
        ids, row_advantages = tiny.sequence(inputs, row)[1], inputs["advantages"][row]
        prob, ratio = logps[1][row].exp(), (logps[1][row] - inputs["old_per_token_logps"][row, : len(ids)]).exp()
        if inputs["demonstration_mask"][row].any():
            weight, coefficient = 3.0, (prob + 0.2 * logps[1][row]).clamp(-0.6, -0.5)
        else:
            weight, coefficient = 0.5, ratio**0.25
            ratios.append(ratio)
        assert (table.advantage - row_advantages[0].item() / weight).abs().min() < 1e-6
        total -= (coefficient * row_advantages[: len(ids)] * (prob <= 0.1)).sum().item()
    assert (torch.cat(ratios) - 1).abs().max() > 1e-3
    assert losses[1].item() == pytest.approx(total / (4 * 16), abs=1e-7)


def test_demonstration_probability(model_path, tmp_path):
    args = tiny.make_args(tmp_path, max_steps=30, demonstration_probability=0.5)
    trainer = LuffyTrainer(
        model_path, tiny.share_of_digits, args, Dataset.from_list(tiny.addition_rows(4, lambda i: ["A"]))
    )
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train()
    assert set(generated) == {3, 4}
    assert 8 <= generated.count(3) <= 22


def test_log_probabilities_of_the_author_are_the_ratio(model_path, tmp_path):
    """r = pi_theta / pi_phi, and it is shaped."""
    logprobs = [-1.0, -2.0, -0.5]
    rows = [{"prompt": "1+1=", "demonstrations": ["A7"], "demonstration_logprobs": [logprobs]}]
    trainer = LuffyTrainer(model_path, tiny.share_of_digits, tiny.make_args(tmp_path), Dataset.from_list(rows))
    trainer.train()
    tokenizer = tiny.make_tokenizer()
    ids = torch.tensor([tokenizer("1+1=A7")["input_ids"] + [tokenizer.eos_token_id]])
    with torch.no_grad():
        logps = AutoModelForCausalLM.from_pretrained(model_path)(ids).logits[0, 3:-1].log_softmax(-1)
    logps = logps.gather(-1, ids[0, 4:].unsqueeze(-1)).squeeze(-1)
    ratio = (logps - torch.tensor(logprobs)).exp()
    log = trainer.state.log_history[0]
    assert log["demonstrations/ratio"] == pytest.approx((ratio / (ratio + 0.1)).mean().item(), rel=1e-5)


def test_partial_demonstrations(model_path, tmp_path):
    """Two traces of a group, shown to different lengths and continued by the policy within the budget of the row."""
    trainer = LuffyTrainer(
        model_path,
        tiny.share_of_digits,
        tiny.make_args(
            tmp_path,
            num_demonstrations=2,
            prefix_ratio_min=0.5,
            prefix_ratio_max=0.75,
            prefix_schedule="fixed",
            advantage_baseline="on_policy",
            log_completions=True,
            max_completion_length=10,
        ),
        Dataset.from_list([{"prompt": "1+1=", "demonstrations": ["ABCDEFG", "1234567"]}]),
    )
    batches = tiny.record_batches(trainer)
    seen, generate = [], trainer.model.generate

    def recording(*args, **kwargs):
        seen.append(
            [ids[mask.bool()] for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)]
        )
        return generate(*args, **kwargs)

    trainer.model.generate = recording
    trainer.train()
    ((_, output),), ((*prompts,),) = batches, seen
    tokenizer = tiny.make_tokenizer()
    # 8 tokens with the EOS: half of them is 4, three quarters are 6
    assert [tokenizer.decode(ids) for ids in prompts] == ["1+1=ABCD", "1+1=123456", "1+1=", "1+1="]
    assert output["demonstration_mask"].sum(1).tolist() == [4, 6, 0, 0]
    texts = [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)
    ]
    assert texts[0].startswith("ABCD") and texts[1].startswith("123456")
    lengths = output["completion_mask"].sum(1)
    assert lengths.max() <= 10 and lengths[0] > 4 and lengths[1] > 6
    # a row with a prefix is a demonstration for the baseline over rollouts, and for TRL's metrics
    rewards = torch.tensor(tiny.share_of_digits(texts))
    torch.testing.assert_close(output["advantages"], rewards - rewards[2:].mean(), atol=1e-6, rtol=0)
    log = trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(rewards[2:].mean().item(), abs=1e-6)
    assert log["demonstrations/reward"] == pytest.approx(rewards[:2].mean().item(), abs=1e-6)
    assert log["demonstrations/length"] == 5
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table.source.tolist() == ["prefix", "prefix", "rollout", "rollout"]


@pytest.mark.parametrize("is_length_aware", [True, False])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rl_with_sft_loss(model_path, tmp_path, loss_type, is_length_aware):
    """The gradient is that of GRPO on the rollouts plus that of the mean cross-entropy of demonstration tokens."""
    gradients = Gradients()
    trainer = LuffyTrainer(
        model_path,
        tiny.share_of_digits,
        tiny.make_args(
            tmp_path,
            demonstration_loss="sft",
            sft_loss_coef=0.7,
            advantage_baseline="on_policy",
            loss_type=loss_type,
            length_aware_batching=is_length_aware,
            gradient_accumulation_steps=2,
            max_grad_norm=0.0,
        ),
        Dataset.from_list(tiny.addition_rows(2, lambda i: ["A7" + "B" * 3 * i])),
        callbacks=[gradients],
    )
    micro_batches = tiny.record_micro_batches(trainer)
    trainer.train()

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    num_tokens = sum(int(batch["completion_mask"].sum()) for batch in micro_batches)
    num_demonstration_tokens = 3 + 6
    for batch in micro_batches:
        for row in range(len(batch["prompt_ids"])):
            logps = row_logps(model, batch, row)
            if batch["demonstration_mask"][row].any():
                loss = -0.7 * logps.sum() / num_demonstration_tokens
            else:
                divisor = {
                    "dr_grpo": 2 * 4 * 16,
                    "grpo": 2 * 4 * len(logps),
                    "bnpo": num_tokens if is_length_aware else 2 * int(batch["completion_mask"].sum()),
                    "dapo": num_tokens,
                }[loss_type]
                loss = -((logps - logps.detach()).exp() * batch["advantages"][row]).sum() / divisor
            loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients.gradients[0][name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_chord(model_path, tmp_path):
    """(1 - mu) GRPO + mu SFT with phi = p (1 - p), over three updates of the schedule of mu."""
    gradients = Gradients()
    trainer = LuffyTrainer(
        model_path,
        tiny.share_of_digits,
        tiny.make_args(
            tmp_path,
            demonstration_loss="sft",
            advantage_baseline="on_policy",
            sft_loss_coef=0.8,
            sft_loss_coef_min=0.2,
            sft_loss_coef_warmup_steps=2,
            sft_loss_coef_decay_steps=2,
            sft_loss_combination="interpolate",
            sft_token_weight="chord",
            max_steps=5,
            max_grad_norm=0.0,
        ),
        Dataset.from_list(tiny.addition_rows(2, lambda i: ["A7" + "B" * 3 * i])),
        callbacks=[gradients],
    )
    batches = tiny.record_micro_batches(trainer)
    trainer.train()
    assert [log["sft_loss_coef"] for log in trainer.state.log_history[:5]] == pytest.approx([0, 0.4, 0.8, 0.5, 0.2])

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for mu, batch, before, recorded in zip(
        [0, 0.4, 0.8, 0.5, 0.2], batches, gradients.weights, gradients.gradients, strict=True
    ):
        model.load_state_dict(before)
        model.zero_grad()
        for row in range(4):
            logps = row_logps(model, batch, row)
            if batch["demonstration_mask"][row].any():
                probs = logps.detach().exp()
                loss = -mu * (probs * (1 - probs) * logps).sum() / len(logps)
            else:
                surrogate = (logps - logps.detach()).exp() * batch["advantages"][row]
                loss = -(1 - mu) * surrogate.sum() / (4 * 16)
            loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(recorded[name], parameter.grad, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- on failure


class ScoredRows:
    """A reward that is 1 for a demonstration, a group's own for its rollouts, and remembers what it has scored."""

    __name__ = "scored_rows"

    def __init__(self, rollout_rewards):
        self.rollout_rewards, self.calls, self.lengths = rollout_rewards, [], []

    def __call__(self, completions, completion_ids, answer, log_extra, **kwargs):
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        self.calls.append(list(zip(answer, texts, strict=True)))
        self.lengths.append([len(ids) for ids in completion_ids])
        log_extra("seen_as", [f"{text!r} for {a}" for a, text in self.calls[-1]])
        numbers = {a: iter(self.rollout_rewards.get(a, [])) for a in set(answer)}
        return [
            1.0 if tiny.is_demonstration_text([text])[0] else next(numbers[a])
            for a, text in zip(answer, texts, strict=True)
        ]


@pytest.mark.parametrize("is_chat", [False, True])
def test_only_failed_groups_get_demonstrations(model_path, tmp_path, is_chat):
    """Three groups of four: one fails, one is just good enough, and one fails and has no trace."""
    rows = tiny.addition_rows(3, lambda i: [] if i == 2 else [f"<think>\n{i} and 1</think>A{j}" for j in (1, 2)])
    if is_chat:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    reward = ScoredRows({"1": [0.2, 0.3, 0.0, 0.1], "2": [0.0, 0.5, 0.1, 0.3], "3": [0.0] * 4})
    trainer = LuffyTrainer(
        model_path,
        reward,
        tiny.make_args(
            tmp_path,
            num_demonstrations=2,
            demonstration_policy="on_failure",
            failure_threshold=0.2,
            gradient_accumulation_steps=3,
            log_completions=True,
        ),
        Dataset.from_list(rows),
    )
    batches = tiny.record_batches(trainer)
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train()

    assert generated == [12]  # all slots, once
    scored = [len(call) for call in reward.calls]
    assert scored == [12, 2]  # each completion once: twelve rollouts, then two demonstrations
    assert [answer for answer, _ in reward.calls[1]] == ["1", "1"]

    tables = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    tables["answer"] = tables.seen_as.str[-1]
    groups = dict(list(tables.groupby("answer")))
    assert groups["1"].source.tolist() == ["demonstration"] * 2 + ["rollout"] * 2
    assert groups["2"].source.tolist() == groups["3"].source.tolist() == ["rollout"] * 4
    # rewards of the rows that are trained on; rollouts keep those that they have got
    expected = {"1": [1.0, 1.0, 0.0, 0.1], "2": [0.0, 0.5, 0.1, 0.3], "3": [0.0] * 4}
    for answer, rewards in expected.items():
        assert groups[answer].scored_rows.tolist() == pytest.approx(rewards)
        advantages = [r - sum(rewards) / 4 for r in rewards]
        assert groups[answer].advantage.tolist() == pytest.approx(advantages)
    # what a reward function wrote beside a completion stands beside that completion
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in tables.completion]
    assert tables.seen_as.tolist() == [f"{t!r} for {a}" for t, a in zip(texts, tables.answer, strict=True)]

    # the tokens are those of the traces, and the loss knows them for demonstrations
    ((_, output),) = batches
    tokenizer = tiny.make_tokenizer()
    shown = output["completion_ids"][output["demonstration_mask"].any(1)]
    assert sorted(tokenizer.batch_decode(shown, skip_special_tokens=True)) == [
        f"<think>\n0 and 1</think>A{j}" for j in (1, 2)
    ]
    # metrics describe all twelve rollouts, those that were replaced too
    log = trainer.state.log_history[0]
    rollout_rewards = torch.tensor([0.2, 0.3, 0.0, 0.1, 0.0, 0.5, 0.1, 0.3, 0.0, 0.0, 0.0, 0.0])
    assert log["reward"] == pytest.approx(rollout_rewards.mean().item(), abs=1e-6)
    assert log["reward_std"] == pytest.approx(rollout_rewards.std().item(), abs=1e-6)
    assert log["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert log["on_policy/solve_none"] == pytest.approx(1 / 3)
    assert log["demonstrations/reward"] == 1.0
    assert log["completions/mean_length"] == pytest.approx(sum(reward.lengths[0]) / 12)


def test_a_failed_group_continues_prefixes(model_path, tmp_path):
    """Rollouts first, then what follows the prefixes of the groups that failed."""
    trainer = LuffyTrainer(
        model_path,
        lambda completions, **kwargs: [0.0] * len(completions),
        tiny.make_args(
            tmp_path,
            demonstration_policy="on_failure",
            prefix_ratio_min=0.5,
            prefix_ratio_max=0.5,
            gradient_accumulation_steps=2,
            max_completion_length=10,
        ),
        Dataset.from_list(tiny.addition_rows(2, lambda i: ["ABCDEFG"])),
    )
    batches = tiny.record_batches(trainer)
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train()
    assert generated == [8, 2]
    ((_, output),) = batches
    assert sorted(output["demonstration_mask"].sum(1).tolist()) == [0] * 6 + [4, 4]
    texts = tiny.make_tokenizer().batch_decode(output["completion_ids"][output["demonstration_mask"].any(1)])
    assert all(text.startswith("ABCD") and len(text) > 4 for text in texts)
    assert output["completion_mask"].sum(1).max() <= 10


def test_groups_of_two_processes_fail_apart(two_processes):
    """A group of four lies on two processes; one of them replaces two rows in one step, and the other none."""
    ranks = two_processes[1]["on_failure"]
    first, second = ranks
    assert first["generated"] == second["generated"] == [2, 2]  # two rows each, in both steps
    # Only the failing group shows its demonstrations, which are in slots 0 and 1 and thus on the first process
    assert first["scored"] == [2, 2, 2] and second["scored"] == [2, 2]
    assert first["log_history"] == second["log_history"]
    (failed,) = [log for log in first["log_history"] if log.get("reward") == 0.0]
    (good,) = [log for log in first["log_history"] if log.get("reward", 0.0) > 0.0]
    assert failed["demonstrations/reward"] == 1.0 and "demonstrations/reward" not in good
    advantages = [own + others for own, others in zip(first["advantages"], second["advantages"], strict=True)]
    assert sorted(advantages) == [[0.0, 0.0, 0.0, 0.0], [0.5, 0.5, -0.5, -0.5]]


# ---------------------------------------------------------------------------------------------- metrics


def test_metrics_describe_rollouts_beside_demonstrations(model_path, tmp_path):
    """Every rollout fails and every demonstration succeeds."""
    trainer = LuffyTrainer(
        model_path,
        [tiny.is_demonstration_text, tiny.share_of_digits],
        tiny.make_args(
            tmp_path, gradient_accumulation_steps=2, max_completion_length=30, reward_weights=[1.0, 0.0], beta=0.1
        ),
        Dataset.from_list(tiny.addition_rows(2)),
    )
    batches = tiny.record_batches(trainer)
    trainer.train()
    ((_, output),), log = batches, trainer.state.log_history[0]
    approx = pytest.approx
    demonstrations = output["demonstration_mask"].any(1)
    lengths = output["completion_mask"].sum(1)

    assert log["reward"] == log["reward_std"] == log["rewards/is_demonstration_text/mean"] == 0
    assert log["frac_reward_zero_std"] == log["on_policy/solve_none"] == 1
    assert log["on_policy/solve_all"] == 0
    assert log["demonstrations/reward"] == 1
    assert log["demonstrations/length"] == approx(lengths[demonstrations].float().mean().item())
    assert log["completions/mean_length"] == approx(lengths[~demonstrations].float().mean().item())
    assert log["completions/min_length"] == lengths[~demonstrations].min()
    assert log["completions/max_length"] == lengths[~demonstrations].max()
    is_demonstration = output["demonstration_mask"]
    fraction = is_demonstration.sum() / output["completion_mask"].sum()
    assert log["demonstrations/fraction"] == approx(fraction.item())

    probs, advantages, entropies = [], [], []
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for row, is_shown in enumerate(demonstrations.tolist()):
        with torch.no_grad():
            logps, entropy = tiny.logps_and_entropies(model, *tiny.sequence(output, row))
        if is_shown:
            probs.append(logps.exp())
            advantages.append(output["advantages"][row].expand_as(logps))
        else:
            entropies.append(entropy)
    probs, advantages = torch.cat(probs), torch.cat(advantages)
    ratios = probs / (probs + 0.1)
    assert log["demonstrations/prob"] == approx(probs.mean().item(), rel=1e-5)
    assert log["demonstrations/ratio"] == approx(ratios.mean().item(), rel=1e-5)
    assert log["demonstrations/loss"] == approx((-ratios * advantages).mean().item(), rel=1e-5)
    assert log["on_policy/loss"] == approx(0.25, rel=1e-5)  # -ratio A with ratio 1, A = 0 - 1/4
    assert log["entropy"] == approx(torch.cat(entropies).mean().item(), rel=1e-5)


def test_solved_groups(model_path, tmp_path):
    """Two groups of three rollouts each: all of one succeed, none of the other."""
    trainer = LuffyTrainer(
        model_path,
        lambda prompts, completions, **kwargs: [float(prompt == "0+1=") for prompt in prompts],
        tiny.make_args(tmp_path, gradient_accumulation_steps=2),
        Dataset.from_list(tiny.addition_rows(2)),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["on_policy/solve_all"], log["on_policy/solve_none"]) == (0.5, 0.5)
    assert log["reward"] == 0.5


def test_reward_functions_that_do_not_apply(model_path, tmp_path):
    """One function scores one group alone, the other nothing at all: neither makes a group look worse or alike."""

    def first_group(prompts, completions, **kwargs):
        return [1.0 if prompt == "0+1=" else None for prompt in prompts]

    def never(completions, **kwargs):
        return [None] * len(completions)

    trainer = LuffyTrainer(
        model_path,
        [first_group, never],
        tiny.make_args(tmp_path, gradient_accumulation_steps=2),
        Dataset.from_list(tiny.addition_rows(2)),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward"] == log["demonstrations/reward"] == 1
    assert (log["on_policy/solve_all"], log["on_policy/solve_none"]) == (1, 0)
    assert log["frac_reward_zero_std"] == 0.5  # the group that nothing scores has no standard deviation
    assert log["grad_norm"] == 0


def test_a_single_rollout_has_no_spread(model_path, tmp_path):
    args = tiny.make_args(tmp_path, num_demonstrations=3)
    rows = tiny.addition_rows(1, lambda i: ["A", "B", "7"])
    trainer = train(LuffyTrainer(model_path, tiny.share_of_digits, args, Dataset.from_list(rows)))
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1


@pytest.mark.parametrize(("reward", "num_groups"), [(0.0, 4), (1.0, 4), (0.0, 3)])
def test_traces_that_the_reward_rejects_are_named(model_path, tmp_path, caplog, reward, num_groups):
    type(metrics.logger).warning_once.cache_clear()  # it was said in another test
    trainer = LuffyTrainer(
        model_path,
        lambda completions, **kwargs: [reward * value for value in tiny.is_demonstration_text(completions)],
        tiny.make_args(tmp_path, num_generations=2, per_device_train_batch_size=2 * num_groups),
        Dataset.from_list(tiny.addition_rows(4)),
    )
    with caplog.at_level("WARNING"):
        trainer.train()
    message = f"None of the {num_groups} demonstrations of a generation batch earns a reward"
    assert (message in caplog.text) == (reward == 0.0 and num_groups == 4)  # of fewer it may be chance


def test_dropped_traces_are_counted(model_path, tmp_path):
    trainer = LuffyTrainer(
        model_path,
        tiny.share_of_digits,
        tiny.make_args(tmp_path, gradient_accumulation_steps=2),
        Dataset.from_list(tiny.addition_rows(2, lambda i: ["x" * 20, "y" * 20] if i == 0 else ["A"])),
    )
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["demonstrations/dropped"] == 2
    assert generated == [4 + 3]


def test_metrics_of_processes_without_rollouts(two_processes):
    """Rank 0 sees demonstrations alone, rank 1 rollouts alone."""
    folder, runs = two_processes
    first, second = runs["metrics"]
    for log in first["log_history"][:-1]:
        assert all(value is not None and not math.isnan(value) for value in log.values())
        assert log["reward"] == 0 and log["demonstrations/reward"] == 1
        assert log["frac_reward_zero_std"] == 1
        assert log["completions/max_length"] <= 16
        assert 0 < log["demonstrations/prob"] < 1
        assert log["entropy"] > 0
    table = pd.read_parquet(folder / "metrics" / "out" / "completions" / "completions_00002.parquet")
    assert table.source.tolist() == ["demonstration", "demonstration", "rollout", "rollout"]


# ---------------------------------------------------------------------------------------------- what TRL users expect


async def async_reward(completions, **kwargs):
    return tiny.share_of_digits(completions)


def test_reward_functions_get_the_other_columns(model_path, tmp_path):
    seen = []

    def reward(prompts, completions, completion_ids, answer, **kwargs):
        seen.append((prompts, answer, sorted(kwargs)))
        return tiny.share_of_digits(completions)

    trainer = LuffyTrainer(
        model_path, [reward, async_reward], tiny.make_args(tmp_path), Dataset.from_list(tiny.addition_rows(1))
    )
    trainer.train()
    ((prompts, answers, others),) = seen
    assert prompts == ["0+1="] * 4
    assert answers == ["1"] * 4
    assert others == ["demonstrations", "log_extra", "log_metric", "trainer_state"]
    log = trainer.state.log_history[0]
    assert log["rewards/reward/mean"] == log["rewards/async_reward/mean"] > 0


def test_a_reward_model_scores_demonstrations(model_path, tmp_path):
    tokenizer = tiny.make_tokenizer()
    config = tiny.make_model(tokenizer).config
    torch.manual_seed(0)
    config.num_labels = 1
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "reward_model")
    tokenizer.save_pretrained(tmp_path / "reward_model")
    trainer = LuffyTrainer(
        model_path, str(tmp_path / "reward_model"), tiny.make_args(tmp_path), Dataset.from_list(tiny.addition_rows(1))
    )
    trainer.train()
    ids = tokenizer("0+1=<think>\n0 and 1</think>A1", return_tensors="pt")
    expected = trainer.reward_funcs[0](**ids).logits.item()
    assert trainer.state.log_history[0]["demonstrations/reward"] == pytest.approx(expected, rel=1e-5)


def test_lora(model_path, tmp_path):
    from peft import LoraConfig

    trainer = LuffyTrainer(
        model_path,
        tiny.share_of_digits,
        tiny.make_args(tmp_path, max_steps=2, beta=0.1),
        Dataset.from_list(tiny.addition_rows(2, lambda i: ["A7"])),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert trainer.state.log_history[0]["demonstrations/length"] == 3


def test_a_lost_server_is_named(model_path, tmp_path, monkeypatch):
    """vLLM is not installed here: what its client raises is made up, and `test_vllm.py` kills a real server."""
    dataset = Dataset.from_list(tiny.addition_rows(2))
    trainer = LuffyTrainer(model_path, tiny.share_of_digits, tiny.make_args(tmp_path), dataset)
    error = ConnectionError("Connection refused")

    def refuse(*args):
        raise error

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", refuse)
    with pytest.raises(ConnectionError):  # not what a server has to do with
        trainer.train()
    trainer.use_vllm, trainer.vllm_mode = True, "server"
    with pytest.raises(RuntimeError, match=r"lost while completions for update 1 .*\(Connection refused\). Start it"):
        trainer.train()


def test_an_error_of_a_reward_is_not_a_lost_server(model_path, tmp_path):
    """With "on_failure" rewards are computed within generation."""

    def judge(completions, **kwargs):
        raise ConnectionError("the judge does not answer")

    args = tiny.make_args(tmp_path, demonstration_policy="on_failure")
    trainer = LuffyTrainer(model_path, judge, args, Dataset.from_list(tiny.addition_rows(2)))
    # vLLM is not installed here: transformers samples, and then the trainer takes its server to be in use
    generate, trainer.vllm_mode = trainer._generate_single_turn, "server"

    def generate_with_transformers(*args):
        result = generate(*args)
        trainer.use_vllm = True
        return result

    trainer._generate_single_turn = generate_with_transformers
    with pytest.raises(ConnectionError, match="the judge does not answer"):
        trainer.train()


@pytest.mark.parametrize("cause", ["loss", "gradient"])
@pytest.mark.parametrize("plain", [True, False])
def test_what_is_not_finite_does_not_reach_the_weights(model_path, tmp_path, cause, plain):
    options = tiny.PLAIN_GRPO if plain else {}
    args = tiny.make_args(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, **options)
    trainer = LuffyTrainer(model_path, tiny.share_of_digits, args, Dataset.from_list(tiny.addition_rows(4)))
    compute_loss, weights = trainer.compute_loss, {}

    def poisoned(model, *args, **kwargs):
        loss = compute_loss(model, *args, **kwargs)
        if trainer.state.global_step == 1:
            weights.update({name: p.detach().clone() for name, p in model.named_parameters()})
            if cause == "loss":
                return loss * torch.nan
            next(model.parameters()).register_hook(lambda gradient: gradient + torch.inf)
        return loss

    trainer.compute_loss = poisoned
    with pytest.raises(FloatingPointError, match=r"The gradient of update 2 is (nan|inf)\. Training stops before"):
        trainer.train()
    assert weights and all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("plain", [False, True])
def test_fewer_rows_than_are_generated_for_at_once(tmp_path, plain):
    args = tiny.make_args(tmp_path, steps_per_generation=3, **(tiny.PLAIN_GRPO if plain else {}))
    message = (
        r"`train_dataset` has 2 rows, and completions are generated for 3 prompts at once: .*\(4\) times 1 process"
    )
    with pytest.raises(ValueError, match=message):  # before the model, which does not exist, is loaded
        LuffyTrainer("no/model", tiny.share_of_digits, args, Dataset.from_list(tiny.addition_rows(2)))


def test_streaming_dataset(model_path, tmp_path):
    rows = tiny.addition_rows(4, lambda i: ["A7"])
    dataset = IterableDataset.from_generator(lambda: iter(rows))
    trainer = LuffyTrainer(model_path, tiny.share_of_digits, tiny.make_args(tmp_path, max_steps=2), dataset)
    generated = tiny.count_generated_rows(trainer.model)
    trainer.train()
    assert generated == [3, 3]


@pytest.mark.parametrize("options", [{"dataloader_num_workers": 2}, {"gradient_checkpointing": False}])
def test_options_of_the_machine_change_nothing(model_path, tmp_path, options):
    def final_weights(**options):
        args = tiny.make_args(tmp_path, max_steps=2, gradient_accumulation_steps=2, **options)
        dataset = Dataset.from_list(tiny.addition_rows(8))
        return train(LuffyTrainer(model_path, tiny.share_of_digits, args, dataset)).model.state_dict()

    expected, weights = final_weights(), final_weights(**options)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_bf16(model_path, tmp_path):
    """Autocast rounds to 8 bits, so that probabilities of the same tokens differ, and little; weights stay in fp32."""

    def first_log(**options):
        dataset = Dataset.from_list(tiny.addition_rows(1))
        trainer = LuffyTrainer(model_path, tiny.share_of_digits, tiny.make_args(tmp_path, **options), dataset)
        trainer.train()
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        return trainer.state.log_history[0]

    expected, rounded = first_log()["demonstrations/prob"], first_log(bf16=True)["demonstrations/prob"]
    assert rounded == pytest.approx(expected, rel=0.05) and rounded != expected


def test_an_instantiated_model_and_default_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's default precision is bf16, which transformers accepts on a GPU only
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    model.config._name_or_path = "someone/tiny"
    trainer = LuffyTrainer(
        model,
        tiny.share_of_digits,
        train_dataset=Dataset.from_list(tiny.addition_rows(1)),
        processing_class=tokenizer,
    )
    assert isinstance(trainer.args, LuffyConfig)
    assert trainer.args.output_dir == "tiny-LUFFY"


# ---------------------------------------------------------------------------------------------- bad input


def test_a_rollout_func_is_refused(tmp_path):
    rows = Dataset.from_list([])
    with pytest.raises(ValueError, match="`rollout_func` is not supported together with demonstrations: it generates"):
        LuffyTrainer("no/model", tiny.share_of_digits, tiny.make_args(tmp_path), rows, rollout_func=print)


def test_refused_arguments_without_clipping_and_demonstrations(tmp_path):
    """The loss without clipping knows nothing of tool masks."""
    args = tiny.make_args(tmp_path, num_demonstrations=0)
    with pytest.raises(ValueError, match="`rollout_func` is not supported.*or train plain GRPO"):
        LuffyTrainer("no/such-model", tiny.share_of_digits, args, rollout_func=lambda prompts, trainer: {})


def test_the_end_of_turn_without_a_generation_config(tmp_path):
    """`config.json` says then what ends generation, as it does for transformers."""
    path = tiny.save_tiny_model(tmp_path / "model")
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(path)
    (tmp_path / "model" / "generation_config.json").unlink()
    rows = [{"prompt": [{"role": "user", "content": "1"}], "demonstrations": ["2"]}]
    trainer = LuffyTrainer(path, tiny.share_of_digits, tiny.make_args(tmp_path / "out"), Dataset.from_list(rows))
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tiny.trace_ids(trainer)[0][0][-1] == end_of_turn
    assert trainer.eos_token_ids == [tokenizer.eos_token_id, end_of_turn]


def test_arguments_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`args` must be a `LuffyConfig`, got `GRPOConfig`"):
        LuffyTrainer("no/such-model", tiny.share_of_digits, tiny.make_args(tmp_path, cls=GRPOConfig))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1+1=", "trace": "2"}], "exactly one of `demonstrations`"),
        ([{"prompt": "1+1=", "demonstrations": ["2"], "completion": "2"}], "exactly one of `demonstrations`"),
        ([{"problem": "1+1=", "demonstrations": ["2"]}], "no column `prompt`, only \\['problem', 'demonstrations'\\]"),
        (
            [{"prompt": "1+1=", "demonstrations": ["2"], "image": "x"}],
            "'image', and the policy has a tokenizer, which sees",
        ),
        (
            [{"prompt": "1+1=", "demonstrations": ["2"], "demonstration_ids": [[1]]}],
            "columns that LuffyTrainer itself",
        ),
    ],
)
def test_refused_datasets(model_path, tmp_path, monkeypatch, rows, message):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        LuffyTrainer(model_path, tiny.share_of_digits, tiny.make_args(tmp_path), Dataset.from_list(rows))


def test_a_tokenizer_without_eos_is_refused(model_path, tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token.*Set `tokenizer.eos_token`"):
        LuffyTrainer(
            model_path,
            tiny.share_of_digits,
            tiny.make_args(tmp_path),
            Dataset.from_list(tiny.addition_rows(1)),
            processing_class=tokenizer,
        )


# ---------------------------------------------------------------------------------------------- the contract with TRL


def parameters_of(cls, name):
    return list(inspect.signature(getattr(cls, name)).parameters)


def test_the_arguments_are_those_of_grpo_trainer():
    assert parameters_of(LuffyTrainer, "__init__") == parameters_of(GRPOTrainer, "__init__")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_set_signature_columns_if_needed", ["self"]),
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_generate", ["self", "prompts"]),
        (
            "_generate_single_turn",
            ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("train", ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        ("evaluate", ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"]),
        ("_get_train_sampler", ["self", "dataset"]),
        (
            "_get_dataloader",
            ["self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"],
        ),
        ("compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("_get_grad_norm", ["self", "model", "grad_norm"]),
        ("get_batch_samples", ["self", "epoch_iterator", "num_batches", "device"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        (
            "_init_training_state",
            [
                "self",
                "max_steps",
                "num_update_steps_per_epoch",
                "num_train_epochs",
                "resume_from_checkpoint",
                "trial",
            ],
        ),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        (
            "_tool_call_loop",
            [
                *("self", "prompts", "prompt_ids", "completion_ids", "completions", "logprobs"),
                *("images", "multimodal_fields"),
            ],
        ),
        ("log", ["self", "logs", "start_time"]),
        ("create_model_card", ["self", "model_name", "dataset_name", "tags"]),
        ("_push_from_checkpoint", ["self", "checkpoint_folder"]),
        ("_finish_current_push", ["self"]),
    ],
)
def test_overridden_methods_have_the_signature_that_trl_calls(name, parameters):
    """Fails when a new TRL changes what is overridden: then read its diff before raising the pin."""
    assert parameters_of(GRPOTrainer, name) == parameters
    overridden = getattr(LuffyTrainer, name)
    assert inspect.unwrap(overridden) is not inspect.unwrap(getattr(GRPOTrainer, name))
    assert list(inspect.signature(overridden).parameters) == parameters


def test_log_probs_begin_with_the_arguments_that_are_overridden():
    parameters = parameters_of(GRPOTrainer, "_get_per_token_logps_and_entropies")
    expected = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert parameters[:6] == expected == parameters_of(LuffyTrainer, "_get_per_token_logps_and_entropies")[:6]


def test_what_renders_answers_of_tools_reads_no_more_of_a_trainer():
    """`turns.answer_ids` calls it on what stands for a trainer, with these attributes."""
    assert parameters_of(GRPOTrainer, "_get_tool_suffix_ids") == ["self", "tool_messages"]
    read = set(re.findall(r"self\.(\w+)", inspect.getsource(GRPOTrainer._get_tool_suffix_ids)))
    assert read == {"_is_vlm", "processing_class", "chat_template", "chat_template_kwargs", "_tokenizer"}


def test_everything_that_is_overridden_is_guarded():
    marks = test_overridden_methods_have_the_signature_that_trl_calls.pytestmark
    guarded = {parameters[0] for mark in marks for parameters in mark.args[1]}
    guarded |= {"__init__", "_get_per_token_logps_and_entropies"}
    own = LuffyTrainer.__mro__[: LuffyTrainer.__mro__.index(GRPOTrainer)]
    overridden = {
        name
        for cls in own
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and hasattr(GRPOTrainer, name)
    }
    assert overridden == guarded and len(own) == 9
