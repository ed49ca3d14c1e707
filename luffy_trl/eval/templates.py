# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Prompts of the models that the paper evaluates. A model is asked as it was trained: they are to the letter those of the
authors' evaluation script.
"""

from transformers import PreTrainedTokenizerBase

from ..chat_templates import CHAT_TEMPLATES
from .benchmarks import Question


_NAMES = {"qwen": "qwen_math", "simplerl": "simplerl", "prime": "prime", "none": "question"}  # among CHAT_TEMPLATES
TEMPLATES = ("own", *_NAMES)


def render_question(
    tokenizer: PreTrainedTokenizerBase, question: Question, template: str = "own", system_prompt: str | None = None
) -> tuple[str, list[int]]:
    """
    Renders a question as training renders its prompt, or as another model was trained; see [`render_prompt`]. With
    `"own"`, a question that is no chat message is the prompt as it stands. `system_prompt` replaces that of the data.
    """
    if system_prompt is None:
        system_prompt = question.system_prompt
    if template == "own" and not question.is_chat:
        if system_prompt:
            raise ValueError(
                f"`system_prompt` needs chat messages, and question {question.index} of {question.benchmark} is a "
                "text. Leave it out, or put the messages into `prompt`."
            )
        template = "none"
    return render_prompt(tokenizer, question.content, template, system_prompt)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, content: str, template: str = "own", system_prompt: str | None = None
) -> tuple[str, list[int]]:
    """
    Renders a question as a prompt, text and tokens: with the model's chat template (`"own"`, which alone takes a
    system prompt), that of `"qwen"`, `"simplerl"` or `"prime"`, or none.
    """
    messages = [{"role": "user", "content": content}]
    if template == "own":
        if tokenizer.chat_template is None:
            raise ValueError(
                f"`template` is 'own', and the tokenizer of {tokenizer.name_or_path!r} has no chat template. Choose "
                f"one of {', '.join(_NAMES)}."
            )
        if system_prompt:
            messages = [{"role": "system", "content": system_prompt}, *messages]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return prompt, tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if template not in _NAMES:
        raise ValueError(f"`template` must be one of {', '.join(TEMPLATES)}, got {template!r}.")
    prompt = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATES[_NAMES[template]], add_generation_prompt=True, tokenize=False
    )
    return prompt, tokenizer(prompt)["input_ids"]
