# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Traces as token ids: what the policy is shown, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import trl
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from tokenizers.processors import TemplateProcessing
from transformers import Qwen2Tokenizer

from luffy_trl import LuffyTrainer
from luffy_trl.demonstrations import (
    DemonstrationTokenizer,
    decode,
    encode,
    to_supervised,
    tokenize_demonstrations,
    tokenize_prompt,
    tokenize_prompts,
    without_doubled_think,
)
from luffy_trl.sources.dataset import choose_demonstrations


EOS = "<|im_end|>"


def tokenized(rows, tokenizer=None, max_length=64, eos_token_ids=None, **kwargs):
    tokenizer = tokenizer or tiny.make_tokenizer()
    dataset = Dataset.from_list(rows)
    return tokenize_demonstrations(dataset, tokenizer, eos_token_ids or [tokenizer.eos_token_id], max_length, **kwargs)


def test_a_warning_before_accelerate_knows_its_processes():
    """As in a script that tokenizes its data before it makes a trainer."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport tiny\nfrom datasets import Dataset\n"
        "from luffy_trl.demonstrations import tokenize_demonstrations\n"
        "rows = Dataset.from_list([{'prompt': '1+1=', 'demonstrations': ['2<|eot_id|>']}])\n"
        "tokenizer = tiny.make_tokenizer()\n"
        "print(len(tokenize_demonstrations(rows, tokenizer, [tokenizer.eos_token_id], 64)))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.stdout.endswith("1\n"), result.stderr[-2000:]
    assert "1 of the 1 traces of the first 1 rows look wrong" in result.stderr


def texts(dataset, tokenizer=None):
    """The demonstrations of each row as text with special tokens."""
    tokenizer = tokenizer or tiny.make_tokenizer()
    return [[tokenizer.decode(ids) for ids in row] for row in dataset["demonstration_ids"]]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def test_standard_prompts():
    dataset = tokenized(
        [
            {"prompt": "1+1=", "demonstrations": ["2", "two"]},
            {"prompt": "2+2=", "demonstrations": []},
            {"prompt": "3+3=", "demonstrations": None},
        ]
    )
    vocab = tiny.make_tokenizer().get_vocab()
    assert dataset["demonstration_ids"][0] == [[vocab["2"], 1], [vocab["t"], vocab["w"], vocab["o"], 1]]
    assert dataset["demonstration_ids"][1:] == [[], []]
    assert dataset["demonstration_row"] == [0, 1, 2]


def test_a_dataset_of_empty_lists():
    dataset = tokenized([{"prompt": f"{i}", "demonstrations": []} for i in range(3)])
    assert dataset["demonstration_ids"] == [[], [], []]


def test_completion_column_of_trl():
    dataset = tokenized([{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": None}])
    assert texts(dataset) == [["2" + EOS], []]
    dataset = tokenized([{"prompt": user("1+1="), "completion": assistant("2")}])
    assert texts(dataset) == [["2" + EOS]]


@pytest.mark.parametrize("trace", ["<think>\nx\n</think>\n2", assistant("<think>\nx\n</think>\n2")])
def test_conversational_prompts_are_rendered_by_the_chat_template(trace):
    tokenizer = tiny.make_tokenizer()
    prompt = [{"role": "system", "content": "Think."}, *user("1+1?")]
    dataset = tokenized([{"prompt": prompt, "demonstrations": [trace]}])
    content = trace if isinstance(trace, str) else trace[0]["content"]
    turn = tokenizer.apply_chat_template([*prompt, *assistant(content)], return_dict=False)
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert turn[: len(prompt_ids)] == prompt_ids
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    assert turn[-2:] == [tokenizer.eos_token_id, newline]  # the template goes on after the end of the turn
    assert dataset["demonstration_ids"][0] == [turn[len(prompt_ids) : -1]]


def test_chat_template_arguments_are_used():
    template = tiny.CHATML.replace("{{ message.content }}", "{{ prefix }}{{ message.content }}")
    tokenizer = tiny.make_tokenizer(template)
    dataset = tokenized(
        [{"prompt": user("1"), "demonstrations": ["2"]}], tokenizer, chat_template_kwargs={"prefix": "So: "}
    )
    assert texts(dataset) == [["So: 2" + EOS]]


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "<think>\n\n", "<think> "])
@pytest.mark.parametrize("before", ["", "\n", " \n\n"])
def test_think_is_not_doubled(opening, before):
    tokenizer = tiny.make_tokenizer(tiny.THINKING_CHATML.replace("<think>\n", opening))
    space = opening.removeprefix("<think>")
    # White space behind the tag is the prompt's, or the trace's where the prompt has none
    expected = {f"<think>{space}x</think>2": "x</think>2", f"<think>{space}\nx</think>2": "\nx</think>2"}
    expected |= {"<think>x</think>2": "x</think>2", "<think> x</think>2": "x</think>2" if space else " x</think>2"}
    for trace, text in expected.items():
        rows = [{"prompt": user("1+1?"), "demonstrations": [before + trace]}]
        assert texts(tokenized(rows, tokenizer), tokenizer) == [[text + EOS]]
        rows = [{"prompt": f"1+1? {opening}", "demonstrations": [before + trace]}]
        assert texts(tokenized(rows, tokenizer), tokenizer) == [[text + EOS]]
    # what does not open the reasoning again stands as it is, and so does a trace where the prompt opens nothing
    assert without_doubled_think(f"1+1? {opening}", f"{before}x</think>2") == f"{before}x</think>2"
    assert without_doubled_think("1+1?", f"{before}<think>x</think>2") == f"{before}<think>x</think>2"


CHAT_TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
IMAGE_TEMPLATES = ("idefics3", "llava_next", "smolvlm")  # which leave out a message whose content is a string
END_OF_TURN = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "lfm2": EOS,
    "llama3": "<|eot_id|>",
    "muse_glimmer": "<|eot|>",
    "nemotron": EOS,
    "phi3": "<|end|>",
    "qwen": EOS,
}
ANSWER = r"It is \boxed{4}."
REASONING = f"<think>\nAdd.\n</think>\n\n{ANSWER}"
OPENED, CLOSED, NEITHER = "never closes the `<think>`", "reasons, but the rendered prompt", None
# By thinking: what the model writes of an answer, what it writes of reasoning and an answer, and what looks wrong
QWEN3 = {True: (f"<think>\n\n</think>\n\n{ANSWER}", REASONING, NEITHER), False: (ANSWER, REASONING, CLOSED)}
QWEN3_5 = {
    True: (f"\n</think>\n\n{ANSWER}", f"Add.\n</think>\n\n{ANSWER}", OPENED),
    False: (ANSWER, REASONING, CLOSED),
}
WRITTEN = {
    "cohere2": {True: (f"{ANSWER}<|END_RESPONSE|>", f"{REASONING}<|END_RESPONSE|>", NEITHER)},
    "deepseek": {True: (ANSWER, f"Add.\n</think>\n\n{ANSWER}", OPENED)},
    "glm4moe": {
        True: (f"\n<think></think>\n{ANSWER}", f"\n<think>Add.</think>\n{ANSWER}", NEITHER),
        False: (f"\n{ANSWER}", REASONING, CLOSED),
    },
    "gptoss": {True: (f"<|channel|>final<|message|>{ANSWER}", f"<|channel|>final<|message|>{REASONING}", NEITHER)},
    "muse_glimmer": {True: (f" to=user<|message|>{ANSWER}", f" to=user<|message|>{REASONING}", NEITHER)},
    "nemotron_3_5_lightning": {True: (ANSWER, f"Add.</think>{ANSWER}", OPENED), False: (ANSWER, REASONING, CLOSED)},
    "nemotron_3_nano": {True: (ANSWER, f"Add.\n</think>\n{ANSWER}", OPENED), False: (ANSWER, REASONING, CLOSED)},
    "nemotron_3_super": {True: (ANSWER, f"Add.\n</think>\n{ANSWER}", OPENED), False: (ANSWER, REASONING, CLOSED)},
    "nemotron_3_ultra": {True: (ANSWER, f"Add.</think>{ANSWER}", OPENED), False: (ANSWER, REASONING, CLOSED)},
    "qwen3": QWEN3,
    "qwen3_training": QWEN3,
    "qwen3_5": QWEN3_5,
    "qwen3_6": QWEN3_5,
    "qwen3_8": QWEN3_5,
}
AS_IT_STANDS = (ANSWER, REASONING, NEITHER)


def of_family(table, name):
    """The entry with the longest name that a template's name begins with; `qwen3_vl` is none of `qwen3`."""
    families = [family for family in table if name.startswith(family) and (family != "qwen3" or name == "qwen3")]
    return table[max(families, key=len)] if families else None


