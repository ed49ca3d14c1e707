# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import hub_server
import pytest
import tiny
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from launched_hub import answer
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import PushInProgress

from luffy_trl import LuffyTrainer
from luffy_trl.demonstrations import find_eos_token_ids, load_generation_config
from luffy_trl.eval import EvaluationArguments, evaluate, summarize
from luffy_trl.eval.identity import identify
from luffy_trl.model_card import __main__ as command


# ---------------------------------------------------------------------------------------------- the Hub


class Outages:
    """Answers 500 to the requests that are named: which of those to a path, counted from 1."""

    def __init__(self, plan):
        self.plan, self.seen = plan, dict.fromkeys(plan, 0)

    def __call__(self, method, path):
        for pattern, numbers in self.plan.items():
            if re.search(pattern, f"{method} {path}"):
                self.seen[pattern] += 1
                return self.seen[pattern] in numbers
        return False


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(files):
    """Of the files of a folder those that a trainer pushes."""
    return {path: content for path, content in files.items() if not path.startswith(("_", "checkpoint-"))}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server to which two trainers have pushed, with outages; and their folders."""
    folder = tmp_path_factory.mktemp("hub")
    tiny.save_tiny_model(folder / "model", hidden_size=64)  # heads of 32, which vLLM wants on the CPU
    row = {"data_source": "sums", "reward_model": {"ground_truth": "1"}}
    rows = [{**row, "prompt": [{"role": "user", "content": f"{i}+1="}]} for i in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with hub_server.serve() as server:
        server.fails = Outages(
            {
                "PUT /lfs/upload": [1],  # `huggingface_hub` tries again by itself
                "someone/my-full/commit": [2, 4],  # the second save, and the first push after training
                "someone/my-lora/commit": [5],  # the model of the last save
            }
        )
        result = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("launched_hub.py")), str(folder)],
            env={**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, result.stdout[-6000:]
        server.output = result.stdout
        yield server, folder


def test_every_save_is_pushed_and_arrives_as_it_was_saved(hub):
    server, folder = hub
    commits = server.repos["someone/my-full"]
    assert [commit.message for commit in commits] == [
        "Training in progress, step 1",
        "Training in progress, step 3",  # the push of step 2 met the outage
        "End of training",
    ]
    pictures = {"curves_on_policy.png", "curves_demonstrations.png", "curves_evaluation.png"}
    assert {"README.md", "model.safetensors", *pictures} <= set(commits[0].files)
    assert commits[0].files == pushed(read_files(folder / "full" / "saved-1"))
    assert commits[1].files == pushed(read_files(folder / "full" / "saved-3"))
    assert commits[2].files == pushed(read_files(folder / "full" / "my-full"))
    assert [status for _, path, status in server.requests if path.endswith("my-full/commit/main")] == [
        200,
        500,
        200,
        500,
        200,
    ]
    assert [status for method, _, status in server.requests if method == "PUT"].count(500) == 1


def test_an_outage_loses_nothing_locally(hub):
    _, folder = hub
    saved = read_files(folder / "full" / "saved-2")
    checkpoint = {path for path in saved if path.startswith("checkpoint-2/")}
    assert {f"checkpoint-2/{name}" for name in ("model.safetensors", "optimizer.pt", "generation_0.pt")} <= checkpoint
    assert (
        saved["model.safetensors"]
        == saved["checkpoint-2/model.safetensors"]
        != saved["checkpoint-1/model.safetensors"]
    )
    assert json.loads((folder / "full" / "result.json").read_text())["failures"] == [500]


def test_a_failed_push_is_told(hub):
    server, folder = hub
    told = re.findall("The push of a checkpoint failed.*", server.output)
    assert len(told) == 1  # that of step 2 was made up for by step 3
    assert f"All files are in {folder / 'lora' / 'my-lora'}, and `trainer.push_to_hub()` pushes them." in told[0]
    assert "The error was: Server error '500 Internal Server Error'" in told[0]


def test_adapters_and_the_last_checkpoint_are_pushed(hub):
    server, folder = hub
    commits = server.repos["someone/my-lora"]
    assert [commit.message for commit in commits] == [
        *(f"Training in progress, step {step}{part}" for step in (1, 2) for part in ("", ", checkpoint")),
        "Training in progress, step 3, checkpoint",
        "End of training",
        "End of training",
    ]
    saved = read_files(folder / "lora" / "my-lora")
    checkpoint = read_files(folder / "lora" / "my-lora" / "checkpoint-3")
    last_checkpoint = {f"last-checkpoint/{path}": content for path, content in checkpoint.items()}
    assert {"last-checkpoint/generation_0.pt", "last-checkpoint/optimizer.pt"} <= set(last_checkpoint)
    assert {"adapter_model.safetensors", "README.md", "curves_on_policy.png"} <= set(pushed(saved))
    assert "model.safetensors" not in saved
    assert commits[-1].files == {**pushed(saved), **last_checkpoint}


def test_no_push_holds_the_token(hub):
    server, _ = hub
    assert "Bearer hf_secret" in server.tokens
    for commits in server.repos.values():
        for commit in commits:
            assert not [path for path, content in commit.files.items() if b"hf_secret" in content]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_download_gives_the_answer_of_the_trained_model(hub, kind):
    server, folder = hub
    downloaded = folder / kind / "downloaded"
    shutil.rmtree(downloaded / ".cache")
    result = json.loads((folder / kind / "result.json").read_text())
    assert read_files(downloaded) == server.files(result["repo"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model" if kind == "lora" else downloaded)
    untrained = answer(model, AutoTokenizer.from_pretrained(downloaded))
    if kind == "lora":
        model = PeftModel.from_pretrained(model, downloaded)
        assert untrained != result["answer"]
    assert answer(model, AutoTokenizer.from_pretrained(downloaded)) == result["answer"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_a_download_gives_the_same_answer_in_vllm(hub):
    from vllm import LLM, SamplingParams

    _, folder = hub
    llm = LLM(str(folder / "full" / "downloaded"), dtype="float32", enforce_eager=True, max_model_len=64)
    (output,) = llm.generate(["7+1="], SamplingParams(temperature=0, max_tokens=12))
    result = json.loads((folder / "full" / "result.json").read_text())
    assert [*output.prompt_token_ids, *output.outputs[0].token_ids] == result["answer"]


def test_the_cards_of_checkpoints_know_what_was_said_before(hub):
    server, _ = hub
    for commit in server.repos["someone/my-full"]:
        card = ModelCard(commit.files["README.md"].decode())
        assert card.data.datasets == ["someone/additions"]
        assert card.data.tags == ["generated_from_trainer", "grpo", "luffy", "math", "trl"]
        assert 'model="someone/my-full"' in card.text
    first, second, _ = (commit.files["README.md"].decode() for commit in server.repos["someone/my-full"])
    assert "| updates | 1 of 3 |" in first and "| updates | 3 |" in second
    lora = ModelCard(server.files("someone/my-lora")["README.md"].decode())
    assert lora.data.library_name == "peft" and "lora" in lora.data.tags and lora.data.base_model is None
    assert "| trained weights | LoRA, r 4, alpha 8 on q_proj, v_proj |" in lora.text
    assert "`base_model_name_or_path` in `adapter_config.json`" in lora.text and "- peft " in lora.text


def test_benchmarks_evaluated_in_training_are_metadata_of_the_weights_they_were_measured_on(hub):
    server, _ = hub
    first, last, _ = (ModelCard(c.files["README.md"].decode()) for c in server.repos["someone/my-full"])
    assert first.data.eval_results is None  # there is a score of update 0, and the weights are those of update 1
    assert "| sums, 3 questions | 0.0 (update 0) | 0.0 (update 0) |" in first.text
    (result,) = last.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("sums", "accuracy", 0.0)
    assert result.metric_args == {"num_questions": 3, "num_samples": 1, "temperature": 0, "top_p": 1.0}
    assert "| sums, 3 questions | 0.0 (update 0) | 0.0 (update 3) |" in last.text
    assert "![Accuracy on benchmarks, by update](curves_evaluation.png)" in last.text


# ---------------------------------------------------------------------------------------------- the card


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny.save_tiny_model(tmp_path_factory.mktemp("card") / "model")


def make_trainer(model_path, output_dir, rows=None, peft_config=None, **kwargs):
    args = tiny.make_args(output_dir, **kwargs)
    dataset = Dataset.from_list(rows or tiny.addition_rows(2))
    return LuffyTrainer(model_path, tiny.share_of_digits, args, dataset, peft_config=peft_config)


def read_card(trainer):
    return (Path(trainer.args.output_dir) / "README.md").read_text()


def test_a_model_card_tells_what_was_done(model_path, tmp_path):
    trainer = make_trainer(model_path, tmp_path / "mine")
    trainer.create_model_card(model_name="mine", dataset_name="someone/data", tags="math")
    card = read_card(trainer)
    assert "tags:\n- generated_from_trainer\n- grpo\n- luffy\n- math\n- trl\n" in card
    assert "datasets:\n- someone/data\n" in card and "pipeline_tag: text-generation" in card
    assert "1 of the 4 completions of each group is a demonstration from the dataset" in " ".join(card.split())
    assert "| policy shaping | regularized, gamma 0.1 |" in card and "| precision | float32 weights |" in card
    data = "[someone/data](https://huggingface.co/datasets/someone/data), 2 rows, with the reward function"
    assert f"{data} `share_of_digits`." in card
    assert "arXiv:2504.14945" in card and str(tmp_path) not in card and model_path not in card
    assert "- luffy-trl " in card and "- trl 1.16" in card
    assert "## Curves" not in card and "## Evaluation" not in card  # there is nothing to show yet
    assert hub_server.find_faults(card) == []


def test_a_base_model_on_the_hub_is_metadata(tmp_path):
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    model.config._name_or_path = "someone/tiny"
    args, dataset = tiny.make_args(tmp_path), Dataset.from_list(tiny.addition_rows(1))
    trainer = LuffyTrainer(model, tiny.share_of_digits, args, dataset, processing_class=tokenizer)
    trainer.create_model_card()
    assert ModelCard(read_card(trainer)).data.base_model == "someone/tiny"
    assert "[someone/tiny](https://huggingface.co/someone/tiny) trained\nwith LUFFY,\nby" in read_card(trainer)


def test_the_recipe_lists_what_differs_from_the_defaults(model_path, tmp_path):
    trainer = make_trainer(
        model_path,
        tmp_path,
        num_generations=2,
        ratio_clipping="on_policy",
        epsilon_high=0.28,
        demonstration_probability=0.5,
        weight_decay=0.01,
        generation_kwargs={"typical_p": 0.9},
        reward_weights=[2.0],
        hub_token="hf_secret",
        run_name="secret",
        model_init_kwargs={"token": "hf_secret"},
    )
    trainer.create_model_card()
    card = read_card(trainer)
    assert "| clipping of the rollout ratio | on_policy, epsilon 0.2 below and 0.28 above |" in card
    section = card.partition("differs from the defaults of `LuffyConfig`")[2].partition("## Versions")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert sorted(rows) == [
        "| `demonstration_probability` | 0.5 | 1.0 |",
        "| `generation_kwargs` | {'typical_p': 0.9} | None |",
        "| `reward_weights` | [2.0] | None |",
        "| `weight_decay` | 0.01 | 0.0 |",
    ]
    assert "secret" not in card


def test_the_example_is_what_a_run_writes(model_path, tmp_path):
    """`model_card/example.md`: the same sections and settings as the card of a run like it."""
    example = (Path(command.__file__).parent / "example.md").read_text()
    trainer = make_trainer(model_path, tmp_path)
    trainer.train()
    trainer.create_model_card(dataset_name="someone/additions")

    def outline(card):
        names = [line.partition(" |")[0] for line in card.splitlines() if line.startswith("| ")]
        return re.findall("^##? .*$", card, re.MULTILINE)[1:], names

    assert outline(example) == outline(read_card(trainer))
    assert hub_server.find_faults(example) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"objective": "rl_plus"},
            "Their tokens are weighted as in [RL-PLUS]",
        ),
        ({"objective": "srft"}, "The loss is that of [SRFT](https://huggingface.co/papers/2506.19767): it adds"),
        (
            {"objective": "oapl", "num_demonstrations": 0},
            "[OAPL](https://huggingface.co/papers/2602.19362): a",
        ),
        (
            {"replay_ratio": 0.5, "num_demonstrations": 0, "per_device_train_batch_size": 8},
            "In up to 50% of the groups one completion is an earlier success of the model's own, as",
        ),
        (
            {"demonstration_policy": "on_failure", "hint_source": "trace"},
            "Where all completions of a group fail, it is sampled once more with hints in the prompt, as",
        ),
    ],
)
def test_a_card_names_the_method(model_path, tmp_path, options, expected):
    trainer = make_trainer(model_path, tmp_path, **options)
    trainer.create_model_card(dataset_name="someone/additions")
    assert expected in " ".join(read_card(trainer).split())


def test_a_card_without_demonstrations(model_path, tmp_path):
    trainer = make_trainer(
        model_path, tmp_path, num_demonstrations=0, ratio_clipping="on_policy", length_aware_batching=False
    )
    trainer.train()
    trainer.create_model_card(dataset_name=str(tmp_path))
    card = " ".join(read_card(trainer).split())
    assert "GRPO: reinforcement learning from a verifiable reward on groups of 4 completions" in card
    assert "policy shaping" not in card and "curves_demonstrations.png" not in card and "datasets:" not in card
    assert (tmp_path / "curves_on_policy.png").exists() and not (tmp_path / "curves_demonstrations.png").exists()
    assert hub_server.find_faults(read_card(trainer)) == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("1+1=", 'device_map="auto")\nprompt = "What'),
        ([{"role": "user", "content": "1"}], 'device_map="auto")\nprompt = [{"role": "user"'),
        (
            [{"role": "system", "content": "my words"}, {"role": "user", "content": "1"}],
            "# In training a system message came before the user's.\nprompt = [",
        ),
    ],
)
def test_the_example_asks_as_training_did(model_path, tmp_path, prompt, expected):
    trainer = make_trainer(model_path, tmp_path, [{"prompt": prompt, "demonstrations": ["2"]}])
    trainer.create_model_card()
    assert expected in read_card(trainer) and "my words" not in read_card(trainer)
    assert "print(generator(prompt, max_new_tokens=16," in read_card(trainer)


def test_without_matplotlib_the_card_comes_without_curves(model_path, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what Python itself does for a module that is not to be had
    trainer = make_trainer(model_path, tmp_path)
    trainer.train()
    trainer.create_model_card()
    assert "The model card has no curves: matplotlib is not installed (`pip install luffy-trl[eval]`)." in caplog.text
    assert "| policy shaping |" in read_card(trainer) and "png" not in read_card(trainer)
    assert not list(tmp_path.glob("*.png"))


def test_a_card_that_is_being_pushed_is_left_alone_in_training(model_path, tmp_path):
    trainer = make_trainer(model_path, tmp_path)
    trainer.create_model_card()
    before, upload = read_card(trainer), Future()
    trainer.push_in_progress = PushInProgress([upload])
    trainer.is_in_train = True
    trainer.create_model_card(tags="math")
    assert read_card(trainer) == before
    upload.set_result(None)
    trainer.create_model_card()
    assert read_card(trainer) == before.replace("- luffy\n", "- luffy\n- math\n")


def git(folder, *args):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *args], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_the_run(model_path, tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_text("1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(model_path, tmp_path / "out")
    trainer.create_model_card()
    assert "code of the run" not in read_card(trainer)
    git(tmp_path, "init")
    git(tmp_path, "add", "reward.py")
    git(tmp_path, "commit", "-m", "a")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    trainer.create_model_card()
    assert f"- code of the run: commit {commit}\n" in read_card(trainer)
    (tmp_path / "reward.py").write_text("2")
    trainer.create_model_card()
    assert f"- code of the run: commit {commit} with changes that are not committed\n" in read_card(trainer)


# ---------------------------------------------------------------------------------------------- results


def save_and_identify(trainer):
    """Saves the trainer's model; what an evaluation of it stores about the model."""
    trainer.save_model()
    path, tokenizer = trainer.args.output_dir, AutoTokenizer.from_pretrained(trainer.args.output_dir)
    return identify(path, tokenizer, find_eos_token_ids(tokenizer, load_generation_config(path)))


