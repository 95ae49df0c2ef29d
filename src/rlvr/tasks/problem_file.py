"""Problems from a JSONL file or the Hugging Face hub."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlvr.batch import Prompt
from rlvr.errors import ConfigError
from rlvr.keyed import generator


class ProblemFile:
    r"""A data set of problems with final answers, split into training and held-out ones.

    Args:
        path: a ``.jsonl`` file with one object a line, or a hub id (needs the ``hub`` extra and a network).
        prompt_key: field that holds the problem.
        answer_key: field that holds the answer.
        answer_after: the answer is what follows the last occurrence of this mark in its field, if there
            (GSM8K's ``####``).
        instruction: put after the problem, on a line of its own.
        heldout: problems kept from training, drawn with ``split_seed``.
        split_seed: of the split, independent of the run's seed, so that runs share their held-out problems.
        chat: put prompts through the tokenizer's chat template.
        hub_config: configuration name on the hub.
        hub_split: split on the hub.

    Raises:
        ConfigError: for a file that is not there, a line that is no problem (with its number), or too few
            problems.
    """

    def __init__(
        self,
        path: str,
        *,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        answer_after: str | None = None,
        instruction: str = "",
        heldout: int = 64,
        split_seed: int = 0,
        chat: bool = True,
        hub_config: str | None = None,
        hub_split: str = "train",
    ) -> None:
        self.chat = chat
        self.path = path
        if path.endswith((".jsonl", ".json")) or Path(path).exists():
            rows = _read_jsonl(Path(path))
        else:
            rows = _read_hub(path, hub_config, hub_split)

        def text_of(row: dict[str, Any], number: int) -> tuple[str, str, str]:
            for key in (prompt_key, answer_key):
                if not isinstance(row.get(key), str | int | float):
                    raise ConfigError(
                        f"task.path={path}, row {number}: {key}={row.get(key)!r}",
                        f"a text under {key!r} (the row has {', '.join(map(str, row))})",
                        "task.prompt_key=... task.answer_key=...",
                    )
            answer = str(row[answer_key])
            if answer_after is not None:
                answer = answer.rsplit(answer_after, 1)[-1]
            text = f"{row[prompt_key]}\n{instruction}" if instruction else str(row[prompt_key])
            return str(row.get("id", number)), text, answer.strip()

        problems = [text_of(row, number) for number, row in rows]
        if len(problems) <= heldout or heldout < 1:
            raise ConfigError(
                f"task.heldout={heldout}",
                f"from 1 to fewer than the {len(problems)} problems",
                "task.heldout=64",
            )
        order = generator(split_seed, "split").permutation(len(problems)).tolist()
        self._heldout = _prompts(problems, sorted(order[:heldout]))
        # A problem that stands in the file twice must not be trained on where its twin is held out.
        kept = {prompt.text for prompt in self._heldout}
        self._train = _prompts(problems, [i for i in sorted(order[heldout:]) if problems[i][1] not in kept])

    def train(self) -> Sequence[Prompt]:
        """Problems to train on, in file order."""
        return self._train

    def heldout(self) -> Sequence[Prompt]:
        """Problems kept from training, in file order."""
        return self._heldout


def _prompts(problems: list[tuple[str, str, str]], chosen: list[int]) -> list[Prompt]:
    return [
        Prompt(index=index, id=problems[i][0], text=problems[i][1], answer=problems[i][2])
        for index, i in enumerate(chosen)
    ]


def _read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Rows with their line numbers, 1-based; blank lines are passed over."""
    if not path.is_file():
        raise ConfigError(f"task.path={path}", "an existing .jsonl file", "task.path=FILE.jsonl")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested without end
                raise ConfigError(
                    f"{path}:{number}", f"one JSON object a line ({error})", "task.path=FILE"
                ) from error
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{path}:{number}", f"a JSON object, got {type(row).__name__}", "task.path=FILE"
                )
            rows.append((number, row))
    return rows


def _read_hub(path: str, config: str | None, split: str) -> list[tuple[int, dict[str, Any]]]:
    fix = "task.path=FILE.jsonl"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"task.path={path}", "a file, or the extra that reads hub ids: pip install 'rlvr[hub]'", fix
        ) from error
    load: Callable[..., Iterable[Any]] = load_dataset
    try:
        return [(number, dict(row)) for number, row in enumerate(load(path, config, split=split), start=1)]
    except Exception as error:  # whatever the hub client says: no network, no such set, no such split
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"task.path={path}", f"a file or a data set on the hub ({reason})", fix) from error
