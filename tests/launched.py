# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What the tests run in several processes: `accelerate launch tests/launched.py FUNCTION OUTPUT_DIR SCENARIO`, where the
scenario is JSON with the keyword arguments of the function.
"""

import atexit
import itertools
import json
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import cpu_engines
import tiny
import torch
import torch.distributed
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from luffy_trl import LuffyTrainer
from luffy_trl.batching import rebatch


class Recorder(TrainerCallback):
    """The weights before each optimizer step, and the gradients that it used."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})


def count(output_dir):
    """Groups of 4 with 1 and 2 demonstrations; a process holds half a group, or a whole one."""
    results = {}
    for num_demonstrations in (1, 2):
        for rows_per_process in (2, 4):
            trainer = LuffyTrainer(
                str(output_dir / "model"),
                tiny.share_of_digits,
                tiny.make_args(
                    output_dir / "out",
                    num_demonstrations=num_demonstrations,
                    per_device_train_batch_size=2,
                    gradient_accumulation_steps=rows_per_process // 2,
                    max_steps=2,
                ),
                Dataset.from_list(tiny.addition_rows(4, lambda i: ["AB", "CD"])),
            )
            rows = tiny.count_generated_rows(trainer.accelerator.unwrap_model(trainer.model))
            trainer.train()
            results[num_demonstrations, rows_per_process] = rows
    return results


def gradients(output_dir):
    """Two updates for each generation, of eight sequences each, for every loss type and several cuts."""
    cuts = {
        "trl": {"length_aware_batching": False},
        "by length": {},
        "token budget": {"max_tokens_per_microbatch": 60},
        "padding free": {"max_tokens_per_microbatch": 60, "padding_free": True},
    }
    results = {}
    for loss_type, cut in [
        *itertools.product(("dr_grpo", "grpo", "bnpo", "dapo"), ("trl", "by length")),
        ("bnpo", "token budget"),
        ("dapo", "token budget"),
        ("grpo", "padding free"),
    ]:
        recorder = Recorder()
        trainer = LuffyTrainer(
            str(output_dir / "model"),
            tiny.share_of_digits,
            tiny.make_args(
                output_dir / "out",
                loss_type=loss_type,
                **cuts[cut],
                gradient_accumulation_steps=2,
                steps_per_generation=4,
                max_steps=4,
                beta=0.3,
                entropy_coef=0.05,
                max_grad_norm=0.0,
            ),
            Dataset.from_list(tiny.addition_rows(16)),
            callbacks=[recorder],
        )
        micro_batches = tiny.record_micro_batches(trainer)
        trainer.train()
        results[loss_type, cut] = {
            "weights": recorder.weights,
            "gradients": recorder.gradients,
            "micro_batches": micro_batches,
            "log_history": trainer.state.log_history,
        }
    return results


def metrics(output_dir):
    """Two rows for each process: one process holds the two demonstrations of a group, the other its two rollouts."""
    trainer = LuffyTrainer(
        str(output_dir / "model"),
        tiny.is_demonstration_text,
        tiny.make_args(
            output_dir / "out",
            num_demonstrations=2,
            per_device_train_batch_size=2,
            max_steps=2,
            beta=0.1,
            entropy_coef=0.01,
            log_completions=True,
        ),
        Dataset.from_list(tiny.addition_rows(8, lambda i: [f"<think>\n{i} and 1</think>A{j}" for j in (1, 2)])),
    )
    trainer.train()
    return {"log_history": trainer.state.log_history}


def on_failure(output_dir):
    """Two rows for each process and one group for each step, of which one fails and the other does not."""
    scored = []

    def reward(completions, answer, **kwargs):
        scored.append(len(completions))
        is_demonstration = tiny.is_demonstration_text(completions)
        return [1.0 if shown else float(a == "2") for a, shown in zip(answer, is_demonstration, strict=True)]

    trainer = LuffyTrainer(
        str(output_dir / "model"),
        reward,
        tiny.make_args(
            output_dir / "out",
            num_demonstrations=2,
            demonstration_policy="on_failure",
            per_device_train_batch_size=2,
            max_steps=2,
        ),
        Dataset.from_list(tiny.addition_rows(2, lambda i: [f"<think>\n{i} and 1</think>A{j}" for j in (1, 2)])),
    )
    generated = tiny.count_generated_rows(trainer.accelerator.unwrap_model(trainer.model))
    batches = tiny.record_batches(trainer)
    trainer.train()
    advantages = [output["advantages"].tolist() for _, output in batches]
    records = [
        {key: value for key, value in log.items() if "time" not in key and "per_second" not in key}
        for log in trainer.state.log_history
    ]
    return {"scored": scored, "generated": generated, "advantages": advantages, "log_history": records}


