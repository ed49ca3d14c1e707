# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
From text to tokens: what a trace of the dataset looks like after its prompt.

A demonstration has to look like something the policy could have sampled after the same prompt: the tokens that follow
the rendered prompt, up to and including one token that ends generation.
"""

import hashlib
import importlib.metadata
import json
import math
import re
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational, prepare_multimodal_messages

from .errors import loading_model
from .messages import clean_prompt
from .turns import Tools, Turns, answer_ids, has_turns, read_turns


logger = get_logger(__name__)

# Tokens that open and close turns in chat templates, unless they are of a trace's own make (OpenThoughts, Sky-T1)
_MARKUP = re.compile(
    r"<[|｜](?!(?:begin|end)_of_(?:thought|solution))[^<>|｜\s]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]|</?s>"
)
_OPENED_THINKING = re.compile(r"<think>(\s*)\Z")
_CLOSED_THINKING = re.compile(r"<think>\s*</think>\s*\Z")
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(["'])(?:role|content|from|value)\1\s*:""")  # written as text
_ROWS_LOOKED_AT = 100
_MIN_LOGP = -80.0  # below it the ratio overflows in float32

# Columns that `tokenize_demonstrations` adds, and that the trainer takes out again before reward functions see a row.
DEMONSTRATION_COLUMNS = {
    "demonstration_ids": List(List(Value("int32"))),  # the traces that fit, tokenized
    "demonstration_logps": List(List(Value("float32"))),  # log pi_phi of their tokens, or no lists where not given
    "demonstration_turns": List(Value("string")),  # the turns of each trace, or no texts where all have one turn
    "demonstration_scores": List(List(Value("float64"))),  # rewards of the traces, or no lists where not given
    "demonstrations_dropped": Value("int32"),  # how many did not fit
    "demonstration_row": Value("int64"),  # number of the row in the dataset, or what stands for it in a stream
}