@pytest.mark.parametrize(
    ("path", "thinking"),
    [
        pytest.param(path, thinking, id=f"{path.stem}-{thinking}")
        for path in CHAT_TEMPLATES
        for thinking in (None, True, False)
        if thinking is None or "enable_thinking" in path.read_text()
    ],
)
def test_the_chat_templates_of_trl(path, thinking):
    """A trace is what a model would sample after the prompt, with the thinking of the template on and off."""
    template, name = path.read_text(), path.stem
    tokenizer = tiny.make_tokenizer(template)
    tokenizer.add_special_tokens({"extra_special_tokens": [*set(END_OF_TURN.values()), "<|END_RESPONSE|>"]})
    tokenizer.add_tokens(sorted({c for c in template if ord(c) > 127}))
    tokenizer.bos_token = "<|pad|>"
    kwargs = {} if thinking is None else {"enable_thinking": thinking}
    prompt = user("2+2?")
    if name.startswith(IMAGE_TEMPLATES):
        assert "2+2?" not in tokenizer.apply_chat_template(prompt, tokenize=False)
        return
    end = of_family(END_OF_TURN, name)
    eos_token_ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", *set(END_OF_TURN.values()))]
    prompt_text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **kwargs)
    thinks = thinking is not False and not (thinking is None and name.startswith("qwen3_5_nothink"))
    answer, reasoning, prompt_does = (of_family(WRITTEN, name) or {}).get(thinks, AS_IT_STANDS)

    def written(traces):
        rows = [{"prompt": prompt, "demonstrations": traces}]
        dataset = tokenized(rows, tokenizer, 10_000, eos_token_ids, chat_template_kwargs=kwargs)
        (all_ids,) = dataset["demonstration_ids"]
        assert all([i for i in ids if i in eos_token_ids] == ids[-1:] for ids in all_ids)
        return [tokenizer.decode(ids) for ids in all_ids]

    assert written([ANSWER, REASONING]) == [answer + end, reasoning + end]
    if prompt_does != CLOSED:  # other ways to write the same trace differ in white space alone
        ways = [f"\n{REASONING}", f"<think>Add.</think>{ANSWER}", f"<think>Add.\n</think>\n{ANSWER}{end}"]
        ways.append(REASONING + reasoning.rpartition(ANSWER)[2] + end)
        if "<think>" in prompt_text:
            ways.append(f"Add.\n</think>\n\n{ANSWER}")
        assert {re.sub(r"\s", "", text) for text in written(ways)} == {re.sub(r"\s", "", reasoning + end)}

    function = DemonstrationTokenizer(tokenizer, "demonstrations", eos_token_ids, 10_000, chat_template_kwargs=kwargs)
    hints = function.find_suspicious(prompt, [ANSWER, REASONING], 0)
    suspected = {OPENED: ["row 0: `demonstrations[0]`"], CLOSED: ["row 0: `demonstrations[1]`"], NEITHER: []}
    assert list(hints) == suspected[prompt_does]
    assert all(hint.startswith(prompt_does) for hint in hints.values())


