# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
The methods of the comparison, and one run of one of them: train, evaluate on the way, write down everything.

All methods start from the same warm model, see the same 256 problems with one trace each, and make updates of 128
sequences: 16 problems x 8 completions, or 128 traces for supervised fine-tuning. `METHODS` has what is different.
"""

import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Qwen2Tokenizer,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.demonstrations import find_eos_token_ids, to_supervised, tokenize_demonstrations


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))
import prepare
import sorting
import task as chains


ON_POLICY = {"num_demonstrations": 0, "ratio_clipping": "on_policy"}
SFT_LOSS = {"demonstration_loss": "sft", "advantage_baseline": "on_policy"}
REPLAY = {"replay_ratio": 0.5}
METHODS = {
    "on_policy": ("on-policy GRPO", ON_POLICY),
    "on_policy_entropy": ("on-policy GRPO, entropy bonus", {**ON_POLICY, "entropy_coef": 0.001}),
    "no_shaping": ("mixed, no shaping", {"policy_shaping": "none"}),
    "luffy": ("LUFFY", {}),
    "on_failure": ("LUFFY on failure", {"demonstration_policy": "on_failure"}),
    "rl_with_sft_loss": ("RL with SFT loss", SFT_LOSS),
    # mu from 0.9 to 0.05 over half of the updates, and mu = 0.1 with the token weight phi: the paper's two variants
    "chord_mu": (
        "CHORD-mu",
        {
            **SFT_LOSS,
            "sft_loss_combination": "interpolate",
            "sft_loss_coef": 0.9,
            "sft_loss_coef_min": 0.05,
            "sft_loss_coef_decay_steps": 40,
        },
    ),
    "chord_phi": (
        "CHORD-phi",
        {**SFT_LOSS, "sft_loss_combination": "interpolate", "sft_loss_coef": 0.1, "sft_token_weight": "chord"},
    ),
    "exgrpo": ("ExGRPO", {"num_demonstrations": 0, "ratio_clipping": "until_mixed", **REPLAY}),
    # Traces for half of the updates, and replays as soon as rollouts succeed
    "luffy_then_exgrpo": ("LUFFY, then ExGRPO", {"demonstration_max_steps": 40, **REPLAY}),
    "hpt": (
        "HPT",
        {
            **SFT_LOSS,
            "demonstration_policy": "on_failure",
            "failed_rollouts": "drop",
            "sft_loss_reduction": "loss_type",
        },
    ),
    "srft": ("SRFT", {"objective": "srft", "loss_type": "dapo"}),
    "rl_plus": ("RL-PLUS", {"objective": "rl_plus"}),
    "prefix_rft": (
        "Prefix-RFT",
        {
            "policy_shaping": "none",
            "prefix_ratio_min": 0.05,
            "prefix_ratio_max": 0.95,
            "prefix_schedule": "random_cosine",
            "prefix_schedule_steps": 80,
            "demonstration_entropy_share": 0.2,
        },
    ),
    # The prompt goes on with the beginning of the trace. Where no hint helps, the trace itself is shown
    "hints": (
        "hints, then LUFFY",
        {"demonstration_policy": "on_failure", "hint_source": "trace", "hint_template": "{prompt}{hint}"},
    ),
    "oapl": ("OAPL", {"num_demonstrations": 0, "objective": "oapl", "steps_per_generation": 10}),
    "sft": ("SFT", None),
    "sft_then_rl": ("SFT, then RL", None),
}
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
NUM_UPDATES = 80
EVAL_STEPS = 10
SEQUENCES_PER_UPDATE = 128
# Bins of the probability of a demonstration token, for the gradient weight that tokens of a bin get
PROBABILITY_BINS = [0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]


@dataclass(frozen=True)
class Task:
    """
    A task of the comparison.

    Args:
        make_splits (`Callable[[int], DatasetDict]`): Makes the splits of a seed.
        warm_up_config (`type`): Settings of the warm-up; `seed` is an argument of it.
        sample_document (`Callable`): Draws a document of the warm-up.
        max_completion_length (`int`): Maximum number of tokens of a completion, in training and evaluation.
        out_of_distribution (`tuple[str, str]`): Names of the two splits that no trace resembles.
    """

    make_splits: object
    warm_up_config: type
    sample_document: object
    max_completion_length: int
    out_of_distribution: tuple[str, str]


TASKS = {
    "chains": Task(
        chains.make_splits, prepare.WarmUpConfig, prepare.sample_document, 56, ("longer", "unseen_operator")
    ),
    "sorting": Task(sorting.make_splits, sorting.WarmUpConfig, sorting.sample_document, 72, ("longer", "repeated")),
}


def warm_model(name: str, seed: int, folder: Path, **settings) -> Path:
    """Trains the warm model of a task and a seed, unless `folder` holds it; where the model is."""
    task = TASKS[name]
    config = task.warm_up_config(seed=seed, **settings)
    fingerprint = json.dumps(asdict(config), indent=2)
    for where in (folder, prepare.CHECKPOINT):
        finished = where / "warm_up.json"
        if finished.exists() and finished.read_text() == fingerprint:
            return where / "model"
    set_seed(seed)
    tokenizer = chains.build_tokenizer()
    model = prepare.build_model(tokenizer)
    splits = task.make_splits(seed)
    hard_prompts = {prompt for split in splits if split != "easy" for prompt in splits[split]["prompt"]}
    prepare.warm_up(model, tokenizer, config, hard_prompts, task.sample_document)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "warm_up.json").write_text(fingerprint)
    return folder / "model"


def reward(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """1.0 for a completion that closes its thought and boxes the answer, and nothing else."""
    return [float(chains.is_correct(text, gold)) for text, gold in zip(completions, answer, strict=True)]


class Recorder(TrainerCallback):
    """Evaluates the model every few updates, on all splits, without touching the random numbers of training."""

    def __init__(self, splits: DatasetDict, tokenizer: Qwen2Tokenizer, max_new_tokens: int):
        self.splits, self.tokenizer, self.max_new_tokens = splits, tokenizer, max_new_tokens
        self.records, self.num_tokens, self.first_step, self.started = [], 0, 0, time.perf_counter()
        self.weights = torch.zeros(2, len(PROBABILITY_BINS) - 1)  # number of tokens, and sum of their weights

    def add_tokens(self, num_tokens: torch.Tensor):
        self.num_tokens += int(num_tokens)

    def add_weights(self, probs: torch.Tensor, weights: torch.Tensor):
        """Adds demonstration tokens, by probability, and how much the loss changes with their log-probability."""
        bins = torch.bucketize(probs, torch.tensor(PROBABILITY_BINS[1:-1]))
        self.weights[0].index_add_(0, bins, torch.ones_like(probs))
        self.weights[1].index_add_(0, bins, weights)

    def on_train_begin(self, args, state, control, model, **kwargs):
        if not self.records:
            self.evaluate(model, 0)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % EVAL_STEPS == 0:
            self.evaluate(model, self.first_step + state.global_step)

    def evaluate(self, model: PreTrainedModel, step: int):
        started = time.perf_counter()
        record = {"step": step, "trained_tokens": self.num_tokens, "seconds": started - self.started}
        was_training = model.training
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(step)
            for name, split in self.splits.items():
                if name == "train":
                    record["demonstration_prob"] = self.demonstration_prob(model, split.select(range(64)))
                else:
                    record[name], length, entropy = self.sample(model, split)
                    if name == "held_out":
                        record["length"], record["entropy"] = length, entropy
        model.train(was_training)
        self.records.append(record)
        self.started += time.perf_counter() - started  # the time of evaluation is not the method's

    def sample(self, model: PreTrainedModel, split: Dataset) -> tuple[float, float, float]:
        """Accuracy, mean length and mean entropy of one sample for each problem at temperature 1."""
        inputs = self.tokenizer(list(split["prompt"]), padding=True, return_tensors="pt")
        ids = model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
        num_prompt_tokens = inputs["input_ids"].size(1)
        completion_ids = ids[:, num_prompt_tokens:]
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        accuracy = sum(reward(texts, split["answer"])) / len(texts)
        mask = completion_ids != self.tokenizer.pad_token_id
        attention_mask = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=attention_mask, position_ids=position_ids).logits
        logps = logits[:, num_prompt_tokens - 1 : -1].log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)[mask].mean().item()
        return accuracy, mask.sum(1).float().mean().item(), entropy

    def demonstration_prob(self, model: PreTrainedModel, split: Dataset) -> float:
        """Mean probability of the tokens of traces of the training data."""
        probs = []
        for prompt, (trace,) in zip(split["prompt"], split["demonstrations"], strict=True):
            prompt_ids = self.tokenizer(prompt)["input_ids"]
            ids = torch.tensor([*prompt_ids, *self.tokenizer(trace)["input_ids"], self.tokenizer.eos_token_id])
            logits = model(ids[None]).logits[0, len(prompt_ids) - 1 : -1]
            probs.append(logits.softmax(-1).gather(-1, ids[len(prompt_ids) :, None]).squeeze(-1))
        return torch.cat(probs).mean().item()


class RecordedLuffyTrainer(LuffyTrainer):
    """Counts the tokens that are trained on, and measures what weight demonstration tokens have in the gradient."""

    recorder: Recorder

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if result[0].requires_grad:
            result[0].retain_grad()
            self._logps = result[0]
        return result

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        batch = self._buffered_inputs[(self._step - 1) % self.args.steps_per_generation]  # all of an update
        self.recorder.add_tokens(batch["completion_mask"].sum())
        shown = batch["demonstration_mask"] & batch["completion_mask"].bool()
        self.recorder.add_weights(self._logps.detach()[shown].exp(), self._logps.grad[shown].abs())
        return loss


class RecordedSFTTrainer(SFTTrainer):
    """The same for supervised fine-tuning, where every token has the weight of one in the mean."""

    recorder: Recorder

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        shown = labels != -100
        self.recorder.add_tokens(shown.sum())
        logps = outputs.logits.detach()[:, :-1].float().log_softmax(-1)
        probs = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)[shown].exp()
        self.recorder.add_weights(probs, torch.full_like(probs, 1 / len(probs)))
        return (loss, outputs) if return_outputs else loss


def spoil(split: Dataset, quality: str, seed: int) -> Dataset:
    """
    Makes the traces of a training split worse, or fewer.

    Args:
        split ([`~datasets.Dataset`]): Rows with `prompt`, `answer` and `demonstrations`.
        quality (`str`):
            `"good"` changes nothing. `"wrong_half"` boxes a wrong answer in half of the traces. `"skipping"` leaves
            out every second line of the thought. `"few"` leaves traces to 16 problems of 256, and `"few_problems"`
            leaves 16 problems.
        seed (`int`): Seed of the choice.

    Returns:
        [`~datasets.Dataset`]: The split.
    """
    rng = random.Random(seed)
    rows = split.to_list()
    if quality == "few_problems":
        return Dataset.from_list(rows[:16])
    for number, row in enumerate(rows):
        (trace,) = row["demonstrations"]
        thought, _, boxed = trace.removeprefix("<think>").partition("</think>")
        if quality == "wrong_half" and number % 2:
            digits = row["answer"]
            row["demonstrations"] = [trace.replace(f"{{{digits}}}", f"{{{shift(digits, rng)}}}")]
        elif quality == "skipping":
            lines = thought.split(";")
            row["demonstrations"] = [f"<think>{';'.join(lines[1::2])}</think>{boxed}"]
        elif quality == "few" and number >= 16:
            row["demonstrations"] = []
        elif quality not in ("good", "wrong_half", "few"):
            raise ValueError(f"Unknown quality {quality!r} of traces.")
    return Dataset.from_list(rows)


def shift(digits: str, rng: random.Random) -> str:
    """Other digits of the same number."""
    return "".join(str((int(digit) + rng.randint(1, 9)) % 10) for digit in digits)


def run(task_name: str, method: str, learning_rate: float, seed: int, model_path: Path, quality: str = "good") -> dict:
    """
    Trains a model with a method, and evaluates it on the way.

    Args:
        task_name (`str`): Name of the task.
        method (`str`): Name of the method.
        learning_rate (`float`): Learning rate, constant.
        seed (`int`): Seed of the data, and of training.
        model_path (`Path`): The warm model.
        quality (`str`, *optional*, defaults to `"good"`): What `spoil` does to the traces.

    Returns:
        `dict`: `records`, one for each evaluation, and `weights`, tokens and their gradient weight by probability.
    """
    torch.set_num_threads(1)
    set_seed(seed)
    task = TASKS[task_name]
    splits = task.make_splits(seed)
    train_split = spoil(splits["train"], quality, seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    recorder = Recorder(splits, tokenizer, task.max_completion_length)
    output = tempfile.TemporaryDirectory()  # of its own, as runs keep others out of theirs
    shared = {
        "per_device_train_batch_size": SEQUENCES_PER_UPDATE,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.99,
        "max_grad_norm": 1.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "seed": seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": output.name,
    }

    def fine_tune(num_updates):
        rows = train_split.filter(lambda row: row["demonstrations"])
        rows = tokenize_demonstrations(
            rows,
            tokenizer,
            find_eos_token_ids(tokenizer, model.generation_config),
            max_length=task.max_completion_length,
        )
        args = SFTConfig(max_steps=num_updates, max_length=None, dataloader_drop_last=False, **shared)
        rows = to_supervised(rows, tokenizer)
        # Every update holds as many sequences as those of the other methods, also where there are few traces
        rows = rows.select([i % len(rows) for i in range(max(len(rows), SEQUENCES_PER_UPDATE))])
        return RecordedSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

    def reinforce(num_updates, options):
        args = LuffyConfig(
            max_steps=num_updates,
            num_generations=8,
            max_completion_length=task.max_completion_length,
            **options,
            **shared,
        )
        return RecordedLuffyTrainer(model, reward, args, train_split, processing_class=tokenizer)

    def train(trainer):
        trainer.recorder = recorder
        trainer.add_callback(recorder)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        recorder.first_step += trainer.state.global_step

    with output:
        if method == "sft":
            train(fine_tune(NUM_UPDATES))
        elif method == "sft_then_rl":
            train(fine_tune(NUM_UPDATES // 2))
            train(reinforce(NUM_UPDATES // 2, ON_POLICY))
        else:
            train(reinforce(NUM_UPDATES, METHODS[method][1]))
    return {"records": recorder.records, "weights": recorder.weights.tolist()}