@dataclass
class DemonstrationTokenizer:
    """
    Turns the traces of dataset rows into token ids; a function for `Dataset.map(batched=True, with_indices=True)`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        field_name (`str`):
            Column with the traces: `"demonstrations"` (a list of them) or `"completion"` (one).
        eos_token_ids (`list[int]`):
            Every token that ends generation. The first is appended where the chat template does not say which.
        max_length (`int`):
            Maximum number of tokens that a demonstration may have, the end-of-sequence token included.
        overflow (`str`, *optional*, defaults to `"drop"`):
            What to do with a longer trace: `"drop"`, `"truncate"` or `"error"`.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the chat template, as for the prompts.
        tools ([`~luffy_trl.turns.Tools`], *optional*):
            The tools of the run.
        processor ([`~transformers.ProcessorMixin`], *optional*):
            The policy's processor, where it sees images: it has the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    field_name: str
    eos_token_ids: list[int]
    max_length: int
    overflow: str = "drop"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    tools: Tools = field(default_factory=Tools)
    processor: ProcessorMixin | None = None
    _environment: str | None = field(default=None, init=False, repr=False)  # of the row that is rendered
    _end_of_turn: tuple[str, str, int] | None = field(default=None, init=False, repr=False)
    # Part of the fingerprint under which `datasets` caches the result: another version may tokenize differently.
    version: str = field(default_factory=lambda: importlib.metadata.version("luffy-trl"))

    def __call__(self, rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        """
        Tokenizes a batch of rows.

        Args:
            rows (`dict[str, list]`):
                Columns of the batch, with `prompt` and `field_name` among them.
            indices (`list[int]`):
                Numbers of the rows in the dataset.

        Returns:
            `dict[str, list]`: The columns of `DEMONSTRATION_COLUMNS`.

        Raises:
            ValueError: If a trace cannot be used; the message names the row and the field.
        """
        has_logprobs, has_scores = "demonstration_logprobs" in rows, "demonstration_rewards" in rows
        demonstration_ids: list[list] = [[] for _ in indices]
        demonstration_logps: list[list] = [[] for _ in indices]
        demonstration_turns: list[list] = [[] for _ in indices]
        demonstration_scores: list[list] = [[] for _ in indices]
        dropped = [0] * len(indices)
        for position, number, name, ids, turns in self.tokenize(rows, indices):
            logps, scores = None, None
            if has_logprobs:
                logps = self.check_logprobs(rows["demonstration_logprobs"][position], number, len(ids), name)
            if has_scores:
                scores = self.check_scores(
                    *(rows["demonstration_rewards"][position], number, name, len(rows[self.field_name][position]))
                )
            if len(ids) > self.max_length:
                if self.overflow == "error":
                    raise ValueError(
                        f"{name} has {len(ids)} tokens, more than `max_completion_length={self.max_length}`. Shorten "
                        "it, raise `max_completion_length`, or set `demonstration_overflow` to 'drop' or 'truncate'."
                    )
                if self.overflow == "drop":
                    dropped[position] += 1
                    continue
                ids = ids[: turns.end_before(self.max_length) if turns else self.max_length]
            if ids in demonstration_ids[position]:  # the traces of a group are distinct
                if (
                    scores is not None
                    and scores != demonstration_scores[position][demonstration_ids[position].index(ids)]
                ):
                    raise ValueError(f"{name} is there twice, with other `demonstration_rewards`. Remove one of them.")
                continue
            demonstration_ids[position].append(ids)
            if logps is not None:
                demonstration_logps[position].append(logps[: len(ids)])
            if scores is not None:
                demonstration_scores[position].append(scores)
            if self.tools.schemas:
                demonstration_turns[position].append(turns.to_json() if turns else "")
        return {
            "demonstration_ids": demonstration_ids,
            "demonstration_logps": demonstration_logps,
            "demonstration_turns": demonstration_turns,
            "demonstration_scores": demonstration_scores,
            "demonstrations_dropped": dropped,
            "demonstration_row": indices,
        }

    def tokenize(
        self, rows: dict[str, list], indices: list[int]
    ) -> list[tuple[int, int, str, list[int], Turns | None]]:
        """
        The token ids of every trace of a batch, complete, however long.

        Args:
            rows (`dict[str, list]`):
                Columns of the batch, with `prompt` and `field_name` among them.
            indices (`list[int]`):
                Numbers of the rows in the dataset.

        Returns:
            `list[tuple[int, int, str, list[int], Turns | None]]`: For each trace the position of its row in the batch,
            its number in the row, a name for messages, its token ids, and its turns where it has several.

        Raises:
            ValueError: If a trace cannot be used; the message names the row and the field.
        """
        places, prompt_texts, trace_texts, end_ids = [], [], [], []
        several = []
        for position, (index, prompt) in enumerate(zip(indices, rows["prompt"], strict=True)):
            check_prompt(prompt, index)
            prompt = clean_prompt(prompt)
            self._environment = rows["environment"][position] if "environment" in rows else None
            if self.tools.schemas and not {None, self._environment} & self.tools.schemas.keys():
                raise ValueError(
                    f"row {index}: `environment` is {self._environment!r}, and `environment_factory` has "
                    f"{', '.join(map(repr, self.tools.schemas))}. Name one of these, or add the other."
                )
            if self.processor is not None:
                prompt = self._with_images(prompt, count_images(rows, position), index)
                if {"image", "images"} & rows.keys() and count_images(rows, position) == 0:
                    raise ValueError(
                        f"row {index} has no image, and processors take none among rows that have some. Leave the row "
                        "out, or train on it apart."
                    )
            if self.tools.schemas and not is_conversational({"prompt": prompt}):
                raise ValueError(
                    f"row {index}: `prompt` is a text, and tools are told to the policy in chat messages. Write it as "
                    "`[{'role': 'user', 'content': ...}]`."
                )
            for number, (trace, name) in enumerate(self._traces(rows[self.field_name][position], f"row {index}")):
                if is_conversational({"prompt": prompt}) and isinstance(trace, list) and has_turns(trace):
                    several.append((position, number, name, *self._tokenize_turns(prompt, trace, name)))
                    continue
                prompt_text, trace_text, end_id = self._render(prompt, trace, name)
                places.append((position, number, name))
                prompt_texts.append(prompt_text)
                trace_texts.append(trace_text)
                end_ids.append(end_id)
        is_chat = bool(rows["prompt"]) and is_conversational({"prompt": rows["prompt"][0]})
        all_ids = self._tokenize(prompt_texts, trace_texts, add_special_tokens=not is_chat)
        single: list[tuple[int, int, str, list[int], Turns | None]] = [
            (*place, self._end_once(ids, end_id, place[-1]), None)
            for place, ids, end_id in zip(places, all_ids, end_ids, strict=True)
        ]
        return sorted([*single, *several], key=lambda trace: trace[:2]) if several else single

    def _with_images(self, prompt: Any, num_images: int, index: int) -> Any:
        """A prompt with the places of its images, as TRL makes it."""
        if not is_conversational({"prompt": prompt}):
            if num_images:
                raise ValueError(
                    f"row {index}: `prompt` is a text, and images need chat messages: they have a place in them. "
                    "Write it as `[{'role': 'user', 'content': ...}]`."
                )
            return prompt
        try:
            return prepare_multimodal_messages(prompt, images=[None] * num_images)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"row {index}: `prompt` and its images do not match: {error} Give as many images as the messages have "
                "parts of the type 'image', or messages without such parts."
            ) from error

    def _tokenize_turns(self, prompt: list[dict], trace: list[dict], name: str) -> tuple[list[int], Turns]:
        """The token ids of a trace of several messages, and what of them was acted."""
        ids: list[int] = []
        spans, history = [], list(prompt)
        turns = read_turns(trace, name, self.tools.names(self._environment))
        for turn, answers in turns:
            before, text, end_id = self._render_turn(history, turn, name, prompt)
            (turn_ids,) = self._tokenize([before], [text], add_special_tokens=False)
            turn_ids = self._end_once(turn_ids, end_id, name)
            spans.append((len(ids), len(ids) + len(turn_ids)))
            ids += turn_ids
            if answers:
                ids += self._answer_ids(answers, name)
            history += [turn, *answers]
        return ids, Turns(spans, [answers for _, answers in turns])

    def _render_turn(self, history: list[dict], turn: dict, name: str, prompt: list[dict]) -> tuple[str, str, int]:
        """
        What [`_render`] returns, for a turn that may call tools, which the chat template alone can write. Where it
        writes other turns in another way once this one is there, the turn is what it is right after the prompt.
        """
        if not turn.get("tool_calls"):
            return self._render(history, [turn], name, prompt)
        before = self._apply_chat_template(history, name, add_generation_prompt=True)
        _, _, end_id = self._find_end_of_turn(history, name)
        text = without_doubled_think(before, turn["content"])
        names = [call["function"]["name"] for call in turn["tool_calls"]]
        for start, context in self._contexts(before, history, prompt, name).items():
            openings = [start]
            if opened := _OPENED_THINKING.search(start):  # templates may write a turn without thinking otherwise
                openings += [f"{start[: opened.start()]}<think>", start[: opened.start()]]
            for message in _as_messages(text):
                rendered = self._apply_chat_template([*context, {**turn, **message}], name)
                opening = next((opening for opening in openings if rendered.startswith(opening)), None)
                following = rendered.removeprefix(opening or "")
                shown = _squeeze(following)
                has_calls = all(shown.count(called) >= names.count(called) for called in names)
                if opening is not None and _squeeze(text) in shown and has_calls:
                    return before, following if opening == start else following.lstrip(), end_id
        raise ValueError(
            f"{name} cannot be rendered after its prompt: the chat template does not write {turn['content'][:40]!r} "
            f"and {len(names)} call(s) of {names[0]!r} as what follows the turns before. Some write one call a turn, "
            "or no text beside it. Take a template that writes all, or drop the trace."
        )

    def _answer_ids(self, answers: list[dict], name: str) -> list[int]:
        chat_template = self.tools.options(self._environment).get("chat_template")
        try:
            return answer_ids(self.processor or self.tokenizer, answers, chat_template, self.chat_template_kwargs)
        except Exception as error:  # a template may raise anything
            raise ValueError(
                f"{name}: the answer of {answers[0]['name']!r} cannot be rendered: {error} Give the tokenizer a chat "
                "template that renders answers of tools."
            ) from error

    def _traces(self, value: Any, row: str) -> list[tuple[str | list[dict], str]]:
        """The traces of one row, each with a name for error messages."""
        if value is None:
            return []
        if self.field_name == "completion":
            traces = [(value, f"{row}: `completion`")]
        elif isinstance(value, list):
            traces = [(trace, f"{row}: `demonstrations[{i}]`") for i, trace in enumerate(value)]
        else:
            hint = "Wrap it in a list; a row without a trace has an empty one."
            if isinstance(value, str):
                hint = "Wrap it in a list. A csv file has no lists: name the column `completion`, of one trace a row."
            raise ValueError(f"{row}: `demonstrations` must be a list of traces, got {type(value).__name__}. {hint}")
        return traces

    def check_logprobs(self, value: Any, number: int, length: int, name: str) -> list[float]:
        """The log-probabilities of trace `number` of a row, checked against its `length` in tokens."""
        if isinstance(value, list) and self.field_name == "demonstrations" and number < len(value):
            value = value[number]
        if not isinstance(value, list) or not all(isinstance(logp, float | int) for logp in value):
            raise ValueError(
                f"{name} has no list of numbers in `demonstration_logprobs`, got {str(value)[:100]!r}. Give the "
                "log-probability of each of its tokens, or remove the column."
            )
        if len(value) != length:
            raise ValueError(
                f"{name} has {length} tokens, the one that ends it included, but `demonstration_logprobs` has "
                f"{len(value)} for it. Score the trace with the tokenizer of the policy."
            )
        if any(logp > 0 for logp in value):
            raise ValueError(
                f"{name}: `demonstration_logprobs` has a value above 0. They are logarithms of probabilities."
            )
        impossible = [logp for logp in value if not logp >= _MIN_LOGP]
        if impossible:
            raise ValueError(
                f"{name}: `demonstration_logprobs` has the value {impossible[0]}, which no author gives to a token of "
                f"its own: the minimum is {_MIN_LOGP:g}. Score the trace again, or leave it out."
            )
        return value

    def check_scores(self, value: Any, number: int, name: str, num_traces: int) -> list[float | None]:
        """The rewards of trace `number` of a row: one, or one for each reward function."""
        if self.field_name == "demonstrations":
            value = value[number] if isinstance(value, list) and len(value) == num_traces else None
        scores = value if isinstance(value, list) else [value]
        is_number = [score is None or (isinstance(score, float | int) and math.isfinite(score)) for score in scores]
        if set(scores) <= {None} or not all(is_number):
            raise ValueError(
                f"{name} has no number in `demonstration_rewards`, got {str(value)[:100]!r}. Give as many as "
                "there are traces, each a reward or a list with one for each reward function, or remove the column."
            )
        return scores

    def _render(self, prompt: Any, trace: Any, name: str, first: list[dict] | None = None) -> tuple[str, str, int]:
        """The text of the prompt, the text of the trace as it follows it, and the token id that ends the trace."""
        is_chat = is_conversational({"prompt": prompt})
        if isinstance(trace, str):
            content = trace
        elif (
            is_chat
            and isinstance(trace, list)
            and len(trace) == 1
            and isinstance(trace[0], dict)
            and trace[0].get("role") == "assistant"
            and isinstance(trace[0].get("content"), str)
            and not any(value for key, value in trace[0].items() if key not in ("role", "content"))
        ):
            content = trace[0]["content"]
        else:
            expected = "a string or a list of messages, the last of the assistant" if is_chat else "a string"
            raise ValueError(f"{name} must be {expected}, got {str(trace)[:100]!r}. Fix the row, or drop it.")

        if not is_chat:
            prompt_text, end_text, closing, end_id = prompt, "", "", self.eos_token_ids[0]
        else:
            prompt_text = self._apply_chat_template(prompt, name, add_generation_prompt=True)
            end_text, closing, end_id = self._find_end_of_turn(prompt, name)
            content = self.without_end(content).removesuffix(closing)
        text = without_doubled_think(prompt_text, content)
        if not text.strip():
            raise ValueError(f"{name} is empty. Remove it: a row without a trace has an empty list, or None.")
        contexts = self._contexts(prompt_text, prompt, first, name) if is_chat else {}
        for start, context in contexts.items():
            for message in _as_messages(text):
                turn = self._apply_chat_template([*context, message], name)
                rendered = turn.removeprefix(start).removesuffix(end_text)
                if turn.startswith(start) and _shows(rendered, text, content):
                    return prompt_text, rendered + closing, end_id
        return prompt_text, text + closing, end_id

    def _contexts(self, text: str, history: list[dict], prompt: list[dict] | None, name: str) -> dict[str, list[dict]]:
        """What a turn may be rendered after, by its text: all that was before it, then the prompt alone."""
        contexts = {text: history}
        if prompt is not None and len(prompt) < len(history):
            contexts[self._apply_chat_template(prompt, name, add_generation_prompt=True)] = prompt
        return contexts

    def find_suspicious(self, prompt: str | list[dict], value: Any, index: int) -> dict[str, str]:
        """What looks wrong about the traces of row `index` that can be used nonetheless, by the name of the trace."""
        traces, hints = self._traces(value, f"row {index}"), {}
        prompt_text = prompt if isinstance(prompt, str) else ""
        if traces and not isinstance(prompt, str):
            prompt_text = self._apply_chat_template(prompt, traces[0][1], add_generation_prompt=True)
        for trace, name in traces:
            text = trace
            if not isinstance(trace, str):
                text = trace[0].get("content") if is_conversational({"prompt": trace}) else None
            if not isinstance(text, str):
                continue  # an error, when it is tokenized
            if hint := suspicion(prompt, self.without_end(text), prompt_text):
                hints[name] = hint
        return hints

    def without_end(self, text: str) -> str:
        """A trace without the tokens that end generation at its end."""
        # The generation config may name tokens that the tokenizer does not have
        ends = tuple(filter(None, self.tokenizer.convert_ids_to_tokens(self.eos_token_ids)))
        while (stripped := text.rstrip()).endswith(ends):
            text = stripped.removesuffix(next(end for end in ends if stripped.endswith(end)))
        return text

    def _apply_chat_template(self, messages: list[dict], name: str, **kwargs) -> str:
        try:
            options = {**self.tools.options(self._environment), **kwargs, **self.chat_template_kwargs}
            if self.processor is not None:
                parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
                places = [part for part in parts if part.get("type") == "image" and "image" not in part]
                messages = prepare_multimodal_messages(messages, images=[None] * len(places))
            return (self.processor or self.tokenizer).apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template may raise anything
            raise ValueError(
                f"{name} cannot be rendered after its prompt: {error} Give the tokenizer a chat template that renders "
                "these messages and an assistant turn."
            ) from error

    def _find_end_of_turn(self, prompt: list[dict], name: str) -> tuple[str, str, int]:
        """What the chat template writes after a turn's text; its part before the token that ends generation; that."""
        if self._end_of_turn is None:
            marker = "MARKER"
            messages = [*prompt, {"role": "assistant", "content": marker}]
            turn = self._apply_chat_template(messages, name)
            # A template that does not show the turn does not say how it ends
            text = following = turn.rpartition(marker)[2] if marker in turn else ""
            if marker in turn and not text:  # GLM's turns end with what opens the next
                turn = self._apply_chat_template([*messages, {"role": "user", "content": "next"}], name)
                following = turn.rpartition(marker)[2].partition("next")[0]
            ids = self.tokenizer(following, add_special_tokens=False)["input_ids"]
            end_ids = [token_id for token_id in ids if token_id in self.eos_token_ids]
            if text and not end_ids:
                logger.warning(
                    f"The chat template ends an assistant turn with {text!r}, which does not end generation "
                    f"(`eos_token_id` is {self.eos_token_ids}). Demonstrations end with "
                    f"{self.tokenizer.eos_token!r} instead. If that is not what you want, set `tokenizer.eos_token`, "
                    "or `eos_token_id` in the model's generation config."
                )
            end_id = (end_ids or self.eos_token_ids)[0]
            closing = following.partition(self.tokenizer.decode(end_id))[0] if end_ids else ""
            self._end_of_turn = text, closing, end_id
        return self._end_of_turn

    def _tokenize(self, prompt_texts: list[str], trace_texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """The ids of each trace as the continuation of its prompt, whose own ids do not change."""
        if not prompt_texts:
            return []
        distinct = list(dict.fromkeys(prompt_texts))  # the traces of a row share theirs
        all_prompt_ids = dict(zip(distinct, encode(self.tokenizer, distinct, add_special_tokens), strict=True))
        full_texts = [prompt + trace for prompt, trace in zip(prompt_texts, trace_texts, strict=True)]
        all_full_ids = encode(self.tokenizer, full_texts, add_special_tokens)
        all_ids = []
        for prompt, full_ids, trace in zip(prompt_texts, all_full_ids, trace_texts, strict=True):
            prompt_ids = all_prompt_ids[prompt]
            if full_ids[: len(prompt_ids)] == prompt_ids:
                all_ids.append(full_ids[len(prompt_ids) :])
            else:  # a token spans the border, which generation after this prompt could not produce
                all_ids.append(self.tokenizer(trace, add_special_tokens=False)["input_ids"])
        return all_ids

    def _end_once(self, ids: list[int], end_id: int, name: str) -> list[int]:
        end = min((ids.index(token_id) for token_id in self.eos_token_ids if token_id in ids), default=None)
        if end == 0:
            raise ValueError(f"{name} is empty but for its end-of-sequence token. Remove it.")
        if not any(self.tokenizer.decode(part, skip_special_tokens=True).strip() for part in (ids[:16], ids[:end])):
            raise ValueError(
                f"{name} has no token with a text of its own: the tokenizer makes {len(ids[:end])} of it, which are "
                "white space or special. Remove the trace, or write it in characters that the tokenizer knows."
            )
        if end is None:
            return [*ids, end_id]
        if self.tokenizer.decode(ids[end + 1 :], skip_special_tokens=True).strip():
            raise ValueError(
                f"{name} goes on after its end-of-sequence token {self.tokenizer.decode(ids[end])!r}, where the "
                "policy would have stopped. Remove the token, or what follows it."
            )
        return ids[: end + 1]


def check_prompt(prompt: Any, index: int):
    """Raises a `ValueError` that names the row, if a prompt is neither a text nor chat messages that ask something."""
    hint = "Fix the row, or drop it."
    if isinstance(prompt, str) and prompt:
        if not _MESSAGES.match(prompt):
            return
        hint = "These are messages written as text. A csv file has no lists: write a .jsonl or .parquet file."
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        if "role" in prompt[0]:
            _check_roles([message.get("role") for message in prompt if isinstance(message, dict)], index)
            return
        if "from" in prompt[0]:
            hint = "Call `from` and `value` of a message `role` and `content`, 'human' 'user', and 'gpt' 'assistant'."
    raise ValueError(
        f"row {index}: `prompt` must be a string or a list of chat messages, got {str(prompt)[:100]!r}. {hint}"
    )


def _check_roles(roles: list[Any], index: int):
    if "human" in roles or "gpt" in roles:
        names = ", ".join(map(repr, dict.fromkeys(roles)))
        raise ValueError(
            f"row {index}: `prompt` has the roles {names}. Call them 'user' and 'assistant', as chat templates do."
        )
    if roles[-1] == "assistant":
        raise ValueError(
            f"row {index}: `prompt` ends with a message of the assistant, and must end with the user's. Move what the "
            "assistant says to `demonstrations`."
        )


def without_doubled_think(prompt_text: str, trace: str) -> str:
    r"""
    Takes the opening `<think>` off a trace if the rendered prompt already ends with it, whatever white space follows.

    Args:
        prompt_text (`str`):
            The prompt as the policy sees it.
        trace (`str`):
            The trace that follows it.

    Returns:
        `str`: The trace, not opening what the prompt has opened.
    """
    opened = _OPENED_THINKING.search(prompt_text)
    if opened is None or not trace.lstrip().startswith("<think>"):
        return trace
    trace = trace.lstrip().removeprefix("<think>")
    # The prompt's white space stands in place of the trace's
    return trace.removeprefix(opened[1]) if trace.startswith(opened[1]) else trace.lstrip()


def _as_messages(text: str) -> list[dict[str, str]]:
    """A trace as assistant messages: as it is, and, as Qwen3.8's template wants it, with its reasoning in a field."""
    messages = [{"role": "assistant", "content": text}]
    reasoning, closes, answer = text.partition("</think>")
    if closes:
        reasoning = reasoning.strip().removeprefix("<think>").strip()
        messages.append({"role": "assistant", "content": answer.strip(), "reasoning_content": reasoning})
    return messages


def _shows(rendered: str, text: str, trace: str) -> bool:
    """
    Whether a rendered turn shows the text of a trace. A template may change white space and write before the text, and
    what it makes of it is what the policy should learn. But it may not drop the reasoning, nor put `<think>` or
    `</think>` before that of the trace.
    """
    rendered, text = _squeeze(rendered), _squeeze(text)
    added = rendered.removesuffix(text)
    return (
        rendered.endswith(text)
        and not ("<think>" in added and "<think>" in trace)
        and not ("</think>" in added and ("<think>" in trace or "</think>" in trace))
    )


def _squeeze(text: str) -> str:
    """A text without the white space that a template may choose: at its ends, and around `<think>` and `</think>`."""
    for tag in ("<think>", "</think>"):
        text = tag.join(part.strip() for part in text.split(tag))
    return text


def load_generation_config(model: str | PreTrainedModel, **kwargs) -> GenerationConfig:
    """
    The generation config of a model, which need not be loaded for it.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            A model on the Hub, a local folder, or a model.
        **kwargs:
            Passed to `from_pretrained`: `revision`, `trust_remote_code`.

    Returns:
        [`~transformers.GenerationConfig`]: Its generation config, or what transformers makes where it has none.
    """
    if not isinstance(model, str):
        return model.generation_config
    try:
        return GenerationConfig.from_pretrained(model, **kwargs)
    except OSError:
        with loading_model(model):
            return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, **kwargs))


