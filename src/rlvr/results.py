"""From the responses of an evaluation to its scores, averages and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch

from rlvr.responses import Response
from rlvr.scores import Estimate, Scores, estimate, estimates, problem_scores, resampled_means

AVERAGED = ("mean", "pass", "maj")
"""Of each benchmark at its own n, as in the paper's table 1."""


@dataclass(frozen=True)
class Scored:
    """A benchmark's scores, problem by problem.

    Args:
        name: of the benchmark.
        samples: n, responses a problem.
        problems: name and right answer of the P problems.
        scores: of :func:`problem_scores`, [P] each.
        length_mean: tokens a response.
        truncated_frac: share of responses that were cut.
        verifier_errors: responses without a verdict; they count as wrong.
    """

    name: str
    samples: int
    problems: list[tuple[str, str]]
    scores: Scores
    length_mean: float
    truncated_frac: float
    verifier_errors: int

    @classmethod
    def of(cls, name: str, responses: Sequence[Response], samples: int) -> "Scored":
        """Score responses, sorted by problem and sample, ``samples`` of every problem."""
        groups = [responses[i : i + samples] for i in range(0, len(responses), samples)]
        return cls(
            name=name,
            samples=samples,
            problems=[(group[0].problem, group[0].gold) for group in groups],
            scores=problem_scores(
                torch.tensor([[response.correct for response in group] for group in groups]),
                [[response.answer for response in group] for group in groups],
            ),
            length_mean=fmean(response.tokens for response in responses),
            truncated_frac=fmean(response.finish_reason == "length" for response in responses),
            verifier_errors=sum(response.unjudged for response in responses),
        )


def results(scored: Sequence[Scored], seed: int) -> dict[str, Any]:
    """Every score with its interval, benchmark by benchmark, and averages over the benchmarks.

    Args:
        scored: at least one benchmark.
        seed: keys the resamples.

    Returns:
        Plain data: what ``results.json`` holds.
    """
    means = {each.name: resampled_means(each.scores, seed=seed, purpose=each.name) for each in scored}
    benchmarks = {
        each.name: {
            "problems": len(each.problems),
            "samples": each.samples,
            "scores": plain(estimates(each.scores, means[each.name])),
            "length_mean": each.length_mean,
            "truncated_frac": each.truncated_frac,
            "verifier_errors": each.verifier_errors,
        }
        for each in scored
    }
    averages = {
        score: average(
            [each.scores[f"{score}_at_{each.samples}"].mean() for each in scored],
            [means[each.name][f"{score}_at_{each.samples}"] for each in scored],
        )
        for score in AVERAGED
    }
    return {"benchmarks": benchmarks, "average": plain(averages)}


def results_table(found: Mapping[str, Any]) -> str:
    """:func:`results` as Markdown: scores in per cent with their 95 % intervals, and pass@k up to n."""
    names = list(found["benchmarks"])
    rows = []
    for name in names:
        of, n = found["benchmarks"][name], found["benchmarks"][name]["samples"]
        scores = [Estimate(**of["scores"][f"{score}_at_{n}"]) for score in AVERAGED]
        length, cut = f"{of['length_mean']:.0f}", f"{100 * of['truncated_frac']:.1f}"
        rows.append([name, of["problems"], n, *scores, length, cut, of["verifier_errors"]])
    averages = [Estimate(**found["average"][score]) for score in AVERAGED]
    rows.append(["average", "", "", *averages, "", "", ""])
    head = ["benchmark", "problems", "n", "mean@n", "pass@n", "maj@n", "tokens", "cut %", "verifier errors"]
    curves = {name: _pass_curve(found["benchmarks"][name]["scores"]) for name in names}
    ks = sorted({k for curve in curves.values() for k in curve})
    points = [[name, *(curve.get(k, "") for k in ks)] for name, curve in curves.items()]
    return f"{table(head, rows)}\n{table(['pass@k', *ks], points)}"


def _pass_curve(scores: Mapping[str, Mapping[str, float]]) -> dict[int, str]:
    """pass@k in per cent by k."""
    passes = {key: of["value"] for key, of in scores.items() if key.startswith("pass_at_")}
    return {int(key.removeprefix("pass_at_")): f"{100 * value:.1f}" for key, value in passes.items()}


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns also line up as text."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "".join(f"{line}\n" for line in lines)


def average(values: Sequence[float], means: Sequence[np.ndarray]) -> Estimate:
    """Over benchmarks, each resampled on its own."""
    return estimate(fmean(values), np.mean(means, axis=0))


def plain(found: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """As plain data."""
    return {name: asdict(each) for name, each in found.items()}
