# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import json
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from luffy_trl import LuffyTrainer
from luffy_trl.chat_templates import CHAT_TEMPLATES, SYSTEM_PROMPT
from luffy_trl.prepare_model import PrepareArguments, main


QUESTION = [{"role": "user", "content": "1 + 1 = ?"}]
TRACE = "<think>\nOne and one.\n</think>\n\n\\boxed{2}"


def save_base_model(path):
    """Shaped as Qwen2.5-Math: 4096 positions, padding with what ends a text, a cap on new tokens, an older config."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    model = tiny.make_model(tokenizer, max_position_embeddings=4096)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, max_new_tokens=2048)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    (path / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0, "rope_scaling": None}))
    (path / "LICENSE").write_text("Free.")
    return path


def save_llama(path, **kwargs):
    """Shaped as Llama 3.1: a BOS token before every text, no padding token, a scaled rotary embedding."""
    alphabet = sorted(ByteLevel.alphabet())
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    backend = Tokenizer(BPE({token: i for i, token in enumerate([*specials, *alphabet])}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        extra_special_tokens=["<|finetune_right_pad_id|>"],
    )
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 131072,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **kwargs,
        }
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def prepare(source, output, **kwargs):
    main(PrepareArguments(model_name_or_path=str(source), output_dir=str(output), **kwargs))
    return (
        AutoConfig.from_pretrained(output),
        AutoTokenizer.from_pretrained(output),
        GenerationConfig.from_pretrained(output),
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_the_papers_starting_point(tmp_path, capsys):
    base = save_base_model(tmp_path / "base")
    config, tokenizer, generation_config = prepare(base, tmp_path / "out")
    assert config.max_position_embeddings == 16384
    assert config.rope_parameters == {"rope_theta": 40000.0, "rope_type": "default"}
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    pad = tokenizer.convert_tokens_to_ids("<|pad|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, pad)
    assert (config.eos_token_id, config.pad_token_id) == (end, pad)
    assert (generation_config.eos_token_id, generation_config.pad_token_id) == ([end], pad)
    assert generation_config.max_new_tokens is None
    assert contents(base)["model.safetensors"] == contents(tmp_path / "out")["model.safetensors"]
    assert contents(tmp_path / "out")["LICENSE"] == b"Free."
    printed = capsys.readouterr().out
    assert "16384 positions (before: 4096), rotary embedding {'rope_theta': 40000.0" in printed
    assert f"padding with '<|pad|>' ({pad})" in printed

    rotary = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, 40000.0 ** -(torch.arange(0, 8, 2) / 8))

    assert tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True) == (
        f"{SYSTEM_PROMPT}\nUser: This is the problem:\n1 + 1 = ?\nAssistant: <think>\n"
    )


def test_again_it_changes_nothing(tmp_path):
    base = save_base_model(tmp_path / "base")
    prepare(base, tmp_path / "a")
    first = contents(tmp_path / "a")
    prepare(tmp_path / "a", tmp_path / "b")  # on its own output
    assert contents(tmp_path / "b") == first
    mtime = (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns
    inode = (tmp_path / "a" / "model.safetensors").stat().st_ino
    prepare(tmp_path / "a", tmp_path / "a")  # in place
    prepare(base, tmp_path / "a")  # the same command again
    assert contents(tmp_path / "a") == first
    stat = (tmp_path / "a" / "model.safetensors").stat()
    assert (stat.st_mtime_ns, stat.st_ino) == (mtime, inode)  # not even copied


def test_weights_are_not_loaded(tmp_path, monkeypatch):
    base = save_base_model(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"not even weights")
    prepare(base, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"not even weights"


def test_weights_in_another_format(tmp_path):
    base = save_base_model(tmp_path / "base")
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    config, _, _ = prepare(base, tmp_path / "out")
    prepared = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert config.rope_parameters["rope_theta"] == 40000.0
    assert weights.keys() == prepared.keys()
    assert all(torch.equal(weights[name], prepared[name]) for name in weights)


def test_llama_with_the_plain_template(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    base = save_llama(tmp_path / "base", rope_parameters=rope)
    config, tokenizer, generation_config = prepare(base, tmp_path / "out", chat_template="cot")
    assert config.max_position_embeddings == 131072
    assert config.rope_parameters == rope
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert generation_config.eos_token_id == [1]
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM_PROMPT}, *QUESTION], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|begin_of_text|>User: 1 + 1 = ?\nAnswer: Let's think step by step."
    prepare(tmp_path / "out", tmp_path / "again", chat_template="cot")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_turn_that_ends_in_another_token(tmp_path):
    base = save_base_model(tmp_path / "base")
    _, tokenizer, generation_config = prepare(base, tmp_path / "out", chat_template="qwen_math")
    end, of_text = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"  # it was, and does not end a turn
    assert generation_config.eos_token_id == [end, of_text]


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_training_on_a_prepared_model(tmp_path, family):
    save = {"qwen": save_base_model, "llama": save_llama}[family]
    prepare(save(tmp_path / "base"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = [{"prompt": QUESTION, "demonstrations": [TRACE], "answer": "2"}] * 4
    args = tiny.make_args(tmp_path / "run", max_completion_length=64)
    trainer = LuffyTrainer(str(tmp_path / "out"), tiny.share_of_digits, args, Dataset.from_list(rows))
    ids = tiny.trace_ids(trainer)[0][0]
    assert tokenizer.decode(ids) == f"{TRACE.removeprefix('<think>' + chr(10))}{tokenizer.eos_token}"
    before = trainer.model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["demonstrations/dropped"] == 0
    assert log["demonstrations/length"] == len(ids)
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_templates(name):
    tokenizer = tiny.make_tokenizer(CHAT_TEMPLATES[name])

    def render(messages, **kwargs):
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    prompt = render(QUESTION, add_generation_prompt=True)
    papers = [{"role": "system", "content": SYSTEM_PROMPT}, *QUESTION]
    assert render(papers, add_generation_prompt=True) == prompt
    assert prompt.count("1 + 1 = ?") == 1
    assert prompt.endswith("<think>\n") == (name == "luffy")
    # a turn, as generation wrote it and as the dataset has it
    for content in (TRACE.removeprefix("<think>\n"), TRACE) if name == "luffy" else ("It is 2.",):
        turn = render([*QUESTION, {"role": "assistant", "content": content}])
        assert turn.rstrip("\n") == f"{prompt}{content.removeprefix('<think>' + chr(10))}<|im_end|>"
    other = [{"role": "system", "content": "Be brief."}, *QUESTION]
    if name == "luffy":
        assert render(other).startswith("Be brief.\nUser: This is the problem:\n")
    else:
        with pytest.raises(Exception, match="no place for a system message"):
            render(other)


def test_a_template_file_and_none(tmp_path):
    base = save_base_model(tmp_path / "base")
    (tmp_path / "mine.jinja").write_text(tiny.CHATML)
    _, tokenizer, _ = prepare(base, tmp_path / "a", chat_template=str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == tiny.CHATML
    _, tokenizer, _ = prepare(base, tmp_path / "b", chat_template="keep")
    assert tokenizer.chat_template == tiny.CHATML


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"chat_template": "nonsense"}, "`chat_template` must be one of luffy, cot, qwen_math"),
        ({"chat_template": "gone.jinja"}, "There is no file 'gone.jinja'. Check `chat_template`"),
        ({"chat_template": "keep"}, "The tokenizer has no chat template to keep"),
        (
            {"chat_template": "qwen_math"},
            r"ends a turn of the assistant with '<\|im_end\|>\\n', and this tokenizer has no",
        ),
        ({"max_position_embeddings": 262144}, r"is scaled already \(`rope_type` is 'linear'\). Set `rope_theta`"),
    ],
)
def test_what_cannot_be_done(tmp_path, kwargs, message):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    base = save_llama(tmp_path / "base", rope_parameters=rope)
    with pytest.raises(ValueError, match=message):
        prepare(base, tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()


def test_positions_of_ones_own(tmp_path):
    base = save_base_model(tmp_path / "base")
    config, _, _ = prepare(base, tmp_path / "a", max_position_embeddings=8192)
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (8192, 20000.0)
    config, _, _ = prepare(base, tmp_path / "b", max_position_embeddings=8192, rope_theta=1e6)
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (8192, 1e6)
    config, _, _ = prepare(base, tmp_path / "c", max_position_embeddings=2048)
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (4096, 10000.0)


def test_the_command(tmp_path, capsys):
    base = save_base_model(tmp_path / "base")
    arguments = ["--model_name_or_path", base, "--output_dir", tmp_path / "out", "--rope_theta", "30000"]
    assert tiny.exit_of("luffy_trl.prepare_model", *arguments) == 0
    assert "a turn ends with '<|endoftext|>'" in capsys.readouterr().out
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 30000.0
