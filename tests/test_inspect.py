# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""`luffy inspect`: what it says is what training does."""

import io
import json
import threading

import pytest
import tiny
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import AutoConfig

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.data import load_data, without_long_prompts
from luffy_trl.estimates import GIB, cache_memory, model_from_config, training_memory, training_operations
from luffy_trl.inspection import inspect_dataset, sources_of_prompt
from luffy_trl.rewards import math_verify_reward
from luffy_trl.scripts import inspect_data


def chat(question):
    return [{"role": "system", "content": "Think."}, {"role": "user", "content": question}]


BAD_ROWS = [
    {
        "prompt": chat("1+1="),
        "demonstrations": [r"<think>\nx</think>\boxed{2}", r"no</think>\boxed{3}"],
        "answer": "2",
    },
    {"prompt": chat("2+1="), "demonstrations": [r"It is \boxed{3}"], "answer": "3"},
    {"prompt": chat("0" * 60), "demonstrations": ["x"], "answer": "3"},
    {"prompt": chat("3+1="), "demonstrations": ["a" * 80 + r"</think>\boxed{4}"], "answer": "4"},
    {"prompt": chat("4+1="), "demonstrations": [], "answer": "5"},
    {"prompt": chat("5+1="), "demonstrations": [""], "answer": "6"},
    {"prompt": chat("6+1="), "demonstrations": [r"</think>\boxed{7}<|eot_id|>"] * 2, "answer": "7"},
    {"prompt": chat("7+1="), "demonstrations": [r"7+1= </think>\boxed{8}", r"</think>\boxed{8"], "answer": "8"},
    {"prompt": chat("8+1="), "demonstrations": ["</think>nine"], "answer": "9"},
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny.save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", tiny.THINKING_CHATML)


def run(folder, model_path, rows, *arguments):
    Dataset.from_list(rows).to_json(folder / "data.jsonl")
    arguments = [folder / "data.jsonl", "--model", model_path, "--per_device_train_batch_size", 8, *arguments]
    return inspect_data.main([str(argument) for argument in arguments])


def value(output, name):
    (line,) = [line for line in output.splitlines() if line.strip().startswith(name)]
    return line.split()[-1]


def test_everything_that_is_wrong_with_a_dataset(tmp_path, model_path, capsys):
    status = run(
        tmp_path,
        model_path,
        BAD_ROWS,
        *("--require_think", "true", "--max_completion_length", 64, "--max_prompt_length", 70),
    )
    output = capsys.readouterr().out
    assert status == 1
    expected = {
        "rows    ": 9,
        "rows left out: prompt longer than max_prompt_length=70": 1,
        "rows without a trace": 1,
        "rows whose traces all drop out": 1,
        "traces dropped: longer than max_completion_length=64": 1,
        "traces dropped: the same as another of the row": 1,
        "traces that training shows": 7,
    }
    lines = output[output.index("What training uses") : output.index("Rewards of")].splitlines()
    for name, count in expected.items():
        assert [line.split()[-1] for line in lines if line.startswith(f"  {name}")] == [str(count)], name
    for line in (
        "  row 2: prompt of 97 tokens",
        "  row 3, demonstrations[0]: 91 tokens",  # 80 + </think> + \boxed{4} + the end
        "  `max_completion_length=91` keeps all traces.",
        "  row 6, demonstrations[1]: repeated",
        "  math_verify_reward       7    0  0.429    1     4",
        "  Without a positive reward, 4 of 7:",
        r"  row 0, demonstrations[1]: \boxed{3} is not equal to '2'",
        "  row 1, demonstrations[0]: no `</think>`, which `require_think` asks for",
        "  row 7, demonstrations[1]: its last box is not closed",
        r"  row 8, demonstrations[0]: no \boxed{}, and no other answer equal to '9'",
        "  row 6, demonstrations[0] holds '<|eot_id|>', the markup of a chat template. A trace is only what follows "
        "the rendered prompt, and the token that ends it is added: take the markup out.",
        "  row 7, demonstrations[0] begins with its own prompt, which the policy would learn to repeat. A trace is "
        "only what follows it.",
        "Training would stop with these problems: 1",
        "  row 5: `demonstrations[0]` is empty. Remove it: a row without a trace has an empty list, or None.",
    ):
        assert line in output.splitlines()


def test_a_prompt_and_its_trace_by_source(tmp_path, model_path, capsys):
    rows = [{"prompt": chat("1+1="), "demonstrations": ["<think>\nA\x1b[31m\nB</think>"], "answer": "2"}]
    run(tmp_path, model_path, rows)
    output = capsys.readouterr().out
    shown = output[output.index("Row 0") : output.index("Tokens")].splitlines()
    assert shown == [
        "Row 0: 41 tokens of prompt",
        r"  template <|im_start|>system\n",
        "  prompt   Think.",
        r"  template <|im_end|>\n",
        r"  template <|im_start|>user\n",
        "  prompt   1+1=",
        r"  template <|im_end|>\n",
        r"  template <|im_start|>assistant\n",
        r"  template <think>\n",  # which the trace does not open again
        "  demonstrations[0]: 9 tokens",
        r"  trace    A[31m\n",  # the tiny vocabulary has no escape
        "  trace    B</think>",
        "  end      <|im_end|>",
        "",
    ]


def test_parts_of_a_prompt_are_the_prompt(model_path):
    tokenizer = tiny.make_tokenizer()
    prompt = chat("1+1=")
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    parts = sources_of_prompt(tokenizer, prompt, ids)
    assert "".join(text for _, text in parts) == tokenizer.decode(ids)
    assert [text for kind, text in parts if kind == "prompt"] == ["Think.", "1+1="]
    assert sources_of_prompt(tokenizer, "2+2=", tokenizer("2+2=")["input_ids"]) == [("prompt", "2+2=")]


def test_plain_when_piped_and_coloured_on_a_terminal():
    for is_terminal in (False, True):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, highlight=False, soft_wrap=True, width=40)
        printer = inspect_data.Printer(console, max_listed=1, max_tokens_shown=4)
        printer.part("trace", "x" * 500 + "\x1b[31m")
        printer.listing(["one", "two"])
        printer.ids(tiny.make_tokenizer(), "end", tiny.make_tokenizer()("abcdef")["input_ids"])
        text = file.getvalue()
        assert ("\x1b[32m" in text) == is_terminal  # green
        assert "\x1b[31m" not in text and r"\x1b[31m" in text  # a data set writes nothing to the terminal
        if not is_terminal:
            assert text.splitlines() == [
                "  trace    " + "x" * 500 + r"\x1b[31m",
                "  one",
                "  ... and 1 more (`--max_listed 0` lists all)",
                "  end      abc",
                "           ... 2 tokens not shown (`--max_tokens_shown 0` shows all) ...",
                "  end      f",
            ]


