# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Make reasoning traces for problems with a teacher behind an OpenAI-compatible endpoint, and keep those that are right.

    vllm serve deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --reasoning-parser deepseek_r1
    python -m luffy_trl.data.generate --dataset_name problems.jsonl --output_dir data/my_traces --num_traces 4 \
        --base_url http://localhost:8000/v1 --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B

Every answer of the teacher goes to a journal beside the output at once. A run that was ended, however that was, goes
on where it stood when it is started again, and asks for nothing twice.
"""

import asyncio
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from tqdm.auto import tqdm

from ..arguments import Parser
from ..endpoints import Endpoint
from ..errors import TO_CONTINUE, in_one_line, in_one_line_if_interrupted, run_async
from ..journal import Journal
from ..options import described
from ..redaction import without_credentials
from .openr1 import Checker, OpenR1Arguments, Report, locked, stream, to_row, write_training_data


try:
    import openai
except ImportError as error:
    raise ImportError("To ask a teacher for traces, openai is needed: `pip install luffy-trl[data]`.") from error


_MAX_WAIT = 3600.0  # seconds: an endpoint that asks for more is asked again
_failure: ContextVar[str | None] = ContextVar("failure", default=None)  # of the request that this task repeats


@described
@dataclass(kw_only=True)
class GenerateArguments(OpenR1Arguments):
    r"""
    Arguments of the command, beside those of [`~luffy_trl.data.openr1.OpenR1Arguments`]. Rows of `dataset_name` need
    `prompt` (or `problem`) and `answer`; traces that they have are not read.

    Args:
        base_url (`str`):
            The endpoint, up to `/v1`.
        model (`str`):
            Name of the teacher there.
        api_key_env (`str`, *optional*):
            Environment variable that holds the key. Without it, none is sent.
        num_traces (`int`, *optional*, defaults to `1`):
            Traces to ask for, for each problem.
        temperature (`float`, *optional*, defaults to `0.6`):
            Sampling temperature.
        top_p (`float`, *optional*, defaults to `0.95`):
            Sampling threshold.
        max_tokens (`int`, *optional*, defaults to `8192`):
            Maximum number of tokens of an answer, as the teacher counts them. One that is cut is dropped.
        instruction (`str`, *optional*):
            What the teacher is told behind the question; it does not go into the data. By default to reason step by
            step, and to put the final answer within `\boxed{}`.
        send_system_prompt (`bool`, *optional*, defaults to `False`):
            Whether the teacher sees the system message of a prompt. It was written for the policy.
        concurrency (`int`, *optional*, defaults to `16`):
            Maximum number of requests under way at once.
        requests_per_minute (`float`, *optional*):
            Maximum number of requests that are started in a minute.
        timeout (`float`, *optional*, defaults to `1800.0`):
            Seconds to wait for an answer.
        max_retries (`int`, *optional*, defaults to `8`):
            How often to repeat a request that fails for the time being: no connection, no answer, 408, 409, 429 or
            5xx. Waits double from half a second to eight, or are what the endpoint asks for (`Retry-After`, an hour at
            most).
        journal_file (`str`, *optional*):
            Where answers are kept. Defaults to the output folder's name and `.journal.jsonl`.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    num_traces: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 8192
    instruction: str = "Please reason step by step, and put your final answer within \\boxed{}."
    send_system_prompt: bool = False
    concurrency: int = 16
    requests_per_minute: float | None = None
    timeout: float = 1800.0
    max_retries: int = 8
    journal_file: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.verify == "flags":
            raise ValueError("`verify='flags'` is for traces that a dataset brings. Use 'math_verify' or 'none'.")
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"`base_url` must begin with http:// or https://, got {self.base_url.rpartition('@')[2]!r}."
            )
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ValueError(f"`api_key_env` names the environment variable {self.api_key_env}, which is not set.")
        if not re.fullmatch("[!-~]*", self.api_key):
            raise ValueError(
                f"`api_key_env`: the value of {self.api_key_env} has white space, or characters that are not ASCII, "
                "which no key has. Set it to the key alone."
            )
        for name, least in (("num_traces", 1), ("max_tokens", 1), ("concurrency", 1), ("max_retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        for name in ("timeout", "requests_per_minute"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        if self.journal_file is None:
            self.journal_file = f"{self.output_dir.rstrip('/')}.journal.jsonl"

    @property
    def api_key(self) -> str:
        """The key, empty if there is none. It is no field: fields are written to the report."""
        return os.environ[self.api_key_env] if self.api_key_env else ""


class Pace:
    """
    When a request may start: evenly spread over a minute, and none before the time that the endpoint has asked for.
    """

    def __init__(self, requests_per_minute: float | None = None):
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = self._not_before = 0.0

    def hold(self, seconds: float):
        """Lets no request start for some seconds."""
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    async def wait(self):
        """Waits for the turn of a request."""
        while (delay := max(self._next, self._not_before) - time.monotonic()) > 0:
            await asyncio.sleep(delay)
        self._next = time.monotonic() + self._interval


class Refused(RuntimeError):
    """The endpoint will not answer this request, however often it is repeated."""


class _PacedClient(openai.DefaultAsyncHttpxClient):
    """Starts each request, also one that the client repeats, when it may start, and counts it."""

    def __init__(self, pace: Pace, counts: Counter, **kwargs):
        super().__init__(**kwargs)
        self._pace, self._counts = pace, counts

    async def send(self, request, **kwargs):
        """Sends a request, in its turn."""
        await self._pace.wait()
        self._counts["sent"] += 1
        if failure := _failure.get():
            self._counts[f"repeated after {failure}"] += 1
        try:
            response = await super().send(request, **kwargs)
        except Exception as error:
            _failure.set(type(error).__name__)
            raise
        if response.is_error:
            _failure.set(str(response.status_code))
            if (seconds := retry_after(response)) is not None:
                self._pace.hold(seconds)  # what is too much from one request is too much from all
                del response.headers["retry-after"]  # of more than two minutes the client would give up
        return response


class Teacher:
    """Asks the endpoint."""

    def __init__(self, args: GenerateArguments):
        self.args = args
        self.counts: Counter[str] = Counter()
        self.endpoint = Endpoint(args.base_url, args.api_key)
        http_client = _PacedClient(Pace(args.requests_per_minute), self.counts, **self.endpoint.http_options)
        self.client = openai.AsyncOpenAI(
            **self.endpoint.client_options(args.timeout, args.max_retries), http_client=http_client
        )

    async def ask(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """
        Asks for one trace: its `trace`, `finish_reason` and `usage`. Raises `Refused` if the endpoint refuses the
        request, and an `openai.APIError` if it still fails after `max_retries` repetitions.
        """
        payload: dict[str, Any] = {
            name: getattr(self.args, name) for name in ("model", "temperature", "top_p", "max_tokens")
        }
        _failure.set(None)
        try:
            answered = await self.client.chat.completions.with_raw_response.create(messages=messages, **payload)
        except openai.APIStatusError as error:
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                raise
            response = error.response
            status = f"{response.status_code} {response.reason_phrase}"
            reason = self.endpoint.hide(f"{status}: {self._redirection(response) or response.text}")
            raise Refused(reason[:500]) from None
        answer = read_answer(answered.http_response)
        hidden = self.endpoint.hide.answer(answer)
        if hidden != answer:
            self.counts["with the key in the answer, taken out"] += 1
        return hidden

    def _redirection(self, response) -> str:
        """What to do about a redirect, which is not followed: a key would go with it."""
        target = self.endpoint.redirection(response)
        if target == "":
            return "it redirects to what is no address"
        advice = f"If you trust it, set `base_url` to {(target or '').removesuffix('/chat/completions')}"
        return f"it redirects to {target}. {advice}" if target else ""


def _name(error: openai.APIError) -> str:
    if isinstance(error, openai.APIStatusError):
        return str(error.status_code)
    return type(error.__cause__ if isinstance(error, openai.APIConnectionError) else error).__name__


def retry_after(response) -> float | None:
    """
    The seconds that the endpoint asks us to wait, an hour at most; `None` if it does not ask. The header has seconds
    or a date.
    """
    value = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(0.0, seconds), _MAX_WAIT)


def read_answer(response) -> dict[str, Any]:
    """
    Reads `trace`, `finish_reason` and `usage` from a chat completion, with the reasoning that some servers return
    beside the answer.
    """
    try:
        body = response.json()
        choice = body["choices"][0]
        message = choice["message"]
        reasoning = _text(message.get("reasoning_content") or message.get("reasoning"))
        trace = _text(message.get("content"))
        if reasoning:
            trace = f"<think>\n{reasoning.strip()}\n</think>\n\n{trace.strip()}"
        elif "</think>" in trace and "<think>" not in trace:  # the teacher's template had opened it
            trace = f"<think>\n{trace.lstrip()}"
        return {"trace": trace, "finish_reason": choice.get("finish_reason"), "usage": body.get("usage")}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        message = f"not a chat completion: {response.text[:200]!r}"
        raise openai.APIResponseValidationError(response, None, message=message) from error


def _text(content: str | list[dict[str, Any]] | None) -> str:
    """The text of a message, which some servers give in parts, without what is no character."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise TypeError(f"content of type {type(content).__name__}")
    return (content or "").encode(errors="replace").decode()


def teacher_messages(row: dict[str, Any], args: GenerateArguments) -> list[dict[str, str]]:
    """The chat messages that the teacher gets for a row."""
    prompt = row["prompt"]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [dict(message) for message in prompt if args.send_system_prompt or message["role"] != "system"]
    if args.instruction:
        messages[-1]["content"] += f"\n\n{args.instruction}"
    return messages


def request_key(messages: list[dict[str, str]], number: int, args: GenerateArguments) -> str:
    """
    The hash that names a request in the journal: the messages, the model, its sampling parameters, and which of the
    `num_traces` it is.
    """
    request = [messages, number, args.model, args.temperature, args.top_p, args.max_tokens]
    return hashlib.blake2b(json.dumps(request).encode(), digest_size=16).hexdigest()


def _rows(args: GenerateArguments) -> Iterator[dict[str, Any]]:
    for number, raw in enumerate(stream(args.dataset_name, args.dataset_split, args.dataset_config)):
        yield to_row(raw, number, args.system_prompt)


def _requests(args: GenerateArguments, checker: Checker) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Key and messages of every request that is worth its price."""
    for row in _rows(args):
        if checker.check_row(row) is None:
            messages = teacher_messages(row, args)
            yield from ((request_key(messages, number, args), messages) for number in range(args.num_traces))


async def ask_all(args: GenerateArguments, checker: Checker, journal: Journal) -> Counter:
    """
    Asks for every trace that the journal does not have; returns how many requests ended in which way. A row that
    cannot be read is an error before anything is asked.
    """
    keys = {key: key in journal for key, _ in _requests(args, checker)}
    progress = tqdm(total=len(keys), initial=sum(keys.values()), desc="Asking the teacher", unit=" traces")
    requests, under_way = _requests(args, checker), set()

    async def work():
        for key, messages in requests:
            if key in journal or key in under_way:
                continue
            under_way.add(key)
            try:
                answer = await teacher.ask(messages)
            except Refused as error:
                if not teacher.counts["answered"] or str(error)[:3] in ("401", "403", "404") or str(error)[0] == "3":
                    raise
                teacher.counts[f"refused with {str(error)[:3]}"] += 1
            except openai.APIError as error:
                teacher.counts[f"given up after {_name(error)}"] += 1
            else:
                journal.add({"key": key, **answer})
                teacher.counts["answered"] += 1
            progress.update()

    teacher = Teacher(args)
    async with teacher.client:
        teacher.counts["in the journal"] = sum(keys.values())
        with progress:
            async with asyncio.TaskGroup() as group:
                for _ in range(args.concurrency):
                    group.create_task(work())
    return teacher.counts


def main(args: GenerateArguments) -> Report:
    """Asks the teacher for what is missing, and writes what is right."""
    with locked("output_dir", args.output_dir), locked("journal_file", args.journal_file):
        args.check_output_dir()  # a run that has just ended may have written it
        return _run(args, Checker(args), Journal(args.journal_file))


def _run(args: GenerateArguments, checker: Checker, journal: Journal) -> Report:
    address = without_credentials(args.base_url)
    try:
        counts = run_async(ask_all(args, checker, journal))
    except ExceptionGroup as group:
        refused, others = group.split(Refused)
        if others:
            raise
        raise SystemExit(f"The endpoint {address} refuses a request: {refused.exceptions[0]}") from None
    failures = {name: number for name, number in counts.items() if name.startswith(("refused", "given up"))}
    if failures and not counts["answered"] and not counts["in the journal"]:
        listed = ", ".join(f"{number} {name}" for name, number in failures.items())
        raise SystemExit(
            f"The endpoint {address} has answered none of {sum(failures.values())} requests: {listed}. Check that it "
            "is up and that `base_url` is its address up to /v1, or raise `timeout`."
        )

    def rows():
        for row in _rows(args):
            messages = teacher_messages(row, args)
            keys = [request_key(messages, number, args) for number in range(args.num_traces)]
            answers = [journal[key] for key in keys if key in journal]
            row["demonstrations"] = [answer["trace"] for answer in answers]
            row["complete"] = [answer["finish_reason"] in ("stop", None) for answer in answers]
            row["correct"] = [None] * len(answers)
            yield row

    source = f"`{args.dataset_name}` and `{args.model}`"
    report = write_training_data(rows(), args, source, checker=checker, requests=dict(counts))
    if failures:
        print(
            f"{sum(failures.values())} requests got no answer. To ask for these again, and for these only, run the "
            "command once more, with `--overwrite_output_dir`."
        )
    return report


if __name__ == "__main__":
    with in_one_line_if_interrupted(TO_CONTINUE["generate"]), in_one_line():
        main(*Parser(GenerateArguments, prog="luffy prepare-data generate").parse_args_into_dataclasses())
