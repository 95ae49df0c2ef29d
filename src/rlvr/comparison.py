"""Two evaluations compared problem by problem."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlvr.errors import ConfigError
from rlvr.responses import RESPONSES, Response, differences, read_facts, read_responses
from rlvr.results import Scored, average, plain, table
from rlvr.scores import Estimate, Scores, estimates, resampled_means


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Paired differences, second minus first, over the problems that two evaluations have in common.

    Those are of one name and one right answer: a name alone, such as a row's number, may mean another
    problem. Pairs are resampled, so that what makes a problem hard for both drops out of the interval.

    Args:
        first: folder of an evaluation, or its ``results.json``.
        second: another.

    Returns:
        Plain data: ``settings``, what the two differ in beside the policy; ``benchmarks``, for each one that
        both have the pairs, the problems that are not among them, and the difference of every score that
        both have; ``average``, of pass@1 over the benchmarks.

    Raises:
        ConfigError: for what is no evaluation, or two without a common problem.
    """
    folders = [place.parent if place.is_file() else place for place in (first, second)]
    facts = [read_facts(folder) for folder in folders]
    ours, theirs = (_scored(folder, fact) for folder, fact in zip(folders, facts, strict=True))
    benchmarks, values, means = {}, [], []
    for name in [name for name in ours if name in theirs]:
        left, right = ours[name], theirs[name]
        places = [{problem: row for row, problem in enumerate(each.problems)} for each in (left, right)]
        common = [problem for problem in left.problems if problem in places[1]]
        if not common:
            continue
        rows = [[place[problem] for problem in common] for place in places]
        scores = {
            key: right.scores[key][rows[1]] - left.scores[key][rows[0]]
            for key in left.scores
            if key in right.scores
        }
        drawn = resampled_means(scores, seed=0, purpose=name)
        values.append(scores["pass_at_1"].mean())
        means.append(drawn["pass_at_1"])
        benchmarks[name] = {
            "pairs": len(common),
            "unpaired": len(left.problems) + len(right.problems) - 2 * len(common),
            "first": _means(left.scores, rows[0], scores),
            "second": _means(right.scores, rows[1], scores),
            "differences": plain(estimates(scores, drawn)),
        }
    if not benchmarks:
        raise ConfigError(
            f"--compare {first} {second}", "a problem that both have answered", "two of one benchmark"
        )
    one, other = ({key: value for key, value in fact.items() if key != "policy"} for fact in facts)
    return {
        "settings": differences(one, other),
        "benchmarks": benchmarks,
        "average": plain({"pass_at_1": average(values, means)}),
    }


def comparison_table(found: Mapping[str, Any]) -> str:
    """:func:`compare` as Markdown, in per cent; a star where the interval has no 0 in it."""
    rows = []
    for name, of in found["benchmarks"].items():
        for score, values in of["differences"].items():
            ends = [f"{100 * of[side][score]:.1f}" for side in ("first", "second")]
            rows.append([name, of["pairs"], score, *ends, _starred(Estimate(**values))])
    overall = Estimate(**found["average"]["pass_at_1"])
    rows.append(["average", "", "pass_at_1", "", "", _starred(overall)])
    unpaired = [
        f"{name}: {of['unpaired']} problems without the same one, answered in full, in the other, left out"
        for name, of in found["benchmarks"].items()
        if of["unpaired"]
    ]
    notes = [*(f"settings differ in {each}" for each in found["settings"]), *unpaired]
    head = ["benchmark", "pairs", "score", "first", "second", "second - first"]
    return "".join(f"WARNING: {note}\n" for note in notes) + table(head, rows)


def _starred(found: Estimate) -> str:
    return f"{found} *" if found.low > 0 or found.high < 0 else str(found)


def _means(scores: Scores, rows: list[int], of: Mapping[str, object]) -> dict[str, float]:
    return {key: float(scores[key][rows].mean()) for key in of}


def _scored(folder: Path, facts: Mapping[str, Any]) -> dict[str, Scored]:
    """A folder's benchmarks, by those problems that have all their responses."""
    unique = {(r.benchmark, r.index, r.sample): r for r in read_responses(folder / RESPONSES)}
    scored = {}
    for name, benchmark in facts["benchmarks"].items():
        groups: dict[int, list[Response]] = {}
        for key in sorted(key for key in unique if key[0] == name):
            groups.setdefault(key[1], []).append(unique[key])
        whole = [group for group in groups.values() if len(group) == benchmark["samples"]]
        if whole:
            responses = [response for group in whole for response in group]
            scored[name] = Scored.of(name, responses, benchmark["samples"])
    return scored
