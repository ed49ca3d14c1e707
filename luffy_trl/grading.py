# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What a text answers, and whether that is right: multiple choice by letter, and mathematics by math-verify, in worker
processes with a hard limit on time and memory.

A worker runs this file as a script: it starts in the time that math-verify takes to import, without torch, and neither
forks a process that holds CUDA or gloo nor imports the user's main module a second time.
"""

import functools
import logging
import math
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NamedTuple


_BOX = re.compile(r"\\(?:boxed|fbox)\s*{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is none
_ANCHOR = re.compile(r"\\boxed|(?<!\\)\$")
_PROSE = re.compile(r"####|(?:^|\s)[A-Za-z]{3,}(?=[\s.,:;]|$)")

# Everyday ways of writing that math-verify cannot read
_LOOKS = re.compile(  # of the same answer: its colour and size
    r"\\(?:textcolor|colorbox|color)\s*\{[^{}]*\}"
    r"|\\(?:underline|boldsymbol|bm|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])"
)
_FULL_STOP = re.compile(r"(?<![\\{])[.,]\s*(?=\}|\$|\\[)\]]|\Z)")  # or a comma; `{,}` and `,\}` stay
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,;:! ]|[ ~])\d{3})+(?!\d)")
_NUMBER_AS_TEXT = re.compile(r"(\\boxed\{)?\\(?:text|math)[a-z]*\s*\{\s*(-?[\d.,]+)\s*\}(\}?)")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,99})\.(\d{0,99})\\(?:overline|bar|dot)\s*(?:\{\s*(\d{1,99})\s*\}|(\d))")
_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre;cm centimeter centimetre;m meter metre;km kilometer kilometre;in inch inche"
        ";ft foot feet;yd yard;mi mile;mg milligram;g gram;kg kilogram;lb pound;oz ounce;ml mL milliliter millilitre"
        ";l L liter litre;s sec second;min minute;h hr hour;day;week;month;year yr;dollar;cent"
    ).split(";")
    for name in names.split()
}
_NO_UNIT = (
    "and|or|percent|percentage|pct|hundred|thousand|million|billion|trillion|dozen|half|halves|thirds?|quarters?|squared"
    "|cubed|factorial|times|over|plus|minus|sin|cos|tan|log|exp|sqrt|alpha|beta|theta|infinity"
)
_WORD = rf"(?:{'|'.join(name for name in _UNITS if len(name) == 2)}|(?!(?:{_NO_UNIT})\b)[A-Za-z]{{3,}})"
_COUNTED = re.compile(  # a number and what it counts: `12 dollars`, of which math-verify knows some
    rf"((?:\\boxed\{{)?(?:[^A-Za-z\\]|\\[A-Za-z]+|\\[^A-Za-z])*[\d}}])\s+({_WORD}(?:\s+{_WORD})*)\s*(\}}?)"
)

# Differences that math-verify does not see
_BASE = re.compile(r"\s*\(?\w+?\)?_\{?(\d+)\}?\s*")
_CAPITALS = re.compile(r"(?:\\(?:text|math)[a-z]*\s*\{\s*)?([A-Z]{2,})\s*\}?")
_EQUATION = re.compile(r"\s*-?\d+(?:\.\d+)?\s*(?:=\s*-?\d+(?:\.\d+)?\s*)+")
_REPEATED = re.compile(r"\s*(.+?)\s*(?:,\s*\1\s*)+")
_COMMAND = re.compile(r"\\[A-Za-z]+|\\.|[{}~$]")
_QUANTITY = re.compile(r"(?<![\d.])(\d++(?:\.\d++)?)\s*([A-Za-z]++)\s*(?:,|\+|and\b)?")
_UNIT = re.compile(r"[^A-Za-z]*\d[^A-Za-z]*?([A-Za-z]+?)s?\s*(?:\^\s*(\d))?\s*")

# Multiple choice
_WRAPPER = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mathsf|operatorname)\s*\{([^{}]*)\}")
_MARKUP = re.compile(r"[*_`$]|\\[(),;! ]")
_OPTION = r"(?:(?:option|choice|letter)\s*:?\s*)?"
_LETTER = re.compile(_OPTION + r"[(\[{]*(?-i:([A-Z]))(?![A-Za-z'’])", re.IGNORECASE)
_STATEMENT = re.compile(
    r"\b(?:answer|(?:correct|right|best)\s+(?:option|choice|letter))\s*"
    r"(?::|(?:is|would\s+be|must\s+be|should\s+be)\b)\s*(?:(?:therefore|thus|hence)\b,?)?\s*:?\s*(?:the\s+)?",
    re.IGNORECASE,
)
# A further letter: `or B`, `/ (B)`, `, B`. The words `A` and `I` are none.
_ANOTHER = re.compile(
    r"[)\]}.]*\s*(?:(?:,|/|;|&|\bor\b|\band\b)\s*)+"
    + _OPTION
    + r"[(\[{]*(?-i:([B-HJ-Z]|[AI](?!\s+[a-z])))(?![A-Za-z'’])",
    re.IGNORECASE,
)
_LABEL = re.compile(r"(?:,|/|;|&|\bor\b|\band\b)\s*[(\[]([A-Z])[)\]]")  # behind an option: `(C) 5 or (D) 6`

_START_LIMIT = 120  # seconds; Python may be on a slow network disk
_START_ATTEMPTS = 3
_MAX_CALLS_AT_ONCE = 16


# ---------------------------------------------------------------------------------------------- what a text answers


def final_answer(text: str, opened: bool = False, require_think: bool = False) -> str | None:
    """
    The answer in a completion: the text between the first and the second `</think>`, or all of it; `None` if its
    reasoning has no end. If the prompt has `opened` a `<think>`, the completion is reasoning until it says `</think>`.
    """
    parts = text.split("</think>")
    if len(parts) > 1:
        return parts[1]
    unfinished = opened or require_think or text.lstrip().startswith("<think>")
    return None if unfinished else text


def find_boxes(text: str) -> Iterator[tuple[str, int | None]]:
    r"""The content of each `\boxed{}` and `\fbox{}`, and where it ends: `None` of the last one if it is not closed."""
    start = _BOX.search(text)
    while start:
        end = _closing_brace(text, start.end())
        # math-verify would drop what stands beside a box inside of a box
        yield _BOX.sub("{", text[start.end() : end].strip()), end
        start = None if end is None else _BOX.search(text, end)


def _closing_brace(text: str, start: int) -> int | None:
    """Where the brace is closed that was opened just before."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def extract_choice(text: str) -> str | None:
    """
    The letter that an answer to a multiple choice question chooses; `None` if there is none, or several. A box comes
    before a statement such as `the answer is (C)`, and that before a last line that is a letter and nothing else.
    """
    letters = set().union(*(_letters(_plain(content), alone=True) for content, _ in find_boxes(text)))
    if not letters:
        plain = _plain(text)
        letters = set().union(*(_letters(plain[match.end() :]) for match in _STATEMENT.finditer(plain)))
    if not letters:
        last_line = plain.strip().split("\n")[-1]
        letters = _letters(last_line.strip(), alone=True) if re.fullmatch(r"\W*\w\W*", last_line) else set()
    return letters.pop() if len(letters) == 1 else None


