"""The report's pictures, on a light or a dark ground: heat-maps, accuracy against length and against state size."""

import dataclasses
import itertools
from collections.abc import Collection, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from lcr.evaluation.series import Series
from lcr.evaluation.tables import write_bytes, write_length, write_percent


@dataclasses.dataclass(frozen=True)
class Theme:
    ground: str
    text: str
    muted: str
    grid: str
    empty: str


LIGHT = Theme(ground="#ffffff", text="#1f2328", muted="#59636e", grid="#e1e4e8", empty="#eceef0")
DARK = Theme(ground="#161b22", text="#e6edf3", muted="#9aa4af", grid="#30363d", empty="#262c34")

# of Okabe and Ito, to be told apart with any colour vision; markers differ too
COLOURS = ("#2f7fc1", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f8790")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
MOST_BANDS = 6  # series whose intervals can be told apart in one panel
METRICS = {"exact_match": "chance_exact_match", "digit_accuracy": "chance_digit"}  # and what guessing gives
MAP = "viridis"  # equal steps look equal, and it stays ordered in grey


def style(index: int) -> dict:
    """Colour, marker and dashes of the series of this index; no two of 64 have both colour and marker in common."""
    again = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + again) % len(MARKERS)],
        "linestyle": ("-", "--", ":")[again % 3],
    }


def draw_heatmap(series: Series, lengths: Sequence[int], depths: Sequence[float], theme: Theme = LIGHT) -> Figure:
    """Exact match of one series, depth downwards by length (log scale) to the right; cells without a row are hatched.

    Cells are equally wide, each centred at its length: where a length is further from the next, there is a gap.
    """
    x = np.log2(lengths)
    width = float(np.diff(x).min()) if len(x) > 1 else 1.0
    columns = min((x[-1] - x[0]) / width + 1, 16)
    figure = Figure(
        figsize=(2.1 + 0.62 * max(columns, 6), 1.55 + 0.46 * max(len(depths), 3)),
        layout="constrained",
        facecolor=theme.ground,
    )
    axes = figure.add_subplot(facecolor=theme.ground)
    colours = matplotlib.colormaps[MAP]
    hatched = False
    for (i, depth), (j, length) in itertools.product(enumerate(depths), enumerate(lengths)):
        row = series.cells.get((length, depth))
        look = {"facecolor": theme.empty, "edgecolor": theme.muted, "hatch": "////", "lw": 0}
        if row is None:
            hatched = True
        else:
            look = {"facecolor": colours(row.exact_match), "edgecolor": theme.ground, "lw": 1.5}
            colour = ink(colours(float(row.exact_match)))
            axes.text(x[j], i, write_percent(row.exact_match), ha="center", va="center", fontsize=9.5, color=colour)
        axes.add_patch(Rectangle((x[j] - width / 2, i - 0.5), width, 1, **look))
    axes.set_xticks(x, [write_length(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlim(x[0] - width / 2, x[-1] + width / 2)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.tick_params(which="both", length=0, colors=theme.text)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("length in tokens, log scale", color=theme.muted)
    axes.set_ylabel("depth of the needle\n(0 = start of the prompt)", color=theme.muted)
    mark_training(axes, x, width, series, theme)
    axes.set_title(series.label, loc="left", color=theme.text, fontweight="bold", pad=22)
    shades = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), colours)
    bar = figure.colorbar(shades, ax=axes, format=PercentFormatter(1.0), ticks=[0, 0.5, 1], pad=0.015, aspect=12)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=theme.muted)
    bar.set_label("exact match", color=theme.muted)
    if hatched:
        figure.supxlabel("hatched: not run", x=0.995, ha="right", fontsize=8.5, color=theme.muted)
    return figure


