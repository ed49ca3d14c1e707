# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from transformers import is_wandb_available
from trl.trainer.utils import get_comet_experiment_url, get_config_model_id, get_trackio_space_url


if TYPE_CHECKING:
    from ..luffy_trainer import LuffyTrainer

_LIBRARIES = ("luffy-trl", "trl", "transformers", "torch", "datasets", "tokenizers")


def save_model_card(
    trainer: "LuffyTrainer", model_name: str | None, dataset_name: str | None, tags: str | list[str] | None
):
    """
    Fills in `template.md` with what a trainer knows, and writes it to `README.md` in its output folder.

    Args:
        trainer ([`LuffyTrainer`]):
            The trainer.
        model_name (`str`, *optional*):
            Name of the model; the output folder's name if not given.
        dataset_name (`str`, *optional*):
            Name of the dataset on the Hub.
        tags (`str` or `list[str]`, *optional*):
            Further tags.
    """
    args = trainer.args
    base_model = get_config_model_id(trainer.model.config)
    if not base_model or os.path.isdir(base_model):
        base_model = None  # a local folder, which says nothing to others
    model_name = model_name or Path(args.output_dir).name
    tags = [tags] if isinstance(tags, str) else tags or []
    card = ModelCard.from_template(
        ModelCardData(
            base_model=base_model,
            datasets=dataset_name,
            library_name="transformers",
            model_name=model_name,
            tags=sorted({"generated_from_trainer", *trainer._tag_names, *tags}),
        ),
        template_path=str(Path(__file__).with_name("template.md")),
        base_model=base_model,
        model_name=model_name,
        model_path=trainer.hub_model_id or args.hub_model_id or model_name,
        dataset_name=dataset_name,
        args=args,
        reward_functions=", ".join(f"`{name}`" for name in trainer.reward_func_names),
        num_prompts=args.generation_batch_size // args.num_generations,
        sequences_per_update=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        global_step=trainer.state.global_step,
        wandb_url=_wandb_url(),
        trackio_url=get_trackio_space_url(),
        comet_url=get_comet_experiment_url(),
        paper=trainer._paper,
        versions={name: version(name) for name in _LIBRARIES},
    )
    card.save(os.path.join(args.output_dir, "README.md"))


def _wandb_url() -> str | None:
    if not is_wandb_available():
        return None
    import wandb  # an optional dependency

    return wandb.run.url if wandb.run is not None else None
