"""What crosses the hops of one iteration: prompts, rollouts, verdicts, and the batches made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlvr.losses import Totals

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
        system: system message for the chat template; the template's own where empty.
    """

    index: int
    id: str
    text: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    system: str = ""


@dataclass(frozen=True)
class Rollout:
    """One finished response.

    Args:
        prompt: what was asked.
        sample: number of the response within its group, 0-based.
        token_ids: the response, its stop token included; none where the engine returned nothing.
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


@dataclass(frozen=True)
class IterationFacts:
    """What schedulers may decide on, the same on every rank.

    Args:
        iteration: k, 0-based.
        entropy: token-mean full-vocabulary entropy of the iteration's responses under the weights it starts
            from, at the sampling temperature, over all ranks, nats.
        reward_mean: mean reward of the iteration's responses over all ranks.
    """

    iteration: int
    entropy: float
    reward_mean: float


@dataclass(frozen=True)
class Sequences:
    """Prompts padded on the left to one width, responses padded on the right.

    Args:
        input_ids: [B, P + T] int64.
        attention_mask: [B, P + T] bool.
        loss_mask: [B, T] bool, the response tokens, stop token included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], pad_id: int) -> "Sequences":
        """Pad rollouts to one batch, in their order."""
        prompts = [rollout.prompt.token_ids for rollout in rollouts]
        responses = [rollout.token_ids for rollout in rollouts]
        width, length = max(map(len, prompts)), max(1, *map(len, responses))
        input_ids = torch.full((len(rollouts), width + length), pad_id)
        attention_mask = torch.zeros(len(rollouts), width + length, dtype=torch.bool)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            begin, end = width - len(prompt), width + len(response)
            input_ids[row, begin:end] = torch.tensor(prompt + response)
            attention_mask[row, begin:end] = True
        return cls(input_ids, attention_mask, loss_mask=attention_mask[:, width:].clone())

    @property
    def targets(self) -> Tensor:
        """The response tokens as one vector, in row order: [N] int64, N = loss_mask.sum()."""
        return self.input_ids[:, -self.loss_mask.shape[1] :][self.loss_mask]

    def scatter(self, values: Sequence[float]) -> Tensor:
        """One value a response token, in row order, as [B, T] float32; 0 outside the mask."""
        full = torch.zeros(self.loss_mask.shape)
        full[self.loss_mask] = torch.tensor(values)
        return full

    def without(self, rows: Sequence[bool]) -> "Sequences":
        """The same sequences with no response token of the given rows in the loss mask."""
        return replace(self, loss_mask=self.loss_mask & ~torch.tensor(rows)[:, None])

    def rows(self, index: Tensor | slice) -> "Sequences":
        """Return the given rows, in as few columns as they need."""
        attention, loss = self.attention_mask[index], self.loss_mask[index]
        width = self.attention_mask.shape[1] - self.loss_mask.shape[1]
        used = attention.any(dim=0)
        begin = int(used[:width].int().argmax()) if used[:width].any() else width
        length = max(int(used[width:].sum()), 1)
        columns = slice(begin, width + length)
        return Sequences(self.input_ids[index][:, columns], attention[:, columns], loss[:, :length])

    def to(self, device: torch.device) -> "Sequences":
        """Move to a device."""
        return Sequences(*(getattr(self, item.name).to(device) for item in fields(self)))


@dataclass(frozen=True)
class Batch:
    """One optimizer mini-batch of this rank.

    Args:
        sequences: tokens and masks of B rows.
        advantages: [B], dimensionless.
        old_logprobs: [B, T] ln q under the weights that the iteration started from, nats; 0 outside
            ``loss_mask``.
        ref_logprobs: [B, T] under the reference policy, nats; None where no reference is wanted.
        rho: [B, T] weights of the policy loss that correct for the engine's distribution, see
            :mod:`rlvr.mismatch`; None where nothing is corrected.
        totals: sizes of the whole mini-batch over all ranks.
        facts: of the iteration.
        keys: [B, 2] int64, prompt index and sample number of each row, which key draws; for losses that
            select.
        selected: [B, T] bool, what such a loss has chosen.
        parts: [b] int64 each, the rows of every forward pass; no row in two. A row in none has no response
            token. None: all rows at once.
    """

    sequences: Sequences
    advantages: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    rho: Tensor | None
    totals: Totals
    facts: IterationFacts
    keys: Tensor | None = None
    selected: Tensor | None = None
    parts: tuple[Tensor, ...] | None = None

    @property
    def loss_mask(self) -> Tensor:
        """[B, T] bool, the response tokens."""
        return self.sequences.loss_mask

    def rows(self, index: Tensor | slice) -> "Batch":
        """Return the given rows, in one part; totals and facts stay those of the whole."""
        sequences = self.sequences.rows(index)
        length = sequences.loss_mask.shape[1]
        return replace(
            self,
            sequences=sequences,
            advantages=self.advantages[index],
            old_logprobs=self.old_logprobs[index][:, :length],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[index][:, :length],
            rho=None if self.rho is None else self.rho[index][:, :length],
            keys=None if self.keys is None else self.keys[index],
            selected=None if self.selected is None else self.selected[index][:, :length],
            parts=None,
        )

    def micro_batches(self) -> Iterator["Batch"]:
        """The rows of each part, in as few columns as they need; of an empty part, no rows."""
        for part in self._parts():
            yield self.rows(part)

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """What was computed for each part's response tokens, vectors in row order, as [B, T]; 0 elsewhere."""
        return join(self.loss_mask, self._parts(), values)

    def _parts(self) -> tuple[Tensor, ...]:
        return (torch.arange(len(self.advantages)),) if self.parts is None else self.parts

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor to a device; Lightning calls this."""
        return replace(
            self,
            sequences=self.sequences.to(device),
            advantages=self.advantages.to(device),
            old_logprobs=self.old_logprobs.to(device),
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs.to(device),
            rho=None if self.rho is None else self.rho.to(device),
            keys=None if self.keys is None else self.keys.to(device),
            selected=None if self.selected is None else self.selected.to(device),
            parts=None if self.parts is None else tuple(part.to(device) for part in self.parts),
        )


def join(mask: Tensor, parts: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Put what was computed part by part back into the places of its tokens.

    Args:
        mask: [B, T] bool, the tokens of all rows.
        parts: rows of each part, [b] int64.
        values: of each part, a vector over the tokens of its rows in their order.

    Returns:
        [B, T] in the dtype of the values; 0 outside the mask, and in rows of no part.
    """
    rows, flat = torch.cat(list(parts)), torch.cat(list(values))
    joined = flat.new_zeros(mask.shape)
    joined[rows] = flat.new_zeros(len(rows), mask.shape[1]).masked_scatter(mask[rows], flat)
    return joined


@dataclass(frozen=True)
class Evaluation:
    """Judged samples of one benchmark.

    Args:
        name: of the benchmark, as in ``val/<name>/...``.
        correct: [P, n] bool.
        answers: what was answered, P lists of n, None where there was no answer.
    """

    name: str
    correct: Tensor
    answers: list[list[str | None]]

    def to(self, device: torch.device) -> "Evaluation":
        """Move to a device; Lightning calls this."""
        return replace(self, correct=self.correct.to(device))