def test_it_counts_what_training_counts(tmp_path, model_path):
    """Lengths, dropped traces and rewards are those in the trainer's log."""
    rows = tiny.addition_rows(4, lambda i: ["x" * 20] if i == 0 else [f"A{i}" * i, "B"])
    dataset = Dataset.from_list(rows)
    args = tiny.make_args(tmp_path, per_device_train_batch_size=16, num_demonstrations=2)
    tokenizer = tiny.make_tokenizer()
    findings = inspect_dataset(dataset, tokenizer, [tokenizer.eos_token_id], args, [tiny.share_of_digits])
    trainer = LuffyTrainer(model_path, tiny.share_of_digits, args, dataset)
    trainer.train()
    log = trainer.state.log_history[0]
    assert [(t.row, t.name, t.length) for t in findings.too_long] == [(0, "demonstrations[0]", 21)]
    assert log["demonstrations/dropped"] == len(findings.too_long)
    assert findings.all_dropped == [0]
    lengths = [trace.length for trace in findings.traces]
    assert lengths == [3, 2, 5, 2, 7, 2] and log["demonstrations/length"] == sum(lengths) / 6
    rewards = [trace.total for trace in findings.traces]
    assert log["demonstrations/reward"] == pytest.approx(sum(rewards) / 6)


