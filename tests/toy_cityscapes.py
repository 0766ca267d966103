"""Draw toy street scenes in the layout of Cityscapes, so that everything can be tried without the
data set. The same arguments always give the same files.

    python tests/toy_cityscapes.py data/toy          # 64 training and 16 validation scenes, 128x256
"""
import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SKY, BUILDING, ROAD, SIDEWALK, CAR, POLE, SIGN, VEGETATION, PERSON, EGO = (
    23, 11, 7, 8, 26, 17, 20, 21, 24, 1)


def draw_scene(random, height, width):
    """A photograph (H, W, 3) and its label ids (H, W), uint8, drawn with the numpy generator."""
    photograph, ids = Image.new("RGB", (width, height)), Image.new("L", (width, height), SKY)
    pens = ImageDraw.Draw(photograph), ImageDraw.Draw(ids)
    unit = height / 128  # the scene is laid out for 128 rows

    def color(*rgb, spread=25):
        return tuple(int(c) for c in np.clip(np.array(rgb) + random.integers(-spread, spread, 3), 0, 255))

    def draw(shape, points, rgb, label):
        getattr(pens[0], shape)(points, fill=rgb)
        getattr(pens[1], shape)(points, fill=label)

    horizon = height * random.uniform(0.38, 0.5)
    draw("rectangle", (0, 0, width, height), color(135, 180, 230), SKY)
    x = 0.0
    while x < width:  # a row of houses, with gaps
        right = x + unit * random.uniform(20, 50)
        if random.random() < 0.8:
            top = horizon - unit * random.uniform(15, 45)
            draw("rectangle", (x, top, right, horizon + 2 * unit), color(150, 95, 80, spread=45), BUILDING)
            glass = color(70, 80, 95)
            for wx in np.arange(x + 4 * unit, right - 6 * unit, 8 * unit):
                for wy in np.arange(top + 4 * unit, horizon - 6 * unit, 9 * unit):
                    draw("rectangle", (wx, wy, wx + 4 * unit, wy + 5 * unit), glass, BUILDING)
        x = right
    draw("rectangle", (0, horizon, width, height), color(185, 175, 170, spread=15), SIDEWALK)
    middle, half = width * random.uniform(0.35, 0.65), unit * random.uniform(8, 16)
    edge = width * random.uniform(0.35, 0.5)
    draw("polygon", [(middle - half, horizon), (middle + half, horizon), (middle + edge, height),
                     (middle - edge, height)], color(85, 85, 90, spread=15), ROAD)
    for y in np.arange(horizon + 6 * unit, height, 12 * unit):  # lane markings
        draw("rectangle", (middle - unit, y, middle + unit, y + 5 * unit), (225, 225, 220), ROAD)
    for _ in range(random.integers(1, 4)):  # trees
        x, size = width * random.random(), unit * random.uniform(8, 16)
        draw("rectangle", (x - unit, horizon - size, x + unit, horizon + 4 * unit), color(95, 70, 45), VEGETATION)
        draw("ellipse", (x - size, horizon - 2.5 * size, x + size, horizon - 0.5 * size), color(60, 120, 50), VEGETATION)
    for _ in range(random.integers(1, 4)):  # lamp posts, some with a sign
        x, foot = width * random.random(), horizon + unit * random.uniform(4, 14)
        top = horizon - unit * random.uniform(15, 35)
        draw("rectangle", (x - 1.2 * unit, top, x + 1.2 * unit, foot), color(120, 125, 125), POLE)
        if random.random() < 0.6:
            draw("ellipse", (x - 6 * unit, top, x + 6 * unit, top + 12 * unit), color(225, 200, 40), SIGN)
    for depth in sorted(random.uniform(0.1, 0.8, random.integers(1, 4))):  # cars, far ones first
        y, size = horizon + depth * (height - horizon), unit * (5 + 18 * depth)
        x = middle + random.uniform(-0.8, 0.8) * (half + depth * (edge - half))
        paint = color(*random.choice([(190, 30, 30), (30, 60, 170), (215, 215, 220), (35, 35, 40)]))
        draw("rectangle", (x - size, y - size, x + size, y), paint, CAR)
        draw("rectangle", (x - 0.7 * size, y - 1.6 * size, x + 0.7 * size, y - size), color(120, 150, 170), CAR)
        for wheel in (-0.8, 0.4):
            draw("ellipse", (x + wheel * size, y - 0.25 * size, x + (wheel + 0.4) * size, y + 0.15 * size), (15, 15, 15), CAR)
    for _ in range(random.integers(1, 5)):  # people
        x, y, size = width * random.random(), horizon + unit * random.uniform(6, 30), unit * random.uniform(3, 5)
        draw("rectangle", (x - size, y - 4 * size, x + size, y), color(150, 60, 120, spread=60), PERSON)
        draw("ellipse", (x - 0.8 * size, y - 6 * size, x + 0.8 * size, y - 4 * size), color(225, 180, 150), PERSON)
    draw("ellipse", (width * 0.2, height * 0.95, width * 0.8, height * 1.2), (25, 25, 30), EGO)  # the bonnet
    pixels = np.array(photograph) * random.uniform(0.8, 1.2) + random.normal(0, 6, (height, width, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8), np.array(ids)


def draw_cityscapes(root, counts={"train": 64, "val": 16}, size=(128, 256), seed=0):
    """Write counts[split] scenes of size (H, W) for each split, in towns of 8 scenes; returns root."""
    for s, (split, count) in enumerate(counts.items()):
        for i in range(count):
            photograph, ids = draw_scene(np.random.default_rng([seed, s, i]), *size)
            town = f"toytown{i // 8}"
            for kind, ending, pixels in (("leftImg8bit", "leftImg8bit", photograph), ("gtFine", "gtFine_labelIds", ids)):
                path = Path(root) / kind / split / town / f"{town}_{i:06d}_000019_{ending}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return Path(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="DIR")
    parser.add_argument("--train", type=int, default=64, help="training scenes (64)")
    parser.add_argument("--val", type=int, default=16, help="validation scenes (16)")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256], metavar=("H", "W"), help="pixels (128 256)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw_cityscapes(args.root, {"train": args.train, "val": args.val}, args.size, args.seed)
    print(f"drew {args.train} + {args.val} scenes of {args.size[0]}x{args.size[1]} pixels: {args.root}")