def write_summary(folder, scores, model="mine", identity=None):
    """What `luffy_trl.eval` writes, of two questions with two samples each."""
    sample = {"num_tokens": 3, "finish_reason": "stop"}
    rows = {
        name: [{"samples": [{**sample, "correct": correct} for correct in question]} for question in questions]
        for name, questions in scores.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({model: {**summarize(rows), "model": identity or {}}}))


def test_results_of_the_evaluation(model_path, tmp_path):
    trainer = make_trainer(model_path, tmp_path / "mine")
    scores = {"aime24": [[True, False], [False, False]]}
    write_summary(tmp_path / "mine" / "_evaluation", scores, identity=save_and_identify(trainer))
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    expected = EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type="HuggingFaceH4/aime_2024",
        dataset_name="AIME24",
        dataset_split="train",
        metric_type="accuracy",
        metric_name="avg@2",
        metric_value=0.25,
        metric_args={"num_questions": 2, "num_samples": 2, "interval_95": "0.0 to 0.5"},
        source_name="luffy-trl",
        source_url="https://pypi.org/project/luffy-trl/",
    )
    assert card.data.eval_results == [expected]
    assert "| AIME24 | 2 | avg@2 | 25.0 | 0.0 to 50.0 | 50.0 (k=2) | 3 | 0.0% |" in card.text
    assert hub_server.find_faults(str(card)) == []


