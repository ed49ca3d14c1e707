# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Getting data in: from the Hub, folders and files to rows of prompts and traces."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from ..demonstrations import check_prompt, check_prompt_column, tokenize_prompt, tokenize_prompts


logger = get_logger(__name__)

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_data(
    name: str, split: str = "train", config: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Loads a dataset from wherever it is.

    Args:
        name (`str`):
            A dataset on the Hub, a local folder (also one written by `save_to_disk`), or a `.jsonl`, `.json`,
            `.parquet` or `.csv` file.
        split (`str`, *optional*, defaults to `"train"`):
            Split to load. A file is one split, whatever it is called.
        config (`str`, *optional*):
            Name of the dataset's configuration, where it has several.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset.

    Raises:
        ValueError: If there is no such file or split, or it cannot be read. The message names it, and a broken line.
    """
    path = Path(name)
    if path.is_dir() and any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
        with explained(name):
            dataset = load_from_disk(name)
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f"{name!r} has the splits {', '.join(dataset)}, and none called {split!r}.")
            dataset = dataset[split]
        return dataset.to_iterable_dataset() if streaming else dataset
    suffix = path.suffix.lower()
    if suffix in BUILDERS and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"There is no file {name!r}. Check `dataset_name`, `eval_dataset_names` or `data_files`.")
        if path.stat().st_size == 0:
            raise ValueError(f"{name!r} is an empty file. It needs a row for each problem.")
        source: dict[str, Any] = {"path": BUILDERS[suffix], "data_files": name, "split": "train"}
    elif path.is_file():
        raise ValueError(
            f"{name!r} is a file of another format than {', '.join(BUILDERS)}. Write a .jsonl file: in each line a "
            'JSON object like {"prompt": ..., "answer": ...}.'
        )
    else:
        source = {"path": name, "name": config, "split": split}
    if suffix == ".csv":  # where 56 may be an answer, and a trace
        source["converters"] = dict.fromkeys(("prompt", "completion", "answer", "solution"), _as_text)
    with explained(name):
        if streaming and path.exists():
            builder = load_dataset_builder(**{key: value for key, value in source.items() if key != "split"})
            builder._generate_tables = partial(_explained_tables, name, builder._generate_tables)
            dataset = builder.as_streaming_dataset(source["split"])
        else:
            dataset = load_dataset(**source, streaming=streaming)
        # What is wrong with a local file would show later, and without its name
        is_empty = streaming and path.exists() and next(iter(dataset), None) is None
        if not streaming and path.is_file() and suffix != ".parquet":
            dataset.data.table.validate(full=True)  # finds what is no UTF-8
    if is_empty:
        raise ValueError(f"{name!r} has no rows.")
    return dataset


def _explained_tables(name: str, generate_tables: Callable[..., Iterator], *args, **kwargs) -> Iterator:
    """What a stream reads from a local file; a broken line may be found when a run has long begun."""
    with explained(name):
        yield from generate_tables(*args, **kwargs)


def _as_text(cell: str) -> str | None:
    return cell or None


@contextmanager
def explained(name: str):
    """Says what is wrong with a dataset in one line, where `datasets` has a traceback without the file or the line."""
    try:
        yield
    except Exception as error:  # of datasets, pyarrow, pandas, json and the Hub's client
        path = Path(name)
        files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
        broken = filter(None, map(_find_broken_line, sorted(files)))
        if line := next(broken, None):
            raise ValueError(f"{line} Correct the line, or remove it.") from error
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        reason = " ".join(f"{type(cause or error).__name__}: {cause or error}".split())[:500]
        if "corresponds to no data" in reason:
            raise ValueError(f"{name!r} has no rows.") from error
        if path.exists():
            raise ValueError(f"{name!r} cannot be loaded. {reason}") from error
        raise ValueError(
            f"{name!r} is no file or folder here, and no dataset on the Hub that can be loaded. {reason}"
        ) from error


def _find_broken_line(file: Path) -> str | None:
    """The first line of a JSON file that is none, and why: a row a line, or an array of rows."""
    if file.suffix.lower() not in (".json", ".jsonl"):
        return None
    with file.open("rb") as lines:
        is_array = lines.read(100).lstrip()[:1] == b"["
        lines.seek(0)
        number = 0
        try:
            if is_array:
                json.load(lines)
                return None
            for number, line in enumerate(lines, start=1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f'Line {number} of {str(file)!r} is no JSON object, such as {{"prompt": ...}}.'
        except json.JSONDecodeError as error:
            number = error.lineno if is_array else number
            reason = error.msg.removesuffix(" at")
            return f"Line {number} of {str(file)!r} is no JSON, from character {error.colno} on: {reason}."
        except UnicodeDecodeError as error:
            return f"Line {number} of {str(file)!r} is no text in UTF-8: {error}."


def without_long_prompts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset | IterableDataset:
    """
    Leaves out rows whose rendered prompt has more than `max_length` tokens, and says how many (of a stream it cannot).
    """

    check_prompt_column(dataset)

    def fits(row, index):
        check_prompt(row["prompt"], index)
        try:
            return len(tokenize_prompt(tokenizer, row["prompt"], chat_template_kwargs)) <= max_length
        except Exception as error:  # a chat template may raise anything
            raise ValueError(f"row {index}: `prompt` cannot be rendered: {error}") from error

    def which_fit(rows, indices):
        for prompt, index in zip(rows["prompt"], indices, strict=True):
            check_prompt(prompt, index)
        try:
            all_ids = tokenize_prompts(tokenizer, rows["prompt"], chat_template_kwargs)
        except Exception:  # of one of them
            return [fits({"prompt": prompt}, index) for prompt, index in zip(rows["prompt"], indices, strict=True)]
        return [len(ids) <= max_length for ids in all_ids]

    if isinstance(dataset, IterableDataset):
        return dataset.filter(fits, with_indices=True)
    with PartialState().main_process_first():
        kept = dataset.filter(which_fit, with_indices=True, batched=True, desc="Measuring prompts")
    if len(kept) < len(dataset):
        logger.warning(
            f"{len(dataset) - len(kept)} of {len(dataset)} rows have a prompt of more than {max_length} tokens and "
            "are left out. Raise `max_prompt_length` to keep them."
        )
    return kept
