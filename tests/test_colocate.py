# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
vLLM in the trainer's own processes (colocate mode): one process, two with an engine each, two with one engine between
them (tensor parallel).

With "vllm" it is vLLM, on the CPU: `make test-vllm`, in an environment with vLLM. With "stand-in" it is a class that
stands at the place of vLLM's `LLM` (see `launched_colocate.py`), so that every run of the suite sees which prompts an
engine is asked for and in what order it is called; it says nothing about vLLM itself. TRL's code is real in both.
"""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import compress
from pathlib import Path

import pytest
import tiny
import torch


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is in an environment of its own: make test-vllm"
)
ENGINES = ["stand-in", pytest.param("vllm", marks=needs_vllm)]
CASES = ["uneven", "all_demonstrations", "prefixes", "on_failure", "failure_prefixes"]


def save_model(folder, **kwargs):
    tokenizer = tiny.make_tokenizer()
    # vLLM wants heads of 32 or more on the CPU
    tiny.make_model(tokenizer, hidden_size=64, intermediate_size=64, **kwargs).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def launch(folder, engine, num_processes, cases=CASES, env=None, **options):
    """What each process has recorded, by case."""
    save_model(folder / "model")
    command = [sys.executable, "-m", "accelerate.commands.launch", *(["--multi_gpu"] * (num_processes > 1))]
    command += ["--num_processes", str(num_processes), "--num_machines", "1", "--main_process_port", "0"]
    script = Path(__file__).with_name("launched_colocate.py")
    scenario = json.dumps({"engine": engine, "cases": list(cases), "options": options})
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", **(env or {})}
    result = subprocess.run(
        [*command, str(script), str(folder), scenario],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    return [torch.load(folder / f"colocate_{rank}.pt", weights_only=False) for rank in range(num_processes)]


def expect_requests(rows, case):
    """The prompts that an engine has to be asked for, request by request, given the rows that it samples for."""
    prefixed = [row["prompt"] + row["completion"][: row["shown"]] for row in rows]
    is_sampled = [row["shown"] < len(row["completion"]) for row in rows]
    if "failure" not in case:
        return [list(compress(prefixed, is_sampled))]
    is_continued = [sampled and row["shown"] > 0 for sampled, row in zip(is_sampled, rows, strict=True)]
    return [[row["prompt"] for row in rows], list(compress(prefixed, is_continued))]


def check(ranks, case, is_parallel, tolerance=1e-4, has_sleep=False):
    ranks = [rank[case] for rank in ranks]
    num_demonstrations, num_spare = 0, 0
    for step, generations in enumerate(zip(*(rank["generations"] for rank in ranks), strict=True)):
        rows_of_rank = [generation["rows"] for generation in generations]
        all_rows = sum(rows_of_rank, [])
        has_second_request = case == "failure_prefixes" and any(row["shown"] for row in all_rows)
        for rows, generation in zip(rows_of_rank, generations, strict=True):
            # The engine was asked for the rollouts and for nothing else; one that has none samples one row in vain
            expected = expect_requests(all_rows if is_parallel else rows, case)[: 1 + has_second_request]
            num_spare += sum(not prompts for prompts in expected)
            expected = [prompts or [rows[0]["prompt"]] for prompts in expected]
            assert generation["requests"] == expected

            # Every process calls its engine in the same order, and pushes the weights once for each update
            push, ask = ["load_weights", "reset_prefix_cache"], ["generate"]
            if has_sleep:  # what sleeps has lost its weights
                push, ask = ["wake_up weights", *push], ["wake_up kv_cache", *ask, "sleep"]
            again = (push if has_sleep else []) + ask
            assert generation["calls"] == push + ask + again * has_second_request

        for row in all_rows:
            is_complete = row["shown"] == len(row["completion"])
            num_demonstrations += row["shown"] > 0
            if is_complete:
                assert set(row["ratio"]) == {1.0}
                continue
            # Each row got what was sampled after its own prompt, from the weights of this update
            assert max(row["own"]) < tolerance
            assert max(row["foreign"]) > 10 * tolerance
            assert step == 0 or max(row["stale"]) > 10 * tolerance
    assert num_demonstrations > 0
    for log in ranks[0]["logs"]:
        assert log["sampling/sampling_logp_difference/mean"] < tolerance
        assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=10 * tolerance)
    assert [log["step"] for log in ranks[0]["logs"]] == [1, 2]
    return num_spare


@needs_vllm
def test_one_process(tmp_path):
    (rank,) = launch(tmp_path, "vllm", 1)
    for case in CASES:
        assert check([rank], case, is_parallel=False) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_for_each_process(tmp_path, engine):
    """Where the first process has demonstrations alone, its engine samples a row in vain, twice."""
    has_sleep = engine == "stand-in"  # vLLM sleeps on GPUs only
    ranks = launch(tmp_path, engine, 2, vllm_enable_sleep_mode=has_sleep)
    num_spare = {case: check(ranks, case, is_parallel=False, has_sleep=has_sleep) for case in CASES}
    assert num_spare["all_demonstrations"] == 2 and num_spare["uneven"] == num_spare["prefixes"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_tensor_parallel(tmp_path, engine):
    """Both processes ask for the rows of both."""
    ranks = launch(tmp_path, engine, 2, vllm_tensor_parallel_size=2)
    for case in CASES:
        assert check(ranks, case, is_parallel=True) == 0
