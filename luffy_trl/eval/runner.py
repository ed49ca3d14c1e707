# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""The evaluation from its arguments to what is written, and how it resumes."""

import gc
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.utils import is_peft_available

from ..demonstrations import find_eos_token_ids, load_generation_config
from ..errors import loading_model
from ..journal import Journal
from ..options import described
from .backends import Request, Sampling, ServerBackend, TransformersBackend, VLLMBackend, sample_seed
from .benchmarks import BENCHMARKS, Question, grade, load_questions
from .identity import IDENTITY, base_of, identify
from .report import plot_pass_at_k, plot_scores, summarize, to_markdown
from .templates import TEMPLATES, render_question


logger = logging.getLogger(__name__)

# Which engine reads an option that not all of them read.
_READ_BY = {
    "batch_size": ("transformers",),
    "num_concurrent": ("server",),
    "dtype": ("transformers", "vllm"),
    "trust_remote_code": ("transformers", "vllm"),
    "tensor_parallel_size": ("vllm",),
    "gpu_memory_utilization": ("vllm",),
    "max_model_len": ("vllm",),
    "vllm_kwargs": ("vllm",),
}
# What rows depend on, beside the model, its template, the number of samples and what generates.
_SETTINGS = (
    "temperature",
    "top_p",
    "max_tokens",
    "seed",
    "shuffle_options",
    "require_think",
    "dtype",
    "max_model_len",
    "vllm_kwargs",
)


