"""The figures of a run: functions from rows to a matplotlib ``Figure``, without pyplot's global state.

What an iteration k measures is drawn at k, held-out scores at k + 1, for they are taken after its updates;
those from before training stand at 0. So all at one x belongs to the same weights. Nothing is smoothed.
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
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

if TYPE_CHECKING:  # these import torch, which comparing finished runs does not need
    from rlvr.clipping import ClipRange

Row = Mapping[str, float]
Array = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's palette for colour-blind readers, without its yellow, which is faint on white."""
UPPER, LOWER = COLOURS[1], COLOURS[0]
REGION_COLOURS = {"E1": COLOURS[0], "E2": COLOURS[1], "E3": COLOURS[4], "E4": COLOURS[5]}
"""Warm where the region raises entropy, cold where it lowers it."""
MEAN_AT_K = re.compile(r"val/(.+)/mean_at_(\d+)")


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
    entropy, reward = series(rows, "rollout/entropy"), series(rows, "rollout/reward_mean")
    if not len(entropy[0]) or not len(reward[0]):
        return None
    figure, (left, right) = canvas("Policy entropy (nats)", "Reward and held-out score")
    draw(left, *entropy, color=COLOURS[0])
    draw(right, *reward, color=COLOURS[0], label="training reward, mean", alpha=0.75)
    for key, colour in zip(mean_at_k_keys([*rows, start]), cycle(COLOURS[1:]), strict=False):
        if found := MEAN_AT_K.fullmatch(key):
            draw(right, *scores(rows, start, key), color=colour, label="{} mean@{}".format(*found.groups()))
    _finish(left, "entropy of a token (nats)", bottom=0.0)
    _finish(right, "mean reward, share correct")
    return figure


def entropy_and_thresholds(rows: Sequence[Row], start: Row) -> Figure | None:
    """Entropy beside the mean upper and lower thresholds (figs. 10, 11)."""
    entropy = series(rows, "rollout/entropy")
    upper, lower = series(rows, "train/clip_high_mean"), series(rows, "train/clip_low_mean")
    if not len(entropy[0]) or not len(upper[0]) + len(lower[0]):
        return None
    figure, (left, right) = canvas("Policy entropy (nats)", "Mean clip thresholds (ratio - 1)")
    draw(left, *entropy, color=COLOURS[0])
    draw(right, *upper, color=UPPER, label="upper, $E^+$")
    draw(right, *lower, color=LOWER, label="lower, $E^-$")
    _finish(left, "entropy of a token (nats)", bottom=0.0)
    _finish(right, "threshold, mean over tokens")
    return figure


def clip_share(rows: Sequence[Row], start: Row) -> Figure | None:
    """Share of the tokens clipped above and below (fig. 12)."""
    (x_upper, upper), (x_lower, lower) = (series(rows, f"train/clip_frac_{side}") for side in ("high", "low"))
    if not len(upper) + len(lower):
        return None
    figure, (ax,) = canvas("Clip probability (% of tokens)")
    draw(ax, x_upper, 100 * upper, color=UPPER, label="upper, $A > 0$")
    draw(ax, x_lower, 100 * lower, color=LOWER, label="lower, $A < 0$")
    _finish(ax, "clipped tokens (%)", bottom=0.0)
    return figure


def region_flows(rows: Sequence[Row], start: Row) -> Figure | None:
    """Entropy flow of every region; above zero it raises entropy (eq. 5)."""
    data = {region: series(rows, f"regions/{region}_flow") for region in REGION_COLOURS}
    if not any(len(x) for x, _ in data.values()):
        return None
    figure, (ax,) = canvas("Entropy flow by region (tabular-logit units)")
    ax.axhline(0.0, color="#444444", linewidth=0.8)
    for region, points in data.items():
        theory = "raises $H$" if region in ("E2", "E3") else "lowers $H$"
        draw(ax, *points, color=REGION_COLOURS[region], label=f"{region} ({theory})")
    ax.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    _finish(ax, "flow, summed over tokens and updates")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, columnspacing=1.2)
    return figure


RUN_FIGURES: dict[str, Callable[[Sequence[Row], Row], Figure | None]] = {
    figure.__name__: figure
    for figure in (entropy_and_gradient, entropy_and_reward, entropy_and_thresholds, clip_share, region_flows)
}
"""File name without suffix, and the figure of a run, or None where its columns were not measured."""


