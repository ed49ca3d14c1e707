# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What `test_vllm.py` runs in several processes: `accelerate launch tests/launched_vllm.py OUTPUT_DIR`."""

import json
import os
import signal
import sys
from pathlib import Path

import tiny
import torch
import trl.generation.vllm_generation
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoTokenizer, TrainerCallback
from trl.generation.vllm_client import VLLMClient

from luffy_trl import LuffyTrainer


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "agent"))
import products


FOLDER = Path(sys.argv[1])
SCENARIO = json.loads(sys.argv[2])
generated_tokens = 0  # of the completions that this process got from the server


class CountingClient(VLLMClient):
    """TRL's client of a vLLM server."""

    def generate(self, *args, **kwargs):
        global generated_tokens
        output = super().generate(*args, **kwargs)
        generated_tokens += sum(len(ids) for ids in output["completion_ids"])
        return output


class FileClient(CountingClient):
    """
    One by which weights go through a file: vLLM transfers them by NCCL alone, which a machine without GPUs does not
    have.
    """

    def init_communicator(self, device=0):
        pass

    def update_named_params(self, metadata, named_params):
        folder = FOLDER / "pushed"
        folder.mkdir(exist_ok=True)
        save_file(
            {name: value.detach().clone().contiguous() for name, value in named_params}, folder / "model.safetensors"
        )
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._post(f"{self.base_url}/collective_rpc", json=body)


class KillServer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ.get("RANK", "0") == "0":
            os.killpg(SCENARIO["server_group"], signal.SIGKILL)


def says_six(completions, **kwargs):
    return [0.3 * (messages[-1]["content"] == "6") for messages in completions]


def main():
    options = dict(SCENARIO["options"])
    resume = options.pop("resume", None)
    args = tiny.make_args(
        FOLDER / "out",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=4,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=SCENARIO["server_url"],
        # So that weights that were not pushed would show
        **{"learning_rate": 0.05, **options},
    )
    trl.generation.vllm_generation.VLLMClient = FileClient if args.use_cpu else CountingClient
    rows = tiny.addition_rows(8, lambda i: [] if i % 3 == 2 else [f"A{i}BCDE", f"{i}{i}"])
    if SCENARIO.get("acts"):
        rows = [
            {**row, "prompt": [{"role": "user", "content": f"1{i}*2{i}"}]}
            | {"demonstrations": [products.solve([10 + i, 20 + i])] if row["demonstrations"] else []}
            for i, row in enumerate(rows)
        ]
    trainer = LuffyTrainer(
        str(FOLDER / "model"),
        says_six if SCENARIO.get("acts") else tiny.share_of_digits,
        args,
        Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(FOLDER / "model"),
        tools=[products.multiply] if SCENARIO.get("acts") else None,
        callbacks=[KillServer()] if "server_group" in SCENARIO else None,
    )
    recorded, ratios, generate = [], [], trainer._generate_and_score_completions

    def recording(inputs):
        output = generate(inputs)
        shown = output["demonstration_mask"] & output["completion_mask"].bool()
        lengths = output["completion_mask"].sum(1)
        recorded.append([lengths.tolist(), shown.sum(1).tolist()])
        # A ratio of a sequence is that of its sampled tokens, and the loss leaves it out on the prefix before them
        acted = output.get("tool_mask", output["completion_mask"]).sum(1)
        is_complete = shown.sum(1) == acted
        ratios.append(output["importance_sampling_ratio"][is_complete].flatten().tolist())
        return output

    trainer._generate_and_score_completions = recording
    trainer.train(resume_from_checkpoint=resume)
    result = {"rows": recorded, "ratios": ratios, "tokens": generated_tokens, "log_history": trainer.state.log_history}
    torch.save(result, FOLDER / f"served_{os.environ.get('RANK', 0)}.pt")
    trainer.accelerator.end_training()  # or gloo's threads may abort the process at its end


if __name__ == "__main__":
    main()
