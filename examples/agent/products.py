# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.
"""
The task of the agent example: products of two-digit numbers, which no model of this size can work out.

A tool can. A trace calls it once for each factor after the first, and copies the last answer:

```text
user       37*46*12
assistant  <tool_call> {"name": "multiply", "arguments": {"a": 37, "b": 46}} </tool_call>
tool       1702
assistant  <tool_call> {"name": "multiply", "arguments": {"a": 1702, "b": 12}} </tool_call>
tool       20424
assistant  20424
```

A question that begins with `use multiply: ` asks for the tool by name: so the warm-up of `train_agent.py` teaches it.
"""

import random
from pathlib import Path

import trl
from datasets import Dataset, DatasetDict
from transformers import Qwen2Tokenizer
from transformers.utils import get_json_schema


NUM_FACTORS = 3
ASKING = "use multiply: "
END = "<|im_end|>"
PIECES = (  # of the chat template, beside the first of all
    "\n<|im_start|>user\n",
    "\n<|im_start|>assistant\n",
    '<tool_call>\n{"name": "multiply", "arguments": {"a": ',
    ', "b": ',
    "}}\n</tool_call>",
    "\n<|im_start|>user\n<tool_response>\n",
    "\n</tool_response>",
)


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return int(a) * int(b)


def product_is_right(completions: list[list[dict]], answer: list[str], **kwargs) -> list[float]:
    """1.0 for a completion whose last message is the product, and nothing else."""
    return [float(messages[-1]["content"] == gold) for messages, gold in zip(completions, answer, strict=True)]


def sample_factors(rng: random.Random, num_factors: int = NUM_FACTORS) -> list[int]:
    """Draws the factors of a question."""
    return [rng.randrange(11, 100) for _ in range(num_factors)]


def solve(factors: list[int]) -> list[dict]:
    """The messages of a trace."""
    messages, product = [], factors[0]
    for factor in factors[1:]:
        call = {"name": "multiply", "arguments": {"a": product, "b": factor}}
        product *= factor
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "name": "multiply", "content": str(product)},
        ]
    return [*messages, {"role": "assistant", "content": str(product)}]


def make_splits(seed: int, num_questions: int = 256) -> DatasetDict:
    """
    Builds the splits: `train`, each question with one trace, `held_out`, and `longer`, with a factor more than any
    trace. The columns are `prompt`, `answer` and, in `train`, `demonstrations`.
    """
    rng = random.Random(seed)
    drawn: set[tuple[int, ...]] = set()
    splits = {}
    for name, num_factors in (("train", NUM_FACTORS), ("held_out", NUM_FACTORS), ("longer", NUM_FACTORS + 1)):
        rows = []
        while len(rows) < num_questions:
            factors = sample_factors(rng, num_factors)
            if tuple(factors) not in drawn:
                drawn.add(tuple(factors))
                trace = solve(factors)
                row = {"prompt": [{"role": "user", "content": "*".join(map(str, factors))}]}
                rows.append({**row, "answer": trace[-1]["content"], "demonstrations": [trace]})
        splits[name] = Dataset.from_list(rows)
        if name != "train":
            splits[name] = splits[name].remove_columns("demonstrations")
    return DatasetDict(splits)


def build_tokenizer() -> Qwen2Tokenizer:
    """
    Builds the task's tokenizer: Qwen2's, with Qwen2.5's chat template. Each character is a token, and so is each piece
    of text that the template always writes, so that a conversation has some 50 tokens instead of 1,200.
    """
    characters = [chr(code) for code in range(33, 127)]
    vocab = {token: index for index, token in enumerate(["<|pad|>", END, *characters, "Ġ", "Ċ"])}
    tokenizer = Qwen2Tokenizer(
        vocab, merges=[], unk_token=None, eos_token=END, pad_token="<|pad|>", padding_side="left"
    )
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    tokenizer.add_tokens([render(tokenizer, "", []).partition(END)[0], *PIECES])
    return tokenizer


def render(tokenizer: Qwen2Tokenizer, question: str, messages: list[dict]) -> str:
    """A conversation as the chat template writes it, up to where the assistant goes on."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}, *messages],
        tools=[get_json_schema(multiply)],
        add_generation_prompt=True,
        tokenize=False,
    )
