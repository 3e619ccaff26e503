"""The picture of ``idist bench``: time and bus bandwidth over size. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from idist.cli.measure import Result

_COLUMN_INCHES, _ROW_INCHES = 4.0, 3.2


def draw(results: Sequence[Result], path: Path) -> None:
    """A column for each collective; a line for each backend, dashed for the bare one."""
    names = list(dict.fromkeys(row.collective for result in results for row in result.rows))
    size = (_COLUMN_INCHES * len(names), 2 * _ROW_INCHES)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharex="col")
    for column, name in enumerate(names):
        above, below = panels[0][column], panels[1][column]
        for result in results:
            rows = [row for row in result.rows if row.collective == name]
            sizes = [row.size for row in rows]
            (line,) = above.plot(sizes, [row.time_us for row in rows], marker="o", label=result.backend)
            bare = [(row.size, row.bare_us) for row in rows if row.bare_us is not None]
            if bare:
                above.plot(*zip(*bare, strict=True), ls="--", color=line.get_color(), label=f"{result.backend}, bare")
            below.plot(sizes, [row.busbw for row in rows], marker="o", color=line.get_color())
        above.set(title=name, xscale="log", yscale="log")
        below.set(xlabel="size (B)", xscale="log", yscale="log")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("time (us)")
    panels[1][0].set_ylabel("bus bandwidth (GB/s)")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path)
