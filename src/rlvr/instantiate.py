"""From a composed configuration to objects, with all that can be wrong said before anything is loaded."""

import inspect
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from rlvr.errors import ConfigError

if TYPE_CHECKING:
    from rlvr.benchmarks import Benchmark
    from rlvr.tasks import Task
    from rlvr.verifiers import Verifier

CONF = Path(__file__).parent / "conf"
if not CONF.exists():  # an editable install reads the checkout's own
    CONF = Path(__file__).parents[2] / "conf"

TOP_LEVEL = [
    "policy",
    "task",
    "engine",
    "verifier",
    "benchmark",
    "algorithm",
    "correction",
    "clip",
    "regions",
    "callbacks",
    "trainer",
    "logger",
    "data",
    "evaluation",
    "checkpoint",
    "export",
    "seed",
    "ckpt_path",
    "threads",
    "plan",
    "hardware",
]
REFUSED_TRAINER_KEYS = {
    "gradient_clip_val": "algorithm.gradient_clip=1.0",
    "accumulate_grad_batches": "data.minibatches=8",
    "max_steps": "trainer.max_epochs=100",
    "callbacks": "+callbacks.NAME._target_=package.Class",
    "logger": "logger=tensorboard",
}
GIVEN = {
    "policy": {"deferred"},
    "engine": {"policy", "place"},
    "trainer": {"callbacks", "logger"},
    "benchmark.heldout": {"task", "verifier"},
    "benchmark.*": {"name"},
}
"""Arguments that the entry point itself hands to a node's target."""


def local_or_hub(file: str, hub: str | None = None) -> str:
    """``${local:FILE,SET}`` in a configuration: a file below the folder RLVR_DATA, or a set on the hub.

    Raises:
        ConfigError: where that environment variable is not set and there is no set.
    """
    if folder := os.environ.get("RLVR_DATA"):
        return str(Path(folder) / file)
    if hub is None:
        raise ConfigError(file, "the folder that holds it in RLVR_DATA", "RLVR_DATA=FOLDER")
    return hub


OmegaConf.register_new_resolver("local", local_or_hub, replace=True)


def check(cfg: DictConfig) -> None:
    """Refuse what cannot work, in one line that names the value, what was expected and the override.

    Raises:
        ConfigError: for an unknown node or argument, a node without ``_target_``, a setting of the trainer's
            that the algorithm owns, or a target that does not exist.
    """
    check_nodes(cfg, TOP_LEVEL, ("policy", "task", "engine", "verifier", "algorithm", "clip", "trainer"))
    for key, fix in REFUSED_TRAINER_KEYS.items():
        if key in cfg.trainer:
            raise ConfigError(f"trainer.{key}", "no such setting: the algorithm owns it", fix)
    for path in ("trainer.max_epochs", "checkpoint.every", "checkpoint.keep_every"):
        value = OmegaConf.select(cfg, path)
        if value is None and path == "checkpoint.keep_every":
            continue
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{path}={value}", "a number of iterations, at least 1", f"{path}=100")


def check_nodes(cfg: DictConfig, known: Collection[str], needed: Collection[str]) -> None:
    """Refuse nodes that nothing reads, nodes without ``_target_``, and arguments that a target does not take.

    Args:
        cfg: the whole configuration.
        known: names of all top-level nodes.
        needed: those that must have a ``_target_``.

    Raises:
        ConfigError: for the first that is wrong.
    """
    for key in map(str, cfg):
        if key not in known:
            raise ConfigError(f"{key}", f"one of the nodes {', '.join(known)}", f"~{key}")
    for name in needed:
        if "_target_" not in (cfg[name] or {}):
            raise ConfigError(
                f"{name}", "a node with _target_", f"{name}=<one of {', '.join(_choices(name))}>"
            )
    for group in ("callbacks", "benchmark"):
        for name, node in (cfg.get(group) or {}).items():
            if not isinstance(node, DictConfig) or "_target_" not in node:
                raise ConfigError(
                    f"{group}.{name}", "a node with _target_", f"+{group}.{name}._target_=package.Class"
                )
    for path, node in _targets(cfg, ""):
        _check_signature(path, node)


