"""A picture of a document: step time of buckets, with the backend that serves them, over context beside the roofline,
and the padding of ladders."""

from __future__ import annotations

from pathlib import Path

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
        figure, axes = plt.subplots(
            1, 2 if ladders else 1, figsize=(13 if ladders else 8, 5.4), layout="constrained", squeeze=False
        )
        figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))  # the line below gets the rest
        _steps(axes[0, 0], document)
        if ladders:
            _padding(axes[0, 1], ladders)
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
