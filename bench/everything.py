"""All comparisons with the peers, as one table and one picture: `python bench/everything.py --plot FILE`.

Each file of this folder that answers a question is run as a program of its own; on Linux with two cores all take about
ten minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from alternate import HEADER, Comparison

QUESTIONS = ("start", "training", "collectives", "initialize", "getters", "imports")


def ask(question: str, quick: bool) -> list[Comparison]:
    """Run one file."""
    command = [sys.executable, str(Path(__file__).with_name(f"{question}.py")), "--json", *["--quick"] * quick]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [Comparison(**json.loads(line)) for line in ended.stdout.splitlines() if line.startswith("{")]


def draw(found: list[Comparison], path: Path) -> None:
    """The ratios, with their spread and their targets."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"], rcParams["svg.fonttype"] = "idist", "none"
    figure = Figure(figsize=(10, 1 + 0.3 * len(found)), layout="constrained")
    axes = figure.subplots()
    ratios = [comparison.ratio for comparison in found]
    middle = [ratio for ratio, _, _ in ratios]
    spread = [[ratio - low for ratio, low, _ in ratios], [high - ratio for ratio, _, high in ratios]]
    places = range(len(found))
    axes.errorbar(middle, places, xerr=spread, fmt="o", capsize=3, label="of all turns: median, middle half")
    axes.plot(
        [comparison.fastest for comparison in found], places, "x", color="tab:green", label="of the fastest turns"
    )
    axes.plot([comparison.target for comparison in found], places, "|", ms=14, color="tab:red", label="target: at most")
    axes.axvline(1, color="gray", lw=0.8)
    axes.set_yticks(places, [f"{comparison.what} / {comparison.beside}" for comparison in found], fontsize="small")
    axes.set(xscale="log", xlabel="time of idist / time of the other")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Ask all, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, to see that it works")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=QUESTIONS, help="some of the questions")
    parser.add_argument("--plot", type=Path, help="write the picture there, an svg or png")
    options = parser.parse_args()
    print(HEADER, flush=True)
    found: list[Comparison] = []
    for question in options.only:
        answers = ask(question, options.quick)
        found += answers
        print("\n".join(comparison.row() for comparison in answers), flush=True)
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
