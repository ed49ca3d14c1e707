# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Micro-batches by length: the best cut, found another way, and nothing lost on the way."""

import itertools
import random

import pytest
import torch

from luffy_trl.batching import plan_micro_batches, rebatch


def padded_tokens(plan, prompts, completions):
    return [len(rows) * (max(prompts[r] for r in rows) + max(completions[r] for r in rows)) for rows in plan]


def test_a_long_sequence_stands_alone():
    # 1 of 100 and 7 of 10 tokens: 2 x 4 rows take 4 x 100 + 4 x 10 = 440, and 1 + 7 rows 100 + 70
    plan = plan_micro_batches([0] * 8, [10, 10, 10, 100, 10, 10, 10, 10], 2, max_tokens=400)
    assert plan[0] == [3] and sorted(plan[1]) == [0, 1, 2, 4, 5, 6, 7]
    # sixteen short ones would take 160 together
    plan = plan_micro_batches([0] * 17, [100] + [10] * 16, 3, max_tokens=100)
    assert plan[0] == [0] and all(6 <= len(rows) <= 10 for rows in plan[1:])


@pytest.mark.parametrize("seed", range(30))
def test_no_other_cut_of_the_sorted_sequences_is_better(seed):
    rng = random.Random(seed)
    num_sequences, num_micro_batches = rng.choice([(6, 2), (6, 3), (8, 4), (9, 3), (5, 5)])
    prompts = [rng.randrange(1, 9) for _ in range(num_sequences)]
    completions = [rng.choice([rng.randrange(1, 20), rng.randrange(40, 60)]) for _ in range(num_sequences)]
    rows = -(-num_sequences // num_micro_batches)
    limit = rows * (max(prompts) + max(completions))
    plan = plan_micro_batches(prompts, completions, num_micro_batches, limit)
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


def make_micro_batches():
    """Two micro-batches of three sequences; each token, mask and value says where it belongs."""
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
        "importance_sampling_ratio": torch.arange(6.0).unsqueeze(1),
        "num_items_in_batch": torch.tensor(18),
        "ref_per_token_logps": None,
    }
    halves = [slice(0, 3), slice(3, 6)]
    return [{k: v if v is None or v.dim() == 0 else v[half] for k, v in batch.items()} for half in halves], (
        prompts,
        completions,
    )


def test_every_row_keeps_what_is_its_own():
    micro_batches, (prompts, completions) = make_micro_batches()
    result = rebatch(micro_batches)
    assert len(result) == 2
    seen = []
    for batch in result:
        rows = [int(advantage) for advantage in batch["advantages"]]
        seen += rows
        assert batch["prompt_ids"].size(1) == max(prompts[row] for row in rows)
        assert batch["completion_ids"].size(1) == max(completions[row] for row in rows)
        assert batch["importance_sampling_ratio"].tolist() == [[float(row)] for row in rows]
        assert batch["num_items_in_batch"] == 18 and batch["ref_per_token_logps"] is None
        for i, row in enumerate(rows):
            ids = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            assert ids.tolist() == [100 + 10 * row + j for j in range(prompts[row])]
            is_real = batch["completion_mask"][i].bool()
            expected = [10 * row + 1 + j for j in range(completions[row])]
            assert batch["completion_ids"][i][is_real].tolist() == expected
            torch.testing.assert_close(batch["old_per_token_logps"][i][is_real], torch.tensor(expected) / 7)
    assert sorted(seen) == list(range(6))
    assert [len(batch["advantages"]) for batch in result] == [1, 5]  # the longest by itself


def test_widths_are_multiples():
    micro_batches, _ = make_micro_batches()
    for batch, (prompt, completion) in zip(
        rebatch(micro_batches, pad_to_multiple_of=4), [(4, 9), (4, 4)], strict=True
    ):
        assert batch["prompt_ids"].size(1) == prompt  # of at most 5
        assert batch["completion_ids"].size(1) == completion  # of at most 9
