# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Which tokens of a trace teach: what each token's log-probability is multiplied by in a step of the optimizer. It is
read off the method's own objective by automatic differentiation, so that there is no second copy of a formula.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from ..arguments import Parser
from ..data import load_data
from ..demonstrations import find_eos_token_ids, load_generation_config
from ..errors import loading_model
from ..inspection import inspect_dataset
from ..losses import Denominators, TokenBatch
from ..luffy_config import LuffyConfig
from ..methods import Method
from ..mixins.recording import DERIVED
from ..recipe import differing
from ..scripts.inspect_data import PlannedConfig
from ..scripts.train import LuffyScriptArguments, get_tools
from ..turns import Tools
from .reading import without_paths


_ROWS_READ = 64  # to find so many rows with a trace
_METHOD = ("objective", "policy_shaping", "policy_shaping_gamma", "demonstration_loss", "temperature")
_BLUE, _ORANGE, _GREEN = 220, 35, 140


def token_weights(
    args: LuffyConfig,
    logps: torch.Tensor,
    entropies: torch.Tensor | None = None,
    acted: list[int] | None = None,
) -> torch.Tensor:
    """
    The weight of each token of a demonstration in the gradient: minus the derivative of the loss by its log-prob.

    For LUFFY it is A gamma pi / (pi + gamma)^2, and for cross-entropy its coefficient.

    Args:
        args ([`LuffyConfig`]):
            Configuration, which makes the objective. What changes over a run is as after its warm-up.
        logps (`torch.Tensor` of shape `(T,)`):
            Log-probabilities of the tokens.
        entropies (`torch.Tensor` of shape `(T,)`, *optional*):
            Entropies of the policy; 0 if not given.
        acted (`list[int]`, *optional*):
            0 on tokens of the tools' answers, which carry no loss, and 1 on others; all 1 if not given.

    Returns:
        `torch.Tensor`: The weights, of shape `(T,)`, for an advantage of 1 and without the constant that the loss
        type divides by.
    """
    method = Method.from_args(args)
    logps = logps.detach()[None].clone().requires_grad_()
    mask = torch.ones_like(logps) if acted is None else torch.tensor([acted], dtype=logps.dtype)
    tokens = TokenBatch(
        logps=logps,
        old_logps=logps.detach(),
        mask=mask,
        demonstration_mask=mask.bool(),
        advantages=mask * method.advantage_weights[0],
        ref_logps=logps.detach(),
        entropies=torch.zeros_like(logps) if entropies is None else entropies[None],
        is_solved=torch.ones(1, dtype=torch.bool, device=logps.device),
        is_mixed=torch.tensor(True),
    )
    one = torch.ones((), device=logps.device)
    objective = replace(method.objective, loss_type="bnpo")  # a sum over tokens, divided by one
    loss, _, _ = objective(tokens, Denominators(1, one, one, one, 1.0), 1, args.sft_loss_coef_warmup_steps)
    return 0.0 - torch.autograd.grad(loss, logps)[0][0]  # and not -0 where there is no loss


