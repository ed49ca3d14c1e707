# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The script and the recipes, at the size of a test: the same code path, other numbers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "configs"
ALL_RECIPES = sorted(CONFIGS.glob("*.yaml"))
RECIPES = [path for path in ALL_RECIPES if path.stem != "sft"]


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script  # where `dataclasses` looks the types of the script's arguments up
    spec.loader.exec_module(script)
    return script


train_luffy, train_sft = load_script("train_luffy"), load_script("train_sft")

ROWS = [
    {
        "prompt": f"{i}+1=",
        "demonstrations": [rf"<think>{i}</think>\boxed{{{i + 1}}}", rf"<think>{i}+1</think>\boxed{{{i + 1}}}"],
        "answer": str(i + 1),
        "hints": ["count", f"after {i}"],
    }
    for i in range(8)
]


def flags(folder, **kwargs):
    """Flags that make any recipe a test."""
    values = {
        "model_name_or_path": tiny.save_tiny_model(folder / "model"),
        "dataset_name": folder / "train.jsonl",
        "output_dir": folder / "out",
        "use_vllm": False,
        "bf16": False,
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "max_completion_length": 32,
        "max_steps": 1,
        "save_steps": 1,
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
        "report_to": "none",
        "disable_tqdm": True,
        **kwargs,
    }
    Dataset.from_list(ROWS).to_json(folder / "train.jsonl")
    return [part for name, value in values.items() for part in (f"--{name}", *str(value).split(" "))]


def run(*arguments):
    parser = train_luffy.make_parser()
    train_luffy.main(*parser.parse_args_and_config([str(a) for a in arguments]))


def run_sft(folder, *arguments, **kwargs):
    """Runs the SFT script; its flags are those of any recipe but for what SFTConfig does not know."""
    unknown = {"steps_per_generation", "use_vllm"}
    parts = flags(folder, **kwargs)
    parts = [part for i, part in enumerate(parts) if parts[i - i % 2].removeprefix("--") not in unknown]
    parser = train_sft.make_parser()
    train_sft.main(*parser.parse_args_and_config([*map(str, arguments), *parts]))


def log_history(folder):
    return json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_for_a_step(recipe, tmp_path):
    options = yaml.safe_load(recipe.read_text())
    hints = ["--hint_warmup_steps", "0"] if "hint_warmup_steps" in options else []
    run("--config", recipe, *flags(tmp_path), *hints)
    log = log_history(tmp_path)[0]
    assert log["step"] == 1 and ("hints/helped" in log) == bool(hints)
    num_demonstrations = options.get("num_demonstrations")
    # with `require_think` the traces are right, and what a random model writes is not: on failure they are shown too
    assert log.get("demonstrations/reward") == (None if num_demonstrations == 0 else 1.0)
    assert log["reward"] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| demonstrations per group | {num_demonstrations} of 8 |" in card


@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_the_command_that_runs_it(recipe):
    comment = " ".join(line.strip("#\\ ") for line in recipe.read_text().splitlines() if line.startswith("#"))
    script = "train_sft" if recipe.stem == "sft" else "train_luffy"
    assert f"examples/{script}.py --config examples/configs/{recipe.name}" in " ".join(comment.split())


def test_sft_recipe_then_rl(tmp_path):
    run_sft(tmp_path, "--config", CONFIGS / "sft.yaml", output_dir=tmp_path / "sft")
    assert (tmp_path / "sft" / "model.safetensors").exists()
    arguments = flags(tmp_path)
    run("--config", CONFIGS / "sft_then_rl.yaml", *arguments, "--model_name_or_path", tmp_path / "sft")
    assert log_history(tmp_path)[0]["reward"] == 0


def test_sft_is_the_mean_over_the_tokens_of_an_update(tmp_path):
    """Traces of unlike lengths in two micro-batches: neither is averaged by itself, and no prompt counts."""
    rows = [{"prompt": f"{i}+1=", "demonstrations": ["A" * (1 + 5 * i)], "answer": ""} for i in range(4)]
    arguments = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "dataset_name": tmp_path / "rows.jsonl",
    }
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    run_sft(tmp_path, **arguments)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = tiny.make_tokenizer()
    total, count = 0.0, 0
    for row in rows:
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["demonstrations"][0])["input_ids"], tokenizer.eos_token_id]
        logps = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
        total = total - logps.gather(-1, torch.tensor(ids)[:, None]).sum()
        count += len(ids)
    (total / count).backward()
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(after[name], parameter.detach() - parameter.grad, atol=1e-6, rtol=1e-5)


def test_sft_refuses_to_cut_traces(tmp_path):
    with pytest.raises(
        ValueError, match="`max_length=512` would cut traces before their end. Set `max_prompt_length`"
    ):
        run_sft(tmp_path, "--max_length", 512)