def _plain(text: str) -> str:
    text = _LOOKS.sub("", text)
    while (unwrapped := _WRAPPER.sub(r"\1", text)) != text:
        text = unwrapped
    return _MARKUP.sub("", text).strip()


def _letters(text: str, alone: bool = False) -> set[str]:
    """The letters that a text begins with: `C) 4 eV` has one, `A or B` two. `alone`: an `E = 4` has none."""
    match = _LETTER.match(text)
    if match is None:
        return set()
    letters, rest = {match[1]}, text[match.end() :]
    while match := _ANOTHER.match(rest):
        letters.add(match[1])
        rest = rest[match.end() :]
    if not alone:
        return letters
    return letters.union(_LABEL.findall(rest)) if re.match(r"\s*([)\]}.:,]|$)", rest) else set()


# -------------------------------------------------------------------------------------------- whether that is right


class _Reader:
    """math-verify, which the processes import that grade, and no other."""

    def __init__(self):
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
        from sympy import Float, Rational, evaluate

        def exact(text, extraction_config, **kwargs):
            parsed = parse(text, extraction_config, parsing_timeout=None, **kwargs)
            # Decimals as they are written: math-verify would round them to six places
            with evaluate(False):  # `2.0 = 2` stays an equation
                return [
                    value
                    if isinstance(value, str)
                    else value.xreplace({x: Rational(str(x)) for x in value.atoms(Float)})
                    for value in parsed
                ]

        # LaTeX only, and what is boxed before anything else
        self.latex = functools.partial(exact, extraction_config=(LatexExtractionConfig(boxed_match_priority=0),))
        self.latex_or_text = functools.partial(
            exact, extraction_config=(LatexExtractionConfig(), ExprExtractionConfig())
        )
        # Fifty digits: with fifteen, all that is below 1e-15 would be equal
        self.verify = functools.partial(
            verify, numeric_precision=50, allow_set_relation_comp=True, timeout_seconds=None
        )


