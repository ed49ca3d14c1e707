# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Getting data in: from the Hub, folders and files to rows of prompts and traces."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from ..demonstrations import check_prompt, check_prompt_column, tokenize_prompt


logger = get_logger(__name__)

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


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
        ValueError: If there is no such file.
    """
    path = Path(name)
    if path.is_dir() and any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
        dataset = load_from_disk(name)
        dataset = dataset[split] if isinstance(dataset, DatasetDict) else dataset
        return dataset.to_iterable_dataset() if streaming else dataset
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise ValueError(f"There is no file {name!r}. Check `dataset_name`, `eval_dataset_names` or `data_files`.")
        return load_dataset(_BUILDERS[path.suffix], data_files=name, split="train", streaming=streaming)
    return load_dataset(name, config, split=split, streaming=streaming)


def without_long_prompts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset | IterableDataset:
    """
    Leaves out rows whose rendered prompt is too long, and says how many (of a streamed dataset it cannot say).

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        max_length (`int`):
            Most tokens that a prompt may have.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the chat template.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The rows that fit.

    Raises:
        ValueError: If there is no column `prompt`, or a prompt that is none.
    """

    check_prompt_column(dataset)

    def fits(row, index):
        check_prompt(row["prompt"], index)
        return len(tokenize_prompt(tokenizer, row["prompt"], chat_template_kwargs)) <= max_length

    if isinstance(dataset, IterableDataset):
        return dataset.filter(fits, with_indices=True)
    with PartialState().main_process_first():
        kept = dataset.filter(fits, with_indices=True, desc="Measuring prompts")
    if len(kept) < len(dataset):
        logger.warning(
            f"{len(dataset) - len(kept)} of {len(dataset)} rows have a prompt of more than {max_length} tokens and "
            "are left out. Raise `max_prompt_length` to keep them."
        )
    return kept
