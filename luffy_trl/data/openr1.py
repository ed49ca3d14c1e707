# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Turn public sets of reasoning traces into training data: convert, filter, and report what was dropped and why.

    python -m luffy_trl.data.openr1 --dataset_name Elliott/Openr1-Math-46k-8192 --output_dir data/openr1_math_46k \
        --model_name_or_path models/qwen2.5_math_7b --evaluation_files valid.parquet

It reads the authors' dataset (one trace a row), `open-r1/OpenR1-Math-220k` (several), and what has our columns
already. Rows are streamed, so that memory stays flat. Answers are judged by `math_verify_reward`: in parallel, each
within a time limit; the environment variables that it reads (`LUFFY_REWARD_WORKERS`, ...) count here as well.
"""

import hashlib
import itertools
import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value, load_dataset_builder
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..arguments import Parser
from ..chat_templates import SYSTEM_PROMPT
from ..demonstrations import (
    DemonstrationTokenizer,
    check_prompt,
    find_eos_token_ids,
    load_generation_config,
    tokenize_prompt,
)
from ..errors import in_one_line, loading_model
from ..options import described
from ..processes import holding
from ..redaction import without_credentials
from ..rewards import math_verify_reward
from . import BUILDERS, explained, load_data


SHARD_BYTES = 300_000_000  # of text; parquet compresses it to about a third

_CHAT = List({"role": Value("string"), "content": Value("string")})
_ROWS_PER_BATCH = 100
_TRACES_PER_CALL = 8  # of the tokenizer, which takes about a hundred bytes for each token


@described
@dataclass
class OpenR1Arguments:
    """
    Arguments of the command.

    Args:
        dataset_name (`str`):
            Dataset on the Hub, local folder or file.
        output_dir (`str`):
            Folder to write: parquet files, and the report as `report.json` and `report.md`.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to read.
        dataset_config (`str`, *optional*):
            Configuration of the dataset, where it has several.
        system_prompt (`str`, *optional*):
            System message of every prompt; an empty one takes it out. By default rows keep theirs, and OpenR1-Math's,
            which have none, get the paper's.
        model_name_or_path (`str`, *optional*):
            The policy that will be trained. Its tokenizer and its chat template measure lengths; without it, no row is
            dropped for its length.
        max_prompt_length (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of a rendered prompt.
        max_completion_length (`int`, *optional*, defaults to `8192`):
            Maximum number of tokens of a trace, the one that ends it included.
        verify (`str`, *optional*, defaults to `"math_verify"`):
            How a trace's answer is judged: `"math_verify"` (against `answer`), `"flags"` (by the dataset's own
            `correctness_math_verify`) or `"none"`.
        require_think (`bool`, *optional*, defaults to `True`):
            Whether math-verify judges what stands behind `</think>`, as the recipes' reward does.
        evaluation_files (`list[str]`, *optional*):
            Benchmarks, to drop rows with their questions: files with `prompt` (chat messages or text), `problem` or
            `question`.
        ngram_size (`int`, *optional*, defaults to `13`):
            A row is dropped if its problem shares this many consecutive words with a benchmark's question. A question
            of fewer words is compared as a whole.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to replace what an earlier run has written to `output_dir`.
    """

    dataset_name: str
    output_dir: str
    dataset_split: str = "train"
    dataset_config: str | None = None
    system_prompt: str | None = None
    model_name_or_path: str | None = None
    max_prompt_length: int = 1024
    max_completion_length: int = 8192
    verify: Literal["math_verify", "flags", "none"] = "math_verify"
    require_think: bool = True
    evaluation_files: list[str] | None = None
    ngram_size: int = 13
    overwrite_output_dir: bool = False

    def __post_init__(self):
        self.check_output_dir()
        for name in ("max_prompt_length", "max_completion_length", "ngram_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def check_output_dir(self):
        """Raises a `ValueError` if `output_dir` holds what is not to be replaced."""
        if Path(self.output_dir).exists() and not self.overwrite_output_dir:
            raise ValueError(
                f"`output_dir` {self.output_dir!r} is there already. Name another, or set `overwrite_output_dir`."
            )
        if Path(self.output_dir).exists() and not (Path(self.output_dir) / "report.json").is_file():
            raise ValueError(f"`output_dir` {self.output_dir!r} holds what this command did not write. Name another.")


# ------------------------------------------------------------------------------------------------ rows, as they come


def stream(name: str, split: str = "train", config: str | None = None) -> Iterator[dict[str, Any]]:
    """
    Reads the rows of a dataset, as [`~luffy_trl.data.load_data`] does, in memory that does not grow with it:
    `datasets` reads parquet ahead of a slow consumer, without bound, and here it is read batch by batch.
    """
    path = Path(name)
    is_one_file = path.suffix.lower() in BUILDERS or path.is_file()
    if path.suffix.lower() == ".parquet" and path.is_file():
        files = [name]
    elif is_one_file or (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        files = None
    else:
        with explained(name):
            builder = load_dataset_builder(name, config)
        files = builder.config.data_files if isinstance(builder.config, ParquetConfig) else None
        if files is not None and split not in files:
            raise ValueError(f"{name!r} has the splits {', '.join(files)}, not {split!r}. Set `dataset_split`.")
        files = files and files[split]
    rows = load_data(name, split, config, streaming=True) if files is None else ()
    with explained(name):
        yield from rows
        for file in files or ():
            with fsspec.open(file) as opened:
                # `pre_buffer` keeps the compressed bytes of all that it has read
                for batch in pq.ParquetFile(opened, pre_buffer=False).iter_batches(batch_size=_ROWS_PER_BATCH):
                    yield from batch.to_pylist()


def to_row(raw: dict[str, Any], number: int, system_prompt: str | None = None) -> dict[str, Any]:
    """
    Brings a row of a supported dataset into our columns: `prompt`, `demonstrations`, `answer`, and in `complete` and
    `correct` what the dataset says of each trace, or `None`. An empty `system_prompt` takes that of the row out;
    `number` is for error messages.
    """
    complete = correct = None
    if "target" in raw:
        prompt = raw["prompt"]
        traces = [message["content"] for message in raw["target"] or []]
        answer = (raw.get("reward_model") or {}).get("ground_truth")
    elif "generations" in raw:
        prompt = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": raw["problem"]}]
        traces = raw["generations"] or []
        answer = raw.get("answer")
        complete, correct = raw.get("is_reasoning_complete"), raw.get("correctness_math_verify")
    elif "prompt" in raw or "problem" in raw:
        prompt = raw["prompt"] if "prompt" in raw else [{"role": "user", "content": raw["problem"]}]
        traces = raw.get("demonstrations") or ([raw["completion"]] if raw.get("completion") else [])
        traces = [trace if isinstance(trace, str) else trace[-1]["content"] for trace in traces]
        answer = raw.get("answer", raw.get("solution"))
        if answer is None and raw.get("reward_model"):
            answer = raw["reward_model"].get("ground_truth")
    else:
        raise ValueError(
            f"row {number}: the columns {', '.join(raw)} are of no dataset that is known here. Give it `prompt` (or "
            "`problem`), `answer` and `demonstrations`."
        )
    if not isinstance(prompt, str):
        if prompt:
            check_prompt(prompt, number)
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt or []]
    if not prompt or not question_of(prompt):
        raise ValueError(f"row {number}: `prompt` must hold a question, got {prompt!r}. Fix the row, or drop it.")
    if system_prompt is not None:
        if isinstance(prompt, str):
            raise ValueError(f"row {number}: `system_prompt` needs chat messages, and `prompt` is a string.")
        prompt = [message for message in prompt if message["role"] != "system"]
        if system_prompt:
            prompt = [{"role": "system", "content": system_prompt}, *prompt]
    for name, flags in (("is_reasoning_complete", complete), ("correctness_math_verify", correct)):
        if flags is not None and len(flags) != len(traces):
            raise ValueError(
                f"row {number}: `{name}` has {len(flags)} values for {len(traces)} traces. Fix the row, or drop it."
            )
    return {
        "prompt": prompt,
        "demonstrations": traces,
        "answer": None if answer is None else str(answer),
        "complete": complete or [None] * len(traces),
        "correct": correct or [None] * len(traces),
    }


def question_of(prompt: str | list[dict[str, str]]) -> str:
    """What a prompt asks: the text of its last message by the user, empty if there is none."""
    if isinstance(prompt, str):
        return prompt.strip()
    return next((message["content"] or "" for message in reversed(prompt) if message["role"] == "user"), "").strip()


# --------------------------------------------------------------------------------------------------- contamination


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _key(text: str) -> str:
    """A problem without its white space and case; not without its symbols, which may be all that two differ in."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


