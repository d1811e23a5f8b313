"""Pictures of a document: step time over batch size beside the ceiling, or what a step is made of."""

from __future__ import annotations

from pathlib import Path

from .against import case_of
from .published import decode_figures

WORKLOADS = ("decode", "step")
OURS, CEILING, GREY = "#d1495b", "#30343f", "#8d99ae"
COLOURS = ("#00798c", "#edae49", "#66a182", "#8e6c8a", "#3d5a80", "#b56576", "#2e4057")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6eb",
    "grid.linewidth": 0.6,
    "font.size": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
SHOWN = 8  # kernels with a colour of their own


def plot(document: dict, path: Path) -> None:
    """Draws a document of workload `decode` or `step` into `path`, in the format of its suffix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))  # the line below gets the rest
        {"decode": _decode, "step": _step}[document["workload"]](axes, document)
        environment = document["environment"]
        figure.text(
            0.995,
            0.01,
            f"{document['model']['shape']}, {document['model']['dtype'].removeprefix('torch.')}; "
            f"{environment['device']}; torch {environment['torch']}; commit {str(environment['commit'])[:7]}",
            ha="right",
            fontsize=7,
            color=GREY,
        )
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _decode(axes, document: dict) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = [row for row in document["rows"] if row["context"]]
    batches, context = [row["batch"] for row in rows], rows[0]["context"]
    axes.plot(
        batches,
        [row["floor_ms"] for row in rows],
        "--",
        color=CEILING,
        lw=1.2,
        label="ceiling: bytes at the rate of a copy",
    )
    low, middle, high = ([row["step_ms"][name] for row in rows] for name in ("p20", "p50", "p80"))
    axes.plot(batches, middle, "o-", color=OURS, lw=2.4, ms=5, label="graphattn", zorder=5)
    axes.fill_between(batches, low, high, color=OURS, alpha=0.2, lw=0)
    by_case = {case_of(row): row["batch"] for row in rows}
    for colour, peer in zip(COLOURS, document.get("peers", []), strict=False):
        points = [
            (by_case[r["case"]], r["step_ms"]["p50"]) for r in peer["rows"] if "step_ms" in r and r["case"] in by_case
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "s-", color=colour, lw=1.4, ms=4, label=f"{peer['name']}, this run")
    published = decode_figures(document["model"]["shape"], context)
    for marker, (name, figures) in zip("v^<>Dp", published.items(), strict=False):
        points = [(batch, ms) for batch, ms in figures.items() if batch in batches]
        if points:
            axes.plot(
                *zip(*points, strict=True), f"{marker}:", color=GREY, lw=1, ms=4, label=f"{name}, measured elsewhere"
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * 2)  # room for the legend
    axes.set_xlabel("batch size, rows")
    axes.set_ylabel("time of a decode step, ms")
    axes.set_title(f"Decode step at {context} tokens of context: median, band from p20 to p80", loc="left")
    axes.legend(loc="upper left", ncols=2)


def _step(axes, document: dict) -> None:
    rows = document["rows"]
    names = list(dict.fromkeys(kernel["name"] for row in rows for kernel in row["top"]))
    total = {name: sum(_us(row, name) / _whole(row) for row in rows) for name in names}
    shown = sorted(names, key=lambda name: -total[name])[:SHOWN]
    left = [0.0] * len(rows)
    for index, name in enumerate([*shown, "other kernels", "idle"]):
        if name == "idle":
            widths = [max(0.0, _whole(row) - _busy(row)) for row in rows]
        elif name == "other kernels":
            widths = [max(0.0, _busy(row) - sum(_us(row, each) for each in shown)) for row in rows]
        else:
            widths = [_us(row, name) for row in rows]
        share = [100 * width / _whole(row) for width, row in zip(widths, rows, strict=True)]
        colour = {"idle": "#f1f2f4", "other kernels": GREY}.get(name, (*COLOURS, OURS)[index % (len(COLOURS) + 1)])
        label = name if len(name) <= 60 else f"{name[:57]}..."
        axes.barh([row["case"] for row in rows], share, left=left, color=colour, height=0.62, label=label)
        left = [start + width for start, width in zip(left, share, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the step's time, %")
    axes.set_ylabel("rows x tokens of context")
    axes.set_title("What a decode step is made of", loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=7)


def _us(row: dict, name: str) -> float:
    return sum(kernel["us_per_step"] for kernel in row["top"] if kernel["name"] == name)


def _busy(row: dict) -> float:
    return row["busy_us"] if row["busy_us"] is not None else sum(kernel["us_per_step"] for kernel in row["top"])


def _whole(row: dict) -> float:
    return max(_busy(row), row["step_ms"]["p50"] * 1e3)
