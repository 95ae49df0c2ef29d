"""Rows of problems, from JSONL, Parquet or the Hugging Face hub, and the prompts made of them."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlvr.answers.extraction import gold_answer
from rlvr.batch import Prompt
from rlvr.errors import ConfigError

OnError = Literal["refuse", "skip"]
PROMPT_KEYS = ("prompt", "question", "problem")
ANSWER_KEYS = ("answer", "solution", "reward_model.ground_truth")
"""What most data sets call them; the last is verl's."""


@dataclass(frozen=True)
class Malformed:
    """A row that cannot be read, and why."""

    why: str


Row = tuple[int, dict[str, Any] | Malformed]
"""A row with its number: the line of a JSONL file, the place in any other set; 1-based."""


@dataclass(frozen=True)
class ProblemFormat:
    r"""Where a row holds problem and answer, and how the problem is put to the policy.

    Args:
        prompt_key: field that holds the problem; of several names the first that a row has. Dots lead into
            nested fields; of a list of chat messages, the last user message counts.
        prompt_until: the problem ends at the last occurrence of this mark, if there (an instruction that the
            data set appends).
        answer_key: field that holds the answer, likewise; a list of texts in it is one answer. Of a whole
            solution the last ``\boxed{}`` counts, see :func:`rlvr.answers.extraction.gold_answer`. None: the
            problems alone are wanted, and their answers are empty.
        answer_after: the answer is what follows the last occurrence of this mark in its field, if there
            (GSM8K's ``####``).
        id_key: field that holds the problem's name, likewise; the row's number where there is none.
        template: what the policy reads, with ``{prompt}`` where the problem goes; other braces stay.
        system: system message of the chat template; the template's own where empty.
    """

    prompt_key: str | Sequence[str] = PROMPT_KEYS
    prompt_until: str | None = None
    answer_key: str | Sequence[str] | None = ANSWER_KEYS
    answer_after: str | None = None
    id_key: str | Sequence[str] | None = "id"
    template: str = "{prompt}"
    system: str = ""

    def check(self, node: str) -> None:
        """Refuse what cannot make problems with answers.

        Args:
            node: where it is configured, for messages.

        Raises:
            ConfigError: for a template without ``{prompt}``, or no name for a field.
        """
        if "{prompt}" not in self.template:
            raise ConfigError(
                f"{node}.template={self.template!r}",
                "{prompt} in it, where the problem goes",
                f"{node}.template='{{prompt}}'",
            )
        for name in ("prompt_key", "answer_key"):
            if not (value := getattr(self, name)):
                raise ConfigError(f"{node}.{name}={value}", "the name of a field", f"{node}.{name}=NAME")

    def prompt(self, number: int, row: dict[str, Any], index: int) -> Prompt:
        """Make a prompt of one row.

        Raises:
            ValueError: for a field that is missing, empty, or no text; it says which and why.
        """
        problem = _text(row, self.prompt_key)
        if self.prompt_until and not (problem := problem.rsplit(self.prompt_until, 1)[0].strip()):
            raise ValueError(f"nothing before {self.prompt_until!r} in the problem")
        answer = "" if self.answer_key is None else self._answer(row)
        named = any(_field(row, key) is not None for key in _names(self.id_key))
        return Prompt(
            index=index,
            id=_text(row, self.id_key) if named else str(number),
            text=self.template.replace("{prompt}", problem),
            answer=answer,
            system=self.system,
        )

    def _answer(self, row: dict[str, Any]) -> str:
        answer = _text(row, self.answer_key, several=True)
        if self.answer_after:
            answer = answer.rsplit(self.answer_after, 1)[-1]
        if not (answer := gold_answer(answer)):
            raise ValueError("no answer in the answer's field")
        return answer


def read_rows(path: str, *, setting: str = "task.path") -> list[Row]:
    """Read a set of problems; what is wrong with single rows is left to :func:`prompts_from`.

    Args:
        path: a ``.jsonl`` file with one object a line, blank ones passed over; a ``.parquet`` file; or
            ``SET``, ``SET:SPLIT`` or ``SET:CONFIGURATION:SPLIT``, where a set is a hub id or a folder that
            ``datasets`` reads and the split is ``train`` where none is given. Parquet and sets need the
            ``hub`` extra.
        setting: where the path stands, for messages.

    Raises:
        ConfigError: for what is not there or cannot be read, or a missing extra.
    """
    file = Path(path)
    if file.suffix == ".parquet":
        return _read_parquet(_existing(file, setting), setting)
    if file.suffix in (".jsonl", ".json") or file.is_file():
        return _read_jsonl(_existing(file, setting))
    return _read_set(path, setting)