def trl_tokenizer(name):
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    return tiny.make_tokenizer(path.read_text())


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ("<think>\nCut off", "<think>\nCut off"),  # not behind a closed <think>
        ("a</think>b</think>2", "<think>\na\n</think>\n\nb</think>2"),  # the template alone would drop b
        ("So: <think>a</think>2", "So: <think>a</think>2"),
    ],
)
def test_traces_that_a_template_for_reasoning_would_change(trace, expected):
    for name, opening in {"qwen3": "", "qwen3_5_think": "<think>\n", "qwen3_8": "<think>\n"}.items():
        tokenizer = trl_tokenizer(name)
        dataset = tokenized([{"prompt": user("1"), "demonstrations": [trace]}], tokenizer)
        ((text,),) = texts(dataset, tokenizer)
        assert re.sub(r"\s", "", text) == re.sub(r"\s", "", expected.removeprefix(opening) + EOS)


@pytest.mark.parametrize("trace", ["", "\n", EOS, f"<think>\n{EOS}"])
def test_an_empty_trace_that_a_template_would_fill(trace):
    tokenizer = trl_tokenizer("qwen3_8" if "<think>" in trace else "qwen3")
    with pytest.raises(ValueError, match=r"row 0: `demonstrations\[0\]` is empty"):
        tokenized([{"prompt": user("1"), "demonstrations": [trace]}], tokenizer)


def test_a_template_that_drops_the_reasoning_is_not_asked_for_the_trace():
    """As DeepSeek-R1's: an assistant turn is rendered from behind `</think>`."""
    template = tiny.CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
    dataset = tokenized(
        [{"prompt": user("1"), "demonstrations": ["<think>x</think>2"]}], tiny.make_tokenizer(template)
    )
    assert texts(dataset) == [["<think>x</think>2" + EOS]]


