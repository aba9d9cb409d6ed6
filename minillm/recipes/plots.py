"""Pictures of a run, as PNG files: each function takes numbers and a path, draws one figure and saves it.

Colours are Okabe & Ito's, which colour-blind readers can tell apart (jfly.uni-koeln.de/color, 2008).
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.files import atomic_write

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#6B6B6B"
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, GREY)
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
Curve = Sequence[tuple[float, float]]  # (x, y) points


@contextlib.contextmanager
def new_figure(path: str | Path, panels: int = 1, size: tuple[float, float] = (7.5, 4.0)) -> Iterator[list[Any]]:
    """Axes side by side; when the block ends, the figure is saved to `path`."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield list(figure.subplots(1, panels, squeeze=False)[0])
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=140, metadata={"Software": None})
    atomic_write(path, png.getvalue())


def smooth(curve: Curve, window: float = 0.05) -> Curve:
    """The running mean of a noisy curve over a part `window` of its length, centred on each point."""
    half = int(len(curve) * window / 2)
    parts = [curve[max(0, i - half) : i + half + 1] for i in range(len(curve))]
    return [(curve[i][0], sum(y for _, y in part) / len(part)) for i, part in enumerate(parts)]


def _draw_losses(axes: Any, curves: Mapping[str, Curve], points: Mapping[str, Curve]) -> None:
    for colour, (name, curve) in zip(COLOURS * 2, curves.items(), strict=False):
        noisy = len(curve) > 40
        if noisy:
            axes.plot(*zip(*curve, strict=True), color=colour, alpha=0.2, linewidth=0.8)
        drawn = smooth(curve) if noisy else curve
        axes.plot(*zip(*drawn, strict=True), color=colour, label=name, marker="" if len(curve) > 1 else "o")
    for colour, (name, curve) in zip((ORANGE, PURPLE, GREY), points.items(), strict=False):
        axes.plot(*zip(*curve, strict=True), color=colour, label=name, marker="o", linestyle="--", linewidth=1.2)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend()


def plot_losses(
    path: str | Path, panels: Mapping[str, Mapping[str, Curve]], points: Mapping[str, Mapping[str, Curve]] | None = None
) -> None:
    """One panel per title, one line per name: the training loss at each step (faint) and its running mean.

    `points` has the same titles and names of curves that are measured now and then, such as the held-out loss.
    """
    with new_figure(path, len(panels), (5.0 * len(panels) + 1.0, 4.0)) as figure:
        for axes, (title, curves) in zip(figure, panels.items(), strict=True):
            _draw_losses(axes, curves, (points or {}).get(title, {}))
            axes.set_title(title)


def plot_learning_rate(path: str | Path, curves: Mapping[str, Curve]) -> None:
    """The learning rate at each step of each run."""
    with new_figure(path) as (axes,):
        for colour, (name, curve) in zip(COLOURS * 2, curves.items(), strict=False):
            axes.plot(*zip(*curve, strict=True), color=colour, label=name)
        axes.set(xlabel="optimizer step", ylabel="learning rate", yscale="log")
        axes.set_title("Learning rate: warm-up, then decay")
        axes.legend()


def plot_attention(path: str | Path, pieces: Sequence[str], maps: Mapping[str, Any]) -> None:
    """One heat map per title; `maps` are (T, T) arrays, row = reading token, column = token it reads from."""
    labels = [piece.replace("\n", "\\n").replace("$", r"\$") for piece in pieces]
    with new_figure(path, len(maps), (1.5 + 4.1 * len(maps), 4.6)) as figure:
        for axes, (title, weights) in zip(figure, maps.items(), strict=True):
            image = axes.imshow(weights, cmap="cividis", vmin=0.0, vmax=1.0)
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8, family="monospace")
            axes.set_yticks(range(len(labels)), labels, fontsize=8, family="monospace")
            axes.set(title=title, xlabel="token read from")
            axes.grid(False)
        figure[0].set_ylabel("token that reads")
        figure[0].figure.colorbar(image, ax=figure, label="attention weight", shrink=0.8)


def plot_next_token(
    path: str | Path, pieces: Sequence[str], distributions: Mapping[str, Sequence[float]], prompt: str
) -> None:
    """Probabilities of the same few tokens, most likely first, one panel per filter; removed ones are marked with ×."""
    labels = [repr(piece)[1:-1].replace("$", r"\$") for piece in pieces]
    with new_figure(path, len(distributions), (2.0 + 2.3 * len(distributions), 4.4)) as figure:
        for axes, colour, (title, probabilities) in zip(figure, COLOURS, distributions.items(), strict=False):
            axes.barh(range(len(labels)), probabilities, color=colour)
            removed = [i for i, p in enumerate(probabilities) if p == 0]
            axes.plot([0.01] * len(removed), removed, "x", color=GREY, markersize=4)
            axes.set_yticks(range(len(labels)), labels if axes is figure[0] else [], family="monospace", fontsize=9)
            axes.set(title=title, xlabel="probability", xlim=(0, max(map(max, distributions.values())) * 1.05))
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
        title = "Next token after: " + prompt.replace("$", r"\$")
        figure[0].figure.suptitle(title, x=0.01, ha="left", family="monospace")


def plot_trade_off(
    path: str | Path, methods: Sequence[str], panels: Mapping[str, tuple[float, Sequence[float]]]
) -> None:
    """What each method changed; each panel is title -> (value before, values after), with bars from before to after."""
    with new_figure(path, len(panels), (1.5 + 4.5 * len(panels), 1.6 + 0.6 * len(methods))) as figure:
        for axes, (title, (before, after)) in zip(figure, panels.items(), strict=True):
            changes = [value - before for value in after]
            bars = axes.barh(range(len(methods)), changes, left=before, color=COLOURS[: len(methods)], height=0.6)
            axes.bar_label(bars, [f"{value:.3f}" for value in after], padding=3)
            axes.axvline(before, color="black", linestyle="--", linewidth=1.2, label=f"before: {before:.3f}")
            axes.set(title=title, xlabel="held-out loss (nats per token)")
            axes.use_sticky_edges = False  # or the bars' common start would be the edge of the picture
            axes.margins(x=0.2)
            axes.set_yticks(range(len(methods)), methods if axes is figure[0] else [])
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
