# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
One mixed batch on one process and on two, with DDP, FSDP2 and DeepSpeed, by the files of `accelerate_configs/`: same
losses, gradient norms and weights. See `cpu_engines.py` for how FSDP2 and DeepSpeed run on a CPU.
"""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file


CONFIGS = Path(__file__).parent.parent / "accelerate_configs"
ENGINES = {"multi_gpu": "ddp", "fsdp2": "fsdp", "zero2": "zero2", "zero3": "zero3"}


def launch(folder, config, num_processes=2, function="canned", **scenario):
    """A run with a file of `accelerate_configs/`."""
    is_pretended = config in ("fsdp2", "zero2", "zero3")
    env = {"PRETEND": "1", "DS_ACCELERATOR": "cpu"} if is_pretended else {"ACCELERATE_USE_CPU": "true"}
    return tiny.launch(function, folder, num_processes, CONFIGS / f"{config}.yaml", env, **scenario)


def curve(rank):
    return [(log["loss"], log["grad_norm"]) for log in rank["log_history"] if "grad_norm" in log]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one process: what it logged, and its weights."""
    folder = tmp_path_factory.mktemp("alone")
    (rank,) = launch(folder, "cpu", 1, per_device=4)
    return rank, load_file(folder / "saved" / "model.safetensors")


def assert_same(ranks, folder, alone, atol):
    expected_rank, expected_weights = alone
    for rank in ranks:
        torch.testing.assert_close(curve(rank), curve(expected_rank), atol=atol, rtol=1e-5)
    weights = load_file(folder / "saved" / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name].float(), value, atol=atol, rtol=1e-5)


def test_one_gpu(tmp_path, alone):
    ranks = launch(tmp_path, "single_gpu", 1, per_device=4)
    assert_same(ranks, tmp_path, alone, atol=0)


@pytest.mark.parametrize("config", ENGINES)
def test_two_processes(tmp_path, alone, config):
    """Each process holds a half of each group, and one of them demonstrations alone where a group has two."""
    ranks = launch(tmp_path, config, per_device=2)
    assert [rank["engine"] for rank in ranks] == [ENGINES[config]] * 2
    generated = [sum(of_ranks) for of_ranks in zip(*(rank["generated"] for rank in ranks), strict=True)]
    assert generated == alone[0]["generated"]
    # AdamW's first steps are about lr * sign(gradient): where a gradient is nearly 0, rounding moves a weight
    assert_same(ranks, tmp_path, alone, atol=2e-6 if config == "multi_gpu" else 2e-5)


@pytest.mark.parametrize("config", ENGINES)
def test_a_token_budget(tmp_path, alone, config):
    """More passes than `gradient_accumulation_steps`: gradients are synchronised in the last one, and are the same."""
    ranks = launch(tmp_path, config, per_device=2, max_tokens_per_microbatch=20)
    assert [rank["engine"] for rank in ranks] == [ENGINES[config]] * 2
    assert ranks[0]["passes"] == ranks[1]["passes"] and min(ranks[0]["passes"]) > 2
    assert_same(ranks, tmp_path, alone, atol=2e-5)


FAMILY = {
    "replay": {"num_demonstrations": 1, "replay_ratio": 0.5, "replay_start_solve_rate": 0.0, "max_steps": 6},
    "hints": {"demonstration_policy": "on_failure", "failure_threshold": 0.5, "hint_source": "column"},
    "hints, plain": {
        "demonstration_policy": "on_failure",
        "failure_threshold": 0.5,
        "hint_source": "column",
        "hint_placement": "plain",
    },
    "comprehension": {"num_demonstrations": 1, "demonstration_choice": "comprehension"},
    "srft": {"objective": "srft", "loss_type": "dapo"},
    "rl_plus": {"objective": "rl_plus", "num_iterations": 2, "max_steps": 4},
}


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("config", ["multi_gpu", "fsdp2", "zero3"])
def test_the_family(tmp_path, config, method):
    """What is measured, replayed, hinted and weighted is the same on one process and on two."""
    if config != "multi_gpu" and method not in ("replay", "hints, plain"):
        pytest.skip("the loss does not know the engine; what asks the policy for log-probs does")
    folders = [tmp_path / "one", tmp_path / "two"]
    (one,) = launch(folders[0], "cpu", 1, per_device=4, **FAMILY[method])
    two = launch(folders[1], config, per_device=2, **FAMILY[method])
    for step, sources in enumerate(one["sources"]):
        assert two[0]["sources"][step] + two[1]["sources"][step] == sources
    shown = {source for sources in one["sources"] for source in sources}
    expected = {"replay": {"replay"}, "hints": {"hinted"}, "hints, plain": {"hinted"}}
    assert expected.get(method, {"demonstration"}) <= shown
    # What is measured is padded otherwise on one process
    atol = 1e-4 if method == "hints, plain" else 2e-5
    assert_same(two, folders[1], (one, load_file(folders[0] / "saved" / "model.safetensors")), atol=atol)


def test_lora_in_two_processes(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    one = launch(folders[0], "cpu", 1, per_device=4, lora=True)
    two = launch(folders[1], "multi_gpu", per_device=2, lora=True)
    expected, weights = (load_file(folder / "saved" / "adapter_model.safetensors") for folder in folders)
    assert expected.keys() == weights.keys() and any("lora_B" in name for name in weights)
    for rank in two:
        torch.testing.assert_close(curve(rank), curve(one[0]), atol=2e-6, rtol=1e-5)
    for name, value in expected.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(weights[name], value, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_generation_is_collective(tmp_path, config):
    """A process whose rows are all demonstrations takes part in the generation of the other; nothing hangs."""
    ranks = launch(tmp_path, config, function="count")
    # With one demonstration, rank 0 has a rollout; with two it has none, and generates one row for nothing.
    assert [rank[1, 2] for rank in ranks] == [[1, 1], [2, 2]]
    assert [rank[2, 2] for rank in ranks] == [[1, 1], [2, 2]]
    assert [rank[2, 4] for rank in ranks] == [[2, 2], [2, 2]]
