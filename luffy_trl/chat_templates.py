# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

r"""
Chat templates: the paper's, and those under which the models it compares with were trained.

| name | who | what the model sees |
| --- | --- | --- |
| `luffy` | the paper's Qwen2.5 models | system prompt, `User: This is the problem:`, `Assistant: <think>\n` |
| `cot` | the paper's Llama-3.1-8B | `User:`, `Answer: Let's think step by step.` |
| `qwen_math` | Qwen2.5-Math-Instruct | ChatML, "reason step by step" as the system prompt |
| `simplerl` | SimpleRL-Zero | ChatML, "reason step by step" behind the question |
| `prime` | PRIME-Zero | "A conversation between User and Assistant", `Assistant:` |
| `question` | anyone | the question, nothing else |

The authors print words, not white space: where the lines of `luffy` and `cot` break is ours. The datasets of the paper
carry its system prompt in every row. Templates other than `luffy` leave that one out, as the authors' evaluation does,
and refuse any other system message.
"""

import json
from string import Template

from transformers import PreTrainedTokenizerBase


# The paper's, word for word (appendix C.2, and the first message of every row of its datasets).
SYSTEM_PROMPT = (
    "Your task is to follow a systematic, thorough reasoning process before providing the final solution. "
    "This involves analyzing, summarizing, exploring, reassessing, and refining your thought process through "
    "multiple iterations. Structure your response into two sections: Thought and Solution. In the Thought "
    'section, present your reasoning using the format: "<think>\n {thoughts} </think>\n". Each thought should '
    'include detailed analysis, brainstorming, verification, and refinement of ideas. After "</think>\n," in '
    "the Solution section, provide the final, logical, and accurate answer, clearly derived from the "
    "exploration in the Thought section. If applicable, include the answer in \\boxed{} for closed-form "
    "results like multiple choices or mathematical solutions."
)

PRIME_SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. "
)
REASON = "Please reason step by step, and put your final answer within \\boxed{}."


# `before` comes first, unless the conversation brings a system message and `own_system` lets it; `opening` begins what
# the assistant writes, unless a message brings it.
_TEMPLATE = Template(
    """{%- if not ($own_system and messages[0].role == 'system') %}{{- $before }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if $own_system %}{{- message.content + $after_system }}
        {%- elif message.content != $paper_system %}
            {{- raise_exception('This chat template has no place for a system message.') }}
        {%- endif %}
    {%- elif message.role == 'user' %}{{- $before_user + message.content + $after_user }}
    {%- elif message.role == 'assistant' %}
        {{- $before_assistant + ('' if message.content.startswith($opening_tag) else $opening) }}
        {{- message.content + $end }}
    {%- else %}{{- raise_exception('Unknown role: ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- $before_assistant + $opening }}{%- endif %}"""
)


def _build(before="", user=("", ""), assistant="", end=None, opening="", own_system=False) -> str:
    """A template from its parts. Without `end`, a turn of the assistant ends in the tokenizer's EOS token."""
    texts = {
        "before": before,
        "after_system": "\n",
        "before_user": user[0],
        "after_user": user[1],
        "before_assistant": assistant,
        "opening": opening,
        "opening_tag": opening.strip(),
        "paper_system": SYSTEM_PROMPT,
    }
    return _TEMPLATE.substitute(
        own_system=str(own_system).lower(),
        end="eos_token" if end is None else json.dumps(end),
        **{name: json.dumps(text) for name, text in texts.items()},
    )


def _chatml(system: str, after_question: str = "") -> str:
    return _build(
        before=f"<|im_start|>system\n{system}<|im_end|>\n",
        user=("<|im_start|>user\n", f"{after_question}<|im_end|>\n"),
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>\n",
    )


CHAT_TEMPLATES = {
    "luffy": _build(
        before=f"{SYSTEM_PROMPT}\n",
        user=("User: This is the problem:\n", "\n"),
        assistant="Assistant: ",
        opening="<think>\n",
        own_system=True,
    ),
    "cot": _build(user=("User: ", "\n"), assistant="Answer: Let's think step by step."),
    "qwen_math": _chatml(REASON),
    "simplerl": _chatml("You are a helpful assistant.", f"\n{REASON}"),
    "prime": _build(
        before=PRIME_SYSTEM_PROMPT,
        user=("User: ", "\n\nPresent the answer in LaTex format: \\boxed{Your answer}. "),
        assistant="Assistant:",
    ),
    "question": _build(),
}


def get_chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """
    One of `CHAT_TEMPLATES` for a tokenizer: it writes the BOS token if the tokenizer puts one before other texts.
    """
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"`chat_template` must be one of {', '.join(CHAT_TEMPLATES)}, got {name!r}.")
    starts_with_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return ("{{- bos_token }}" if starts_with_bos else "") + CHAT_TEMPLATES[name]
