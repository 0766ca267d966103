"""Draw the loss, the learning rate and the mIoU of one or several runs of train.py:
python tests/curves.py runs/pspnet [more runs] --out curves.png"""
import json
import math
from argparse import ArgumentParser
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PANELS = "loss", "learning rate", "mIoU in %"
COLORS = ["#1f6fb4", "#d95f02", "#2a9245", "#c2185b", "#7b4fb0", "#8c6d31"]
WIDTH, HEIGHT, FONT = 2000, 480, ImageFont.load_default(30)  # of a panel, twice as large as at last
LEFT, TOP, GAP = 180, 80, 120  # to the left of a panel, above the first, between two


def read_log(folder):
    """The log of a run -> for each panel a dictionary, value by iteration. After a resume some
    iterations stand there twice. The later line counts."""
    loss, rate, miou = {}, {}, {}
    for entry in map(json.loads, Path(folder, "log.jsonl").read_text().splitlines()):
        if entry["event"] == "train":
            loss[entry["step"]], rate[entry["step"]] = entry["loss"], entry["lr"]
        if entry["event"] == "validation":
            miou[entry["step"]] = 100 * entry["miou"]
    return loss, rate, miou


def ticks(values):
    """Round numbers from 0 on, up to six, that reach the largest of the values."""
    largest = max(values, default=0) or 1
    power = 10 ** math.floor(math.log10(largest))
    step = next(factor * power for factor in (0.2, 0.5, 1, 2) if 5 * factor * power >= largest)
    return [i * step for i in range(math.ceil(largest / step) + 1)]


def draw_panel(draw, top, title, curves, xs, ys):
    """Draw curves, value by iteration. `xs` and `ys` are the numbers at the axes."""
    def place(x, y):
        return LEFT + WIDTH * x / xs[-1], top + HEIGHT * (1 - y / ys[-1])
    draw.text((LEFT, top - 16), title, "black", FONT, anchor="ls")
    for y in ys:
        draw.line([place(0, y), place(xs[-1], y)], "#dddddd", 2)
        draw.text((LEFT - 16, place(0, y)[1]), f"{y:g}", "black", FONT, anchor="rm")
    for x in xs:
        draw.line([place(x, 0), place(x, ys[-1])], "#dddddd", 2)
        draw.text((place(x, 0)[0], top + HEIGHT + 12), f"{x:,g}", "black", FONT, anchor="mt")
    draw.line([place(0, ys[-1]), place(0, 0), place(xs[-1], 0)], "black", 3)
    for i, curve in enumerate(curves):
        places = [place(*point) for point in sorted(curve.items())]
        draw.line(places, COLORS[i % 6], 5 if len(places) < 500 else 3)
        for x, y in places if len(places) < 50 else []:
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), COLORS[i % 6])


def draw_curves(folders):
    runs, legend = [read_log(folder) for folder in folders], TOP + 3 * (HEIGHT + GAP)
    xs = ticks([step for run in runs for curve in run for step in curve])
    picture = Image.new("RGB", (LEFT + WIDTH + 100, legend + 50 * len(runs)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((LEFT + WIDTH, legend - 40), "iterations", "black", FONT, anchor="rm")
    for i, curves in enumerate(zip(*runs, strict=True)):
        ys = ticks([value for curve in curves for value in curve.values()])
        draw_panel(draw, TOP + i * (HEIGHT + GAP), PANELS[i], curves, xs, ys)
    for i, folder in enumerate(folders):
        draw.line([(LEFT, legend + 50 * i), (LEFT + 80, legend + 50 * i)], COLORS[i % 6], 6)
        draw.text((LEFT + 100, legend + 50 * i), str(folder), "black", FONT, anchor="lm")
    return picture.reduce(2)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder that train.py has written")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    draw_curves(args.runs).save(args.out)
