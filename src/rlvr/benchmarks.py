"""Benchmarks: problems to score a policy by, in training and after it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlvr.batch import Prompt
from rlvr.engines import SamplingParams
from rlvr.errors import ConfigError
from rlvr.policy import Policy
from rlvr.prompts import encode
from rlvr.settings import EvaluationConfig
from rlvr.tasks import ProblemFormat, Task, prompts_from, read_rows
from rlvr.verifiers import Verifier

HELDOUT = "heldout"


@dataclass(frozen=True)
class Benchmark:
    """Problems, how often each is asked, and who judges the answers.

    Args:
        name: as in ``val/<name>/...``; it keys the draws.
        problems: not yet encoded; ``index`` is the position.
        verifier: who judges.
        samples: n, responses a problem.
        chat: put problems through the tokenizer's chat template.
    """

    name: str
    problems: Sequence[Prompt]
    verifier: Verifier
    samples: int = 8
    chat: bool = True

    def prompts(
        self, policy: Policy, evaluation: EvaluationConfig, *, max_prompt_tokens: int, max_new_tokens: int
    ) -> list[Prompt]:
        """The problems as the policy reads them; see :func:`rlvr.prompts.encode` for what is left out."""
        return encode(
            self.problems[: evaluation.num_prompts],
            policy,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            chat=self.chat,
            split="held-out" if self.name == HELDOUT else self.name,
        )

    def sampling(self, evaluation: EvaluationConfig, *, max_new_tokens: int, seed: int) -> SamplingParams:
        """How its responses are drawn: the same draws in every evaluation, in training and after it."""
        return SamplingParams(
            samples=evaluation.samples or self.samples,
            max_new_tokens=max_new_tokens,
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            seed=seed,
            purpose=self.name,
        )


def heldout(task: Task, verifier: Verifier, samples: int = 8) -> Benchmark:
    """The problems that a training task keeps from training, judged as in training."""
    return Benchmark(HELDOUT, task.heldout(), verifier, samples=samples, chat=task.chat)


def problem_set(
    name: str,
    path: str,
    *,
    verifier: Verifier,
    form: ProblemFormat | None = None,
    samples: int = 8,
    chat: bool = True,
) -> Benchmark:
    """Every problem of a file or data set.

    Args:
        name: of the benchmark.
        path: as in :func:`rlvr.tasks.read_rows`.
        verifier: who judges.
        form: how a row is read, and the template that the policy sees.
        samples: responses a problem.
        chat: put problems through the tokenizer's chat template.

    Raises:
        ConfigError: for what is not there or cannot be read, malformed rows, or two problems of one
            name.
    """
    setting = f"benchmark.{name}.path"
    keys = f"benchmark.{name}.form.prompt_key=NAME benchmark.{name}.form.answer_key=NAME"
    form = form or ProblemFormat()
    form.check(f"benchmark.{name}.form")
    problems = prompts_from(read_rows(path, setting=setting), path, form, fix=keys)
    if twice := [id for id, times in Counter(problem.id for problem in problems).items() if times > 1]:
        raise ConfigError(
            f"{setting}={path}: two problems named {twice[0]!r}",
            "one name each",
            f"benchmark.{name}.form.id_key=null",
        )
    return Benchmark(name, problems, verifier, samples=samples, chat=chat)
