"""The report's figures, as inline SVG without fonts, ids or network addresses.

Colours are CSS variables of report.css, so that a file reads well on a light and on a dark page.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import numpy as np

from minitron.core.text import Number, short_count, size
from minitron.distillation.layouts import Logged

WIDTH_INCHES = 4.6  # two side by side on a desktop, one on a phone: labels stay readable on both
MOST_POINTS = 400  # points of a curve, columns of a heat map
# Placeholders that matplotlib can draw with, and the CSS variables that take their place.
COLORS = {
    "ink": "#010101",
    "rule": "#020202",
    "teacher": "#030303",
    "pruned": "#040404",
    "student": "#050505",
    "scratch": "#060606",
    "kept": "#070707",
    "removed": "#080808",
    "corrected": "#090909",
    **{f"run{number}": f"#0a0a{number:02x}" for number in range(8)},
}
RUN_COLORS, RUN_LINES = [COLORS[f"run{number}"] for number in range(8)], ("-", "--", ":")
# A heat map's pixels cannot be CSS variables: mid-tones whose opacity is the score read well on both pages.
KEPT_RGB, REMOVED_RGB = (0.25, 0.50, 0.91), (0.88, 0.49, 0.13)
STYLE: Any = {  # matplotlib types its keys as literals
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["ink"],
    "axes.edgecolor": COLORS["rule"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.useoffset": False,
    "grid.color": COLORS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": COLORS["rule"],
    "ytick.color": COLORS["rule"],
    "xtick.labelcolor": COLORS["ink"],
    "ytick.labelcolor": COLORS["ink"],
    "ytick.left": False,
    "legend.frameon": False,
}


def bars(values: Mapping[str, Number], unit: str, label: str) -> str:
    """A horizontal bar for each model, with its value."""
    with _canvas(0.5 + 0.32 * len(values), label) as (figure, drawn):
        axes = figure.subplots()
        drawn_bars = axes.barh(list(values), list(values.values()), height=0.62, color=[COLORS[n] for n in values])
        axes.bar_label(drawn_bars, [f"{value:.3f}" for value in values.values()], padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(unit)
    return drawn[0]


def training_curve(metrics: Sequence[Logged], unit: str) -> str:
    training = [(row.step, row.loss) for row in metrics if row.loss is not None]
    heldout = [(row.step, row.heldout_loss) for row in metrics if row.heldout_loss is not None]
    label = "Line chart of the distillation loss per step: " + ", ".join(
        f"{name} from {points[0][1]:.3f} to {points[-1][1]:.3f} {unit}"
        for name, points in (("training", training), ("held-out", heldout))
        if points
    )
    with _canvas(2.5, label) as (figure, drawn):
        axes = figure.subplots()
        steps, losses = _thin([step for step, _ in training]), _thin([loss for _, loss in training])
        axes.plot(steps, losses, color=COLORS["teacher"], linewidth=1.1, label="training batch")
        axes.plot(
            [step for step, _ in heldout],
            [loss for _, loss in heldout],
            color=COLORS["student"],
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            label="held-out",
        )
        axes.legend(loc="upper right")
        axes.locator_params(axis="x", nbins=6)
        axes.set(xlabel="step", ylabel=unit)
    return drawn[0]


def learning_rate_curve(metrics: Sequence[Logged]) -> str:
    points = [(row.step, row.learning_rate) for row in metrics if row.learning_rate is not None]
    rates = [rate for _, rate in points]
    with _canvas(2.5, f"Line chart of the learning rate per step: peak {max(rates):.2g}, end {rates[-1]:.2g}") as (
        figure,
        drawn,
    ):
        axes = figure.subplots()
        axes.plot(_thin([step for step, _ in points]), _thin(rates), color=COLORS["student"], linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", nbins=6)
        axes.set(xlabel="step", ylabel="learning rate")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
    return drawn[0]


def pareto(points: Sequence[tuple[Number, Number]], x: str, y: str, form: Callable[[Number], str]) -> str:
    """The cost and loss of each candidate, the chosen one first, and a line along the Pareto front."""
    front = pareto_front(points)
    label = f"Scatter plot of {len(points)} candidates, {y} against {x}; {len(front)} are beaten by none in both"
    with _canvas(2.5, label) as (figure, drawn):
        axes = figure.subplots()
        steps = [points[index] for index in front]
        axes.step(*zip(*steps, strict=True), where="post", color=COLORS["teacher"], linewidth=1.1)
        axes.scatter(*zip(*points, strict=True), s=16, color=COLORS["teacher"], linewidths=0, label="candidates")
        axes.scatter(*zip(*points[:1], strict=True), s=44, color=COLORS["student"], linewidths=0, label="chosen")
        axes.legend(loc="best")
        axes.margins(x=0.06, y=0.14)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: form(value))
        axes.set(xlabel=x, ylabel=y)
    return drawn[0]


def file_sizes(points: Mapping[str, tuple[Number, Number]]) -> str:
    """Files by size and KL, with their names; KL on a logarithmic scale."""
    label = "Scatter plot of KL against file size: " + ", ".join(f"{name} {kl:.5f}" for name, (_, kl) in points.items())
    with _canvas(2.8, label) as (figure, drawn):
        axes = figure.subplots()
        own = {name: name.endswith(("bpw", "B")) for name in points}
        for kind, color, text in ((False, "teacher", "llama.cpp's mixtures"), (True, "student", "our own")):
            some = [points[name] for name in points if own[name] == kind]
            if some:
                axes.scatter(*zip(*some, strict=True), s=22, color=COLORS[color], linewidths=0, label=text)
        for name, point in points.items():
            axes.annotate(name, point, xytext=(4, 3), textcoords="offset points", fontsize=7)
        axes.set_yscale("log")
        axes.legend(loc="best")
        axes.margins(x=0.14, y=0.14)
        axes.xaxis.set_major_formatter(lambda value, _: size(value))
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel="file", ylabel="KL, nats/token")
    return drawn[0]


def named_points(points: Mapping[str, tuple[Number, Number]], x: str, y: str, form: Callable[[Number], str]) -> str:
    """A point for each run, in a colour of its own."""
    label = f"Scatter plot, {y} against {x}: " + ", ".join(f"{name} {value:.3f}" for name, (_, value) in points.items())
    with _canvas(2.6 + _legend_inches(points), label) as (figure, drawn):
        axes = figure.subplots()
        for number, (name, point) in enumerate(points.items()):
            color, marker = RUN_COLORS[number % len(RUN_COLORS)], "osD^"[number // len(RUN_COLORS) % 4]
            axes.scatter(*point, s=34, color=color, marker=marker, linewidths=0, label=name)
        _legend_above(figure)
        axes.margins(x=0.14, y=0.14)
        axes.xaxis.set_major_formatter(lambda value, _: form(value))
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel=x, ylabel=y)
    return drawn[0]


def overlaid(curves: Mapping[str, Sequence[tuple[Number, Number]]], x: str, y: str, *, marked: bool) -> str:
    """A curve for each run, in the colours of `named_points`; a run without points keeps its colour."""
    last = ", ".join(f"{name} ends at {points[-1][1]:.3f}" for name, points in curves.items() if points)
    with _canvas(2.6 + _legend_inches(curves), f"Line chart of {len(curves)} runs, {y} by {x}: {last}") as (
        figure,
        drawn,
    ):
        axes = figure.subplots()
        for number, (name, points) in enumerate(curves.items()):
            if not points:
                continue
            style = RUN_LINES[number // len(RUN_COLORS) % len(RUN_LINES)]
            axes.plot(
                *(_thin(values) for values in zip(*points, strict=True)),
                color=RUN_COLORS[number % len(RUN_COLORS)],
                linestyle=style,
                marker="o" if marked else None,
                markersize=3.5,
                linewidth=1.3,
                label=name,
            )
        _legend_above(figure)
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
        axes.set(xlabel=x, ylabel=y)
    return drawn[0]


def _legend_inches(names: Iterable[str]) -> float:
    return 0.19 * sum(1 for _ in names)


def _legend_above(figure: Any) -> None:
    """Put the legend outside the axes, one name a line: names of runs are long."""
    figure.legend(loc="outside upper left", ncols=1, fontsize=8.5, borderpad=0, labelspacing=0.3)


def pareto_front(points: Sequence[tuple[Number, Number]]) -> list[int]:
    """The indices of points that no other point beats in both coordinates, by rising x."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def elimination_curves(curves: Sequence[Mapping[int, Number]], unit: str) -> str:
    """The loss of each candidate at the steps where it was measured, the chosen candidate first."""
    label = f"Line chart of the losses of {len(curves)} candidates, which stop one half after the other"
    with _canvas(2.5, label) as (figure, drawn):
        axes = figure.subplots()
        for index, losses in reversed(list(enumerate(curves))):
            color = COLORS["teacher" if index else "student"]
            axes.plot(list(losses), list(losses.values()), color=color, marker="o", markersize=3.5, linewidth=1.2)
        axes.set_xscale("symlog", base=2, linthresh=min(step for losses in curves for step in losses if step))
        axes.set_xticks(
            ticks := sorted({step for losses in curves for step in losses}), [f"{tick:,}" for tick in ticks]
        )
        axes.minorticks_off()
        axes.set(xlabel="step", ylabel=unit)
    return drawn[0]


