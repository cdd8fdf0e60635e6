"""The plots of a study's summary."""

import os

from ...report import plots

NAMES = ("base", "SEAL-H", "SEAL-C", "LoRA", "DoRA")


def draw(content: dict, folder: str) -> list[str]:
    """Draws what there is; the names of the files."""
    drawn = []
    for name, key, function in (
        ("main.png", "main", _main),
        ("curve.png", "curve", _curve),
        ("beyond.png", "beyond", _beyond),
    ):
        if content[key] and (key != "curve" or len({row["lr"] for row in content[key]}) > 2):
            function(content, os.path.join(folder, name))
            drawn.append(name)
    return drawn


def _style(i):
    n = len(plots.COLOURS)
    return {"color": plots.COLOURS[i % n], "marker": plots.MARKERS[i % n], "linestyle": plots.LINES[i % n]}


def _main(content, path):
    """A panel a task: accuracy by length with 95 % intervals."""
    cells = content["main"]["cells"]
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    fig, axes = plots.figure(columns, rows, width=3.0 * columns, height=2.5 * rows + 0.5, squeeze=False, sharey=True)
    for ax, task in zip(axes.flat, tasks, strict=False):
        _lines(ax, [c for c in cells if c["task"] == task], "method", NAMES)
        ax.set_title(task, loc="left", fontsize=10)
    for ax in list(axes.flat)[len(tasks) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy")
    _legend(fig, axes.flat[0], "prompt length in tokens; bars: 95 % Wilson intervals")
    plots.save(fig, path)


def _lines(ax, cells, key, names):
    lengths = sorted({cell["length"] for cell in cells})
    for i, name in enumerate(names):
        mine = sorted((cell for cell in cells if cell[key] == name), key=lambda cell: cell["length"])
        if not mine:
            continue
        mean = [cell["accuracy"] for cell in mine]
        spread = [
            [max(0.0, c["accuracy"] - c["low"]) for c in mine],
            [max(0.0, c["high"] - c["accuracy"]) for c in mine],
        ]
        x = [lengths.index(cell["length"]) + 0.05 * (i - (len(names) - 1) / 2) for cell in mine]
        ax.errorbar(x, mean, spread, label=name, capsize=2, markersize=4, linewidth=1.3, **_style(i))
    ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
    ax.set_ylim(-0.02, 1.04)


def _legend(fig, ax, note):
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(
        handles, labels, title=note, loc="outside lower center", ncols=5, frameon=False, fontsize=9, title_fontsize=8
    )


def _curve(content, path):
    """Accuracy at the longest length, by samples and by rate."""
    fig, axes = plots.figure(2, width=8.0, height=3.4, sharey=True)
    for ax, key, label in ((axes[0], "samples", "training samples"), (axes[1], "lr", "learning rate")):
        for i, name in enumerate(NAMES):
            mine = [
                r for r in content["curve"] if r["method"] == name and (r["samples"] is not None) == (key == "samples")
            ]
            mine.sort(key=lambda row: row[key])
            if mine:
                spread = [
                    [max(0.0, r["accuracy"] - r["low"]) for r in mine],
                    [max(0.0, r["high"] - r["accuracy"]) for r in mine],
                ]
                ax.errorbar(
                    [r[key] for r in mine], [r["accuracy"] for r in mine], spread, label=name, capsize=2, **_style(i)
                )
        ax.set_xscale("log")
        ax.set_xlabel(label)
        ax.set_ylim(-0.02, 1.04)
    axes[0].set_ylabel("accuracy")
    _legend(fig, axes[1], "at the longest length; 95 % Wilson intervals")
    plots.save(fig, path)


def _beyond(content, path):
    """A panel a way of reaching further: accuracy at the model's own length and beyond."""
    settings = list(dict.fromkeys((row["kind"], row["factor"]) for row in content["beyond"]))
    fig, axes = plots.figure(len(settings), width=2.8 * len(settings) + 0.6, height=3.2, squeeze=False, sharey=True)
    for ax, setting in zip(axes[0], settings, strict=True):
        rows = [row for row in content["beyond"] if (row["kind"], row["factor"]) == setting]
        _lines(ax, rows, "method", list(dict.fromkeys(row["method"] for row in rows)))
        ax.set_title(f"{setting[0].upper()} ×{setting[1]}", loc="left", fontsize=10)
        ax.legend(frameon=False, fontsize=7)
    axes[0, 0].set_ylabel("accuracy")
    plots.save(fig, path)