def build(cfg: DictConfig, path: str, /, **given: Any) -> Any:
    """Instantiate the node at ``path``; what its constructor refuses becomes one line.

    Args:
        cfg: the whole configuration.
        path: dotted, for instance ``callbacks.samples``.
        given: further arguments, for targets that take them.
    """
    node = OmegaConf.select(cfg, path)
    given = {name: value for name, value in given.items() if _takes(node, name)}
    try:
        return instantiate(node, _convert_="all", **given)
    except (InstantiationException, InterpolationResolutionError) as error:
        cause: BaseException = error
        while not isinstance(cause, ConfigError) and (inner := cause.__cause__ or cause.__context__):
            cause = inner
        if isinstance(cause, ConfigError):
            raise cause from None
        if isinstance(cause, (ValueError, TypeError, OSError)):
            message = " ".join(str(cause).split())
            raise ConfigError(f"{path}", f"other values ({message})", f"{path}.KEY=VALUE") from error
        raise


def _takes(node: Any, name: str) -> bool:
    try:
        parameters = inspect.signature(get_object(node["_target_"])).parameters
    except (ValueError, TypeError):
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def build_benchmarks(cfg: DictConfig, task: "Task | None", verifier: "Verifier | None") -> "list[Benchmark]":
    """The benchmarks of ``cfg.benchmark``, in its order.

    Args:
        cfg: the whole configuration.
        task: whose held-out problems ``heldout`` is.
        verifier: who judges those. Others bring their own; those of equal settings share one.

    Raises:
        ConfigError: for what cannot be read, or ``heldout`` without a task.
    """
    benchmarks, verifiers = [], dict[str, Any]()
    for name, node in (cfg.benchmark or {}).items():
        path = f"benchmark.{name}"
        if name == "heldout":
            if task is None or verifier is None:
                raise ConfigError(
                    "benchmark=heldout", "the task whose held-out problems these are", "task=letters"
                )
            benchmarks.append(build(cfg, path, task=task, verifier=verifier))
            continue
        key = json.dumps(plain(node.verifier), sort_keys=True)
        if key not in verifiers:
            verifiers[key] = build(cfg, f"{path}.verifier")
        benchmarks.append(build(cfg, path, name=name, verifier=verifiers[key]))
    return benchmarks


def plain(node: DictConfig) -> dict[str, Any]:
    """A node as a dictionary of plain values, interpolations resolved."""
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _targets(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Every node below with a ``_target_``, with its dotted path."""
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        yield path, node
    for key in map(str, node):
        if not OmegaConf.is_missing(node, key):
            yield from _targets(node._get_node(key), f"{path}.{key}" if path else key)


def _check_signature(path: str, node: DictConfig) -> None:
    target = node["_target_"]
    try:
        function = get_object(target)
    except Exception as error:
        raise ConfigError(
            f"{path}._target_={target}",
            f"an importable dotted path ({' '.join(str(error).split())[:200]})",
            f"{path}._target_=package.module.Name",
        ) from error
    try:
        signature = inspect.signature(function)
    except ValueError:
        return
    parameters = signature.parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    partial = bool(node.get("_partial_", False))
    keys = {str(key) for key in node if not str(key).startswith("_")}
    if unknown := sorted(keys - set(parameters)):
        raise ConfigError(
            f"{path}.{unknown[0]}={node[unknown[0]]}",
            f"an argument of {target} ({', '.join(map(str, parameters)) or 'it takes none'})",
            f"~{path}.{unknown[0]}",
        )
    required = {
        name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
    }
    given = GIVEN.get(path, set()) | GIVEN.get(f"{path.rpartition('.')[0]}.*", set())
    missing = sorted(required - keys - given)
    if missing and not partial:
        raise ConfigError(f"{path}", f"a value for {missing[0]}", f"+{path}.{missing[0]}=VALUE")