class Contamination:
    """
    Finds benchmark questions in training problems, by n-grams of words: runs of letters and digits, whatever stands
    between them. A question of fewer words is compared as one text, white space and case aside.
    """

    def __init__(self, questions: Iterable[str], ngram_size: int = 13):
        self.ngram_size = ngram_size
        self.num_questions = 0
        self._ngrams: dict[tuple[str, ...], str] = {}
        self._short: dict[str, str] = {}
        for question in questions:
            self.num_questions += 1
            words = _words(question)
            self._short.setdefault(_key(question), question)
            for start in range(len(words) - ngram_size + 1):
                self._ngrams.setdefault(tuple(words[start : start + ngram_size]), question)

    def find(self, problem: str) -> str | None:
        """The first benchmark question that shares an n-gram with a problem, or is equal to it."""
        found = self._short.get(_key(problem))
        words = _words(problem)
        for start in range(len(words) - self.ngram_size + 1):
            if found:
                break
            found = self._ngrams.get(tuple(words[start : start + self.ngram_size]))
        return found


def _evaluation_questions(files: Iterable[str]) -> Iterator[str]:
    """The question of each row of `evaluation_files`, which need no answers; a row without one is a `ValueError`."""
    for name in files:
        for number, row in enumerate(stream(name)):
            question = question_of(row.get("prompt") or row.get("problem") or row.get("question") or "")
            if not question:
                raise ValueError(
                    f"`evaluation_files`: row {number} of {name!r} has no question in `prompt`, `problem` or "
                    "`question`. Fix the file, or leave it out."
                )
            yield question


