"""Problems from a file or the Hugging Face hub: each of them once, split into training and held-out ones."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from rlvr.answers.canonical import canonical
from rlvr.batch import Prompt
from rlvr.errors import ConfigError
from rlvr.keyed import generator
from rlvr.tasks.rows import (
    ANSWER_KEYS,
    PROMPT_KEYS,
    Malformed,
    OnError,
    ProblemFormat,
    Row,
    prompts_from,
    read_rows,
)


class ProblemFile:
    r"""A data set of problems with final answers.

    Problems that differ in white space alone are one. Where its copies have different answers, none is
    trusted, and the problem is left out; other notations of one answer are no conflict. Both are said on
    stderr.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file, or a data set as ``SET``, ``SET:SPLIT`` or
            ``SET:CONFIGURATION:SPLIT``, see :func:`rlvr.tasks.rows.read_rows`.
        prompt_key: field that holds the problem, or several names of which a row's first counts; dots lead
            into nested fields, and of chat messages the last user message counts.
        prompt_until: the problem ends at the last occurrence of this mark, if there (an instruction that the
            data set appends).
        answer_key: field that holds the answer, likewise; of a whole solution the last ``\boxed{}`` counts.
        answer_after: the answer is what follows the last occurrence of this mark in its field, if there
            (GSM8K's ``####``).
        id_key: field that holds the problem's name, likewise; row numbers where there is none, or for None.
        template: what the policy reads, with ``{prompt}`` where the problem goes; other braces stay.
        system: system message of the chat template; the template's own where empty.
        chat: put prompts through the tokenizer's chat template.
        heldout: number of problems kept from training, drawn with ``split_seed``; None: all of
            ``heldout_path``.
        heldout_path: draw them from this file or data set instead. A training problem that stands anywhere in
            it is left out, whatever is wrong with its answer there.
        split_seed: of the draw, independent of the run's seed, so that runs share their held-out problems.
        on_error: ``refuse`` malformed rows, all in one message, or ``skip`` them and say so.

    Raises:
        ConfigError: for what is not there or cannot be read, malformed rows, two problems of one name, too
            few problems, or a system message without the chat template.
    """

    def __init__(
        self,
        path: str,
        *,
        prompt_key: str | Sequence[str] = PROMPT_KEYS,
        prompt_until: str | None = None,
        answer_key: str | Sequence[str] = ANSWER_KEYS,
        answer_after: str | None = None,
        id_key: str | Sequence[str] | None = "id",
        template: str = "{prompt}",
        system: str = "",
        chat: bool = True,
        heldout: int | None = 64,
        heldout_path: str | None = None,
        split_seed: int = 0,
        on_error: OnError = "refuse",
    ) -> None:
        if system and not chat:
            raise ConfigError(
                f"task.system={system!r}", "the chat template, which has a place for it", "task.chat=true"
            )
        self.chat, self.path, self.on_error = chat, path, on_error
        self.form = ProblemFormat(
            prompt_key=prompt_key,
            prompt_until=prompt_until,
            answer_key=answer_key,
            answer_after=answer_after,
            id_key=id_key,
            template=template,
            system=system,
        )
        self.form.check("task")
        train = self._problems(read_rows(path), path, "task.path")
        if heldout_path is None:
            pool, most, limit = train, len(train) - 1, f"fewer than the {len(train)} problems"
        else:
            rows = read_rows(heldout_path, setting="task.heldout_path")
            pool = self._problems(rows, heldout_path, "task.heldout_path")
            most, limit = len(pool), f"the {len(pool)} problems of {heldout_path}, or null for all"
            heldout = len(pool) if heldout is None else heldout
        if heldout is None or not 1 <= heldout <= most:
            raise ConfigError(
                f"task.heldout={heldout}", f"from 1 to {limit}", f"task.heldout={min(64, most)}"
            )
        order = generator(split_seed, "split").permutation(len(pool)).tolist()
        self._heldout = _numbered([pool[i] for i in sorted(order[:heldout])])
        texts = [prompt.text for prompt in self._heldout] if heldout_path is None else self._texts(rows)
        kept_out = set(map(_bare, texts))
        self._train = _numbered([prompt for prompt in train if _bare(prompt.text) not in kept_out])
        if heldout_path is not None and (shared := len(train) - len(self._train)):
            print(f"{path}: left out: problems that stand in {heldout_path}, {shared}", file=sys.stderr)
        if not self._train:
            raise ConfigError(
                f"task.heldout_path={heldout_path}", f"not every problem of {path} in it", "another file"
            )

    def train(self) -> Sequence[Prompt]:
        """Problems to train on, in file order."""
        return self._train

    def heldout(self) -> Sequence[Prompt]:
        """Problems kept from training, in file order."""
        return self._heldout

    def _texts(self, rows: Iterable[Row]) -> Iterator[str]:
        """The problems of all rows that hold one, with or without an answer."""
        form = replace(self.form, answer_key=None, id_key=None)
        for number, row in rows:
            if not isinstance(row, Malformed):
                with suppress(ValueError):
                    yield form.prompt(number, row, 0).text

    def _problems(self, rows: Iterable[Row], path: str, setting: str) -> list[Prompt]:
        """The problems of a file or data set, each once."""
        prompts = prompts_from(rows, path, self.form, on_error=self.on_error)
        copies: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            copies.setdefault(_bare(prompt.text), []).append(prompt)
        distinct: list[Prompt] = []
        doubtful: list[Prompt] = []
        for same in copies.values():
            agreed = len(same) == 1 or len({_bare(canonical(prompt.answer)) for prompt in same}) == 1
            (distinct if agreed else doubtful).append(same[0])
        if merged := len(prompts) - len(copies):
            print(f"{path}: left out: copies of other problems, {merged}", file=sys.stderr)
        if doubtful:
            some = ", ".join(prompt.id for prompt in doubtful[:_SHOWN]) + ", ..." * (len(doubtful) > _SHOWN)
            print(
                f"{path}: left out: problems whose copies have different answers, {len(doubtful)} ({some})",
                file=sys.stderr,
            )
        names: set[str] = set()
        for prompt in distinct:
            if prompt.id in names:
                raise ConfigError(
                    f"{setting}={path}: two problems named {prompt.id!r}", "one name each", "task.id_key=null"
                )
            names.add(prompt.id)
        return distinct


_SHOWN = 5
"""Problems that a message names."""


def _bare(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def _numbered(prompts: list[Prompt]) -> list[Prompt]:
    return [replace(prompt, index=index) for index, prompt in enumerate(prompts)]
