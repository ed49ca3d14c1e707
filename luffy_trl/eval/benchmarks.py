# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Benchmarks: where their questions are, and how a row becomes a question."""

import logging
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..chat_templates import SYSTEM_PROMPT
from ..data import load_data
from ..grading import extract_choice, final_answer
from ..rewards import math_verify_reward


logger = logging.getLogger(__name__)

LETTERS = string.ascii_uppercase
_LABEL = re.compile(r"^([A-Z]|[1-9])\) ", re.MULTILINE)
_ASK_FOR_LETTER = "Answer with the letter of the right option, in \\boxed{}."


@dataclass(frozen=True)
class Question:
    """A question of a benchmark."""

    benchmark: str
    index: int
    text: str  # without the options
    gold: str  # of multiple choice, the letter of the right option
    system_prompt: str | None = None
    options: tuple[str, ...] = ()  # lettered A, B, C and so on in this order
    instruction: str = ""  # below the options
    is_chat: bool = True  # otherwise it is the prompt as it stands

    @property
    def content(self) -> str:
        """The message of the user."""
        if not self.options:
            return self.text
        lines = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return "\n\n".join(part for part in (self.text, lines, self.instruction) if part)

    def with_shuffled_options(self, seed: int) -> "Question":
        """The question with its options in an order that depends on seed, benchmark and index alone."""
        order = list(range(len(self.options)))
        random.Random(f"{seed}/{self.benchmark}/{self.index}").shuffle(order)
        options = tuple(self.options[i] for i in order)
        return replace(self, options=options, gold=LETTERS[order.index(LETTERS.index(self.gold))])


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper."""

    title: str  # in tables
    data_source: str  # in the column of this name of the authors' files
    dataset: str
    split: str
    # From a row, the text, the gold answer (of multiple choice, the index of the right option), and the options
    read: Callable[[dict[str, Any]], tuple[str, Any, tuple[str, ...]]]
    config: str | None = None
    num_samples: int = 1  # the score is the mean over them: 32 for small benchmarks, as in the paper
    multiple_choice: bool = False  # these are the ones out of distribution in the paper


def _columns(text: str, answer: str) -> Callable[[dict[str, Any]], tuple[str, Any, tuple[str, ...]]]:
    def read(row):
        gold = row[answer]
        if isinstance(gold, list):  # OlympiadBench: one expression, in a list
            gold = ", ".join(gold)
        return row[text], gold, ()

    return read


def _read_arc(row):
    labels = row["choices"]["label"]
    return row["question"], labels.index(row["answerKey"]), tuple(row["choices"]["text"])


def _read_gpqa(row):
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    return row["Question"].strip(), 0, tuple(row[name].strip() for name in names)


def _read_mmlu_pro(row):
    return row["question"], row["answer_index"], tuple(row["options"])


BENCHMARKS = {
    "aime24": Benchmark(
        "AIME24", "aime", "HuggingFaceH4/aime_2024", "train", _columns("problem", "answer"), num_samples=32
    ),
    "aime25": Benchmark("AIME25", "aime25", "math-ai/aime25", "test", _columns("problem", "answer"), num_samples=32),
    "amc": Benchmark(
        "AMC", "amc", "AI-MO/aimo-validation-amc", "train", _columns("problem", "answer"), num_samples=32
    ),
    "math500": Benchmark("MATH-500", "math", "HuggingFaceH4/MATH-500", "test", _columns("problem", "answer")),
    "minerva": Benchmark("Minerva", "minerva", "math-ai/minervamath", "test", _columns("question", "answer")),
    # this copy has the 675 questions of the authors' file; others have 674
    "olympiadbench": Benchmark(
        "OlympiadBench",
        "olympiad_bench",
        "zwhe99/simplerl-OlympiadBench",
        "test",
        _columns("question", "final_answer"),
    ),
    "arc_c": Benchmark(
        "ARC-c", "arc_c", "allenai/ai2_arc", "test", _read_arc, config="ARC-Challenge", multiple_choice=True
    ),
    # gated: accept its terms on the Hub, and log in
    "gpqa_diamond": Benchmark(
        "GPQA-diamond", "gpqa", "Idavidrein/gpqa", "train", _read_gpqa, config="gpqa_diamond", multiple_choice=True
    ),
    "mmlu_pro": Benchmark("MMLU-Pro", "mmlu_pro", "TIGER-Lab/MMLU-Pro", "test", _read_mmlu_pro, multiple_choice=True),
}


def is_multiple_choice(benchmark: str) -> bool:
    """Whether a benchmark, which may be one of your own, is graded by letter."""
    return benchmark in BENCHMARKS and BENCHMARKS[benchmark].multiple_choice


def grade(question: Question, texts: list[str], opened: bool = False, require_think: bool = False) -> list[bool]:
    """
    Whether each completion of a question is right. `opened` prompts end with `<think>`. Where math-verify cannot read
    the gold answer, none is right, with a warning.
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


