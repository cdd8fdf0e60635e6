"""Plots of evaluations and of learned scales, readable in print, in grey and by colour-blind readers.

Series differ in colour (Okabe and Ito's palette), marker and line style; heat maps (cividis, or purple to orange around
zero) carry their numbers.  Every function writes PNG, SVG or PDF by the suffix of ``path`` (one, or a list), each file
in one step, and keeps no state of matplotlib's.
"""

import os
from collections.abc import Mapping, Sequence

from ..evaluation.results import Evaluation
from ..utils.files import replacing

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
FORMATS = (".png", ".svg", ".pdf")


def figure(columns: int = 1, rows: int = 1, width: float = 6.4, height: float = 4.0, **options):
    """A new figure with plain axes: ``(figure, axes)`` as ``matplotlib.pyplot.subplots`` gives them."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = fig.subplots(rows, columns, **options)
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    return fig, axes


def save(fig, path) -> None:
    """Writes the figure, the format by the suffix; ``path`` may also be a list of paths.

    Raises:
        ValueError: a suffix that is not one of ``FORMATS``.
    """
    if isinstance(path, (list, tuple)):
        for one in path:
            save(fig, one)
        return
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in FORMATS:
        raise ValueError(f"seal_ops.plots: path must end with one of {', '.join(FORMATS)}, got {os.fspath(path)}")
    with replacing(path) as temporary:
        fig.savefig(temporary, format=suffix[1:])


def accuracy_by_length(
    evaluations: Sequence[Evaluation], path, *, title: str | None = None, trained_at: int | None = None
) -> None:
    """Accuracy over prompt length with 95 % intervals, one line an evaluation (its ``name`` is the label).

    Args:
        trained_at: length of the training samples, marked on the axis.
    """
    fig, ax = figure()
    lengths = sorted({length for evaluation in evaluations for length in evaluation.accuracy})
    spread = (lengths[-1] - lengths[0]) * 0.006 if len(lengths) > 1 else 1.0
    for i, evaluation in enumerate(evaluations):
        cells = evaluation.accuracy
        mean = [cell.accuracy for cell in cells.values()]
        # Side by side, so that intervals at one length do not hide each other.
        x = [length + (i - (len(evaluations) - 1) / 2) * spread for length in cells]
        below = [max(0.0, cell.accuracy - cell.low) for cell in cells.values()]
        above = [max(0.0, cell.high - cell.accuracy) for cell in cells.values()]
        style = {"color": _nth(COLOURS, i), "marker": _nth(MARKERS, i), "linestyle": _nth(LINES, i)}
        ax.errorbar(x, mean, (below, above), label=evaluation.name, capsize=3, markersize=6, linewidth=1.6, **style)
    if trained_at is not None:
        ax.axvline(trained_at, color="0.6", linewidth=1, linestyle=(0, (1, 3)), zorder=0)
        ax.text(
            trained_at, 1.01, "trained here ", transform=ax.get_xaxis_transform(), color="0.4", fontsize=8, ha="right"
        )
    ax.set_xticks(lengths)
    ax.set_ylim(-0.02, 1.04)
    ax.set_xlabel("prompt length in tokens")
    cases = sorted({cell.cases for evaluation in evaluations for cell in evaluation.accuracy.values()})
    ax.set_ylabel("accuracy")
    ax.set_title(title or f"{evaluations[0].task}: accuracy by length", loc="left", fontsize=11)
    counted = str(cases[0]) if len(cases) == 1 else f"{cases[0]} to {cases[-1]}"
    # Underneath, where no line can run through it.
    fig.legend(
        title=f"95 % Wilson intervals, {counted} cases a point", loc="outside lower center",
        ncols=min(4, len(evaluations)), frameon=False, fontsize=9, title_fontsize=8,
    )  # fmt: skip
    save(fig, path)


def scales_by_layer(scales: Mapping[str, Mapping[int, object]], path, *, title: str | None = None) -> None:
    """The learned scales of every layer, one panel an adapter.

    Args:
        scales: ``{name: {layer: tensor}}``; a tensor ``[Hq]`` is drawn as one point a head, ``[Hq, D]`` as a box of its
            channels (quartiles; whiskers at 5 % and 95 %; the extremes as points).
    """
    width = max(3.6, 0.16 * max(len(layers) for layers in scales.values()))
    fig, axes = figure(len(scales), width=width * len(scales), height=3.6, squeeze=False)
    for i, (ax, (name, layers)) in enumerate(zip(axes[0], scales.items(), strict=True)):
        colour = _nth(COLOURS, i + 1)
        values = {layer: tensor.detach().float().cpu() for layer, tensor in sorted(layers.items())}
        ax.axhline(1, color="0.5", linewidth=1)
        if all(tensor.ndim == 1 for tensor in values.values()):
            for layer, tensor in values.items():
                # Heads from left to right within the layer's place.
                x = [layer + 0.5 * ((h + 0.5) / len(tensor) - 0.5) for h in range(len(tensor))]
                ax.plot(x, tensor, linestyle="", marker="o", color=colour, markersize=5 if len(tensor) <= 8 else 2.5)
            ax.plot(list(values), [t.mean() for t in values.values()], color="black", linewidth=1.2, linestyle="--")
            note = "points: heads, left to right; dashed: mean"
        else:
            for layer, tensor in values.items():
                flat = tensor.flatten()
                ax.plot([layer, layer], [flat.min(), flat.max()], linestyle="", marker="_", color="0.3", markersize=6)
            ax.boxplot(
                [tensor.flatten().numpy() for tensor in values.values()], positions=list(values), widths=0.5,
                whis=(5, 95), showfliers=False, patch_artist=True, manage_ticks=False,
                boxprops={"facecolor": colour, "alpha": 0.45, "edgecolor": colour},
                medianprops={"color": "black"}, whiskerprops={"color": colour}, capprops={"color": colour},
            )  # fmt: skip
            note = "channels: quartiles, 5 to 95 %, extremes"
        ax.set_xlabel("layer")
        ax.set_xticks(_ticks(list(values)))
        ax.set_title(f"{name}\n", loc="left", fontsize=11)
        ax.text(0, 1.02, note, transform=ax.transAxes, fontsize=8, color="0.35")
    axes[0][0].set_ylabel("learned scale (1 = unchanged)")
    if title:
        fig.suptitle(title, fontsize=11)
    save(fig, path)


def depth_by_length(evaluation: Evaluation, path, *, bins: int = 5, title: str | None = None) -> None:
    """Heat map of accuracy: prompt length across, depth of the answer in the text down (0 % is its start).

    Args:
        evaluation: its records must have ``depth`` in [0, 1].
        bins: rows where the depths are not on a grid of at most 11 values.

    Raises:
        ValueError: a case without a depth.
    """
    depths = sorted({record.get("depth") for record in evaluation.records}, key=lambda d: -1 if d is None else d)
    if not depths or depths[0] is None:
        raise ValueError(
            f"seal_ops.plots.depth_by_length: evaluation must have a depth for every case, {evaluation.task} has none"
        )
    if len(depths) <= 11:
        rows, labels = depths, [f"{d:.0%}" for d in depths]
        row_of = rows.index
    else:
        rows = list(range(bins))
        labels = [f"{i / bins:.0%} to {(i + 1) / bins:.0%}" for i in rows]

        def row_of(depth):
            return min(int(depth * bins), bins - 1)

    cells = evaluation.by("length", lambda record: row_of(record["depth"]))
    lengths = sorted({length for length, _ in cells})
    values = [[getattr(cells.get((n, r)), "accuracy", float("nan")) for n in lengths] for r in range(len(rows))]
    fig, ax = figure(width=1.9 + 0.75 * len(lengths) + 1.0, height=1.5 + 0.36 * len(rows))
    image = _heat(fig, ax, values, lengths, labels, limits=(0, 1), fmt="{:.2f}", label="accuracy")
    image.axes.set_xlabel("prompt length in tokens")
    ax.set_ylabel("depth of the answer")
    counts = sorted({cell.cases for cell in cells.values()})
    counted = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    ax.set_title(f"{title or f'{evaluation.task}, {evaluation.name}'}\n", loc="left", fontsize=11)
    ax.text(0, 1.02, f"{counted} cases a cell", transform=ax.transAxes, fontsize=8, color="0.35", va="bottom")
    save(fig, path)


def head_importance(
    panels: Mapping[str, Sequence[Sequence[float]]], path, *, label: str, title: str | None = None
) -> None:
    """Heat maps layers x heads of what a head's removal changes, one panel an entry, on one colour scale.

    Args:
        panels: ``{title: grid}`` as :meth:`seal_ops.experiments.head_importance.HeadImportance.grid` gives them; NaN
            stays white.
        label: what the colours measure, with its unit.
    """
    heads = max(len(row) for grid in panels.values() for row in grid)
    layers = max(len(grid) for grid in panels.values())
    size = max(0.14, min(0.62, 9 / heads))
    fig, axes = figure(
        len(panels),
        width=len(panels) * (0.9 + heads * size) + 1.0,
        height=1.6 + layers * min(size, 0.42),
        squeeze=False,
    )
    known = [abs(v) for grid in panels.values() for row in grid for v in row if v == v]
    extreme = max([*known, 1e-9])
    for ax, (name, grid) in zip(axes[0], panels.items(), strict=True):
        rows = [[*row, *[float("nan")] * (heads - len(row))] for row in grid]
        image = _heat(
            fig, ax, rows, range(heads), range(len(rows)), limits=extreme, fmt="{:+.2g}", numbers=heads <= 12 and layers <= 24,  # noqa: E501
            label=label if ax is axes[0][-1] else None,
        )  # fmt: skip
        image.axes.invert_yaxis()  # the first layer at the bottom, as models are drawn
        ax.set_xlabel("head")
        ax.set_title(name, loc="left", fontsize=10)
    axes[0][0].set_ylabel("layer")
    if title:
        fig.suptitle(title, fontsize=11, x=0.01, ha="left")
    save(fig, path)


def matrix(rows: Sequence[str], columns: Sequence[str], values, path, *, xlabel: str, ylabel: str, title: str) -> None:
    """Heat map of accuracies in [0, 1] with their numbers: ``values[row][column]``."""
    fig, ax = figure(width=2.6 + 0.95 * len(columns), height=1.7 + 0.42 * len(rows))
    _heat(fig, ax, values, columns, rows, limits=(0, 1), fmt="{:.2f}", label="accuracy")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.set_title(title, loc="left", fontsize=11)
    save(fig, path)


def agreement(gradient, ablation, path, *, name: str, rho: float | None, labels: Sequence[str] = ()) -> None:
    """Scatter of the gradient's estimate over the measured change, one point a unit; the diagonal is perfect agreement.

    Args:
        gradient, ablation: vectors ``[N]``, nats.
        labels: names of the units; those of the six largest changes are written beside their points.
    """
    fig, ax = figure(width=4.8, height=4.4)
    ax.grid(color="0.9", linewidth=0.8)
    x, y = [float(v) for v in ablation], [float(v) for v in gradient]
    ax.axhline(0, color="0.7", linewidth=0.8)
    ax.axvline(0, color="0.7", linewidth=0.8)
    if max(map(abs, x + y)) > 5:  # linear within one nat, logarithmic beyond: a few heads may carry everything
        ax.set_xscale("symlog", linthresh=1)
        ax.set_yscale("symlog", linthresh=1)
    else:
        ax.locator_params(nbins=6)
    ends = [min(x + y), *[t / 10 for t in range(-10, 11)], max(x + y)]
    ends = sorted(t for t in ends if min(x + y) <= t <= max(x + y))
    ax.plot(ends, ends, color="0.4", linewidth=1, linestyle="--", label="equal")
    ax.plot(x, y, linestyle="", marker="o", color=COLOURS[1], markersize=5, alpha=0.8)
    for i in sorted(range(len(labels)), key=lambda i: -abs(x[i]))[:6]:
        ax.annotate(labels[i], (x[i], y[i]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    ax.set_xlabel("measured change of the answer's log-probability (nats)")
    ax.set_ylabel("first-order estimate (nats)")
    if labels:
        ax.text(0.98, 0.02, "labels: layer.head", transform=ax.transAxes, fontsize=8, color="0.35", ha="right")
    shown = "" if rho is None else f"\nSpearman {rho:.2f}"
    ax.set_title(f"{name}{shown}", loc="left", fontsize=11)
    ax.legend(frameon=False, fontsize=8, loc="best")
    save(fig, path)


def cost(rows: Sequence[Mapping], path, *, title: str | None = None) -> None:
    """Bars of what each method costs: a panel for trained parameters, training time, peak memory and evaluation time.

    Args:
        rows: dicts with ``name`` and any of ``parameters``, ``training_seconds``, ``peak_memory`` (bytes) and
            ``evaluation_seconds``; panels without a value are left out.
    """
    kinds = [
        ("parameters", "trained numbers (log)", 1, "{:,.0f}"),
        ("training_seconds", "training, seconds", 1, "{:.3g}"),
        ("peak_memory", "peak memory, MiB", 2**20, "{:,.0f}"),
        ("evaluation_seconds", "evaluation, seconds", 1, "{:.3g}"),
    ]
    kinds = [kind for kind in kinds if any(row.get(kind[0]) for row in rows)]
    names = [row["name"] for row in rows]
    fig, axes = figure(
        len(kinds), width=1.0 + 2.5 * len(kinds), height=1.1 + 0.4 * len(rows), squeeze=False, sharey=True
    )
    for ax, (key, label, unit, fmt) in zip(axes[0], kinds, strict=True):
        values = [(row.get(key) or 0) / unit for row in rows]
        bars = ax.barh(names, values, color=[_nth(COLOURS, i) for i in range(len(rows))], height=0.62)
        ax.bar_label(bars, [fmt.format(v) if v else "" for v in values], padding=3, fontsize=8)
        if key == "parameters":
            ax.set_xscale("log")
        ax.margins(x=0.3)
        ax.set_xlabel(label, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(visible=False)
    axes[0][0].invert_yaxis()
    if title:
        fig.suptitle(title, fontsize=11, x=0.01, ha="left")
    save(fig, path)


def _heat(fig, ax, values, columns, rows, *, limits, fmt, label, numbers=True):
    """A heat map with labelled cells; ``limits`` is (low, high), or one number for a scale around 0 in both
    directions."""
    from matplotlib.colors import SymLogNorm

    if isinstance(limits, tuple):
        options = {"cmap": "cividis", "vmin": limits[0], "vmax": limits[1]}
    else:  # linear near 0, logarithmic beyond: one head may outweigh all others together
        options = {"cmap": "PuOr", "norm": SymLogNorm(limits / 30, vmin=-limits, vmax=limits)}
    image = ax.imshow(values, aspect="auto", interpolation="nearest", **options)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    for axis, names in ((ax.xaxis, list(columns)), (ax.yaxis, list(rows))):
        places = list(range(len(names)))[:: -(-len(names) // 16)]
        axis.set_ticks(places, [str(names[i]) for i in places], fontsize=8)
        axis.set_tick_params(length=0)
    if numbers:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value == value:
                    red, green, blue, _ = image.cmap(image.norm(value))
                    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                    shown = fmt.format(value) if value else "0"
                    ax.text(x, y, shown, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    if label:
        bar = fig.colorbar(image, ax=ax, label=label, shrink=0.9, pad=0.02)
        if not isinstance(limits, tuple):  # matplotlib's own ticks for this scale overlap around 0
            ticks = [-limits, -limits / 10, 0, limits / 10, limits]
            bar.set_ticks(ticks, labels=[f"{t:+.2g}" if t else "0" for t in ticks], minor=False)
            bar.minorticks_off()
    return image


def _ticks(layers):
    step = -(-len(layers) // 12)
    return layers[::step]


def _nth(values, i):
    return values[i % len(values)]
