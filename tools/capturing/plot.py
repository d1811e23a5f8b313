"""A picture of a document: step time of buckets, with the backend that serves them, over context beside the roofline,
memory of all buckets, and the padding of ladders."""

from __future__ import annotations

from pathlib import Path

from benchmark.buckets import KINDS
from benchmark.plot import CEILING, COLOURS, GREY, OURS, STYLE

from capturing.backends import serving

SHOWN = len(COLOURS)  # buckets with a line of their own


def plot(document: dict, path: Path) -> None:
    """Draws it into `path`, in the format of its suffix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ladders = document["choice"]["ladders"] if document["choice"] is not None else []
    with plt.rc_context(STYLE):
        count = 3 if ladders else 2
        figure, axes = plt.subplots(1, count, figsize=(6.5 * count, 5.4), layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))  # the line below gets the rest
        _steps(axes[0], document)
        _memory(axes[1], document)
        if ladders:
            _padding(axes[2], ladders)
        environment, model = document["environment"], document["model"]
        about = (
            f"{model['name']}, {model['dtype']}",
            environment["device"],
            f"torch {environment['torch']}",
            f"commit {str(environment['commit'])[:7]}",
        )
        figure.text(0.995, 0.01, "; ".join(about), ha="right", fontsize=7, color=GREY)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def shown(buckets: list[dict]) -> list[dict]:
    """As many as there are colours, the smallest and the largest among them."""
    if len(buckets) <= SHOWN:
        return buckets
    return [buckets[round(index * (len(buckets) - 1) / (SHOWN - 1))] for index in range(SHOWN)]


def _steps(axes, document: dict) -> None:
    label = "roofline: bytes at the rate of a copy"
    for colour, row in zip(COLOURS, shown(document["buckets"]), strict=False):
        steps = [step for step in serving(row) if "step_ms" in step]
        contexts = [step["context"] for step in steps]
        low, middle, high = ([step["step_ms"][name] for step in steps] for name in ("p20", "p50", "p80"))
        axes.plot(contexts, middle, "o-", color=colour, lw=1.8, ms=4, label=f"bucket {row['bucket']}")
        axes.fill_between(contexts, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(contexts, [step["floor_ms"] for step in steps], ".--", color=colour, lw=0.9, ms=3)
    axes.plot([], [], "--", color=CEILING, lw=0.9, label=label)
    axes.set_yscale("log")
    axes.set_xticks(document["contexts"], [str(context) for context in document["contexts"]])
    axes.set_xlabel("tokens of each row")
    axes.set_ylabel("time of a decode step, ms")
    axes.set_title("Step of each bucket: median, band from p20 to p80", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=3)


def _memory(axes, document: dict) -> None:
    backends = list(dict.fromkeys(each["backend"] for row in document["buckets"] for each in row["backends"]))
    bars = [(f"{backend}, {how}", backend, how) for backend in backends for how in ("alone", "shared")]
    left = [0.0] * len(bars)
    for colour, (kind, name) in zip(COLOURS, KINDS.items(), strict=False):
        sizes = []
        for _, backend, how in bars:
            rows = [each for row in document["buckets"] for each in row["backends"] if each["backend"] == backend]
            sizes.append(sum((each["alone"] if how == "alone" else each)[kind] for each in rows) / 2**20)
        axes.barh([bar[0] for bar in bars], sizes, left=left, color=colour, height=0.62, label=name)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("MiB")
    axes.set_title("What all buckets take, each alone and sharing", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)


def _padding(axes, ladders: list[dict]) -> None:
    names = [f"{each['name']} ({len(each['sizes'])})" for each in ladders]
    colours = [OURS, *[GREY] * (len(ladders) - 1)]
    bars = axes.barh(names, [100 * each["waste"] for each in ladders], color=colours, height=0.62)
    times = ["" if each["step_ms"] is None else f" {each['step_ms']:.3g} ms per step" for each in ladders]
    axes.bar_label(bars, times, fontsize=8)
    axes.margins(x=0.3)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("padding, % of the rows computed on the trace")
    axes.set_title("Ladders (buckets)", loc="left")
