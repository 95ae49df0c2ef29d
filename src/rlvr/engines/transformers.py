"""Rollouts with transformers: batched, with a KV cache, with the trainer's own weights or a copy."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from rlvr.batch import Prompt, Rollout
from rlvr.engines.protocol import SamplingParams
from rlvr.keyed import uniforms
from rlvr.policy import Policy


class TransformersEngine:
    """Samples by inverse distribution function from one keyed uniform draw a token.

    A response depends on its key and on the weights, not on what it was batched with (but for the rounding of
    matrix products of another size). A prompt's cache is computed once and shared by its group; finished rows
    leave the batch.

    Args:
        policy: the trainer's policy.
        own_copy: generate with a copy of the weights, synced by ``load_weights``, instead of the trainer's
            own.
        max_num_seqs: responses generated at one time.
    """

    def __init__(self, policy: Policy, *, own_copy: bool = False, max_num_seqs: int = 256) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"engine.max_num_seqs={max_num_seqs} must be at least 1")
        self.model = policy.model
        if own_copy:
            meta = next(policy.parameters()).is_meta
            self.model = (policy.read() if meta else copy.deepcopy(policy.model)).eval()
        self.own_copy = self.concurrent = own_copy
        self.dtype: torch.dtype | None = self.model.dtype if own_copy else None
        self.max_num_seqs = max_num_seqs
        self.tokenizer, self.pad_id, self.stop_ids = policy.tokenizer, policy.pad_id, policy.stop_ids

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the trainer's weights; nothing to do where they are shared."""
        if not self.own_copy:
            return
        ours = dict(self.model.named_parameters())
        for name, tensor in weights:
            if tensor.device != self.model.device:
                self.model.to(tensor.device)  # in place: the parameters remain themselves
            ours.pop(name).copy_(tensor)
        if ours:
            raise RuntimeError(
                f"the weight sync left {len(ours)} tensors stale, {next(iter(ours))} among them"
            )

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield rollouts as they finish."""
        rows = [(prompt, sample) for prompt in prompts for sample in range(sampling.samples)]
        training = self.model.training
        self.model.eval()  # in training mode, activation checkpointing turns the cache off
        try:
            for begin in range(0, len(rows), self.max_num_seqs):
                yield from self._generate(rows[begin : begin + self.max_num_seqs], sampling)
        finally:
            self.model.train(training)

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> list[float] | None:
        """Ln p of every token but the first, in nats; None where the weights are the trainer's own."""
        if not self.own_copy:
            return None
        ids = torch.tensor([list(token_ids)], device=self.model.device)
        logprobs = self.model(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)
        scores: list[float] = logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()
        return scores

    def close(self) -> None:
        """Drop the model."""
        del self.model

    def _generate(self, rows: list[tuple[Prompt, int]], sampling: SamplingParams) -> Iterator[Rollout]:
        state = self._prefill(rows, sampling)
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        stops = torch.tensor(self.stop_ids, device=self.model.device)
        for step in range(sampling.max_new_tokens):
            sampled, sampled_logprobs = _sample(state.logits, state.uniforms[:, step], sampling)
            for row, token, logprob in zip(
                state.rows, sampled.tolist(), sampled_logprobs.tolist(), strict=True
            ):
                tokens[row].append(token)
                logprobs[row].append(logprob)
            stopped = torch.isin(sampled, stops)
            finished = stopped | (step + 1 == sampling.max_new_tokens)
            for position in finished.nonzero().flatten().tolist():
                row = state.rows[position]
                yield Rollout(
                    prompt=rows[row][0],
                    sample=rows[row][1],
                    token_ids=tuple(tokens[row]),
                    logprobs=tuple(logprobs[row]),
                    finish_reason="stop" if stopped[position] else "length",
                    text=str(self.tokenizer.decode(tokens[row], skip_special_tokens=True)),
                )
            if finished.all():
                return
            if finished.any():
                state.select((~finished).nonzero().flatten())
                sampled = sampled[~finished]
            self._advance(state, sampled)

    @torch.no_grad()
    def _prefill(self, rows: list[tuple[Prompt, int]], sampling: SamplingParams) -> "_State":
        """Run every distinct prompt once, and hand its cache to all of its responses."""
        device = self.model.device
        distinct = {prompt.index: prompt for prompt, _ in rows}
        slots = {index: slot for slot, index in enumerate(distinct)}
        width = max(len(prompt.token_ids) for prompt in distinct.values())
        input_ids = torch.full((len(distinct), width), self.pad_id)
        mask = torch.zeros(len(distinct), width, dtype=torch.bool)
        for slot, prompt in enumerate(distinct.values()):
            input_ids[slot, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[slot, width - len(prompt.token_ids) :] = True
        cache = DynamicCache(config=self.model.config)
        outputs = self.model(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.long().cumsum(dim=-1) - 1).clamp(min=0).to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        owner = torch.tensor([slots[prompt.index] for prompt, _ in rows], device=device)
        cache.batch_select_indices(owner)
        keys = [(sampling.iteration, prompt.index, sample) for prompt, sample in rows]
        draws = uniforms(sampling.seed, sampling.purpose, keys, sampling.max_new_tokens)
        return _State(
            rows=list(range(len(rows))),
            cache=cache,
            mask=mask.to(device)[owner],
            logits=outputs.logits[owner, -1],
            uniforms=draws.to(device),
        )

    @torch.no_grad()
    def _advance(self, state: "_State", sampled: Tensor) -> None:
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(sampled), 1)], dim=1)
        outputs = self.model(
            input_ids=sampled[:, None],
            attention_mask=state.mask,
            position_ids=state.mask.long().sum(dim=-1, keepdim=True) - 1,
            past_key_values=state.cache,
            use_cache=True,
        )
        state.logits = outputs.logits[:, -1]


@dataclass
class _State:
    """The rows still being generated: their numbers, cache, mask [B, S], next logits [B, V], draws [B, T]."""

    rows: list[int]
    cache: DynamicCache
    mask: Tensor
    logits: Tensor
    uniforms: Tensor

    def select(self, index: Tensor) -> None:
        """Go on with the rows at ``index`` only."""
        self.rows = [self.rows[i] for i in index.tolist()]
        self.cache.batch_select_indices(index)
        self.mask, self.uniforms = self.mask[index], self.uniforms[index]


@torch.no_grad()
def _sample(logits: Tensor, draws: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token a row, [B, V] and [B] -> tokens [B] and their ln p [B] in what was sampled from."""
    logits = logits.float()
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(dim=-1)
        tokens = logprobs.argmax(dim=-1)
        return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    logits = logits / sampling.temperature
    warpers: list[Any] = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    for warper in warpers:
        logits = warper(None, logits)
    logprobs = logits.log_softmax(dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    # Strictly below the total: the draw can then only fall on a token that has probability.
    threshold = (draws * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
