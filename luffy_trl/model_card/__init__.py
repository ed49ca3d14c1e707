# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The model card; `python -m luffy_trl.model_card --help` adds the results of an evaluation to one."""

import importlib.util
import os
from pathlib import Path

from accelerate.logging import get_logger
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import is_wandb_available
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import get_comet_experiment_url, get_config_model_id, get_trackio_space_url

from .curves import draw_curves
from .provenance import commit_of_run, library_versions
from .recipe import changed_settings, describe_adapter, describe_precision
from .results import EVALUATION_DIR, add_evaluation, benchmark_title, results_in_training


__all__ = ["EVALUATION_DIR", "add_evaluation", "save_model_card"]

logger = get_logger(__name__)


def save_model_card(
    trainer: GRPOTrainer,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
):
    """
    Fills in `template.md` with what a trainer knows, and writes it to `README.md` in its output folder, with the
    curves beside it. In training, a card that is being pushed is left as it is.
    """
    push = getattr(trainer, "push_in_progress", None)
    if trainer.is_in_train and push is not None and not push.is_done():
        return
    args, folder = trainer.args, Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    base_model = get_config_model_id(trainer.model.config)
    base_model = base_model if _is_on_hub(base_model) else None  # a local folder says nothing to others
    model_name = model_name or folder.name
    model_path = trainer.hub_model_id or args.hub_model_id or model_name
    adapter = describe_adapter(trainer.model)
    tags = [tags] if isinstance(tags, str) else tags or []
    results, in_training = results_in_training(trainer)
    card = ModelCard.from_template(
        ModelCardData(
            base_model=base_model,
            datasets=[dataset_name] if _is_on_hub(dataset_name) else None,
            eval_results=results or None,
            library_name="peft" if adapter else "transformers",
            model_name=model_name,
            pipeline_tag="text-generation",
            tags=sorted({"generated_from_trainer", *(["lora"] if adapter else []), *trainer._tag_names, *tags}),
        ),
        template_path=str(Path(__file__).with_name("template.md")),
        base_model=base_model,
        model_name=model_name,
        model_path=model_path,
        dataset_name=dataset_name,
        dataset_is_on_hub=_is_on_hub(dataset_name),
        num_rows=len(trainer.train_dataset) if isinstance(trainer.train_dataset, Dataset) else None,
        first_message=_first_message(trainer),
        args=args,
        state=trainer.state,
        adapter=adapter,
        precision=describe_precision(trainer),
        changed_settings=changed_settings(args),
        reward_functions=", ".join(f"`{name}`" for name in trainer.reward_func_names),
        num_prompts=args.generation_batch_size // args.num_generations,
        sequences_per_update=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        pictures=_draw(trainer, folder),
        in_training=in_training,
        wandb_url=_wandb_url(),
        trackio_url=get_trackio_space_url(),
        comet_url=get_comet_experiment_url(),
        paper=trainer._paper,
        versions=library_versions(("peft",) if adapter else ()),
        commit=commit_of_run(),
    )
    # In training, results in the folder can only be those of an earlier run.
    if not trainer.is_in_train and (folder / EVALUATION_DIR / "summary.json").exists():
        names = dict.fromkeys(name for path in (str(folder), model_path) for name in (path, Path(path).name))
        try:
            add_evaluation(card, folder, folder / EVALUATION_DIR, list(names))
        except ValueError as error:  # not worth a trained model
            logger.warning(f"The model card has no results of the evaluation: {error}")
    card.save(folder / "README.md")


def _is_on_hub(name: str | None) -> bool:
    """Whether this may be a model or a dataset on the Hub, as metadata have to name it."""
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _first_message(trainer: GRPOTrainer) -> str | None:
    """The role of the first message of training prompts; `None` if prompts are text."""
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset) or len(dataset) == 0:  # nothing is fetched for this
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        return "user" if tokenizer.chat_template else None
    row = {"prompt": dataset[0]["prompt"]}
    return row["prompt"][0]["role"] if is_conversational(row) else None


def _draw(trainer: GRPOTrainer, folder: Path) -> dict[str, str]:
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning_once(
            "The model card has no curves: matplotlib is not installed (`pip install luffy-trl[eval]`)."
        )
        return {}
    history = trainer.state.log_history
    keys = dict.fromkeys(key for record in history for key in record if key.startswith("eval/"))
    return draw_curves(history, folder, {key: benchmark_title(key.removeprefix("eval/")) for key in keys})


def _wandb_url() -> str | None:
    if not is_wandb_available():
        return None
    import wandb  # an optional dependency

    return wandb.run.url if wandb.run is not None else None