def test_the_papers_recipe_is_the_papers():
    parser = train_luffy.make_parser()
    config = ROOT / "examples" / "configs" / "qwen2.5_math_7b.yaml"
    _, args, model_args = parser.parse_args_and_config(["--config", str(config), "--use_cpu", "--bf16", "false"])
    on_8_gpus = 8
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * on_8_gpus == 64 * 8
    assert args.per_device_train_batch_size * args.steps_per_generation * on_8_gpus == 128 * 8
    assert (args.learning_rate, args.lr_scheduler_type, args.weight_decay) == (1e-6, "constant", 0.01)
    assert (args.max_completion_length, args.max_steps, args.temperature) == (8192, 500, 1.0)
    assert (args.max_grad_norm, args.adam_epsilon) == (1.0 / 64, 1e-8 / 64)
    assert args.entropy_coef == pytest.approx(0.001 * 5 / 64, rel=0.03)
    assert model_args.dtype == "float32"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "saved"])
def test_data_from(kind, tmp_path):
    arguments = flags(tmp_path)
    dataset, path = Dataset.from_list(ROWS), tmp_path / f"data.{kind}"
    if kind == "jsonl":
        dataset.to_json(path)
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "folder":
        dataset.to_parquet(path / "train-00000.parquet")
    else:
        dataset.save_to_disk(path)
    run(*arguments, "--dataset_name", path, "--require_think", "true")
    assert log_history(tmp_path)[0]["demonstrations/reward"] == 1


def test_long_prompts_are_left_out_and_counted(tmp_path, caplog):
    arguments = flags(tmp_path)
    rows = [*ROWS, {**ROWS[0], "prompt": "0" * 40}]
    Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
    run(*arguments, "--max_prompt_length", 39)
    assert "1 of 9 rows have a prompt of more than 39 tokens and are left out" in caplog.text


def test_evaluation_sets_are_told_apart(tmp_path):
    arguments = flags(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
    for name in ("easy", "hard"):
        Dataset.from_list(ROWS[:2]).to_json(tmp_path / f"{name}.jsonl")
    names = [tmp_path / "easy.jsonl", tmp_path / "hard.jsonl"]
    run(*arguments, "--num_generations_eval", 1, "--eval_dataset_names", *names)
    records = [log for log in log_history(tmp_path) if "eval_reward" in log]
    assert [{name for name in ("easy", "hard") if f"eval_{name}_loss" in log} for log in records] == [
        {"easy"},
        {"hard"},
    ]


def test_peft_flags(tmp_path):
    run(*flags(tmp_path), "--use_peft", "--lora_r", 2, "--lora_target_modules", "q_proj", "v_proj")
    assert (tmp_path / "out" / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(PeftModel.from_pretrained(model, tmp_path / "out"), PeftModel)


def test_own_reward_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "def length(completions, **kwargs):\n    return [float(len(text)) for text in completions]\n"
    )
    run(*flags(tmp_path), "--reward_funcs", "my_rewards.length", "math_verify_reward")
    log = log_history(tmp_path)[0]
    assert log["rewards/length/mean"] > 0 and log["rewards/math_verify_reward/mean"] == 0


def test_resume(tmp_path):
    run(*flags(tmp_path), "--save_steps", 1)
    run(*flags(tmp_path, max_steps=3), "--resume_from_checkpoint", "true")
    assert [log["step"] for log in log_history(tmp_path) if "loss" in log] == [1, 2, 3]


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run(*flags(tmp_path, report_to="wandb"), "--log_completions", "true")
    import wandb

    wandb.finish()
    wandb.teardown()  # waits for the service, which writes the file
    (run_file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = run_file.read_bytes()
    assert b"train/demonstrations/reward" in content
    # TRL logs the table of a step again with the summary of the run
    tables = list(tmp_path.glob("wandb/offline-run-*/files/media/table/*.table.json"))
    assert tables
    for path in tables:
        table = json.loads(path.read_text())
        sources = [row[table["columns"].index("source")] for row in table["data"]]
        assert sources == (["demonstration"] + ["rollout"] * 7) * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward_funcs", "nonsense"], "Unknown reward function 'nonsense'. Choose from math_verify_reward"),
        (["--reward_funcs", "accuracy_reward", "--require_think", "true"], "is an option of `math_verify_reward`"),
        (["--dataset_name", "nowhere.jsonl"], "There is no file 'nowhere.jsonl'. Check `dataset_name`,"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(*flags(tmp_path), *arguments)


def test_an_unknown_setting_is_an_error(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_demonstration: 2\n")
    with pytest.raises(ValueError, match="knows no option 'num_demonstration', .* Did you mean `num_demonstrations`"):
        run("--config", recipe, *flags(tmp_path))


def test_accelerate_launch_with_two_processes(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "examples" / "train_luffy.py")]
    result = subprocess.run(
        [*command, *flags(tmp_path, steps_per_generation=2)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert log_history(tmp_path)[0]["demonstrations/fraction"] > 0
    assert load_file(tmp_path / "out" / "model.safetensors")