def test_a_template_that_trims_a_turn_is_followed():
    template = tiny.CHATML.replace("{{ message.content }}", "{{ message.content | trim }}")
    dataset = tokenized([{"prompt": user("1"), "demonstrations": [" 2 \n"]}], tiny.make_tokenizer(template))
    assert texts(dataset) == [["2" + EOS]]


@pytest.mark.parametrize("ending", ["", EOS, EOS + EOS, EOS + "\n"])
def test_a_trace_ends_in_exactly_one_eos(ending):
    assert texts(tokenized([{"prompt": "1", "demonstrations": ["2" + ending]}])) == [["2" + EOS]]
    assert texts(tokenized([{"prompt": user("1"), "demonstrations": ["2" + ending]}])) == [["2" + EOS]]


def test_the_end_of_turn_of_the_template_is_preferred_to_the_tokenizers_eos():
    tokenizer = tiny.make_tokenizer()
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    dataset = tokenized([{"prompt": user("1"), "demonstrations": ["2"]}], eos_token_ids=[other, 1])
    assert texts(dataset) == [["2" + EOS]]
    dataset = tokenized([{"prompt": "1", "demonstrations": ["2"]}], eos_token_ids=[other, 1])
    assert texts(dataset) == [["2<|endoftext|>"]]


def test_an_end_of_turn_that_does_not_end_generation_is_replaced(caplog):
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    dataset = tokenized([{"prompt": user("1"), "demonstrations": ["2"]}], tokenizer)
    assert texts(dataset) == [["2<|endoftext|>"]]
    assert "does not end generation" in caplog.text and "set `tokenizer.eos_token`" in caplog.text


def test_tokens_do_not_span_the_border_between_prompt_and_trace():
    tokenizer = tiny.make_tokenizer(merges=[("a", "b")])
    assert tokenizer.tokenize("xab") == ["x", "ab"]
    dataset = tokenized([{"prompt": "xa", "demonstrations": ["bab"]}], tokenizer)
    assert tokenizer.convert_ids_to_tokens(dataset["demonstration_ids"][0][0]) == ["b", "ab", EOS]


def test_overflow():
    rows = [{"prompt": "1", "demonstrations": ["123", "1234", "12345"]}, {"prompt": "2", "demonstrations": ["123456"]}]
    dataset = tokenized(rows, max_length=5)
    assert texts(dataset) == [["123" + EOS, "1234" + EOS], []]  # 4 and the EOS are 5 tokens
    assert dataset["demonstrations_dropped"] == [1, 1]
    dataset = tokenized(rows, max_length=5, overflow="truncate")
    assert texts(dataset) == [["123" + EOS, "1234" + EOS, "12345"], ["12345"]]
    assert dataset["demonstrations_dropped"] == [0, 0]
    with pytest.raises(ValueError, match=r"row 0: `demonstrations\[2\]` has 6 tokens, more than `max_completion_l"):
        tokenized(rows, max_length=5, overflow="error")


def test_a_truncated_trace_trains(tmp_path):
    trainer = LuffyTrainer(
        tiny.save_tiny_model(tmp_path / "model"),
        tiny.share_of_digits,
        tiny.make_args(tmp_path, demonstration_overflow="truncate", max_completion_length=5),
        Dataset.from_list([{"prompt": "1", "demonstrations": ["1234567"]}]),
    )
    trainer.train()
    assert trainer.state.log_history[0]["demonstrations/length"] == 5


def test_the_same_trace_is_shown_once():
    rows = [{"prompt": "1", "demonstrations": ["2", "3", "2" + EOS], "demonstration_logprobs": [[-1, -2]] * 3}]
    dataset = tokenized(rows)
    assert texts(dataset) == [["2" + EOS, "3" + EOS]]
    assert len(dataset["demonstration_logps"][0]) == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            None,
            r"row 0: `demonstrations\[0\]` cannot be rendered after its prompt: .*Give the tokenizer a chat template",
        ),
        (
            "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('Only user turns') }}{% endif %}"
            "{{ m.content }}{% endfor %}",
            r"row 0: `demonstrations\[0\]` cannot be rendered after its prompt: Only user turns",
        ),
    ],
)
def test_chat_templates_that_do_not_render(template, message):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        tokenized([{"prompt": user("1"), "demonstrations": ["2"]}], tokenizer)


def test_a_template_that_hides_assistant_turns():
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    dataset = tokenized([{"prompt": user("1"), "demonstrations": ["2"]}], tiny.make_tokenizer(template))
    assert texts(dataset) == [["2" + EOS]]