_reader = functools.cache(_Reader)


def grade(gold: str, answers: tuple[str, ...]) -> bool | None:
    """
    Whether all boxes of an answer, one by one or together as the list `a,b`, equal the gold answer, by math-verify;
    `None` if that cannot be parsed. A final full stop, colours and spaces between thousands do not count, another unit
    or base does. Has no limits: call it in a [`WorkerPool`].
    """
    gold, answers = _tidy(gold), tuple(_tidy(answer) for answer in answers)
    parsed_gold = _parse_gold(gold)
    if not parsed_gold:
        return None

    def is_equal(answer):
        parsed = _reader().latex(answer, extraction_mode="first_match")
        return _reader().verify(parsed_gold, parsed)

    choice = re.fullmatch(r"\W*([A-Z])\W*", _plain(_content(gold)))

    def is_right(answer):
        if choice and answer.startswith(r"\boxed{") and _letters(_plain(_content(answer)), alone=True) == {choice[1]}:
            return True
        quantities = _quantities(_content(gold)), _quantities(_content(answer))
        if any(quantities):
            return quantities[0] == quantities[1]
        if not is_equal(answer) or _differs(_content(gold), _content(answer)):
            return False
        repeated = _REPEATED.fullmatch(_content(answer))
        return not repeated or bool(_REPEATED.fullmatch(_content(gold))) or not is_equal(rf"\boxed{{{repeated[1]}}}")

    if not answers:
        return False
    if all(is_right(answer) for answer in answers):
        return True
    if len(answers) == 1 or any(is_equal(answer) for answer in answers):
        return False
    return is_equal("".join(answers))  # math-verify reads adjacent boxes as a list


def _tidy(text: str) -> str:
    """A gold answer or an answer as math-verify can read it: no colour, no full stop, digits in one group."""
    text = _FULL_STOP.sub("", _LOOKS.sub("", text).replace(r"\varnothing", r"\emptyset"))
    if number := _NUMBER_AS_TEXT.fullmatch(text):
        text = rf"{number[1] or ''}{number[2]}{number[3]}"
    text = _REPEATING.sub(_as_fraction, text)
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    if text.startswith(r"\boxed{{") and text.endswith("}}"):  # of a colour
        content = _content(text)
        is_pair = _closing_brace(content, 1) == len(content) - 1
        text = rf"\boxed{{{content[1:-1] if is_pair else content}}}"
    counted = _COUNTED.fullmatch(text)
    return rf"{counted[1]}\text{{ {counted[2]}}}{counted[3]}" if counted else text


def _as_fraction(match: re.Match) -> str:
    """A decimal whose last digits repeat, which math-verify reads as the digits and a factor."""
    whole, fixed, repeated = match[1], match[2], match[3] or match[4]
    denominator = int("9" * len(repeated) + "0" * len(fixed))
    return rf"{{\frac{{{int(whole + fixed + repeated) - int(whole + fixed or 0)}}}{{{denominator}}}}}"


def _content(text: str) -> str:
    """What is inside of a box or of dollars, if nothing is outside."""
    is_box = text.startswith(r"\boxed{") and text.endswith("}")
    return text[len(r"\boxed{") : -1].strip() if is_box else text.strip("$ ")


def _differs(gold: str, answer: str) -> bool:
    """Whether an answer that math-verify finds equal has another base, unit or order of letters, or says `3 = 2`."""
    if _EQUATION.fullmatch(answer) and len({float(side) for side in answer.split("=")}) > 1:
        return True
    for pattern in (_BASE, _CAPITALS):
        matches = pattern.fullmatch(gold), pattern.fullmatch(answer)
        if all(matches) and matches[0][1] != matches[1][1]:
            return True
    units = [_UNIT.fullmatch(_COMMAND.sub(" ", text)) for text in (gold, answer)]
    return all(unit and unit[1] in _UNITS for unit in units) and len({(_UNITS[u[1]], u[2]) for u in units}) > 1


