# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Results of this project's evaluation on a model card: as `model-index` metadata, and as tables."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from transformers import AutoTokenizer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..callbacks import EvaluationCallback
from ..demonstrations import find_eos_token_ids, load_generation_config
from ..eval.benchmarks import BENCHMARKS
from ..eval.identity import IDENTITY, base_of, identify
from ..eval.report import to_markdown
from ..eval.templates import TEMPLATES


# Where a card looks for the results of `luffy_trl.eval`. Trainers do not push what begins with an underscore, so the
# questions of benchmarks, some of them gated, stay here.
EVALUATION_DIR = "_evaluation"
_SECTION = re.compile(r"<!-- evaluation -->.*?<!-- /evaluation -->", re.DOTALL)
_SOURCE = {"source_name": "luffy-trl", "source_url": "https://pypi.org/project/luffy-trl/"}


def benchmark_title(name: str) -> str:
    """How tables call a benchmark, which may be one of the user's own."""
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def results_in_training(trainer: GRPOTrainer) -> tuple[list[EvalResult], list[tuple[str, str, str]]]:
    """
    What [`~luffy_trl.callbacks.EvaluationCallback`] has logged: results for the metadata, only those of this very
    update, which are those of the weights; and rows of a table with the first and the last accuracy of each benchmark.
    """
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, EvaluationCallback)]
    is_best = trainer.args.load_best_model_at_end and not trainer.is_in_train
    step = trainer.state.best_global_step if is_best else trainer.state.global_step
    results, rows = [], []
    for callback in callbacks:
        for name in dict.fromkeys(question.benchmark for question in callback.questions):
            log = [record for record in trainer.state.log_history if f"eval/{name}" in record]
            if not log:
                continue
            num_questions = sum(question.benchmark == name for question in callback.questions)
            num_samples = len(callback.requests) // len(callback.questions)
            first, last = (f"{100 * log[i][f'eval/{name}']:.1f} (update {log[i]['step']})" for i in (0, -1))
            rows.append((f"{benchmark_title(name)}, {num_questions} questions", first, last))
            if log[-1]["step"] == step:
                details: dict[str, float] = {"num_questions": num_questions, "num_samples": num_samples}
                details |= {"temperature": callback.sampling.temperature, "top_p": callback.sampling.top_p}
                results.append(_result(name, num_samples, log[-1][f"eval/{name}"], details))
    return results, rows


def add_evaluation(card: ModelCard, folder: Path, evaluation_dir: Path, names: Sequence[str]):
    """
    Puts the results of `luffy_trl.eval` on a card, in place of those that it has of the same benchmarks. An evaluation
    of another model, or older than the weights, is an error. `names` are those that it may call the model by.
    """
    if not _SECTION.search(card.text):
        raise ValueError(f"{folder / 'README.md'} is not a card of `LuffyTrainer.create_model_card`.")
    path = evaluation_dir / "summary.json"
    summary = json.loads(path.read_text())
    label = _find_label(summary, folder, names, path)  # removes what is of other weights
    states = [*folder.glob("trainer_state.json"), *folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")]
    newest = max(states, key=lambda file: file.stat().st_mtime, default=None)
    if newest is not None and newest.stat().st_mtime > path.stat().st_mtime:
        raise ValueError(
            f"{path} is older than {newest}: the model was trained after it was evaluated. Evaluate it again."
        )
    benchmarks = summary[label]["benchmarks"]
    results = {benchmark_title(name): _summarized(name, entry) for name, entry in benchmarks.items()}
    kept = [result for result in card.data.eval_results or [] if result.dataset_name not in results]
    card.data.eval_results = [*results.values(), *kept]
    section = (
        "<!-- evaluation -->\n## Evaluation\n\nBy `python -m luffy_trl.eval`; scores in percent.\n\n"
        f"{to_markdown(summary)}\n<!-- /evaluation -->"
    )
    card.text = _SECTION.sub(lambda _: section, card.text)


def _find_label(summary: dict[str, dict], folder: Path, names: Sequence[str], path: Path) -> str:
    """How a summary calls the model of a folder. What has its name, but not its weights, is removed from it."""
    templates = [f"-{template}" for template in TEMPLATES]
    named = [label for label in summary if any(label in (name, *(name + t for t in templates)) for name in names)]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        eos_token_ids = find_eos_token_ids(tokenizer, load_generation_config(base_of(str(folder))))
        identity = identify(str(folder), tokenizer, eos_token_ids)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no model with a tokenizer, which {path} could be of. Save it there: `trainer.save_model()`."
        ) from error
    differing: dict[str, list[str]] = {}
    for label, entry in summary.items():
        stored = entry.get("model", {})
        counted = [name for name in IDENTITY if name in stored or name != "chat_template"]
        differing[label] = [IDENTITY[name] for name in counted if stored.get(name) != identity[name]]
    for label in named or summary:
        if not differing[label]:
            for other in named:
                if differing[other]:
                    del summary[other]
            return label
    if not named:
        raise ValueError(
            f"{path} has results of {', '.join(summary)}, and none of a model called {' or '.join(names)}. Evaluate "
            "the model from the folder that it was saved in."
        )
    raise ValueError(
        f"{path} has results of {named[0]!r}, and not of what is in {folder} now: the {differing[named[0]][0]} "
        "differ. Evaluate it again, with another `output_dir`."
    )


def _summarized(name: str, entry: dict) -> EvalResult:
    low, high = (round(bound, 4) for bound in entry["interval"])
    details = {"num_questions": entry["num_questions"], "num_samples": entry["num_samples"]}
    details["interval_95"] = f"{low} to {high}"
    return _result(name, entry["num_samples"], entry["score"], details)


def _result(name: str, num_samples: int, score: float, details: dict) -> EvalResult:
    benchmark = BENCHMARKS.get(name)
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=benchmark.dataset if benchmark else name,
        dataset_name=benchmark_title(name),
        dataset_config=benchmark.config if benchmark else None,
        dataset_split=benchmark.split if benchmark else None,
        metric_type="accuracy",
        metric_name="pass@1" if num_samples == 1 else f"avg@{num_samples}",
        metric_value=round(score, 4),
        metric_args=details,
        **_SOURCE,
    )
