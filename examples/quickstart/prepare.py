# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.
"""
Prepares the quickstart: data, a tokenizer and a small model with a skill and a bad habit.

The warm-up teaches the model to apply one operation, and to solve the easy problems of `task.py`. It also teaches it
to give up on longer problems after two operations. The model therefore holds all it needs to solve the hard problems,
but practically never samples a solution: reinforcement learning from its own rollouts sees no reward.

```bash
python examples/quickstart/prepare.py --output_dir outputs/quickstart/seed_0 --seed 0
```

The warm-up takes about four minutes on a core. That of seed 0 is in `checkpoint/`, made with `--output_dir
examples/quickstart/checkpoint`, and is copied from there.
"""

import argparse
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from task import (
    EASY_LENGTHS,
    EOS_TOKEN,
    LONGER_LENGTHS,
    OPERATORS,
    apply_operation,
    build_tokenizer,
    format_completion,
    format_prompt,
    is_correct,
    make_splits,
    rewrite,
    sample_problem,
)
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    set_seed,
)


HARD_SPLITS = ("train", "held_out", "longer", "unseen_operator")
MAX_NEW_TOKENS = 40
CHECKPOINT = Path(__file__).parent / "checkpoint"  # the warm model of seed 0, to save the minutes of its warm-up


@dataclass(frozen=True)
class WarmUpConfig:
    """
    Settings of the warm-up.

    Args:
        seed (`int`): Seed of the data, of the initial weights and of the warm-up.
        num_steps (`int`, *optional*, defaults to `3500`): Number of optimizer steps.
        tokens_per_batch (`int`, *optional*, defaults to `1200`): Number of tokens per step.
        learning_rate (`float`, *optional*, defaults to `3e-3`): Peak learning rate; it decays linearly.
        mixture (`tuple[float, float, float, float]`, *optional*, defaults to `(0.3, 0.1, 0.25, 0.35)`):
            Shares of solved easy problems, first steps, abandoned problems and excerpts.
        give_up_probability (`float`, *optional*, defaults to `0.9999`):
            Probability that an abandoned problem ends after a line, from the second line on. The higher it is, the
            rarer a lucky rollout; but a demonstration needs some probability left to raise.
    """

    seed: int
    num_steps: int = 3500
    tokens_per_batch: int = 1200
    learning_rate: float = 3e-3
    mixture: tuple[float, float, float, float] = (0.3, 0.1, 0.25, 0.35)
    give_up_probability: float = 0.9999


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """
    Builds the model, of about 200 000 parameters, with random weights.

    Args:
        tokenizer ([`~transformers.Qwen2Tokenizer`]): Tokenizer the model is for.

    Returns:
        [`~transformers.Qwen2ForCausalLM`]: The model.
    """
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            # The default of 0.02 suits wide models; with 64 dimensions it delays learning severalfold.
            initializer_range=0.08,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def sample_document(rng: random.Random, config: WarmUpConfig) -> tuple[str, str]:
    """
    Draws one document of the warm-up.

    Args:
        rng (`random.Random`): Source of randomness.
        config (`WarmUpConfig`): Settings of the warm-up.

    Returns:
        `tuple[str, str]`: Context, and the continuation to be learned.
    """
    operators = "".join(OPERATORS)
    min_hard, max_length = max(EASY_LENGTHS) + 1, max(LONGER_LENGTHS)
    (kind,) = rng.choices(("solved", "first_step", "abandoned", "excerpt"), config.mixture)
    if kind == "solved":
        problem = sample_problem(rng, rng.choice(EASY_LENGTHS), operators)
        lines = rewrite(problem)
        return format_prompt(problem), format_completion(lines, lines[-1]) + EOS_TOKEN
    if kind == "first_step":
        problem = sample_problem(rng, rng.randint(min_hard, max_length), operators)
        return format_prompt(problem), f"<think>{apply_operation(problem)};"
    if kind == "abandoned":
        problem = sample_problem(rng, rng.randint(min_hard, max_length), operators)
        lines = rewrite(problem)
        num_lines = max(EASY_LENGTHS)
        while num_lines < len(lines) and rng.random() > config.give_up_probability:
            num_lines += 1
        return format_prompt(problem), format_completion(lines[:num_lines], lines[num_lines - 1][:2]) + EOS_TOKEN
    # An excerpt has neither a prompt nor tags, so that it trains the operation at every depth of a chain without
    # weakening the habit. Half of them are one operation long: arithmetic is learned last and needs the most examples.
    problem = sample_problem(rng, rng.choice((1, rng.randint(2, max_length))), operators)
    return f"{problem};", ";".join(rewrite(problem))


