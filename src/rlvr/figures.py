"""The figures of a run: functions from rows to a matplotlib ``Figure``, without pyplot's global state.

An iteration's entropy, reward, thresholds and clip shares are drawn at its index k. Held-out scores are drawn
at k + 1, for they are measured after its updates; those measured before training stand at 0. So everything at
one x belongs to the weights after x iterations, or to the updates that follow. Nothing is smoothed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize, SymLogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

if TYPE_CHECKING:  # these import torch, which comparing finished runs does not need
    from rlvr.clipping import ClipRange, LinearThreshold

Row = Mapping[str, float]
Array = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's palette for colour-blind readers, without its yellow, which is faint on white."""
UPPER, LOWER = COLOURS[1], COLOURS[0]
REGION_COLOURS = {"E1": COLOURS[0], "E2": COLOURS[1], "E3": COLOURS[4], "E4": COLOURS[5]}
"""Warm where the region raises entropy, cold where it lowers it."""
MEAN_AT_K = re.compile(r"val/(?P<benchmark>.+)/mean_at_(?P<k>\d+)")


def series(rows: Sequence[Row], key: str, shift: int = 0) -> tuple[Array, Array]:
    """What was measured of ``key``: iterations (plus ``shift``) and finite values, both [N]."""
    pairs = [(row["iteration"] + shift, row[key]) for row in rows if np.isfinite(row.get(key, np.nan))]
    points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def scores(rows: Sequence[Row], start: Row, key: str) -> tuple[Array, Array]:
    """A held-out score over the iterations done, with the score before training at 0."""
    x, y = series(rows, key, shift=1)
    if np.isfinite(start.get(key, np.nan)):
        x, y = np.insert(x, 0, 0.0), np.insert(y, 0, start[key])
    return x, y


def mean_at_k_keys(rows: Sequence[Row]) -> list[str]:
    """The columns that hold a benchmark's mean@k, sorted."""
    return sorted({key for row in rows for key in row if MEAN_AT_K.fullmatch(key)})


def entropy_and_gradient(rows: Sequence[Row], start: Row) -> Figure | None:
    """Twice the entropy, which should bound it, and the gradient norm (fig. 1)."""
    x, entropy = series(rows, "train/entropy")
    x_norm, norm = series(rows, "train/grad_norm")
    if not len(x) or not len(x_norm):
        return None
    figure, (ax,) = canvas("Entropy (nats) and gradient norm")
    draw(ax, x, 2 * entropy, color=COLOURS[0], label="twice the entropy, $2H$ (nats)")
    draw(ax, x_norm, norm, color=COLOURS[1], label="gradient norm")
    _finish(ax, "$2H$ (nats), gradient norm", bottom=0.0)
    return figure


def entropy_and_reward(rows: Sequence[Row], start: Row) -> Figure | None:
    """Entropy; training reward and held-out mean@k (fig. 7)."""
    x_entropy, entropy = series(rows, "rollout/entropy")
    x_reward, reward = series(rows, "rollout/reward_mean")
    if not len(entropy) or not len(reward):
        return None
    figure, (left, right) = canvas("Policy entropy (nats)", "Reward and held-out score")
    draw(left, x_entropy, entropy, color=COLOURS[0])
    draw(right, x_reward, reward, color=COLOURS[0], label="training reward, mean", alpha=0.75)
    for key, colour in zip(mean_at_k_keys(rows), cycle(COLOURS[1:]), strict=False):
        if found := MEAN_AT_K.fullmatch(key):
            draw(right, *scores(rows, start, key), color=colour, label="{} mean@{}".format(*found.groups()))
    _finish(left, "entropy of a token (nats)", bottom=0.0)
    _finish(right, "mean reward, share correct")
    return figure


def entropy_and_thresholds(rows: Sequence[Row], start: Row) -> Figure | None:
    """Entropy beside the mean upper and lower thresholds (figs. 10, 11)."""
    x_entropy, entropy = series(rows, "rollout/entropy")
    upper, lower = series(rows, "train/clip_high_mean"), series(rows, "train/clip_low_mean")
    if not len(entropy) or not len(upper[0]) + len(lower[0]):
        return None
    figure, (left, right) = canvas("Policy entropy (nats)", "Mean clip thresholds (ratio - 1)")
    draw(left, x_entropy, entropy, color=COLOURS[0])
    draw(right, *upper, color=UPPER, label="upper, $E^+$")
    draw(right, *lower, color=LOWER, label="lower, $E^-$")
    _finish(left, "entropy of a token (nats)", bottom=0.0)
    _finish(right, "threshold, mean over tokens")
    return figure