@described
@dataclass
class EvaluationArguments:
    r"""
    Arguments of `python -m luffy_trl.eval`.

    Args:
        model_name_or_path (`list[str]`):
            Models to evaluate, side by side in the table.
        output_dir (`str`):
            Folder for what is generated and for the results. An evaluation that was interrupted goes on there.
        benchmarks (`list[str]`, *optional*):
            `aime24`, `aime25`, `amc`, `math500`, `minerva`, `olympiadbench`, `arc_c`, `gpqa_diamond`, `mmlu_pro`, or
            another `data_source` of your files. Default: all in `data_files`; without files, these nine.
        data_files (`list[str]`, *optional*):
            Files with questions of your own or in the authors' format, each with one or more benchmarks. What they do
            not have comes from the Hub.
        datasets_dir (`str`, *optional*):
            Folder with downloaded copies of the Hub's datasets, `<datasets_dir>/<dataset id>`.
        backend (`str`, *optional*, defaults to `"vllm"`):
            `"vllm"` or `"transformers"`.
        base_url (`list[str]`, *optional*):
            With `backend="vllm"`: ask the running server at this address, such as `http://localhost:8000`, rather than
            loading the model. One for all models or one for each.
        template (`list[str]`, *optional*, defaults to `["own"]`):
            Prompt template, one for all models or one for each: `own` (the model's chat template), `qwen`, `simplerl`,
            `prime` or `none`.
        system_prompt (`str`, *optional*):
            System message for the template `own`. Default: that of the data, which for questions from the Hub is
            LUFFY's. The empty string leaves it out, for a chat template that says it by itself.
        temperature (`float`, *optional*, defaults to `0.6`):
            Temperature of sampling; 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass to sample from.
        max_tokens (`int`, *optional*, defaults to `8192`):
            Maximum number of tokens of a completion. Where the model's context ends earlier, it is cut off there.
        num_samples (`int`, *optional*):
            Samples for each question. Default: 32 for AIME and AMC, 1 for the others.
        max_questions (`int`, *optional*):
            Take only the first questions of each benchmark.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples, of the order of options and of the intervals.
        shuffle_options (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the options of multiple choice.
        require_think (`bool`, *optional*, defaults to `False`):
            Whether an answer counts only behind `</think>`. After a prompt that ends with `<think>` it always does.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Resamples of the bootstrap.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Precision of the weights.
        batch_size (`int`, *optional*, defaults to `16`):
            Samples of a batch, with `backend="transformers"`.
        num_concurrent (`int`, *optional*, defaults to `64`):
            Requests under way at a time, with `base_url`.
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs for vLLM to split the model over. (`backend="transformers"` is one process.)
        gpu_memory_utilization (`float`, *optional*, defaults to `0.9`):
            Share of a GPU's memory for vLLM.
        max_model_len (`int`, *optional*):
            Context of vLLM, in tokens. Default: the model's.
        vllm_kwargs (`dict` or `str`, *optional*):
            Further arguments of `vllm.LLM`, on the command line as JSON: `'{"enforce_eager": true}'`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
    """

    model_name_or_path: list[str]
    output_dir: str
    benchmarks: list[str] | None = None
    data_files: list[str] | None = None
    datasets_dir: str | None = None
    backend: str = "vllm"
    base_url: list[str] | None = None
    template: list[str] = field(default_factory=lambda: ["own"])
    system_prompt: str | None = None
    temperature: float = 0.6
    top_p: float = 1.0
    max_tokens: int = 8192
    num_samples: int | None = None
    max_questions: int | None = None
    seed: int = 0
    shuffle_options: bool = True
    require_think: bool = False
    num_resamples: int = 2000
    dtype: str = "bfloat16"
    batch_size: int = 16
    num_concurrent: int = 64
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    vllm_kwargs: dict | str | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.backend not in ("vllm", "transformers"):
            raise ValueError(f"`backend` must be 'vllm' or 'transformers', got {self.backend!r}.")
        if self.base_url and self.backend != "vllm":
            raise ValueError("`base_url` is for `backend='vllm'`.")
        for name in ("model_name_or_path", "template", "base_url", "benchmarks", "data_files"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if isinstance(self.vllm_kwargs, str):
            try:
                self.vllm_kwargs = json.loads(self.vllm_kwargs)
            except ValueError as error:
                raise ValueError(f"`vllm_kwargs` must be JSON, got {self.vllm_kwargs!r}.") from error
        for name in ("template", "base_url"):
            value = getattr(self, name)
            if value is not None and len(value) not in (1, len(self.model_name_or_path)):
                raise ValueError(
                    f"`{name}` has {len(value)} values for {len(self.model_name_or_path)} models. Give one for all or "
                    "one for each."
                )
        for template in self.template:
            if template not in TEMPLATES:
                raise ValueError(f"`template` must be one of {', '.join(TEMPLATES)}, got {template!r}.")
        if self.system_prompt is not None and "own" not in self.template:
            raise ValueError(f"`system_prompt` is for the template 'own'; {self.template[0]!r} has its own.")
        for name in ("max_tokens", "num_samples", "num_resamples", "batch_size", "num_concurrent"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must not be negative, got {self.temperature}.")
        if self.temperature == 0 and (self.num_samples or 0) > 1:
            raise ValueError("`temperature` is 0, so all of the `num_samples` of a question would be the same.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")
        for option in fields(self):
            read_by = _READ_BY.get(option.name, (self.engine,))
            if self.engine not in read_by and getattr(self, option.name) != option.default:
                raise ValueError(
                    f"`{option.name}` is read by {' and '.join(read_by)} only, not by {self.engine}. Leave it out."
                )

    @property
    def engine(self) -> str:
        """What generates: `"transformers"`, `"vllm"` or `"server"`."""
        return "server" if self.base_url else self.backend


def file_name(name: str) -> str:
    """
    A file's name for a name from the data, which may be any text. Plain names stay as they are; of others a hash is a
    part, so that no two of them share a file, on a file system without upper case either.
    """
    plain = re.sub("[^a-z0-9._-]+", "_", name.lower()).strip("._")[:80]
    if plain and plain == name and not re.search("-[0-9a-f]{16}$", name):
        return name
    return f"{plain}-{hashlib.blake2b(name.encode(errors='surrogatepass'), digest_size=8).hexdigest()}"


class Store:
    """
    What was generated for a benchmark: a JSON line for each question, beside a file with the settings. A file of other
    settings, or with a line other than the last that cannot be read, is an error.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings
        settings_path = path.with_suffix(".settings.json")
        if settings_path.exists():
            stored = json.loads(settings_path.read_text())
            for name in {**stored, **settings}:
                if stored.get(name) == settings.get(name):
                    continue
                if name in IDENTITY:
                    raise ValueError(
                        f"The {IDENTITY[name]} of {settings['model_name_or_path']!r} now ({settings[name]}) and when "
                        f"{path} was generated ({stored.get(name, 'not stored')}) differ. Use another `output_dir`, "
                        f"or delete {path.parent}."
                    )
                if name != "served_from" or None not in (stored.get(name), settings.get(name)):
                    raise ValueError(
                        f"`{name}` is {settings.get(name)!r}, and {path} was generated with {stored.get(name)!r}. Go "
                        "on with the same settings, or use another `output_dir`."
                    )
        elif path.exists():
            raise ValueError(f"{path} has lost its {settings_path.name}. Use another `output_dir`.")
        self.rows = Journal(path, key="question")

    def has(self, question: Question, prompt: str) -> bool:
        """Whether a question is done. If it is, and has changed since, it is a `ValueError`."""
        row = self.rows[question.index] if question.index in self.rows else None
        for name, value in (("prompt", prompt), ("gold", question.gold)):
            if row is not None and row[name] != value:
                raise ValueError(
                    f"`{name}` of question {question.index} is not what it was when {self.path} was generated: the "
                    "data, or the chat template, has changed. Use another `output_dir`."
                )
        return row is not None

    def add(self, row: dict):
        """Appends a row."""
        if not self.rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            settings_path = self.path.with_suffix(".settings.json")
            temporary = settings_path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.settings, indent=2) + "\n")
            temporary.replace(settings_path)
        self.rows.add(row)


class _Run:
    """A model with its template: a folder of rows, and a group of columns in the table."""

    def __init__(self, args: EvaluationArguments, number: int):
        def pick(values):
            return values[number if len(values) > 1 else 0]

        self.args = args
        self.model = args.model_name_or_path[number]
        self.template = pick(args.template)
        self.base_url = pick(args.base_url) if args.base_url else None
        path = Path(self.model)
        self.name, folder = path.name, "__".join(part for part in path.parts if part not in (os.sep, "."))
        if not path.name.strip("."):  # `.`, or `checkpoints/..`
            self.name = folder = path.resolve().name
        folder = self._with_template(folder)
        self.folder = Path(args.output_dir) / (folder if 0 < len(os.fsencode(folder)) <= 200 else file_name(folder))
        self.stores: dict[str, Store] = {}
        self.prompts: dict[int, str] = {}
        self.requests: list[Request] = []

    def _with_template(self, name: str) -> str:
        return name if self.template == "own" else f"{name}-{self.template}"

    def label(self, short: bool) -> str:
        return self._with_template(self.name if short else self.model)

    def prepare(self, questions: list[Question]):
        """Renders the prompts, reads what is stored, and lists what is left to generate."""
        args = self.args
        remote = {"trust_remote_code": args.trust_remote_code}
        with loading_model(self.model):
            self.tokenizer = AutoTokenizer.from_pretrained(self.model, **remote)
        eos_token_ids = find_eos_token_ids(self.tokenizer, load_generation_config(self._base_model(), **remote))
        self.sampling = Sampling(args.temperature, args.top_p, tuple(eos_token_ids))
        self.identity = identify(self.model, self.tokenizer, eos_token_ids, self.template == "own")
        self._find_server()
        for number, question in enumerate(questions):
            name = question.benchmark
            if name not in self.stores:
                self.stores[name] = Store(self.folder / f"{file_name(name)}.jsonl", self._settings(name))
            prompt, ids = render_question(self.tokenizer, question, self.template, args.system_prompt)
            if not self.stores[name].has(question, prompt):
                self.prompts[number] = prompt
                for sample in range(self.stores[name].settings["num_samples"]):
                    seed = sample_seed(args.seed, name, question.index, sample)
                    self.requests.append(Request(number, sample, ids, seed, args.max_tokens))
        if self.no_server is not None:
            if self.requests:
                raise self.no_server
            logger.warning(f"What there is of {self.model!r} was generated before. {self.no_server}")

    def _find_server(self):
        """Asks the server what it has. Where everything is done, it need not be there."""
        self.server, self.no_server = None, None
        if self.args.engine == "server":
            try:
                self.server = ServerBackend(self.model, self.sampling, self.base_url, self.args.num_concurrent)
            except ValueError as error:
                self.no_server = error

    def _base_model(self) -> str:
        """The model itself, or the one that it is an adapter of: an adapter has no configuration of its own."""
        base_model = base_of(self.model)
        if base_model == self.model:
            return self.model
        if self.args.engine == "vllm":
            raise ValueError(
                f"{self.model!r} is a LoRA adapter of {base_model!r}. Evaluate it with `--backend transformers`, or "
                "merge it first, with PEFT's `merge_and_unload`, and put the tokenizer beside it."
            )
        if self.args.engine == "transformers" and not is_peft_available():
            raise ValueError(f"{self.model!r} is a LoRA adapter, and needs PEFT: `pip install luffy-trl[peft]`.")
        return base_model

    def _settings(self, benchmark: str) -> dict:
        args = self.args
        num_samples = args.num_samples
        if num_samples is None:
            several = benchmark in BENCHMARKS and args.temperature > 0
            num_samples = BENCHMARKS[benchmark].num_samples if several else 1
        settings = {"model_name_or_path": self.model, "template": self.template, "num_samples": num_samples}
        settings |= {name: value for name, value in self.identity.items() if name != "chat_template"}
        settings["backend"] = args.engine
        if args.engine == "server":
            settings["served_from"] = self.server and self.server.served_from
        settings["system_prompt"] = args.system_prompt if self.template == "own" else None
        for name in _SETTINGS:
            if args.engine in _READ_BY.get(name, (args.engine,)):
                settings[name] = getattr(args, name)
        return settings

    def generate(self, questions: list[Question], label: str):
        """Generates what is left, and stores each question when all of its samples are done."""
        if not self.requests:
            return
        backend = self._backend()
        # The longest first: whether memory suffices shows at once.
        requests = sorted(self._within_context(questions, backend.max_length), key=lambda r: -len(r.prompt_ids))
        completions: dict[int, dict[int, dict]] = defaultdict(dict)
        with tqdm(total=len(requests), desc=label) as progress:
            for request, completion in backend.generate(requests):
                done = completions[request.question]
                done[request.sample] = {**asdict(completion), "seed": request.seed}
                progress.update()
                question = questions[request.question]
                store = self.stores[question.benchmark]
                if len(done) == store.settings["num_samples"]:
                    samples = [done[i] for i in range(len(done))]
                    prompt = self.prompts[request.question]
                    opened = prompt.rstrip().endswith("<think>")
                    right = grade(question, [s["text"] for s in samples], opened, self.args.require_think)
                    for sample, correct in zip(samples, right, strict=True):
                        sample["correct"] = correct
                    store.add(
                        {
                            "benchmark": question.benchmark,
                            "question": question.index,
                            "prompt": prompt,
                            "gold": question.gold,
                            "samples": samples,
                        }
                    )
                    del completions[request.question]
        del backend
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _backend(self):
        args = self.args
        if args.engine == "server":
            return self.server
        vllm_kwargs: Any = args.vllm_kwargs or {}  # parsed by now
        options: dict[str, Any] = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
        if args.engine == "transformers":
            return TransformersBackend(self.model, self.tokenizer, self.sampling, args.batch_size, **options)
        return VLLMBackend(
            self.model,
            self.sampling,
            tensor_parallel_size=args.tensor_parallel_size,
            gpu_memory_utilization=args.gpu_memory_utilization,
            max_model_len=args.max_model_len,
            seed=args.seed,
            **options,
            **vllm_kwargs,
        )

    def _within_context(self, questions: list[Question], max_length: int | None) -> list[Request]:
        if max_length is None:
            return self.requests
        requests = []
        for request in self.requests:
            room = max_length - len(request.prompt_ids)
            if room < 1:
                question = questions[request.question]
                raise ValueError(
                    f"Question {question.index} of {question.benchmark} has a prompt of {len(request.prompt_ids)} "
                    f"tokens, and the context of {self.model!r} is {max_length}."
                )
            requests.append(replace(request, max_tokens=min(request.max_tokens, room)))
        num_cut = sum(request.max_tokens < self.args.max_tokens for request in requests)
        if num_cut:
            logger.warning(
                f"{num_cut} of {len(requests)} samples get less than `max_tokens`, {self.args.max_tokens} tokens: "
                f"the context of {self.model!r} is {max_length}."
            )
        return requests


def evaluate(args: EvaluationArguments) -> dict[str, dict]:
    """
    Evaluates models on benchmarks, and writes what they said and their scores to `output_dir`. Returns for each what
    [`~luffy_trl.eval.summarize`] does, and `model`, which tells its weights from others.
    """
    plots = importlib.util.find_spec("matplotlib") is not None
    if not plots:
        logger.warning("There will be no plots: matplotlib is not installed (`pip install luffy-trl[eval]`).")
    runs = [_Run(args, number) for number in range(len(args.model_name_or_path))]
    labels = [run.label(short=True) for run in runs]
    if len(set(labels)) < len(runs):
        labels = [run.label(short=False) for run in runs]
    if len({run.folder for run in runs}) < len(runs):
        raise ValueError("`model_name_or_path` has a model twice, with the same template.")
    questions = load_questions(
        args.benchmarks, args.data_files, args.datasets_dir, args.max_questions, args.shuffle_options, args.seed
    )
    for run in runs:  # whatever is wrong with the input is found before the first model is loaded
        run.prepare(questions)
    summary = {}
    for run, label in zip(runs, labels, strict=True):
        run.generate(questions, label)
        rows = defaultdict(list)
        for question in questions:
            rows[question.benchmark].append(run.stores[question.benchmark].rows[question.index])
        summary[label] = {**summarize(rows, args.num_resamples, args.seed), "model": run.identity}
    output_dir = Path(args.output_dir)
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (output_dir / "table.md").write_text(to_markdown(summary))
    if plots:
        plot_scores(summary, output_dir / "scores.png")
        plot_pass_at_k(summary, output_dir / "pass_at_k.png")
    return summary