def test_rewards_are_weighed_and_failures_of_a_function_are_problems():
    def by_gold(prompts, completions, completion_ids, gold, trainer_state, log_extra, log_metric, **kwargs):
        assert trainer_state.global_step == 0 and len(completion_ids[0]) == len(completions[0]) + 1
        log_metric("seen", 1.0)
        return [None if value is None else float(text == value) for text, value in zip(completions, gold, strict=True)]

    async def half(completions, **kwargs):
        return [0.5] * len(completions)

    def broken(completions, **kwargs):
        raise KeyError("gold")

    tokenizer = tiny.make_tokenizer()
    rows = [{"prompt": "p", "demonstrations": ["A", "B"], "gold": gold} for gold in ("A", None)]
    args = LuffyConfig("unused", use_cpu=True, bf16=False, reward_weights=[1.0, 2.0])
    findings = inspect_dataset(Dataset.from_list(rows), tokenizer, [1], args, [by_gold, half])
    assert [trace.total for trace in findings.traces] == [2.0, 1.0, 1.0, 1.0]
    assert [trace.rewards for trace in findings.traces] == [[1.0, 0.5], [0.0, 0.5], [None, 0.5], [None, 0.5]]
    assert findings.traces[1].reason == "`by_gold` gives 0.0"
    args.reward_weights = None
    findings = inspect_dataset(Dataset.from_list(rows), tokenizer, [1], args, [broken, "a/reward-model"])
    assert findings.problems == ["The reward function `broken` fails: KeyError: 'gold'"]


def test_rewards_are_given_in_the_main_thread_and_in_order(tmp_path):
    """While it scores, what comes next is read in another thread."""

    def length(completions, prompts, **kwargs):
        assert threading.current_thread() is threading.main_thread()
        if "70+1=" in prompts:
            raise KeyError("gold")
        return [float(len(completion)) for completion in completions]

    rows = [{"prompt": f"{i}+1=", "demonstrations": ["x" * (1 + i % 5)] if i != 150 else [""]} for i in range(200)]
    tokenizer, args = tiny.make_tokenizer(), tiny.make_args(tmp_path)
    findings = inspect_dataset(Dataset.from_list(rows), tokenizer, [1], args, [length])
    assert findings.problems == [
        "row 150: `demonstrations[0]` is empty. Remove it: a row without a trace has an empty list, or None.",
        "The reward function `length` fails: KeyError: 'gold'",
    ]
    assert [trace.row for trace in findings.traces] == [i for i in range(200) if i != 150]
    for trace in findings.traces:
        assert trace.rewards == [None if 64 <= trace.row < 128 else 1.0 + trace.row % 5]


def test_a_prompt_that_cannot_be_rendered_is_one_problem_of_its_batch(tmp_path):
    template = "{{ raise_exception('no x') if messages[0].content == 'x' }}" + tiny.CHATML
    tokenizer, args = tiny.make_tokenizer(template), tiny.make_args(tmp_path)
    rows = [{"prompt": chat(str(i))[1:], "demonstrations": ["1"]} for i in range(80)]
    rows[70]["prompt"] = chat("x")[1:]
    findings = inspect_dataset(Dataset.from_list(rows), tokenizer, [1], args, [tiny.share_of_digits])
    assert findings.problems == ["row 70: `prompt` cannot be rendered: no x"]
    assert len(findings.prompt_lengths) == len(findings.traces) == 79
    alone = inspect_dataset(Dataset.from_list(rows[70:71]), tokenizer, [1], args, [tiny.share_of_digits])
    assert alone.problems == ["row 0: `prompt` cannot be rendered: no x"]
    with pytest.raises(ValueError, match="row 70: `prompt` cannot be rendered: no x"):
        without_long_prompts(Dataset.from_list(rows), tokenizer, 100)
    kept = without_long_prompts(Dataset.from_list(rows[:12]), tokenizer, findings.prompt_lengths[0])
    assert [prompt[0]["content"] for prompt in kept["prompt"]] == [str(i) for i in range(10)]


