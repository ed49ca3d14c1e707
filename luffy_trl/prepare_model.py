# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

r"""
Prepare a base model for training: more positions, a chat template, and tokens that end and pad.

    python -m luffy_trl.prepare_model --model_name_or_path Qwen/Qwen2.5-Math-7B --output_dir models/qwen2.5_math_7b

gives the paper's starting point: 16384 positions with a rope_theta of 40000 (before: 4096 and 10000), and a template
with the paper's system prompt that opens `<think>\n`. Weights are copied as files, not loaded. Running it again, or on
its own output, changes nothing.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from .arguments import Parser
from .chat_templates import get_chat_template
from .demonstrations import load_generation_config
from .errors import in_one_line, loading_model
from .options import described


_COPIED = ["*.safetensors", "*.safetensors.index.json", "*.py", "LICENSE*", "NOTICE*"]
# What models have to pad with, where it is not what ends their turns: Qwen2.5, Llama 3.1, Llama 2, and others
_PAD_TOKENS = ["<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|fim_pad|>", "<|endoftext|>", "<unk>"]


@described
@dataclass
class PrepareArguments:
    """
    Arguments of the command.

    Args:
        model_name_or_path (`str`):
            The base model: on the Hub, or a local folder.
        output_dir (`str`):
            Where to write the prepared model. It may be `model_name_or_path` itself.
        chat_template (`str`, *optional*, defaults to `"luffy"`):
            Name of a template of `luffy_trl.chat_templates`, a `.jinja` file, or `"keep"` for the tokenizer's own.
        max_position_embeddings (`int`, *optional*, defaults to `16384`):
            Positions that the model needs at least. One that has them is left as it is.
        rope_theta (`float`, *optional*):
            Base of the rotary embedding. Defaults to the model's own, times the factor by which its positions grow.
        revision (`str`, *optional*):
            Revision of the model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
    """

    model_name_or_path: str
    output_dir: str
    chat_template: str = "luffy"
    max_position_embeddings: int = 16384
    rope_theta: float | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def extend_positions(config: PreTrainedConfig, max_position_embeddings: int, rope_theta: float | None = None) -> None:
    """
    Gives a model more positions, in place. By default the base of its rotary embedding grows by the same factor.
    Without a single, unscaled rotary embedding this is an error.
    """
    old = config.max_position_embeddings
    if old >= max_position_embeddings and rope_theta is None:
        return
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:
        raise ValueError(
            f"A {config.model_type} model has no single `rope_theta`, so its {old} positions cannot be extended. Set "
            f"`max_position_embeddings` to at most {old}, or take another model."
        )
    if rope_theta is None and rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"The rotary embedding of the model is scaled already (`rope_type` is {rope['rope_type']!r}). Set "
            f"`rope_theta` to say what its base should be, or `max_position_embeddings` to at most {old}."
        )
    config.max_position_embeddings = max(old, max_position_embeddings)
    rope["rope_theta"] = float(
        rope["rope_theta"] * max_position_embeddings / old if rope_theta is None else rope_theta
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    The token with which the tokenizer's chat template ends a turn of the assistant. It has to be a special token.
    """
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "MARKER"}]
    end = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("MARKER")[2]
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in tokenizer.added_tokens_decoder:
        raise ValueError(
            f"The chat template ends a turn of the assistant with {end!r}, and this tokenizer has no special token "
            "for it. Choose another `chat_template`: `luffy` and `cot` end a turn with the tokenizer's EOS token, if "
            "it has one."
        )
    return ids[0]


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, end_id: int) -> str:
    """
    A token to pad with: the tokenizer's own, unless it ends a turn and the vocabulary has another that is surely
    unused.
    """
    if tokenizer.pad_token_id not in (None, end_id):
        return tokenizer.pad_token
    vocab = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    usable = [token for token in _PAD_TOKENS if token in vocab and vocab[token] != end_id]
    return usable[0] if usable else tokenizer.convert_ids_to_tokens(end_id)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str = "luffy") -> None:
    """
    Installs a chat template (a name, a `.jinja` file or `"keep"`), and makes the tokenizer's EOS token what ends a
    turn under it, in place.
    """
    if chat_template.endswith(".jinja"):
        if not Path(chat_template).is_file():
            raise ValueError(f"There is no file {chat_template!r}. Check `chat_template`.")
        tokenizer.chat_template = Path(chat_template).read_text()
    elif chat_template != "keep":
        tokenizer.chat_template = get_chat_template(chat_template, tokenizer)
    elif tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template to keep. Choose another `chat_template`.")
    end_id = end_of_turn(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_id)
    tokenizer.pad_token = choose_pad_token(tokenizer, end_id)