def test_results_come_to_a_card_that_was_there(model_path, tmp_path, capsys):
    folder = tmp_path / "mine"
    trainer = make_trainer(model_path, folder)
    trainer.create_model_card(tags="math")
    before, identity = read_card(trainer), save_and_identify(trainer)
    del identity["chat_template"]  # of an evaluation with another template
    for correct, name in ((False, "mine-qwen"), (True, "another")):  # the weights count, and not the name
        scores = {"math500": [[correct, False]], "my_own": [[True, True]]}
        write_summary(tmp_path / "results", scores, name, identity)
        command.main(command.CardArguments(str(folder), str(tmp_path / "results")))
        card = ModelCard.load(folder / "README.md")
        scores = {result.dataset_name: result.metric_value for result in card.data.eval_results}
        assert scores == {"MATH-500": correct / 2, "my_own": 1.0}
        assert f"| MATH-500 | 1 | avg@2 | {50 * correct:.1f} |" in card.text and card.text.count("## Evaluation") == 1
    without = re.sub("<!-- evaluation -->.*<!-- /evaluation -->", "", card.text, flags=re.DOTALL)
    assert without == ModelCard(before).text.replace("<!-- evaluation -->\n<!-- /evaluation -->", "")
    assert card.data.tags == ["generated_from_trainer", "grpo", "luffy", "math", "trl"]
    assert capsys.readouterr().out == 2 * f"The results are in {folder / 'README.md'}.\n"


