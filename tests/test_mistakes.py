# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
The likeliest mistakes of a first hour: each ends in a message that says what to do, before a model is loaded.

They are made with the script of `luffy train`, on a model without weights: whatever comes to load them fails the test.
"""

import functools
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tiny
from datasets import Dataset
from safetensors import SafetensorError
from transformers import AutoTokenizer

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.checks import check_vllm_server, has_bf16
from luffy_trl.scripts import train


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


@pytest.fixture
def luffy_train(tmp_path, model_path):
    def run(rows=RIGHT, **kwargs):
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
        train.main(*train.make_parser().parse_args_and_config(flags))

    return run


def renamed(**names):
    return [{names.get(name, name): value for name, value in row.items()} for row in RIGHT]


def test_without_a_mistake_it_is_the_weights_that_fail(luffy_train):
    """So that each message below comes before them."""
    with pytest.raises(SafetensorError):
        luffy_train()


def test_wrong_column(luffy_train):
    for rows, message in (
        (renamed(prompt="question"), r"no column `prompt`, only \['question', 'demonstrations', 'answer'\]. Rename"),
        (renamed(demonstrations="response"), "exactly one of `demonstrations` .* Rename or remove a column"),
        (renamed(answer="gold"), "`math_verify_reward` needs the gold answers, .* rename the one with the answers"),
        ([{**RIGHT[0], "prompt": None}, *RIGHT[1:]], "row 0: `prompt` must be a string or a list .* got 'None'. Mend"),
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
        "`</think>`, which `require_think` asks for. .* mend the traces or `reward_funcs`",
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


def test_bf16_without_a_gpu(luffy_train):
    with pytest.raises(ValueError, match=r"`bf16=True`, the default, needs a GPU .* \(`--use_cpu --bf16 false`\)"):
        luffy_train(use_cpu="false", bf16="true")


def test_bf16_on_an_old_cpu(luffy_train, monkeypatch):
    old = {"avx2": True, "avx512_bf16": False, "amx_bf16": False}
    assert not has_bf16(old) and has_bf16({**old, "amx_bf16": True})
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: old)
    with pytest.warns(UserWarning, match="This CPU has no instructions for bf16 .* Set `bf16=False`"):
        with pytest.raises(SafetensorError):
            luffy_train(bf16="true")


def test_missing_extra(luffy_train, monkeypatch):
    with pytest.raises(ValueError, match=r"`use_vllm=True` needs vLLM, .* `pip install luffy-trl\[vllm\]`"):
        luffy_train(use_vllm="true")  # which is in an environment of its own
    # what is installed here cannot be missing
    monkeypatch.setattr("luffy_trl.checks.get_available_reporting_integrations", lambda: [])
    with pytest.raises(ValueError, match="`report_to` names 'wandb', which is not installed: `pip install wandb`, or"):
        luffy_train(report_to="wandb")
    monkeypatch.setattr("luffy_trl.scripts.train.is_peft_available", lambda: False)
    with pytest.raises(ValueError, match=r"`use_peft=True` needs PEFT, .* `pip install luffy-trl\[peft\]`"):
        luffy_train(use_peft="true")


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


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *args):
        pass