def _quantities(text: str) -> list[tuple[float, str]]:
    """Numbers and units of a quantity in several units, `2 h 30 min`, of which math-verify reads the first number."""
    plain = _COMMAND.sub(" ", text)
    found = _QUANTITY.findall(plain)
    is_all = not _QUANTITY.sub("", plain).strip() and len(found) > 1
    units = [unit if unit in _UNITS else unit.removesuffix("s") for _, unit in found]
    # `3m + 2s` are letters, and no metres
    if not is_all or ("\\" not in text and all(len(unit) == 1 for unit in units)):
        return []
    if not all(unit in _UNITS or re.fullmatch(_WORD, unit) for unit in units):
        return []
    return [(float(number), _UNITS.get(unit, unit)) for (number, _), unit in zip(found, units, strict=True)]


@functools.lru_cache(maxsize=1024)
def _parse_gold(gold: str) -> list:
    if _ANCHOR.search(gold):
        return _reader().latex_or_text(gold)
    # math-verify reads a bare expression only inside an anchor, and all of a sentence there as an expression
    parsed = _reader().latex(rf"\boxed{{{gold}}}")
    if _PROSE.search(gold):
        return _reader().latex_or_text(gold) or parsed
    return parsed or _reader().latex_or_text(gold)


# ------------------------------------------------------------------------------------------------- in other processes


class Failure(NamedTuple):
    """
    What [`WorkerPool.map`] gives in place of a result: `"time limit"`, `"exit code -11"` (ended by signal 11), or the
    exception.
    """

    reason: str


class WorkerPool:
    """
    Calls a function of a module that workers can import in processes, each call within a hard limit. A worker that
    exceeds the time limit is killed, and one that crashes costs the one call that it was at. POSIX only.
    """

    # An alarm inside of a worker would not reach code in C. The first call of a worker that was idle is tried again:
    # something else may have killed or stopped it. Workers are started when the first calls come, end with their
    # parent, however that ends, and are replaced after a failure, after `calls_per_worker` calls, and when their
    # resident memory has grown beyond a quarter of the limit (which macOS does not enforce). Every thread may use the
    # pool, one at a time; a forked process has workers of its own.

    def __init__(
        self,
        function: Callable = grade,
        num_workers: int | None = None,
        timeout: float | None = None,  # seconds, without the start of a worker
        memory_limit: float | None = None,  # MiB of address space
        calls_per_worker: int = 20_000,
    ):
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = min(8, max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.num_workers = int(_positive("num_workers", num_workers, "LUFFY_REWARD_WORKERS", share, least=1))
        self.timeout = _positive("timeout", timeout, "LUFFY_REWARD_TIMEOUT", 5.0)
        self.memory_limit = _positive("memory_limit", memory_limit, "LUFFY_REWARD_MEMORY", 1024.0, least=128)
        self.calls_per_worker = int(_positive("calls_per_worker", calls_per_worker, None, None, least=1))
        self._function = function
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _stop, self._workers)  # runs at exit, too
        _POOLS.add(self)

    def map(self, calls: list[tuple]) -> list[Any]:
        """
        The result of the function for each tuple of arguments, or a [`Failure`]. What is passed and returned is
        pickled.
        """
        with self._lock:
            try:
                return self._map(calls)
            finally:  # after an exception, such as a `KeyboardInterrupt`, nobody waits for the calls under way
                self._retire([worker for worker in self._workers if worker.calls])

    def close(self):
        """Ends the workers. The next `map` starts others."""
        with self._lock:
            self._retire(list(self._workers))

    def _map(self, calls):
        results: list[Any] = [None] * len(calls)
        waiting, failed_starts = deque(range(len(calls))), 0
        # An idle worker may have been killed or stopped since the last batch: then its first call is tried again
        idle = set(self._workers)
        while True:
            for worker in self._workers:
                if waiting and worker.is_ready and not worker.calls:
                    # Several at once: a busy machine takes longer to wake a process than to grade. Few at the end.
                    share = min(_MAX_CALLS_AT_ONCE, 1 + len(waiting) // (4 * self.num_workers))
                    worker.send([waiting.popleft() for _ in range(min(share, len(waiting)))], calls, self.timeout)
            if not waiting and not any(worker.calls for worker in self._workers):
                return results
            for _ in range(min(self.num_workers - len(self._workers), len(waiting))):
                self._workers.append(_Worker(self))
            listening = [worker for worker in self._workers if worker.calls or not worker.is_ready]
            seconds = min(worker.deadline for worker in listening) - time.monotonic()
            readable = set(wait([worker.connection for worker in listening], max(seconds, 0)))
            now = time.monotonic()
            for worker in listening:
                if worker.connection in readable:
                    result, failure, is_last = worker.receive()
                elif now >= worker.deadline:
                    result, failure, is_last = None, "time limit", True
                else:
                    continue
                if worker.is_ready and failure and worker in idle:
                    pass  # back to the waiting calls
                elif worker.is_ready:
                    results[worker.calls.popleft()] = Failure(failure) if failure else result
                    worker.deadline = now + self.timeout
                    idle.discard(worker)
                elif not failure:
                    worker.is_ready, failed_starts = True, 0
                elif (failed_starts := failed_starts + 1) == _START_ATTEMPTS:
                    raise RuntimeError(f"Worker processes for grading do not start: {failure}.")
                if is_last:
                    waiting.extendleft(reversed(worker.calls))
                    self._retire([worker])

    def _retire(self, workers):
        _stop(workers)
        self._workers[:] = [worker for worker in self._workers if worker not in workers]

    def _forget(self):  # in a forked process, whose parent goes on with the workers
        for worker in self._workers:
            worker.connection.close()
        self._workers.clear()
        self._lock = threading.Lock()


_POOLS: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
# A forked process, such as a data loader's, would hold connections open and so hide the parent's end from the workers.
os.register_at_fork(after_in_child=lambda: [pool._forget() for pool in _POOLS])


@functools.cache
def shared_pool() -> WorkerPool:
    """The pool of this process for [`grade`]; the environment variables count at its first use."""
    return WorkerPool()


def _positive(name: str, value: Any, variable: str | None, default: float | None, least: float = 0) -> float:
    if value is None:
        name, value = variable, os.environ.get(variable, default)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0 and number >= least):
        bound = f"of {least} or more" if least else "above 0"
        raise ValueError(f"`{name}` is {value!r}. Give a number {bound}.")
    return number


