"""Rows on disk, the figures drawn from them, the reward fit, and runs side by side."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from rlvr import figures
from rlvr.clipping import ClipRange
from rlvr.errors import ConfigError
from rlvr.report import compare, fit_reward, main, read_rows, write_report, write_rows
from rlvr.schedules import increase_then_decrease

START = {"val/heldout/mean_at_8": 0.1, "val/heldout/pass_at_8": 0.25}


def run_rows(iterations: int = 6, entropy: float = 1.0) -> list[dict[str, float]]:
    """Rows of a run whose held-out score is measured every other iteration; reward is 0.9 - 0.2 exp(H)."""
    rows = []
    for k in range(iterations):
        level = entropy * (1 - 0.1 * k)
        row = {
            "iteration": float(k),
            "train/entropy": level,
            "train/grad_norm": level / 2,
            "train/clip_frac_low": 0.01,
            "train/clip_frac_high": 0.02,
            "train/clip_low_mean": 0.2,
            "train/clip_high_mean": 0.3 - 0.01 * k,
            "rollout/entropy": level,
            "rollout/reward_mean": 0.9 - 0.2 * math.exp(level),
            **{f"regions/E{i}_flow": 1e-4 * i for i in (1, 2, 3, 4)},
        }
        if k % 2:
            row |= {"val/heldout/mean_at_8": 0.1 * k, "val/heldout/pass_at_4": 0.15 * k}
            row |= {"val/heldout/pass_at_8": 0.2 * k}
        rows.append(row)
    return rows


def write_run(folder: Path, rows: list[dict[str, float]], **facts: object) -> Path:
    folder.mkdir(parents=True)
    write_rows(folder / "metrics.csv", rows)
    summary = {
        "iterations": len(rows),
        "reward_first": rows[0]["rollout/reward_mean"],
        "reward_last": rows[-1]["rollout/reward_mean"],
        "entropy_first": rows[0]["rollout/entropy"],
        "entropy_last": rows[-1]["rollout/entropy"],
        "heldout_first": 0.1,
        "heldout_last": 0.5,
        "heldout_metric": "val/heldout/mean_at_8",
        "heldout_start": START,
        "seconds": 61.4,
        "tokens_per_s": 1e3,
        "objective": "ppo_clip",
        "versions": {"torch": "2.13.0"},
        **facts,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def points(figure: Figure, panel: int, line: int) -> tuple[list[float], list[float]]:
    x, y = figure.axes[panel].lines[line].get_data()
    return list(map(float, x)), list(map(float, y))


def labels(figure: Figure) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes]


# Rows
# ----------------------------------------------------------------------------------------------------


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    """To the last bit, infinities too; NaN and what was never measured are both NaN."""
    rows = [
        {"b": 0.1 + 0.2, "iteration": 0.0, "a": math.inf},
        {"iteration": 1.0, "b": math.nan, "c": np.float64(1e-300)},
        {"iteration": 2.0, "b": -1e22, "c": -0.0},
    ]
    write_rows(tmp_path / "metrics.csv", rows)
    back = read_rows(tmp_path / "metrics.csv")
    assert list(back[0]) == ["iteration", "a", "b", "c"]
    for row, read in zip(rows, back, strict=True):
        for key, value in read.items():
            np.testing.assert_equal(value, float(row.get(key, math.nan)))
    assert math.copysign(1, back[2]["c"]) == -1


def test_an_unmeasured_cell_is_empty_and_a_whole_number_plain(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.csv", [{"iteration": 3.0, "x": math.nan}, {"iteration": 4, "x": 0.5}])
    assert (tmp_path / "metrics.csv").read_text() == "iteration,x\n3,\n4,0.5\n"


def test_writing_replaces_at_once_or_not_at_all(tmp_path: Path) -> None:
    """A failed write leaves the file of before, and no write leaves another file."""
    path = tmp_path / "metrics.csv"
    write_rows(path, run_rows(2))
    before = path.read_text()
    with pytest.raises(TypeError):
        write_rows(path, [{"iteration": 0.0}, {"iteration": "one"}])  # type: ignore[dict-item]
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
    write_rows(path, run_rows(3))
    assert len(read_rows(path)) == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("iteration,x\n0,1\n1\n", "line 3", id="a line cut off"),
        pytest.param("iteration,x\n0,much\n", "line 2", id="not a number"),
        pytest.param("x\n1\n", "column 'iteration'", id="another table"),
    ],
)
def test_what_is_no_metrics_file_is_said_so(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_rows(tmp_path / "metrics.csv")


def test_no_row_is_a_header_only(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.csv", [])
    assert (tmp_path / "metrics.csv").read_text() == "iteration\n"
    assert read_rows(tmp_path / "metrics.csv") == []


# The fit R = a exp(H) + b
# ----------------------------------------------------------------------------------------------------


def test_the_fit_finds_planted_parameters() -> None:
    fit = fit_reward([*run_rows(), {"iteration": 6.0, "rollout/entropy": math.nan}])
    assert fit == pytest.approx({"a": -0.2, "b": 0.9, "r2": 1.0})


def test_the_fit_of_noise_explains_as_much_as_polyfit_does() -> None:
    generator = np.random.default_rng(0)
    entropy, reward = generator.uniform(0.1, 1.5, 50), generator.uniform(0, 1, 50)
    rows = [{"rollout/entropy": h, "rollout/reward_mean": r} for h, r in zip(entropy, reward, strict=True)]
    a, b = np.polyfit(np.exp(entropy), reward, 1)
    r2 = np.corrcoef(np.exp(entropy), reward)[0, 1] ** 2
    assert fit_reward(rows) == pytest.approx({"a": a, "b": b, "r2": r2})


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="none"),
        pytest.param(run_rows(2), id="two points"),
        pytest.param([{"iteration": 0.0}] * 5, id="not measured"),
        pytest.param(
            [{"rollout/entropy": 0.3, "rollout/reward_mean": r} for r in (0, 0.5, 1)], id="constant H"
        ),
        pytest.param(
            [{"rollout/entropy": h, "rollout/reward_mean": 0.5} for h in (0, 0.5, 1)], id="constant R"
        ),
    ],
)
def test_nothing_to_fit(rows: list[dict[str, float]]) -> None:
    assert fit_reward(rows) == {"a": None, "b": None, "r2": None}


# Figures
# ----------------------------------------------------------------------------------------------------


def test_figure_1_has_twice_the_entropy_and_the_gradient_norm() -> None:
    figure = figures.entropy_and_gradient(run_rows(3), {})
    assert figure is not None
    assert points(figure, 0, 0)[1] == pytest.approx([2.0, 1.8, 1.6])
    assert points(figure, 0, 1)[1] == pytest.approx([0.5, 0.45, 0.4])
    assert "nats" in labels(figure)[0]


def test_figure_7_puts_held_out_scores_after_their_iteration() -> None:
    figure = figures.entropy_and_reward(run_rows(4), START)
    assert figure is not None
    assert labels(figure) == ["entropy of a token (nats)", "mean reward, share correct"]
    assert points(figure, 0, 0)[0] == [0, 1, 2, 3]
    assert len(figure.axes[1].lines) == 2
    x, y = points(figure, 1, 1)
    assert x == [0, 2, 4]
    assert y == pytest.approx([0.1, 0.1, 0.3])
    assert figure.axes[1].get_legend_handles_labels()[1] == ["training reward, mean", "heldout mean@8"]


def test_figures_10_and_12_tell_upper_from_lower() -> None:
    thresholds, clipped = (f(run_rows(2), {}) for f in (figures.entropy_and_thresholds, figures.clip_share))
    assert thresholds is not None
    assert clipped is not None
    assert points(thresholds, 1, 0)[1] == pytest.approx([0.3, 0.29])
    assert points(thresholds, 1, 1)[1] == pytest.approx([0.2, 0.2])
    assert points(clipped, 0, 0)[1] == pytest.approx([2, 2])
    assert points(clipped, 0, 1)[1] == pytest.approx([1, 1])
    assert labels(clipped) == ["clipped tokens (%)"]


def test_region_flows_are_four_lines_and_zero() -> None:
    figure = figures.region_flows(run_rows(2), {})
    assert figure is not None
    assert [points(figure, 0, i)[1] for i in range(1, 5)] == [[1e-4 * i] * 2 for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", figures.RUN_FIGURES)
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="no row"),
        pytest.param([{"iteration": 0.0}], id="no column"),
        pytest.param([dict.fromkeys(run_rows(2)[1], math.nan) | {"iteration": 0.0}], id="nothing measured"),
    ],
)
def test_what_was_not_measured_is_not_drawn(name: str, rows: list[dict[str, float]]) -> None:
    assert figures.RUN_FIGURES[name](rows, {}) is None


@pytest.mark.parametrize("name", figures.RUN_FIGURES)
def test_one_iteration_is_seen(name: str) -> None:
    figure = figures.RUN_FIGURES[name](run_rows(1), {})
    assert figure is not None
    assert any(line.get_marker() == "o" for axes in figure.axes for line in axes.lines)


def test_figure_3_draws_the_bounds_of_the_ratio() -> None:
    ranges = {"ID": increase_then_decrease(0.0), "none": ClipRange.unclipped()}
    figure = figures.threshold_figure(ranges)
    assert points(figure, 0, 0) == ([0, 1], [1.5, 1.25])
    assert points(figure, 0, 1) == ([0, 1], [0.8, 0.8])
    assert figure.axes[0].get_xlabel() == "probability of the token, $p$"


def test_figures_4_and_5_draw_the_thresholds_of_every_iteration() -> None:
    figure = figures.schedule_figure([increase_then_decrease(k / 4) for k in range(4)])
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]
    assert points(figure, 0, 1) == ([0, 1, 2, 3], pytest.approx([0.375, 0.2875, 0.2, 0.2]))
    assert points(figure, 1, 2)[1] == pytest.approx([0.2, 0.2, 0.2, (0.2 + 0.3 - 0.13 * 0.9) / 2])


def region_map() -> tuple[np.ndarray, ...]:
    count = np.array([[[4.0, 0.0], [1.0, 2.0]], [[0.0, 8.0], [5.0, 5.0]]])
    flow = np.array([[[8e-6, 0.0], [-3e-6, 1e-9]], [[0.0, 4e-6], [0.0, -5e-7]]])
    return count, flow, np.array([0.0, 0.5, 1.0]), np.array([-0.4, 0.0, 0.4])


def test_the_region_map_shows_means_and_outlines_the_regions() -> None:
    figure = figures.region_map_figure(*region_map())
    positive, negative = figure.axes[:2]
    mean = positive.collections[0].get_array()
    assert mean.mask.tolist() == [[False, True], [False, False]]
    assert mean.compressed() == pytest.approx([2e-6, -3e-6, 5e-10])
    assert [text.get_text() for axes in (positive, negative) for text in axes.texts] == [
        "E1",
        "E2",
        "E3",
        "E4",
    ]
    boxes = [patch.get_bbox() for axes in (positive, negative) for patch in axes.patches]
    assert [(box.x0 > 0.7, box.x1 <= 0.3) for box in boxes] == [(True, False), (False, True)] * 2
    assert [box.y0 > 0 for box in boxes] == [True, True, False, False]
    assert positive.get_ylabel() == r"$\ln r$ (nats)"
    counts = figures.region_map_figure(*region_map(), colour="count").axes[1].collections[0].get_array()
    assert counts.compressed().tolist() == [8, 5, 5]


def test_a_report_holds_everything_measured(tmp_path: Path) -> None:
    ranges = [increase_then_decrease(k / 6) for k in range(6)]
    written = write_report(tmp_path, run_rows(), START, region_map(), ranges=ranges)
    names = {*figures.RUN_FIGURES, "thresholds", "schedule", "region_map", "region_map_count"}
    assert sorted(written) == sorted((tmp_path / "report").iterdir())
    assert {path.stem for path in written} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_report_leaves_out_the_rest(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if "train" not in key} for row in run_rows()]
    count, *rest = region_map()
    written = write_report(tmp_path, rows, {}, (np.zeros_like(count), *rest))
    assert {path.stem for path in written} == {"entropy_and_reward", "region_flows"}


# Several runs
# ----------------------------------------------------------------------------------------------------


def test_the_table_of_two_runs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "id", run_rows()),
        write_run(tmp_path / "grpo", run_rows(4, 0.5), seconds=None, versions={"torch": "2.12.1"}),
    ]
    table = compare(runs, tmp_path / "out" / "both.png").splitlines()
    assert [re.split(" {2,}", line) for line in table] == [
        ["run", "iterations", "entropy (nats)", "at half", "reward"]
        + ["held-out mean@8", "pass@8", "clipped (%)", "seconds"],
        ["id", "6", "1.000 -> 0.500", "0.700", "0.356 -> 0.570"]
        + ["0.100 -> 0.500", "0.250 -> 1.000", "3.00", "61"],
        ["grpo", "4", "0.500 -> 0.350", "0.400", "0.570 -> 0.616"]
        + ["0.100 -> 0.500", "0.250 -> 0.600", "3.00", "-"],
        ["torch differs: id: 2.13.0; grpo: 2.12.1"],
    ]
    assert len({len(line) for line in table[:3]}) == 1
    assert (tmp_path / "out" / "both.png").stat().st_size > 10_000


def test_the_picture_of_two_runs() -> None:
    runs = {"a": (run_rows(4), START), "b": (run_rows(40), {})}
    figure = figures.comparison_figure(runs)
    assert [len(axes.lines) for axes in figure.axes] == [2, 4, 4, 4]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert points(figure, 1, 1)[0] == [0, 2, 4]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2


def test_many_runs_have_a_colour_each() -> None:
    figure = figures.comparison_figure({f"run {i}": (run_rows(2), {}) for i in range(12)})
    assert len({line.get_color() for line in figure.axes[0].lines}) == 12


def test_a_run_that_is_not_over_is_read_from_its_rows(tmp_path: Path) -> None:
    """No summary, no held-out score and no clipping: dashes, not errors."""
    rows = [{"iteration": k, "rollout/entropy": 1.0 - k, "rollout/reward_mean": 0.5} for k in (0.0, 1.0)]
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run" / "metrics.csv", rows)
    cells = compare([tmp_path / "run"], tmp_path / "out.png").splitlines()[1]
    assert re.sub(" +", " ", cells) == "run 2 1.000 -> 0.000 0.000 0.500 -> 0.500 - -> - - -> - - -"


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / kind / "seed100", run_rows(3)) for kind in ("id", "od")]
    table = compare([*runs, runs[0]], tmp_path / "out.png").splitlines()
    assert [line.split()[0] for line in table] == ["run", "id/seed100", "od/seed100"]


def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-W", "error", "-m", "rlvr.report", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_command_prints_the_table_and_writes_the_picture(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, run_rows(3)) for name in ("one", "two")]
    done = command(*runs, "--out", tmp_path / "both.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["run", "one", "two", "picture:"]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_in_one_line_that_a_folder_holds_no_run(tmp_path: Path) -> None:
    done = command(tmp_path, "--out", tmp_path / "out.png")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'metrics.csv'} is not there: expected a run")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("spoil", "out", "message"),
    [
        pytest.param({"metrics.csv": "iteration\n"}, "out.png", "metrics.csv is empty", id="no iteration"),
        pytest.param({"metrics.csv": "iteration\nx\n"}, "out.png", "line 2", id="broken rows"),
        pytest.param({"summary.json": "{"}, "out.png", "summary.json", id="broken summary"),
        pytest.param({"summary.json": "[]"}, "out.png", "summary.json", id="another summary"),
        pytest.param({}, "out.txt", ".pdf", id="no picture"),
        pytest.param({"used": "a file"}, "used/out.png", "used", id="nowhere to write"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: dict[str, str], out: str, message: str
) -> None:
    run = write_run(tmp_path / "run", run_rows(2))
    for name, text in spoil.items():
        (run / name).write_text(text)
    assert main([str(run), "--out", str(run / out)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_writing_rows_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, rlvr.report; print(*{'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
