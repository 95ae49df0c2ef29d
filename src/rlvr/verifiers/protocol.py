"""The contract every verifier keeps."""

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from rlvr.batch import Prompt, Verdict


class Verifier(Protocol):
    """Any callable that judges one response; deterministic, and takes whatever a model may write."""

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        """Judge ``completion``, the decoded response without special tokens, against ``prompt.answer``."""


@runtime_checkable
class AsyncVerifier(Verifier, Protocol):
    """A verifier that also judges while its caller goes on: submit as responses finish, collect in order."""

    def submit(self, prompt: Prompt, completion: str) -> Future[Verdict]:
        """Start to judge one response."""

    def close(self) -> None:
        """End what works in the background."""


def close_verifiers(verifiers: Iterable[Verifier]) -> None:
    """End what works in the background of any of them, once each."""
    for verifier in {id(each): each for each in verifiers}.values():
        if isinstance(verifier, AsyncVerifier):
            verifier.close()