def threshold_figure(ranges: "Mapping[str, ClipRange]") -> Figure:
    """Clip schemes as bounds of the ratio over the token's probability, solid above, dashed below (fig. 3).

    Args:
        ranges: by name; an infinite bound is not drawn.
    """
    figure, (ax,) = canvas("Clip bounds of the ratio: upper (solid), lower (dashed)")
    probs = np.array([0.0, 1.0])  # the thresholds are linear
    for (name, clip), colour in zip(ranges.items(), cycle(COLOURS), strict=False):
        upper, lower = (np.array([side(0.0), side(1.0)]) for side in (clip.upper, clip.lower))
        draw(ax, probs, 1 + upper, color=colour, label=name, markers=False)
        draw(ax, probs, 1 - lower, color=colour, linestyle="--", markers=False)
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

    tokens = np.ma.masked_equal(count, 0)
    if colour == "flow":
        shown, what = np.ma.masked_array(flow, mask=tokens.mask) / tokens, "Mean entropy flow of a token"
        largest = float(np.ma.abs(shown).filled(0).max()) or 1.0
        decades = 10.0 ** (np.floor(np.log10(largest)) + np.arange(-2, 1))
        ticks = [*-decades[::-1], 0.0, *decades]
        norm: Normalize = SymLogNorm(linthresh=decades[0], vmin=-largest, vmax=largest)
        cmap, label = "RdBu_r", "mean flow (tabular-logit units)"
    else:
        shown, what, ticks = tokens, "Tokens", None
        norm = LogNorm(vmin=1, vmax=max(float(count.max()), 10))
        cmap, label = "cividis", "tokens in the bin"
    low, high = float(log_ratio_edges[0]), float(log_ratio_edges[-1])
    figure, axes = canvas(f"{what}, $A > 0$", f"{what}, $A < 0$")
    for ax, panel, names in zip(axes, shown, (("E1", "E2"), ("E3", "E4")), strict=True):
        mesh = ax.pcolormesh(prob_edges, log_ratio_edges, panel, norm=norm, cmap=cmap)
        bottom, height = (0.0, high) if names[0] == "E1" else (low, -low)
        for name, left, width in zip(names, (PROBABLE, 0.0), (1 - PROBABLE, IMPROBABLE), strict=True):
            # Drawn a little inside, so that the frame of the axes does not hide its sides.
            corner, inset = (left + 0.004, bottom + 0.01 * height), (width - 0.008, 0.98 * height)
            ax.add_patch(Rectangle(corner, *inset, fill=False, linewidth=1.6, edgecolor="black"))
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
            y = bottom + (0.9 if names[0] == "E1" else 0.1) * height
            ax.text(left + width / 2, y, name, ha="center", va="center", fontweight="bold", bbox=box)
        ax.set(xlim=(0, 1), ylim=(low, high), xlabel="token's probability, $p$", ylabel=r"$\ln r$ (nats)")
        ax.grid(False)
        ax.set_facecolor("#eeeeee")
    figure.colorbar(mesh, ax=axes, label=label, ticks=ticks)
    return figure


def comparison_figure(runs: Mapping[str, tuple[Sequence[Row], Row]]) -> Figure:
    """Several runs side by side; ``runs`` has, by name, rows and what was measured before iteration 0."""
    figure, (entropy, reward, threshold, share) = canvas(
        "Policy entropy (nats)",
        "Reward (solid, thin) and held-out mean@k (dots)",
        "Mean clip thresholds: upper (solid), lower (dashed)",
        "Clip probability (% of tokens): upper (solid), lower (dashed)",
    )
    many = [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.05, 0.95, len(runs)))]
    colours = COLOURS[: len(runs)] if len(runs) <= len(COLOURS) else many
    handles = []
    for (name, (rows, start)), colour in zip(runs.items(), colours, strict=True):
        handles.append(Line2D([], [], color=colour, linewidth=3, label=name))
        draw(entropy, *series(rows, "rollout/entropy"), color=colour)
        draw(
            reward,
            *series(rows, "rollout/reward_mean"),
            color=colour,
            alpha=0.6,
            linewidth=0.9,
            markers=False,
        )
        for key in mean_at_k_keys([*rows, start]):
            draw(reward, *scores(rows, start, key), color=colour, markers=True)
        for side, style in (("high", "-"), ("low", "--")):
            draw(threshold, *series(rows, f"train/clip_{side}_mean"), color=colour, linestyle=style)
            x, clipped = series(rows, f"train/clip_frac_{side}")
            draw(share, x, 100 * clipped, color=colour, linestyle=style)
    _finish(entropy, "entropy of a token (nats)", bottom=0.0)
    _finish(reward, "mean reward, share correct")
    _finish(threshold, "threshold, mean over tokens")
    _finish(share, "clipped tokens (%)", bottom=0.0)
    columns = max(1, min(len(runs), 120 // (8 + max((len(name) for name in runs), default=0))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)
    return figure


# Drawing
# ----------------------------------------------------------------------------------------------------


def canvas(*titles: str) -> tuple[Figure, list[Axes]]:
    """A figure with one titled panel a title, two in a row, drawn by Agg whatever the caller's backend."""
    columns = min(len(titles), 2)
    rows = -(-len(titles) // columns)
    figure = Figure(
        figsize=(6.0 * columns + 0.5, 4.2 * rows),
        dpi=130,
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
    )
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
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if bottom is not None:
        ax.set_ylim(bottom=bottom)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(framealpha=0.85, edgecolor="none", fontsize=10)
