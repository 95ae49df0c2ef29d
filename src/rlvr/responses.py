"""The responses of an evaluation, kept as they come, and whose they are."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlvr.batch import FinishReason, Prompt, Rollout, Verdict
from rlvr.errors import ConfigError
from rlvr.files import write_whole

RESPONSES = "responses.jsonl"
FACTS = "evaluation.json"


@dataclass(frozen=True)
class Response:
    """One judged response: a line of ``responses.jsonl``.

    Args:
        benchmark: its name.
        index: position of the problem in the benchmark.
        problem: its name.
        sample: number among the problem's responses.
        prompt: the problem as text, without chat template.
        gold: the right answer.
        response: what the policy wrote, without special tokens.
        tokens: their number, stop token included.
        finish_reason: ``stop``, or ``length`` where it was cut.
        correct: the verdict.
        answer: what was answered; None where there was no answer.
        reason: of the verdict; one that starts with ``verifier error`` is none.
    """

    benchmark: str
    index: int
    problem: str
    sample: int
    prompt: str
    gold: str
    response: str
    tokens: int
    finish_reason: str
    correct: bool
    answer: str | None
    reason: str

    @classmethod
    def of(cls, benchmark: str, rollout: Rollout, verdict: Verdict) -> "Response":
        """What is kept of a rollout and its verdict."""
        prompt = rollout.prompt
        return cls(
            benchmark=benchmark,
            index=prompt.index,
            problem=prompt.id,
            sample=rollout.sample,
            prompt=prompt.text,
            gold=prompt.answer,
            response=rollout.text,
            tokens=len(rollout.token_ids),
            finish_reason=rollout.finish_reason,
            correct=verdict.correct,
            answer=verdict.answer,
            reason=verdict.reason,
        )

    @property
    def unjudged(self) -> bool:
        """Whether the verifier failed on it; it counts as wrong."""
        return self.reason.startswith("verifier error")

    def rollout(self, prompt: Prompt) -> Rollout:
        """The response to ``prompt`` as a verifier reads it: the text, without tokens."""
        reason: FinishReason = "length" if self.finish_reason == "length" else "stop"
        return Rollout(prompt, self.sample, (), (), reason, self.response)

    def judged(self, verdict: Verdict) -> "Response":
        """The same response with another verdict."""
        return replace(self, correct=verdict.correct, answer=verdict.answer, reason=verdict.reason)


def read_responses(path: Path) -> list[Response]:
    """The responses of a file, none where there is no file; a last line without its end is passed over.

    Of several lines for one response the last counts.

    Raises:
        ConfigError: for another line that is no response.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    responses: dict[tuple[str, int, int], Response] = {}
    for number, line in enumerate(lines, start=1):
        try:
            response = Response(**json.loads(line))
            responses[_key(response)] = response
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}:{number}", f"a response ({error})", "another hydra.run.dir") from error
    return list(responses.values())


class ResponseFile:
    """Appends responses to ``responses.jsonl``, each line whole; what a killed process left counts.

    Args:
        folder: of the evaluation.

    Raises:
        ConfigError: for a file that holds something else.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / RESPONSES
        self._known = {_key(response): response for response in read_responses(path)}
        self._file = path.open("ab", buffering=0)
        # A line that a kill cut in half has no end, and is written anew.
        self._file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def add(self, response: Response) -> None:
        """Write one down, unless it is there."""
        if _key(response) not in self._known:
            self.amend(response)

    def amend(self, response: Response) -> None:
        """Write one down, in the place of what is there."""
        self._known[_key(response)] = response
        # ASCII, so that no surrogate of the model's can make the line unwritable.
        self._file.write(json.dumps(asdict(response)).encode("ascii") + b"\n")

    def of(self, benchmark: str) -> list[Response]:
        """Those of one benchmark, by problem and sample."""
        return sorted((r for r in self._known.values() if r.benchmark == benchmark), key=_key)

    def missing(self, benchmark: str, prompts: Iterable[Prompt], samples: int) -> list[Prompt]:
        """The prompts that do not have all their responses."""
        wanted = range(samples)
        return [p for p in prompts if any((benchmark, p.index, s) not in self._known for s in wanted)]

    def close(self) -> None:
        """Close the file, with its lines on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def _key(response: Response) -> tuple[str, int, int]:
    return response.benchmark, response.index, response.sample


# Whose they are
# ----------------------------------------------------------------------------------------------------


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named tensors: their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of what is asked and what is right: names, tokens, answers."""
    asked = [(prompt.index, prompt.id, prompt.token_ids, prompt.answer) for prompt in prompts]
    return hashlib.sha256(repr(asked).encode("utf-8", "surrogatepass")).hexdigest()


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``evaluation.json`` says: the policy and the settings that a folder's responses come from.

    Raises:
        ConfigError: for a folder without one.
    """
    try:
        facts = json.loads((folder / FACTS).read_text())
        benchmarks = facts["benchmarks"].values()
        if not all(isinstance(each["samples"], int) for each in benchmarks):
            raise TypeError("a number of samples that is none")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{folder}", f"a folder that rlvr-eval has written ({said})", "another") from error
    return dict(facts)


def claim(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``evaluation.json`` into a new folder; refuse one that holds another policy or settings.

    Args:
        folder: of the evaluation.
        facts: plain data, nested.

    Raises:
        ConfigError: naming what differs.
    """
    path, new = folder / FACTS, f"hydra.run.dir={folder}"
    if path.exists():
        if changed := differences(read_facts(folder), facts):
            raise ConfigError(
                new, f"the policy and settings that it holds ({'; '.join(changed)})", "another hydra.run.dir"
            )
        return
    if (folder / RESPONSES).exists():
        raise ConfigError(new, f"{FACTS} beside its {RESPONSES}", "another hydra.run.dir")
    write_whole(path, json.dumps(facts, indent=2) + "\n")


def differences(first: Mapping[str, Any], second: Mapping[str, Any], at: str = "") -> list[str]:
    """Every value that two nested mappings differ in, as ``a.b: 1 and 2``."""
    found = []
    for key in {**first, **second}:
        one, other, name = first.get(key), second.get(key), f"{at}{key}"
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{name}.")
        elif one != other:
            found.append(f"{name}: {_short(one)} and {_short(other)}")
    return found


def _short(value: object) -> str:
    return text if len(text := str(value)) <= 40 else f"{text[:12]}..."
