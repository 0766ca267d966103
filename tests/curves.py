"""Draw the loss, the learning rate and the mIoU of one or several runs of train.py:
python tests/curves.py runs/pspnet [more runs] --out curves.png"""
import json
from argparse import ArgumentParser
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PANELS = "loss", "learning rate", "mIoU in %"
COLORS = ["#1f6fb4", "#d95f02", "#2a9245", "#c2185b", "#7b4fb0", "#8c6d31"]
WIDTH, HEIGHT, FONT = 1000, 240, ImageFont.load_default(15)  # of a panel
LEFT, TOP, GAP = 90, 40, 60  # to the left of a panel, above the first, between two


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


def draw_panel(draw, top, title, curves, last):
    """Draw curves, value by iteration, on axes from 0 to the last iteration and largest value."""
    largest = max((value for curve in curves for value in curve.values()), default=1) or 1

    def place(x, y):
        return LEFT + WIDTH * x / last, top + HEIGHT * (1 - y / largest)

    draw.text((LEFT, top - 8), f"{title}, by iteration", "black", FONT, anchor="ls")
    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = part * last, part * largest
        draw.line([place(0, y), place(last, y)], "#dddddd")
        draw.text((LEFT - 8, place(0, y)[1]), f"{y:.2g}", "black", FONT, anchor="rm")
        draw.text((place(x, 0)[0], top + HEIGHT + 6), f"{x:,.0f}", "black", FONT, anchor="mt")
    for i, curve in enumerate(curves):
        places = [place(*point) for point in sorted(curve.items())]
        draw.line(places, COLORS[i % 6], 2)
        for x, y in places if len(places) < 50 else []:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), COLORS[i % 6])


def draw_curves(folders):
    legend = TOP + 3 * (HEIGHT + GAP)
    picture = Image.new("RGB", (LEFT + WIDTH + 50, legend + 25 * len(folders)), "white")
    draw, runs = ImageDraw.Draw(picture), [read_log(folder) for folder in folders]
    last = max((step for run in runs for curve in run for step in curve), default=1)
    for i, curves in enumerate(zip(*runs, strict=True)):
        draw_panel(draw, TOP + i * (HEIGHT + GAP), PANELS[i], curves, last)
    for i, folder in enumerate(folders):
        draw.text((LEFT, legend + 25 * i), str(folder), COLORS[i % 6], FONT, anchor="lm")
    return picture


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder that train.py has written")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    draw_curves(args.runs).save(args.out)
