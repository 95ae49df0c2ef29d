"""Sizes and sampling of a run: plain values, checked before anything is loaded."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from rlvr.errors import ConfigError, require_numbers

OldLogprobs = Literal["policy", "engine"]


@dataclass(frozen=True)
class DataConfig:
    """Sizes and sampling of one iteration; the ``data`` node.

    Args:
        num_prompts: prompts an iteration, over all ranks.
        group_size: responses a prompt.
        minibatches: optimizer steps in one pass over the responses.
        epochs: passes over the responses.
        micro_batch_size: rows in one forward pass of the trainer.
        tokens_per_micro_batch: instead, tokens in one forward pass, prompts included, and padding where there
            is any; None: by ``micro_batch_size``.
        max_prompt_tokens: longer prompts are left out, and counted.
        max_new_tokens: longest response, stop token included.
        temperature: of training rollouts; logits are divided by it, > 0.
        top_p: smallest set of tokens with this probability to sample from; 1 is off.
        top_k: number of most probable tokens to sample from; 0 is off.
        old_logprobs: ``policy``: ln q is the trainer's, taken before the first update; ``engine``: it is what
            the engine sampled with, and the ratio itself corrects for the engine's distribution.
        dynamic_sampling: rounds in which groups of equal rewards are replaced by other prompts' (DAPO,
            arXiv:2503.14476, sec. 3.2); what is missing after the last round is filled up with them; 0 is
            off.
        overlong_buffer: tokens before ``max_new_tokens`` over which a penalty grows (DAPO, eq. 13); 0 is off.
        overlong_factor: the largest penalty, in units of reward.
        mask_truncated: truncated responses do not train; their rewards still count in their group's mean.
        lookahead: 1: the next iteration's responses are generated while this one trains, by the weights that
            this one started from; 0: by the newest.

    Raises:
        ConfigError: for sizes that cannot work, naming the override.
    """

    num_prompts: int
    group_size: int
    minibatches: int
    epochs: int = 1
    micro_batch_size: int = 32
    tokens_per_micro_batch: int | None = None
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    dynamic_sampling: int = 0
    overlong_buffer: int = 0
    overlong_factor: float = 1.0
    mask_truncated: bool = False
    old_logprobs: OldLogprobs = "policy"
    lookahead: int = 0

    def __post_init__(self) -> None:
        no_numbers = ("old_logprobs", "mask_truncated")
        numbers = {name: value for name, value in vars(self).items() if name not in no_numbers}
        require_numbers("data", optional=("tokens_per_micro_batch",), **numbers)
        if not isinstance(self.mask_truncated, bool):
            raise ConfigError(
                f"data.mask_truncated={self.mask_truncated}", "true or false", "data.mask_truncated=true"
            )
        if self.dynamic_sampling < 0:
            raise ConfigError(
                f"data.dynamic_sampling={self.dynamic_sampling}",
                "a number of rounds, 0 is off",
                "data.dynamic_sampling=3",
            )
        if not 0 <= self.overlong_buffer <= self.max_new_tokens:
            raise ConfigError(
                f"data.overlong_buffer={self.overlong_buffer}",
                f"from 0 to data.max_new_tokens={self.max_new_tokens}",
                f"data.overlong_buffer={max(self.max_new_tokens // 4, 1)}",
            )
        if not self.overlong_factor >= 0:
            raise ConfigError(
                f"data.overlong_factor={self.overlong_factor}", "at least 0", "data.overlong_factor=1.0"
            )
        if self.old_logprobs not in get_args(OldLogprobs):
            raise ConfigError(
                f"data.old_logprobs={self.old_logprobs}", "policy or engine", "data.old_logprobs=policy"
            )
        if self.lookahead not in (0, 1):
            raise ConfigError(f"data.lookahead={self.lookahead}", "0 or 1", "data.lookahead=1")
        for name in (
            "num_prompts",
            "minibatches",
            "epochs",
            "micro_batch_size",
            "max_prompt_tokens",
            "max_new_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)}", "at least 1", f"data.{name}=1")
        longest = self.max_prompt_tokens + self.max_new_tokens
        if self.tokens_per_micro_batch is not None and self.tokens_per_micro_batch < longest:
            raise ConfigError(
                f"data.tokens_per_micro_batch={self.tokens_per_micro_batch}",
                f"at least data.max_prompt_tokens + data.max_new_tokens = {longest}, the longest sequence",
                f"data.tokens_per_micro_batch={longest}",
            )
        if self.group_size < 2:
            raise ConfigError(
                f"data.group_size={self.group_size}",
                "at least 2: a response is compared with the others of its group",
                "data.group_size=8",
            )
        rows = self.num_prompts * self.group_size
        if rows % self.minibatches:
            raise ConfigError(
                f"data.minibatches={self.minibatches}",
                f"a divisor of data.num_prompts x data.group_size = {rows}",
                f"data.minibatches={math.gcd(rows, self.minibatches)}",
            )
        if not self.temperature > 0:
            raise ConfigError(
                f"data.temperature={self.temperature}", "> 0 in training", "data.temperature=1.0"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"data.top_p={self.top_p}", "in (0, 1]", "data.top_p=1.0")
        if self.top_k < 0:
            raise ConfigError(f"data.top_k={self.top_k}", "at least 0 (0 is off)", "data.top_k=0")

    @property
    def truncated(self) -> bool:
        """Whether only some of the vocabulary is sampled from."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def updates(self) -> int:
        """Optimizer steps an iteration."""
        return self.minibatches * self.epochs


@dataclass(frozen=True)
class EvaluationConfig:
    """How held-out problems and benchmarks are scored; the ``evaluation`` node.

    Args:
        every: iterations between two evaluations; the start and the end are always evaluated.
        samples: responses a problem; null is each benchmark's own number.
        num_prompts: how many problems of each benchmark, from the first; null is all of them.
        temperature: 0 is greedy.
        top_p: smallest set of tokens with this probability to sample from; 1 is off.
    """

    every: int = 10
    samples: int | None = 8
    num_prompts: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require_numbers("evaluation", optional=("samples", "num_prompts"), **vars(self))
        for name in ("every", "samples", "num_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluation.{name}={value}", "at least 1", f"evaluation.{name}=1")
        if not self.temperature >= 0:
            raise ConfigError(
                f"evaluation.temperature={self.temperature}", ">= 0", "evaluation.temperature=1.0"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"evaluation.top_p={self.top_p}", "in (0, 1]", "evaluation.top_p=1.0")