def test_results_that_are_not_of_these_weights_are_left_out(model_path, tmp_path, caplog):
    folder = tmp_path / "mine"
    trainer = make_trainer(model_path, folder)
    write_summary(folder / "_evaluation", {"math500": [[True]]})
    trainer.create_model_card()
    assert "has no model with a tokenizer, which " in caplog.text
    identity = save_and_identify(trainer)
    write_summary(folder / "_evaluation", {"math500": [[True]]}, "another", {**identity, "weights": "0"})
    trainer.create_model_card()
    assert "has results of another, and none of a model called" in caplog.text
    for stored, what in (
        (None, "weights or configurations"),  # of a version that did not store it
        ({**identity, "tokenizer": "0"}, "tokenizers"),
        ({**identity, "eos_token_ids": [0]}, "end-of-sequence tokens"),
        ({**identity, "chat_template": "0"}, "chat templates"),
    ):
        write_summary(folder / "_evaluation", {"math500": [[True]]}, identity=stored)
        trainer.create_model_card()
        assert f"has results of 'mine', and not of what is in {folder} now: the {what} differ." in caplog.text
    assert "## Evaluation" not in read_card(trainer)

    write_summary(folder / "_evaluation", {"math500": [[True]]}, identity=identity)
    past = time.time() - 100
    os.utime(folder / "_evaluation" / "summary.json", (past, past))
    trainer.train()
    trainer.save_state()
    trainer.create_model_card()
    assert "the model was trained after it was evaluated. Evaluate it again." in caplog.text
    assert "## Evaluation" not in read_card(trainer)
    with pytest.raises(ValueError, match="summary.json is older than .*trainer_state.json"):
        command.main(command.CardArguments(str(folder)))


