# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Traces of several messages: what a rollout with the same moves would be, to the token."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import trl
from accelerate import PartialState
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import add_response_schema, supports_tool_calling

from luffy_trl.demonstrations import DemonstrationTokenizer, tokenize_demonstrations
from luffy_trl.turns import Tools, Turns, read_turns


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def call(**arguments):
    return {"type": "function", "function": {"name": "multiply", "arguments": arguments}}


def answer(content):
    return {"role": "tool", "name": "multiply", "content": content}


PROMPT = [{"role": "user", "content": "2*3*4?"}]
TRACE = [
    {"role": "assistant", "content": "First 2*3.", "tool_calls": [call(a=2, b=3)]},
    answer("6"),
    {"role": "assistant", "content": "", "tool_calls": [call(a=6, b=4), call(a=1, b=1)]},
    answer("24"),
    answer("1"),
    {"role": "assistant", "content": "It is 24."},
]
# Llama's template has one call a turn, and no text beside it
ONE_CALL = [{"role": "assistant", "content": "", "tool_calls": [call(a=2, b=3)]}, answer("6"), TRACE[-1]]
ENDS = {  # of turns, and of turns that call tools, by the family of templates
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "gemma4": ("<eos>", "<turn|>", "<|tool_response>"),
    "diffusion_gemma": ("<eos>", "<turn|>", "<|tool_response>"),
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "llama3": ("<|eot_id|>",),
    "muse": ("<|eot|>",),
}
# The others, `*_training.jinja`, stand in for these where TRL trains
TEMPLATES = [
    path
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.endswith("_training")
]


def tokenizer_of(path):
    """A tokenizer with a chat template, and the tokens that end its turns."""
    template = path.read_text()
    tokenizer = tiny.make_tokenizer(template)
    ends = next((ends for name, ends in ENDS.items() if path.stem.startswith(name)), ("<|im_end|>",))
    tokenizer.add_special_tokens({"eos_token": ends[0], "extra_special_tokens": list(ends)})
    tokenizer.add_tokens(sorted({c for c in template if ord(c) > 127}))
    tokenizer.bos_token = "<|pad|>"
    return tokenizer, tokenizer.convert_tokens_to_ids(list(ends))


class Canned(GRPOTrainer):
    """TRL's trainer, with a policy that plays the turns of a trace."""

    turns: list = []

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self.contexts.append([list(ids) for ids in prompt_ids])
        return [list(self.turns[len(self.contexts) - 1]) for _ in prompt_ids], None


def play(tokenizer, end_ids, trace, tmp_path, tools=(multiply,)):
    """The ids and turns of a trace, and what TRL makes of the same moves."""
    model = tiny.make_model(tokenizer, max_position_embeddings=8192)
    model.generation_config.eos_token_id = end_ids
    args = tiny.make_args(tmp_path, GRPOConfig, max_completion_length=4096)
    rows = Dataset.from_list([{"prompt": PROMPT}] * 4)
    of_run = Tools.of_run(tokenizer, list(tools), None)
    trainer = Canned(model, tiny.share_of_digits, args, rows, processing_class=tokenizer, tools=list(tools))
    function = DemonstrationTokenizer(tokenizer, "demonstrations", end_ids, 10_000, tools=of_run)
    ((_, _, _, ids, turns),) = function.tokenize({"prompt": [PROMPT], "demonstrations": [[trace]]}, [0])
    trainer.turns, trainer.contexts = [ids[start:end] for start, end in turns.spans], []
    trainer._sync_tool_dicts, trainer._async_tool_dicts = [{"multiply": multiply}] * 4, [{}] * 4
    return ids, turns, trainer, trainer._generate([PROMPT] * 4)


UNPARSED = ("deepseekv3", "diffusion_gemma", "muse_glimmer")  # TRL cannot read calls of these, and says so


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_trace_is_what_trls_loop_makes_of_the_same_moves(path, tmp_path):
    tokenizer, end_ids = tokenizer_of(path)
    PartialState()
    if not supports_tool_calling(tokenizer):
        with pytest.raises(ValueError, match="need a chat template that renders tool calls"):
            Tools.of_run(tokenizer, [multiply], None)
        return
    trace = ONE_CALL if path.stem.startswith(("llama", "gptoss")) else TRACE
    if path.stem in UNPARSED:
        with pytest.raises(ValueError, match="failed to add response schema"):
            play(tokenizer, end_ids, trace, tmp_path)
        return
    ids, turns, trainer, generated = play(tokenizer, end_ids, trace, tmp_path)
    prompt_ids, completion_ids, tool_mask, completions = generated[:4]
    assert completion_ids[0] == ids
    assert tool_mask[0] == turns.mask(len(ids))
    assert completions[0] == turns.messages(tokenizer, prompt_ids[0], ids, trainer.tools)
    assert [message["role"] for message in completions[0]] == [message["role"] for message in trace]