# ------------------------------------------------------------------------------------------------ traces, one by one


class Checker:
    """Says which rows and which of their traces can be trained on."""

    def __init__(self, args: OpenR1Arguments):
        self.args = args
        self.contamination = Contamination(_evaluation_questions(args.evaluation_files or []), args.ngram_size)
        self.tokenizer = self._tokenize = None
        if args.model_name_or_path is not None:
            with loading_model(args.model_name_or_path):
                self.tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
            eos_token_ids = find_eos_token_ids(self.tokenizer, load_generation_config(args.model_name_or_path))
            # As the trainer does it, so that a trace that is kept here is not dropped there
            self._tokenize = DemonstrationTokenizer(
                self.tokenizer, "demonstrations", eos_token_ids, args.max_completion_length
            )

    def check_row(self, row: dict[str, Any]) -> str | None:
        """Why to drop a row, whatever its traces are; `None` to keep it."""
        if self.contamination.find(question_of(row["prompt"])):
            return "found in a benchmark"
        if self.args.verify == "math_verify" and row["answer"] is None:
            return "no gold answer"
        if self.tokenizer is not None:
            if len(tokenize_prompt(self.tokenizer, row["prompt"])) > self.args.max_prompt_length:
                return "prompt too long"

    def check_traces(self, rows: list[dict[str, Any]]) -> list[list[str | None]]:
        """For each trace of each row why to drop it, or `None` to keep it."""
        reasons = [[self._first_look(row, number) for number in range(len(row["demonstrations"]))] for row in rows]
        for check in (self._check_lengths, self._check_answers):
            left = [
                (i, number) for i, row in enumerate(reasons) for number, reason in enumerate(row) if reason is None
            ]
            found = check([rows[i] for i, _ in left], [rows[i]["demonstrations"][number] for i, number in left])
            for (i, number), reason in zip(left, found, strict=True):
                reasons[i][number] = reason
        return reasons

    def _first_look(self, row, number):
        trace = row["demonstrations"][number]
        if not trace or not trace.strip():
            return "empty"
        if trace in row["demonstrations"][:number]:
            return "repeats another trace"
        if row["complete"][number] is False:
            return "unfinished"
        if self.args.verify == "flags" and not row["correct"][number]:
            return "wrong answer, says the dataset"
        if self.args.verify == "math_verify" and self.args.require_think and "</think>" not in trace:
            return "no </think>"

    def _check_lengths(self, rows, traces):
        if self._tokenize is None:
            return [None] * len(traces)
        reasons = []
        for start in range(0, len(traces), _TRACES_PER_CALL):
            part = slice(start, start + _TRACES_PER_CALL)
            reasons += self._measure(rows[part], traces[part])
        return reasons

    def _measure(self, rows, traces):
        columns = {"prompt": [row["prompt"] for row in rows], "demonstrations": [[trace] for trace in traces]}
        try:
            dropped = self._tokenize(columns, list(range(len(traces))))["demonstrations_dropped"]
        except ValueError:  # of one of them
            if len(traces) == 1:
                return ["cannot be tokenized"]
            return [self._measure([row], [trace])[0] for row, trace in zip(rows, traces, strict=True)]
        return ["too long" if number else None for number in dropped]

    def _check_answers(self, rows, traces):
        if self.args.verify != "math_verify":
            return [None] * len(traces)
        answers = [row["answer"] for row in rows]
        rewards = math_verify_reward(traces, answer=answers, require_think=self.args.require_think)
        return [{None: "gold answer cannot be read", 1.0: None}.get(reward, "wrong answer") for reward in rewards]


