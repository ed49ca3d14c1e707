# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
The likeliest mistakes of a first hour: each ends in a message that says what to do, before a model is loaded.

They are made with the scripts of `luffy train` and `luffy sft`, on a model without weights: whatever comes to load
them fails the test.
"""

import base64
import functools
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tiny
import wandb
from datasets import Dataset, DatasetDict
from safetensors import SafetensorError
from transformers import AutoTokenizer
from trl import ModelConfig

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.checks import check_model, check_vllm_server, has_bf16
from luffy_trl.data import load_data
from luffy_trl.data.openr1 import stream
from luffy_trl.demonstrations import check_prompt_column
from luffy_trl.errors import in_one_line
from luffy_trl.scripts import sft, train


RIGHT = [
    {"prompt": f"{i}+1=", "demonstrations": [rf"<think>{i}</think>\boxed{{{i + 1}}}"], "answer": str(i + 1)}
    for i in range(8)
]


@pytest.fixture
def model_path(tmp_path):
    """A model whose weights cannot be loaded."""
    path = tiny.save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    return path


def make_script(script, tmp_path, model_path):
    def run(rows=RIGHT, **kwargs):
        if "dataset_name" not in kwargs:
            Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
        values = {
            "model_name_or_path": model_path,
            "dataset_name": tmp_path / "train.jsonl",
            "output_dir": tmp_path / "out",
            "per_device_train_batch_size": 8,
            "max_completion_length": 32,
            "max_steps": 1,
            "use_cpu": "true",
            "bf16": "false",
            "report_to": "none",
            **kwargs,
        }
        flags = [part for name, value in values.items() for part in (f"--{name}", *str(value).split(" "))]
        script.main(*script.make_parser().parse_args_and_config(flags))

    return run


@pytest.fixture
def luffy_train(tmp_path, model_path):
    return make_script(train, tmp_path, model_path)


@pytest.fixture(params=[train, sft], ids=["train", "sft"])
def luffy(request, tmp_path, model_path):
    """Both scripts."""
    return make_script(request.param, tmp_path, model_path)


def renamed(**names):
    return [{names.get(name, name): value for name, value in row.items()} for row in RIGHT]


def test_without_a_mistake_it_is_the_weights_that_fail(luffy):
    """So that each message below comes before them."""
    with pytest.raises(SafetensorError):
        luffy()


LINE = b'{"prompt": "1+1=", "demonstrations": ["2"], "answer": "2"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            LINE * 2 + b'{"prompt": "1\n' + LINE,
            "Line 3 of '{}' is no JSON, from character 14 on: Invalid con",
        ),
        ("a.jsonl", LINE * 2 + LINE[:20], "Line 3 of '{}' is no JSON, from character 20 on: Unterminated string"),
        ("a.jsonl", LINE[:-1] + b",\n" + LINE, "Line 1 of '{}' is no JSON, from character 59 on: Extra data. Correct"),
        ("a.jsonl", LINE + b"3\n", r"Line 2 of '{}' is no JSON object, such as \{{\"prompt\": ...\}}"),
        (
            "a.jsonl",
            b'{"prompt": "\xe9"}\n' + LINE,
            "Line 1 of '{}' is no text in UTF-8: 'utf-8' codec can't decode byt",
        ),
        ("a.jsonl", b"", "'{}' is an empty file. It needs a row for each problem"),
        ("a.jsonl", b"\n\n", "'{}' has no rows"),
        (
            "a.json",
            b"[" + LINE + b",\n x]",
            "Line 3 of '{}' is no JSON, from character 2 on: Expecting value. Correct",
        ),
        ("a.json", b"[]", "'{}' has no rows"),
        (
            "a.csv",
            b"prompt,completion,answer\n1,2,3\n1,2,3,4\n",
            "'{}' cannot be loaded. ParserError: .* line 3, saw 4",
        ),
        ("a.csv", b"prompt,completion,answer\n", "'{}' has no rows"),
        ("a.csv", b"prompt,completion\n1,\xe9\n", "'{}' cannot be loaded. UnicodeDecodeError: "),
        ("a.parquet", b"nothing", "'{}' cannot be loaded. ArrowInvalid: Parquet file size is 7 bytes"),
        ("a.txt", LINE, "'{}' is a file of another format than .jsonl, .json, .parquet, .csv. Write a .jsonl file"),
        ("a.jsonl.gz", LINE, "'{}' is a file of another format than"),
        ("a.jsonl", None, "There is no file '{}'. Check `dataset_name`"),
        ("a", None, "'{}' is no file or folder here, and no dataset on the Hub that can be loaded. FileNotFound"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    """As all commands read them: at once, as a stream, and for `luffy prepare-data`."""
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    for read in (load_data, lambda name: load_data(name, streaming=True), lambda name: list(stream(name))):
        with pytest.raises(ValueError, match=message.format(file)) as error:
            read(str(file))
        assert "\n" not in str(error.value)


def test_folders_that_cannot_be_read(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        ValueError, match="folder' cannot be loaded. EmptyDatasetError: .* doesn't contain any data file"
    ):
        load_data(str(tmp_path / "folder"))
    (tmp_path / "folder" / "a.jsonl").write_bytes(LINE)
    assert load_data(str(tmp_path / "folder")).num_rows == 1
    with pytest.raises(
        ValueError, match='folder\' cannot be loaded. ValueError: Unknown split "test". Should be one of'
    ):
        load_data(str(tmp_path / "folder"), "test")
    (tmp_path / "folder" / "b.jsonl").write_bytes(LINE + b"x\n")
    with pytest.raises(ValueError, match="Line 2 of '.*folder/b.jsonl' is no JSON, from character 1 on"):
        load_data(str(tmp_path / "folder"))
    DatasetDict(train=Dataset.from_list(RIGHT)).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="saved' has the splits train, and none called 'test'"):
        load_data(str(tmp_path / "saved"), "test")
    (tmp_path / "saved" / "train" / "dataset_info.json").write_text("x")
    with pytest.raises(ValueError, match="Line 1 of '.*saved/train/dataset_info.json' is no JSON"):
        load_data(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="'someone/nothing' is no file or folder here, and no dataset on the Hub"):
        load_data("someone/nothing")  # the tests are offline


def test_a_file_in_which_a_later_line_is_broken(tmp_path):
    """Behind what a stream reads at first, 10 MB."""
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write((LINE[:-3] + b"0" * 10_000 + b'"}\n') * 1500 + b"x\n")
    rows = stream(str(tmp_path / "a.jsonl"))
    assert next(rows)["prompt"] == "1+1="
    with pytest.raises(ValueError, match="Line 1501 of '.*a.jsonl' is no JSON, from character 1 on"):
        list(rows)


def test_a_dataset_that_cannot_be_read(luffy, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE + b"x\n")
    with pytest.raises(ValueError, match="Line 2 of '.*a.jsonl' is no JSON, from character 1 on: Expecting value"):
        luffy(dataset_name=tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
            "`prompt` ends with a message of the assistant, and must end with the user's. Move what the assistant",
        ),
        (
            [{"role": "human", "content": "1"}],
            "`prompt` has the roles 'human'. Call them 'user' and 'assistant', as chat templates do",
        ),
        (
            [{"role": "system", "content": "1"}, {"role": "human", "content": "1"}, {"role": "gpt", "content": "1"}],
            "`prompt` has the roles 'system', 'human', 'gpt'. Call them 'user' and 'assistant'",
        ),
        (
            [{"from": "human", "value": "1"}],
            "`prompt` must be .* Call `from` and `value` of a message `role` and `content`, 'human' 'user', and 'gpt'",
        ),
        ([], r"`prompt` must be a string or a list of chat messages, got '\[\]'"),
        (["1"], r"`prompt` must be a string or a list of chat messages, got \"\['1'\]\""),
    ],
)
def test_prompts_that_ask_nothing(luffy, prompt, message):
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        luffy([{"prompt": prompt, "completion": "2", "answer": "2"}])


def test_messages_in_a_csv_file(luffy, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "1"}], "completion": "2", "answer": "2"}]
    Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    with pytest.raises(
        ValueError, match="row 0: .* These are messages written as text. A csv file has no lists: write"
    ):
        luffy(dataset_name=tmp_path / "a.csv")
    with pytest.raises(SafetensorError):  # a question about messages is none
        luffy([{**row, "prompt": 'What is [{"role": "user"}]?'} for row in RIGHT])


def test_traces_in_a_csv_file(luffy, tmp_path):
    (tmp_path / "a.csv").write_text("prompt,demonstrations,answer\n1+1=,\"['2']\",2\n")
    with pytest.raises(
        ValueError, match="row 0: `demonstrations` .* A csv file has no lists: name the column `completi"
    ):
        luffy(dataset_name=tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("prompt,completion,answer\n1+1=,\\boxed{2},2\n" + "2+1=,\\boxed{3},3\n" * 7)
    with pytest.raises(SafetensorError):
        luffy(dataset_name=tmp_path / "a.csv")


def test_wrong_column(luffy_train):
    for rows, message in (
        (renamed(prompt="question"), r"no column `prompt`, only \['question', 'demonstrations', 'answer'\]. Rename"),
        (renamed(demonstrations="response"), "exactly one of `demonstrations` .* Rename or remove a column"),
        (renamed(answer="gold"), "`math_verify_reward` needs the gold answers, .* rename the one with the answers"),
        ([{**RIGHT[0], "prompt": None}, *RIGHT[1:]], "row 0: `prompt` must be a string or a list .* got 'None'. Fix"),
    ):
        with pytest.raises(ValueError, match=message):
            luffy_train(rows)


def test_reward_function_of_the_users(luffy_train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistaken_rewards.py").write_text(
        "def by_target(completions, target, **kwargs): return [1.0 for _ in completions]\n"
        "def narrow(completions, answer): return [1.0 for _ in completions]\n"
        "def broken(completions, **kwargs): return [kwargs['gold'] for _ in completions]\n"
        "def short(completions, **kwargs): return [1.0]\n"
    )
    for name, message in (
        (
            "by_target",
            "`by_target` has the parameter `target`, and the dataset has only the columns .* Rename the par",
        ),
        ("narrow", "`narrow` does not take `completion_ids`: .* Add `\\*\\*kwargs` to its parameters"),
        ("broken", "The reward function `broken` fails: KeyError: 'gold'"),
        ("short", "The reward function `short` fails: ValueError: it returns 1 rewards for 8 completions"),
    ):
        with pytest.raises(ValueError, match=message):
            luffy_train(reward_funcs=f"mistaken_rewards.{name}")


def test_traces_that_the_reward_rejects(luffy_train, tmp_path, monkeypatch, caplog):
    rows = [{**row, "demonstrations": [rf"\boxed{{{row['answer']}}}"]} for row in RIGHT]
    with pytest.raises(
        ValueError,
        match=r"The reward rejects all 8 traces of the first 8 rows, such as row 0, demonstrations\[0\]: no "
        "`</think>`, which `require_think` asks for. .* fix the traces, `reward_funcs` or `require_think`",
    ):
        luffy_train(rows, require_think="true")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strict_rewards.py").write_text(
        "def nothing(completions, **kwargs): return [0.0 for _ in completions]\n"
    )
    with pytest.raises(SafetensorError):  # zero may be the best that it gives
        luffy_train(reward_funcs="strict_rewards.nothing")
    assert "The reward rejects all 8 traces of the first 8 rows" in caplog.text


def test_no_eos(luffy_train, model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model_path)
    with pytest.raises(ValueError, match="no end-of-sequence token, .* Set `tokenizer.eos_token` .* prepare-model"):
        luffy_train()


def test_too_small_completion_length(luffy_train, caplog):
    with pytest.raises(ValueError, match="All 8 traces have more tokens than `max_completion_length=12`, .* Raise it"):
        luffy_train(max_completion_length=12)
    rows = [{**RIGHT[0], "demonstrations": [RIGHT[0]["demonstrations"][0], "x" * 40]}, *RIGHT[1:]]
    with pytest.raises(SafetensorError):
        luffy_train(rows)
    assert "1 traces have more tokens than `max_completion_length=32` and are dropped. `luffy inspect`" in caplog.text


def test_too_small_completion_length_without_the_script(tmp_path, model_path):
    dataset = Dataset.from_list(tiny.addition_rows(4))
    with pytest.raises(
        ValueError, match="All 4 traces have more tokens than `max_completion_length=12`, so that none"
    ):
        LuffyTrainer(model_path, tiny.share_of_digits, tiny.make_args(tmp_path, max_completion_length=12), dataset)


def test_group_size_that_does_not_divide(luffy_train):
    with pytest.raises(
        ValueError,
        match=r"`num_generations=3` does not divide the 8 completions .* `per_device_train_batch_size` \(8\) times 1 "
        r"process\(es\) times `steps_per_generation` \(1\). Change one of them.",
    ):
        luffy_train(num_generations=3)


def test_mismatched_chat_template(luffy_train, model_path, caplog):
    chat = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in RIGHT]
    # another model's markup in the traces
    rows = [{**row, "demonstrations": [row["demonstrations"][0] + "<|eot_id|>"]} for row in chat]
    with pytest.raises(SafetensorError):
        luffy_train(rows)
    assert (
        "8 of the 8 traces of the first 8 rows look wrong: row 0: `demonstrations[0]` holds '<|eot_id|>', the mark"
        in (caplog.text)
    )
    # a template that ends its turns by what does not end generation
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("<|im_end|>", "<|endoftext|>")
    tokenizer.save_pretrained(model_path)
    with pytest.raises(SafetensorError):
        luffy_train(chat)
    assert (
        "The chat template ends an assistant turn with '<|endoftext|>\\n', which does not end generation"
        in caplog.text
    )
    # no template
    (Path(model_path) / "chat_template.jinja").unlink()
    with pytest.raises(
        ValueError, match="the tokenizer has no chat template. `luffy prepare-model` gives a base model"
    ):
        luffy_train(chat)


def test_a_demonstration_that_repeats_its_prompt(luffy_train, caplog):
    rows = [{**row, "demonstrations": [row["prompt"] + row["demonstrations"][0]]} for row in RIGHT[:4]]
    with pytest.raises(SafetensorError):
        luffy_train([*rows, *RIGHT[4:]])
    assert (
        "4 of the 8 traces of the first 8 rows look wrong: row 0: `demonstrations[0]` begins with its own prompt"
        in (caplog.text)
    )


def test_bf16_without_a_gpu(luffy):
    with pytest.raises(ValueError, match=r"`bf16=True`, the default, needs a GPU .* \(`--use_cpu --bf16 false`\)"):
        luffy(use_cpu="false", bf16="true")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", "`model_name_or_path`: './nope' is no folder here, and no model on the Hub that can be loaded. "),
        ("someone/nothing", "`model_name_or_path`: 'someone/nothing' is no folder here, and no model on the Hub"),
        ("{}/empty", "`model_name_or_path`: '{}/empty' is a folder without a model that can be loaded. "),
        (
            "{}/without_config",
            "`model_name_or_path`: '{}/without_config' is a folder without a model that can be load",
        ),
    ],
)
def test_a_model_that_is_not_there(luffy, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "without_config").mkdir()
    tiny.make_tokenizer().save_pretrained(tmp_path / "without_config")
    with pytest.raises(ValueError, match=message.format(tmp_path)) as error:
        luffy(model_name_or_path=name.format(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("script", [train, sft], ids=["train", "sft"])
def test_no_in_yaml(tmp_path, script):
    """`no` is False there."""
    (tmp_path / "recipe.yaml").write_text("save_strategy: no\neval_strategy: no\nlogging_strategy: no\n")
    flags = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    _, args, _ = script.make_parser().parse_args_and_config(flags)
    assert {args.save_strategy.value, args.eval_strategy.value, args.logging_strategy.value} == {"no"}


@pytest.mark.parametrize("module", ["scripts.train", "scripts.sft", "scripts.inspect_data", "eval", "data.openr1"])
def test_a_mistake_is_one_line_of_a_command(tmp_path, monkeypatch, module):
    """Of the first in a process of its own, where Python writes the line and sets the status."""
    (tmp_path / "a.jsonl").write_bytes(LINE + b"x\n")
    arguments = {
        "eval": ["--data_files", "a.jsonl", "--output_dir", "out", "--backend", "transformers"],
        "data.openr1": ["--dataset_name", "a.jsonl", "--output_dir", "out"],
        "scripts.inspect_data": ["--dataset_name", "a.jsonl"],
    }.get(module, ["--dataset_name", "a.jsonl", "--output_dir", "out", "--use_cpu", "true", "--bf16", "false"])
    if module != "data.openr1":
        arguments += ["--model_name_or_path", tiny.save_tiny_model(tmp_path / "model")]
    message = "ValueError: Line 2 of 'a.jsonl' is no JSON, from character 1 on"
    monkeypatch.chdir(tmp_path)
    if module == "scripts.train":
        command = [sys.executable, "-m", f"luffy_trl.{module}", *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].startswith(message)
    else:
        line = tiny.exit_of(f"luffy_trl.{module}", *arguments)
        assert line.startswith(message) and "\n" not in line


def test_what_is_no_mistake_keeps_its_traceback(tmp_path):
    def refuse():
        check_model(ModelConfig(model_name_or_path=None))

    with pytest.raises(SystemExit, match="ValueError: `model_name_or_path` is required: a model on the Hub"):
        with in_one_line():
            refuse()
    (tmp_path / "recipe.yaml").write_text("nothing: 1\n")
    with pytest.raises(SystemExit, match="ValueError: .* knows no option 'nothing', which the file of `--c"):
        with in_one_line():
            train.make_parser().parse_args_and_config(
                ["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "true", "--bf16", "false"]
            )
    for mistake, error in (
        (lambda: {}["x"], KeyError),
        (lambda: int("x"), ValueError),
        (lambda: load_data(), TypeError),
    ):
        with pytest.raises(error):
            with in_one_line():
                mistake()


def test_bf16_on_an_old_cpu(luffy_train, monkeypatch):
    old = {"avx2": True, "avx512_bf16": False, "amx_bf16": False}
    assert not has_bf16(old) and has_bf16({**old, "amx_bf16": True})
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: old)
    with pytest.warns(UserWarning, match="This CPU has no instructions for bf16 .* Set `bf16=False`"):
        with pytest.raises(SafetensorError):
            luffy_train(bf16="true")


def test_missing_extra(luffy_train):
    with pytest.raises(ValueError, match=r"`use_vllm=True` needs vLLM, .* `pip install luffy-trl\[vllm\]`"):
        luffy_train(use_vllm="true")  # which is in an environment of its own


def test_missing_extra_of_both(luffy, monkeypatch):
    # what is installed here cannot be missing
    monkeypatch.setattr("luffy_trl.checks.get_available_reporting_integrations", lambda: [])
    with pytest.raises(ValueError, match="`report_to` names 'wandb', which is not installed: `pip install wandb`, or"):
        luffy(report_to="wandb")
    monkeypatch.setattr("luffy_trl.checks.is_peft_available", lambda: False)
    with pytest.raises(ValueError, match=r"`use_peft=True` needs PEFT, .* `pip install luffy-trl\[peft\]`"):
        luffy(use_peft="true")


def test_a_tracker_that_nobody_knows(luffy):
    with pytest.raises(ValueError, match="`report_to` names 'wadnb', which transformers does not know. It .*wandb"):
        luffy(report_to="wadnb")


def test_wandb_without_a_login(luffy, tmp_path, monkeypatch):
    """A login is found where wandb looks for it, without a network."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # it has read the environment once
    with pytest.raises(ValueError, match="`report_to` names 'wandb', which has no login for api.*: `wandb login`"):
        luffy(report_to="wandb")
    for name, value in (("WANDB_API_KEY", "0" * 40), ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            wandb.teardown()
            with pytest.raises(SafetensorError):
                luffy(report_to="wandb")
    wandb.teardown()
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    with pytest.raises(SafetensorError):
        luffy(report_to="wandb")
    wandb.teardown()


def test_trackio_space_without_a_login(luffy, monkeypatch):
    monkeypatch.setattr("luffy_trl.checks.get_token", lambda: None)  # the machine may have one
    with pytest.raises(ValueError, match="`trackio_space_id` 'me/space' needs a login to the Hub: `hf auth login`"):
        luffy(report_to="trackio", trackio_space_id="me/space")
    with pytest.raises(SafetensorError):
        luffy(report_to="trackio")


def test_a_login_in_the_address_of_the_vllm_server(tmp_path, caplog):
    """It is sent as TRL's client sends it, and is in no message."""
    server = HTTPServer(("127.0.0.1", 0), NeedsLogin)
    options = {"use_cpu": True, "bf16": False, "use_vllm": True, "vllm_mode": "server", "vllm_server_timeout": 0.1}
    url = f"http://user:pass%20word@127.0.0.1:{server.server_port}"
    args = LuffyConfig(str(tmp_path), vllm_server_base_url=url, **options)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    check_vllm_server(args)
    server.shutdown()
    server.server_close()
    thread.join()
    with pytest.raises(ValueError, match=f"No vLLM server answers at http://127.0.0.1:{server.server_port} ") as error:
        check_vllm_server(args, retry_interval=0.1)
    told = f"{error.value} {error.value.__cause__} {caplog.text}"
    assert "Waiting for a vLLM server at http://127.0.0.1" in told and "pass" not in told and "user" not in told


def test_vllm_server_that_is_not_up(tmp_path, caplog):
    server = HTTPServer(("127.0.0.1", 0), Health)
    url = f"http://127.0.0.1:{server.server_port}"
    args = functools.partial(
        LuffyConfig,
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    check_vllm_server(args(vllm_server_timeout=30))
    server.shutdown()
    server.server_close()
    thread.join()
    with pytest.raises(
        ValueError, match=f"No vLLM server answers at {url} .* Start it first, as docs/vllm.md shows, or"
    ):
        check_vllm_server(args(vllm_server_timeout=0.1), retry_interval=0.1)
    assert f"Waiting for a vLLM server at {url}, up to 0.1 seconds." in caplog.text


class NeedsLogin(BaseHTTPRequestHandler):
    def do_GET(self):
        login = "Basic " + base64.b64encode(b"user:pass word").decode()
        self.send_response(200 if self.headers["Authorization"] == login else 401)
        self.end_headers()

    def log_message(self, *args):
        pass


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_numbers_in_a_csv_are_texts(tmp_path):
    """An answer, and a trace, may be a number, which a reader of csv would take for one."""
    (tmp_path / "rows.csv").write_text("prompt,completion,answer,level\n7*8=,56,56,1\n1/4=,0.250,0.250,2\n")
    rows = load_data(str(tmp_path / "rows.csv")).to_list()
    assert rows == [
        {"prompt": "7*8=", "completion": "56", "answer": "56", "level": 1},
        {"prompt": "1/4=", "completion": "0.250", "answer": "0.250", "level": 2},
    ]
    assert list(load_data(str(tmp_path / "rows.csv"), streaming=True)) == rows


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_conversation_instead_of_a_prompt(name):
    rows = Dataset.from_list([{name: [{"role": "user", "content": "1+1="}]}])
    with pytest.raises(
        ValueError, match=f"Split `{name}`: the messages up to the last user's are `prompt`, the answer"
    ):
        check_prompt_column(rows)