def qwen():
    tokenizer, end_ids = tokenizer_of(next(path for path in TEMPLATES if path.stem == "qwen2_5"))
    return tokenizer, end_ids, Tools.of_run(tokenizer, [multiply], None)


def tokenized(rows, max_length=10_000, stream=False, **kwargs):
    tokenizer, end_ids, tools = qwen()
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if stream else dataset
    return list(tokenize_demonstrations(dataset, tokenizer, end_ids, max_length, tools=tools, **kwargs))


SAYS = {"role": "assistant", "content": "24"}
BAD = {
    "a tool that there is not": (
        [{**TRACE[0], "tool_calls": [{"function": {"name": "divide", "arguments": {}}}]}, answer("6"), SAYS],
        r"`demonstrations\[0\]`\[0\]: `tool_calls\[0\]` calls 'divide', and the run has multiply",
    ),
    "an answer without a call": (
        [SAYS, answer("6"), SAYS],
        r"\[1\] is an answer of a tool, and no call waits for one",
    ),
    "the last is an answer": (TRACE[:2], "must end with a message of the assistant that calls no tool"),
    "the last is a call": (TRACE[:3], "must end with a message of the assistant that calls no tool"),
    "a call without an answer": ([TRACE[0], SAYS], r"\[1\] comes before the answer to the call of 'multiply'"),
    "no JSON": (
        [{**TRACE[0], "tool_calls": [{"function": {"name": "multiply", "arguments": "{a: 2}"}}]}, answer("6"), SAYS],
        "`arguments` is no JSON: ",
    ),
    "no object": (
        [{**TRACE[0], "tool_calls": [{"function": {"name": "multiply", "arguments": "[2]"}}]}, answer("6"), SAYS],
        r"`arguments` must be an object, got '\[2\]'",
    ),
    "no function": ([{**TRACE[0], "tool_calls": [{"id": "1"}]}, answer("6"), SAYS], "must have a `function`"),
    "a user": ([TRACE[0], answer("6"), {"role": "user", "content": "go on"}, SAYS], r"\[2\] must be a message of the"),
    "goes on after its end": ([SAYS, SAYS], r"\[1\] follows a message of the assistant that calls no tool"),
    "another name": (
        [TRACE[0], {**answer("6"), "name": "add"}, SAYS],
        "`name` is 'add', and the call is of 'multiply'",
    ),
    "another id": (
        [{**TRACE[0], "tool_calls": [{**call(a=2, b=3), "id": "1"}]}, {**answer("6"), "tool_call_id": "2"}, SAYS],
        "`tool_call_id` '2' is of no call",
    ),
    "out of order": (
        [
            {**TRACE[0], "tool_calls": [{**call(a=2, b=3), "id": "1"}, {**call(a=1, b=3), "id": "2"}]},
            {**answer("3"), "tool_call_id": "2"},
            {**answer("6"), "tool_call_id": "1"},
            SAYS,
        ],
        "answers the call of 'multiply' before that of",
    ),
    "no text": ([TRACE[0], {**answer("6"), "content": None}, SAYS], "`content` must be a text, got 'None'"),
    "a field of its own": ([TRACE[0], answer("6"), {**SAYS, "audio": "x"}], "has the field 'audio'"),
}


@pytest.mark.parametrize(("trace", "message"), BAD.values(), ids=BAD)
def test_traces_that_no_rollout_could_be(trace, message):
    with pytest.raises(ValueError, match=message) as error:
        read_turns(trace, "row 3: `demonstrations[0]`", {"multiply"})
    assert str(error.value).startswith("row 3: `demonstrations[0]`")


def test_a_run_without_tools():
    tokenizer, end_ids, _ = qwen()
    dataset = Dataset.from_list([{"prompt": PROMPT, "demonstrations": [TRACE]}])
    with pytest.raises(ValueError, match="calls 'multiply', and the run has no tools"):
        tokenize_demonstrations(dataset, tokenizer, end_ids, 10_000)


def test_what_the_api_of_openai_writes():
    trace = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "multiply", "arguments": '{"a": 2, "b": 3}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "6"},
        TRACE[-1],
    ]
    ((own,), (theirs,)) = (tokenized([{"prompt": PROMPT, "demonstrations": [each]}]) for each in (ONE_CALL, trace))
    assert own["demonstration_ids"] == theirs["demonstration_ids"]
    assert own["demonstration_turns"] == theirs["demonstration_turns"]