def ink(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever stands out more from this colour (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def mark_training(axes: Axes, columns: np.ndarray, width: float, series: Series, theme: Theme) -> None:
    """A labelled line at the training length, but beside the cells, never through one.

    columns: log2 of the lengths. width: of a cell.
    """
    met = int((columns <= np.log2(series.training_length)).sum())
    least = columns[met - 1] + width / 2 if met else columns[0] - width / 2
    most = columns[met] - width / 2 if met < len(columns) else least
    x = float(np.clip(np.log2(series.training_length), least, max(least, most)))
    part = (x - columns[0]) / max(columns[-1] - columns[0], 1)
    axes.axvline(x, color=theme.text, linewidth=1.8, linestyle=(0, (4, 2)), clip_on=False)
    axes.annotate(
        f"trained on up to {write_length(series.training_length)} tokens",
        (x, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 5),
        textcoords="offset points",
        ha="left" if part < 0.35 else "right" if part > 0.65 else "center",
        fontsize=8.5,
        color=theme.text,
    )


def draw_accuracy(all_series: Sequence[Series], theme: Theme = LIGHT) -> Figure:
    """Exact match and digits right, all depths together, against length; bands are 95% intervals (of more than
    `MOST_BANDS` series they would only darken one another, and are left out)."""
    figure = Figure(figsize=(11, 4.6), layout="constrained", facecolor=theme.ground)
    lengths = sorted({length for series in all_series for length in series.lengths})
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric, title in zip(panels, METRICS, ("exact match", "digits right"), strict=True):
        for index, series in enumerate(all_series):
            pooled = [series.pooled(length) for length in series.lengths]
            look = style(index)
            axes.plot(
                series.lengths,
                [getattr(p, metric) for p in pooled],
                label=series.label,
                markersize=6.5,
                markeredgecolor=theme.ground,
                linewidth=1.8,
                zorder=3,
                **look,
            )
            low = [getattr(p, metric + "_low") for p in pooled]
            high = [getattr(p, metric + "_high") for p in pooled]
            if len(all_series) > MOST_BANDS:
                continue
            if len(pooled) > 1:
                axes.fill_between(series.lengths, low, high, color=look["color"], alpha=0.15, linewidth=0)
            else:
                axes.vlines(series.lengths, low, high, color=look["color"], linewidth=1.6)
        dress(axes, theme, title)
        mark_chance(axes, {getattr(series.row, METRICS[metric]) for series in all_series}, theme)
        axes.set_xscale("log", base=2)
        narrowest = min((after / before for before, after in itertools.pairwise(lengths)), default=2.0)
        crowded = np.log(lengths[-1] / lengths[0]) / np.log(narrowest) > 14
        axes.set_xticks(lengths, [write_length(length) for length in lengths], rotation=90 if crowded else 0)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("length in tokens", color=theme.muted)
        for length in sorted({series.training_length for series in all_series}):
            axes.axvline(length, color=theme.muted, linewidth=1.3, linestyle=(0, (4, 2)), zorder=1)
            axes.annotate(
                f"trained on up to {write_length(length)}",
                (length, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 4),
                textcoords="offset points",
                fontsize=8.5,
                color=theme.muted,
            )
    share_legend(figure, panels[0], theme)
    return figure


def draw_state(all_series: Sequence[Series], theme: Theme = LIGHT) -> Figure:
    """Exact match (95% interval) against the bytes of one sequence's state, at up to four of the lengths that half
    of the series have or more."""
    every = sorted({length for series in all_series for length in series.lengths})
    lengths = [n for n in every if 2 * sum(n in series.lengths for series in all_series) >= len(all_series)] or every
    chosen = np.linspace(0, len(lengths) - 1, min(4, len(lengths))).round().astype(int)
    figure = Figure(figsize=(11 if len(chosen) > 2 else 7, 4.2), layout="constrained", facecolor=theme.ground)
    panels = figure.subplots(1, len(chosen), sharex=True, sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, (lengths[i] for i in chosen), strict=True):
        for index, series in enumerate(all_series):
            if length not in series.lengths:
                axes.plot([], [], label=series.label, **style(index))  # the legend names every series
                continue
            pooled = series.pooled(length)
            below, above = pooled.exact_match - pooled.exact_match_low, pooled.exact_match_high - pooled.exact_match
            axes.errorbar(
                [pooled.state_bytes],
                [pooled.exact_match],
                yerr=[[below], [above]],
                label=series.label,
                markersize=10,
                markeredgecolor=theme.ground,
                elinewidth=1.6,
                zorder=3,
                **style(index),
            )
        dress(axes, theme, f"at {write_length(length)} tokens")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: write_bytes(count)))
        axes.xaxis.set_minor_locator(NullLocator())
    spread_states(panels[0], all_series)
    panels[0].set_ylabel("exact match, all depths", color=theme.muted)
    figure.supxlabel("bytes of one sequence's state", color=theme.muted, fontsize="medium")
    share_legend(figure, panels[0], theme)
    return figure


def spread_states(axes: Axes, all_series: Sequence[Series]) -> None:
    """Limits that leave room beside the smallest and the largest state, with a few round ticks between."""
    states = [row.state_bytes for series in all_series for row in series.cells.values() if row.state_bytes]
    low, high = (min(states) / 5, max(states) * 5) if states else (1.0, 10.0)
    axes.set_xlim(low, high)
    powers = np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + 1)
    ticks = 10.0 ** powers[:: max(1, -(-len(powers) // 3))]
    axes.set_xticks(ticks if len(ticks) > 1 else sorted({low * 5, high / 5}))


def dress(axes: Axes, theme: Theme, title: str) -> None:
    axes.set_facecolor(theme.ground)
    axes.set_ylim(-0.05, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(title, loc="left", color=theme.text, fontweight="bold", pad=18)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=theme.text)
    axes.spines[:].set_visible(False)


def mark_chance(axes: Axes, levels: Collection[float], theme: Theme) -> None:
    for level in levels:
        axes.axhline(level, color=theme.muted, linewidth=1.3, linestyle=":", zorder=1)
        axes.annotate(
            f"chance {100 * level:.3g}%",
            (0, level),
            xycoords=axes.get_yaxis_transform(),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=8.5,
            color=theme.muted,
            # The line that marks the training length may stand here.
            bbox={"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 0.5},
        )


def share_legend(figure: Figure, axes: Axes, theme: Theme) -> None:
    """One row above the panels, and more where it would not fit."""
    handles, labels = axes.get_legend_handles_labels()
    width = int(figure.get_figwidth() * 12)  # characters
    fits = sum(len(label) + 7 for label in labels) <= width
    columns = len(labels) if fits else max(1, width // (max(map(len, labels)) + 7))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, labelcolor=theme.text)