def find_eos_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig) -> list[int]:
    """
    The tokens that end a completion, as [`~trl.GRPOTrainer`] finds them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        generation_config ([`~transformers.GenerationConfig`]):
            The policy's generation config.

    Returns:
        `list[int]`: Token ids, the tokenizer's own first.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "`processing_class` has no end-of-sequence token, so demonstrations could not end. Set "
            "`tokenizer.eos_token` to the token that ends a completion, or let `luffy prepare-model` do it."
        )
    ids = generation_config.eos_token_id
    ids = [ids] if isinstance(ids, int) else ids or []
    return [tokenizer.eos_token_id, *(token_id for token_id in ids if token_id != tokenizer.eos_token_id)]


def check_prompt_column(dataset: Dataset | IterableDataset) -> list[str]:
    """
    Checks that a dataset has rows with a `prompt`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training data.

    Returns:
        `list[str]`: Its columns.

    Raises:
        ValueError: If it is empty, or has no such column.
    """
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError("`train_dataset` is empty. Check the file, the split and the filters that it went through.")
    columns = dataset.column_names or list(first_row)
    if "prompt" not in columns:
        conversation = next((name for name in ("messages", "conversations") if name in columns), None)
        remedy = "Rename the one with the problems."
        if conversation:
            remedy = (
                f"Split `{conversation}`: the messages up to the last user's are `prompt`, the answer `completion`. "
                "`luffy_trl.data.conversations.to_demonstration` does it, also where tools are called."
            )
        raise ValueError(f"`train_dataset` has no column `prompt`, only {columns}. {remedy}")
    return columns


def without_demonstrations(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a prepared dataset as TRL is to see it."""
    row = {key: value for key, value in row.items() if key not in DEMONSTRATION_COLUMNS}
    return {**row, "prompt": clean_prompt(row["prompt"])}


