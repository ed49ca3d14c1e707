# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What sources of demonstrations ask of the policy: what it thinks of completions, as it is now."""

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad


class MeasuringTrainer(GRPOTrainer):
    """
    A [`~trl.GRPOTrainer`] that can be asked for log-probs and entropies of any completions.

    - Overrides nothing.
    - Adds `tokenize` and `measure`, of [`~luffy_trl.groups.Policy`].
    - Keeps every number of TRL.
    """

    def tokenize(self, prompts: list) -> list[list[int]]:
        return self._tokenize_prompts(prompts)[0]

    def measure(self, sequences: list[tuple[list[int], list[int]]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All processes call this with the same sequences; each makes an equal share of the forward passes."""
        if not sequences:
            return []
        num_processes, size = self.accelerator.num_processes, self.args.per_device_train_batch_size
        order = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
        # Sharded models make their passes together: the last rows are measured again where the number is uneven
        order += order[-1:] * (-len(order) % (num_processes * size))
        measured = []
        device = self.accelerator.device
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            for start in range(self.accelerator.process_index * size, len(order), num_processes * size):
                numbers = order[start : start + size]
                prompts, completions = (
                    [torch.tensor(sequences[i][side], dtype=torch.long) for i in numbers] for side in (0, 1)
                )
                ids, mask = (
                    torch.cat([pad(left, value, padding_side="left"), pad(right, value)], dim=1).to(device)
                    for left, right, value in (
                        (prompts, completions, self._tokenizer.pad_token_id),
                        ([torch.ones_like(p) for p in prompts], [torch.ones_like(c) for c in completions], 0),
                    )
                )
                length = max(map(len, completions))
                logps, entropies, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, length, compute_entropy=True
                )
                measured += [
                    (i, logps[row, : len(completion)].float().cpu(), entropies[row, : len(completion)].float().cpu())
                    for row, (i, completion) in enumerate(zip(numbers, completions, strict=True))
                ]
        by_number = {i: (logps, entropies) for i, logps, entropies in gather_object(measured)}
        return [by_number[i] for i in range(len(sequences))]
