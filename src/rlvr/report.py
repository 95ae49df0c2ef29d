r"""A run's ``metrics.csv``, its pictures, and runs side by side: ``python -m rlvr.report RUN [RUN ...]``."""

import argparse
import csv
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlvr.errors import ConfigError

if TYPE_CHECKING:
    from rlvr.clipping import ClipRange
    from rlvr.figures import Array

# rlvr.figures is imported inside the functions that draw: matplotlib takes 0.4 s, and the training loop
# imports this module only to write rows.

PICTURES = (".png", ".pdf", ".svg")


def read_rows(path: Path) -> list[dict[str, float]]:
    """Read a ``metrics.csv``: one dictionary an iteration, NaN where a cell is empty (not measured).

    Raises:
        ConfigError: where a line is not as long as the header, or a cell is no number.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    header = lines[0] if lines else []
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        try:
            rows.append({k: float(cell) if cell else math.nan for k, cell in zip(header, cells, strict=True)})
        except ValueError:
            raise ConfigError(
                f"{path}, line {number}", "one number a column", "a file rlvr-train wrote"
            ) from None
    if rows and "iteration" not in header:
        raise ConfigError(f"{path}, header {header[:3]}", "a column 'iteration'", "a file rlvr-train wrote")
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write a ``metrics.csv`` at once or not at all.

    Columns are those of any row, ``iteration`` first, then sorted. Floats are written in full; NaN and what a
    row does not have become an empty cell.

    Args:
        path: the file, replaced if there.
        rows: one mapping an iteration.
    """
    columns = ["iteration", *sorted({key for row in rows for key in row} - {"iteration"})]
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([_cell(row.get(key, math.nan)) for key in columns] for row in rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value)).removesuffix(".0")