def test_an_unparsable_gold_and_a_cut_trace_are_reasons(tmp_path):
    tokenizer = tiny.make_tokenizer()
    rows = [
        {"prompt": "p", "demonstrations": [r"\boxed{1}"], "answer": "$$"},
        {"prompt": "p", "demonstrations": ["x" * 20 + r"\boxed{1}"], "answer": "1"},
    ]
    args = tiny.make_args(tmp_path, demonstration_overflow="truncate")
    findings = inspect_dataset(Dataset.from_list(rows), tokenizer, [1], args, [math_verify_reward])
    assert len(findings.traces) == 2  # the cut one is shown
    assert findings.traces[1].reason == r"no \boxed{}, and no other answer equal to '1' (cut at 16 of 30 tokens)"
    assert findings.traces[0].rewards == [None]
    assert findings.traces[0].reason == "the gold answer '$$' cannot be parsed"


def test_given_rewards_do_not_hide_what_training_refuses(tmp_path, model_path, capsys):
    """No function scores these traces, and rollouts need the answers nonetheless."""
    rows = [{"prompt": "1+1=", "demonstrations": ["2"], "demonstration_rewards": [1.0]}] * 4
    assert run(tmp_path, model_path, rows) == 1
    assert "`math_verify_reward` needs the gold answers" in capsys.readouterr().out


