# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Model cards, written when they are needed, and pushes of checkpoints whose errors are seen."""

from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from trl import GRPOTrainer


logger = get_logger(__name__)

LUFFY_PAPER = {
    "title": "Learning to Reason under Off-Policy Guidance",
    "id": "2504.14945",
    "citation": """\
@article{yan2025learning,
    title        = {{Learning to Reason under Off-Policy Guidance}},
    author       = {Jianhao Yan and Yafu Li and Zican Hu and Zhi Wang and Ganqu Cui and Xiaoye Qu and Yu Cheng and Yue Zhang},
    year         = 2025,
    eprint       = {arXiv:2504.14945},
}""",
}


class CardTrainer(GRPOTrainer):
    """
    A [`~trl.GRPOTrainer`] with the model card of this package.

    - Overrides `create_model_card`, and calls [`~luffy_trl.model_card.save_model_card`].
    - Overrides `_push_from_checkpoint` and `_finish_current_push`: PEFT's own card is not pushed, and a failed push of
      a checkpoint, which runs in the background, is reported.
    """

    _card_details: dict[str, Any] = {}

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ):
        """
        Writes the model card, `README.md` in the output folder: method, data, recipe, curves, results of the
        evaluation, versions and citations. `dataset_name` and `tags` hold for later cards too, such as those of
        checkpoints.

        Args:
            model_name (`str`, *optional*):
                Name of the model.
            dataset_name (`str`, *optional*):
                Name of the dataset used for training. If it is on the Hub, the metadata name it too.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        from ..model_card import save_model_card  # with the results of evaluations, which training does not need

        details = {"dataset_name": dataset_name, "tags": tags}
        self._card_details = {**self._card_details, **{name: value for name, value in details.items() if value}}
        if self.is_world_process_zero():
            save_model_card(self, model_name, **self._card_details)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.is_world_process_zero():
            # PEFT's own card, whose base model the Hub refuses if it is a local folder
            (Path(checkpoint_folder) / "README.md").unlink(missing_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self):
        super()._finish_current_push()
        push = getattr(self, "push_in_progress", None)
        # Checkpoints are pushed in the background, where an error is seen by nobody.
        for job in [] if push is None else push.jobs:
            if error := job.exception():
                logger.warning(
                    f"The push of a checkpoint failed. All files are in {self.args.output_dir}, and "
                    f"`trainer.push_to_hub()` pushes them. The error was: {error}"
                )
        self.push_in_progress = None
