"""The plots of a study's summary."""

import os

from ...report import plots

NAMES = ("base", "SEAL-H", "SEAL-C", "LoRA", "DoRA")
MARKED = -0.03  # a loss against the base from here on gets a frame in the transfer matrix


def draw(content: dict, folder: str) -> list[str]:
    """Draws what there is; the names of the files."""
    drawn = []
    for name, key, function in (
        ("main.png", "main", _main),
        ("curve.png", "curve", _curve),
        ("length.png", "length", _length),
        ("beyond.png", "beyond", _beyond),
        ("transfer.png", "transfer", _transfer),
    ):
        if content[key] and (key != "curve" or len({row["lr"] for row in content[key]}) > 2):
            function(content, os.path.join(folder, name))
            drawn.append(name)
    return drawn


def _style(i):
    n = len(plots.COLOURS)
    return {"color": plots.COLOURS[i % n], "marker": plots.MARKERS[i % n], "linestyle": plots.LINES[i % n]}


def _errors(rows):
    """How far the interval reaches below and above, as matplotlib wants it."""
    return [[max(0.0, r["accuracy"] - r["low"]) for r in rows], [max(0.0, r["high"] - r["accuracy"]) for r in rows]]


def _main(content, path):
    """A panel a task: accuracy by length with 95 % intervals; what gains most comes first."""
    cells = content["main"]["cells"]
    longest = max(cell["length"] for cell in cells)
    by_task: dict[str, dict[str, float]] = {}
    for cell in cells:
        if cell["length"] == longest:
            by_task.setdefault(cell["task"], {})[cell["method"]] = cell["accuracy"]
    tasks = sorted(by_task, key=lambda task: by_task[task]["base"] - max(by_task[task].values()))
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


def _lines(ax, cells, key, names, labels=None):
    lengths = sorted({cell["length"] for cell in cells})
    for i, name in enumerate(names):
        mine = sorted((cell for cell in cells if cell[key] == name), key=lambda cell: cell["length"])
        if not mine:
            continue
        mean = [cell["accuracy"] for cell in mine]
        x = [lengths.index(cell["length"]) + 0.05 * (i - (len(names) - 1) / 2) for cell in mine]
        label = (labels or names)[i]
        ax.errorbar(x, mean, _errors(mine), label=label, capsize=2, markersize=4, linewidth=1.3, **_style(i))
    ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
    ax.set_ylim(-0.02, 1.04)


def _legend(fig, ax, note):
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(
        handles, labels, title=note, loc="outside lower center", ncols=5, frameon=False, fontsize=9, title_fontsize=8
    )


def _curve(content, path):
    """Accuracy at the longest length by samples and by rate, and what a rate costs in perplexity."""
    rows = content["curve"]
    by_rate = [row for row in rows if row["samples"] is None]
    costs = any("perplexity_change" in row for row in by_rate)
    fig, axes = plots.figure(3 if costs else 2, width=11.0 if costs else 7.6, height=3.5, sharey=True)
    for i, name in enumerate(NAMES):
        samples = sorted((r for r in rows if r["method"] == name and r["samples"]), key=lambda r: r["samples"])
        rates = sorted((r for r in by_rate if r["method"] == name), key=lambda r: r["lr"])
        for ax, mine, key in ((axes[0], samples, "samples"), (axes[1], rates, "lr")):
            if mine:
                accuracy = [r["accuracy"] for r in mine]
                ax.errorbar([r[key] for r in mine], accuracy, _errors(mine), label=name, capsize=2, **_style(i))
        rates = [r for r in rates if "perplexity_change" in r]
        if rates:
            change = [100 * r["perplexity_change"] for r in rates]
            axes[2].errorbar(change, [r["accuracy"] for r in rates], _errors(rates), capsize=2, **_style(i))
            for x, r in zip(change, rates, strict=True):
                # Two methods: one has its labels over the intervals, the other under them.
                above = i != 1 or r["low"] < 0.1
                axes[2].annotate(
                    f"{r['lr']:g}", (x, r["high"] if above else r["low"]), xytext=(0, 4 if above else -10),
                    textcoords="offset points", fontsize=7, color=plots.COLOURS[i], ha="center",
                )  # fmt: skip
    known = [row["against_base"]["base"] for row in rows if row["against_base"]]
    for ax, label in zip(axes, ("training samples", "learning rate", "perplexity above the base's, %"), strict=False):
        ax.set_xscale("log")
        ax.set_xlabel(label)
        ax.set_ylim(-0.02, 1.04)
        if known:  # the same cases for all, up to the batch in which they were read
            ax.axhline(known[0], color=plots.COLOURS[0], linewidth=1.2, label="base", zorder=0)
    counts = sorted({row["samples"] for row in rows if row["samples"]})
    axes[0].set_xticks(counts, map(str, counts))
    axes[0].minorticks_off()
    rates = sorted({row["lr"] for row in by_rate})
    axes[1].set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=7, rotation=45)
    axes[1].minorticks_off()
    if costs:
        axes[2].set_xscale("symlog", linthresh=1)
        axes[2].axvline(1, color="0.5", linewidth=1, linestyle=":")
        axes[2].set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1,000"])
        axes[2].minorticks_off()
    axes[0].set_ylabel("accuracy")
    note = "accuracy at the longest length; 95 % Wilson intervals"
    _legend(fig, axes[1], note + ("; right: labels are rates, dotted: 1 %" if costs else ""))
    plots.save(fig, path)