def layer_scores(scores: Sequence[Number], kept: Sequence[int], unit: str) -> str:
    """A bar for each layer; a layer of infinite score, which must stay, has none."""
    values = np.asarray(scores, dtype=float)
    label = f"Bar chart of the importance of {len(scores)} layers, {len(kept)} of them kept"
    with _canvas(2.2, label) as (figure, drawn):
        axes = figure.subplots()
        for layer in sorted(set(range(len(scores))) - set(kept)):  # whose bars are often too low to be seen
            axes.axvspan(layer - 0.5, layer + 0.5, color=COLORS["removed"], alpha=0.18, linewidth=0)
        heights = np.where(np.isfinite(values), values, 0.0)
        axes.bar(range(len(scores)), heights, width=0.7, color=_kept_colors(len(scores), kept))
        axes.grid(axis="x", visible=False)
        axes.set_xlim(-0.6, len(scores) - 0.4)
        _whole_numbers(axes)
        axes.set(xlabel="layer of the teacher", ylabel=unit)
    return drawn[0]


def hidden_scores(scores: Sequence[Number], kept: Sequence[int] | None) -> str:
    """Channels by falling score. `kept` is None where none was kept or removed."""
    values, is_kept = np.asarray(scores), _mask(len(scores), kept or ())
    order = np.argsort(-values, kind="stable")
    ranks = _spread(len(values))
    values, is_kept = values[order][ranks], is_kept[order][ranks]
    label = f"Sorted importance of {len(scores)} hidden channels"
    label += "" if kept is None else f", {len(kept)} of them kept"
    with _canvas(2.2, label) as (figure, drawn):
        axes = figure.subplots()
        edges = np.append(ranks, len(scores))
        for chosen, color in ((is_kept, "kept"), (~is_kept, "teacher" if kept is None else "removed")):
            axes.stairs(np.where(chosen, values, np.nan), edges, fill=True, color=COLORS[color])
        # A few channels are often many times louder than the rest.
        log = bool(values.min() > 0 and values.max() > 4 * np.median(values))
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.margins(x=0)
        axes.set(xlabel="channel, by falling score", ylabel="score, log scale" if log else "score")
    return drawn[0]