def main(args: PrepareArguments):
    """Makes a base model ready, and saves it."""
    source, output = Path(args.model_name_or_path), Path(args.output_dir)
    if output.is_file():
        raise ValueError(f"`output_dir` {args.output_dir!r} is a file. Name a folder.")
    kwargs = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    with loading_model(args.model_name_or_path):
        config = AutoConfig.from_pretrained(args.model_name_or_path, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, **kwargs)
    generation_config: GenerationConfig = load_generation_config(args.model_name_or_path, **kwargs)

    old_eos = generation_config.eos_token_id
    old_positions = config.max_position_embeddings
    extend_positions(config, args.max_position_embeddings, args.rope_theta)
    prepare_tokenizer(tokenizer, args.chat_template)
    end_id = tokenizer.eos_token_id
    if max(end_id, tokenizer.pad_token_id) >= config.vocab_size:
        raise ValueError(
            f"The tokenizer's {tokenizer.eos_token!r} or {tokenizer.pad_token!r} is beyond the {config.vocab_size} "
            "embeddings of the model. Choose another `chat_template`."
        )
    others = [old_eos] if isinstance(old_eos, int) else old_eos or []
    config.eos_token_id = end_id
    config.pad_token_id = tokenizer.pad_token_id
    generation_config.eos_token_id = [end_id, *(number for number in others if number != end_id)]
    generation_config.pad_token_id = tokenizer.pad_token_id
    # A cap made for a shorter context; vLLM would apply it to every request that it serves.
    generation_config.max_new_tokens = None
    if tokenizer.model_max_length < config.max_position_embeddings:
        tokenizer.model_max_length = config.max_position_embeddings

    if not source.is_dir():
        source = Path(snapshot_download(args.model_name_or_path, revision=args.revision, allow_patterns=_COPIED))
    output.mkdir(parents=True, exist_ok=True)
    if any(source.glob("*.safetensors")):
        for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)}):
            _copy(path, output / path.name)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype="auto", **kwargs)
        model.save_pretrained(output)
    # Last what makes the folder a model, so that one without its weights does not look like one
    tokenizer.save_pretrained(output)
    generation_config.save_pretrained(output)
    config.save_pretrained(output)

    rope = getattr(config, "rope_parameters", None) or {}
    print(f"The prepared model is in {output}:")
    print(f"- {config.max_position_embeddings} positions (before: {old_positions}), rotary embedding {rope}")
    print(f"- chat template {args.chat_template!r}; a turn ends with {tokenizer.eos_token!r} ({end_id})")
    print(f"- generation ends with {generation_config.eos_token_id} (before: {old_eos})")
    print(f"- padding with {tokenizer.pad_token!r} ({tokenizer.pad_token_id})")
    if tokenizer.pad_token_id == end_id:
        print("  It also ends a turn: the vocabulary has no other token that is sure to be unused.")


def _copy(source: Path, target: Path):
    """Copies a file, unless it is there; under its name only when it is complete."""
    stat = source.stat()
    if target.exists() and (os.path.samefile(source, target) or _same(stat, target.stat())):
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.copy2(source, partial)  # follows the links of the Hub's cache
    partial.replace(target)


def _same(stat: os.stat_result, other: os.stat_result) -> bool:
    return (stat.st_size, stat.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


if __name__ == "__main__":
    with in_one_line():
        main(*Parser(PrepareArguments, prog="luffy prepare-model").parse_args_into_dataclasses())
