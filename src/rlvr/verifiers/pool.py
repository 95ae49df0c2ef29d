"""Worker processes that compare answers, each under a deadline and a memory limit."""

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

START_S = 60.0
"""Seconds that a worker may take to start; the deadline counts from then."""


def then(future: Future[T], function: Callable[[Future[T]], R]) -> Future[R]:
    """Return what ``function`` makes of a future when that is done; its errors too."""
    result: Future[R] = Future()

    def done(future: Future[T]) -> None:
        try:
            result.set_result(function(future))
        except Exception as error:
            result.set_exception(error)

    future.add_done_callback(done)
    return result


class VerifierError(RuntimeError):
    """No verdict: out of time or memory, or the worker died. Says nothing about the answer."""


class WorkerPool:
    """Compares answers in processes of its own; killed at the deadline, and replaced.

    Nothing starts before the first request. A worker is a fresh interpreter that imports sympy and no torch;
    it shares nothing with the threads of this process. One daemon thread owns one worker, which ends with it,
    also where this process is killed.

    Args:
        workers: processes at a time.
        deadline_s: seconds for one comparison.
        memory_mib: address space of one worker, MiB.
        rel_tol: how far a number may be from the gold one, as a share of it.
    """

    def __init__(
        self, workers: int = 2, *, deadline_s: float = 3.0, memory_mib: int = 1024, rel_tol: float = 0.0
    ) -> None:
        self.workers, self.deadline_s, self.memory_mib, self.rel_tol = (
            workers,
            deadline_s,
            memory_mib,
            rel_tol,
        )
        self._requests: queue.SimpleQueue[tuple[Future[bool], str, str] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._running: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, gold: str, answer: str) -> Future[bool]:
        """Compare two answers while the caller goes on.

        Returns:
            Whether they are the same; or a ``VerifierError``.
        """
        future: Future[bool] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(VerifierError("the pool is closed"))
                return future
            self._requests.put((future, gold, answer))
            if len(self._threads) < self.workers:
                thread = threading.Thread(target=self._serve, name="rlvr-verifier", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def close(self) -> None:
        """End all workers; what they had not answered gets an error."""
        with self._lock:
            self._closed = True
            for worker in self._running:
                worker.process.kill()
        for _ in self._threads:
            self._requests.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        worker: _Worker | None = None
        while (request := self._requests.get()) is not None:
            future, gold, answer = request
            if worker is not None and worker.process.poll() is not None:  # killed while it had nothing to do
                self._end(worker)
                worker = None
            try:
                worker = worker or self._start()
                future.set_result(worker.same(gold, answer, self.deadline_s))
            except Exception as error:
                # Also one that could go on is replaced: after a MemoryError nothing of it can be trusted.
                if worker is not None:
                    self._end(worker)
                worker = None
                problem = error if isinstance(error, VerifierError) else VerifierError(f"{error!r}")
                future.set_exception(problem)
        if worker is not None:
            self._end(worker)

    def _start(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise VerifierError("the pool is closed")
            worker = _Worker(self.deadline_s, self.memory_mib, self.rel_tol)
            self._running.add(worker)
        return worker

    def _end(self, worker: "_Worker") -> None:
        with self._lock:
            self._running.discard(worker)
        worker.end()


class _Worker:
    """One process, used by the thread that made it."""

    def __init__(self, deadline_s: float, memory_mib: int, rel_tol: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlvr.answers.worker"]
            + [str(os.getpid()), str(deadline_s), str(memory_mib), str(rel_tol)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # It finds the same packages as this process.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self._ready = False
        self._buffer = b""

    def same(self, gold: str, answer: str, deadline_s: float) -> bool:
        """Ask, and wait until the deadline."""
        if not self._ready:
            self._line(START_S, f"the worker did not start within {START_S:.0f} s")
            self._ready = True
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise VerifierError("the worker died") from error
        reply = json.loads(self._line(deadline_s, f"timeout after {deadline_s:g} s"))
        if "error" in reply:
            raise VerifierError(reply["error"])
        return bool(reply["same"])

    def _line(self, wait_s: float, late: str) -> bytes:
        assert self.process.stdout is not None
        file, end = self.process.stdout.fileno(), time.monotonic() + wait_s
        while b"\n" not in self._buffer:
            poll = select.poll()  # select() takes no descriptor above 1023
            poll.register(file, select.POLLIN)
            left = end - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise VerifierError(late)
            if not (chunk := os.read(file, 65536)):
                raise VerifierError("the worker died")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def end(self) -> None:
        """Kill the process and wait for it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not written yet has nobody to read it
                pipe.close()