def _length(content, path):
    """A panel a method: the base, and a line for every length trained at."""
    rows = content["length"]
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "base"]
    trained = sorted({row["train_length"] for row in rows if row["method"] != "base"})
    labels = ["base", *(f"trained at {n:,}" for n in trained)]
    fig, axes = plots.figure(len(methods), width=4.0 * len(methods), height=3.4, squeeze=False, sharey=True)
    for ax, method in zip(axes[0], methods, strict=True):
        shown = [row for row in rows if row["method"] in ("base", method)]
        _lines(ax, shown, "train_length", ["", *trained], labels)
        ax.set_title(method, loc="left", fontsize=10)
        ax.set_xlabel("prompt length in tokens")
    axes[0, 0].set_ylabel("accuracy")
    _legend(fig, axes[0, 0], "bars: 95 % Wilson intervals")
    plots.save(fig, path)


def _beyond(content, path):
    """A panel a way of reaching further: accuracy at the model's own length and beyond."""
    spelled = {"ntk": "NTK", "yarn": "YaRN"}
    settings = list(dict.fromkeys((row["kind"], row["factor"]) for row in content["beyond"]))
    fig, axes = plots.figure(len(settings), width=2.6 * len(settings) + 0.6, height=3.3, squeeze=False, sharey=True)
    for ax, setting in zip(axes[0], settings, strict=True):
        rows = [row for row in content["beyond"] if (row["kind"], row["factor"]) == setting]
        names = list(dict.fromkeys(row["method"] for row in rows))  # base, scales as they were, scales trained there
        labels = ["base", "SEAL-C trained at the model's own length", "SEAL-C trained at the further length"]
        _lines(ax, rows, "method", names, labels)
        ax.set_title(f"{spelled[setting[0]]} × {setting[1]}", loc="left", fontsize=10)
    axes[0, 0].set_ylabel("accuracy")
    _legend(fig, axes[0, 0], "prompt length in tokens; bars: 95 % Wilson intervals")
    plots.save(fig, path)


def _transfer(content, path):
    """A panel a length: accuracy in numbers, the change against the base in colour; frames mark what was lost."""
    rows = content["transfer"]
    lengths = sorted({row["length"] for row in rows})
    trained = ["base", *(t for t in dict.fromkeys(row["trained"] for row in rows) if t != "base")]
    panels = {}
    for length in lengths:
        here = [row for row in rows if row["length"] == length]
        names = list(dict.fromkeys(row["measured"] for row in here))
        panels[length] = (
            sorted(names, key=lambda name: (name.startswith("reworded "), trained.index(name.split()[-1]))),
            {(row["trained"], row["measured"]): row for row in here},
        )
    widths = [len(columns) for columns, _ in panels.values()]
    fig, axes = plots.figure(
        len(panels), width=1.8 + 0.45 * sum(widths), height=2.0 + 0.32 * len(trained), squeeze=False, sharey=True,
        width_ratios=widths,
    )  # fmt: skip
    image = None
    for ax, (length, (columns, cells)) in zip(axes[0], panels.items(), strict=True):
        change = [
            [cells[t, c].get("against_base", {}).get("difference", 0.0) if (t, c) in cells else 0.0 for c in columns]
            for t in trained
        ]
        image = ax.imshow(change, aspect="auto", interpolation="nearest", cmap="PuOr_r", vmin=-1, vmax=1)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        for y, task in enumerate(trained):
            for x, column in enumerate(columns):
                if (task, column) not in cells:
                    continue
                lost = change[y][x] <= MARKED
                shown = f"{cells[task, column]['accuracy']:.2f}".replace("0.", ".", 1)
                ax.text(
                    x, y, shown, ha="center", va="center", fontsize=7, color="white" if abs(change[y][x]) > 0.6 else "black",  # noqa: E501
                    bbox={"facecolor": "none", "edgecolor": "0.1", "linewidth": 0.9, "pad": 2} if lost else None,
                )  # fmt: skip
        labels = [name.replace("reworded ", "other wording:\n") for name in columns]
        ax.set_xticks(range(len(columns)), labels, fontsize=7.5, rotation=50, ha="right", rotation_mode="anchor")
        ax.tick_params(length=0)
        ax.set_title(f"measured at {length:,} tokens", loc="left", fontsize=10)
    axes[0, 0].set_yticks(range(len(trained)), ["base, untrained" if t == "base" else t for t in trained], fontsize=8)
    axes[0, 0].set_ylabel("scales trained on")
    fig.colorbar(image, ax=axes[0, -1], label="change against the base", shrink=0.9, pad=0.01)
    plots.save(fig, path)
