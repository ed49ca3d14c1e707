# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Groups of demonstrations and rollouts that call tools, and act in environments."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from test_turns import ONE_CALL, PROMPT, TRACE, answer, call, multiply
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.data.conversations import to_demonstration


TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 5, "b": 5}}\n</tool_call>'
ROWS = [{"prompt": PROMPT, "demonstrations": [ONE_CALL]}] * 2


def make_trainer(folder, rows, cls=LuffyTrainer, tools=(multiply,), rewards=None, environment_factory=None, **kwargs):
    tokenizer = tiny.make_tokenizer(TEMPLATE)
    config = GRPOConfig if cls is GRPOTrainer else LuffyConfig
    return cls(
        tiny.make_model(tokenizer, max_position_embeddings=2048),
        counts_24 if rewards is None else rewards,
        tiny.make_args(folder, config, **{"max_completion_length": 600, **kwargs}),
        Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=tokenizer,
        tools=list(tools),
        environment_factory=environment_factory,
    )


def counts_24(completions, **kwargs):
    return [float("24" in completion[-1]["content"]) for completion in completions]


def play(trainer, *turns):
    """Lets the policy write texts: for each call of `generate`, those of its rows. Returns what it was asked."""
    asked, tokenizer = [], trainer.processing_class

    def generate(input_ids, **kwargs):
        texts = turns[len(asked)]
        asked.append([tokenizer.decode(ids[ids != tokenizer.pad_token_id]) for ids in input_ids])
        assert len(texts) == len(input_ids)
        new = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]
        new = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=tokenizer.pad_token_id)
        return torch.cat([input_ids, new], dim=1)

    trainer.model.generate = generate
    return asked


def capture(trainer):
    """Keeps the rewards' completions, and what the trainer makes of each generation batch."""
    made, completions = [], []
    make, score = trainer._generate_and_score_completions, trainer._calculate_rewards

    def keep(inputs):
        made.append(make(inputs))
        return made[-1]

    def note(inputs, prompts, own_completions, ids):
        completions.append(own_completions)
        return score(inputs, prompts, own_completions, ids)

    trainer._generate_and_score_completions, trainer._calculate_rewards = keep, note
    return made, completions


def texts(trainer, batch, mask):
    """The text under a mask of each row."""
    mask = mask.bool() & batch["completion_mask"].bool()
    return [trainer.processing_class.decode(ids[own]) for ids, own in zip(batch["completion_ids"], mask, strict=True)]


