# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import logging
import re
import threading

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify


_LATEX = (LatexExtractionConfig(boxed_match_priority=0),)  # LaTeX only, and what is boxed before anything else
_LATEX_OR_TEXT = (LatexExtractionConfig(), ExprExtractionConfig())
_ANCHOR = re.compile(r"\\boxed|(?<!\\)\$")
_PROSE = re.compile(r"####|(?:^|\s)[A-Za-z]{3,}(?=[\s.,:;]|$)")


def math_verify_reward(
    completions: list[str] | list[list[dict[str, str]]],
    solution: list[str] | None = None,
    answer: list[str] | None = None,
    require_think: bool = False,
    **kwargs,
) -> list[float | None]:
    r"""
    Reward function that is 1.0 where the answer of a completion equals the gold answer, as judged by math-verify.

    The answer is what the completion puts into `\boxed{}` or another LaTeX environment. The function has no state and
    works in [`~trl.GRPOTrainer`] as well.

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
        parsed.

    Raises:
        ValueError: If neither `solution` nor `answer` is given.

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

    # math-verify's time limits are alarms, which only the main thread can set; elsewhere it asks to turn them off.
    timeout = 5 if threading.current_thread() is threading.main_thread() else None
    if timeout is None:
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.ERROR)

    rewards = []
    for completion, gold in zip(completions, golds, strict=True):
        text = completion if isinstance(completion, str) else completion[-1].get("content") or ""
        parsed_gold = _parse_gold(gold, timeout)
        if not parsed_gold:
            rewards.append(None)
            continue
        if require_think:
            parts = text.split("</think>")
            if len(parts) == 1:
                rewards.append(0.0)
                continue
            text = parts[1]
        parsed_answer = parse(text, _LATEX, extraction_mode="first_match", parsing_timeout=timeout)
        rewards.append(float(verify(parsed_gold, parsed_answer, timeout_seconds=timeout)))
    return rewards


def _parse_gold(gold: str | int | float | None, timeout: int | None) -> list:
    if gold is None:
        return []
    gold = str(gold)
    if _ANCHOR.search(gold):
        return parse(gold, _LATEX_OR_TEXT, parsing_timeout=timeout)
    # math-verify reads a bare expression only inside an anchor, and all of a sentence there as an expression
    parsed = parse(rf"\boxed{{{gold}}}", _LATEX, parsing_timeout=timeout)
    if _PROSE.search(gold):
        return parse(gold, _LATEX_OR_TEXT, parsing_timeout=timeout) or parsed
    return parsed or parse(gold, _LATEX_OR_TEXT, parsing_timeout=timeout)
