# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
The benchmark on a real language model, with tiny stand-ins of both packages: the data that it makes, runs that are
killed and cut into pieces, and the report. Nothing is downloaded.
"""

import importlib
import json
import os
import random
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy_trl.rewards import math_verify_reward


FOLDER = Path(__file__).parent.parent / "benchmarks" / "language_model"

# A template that is right, one that is wrong on every second problem, and one whose answer is another word for it
GENERATORS = """
def problem(question, trace, answer):
    return {"question": question, "answer": str(answer), "metadata": {"answer_cot": trace + f"\\n#### {answer}"}}


def generate_0(rng, difficulty):
    a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 9)
    trace = f"There are {a} + {b} pens = {a + b} pens.\\nThey cost {a + b} pens * ${c}/pen = ${(a + b) * c}."
    return problem(f"{a} pens and {b} pens at ${c}?", trace, (a + b) * c)


def generate_1(rng, difficulty):
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    return problem(f"{a} and {b}?", f"So {a}+{b}={a + b + a % 2}", a + b + a % 2)
"""
GYM = """
def create_dataset(name, seed, size, **kwargs):
    assert name == "chain_sum"
    return [{"question": f"{i} + {seed} =", "answer": str(i + seed)} for i in range(size)]
"""


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """The script, with a stand-in of reasoning-gym on the path."""
    package = tmp_path / "packages" / "reasoning_gym" / "arithmetic" / "gsm_symbolic"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package.parent.parent / "__init__.py").write_text(GYM)
    (package / "generators_00_49.py").write_text(GENERATORS)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    return load(monkeypatch, "prepare", "reasoning_gym")


def load(monkeypatch, name, *others):
    """A script of the folder; those of other benchmarks have the same names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for module in list(sys.modules):
        if module.partition(".")[0] in (name, *others):
            monkeypatch.delitem(sys.modules, module)
    script = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return script


@pytest.mark.parametrize(
    ("trace", "is_right"),
    [
        ("So 10-8=2 people\nThus 2*3 = 6 letters\n#### 6", True),
        ("It is 36 meters / 6 meters/minute = 6 minutes\n#### 6", True),
        ("12 ÷ 6 = 2 times, so 2 x 3= 6 papers\n#### 6", True),
        ("12 boxes * $0.50/box = $6\n#### 6", True),
        ("10 - 2 * 2 = 6\n#### 6", True),
        ("10 - 2 - 2 = 6\n#### 6", True),
        ("10-8=3\n2*3=6\n#### 6", False),
        ("13*0.5=6\n#### 6", False),
        ("2*3=6\n#### 7", False),
        ("2*3=6\n1+1=2\n#### 6", False),
        ("T + 3 + 3 = 6\n2*3=6\n#### 6", False),
        ("2 * (1 + 2) = 6\n#### 6", False),
        ("50% of 12 is 12 * 0.5 = 6\n#### 6", False),
        ("2,000 / 2 = 6\n#### 6", False),
        ("6 / 0 = 6\n#### 6", False),
        ("It is 6.\n#### 6", False),
        ("2*3=6.5\n#### 6", False),
    ],
)
def test_checked_equations(prepare, trace, is_right):
    assert prepare.check(trace, "6") == is_right


def test_a_slip_is_in_one_line_and_goes_on_from_there(prepare):
    trace = "In all 80 minutes, as 33 + 47 = 80.\nOn Sunday 80 x 2 = 160 minutes.\nThat is 160 - 33 = 127.\n#### 127"
    found = set()
    for seed in range(40):
        slipped, wrong = prepare.with_slip(trace, random.Random(seed))
        *lines, last = slipped.splitlines()
        equations = [prepare.EQUATION.search(line) for line in lines]
        holds = [prepare.evaluate(equation["left"]) == prepare.value(equation["right"]) for equation in equations]
        assert holds.count(False) == 1 and last == f"#### {wrong}" and wrong != "127"
        assert equations[0]["right"] == equations[1]["left"].split(" x ")[0]
        assert lines[0].startswith(f"In all {equations[0]['right']} minutes")
        assert equations[2]["left"] == f"{equations[1]['right']} - 33" and equations[2]["right"] == wrong
        found.add(holds.index(False))
    assert found == {0, 1, 2}