SPOKEN = '<tool_call>\n{"name": "multiply", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>It is 24.<|im_end|>'


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_microbatch": 1200}, {"length_aware_batching": False}])
def test_a_group_in_which_some_call_tools(tmp_path, options):
    trainer = make_trainer(tmp_path, ROWS, **options)
    asked, (made, completions) = play(trainer, [CALL, "no", CALL], ["24", "x"]), capture(trainer)
    trainer.train()
    assert [len(rows) for rows in asked] == [3, 2]  # nothing is generated for the demonstration
    answered = "<tool_response>\n25\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert all(context.endswith(answered) for context in asked[1])
    assert completions[0][0] == ONE_CALL
    assert completions[0][1][1:] == [answer("25"), {"role": "assistant", "content": "24"}]
    assert [len(completion) for completion in completions[0]] == [3, 3, 1, 3]

    (batch,) = made
    assert texts(trainer, batch, batch["demonstration_mask"]) == [SPOKEN, "", "", ""]
    own = [f"{CALL}<|im_end|>24<|im_end|>", "no<|im_end|>", f"{CALL}<|im_end|>x<|im_end|>"]
    assert texts(trainer, batch, batch["tool_mask"]) == [SPOKEN, *own]
    num_rollout_tokens = batch["tool_mask"][1:] * batch["completion_mask"][1:]
    log = trainer.state.log_history[0]
    assert log["demonstrations/length"] == batch["demonstration_mask"].sum()
    assert log["completions/mean_length"] == pytest.approx(num_rollout_tokens.sum().item() / 3)
    assert log["tools/call_frequency"] == pytest.approx(2 / 3)
    acted = batch["demonstration_mask"].sum() / (batch["tool_mask"] * batch["completion_mask"]).sum()
    assert log["demonstrations/fraction"] == pytest.approx(acted.item())


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_microbatch": 1200}, {"length_aware_batching": False}])
def test_the_loss_is_of_what_was_acted(tmp_path, options):
    """Sequence by sequence: the shaped ratio on acted tokens of the demonstration, log-probs on those of rollouts."""
    trainer = make_trainer(tmp_path, ROWS, learning_rate=0.0, loss_type="dapo", **options)
    play(trainer, [CALL, "no", CALL], ["24", "x"])
    made, _ = capture(trainer)
    trainer.train()
    (batch,) = made
    reference, total, count = tiny.make_model(trainer.processing_class, max_position_embeddings=2048), 0.0, 0
    for row in range(4):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        mask = batch["completion_mask"][row].bool()
        ids, acted = batch["completion_ids"][row][mask], batch["tool_mask"][row][mask].bool()
        logits = reference(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        probs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].exp()
        weights = probs / (probs + 0.1) if row == 0 else probs / probs.detach()
        total = total - (batch["advantages"][row] * weights[acted]).sum()
        count += acted.sum()
    loss = total / count
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm().item()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("options", [tiny.PLAIN_GRPO, {"length_aware_batching": False, "ratio_clipping": "on_policy"}])
def test_without_traces_it_is_trls_own_to_the_bit(tmp_path, options):
    rows = [{"prompt": PROMPT, "demonstrations": []}] * 2
    weights = []
    for cls, own in ((GRPOTrainer, {}), (LuffyTrainer, options)):
        own = {"advantage_baseline": "group", **own} if own and own.get("num_demonstrations") != 0 else own
        own.pop("advantage_baseline", None)
        given = rows if cls is LuffyTrainer else [{"prompt": row["prompt"]} for row in rows]
        trainer = make_trainer(
            tmp_path / cls.__name__, given, cls, scale_rewards="none", loss_type="dapo", beta=0.0, **own
        )
        play(trainer, [CALL, "no", CALL, "24"], ["24", "x"])
        trainer.train()
        trainer.save_model(tmp_path / cls.__name__)
        weights.append(load_file(tmp_path / cls.__name__ / "model.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_prefix_ends_where_the_policy_can_go_on(tmp_path):
    rows = [{"prompt": PROMPT, "demonstrations": [TRACE, ONE_CALL]}] * 2
    trainer = make_trainer(tmp_path, rows, prefix_schedule="fixed", prefix_ratio_min=0.5, num_demonstrations=2)
    asked = play(trainer, [CALL, "no", "no"], ["It is 24."])
    made, completions = capture(trainer)
    trainer.train()
    # The first half of the trace is its first call, and the answer
    assert [len(rows) for rows in asked] == [3, 1]
    assert "First 2*3." in asked[0][0] and asked[0][0].endswith(
        "6\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert asked[1][0].endswith("25\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    (batch,) = made
    first = f"First 2*3.\n{CALL.replace('5', '2', 1).replace('5', '3', 1)}<|im_end|>"
    assert texts(trainer, batch, batch["demonstration_mask"])[0] == first
    assert texts(trainer, batch, batch["tool_mask"])[0] == f"{first}{CALL}<|im_end|>It is 24.<|im_end|>"
    own = [{"role": "assistant", "content": "", "tool_calls": [call(a=5, b=5)]}, answer("25")]
    assert completions[0][0] == [*TRACE[:2], *own, {"role": "assistant", "content": "It is 24."}]
    assert completions[0][1] == ONE_CALL


@pytest.mark.parametrize("prefix", [False, True])
def test_what_replaces_failures(tmp_path, prefix):
    options = {"prefix_schedule": "linear", "prefix_ratio_min": 0.3, "prefix_ratio_max": 0.5} if prefix else {}
    if prefix:
        options["prefix_schedule_steps"] = 10
    rows = [{"prompt": PROMPT, "demonstrations": [TRACE]}] * 2
    trainer = make_trainer(tmp_path, rows, demonstration_policy="on_failure", **options)
    turns = [[CALL, "no", CALL, "no"], ["x", "x"], *([[CALL], ["24!"]] if prefix else [])]
    asked, (made, completions) = play(trainer, *turns), capture(trainer)
    trainer.train()
    assert [len(rows) for rows in asked] == ([4, 2, 1, 1] if prefix else [4, 2])
    (batch,) = made
    shown = completions[-1][0]
    assert (
        shown == TRACE
        if not prefix
        else [shown[:2], shown[3:]] == [TRACE[:2], [answer("25"), {"role": "assistant", "content": "24!"}]]
    )
    assert [len(completion) for completion in completions[-1]] == [len(shown), 1, 3, 1]
    acted = texts(trainer, batch, batch["tool_mask"])
    assert "tool_response" not in acted[0] and acted[0].endswith("24!<|im_end|>" if prefix else "It is 24.<|im_end|>")
    assert acted[2] == f"{CALL}<|im_end|>x<|im_end|>"
    assert trainer.state.log_history[0]["demonstrations/reward"] == 1.0


class Counter:
    """An environment: a number that can be raised."""

    started = 0

    def reset(self, prompt, start=0, **kwargs):
        type(self).started += 1
        self.number = start
        return f" It is at {start}."

    def add(self, amount: int) -> int:
        """
        Raises the number.

        Args:
            amount: By how much.
        """
        self.number += amount
        return self.number

    def get_reward(self):
        return float(self.number == 7)


ADD = '<tool_call>\n{"name": "add", "arguments": {"amount": 4}}\n</tool_call>'
ACTED = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"amount": 4}}}],
    },
    {"role": "tool", "name": "add", "content": "7"},
    {"role": "assistant", "content": "Done."},
]


