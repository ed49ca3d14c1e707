# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from luffy_trl.grading import Failure, WorkerPool, grade


EXIT = "__import__('os')._exit(3)"
SEGFAULT = "__import__('ctypes').string_at(0)"
OUT_OF_MEMORY = "'x' * 2**31"
RECURSION = "(lambda f: f(f))(lambda f: f(f))"
HANG_IN_C = "10 ** (10**9)"  # holds the GIL for minutes
HANG_IN_REGEX = "__import__('re').match('(a+)+b', 'a' * 60)"
PID = "__import__('os').getpid()"


def in_thread(function, *args):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join()
    return results[0]


def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def children():
    """Returns a function that lists this process' children, but those that earlier tests have left running."""
    earlier = {child.pid for child in psutil.Process().children()}
    return lambda: [child for child in psutil.Process().children() if child.pid not in earlier]


@pytest.fixture
def pool(children):  # which looks before the pool starts any
    pool = WorkerPool(eval, num_workers=2, timeout=0.5)
    yield pool
    pool.close()


@pytest.mark.parametrize("threaded", [False, True])
def test_a_failure_costs_one_call(pool, threaded):
    calls = ["0", EXIT, SEGFAULT, OUT_OF_MEMORY, RECURSION, HANG_IN_C, HANG_IN_REGEX, "1/0", *map(str, range(8, 60))]
    calls = [(call,) for call in calls]
    results = in_thread(pool.map, calls) if threaded else pool.map(calls)
    assert results[0] == 0
    assert results[1:4] == [Failure("exit code 3"), Failure("exit code -11"), Failure("MemoryError()")]
    assert results[4].reason.startswith("RecursionError")
    assert results[5:7] == [Failure("time limit")] * 2
    assert results[7] == Failure("ZeroDivisionError('division by zero')")
    assert results[8:] == list(range(8, 60))


def test_the_time_limit_is_hard(pool, children):
    pool.map([("0",)] * 2)
    start = time.perf_counter()
    assert pool.map([(HANG_IN_C,), (HANG_IN_REGEX,)]) == [Failure("time limit")] * 2
    assert time.perf_counter() - start >= 1.0  # once, and again as the workers were idle
    assert len(children()) == 0  # killed, and waited for


def test_calls_behind_a_failure_go_to_other_workers():
    with_one = WorkerPool(eval, num_workers=1, timeout=0.5)
    calls = [(HANG_IN_C if i == 3 else str(i),) for i in range(100)]  # many are sent at once
    assert with_one.map(calls) == [Failure("time limit") if i == 3 else i for i in range(100)]
    with_one.close()


def test_the_memory_of_workers_is_limited():
    pool = WorkerPool(eval, num_workers=1, memory_limit=256)
    (first,) = pool.map([(PID,)])
    assert pool.map([(PID,), ("len('x' * 2**29)",)]) == [first, Failure("MemoryError()")]
    (second,) = pool.map([(PID,)])
    # no failure, but grown beyond a quarter of the limit
    assert pool.map([("len(globals().setdefault('kept', 'x' * 2**26))",)]) == [2**26]
    (third,) = pool.map([(PID,)])
    assert len({first, second, third}) == 3
    assert not is_running(first) and not is_running(second)
    pool.close()


def test_workers_are_replaced_after_many_calls():
    pool = WorkerPool(eval, num_workers=1, calls_per_worker=10)
    pids = pool.map([(PID,)] * 25)
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [10, 10, 5]
    pool.close()


def test_workers_start_with_the_calls_and_live_on(pool, children):
    assert children() == []
    first = pool.map([(PID,)])
    assert len(children()) == 1
    pool.map([("0",)] * 50)
    assert len(children()) == 2
    assert first[0] in [child.pid for child in children()]
    assert pool.map([]) == []
    pool.close()
    assert children() == []
    assert pool.map([("7",)]) == [7]


@pytest.mark.parametrize(
    ("signal_number", "size"),
    # a text of 4 MiB does not fit into a socket, and nobody reads it out
    [(signal.SIGKILL, 1), (signal.SIGKILL, 2**22), (signal.SIGSTOP, 1), (signal.SIGSTOP, 2**22)],
)
def test_a_worker_that_was_killed_or_stopped_just_before_costs_nothing(signal_number, size):
    pool = WorkerPool(eval, num_workers=1, timeout=1.0)
    (pid,) = pool.map([(PID,)])
    os.kill(pid, signal_number)
    assert pool.map([(f"len('{'x' * size}')",), ("7",)]) == [size, 7]
    assert not is_running(pid)
    pool.close()


def test_an_idle_worker_that_was_killed_costs_nothing(pool):
    (pid,) = pool.map([(PID,)])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_running(pid))
    assert pool.map([("7",)]) == [7]


def test_only_the_first_call_of_an_idle_worker_is_tried_again(tmp_path):
    tried = tmp_path / "tried"
    crash = f"(open({str(tried)!r}, 'a').write('x'), __import__('os')._exit(3))"
    pool = WorkerPool(eval, num_workers=1)
    assert pool.map([(crash,)]) == [Failure("exit code 3")]  # of a worker that was started for it
    assert tried.read_text() == "x"
    assert pool.map([("1",), (crash,), ("2",)]) == [1, Failure("exit code 3"), 2]  # it has answered a call
    assert tried.read_text() == "xx"
    assert pool.map([(crash,), ("2",)]) == [Failure("exit code 3"), 2]
    assert tried.read_text() == "xxxx"
    pool.close()