@pytest.mark.parametrize("traces", [["2"], []])
@pytest.mark.parametrize("prompt", [None, ""])
def test_a_row_without_a_prompt(prompt, traces):
    with pytest.raises(ValueError, match="row 1: `prompt` must be a string or a list of chat messages, got"):
        tokenized([GOOD, {"prompt": prompt, "demonstrations": traces}])


@pytest.mark.parametrize("prompt", [5, ["a"], []])
def test_prompts_of_the_wrong_type(prompt):
    with pytest.raises(ValueError, match="row 0: `prompt` must be a string or a list of chat messages, got"):
        tokenized([{"prompt": prompt, "demonstrations": ["2"]}])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (DatasetDict({"train": Dataset.from_list([{"prompt": "1"}])}), "got `DatasetDict`. Pass one split of it"),
        ([{"prompt": "1", "demonstrations": ["2"]}], "must be a `Dataset` or an `IterableDataset`, got `list`"),
        (None, "must be a `Dataset` or an `IterableDataset`, got `NoneType`"),
        (Dataset.from_list([]), "`train_dataset` is empty"),
        (IterableDataset.from_generator(lambda: iter([])), "`train_dataset` is empty"),
    ],
)
def test_things_that_are_no_dataset(dataset, message):
    with pytest.raises(ValueError, match=message):
        tokenize_demonstrations(dataset, tiny.make_tokenizer(), [1], 64)


GOOD = {"prompt": "1+1=", "demonstrations": ["2"]}


@pytest.mark.parametrize(
    ("bad_row", "message"),
    [
        ({"prompt": "1", "demonstrations": [""]}, r"row 1: `demonstrations\[0\]` is empty. Remove it"),
        ({"prompt": "1", "demonstrations": ["2", " \n"]}, r"row 1: `demonstrations\[1\]` is empty"),
        (
            {"prompt": "1", "demonstrations": [EOS]},
            r"row 1: `demonstrations\[0\]` is empty but for its end-of-sequence",
        ),
        ({"prompt": "1<think>\n", "demonstrations": ["<think>\n"]}, r"row 1: `demonstrations\[0\]` is empty"),
        ({"prompt": "1", "demonstrations": ["2", "é"]}, r"row 1: `demonstrations\[1\]` has no token .* makes 0 of"),
        ({"prompt": "1", "demonstrations": ["é \n"]}, r"row 1: `demonstrations\[0\]` has no token .* makes 2 of"),
        ({"prompt": "1", "demonstrations": [" " * 20 + "é"]}, r"row 1: `demonstrations\[0\]` has no .* makes 20 of"),
        ({"prompt": "1", "demonstrations": [f"  {EOS}"]}, r"row 1: `demonstrations\[0\]` has no token .* makes 2 of"),
        ({"prompt": "1", "demonstrations": ["<|im_start|>"]}, r"row 1: `demonstrations\[0\]` has no token with"),
        ({"prompt": "1", "demonstrations": ["2", None]}, r"row 1: `demonstrations\[1\]` must be a string, got 'None'"),
        (
            {"prompt": "1", "demonstrations": [f"2{EOS}3"]},
            r"row 1: `demonstrations\[0\]` goes on after its end-of-sequence token '<\|im_end\|>'",
        ),
    ],
)
def test_traces_that_cannot_be_used(bad_row, message):
    with pytest.raises(ValueError, match=message):
        tokenized([GOOD, bad_row])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1", "demonstrations": "2"}], "row 0: `demonstrations` must be a list of traces, got str. Wrap"),
        ([{"prompt": "1", "demonstrations": [2]}], r"row 0: `demonstrations\[0\]` must be a string, got '2'"),
        ([{"prompt": "1", "completion": ["2"]}], "row 0: `completion` must be a string"),
        ([{"prompt": "1", "completion": ""}], "row 0: `completion` is empty"),
        ([{"prompt": "1", "demonstrations": [assistant("2")]}], r"row 0: `demonstrations\[0\]` must be a string"),
        ([{"prompt": user("1"), "demonstrations": [user("2")]}], "must be a string or a list of messages"),
        ([{"prompt": user("1"), "demonstrations": [assistant("2") * 2]}], r"\[1\] follows a message of the assistant"),
    ],
)
def test_columns_of_the_wrong_type(rows, message):
    with pytest.raises(ValueError, match=message):
        tokenized(rows)


