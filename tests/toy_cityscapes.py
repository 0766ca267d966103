"""Draw toy street scenes in the layout of Cityscapes, so that everything can be tried without the
data set. The same arguments always give the same files.

    python tests/toy_cityscapes.py data/toy          # 64 training and 16 validation scenes, 128x256
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Label ids of Cityscapes
SKY, BUILDING, ROAD, SIDEWALK, CAR = 23, 11, 7, 8, 26
POLE, SIGN, VEGETATION, PERSON, EGO = 17, 20, 21, 24, 1


def draw_scene(random, height, width):
    """A photograph (H, W, 3) and its label ids (H, W), uint8, drawn with the numpy generator."""
    photograph, ids = Image.new("RGB", (width, height)), Image.new("L", (width, height), SKY)
    pens = ImageDraw.Draw(photograph), ImageDraw.Draw(ids)
    unit = height / 128  # the scene is laid out for 128 rows

    def color(*rgb, spread=25):
        rgb = np.clip(np.array(rgb) + random.integers(-spread, spread, 3), 0, 255)
        return tuple(int(c) for c in rgb)

    def draw(label, rgb, shape, *points):
        getattr(pens[0], shape)(points, fill=rgb)
        getattr(pens[1], shape)(points, fill=label)

    horizon = height * random.uniform(0.38, 0.5)
    draw(SKY, color(135, 180, 230), "rectangle", 0, 0, width, height)
    x = 0.0
    while x < width:  # a row of houses, with gaps
        right = x + unit * random.uniform(20, 50)
        if random.random() < 0.8:
            top = horizon - unit * random.uniform(15, 45)
            wall = color(150, 95, 80, spread=45)
            draw(BUILDING, wall, "rectangle", x, top, right, horizon + 2 * unit)
            glass = color(70, 80, 95)
            for wx in np.arange(x + 4 * unit, right - 6 * unit, 8 * unit):
                for wy in np.arange(top + 4 * unit, horizon - 6 * unit, 9 * unit):
                    draw(BUILDING, glass, "rectangle", wx, wy, wx + 4 * unit, wy + 5 * unit)
        x = right
    draw(SIDEWALK, color(185, 175, 170, spread=15), "rectangle", 0, horizon, width, height)
    middle, half = width * random.uniform(0.35, 0.65), unit * random.uniform(8, 16)
    edge = width * random.uniform(0.35, 0.5)
    draw(ROAD, color(85, 85, 90, spread=15), "polygon", middle - half, horizon,
         middle + half, horizon, middle + edge, height, middle - edge, height)
    for y in np.arange(horizon + 6 * unit, height, 12 * unit):  # lane markings
        draw(ROAD, (225, 225, 220), "rectangle", middle - unit, y, middle + unit, y + 5 * unit)
    for _ in range(random.integers(1, 4)):  # trees
        x, size = width * random.random(), unit * random.uniform(8, 16)
        trunk, crown = color(95, 70, 45), color(60, 120, 50)
        draw(VEGETATION, trunk, "rectangle", x - unit, horizon - size, x + unit, horizon + 4 * unit)
        draw(VEGETATION, crown, "ellipse",
             x - size, horizon - 2.5 * size, x + size, horizon - 0.5 * size)
    for _ in range(random.integers(1, 4)):  # lamp posts, some with a sign
        x, foot = width * random.random(), horizon + unit * random.uniform(4, 14)
        top = horizon - unit * random.uniform(15, 35)
        draw(POLE, color(120, 125, 125), "rectangle", x - 1.2 * unit, top, x + 1.2 * unit, foot)
        if random.random() < 0.6:
            draw(SIGN, color(225, 200, 40), "ellipse",
                 x - 6 * unit, top, x + 6 * unit, top + 12 * unit)
    for depth in sorted(random.uniform(0.1, 0.8, random.integers(1, 4))):  # cars, far ones first
        y, size = horizon + depth * (height - horizon), unit * (5 + 18 * depth)
        x = middle + random.uniform(-0.8, 0.8) * (half + depth * (edge - half))
        paint = color(*random.choice([(190, 30, 30), (30, 60, 170), (215, 215, 220), (35, 35, 40)]))
        draw(CAR, paint, "rectangle", x - size, y - size, x + size, y)
        draw(CAR, color(120, 150, 170), "rectangle",
             x - 0.7 * size, y - 1.6 * size, x + 0.7 * size, y - size)
        for wheel in (x - 0.8 * size, x + 0.4 * size):
            draw(CAR, (15, 15, 15), "ellipse",
                 wheel, y - 0.25 * size, wheel + 0.4 * size, y + 0.15 * size)
    for _ in range(random.integers(1, 5)):  # people
        x, y = width * random.random(), horizon + unit * random.uniform(6, 30)
        size = unit * random.uniform(3, 5)
        clothes, skin = color(150, 60, 120, spread=60), color(225, 180, 150)
        draw(PERSON, clothes, "rectangle", x - size, y - 4 * size, x + size, y)
        draw(PERSON, skin, "ellipse", x - 0.8 * size, y - 6 * size, x + 0.8 * size, y - 4 * size)
    bonnet = width * 0.2, height * 0.95, width * 0.8, height * 1.2
    draw(EGO, (25, 25, 30), "ellipse", *bonnet)
    light, noise = random.uniform(0.8, 1.2), random.normal(0, 6, (height, width, 3))
    pixels = np.clip(np.array(photograph) * light + noise, 0, 255)
    return pixels.astype(np.uint8), np.array(ids)


def draw_cityscapes(root, counts, size, seed=0):
    """Write counts[split] scenes of size (H, W) for each split, in towns of 8 scenes; returns
    root."""
    for s, (split, count) in enumerate(counts.items()):
        for i in range(count):
            photograph, ids = draw_scene(np.random.default_rng([seed, s, i]), *size)
            town = f"toytown{i // 8}"
            for kind, ending, pixels in (
                ("leftImg8bit", "leftImg8bit", photograph),
                ("gtFine", "gtFine_labelIds", ids),
            ):
                path = Path(root) / kind / split / town / f"{town}_{i:06d}_000019_{ending}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return Path(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", metavar="DIR")
    parser.add_argument("--train", type=int, default=64, help="training scenes (64)")
    parser.add_argument("--val", type=int, default=16, help="validation scenes (16)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[128, 256], metavar=("H", "W"), help="pixels (128 256)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw_cityscapes(args.root, {"train": args.train, "val": args.val}, args.size, args.seed)
    print(
        f"drew {args.train} + {args.val} scenes of {args.size[0]}x{args.size[1]} pixels: "
        f"{args.root}"
    )
