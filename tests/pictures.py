"""Draw the first two pictures of the README; tests/context.py draws the third.

    python tests/pictures.py     # after README's first command
"""
import sys
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))
from cityscapes import Cityscapes, colored, to_picture, to_tensors  # noqa: E402
from evaluate import predict  # noqa: E402
from pspnet import load_net  # noqa: E402


def cells_of(title, scene, nets):
    """(title, picture) of a scene, a pair of pictures, of its truth, and of what each net predicts.
    `nets` is a dictionary by title."""
    cells = [(title, scene[0]), ("truth", colored(scene[1], Cityscapes.classes))]
    image, _ = to_tensors(scene)
    for name, net in nets.items():
        cells.append((name, colored(predict(net, image), Cityscapes.classes)))
    return cells


def save_cells(path, rows, scale=1):
    """Save rows of (title, picture): each picture `scale` times as large, below its title."""
    rows = list(rows)
    width, height = (round(scale * length) for length in rows[0][0][1].size)
    sheet = Image.new("RGB", (len(rows[0]) * (width + 4) - 4, len(rows) * (height + 16)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row, cells in enumerate(rows):
        for column, (title, picture) in enumerate(cells):
            x, y = column * (width + 4), row * (height + 16)
            draw.text((x + 4, y + 2), title, fill="black", font=font)
            picture = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, y + 16))
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"drew {path}")


if __name__ == "__main__":
    scene, net = Cityscapes(TOP / "data/toy", "val")[0], load_net(TOP / "runs/toy/best.pt")
    row = cells_of("drawn scene", scene, {"prediction": net})
    save_cells(TOP / "tests/pictures/toy.png", [row])
    image, _ = to_tensors(scene)
    row = [("drawn scene", scene[0])]
    for k in (1, 2, 3, 6):
        cells = F.adaptive_avg_pool2d(image.float(), k)
        averages = F.interpolate(cells[None], image.shape[1:])[0].byte()
        row.append((f"averages on a {k} x {k} grid", to_picture(averages)))
    save_cells(TOP / "tests/pictures/pyramid.png", [row], 0.6)
