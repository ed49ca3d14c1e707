# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What `test_colocate.py` runs, with an engine in each process: `accelerate launch tests/launched_colocate.py FOLDER`.

`ENGINE=vllm` is vLLM. `ENGINE=stand-in` is the class below, for machines without vLLM; what stands around it is TRL's
own code all the same: the push of weights, the gather over a tensor-parallel group, sleep mode.
"""

import functools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import tiny
import torch
import trl.generation.vllm_generation as boundary
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoModelForCausalLM

import luffy_trl.checks
from luffy_trl import LuffyTrainer


FOLDER = Path(sys.argv[1])
SCENARIO = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
CASES = {
    "uneven": {"num_demonstrations": 1},
    "all_demonstrations": {"num_generations": 12, "num_demonstrations": 6},  # so are the first six rows
    "prefixes": {"num_demonstrations": 2, "prefix_ratio_min": 0.3, "prefix_ratio_max": 0.9},
    "on_failure": {"num_demonstrations": 2, "demonstration_policy": "on_failure", "failure_threshold": 0.4},
    "replay": {"num_demonstrations": 0, "replay_ratio": 0.5, "replay_start_solve_rate": 0.0},
}
CASES["failure_prefixes"] = {**CASES["on_failure"], "prefix_ratio_min": 0.3, "prefix_ratio_max": 0.9}


class StandIn:
    """
    vLLM's `LLM`, as far as TRL uses it. It samples with transformers from the weights that were loaded into it, and
    fails where vLLM would hang or crash: asleep, or with other prompts than the rest of its tensor-parallel group.
    """

    def __init__(self, model, tensor_parallel_size, enable_sleep_mode, seed, **kwargs):
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.eos_token_id = self.model.config.eos_token_id
        self.is_parallel = tensor_parallel_size > 1
        self.awake = {"weights", "kv_cache"}
        self.generator = torch.Generator().manual_seed(seed)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def sleep(self, level):
        self.awake = set()
        for weights in self.model.parameters():  # level 2 gives them up
            weights.data.fill_(torch.nan)

    def wake_up(self, tags):
        self.awake |= set(tags)

    def reset_prefix_cache(self):
        pass

    def load_weights(self, weights):
        assert "weights" in self.awake
        for name, value in weights:
            self.model.get_parameter(name).data.copy_(value)

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        assert self.awake == {"weights", "kv_cache"}
        if self.is_parallel:
            assert all(others == prompts for others in gather_object([prompts]))
        return [self._answer(prompt["prompt_token_ids"], sampling_params.max_tokens) for prompt in prompts]

    def _answer(self, prompt_ids, max_tokens):
        ids, logprobs = [], []
        while len(ids) < max_tokens and ids[-1:] != [self.eos_token_id]:
            logps = self.model(torch.tensor([prompt_ids + ids])).logits[0, -1].log_softmax(-1)
            ids.append(logps.exp().multinomial(1, generator=self.generator).item())
            logprobs.append({ids[-1]: SimpleNamespace(logprob=logps[ids[-1]].item(), rank=1)})
        output = SimpleNamespace(token_ids=ids, logprobs=logprobs)
        return SimpleNamespace(prompt_token_ids=prompt_ids, outputs=[output])


def choose_engine():
    if SCENARIO["engine"] == "stand-in":
        boundary.is_vllm_available = luffy_trl.checks.is_vllm_available = lambda: True
        boundary.SamplingParams = SimpleNamespace
        engine = StandIn
    else:
        if not torch.cuda.is_available():
            # The CPU build packs weights when it loads them, and would not see those that are pushed later
            import vllm._custom_ops

            vllm._custom_ops._supports_onednn = False
        engine = functools.partial(boundary.LLM, dtype="float32", enforce_eager=True)
    engine = functools.cache(engine)  # one for all trainers of this process: it may not be made twice

    def make_engine(seed, **kwargs):
        torch.manual_seed(seed)  # as vLLM does where it is made: the processes of an engine must draw the same
        return engine(seed=seed, **kwargs)

    boundary.LLM = make_engine


def watch(llm):
    """The calls of an engine, in order, and the prompts of each request."""
    calls, requests = [], []
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model

    def wrap(owner, name):
        method = getattr(owner, name)

        @functools.wraps(method)
        def recording(*args, **kwargs):
            call = " ".join([name, *kwargs.get("tags", [])])
            if call != "load_weights" or calls[-1:] != [call]:  # one for each tensor
                calls.append(call)
            if name == "generate":
                requests.append([prompt["prompt_token_ids"] for prompt in args[0]])
            return method(*args, **kwargs)

        setattr(owner, name, recording)
        return owner, name, method

    wrapped = [wrap(llm, name) for name in ("sleep", "wake_up", "reset_prefix_cache", "generate")]
    wrapped.append(wrap(model, "load_weights"))
    return calls, requests, wrapped


@torch.no_grad()
def score(model, prompt_ids, completion_ids):
    """Log-probs of a completion by a model of transformers: one row, no padding."""
    ids = torch.tensor([prompt_ids + completion_ids], device=model.device)
    logps = model(ids).logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(-1)
    return logps.gather(1, ids[0, len(prompt_ids) :, None]).squeeze(1).cpu()


def describe(trainer, old_model, output):
    """
    The rows of a generation batch. Of each: the prompt, the completion, how much of it is shown, the correction's
    ratio, and how far the sampler's log-probs are from those of the policy, of the weights before training, and of the
    policy after another prompt.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    rows = []
    for i in range(len(output["prompt_ids"])):
        prompt_ids = output["prompt_ids"][i][output["prompt_mask"][i].bool()].tolist()
        mask = output["completion_mask"][i].bool()
        completion_ids = output["completion_ids"][i][mask].tolist()
        shown = int(output["demonstration_mask"][i][mask].sum())
        sampled = output["sampling_per_token_logps"][i][mask].cpu()
        differences = {
            "own": score(model, prompt_ids, completion_ids) - sampled,
            "stale": score(old_model, prompt_ids, completion_ids) - sampled,
            "foreign": score(model, [ids + 1 for ids in prompt_ids], completion_ids) - sampled,
        }
        rows.append(
            {
                "prompt": prompt_ids,
                "completion": completion_ids,
                "shown": shown,
                "ratio": output["importance_sampling_ratio"][i].tolist(),
                **{name: values[shown:].abs().tolist() for name, values in differences.items()},
            }
        )
    return rows


