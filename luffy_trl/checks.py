# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What can be told about a run before its model is loaded."""

import functools
import inspect
import logging
import math
import netrc
import os
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import torch
from datasets import Dataset
from huggingface_hub import get_token
from torch import nn
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_peft_available
from trl import ModelConfig, SFTConfig
from trl.import_utils import is_vllm_available

from .config_rules import CACHE_OPTIONS
from .luffy_config import LuffyConfig
from .redaction import Redactor, credentials_of, without_credentials
from .rewards import math_verify_reward


logger = logging.getLogger(__name__)

_TRACKERS = ("wandb", "trackio", "tensorboard", "mlflow", "comet_ml", "swanlab")
# What TRL passes to a reward function, beside the columns of the dataset
_PASSED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


def without_options(reward_func: Any) -> Any:
    """A reward function itself, where `functools.partial` has set options of it."""
    return reward_func.func if isinstance(reward_func, functools.partial) else reward_func


def reward_name(reward_func: Callable | str) -> str:
    """The name under which TRL logs a reward function."""
    if isinstance(reward_func, str):
        return reward_func.split("/")[-1]
    reward_func = without_options(reward_func)
    return getattr(reward_func, "__name__", type(reward_func).__name__)


def check_arguments(
    args: LuffyConfig, reward_funcs: Any, train_dataset: Any, tools: Any, rollout_func: Any, environment_factory: Any
):
    """Checks what is passed to the trainer, before a tokenizer or a model is loaded."""
    if not isinstance(args, LuffyConfig):
        raise ValueError(f"`args` must be a `LuffyConfig`, got `{type(args).__name__}`. It takes the same fields.")
    if not args.is_plain_grpo:
        if rollout_func is not None:
            raise ValueError(
                "`rollout_func` is not supported together with demonstrations: it generates all completions itself. "
                "Remove it, or train plain GRPO (`num_demonstrations=0`, `ratio_clipping='on_policy'`, "
                "`length_aware_batching=False`)."
            )
        if not tools and not environment_factory:
            check_caches(args)
        check_acting(args, getattr(train_dataset, "column_names", None), tools, environment_factory)
        if environment_factory is None:  # which may have a reward of its own
            check_given_rewards(train_dataset, len(reward_funcs) if isinstance(reward_funcs, list) else 1)
    check_number_of_rows(train_dataset, args)
    if not args.is_plain_grpo:
        check_machine(args)
        passed = {"environments"} if environment_factory else set()
        check_reward_columns(reward_funcs, getattr(train_dataset, "column_names", None), passed)


