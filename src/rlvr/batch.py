"""What crosses the hops of one iteration: prompts, rollouts, verdicts, and the batches made of them."""

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """A problem, and the tokens that state it to the policy.

    Args:
        index: position in its split; with a sample number it keys every random draw made for the prompt.
        id: name in reports, unique in its split.
        text: the problem, without chat template.
        answer: the gold answer, as the verifier wants it.
        meta: whatever else the verifier or a report needs, plain data.
        token_ids: the prompt as the policy reads it, chat template included; empty until encoded.
    """

    index: int
    id: str
    text: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One finished response.

    Args:
        prompt: what was asked.
        sample: number of the response within its group, 0-based.
        token_ids: the response, its stop token included; at least one token.
        logprobs: the engine's ln p of each of them at the sampling temperature, nats; same length.
        finish_reason: ``stop``, or ``length`` where it was cut off at the token limit (truncated).
        text: decoded response without special tokens.
    """

    prompt: Prompt
    sample: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one response.

    Args:
        reward: what training sees, finite, dimensionless.
        correct: what evaluation sees.
        answer: the answer found in the response, in canonical form, for majority votes; None where there is
            none.
        reason: one short phrase for people and reports, for instance ``wrong``, ``no answer``.
    """

    reward: float
    correct: bool
    answer: str | None
    reason: str