@torch.no_grad()
def measure(
    model: PreTrainedModel, prompt_ids: list[int], ids: list[int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the tokens of a trace, each of shape `(T,)`."""
    sequence = torch.tensor([prompt_ids + ids], device=model.device)
    logits = model(input_ids=sequence, use_cache=False).logits[:, len(prompt_ids) - 1 : -1].float() / temperature
    return selective_log_softmax(logits, sequence[:, len(prompt_ids) :])[0].cpu(), entropy_from_logits(logits)[0].cpu()


def weigh_rows(
    name: str, before: str | None, num_rows: int, options: list[str]
) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """
    Runs the traces of a few rows through one checkpoint, or two.

    Args:
        name (`str`):
            The checkpoint.
        before (`str`, *optional*):
            The one to compare with.
        num_rows (`int`):
            Rows with a trace.
        options (`list[str]`):
            Options of `luffy train`: the data, and what makes the objective.

    Returns:
        `tuple[list[tuple[str, str]], list[dict]]`: Names and values of what the page is made of, and for each trace
        `title`, `prompt`, `text`, `tokens`, whether each was `acted`, and `views` with the values of each.

    Raises:
        ValueError: If an option is unknown, a model cannot be loaded, or no row has a trace.
    """
    parser = Parser((LuffyScriptArguments, PlannedConfig, ModelConfig), prog="luffy report")
    script_args, args, model_args = parser.parse_args_and_config(["--model_name_or_path", name, *options])
    if script_args.dataset_name is None:
        raise ValueError("`--dataset_name` is needed with `--model`: the data whose traces are shown.")
    load_options = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    with loading_model(name, "model"):
        tokenizer = AutoTokenizer.from_pretrained(name, **load_options)
        eos_token_ids = find_eos_token_ids(tokenizer, load_generation_config(name, **load_options))
    dataset = load_data(
        script_args.dataset_name,
        script_args.dataset_train_split,
        script_args.dataset_config,
        script_args.dataset_streaming,
    )
    if "demonstration_logprobs" in (dataset.column_names or []):
        print("The weights are with pi_phi = 1: `demonstration_logprobs` are not read here.", file=sys.stderr)
    findings = inspect_dataset(
        *(dataset, tokenizer, eos_token_ids, args, []),
        max_prompt_length=script_args.max_prompt_length,
        max_rows=max(_ROWS_READ, num_rows),
        num_examples=num_rows,
        tools=Tools.of_run(tokenizer, *get_tools(script_args)),
    )
    if findings.problems or not findings.examples:
        reasons = [*findings.problems, f"No row of the first {findings.num_rows} has a trace that fits."]
        raise ValueError(f"{script_args.dataset_name}: {reasons[0]} `luffy inspect` says more.")
    examples, pictures = [], []
    for row, _, prompt_ids, traces in findings.examples:
        for trace, ids in traces[:1]:
            acted = trace.turns.mask(len(ids)) if trace.turns else [1] * len(ids)
            examples.append((prompt_ids, ids, acted))
            tokens = split_text(tokenizer, ids)
            pictures.append(
                {
                    "title": f"Row {row} (the first is 0), {trace.name}",
                    "prompt": tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False),
                    "text": "".join(tokens),
                    "tokens": tokens,
                    "acted": [bool(value) for value in acted],
                    "views": [],
                }
            )
    about = [("after training" if before else "model", _shown(name)), ("data", _shown(script_args.dataset_name))]
    if before:
        about.insert(0, ("before training", _shown(before)))
    for label, path in (("before training: ", before), ("after training: " if before else "", name)):
        if path is None:
            continue
        with loading_model(path, "model" if path == name else "before"):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=model_args.dtype, **load_options).eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        for (prompt_ids, ids, acted), picture in zip(examples, pictures, strict=True):
            logps, entropies = measure(model, prompt_ids, ids, args.temperature)
            weights = token_weights(args, logps, entropies, acted)
            picture["views"] += _views(label + _shown(path), logps.exp(), weights)
        del model
    for picture in pictures:  # before and after have one scale
        for hue in (_ORANGE, _GREEN):
            views = [view for view in picture["views"] if view["hue"] == hue]
            scale = max(abs(value) for view in views for value in view["values"]) or 1.0
            for view in views:
                view |= {"scale": scale, "title": f"{view['title']}; full colour is {scale:.3g}"}
    return about + _method(args), pictures


def split_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """
    The text of each token. A character of several tokens is at the one that completes it, and the others are empty.
    """
    texts: list[str] = []
    context, start = 0, 0  # tokens that are decoded too, for the space between words; the first that is not written
    for end in range(1, len(ids) + 1):
        before, now = (
            tokenizer.decode(ids[context:stop], clean_up_tokenization_spaces=False) for stop in (start, end)
        )
        # A character has up to four bytes: what is open after as many tokens is no text
        if now.endswith("\ufffd") and end - start < 4 and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        context, start = start, end
    return texts


def _shown(path: str) -> str:
    """A model or a dataset by its name, without the folders that it is in on this machine."""
    return Path(path).resolve().name if Path(path).exists() else without_paths(path)


def _method(args: LuffyConfig) -> list[tuple[str, str]]:
    """What the weights are made from, and what else differs from the defaults."""
    values = {name: str(getattr(args, name)) for name in _METHOD}
    values |= {name: value for name, value, _ in differing(LuffyConfig, vars(args), left_out=DERIVED)}
    return [(name, without_paths(value)) for name, value in values.items()]


def _views(label: str, probs: torch.Tensor, weights: torch.Tensor) -> list[dict[str, Any]]:
    """Three pictures of a trace: the probability of each token, its weight, and how hard its logit is pulled."""
    values = {"probs": probs.tolist(), "weights": weights.tolist()}
    pull = (weights * (1 - probs)).tolist()  # the log-prob of a token grows by 1 - pi with its logit
    return [
        {"title": f"Probability, {label}", "values": values["probs"], "scale": 1.0, "hue": _BLUE, **values},
        {"title": f"Weight, {label}", "values": values["weights"], "hue": _ORANGE, **values},
        {
            "title": f"Weight x (1 - probability), the pull on its logit, {label}",
            "values": pull,
            "hue": _GREEN,
            **values,
        },
    ]
