"""What pictures are made with, and two of the README. (reach.py and context.py make the others.)

    python tests/pictures.py     # pyramid.png, and after README's first command toy.png
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from toy_cityscapes import draw_scene

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))
from cityscapes import Cityscapes, colored, to_tensors  # noqa: E402
from evaluate import predict  # noqa: E402
from pspnet import load_net  # noqa: E402

FONT = ImageFont.load_default(12)


def cells_of(title, scene, nets):
    """(title, picture) of a scene, a pair of pictures, of its truth, and of what each net predicts.
    `nets` is a dictionary by title."""
    cells = [(title, scene[0]), ("truth", colored(scene[1], Cityscapes.classes))]
    image, _ = to_tensors(*scene)
    for name, net in nets.items():
        cells.append((name, colored(predict(net, image), Cityscapes.classes)))
    return cells


def sheet_of(rows, scale=1):
    """Rows of (title, picture) as one picture: each `scale` times as large, below its title."""
    rows = list(rows)
    width, height = (round(scale * length) for length in rows[0][0][1].size)
    sheet = Image.new("RGB", (len(rows[0]) * (width + 6) - 6, len(rows) * (height + 20)), "white")
    smooth = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BICUBIC
    for row, cells in enumerate(rows):
        for column, (title, picture) in enumerate(cells):
            x, y = column * (width + 6), row * (height + 20)
            ImageDraw.Draw(sheet).text((x + 2, y + 3), title, fill="black", font=FONT)
            sheet.paste(picture.resize((width, height), smooth), (x, y + 20))
    return sheet


def save_cells(path, rows, scale=1):
    sheet = sheet_of(rows, scale)
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"drew {path}")


def averages_of(photograph):
    """Two rows of (title, picture): averages over k x k regions, and what each position gets."""
    image = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None].float()
    rows = []
    for title, mode in (("averages over", "nearest"), ("what positions get,", "bilinear")):
        rows.append([("photograph", photograph)])
        for k in (1, 2, 3, 6):
            averages = F.adaptive_avg_pool2d(image, k)  # (1, 3, k, k)
            pixels = F.interpolate(averages, image.shape[2:], mode=mode)[0].permute(1, 2, 0)
            rows[-1].append((f"{title} {k} x {k}", Image.fromarray(pixels.byte().numpy())))
    return rows


def dots_of(x_axis, y_axis, **groups):
    """Lists of points (x, y), by name, as a picture. The axes have these names."""
    picture, corners = Image.new("RGB", (480, 256), "white"), np.array([(44, 214), (466, 26)])
    draw, points = ImageDraw.Draw(picture), np.concatenate(list(groups.values()))
    low, high = points.min(axis=0), points.max(axis=0)
    draw.line((40, 26, 40, 218, 466, 218), fill="black")
    draw.text((4, 4), y_axis, fill="black", font=FONT)
    draw.text((200, 238), x_axis, fill="black", font=FONT)
    for corner, (x, y) in zip(corners, (low, high)):
        draw.text((corner[0] - 14, 222), f"{x:.3g}", fill="black", font=FONT)
        draw.text((4, corner[1] - 8), f"{y:.3g}", fill="black", font=FONT)
    for x, color, (name, points) in zip((200, 340), ("#1f77b4", "#d62728"), groups.items()):
        draw.text((x, 4), name if len(groups) > 1 else "", fill=color, font=FONT)
        for part in (np.asarray(points) - low) / (high - low):
            x, y = corners[0] + part * (corners[1] - corners[0])
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
    return picture


def legend_of(classes):
    """Names of classes on their colors, as a picture."""
    picture = Image.new("RGB", (960, 24 * math.ceil(len(classes) / 10)), "white")
    draw = ImageDraw.Draw(picture)
    for i, entry in enumerate(classes):
        x, y = 96 * (i % 10), 24 * (i // 10)
        draw.rectangle((x, y, x + 94, y + 22), fill=entry.color)
        light = sum(entry.color) > 330
        draw.text((x + 4, y + 5), entry.name, fill="black" if light else "white", font=FONT)
    return picture


def table_of(matrix, names, cell=46):
    """A confusion matrix as a picture: each row, a class of the truth, in percent."""
    left, top = 100, 50
    picture = Image.new("RGB", (left + cell * len(names), top + cell * len(names)), "white")
    draw, percent = ImageDraw.Draw(picture), 100 * matrix / matrix.sum(dim=1, keepdim=True)
    for i, name in enumerate(names):
        draw.text((4, top + cell * i + 16), name, fill="black", font=FONT)
        draw.text((left + cell * i, 6 + 20 * (i % 2)), name, fill="black", font=FONT)
        for j, value in enumerate(percent[i].tolist()):
            x, y, light = left + cell * j, top + cell * i, round(255 - 2 * value)
            color = (light, light, 255) if i == j else (255, light, light)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=color)
            draw.text((x + 14, y + 16), f"{value:.0f}" * (value >= 0.5), fill="black", font=FONT)
    return picture


if __name__ == "__main__":
    photograph, _ = draw_scene(np.random.default_rng([0, 1]), 160, 320)
    sheet = sheet_of(averages_of(Image.fromarray(photograph)), 0.6)  # no palette: it has gradations
    sheet.save(TOP / "tests/pictures/pyramid.png", optimize=True)
    if (TOP / "runs/toy/best.pt").exists():
        scene, net = Cityscapes(TOP / "data/toy", "val")[0], load_net(TOP / "runs/toy/best.pt")
        row = cells_of("drawn scene", scene, {"prediction": net})
        save_cells(TOP / "tests/pictures/toy.png", [row])