def test_an_interrupted_batch_leaves_no_results_behind(pool):
    def interrupt():
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    pool.timeout = 30
    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        pool.map([("__import__('time').sleep(20)",)] * 2)
    thread.join()
    assert pool.map([("1",), ("2",)]) == [1, 2]


def test_threads_share_a_pool(pool):
    results = [None] * 4

    def work(i):
        results[i] = pool.map([(str(100 * i + j),) for j in range(50)])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[100 * i + j for j in range(50)] for i in range(4)]


def test_a_forked_process_has_workers_of_its_own(pool):
    (pid,) = pool.map([(PID,)])
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        results = pool.map([("7",), (PID,)])
        pool.close()
        os.write(writing, repr(results).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    seven, other_pid = eval(os.read(reading, 100))
    assert seven == 7 and other_pid != pid
    assert pool.map([(PID,)]) == [pid]


PARENT = """
import subprocess, sys, time, psutil
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("grading", {path!r})  # without torch
sys.modules["grading"] = grading = module_from_spec(spec)
spec.loader.exec_module(grading)
pool = grading.WorkerPool(eval, num_workers=2, timeout=1)
print(*pool.map([("(__import__('time').sleep(0.3), __import__('os').getpid())[1]",)] * 2), flush=True)
"""


def start_parent(end):
    path = sys.modules[WorkerPool.__module__].__file__
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(path=path) + end], stdout=subprocess.PIPE, text=True
    )
    return parent, [int(pid) for pid in parent.stdout.readline().split()]


@pytest.mark.parametrize(
    ("end", "kill"),
    [
        ("raise SystemExit(1)", None),
        ("time.sleep(60)", signal.SIGKILL),
        ("time.sleep(60)", signal.SIGTERM),
        (f"pool.map([({HANG_IN_C!r},)] * 2)", signal.SIGKILL),  # busy in C, they do not see that nobody listens
    ],
)
def test_workers_end_with_their_parent(end, kill):
    parent, workers = start_parent(end)
    assert len(set(workers)) == 2
    if kill:
        assert all(map(is_running, workers))
        time.sleep(0.3)
        parent.send_signal(kill)
    parent.wait()
    wait_for(lambda: not any(map(is_running, workers)))


def test_workers_import_neither_torch_nor_the_package():
    pool = WorkerPool(eval, num_workers=1)
    modules = "[name for name in ('torch', 'trl', 'luffy_trl', 'math_verify') if name in __import__('sys').modules]"
    assert pool.map([(modules,)]) == [[]]  # math-verify where it grades
    pool.close()


def test_a_worker_that_does_not_start(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="for grading do not start: exit code 1"):
        WorkerPool(num_workers=1).map([("4", (r"\boxed{4}",))])


def test_limits_come_from_the_environment(monkeypatch):
    cpus = len(os.sched_getaffinity(0))
    assert WorkerPool().num_workers == min(8, cpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cpus))
    assert WorkerPool().num_workers == 1
    monkeypatch.setenv("LUFFY_REWARD_WORKERS", "3")
    monkeypatch.setenv("LUFFY_REWARD_TIMEOUT", "0.25")
    monkeypatch.setenv("LUFFY_REWARD_MEMORY", "512")
    pool = WorkerPool()
    assert (pool.num_workers, pool.timeout, pool.memory_limit) == (3, 0.25, 512)
    assert WorkerPool(num_workers=2).num_workers == 2


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("LUFFY_REWARD_WORKERS", "0", "`LUFFY_REWARD_WORKERS` is '0'. Give a number of 1 or more."),
        ("LUFFY_REWARD_TIMEOUT", "0", "`LUFFY_REWARD_TIMEOUT` is '0'. Give a number above 0."),
        ("LUFFY_REWARD_TIMEOUT", "5 s", "`LUFFY_REWARD_TIMEOUT` is '5 s'. Give a number above 0."),
        ("LUFFY_REWARD_MEMORY", "64", "`LUFFY_REWARD_MEMORY` is '64'. Give a number of 128 or more."),
    ],
)
def test_limits_without_a_meaning(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        WorkerPool()


@pytest.mark.parametrize(
    ("gold", "answers", "result"),
    [
        ("4", (r"\boxed{4}",), True),
        ("4", (r"\boxed{4}", r"\boxed{\frac{8}{2}}"), True),
        ("4", (r"\boxed{4}", r"\boxed{5}"), False),
        ("4, 5", (r"\boxed{4}", r"\boxed{5}"), True),
        ("4", (), False),
        ("", (r"\boxed{4}",), None),
        ("", (), None),
    ],
)
def test_grade(gold, answers, result):
    assert grade(gold, answers) is result


def test_in_two_training_processes(tmp_path):
    # both have rewards of their own rows; the launcher itself would hang on workers that outlive their parents
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import PartialState\n"
        "from luffy_trl.rewards import math_verify_reward\n"
        "state = PartialState(cpu=True)\n"  # gloo is up
        "rank = state.process_index\n"
        "rewards = math_verify_reward([r'\\boxed{%d}' % i for i in range(50)], answer=[str(rank * 7)] * 50)\n"
        "right = [i for i, reward in enumerate(rewards) if reward]\n"
        "print(f'rank {rank} of {state.num_processes}: {right}', flush=True)\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--main_process_port", "0", str(script)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    assert "rank 0 of 2: [0]" in output and "rank 1 of 2: [7]" in output
