# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
One mixed batch on one process and on two, with DDP, FSDP2 and DeepSpeed, by the files of `accelerate_configs/`: same
losses, gradient norms and weights. See `cpu_engines.py` for how FSDP2 and DeepSpeed run on a CPU.
"""

import functools
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file


CONFIGS = Path(__file__).parent.parent / "accelerate_configs"
ENGINES = {"multi_gpu": "ddp", "fsdp2": "fsdp", "zero2": "zero2", "zero3": "zero3"}
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
SCENARIOS = {"plain": {}, "token budget": {"max_tokens_per_microbatch": 20}, "lora": {"lora": True}, **FAMILY}
# The loss does not know the engine; what asks the policy for log-probs does
ASKING = ("replay", "hints, plain")
SCENARIOS_OF = {
    "cpu": ["plain", "lora", *FAMILY],
    "single_gpu": ["plain"],
    "multi_gpu": ["plain", "token budget", "lora", *FAMILY],
    "fsdp2": ["plain", "token budget", *ASKING],
    "zero2": ["plain", "token budget"],
    "zero3": ["plain", "token budget", *ASKING],
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The processes of a scenario and its folder, by a file of `accelerate_configs/`: all of a file in one launch."""

    @functools.cache
    def launch(config):
        is_alone, is_pretended = config in ("cpu", "single_gpu"), config in ("fsdp2", "zero2", "zero3")
        options = {"per_device": 4 if is_alone else 2}
        scenarios = {name: ("canned", {**options, **SCENARIOS[name]}) for name in SCENARIOS_OF[config]}
        if config in ("fsdp2", "zero3"):
            scenarios["count"] = "count", {}
        env = {"PRETEND": "1", "DS_ACCELERATOR": "cpu"} if is_pretended else {"ACCELERATE_USE_CPU": "true"}
        folder = tmp_path_factory.mktemp(config)
        file = CONFIGS / f"{config}.yaml"
        return folder, tiny.launch_several(folder, scenarios, 1 if is_alone else 2, config_file=file, env=env)

    def of(config, name):
        folder, runs = launch(config)
        return runs[name], folder / name

    return of


def curve(rank):
    return [(log["loss"], log["grad_norm"]) for log in rank["log_history"] if "grad_norm" in log]


def assert_same(run, alone, atol, file="model.safetensors"):
    """Losses, gradient norms and weights of a run are those of another one, on one process."""
    (ranks, folder), ((expected_rank,), expected_folder) = run, alone
    for rank in ranks:
        torch.testing.assert_close(curve(rank), curve(expected_rank), atol=atol, rtol=1e-5)
    weights, expected_weights = (load_file(path / "saved" / file) for path in (folder, expected_folder))
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name].float(), value, atol=atol, rtol=1e-5)
    return expected_weights


def test_one_gpu(run_of):
    assert_same(run_of("single_gpu", "plain"), run_of("cpu", "plain"), atol=0)


@pytest.mark.parametrize("config", ENGINES)
def test_two_processes(run_of, config):
    """Each process holds a half of each group, and one of them demonstrations alone where a group has two."""
    (ranks, _), ((alone,), _) = run_of(config, "plain"), run_of("cpu", "plain")
    assert [rank["engine"] for rank in ranks] == [ENGINES[config]] * 2
    generated = [sum(of_ranks) for of_ranks in zip(*(rank["generated"] for rank in ranks), strict=True)]
    assert generated == alone["generated"]
    # AdamW's first steps are about lr * sign(gradient): where a gradient is nearly 0, rounding moves a weight
    atol = 2e-6 if config == "multi_gpu" else 2e-5
    assert_same(run_of(config, "plain"), run_of("cpu", "plain"), atol=atol)


@pytest.mark.parametrize("config", ENGINES)
def test_a_token_budget(run_of, config):
    """More passes than `gradient_accumulation_steps`: gradients are synchronised in the last one, and are the same."""
    ranks, _ = run_of(config, "token budget")
    assert [rank["engine"] for rank in ranks] == [ENGINES[config]] * 2
    assert ranks[0]["passes"] == ranks[1]["passes"] and min(ranks[0]["passes"]) > 2
    assert_same(run_of(config, "token budget"), run_of("cpu", "plain"), atol=2e-5)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (config, method)
        for config in ("multi_gpu", "fsdp2", "zero3")
        for method in FAMILY
        if method in SCENARIOS_OF[config]
    ],
)
def test_the_family(run_of, config, method):
    """What is measured, replayed, hinted and weighted is the same on one process and on two."""
    (two, _), ((one,), _) = run_of(config, method), run_of("cpu", method)
    assert [rank["engine"] for rank in two] == [ENGINES[config]] * 2
    for step, sources in enumerate(one["sources"]):
        assert two[0]["sources"][step] + two[1]["sources"][step] == sources
    shown = {source for sources in one["sources"] for source in sources}
    expected = {"replay": {"replay"}, "hints": {"hinted"}, "hints, plain": {"hinted"}}
    assert expected.get(method, {"demonstration"}) <= shown
    # What is measured is padded otherwise on one process
    atol = 1e-4 if method == "hints, plain" else 2e-5
    assert_same(run_of(config, method), run_of("cpu", method), atol=atol)


def test_lora_in_two_processes(run_of):
    runs = run_of("multi_gpu", "lora"), run_of("cpu", "lora")
    weights = assert_same(*runs, atol=2e-6, file="adapter_model.safetensors")
    assert any("lora_B" in name for name in weights)
    assert all(value.abs().max() > 0 for value in weights.values())


@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_generation_is_collective(run_of, config):
    """A process whose rows are all demonstrations takes part in the generation of the other; nothing hangs."""
    ranks, _ = run_of(config, "count")
    # With one demonstration, rank 0 has a rollout; with two it has none, and generates one row for nothing.
    assert [rank[1, 2] for rank in ranks] == [[1, 1], [2, 2]]
    assert [rank[2, 2] for rank in ranks] == [[1, 1], [2, 2]]
    assert [rank[2, 4] for rank in ranks] == [[2, 2], [2, 2]]
