# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What tells a model from another of the same name, so that scores stay with the weights they were measured on."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import loading_model


# What identifies a model, and how messages call it.
IDENTITY = {
    "weights": "weights or configurations",
    "tokenizer": "tokenizers",
    "eos_token_ids": "end-of-sequence tokens",
    "chat_template": "chat templates",
}
_FILES = ("config.json", "adapter_config.json", "*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.py")
# An update changes some weights of nearly all tensors, in bfloat16 perhaps one in a thousand. Four blocks of each
# tensor are millions of weights of a model of 7B parameters, in 6 MB instead of 15 GB.
_BLOCK = 4096
_NUM_BLOCKS = 4
_CHUNK = 16 * 2**20  # of a file that does not say where its tensors are


def base_of(model_name_or_path: str) -> str:
    """The model itself, or the one that it is a LoRA adapter of: an adapter has no configuration of its own."""
    path = find_adapter_config_file(model_name_or_path)
    return model_name_or_path if path is None else json.loads(Path(path).read_text())["base_model_name_or_path"]


def identify(
    model_name_or_path: str, tokenizer: PreTrainedTokenizerBase, eos_token_ids: list[int], with_template: bool = True
) -> dict[str, Any]:
    """
    What a model's answers depend on: `weights` (a hash of a folder's files, or a commit on the Hub, with the
    configuration and the base model of an adapter), `tokenizer`, `eos_token_ids` and, if it counts, `chat_template`.
    """
    names = dict.fromkeys((model_name_or_path, base_of(model_name_or_path)))
    identity = {
        "weights": "+".join(_identify_weights(name) for name in names),
        "tokenizer": _identify_tokenizer(tokenizer),
        "eos_token_ids": list(eos_token_ids),
    }
    return identity | ({"chat_template": _hash(tokenizer.chat_template)} if with_template else {})


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _identify_weights(name: str) -> str:
    if not Path(name).is_dir():
        with loading_model(name):
            path = find_adapter_config_file(name) or cached_file(name, "config.json")
        return f"commit {extract_commit_hash(path, None)}"
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted({path for pattern in _FILES for path in Path(name).glob(pattern)}):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            for start, end in _regions(file, path):
                for block in _sample(file, start, end):
                    digest.update(block)
    return digest.hexdigest()


def _regions(file: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    """Where a file is looked at: its header and each of its tensors, or chunks of it."""
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        header_end = 8 + int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(header_end, size) - 8))
            tensors = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, AttributeError):  # loading it will say that it is damaged
            pass
        else:
            yield from ((start, min(start + _BLOCK, header_end)) for start in range(0, header_end, _BLOCK))
            yield from sorted((header_end + start, header_end + end) for start, end in tensors)
            return
    yield from ((start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK))


def _sample(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """Evenly spaced blocks of a region, the first and the last among them; all of a short one."""
    file.seek(start)
    if end - start <= _NUM_BLOCKS * _BLOCK:
        yield file.read(end - start)
        return
    for number in range(_NUM_BLOCKS):
        file.seek(start + number * (end - start - _BLOCK) // (_NUM_BLOCKS - 1))
        yield file.read(_BLOCK)


def _identify_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    state: Any = sorted(tokenizer.get_vocab().items())
    with suppress(Exception):  # a tokenizer in Python, or with parts in it, has no such state
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state = {name: value for name, value in state.items() if name not in ("truncation", "padding")}  # of calls
    return _hash([state, sorted(tokenizer.all_special_tokens), tokenizer.clean_up_tokenization_spaces])