# ------------------------------------------------------------------------------------------------------------ output


@dataclass
class Report:
    """What was read, kept and dropped. A row that is dropped takes its traces with it, for the same reason."""

    rows: Counter = field(default_factory=Counter)  # by reason; `None` is that of rows that are kept
    traces: Counter = field(default_factory=Counter)
    contaminated: list[dict[str, str]] = field(default_factory=list)  # the first hundred, with what they match
    requests: dict[str, int] | None = None  # to a teacher, by what became of them

    def drop(self, row: dict[str, Any], reason: str):
        """Counts a row that is dropped with all its traces."""
        self.rows[reason] += 1
        if row["demonstrations"]:
            self.traces[reason] += len(row["demonstrations"])

    def to_dict(self) -> dict[str, Any]:
        """
        `rows` and `traces`, each with `read`, `kept` and `dropped` by reason; `contaminated`, and `requests` if there
        are any.
        """
        counts = {}
        for name, counter in (("rows", self.rows), ("traces", self.traces)):
            dropped = {reason: number for reason, number in counter.most_common() if reason is not None}
            counts[name] = {"read": counter.total(), "kept": counter[None], "dropped": dropped}
        requests = {"requests": self.requests} if self.requests is not None else {}
        return {**counts, "contaminated": self.contaminated, **requests}

    def to_markdown(self) -> str:
        """The report as a table."""
        report = self.to_dict()
        reasons = dict.fromkeys([*report["rows"]["dropped"], *report["traces"]["dropped"]])
        lines = ["| | rows | traces |", "| --- | --- | --- |"]
        lines.append(f"| read | {report['rows']['read']} | {report['traces']['read']} |")
        for reason in reasons:
            rows, traces = (report[name]["dropped"].get(reason, 0) for name in ("rows", "traces"))
            lines.append(f"| dropped: {reason} | {rows} | {traces} |")
        lines.append(f"| **kept** | **{report['rows']['kept']}** | **{report['traces']['kept']}** |")
        if self.requests is not None:
            lines += ["", "Requests: " + ", ".join(f"{number} {name}" for name, number in self.requests.items()) + "."]
        return "\n".join(lines)


@contextmanager
def locked(option: str, path: str):
    """Refuses a second run that would write the same file or folder. The lock of a process ends with it."""
    target = Path(path).resolve()
    lock = target.with_name(f".{target.name}.lock")
    refusal = (
        f"`{option}`: another run is writing {path!r}, and holds {lock}. Wait until it has ended, or name another."
    )
    with holding(lock, refusal):
        yield


class ParquetFolder:
    """
    Writes rows to the parquet files of a folder, which appears when everything is written and replaces the former one.
    After an error or a kill there is no folder of that name.
    """

    def __init__(self, output_dir: str):
        self.output = Path(output_dir)
        self.partial = self.output.with_name(f".{self.output.name}.partial")
        self._buffer: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None
        self._bytes = 0
        self._shards = 0

    def __enter__(self) -> "ParquetFolder":
        shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
        self.partial.mkdir(parents=True)
        return self

    def write(self, row: dict[str, Any]):
        """Writes a row of `prompt`, `demonstrations` and `answer`."""
        if self._schema is None:
            prompt = Value("string") if isinstance(row["prompt"], str) else _CHAT
            features = {"prompt": prompt, "demonstrations": List(Value("string")), "answer": Value("string")}
            self._schema = Features(features).arrow_schema
        self._buffer.append({name: row[name] for name in self._schema.names})
        self._bytes += sum(len(trace) for trace in row["demonstrations"])
        if len(self._buffer) == _ROWS_PER_BATCH:
            self._flush()

    def _flush(self):
        if not self._buffer:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.partial / f"{self._shards}.parquet", self._schema)
            self._shards += 1
        self._writer.write_table(pa.Table.from_pylist(self._buffer, schema=self._schema))
        self._buffer.clear()
        if self._bytes >= SHARD_BYTES:
            self._close()

    def _close(self):
        if self._writer is not None:
            self._writer.close()
        self._writer, self._bytes = None, 0

    def __exit__(self, exception_type, exception, traceback):
        if exception_type is None:
            self._flush()
        self._close()
        if exception_type is not None:
            shutil.rmtree(self.partial)
            return
        for number in range(self._shards):
            name = f"train-{number:05d}-of-{self._shards:05d}.parquet"
            (self.partial / f"{number}.parquet").rename(self.partial / name)
        if self.output.is_dir():
            shutil.rmtree(self.output)
        self.partial.rename(self.output)