@pytest.mark.parametrize("policy", ["always", "on_failure"])
def test_environments(tmp_path, policy):
    Counter.started = 0
    prompt = [{"role": "user", "content": "Raise it to 7."}]
    rows = [{"prompt": prompt, "demonstrations": [ACTED], "demonstration_rewards": [1.0], "start": 3}] * 2
    seen = []

    def reads_environments(environments, completions, **kwargs):
        seen.extend(environment.number for environment in environments)
        return [0.5] * len(completions)

    options = {"demonstration_policy": policy, **({"failure_threshold": 1.0} if policy == "on_failure" else {})}
    trainer = make_trainer(
        tmp_path, rows, tools=(), rewards=[reads_environments], environment_factory=Counter, **options
    )
    num_rollouts = 4 if policy == "on_failure" else 3
    asked = play(trainer, [ADD, "no", "no", "no"][:num_rollouts], ["Done."])
    made, completions = capture(trainer)
    trainer.train()
    assert Counter.started == num_rollouts  # none for the demonstration
    assert len(trainer._environment_pool[None]) == num_rollouts
    assert all("It is at 3." in text for text in asked[0])
    (batch,) = made
    decoded = [trainer.processing_class.decode(ids, skip_special_tokens=True) for ids in batch["prompt_ids"]]
    assert all(text.count("It is at 3.") == 1 for text in decoded)  # the demonstration's prompt too
    assert completions[-1][0] == ACTED
    assert seen == [7, 3, 3, 3][:num_rollouts]
    # Both reward functions give the trace what the dataset says
    rewards = {name: list(values)[-4:] for name, values in trainer._logs["rewards"].items()}
    solved = float(policy == "always")
    assert rewards == {"reads_environments": [1.0, 0.5, 0.5, 0.5], "Counter": [1.0, solved, 0.0, 0.0]}


def test_environments_need_the_rewards_of_traces(tmp_path):
    rows = [{"prompt": PROMPT, "demonstrations": [ACTED]}] * 2
    with pytest.raises(ValueError, match="needs the column `demonstration_rewards`"):
        make_trainer(tmp_path, rows, tools=(), environment_factory=Counter)
    rows = [{**row, "demonstration_rewards": [1.0]} for row in rows]
    with pytest.raises(ValueError, match="`prefix_ratio_min=0.5` with `environment_factory`"):
        make_trainer(tmp_path, rows, tools=(), environment_factory=Counter, prefix_ratio_min=0.5)