def sample_batches(
    tokenizer: Qwen2Tokenizer,
    config: WarmUpConfig,
    excluded_prompts: set[str],
    sample_document: Callable[[random.Random, WarmUpConfig], tuple[str, str]] = sample_document,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    Draws batches of documents of similar length, without end.

    Args:
        tokenizer ([`~transformers.Qwen2Tokenizer`]): Tokenizer.
        config (`WarmUpConfig`): Settings of the warm-up.
        excluded_prompts (`set[str]`): Prompts that must not be drawn.
        sample_document (`Callable`, *optional*): What draws a document; that of another task for another task.

    Yields:
        `tuple[torch.Tensor, torch.Tensor]`: Token ids, and labels with -100 on context and padding.
    """
    rng = random.Random(config.seed)
    documents_per_pool = 640
    while True:
        documents = [sample_document(rng, config) for _ in range(documents_per_pool)]
        documents = [document for document in documents if document[0] not in excluded_prompts]
        contexts, continuations = (tokenizer(list(texts))["input_ids"] for texts in zip(*documents, strict=True))
        pool = sorted(
            zip(contexts, continuations, strict=True), key=lambda document: len(document[0]) + len(document[1])
        )

        batches = [[]]
        for context_ids, continuation_ids in pool:
            length = len(context_ids) + len(continuation_ids)
            if (len(batches[-1]) + 1) * length > config.tokens_per_batch:
                batches.append([])
            batches[-1].append((context_ids, continuation_ids))
        rng.shuffle(batches)

        for batch in batches:
            length = max(len(context_ids) + len(continuation_ids) for context_ids, continuation_ids in batch)
            # Padding on the right needs no attention mask: attention is causal, and padding has no label.
            input_ids = torch.full((len(batch), length), tokenizer.pad_token_id)
            labels = torch.full((len(batch), length), -100)
            for row, (context_ids, continuation_ids) in enumerate(batch):
                end = len(context_ids) + len(continuation_ids)
                input_ids[row, :end] = torch.tensor(context_ids + continuation_ids)
                labels[row, len(context_ids) : end] = torch.tensor(continuation_ids)
            yield input_ids, labels


def warm_up(
    model: PreTrainedModel,
    tokenizer: Qwen2Tokenizer,
    config: WarmUpConfig,
    excluded_prompts: set[str],
    sample_document: Callable[[random.Random, WarmUpConfig], tuple[str, str]] = sample_document,
) -> None:
    """
    Trains the model on documents of the warm-up, in place.

    Args:
        model ([`~transformers.PreTrainedModel`]): Model to train.
        tokenizer ([`~transformers.Qwen2Tokenizer`]): Tokenizer.
        config (`WarmUpConfig`): Settings of the warm-up.
        excluded_prompts (`set[str]`): Prompts that must not be trained on.
        sample_document (`Callable`, *optional*): What draws a document; that of another task for another task.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1 - step / config.num_steps)
    )
    batches = sample_batches(tokenizer, config, excluded_prompts, sample_document)
    model.train()
    progress = tqdm(range(config.num_steps), desc="Warm-up")
    for step in progress:
        input_ids, labels = next(batches)
        logits = model(input_ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def count_successes(
    model: PreTrainedModel,
    tokenizer: Qwen2Tokenizer,
    prompts: list[str],
    answers: list[str],
    num_samples: int,
    batch_size: int = 512,
) -> int:
    """
    Counts the correct samples at temperature 1, going through the prompts as often as needed.

    Args:
        model ([`~transformers.PreTrainedModel`]): Model to sample from.
        tokenizer ([`~transformers.Qwen2Tokenizer`]): Tokenizer.
        prompts (`list[str]`): Prompts.
        answers (`list[str]`): Answer of each prompt.
        num_samples (`int`): Number of samples.
        batch_size (`int`, *optional*, defaults to `512`): Number of samples that are drawn at once.

    Returns:
        `int`: Number of correct samples.
    """
    model.eval()
    successes = 0
    for start in range(0, num_samples, batch_size):
        rows = [row % len(prompts) for row in range(start, min(start + batch_size, num_samples))]
        inputs = tokenizer([prompts[row] for row in rows], padding=True, return_tensors="pt")
        output_ids = model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
        completions = tokenizer.batch_decode(output_ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        successes += sum(
            is_correct(completion, answers[row]) for completion, row in zip(completions, rows, strict=True)
        )
    return successes


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Prepare the quickstart's data and warm model.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"), help="Folder to write to.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the data and of the warm-up.")
    parser.add_argument(
        "--num_steps", type=int, default=WarmUpConfig.num_steps, help="Number of optimizer steps of the warm-up."
    )
    parser.add_argument(
        "--num_samples", type=int, default=2048, help="Samples per split for the success table; 0 prints no table."
    )
    return parser.parse_args()


def main() -> None:
    """Prepares the quickstart."""
    args = parse_args()
    config = WarmUpConfig(seed=args.seed, num_steps=args.num_steps)
    model_dir, data_dir = args.output_dir / "model", args.output_dir / "data"
    fingerprint_file = args.output_dir / "warm_up.json"
    fingerprint = json.dumps(asdict(config), indent=2)

    splits = make_splits(args.seed)
    data_dir.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        (data_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split))

    for folder in (args.output_dir, CHECKPOINT):
        if (folder / "warm_up.json").exists() and (folder / "warm_up.json").read_text() == fingerprint:
            print(f"The warm model in {folder} was made with these settings and this seed, and is used again.")
            if folder != args.output_dir:
                shutil.copytree(folder / "model", model_dir, dirs_exist_ok=True)
                fingerprint_file.write_text(fingerprint)
            tokenizer = AutoTokenizer.from_pretrained(model_dir)
            model = AutoModelForCausalLM.from_pretrained(model_dir)
            break
    else:
        set_seed(args.seed)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
        fingerprint_file.unlink(missing_ok=True)
        warm_up(model, tokenizer, config, {prompt for split in HARD_SPLITS for prompt in splits[split]["prompt"]})
        model.save_pretrained(model_dir)
        tokenizer.save_pretrained(model_dir)
        # Written last, so that an interrupted run is not taken for a finished one.
        fingerprint_file.write_text(fingerprint)

    if args.num_samples:
        set_seed(args.seed)
        print(f"Success of the warm model at temperature 1, {args.num_samples} samples per split:")
        for name, split in splits.items():
            successes = count_successes(model, tokenizer, split["prompt"], split["answer"], args.num_samples)
            print(f"  {name:<16}{successes:>6}  ({successes / args.num_samples:.1%})")


if __name__ == "__main__":
    main()