def check_columns(dataset: Dataset | IterableDataset, sees_images: bool = False) -> str:
    """
    Checks that a dataset has what training with demonstrations needs.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training data.
        sees_images (`bool`, *optional*, defaults to `False`):
            Whether the policy has a processor.

    Returns:
        `str`: The column with the traces, `"demonstrations"` or `"completion"`.

    Raises:
        ValueError: If it is empty, or a column is missing or too many.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        hint = " Pass one split of it, such as `dataset['train']`." if isinstance(dataset, dict) else ""
        raise ValueError(
            f"`train_dataset` must be a `Dataset` or an `IterableDataset`, got `{type(dataset).__name__}`.{hint}"
        )
    columns = check_prompt_column(dataset)
    images = {"image", "images"} & set(columns)
    if images and not sees_images:
        raise ValueError(
            f"`train_dataset` has the column {images.pop()!r}, and the policy has a tokenizer, which sees no images. "
            "Pass `processing_class=AutoProcessor.from_pretrained(...)` of a model that does, or remove the column."
        )
    present = [name for name in ("demonstrations", "completion") if name in columns]
    if len(present) != 1:
        raise ValueError(
            f"`train_dataset` has the columns {columns}. It must have exactly one of `demonstrations` (a list of "
            "traces for each prompt) and `completion` (one trace). Rename or remove a column, or set "
            "`num_demonstrations=0` to train without demonstrations."
        )
    if taken := set(columns) & set(DEMONSTRATION_COLUMNS):
        raise ValueError(f"`train_dataset` has columns that LuffyTrainer itself adds: {sorted(taken)}. Rename them.")
    return present[0]


def tokenize_demonstrations(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
    max_length: int,
    overflow: str = "drop",
    chat_template_kwargs: dict[str, Any] | None = None,
    tools: Tools | None = None,
    processor: ProcessorMixin | None = None,
) -> Dataset | IterableDataset:
    """
    Adds the columns of `DEMONSTRATION_COLUMNS` to a dataset. `datasets` caches the result of a dataset that lies on
    disk, so that the next run of the same data and tokenizer does no work.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt` and either `demonstrations` or `completion`.
        tokenizer, eos_token_ids, max_length, overflow, chat_template_kwargs, tools, processor:
            See [`DemonstrationTokenizer`].

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset with the added columns.

    Raises:
        ValueError: If the dataset has neither or both of the columns, or a row of it cannot be used.
    """
    state = PartialState()  # which accelerate's logger needs
    field_name = check_columns(dataset, sees_images=processor is not None)
    function = DemonstrationTokenizer(
        *(tokenizer, field_name, eos_token_ids, max_length, overflow, dict(chat_template_kwargs or {})),
        tools or Tools(),
        processor,
    )
    if isinstance(dataset, IterableDataset):
        features = dataset.features and Features({**dataset.features, **DEMONSTRATION_COLUMNS})

        def tokenize(rows, indices):
            return {**function(rows, indices), "demonstration_row": _identify(rows)}

        return dataset.map(tokenize, with_indices=True, batched=True, batch_size=64, features=features)

    _warn_of_suspicious(dataset, function)
    with state.main_process_first():
        dataset = dataset.map(
            function,
            with_indices=True,
            batched=True,
            features=Features({**dataset.features, **DEMONSTRATION_COLUMNS}),
            desc="Tokenizing demonstrations",
        )
    num_dropped = sum(dataset["demonstrations_dropped"])
    if num_dropped and not pc.max(pc.list_value_length(dataset.data.column("demonstration_ids"))).as_py():
        raise ValueError(
            f"All {num_dropped} traces have more tokens than `max_completion_length={max_length}`, so that none is "
            "left. Raise it, or set `demonstration_overflow='truncate'`. `luffy inspect` shows how long they are."
        )
    if num_dropped:
        logger.warning(
            f"{num_dropped} traces have more tokens than `max_completion_length={max_length}` and are dropped. "
            "`luffy inspect` shows how long they are."
        )
    return dataset


def count_images(rows: dict[str, list], position: int) -> int:
    """How many images a row of a batch has, in TRL's columns `images` and `image`."""
    if "images" in rows:
        return len(rows["images"][position] or [])
    return int("image" in rows and rows["image"][position] is not None)


def _identify(rows: dict[str, list]) -> list[int]:
    """A number for each row that depends on its content alone: each shard of a stream counts its rows from 0."""
    numbers = []
    for values in zip(*rows.values(), strict=True):
        text = json.dumps(values, default=_as_text)
        numbers.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True))
    return numbers


def _warn_of_suspicious(dataset: Dataset, function: DemonstrationTokenizer):
    rows = dataset[:_ROWS_LOOKED_AT]
    hints, num_traces = [], 0
    for row, (prompt, value) in enumerate(zip(rows["prompt"], rows[function.field_name], strict=True)):
        check_prompt(prompt, row)
        num_traces += len(function._traces(value, f"row {row}"))
        hints += [f"{name} {hint}" for name, hint in function.find_suspicious(prompt, value, row).items()]
    if hints:
        logger.warning(
            f"{len(hints)} of the {num_traces} traces of the first {len(rows['prompt'])} rows look wrong: {hints[0]} "
            "`luffy inspect` lists them."
        )


def suspicion(prompt: str | list[dict], trace: str, prompt_text: str) -> str | None:
    """
    What looks wrong about a trace that can be used nonetheless.

    Args:
        prompt (`str` or `list[dict]`):
            Its prompt.
        trace (`str`):
            Its text, without what ends it.
        prompt_text (`str`):
            The prompt as the policy sees it.

    Returns:
        `str` or `None`: What is wrong and how to fix it, or `None`.
    """
    if markup := _MARKUP.search(trace):
        return (
            f"holds {markup[0]!r}, the markup of a chat template. A trace is only what follows the rendered prompt, "
            "and the token that ends it is added: take the markup out."
        )
    question = prompt if isinstance(prompt, str) else prompt[-1].get("content")
    if isinstance(question, str) and question.strip() and trace.strip().startswith(question.strip()):
        return "begins with its own prompt, which the policy would learn to repeat. A trace is only what follows it."
    if _CLOSED_THINKING.search(prompt_text) and ("<think>" in trace or "</think>" in trace):
        return (
            "reasons, but the rendered prompt ends with a closed, empty `<think></think>`. Take the reasoning out of "
            "the trace, or let the chat template think (`chat_template_kwargs`, such as `enable_thinking`)."
        )
    if _OPENED_THINKING.search(prompt_text) and "</think>" not in trace:
        return (
            "never closes the `<think>` that the rendered prompt opens. Put `</think>` between its reasoning and its "
            "answer, or use a chat template or `chat_template_kwargs` that do not open it."
        )
    return None


def _as_text(value: Any) -> Any:
    """What stands for the content of a value that JSON does not know."""
    if hasattr(value, "tobytes") and hasattr(value, "size") and not hasattr(value, "tolist"):  # an image
        return f"{value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def decode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    prompt_ids: list[int],
    ids: list[int],
    turns: Turns | None = None,
    tools: list | None = None,
) -> str | list[dict]:
    """
    A completion as reward functions see it, decoded as [`~trl.GRPOTrainer`] does it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        prompt (`str` or `list[dict]`):
            The prompt, plain or conversational.
        prompt_ids (`list[int]`):
            Its token ids.
        ids (`list[int]`):
            Token ids of the completion.
        turns ([`~luffy_trl.turns.Turns`], *optional*):
            Where it has several.
        tools (`list`, *optional*):
            Those of the run, for the types of the arguments of calls.

    Returns:
        `str` or `list[dict]`: A text, or messages: one of the assistant, or those of the turns.
    """
    if turns is not None:
        return turns.messages(tokenizer, prompt_ids, ids, tools)
    if not is_conversational({"prompt": prompt}):
        return decode(tokenizer, ids, skip_special_tokens=True)
    if getattr(tokenizer, "response_template", None) or getattr(tokenizer, "response_schema", None):
        return [parse_response(tokenizer, ids, prefix=prompt_ids, tools=tools)]
    return [{"role": "assistant", "content": decode(tokenizer, ids, skip_special_tokens=True)}]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], **kwargs) -> str:
    """`tokenizer.decode`, which would look at each number of a list in Python, and takes an array as it is."""
    return tokenizer.decode(np.asarray(ids), **kwargs)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """`tokenizer(texts)["input_ids"]`, without the offsets of each token, which take as long as the ids."""
    if not texts:
        return []
    methods = [getattr(type(tokenizer), name, None) for name in ("__call__", "_encode_plus")]
    if methods != [PreTrainedTokenizerBase.__call__, PreTrainedTokenizerFast._encode_plus]:  # one has its own
        return tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    # The first goes through `transformers`, which turns off truncation and padding for the others
    ids = tokenizer(texts[:1], add_special_tokens=add_special_tokens)["input_ids"]
    others = tokenizer.backend_tokenizer.encode_batch_fast(texts[1:], add_special_tokens=add_special_tokens)
    return ids + [encoding.ids for encoding in others]


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """
    The token ids of a prompt, as [`~trl.GRPOTrainer`] makes them. [`tokenize_prompts`] is faster for many.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        prompt (`str` or `list[dict]`):
            The prompt, plain or conversational.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the chat template.

    Returns:
        `list[int]`: Its token ids, with the opening of the assistant's turn.

    Raises:
        ValueError: If a conversational prompt meets a tokenizer without a chat template.
    """
    if is_conversational({"prompt": prompt}):
        if tokenizer.chat_template is None:
            raise ValueError(
                "The prompts are chat messages, and the tokenizer has no chat template. `luffy prepare-model` gives a "
                "base model one; for another, make `prompt` a string, rendered as the model wants it."
            )
        return tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False, **(chat_template_kwargs or {})
        )
    return tokenizer(prompt)["input_ids"]


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str | list[dict]],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """[`tokenize_prompt`] of many, in a fraction of the time."""
    kinds = {is_conversational({"prompt": prompt}) for prompt in prompts}
    if len(kinds) > 1 or (True in kinds and tokenizer.chat_template is None):
        return [tokenize_prompt(tokenizer, prompt, chat_template_kwargs) for prompt in prompts]
    texts: list[Any] = prompts
    if True in kinds:
        options = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
        texts = [tokenizer.apply_chat_template(prompt, tokenize=False, **options) for prompt in prompts]
    return encode(tokenizer, texts, add_special_tokens=False in kinds)


def _labels(ids: list[int], turns: str | None) -> list[int]:
    """The labels of a trace: -100 on what tools have answered."""
    if not turns:
        return ids
    mask = Turns.from_json(turns).mask(len(ids))
    return [token_id if acted else -100 for token_id, acted in zip(ids, mask, strict=True)]


def to_supervised(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset | IterableDataset:
    """
    Turns tokenized demonstrations into rows for [`~trl.SFTTrainer`]: the tokens that LUFFY shows, a trace a row.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            What [`tokenize_demonstrations`] returns.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the chat template.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: Rows of `input_ids` (prompt and trace), `labels` (-100
        on the prompt) and `demonstration_row` (the number of the row that the trace came from; in a stream, one that
        stands for its content).
    """

    def expand(rows):
        all_prompt_ids = tokenize_prompts(tokenizer, rows["prompt"], chat_template_kwargs)
        columns = (rows[name] for name in ("demonstration_ids", "demonstration_turns", "demonstration_row"))
        shown = [
            (prompt_ids, ids, _labels(ids, written), number)
            for prompt_ids, traces, turns, number in zip(all_prompt_ids, *columns, strict=True)
            for ids, written in zip_longest(traces, turns)
        ]
        return {
            "input_ids": [prompt_ids + ids for prompt_ids, ids, _, _ in shown],
            "labels": [[-100] * len(prompt_ids) + labels for prompt_ids, _, labels, _ in shown],
            "demonstration_row": [number for _, _, _, number in shown],
        }

    names = dataset.column_names or list(next(iter(dataset)))
    if isinstance(dataset, IterableDataset):
        return dataset.map(expand, batched=True, remove_columns=names)
    with PartialState().main_process_first():
        return dataset.map(expand, batched=True, remove_columns=names, desc="Joining prompts and traces")