def test_an_error_in_a_stream_names_the_row():
    rows = [GOOD, {"prompt": "1", "demonstrations": [""]}]
    tokenizer = tiny.make_tokenizer()
    dataset = tokenize_demonstrations(IterableDataset.from_generator(lambda: iter(rows)), tokenizer, [1], 64)
    with pytest.raises(ValueError, match=r"row 1: `demonstrations\[0\]` is empty"):
        list(dataset)


def test_many_texts_are_encoded_as_one_by_one():
    texts = ["1+1=", "<think>\n2", "", "x" * 300, "<|im_start|>user\n1<|im_end|>", "a b"]
    merged = tiny.make_tokenizer(merges=[("1", "+"), ("1+", "1"), ("x", "x")])
    bos = tiny.make_tokenizer()
    bos.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 2)])
    left_over = tiny.make_tokenizer()  # what was said at an earlier call, and what a file may hold
    left_over(texts, truncation=True, max_length=2, padding="max_length")
    for tokenizer in (merged, bos, left_over):
        for add_special_tokens in (True, False):
            expected = [tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"] for text in texts]
            tokenizer.backend_tokenizer.enable_truncation(2)
            tokenizer.backend_tokenizer.enable_padding(length=400)
            assert encode(tokenizer, texts, add_special_tokens) == expected
    assert expected[3][:2] != encode(bos, texts, True)[3][:2]
    assert encode(tokenizer, [], True) == []


def test_a_tokenizer_with_methods_of_its_own_is_called():
    class Lower(Qwen2Tokenizer):
        def __call__(self, text, *args, **kwargs):
            return super().__call__([part.lower() for part in text], *args, **kwargs)

    tokenizer = tiny.make_tokenizer()
    tokenizer.__class__ = Lower
    assert encode(tokenizer, ["AB", "CD"], True) == tiny.make_tokenizer()(["ab", "cd"])["input_ids"]


@pytest.mark.parametrize("kinds", [(True, True), (False, False), (True, False)])
def test_many_prompts_are_tokenized_as_one_by_one(kinds):
    tokenizer = tiny.make_tokenizer(tiny.THINKING_CHATML)
    prompts = [user(f"{i}+1=") if is_chat else f"{i}+1=" for i, is_chat in enumerate(kinds)]
    expected = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    assert tokenize_prompts(tokenizer, prompts) == expected
    for prompt, ids in zip(prompts, expected, strict=True):
        if not isinstance(prompt, str):
            assert ids == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    tokenizer.chat_template = None
    if any(kinds):
        with pytest.raises(ValueError, match="the tokenizer has no chat template"):
            tokenize_prompts(tokenizer, prompts)


def test_decode_is_that_of_the_tokenizer():
    tokenizer = tiny.make_tokenizer()
    for ids in (tokenizer("<think>\n1+1=<|im_end|>")["input_ids"], [], [tokenizer.eos_token_id]):
        for options in ({}, {"skip_special_tokens": True}):
            assert decode(tokenizer, ids, **options) == tokenizer.decode(ids, **options)


def test_tokenized_once_and_cached(tmp_path, monkeypatch):
    """Two trainers on the same file: the second tokenizes no trace, and training tokenizes prompts alone."""
    model_path = tiny.save_tiny_model(tmp_path / "model")
    Dataset.from_list(tiny.addition_rows(8)).to_json(tmp_path / "train.jsonl")
    seen = []
    call = Qwen2Tokenizer.__call__

    def recording(self, text, *args, **kwargs):
        seen.extend([text] if isinstance(text, str) else text)
        return call(self, text, *args, **kwargs)

    def traces_tokenized(**kwargs):
        seen.clear()
        dataset = load_dataset("json", data_files=str(tmp_path / "train.jsonl"), split="train", cache_dir=tmp_path)
        args = tiny.make_args(tmp_path / "out", max_steps=4, **kwargs)
        trainer = LuffyTrainer(model_path, tiny.share_of_digits, args, dataset)
        at_construction = sum("</think>" in text for text in seen)
        trainer.train()
        return at_construction, sum("</think>" in text for text in seen)

    monkeypatch.setattr(Qwen2Tokenizer, "__call__", recording)
    assert traces_tokenized() == (8, 8)
    assert traces_tokenized() == (0, 0)
    assert traces_tokenized(max_completion_length=20) == (8, 8)  # another limit is another result


def test_choice_of_demonstrations(tmp_path):
    row = {"demonstration_ids": [[1], [2], [3], [4]], "demonstration_logps": [], "demonstration_row": 7}

    def chosen(row, step=5, **kwargs):
        args = tiny.make_args(tmp_path, num_generations=8, per_device_train_batch_size=8, seed=0, **kwargs)
        return [shown and shown.ids for shown in choose_demonstrations(row, args, step)]

    choices = [chosen(row, step, num_demonstrations=2) for step in range(200)]
    assert all(len(choice) == 2 and choice[0] != choice[1] for choice in choices)
    counts = [sum([i] in choice for choice in choices) for i in (1, 2, 3, 4)]
    assert sum(counts) == 400 and min(counts) > 70
    assert chosen(row, num_demonstrations=2) == choices[5]
    assert chosen(row, num_demonstrations=4) == row["demonstration_ids"]
    assert chosen({**row, "demonstration_ids": []}) == []
    shown = [bool(chosen(row, step, demonstration_probability=0.25)) for step in range(400)]
    assert 70 < sum(shown) < 130


def prefix_lengths(tmp_path, steps=range(11), length=20, **kwargs):
    row = {"demonstration_ids": [list(range(length))] * 3, "demonstration_logps": [], "demonstration_row": 0}
    args = tiny.make_args(tmp_path, **kwargs)
    return [[len(d.ids) if d else 0 for d in choose_demonstrations(row, args, step)] for step in steps]


def test_prefix_schedules(tmp_path):
    def lengths(**kwargs):
        return [length for (length,) in prefix_lengths(tmp_path, **kwargs)]

    steps = {"prefix_schedule_steps": 10}
    assert lengths() == [20] * 11
    assert lengths(prefix_ratio_min=0.0, prefix_schedule="linear", **steps) == list(range(20, -1, -2))
    assert lengths(prefix_ratio_min=0.0, prefix_schedule="reverse_linear", **steps) == list(range(0, 21, 2))
    # 20 (1 + cos(pi t / 10)) / 2 at t = 0, 1, 2, ...
    cosine = lengths(prefix_ratio_min=0.0, prefix_schedule="cosine", **steps)
    assert cosine == [20, 20, 18, 16, 13, 10, 7, 4, 2, 0, 0]
    linear = lengths(
        prefix_ratio_min=0.2, prefix_ratio_max=0.8, prefix_schedule="linear", steps=(0, 5, 10, 99), **steps
    )
    assert linear == [16, 10, 4, 4]
    drawn = lengths(prefix_ratio_min=0.25, prefix_ratio_max=0.75, steps=range(200))
    assert min(drawn) == 5 and max(drawn) == 15 and len(set(drawn)) == 11
    assert drawn == lengths(prefix_ratio_min=0.25, prefix_ratio_max=0.75, steps=range(200))


def test_fixed_prefixes_are_spread_over_the_group(tmp_path):
    kwargs = {"num_demonstrations": 3, "prefix_schedule": "fixed", "prefix_ratio_min": 0.0, "steps": [0]}
    assert prefix_lengths(tmp_path, **kwargs) == [[0, 10, 20]]


def test_log_probabilities_of_the_author():
    rows = [
        {"prompt": "1", "demonstrations": ["23", "4"], "demonstration_logprobs": [[-0.5, -1.5, 0.0], [-2.0, -0.25]]},
        {"prompt": "2", "demonstrations": [], "demonstration_logprobs": []},
    ]
    dataset = tokenized(rows)
    assert dataset["demonstration_logps"] == [[[-0.5, -1.5, 0.0], [-2.0, -0.25]], []]
    dataset = tokenized(rows, max_length=2)  # the first trace is dropped, and its log-probs with it
    assert dataset["demonstration_logps"] == [[[-2.0, -0.25]], []]
    dataset = tokenized(rows, max_length=2, overflow="truncate")
    assert dataset["demonstration_logps"] == [[[-0.5, -1.5], [-2.0, -0.25]], []]
    dataset = tokenized([{"prompt": "1", "completion": "23", "demonstration_logprobs": [-0.5, -1.5, 0.0]}])
    assert dataset["demonstration_logps"] == [[[-0.5, -1.5, 0.0]]]
    assert tokenized([GOOD])["demonstration_logps"] == [[]]


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        ([[-0.5]], r"row 0: `demonstrations\[0\]` has 2 tokens, the one that ends it included, but .* has 1 for it"),
        ([], r"row 0: `demonstrations\[0\]` has 2 tokens, .* has 0 for it"),
        (None, r"row 0: `demonstrations\[0\]` has no list of numbers in `demonstration_logprobs`"),
        ([[-0.5, 0.1]], "has a value above 0. They are logarithms"),
        ([[-0.5, -80.5]], r"row 0: `demonstrations\[0\]`: .* has the value -80.5, .* the minimum is -80\. Score"),
        ([[-0.5, float("-inf")]], "has the value -inf"),
        ([[float("nan"), -0.5]], "has the value nan"),
    ],
)
def test_log_probabilities_that_do_not_fit(logprobs, message):
    with pytest.raises(ValueError, match=message):
        tokenized([{"prompt": "1", "demonstrations": ["2"], "demonstration_logprobs": logprobs}])


