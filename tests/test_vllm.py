# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
A real vLLM server on the CPU, and trainers in one and two processes: `make test-vllm`, in an environment with vLLM.

What is not real is the way of the weights to the server: see `launched_vllm.py`.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tiny
import torch


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "agent"))
import products


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is in an environment of its own: make test-vllm"
)


class Server:
    """A vLLM server of the model in a folder."""

    def __init__(self, model, log, dtype="float32", **env):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--port", str(self.port), "--dtype", dtype, "--max-model-len", "128", "--max-num-seqs", "16"]
        command += ["--enforce-eager", "--weight-transfer-config", '{"backend":"nccl"}', "--logprobs-mode"]
        command += ["processed_logprobs", "--max-logprobs", "-1", "--enable-scale-out"]
        environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
        self.log = log
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment, "HF_HUB_OFFLINE": "1", **env},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self):
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return self
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(1)
        raise TimeoutError(self.log.read_text()[-3000:])

    def count_tokens(self):
        """Tokens that the server has generated since its start, by its own count."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=10).read().decode()
        return sum(float(value) for value in re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", text, re.M))

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def save_model(folder):
    tokenizer = tiny.make_tokenizer()
    tiny.make_model(tokenizer, hidden_size=64, intermediate_size=64).save_pretrained(folder)  # heads of 32
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    save_model(folder / "model")
    server = Server(folder / "model", folder / "log.txt").wait()
    yield server
    server.kill()


def launch(folder, server, num_processes, options, model=None, **scenario):
    if model is None:
        save_model(folder / "model")
    else:
        shutil.copytree(model, folder / "model")
    script = Path(__file__).with_name("launched_vllm.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", *(["--multi_gpu"] * (num_processes > 1))]
    scenario = json.dumps({"server_url": server.url, "options": options, **scenario})
    command += ["--num_processes", str(num_processes), "--main_process_port", "0", str(script), str(folder), scenario]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"num_demonstrations": 1},
        {"num_demonstrations": 2, "prefix_ratio_min": 0.3, "prefix_ratio_max": 1.0},
        {"num_demonstrations": 2, "demonstration_policy": "on_failure", "failure_threshold": 0.45},
    ],
    ids=["uneven", "prefixes", "on_failure"],
)
def test_server(tmp_path, server, num_processes, options):
    check(tmp_path, server, num_processes, options)


def check(folder, server, num_processes, options, tolerance=1e-4):
    """Trains; what the server was asked for, what it knew, and the importance-sampling ratios of demonstrations."""
    before = server.count_tokens()
    result = launch(folder, server, num_processes, options)
    assert result.returncode == 0, result.stdout[-4000:]
    ranks = [torch.load(folder / f"served_{rank}.pt") for rank in range(num_processes)]

    # Nothing was sampled for a demonstration: the server's own count is that of the rollout tokens
    served = server.count_tokens() - before
    assert served == sum(rank["tokens"] for rank in ranks)
    shown = [tokens for rank in ranks for _, counts in rank["rows"] for tokens in counts]
    totals = [tokens for rank in ranks for lengths, _ in rank["rows"] for tokens in lengths]
    assert 0 < sum(tokens > 0 for tokens in shown) < len(shown)
    if options["num_demonstrations"] == 1:
        assert served == sum(totals) - sum(shown)
    else:  # what a prefix's row or a replaced rollout has too many is cut or left out
        assert served >= sum(totals) - sum(shown)

    # Weights were pushed before each generation, and demonstrations have an importance-sampling ratio of exactly 1
    logs = [log for log in ranks[0]["log_history"] if "reward" in log]
    assert len(logs) == 4
    for log in logs:
        assert log["sampling/sampling_logp_difference/mean"] < tolerance
        assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=10 * tolerance)
    ratios = [value for rank in ranks for values in rank["ratios"] for value in values]
    assert ratios and set(ratios) == {1.0}


def test_a_lost_server(tmp_path, server):
    """Killed after the second update; the run says so, and goes on from its checkpoint with another server."""
    save_model(tmp_path / "model")
    options = {"save_strategy": "steps", "save_steps": 1}
    first = Server(tmp_path / "model", tmp_path / "log.txt").wait()
    try:
        result = launch(tmp_path, first, 2, options, server_group=first.process.pid)
    finally:
        first.kill()
    assert result.returncode != 0
    assert "The vLLM server was lost while completions for update 3 were generated" in result.stdout
    assert "resume from the last checkpoint" in result.stdout

    # One process: the transformers that vLLM pins cannot load an optimizer onto the device "cpu:0" of several
    result = launch(tmp_path, server, 1, {**options, "resume": True})
    assert result.returncode == 0, result.stdout[-4000:]
    logs = torch.load(tmp_path / "served_0.pt")["log_history"]
    assert [log["step"] for log in logs if "reward" in log] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def acting_server(tmp_path_factory):
    """One whose model always calls the tool with 2 and 3, and then says 6."""
    folder = tmp_path_factory.mktemp("acting")
    tokenizer = products.build_tokenizer()
    model = tiny.make_model(tokenizer, hidden_size=64, intermediate_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    texts = [products.render(tokenizer, f"1{i}*2{i}", products.solve([2, 3])) for i in range(8)]
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    for _ in range(150):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    server = Server(folder / "model", folder / "log.txt").wait()
    yield server, folder / "model"
    server.kill()


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("policy", ["always", "on_failure"])
def test_tools(tmp_path, acting_server, num_processes, policy):
    """Rollouts call tools through the server, demonstrations do not, on processes that call differently often."""
    server, model = acting_server
    before = server.count_tokens()
    options = {"num_demonstrations": 1, "demonstration_policy": policy, "max_completion_length": 60}
    options |= {"failure_threshold": 0.5} if policy == "on_failure" else {}
    result = launch(tmp_path, server, num_processes, {**options, "learning_rate": 1e-4}, model=model, acts=True)
    assert result.returncode == 0, result.stdout[-4000:]
    ranks = [torch.load(tmp_path / f"served_{rank}.pt") for rank in range(num_processes)]
    assert server.count_tokens() - before == sum(rank["tokens"] for rank in ranks)
    logs = [log for log in ranks[0]["log_history"] if "reward" in log]
    assert len(logs) == 4
    for log in logs:
        assert log["tools/call_frequency"] == pytest.approx(1.0, abs=0.3)
        assert log["sampling/sampling_logp_difference/mean"] < 1e-4
    ratios = [value for rank in ranks for values in rank["ratios"] for value in values]
    assert ratios and set(ratios) == {1.0}