def ffn_scores(scores: Sequence[Sequence[Number]], kept: Mapping[int, Sequence[int]]) -> str:
    """Each layer's neurons by falling score. `kept` maps a kept layer to its kept units; other layers are removed."""
    values, is_kept = np.asarray(scores, dtype=float), _mask_per_layer(scores, kept)
    order = np.argsort(-values, axis=1, kind="stable")
    ranks = _spread(values.shape[1])
    values, is_kept = (np.take_along_axis(a, order, axis=1)[:, ranks] for a in (values, is_kept))
    label = f"Heat map of the importance of {len(scores[0])} ffn neurons in each of {len(scores)} layers"
    return _heat(values, is_kept, label, "neuron, by falling score", log=True, extent=(0, len(scores[0])))


def head_scores(scores: Sequence[Sequence[Number]], kept: Mapping[int, Sequence[int]], group: int, what: str) -> str:
    """Each layer's heads. `group` heads share a kv head, and a line separates groups."""
    values, is_kept = np.asarray(scores, dtype=float), _mask_per_layer(scores, kept)
    label = f"Heat map of the importance of {len(scores[0])} {what}s in each of {len(scores)} layers"
    return _heat(values, is_kept, label, what, extent=(-0.5, len(scores[0]) - 0.5), group=group)


