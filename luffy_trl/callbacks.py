# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import random
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.distributed.fsdp import FullyShardedDataParallel
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from trl.models.utils import unwrap_model_for_generation

from .demonstrations import find_eos_token_ids
from .eval.backends import Request, Sampling, generate_batch, sample_seed
from .eval.benchmarks import grade, load_questions
from .eval.templates import render_question


class EvaluationCallback(TrainerCallback):
    r"""
    Evaluates the model on benchmarks in the middle of training, and logs `eval/<benchmark>`, the mean accuracy over
    questions and samples.

    It generates with transformers, also where training uses vLLM. Questions are split over the processes. Training
    goes on as if nothing had happened: the mode of each module and the state of the random number generators are
    restored.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer: a [`LuffyTrainer`], or another one for language models.
        benchmarks (`list[str]`, *optional*):
            See [`~luffy_trl.eval.load_questions`], also for the next three.
        data_files (`list[str]`, *optional*):
            Files with questions.
        datasets_dir (`str`, *optional*):
            Folder with downloaded copies of the Hub's datasets.
        max_questions (`int`, *optional*):
            Take only the first ones of each benchmark.
        every_n_steps (`int`, *optional*, defaults to `50`):
            Evaluate after every so many optimizer steps, and after the last.
        on_start (`bool`, *optional*, defaults to `True`):
            Whether to evaluate before the first step too.
        num_samples (`int`, *optional*, defaults to `1`):
            Samples for each question.
        temperature (`float`, *optional*, defaults to `0.6`):
            Temperature of sampling; 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass to sample from.
        max_tokens (`int`, *optional*):
            Maximum number of tokens of a completion. Default: the `max_completion_length` of the trainer.
        batch_size (`int`, *optional*):
            Samples of a batch on each process. Default: `per_device_eval_batch_size`.
        template (`str`, *optional*, defaults to `"own"`):
            Prompt template; see [`~luffy_trl.eval.render_prompt`].
        system_prompt (`str`, *optional*):
            System message for the template `own`. Default: that of the data; the empty string leaves it out.
        require_think (`bool`, *optional*, defaults to `False`):
            Whether an answer counts only behind `</think>`. After a prompt that ends with `<think>` it always does.
        shuffle_options (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the options of multiple choice.
        seed (`int`, *optional*, defaults to `0`):
            Seed of samples and options: the same at every evaluation.

    Raises:
        ValueError: If an argument or a row of the data cannot be used. The message names it.

    Example:
    ```python
    trainer.add_callback(EvaluationCallback(trainer, ["aime24", "math500"], every_n_steps=20))
    ```
    """

    def __init__(
        self,
        trainer: Trainer,
        benchmarks: list[str] | None = None,
        data_files: list[str] | None = None,
        datasets_dir: str | None = None,
        max_questions: int | None = None,
        every_n_steps: int = 50,
        on_start: bool = True,
        num_samples: int = 1,
        temperature: float = 0.6,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        batch_size: int | None = None,
        template: str = "own",
        system_prompt: str | None = None,
        require_think: bool = False,
        shuffle_options: bool = True,
        seed: int = 0,
    ):
        args = trainer.args
        if max_tokens is None:
            max_tokens = getattr(args, "max_completion_length", None)
            if max_tokens is None:
                raise ValueError("`max_tokens` is needed: the trainer has no `max_completion_length`.")
        batch_size = args.per_device_eval_batch_size if batch_size is None else batch_size
        positive = {"every_n_steps": every_n_steps, "num_samples": num_samples}
        positive |= {"max_tokens": max_tokens, "batch_size": batch_size}
        for name, value in positive.items():
            if value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if temperature < 0 or (temperature == 0 and num_samples > 1):
            raise ValueError(
                f"`temperature` must not be negative, nor 0 with more than one sample, got {temperature} with "
                f"`num_samples` {num_samples}."
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {top_p}.")
        if system_prompt is not None and template != "own":
            raise ValueError(f"`system_prompt` is for the template 'own'; {template!r} has its own.")
        self.trainer, self.every_n_steps, self.on_start = trainer, every_n_steps, on_start
        self.batch_size, self.require_think = batch_size, require_think
        self.tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        model = trainer.accelerator.unwrap_model(trainer.model)
        eos_token_ids = find_eos_token_ids(self.tokenizer, model.generation_config)
        self.sampling = Sampling(temperature, top_p, tuple(eos_token_ids))
        with trainer.accelerator.main_process_first():
            self.questions = load_questions(benchmarks, data_files, datasets_dir, max_questions, shuffle_options, seed)
        max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.prompts, self.requests = [], []
        for number, question in enumerate(self.questions):
            prompt, ids = render_question(self.tokenizer, question, template, system_prompt)
            if max_length is not None and len(ids) + max_tokens > max_length:
                raise ValueError(
                    f"Question {question.index} of {question.benchmark} has a prompt of {len(ids)} tokens, which "
                    f"leaves no room for `max_tokens`={max_tokens} in the model's context of {max_length}."
                )
            self.prompts.append(prompt)
            for sample in range(num_samples):
                question_seed = sample_seed(seed, question.benchmark, question.index, sample)
                self.requests.append(Request(number, sample, ids, question_seed, max_tokens))
        self.requests.sort(key=lambda request: -len(request.prompt_ids))

    def on_train_begin(self, args, state, control, **kwargs):
        if self.on_start and state.global_step == 0:
            self._evaluate(control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every_n_steps == 0 or state.global_step == state.max_steps:
            self._evaluate(control)

    def _evaluate(self, control):
        # Logging marks what was to be logged as logged, and the step's own record is yet to come.
        should_log = control.should_log
        scores = self.evaluate()
        # `Trainer.log`: `GRPOTrainer.log` would write the metrics of the unfinished step into this record.
        Trainer.log(self.trainer, {f"eval/{name}": score for name, score in scores.items()})
        control.should_log = should_log

    def evaluate(self) -> dict[str, float]:
        """
        Evaluates the model as it is. Every process has to call it.

        Returns:
            `dict[str, float]`: Mean accuracy for each benchmark, the same on every process.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        # As many batches on every process, for sharded models: what is missing at the end is done twice.
        share = -(-len(self.requests) // accelerator.num_processes)
        numbers = [(accelerator.process_index + i * accelerator.num_processes) for i in range(share)]
        mine = [self.requests[number % len(self.requests)] for number in numbers]
        results = []
        wrapped = trainer.model_wrapped
        sharded = isinstance(wrapped, FullyShardedDataParallel)
        with (
            _left_alone(trainer.model),
            unwrap_model_for_generation(
                wrapped,
                accelerator,
                gather_deepspeed3_params=getattr(trainer.args, "ds3_gather_for_generation", True),
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            FullyShardedDataParallel.summon_full_params(wrapped, recurse=False) if sharded else nullcontext(),
            tqdm(
                total=share,
                desc="Evaluating",
                leave=False,
                disable=trainer.args.disable_tqdm or not accelerator.is_local_main_process,
            ) as progress,
        ):
            for start in range(0, share, self.batch_size):
                batch = mine[start : start + self.batch_size]
                with accelerator.autocast():
                    completions = generate_batch(model, self.tokenizer, batch, self.sampling)
                for request, completion in zip(batch, completions, strict=True):
                    opened = self.prompts[request.question].rstrip().endswith("<think>")
                    question = self.questions[request.question]
                    (correct,) = grade(question, [completion.text], opened, self.require_think)
                    results.append(((request.question, request.sample), correct))
                progress.update(len(batch))
            results = gather_object(results)
        scores = defaultdict(list)
        for (number, _), correct in sorted(dict(results).items()):
            scores[self.questions[number].benchmark].append(correct)
        return {name: sum(values) / len(values) for name, values in scores.items()}


@contextmanager
def _left_alone(model):
    """Evaluation mode inside; outside, every module's mode and the random numbers go on where they were."""
    modes = {module: module.training for module in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy)
