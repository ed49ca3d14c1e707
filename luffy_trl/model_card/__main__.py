# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Add the results of an evaluation to the card of a model that was trained before:

    python -m luffy_trl.eval --model_name_or_path my_model --output_dir my_model/_evaluation
    python -m luffy_trl.model_card --model_dir my_model
"""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard

from ..arguments import Parser
from ..errors import in_one_line
from .results import EVALUATION_DIR, add_evaluation


@dataclass
class CardArguments:
    """Arguments of `python -m luffy_trl.model_card`."""

    model_dir: str = field(metadata={"help": "Folder of a model with the card that LuffyTrainer has written."})
    evaluation_dir: str | None = field(
        default=None,
        metadata={"help": f"The output_dir of the evaluation. Default: {EVALUATION_DIR} in the model's folder."},
    )


def main(args: CardArguments):
    """Adds the results of an evaluation to the card of a model."""
    folder = Path(args.model_dir)
    evaluation_dir = Path(args.evaluation_dir or folder / EVALUATION_DIR)
    for path, advice in (
        (folder / "README.md", "Write it with `trainer.create_model_card()`."),
        (
            evaluation_dir / "summary.json",
            "Run `python -m luffy_trl.eval`, or give its `output_dir` here.",
        ),
    ):
        if not path.exists():
            raise ValueError(f"{path} does not exist. {advice}")
    card = ModelCard.load(folder / "README.md")
    names = dict.fromkeys([args.model_dir, folder.resolve().name, card.data.model_name])
    add_evaluation(card, folder, evaluation_dir, [name for name in names if name])
    card.save(folder / "README.md")
    print(f"The results are in {folder / 'README.md'}.")


if __name__ == "__main__":
    with in_one_line():
        main(*Parser(CardArguments, prog="python -m luffy_trl.model_card").parse_args_and_config())
