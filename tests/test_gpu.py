# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What only a GPU can show: `make test-gpu`, in an environment with vLLM. Two GPUs show all of it, one what it can.

Where there is none, tests that name no GPU run on the CPU, so that they are known to run; the others are skipped. The
authors of this package had no GPU: what is skipped here has never been run.
"""

import importlib.util
import os

import launched
import pytest
import test_colocate
import test_vllm
import tiny
import torch
from datasets import Dataset

from luffy_trl import LuffyTrainer


NUM_GPUS = torch.cuda.device_count()
USE_CPU = NUM_GPUS == 0
DEVICE = "cpu" if USE_CPU else "cuda"
needs_one_gpu = pytest.mark.skipif(NUM_GPUS < 1, reason="needs a GPU: make test-gpu")
needs_two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs: make test-gpu")


def has(module):
    return importlib.util.find_spec(module) is not None


needs_vllm = pytest.mark.skipif(not has("vllm"), reason="needs vLLM: make test-gpu")
needs_flash_attention = pytest.mark.skipif(
    not has("flash_attn"), reason="needs flash attention: pip install flash-attn"
)


def run_canned(folder, num_processes, **options):
    """(loss, gradient norm) of three updates on the same rollouts."""
    if USE_CPU:  # in this process: elsewhere a process that has used a GPU is not asked for a CPU
        tiny.save_tiny_model(folder / "model")
        rank = launched.canned(folder, per_device=4, **options)
    else:
        rank = tiny.launch("canned", folder, num_processes, per_device=4 // num_processes, **options)[0]
    return torch.tensor([(log["loss"], log["grad_norm"]) for log in rank["log_history"] if "grad_norm" in log])


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """What a CPU computes in fp32."""
    return run_canned(tmp_path_factory.mktemp("cpu"), 1, use_cpu=True)


@pytest.mark.parametrize(
    ("num_processes", "tolerance", "options"),
    [
        pytest.param(1, 1e-4, {}, marks=needs_one_gpu, id="fp32"),
        pytest.param(2, 1e-4, {}, marks=needs_two_gpus, id="fp32, NCCL"),
        pytest.param(1, 0.05, {"bf16": True}, id="bf16"),
        pytest.param(
            1,
            0.05,
            {"bf16": True, "padding_free": True, "model_init_kwargs": {"attn_implementation": "flash_attention_2"}},
            marks=[needs_one_gpu, needs_flash_attention],
            id="flash attention",
        ),
    ],
)
def test_the_numbers_of_a_cpu(tmp_path, curve, num_processes, tolerance, options):
    measured = run_canned(tmp_path, num_processes, use_cpu=USE_CPU, **options)
    torch.testing.assert_close(measured, curve, rtol=tolerance, atol=tolerance * curve.abs().max().item())
    assert not torch.equal(measured, curve)


def make_trainer(folder, **options):
    if not (folder / "model").exists():
        tiny.save_tiny_model(folder / "model")
    args = tiny.make_args(folder / "out", use_cpu=USE_CPU, **options)
    return LuffyTrainer(str(folder / "model"), tiny.share_of_digits, args, Dataset.from_list(tiny.addition_rows(8)))


def test_bf16_weights(tmp_path):
    """Sampled from and trained."""
    trainer = make_trainer(tmp_path, bf16=True, model_init_kwargs={"dtype": "bfloat16"}, max_steps=2)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert value.dtype == torch.bfloat16 and value.device.type == DEVICE
        assert value.isfinite().all() and not torch.equal(value, before[name])
    for log in trainer.state.log_history[:2]:
        assert log["grad_norm"] > 0 and log["completions/min_length"] >= 1
        assert 0 < log["demonstrations/prob"] < 1


def test_resumed_within_a_generation_batch(tmp_path):
    """Four updates for each generation, and a checkpoint after the first: the others train on what it has kept."""
    options = {"steps_per_generation": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    generated = tiny.count_generated_rows(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert generated == []
    for mine, kept in zip(whole._buffered_inputs, resumed._buffered_inputs, strict=True):
        assert kept["completion_ids"].device.type == DEVICE
        assert torch.equal(mine["completion_ids"], kept["completion_ids"])
    for mine, again in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(mine, again, atol=1e-5, rtol=1e-5)


@needs_vllm
@needs_two_gpus
def test_weights_go_to_a_server_by_nccl(tmp_path):
    """A vLLM server on the second GPU, which samples in bf16; the trainer on the first."""
    test_vllm.save_model(tmp_path / "model")
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    server = test_vllm.Server(
        tmp_path / "model", tmp_path / "log.txt", dtype="bfloat16", CUDA_VISIBLE_DEVICES=devices[1]
    )
    try:
        options = {"num_demonstrations": 1, "use_cpu": False, "bf16": True}
        test_vllm.check(tmp_path, server.wait(), 1, options, tolerance=0.1)
    finally:
        server.kill()


@needs_vllm
@pytest.mark.parametrize("case", test_colocate.CASES)
@pytest.mark.parametrize(
    ("num_processes", "tensor_parallel_size"),
    [
        pytest.param(1, 1, marks=needs_one_gpu),
        pytest.param(2, 1, marks=needs_two_gpus),
        pytest.param(2, 2, marks=needs_two_gpus),
    ],
)
def test_colocated_and_asleep(tmp_path, num_processes, tensor_parallel_size, case):
    """Between generations the engine sleeps and gives its memory up, weights included."""
    options = {"use_cpu": False, "vllm_enable_sleep_mode": True, "vllm_tensor_parallel_size": tensor_parallel_size}
    ranks = test_colocate.launch(tmp_path, "vllm", num_processes, [case], **options)
    test_colocate.check(ranks, case, tensor_parallel_size > 1, tolerance=1e-2, has_sleep=True)
