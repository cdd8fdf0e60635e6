"""Plots of evaluations and of learned scales, readable in print, in grey and by colour-blind readers.

Series differ in colour (Okabe and Ito's palette), marker and line style.  Every function writes one file, PNG or SVG by
the suffix of ``path``, in one step, and keeps no state of matplotlib's.
"""

import os
from collections.abc import Mapping, Sequence

from .evaluate import Evaluation
from .files import replacing

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
    """Writes the figure, the format by the suffix; ``ValueError`` for a suffix that is not one of ``FORMATS``."""
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in FORMATS:
        raise ValueError(f"plots: path must end with one of {', '.join(FORMATS)}, got {os.fspath(path)}")
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


def _ticks(layers):
    step = -(-len(layers) // 12)
    return layers[::step]


def _nth(values, i):
    return values[i % len(values)]
