"""An engine that answers from a script: for tests of what lies around it, and for replays."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from rlvr.batch import Prompt, Rollout
from rlvr.engines.protocol import SamplingParams
from rlvr.policy import Policy

Script = Callable[[Prompt, int, int], str]


class ScriptedEngine:
    """Answers ``script(prompt, iteration, sample)``, tokenised, cut at the token limit.

    Args:
        policy: whose tokenizer and stop token are used, and which scores the probe.
        script: returns the text of a response.
    """

    dtype, concurrent = None, True

    def __init__(self, policy: Policy, script: Script) -> None:
        self.policy, self.script = policy, script

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing to load: a script has no weights."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield the scripted responses in order; their log-probs are 0, for a script is certain."""
        stop = self.policy.stop_ids[0]
        for prompt in prompts:
            for sample in range(sampling.samples):
                text = self.script(prompt, sampling.iteration, sample)
                ids = [*self.policy.tokenizer.encode(text, add_special_tokens=False), stop]
                fits = len(ids) <= sampling.max_new_tokens
                ids = ids[: sampling.max_new_tokens]
                yield Rollout(
                    prompt, sample, tuple(ids), (0.0,) * len(ids), "stop" if fits else "length", text
                )

    def score(self, token_ids: Sequence[int]) -> list[float] | None:
        """No weights, nothing to probe."""
        return None

    def close(self) -> None:
        """Nothing to give back."""