def fit_reward(rows: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    r"""Fit :math:`R = a\,e^{H} + b` over the iterations by least squares (claim C12; a < 0 is expected).

    Args:
        rows: with ``rollout/entropy`` (nats) and ``rollout/reward_mean``; iterations without both are left
            out.

    Returns:
        ``a``, ``b`` and ``r2``, the explained share of the variance; all None with fewer than three
        iterations, or where entropy or reward never changes.
    """
    keys = ("rollout/entropy", "rollout/reward_mean")
    pairs = np.array([[row.get(key, math.nan) for key in keys] for row in rows]).reshape(-1, 2)
    entropy, reward = pairs[np.isfinite(pairs).all(axis=1)].T
    if len(entropy) < 3 or any(np.allclose(values, values[0], rtol=1e-9) for values in (entropy, reward)):
        return {"a": None, "b": None, "r2": None}
    x = np.exp(entropy)
    a = float(((x - x.mean()) * (reward - reward.mean())).sum() / ((x - x.mean()) ** 2).sum())
    b = float(reward.mean() - a * x.mean())
    r2 = 1 - float(((reward - a * x - b) ** 2).sum() / ((reward - reward.mean()) ** 2).sum())
    return {"a": a, "b": b, "r2": r2}


def write_report(
    folder: Path,
    rows: Sequence[Mapping[str, float]],
    start: Mapping[str, float],
    region_map: "tuple[Array, Array, Array, Array] | None" = None,
    *,
    ranges: "Sequence[ClipRange]" = (),
) -> list[Path]:
    """Draw everything that was measured into ``folder/report``.

    Args:
        folder: of the run.
        rows: one mapping an iteration, see :func:`read_rows`.
        start: ``val/...`` measured before iteration 0; may be empty.
        region_map: count, flow, prob_edges and log_ratio_edges of :func:`rlvr.figures.region_map_figure`; no
            picture without a token.
        ranges: thresholds of every iteration, from 0.

    Returns:
        The pictures written.
    """
    from rlvr import figures

    drawn = {name: figure(rows, start) for name, figure in figures.RUN_FIGURES.items()}
    if ranges:
        named: dict[ClipRange, str] = {}
        for k in (0, len(ranges) // 2, len(ranges) - 1):
            named.setdefault(ranges[k], f"iteration {k}")
        drawn["thresholds"] = figures.threshold_figure({name: clip for clip, name in named.items()})
        drawn["schedule"] = figures.schedule_figure(ranges)
    if region_map is not None and region_map[0].any():
        drawn["region_map"] = figures.region_map_figure(*region_map)
        drawn["region_map_count"] = figures.region_map_figure(*region_map, colour="count")
    (folder / "report").mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            written.append(folder / "report" / f"{name}.png")
            figure.savefig(written[-1])
    return written


# Several runs
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run folder as read.

    Attributes:
        rows: of ``metrics.csv``.
        summary: of ``summary.json``; empty where the run is not over.
    """

    rows: list[dict[str, float]]
    summary: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run folder, or say in one line why it is none."""
        metrics, summary = folder / "metrics.csv", folder / "summary.json"
        rows = read_rows(metrics) if metrics.is_file() else []
        if not rows:
            wrong = "is empty" if metrics.is_file() else "is not there"
            raise ConfigError(f"{metrics} {wrong}", "a run with an iteration done", "its hydra.run.dir")
        try:
            facts = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
        except ValueError:
            facts = None
        if not isinstance(facts, dict):
            raise ConfigError(f"{summary}", "a JSON object", f"without it: rm {summary}")
        return cls(rows, facts)

    @property
    def heldout(self) -> str:
        """The column of the held-out mean@k: the summary's, else the first benchmark's, else empty."""
        from rlvr.figures import mean_at_k_keys

        keys = [key for key in mean_at_k_keys(self.rows) if self.measured(key)]
        return str(self.summary.get("heldout_metric") or next(iter(keys), ""))

    @property
    def start(self) -> dict[str, float]:
        """What was measured before training, as far as the summary has it."""
        everything = self.summary.get("heldout_start") or {}
        scores = {self.heldout: self.summary.get("heldout_first"), **everything}
        return {key: float(value) for key, value in scores.items() if isinstance(value, int | float)}

    def measured(self, key: str) -> list[float]:
        """The values of a column where it was measured."""
        return [row[key] for row in self.rows if not math.isnan(row.get(key, math.nan))]

    def ends(self, key: str, name: str = "") -> str:
        """``first -> last`` of a column; the summary's ``NAME_first`` and ``NAME_last`` where it has them."""
        values = [*([self.start[key]] if key in self.start else []), *self.measured(key)] or [math.nan]
        found = (self.summary.get(f"{name}_{end}", values[i]) for end, i in (("first", 0), ("last", -1)))
        return " -> ".join(_number(value) for value in found)

    def cells(self) -> dict[str, str]:
        """The run's line of the table, by column."""
        entropy = self.measured("rollout/entropy")
        shares = [self.measured(f"train/clip_frac_{side}") for side in ("low", "high")]
        clipped = 100 * sum(sum(share) / len(share) for share in shares) if all(shares) else math.nan
        passes = f"{self.heldout.rpartition('/')[0]}/pass_at_"
        ks = [key.removeprefix(passes) for key in self.rows[-1] if key.startswith(passes)]
        k = max((k for k in ks if k.isdigit()), key=int, default="k")
        return {
            "iterations": _number(self.summary.get("iterations", len(self.rows)), 0),
            "entropy (nats)": self.ends("rollout/entropy", "entropy"),
            "at half": _number(entropy[len(entropy) // 2]) if entropy else "-",
            "reward": self.ends("rollout/reward_mean", "reward"),
            f"held-out mean@{self.heldout.rpartition('_')[2] or 'k'}": self.ends(self.heldout, "heldout"),
            f"pass@{k}": self.ends(f"{passes}{k}"),
            "clipped (%)": _number(clipped, 2),
            "seconds": _number(self.summary.get("seconds"), 0),
        }


def compare(runs: Sequence[Path], out: Path) -> str:
    """Draw several runs into one picture, and tabulate them.

    Args:
        runs: run folders; one named twice counts once. One that is not over has no ``summary.json`` yet: its
            numbers then come from its rows.
        out: the picture, ``.png``, ``.pdf`` or ``.svg``.

    Returns:
        A table, one run a line; below it the objectives and versions in which the runs differ.

    Raises:
        ConfigError: for a folder that holds no run, or another kind of picture.
    """
    if out.suffix not in PICTURES:
        raise ConfigError(f"--out {out}", f"a name ending in {', '.join(PICTURES)}", "--out compare.png")
    read = {name: Run.read(folder) for name, folder in _names(runs).items()}
    from rlvr.figures import comparison_figure

    figure = comparison_figure({name: (run.rows, run.start) for name, run in read.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    lines = [{"run": name, **run.cells()} for name, run in read.items()]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    table = [columns, *([line.get(column, "-") for column in columns] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    return "\n".join([*text, *_differences({name: run.summary for name, run in read.items()})])


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Each folder under the shortest tail of its path that tells it from the others."""
    paths = list(dict.fromkeys(folder.resolve() for folder in folders))
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {"/".join(path.parts[-depth:]): path for path in paths}


def _differences(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for the objective and for each version that is not the same in all runs."""
    flat: dict[str, dict[str, str]] = {}
    for name, summary in summaries.items():
        versions = summary.get("versions")
        facts = {"objective": summary.get("objective"), **(versions if isinstance(versions, dict) else {})}
        for key, value in facts.items():
            if value is not None:
                flat.setdefault(key, {})[name] = str(value)
    return [
        f"{key} differs: " + "; ".join(f"{name}: {value}" for name, value in values.items())
        for key, values in flat.items()
        if len(set(values.values())) > 1
    ]


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) and math.isfinite(value) else "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the picture; 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m rlvr.report", description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), metavar="FILE", help="the picture")
    chosen = parser.parse_args(arguments)
    try:
        print(compare(chosen.runs, chosen.out))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"picture: {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
