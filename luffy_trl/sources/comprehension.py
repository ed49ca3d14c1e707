# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Unlike LUFFY, which draws one of the traces of a row, this shows the one from which the policy itself finds the gold
answer with the highest probability (AMPO).
"""

from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from ..groups import MixedBatch


# Between a trace and the answer whose probability is measured
PHRASE = "\n\nThe final answer is "


def rank_by_comprehension(
    rows: list[dict[str, Any]], batch: MixedBatch, is_open: list[bool], tokenizer: PreTrainedTokenizerBase
) -> list[list[int] | None]:
    """
    For each of the B rows the numbers of its traces, the best first, by the mean probability of the tokens of the gold
    answer after each; `None` where there is no choice, or the row is not open.
    """
    has_choice = [is_open[i] and len(row["demonstration_ids"]) > 1 for i, row in enumerate(rows)]
    prompt_ids = batch.policy.tokenize([row["prompt"] for row in batch.rows])
    questions = {}  # a group asks once for each of its traces, from its first row on this process
    for i, row in enumerate(rows):
        if has_choice[i]:
            gold = next((batch.rows[i][name] for name in ("answer", "solution") if batch.rows[i].get(name)), None)
            if gold is None:
                raise ValueError(
                    "`demonstration_choice='comprehension'` measures the probability of the gold answer, and the row "
                    f"with the prompt {batch.rows[i]['prompt']!r} has none in `answer` or `solution`. Give it one, or "
                    "set `remove_unused_columns=False` if the column was removed."
                )
            phrase, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PHRASE, str(gold)))
            for number, ids in enumerate(row["demonstration_ids"]):
                trace = ids[:-1] if ids[-1] in tokenizer.all_special_ids else ids
                questions[row["demonstration_row"], number] = (prompt_ids[i] + trace + phrase, answer)
    asked = dict(entry for part in gather_object([list(questions.items())]) for entry in part)
    asked = dict(sorted(asked.items()))
    probs = {}
    if asked:
        for key, (logps, _) in zip(asked, batch.policy.measure(list(asked.values())), strict=True):
            probs[key] = logps.exp().mean().item()
    rankings: list[list[int] | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        if has_choice[i]:
            own = [probs[row["demonstration_row"], number] for number in range(len(row["demonstration_ids"]))]
            rankings[i] = sorted(range(len(own)), key=[-prob for prob in own].__getitem__)
    return rankings
