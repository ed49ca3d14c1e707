# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What GRPOTrainer lacks, on GRPOTrainer itself: no demonstrations, no `LuffyConfig`."""

import pytest
import tiny
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import LuffyTrainer
from luffy_trl.groups import Caches, Demonstration, MixedBatch
from luffy_trl.mixins.model_cards import CardTrainer
from luffy_trl.mixins.resuming import ResumingTrainer
from luffy_trl.mixins.safety import SafeTrainer
from luffy_trl.mixins.sampling import UnevenSamplingTrainer


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny.save_tiny_model(tmp_path_factory.mktemp("model"))


def make_trainer(cls, model_path, output_dir, **options):
    args = tiny.make_args(output_dir, GRPOConfig, beta=0.1, **options)
    rows = Dataset.from_list([{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8)])
    return cls(model_path, tiny.share_of_digits, args, rows)


def weights_after(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.state_dict()


def assert_equal(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@pytest.mark.parametrize("cls", [ResumingTrainer, UnevenSamplingTrainer, SafeTrainer, CardTrainer])
def test_a_mixin_alone_is_grpo_to_the_bit(model_path, tmp_path, cls):
    options = {"max_steps": 3, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    expected = weights_after(make_trainer(GRPOTrainer, model_path, tmp_path / "stock", **options))
    assert_equal(weights_after(make_trainer(cls, model_path, tmp_path / "own", **options)), expected)


def test_resuming_within_a_generation_batch(model_path, tmp_path):
    """The checkpoint lies after the first of two updates on one generation batch, in the second epoch."""
    options = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
    options |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 7}

    def history(trainer):
        kept = ("loss", "reward", "kl", "learning_rate", "grad_norm", "epoch")
        return [{key: log.get(key) for key in kept} for log in trainer.state.log_history if "loss" in log]

    trainer = make_trainer(ResumingTrainer, model_path, tmp_path / "out", **options)
    expected = weights_after(trainer)
    resumed = make_trainer(ResumingTrainer, model_path, tmp_path / "other", **options)
    generated = tiny.count_generated_rows(resumed.model)
    weights = weights_after(resumed, str(tmp_path / "out" / "checkpoint-5"))
    assert_equal(weights, expected)
    assert history(resumed) == history(trainer) and generated == [16]  # for the seventh update only


def test_completions_begin_with_what_is_given(model_path, tmp_path):
    class Giving(UnevenSamplingTrainer):
        def _generate_and_score_completions(self, inputs):
            self._batch = MixedBatch(inputs, self.num_generations, self.accelerator, Caches())
            complete, prefix = Demonstration([10, 11, 1]), Demonstration([12, 13], is_complete=False)
            self._batch.insert([complete, prefix, None, None])
            return super()._generate_and_score_completions(inputs)

    trainer = make_trainer(Giving, model_path, tmp_path)
    generated, completions = tiny.count_generated_rows(trainer.model), []
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda *args: completions.append(generate(*args)) or completions[-1]
    trainer.train()
    ids, _ = completions[0]
    assert generated == [3]
    assert ids[0] == [10, 11, 1] and ids[1][:2] == [12, 13] and 2 < len(ids[1]) <= 16
    assert ids[2][:2] != [12, 13] and len(ids[2]) > 0


def test_a_number_that_is_not_finite(model_path, tmp_path):
    trainer = make_trainer(SafeTrainer, model_path, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) * torch.inf
    with pytest.raises(FloatingPointError, match="The gradient of update 1 is nan"):
        trainer.train()
    assert_equal(trainer.model.state_dict(), before)


def test_a_card(model_path, tmp_path):
    trainer = make_trainer(CardTrainer, model_path, tmp_path / "stock")
    trainer.train()
    trainer.create_model_card(model_name="mine", tags="extra")
    card = (tmp_path / "stock" / "README.md").read_text()
    assert "share_of_digits" in card and "GRPO" in card and "- extra" in card
    assert "policy shaping" not in card and "LUFFY" not in card


@pytest.mark.parametrize(("reward", "shown"), [(float("inf"), "inf"), (float("-inf"), "-inf"), ("1.0", "'1.0'")])
def test_a_reward_that_is_no_finite_number(model_path, tmp_path, reward, shown):
    def odd(completions, **kwargs):
        return [0.0] * (len(completions) - 1) + [reward]

    trainer = LuffyTrainer(model_path, odd, tiny.make_args(tmp_path), Dataset.from_list(tiny.addition_rows(2)))
    with pytest.raises(ValueError, match=f"The reward function `odd` returned {shown}. A reward is a finite number"):
        trainer.train()


@pytest.mark.parametrize("value", [None, float("nan")])
@pytest.mark.parametrize("options", [{}, tiny.PLAIN_GRPO], ids=["luffy", "grpo"])
def test_no_rewards_at_all(tmp_path, model_path, caplog, value, options):
    """One warning that names the functions; one that gives some completions no reward is no mistake."""

    def nothing(completions, **kwargs):
        return [value] * len(completions)

    def nil(completions, **kwargs):
        return nothing(completions)

    def some(completions, **kwargs):
        return [value, *tiny.share_of_digits(completions[1:])]

    for functions, count in (([nothing, nil], 1), ([nothing, some], 0), (some, 0)):
        caplog.clear()
        rows = Dataset.from_list(tiny.addition_rows(4))
        args = tiny.make_args(tmp_path / "out", max_steps=3, **options)
        LuffyTrainer(model_path, functions, args, rows).train()
        told = [record.getMessage() for record in caplog.records if "got a reward from" in record.getMessage()]
        assert [text.partition(":")[0] for text in told] == [
            "[RANK 0] No completion of a batch of 4 got a reward from `nothing`, `nil`"
        ] * count