def test_data(prepare):
    splits = prepare.make_problems({"train": [0], "unseen": [1]}, seed=0)
    sizes = {name: len(problems) for name, problems in splits.items()}
    assert sizes == {"train": 24, "cold_start": 8, "validation": 4, "same_templates": 6, "unseen_templates": 18}
    everything = [problem for problems in splits.values() for problem in problems]
    assert len({problem["question"] for problem in everything}) == 60
    assert all(prepare.check(problem["trace"], problem["answer"]) for problem in everything)
    assert {problem["template"] for problem in splits["unseen_templates"]} == {"gsm_1"}
    assert splits == prepare.make_problems({"train": [0], "unseen": [1]}, seed=0)
    assert splits != prepare.make_problems({"train": [0], "unseen": [1]}, seed=1)
    assert len({problem["question"] for problem in prepare.make_other_task(3)}) == 144

    train = splits["train"]
    good = [problem["trace"] for problem in train]

    def rewards(condition):
        rows = prepare.to_rows(train, prepare.spoil(train, condition, num_few=5, share_wrong=0.25, seed=0))
        traces = [(row["demonstrations"], row["answer"]) for row in rows if row["demonstrations"]]
        return math_verify_reward([trace[0] for trace, _ in traces], answer=[answer for _, answer in traces])

    assert rewards("good") == [1.0] * 24
    assert rewards("few") == [1.0] * 5
    assert sorted(rewards("wrong")) == [0.0] * 6 + [1.0] * 18
    assert rewards("foreign") == [1.0] * 24
    foreign = prepare.spoil(train, "foreign", 5, 0.25, seed=0)
    assert all(len(long) > 2 * len(short) for long, short in zip(foreign, good, strict=True))
    row = prepare.to_rows(train, good)[0]
    assert r"\boxed{}" in row["prompt"][0]["content"]
    assert row["demonstrations"][0].endswith(rf"The answer is \boxed{{{row['answer']}}}.")


def test_templates_are_trained_on_or_not():
    templates = json.loads((FOLDER / "templates.json").read_text())
    assert (len(templates["train"]), len(templates["unseen"])) == (24, 8)
    assert len(set(templates["train"] + templates["unseen"])) == 32