def test_one_message_with_more_than_its_text():
    """Its thought may stand in a field of its own. One that calls a tool is no end."""
    thought = [{"role": "assistant", "content": "24", "reasoning_content": "2*3*4"}]
    (own,) = tokenized([{"prompt": PROMPT, "demonstrations": [thought]}])
    (text,) = tokenized([{"prompt": PROMPT, "demonstrations": ["<think>\n2*3*4\n</think>\n\n24"]}])
    assert own["demonstration_ids"] == text["demonstration_ids"]
    with pytest.raises(ValueError, match="must end with a message of the assistant that calls no tool"):
        tokenized([{"prompt": PROMPT, "demonstrations": [TRACE[:1]]}])


@pytest.mark.parametrize("stream", [False, True])
def test_columns_of_a_dataset(stream):
    traces = [TRACE, ONE_CALL, [SAYS]]
    (row,) = tokenized([{"prompt": PROMPT, "demonstrations": traces}], stream=stream)
    tokenizer, _, _ = qwen()
    (text,) = tokenized([{"prompt": PROMPT, "demonstrations": ["24"]}])
    assert (
        row["demonstration_ids"][2]
        == text["demonstration_ids"][0]
        == [*tokenizer("24")["input_ids"], tokenizer.eos_token_id]
    )
    turns = [Turns.from_json(written) if written else None for written in row["demonstration_turns"]]
    assert [len(of_trace.spans) if of_trace else None for of_trace in turns] == [3, 2, None]
    assert [
        ids[start:end].count(tokenizer.eos_token_id)
        for ids in row["demonstration_ids"][:1]
        for start, end in turns[0].spans
    ] == [1, 1, 1]
    # Between two turns there is what the template makes of the answers
    between = row["demonstration_ids"][0][turns[0].spans[0][1] : turns[0].spans[1][0]]
    opened = "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(between) == f"\n<|im_start|>user\n<tool_response>\n6\n</tool_response>{opened}"


@pytest.mark.parametrize(("spare", "num_turns"), [(0, 3), (-1, 2), (-100, 2), (-210, 1)])
def test_truncation_at_the_end_of_a_turn(spare, num_turns):
    (row,) = tokenized([{"prompt": PROMPT, "demonstrations": [TRACE]}])
    (ids,), turns = row["demonstration_ids"], Turns.from_json(row["demonstration_turns"][0])
    max_length = len(ids) + spare
    (cut,) = tokenized([{"prompt": PROMPT, "demonstrations": [TRACE]}], max_length, overflow="truncate")
    assert cut["demonstration_ids"] == [ids[: turns.spans[num_turns - 1][1]]]
    tokenizer, _, _ = qwen()
    messages = turns.messages(add_response_schema(tokenizer), [], cut["demonstration_ids"][0], [multiply])
    roles = [message["role"] for message in TRACE]
    assert [message["role"] for message in messages] == roles[: {3: 6, 2: 3, 1: 1}[num_turns]]
    with pytest.raises(ValueError, match="All 1 traces have more tokens") if spare else nullcontext():
        tokenized([{"prompt": PROMPT, "demonstrations": [TRACE]}], max_length)


def test_a_first_turn_that_is_too_long_is_cut():
    (row,) = tokenized([{"prompt": PROMPT, "demonstrations": [TRACE]}], 20, overflow="truncate")
    (complete,) = tokenized([{"prompt": PROMPT, "demonstrations": [TRACE]}])
    assert row["demonstration_ids"][0] == complete["demonstration_ids"][0][:20]


def test_masks_and_borders():
    turns = Turns([(0, 3), (5, 8), (9, 10)], [[{}], [{}], []])
    assert turns.mask(10) == [1, 1, 1, 0, 0, 1, 1, 1, 0, 1]
    assert turns.mask(6) == [1, 1, 1, 0, 0, 1]
    assert [turns.nearest_border(length) for length in (0, 2, 3, 6, 7, 8, 10)] == [0, 0, 5, 5, 5, 9, 10]
    assert [turns.end_before(length) for length in (2, 3, 7, 8, 9, 10)] == [2, 3, 3, 8, 8, 10]
    assert Turns.from_json(turns.to_json()) == turns


def test_arguments_are_kept_as_they_are():
    """Arrow adds None to objects, also within others; a text is what it is."""

    def arguments(value):
        calls = [{"function": {"name": "multiply", "arguments": value}}]
        ((turn, _), _) = read_turns([{**TRACE[0], "tool_calls": calls}, answer("6"), TRACE[-1]], "x", {"multiply"})
        return turn["tool_calls"][0]["function"]["arguments"]

    assert arguments({"a": {"x": 1, "y": None}, "b": [{"c": None, "d": 2}], "e": None}) == {
        "a": {"x": 1},
        "b": [{"d": 2}],
    }
    assert arguments('{"a": 1, "b": null}') == {"a": 1, "b": None}