def check_caches(args: LuffyConfig):
    """
    Raises a `ValueError` where a cache would stay empty: it keeps what complete traces have. A prefix of a trace that
    acts ends at a turn, and may be complete.
    """
    for name in CACHE_OPTIONS:
        if getattr(args, name) and args.prefix_ratio_max < 1 and args.demonstration_sources == ["dataset"]:
            raise ValueError(
                f"`{name}=True` has no effect with `prefix_ratio_max={args.prefix_ratio_max}`: it is for complete "
                "traces, and none is shown. Remove it, or set `prefix_ratio_max=1`."
            )


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None, model_id: str, args: LuffyConfig
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer or processor of a model, if none is given; a `ValueError` for what cannot be with images."""
    if processing_class is None:
        processing_class = AutoProcessor.from_pretrained(
            model_id, truncation_side="left", padding_side="left", **args.load_options
        )
    if isinstance(processing_class, ProcessorMixin):
        asked = {
            "padding_free=True": args.padding_free,
            f"replay_ratio={args.replay_ratio}": args.replay_ratio > 0,
            f"hint_source={args.hint_source!r}": args.hint_source != "none",
            "demonstration_choice='comprehension'": args.demonstration_choice == "comprehension",
        }
        if refused := [option for option, is_set in asked.items() if is_set]:
            raise ValueError(
                f"`{refused[0]}` is not supported with a multimodal processor: what it computes has no images. Remove "
                "it, or pass `processing_class=AutoTokenizer.from_pretrained(...)` to train on text."
            )
    return processing_class


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def check_acting(args: LuffyConfig, columns: list[str] | None, tools: Any, environment_factory: Any):
    """Raises a `ValueError` where a configuration has no meaning for completions that act."""
    if not tools and not environment_factory:
        return
    for name, is_set in (("replay_ratio", args.replay_ratio > 0), ("hint_source", args.hint_source != "none")):
        if is_set:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` is not supported with tools or environments: what tools have "
                "answered is not kept, and cannot be asked for again. Remove it."
            )
    if not environment_factory or args.num_demonstrations == 0:
        return
    if isinstance(environment_factory, dict) and len(environment_factory) > 1:
        raise ValueError(
            "`environment_factory` with several environments is not supported together with demonstrations: of the "
            "rewards of a trace it is not known which environment they are of. Train them one after the other."
        )
    if args.prefix_ratio_min < 1:
        raise ValueError(
            f"`prefix_ratio_min={args.prefix_ratio_min}` with `environment_factory`: no environment is in the state "
            "in which a part of a trace leaves it. Show complete traces (`prefix_ratio_min=1.0`)."
        )
    if columns and "demonstration_rewards" not in columns:
        raise ValueError(
            "`environment_factory` with demonstrations needs the column `demonstration_rewards`: a trace has acted "
            "in no environment of the run, so that nothing can score it. Give each trace the reward that it earned."
        )


def check_reward_columns(reward_funcs: Any, columns: list[str] | None, also: set[str] | None = None):
    """
    Checks that reward functions can be called with the columns of a dataset, if these are known. `also` is what TRL
    passes beside them. Models are not checked.
    """
    passed = _PASSED | (also or set()) | set(columns or ()) - {"prompt", "completion"}
    for reward_func in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if not isinstance(columns, list) or not callable(reward_func) or isinstance(reward_func, nn.Module):
            continue
        name = reward_name(reward_func)
        if without_options(reward_func) is math_verify_reward and not {"answer", "solution"} & passed:
            raise ValueError(
                f"`{name}` needs the gold answers, and the dataset has only the columns {columns}. Give it a column "
                "`answer` or `solution`, or rename the one with the answers."
            )
        try:
            parameters = inspect.signature(reward_func).parameters.values()
        except ValueError:  # not every callable has one
            continue
        missing = [
            parameter.name
            for parameter in parameters
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.name not in passed
        ]
        if missing:
            raise ValueError(
                f"The reward function `{name}` has the parameter `{missing[0]}`, and the dataset has only the columns "
                f"{columns}. Rename the parameter or the column, or give the parameter a default."
            )
        refused = passed - {parameter.name for parameter in parameters}
        if refused and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            raise ValueError(
                f"The reward function `{name}` does not take `{min(refused)}`: it is called with all columns and "
                "more. Add `**kwargs` to its parameters."
            )


def check_given_rewards(dataset: Any, num_functions: int):
    """Raises a `ValueError` if a trace has neither one reward of its own nor one for each reward function."""
    if not isinstance(dataset, Dataset) or "demonstration_rewards" not in dataset.column_names:
        return
    has_several = "demonstrations" in dataset.column_names
    allowed = (0, 1, num_functions)  # none at all is refused where traces are read
    for index, value in enumerate(dataset["demonstration_rewards"]):
        for scores in value if has_several and isinstance(value, list) else [value]:
            if isinstance(scores, list) and len(scores) not in allowed:
                raise ValueError(
                    f"row {index}: `demonstration_rewards` has {len(scores)} numbers for a trace, and there are "
                    f"{num_functions} reward functions. Give one number, or one for each function."
                )


def check_number_of_rows(dataset: Any, args: LuffyConfig):
    """Raises a `ValueError` if a dataset has too few rows for one generation batch, and so for any update."""
    if not isinstance(dataset, Dataset):
        return
    if len(dataset) == 0:
        raise ValueError("`train_dataset` is empty. Check the file, the split and the filters that it went through.")
    num_prompts = args.generation_batch_size // args.num_generations
    if len(dataset) < num_prompts:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} rows, and completions are generated for {num_prompts} prompts at "
            f"once: `per_device_train_batch_size` ({args.per_device_train_batch_size}) times {args.world_size} "
            f"process(es) times `steps_per_generation` ({args.steps_per_generation}), over `num_generations` "
            f"({args.num_generations}). Lower one of the first two, or give more rows."
        )


def check_finite(name: str, value: torch.Tensor | float, step: int, output_dir: str):
    """Raises a `FloatingPointError` if the loss or the gradient norm of an update is infinite or not a number."""
    value = float(value)
    if not math.isfinite(value):
        raise FloatingPointError(
            f"The {name} of update {step} is {value}. Training stops before anything of it is saved; checkpoints in "
            f"{output_dir!r} are from before. Look at the rewards and metrics until then; a lower `learning_rate` or "
            "`demonstration_ratio_max` may help."
        )


def check_model(model_args: ModelConfig):
    """Checks that a script is told which model to train, and can train it as it is told."""
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is required: a model on the Hub, or a local folder.")
    if model_args.use_peft and not is_peft_available():
        raise ValueError("`use_peft=True` needs PEFT, which is not installed here: `pip install luffy-trl[peft]`.")


def check_machine(args: LuffyConfig | SFTConfig):
    """Checks that what a configuration asks for is installed, and warns of a CPU that emulates bf16."""
    if getattr(args, "use_vllm", False) and not is_vllm_available():
        raise ValueError(
            "`use_vllm=True` needs vLLM, which is not installed here: `pip install luffy-trl[vllm]`, or set "
            "`use_vllm=False` to generate with transformers."
        )
    available = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"`report_to` names {name!r}, which transformers does not know. It knows "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}, and 'none'."
            )
        if name in _TRACKERS and name not in available:
            raise ValueError(
                f"`report_to` names {name!r}, which is not installed: `pip install {name}`, or set `report_to='none'`."
            )
    if args.process_index == 0:  # which alone reports
        if "wandb" in args.report_to:
            _check_wandb()
        if "trackio" in args.report_to and args.trackio_space_id is not None and get_token() is None:
            raise ValueError(
                f"`trackio_space_id` {args.trackio_space_id!r} needs a login to the Hub: `hf auth login`, or set "
                "`HF_TOKEN`. Without `trackio_space_id`, trackio logs to this machine."
            )
    if args.bf16 and args.use_cpu and not has_bf16(torch.cpu.get_capabilities()):
        warnings.warn(
            "This CPU has no instructions for bf16 and emulates them, which is slower than float32. Set `bf16=False`.",
            stacklevel=3,
        )


def _check_wandb():
    """Raises a `ValueError` if wandb will find no login, and cannot ask for one. Nothing is sent."""
    import wandb

    settings = wandb.setup().settings
    if wandb.run is not None or settings.mode in ("offline", "dryrun", "disabled") or os.environ.get("WANDB_DISABLED"):
        return
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    host = urlsplit(settings.base_url).netloc
    for file in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            found = netrc.netrc(os.path.expanduser(file))
            if found.authenticators(host) or found.authenticators("api.wandb.ai"):  # the host of earlier versions
                return
        except (OSError, netrc.NetrcParseError):  # not there, or of others
            pass
    if not sys.stdin.isatty():
        raise ValueError(
            f"`report_to` names 'wandb', which has no login for {host}: `wandb login`, or set `WANDB_API_KEY`. "
            "Without one, set `WANDB_MODE=offline`, or `report_to='none'`."
        )


def has_bf16(capabilities: dict[str, Any]) -> bool:
    """Whether a CPU computes in bf16, from `torch.cpu.get_capabilities()`."""
    return any(value for name, value in capabilities.items() if "bf16" in name)


def check_vllm_server(args: LuffyConfig, retry_interval: float = 2.0):
    """Waits for the vLLM server of a run, if it has one, for `vllm_server_timeout` seconds."""
    if not args.use_vllm or args.vllm_mode != "server":
        return
    url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    secrets, url = credentials_of(url), without_credentials(url)
    hide = Redactor(*secrets)
    # TRL's client sends a login that is in the address likewise
    request = urllib.request.Request(
        f"{url}/health", headers={"Authorization": f"Basic {secrets[1]}"} if secrets else {}
    )
    start, attempts = time.monotonic(), 0
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if time.monotonic() - start >= args.vllm_server_timeout:
                raise ValueError(
                    f"No vLLM server answers at {url} (`vllm_server_base_url`), for {args.vllm_server_timeout:g} "
                    f"seconds (`vllm_server_timeout`): {hide(error)}. Start it first, as docs/vllm.md shows, or set "
                    "`vllm_mode='colocate'` to generate in the training processes."
                ) from (None if secrets else error)
        attempts += 1
        if attempts == 1:
            logger.warning(f"Waiting for a vLLM server at {url}, up to {args.vllm_server_timeout:g} seconds.")
        time.sleep(retry_interval)
