# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The command `luffy`: what it runs is what `python -m` and `accelerate launch` run."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from luffy_trl import cli
from luffy_trl.arguments import Parser
from luffy_trl.errors import in_one_line
from luffy_trl.scripts.train import LuffyScriptArguments, get_reward_funcs, make_parser


ROOT = Path(__file__).parent.parent
RIGHT = [
    {"prompt": f"{i}+1=", "demonstrations": [rf"<think>{i}</think>\boxed{{{i + 1}}}"], "answer": str(i + 1)}
    for i in range(8)
]


def luffy(*arguments, cwd, env=None, timeout=600):
    return subprocess.run(
        [sys.executable, "-m", "luffy_trl", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_flags(folder, **kwargs):
    Dataset.from_list(RIGHT).to_json(folder / "train.jsonl")
    values = {
        "model_name_or_path": tiny.save_tiny_model(folder / "model"),
        "dataset_name": "train.jsonl",
        "output_dir": "out",
        "max_steps": 1,
        "max_completion_length": 16,
        "per_device_train_batch_size": 8,
        "bf16": "false",
        "use_cpu": "true",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **kwargs,
    }
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def test_help_names_the_commands_and_loads_no_torch(capsys):
    assert cli.main([]) == 0
    output = capsys.readouterr().out
    for name in ("train", "sft", "inspect", "prepare-data", "prepare-model", "eval", "report"):
        assert f"\n    {name}" in output
    assert cli.main(["prepare-data"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n    {name}" in output for name in ("openr1", "generate", "score"))
    code = "import sys, luffy_trl.cli as c; c.main([]); assert 'torch' not in sys.modules and 'trl' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["prepare-data", "openr1"], "--evaluation_files"),
        (["prepare-data", "generate"], "--base_url"),
        (["prepare-data", "score"], "--teacher_name_or_path"),
        (["prepare-model"], "--max_position_embeddings"),
        (["eval"], "--benchmarks"),
        (["inspect"], "--max_tokens_shown"),
        (["report"], "--watch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_command_is_its_module(arguments, option, capsys):
    argv = list(sys.argv)
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*arguments, "-h"])
    output = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert output.startswith(f"usage: luffy {' '.join(arguments)} [-h]") and option in output
    assert sys.argv == argv


def test_prepare_model_and_inspect_run(tmp_path, monkeypatch):
    """Two commands that do their work, and the exit status that one of them ends with."""
    run_flags(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare-model", "--model_name_or_path", "model", "--output_dir", "ready"]) == 0
    assert (tmp_path / "ready" / "model.safetensors").exists()
    inspected = luffy("inspect", "train.jsonl", "--model", "ready", "--config", "luffy_on_failure", cwd=tmp_path)
    assert inspected.returncode == 0, inspected.stderr
    assert "math_verify_reward       8    1     1    1     0" in inspected.stdout
    assert "\x1b" not in inspected.stdout and "Reading rows" not in inspected.stdout
    (tmp_path / "train.jsonl").write_text(json.dumps({**RIGHT[0], "demonstrations": [""]}))
    with pytest.raises(SystemExit, match="1"):
        cli.main(["inspect", "train.jsonl", "--model", "ready"])


def test_train_launches_accelerate(tmp_path):
    """A recipe by its name, a launch file by its name, an option of accelerate, and two processes."""
    arguments = run_flags(tmp_path, steps_per_generation=1, gradient_accumulation_steps=1, use_vllm="false")
    result = luffy(
        *("train", "--config", "quickstart", "--num_processes", 2, *arguments, "--accelerate_config", "multi_gpu"),
        *("--mixed_precision", "no", "--main_process_port", 0, "--eval_strategy", "no", "--eval_on_start", "false"),
        cwd=tmp_path,
        env={"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (log, _) = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert log["demonstrations/reward"] == 1.0
    recipe = yaml.safe_load((cli.PACKAGE / "recipes" / "quickstart.yaml").read_text())
    assert log["learning_rate"] == recipe["learning_rate"] == 3e-4
    # two processes of eight sequences: prompts of 4 tokens, two traces of 13, and 14 rollouts of at most 16
    assert 16 * 4 + 2 * 13 + 14 < log["num_tokens"] <= 16 * 4 + 2 * 13 + 14 * 16
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_the_environment_is_as_before(tmp_path, monkeypatch):
    """What accelerate sets for the run, such as the device, is not there for what comes after it."""
    monkeypatch.setattr("luffy_trl.scripts.train.run", lambda *args: seen.append(dict(os.environ)))
    seen, before = [], dict(os.environ)
    assert cli.main(["train", "--cpu", "--output_dir", str(tmp_path), "--num_cpu_threads_per_process", "1"]) == 0
    assert seen[0]["ACCELERATE_USE_CPU"] == "True" and "ACCELERATE_USE_CPU" not in before
    assert dict(os.environ) == before


def test_an_error_of_the_script_is_the_last_word(tmp_path, monkeypatch, capfd):
    arguments = run_flags(tmp_path, num_generations=3)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--accelerate_config", "cpu", *map(str, arguments)]) == 1
    last_line = capfd.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("ValueError: `num_generations=3` does not divide the 8 completions that are generated")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nope"], "There is no recipe 'nope'. `--config` takes a YAML file, or one of: ampo, chord, ex"),
        (
            ["--num_demonstration_s", "2"],
            "`luffy train` and accelerate know no argument '--num_demonstration_s'. Did you mean",
        ),
        (["--num_dem=2"], "know no argument '--num_dem'. Did you mean `--num_demonstrations`?"),
        (["--num_proc", "2"], "know no argument '--num_proc'. Did you mean `--num_processes`?"),
        (["data.jsonl", "--max_steps", "1"], "`luffy train` and accelerate know no argument 'data.jsonl'."),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["train", *arguments])


@pytest.mark.parametrize(
    ("command", "abbreviated", "meant"),
    [
        ("train", "--num_dem", "--num_demonstrations"),
        ("sft", "--max_prompt", "--max_prompt_length"),
        ("inspect", "--mod", "--model"),
        ("prepare-model", "--chat-templ", "--chat-template"),
        ("prepare-data openr1", "--dataset_nam", "--dataset_name"),
        ("prepare-data score", "--teacher", "--teacher_name_or_path"),
    ],
)
def test_abbreviations(command, abbreviated, meant):
    """Each parser of a command, also where a required option is the one that is abbreviated, or a file names it."""
    modules = {**cli.COMMANDS, **{f"prepare-data {name}": value for name, value in cli.PREPARE_DATA.items()}}
    message = f"ValueError: `luffy {command}` knows no argument '{abbreviated}'. Did you mean `{meant}`?"
    assert tiny.exit_of(modules[command][0], abbreviated, "1") == message


@pytest.mark.parametrize("num_processes", [1, 2])
def test_libraries_are_not_taken_from_the_folder(tmp_path, num_processes):
    """Files there have the names of libraries, some of which are not installed; a reward that is named is taken."""
    arguments = run_flags(tmp_path)
    names = ["sympy", "math_verify", "peft", "rich", *(["mlflow", "comet_ml", "wandb"] if num_processes == 1 else [])]
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"open('imported_{name}', 'w')\nraise SystemExit('from the folder')\n")
    if num_processes == 2:
        (tmp_path / "my_rewards.py").write_text(
            "def one(completions, **kwargs):\n    return [1.0] * len(completions)\n"
        )
        arguments += ["--reward_funcs", "math_verify_reward", "my_rewards.one"]
        # On a CPU accelerate itself would start one
        arguments += ["--accelerate_config", "cpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [Path(sys.executable).with_name("luffy"), "train", *map(str, arguments)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    state = (tmp_path / "out" / "trainer_state.json").read_text()
    assert ("rewards/one/mean" in state) == (num_processes == 2)
    assert f"{num_processes} process{'es' * (num_processes == 2)} on cpu" in result.stdout
    assert not list(tmp_path.glob("imported_*"))


def processes_of(folder):
    """Processes whose working folder is this one, the launcher's children and graders among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").resolve() == folder and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(path.name))
        except OSError:
            pass  # it has ended
    return found


def wait_until(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("num_processes", "signal_number"),
    [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGKILL)],
)
def test_a_signal_to_the_command_ends_all_of_the_run(tmp_path, num_processes, signal_number):
    arguments = run_flags(tmp_path, max_steps=100000, save_strategy="steps", save_steps=1, save_total_limit=2)
    if num_processes == 2:
        arguments += ["--num_processes", "2", "--multi_gpu", "--main_process_port", "0"]
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "luffy_trl", "train", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        wait_until(lambda: list(tmp_path.glob("out/checkpoint-*")))
        process.send_signal(signal_number)
        wait_until(lambda: not [pid for pid in processes_of(tmp_path) if pid != process.pid])
        status, printed = process.wait(600), (tmp_path / "stderr").read_text()
        if signal_number == signal.SIGINT:
            assert status == 130 and printed.count("Interrupted. Continue from the last checkpoint, if there is") == 1
        else:
            assert status == -signal_number and "Interrupted" not in printed
        assert "Traceback" not in printed and "KeyboardInterrupt" not in printed
    finally:
        for pid in processes_of(tmp_path):
            os.kill(pid, signal.SIGKILL)


def test_an_interrupt_while_libraries_are_imported(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "luffy_trl", "train", *map(str, run_flags(tmp_path))]
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=stderr)
    wait_until(lambda: re.search(r"\| +numpy$", (tmp_path / "stderr").read_text(), re.MULTILINE))
    process.send_signal(signal.SIGINT)
    assert process.wait(600) == 130
    printed = (tmp_path / "stderr").read_text()
    assert "Traceback" not in printed and printed.count("Interrupted. ") == 1


def test_no_exception_reaches_a_library_that_is_imported(tmp_path):
    """C++ code that gets one while it is loaded aborts the process."""
    lines = ["import os, time", "try:", "    print('here', flush=True)", "    time.sleep(60)"]
    (tmp_path / "library.py").write_text("\n".join([*lines, "except BaseException:", "    os.abort()"]))
    script = "with in_one_line_if_interrupted('Go on.'):\n    import library"
    script = f"from luffy_trl.errors import in_one_line_if_interrupted\n{script}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, text=True, **pipes)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=600)[1] == "\nInterrupted. Go on.\n"
    assert process.returncode == 130


class NeverAnswers(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"data": [{"id": "model"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.server.asked.set()
        self.server.is_over.wait()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["eval", "--backend", "vllm", "--model_name_or_path", "model", "--data_files", "train.jsonl"],
            "is in `output",
        ),
        (["prepare-data", "generate", "--model", "model", "--dataset_name", "train.jsonl"], "are in the journal."),
    ],
    ids=["eval", "generate"],
)
def test_an_interrupt_of_a_command_that_waits(tmp_path, command, message):
    run_flags(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), NeverAnswers)
    server.asked, server.is_over, server.daemon_threads = threading.Event(), threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    arguments = [*command, "--base_url", f"http://127.0.0.1:{server.server_port}/v1", "--output_dir", "out"]
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "luffy_trl", *arguments],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert server.asked.wait(600)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        time.sleep(1.0)
        server.is_over.set()  # an evaluation waits for the requests that are under way
        _, printed = process.communicate(timeout=600)
    finally:
        server.is_over.set()
        server.shutdown()
        server.server_close()
    last_line = printed.strip().splitlines()[-1]
    assert process.returncode == 130 and "Traceback" not in printed
    assert last_line.startswith("Interrupted. Continue with the same command: ") and message in last_line


@pytest.mark.parametrize("launcher", [["luffy_trl", "train"], ["accelerate.commands.launch"]])
def test_what_all_processes_refuse_is_said_once(tmp_path, launcher):
    flags = [*map(str, run_flags(tmp_path, num_generations=3))]
    launch = ["--num_processes", "2", "--multi_gpu", "--main_process_port", "0"]
    is_luffy = launcher[0] == "luffy_trl"
    command = [*launcher, *flags, *launch] if is_luffy else [*launcher, *launch, "-m", "luffy_trl", "train", *flags]
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 1
    assert result.stderr.count("ValueError: `num_generations=3` does not divide the 16 completions") == 1
    assert not is_luffy or len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_what_one_process_refuses_is_said(tmp_path, monkeypatch, capsys):
    """Processes of one launcher, told apart by their files: each says what no other has said."""
    said = []
    for rank, message in enumerate(["all", "all", "only this"]):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / str(rank) / "error.json"))
        (tmp_path / "attempt_0" / str(rank)).mkdir(parents=True)
        with pytest.raises(SystemExit) as exit_info:
            with in_one_line():
                Parser(prog=message).parse_args_into_dataclasses(["--x"])
        said.append(exit_info.value.code)
    assert said == [
        "ValueError: `all` knows no argument '--x'.",
        1,
        "ValueError: `only this` knows no argument '--x'.",
    ]


def test_two_runs_into_one_folder(tmp_path, monkeypatch, capsys):
    arguments = [*map(str, run_flags(tmp_path, max_steps=3, save_strategy="steps", save_steps=1))]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 0
    states = [path / "trainer_state.json" for path in sorted(tmp_path.glob("out/checkpoint-*"))]
    written = [path.stat().st_mtime_ns for path in states]
    for extra, message in (
        ([], "ValueError: `output_dir` 'out' has checkpoints of an earlier run, up to checkpoint-3. Go on with"),
        (
            ["--resume_from_checkpoint", "true"],
            "has made 3 updates, and the run has 3: nothing is left to train. Raise",
        ),
        (
            ["--resume_from_checkpoint", "true", "--overwrite_output_dir", "true"],
            "ValueError: `overwrite_output_dir=True` deletes the checkpoints that `resume_from_checkpoint` may need.",
        ),
    ):
        assert cli.main(["train", *arguments, *extra]) == 1
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert [path.stat().st_mtime_ns for path in states] == written and len(written) == 3
    assert not (tmp_path / "out" / "_run.lock").exists()
    assert cli.main(["train", *arguments, "--max_steps", "2", "--overwrite_output_dir", "true"]) == 0
    assert sorted(path.name for path in tmp_path.glob("out/checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_two_runs_at_once(tmp_path, monkeypatch, capsys):
    """Another process, which ends without a word, holds the folder."""
    arguments = [*map(str, run_flags(tmp_path))]
    monkeypatch.chdir(tmp_path)
    code = "import time, luffy_trl.processes as p\nwith p.locked('out'): print(1, flush=True); time.sleep(999)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        (tmp_path / "out" / "checkpoint-1").mkdir()
        assert cli.main(["train", *arguments, "--overwrite_output_dir", "true"]) == 1
        (tmp_path / "out" / "checkpoint-1").rmdir()  # it is there: nothing of a run that writes is deleted
        assert cli.main(["train", *arguments]) == 1
        other.kill()
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("ValueError: Another run writes to `output_dir` 'out'.")
    assert cli.main(["train", *arguments]) == 0  # what the killed one has left keeps nobody out


@pytest.mark.parametrize("command", ["train", "sft"])
def test_help_shows_what_is_ours(command, capsys):
    shown = []
    for flag in ("-h", "--help-all"):
        with pytest.raises(SystemExit) as exit_info:
            cli.main([command, flag])
        assert exit_info.value.code == 0
        shown.append(capsys.readouterr().out)
    short, complete = shown
    own = {"train": ["--policy_shaping", "--reward_funcs"], "sft": ["--max_completion_length"]}[command]
    for name in [*own, "--learning_rate", "--model_name_or_path", "--config", "--help-all"]:
        assert f"\n  {name}" in short and f"\n  {name}" in complete
    assert "--adam_beta1" not in short and "\n  --adam_beta1" in complete
    assert "--help-all` shows the options of TRL and transformers too" in short
    assert len(short.splitlines()) < len(complete.splitlines()) / 3


def test_no_warnings_of_our_own_defaults(tmp_path):
    """What a run prints on stderr, beside progress bars: nothing that a user could not have avoided."""
    result = luffy(
        "train", *run_flags(tmp_path, max_steps=2), cwd=tmp_path, env={"PYTHONWARNINGS": "default::FutureWarning"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.rpartition("\r")[2] for line in result.stderr.splitlines()]
    assert [line for line in lines if line.strip()] == []  # nor bars, where there is no terminal
    words = ["model", "data", "step", "memory", "results", "1/2", "2/2", "ended", "The"]
    assert [line.split()[0] for line in result.stdout.splitlines()] == words


def test_a_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"traces, openai is needed: `pip install luffy-trl\[data\]`"):
        cli.main(["prepare-data", "generate", "-h"])


def test_a_single_reward_in_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("reward_funcs: lone_rewards.one\neval_dataset_names: held_out.jsonl\n")
    (tmp_path / "lone_rewards.py").write_text("def one(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    flags = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    args, *_ = make_parser().parse_args_and_config(["--config", "recipe.yaml", *flags])
    assert args.eval_dataset_names == ["held_out.jsonl"]
    (reward_func,) = get_reward_funcs(args)
    assert reward_func(["a", "b"]) == [1.0, 1.0]


def test_evaluation_files_of_one_name():
    with pytest.raises(ValueError, match="`eval_dataset_names` has two that are called 'test' in the log. Rename one"):
        LuffyScriptArguments(eval_dataset_names=["a/other.jsonl", "a/test.jsonl", "b/test.parquet"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_rewards.one", "'no_such_rewards.one' cannot be loaded: No module named 'no_such_rewards'"),
        ("math.one", "'math.one' cannot be loaded: module 'math' has no attribute 'one'"),
    ],
)
def test_a_reward_that_is_not_there(name, message):
    with pytest.raises(ValueError, match=message):
        get_reward_funcs(LuffyScriptArguments(reward_funcs=[name]))


def test_an_unknown_accelerate_config():
    with pytest.raises(ValueError, match="Accelerate config zero9 is neither a file nor a valid config"):
        cli.main(["train", "--accelerate_config", "zero9"])


def test_a_shipped_file_does_not_hide_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(cli.PACKAGE / "recipes" / "sft.yaml")
    assert cli._with_shipped_recipe(["--seed", "1", "--config", "sft"]) == ["--seed", "1", "--config", shipped]
    Path("sft").write_text("seed: 1")
    assert cli._with_shipped_recipe(["--config", "sft"]) == ["--config", "sft"]


def test_the_wheel_has_the_command_the_recipes_and_the_launch_files(tmp_path):
    """Built as it lies here; `examples/configs` and `accelerate_configs` are links to what the package has."""
    assert (ROOT / "examples" / "configs").resolve() == cli.PACKAGE / "recipes"
    assert (ROOT / "accelerate_configs").resolve() == cli.PACKAGE / "accelerate_configs"
    for name in ("luffy_trl", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("recipes", "accelerate_configs"):
        files = {f"luffy_trl/{folder}/{path.name}" for path in (cli.PACKAGE / folder).glob("*.yaml")}
        assert len(files) >= 6 and files <= names
    assert {"luffy_trl/scripts/train.py", "luffy_trl/scripts/sft.py"} <= names
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "luffy = luffy_trl.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()
