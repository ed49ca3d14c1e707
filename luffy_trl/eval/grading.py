# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Grading: mathematics by math-verify, multiple choice by letter."""

import logging
import re

from ..grading import LOOKS
from ..rewards import math_verify_reward
from .benchmarks import Question, is_multiple_choice


logger = logging.getLogger(__name__)

_WRAPPER = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mathsf|operatorname)\s*\{([^{}]*)\}")
_MARKUP = re.compile(r"[*_`$]|\\[(),;! ]")
_OPTION = r"(?:(?:option|choice|letter)\s*:?\s*)?"
_LETTER = re.compile(_OPTION + r"[(\[{]*(?-i:([A-Z]))(?![A-Za-z'’])", re.IGNORECASE)
_STATEMENT = re.compile(
    r"\b(?:answer|(?:correct|right|best)\s+(?:option|choice|letter))\s*"
    r"(?::|(?:is|would\s+be|must\s+be|should\s+be)\b)\s*(?:(?:therefore|thus|hence)\b,?)?\s*:?\s*(?:the\s+)?",
    re.IGNORECASE,
)
# A further letter: `or B`, `/ (B)`, `, B`. The words `A` and `I` are none.
_ANOTHER = re.compile(
    r"[)\]}.]*\s*(?:(?:,|/|;|&|\bor\b|\band\b)\s*)+"
    + _OPTION
    + r"[(\[{]*(?-i:([B-HJ-Z]|[AI](?!\s+[a-z])))(?![A-Za-z'’])",
    re.IGNORECASE,
)


def extract_choice(text: str) -> str | None:
    r"""
    The letter that an answer to a multiple choice question chooses.

    What is boxed goes before statements such as `the answer is (C)` or `ANSWER: C`, and they before a last line that
    is a letter and nothing else.

    Args:
        text (`str`):
            The answer, without the reasoning before it.

    Returns:
        `str` or `None`: The letter; `None` if there is none, or if there are several.

    Example:
    ```python
    >>> extract_choice(r"So it is \boxed{\text{C}}.")
    'C'
    >>> extract_choice("The answer is (A) or (B).")  # None
    ```
    """
    letters = set().union(*(_letters(_plain(content), alone=True) for content in _boxed(text)))
    if not letters:
        plain = _plain(text)
        letters = set().union(*(_letters(plain[match.end() :]) for match in _STATEMENT.finditer(plain)))
    if not letters:
        last_line = plain.strip().split("\n")[-1]
        letters = _letters(last_line.strip(), alone=True) if re.fullmatch(r"\W*\w\W*", last_line) else set()
    return letters.pop() if len(letters) == 1 else None


def _plain(text: str) -> str:
    text = LOOKS.sub("", text)
    while (unwrapped := _WRAPPER.sub(r"\1", text)) != text:
        text = unwrapped
    return _MARKUP.sub("", text).strip()


def _boxed(text: str) -> list[str]:
    r"""The contents of each `\boxed{}` and `\fbox{}`, which may have braces."""
    contents = []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        contents.append(text[match.end() : end - (depth == 0)])
    return contents


def _letters(text: str, alone: bool = False) -> set[str]:
    """The letters that a text begins with: `C) 4 eV` has one, `A or B` two. `alone`: an `E = 4` has none."""
    match = _LETTER.match(text)
    if match is None:
        return set()
    letters, rest = {match[1]}, text[match.end() :]
    while match := _ANOTHER.match(rest):
        letters.add(match[1])
        rest = rest[match.end() :]
    return set() if alone and not re.match(r"\s*([)\]}.:,]|$)", rest) else letters


def final_answer(text: str, opened: bool = False, require_think: bool = False) -> str | None:
    """
    What is graded of a completion: the text between the first and the second `</think>`, or all of it.

    Args:
        text (`str`):
            The completion.
        opened (`bool`, *optional*, defaults to `False`):
            Whether the prompt ends with `<think>`. If so, the completion is reasoning until it says `</think>`.
        require_think (`bool`, *optional*, defaults to `False`):
            Whether there must be a `</think>`.

    Returns:
        `str` or `None`: The answer; `None` if the reasoning has no end.
    """
    parts = text.split("</think>")
    if len(parts) > 1:
        return parts[1]
    unfinished = opened or require_think or text.lstrip().startswith("<think>")
    return None if unfinished else text


def grade(question: Question, texts: list[str], opened: bool = False, require_think: bool = False) -> list[bool]:
    """
    Grades completions of a question.

    Args:
        question ([`Question`]):
            The question.
        texts (`list[str]`):
            Completions of it.
        opened (`bool`, *optional*, defaults to `False`):
            Whether the prompt ends with `<think>`.
        require_think (`bool`, *optional*, defaults to `False`):
            Whether an answer counts only behind `</think>`.

    Returns:
        `list[bool]`: Whether each is right. Where math-verify cannot read the gold answer, none is, with a warning.
    """
    answers = [final_answer(text, opened, require_think) for text in texts]
    if is_multiple_choice(question.benchmark):
        return [answer is not None and extract_choice(answer) == question.gold for answer in answers]
    rewards = math_verify_reward([answer or "" for answer in answers], answer=[question.gold] * len(answers))
    if None in rewards:
        logger.warning(
            f"Question {question.index} of {question.benchmark} counts as wrong: its gold answer {question.gold!r} "
            "cannot be parsed."
        )
    return [reward == 1.0 for reward in rewards]