def write_training_data(
    rows: Iterable[dict[str, Any]],
    args: OpenR1Arguments,
    source: str,
    checker: Checker | None = None,
    requests: dict[str, int] | None = None,
) -> Report:
    """
    Filters rows and writes what is left, with a report, to `args.output_dir`. `source` is named on the dataset card.
    """
    checker = checker or Checker(args)
    report, seen = Report(requests=requests), set()
    rows, progress = iter(rows), tqdm(desc="Filtering rows", unit=" rows")
    with progress, ParquetFolder(args.output_dir) as folder:
        while batch := list(itertools.islice(rows, _ROWS_PER_BATCH)):
            left = []
            for row in batch:
                reason = checker.check_row(row) or (None if row["demonstrations"] else "no trace")
                if reason:
                    report.drop(row, reason)
                    if reason == "found in a benchmark" and len(report.contaminated) < 100:
                        problem = question_of(row["prompt"])
                        match = {"problem": problem, "question": checker.contamination.find(problem)}
                        report.contaminated.append(match)
                else:
                    left.append(row)
            for row, reasons in zip(left, checker.check_traces(left), strict=True):
                kept = [trace for trace, reason in zip(row["demonstrations"], reasons, strict=True) if reason is None]
                key = hashlib.blake2b(_key(question_of(row["prompt"])).encode(), digest_size=16).digest()
                if kept and key in seen:
                    report.drop(row, "repeats another problem")
                    continue
                report.traces.update(reasons)
                report.rows[None if kept else "no trace left"] += 1
                if kept:
                    seen.add(key)
                    folder.write({**row, "demonstrations": kept})
            progress.update(len(batch))
        if not report.rows:
            raise ValueError(f"{source} has no rows.")
        if not report.rows[None]:
            raise ValueError(f"No row of {source} is left:\n{report.to_markdown()}\nLoosen what drops them.")
        _write_report(report, folder.partial, args, source, checker.contamination.num_questions)
    print(f"{report.to_markdown()}\n\nThe data is in {args.output_dir}.")
    return report


def _write_report(report: Report, folder: Path, args: OpenR1Arguments, source: str, num_questions: int):
    settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
    if "base_url" in settings:
        settings["base_url"] = without_credentials(settings["base_url"])
    (folder / "report.json").write_text(
        json.dumps({**report.to_dict(), "settings": settings}, indent=2, ensure_ascii=False) + "\n"
    )
    lengths = "Lengths were not checked."
    if args.model_name_or_path is not None:
        lengths = (
            f"Prompts of at most {args.max_prompt_length} tokens and traces of at most {args.max_completion_length}, "
            f"as the tokenizer of `{args.model_name_or_path}` counts them."
        )
    # Not a README.md with `configs`: `load_dataset` would then cache the folder by its name, whatever it holds
    (folder / "report.md").write_text(
        f"Problems with reasoning traces, from {source}, for `luffy-trl`: `prompt`, `demonstrations`, `answer`.\n\n"
        f"{report.to_markdown()}\n\n{lengths} Answers judged by: {args.verify}. Compared with {num_questions} "
        f"benchmark questions by {args.ngram_size}-grams of words. `report.json` has every setting.\n"
    )


def main(args: OpenR1Arguments):
    """Makes the training data that the arguments ask for."""

    def rows():
        for number, raw in enumerate(stream(args.dataset_name, args.dataset_split, args.dataset_config)):
            if args.verify == "flags" and "correctness_math_verify" not in raw:
                raise ValueError("`verify='flags'` needs the column `correctness_math_verify`; the dataset has none.")
            yield to_row(raw, number, args.system_prompt)

    with locked("output_dir", args.output_dir):
        args.check_output_dir()  # a run that has just ended may have written it
        write_training_data(rows(), args, f"`{args.dataset_name}`")


if __name__ == "__main__":
    with in_one_line():
        main(*Parser(OpenR1Arguments, prog="luffy prepare-data openr1").parse_args_into_dataclasses())
