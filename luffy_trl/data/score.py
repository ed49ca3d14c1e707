# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Score the traces of a dataset with the model that wrote them: adds the column `demonstration_logprobs`, with which the
ratio of a demonstration token is pi_theta / pi_phi instead of pi_theta / 1.

    python -m luffy_trl.data.score --dataset_name my_data.jsonl --model_name_or_path Qwen/Qwen2.5-Math-1.5B \
        --teacher_name_or_path Qwen/Qwen2.5-Math-7B-Instruct --output_file my_scored_data.parquet

The teacher has to share the policy's vocabulary. Its probabilities are those after the prompt as the policy sees it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer.utils import pad, selective_log_softmax

from ..arguments import Parser, load_tools
from ..demonstrations import (
    check_columns,
    find_eos_token_ids,
    load_generation_config,
    to_supervised,
    tokenize_demonstrations,
)
from ..errors import in_one_line, loading_model
from ..options import described
from ..turns import Tools
from . import load_data


@described
@dataclass
class ScoreArguments:
    """
    Arguments of the command.

    Args:
        dataset_name (`str`):
            Dataset on the Hub, local folder or file, with `prompt` and `demonstrations` (or `completion`).
        model_name_or_path (`str`):
            The policy that will be trained: its tokenizer and its chat template are used.
        teacher_name_or_path (`str`):
            The model that wrote the traces.
        output_file (`str`):
            Where to write the dataset with its new column: a `.parquet` or a `.jsonl` file.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to score.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature at which the teacher wrote.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of traces of a forward pass.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Precision of the teacher's weights. Log-probabilities are computed in float32.
        tools (`list[str]`, *optional*):
            Tools that the traces call: the dotted paths of functions, such as `my_tools.multiply`.
    """

    dataset_name: str
    model_name_or_path: str
    teacher_name_or_path: str
    output_file: str
    dataset_split: str = "train"
    temperature: float = 1.0
    batch_size: int = 8
    dtype: str = "bfloat16"
    tools: list[str] | None = None


def score_demonstrations(
    dataset: Dataset,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
    temperature: float = 1.0,
    batch_size: int = 8,
    chat_template_kwargs: dict | None = None,
    tools: Tools | None = None,
) -> Dataset:
    """
    Adds the column `demonstration_logprobs`: log pi_phi of each token of each trace, also of the token that ends it.
    `tokenizer` and `eos_token_ids` are those of the policy; `temperature` is what the teacher wrote with; `tools` are
    those that the traces call.
    """
    tools = tools or Tools()
    check_columns(dataset)
    field_name = "demonstrations" if "demonstrations" in dataset.column_names else "completion"
    traces = [value if field_name == "demonstrations" else [value] for value in dataset[field_name]]
    counts = [len(value or []) if value != [None] else 0 for value in traces]
    flat = Dataset.from_dict(
        {
            "prompt": [prompt for prompt, n in zip(dataset["prompt"], counts, strict=True) for _ in range(n)],
            "completion": [trace for value, n in zip(traces, counts, strict=True) for trace in (value or [])[:n]],
        }
    )
    tokenized = tokenize_demonstrations(
        *(flat, tokenizer, eos_token_ids),
        max_length=2**31 - 1,
        chat_template_kwargs=chat_template_kwargs,
        tools=tools,
    )
    rows = to_supervised(tokenized, tokenizer, {**tools.options(None), **(chat_template_kwargs or {})})
    too_large = max(max(ids) for ids in rows["input_ids"])
    num_embeddings = teacher.get_input_embeddings().num_embeddings
    if too_large >= num_embeddings:
        raise ValueError(
            f"`teacher_name_or_path` has {num_embeddings} token embeddings, and the policy's tokenizer gave the token "
            f"{too_large} ({tokenizer.convert_ids_to_tokens(too_large)!r}). Use a teacher of the same vocabulary."
        )

    scored: list[list[float]] = [[] for _ in range(len(rows))]
    order = sorted(
        range(len(rows)), key=lambda i: -len(rows[i]["input_ids"])
    )  # the longest first: memory shows at once
    with tqdm(total=len(rows), desc="Scoring traces") as progress:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = rows[numbers]
            logps = _per_token_logps(teacher, batch["input_ids"], temperature)
            for number, labels, values in zip(numbers, batch["labels"], logps, strict=True):
                num_prompt_tokens = next(i for i, label in enumerate(labels) if label != -100)
                scored[number] = values[num_prompt_tokens - 1 : len(labels) - 1].tolist()
            progress.update(len(numbers))

    remaining = iter(scored)
    column: list[Any] = [[next(remaining) for _ in range(n)] for n in counts]
    if field_name == "completion":
        column = [values[0] if values else None for values in column]
    return dataset.add_column("demonstration_logprobs", column)


@torch.no_grad()
def _per_token_logps(teacher: PreTrainedModel, input_ids: list[list[int]], temperature: float) -> torch.Tensor:
    """Log-probabilities of the tokens from the second on, of shape `(B, T - 1)`; padding has some value."""
    ids = pad([torch.tensor(row) for row in input_ids], padding_value=0).to(teacher.device)
    mask = pad([torch.ones(len(row), dtype=torch.long) for row in input_ids], padding_value=0).to(teacher.device)
    logits = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return selective_log_softmax(logits / temperature, ids[:, 1:]).cpu()


def main(args: ScoreArguments):
    """Writes the dataset with the log-probabilities of its traces."""
    writers = {".parquet": Dataset.to_parquet, ".jsonl": Dataset.to_json}
    output = Path(args.output_file)
    if output.suffix not in writers:
        raise ValueError(f"`output_file` must end in .parquet or .jsonl, got {args.output_file!r}.")
    if args.temperature <= 0:
        raise ValueError(f"`temperature` must be positive, got {args.temperature}.")
    dataset = load_data(args.dataset_name, args.dataset_split)
    with loading_model(args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    tools = Tools.of_run(tokenizer, load_tools(args.tools), None)
    with loading_model(args.teacher_name_or_path, "teacher_name_or_path"):
        teacher_tokenizer = AutoTokenizer.from_pretrained(args.teacher_name_or_path)
    teacher_vocab = teacher_tokenizer.get_vocab()
    unlike = sorted(t for t, number in tokenizer.get_vocab().items() if teacher_vocab.get(t, number) != number)
    if unlike:
        raise ValueError(
            f"`teacher_name_or_path` numbers {len(unlike)} tokens unlike the policy, such as {unlike[0]!r}. Use a "
            "teacher of the same vocabulary, or train with pi_phi = 1, without the column `demonstration_logprobs`."
        )
    eos_token_ids = find_eos_token_ids(tokenizer, load_generation_config(args.model_name_or_path))
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher_name_or_path, dtype=args.dtype, device_map="auto")
    scored = score_demonstrations(
        *(dataset, teacher.eval(), tokenizer, eos_token_ids, args.temperature, args.batch_size), tools=tools
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    writers[output.suffix](scored, output)
    print(f"{len(scored)} rows with `demonstration_logprobs` are in {output}.")


if __name__ == "__main__":
    with in_one_line():
        main(*Parser(ScoreArguments, prog="luffy prepare-data score").parse_args_into_dataclasses())