def train(case, options):
    args = tiny.make_args(
        FOLDER / "out",
        **{
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 6 // int(os.environ.get("WORLD_SIZE", 1)),  # 12 rows, three groups of 4
            "max_completion_length": 8,
            "max_steps": 2,
            "learning_rate": 0.05,  # so that weights that were not pushed would show
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": 128,
            **CASES[case],
            **options,
        },
    )
    traces = [f"A{'B' * j}{j}" for j in range(6)]
    num_traces = args.num_demonstrations
    trainer = LuffyTrainer(
        str(FOLDER / "model"),
        tiny.is_even if args.replay_ratio else tiny.share_of_digits,
        args,
        Dataset.from_list(
            tiny.addition_rows(9, lambda i: [] if i % 3 == 2 and num_traces < 6 else traces[:num_traces])
        ),
    )
    old_model = AutoModelForCausalLM.from_pretrained(FOLDER / "model").to(trainer.accelerator.device).eval()
    calls, requests, wrapped = watch(trainer.vllm_generation.llm)
    generations, generate = [], trainer._generate_and_score_completions

    def recording(inputs):
        calls.clear()
        requests.clear()
        output = generate(inputs)
        generations.append(
            {"rows": describe(trainer, old_model, output), "calls": list(calls), "requests": list(requests)}
        )
        return output

    trainer._generate_and_score_completions = recording
    trainer.train()
    for owner, name, method in wrapped:
        setattr(owner, name, method)
    logs = [log for log in trainer.state.log_history if "reward" in log]
    return {"generations": generations, "logs": logs}


if __name__ == "__main__":
    choose_engine()
    cases = {case: train(case, SCENARIO["options"]) for case in SCENARIO["cases"]}
    torch.save(cases, FOLDER / f"colocate_{os.environ.get('RANK', 0)}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or its threads may abort the process at its end