def clip_share(rows: Sequence[Row], start: Row) -> Figure | None:
    """Share of the tokens clipped above and below (fig. 12)."""
    upper, lower = series(rows, "train/clip_frac_high"), series(rows, "train/clip_frac_low")
    if not len(upper[0]) + len(lower[0]):
        return None
    figure, (ax,) = canvas("Clip probability (% of tokens)")
    draw(ax, *upper, color=UPPER, label="upper, $A > 0$")
    draw(ax, *lower, color=LOWER, label="lower, $A < 0$")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish(ax, "clipped tokens", bottom=0.0)
    return figure


def region_flows(rows: Sequence[Row], start: Row) -> Figure | None:
    """Entropy flow of every region; above zero it raises entropy (eq. 5)."""
    data = {region: series(rows, f"regions/{region}_flow") for region in REGION_COLOURS}
    if not any(len(x) for x, _ in data.values()):
        return None
    figure, (ax,) = canvas("Entropy flow by region (tabular-logit units)")
    ax.axhline(0.0, color="#444444", linewidth=0.8)
    for region, points in data.items():
        sign = "rises" if region in ("E2", "E3") else "falls"
        draw(ax, *points, color=REGION_COLOURS[region], label=f"{region} (theory: entropy {sign})")
    ax.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    _finish(ax, "flow, summed over tokens and updates")
    return figure


RUN_FIGURES: dict[str, Callable[[Sequence[Row], Row], Figure | None]] = {
    "entropy_and_gradient": entropy_and_gradient,
    "entropy_and_reward": entropy_and_reward,
    "entropy_and_thresholds": entropy_and_thresholds,
    "clip_share": clip_share,
    "region_flows": region_flows,
}
"""File name without suffix, and the figure of a run, or None where its columns were not measured."""


def threshold_figure(ranges: "Mapping[str, ClipRange]") -> Figure:
    """Clip schemes as bounds of the ratio over the token's probability, solid above, dashed below (fig. 3).

    Args:
        ranges: what to call each, and the thresholds; an infinite bound is not drawn.
    """
    figure, (ax,) = canvas("Clip bounds of the ratio: upper (solid), lower (dashed)")
    probs = np.array([0.0, 1.0])
    for (name, clip), colour in zip(ranges.items(), cycle(COLOURS), strict=False):
        draw(ax, probs, 1 + _evaluate(clip.upper, probs), color=colour, label=name, markers=False)
        draw(ax, probs, 1 - _evaluate(clip.lower, probs), color=colour, linestyle="--", markers=False)
    ax.axhline(1.0, color="#444444", linewidth=0.8)
    modes = {clip.mode for clip in ranges.values()}
    xlabel = "probability of the token" + (" in the rollout, $q$" if modes == {"old"} else ", $p$")
    _finish(ax, "bound of $r$ (dimensionless)", xlabel=xlabel)
    ax.set_xlim(0, 1)
    return figure


def schedule_figure(ranges: "Sequence[ClipRange]") -> Figure:
    """The upper and the lower threshold over the iterations, at p = 0.1, 0.5 and 0.9 (figs. 4, 5).

    Args:
        ranges: the thresholds of every iteration, from 0.
    """
    figure, axes = canvas("Upper threshold $E^+(p)$ (ratio - 1)", "Lower threshold $E^-(p)$ (1 - ratio)")
    iterations = np.arange(len(ranges), dtype=np.float64)
    for prob, colour in zip((0.1, 0.5, 0.9), COLOURS, strict=False):
        for ax, side in zip(axes, ("upper", "lower"), strict=True):
            values = np.array([getattr(clip, side)(prob) for clip in ranges])
            draw(ax, iterations, values, color=colour, label=f"$p = {prob}$")
    for ax in axes:
        _finish(ax, "threshold (dimensionless)")
    return figure


