# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.
"""
The quickstart's task: chains of operations on a two-digit register, solved by rewriting.

A problem is a register of two digits followed by operations of one digit each, such as `48+3+4=`. One operation takes
the register `(t, u)` to `(u, (t op d) mod 10)`, and a trace applies the operations one at a time, each time writing
out what is left of the problem:

```text
48+3+4=<think>87+4;72</think>\boxed{72}
```

Every answer is two digits long, so a guess is right about once in a hundred times. No operation occurs twice in a
problem, so that there is one place to copy from. A problem is hard if it has more operations than the warm-up of
`prepare.py` carries through.
"""

import operator
import random

from datasets import Dataset, DatasetDict
from transformers import Qwen2Tokenizer


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
TRACE_OPERATORS = "+-"
OPERATIONS = [f"{symbol}{operand}" for symbol in OPERATORS for operand in range(1, 10)]
EASY_LENGTHS = (1, 2)
HARD_LENGTHS = (4,)
LONGER_LENGTHS = (5, 6)

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
MARKUP_TOKENS = ("<think>", "</think>", r"\boxed{")


def apply_operation(problem: str) -> str:
    """
    Rewrites a problem by applying its first operation.

    Args:
        problem (`str`): A register and at least one operation, without the `=`, such as `"48+3+4"`.

    Returns:
        `str`: What is left of the problem, such as `"87+4"`.
    """
    tens, units, symbol, operand = problem[:4]
    return f"{units}{OPERATORS[symbol](int(tens), int(operand)) % 10}{problem[4:]}"


def rewrite(problem: str) -> list[str]:
    """
    Applies the operations of a problem one after the other.

    Args:
        problem (`str`): A register and its operations, without the `=`, such as `"48+3+4"`.

    Returns:
        `list[str]`: One line per operation, the last one being the answer, such as `["87+4", "72"]`.
    """
    lines = []
    while len(problem) > 2:
        problem = apply_operation(problem)
        lines.append(problem)
    return lines


def format_prompt(problem: str) -> str:
    """Returns the prompt for a problem."""
    return f"{problem}="


def format_completion(lines: list[str], answer: str) -> str:
    r"""Returns the completion that thinks `lines` and then boxes `answer`."""
    return rf"<think>{';'.join(lines)}</think>\boxed{{{answer}}}"


def is_correct(completion: str, answer: str) -> bool:
    """Returns whether a completion ends its thought and then boxes the answer, and nothing else."""
    return completion.partition("</think>")[2] == rf"\boxed{{{answer}}}"


def sample_problem(rng: random.Random, num_operations: int, operators: str) -> str:
    """
    Draws a problem.

    Args:
        rng (`random.Random`): Source of randomness.
        num_operations (`int`): Number of operations.
        operators (`str`): Symbols to draw the operations from.

    Returns:
        `str`: A register and its operations, without the `=`.
    """
    operations = [f"{symbol}{operand}" for symbol in operators for operand in range(1, 10)]
    return f"{rng.randrange(100):02d}" + "".join(rng.sample(operations, num_operations))


def sample_problems(
    rng: random.Random,
    num_problems: int,
    lengths: tuple[int, ...],
    operators: str,
    *,
    required_operator: str = "",
    exclude: set[str] | None = None,
) -> list[str]:
    """
    Draws distinct problems.

    Problems whose answer is also an intermediate value are left out: stopping early must never be rewarded.

    Args:
        rng (`random.Random`): Source of randomness.
        num_problems (`int`): Number of problems to draw.
        lengths (`tuple[int, ...]`): Numbers of operations to draw from.
        operators (`str`): Symbols to draw the operations from.
        required_operator (`str`, *optional*, defaults to `""`): Symbol that every problem must hold.
        exclude (`set[str]`, *optional*): Problems that must not be drawn.

    Returns:
        `list[str]`: The problems, without the `=`.
    """
    problems: dict[str, None] = {}
    while len(problems) < num_problems:
        problem = sample_problem(rng, rng.choice(lengths), operators)
        *intermediates, answer = rewrite(problem)
        stops_early = any(line.startswith(answer) for line in (problem, *intermediates))
        if required_operator in problem and not stops_early and problem not in (exclude or ()):
            problems[problem] = None
    return list(problems)


def make_splits(seed: int, num_problems: int = 256) -> DatasetDict:
    """
    Builds the splits of the task. No problem is in two of them.

    - `train`: hard problems, each with one demonstration
    - `held_out`: further problems of the same distribution
    - `longer`: more operations than any demonstration has
    - `unseen_operator`: as long as `train`, with at least one operation that no demonstration shows
    - `easy`: problems that the warm-up teaches

    Args:
        seed (`int`): Seed of the draw; the same seed gives the same splits.
        num_problems (`int`, *optional*, defaults to `256`): Number of problems per split.

    Returns:
        [`~datasets.DatasetDict`]: Splits with the columns `prompt` (`str`) and `answer` (`str`); `train` also has
        `demonstrations` (`list[str]`).
    """
    rng = random.Random(seed)
    symbols = "".join(OPERATORS)
    (unseen_operator,) = set(symbols) - set(TRACE_OPERATORS)
    train = sample_problems(rng, num_problems, HARD_LENGTHS, TRACE_OPERATORS)
    problems = {
        "train": train,
        "held_out": sample_problems(rng, num_problems, HARD_LENGTHS, TRACE_OPERATORS, exclude=set(train)),
        "longer": sample_problems(rng, num_problems, LONGER_LENGTHS, TRACE_OPERATORS),
        "unseen_operator": sample_problems(
            rng, num_problems, HARD_LENGTHS, symbols, required_operator=unseen_operator
        ),
        "easy": sample_problems(rng, num_problems, EASY_LENGTHS, symbols),
    }
    splits = {
        name: {"prompt": [format_prompt(p) for p in split], "answer": [rewrite(p)[-1] for p in split]}
        for name, split in problems.items()
    }
    traces = [rewrite(problem) for problem in train]
    splits["train"]["demonstrations"] = [[format_completion(lines, lines[-1])] for lines in traces]
    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in splits.items()})


def build_tokenizer() -> Qwen2Tokenizer:
    """
    Builds the task's tokenizer: Qwen2's, with one token per digit, operation and piece of markup.

    Operations and markup are added tokens, but not special ones: decoding with `skip_special_tokens=True` keeps them.

    Returns:
        [`~transformers.Qwen2Tokenizer`]: The tokenizer.
    """
    vocab = {token: index for index, token in enumerate([PAD_TOKEN, EOS_TOKEN, *"0123456789=;}"])}
    tokenizer = Qwen2Tokenizer(
        vocab, merges=[], unk_token=None, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, padding_side="left"
    )
    tokenizer.add_tokens([*MARKUP_TOKENS, *OPERATIONS])
    return tokenizer
