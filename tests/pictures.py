"""Draw the pictures of the README into tests/pictures.

    python tests/pictures.py     # after README's first command and tests/context.py runs/context
"""
import sys
from pathlib import Path

import torch.nn.functional as F
from context import PYRAMIDS, folder_of
from PIL import Image, ImageDraw, ImageFont

TESTS = Path(__file__).resolve().parent
TOP = TESTS.parent
sys.path.insert(0, str(TOP))
from cityscapes import Cityscapes, colored, to_picture, to_tensors  # noqa: E402
from evaluate import predict  # noqa: E402
from pspnet import load_net  # noqa: E402


def save_table(name, rows, titles, scale=1):
    """Save rows of pictures of one size, below a title for each column."""
    width, height = (round(scale * length) for length in rows[0][0].size)
    title_height, gap = 20, 4
    table = Image.new("RGB", (len(titles) * (width + gap) - gap,
                              title_height + len(rows) * (height + gap) - gap), "white")
    draw, font = ImageDraw.Draw(table), ImageFont.load_default()
    for column, title in enumerate(titles):
        x = column * (width + gap)
        draw.text((x + 4, 4), title, fill="black", font=font)
        for row, pictures in enumerate(rows):
            picture = pictures[column].resize((width, height), Image.Resampling.NEAREST)
            table.paste(picture, (x, title_height + row * (height + gap)))
    path = TESTS / "pictures" / name
    table.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main():
    scenes, net = Cityscapes(TOP / "data/toy", "val"), load_net(TOP / "runs/toy/best.pt")
    picture, label = scenes[0]
    image, _ = to_tensors((picture, label))
    row = [picture, colored(label, scenes.classes), colored(predict(net, image), scenes.classes)]
    save_table("toy.png", [row], ["drawn scene", "truth", "prediction"])

    averages = [picture]
    for k in (1, 2, 3, 6):
        cells = F.adaptive_avg_pool2d(image.float(), k)
        averages.append(to_picture(F.interpolate(cells[None], image.shape[1:])[0].byte()))
    titles = ["drawn scene"] + [f"averages on a {k} x {k} grid" for k in (1, 2, 3, 6)]
    save_table("pyramid.png", [averages], titles, scale=0.6)

    out = TOP / "runs/context"
    scenes = Cityscapes(out / "data", "val")
    nets = [load_net(folder_of(out, bins, seed=0) / "best.pt") for bins in PYRAMIDS]
    columns = []  # the first street and the first river: one has cars, train id 13, one has not
    for with_cars in (True, False):
        picture, label = next(pair for pair in scenes
                              if (pair[1].histogram()[13] > 0) == with_cars)
        image, _ = to_tensors((picture, label))
        predictions = [colored(predict(net, image), scenes.classes) for net in nets]
        columns.append([picture, colored(label, scenes.classes), *predictions])
    names = ("drawn scene", "truth", "no pyramid", "one average", "pyramid 1 2 3 6")
    rows = [[titled(picture, name) for picture in row]
            for name, row in zip(names, zip(*columns, strict=True), strict=True)]
    save_table("context.png", rows, ["street at the left, so these are cars (blue)",
                                     "river at the left, so these are boats (red)"])


def titled(picture, title):
    """The picture, enlarged, below its title."""
    picture = picture.resize((picture.width * 3 // 2, picture.height * 3 // 2))
    whole = Image.new("RGB", (picture.width, picture.height + 14), "white")
    whole.paste(picture, (0, 14))
    ImageDraw.Draw(whole).text((4, 1), title, fill="black", font=ImageFont.load_default())
    return whole


if __name__ == "__main__":
    main()