def region_map_figure(
    count: Array,
    flow: Array,
    prob_edges: Array,
    log_ratio_edges: Array,
    *,
    colour: Literal["flow", "count"] = "flow",
) -> Figure:
    """Where a run's tokens are, and which of them raise the entropy (fig. 2b).

    Args:
        count: tokens in a bin, [2, Y, X]; A > 0 first, then A < 0.
        flow: entropy flow of a bin, summed over its tokens, [2, Y, X], tabular-logit units.
        prob_edges: edges of the bins in p, [X + 1].
        log_ratio_edges: edges of the bins in ln r, [Y + 1], nats.
        colour: ``flow``: the mean flow of a token in the bin; ``count``: tokens in the bin.
    """
    from rlvr.regions import IMPROBABLE, PROBABLE  # imports torch, see above

    shown = np.ma.masked_equal(count, 0)
    norm: Normalize = LogNorm(vmin=1, vmax=max(float(count.max()), 10))
    if colour == "flow":
        shown = np.ma.masked_array(flow, mask=count == 0) / shown
        largest = float(np.ma.abs(shown).max()) if count.any() else 0.0
        largest = largest or 1.0
        norm = SymLogNorm(linthresh=largest * 1e-3, vmin=-largest, vmax=largest)
    low, high = float(log_ratio_edges[0]), float(log_ratio_edges[-1])
    figure, axes = canvas("$A > 0$: made more probable", "$A < 0$: made less probable")
    for ax, panel, names in zip(axes, shown, (("E1", "E2"), ("E3", "E4")), strict=True):
        mesh = ax.pcolormesh(
            prob_edges, log_ratio_edges, panel, norm=norm, cmap="RdBu_r" if colour == "flow" else "cividis"
        )
        bottom, height = (0.0, high) if names[0] == "E1" else (low, -low)
        for name, left, width in zip(names, (PROBABLE, 0.0), (1 - PROBABLE, IMPROBABLE), strict=True):
            # Drawn a little inside, so that the frame of the axes does not hide its sides.
            corner, inset = (left + 0.004, bottom + 0.01 * height), (width - 0.008, 0.98 * height)
            ax.add_patch(Rectangle(corner, *inset, fill=False, linewidth=1.6, edgecolor="black"))
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
            middle = (left + width / 2, bottom + (0.9 if names[0] == "E1" else 0.1) * height)
            ax.text(*middle, name, ha="center", va="center", fontweight="bold", bbox=box)
        ax.set(
            xlabel="probability of the token, $p$", ylabel=r"$\ln r$ (nats)", xlim=(0, 1), ylim=(low, high)
        )
        ax.grid(False)
        ax.set_facecolor("#eeeeee")
    label = "mean entropy flow of a token (tabular-logit units)" if colour == "flow" else "tokens"
    figure.colorbar(mesh, ax=axes, label=label)
    return figure


def comparison_figure(runs: Mapping[str, tuple[Sequence[Row], Row]]) -> Figure:
    """Several runs side by side: entropy, reward and held-out score, mean thresholds, clip share.

    Args:
        runs: for every run's name its rows, and what was measured before iteration 0.
    """
    figure, (entropy, reward, threshold, share) = canvas(
        "Policy entropy (nats)",
        "Reward (solid, thin) and held-out mean@k (dots)",
        "Mean clip thresholds: upper (solid), lower (dashed)",
        "Clip probability (% of tokens): upper (solid), lower (dashed)",
    )
    spread = [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.05, 0.95, len(runs)))]
    handles = []
    for (name, (rows, start)), colour in zip(
        runs.items(), COLOURS[: len(runs)] if len(runs) <= len(COLOURS) else spread, strict=True
    ):
        handles.append(Line2D([], [], color=colour, linewidth=3, label=name))
        draw(entropy, *series(rows, "rollout/entropy"), color=colour)
        draw(reward, *series(rows, "rollout/reward_mean"), color=colour, alpha=0.45, markers=False)
        for key in mean_at_k_keys(rows):
            draw(reward, *scores(rows, start, key), color=colour, markers=True)
        for side, style in (("high", "-"), ("low", "--")):
            draw(threshold, *series(rows, f"train/clip_{side}_mean"), color=colour, linestyle=style)
            draw(share, *series(rows, f"train/clip_frac_{side}"), color=colour, linestyle=style)
    share.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish(entropy, "entropy of a token (nats)", bottom=0.0)
    _finish(reward, "mean reward, share correct")
    _finish(threshold, "threshold, mean over tokens")
    _finish(share, "clipped tokens", bottom=0.0)
    columns = max(1, min(len(runs), 120 // (8 + max((len(name) for name in runs), default=0))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)
    return figure


# Drawing
# ----------------------------------------------------------------------------------------------------


def canvas(*titles: str) -> tuple[Figure, list[Axes]]:
    """A figure with one titled panel a title, two in a row, drawn by Agg whatever the caller's backend."""
    columns = min(len(titles), 2)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(6.0 * columns + 0.5, 4.2 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(titles))]
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=12)
        ax.grid(True, color="#dddddd", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(ax: Axes, x: Array, y: Array, *, markers: bool | None = None, **style: Any) -> None:
    """One line, unless empty; ``markers`` None: where there are few points, so that a single one is seen."""
    if len(x):
        marker = "o" if (len(x) <= 30 if markers is None else markers) else ""
        ax.plot(x, y, **{"linewidth": 1.6, "marker": marker, "markersize": 4, **style})


def _finish(ax: Axes, ylabel: str, *, bottom: float | None = None, xlabel: str = "iteration") -> None:
    """Label the axes; y starts at ``bottom`` where given; a legend where a line has a label."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if xlabel == "iteration":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if bottom is not None:
        ax.set_ylim(bottom=bottom)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, fontsize=10)


def _evaluate(threshold: "LinearThreshold", probs: Array) -> Array:
    return np.array([threshold(float(prob)) for prob in probs])