def load_questions(
    benchmarks: list[str] | None = None,
    data_files: list[str] | None = None,
    datasets_dir: str | None = None,
    max_questions: int | None = None,
    shuffle_options: bool = True,
    seed: int = 0,
) -> list[Question]:
    """
    Loads questions from files, and from the Hub, or copies of it in `datasets_dir`, what the files do not have. Files
    have the columns of training data, or the authors' `reward_model`; `data_source`, or the file's name, is the
    benchmark of a row. A repeated row counts once. A `data_source` outside of `BENCHMARKS` is graded as mathematics.
    """
    if max_questions is not None and max_questions < 1:
        raise ValueError(f"`max_questions` must be positive, got {max_questions}.")
    if datasets_dir is not None and not Path(datasets_dir).is_dir():
        raise ValueError(f"`datasets_dir`: there is no folder {datasets_dir!r}.")
    from_files = _load_files(data_files or [])
    known = {*BENCHMARKS, *from_files}
    names = benchmarks
    if not names:  # in the order of `BENCHMARKS`, and your own at the end
        available = from_files if data_files else BENCHMARKS
        names = [name for name in (*BENCHMARKS, *available) if name in available]
    for name in names:
        if name not in known:
            raise ValueError(f"`benchmarks`: {name!r} is not known. Choose from {', '.join(sorted(known))}.")
    questions = []
    for name in dict.fromkeys(names):
        found = from_files[name] if name in from_files else _load_from_hub(name, datasets_dir)
        for question in found[:max_questions]:
            shuffled = shuffle_options and question.options
            questions.append(question.with_shuffled_options(seed) if shuffled else question)
    return questions


def _load_from_hub(name: str, datasets_dir: str | None) -> list[Question]:
    benchmark = BENCHMARKS[name]
    dataset = benchmark.dataset
    if datasets_dir is not None:
        dataset = str(Path(datasets_dir) / dataset)
        if not Path(dataset).is_dir():
            raise ValueError(
                f"`datasets_dir` has no folder {dataset!r} for {name}. Get it with `hf download {benchmark.dataset} "
                f"--repo-type dataset --local-dir {dataset}`."
            )
    questions = []
    for index, row in enumerate(load_data(dataset, benchmark.split, benchmark.config)):
        where = f"Row {index} of {dataset}"
        try:
            text, gold, options = benchmark.read(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} cannot be read as {name}: {type(error).__name__} {error}.") from error
        if options:
            if not (isinstance(gold, int) and 0 <= gold < len(options) <= len(LETTERS)):
                raise ValueError(f"{where} has {len(options)} options, and the answer {gold!r} is none of them.")
            gold = LETTERS[gold]
        instruction = _ASK_FOR_LETTER if options else ""
        questions.append(_question(where, name, index, text, gold, SYSTEM_PROMPT, options, instruction))
    return questions


def _load_files(files: list[str]) -> dict[str, list[Question]]:
    names = {benchmark.data_source: name for name, benchmark in BENCHMARKS.items()}
    questions: dict[str, list[Question]] = {}
    named: dict[str, str] = {}
    seen = set()
    num_rows = 0
    for file in files:
        dataset = load_data(file)
        columns = set(dataset.column_names)
        if "prompt" not in columns or not columns & {"answer", "solution", "reward_model"}:
            raise ValueError(
                f"`data_files`: {file} has the columns {', '.join(dataset.column_names)}. It needs those of training "
                "data, `prompt` and `answer`, or the authors' `data_source`, `prompt` and `reward_model` (with "
                "`ground_truth`)."
            )
        if "data_source" not in columns:
            _check_file_name(file, named)
        for number, row in enumerate(dataset):
            where = f"Row {number} of {file}"
            source = row.get("data_source", _stem(file))
            if not isinstance(source, str) or not source.strip():
                raise ValueError(f"{where}: `data_source` must be the name of a benchmark, got {source!r}.")
            system_prompt, text, is_chat = _read_prompt(where, row["prompt"])
            gold = _read_gold(where, row)
            num_rows += 1
            # The authors' files repeat a question 32 times instead of sampling it 32 times.
            info = row.get("extra_info")
            key = (source, info.get("index") if isinstance(info, dict) else None, system_prompt, text, str(gold))
            if key in seen:
                continue
            seen.add(key)
            name = names.get(source, source)
            options: tuple[str, ...] = ()
            if is_multiple_choice(name):
                text, options, gold = _split_options(where, text, gold)
            found = questions.setdefault(name, [])
            found.append(_question(where, name, len(found), text, gold, system_prompt, options, "", is_chat))
    if len(seen) < num_rows:
        logger.warning(f"{num_rows - len(seen)} of {num_rows} rows are repeats and count once; see `num_samples`.")
    return questions