def _stop(workers: "list[_Worker]"):
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.wait()
        worker.connection.close()


class _Worker:
    def __init__(self, pool):
        self.connection, theirs = Pipe()
        with socket.socket(fileno=os.dup(self.connection.fileno())) as ours:  # a stopped worker would block a `send`
            limit = struct.pack("ll", int(pool.timeout), max(1, int(pool.timeout % 1 * 1e6)))
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],  # -P: this file's folder stays off the path
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.calls: deque[int] = deque()
        self.is_ready, self.deadline = False, time.monotonic() + _START_LIMIT
        function = None if pool._function is grade else pool._function  # unpickling `grade` would import the package
        self.connection.send((function, pool.timeout, pool.memory_limit, pool.calls_per_worker))

    def send(self, indices, calls, timeout):
        self.calls.extend(indices)
        self.deadline = time.monotonic() + timeout
        try:
            self.connection.send([calls[i] for i in indices])
        except OSError:
            pass  # it has ended or stopped, as `receive` or its deadline will tell

    def receive(self):
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None, f"exit code {self.process.wait()}", True


def _work(connection: Connection):
    """The life of a worker: it replies to each call with a result, a failure, and whether that was its last."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable()
    try:
        function, timeout, memory_limit, calls_left = connection.recv()
    except Exception as error:
        return connection.send((None, repr(error), True))
    if function is None:
        _reader()  # before the limit on memory, and before the first call is timed
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, int(memory_limit * 2**20))):
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):
            pass  # macOS, or a limit of the user's that is lower
    connection.send((None, None, False))
    while True:
        for call in connection.recv():
            # The parent keeps the time. Should it be gone, then SIGPROF ends what would not come back to see that.
            signal.setitimer(signal.ITIMER_PROF, timeout + 1)
            result = failure = None
            try:
                result = (function or grade)(*call)
            except Exception as error:
                failure = repr(error)
            signal.setitimer(signal.ITIMER_PROF, 0)
            calls_left -= 1
            is_last = bool(failure or calls_left == 0 or _resident_memory() > memory_limit / 4)
            connection.send((result, failure, is_last))
            if is_last:
                return


def _resident_memory() -> float:
    """In MiB; 0 where the platform does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return 0.0


if __name__ == "__main__":
    try:
        _work(Connection(int(sys.argv[1])))
    except (EOFError, OSError):
        pass  # the parent is gone
