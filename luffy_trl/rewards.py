# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import logging
import re
from collections import Counter
from typing import Any

from .grading import Failure, final_answer, find_boxes, shared_pool


logger = logging.getLogger(__name__)

_PERCENT = re.compile(r"\s*(?:\$|\\[)\]])\s*\\?%")


def math_verify_reward(
    completions: list[str] | list[list[dict[str, str]]],
    solution: list[str] | None = None,
    answer: list[str] | None = None,
    require_think: bool = False,
    **kwargs,
) -> list[float | None]:
    r"""
    Reward function that is 1.0 where the answer of a completion equals the gold answer, as judged by math-verify.

    The answer is what the completion puts into `\boxed{}` or `\fbox{}`; what it says elsewhere does not count then.
    Where several boxes differ, each has to equal the gold answer, or all together, as a list: `\boxed{4}` and
    `\boxed{5}` are right for the gold answer "4, 5", and wrong for "4" and for "5". So a completion gains nothing by
    naming several candidates, in whatever order and distance; TRL's `accuracy_reward` and the released code leave it
    to math-verify, which takes the last of boxes that stand far apart. Second thoughts belong into the reasoning:
    where boxes follow the last `</think>`, those before it do not count. A box that is not closed is wrong. Without a
    box, the answer is the last LaTeX environment, as math-verify finds it. In an equation, the last side counts. A
    final full stop or comma does not matter; a number in another unit or base than the gold answer's is wrong.
    Decimals count as they are written, where math-verify alone would round them to six places.

    Answers are graded in worker processes with a hard limit on time and memory, on every thread (see
    [`~luffy_trl.grading.WorkerPool`] and its environment variables); identical ones only once in a batch. One that
    runs into a limit or crashes its worker gets 0.0, and a warning says so. The function works in
    [`~trl.GRPOTrainer`] as well.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions, plain or conversational.
        solution (`list[str]`, *optional*):
            Gold solutions: a LaTeX expression, or a text with one.
        answer (`list[str]`, *optional*):
            Gold answers. Where a row has both, the answer is used.
        require_think (`bool`, *optional*, defaults to `False`):
            Whether a completion has to close its reasoning with `</think>`. If so, one that does not gets 0.0, and
            only the text between the first and the second `</think>` is judged (version 3 of the released code's
            reward). The opening tag is not asked for, as it may be in the prompt. Set it with
            `functools.partial(math_verify_reward, require_think=True)`.
        **kwargs:
            Other columns and what the trainer passes; not used.

    Returns:
        `list[float | None]`: 1.0 or 0.0 for each completion; `None`, which trainers skip, where no gold answer can be
        parsed, or not within the limits.

    Raises:
        ValueError: If neither `solution` nor `answer` is given, or an environment variable is no positive number.
        RuntimeError: If worker processes cannot be started.

    Example:
    ```python
    >>> from luffy_trl.rewards import math_verify_reward

    >>> math_verify_reward([r"So it is \boxed{\frac{1}{2}}.", r"\boxed{3}"], answer=["0.5", "4"])
    [1.0, 0.0]
    ```
    """
    if solution is None and answer is None:
        raise ValueError(
            "`math_verify_reward` needs the gold answers: give the dataset a column `answer` or `solution`."
        )
    golds = solution if answer is None else answer
    if solution is not None and answer is not None:
        golds = [sol if ans is None else ans for ans, sol in zip(answer, solution, strict=True)]

    calls = []
    completion: Any  # plain, or conversational
    for completion, gold in zip(completions, golds, strict=True):
        text = completion if isinstance(completion, str) else completion[-1].get("content") or ""
        calls.append(None if gold is None else (str(gold), _find_answers(text, require_think)))

    # the completions of a group differ in their reasoning more than in their answers
    distinct = [call for call in dict.fromkeys(calls) if call is not None]
    pool = shared_pool()
    results = dict(zip(distinct, pool.map(distinct), strict=True))
    if failures := {call: result.reason for call, result in results.items() if isinstance(result, Failure)}:
        suspects = list({gold for gold, _ in failures} - {gold for gold, _ in results.keys() - failures.keys()})
        checks = dict(zip(suspects, pool.map([(gold, ()) for gold in suspects]), strict=True))
        results |= {call: None if isinstance(checks.get(call[0]), Failure) else False for call in failures}
        reasons = ", ".join(f"{count} by {reason}" for reason, count in Counter(failures.values()).items())
        logger.warning(
            f"The grading of {len(failures)} of {len(distinct)} answers failed: {reasons}. They get 0.0, or no reward "
            "where the gold answer is to blame. The limits are the environment variables `LUFFY_REWARD_TIMEOUT` "
            f"(now {pool.timeout:g} seconds) and `LUFFY_REWARD_MEMORY` (now {pool.memory_limit:g} MiB)."
        )
    grades = [None if call is None else results[call] for call in calls]
    return [None if grade is None else float(grade) for grade in grades]


def explain_math_verify_reward(
    completion: str, gold: str | None, reward: float | None, require_think: bool = False
) -> str:
    """Why [`math_verify_reward`] gives a completion 0.0, or `None`."""
    if reward is None:
        return f"the gold answer {str(gold)[:80]!r} cannot be parsed"
    if require_think and final_answer(completion, require_think=True) is None:
        return "no `</think>`, which `require_think` asks for"
    answers = _find_answers(completion, require_think)
    if answers == ("",):
        return "its last box is not closed"
    if not answers[0].startswith(r"\boxed{"):
        return rf"no \boxed{{}}, and no other answer equal to {str(gold)[:80]!r}"
    return f"{', '.join(answers)[:80]} is not equal to {str(gold)[:80]!r}"


def _find_answers(text: str, require_think: bool) -> tuple[str, ...]:
    """What [`~luffy_trl.grading.grade`] reads: the boxes of a completion; its text, if there are none."""
    if require_think:
        answer = final_answer(text, require_think=True)
        return () if answer is None else _boxes(answer) or (answer,)
    return _boxes(text.rpartition("</think>")[2]) or _boxes(text) or (text,)


def _boxes(text: str) -> tuple[str, ...]:
    boxes: dict[str, None] = {}
    for content, end in find_boxes(text):
        if content and end is None:
            return ("",)  # cut in the middle of an answer
        if content:  # an empty box is one that the text talks about
            boxes[content + r"\%" * bool(end and _PERCENT.match(text, end + 1))] = None
    return tuple(rf"\boxed{{{content}}}" for content in boxes)