def test_rewards_of_traces_from_the_dataset(tmp_path):
    """Text tasks as well: preferences of people, or a grader that is dear."""
    rows = [
        {"prompt": f"{i}+1=", "demonstrations": ["a", "bc"], "demonstration_rewards": [[0.25, None], [2.0, -1.0]]}
        for i in range(2)
    ]
    scored = []

    def first(completions, **kwargs):
        scored.extend(completions)
        return [0.0] * len(completions)

    def second(completions, **kwargs):
        return [0.5] * len(completions)

    trainer = make_trainer(tmp_path, rows, tools=(), rewards=[first, second], num_demonstrations=2)
    trainer.train()
    assert len(scored) == 2
    rewards = {name: list(values) for name, values in trainer._logs["rewards"].items()}
    assert rewards["first"][:2] == [0.25, 2.0] and rewards["second"][1:] == [-1.0, 0.5, 0.5]
    assert rewards["second"][0] != rewards["second"][0]
    message = "has 2 numbers for a trace, and there are 1 reward functions"
    with pytest.raises(ValueError, match=f"^row 0: `demonstration_rewards` {message}"):
        make_trainer(tmp_path, rows, tools=(), rewards=[first], num_demonstrations=2)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(tmp_path, stream, tools=(), rewards=[first], num_demonstrations=2)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_resumed_within_a_generation_batch(tmp_path):
    """What was acted, and the masks, are in the checkpoint: the same weights to the bit."""
    options = {"max_steps": 3, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "all", ROWS, **options).train()
    shutil.copytree(tmp_path / "all" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    resumed = make_trainer(tmp_path / "resumed", ROWS, **options)
    resumed.train(resume_from_checkpoint=True)
    expected, weights = (
        load_file(tmp_path / run / "checkpoint-3" / "model.safetensors") for run in ("all", "resumed")
    )
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    state = torch.load(tmp_path / "all" / "checkpoint-1" / "generation_0.pt")
    assert any("tool_mask" in batch and (batch["tool_mask"] == 0).any() for batch in state["buffered_inputs"])


def test_prompts_with_fields_of_other_messages(tmp_path, capsys):
    """Arrow gives each message the fields of all others, as None, and TRL's table of completions takes none."""
    log = [*PROMPT, *ONE_CALL]
    rows = Dataset.from_list([{"messages": log}] * 2).map(to_demonstration, with_indices=True)
    assert rows[0]["prompt"][0]["tool_calls"] is None
    trainer = make_trainer(tmp_path, rows.remove_columns("messages"), log_completions=True)
    trainer.train()
    assert "2*3*4?" in capsys.readouterr().out


NO_REWARDS = [[None] * 2, [[None], [1.0]], ["a"] * 2, [[]] * 2, [1.0], [1.0] * 3, [float("inf"), 1.0], 1.0]


@pytest.mark.parametrize("value", NO_REWARDS)
def test_rewards_of_traces_that_are_none(tmp_path, value):
    rows = [{"prompt": "1+1=", "demonstrations": ["a", "b"], "demonstration_rewards": value}]
    with pytest.raises(ValueError, match=r"row 0: `demonstrations\[.\]` has no number in `demonstration_rewards`"):
        make_trainer(tmp_path, rows * 2, tools=())


@pytest.mark.parametrize("config", [None, "zero3"])
def test_processes_that_call_tools_differently_often(tmp_path, config):
    """Sharded models sample together: who calls no tools takes part in the turns of the others. Nothing hangs."""
    file = config and Path(__file__).parent.parent / "accelerate_configs" / f"{config}.yaml"
    env = {"PRETEND": "1", "DS_ACCELERATOR": "cpu"} if config else {"ACCELERATE_USE_CPU": "true"}
    ranks = tiny.launch("acts", tmp_path, config_file=file, env=env)
    assert ranks[0]["asked"] == ([1, 1, 1] if config else [1])
    assert ranks[1]["asked"] == [2, 2, 1]
    for rank in ranks:
        # The demonstration and one rollout say 24, and one says it after two calls
        assert rank["log"]["demonstrations/reward"] == 1.0 and rank["log"]["reward"] == pytest.approx(2 / 3)
        assert rank["log"]["tools/call_frequency"] == pytest.approx(3 / 3)


def test_rewards_of_equal_traces_and_of_traces_that_are_cut(tmp_path):
    rows = [{"prompt": "1+1=", "demonstrations": ["a", "a"], "demonstration_rewards": [0.0, 1.0]}] * 2
    with pytest.raises(ValueError, match=r"`demonstrations\[1\]` is there twice, with other `demonstration_rewards`"):
        make_trainer(tmp_path, rows, tools=())
    with pytest.raises(
        ValueError, match="`demonstration_overflow='truncate'` with the column `demonstration_rewards`"
    ):
        make_trainer(tmp_path, rows, tools=(), demonstration_overflow="truncate")


def test_several_environments_and_texts_are_refused(tmp_path):
    rows = [{"prompt": "1+1=", "demonstrations": ["a"], "demonstration_rewards": [0.0]}] * 2
    with pytest.raises(ValueError, match="`environment_factory` with several environments is not supported"):
        make_trainer(tmp_path, rows, tools=(), environment_factory={"a": Counter, "b": Counter})
    with pytest.raises(ValueError, match="row 1: `environment` is 'b', and `environment_factory` has 'a'. Name one"):
        make_trainer(
            tmp_path,
            [{**rows[0], "prompt": [{"role": "user", "content": "1"}], "environment": name} for name in "ab"],
            tools=(),
            environment_factory={"a": Counter},
        )
    with pytest.raises(
        ValueError, match="row 0: `prompt` is a text, and tools are told to the policy in chat messages"
    ):
        make_trainer(tmp_path, rows)