def prompts_from(
    rows: Iterable[Row],
    path: str,
    form: ProblemFormat,
    *,
    on_error: OnError = "refuse",
    fix: str = "task.on_error=skip, or task.prompt_key=NAME task.answer_key=NAME",
) -> list[Prompt]:
    """Make prompts of rows, in their order; all that are malformed are reported together.

    Args:
        rows: of :func:`read_rows`.
        path: where they are from, for messages.
        form: how a row is read.
        on_error: ``refuse`` malformed rows, or ``skip`` them and say so on stderr.
        fix: the override that mends it, for messages.

    Returns:
        Not yet encoded; ``index`` is the position among those that are left.

    Raises:
        ConfigError: for malformed rows, unless they are skipped, or where no row is left.
    """
    if on_error not in get_args(OnError):
        raise ConfigError(
            f"task.on_error={on_error}", f"one of {', '.join(get_args(OnError))}", "task.on_error=skip"
        )
    prompts: list[Prompt] = []
    wrong: list[str] = []
    for number, row in rows:
        try:
            if isinstance(row, Malformed):
                raise ValueError(row.why)
            prompts.append(form.prompt(number, row, len(prompts)))
        except ValueError as error:
            wrong.append(f"{path}:{number}: {error}")
    if wrong:
        shown = "; ".join(wrong[:_SHOWN]) + (f"; and {len(wrong) - _SHOWN} more" if wrong[_SHOWN:] else "")
        malformed = f"{len(wrong)} malformed row{'s' * (len(wrong) > 1)} of {len(wrong) + len(prompts)}"
        if on_error == "refuse":
            raise ConfigError(f"{malformed}: {shown}", "a problem and its answer in every row", fix)
        print(f"left out {malformed}: {shown}", file=sys.stderr)
    if not prompts:
        raise ConfigError(f"{path}", "at least one problem", fix)
    return prompts


_SHOWN = 5
"""Malformed rows that a message names."""


def _names(keys: str | Sequence[str] | None) -> Sequence[str]:
    return (keys,) if isinstance(keys, str) else keys or ()


def _field(row: dict[str, Any], key: str) -> Any:
    """The value under a name, or down a dotted path; None where there is none."""
    value: Any = row
    if key in row:
        return row[key]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _text(row: dict[str, Any], keys: str | Sequence[str] | None, *, several: bool = False) -> str:
    """The text under the first of the keys that the row has; of ``several``, a list joined by commas."""
    key, value = next(
        ((key, value) for key in _names(keys) if (value := _field(row, key)) is not None), (None, None)
    )
    if key is None:
        there = ", ".join(map(str, row)) or "nothing"
        raise ValueError(f"nothing under {' or '.join(_names(keys))} (the row has {there})"[:300])
    if several and isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ", ".join(value)
    said = _last_user_message(value) if isinstance(value, list) else value
    if isinstance(said, bool) or not isinstance(said, str | int | float):
        raise ValueError(f"{key} is no text: {value!r}"[:100])
    if isinstance(said, float) and not math.isfinite(said):
        raise ValueError(f"{key} is no number: {said}")
    text = str(said).strip()
    if not text:
        raise ValueError(f"{key} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} holds half a surrogate pair, at character {error.start}") from None
    return text


def _last_user_message(messages: list[Any]) -> Any:
    said = (m.get("content") for m in reversed(messages) if isinstance(m, dict) and m.get("role") == "user")
    return next(said, None)


def _existing(file: Path, setting: str) -> Path:
    if not file.is_file():
        raise ConfigError(f"{setting}={file}", "an existing file", f"{setting}=FILE.jsonl")
    return file


def _read_jsonl(file: Path) -> list[Row]:
    rows: list[Row] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested without end
                rows.append((number, Malformed(f"no JSON ({error})")))
                continue
            good = isinstance(row, dict)
            rows.append((number, row if good else Malformed(f"no JSON object but a {type(row).__name__}")))
    return rows


def _read_parquet(file: Path, setting: str) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{setting}={file}",
            "the extra that reads Parquet: pip install 'rlvr[hub]'",
            f"{setting}=FILE.jsonl",
        ) from error
    try:
        table = pyarrow.parquet.read_table(file)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{setting}={file}", f"a Parquet file ({_first_line(error)})", f"{setting}=FILE.parquet"
        ) from error
    try:
        return list(enumerate(table.to_pylist(), start=1))
    except UnicodeDecodeError:  # somewhere; row by row, to find out where
        return [(i + 1, _parquet_row(table.slice(i, 1))) for i in range(table.num_rows)]


def _parquet_row(table: Any) -> dict[str, Any] | Malformed:
    try:
        row: dict[str, Any] = table.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Malformed(f"no UTF-8 ({error})")
    return row


def _read_set(path: str, setting: str) -> list[Row]:
    name, *rest = path.split(":")
    if not name or len(rest) > 2:
        raise ConfigError(
            f"{setting}={path}",
            "a file, or a data set as SET, SET:SPLIT or SET:CONFIGURATION:SPLIT",
            f"{setting}=FILE.jsonl",
        )
    *configuration, split = rest or ["train"]
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise ConfigError(
            f"{setting}={path}",
            "a file, or the extra that reads data sets: pip install 'rlvr[hub]'",
            f"{setting}=FILE.jsonl",
        ) from error
    load: Callable[..., Iterable[Any]] = load_dataset
    try:
        if Path(name, "state.json").is_file():  # what save_to_disk leaves
            found: Iterable[Any] = load_from_disk(name)
        else:
            found = load(name, *configuration, split=split)
        return [(number, dict(row)) for number, row in enumerate(found, start=1)]
    except Exception as error:  # whatever the library says: no network, no such set, no such split
        raise ConfigError(
            f"{setting}={path}",
            f"a file or a data set on the hub ({_first_line(error)})",
            f"{setting}=FILE.jsonl",
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