@pytest.mark.parametrize("adapter", [False, True])
def test_trained_on_into_the_same_folder(tmp_path, caplog, adapter):
    """Train, evaluate, train on, evaluate again: as a user would, with the smallest update that there is."""
    folder = tmp_path / "mine"
    base = tiny.save_tiny_model(tmp_path / "base")
    questions = tmp_path / "sums.jsonl"
    questions.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    peft_config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapter else None
    args = EvaluationArguments(
        model_name_or_path=[str(folder)],
        output_dir=str(folder / "_evaluation"),
        data_files=[str(questions)],
        backend="transformers",
        dtype="float32",
        max_tokens=4,
        num_resamples=10,
    )
    trainer = make_trainer(base, folder, peft_config=peft_config, learning_rate=1e-6)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    summary = evaluate(args)
    assert list(summary) == ["mine"]
    trainer.create_model_card()
    assert "| sums | 1 | pass@1 | 0.0 |" in read_card(trainer)
    trainer.save_model()  # the same weights again, as `push_to_hub` saves them
    assert evaluate(args) == summary

    trainer = make_trainer(base, folder, peft_config=peft_config, learning_rate=1e-6, max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    with pytest.raises(ValueError, match="The weights or configurations of '.*mine' now .* differ"):
        evaluate(args)
    os.utime(folder / "_evaluation" / "summary.json")  # the date says nothing
    trainer.create_model_card()
    assert f"not of what is in {folder} now: the weights or configurations differ. Evaluate it again" in caplog.text
    assert "## Evaluation" not in read_card(trainer)
    with pytest.raises(ValueError, match="the weights or configurations differ"):
        command.main(command.CardArguments(str(folder)))
    args.output_dir = str(tmp_path / "again")
    evaluate(args)
    command.main(command.CardArguments(str(folder), args.output_dir))
    assert "| sums | 1 | pass@1 | 0.0 |" in read_card(trainer)


def test_the_command_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="README.md does not exist. Write it with `trainer.create_model_card"):
        command.main(command.CardArguments(str(tmp_path)))
    (tmp_path / "README.md").write_text("---\ntags: [a]\n---\n# Another's\n")
    with pytest.raises(ValueError, match="_evaluation/summary.json does not exist. Run `python -m luffy_trl.eval`"):
        command.main(command.CardArguments(str(tmp_path)))
    write_summary(tmp_path / "_evaluation", {"math500": [[True]]}, tmp_path.name)
    with pytest.raises(ValueError, match="README.md is not a card of `LuffyTrainer.create_model_card`"):
        command.main(command.CardArguments(str(tmp_path)))