def _stem(file: str) -> str:
    path = Path(file)
    return path.name if path.is_dir() else path.stem


def _check_file_name(file: str, named: dict[str, str]):
    """A file's name says which benchmark it is, where no column does."""
    name = _stem(file)
    if name in BENCHMARKS:
        raise ValueError(
            f"`data_files`: {file} is called like a benchmark of the paper, and has no column `data_source` that says "
            "whether it is. Add the column, or rename the file."
        )
    if named.setdefault(name, file) != file:
        raise ValueError(
            f"`data_files`: {named[name]} and {file} have the same name, and no column `data_source` that says which "
            "benchmark is which. Rename one, or add the column."
        )


def _read_prompt(where: str, prompt: Any) -> tuple[str | None, str, bool]:
    """System message and question, and whether they are chat messages."""
    if isinstance(prompt, str):
        return None, prompt, False
    messages = prompt if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt) else []
    if [message.get("role") for message in messages] not in (["user"], ["system", "user"]):
        raise ValueError(
            f"{where}: `prompt` must be a user message, perhaps after a system message, or a text. Got "
            f"{str(prompt)[:100]!r}."
        )
    contents = [message.get("content") for message in messages]
    if not all(isinstance(content, str) for content in contents):
        raise ValueError(f"{where}: `prompt` has a message whose `content` is no text: {str(prompt)[:100]!r}.")
    return contents[0] if len(contents) == 2 else None, contents[-1], True


def _read_gold(where: str, row: dict[str, Any]) -> Any:
    if "reward_model" in row:
        field, value = "reward_model", row["reward_model"]
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{where}: `reward_model` must hold the gold answer as `ground_truth`, got {value!r}.")
        gold = (value or {}).get("ground_truth")
    else:
        field = "answer" if row.get("answer") is not None else "solution"
        gold = row.get(field)
    if isinstance(gold, bool) or not isinstance(gold, str | int | float | None):
        raise ValueError(f"{where}: the gold answer in `{field}` must be one text or number, got {str(gold)[:100]}.")
    return gold


def _question(where, benchmark, index, text, gold, *args) -> Question:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the question is empty.")
    if gold is None or not str(gold).strip():
        raise ValueError(f"{where}: the gold answer is empty.")
    return Question(benchmark, index, text, str(gold), *args)


def _split_options(where: str, content: str, gold: str) -> tuple[str, tuple[str, ...], str]:
    """Text, options and the letter of the right one, from a text that ends in lines `A) ...` or `1) ...`."""
    marks = list(_LABEL.finditer(content))
    # The list begins at the last A; a question may have a list of its own before, numbered 1, 2, 3.
    for first in ("A", "1"):
        starts = [i for i, mark in enumerate(marks) if mark[1] == first]
        if starts:
            marks = marks[starts[-1] :]
            break
    labels = [mark[1] for mark in marks]
    letters = LETTERS if labels[:1] == ["A"] else string.digits[1:]
    if len(labels) < 2 or labels != list(letters[: len(labels)]):
        raise ValueError(f"{where}: `prompt` must end in options, in lines `A) ...`, `B) ...` and so on.")
    if gold not in labels:
        raise ValueError(f"{where}: `ground_truth` is {gold!r}, and the options are {', '.join(labels)}.")
    ends = [mark.start() for mark in marks[1:]] + [len(content)]
    options = tuple(content[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True))
    return content[: marks[0].start()].rstrip(), options, LETTERS[labels.index(gold)]