def write_gguf(path):
    """A Llama of one layer with byte-level tokens, as llama.cpp stores it."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ċ", "Ġ", *(chr(c) for c in range(33, 127)), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny.CHATML)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    shapes |= {"blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).mul(0.1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_prepared_from_packages(prepare, tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "llm_tiny/tiny.gguf")
    (tmp_path / "templates.json").write_text('{"train": [0], "unseen": [1]}')
    flags = [
        "--model_wheel",
        tmp_path / "tiny.whl",
        "--output_dir",
        tmp_path,
        "--templates",
        tmp_path / "templates.json",
    ]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, [*flags, "--num_few", 5])])
    prepare.main()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == tiny.CHATML and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("ab c")["input_ids"] == tokenizer.convert_tokens_to_ids(["ab", "Ġ", "c"])
    counts = {file.stem: len(file.read_text().splitlines()) for file in (tmp_path / "data").iterdir()}
    of_train = dict.fromkeys(("train", "train_few", "train_wrong", "train_foreign"), 24)
    assert counts == {
        **of_train,
        **{"cold_start": 8, "validation": 4, "same_templates": 6, "unseen_templates": 18, "other_task": 144},
    }


# Imports once, and then does run.py again and again, each time in a process that it forks: killed in the pass of an
# update, in a checkpoint or in an evaluation, or with a clock that ticks once for each look at it
REPEATED = """
    import itertools, json, os, signal, sys, time, types
    sys.path.insert(0, {folder!r})
    import run
    from transformers import Trainer

    # A random model writes as much as it may, and traces have eleven tokens at most
    run.CONDITIONS = {{name: (split, 24) for name, (split, _) in run.CONDITIONS.items()}}

    def killing(function, count):
        calls = itertools.count(1)
        def call(*args, **kwargs):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    for where, count, flags in json.loads(sys.argv[1]):
        child = os.fork()
        if not child:
            if where == "pass":
                Trainer.training_step = killing(Trainer.training_step, count)
            elif where == "checkpoint":  # behind the weights, and before what is written last
                Trainer._save_rng_state = killing(Trainer._save_rng_state, count)
            elif where == "evaluation":
                run.generate_batch = killing(run.generate_batch, count)
            elif where == "clock":
                run.time = types.SimpleNamespace(perf_counter=time.perf_counter, monotonic=itertools.count().__next__)
                flags = [*flags, "--max_minutes", str(count / 60)]
            sys.argv = ["run.py", *flags]
            run.main()
            sys.exit()
        print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A model and data as prepare.py leaves them."""
    folder = tmp_path_factory.mktemp("prepared")
    tiny.save_tiny_model(folder / "model")
    (folder / "data").mkdir()
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+1"}],
            "answer": str(i + 1),
            "demonstrations": [rf"\boxed{{{i + 1}}}"],
            "template": f"gsm_{i % 3}",
        }
        for i in range(12)
    ]
    for name in ("train", "cold_start", "validation", "same_templates", "unseen_templates", "other_task"):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = [row if i < 3 else row | {"demonstrations": []} for i, row in enumerate(rows)]
    (folder / "data" / "train_few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    (folder / "repeated.py").write_text(textwrap.dedent(REPEATED.format(folder=str(FOLDER))))
    return folder


FLAGS = "--stages compare --starts cold --seeds 1 --learning_rate 1e-2 --num_updates 4 --prompts_per_update 2".split()
FLAGS += "--num_generations 4 --micro_batch_size 4 --save_updates 2 --eval_updates 3 --eval_batch_size 4".split()
FLAGS += "--num_curve_problems 4 --num_problems 6 --cold_start_updates 2 --num_threads 1".split()


def repeat(prepared, scenarios):
    """The exit statuses of run.py: where it is killed, after how many calls, and its flags."""
    scenarios = [
        (where, count, ["--data_dir", str(prepared), "--output_dir", str(output_dir), *FLAGS, "--methods", *methods])
        for where, count, output_dir, methods in scenarios
    ]
    process = subprocess.run(
        [sys.executable, prepared / "repeated.py", json.dumps(scenarios)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "LUFFY_REWARD_WORKERS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    return [line for line in process.stdout.splitlines() if line.isdigit()], process


def outcome(output_dir):
    """All that the runs have found, without how long it took."""
    found = {}
    for file in sorted(output_dir.glob("runs/*/*/result.json")):
        result = json.loads(file.read_text())
        timed = {"seconds", "train_runtime", "step_time", "device", "commit"}
        history = [{name: x for name, x in row.items() if name not in timed} for row in result.pop("history")]
        answers = [json.loads(line) for line in (file.parent / "answers.jsonl").read_text().splitlines()]
        for row in answers:
            row.pop("seconds")
        kept = {name: value for name, value in result.items() if name not in timed}
        found[str(file.parent.relative_to(output_dir))] = (kept, history, answers)
    return found


@pytest.fixture(scope="module")
def finished(prepared):
    """The runs of three methods, at one go; killed in many places; and in pieces."""
    whole, killed, pieces = (prepared / name for name in ("whole", "killed", "pieces"))
    both = ["luffy", "sft"]
    # After an update behind a checkpoint; in the next checkpoint; in an evaluation; and SFT behind a checkpoint
    places = [("pass", 9), ("checkpoint", 1), ("evaluation", 2), ("pass", 7)]
    statuses, process = repeat(
        prepared,
        [
            (None, 0, whole, [*both, "zero_shot"]),
            *((where, count, killed, both) for where, count in places),
            (None, 0, killed, both),
            *[("clock", 9, pieces, ["luffy"])] * 4,
        ],
    )
    return whole, killed, pieces, statuses, process


def test_killed_and_in_pieces(finished):
    whole, killed, pieces, statuses, process = finished
    assert statuses == ["0", *["9"] * 4, "0", *["0"] * 4], process.stderr
    expected = outcome(whole)
    cold, luffy, sft, zero = (
        f"runs/{name}"
        for name in (
            "cold_start/base-sft-cold_start-5e-05-1",
            "compare/cold-luffy-good-0.01-1",
            "compare/cold-sft-good-0.01-1",
            "compare/cold-zero_shot-good-0-1",
        )
    )
    assert set(expected) == {cold, luffy, sft, zero}
    assert outcome(killed) == {name: expected[name] for name in (cold, luffy, sft)}
    assert process.stdout.count("The time is over") >= 3
    assert outcome(pieces) == {name: expected[name] for name in (cold, luffy)}


def test_report(finished, monkeypatch, tmp_path):
    whole, *_ = finished
    report = load(monkeypatch, "report", "run")
    report.write(whole, tmp_path)
    rows = pd.read_csv(tmp_path / "runs.csv").set_index(["stage", "method", "update", "split", "mode"])
    assert len(rows) == 6 + 2 * (3 + 6) + 6
    luffy = rows.loc[("compare", "luffy")]
    of_answers = [json.loads(line) for line in next(whole.glob("runs/compare/*luffy*/answers.jsonl")).open()]
    right = [
        row["correct"]
        for row in of_answers
        if (row["update"], row["split"], row["mode"]) == (4, "other_task", "sampled")
    ]
    assert luffy.loc[(4, "other_task", "sampled"), "accuracy"] == pytest.approx(sum(right) / 6)
    # Two groups of four with one trace each: `\boxed{1}` has nine characters and a token that ends it
    tokens = luffy.loc[(4, "other_task", "greedy")]
    assert 4 * 2 * 10 <= tokens["demonstration_tokens"] <= 4 * 2 * 11
    assert luffy.loc[(3, "other_task", "greedy"), "trained_tokens"] < tokens["trained_tokens"]
    sft = rows.loc[("compare", "sft", 4, "other_task", "greedy")]
    assert 4 * 8 * 10 <= sft["demonstration_tokens"] <= 4 * 8 * 11 and sft["rollout_tokens"] == 0
    assert rows.loc[("compare", "zero_shot", 0, "other_task", "greedy"), "trained_tokens"] == 0
    assert rows["commit"].str.len().min() >= 12
    tables = (tmp_path / "tables.md").read_text()
    assert "## After all updates, from the cold start, traces: good, greedy" in tables
    assert "| LUFFY (1 seeds) | " in tables and "| SFT | 0.01 | 1 | " in tables
    assert {path.name for path in tmp_path.glob("*.png")} == {"cold.png", "conditions.png"}
    assert len(pd.read_csv(tmp_path / "updates.csv")) == 2 + 4 + 4


def test_intervals(monkeypatch):
    report = load(monkeypatch, "report", "run")
    # Ten templates of forty problems that are all right or all wrong: the templates are what is uncertain
    rows = pd.DataFrame([{"template": t, "correct": float(t < 5)} for t in range(10) for _ in range(40)])
    assert report.bootstrap(rows) == pytest.approx((0.2, 0.8))
    assert report.bootstrap(rows, over_templates=False) == pytest.approx((0.45, 0.55), abs=0.005)
    # With one template there is nothing to draw but problems
    assert report.bootstrap(rows.assign(template=0)) == pytest.approx((0.45, 0.55), abs=0.005)


def test_what_a_kill_leaves_of_a_line(monkeypatch, tmp_path):
    run = load(monkeypatch, "run")
    file = tmp_path / "answers.jsonl"
    file.write_text('{"index": 0}\n{"index": 1, "te')
    assert run.read_lines(file) == [{"index": 0}] and file.read_text() == '{"index": 0}\n'
    assert run.read_lines(tmp_path / "missing.jsonl") == []


def test_another_run_in_its_place(monkeypatch, prepared, tmp_path):
    run = load(monkeypatch, "run")
    begun = run.Run("compare", "base", "sft", "good", 1e-3, seed=1)
    begun.folder(tmp_path).mkdir(parents=True)
    run.write_last(begun.folder(tmp_path) / "run.json", run.asdict(begun))
    flags = ["--data_dir", prepared, "--output_dir", tmp_path, "--stages", "compare", "--starts", "base"]
    flags += ["--methods", "sft", "--seeds", "1"]
    for more, message in [
        (["--learning_rate", "1e-3", "--num_updates", "5"], "run.json comes from another `num_updates`"),
        ([], "No learning rate of sft from base has been tried"),
        (["--micro_batch_size", "5"], "`micro_batch_size` has to divide"),
        (["--seeds", "0"], "`seeds`: 0 is the seed of the learning rates"),
    ]:
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, [*flags, *more])])
        with pytest.raises(SystemExit, match=message):
            run.main()


def test_the_best_learning_rate(monkeypatch, tmp_path):
    run = load(monkeypatch, "run")
    for condition, rate, right in [("good", 1e-5, 1), ("good", 3e-5, 2), ("good", 1e-4, 2), ("wrong", 1e-5, 1)]:
        folder = run.Run("tune", "cold", "sft", condition, rate, seed=0).folder(tmp_path)
        folder.mkdir(parents=True)
        result = {"start": "cold", "method": "sft", "condition": condition, "learning_rate": rate}
        run.write_last(folder / "result.json", result)
        rows = [{"correct": float(i < right)} for i in range(4)]
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rates = [run.best_learning_rate("cold", "sft", condition, tmp_path) for condition in ("good", "few", "wrong")]
    assert rates == [3e-5, 3e-5, 1e-5]
