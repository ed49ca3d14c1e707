# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What generates: transformers or vLLM in this process, or a server."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from trl.trainer.utils import pad

from ..endpoints import Endpoint


@dataclass(frozen=True)
class Sampling:
    """How to sample; temperature 0 is greedy."""

    temperature: float = 0.6
    top_p: float = 1.0
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """A sample to generate."""

    question: int
    sample: int
    prompt_ids: list[int]
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Completion:
    """What was generated."""

    text: str
    num_tokens: int  # with the one that ends it
    finish_reason: str  # "stop", or "length" if it was cut off


def sample_seed(seed: int, benchmark: str, index: int, sample: int) -> int:
    """A seed, below 2**31, that depends on these four alone."""
    digest = hashlib.blake2b(f"{seed}/{benchmark}/{index}/{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1


class SeededSampling(LogitsProcessor):
    """
    Samples each row with a generator of its own, so that a sample does not depend on its batch: the maximum of logits
    plus Gumbel noise is a sample from their softmax. Goes last, with `do_sample=False`.
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_min_(torch.finfo(torch.float32).tiny).log_()


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: list[Request], sampling: Sampling
) -> list[Completion]:
    """Generates a batch with transformers. The sampling options of the model's generation config are not used."""
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompts = [torch.tensor(request.prompt_ids) for request in requests]
    input_ids = pad(prompts, padding_value=pad_token_id, padding_side="left").to(model.device)
    attention_mask = pad([torch.ones_like(p) for p in prompts], padding_value=0, padding_side="left").to(model.device)
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(SeededSampling([request.seed for request in requests], model.device))
    config = GenerationConfig(
        max_new_tokens=max(request.max_tokens for request in requests),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # as the next two: what is not set would come from the model's generation config
        no_repeat_ngram_size=0,
        min_length=0,
        eos_token_id=list(sampling.eos_token_ids),
        pad_token_id=pad_token_id,
    )
    output = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, generation_config=config, logits_processor=processors
    )
    completions = []
    for request, ids in zip(requests, output[:, input_ids.shape[1] :].tolist(), strict=True):
        ids = ids[: request.max_tokens]
        end = next((i for i, token in enumerate(ids) if token in sampling.eos_token_ids), None)
        num_tokens = len(ids) if end is None else end + 1
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        completions.append(Completion(text, num_tokens, "length" if end is None else "stop"))
    return completions


class TransformersBackend:
    """Generates with transformers, in one process."""

    def __init__(
        self,
        model_name_or_path: str,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        batch_size: int = 16,
        **kwargs,
    ):
        self.model = AutoModelForCausalLM.from_pretrained(model_name_or_path, device_map="auto", **kwargs).eval()
        self.tokenizer, self.sampling, self.batch_size = tokenizer, sampling, batch_size
        self.max_length = getattr(self.model.config, "max_position_embeddings", None)

    def generate(self, requests: list[Request]) -> Iterator[tuple[Request, Completion]]:
        """Yields each request with its completion, in any order."""
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            yield from zip(batch, generate_batch(self.model, self.tokenizer, batch, self.sampling), strict=True)


class VLLMBackend:
    """
    Generates with vLLM in this process. vLLM chooses its batches: a seed gives a sample the same random numbers, but
    its probabilities may differ in the last bits from one batch to another.
    """

    def __init__(self, model_name_or_path: str, sampling: Sampling, **kwargs):
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                "`backend` is 'vllm', and vLLM is not installed: `pip install luffy-trl[vllm]`. Or set `base_url` of "
                "a server, or `--backend transformers`."
            ) from error
        self.llm = LLM(model_name_or_path, **kwargs)
        self.sampling = sampling
        self.max_length = self.llm.llm_engine.model_config.max_model_len

    def generate(self, requests: list[Request]) -> Iterator[tuple[Request, Completion]]:
        """Yields each request with its completion, in any order."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # `LLM.generate` returns when the last one is done; the engine gives each as it is done, to be stored.
        engine = self.llm.llm_engine
        for number, request in enumerate(requests):
            params = SamplingParams(
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                max_tokens=request.max_tokens,
                seed=request.seed,
                stop_token_ids=list(self.sampling.eos_token_ids),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(number), {"prompt_token_ids": request.prompt_ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    completion = output.outputs[0]
                    yield (
                        requests[int(output.request_id)],
                        Completion(completion.text, len(completion.token_ids), completion.finish_reason),
                    )


class ServerBackend:
    """
    Generates with a server that speaks OpenAI's completions API, as those of vLLM and SGLang do. What [`VLLMBackend`]
    says of seeds holds here as well.
    """

    def __init__(
        self,
        model_name_or_path: str,
        sampling: Sampling,
        base_url: str,
        num_concurrent: int = 64,
        num_retries: int = 5,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError("`base_url` needs openai: `pip install luffy-trl[eval]`.") from error
        self.model, self.sampling, self.num_concurrent = model_name_or_path, sampling, num_concurrent
        self.endpoint = Endpoint(base_url.rstrip("/").removesuffix("/v1") + "/v1", use_netrc=True)
        self.name = self.endpoint.address
        # A sample has a seed, so that asking again does no harm.
        options = self.endpoint.client_options(timeout=3600.0, max_retries=num_retries)
        http_client = openai.DefaultHttpxClient(**self.endpoint.http_options)
        self.client = openai.OpenAI(**options, http_client=http_client)
        try:
            served = self._call(self.client.models.with_raw_response.list)["data"]
        except ConnectionError as error:
            raise ValueError(f"`base_url`: {error}") from None
        named = {entry["id"]: entry for entry in served}
        if self.model not in named:
            raise ValueError(
                f"`base_url`: the server at {self.name} serves {', '.join(map(repr, named))}, not {self.model!r}."
            )
        self.max_length = named[self.model].get("max_model_len")
        self.served_from = named[self.model].get("root")  # where vLLM has the weights from

    def _call(self, method: Callable, **kwargs) -> dict:
        import openai

        try:
            return self.endpoint.hide.answer(method(**kwargs).http_response.json())
        except openai.APIConnectionError as error:
            reason = self.endpoint.hide(repr(error.__cause__ or error))
            raise ConnectionError(f"no server answers at {self.name} ({reason}).") from None
        except openai.APIStatusError as error:
            response = error.response
        if target := self.endpoint.redirection(response):
            raise ValueError(f"The server at {self.name} redirects to {target}. Set `base_url` to where it is.")
        kind = ValueError if response.status_code < 500 else RuntimeError  # of the request, of the server
        text = self.endpoint.hide(response.text)[:1000]
        raise kind(f"The server at {self.name} answers {response.status_code}: {text}")

    def _complete(self, request: Request) -> Completion:
        # Set here, or a server would take them from the model's generation config.
        beyond_openai = {
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(self.sampling.eos_token_ids),
        }
        answer = self._call(
            self.client.completions.with_raw_response.create,
            model=self.model,
            prompt=request.prompt_ids,
            max_tokens=request.max_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=request.seed,
            extra_body=beyond_openai,
        )
        choice = answer["choices"][0]
        return Completion(choice["text"], answer["usage"]["completion_tokens"], choice["finish_reason"])

    def generate(self, requests: list[Request]) -> Iterator[tuple[Request, Completion]]:
        """Yields each request with its completion, in any order."""
        executor = ThreadPoolExecutor(self.num_concurrent)
        try:
            futures = {executor.submit(self._complete, request): request for request in requests}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            executor.shutdown(cancel_futures=True)
