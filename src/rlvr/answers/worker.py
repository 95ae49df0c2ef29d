"""A process that compares answers: requests on standard input, replies on standard output, JSON lines.

    python -P -m rlvr.answers.worker PARENT_PID DEADLINE_S MEMORY_MIB REL_TOL

The first line says that it is ready. A request is ``[gold, answer]``, a reply ``{"same": bool}`` or
``{"error": why}``. Whoever started it kills it at the deadline; it ends by itself with its parent, however
that ended.
"""

import contextlib
import ctypes
import functools
import json
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until standard input ends."""
    parent, deadline_s, memory_mib = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    rel_tol = float(sys.argv[4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, meant for the run
    _end_with(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Libraries may print; replies have a stream of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    from rlvr.answers.comparison import equivalent
    from rlvr.answers.symbolic import same_formula

    leaf = functools.partial(same_formula, rel_tol=rel_tol)
    # What parser and sympy load at first use is not on the first answer's time.
    same_formula(r"2\sqrt{3}", r"\sqrt{12}")
    with contextlib.suppress(ValueError, OSError):  # where a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20, memory_mib * 2**20))
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin.buffer:
        gold, answer = json.loads(line)
        _bound_cpu(deadline_s)
        reply: dict[str, bool | str]
        try:
            reply = {"same": equivalent(gold, answer, leaf, rel_tol=rel_tol)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {str(error)[:80]}"}
        print(json.dumps(reply), file=replies, flush=True)


def _end_with(parent: int) -> None:
    """Be killed when the thread that started this process ends; at once if it has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def _bound_cpu(deadline_s: float) -> None:
    """Let the kernel end a request that outlives whoever should have killed it, where there is no prctl."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime + 2 * deadline_s) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