class KillAt(TrainerCallback):
    """Ends the process as a power cut would, in the middle of an update."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(output_dir, kind, max_steps=10, kill_at=None, resume=None):
    """Updates with several traces for each row."""
    kinds = {
        "prefixes": {
            "prefix_ratio_min": 0.2,
            "prefix_ratio_max": 0.9,
            "prefix_schedule": "cosine",
            "prefix_schedule_steps": 9,
            "demonstration_probability": 0.8,
        },
        "on_failure": {"demonstration_policy": "on_failure", "failure_threshold": 0.5},
        "replay": {"num_demonstrations": 1, "replay_ratio": 0.5, "replay_start_solve_rate": 0.0},
    }
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    trainer = LuffyTrainer(
        str(output_dir / "model"),
        tiny.is_even if kind == "replay" else tiny.share_of_digits,
        tiny.make_args(
            output_dir / "out",
            per_device_train_batch_size=4 // num_processes,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            max_steps=max_steps,
            save_strategy="steps",
            save_steps=5,
            adam_beta2=0.9,
            **{"num_demonstrations": 2, **kinds[kind]},
        ),
        # Two generation batches of four rows make an epoch, so it has four updates; two rows are left over
        Dataset.from_list(tiny.addition_rows(10, lambda i: [f"A{i}{j}" for j in range(4)])),
        callbacks=[KillAt(kill_at)] if kill_at else None,
    )
    trainer.train(resume_from_checkpoint=resume)


def ended(output_dir, fails=False):
    """What is left of the process group when Python ends, after training, or after an error behind it."""
    file = output_dir / f"left_{os.environ['RANK']}"
    # Handlers are called in reverse order: this one after those of the trainer
    atexit.register(lambda: file.write_text(str(torch.distributed.is_initialized())))
    args = tiny.make_args(output_dir / "out")
    rows = Dataset.from_list(tiny.addition_rows(2))
    LuffyTrainer(str(output_dir / "model"), tiny.share_of_digits, args, rows).train()
    if fails:
        raise RuntimeError("after training")


def streams(output_dir):
    """Groups of four rows, six rows for each process: the prompts of each generation batch, row by row."""
    results = {}
    for num_shards in (1, 4):
        trainer = LuffyTrainer(
            str(output_dir / "model"),
            tiny.is_demonstration_text,
            tiny.make_args(
                output_dir / "out", per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=3
            ),
            Dataset.from_list(tiny.addition_rows(24)).to_iterable_dataset(num_shards=num_shards),
        )
        batches = tiny.record_batches(trainer)
        trainer.train()
        seen = [[row["prompt"] for row in batch.rows] for batch, _ in batches]
        rewards = [log["demonstrations/reward"] for log in trainer.state.log_history if "reward" in log]
        results[num_shards] = {"prompts": seen, "rewards": rewards}
    return results


def canned(output_dir, per_device, lora=False, **options):
    """
    Three updates on two groups each, with rollouts that depend on prompt and slot alone, so that nothing is sampled.

    `per_device` says how many rows a process holds in a micro-batch.
    """
    peft_config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4) if lora else None
    args = tiny.make_args(
        output_dir / "out",
        **{
            "per_device_train_batch_size": per_device,
            "gradient_accumulation_steps": 2,
            "num_demonstrations": 2,
            "max_steps": 3,
            **options,
        },
    )
    torch.manual_seed(0)  # LoRA's weights
    rows = tiny.addition_rows(6, lambda i: [f"A{i}", f"B{i}{i}C"][: 1 + i % 2])
    trainer = LuffyTrainer(
        str(output_dir / "model"),
        tiny.is_even if args.replay_ratio or args.hint_source != "none" else tiny.share_of_digits,
        args,
        Dataset.from_list([{**row, "hints": ["a", "b"]} for row in rows]),
        peft_config=peft_config,
    )
    generated, batches = [], tiny.record_batches(trainer)

    def answer(prompt_ids, completion_ids, logps, sampled):
        generated.append(len(sampled))
        for i in sampled:
            slot = (trainer.accelerator.process_index * len(prompt_ids) + i) % args.num_generations
            rng = random.Random(f"{prompt_ids[i]}-{slot}")
            completion_ids[i] += [rng.randrange(6, 90) for _ in range(rng.randrange(2, 15))]

    def answer_all(prompt_ids, *args):
        completion_ids = [[] for _ in prompt_ids]
        answer(prompt_ids, completion_ids, None, range(len(prompt_ids)))
        return completion_ids, None

    trainer.continue_completions = answer
    if args.demonstration_policy == "on_failure":  # all rollouts come first
        trainer._generate_single_turn = answer_all
    micro_batches = tiny.record_micro_batches(trainer)
    trainer.train()
    trainer.save_model(str(output_dir / "saved"))
    plugin = trainer.accelerator.state.deepspeed_plugin
    return {
        "generated": generated,
        "sources": [batch.sources for batch, _ in batches],
        "passes": [sum(batch["step"] == step for batch in micro_batches) for step in range(3)],
        "engine": f"zero{plugin.zero_stage}" if plugin else "fsdp" if trainer.is_fsdp_enabled else "ddp",
        "log_history": trainer.state.log_history,
    }


def rebatched(output_dir):
    """
    Made-up micro-batches, cut again in several ways: what a process had and has, and the bytes it got from others.

    Padding is junk, and processes have different widths.
    """
    accelerator = Accelerator(cpu=True)
    received, gather, all_to_all = [], accelerator.gather, torch.distributed.all_to_all_single

    def counting_gather(tensor):
        received.append(tensor.numel() * tensor.element_size() * (accelerator.num_processes - 1))
        return gather(tensor)

    def counting_all_to_all(output, values, output_sizes, input_sizes):
        num_own = output_sizes[accelerator.process_index]
        received.append((output.numel() - num_own) * output.element_size())
        return all_to_all(output, values, output_sizes, input_sizes)

    results = []
    for seed, options in enumerate(
        [
            {},
            {"pad_to_multiple_of": 8},
            {"max_tokens": 150},
            {"max_tokens": 150, "pad_to_multiple_of": 8},
            {"max_tokens": 200, "padding_free": True},
            {"max_tokens": 1},
        ]
    ):
        generator = torch.Generator().manual_seed(100 * seed + accelerator.process_index)
        draw = partial(torch.randint, generator=generator)
        prompt_width, width, is_per_token = 5 + accelerator.process_index, 40 - accelerator.process_index, seed % 2
        prompt_lengths, lengths = draw(1, 6, (12, 1)), draw(1, 31, (12, 1))
        lengths[draw(0, 12, (1,))] = 0  # a truncated completion that is masked out
        before = {
            "prompt_ids": draw(0, 10**6, (12, prompt_width)),
            "prompt_mask": (torch.arange(prompt_width).flip(0) < prompt_lengths).long(),
            "completion_ids": draw(0, 10**6, (12, width)),
            "completion_mask": (torch.arange(width) < lengths).long(),
            "advantages": draw(0, 10**6, (12, width) if is_per_token else (12,)) / 7,
            "old_per_token_logps": draw(0, 10**6, (12, width)) / 7,
            "importance_sampling_ratio": draw(0, 10**6, (12, width if is_per_token else 1)) / 7,
            "ref_per_token_logps": (draw(0, 10**6, (12, width)) / 7).bfloat16(),
            "behavior_logps": (draw(0, 10**6, (12, width)) / 7).double(),
            "demonstration_mask": draw(0, 2, (12, width)).bool(),
            "number": 2**40 + 12 * accelerator.process_index + torch.arange(12),  # no int32
            "pair": draw(0, 10**6, (12, 2)),
        }
        shared = {"num_items_in_batch": torch.tensor(18), "sampling_per_token_logps": None}
        batches = [{**{key: value[i : i + 4] for key, value in before.items()}, **shared} for i in (0, 4, 8)]
        received.clear()
        with (
            patch.object(accelerator, "gather", counting_gather),
            patch.object(torch.distributed, "all_to_all_single", counting_all_to_all),
        ):
            after = rebatch(batches, accelerator, **options)
        results.append({"options": options, "before": before, "after": after, "received": sum(received)})
    accelerator.end_training()
    return results


def acts(output_dir, config="always"):
    """Groups of 4, half of each on a process; only the rollouts of the second process call tools, and two times."""
    from test_acting import CALL, ROWS, make_trainer, play

    rank = int(os.environ["RANK"])
    trainer = make_trainer(output_dir / "out", ROWS, per_device_train_batch_size=2)
    trainer.model.generation_config.max_new_tokens = 2
    if rank == 0:
        turns = [["no"], *[["spare"]] * 2]
    else:
        turns = [[CALL, CALL], [CALL, "24"], ["It is 24."]]
    asked = play(trainer, *turns)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    return {"asked": [len(rows) for rows in asked], "log": log}


def sees(output_dir, make="make_qwen", **options):
    """Prompts with one image or two, of several sizes."""
    import tiny_vision
    from test_vision import make_trainer, rows_with

    rows = rows_with()
    rewards = tiny.share_of_digits
    trainer = make_trainer(output_dir / "out", getattr(tiny_vision, make), rows, rewards=rewards, **options)
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]


def several(output_dir, scenarios):
    """Other functions, one after the other: what starting the processes costs is paid once."""
    return {name: globals()[function](output_dir / name, **kwargs) for name, (function, kwargs) in scenarios.items()}


if __name__ == "__main__":
    if "PRETEND" in os.environ:
        cpu_engines.pretend()
    name, folder, scenario = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.save(globals()[name](folder, **scenario), folder / f"{name}_{os.environ.get('RANK', 0)}.pt")
