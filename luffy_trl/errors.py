# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""How a mistake is told: in one line, which says what to do."""

import asyncio
import hashlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


_PACKAGE = Path(__file__).parent
_PARSERS = ("parse_args_and_config", "parse_args_into_dataclasses")
INTERRUPTED = 130  # the exit status of a command that Ctrl-C has ended
TO_RESUME = "Continue from the last checkpoint, if there is one, with `--resume_from_checkpoint true`."
TO_CONTINUE = {  # an interrupted command
    "train": TO_RESUME,
    "sft": TO_RESUME,
    "eval": "Continue with the same command: what was generated is in `output_dir`.",
    "generate": "Continue with the same command: the answers until now are in the journal.",
}


@contextmanager
def in_one_line() -> Iterator[None]:
    """
    Ends a command with one line where it refuses what it was given: by a `raise` of this package, or while it reads
    its arguments. What nobody has foreseen keeps its traceback. Of several processes, one says what all would say.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        is_ours = Path(frames[-1].filename).is_relative_to(_PACKAGE) and (frames[-1].line or "").startswith("raise ")
        is_refused = isinstance(error, ValueError | ImportError) and is_ours
        if not is_refused and not any(frame.name in _PARSERS for frame in frames):
            raise
        message = f"{type(error).__name__}: {error}"
        raise SystemExit(message if _is_first_to_say(message) else 1) from None


@contextmanager
def in_one_line_if_interrupted(hint: str = "") -> Iterator[None]:
    """
    Ends a command that Ctrl-C interrupts with one line and the exit status 130.

    While a library is imported, it ends at once: an exception that reaches C++ code there would abort the process.
    """

    def say():
        message = f"Interrupted. {hint}".strip()
        if _is_first_to_say(message):
            print(f"\n{message}", file=sys.stderr, flush=True)

    def interrupt(signal_number: int, frame: FrameType | None):
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib."):
                say()
                os._exit(INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    with _handler_of_interrupts(interrupt):
        try:
            yield
        except KeyboardInterrupt:
            say()
            raise SystemExit(INTERRUPTED) from None


def run_async(coroutine: Coroutine) -> Any:
    """`asyncio.run`, which cancels what is under way at Ctrl-C only where Python's own handler stands."""
    with _handler_of_interrupts(signal.default_int_handler):
        return asyncio.run(coroutine)


@contextmanager
def _handler_of_interrupts(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    old = signal.getsignal(signal.SIGINT)
    is_ours = old is signal.default_int_handler or getattr(old, "__module__", None) == __name__
    if not is_ours or threading.current_thread() is not threading.main_thread():  # the only one that may set handlers
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def _is_first_to_say(message: str) -> bool:
    """Whether no other process of the same launcher, on this machine, has said this yet."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # of this process alone, in a folder that all share
    if not error_file:
        return True
    said = Path(error_file).parent.parent / f"said-{hashlib.sha256(message.encode()).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass  # twice is better than never
    return True


@contextmanager
def loading_model(name: str, option: str = "model_name_or_path") -> Iterator[None]:
    """Says which model cannot be loaded, where `transformers` guesses in many lines what a name may have meant."""
    try:
        yield
    except (OSError, ValueError) as error:
        what = (
            "is a folder without a model that can be loaded"
            if Path(name).is_dir()
            else ("is no folder here, and no model on the Hub that can be loaded")
        )
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"`{option}`: {name!r} {what}. {type(error).__name__}: {reason}") from error
