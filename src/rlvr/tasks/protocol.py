"""The contract every task keeps."""

from collections.abc import Sequence
from typing import Protocol

from rlvr.batch import Prompt


class Task(Protocol):
    """Prompts to train on and prompts held out, both in a fixed order.

    Attributes:
        chat: whether prompts are put through the tokenizer's chat template.
    """

    chat: bool

    def train(self) -> Sequence[Prompt]:
        """Return the training prompts, not yet encoded; ``index`` is the position."""

    def heldout(self) -> Sequence[Prompt]:
        """Return the held-out prompts, disjoint from the training prompts; ``index`` is the position."""
