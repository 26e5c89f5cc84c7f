"""Draw what each rank of a layout holds, as `docs/layouts.png` shows it.

python -m experiments.tools.draw_layouts docs/layouts.png
"""

from __future__ import annotations

import sys

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

CFG, CP, HEADS = 2, 4, 8
COLORS = ("#a6cee3", "#b2df8a", "#fdbf6f", "#cab2d6", "#6baed6", "#74c476", "#fd8d3c", "#9e9ac8")  # by rank


def part(axes: Axes, x: float, y: float, width: float, height: float, rank: int, label: str) -> None:
    """A rank's part of a tensor."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=COLORS[rank], edgecolor="white", linewidth=2))
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=9)


def panel(axes: Axes, title: str, below: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.text(0.5, -0.14, below, transform=axes.transAxes, ha="center", va="top", fontsize=8.5, color="0.3")
    axes.set(xticks=[], yticks=[], xlim=(0, 4), ylim=(0, 4))
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    for side in axes.spines.values():
        side.set_visible(False)


def main(path: str) -> None:
    figure = Figure(figsize=(12, 3.3))
    requests, replica, sequence, heads = figure.subplots(1, 4, width_ratios=(0.8, 1.2, 1, 1))
    figure.subplots_adjust(left=0.03, right=0.99, top=0.88, bottom=0.24, wspace=0.32)

    panel(requests, "--dp 2", "replicas take requests in turn\nand send each other nothing", "", "")
    for number in range(2):
        y = 2.1 * (1 - number)
        requests.add_patch(Rectangle((0.1, y), 3.8, 1.8, facecolor="0.93", edgecolor="0.6"))
        requests.text(2, y + 1.2, f"replica {number}", ha="center", fontsize=9)
        first = number * CFG * CP
        requests.text(2, y + 0.5, f"ranks {first} to {first + CFG * CP - 1}", ha="center", fontsize=9)

    panel(
        replica,
        "a replica: --cfg 2 --cp 4",
        "guidance: one all-gather a step,\nbetween the ranks of a column",
        "sequence: runs of frames",
        "",
    )
    for branch, name in enumerate(("prompt", "negative\nprompt")):
        y = 2.0 * (1 - branch)
        replica.text(-0.1, y + 1, name, ha="right", va="center", fontsize=9)
        for place in range(CP):
            rank = branch * CP + place
            part(replica, place, y, 1, 2, rank, f"rank {rank}")

    panel(
        sequence,
        "a row, outside attention",
        "[batch, seq, heads, head_dim]\nShard(1): some tokens, all heads",
        "sequence",
        "heads",
    )
    panel(
        heads,
        "inside attention",
        "Shard(2): all tokens, some heads\n",
        "sequence",
        "heads",
    )
    for rank in range(CP):
        part(sequence, rank, 0, 1, 4, rank, f"rank {rank}")
        part(heads, 0, 3 - rank, 4, 1, rank, f"rank {rank}: {HEADS // CP} of {HEADS} heads")
    arrow = {"arrowstyle": "<->", "color": "0.3", "linewidth": 1.5}
    box = sequence.get_position(), heads.get_position()
    middle = (box[0].y0 + box[0].y1) / 2
    between = (box[0].x1 + 0.004, middle), (box[1].x0 - 0.018, middle)
    figure.add_artist(FancyArrowPatch(*between, mutation_scale=14, **arrow))
    figure.text((between[0][0] + between[1][0]) / 2, middle + 0.05, "all-to-all", ha="center", fontsize=8)
    figure.savefig(path, dpi=130, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1])
