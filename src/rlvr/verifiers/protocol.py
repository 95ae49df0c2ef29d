"""The contract every verifier keeps."""

from typing import Protocol

from rlvr.batch import Prompt, Verdict


class Verifier(Protocol):
    """Any callable that judges one response; deterministic, and takes whatever a model may write."""

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        """Judge ``completion``, the decoded response without special tokens, against ``prompt.answer``."""
