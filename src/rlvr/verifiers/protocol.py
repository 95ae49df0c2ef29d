"""The contract every verifier keeps."""

from typing import Protocol

from rlvr.batch import Prompt, Verdict


class Verifier(Protocol):
    """Any callable that judges one response; it must not raise on what a model may write, and must be deterministic."""

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        """Judge ``completion``, the decoded response without special tokens, against ``prompt.answer``."""