def test_a_recipe_for_eight_gpus_is_read_on_any_machine(tmp_path, model_path, capsys):
    """The recipe, its name, the launch file and flags: the numbers of the run, not of this machine."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "per_device_train_batch_size: 1\ngradient_accumulation_steps: 4\nsteps_per_generation: 8\nbf16: true\n"
        "num_generations: 16\nnum_demonstrations: 2\nmax_completion_length: 30\ndtype: float32\nuse_vllm: true\n"
    )
    Dataset.from_list(tiny.addition_rows(4)).to_json(tmp_path / "rows.jsonl")
    arguments = ["--dataset_name", tmp_path / "rows.jsonl", "--model_name_or_path", model_path, "--config", recipe]
    arguments += ["--accelerate_config", "zero3", "--reward_funcs", "accuracy_reward"]
    status = inspect_data.main([str(argument) for argument in arguments])
    output = capsys.readouterr().out
    assert status == 1  # accuracy_reward reads `solution`
    assert "  The reward function `accuracy_reward` fails: TypeError: " in output
    assert "An update, on 8 processes" in output
    assert value(output, "prompts of a generation") == str(8 * 8 // 16)
    assert value(output, "updates for each generation") == "2"
    assert value(output, "sequences of an update") == "32"
    assert value(output, "of them demonstrations, at most 2 of 16") == "4"
    assert value(output, "tokens of prompts, on average") == str(32 * 4)
    assert value(output, "tokens of demonstrations, on average") == str(4 * 13)
    assert value(output, "tokens of rollouts, at most") == str(28 * 30)
    assert "with a micro-batch of 34 tokens" in output  # a row of 4 + 30
    num_parameters = sum(p.numel() for p in tiny.make_model(tiny.make_tokenizer()).parameters())
    assert value(output, "states") == f"{16 * num_parameters / 8 / GIB:.4g}"
    assert "vLLM takes 30% of the GPU beside it." in output


def test_no_weights_are_needed(tmp_path, capsys):
    tiny.save_tiny_model(tmp_path / "model")
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    rows = [{"prompt": "1+1=", "demonstrations": [r"\boxed{2}"], "answer": "2"}]
    assert run(tmp_path, tmp_path / "model", rows) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "A dataset is required: `luffy inspect my_data.jsonl --model"),
        (["rows.jsonl"], "`--model` is required"),
        (
            ["rows.jsonl", "--model", "m", "--accelerate_config", "zero9"],
            "neither a file nor one of cpu, fsdp2, multi",
        ),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        inspect_data.main(arguments)


def test_memory_by_hand():
    config = tiny.make_model(tiny.make_tokenizer()).config
    model = model_from_config("tiny", config)
    # of a layer: q, k and v, o, biases of q, k, v, feed-forward, two norms
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + (16 + 8 + 8) + 3 * 16 * 32 + 2 * 16
    assert model.num_parameters == 2 * config.vocab_size * 16 + 2 * layer + 16
    n, tokens = model.num_parameters, 100
    memory = training_memory(model, 4, tokens, zero_stage=2)
    assert memory == pytest.approx(
        {
            "states": (4 * n + (4 + 8) * n / 4) / GIB,
            "gathered layer": 2 * n / 2 / GIB,
            "kept hidden states": 2 * tokens * 16 * 2 / GIB,
            "one layer's activations": 2 * tokens * (8 * 16 + 3 * 32) / GIB,
            "logits": 12 * tokens * config.vocab_size / GIB,
        }
    )
    memory = training_memory(model, 1, tokens, weight_bytes=2, compute_bytes=4, gradient_checkpointing=False)
    assert memory["states"] == pytest.approx(8 * n / GIB)
    assert memory["all layers' activations"] == pytest.approx(4 * tokens * (8 * 16 + 3 * 32) * 2 / GIB)
    assert cache_memory(model, tokens) == pytest.approx(2 * 2 * 2 * 1 * 8 * tokens / GIB)
    assert training_operations(model, tokens) == 8 * n * tokens


def test_memory_with_lora(model_path):
    config = AutoConfig.from_pretrained(model_path)
    model = model_from_config("tiny", config, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert model.num_trainable == 2 * (16 * 2 + 2 * 16)
    assert model.num_parameters == model_from_config("tiny", config).num_parameters
    memory = training_memory(model, 1, 0)
    assert memory["states"] == pytest.approx((4 * model.num_parameters + 12 * model.num_trainable) / GIB)


def test_what_looks_wrong_is_the_traces_own(tmp_path):
    """What the chat template writes around a trace is not, and what the prompt does to thinking is told."""
    tokenizer = tiny.make_tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>final<|im_end|>{% endif %}{{ m.content }}"
        "<|endoftext|>{% endfor %}"
    )
    rows = [{"prompt": chat("1+1="), "demonstrations": ["2", "<|im_start|>2", r"\boxed{2}<|endoftext|>"]}]
    eos_token_ids = [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    args = tiny.make_args(tmp_path)
    findings = inspect_dataset(Dataset.from_list(rows), tokenizer, eos_token_ids, args, [tiny.share_of_digits])
    assert [text.partition(", the")[0] for text in findings.suspicious] == [
        "row 0, demonstrations[1] holds '<|im_start|>'"
    ]

    rows = [{"prompt": chat("1+1="), "demonstrations": ["2", "<think>\n1</think>2"]}]
    for opening, hint in {
        "<think>\n": "row 0, demonstrations[0] never closes the `<think>` that the rendered prompt opens.",
        "<think></think>": "row 0, demonstrations[1] reasons, but the rendered prompt ends with a closed, empty",
    }.items():
        tokenizer = tiny.make_tokenizer(tiny.THINKING_CHATML.replace("<think>\n", opening))
        findings = inspect_dataset(Dataset.from_list(rows), tokenizer, [1], args, [tiny.share_of_digits])
        assert len(findings.suspicious) == 1 and findings.suspicious[0].startswith(hint)


def test_a_stream(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in tiny.addition_rows(3)))
    tokenizer = tiny.make_tokenizer()
    stream = load_data(str(tmp_path / "rows.jsonl"), streaming=True)
    args = tiny.make_args(tmp_path)
    findings = inspect_dataset(stream, tokenizer, [1], args, [tiny.share_of_digits], max_rows=2)
    assert findings.num_rows == 2 and [trace.length for trace in findings.traces] == [13, 13]
