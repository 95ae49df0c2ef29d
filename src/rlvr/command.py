"""What the Hydra commands share: how errors are said, and lists of benchmarks as people write them."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rlvr.errors import ConfigError

WANTS_TRACEBACK = "HYDRA_FULL_ERROR" in os.environ


def run(name: str, job: Callable[[], None]) -> None:
    """Run a Hydra command; what is wrong with its configuration becomes one line and exit status 2.

    Args:
        name: of the command.
        job: what ``hydra.main`` decorates; it reads ``sys.argv``.
    """
    # Otherwise Hydra prints every exception in its own way, the composer's on several lines.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = with_lists(sys.argv[1:])
    try:
        job()
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        if WANTS_TRACEBACK:
            raise
        print(f"{name}: {_one_line(name, error)}", file=sys.stderr)
        sys.exit(2)


def leave(name: str, work: Callable[[], int]) -> None:
    """Do a job's work within Hydra, and exit with its status where that is not 0.

    A rank that leaves others behind does so at once: the interpreter's cleaning up would wait for them, and
    they wait for this one.
    """
    try:
        code = work()
    except (ConfigError, OmegaConfBaseException) as error:
        if WANTS_TRACEBACK:
            raise
        # Said here: out of the job, Hydra would print a line of its own above it.
        print(f"{name}: {_one_line(name, error)}", file=sys.stderr)
        code = 2
    except Exception:
        if not _has_ranks():
            raise
        traceback.print_exc()
        code = 1
    if code and _has_ranks():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _has_ranks() -> bool:
    """Whether this process is still connected to other ranks; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.distributed.is_initialized())


def with_lists(arguments: Sequence[str]) -> list[str]:
    """Put brackets around ``benchmark=a,b``, which Hydra would take for a sweep; not where one is wanted.

    A comma with nothing beside it counts for nothing.
    """
    if {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    return [
        f"benchmark=[{','.join(filter(None, value.split(',')))}]"
        if key == "benchmark" and "," in value and "[" not in value
        else argument
        for argument in arguments
        for key, _, value in [argument.partition("=")]
    ]


def _one_line(name: str, error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:  # OmegaConf wraps what a resolver of ours raises
        if isinstance(cause, ConfigError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    said = " ".join(str(error).split())
    if error.__cause__ is not None:
        said += " " + " ".join(str(error.__cause__).split())
    return f"{said}; expected a key or choice of the configuration; `{name} --cfg job` shows them"
