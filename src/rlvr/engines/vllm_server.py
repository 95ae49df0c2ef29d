"""vLLM itself, in whatever process this is imported: the only file that imports it.

:func:`main` is what the engine's own process runs; on a GPU shared with the trainer, :class:`VllmServer`
lives in the trainer's.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlvr.engines.weight_stream import Piece, WeightReader

HEARTBEAT_S = 5.0
"""Seconds of generation without a finished response after which the process says that it lives."""


@dataclass(frozen=True)
class ServerSettings:
    """What vLLM is started with.

    Args:
        model: folder with a ``config.json``; its weights, if any, are not read.
        dtype: of weights and arithmetic, ``float32`` or ``bfloat16``.
        max_model_len: tokens of prompt and response.
        max_num_seqs: responses generated at one time.
        tensor_parallel_size: devices that share each layer.
        enforce_eager: no compilation, no CUDA graphs.
        memory_share: of a GPU's memory, in (0, 1].
        kv_cache_bytes: of the KV cache; None: what ``memory_share`` leaves.
        sleep: give the GPU's memory back after every generation.
        worker: dotted path of the worker's extension, :class:`WeightWorker` or a subclass.
        options: further arguments of vLLM's ``EngineArgs``.
    """

    model: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    tensor_parallel_size: int
    enforce_eager: bool
    memory_share: float
    kv_cache_bytes: int | None
    sleep: bool
    worker: str
    options: dict[str, Any] = field(default_factory=dict)


class Request(NamedTuple):
    """One response to generate: its prompt, its own seed, and how to sample."""

    token_ids: tuple[int, ...]
    seed: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_ids: tuple[int, ...]


class Finished(NamedTuple):
    """The number of its request, tokens, ln p in nats, ``stop`` or ``length``, prompt tokens cached."""

    number: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    cached: int


class VllmServer:
    """One vLLM engine, driven step by step: the same submissions give the same batches and responses.

    Args:
        settings: see :class:`ServerSettings`.
    """

    def __init__(self, settings: ServerSettings) -> None:
        # The engine's core in this process: requests then never race with its steps.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        arguments: dict[str, Any] = {
            "model": settings.model,
            "skip_tokenizer_init": True,  # tokens go in and out
            "load_format": "dummy",  # the trainer sends the weights
            "dtype": settings.dtype,
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "enforce_eager": settings.enforce_eager,
            "gpu_memory_utilization": settings.memory_share,
            "kv_cache_memory_bytes": settings.kv_cache_bytes,
            "enable_sleep_mode": settings.sleep,
            "enable_prefix_caching": True,
            # What was sampled from, temperature included.
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # no sampling defaults of the model's own
            "disable_log_stats": True,
            "worker_extension_cls": settings.worker,
            **(_on_cpu(settings) if current_platform.is_cpu() else {}),
            **settings.options,
        }
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._sleeps, self._asleep = settings.sleep, False
        self._calls = 0

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over weights of this process, tensor by tensor."""
        self.begin_load()
        for name, tensor in weights:
            self._engine.collective_rpc("rlvr_take", args=([(name, tensor)],))
        self.finish_load()

    def begin_load(self) -> None:
        """Wake the weights' memory; the KV cache must still sleep, or both do not fit beside the trainer."""
        if self._asleep:
            self._engine.wake_up(tags=["weights"])
        self._engine.collective_rpc("rlvr_begin")

    def load_pieces(self, path: str, pieces: list[Piece]) -> None:
        """Take over what the shared buffer holds."""
        self._engine.collective_rpc("rlvr_take_pieces", args=(path, pieces))

    def finish_load(self) -> None:
        """Put the weights to use, forget what was computed with the old ones, wake the KV cache."""
        self._engine.collective_rpc("rlvr_finish")
        if self._asleep:
            self._engine.wake_up(tags=["kv_cache"])
            self._asleep = False
        self._engine.reset_prefix_cache()

    def generate(self, requests: Sequence[Request]) -> Generator[list[Finished], None, None]:
        """Yield after every step the responses that it finished, often none."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._calls += 1
        numbers = {f"{self._calls}-{i}": i for i in range(len(requests))}
        try:
            for key, request in zip(numbers, requests, strict=True):
                params = SamplingParams(
                    temperature=request.temperature,
                    top_p=request.top_p,
                    top_k=request.top_k,
                    seed=request.seed,
                    max_tokens=request.max_tokens,
                    stop_token_ids=list(request.stop_ids),
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                self._engine.add_request(key, {"prompt_token_ids": list(request.token_ids)}, params)
            left = set(numbers)
            while left:
                finished = []
                for output in self._engine.step():
                    if not output.finished:
                        continue
                    left.discard(output.request_id)
                    finished.append(_finished(numbers[output.request_id], output))
                yield finished
        finally:
            if self._engine.has_unfinished_requests():
                self._engine.abort_request(list(numbers))
            if self._sleeps:
                # Weights are sent anew before the next generation: none are kept.
                self._engine.sleep(level=2)
                self._asleep = True

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Ln p of every token but the first, at temperature 1, in nats."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        self._calls += 1
        self._engine.add_request(f"score-{self._calls}", {"prompt_token_ids": list(token_ids)}, params)
        while True:
            for output in self._engine.step():
                if output.finished:
                    pairs = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
                    return [position[token].logprob for position, token in pairs]

    def close(self) -> None:
        """Give everything back."""
        self._engine.engine_core.shutdown()


def _on_cpu(settings: ServerSettings) -> dict[str, Any]:
    return {
        # Prompts of a hundred tokens should share blocks; the kernels want multiples of 32.
        "block_size": 32,
        # A prompt in two chunks rewinds its request's generator, which a CPU generator cannot (vLLM 0.32).
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, settings.max_model_len),
    }


def _finished(number: int, output: Any) -> Finished:
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with {completion.finish_reason!r}")
    # logprobs=0: one position is one token, the sampled one.
    logprobs = completion.logprobs.logprobs if completion.token_ids else ()
    return Finished(
        number,
        tuple(completion.token_ids),
        tuple(logprobs),
        completion.finish_reason,
        output.num_cached_tokens or 0,
    )


class WeightWorker:
    """Mixed into every vLLM worker: takes weights over, layer by layer, and puts them to use."""

    vllm_config: Any
    model_runner: Any
    model_config: Any
    _reader: WeightReader | None = None

    def rlvr_begin(self) -> None:
        """Prepare every layer to be loaded anew."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with self._context():
            initialize_layerwise_reload(self.model_runner.get_model())

    def rlvr_take(self, weights: list[tuple[str, Tensor]]) -> None:
        """Load full tensors under the names of the Hugging Face model."""
        with self._context(), torch.no_grad():
            self.model_runner.get_model().load_weights(weights)

    def rlvr_take_pieces(self, path: str, pieces: list[Piece]) -> None:
        """Load what has become whole with these pieces."""
        if self._reader is None:
            self._reader = WeightReader(path)
        self.rlvr_take(list(self._reader.take(pieces)))

    def rlvr_finish(self) -> None:
        """Put the new weights in the kernels' form, in the place of the old."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.get_model()
        with self._context():
            finalize_layerwise_reload(model, self.model_config)
        self.rlvr_repack(model)

    def rlvr_repack(self, model: Any) -> None:
        """Pack a tied head again: on a CPU it has a packed copy of the embedding, which no reload renews."""
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        head = getattr(model, "lm_head", None)
        if hasattr(head, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    def _context(self) -> Any:
        from vllm.config import set_current_vllm_config

        return set_current_vllm_config(self.vllm_config)


# The engine's own process
# -----------------------------------------------------------------------------------------------------


def serve(connection: Connection) -> None:
    """Answer one request after the other until the other end says ``close``, or is gone.

    What goes wrong is said to the other end, and raised for the log.
    """
    settings, path = connection.recv()
    try:
        server = VllmServer(settings)
    except Exception as error:
        connection.send(("error", _said(error)))
        raise
    connection.send(("ok", None))
    while True:
        kind, *arguments = _next(connection)
        if kind == "stop":
            continue  # it crossed the last response
        try:
            if kind == "generate":
                kind = _generate(server, connection, *arguments)
            elif kind != "close":
                calls: dict[str, Callable[..., object]] = {
                    "begin": server.begin_load,
                    "pieces": lambda pieces: server.load_pieces(path, pieces),
                    "finish": server.finish_load,
                    "score": server.score,
                }
                connection.send(("ok", calls[kind](*arguments)))
        except Exception as error:
            connection.send(("error", _said(error)))
            raise
        if kind == "close":
            server.close()
            return


def _next(connection: Connection) -> tuple[Any, ...]:
    """Return the next message; the trainer being gone is its wish to close."""
    try:
        message: tuple[Any, ...] = connection.recv()
    except EOFError:
        return ("close",)
    return message


def _generate(server: VllmServer, connection: Connection, requests: list[Request]) -> str:
    """Send responses as they finish; return what came meanwhile, ``stop`` or ``close``, or nothing."""
    said = time.monotonic()
    steps = server.generate(requests)
    for finished in steps:
        if connection.poll():
            steps.close()
            if (wish := str(_next(connection)[0])) == "close":
                return wish
            break
        if finished or time.monotonic() - said > HEARTBEAT_S:
            said = time.monotonic()
            connection.send(("finished", finished))
    connection.send(("ok", None))
    return ""


def _said(error: Exception) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _die_with(parent: int) -> None:
    """End this process and its workers once the trainer is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Entry point: file descriptor of the connection, process id of the trainer."""
    descriptor, parent = map(int, sys.argv[1:])
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    serve(Connection(descriptor))