@pytest.mark.parametrize("is_chat", [False, True])
def test_supervised_rows_are_what_luffy_shows(tmp_path, is_chat):
    """Prompt and trace of a row for SFT are the tokens of a demonstration's row in training."""
    prompts = [user("1+1=") if is_chat else "1+1=", user("22+2=") if is_chat else "22+2="]
    traces = [["2", "two"], ["<think>24</think>24"]]
    rows = [{"prompt": p, "demonstrations": d} for p, d in zip(prompts, traces, strict=True)]
    path = tiny.save_tiny_model(tmp_path / "model", chat_template=tiny.THINKING_CHATML)
    tokenizer = Qwen2Tokenizer.from_pretrained(path)
    supervised = to_supervised(tokenized(rows, tokenizer), tokenizer)
    assert supervised["demonstration_row"] == [0, 0, 1]
    for ids, labels in zip(supervised["input_ids"], supervised["labels"], strict=True):
        num_prompt_tokens = labels.count(-100)
        assert labels == [-100] * num_prompt_tokens + ids[num_prompt_tokens:] and 0 < num_prompt_tokens < len(ids)

    args = tiny.make_args(tmp_path / "out", num_demonstrations=2, gradient_accumulation_steps=2, max_steps=1)
    trainer = LuffyTrainer(path, tiny.share_of_digits, args, Dataset.from_list(rows), processing_class=tokenizer)
    micro_batches = tiny.record_micro_batches(trainer)
    trainer.train()
    shown = [
        [ids.tolist() for ids in tiny.sequence(inputs, i)]
        for inputs in micro_batches
        for i in inputs["demonstration_mask"].any(1).nonzero().flatten()
    ]
    assert sorted(prompt + completion for prompt, completion in shown) == sorted(supervised["input_ids"])
    assert {len(prompt) for prompt, _ in shown} == {labels.count(-100) for labels in supervised["labels"]}


