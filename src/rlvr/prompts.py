"""Prompts as the policy reads them, and which of them an iteration asks."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlvr.batch import Prompt
from rlvr.errors import ConfigError
from rlvr.keyed import generator
from rlvr.policy import Policy


def encode(
    prompts: Sequence[Prompt],
    policy: Policy,
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    chat: bool,
    split: str,
) -> list[Prompt]:
    """Tokenize prompts, and leave out those that do not fit, saying how many.

    Args:
        prompts: of a task.
        policy: whose tokenizer and length limit hold.
        max_prompt_tokens: longest prompt, in tokens.
        max_new_tokens: longest response, in tokens.
        chat: put them through the tokenizer's chat template.
        split: what they are, for messages: ``training``, ``held-out``, or the name of a benchmark.

    Raises:
        ConfigError: for a tokenizer without the chat template that is wanted, where no prompt fits, or where
            prompt and response exceed what the policy takes.
    """
    if chat and not policy.tokenizer.chat_template:
        node = "task" if split in ("training", "held-out") else f"benchmark.{split}"
        raise ConfigError(
            f"{node}.chat=true", "a policy whose tokenizer has a chat template", f"{node}.chat=false"
        )
    encoded = [replace(prompt, token_ids=_token_ids(prompt, policy, chat)) for prompt in prompts]
    fits = [prompt for prompt in encoded if 0 < len(prompt.token_ids) <= max_prompt_tokens]
    if dropped := len(encoded) - len(fits):
        print(
            f"left out {dropped} of {len(encoded)} {split} prompts: empty, or longer than "
            f"data.max_prompt_tokens={max_prompt_tokens}",
            file=sys.stderr,
        )
    longest = max((len(prompt.token_ids) for prompt in fits), default=0)
    if longest + max_new_tokens > policy.max_length:
        raise ConfigError(
            f"data.max_new_tokens={max_new_tokens}",
            f"prompt and response within the policy's {policy.max_length} tokens "
            f"(they reach {longest + max_new_tokens})",
            _shorter(longest, max_new_tokens, policy.max_length),
        )
    if not fits:
        raise ConfigError(f"task: no {split} prompt", "at least one that fits", "data.max_prompt_tokens=1024")
    return fits


@dataclass(frozen=True)
class PromptOrder:
    """One rank's prompts of each iteration: a function of seed and iteration, so that it survives a resume.

    Args:
        prompts: to train on.
        num_prompts: an iteration, over all ranks; at most as many as there are.
        seed: of the run.
        rank: this one.
        ranks: how many there are.
    """

    prompts: Sequence[Prompt]
    num_prompts: int
    seed: int
    rank: int = 0
    ranks: int = 1

    def of_iteration(self, k: int) -> list[Prompt]:
        """Passes in keyed order, no prompt twice in an iteration; the ranks' shares are disjoint."""
        return [self.prompts[i] for i in self._chosen(k)[self.rank :: self.ranks]]

    def spares(self, k: int) -> list[Prompt]:
        """Replacements for iteration ``k``: all its other prompts, in an order of their own."""
        chosen = set(self._chosen(k))
        order = generator(self.seed, "spares", k).permutation(len(self.prompts)).tolist()
        others = [i for i in order if i not in chosen]
        return [self.prompts[i] for i in others[self.rank :: self.ranks]]

    def _chosen(self, k: int) -> list[int]:
        per_pass = len(self.prompts) // self.num_prompts
        order: list[int] = (
            generator(self.seed, "order", k // per_pass).permutation(len(self.prompts)).tolist()
        )
        begin = k % per_pass * self.num_prompts
        return order[begin : begin + self.num_prompts]


def _shorter(longest_prompt: int, max_new_tokens: int, most: int) -> str:
    """The override with which both are within ``most`` tokens: shorter responses, else shorter prompts."""
    if longest_prompt < most:
        return f"data.max_new_tokens={most - longest_prompt}"
    if max_new_tokens < most:
        return f"data.max_prompt_tokens={most - max_new_tokens}"
    return f"data.max_prompt_tokens={most // 2} data.max_new_tokens={most // 2}"


def _token_ids(prompt: Prompt, policy: Policy, chat: bool) -> tuple[int, ...]:
    tokenizer = policy.tokenizer
    if not chat:
        return tuple(tokenizer.encode(prompt.text))
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    messages.append({"role": "user", "content": prompt.text})
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
