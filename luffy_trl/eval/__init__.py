# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Evaluation on the paper's benchmarks; `python -m luffy_trl.eval --help` is its command line."""

from ..chat_templates import SYSTEM_PROMPT
from ..grading import extract_choice
from .benchmarks import BENCHMARKS, Benchmark, Question, grade, load_questions
from .report import bootstrap_means, pass_at_k, summarize, to_markdown
from .runner import EvaluationArguments, evaluate
from .templates import TEMPLATES, render_prompt


__all__ = [
    "BENCHMARKS",
    "SYSTEM_PROMPT",
    "TEMPLATES",
    "Benchmark",
    "EvaluationArguments",
    "Question",
    "bootstrap_means",
    "evaluate",
    "extract_choice",
    "grade",
    "load_questions",
    "pass_at_k",
    "render_prompt",
    "summarize",
    "to_markdown",
]