def test_supervised_rows_of_a_stream():
    rows = [{"prompt": "1+1=", "demonstrations": ["2", "two"]}, {"prompt": "2+2=", "demonstrations": []}]
    tokenizer = tiny.make_tokenizer()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    stream = tokenize_demonstrations(stream, tokenizer, [tokenizer.eos_token_id], max_length=64)
    expected = to_supervised(tokenized(rows), tokenizer).remove_columns("demonstration_row").to_list()
    supervised = list(to_supervised(stream, tokenizer))
    assert len({row.pop("demonstration_row") for row in supervised}) == 1  # both traces are of the first row
    assert supervised == expected and len(expected) == 2


def test_rows_of_a_stream_are_told_apart_by_their_content():
    """`datasets` counts the rows of each shard, and those of a shuffled stream, anew."""
    rows = tiny.addition_rows(24)
    numbers = {}
    for num_shards, seed in ((1, None), (4, 0), (4, 1)):
        stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=num_shards)
        stream = stream if seed is None else stream.shuffle(seed=seed)
        shown = list(tokenize_demonstrations(stream, tiny.make_tokenizer(), [1], 64))
        numbers[num_shards, seed] = {row["prompt"]: row["demonstration_row"] for row in shown}
    assert len(set(numbers[1, None].values())) == 24
    assert numbers[1, None] == numbers[4, 0] == numbers[4, 1]
    other = [{**row, "answer": "0"} for row in rows]  # a reward reads it
    stream = tokenize_demonstrations(Dataset.from_list(other).to_iterable_dataset(), tiny.make_tokenizer(), [1], 64)
    assert not {row["demonstration_row"] for row in stream} & set(numbers[1, None].values())


def test_an_end_token_that_the_tokenizer_does_not_have():
    """Some generation configs name ids behind the vocabulary."""
    dataset = tokenize_demonstrations(
        Dataset.from_list([{"prompt": "1", "completion": "2"}]), tiny.make_tokenizer(), [1, 151643], 64
    )
    assert dataset["demonstration_ids"] == [[tiny.make_tokenizer()("2")["input_ids"] + [1]]]
