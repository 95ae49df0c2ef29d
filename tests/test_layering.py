"""A file imports only from its own layer downward (design.md, "Layout")."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "rlvr"

LAYERS = {
    "errors": 0,
    "files": 0,
    "settings": 0,
    "keyed": 0,
    "ledger": 0,
    "clipping": 0,
    "schedules": 0,
    "losses": 0,
    "advantages": 0,
    "logprobs": 0,
    "regions": 0,
    "metrics": 0,
    "scores": 0,
    "mismatch": 0,
    "answers": 0,
    "packing": 0,
    "batch": 1,
    "context": 1,
    "attention": 1,
    "policy": 1,
    "algorithm": 1,
    "tasks": 1,
    "verifiers": 1,
    "engines": 1,
    "prompts": 1,
    "benchmarks": 1,
    "responses": 1,
    "results": 1,
    "comparison": 1,
    "sources": 1,
    "rollout_metrics": 1,
    "rollouts": 1,
    "weight_sync": 1,
    "sharding": 1,
    "rank_watch": 1,
    "minibatches": 1,
    "planning": 1,
    "report": 1,
    "figures": 1,
    "module": 2,
    "strategies": 2,
    "data": 2,
    "generation": 2,
    "callbacks": 3,
    "train": 4,
    "run": 4,
    "plan": 4,
    "guards": 4,
    "instantiate": 4,
    "command": 4,
    "export": 4,
    "contamination": 4,
    "evaluate": 4,
    "evaluation": 4,
}
"""Every file, or folder, of the package; a new one without a layer fails."""

LIBRARIES = {
    "vllm": (1, 1),
    "datasets": (1, 1),
    "pyarrow": (1, 1),
    "math_verify": (0, 0),
    "latex2sympy2_extended": (0, 0),
    "sympy": (0, 0),
    "transformers": (1, 4),
    "lightning": (2, 4),
    "hydra": (4, 4),
    "omegaconf": (4, 4),
}
"""Layers, first and last, that may import a library."""

FILES = sorted(SRC.rglob("*.py"))


def part(path: Path) -> str:
    """The file or folder right below the package that a file belongs to."""
    return path.relative_to(SRC).with_suffix("").parts[0]


def imports(path: Path) -> list[tuple[str, int]]:
    """Dotted names that a file imports anywhere in it, lazily too, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module
            # `from rlvr import schedules` imports a part; `from rlvr.batch import Prompt` a name of one.
            deeper = node.module == "rlvr"
            found += [(f"rlvr.{a.name}" if deeper else node.module, node.lineno) for a in node.names]
    return found


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(SRC))) for path in FILES])
def test_imports_only_downward(path: Path) -> None:
    name = part(path)
    if name == "__init__":
        assert all(module.split(".")[0] == "importlib" for module, _ in imports(path))
        return
    assert name in LAYERS, f"{path}: give {name} a layer, here and in design.md"
    for module, line in imports(path):
        top, *rest = module.split(".")
        if top == "rlvr":
            assert rest, f"{path}:{line} imports the package itself"
            assert LAYERS[rest[0]] <= LAYERS[name], f"{path}:{line} imports upward: {module}"
        if top in LIBRARIES:
            first, last = LIBRARIES[top]
            assert first <= LAYERS[name] <= last, f"{path}:{line}: layer {LAYERS[name]} imports {module}"
        if top == "vllm":
            assert path.name == "vllm_server.py", f"{path}:{line}: engines/vllm_server.py alone imports vllm"
        if top in ("sympy", "math_verify", "latex2sympy2_extended"):
            assert path.name == "symbolic.py", f"{path}:{line}: answers/symbolic.py alone imports {top}"
        if name == "answers":  # a worker imports it: torch would be seconds and hundreds of MiB in each
            assert top != "torch", f"{path}:{line}: workers import no torch"
            assert top != "rlvr" or rest[0] == "answers", f"{path}:{line}: answers imports {module}"


def test_nothing_stands_in_the_table_that_is_not_there() -> None:
    assert set(LAYERS) == {part(path) for path in FILES} - {"__init__"}


def test_no_catch_all_modules() -> None:
    assert not {path.stem for path in FILES} & {"utils", "helpers", "registry", "base", "common", "misc"}
