"""The scoreboard's pictures."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.recipes.compare.rows import FAMILIES
from minillm.recipes.plots import COLOURS, new_figure
from minillm.recipes.report import Picture

Entry = Mapping[str, Any]
LINES = ("-", "--", ":")  # as colours come round again
MARKERS = "osD^vP*X"  # of the methods of a family


def draw(folder: Path, entries: Sequence[Entry], metric: str) -> list[Picture]:
    """Every picture that the entries allow, in `folder`/plots."""
    scored = [entry for entry in entries if "score" in entry]
    if not scored:
        return []
    pictures = [_trade_off(folder, scored, metric), _curves(folder, scored)]
    forgetting = [entry for entry in scored if "forgetting_on" in entry]
    return pictures + ([_forgetting(folder, forgetting)] if forgetting else [])


def _colour(family: str) -> str:
    families = [*FAMILIES, *([] if family in FAMILIES else [family])]
    return COLOURS[families.index(family) % len(COLOURS)]


def _trade_off(folder: Path, entries: Sequence[Entry], metric: str) -> Picture:
    file, seen = "plots/score.png", dict.fromkeys((entry["family"] for entry in entries), 0)
    with new_figure(folder / file, size=(9.0, 5.0)) as (axes,):
        for entry in entries:
            family, (low, high) = entry["family"], entry["interval"]
            spread = [[max(0.0, entry["score"] - low)], [max(0.0, high - entry["score"])]]
            look = {"color": _colour(family), "fmt": MARKERS[seen[family] % len(MARKERS)], "markeredgecolor": "white"}
            axes.errorbar(
                entry["trainable"], entry["score"], spread, markersize=7, capsize=3, linewidth=1.2,
                label=entry["title"], **look,
            )  # fmt: skip
            seen[family] += 1
        axes.set(xlabel="trained values", ylabel=f"{metric} on test", xscale="log", title="Score and trained values")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    best = max(entries, key=lambda entry: entry["score"])
    listed = "; ".join(f"{e['title']}: {e['score']:.3f} with {e['trainable']:,}" for e in entries)
    return Picture(
        file,
        f"Score on test against the number of trained values, by method. {listed}.",
        f"Score against trained values, with bootstrap intervals. The best mean is that of {best['title']}.",
    )


def _curves(folder: Path, entries: Sequence[Entry]) -> Picture:
    file, families = "plots/curves.png", list(dict.fromkeys(entry["family"] for entry in entries))
    with new_figure(folder / file, len(families), (1.5 + 4.0 * len(families), 4.2)) as figure:
        for axes, family in zip(figure, families, strict=True):
            for i, entry in enumerate(e for e in entries if e["family"] == family):
                steps = [step for step, _ in entry["curves"][0]]
                values = list(zip(*([loss for _, loss in curve] for curve in entry["curves"]), strict=True))
                style = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)]}
                axes.plot(steps, list(map(statistics.fmean, values)), label=entry["title"], **style)
                low, high = list(map(min, values)), list(map(max, values))
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
            axes.set(xlabel="optimizer step", title=family)
            axes.legend(fontsize=8)
        figure[0].set_ylabel("loss on valid")
        limits = [axes.get_ylim() for axes in figure]
        for axes in figure:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    ends = "; ".join(f"{e['title']}: {statistics.fmean(c[-1][1] for c in e['curves']):.3f}" for e in entries)
    return Picture(
        file,
        f"Loss on valid falling with the steps, by method. At the end: {ends}.",
        "Learning curves: the mean over seeds, and between the lowest and the highest seed.",
    )


def _forgetting(folder: Path, entries: Sequence[Entry]) -> Picture:
    file, places = "plots/forgetting.png", range(len(entries))
    with new_figure(folder / file, size=(7.5, 1.5 + 0.35 * len(entries))) as (axes,):
        for shift, side, colour in ((-0.2, "on", COLOURS[0]), (0.2, "off", COLOURS[1])):
            known = [(i, entry.get(f"forgetting_{side}")) for i, entry in enumerate(entries)]
            some = [(i + shift, change) for i, change in known if change is not None]
            axes.barh([i for i, _ in some], [change for _, change in some], 0.38, color=colour, label=f"method {side}")
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(places, [entry["title"] for entry in entries])
        axes.set(xlabel="change of the base's held-out loss (nats per token)", title="What the base forgets")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.legend()
    listed = "; ".join(
        f"{e['title']}: {e['forgetting_on']:+.3f} on"
        + (f", {e['forgetting_off']:+.3f} off" if "forgetting_off" in e else "")
        for e in entries
    )
    return Picture(
        file,
        f"Bars of the change of the base's held-out loss with each method on and off. {listed}.",
        "What the base forgets with a method on, and with it switched off.",
    )
