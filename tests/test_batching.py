# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Micro-batches by length: the best cut, found another way, and nothing lost on the way."""

import itertools
import random

import launched
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import LuffyConfig, LuffyTrainer, batching
from luffy_trl.batching import distribute, needs_position_ids, place, plan_micro_batches, resize, round_up, select


def padded_tokens(plan, prompts, completions):
    return [len(rows) * (max(prompts[r] for r in rows) + max(completions[r] for r in rows)) for rows in plan]


def test_a_long_sequence_stands_alone():
    # 1 of 100 and 7 of 10 tokens: 2 x 4 rows take 4 x 100 + 4 x 10 = 440, and 1 + 7 rows 100 + 70
    plan = plan_micro_batches([0] * 8, [10, 10, 10, 100, 10, 10, 10, 10], 400, 2)
    assert plan[0] == [3] and sorted(plan[1]) == [0, 1, 2, 4, 5, 6, 7]
    # sixteen short ones would take 160 together
    plan = plan_micro_batches([0] * 17, [100] + [10] * 16, 100, 3)
    assert plan[0] == [0] and all(6 <= len(rows) <= 10 for rows in plan[1:])


@pytest.mark.parametrize("seed", range(30))
def test_no_other_cut_of_the_sorted_sequences_is_better(seed):
    rng = random.Random(seed)
    num_sequences, num_micro_batches = rng.choice([(6, 2), (6, 3), (8, 4), (9, 3), (5, 5)])
    prompts = [rng.randrange(1, 9) for _ in range(num_sequences)]
    completions = [rng.choice([rng.randrange(1, 20), rng.randrange(40, 60)]) for _ in range(num_sequences)]
    rows = -(-num_sequences // num_micro_batches)
    limit = rows * (max(prompts) + max(completions))
    plan = plan_micro_batches(prompts, completions, limit, num_micro_batches)
    assert sorted(row for rows in plan for row in rows) == list(range(num_sequences))
    assert len(plan) == num_micro_batches and all(plan)
    tokens = padded_tokens(plan, prompts, completions)
    assert max(tokens) <= limit
    longest = [max(completions[row] for row in rows) for rows in plan]
    assert longest == sorted(longest, reverse=True)

    order = sorted(range(num_sequences), key=lambda row: (-completions[row], -prompts[row]))
    best = min(
        sum(tokens)
        for cuts in itertools.combinations(range(1, num_sequences), num_micro_batches - 1)
        for tokens in [
            padded_tokens([order[a:b] for a, b in itertools.pairwise([0, *cuts, num_sequences])], prompts, completions)
        ]
        if max(tokens) <= limit
    )
    assert sum(tokens) == best


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("padding_free", [False, True])
def test_a_token_budget_takes_the_fewest_micro_batches(seed, padding_free):
    rng = random.Random(seed)
    num_sequences, max_tokens, num_processes = rng.choice([6, 8]), rng.choice([40, 70]), rng.choice([1, 2])
    prompts = [rng.randrange(1, 9) for _ in range(num_sequences)]
    completions = [rng.randrange(1, 60) for _ in range(num_sequences)]

    def tokens_of(plan):
        if padding_free:
            return [sum(prompts[row] + completions[row] for row in rows) for rows in plan]
        return padded_tokens(plan, prompts, completions)

    plan = plan_micro_batches(prompts, completions, max_tokens, None, num_processes, padding_free)
    assert sorted(row for rows in plan for row in rows) == list(range(num_sequences)) and all(plan)
    assert all(len(rows) == 1 or count <= max_tokens for rows, count in zip(plan, tokens_of(plan), strict=True))

    order = sorted(range(num_sequences), key=lambda row: (-completions[row], -prompts[row]))
    costs = {}
    for number in range(1, num_sequences + 1):
        for cuts in itertools.combinations(range(1, num_sequences), number - 1):
            other = [order[a:b] for a, b in itertools.pairwise([0, *cuts, num_sequences])]
            counts = tokens_of(other)
            if all(len(rows) == 1 or count <= max_tokens for rows, count in zip(other, counts, strict=True)):
                cost = sum(count**2 if padding_free else count for count in counts)
                costs[number] = min(cost, costs.get(number, cost))
    assert len(plan) == -(-min(costs) // num_processes) * num_processes
    assert sum(count**2 if padding_free else count for count in tokens_of(plan)) == costs[len(plan)]


def plan_by_all_pairs(prompts, completions, max_tokens, num_micro_batches, multiple_of, padding_free):
    """The dynamic program over all pairs of sequences, in cubic time; of equal cuts, the longest last micro-batch."""
    order = sorted(range(len(prompts)), key=lambda row: (-completions[row], -prompts[row]))

    def tokens_of(start, end):
        rows = order[start:end]
        if padding_free:
            return sum(prompts[row] + completions[row] for row in rows)
        return len(rows) * (max(prompts[row] for row in rows) + max(completions[row] for row in rows))

    tokens = {pair: tokens_of(*pair) for pair in itertools.combinations(range(len(order) + 1), 2)}
    costs = {
        (start, end): count**2 if padding_free else count
        for (start, end), count in tokens.items()
        if count <= max_tokens or end == start + 1
    }
    totals, starts = [{0: 0}], []  # by number of micro-batches, and by end
    for _ in order:
        ways = {}
        for (start, end), cost in costs.items():  # the first start comes first
            if start in totals[-1] and totals[-1][start] + cost < ways.get(end, (float("inf"),))[0]:
                ways[end] = totals[-1][start] + cost, start
        totals.append({end: cost for end, (cost, _) in ways.items()})
        starts.append({end: start for end, (_, start) in ways.items()})
    if num_micro_batches is None:
        fewest = next(number for number, of_number in enumerate(totals) if len(order) in of_number)
        num_micro_batches = -(-fewest // multiple_of) * multiple_of
    plan, end = [], len(order)
    for of_number in reversed(starts[:num_micro_batches]):
        plan.append(order[of_number[end] : end])
        end = of_number[end]
    return plan[::-1], totals[num_micro_batches][len(order)]


def draw_lengths(rng):
    """Sequences of one kind: spread out, equal, multiples of 64, odd prompts, one in eight or a single one long."""
    num_sequences = rng.choice([1, 2, 5, 8, 12, 20, 30])
    widest_prompt, widest_completion = rng.choice([1, 8, 99, 999]), rng.choice([1, 19, 299, 7999])
    prompts = [rng.randint(1, widest_prompt) for _ in range(num_sequences)]
    completions = [rng.randint(1, widest_completion) for _ in range(num_sequences)]
    kind = rng.choice(["spread", "equal", "multiples", "odd prompts", "long traces", "one too long"])
    if kind == "equal":
        completions = [7] * num_sequences
    elif kind == "multiples":
        prompts, completions = ([64 * length for length in lengths] for lengths in (prompts, completions))
    elif kind == "odd prompts":
        prompts = [rng.choice([10, 5000]) for _ in prompts]
        completions = [rng.randint(1000, 1030) for _ in completions]
    elif kind == "long traces":
        completions = [20 * length if rng.random() < 1 / 8 else length for length in completions]
    elif kind == "one too long":
        completions[rng.randrange(num_sequences)] = 100_000
    return prompts, completions


@pytest.mark.parametrize("max_stored_costs", [0, 2**23])
@pytest.mark.parametrize("padding_free", [False, True])
def test_the_plan_is_that_of_the_dynamic_program(padding_free, max_stored_costs, monkeypatch):
    """300 instances: the same cost, and of equal cuts the same one, whether costs are stored or computed again."""
    monkeypatch.setattr(batching, "MAX_STORED_COSTS", max_stored_costs)
    rng = random.Random(f"{padding_free}")
    kinds = set()
    for _ in range(300):
        prompts, completions = draw_lengths(rng)
        num_sequences, longest = len(prompts), max(prompts) + max(completions)
        divisors = [number for number in range(1, num_sequences + 1) if num_sequences % number == 0]
        kind = rng.choice(["as many", "budget", "any number"])
        max_tokens, num_micro_batches, multiple_of = rng.randint(1, 4 * longest), None, rng.choice(divisors)
        if kind == "as many":  # as TRL's cut into equally many rows
            num_micro_batches = rng.choice(divisors)
            max_tokens = num_sequences // num_micro_batches * longest
        elif kind == "any number":
            fewest = len(plan_micro_batches(prompts, completions, max_tokens, padding_free=padding_free))
            num_micro_batches = rng.randint(fewest, num_sequences)
        arguments = prompts, completions, max_tokens, num_micro_batches, multiple_of, padding_free
        plan = plan_micro_batches(*arguments)
        expected, cost = plan_by_all_pairs(*arguments)
        if padding_free:
            tokens = [sum(prompts[row] + completions[row] for row in rows) for rows in plan]
        else:
            tokens = padded_tokens(plan, prompts, completions)
        assert sum(count**2 if padding_free else count for count in tokens) == cost, arguments
        assert plan == expected, arguments
        kinds.add((kind, len(plan) > 1, max(tokens) > max_tokens))
    assert len(kinds) >= 8  # all of these, with and without a sequence over the budget


def test_a_large_plan_stays_small(monkeypatch):
    """2,048 sequences: what is computed are micro-batches of a few dozen sequences, not all pairs."""
    rng = random.Random(0)
    prompts = [rng.randint(60, 1000) for _ in range(2048)]
    completions = [rng.randint(2000, 8192) if rng.random() < 1 / 8 else rng.randint(100, 2000) for _ in prompts]
    largest, costs = [], batching.Runs.costs
    monkeypatch.setattr(
        batching.Runs, "costs", lambda self, end: largest.append(len(costs(self, end))) or costs(self, end)
    )
    for arguments in [(16384, None, 256), (4 * (max(prompts) + max(completions)), 512)]:
        for padding_free in (False, True):
            largest.clear()
            plan = plan_micro_batches(prompts, completions, *arguments, padding_free=padding_free)
            assert len(plan) % 256 == 0
            assert max(largest) < 200
            assert len(largest) < 40 * 2048  # passes over all sequences


def test_a_cut_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="3 sequences make between 2 and 3 micro-batches of at most 20 tokens, not 1"):
        plan_micro_batches([1, 1, 1], [9, 9, 9], 20, 1)
    with pytest.raises(ValueError, match="between 2 and 3 .* not 4"):
        plan_micro_batches([1, 1, 1], [9, 9, 9], 20, None, 4)
    assert plan_micro_batches([], [], 20) == []


def test_processes_have_as_much_to_do():
    tokens = [90, 10, 50, 60, 40, 30]
    shares = distribute([[number] for number in range(6)], tokens, 2)
    # 90 and 60; then 50 to the lesser and 40; then 30 to the lesser (60 + 50 = 110 < 90 + 40 = 130) and 10
    assert shares == [[[0], [4], [1]], [[3], [2], [5]]]


def make_batch():
    """Six sequences; each token, mask and value says where it belongs."""
    prompts, completions = [2, 1, 4, 3, 1, 2], [3, 9, 1, 2, 0, 3]
    prompt_width, width = 5, 9  # wider than any prompt, as TRL's padding to a multiple may make it
    prompt_ids, prompt_mask = torch.zeros(6, prompt_width, dtype=torch.long), torch.zeros(6, prompt_width).long()
    ids, mask = torch.zeros(6, width, dtype=torch.long), torch.zeros(6, width).long()
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        prompt_ids[row, prompt_width - prompt :] = torch.arange(prompt) + 10 * row + 100
        prompt_mask[row, prompt_width - prompt :] = 1
        ids[row, :completion] = torch.arange(completion) + 10 * row + 1
        mask[row, :completion] = 1
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.arange(6.0),
        "old_per_token_logps": ids / 7,
        "num_items_in_batch": torch.tensor(18),
        "ref_per_token_logps": None,
    }
    return batch, prompts, completions


@pytest.mark.parametrize(("prompt", "completion"), [(4, 3), (5, 9), (7, 12)])
def test_every_row_keeps_what_is_its_own(prompt, completion):
    """Narrower, as wide and wider than before; the row of nine tokens is left out of what is narrower."""
    batch, prompts, completions = make_batch()
    rows = [5, 0, 2, 3, 4, *([1] if completion >= 9 else [])]
    result = resize(select(batch, rows), prompt, completion)
    assert result["prompt_ids"].shape == result["prompt_mask"].shape == (len(rows), prompt)
    assert result["old_per_token_logps"].shape == result["completion_mask"].shape == (len(rows), completion)
    assert result["advantages"].tolist() == rows
    assert result["num_items_in_batch"] == 18 and result["ref_per_token_logps"] is None
    for i, row in enumerate(rows):
        ids = result["prompt_ids"][i][result["prompt_mask"][i].bool()]
        assert ids.tolist() == [100 + 10 * row + j for j in range(prompts[row])]
        is_real = result["completion_mask"][i].bool()
        expected = [10 * row + 1 + j for j in range(completions[row])]
        assert result["completion_ids"][i][is_real].tolist() == expected
        torch.testing.assert_close(result["old_per_token_logps"][i][is_real], torch.tensor(expected) / 7)


def test_widths_are_multiples():
    lengths = torch.tensor([[0, 3], [4, 5]])
    assert round_up(lengths, 4).tolist() == [[4, 4], [4, 8]]
    assert round_up(lengths, None).tolist() == [[1, 3], [4, 5]]


# ---------------------------------------------------------------------------------------------- between processes


PER_TOKEN = (
    "completion_ids",
    "advantages",
    "old_per_token_logps",
    "importance_sampling_ratio",
    "ref_per_token_logps",
    "behavior_logps",
    "demonstration_mask",
)


def real_values(row, key, value=None):
    """A row's values, or those of one that it became, without padding."""
    value = row[key] if value is None else value
    if key == "prompt_ids":
        return value[-int(row["prompt_mask"].sum()) :]
    if key in PER_TOKEN and value.dim() == 1:
        length = int(row["completion_mask"].sum())
        return value.expand(length) if len(value) == 1 else value[:length]  # a ratio may be one for the sequence
    return value


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_sequences_arrive_where_the_plan_wants_them(tmp_path, num_processes):
    """Each once and to the bit, in the micro-batches of the plan. Others send neither padding nor masks."""
    ranks = tiny.launch("rebatched", tmp_path, num_processes) if num_processes > 1 else [launched.rebatched(tmp_path)]
    for cases in zip(*ranks, strict=True):
        options = cases[0]["options"]
        rows = [{key: value[i] for key, value in case["before"].items()} for case in cases for i in range(12)]
        lengths = torch.tensor([[int(row[f"{part}_mask"].sum()) for part in ("prompt", "completion")] for row in rows])
        wide = round_up(lengths, options.get("pad_to_multiple_of"))
        if "max_tokens" in options:
            limits = options["max_tokens"], None
        else:
            limits = 4 * int(wide.amax(0).sum()), 3 * num_processes
        plan = plan_micro_batches(*wide.T.tolist(), *limits, num_processes, options.get("padding_free", False))
        numbers = [[(batch["number"] - 2**40).tolist() for batch in case["after"]] for case in cases]
        assert sorted(sum(numbers, [])) == sorted(plan)
        assert len({len(of_process) for of_process in numbers}) == 1

        for process, (case, of_process) in enumerate(zip(cases, numbers, strict=True)):
            num_bytes = 8 * (len(rows) - 12)  # lengths
            for batch, of_batch in zip(case["after"], of_process, strict=True):
                shared = {
                    "num_items_in_batch": 18,
                    "num_sequences": 12,
                    "num_tokens": lengths[:, 1].sum() / num_processes,
                }
                for key, value in shared.items():
                    assert batch.pop(key) == value
                assert batch.pop("sampling_per_token_logps") is None and batch.keys() == case["before"].keys()
                widths = wide[of_batch].amax(0).tolist()
                for key, value in batch.items():
                    assert value.dtype == case["before"][key].dtype and value.device == case["before"][key].device
                    if value.dim() > 1 and key != "pair":
                        assert value.size(1) == widths[0 if key.startswith("prompt") else 1]
                for i, number in enumerate(of_batch):
                    row, (prompt, completion) = rows[number], lengths[number].tolist()
                    assert batch["prompt_mask"][i].tolist() == [0] * (widths[0] - prompt) + [1] * prompt
                    assert batch["completion_mask"][i].tolist() == [1] * completion + [0] * (widths[1] - completion)
                    for key in batch.keys() - {"prompt_mask", "completion_mask"}:
                        expected = real_values(row, key)
                        assert torch.equal(real_values(row, key, batch[key][i]), expected)
                        if number // 12 != process:
                            num_bytes += expected.numel() * (4 if key.endswith("_ids") else expected.element_size())
            assert case["received"] == num_bytes * (num_processes > 1)


def test_shares_stay_where_their_tokens_are():
    # Three processes with two sequences each. The third share has most of its tokens on the first process.
    assert place([[1, 2], [4, 5], [0, 3]], [50, 10, 5, 9, 20, 30]) == [2, 0, 1]
    assert place([[2, 3], [0, 1]], [1, 1, 1, 1]) == [1, 0]
    rng = random.Random(0)
    for _ in range(20):
        rows = rng.sample(range(64), 64)
        assert sorted(place([rows[i : i + 8] for i in range(0, 64, 8)], [rng.randint(1, 9) for _ in rows])) == list(
            range(8)
        )


# ---------------------------------------------------------------------------------------------- absolute positions


def make_gpt2(tokenizer):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            initializer_range=0.3,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class TwoUpdates(TrainerCallback):
    """The gradients of two updates, and the weights that they belong to."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pad_to_multiple_of": 8},
        {"max_tokens_per_microbatch": 40, "pad_to_multiple_of": 8},
        {"max_tokens_per_microbatch": 40, "padding_free": True},
        {"lora": True, "pad_to_multiple_of": 8},
    ],
)
def test_padding_does_not_move_absolute_positions(tmp_path, options):
    """GPT-2 sees each token where generation does: gradients are those of each sequence on its own."""
    tokenizer, recorder = tiny.make_tokenizer(), TwoUpdates()
    options = dict(options)
    lora = LoraConfig(target_modules=["c_attn"], r=4, fan_in_fan_out=True) if options.pop("lora", False) else None
    make_gpt2(tokenizer).save_pretrained(tmp_path / "model")
    trainer = LuffyTrainer(
        str(tmp_path / "model"),
        tiny.share_of_digits,
        tiny.make_args(
            tmp_path,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            max_steps=2,
            beta=0.3,
            max_grad_norm=0.0,
            **options,
        ),
        Dataset.from_list([{"prompt": "1" * 3 * i + "+1=", "demonstrations": [f"A{i}"]} for i in range(1, 5)]),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[recorder],
    )

    def answer(prompt_ids, completion_ids, logps, sampled):  # nothing is sampled, so that all runs have the same rows
        for i in sampled:
            rng = random.Random(f"{prompt_ids[i]}-{i}")
            completion_ids[i] += [rng.randrange(6, 90) for _ in range(rng.randrange(2, 15))]

    trainer.continue_completions = answer
    batches = tiny.record_micro_batches(trainer)
    trainer.train()

    model = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    if lora is not None:
        model = get_peft_model(model, lora)
    assert len(recorder.gradients) == 2
    for step, (weights, gradients) in enumerate(zip(recorder.weights, recorder.gradients, strict=True)):
        model.zero_grad()
        for batch in batches:
            for row in range(len(batch["prompt_ids"]) if batch["step"] == step else 0):
                ids = tiny.sequence(batch, row)

                def logps_with(state):
                    model.load_state_dict(state, strict=False)
                    return tiny.logps_and_entropies(model, *ids)[0]  # noqa: B023

                with torch.no_grad():
                    ref_logps = old_logps = logps_with(recorder.weights[0])
                logps = logps_with(weights)
                ratio = (logps - old_logps).exp()
                kl = (ref_logps - logps).exp() - (ref_logps - logps) - 1
                if batch["demonstration_mask"][row].any():
                    token_loss = -logps.exp() / (logps.exp() + 0.1) * batch["advantages"][row] + 0.3 * kl
                else:
                    token_loss = -ratio * batch["advantages"][row] + 0.3 * kl * ratio
                (token_loss.sum() / (8 * 16)).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize("k", [0, 1])
def test_on_its_own_cut_grpo_has_the_positions_of_trl(tmp_path, k):
    """Without demonstrations, and with one of each group on rows that have none."""
    tokenizer = tiny.make_tokenizer()
    make_gpt2(tokenizer).save_pretrained(tmp_path / "model")
    rows = [{"prompt": "1" * 3 * i + "+1=", "demonstrations": []} for i in range(1, 5)]
    own = {**tiny.PLAIN_GRPO, "num_demonstrations": k}
    weights = []
    for trainer_class, args_class, options in [(GRPOTrainer, GRPOConfig, {}), (LuffyTrainer, LuffyConfig, own)]:
        args = tiny.make_args(
            tmp_path,
            args_class,
            loss_type="dr_grpo",
            scale_rewards="none",
            pad_to_multiple_of=8,
            gradient_accumulation_steps=2,
            max_steps=2,
            **options,
        )
        trainer = trainer_class(
            str(tmp_path / "model"), tiny.share_of_digits, args, Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_position_ids_are_passed_where_positions_are_absolute():
    tokenizer = tiny.make_tokenizer()
    assert needs_position_ids(make_gpt2(tokenizer))
    assert needs_position_ids(
        get_peft_model(make_gpt2(tokenizer), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    )
    assert not needs_position_ids(tiny.make_model(tokenizer))  # rotary: the distances between tokens are all it sees
    bloom = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))
    assert not needs_position_ids(bloom)  # takes none
