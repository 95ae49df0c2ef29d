"""vLLM in a process of its own: the trainer's end of the connection."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlvr.engines.vllm_server import Finished, Request, ServerSettings
from rlvr.engines.weight_stream import WeightBuffer
from rlvr.errors import EngineDiedError

START_TIMEOUT_S = 1800.0
"""Longest start, compilation of a large model included."""
START = "from rlvr.engines.vllm_server import main; main()"


class EngineProcess:
    """A :class:`rlvr.engines.vllm_server.VllmServer` in a process of its own, seen from the trainer.

    Args:
        settings: of the server.
        environment: variables beyond the trainer's own.
        dtype: that weights are sent in.
        timeout_s: longest silence in seconds.

    Attributes:
        log: file that holds what the process prints; kept where it died.
        ready: it has started.
        dead: it has ended, or does not answer.
    """

    def __init__(
        self,
        settings: ServerSettings,
        environment: dict[str, str],
        dtype: torch.dtype | None,
        timeout_s: float,
    ) -> None:
        self.dead = False
        self._dtype, self._timeout_s = dtype, timeout_s
        self.ready = False
        self._buffer = WeightBuffer()
        descriptor, name = tempfile.mkstemp(prefix="rlvr-vllm-", suffix=".log")
        self.log = Path(name)
        self._connection, theirs = Pipe()
        # Modules given by dotted path, such as the worker's, are found there as they are here.
        paths = os.pathsep.join(path for path in sys.path if path)
        try:
            self._process = subprocess.Popen(
                # Not -m: what crosses the connection must be of the same classes at both ends.
                [sys.executable, "-c", START, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**_without_ranks(os.environ), "PYTHONPATH": paths, **environment},
            )
        finally:
            theirs.close()
            os.close(descriptor)
        self._finalizer = weakref.finalize(self, _end, self._process, self._connection)
        self._send(settings, self._buffer.path)

    @property
    def pid(self) -> int:
        """Process id, which is also that of its group and session."""
        return self._process.pid

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Stream the weights: one half of the buffer is filled while the other is loaded."""
        self._wait_ready()
        self._ask("begin")
        pending = False
        for pieces in self._buffer.fill(weights, self._dtype):
            if pending:
                self._answer()
            self._send("pieces", pieces)
            pending = True
        if pending:
            self._answer()
        self._ask("finish")

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Finished]]:
        """Yield responses as they finish; leaving early ends the others."""
        self._send("generate", list(requests))
        try:
            while (message := self._receive(self._timeout_s))[0] == "finished":
                yield message[1]
        except GeneratorExit:
            self._send("stop")
            while self._receive(self._timeout_s)[0] == "finished":
                pass
            raise
        except KeyboardInterrupt:
            # Perhaps in the middle of a message: nothing after it could be read.
            self._died("interrupted")
            raise

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Ln p of every token but the first, in nats."""
        scores: list[float] = self._ask("score", list(token_ids))
        return scores

    def close(self) -> None:
        """End the process and its workers; keep its log where it died of itself."""
        if not self.dead:
            with suppress(EngineDiedError, subprocess.TimeoutExpired):
                self._send("close")
                self._process.wait(timeout=10)
            self.log.unlink(missing_ok=True)
        self._finalizer()
        self._buffer.close()
        self.dead = True

    def _wait_ready(self) -> None:
        if self.ready:
            return
        self._answer(START_TIMEOUT_S)
        self.ready = True

    def _ask(self, *message: Any) -> Any:
        self._send(*message)
        return self._answer()

    def _answer(self, timeout_s: float | None = None) -> Any:
        return self._receive(timeout_s or self._timeout_s)[1]

    def _send(self, *message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._died("it does not take messages") from error

    def _receive(self, timeout_s: float) -> tuple[str, Any]:
        try:
            if not self._connection.poll(timeout_s):
                raise self._died(f"silent for {timeout_s:.0f} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died("its process is gone") from error
        if kind == "error":
            raise self._died(value)
        return kind, value

    def _died(self, reason: str) -> EngineDiedError:
        self.dead = True
        self._finalizer()
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        reason = " ".join(reason.split())
        return EngineDiedError(f"vLLM's process {self.pid}: {reason} ({how}; log: {self.log})")


def _without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """What does not speak of the trainer's ranks, for vLLM has ranks of its own."""
    ours = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_")
    return {k: v for k, v in environment.items() if not k.startswith((*ours, "TORCHELASTIC_"))}


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    """Kill whatever is left of the process's group, and reap it."""
    connection.close()
    if process.poll() is None:
        # A process that has just died is not a zombie at once: what it died of is worth the wait.
        deadline = time.monotonic() + 0.5
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