def _heat(
    values: np.ndarray,
    kept: np.ndarray,
    label: str,
    xlabel: str,
    *,
    extent: tuple[Number, Number],
    log: bool = False,
    group: int = 0,
) -> str:
    """A heat map: colour tells kept from removed, opacity is the score; a log scale clips one per cent of outliers."""
    tails = (0.005, 0.995) if log else (0.0, 1.0)
    if log:
        positive = values[values > 0]
        values = np.log10(np.maximum(values, positive.min() if positive.size else 1.0))
    low, high = np.quantile(values, tails)
    layers = len(values)
    with _canvas(min(6.0, max(1.7, 0.9 + 0.15 * layers)), label) as (figure, drawn):
        axes, key = figure.subplots(1, 2, width_ratios=(24, 1.4))
        for each in (axes, key):
            each.grid(False)
            each.spines[:].set_visible(False)
        image = _tint((values.clip(low, high) - low) / ((high - low) or 1.0), kept)
        axes.imshow(image, aspect="auto", interpolation="none", extent=(*extent, layers - 0.5, -0.5))
        for edge in range(group, values.shape[1], group) if group > 1 else ():
            axes.axvline(edge - 0.5, color=COLORS["ink"], linewidth=0.8)
        _whole_numbers(axes)
        axes.set(xlabel=xlabel, ylabel="layer of the teacher")
        scale = np.repeat(np.linspace(0, 1, 64)[:, None], 2, axis=1)
        key.imshow(
            _tint(scale, np.array([[True, False]])),
            aspect="auto",
            interpolation="none",
            extent=(0, 1, 0, 1),
            origin="lower",
        )
        marks = [_short(10**mark if log else mark) for mark in np.linspace(low, high, 3)]
        key.set_xticks([])
        key.set_yticks([0, 0.5, 1], [f"≤ {marks[0]}", marks[1], f"≥ {marks[2]}"] if log else marks)
        key.yaxis.tick_right()
        key.tick_params(length=0)
    return drawn[0]


def _tint(opacity: np.ndarray, kept: np.ndarray) -> np.ndarray:
    color = np.where(np.broadcast_to(kept, opacity.shape)[..., None], KEPT_RGB, REMOVED_RGB)
    return np.concatenate([color, 0.12 + 0.88 * opacity[..., None]], axis=-1)


@contextmanager
def _canvas(height_inches: float, label: str) -> Iterator[tuple[Any, list[str]]]:
    """In the block, a figure in the report's style; afterwards the list holds its SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn: list[str] = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # The label is the salt: ids are the same in every run and differ between figures.
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": label})
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        yield figure, drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
        drawn.append(_inline(buffer.getvalue(), label))


def _inline(svg: str, label: str) -> str:
    """Reduce SVG to the drawing: no prologue, metadata, namespaces, fixed size, style sheet, fonts or unused ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    for name, placeholder in COLORS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view
    return re.sub(r"<svg[^>]*>", f'<svg {view[0]} role="img" aria-label="{escape(label)}">', svg, count=1).strip()


def _short(value: Number) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.2g}"


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis) if axes.images else (axes.xaxis,):
        axis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _kept_colors(num_units: int, kept: Sequence[int]) -> list[str]:
    return [COLORS["kept" if unit else "removed"] for unit in _mask(num_units, kept)]


def _mask(num_units: int, kept: Sequence[int]) -> np.ndarray:
    return np.isin(np.arange(num_units), np.asarray(kept, dtype=int))


def _mask_per_layer(scores: Sequence[Sequence[Number]], kept: Mapping[int, Sequence[int]]) -> np.ndarray:
    return np.stack([_mask(len(row), kept.get(layer, ())) for layer, row in enumerate(scores)])


def _spread(num_units: int) -> np.ndarray:
    """Evenly spaced indices, at most MOST_POINTS."""
    return np.unique(np.linspace(0, num_units - 1, min(num_units, MOST_POINTS)).round().astype(int))


def _thin(values: Sequence[Number]) -> np.ndarray:
    """Means of neighbours, at most MOST_POINTS, so that a long curve keeps its shape."""
    return np.array([part.mean() for part in np.array_split(np.asarray(values, dtype=float), MOST_POINTS) if part.size])
