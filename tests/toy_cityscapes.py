"""Draw toy street scenes in the layout of Cityscapes, so that everything can be tried without the
data set. The same arguments always give the same files.

    python tests/toy_cityscapes.py data/toy          # 96 training and 16 validation scenes, 160x320
"""
import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Label ids of Cityscapes
ROAD, SIDEWALK, BUILDING, POLE, SIGN = 7, 8, 11, 17, 20
VEGETATION, SKY, PERSON, CAR = 21, 23, 24, 26


class Canvas:
    """A photograph and its label ids, which get the same shapes. Coordinates are in units, from the
    point of the latest move_to, x to the right and y upwards. A canvas is 128 units high."""

    def __init__(self, random, height, width):
        self.random, self.height, self.width = random, height, width
        # Twice the size that is wanted: `finish` makes the edges smooth.
        self.photograph = Image.new("RGB", (2 * width, 2 * height))
        self.ids = Image.new("L", (2 * width, 2 * height))
        self.move_to(0, 0)

    def move_to(self, x, y, size=1.0):
        """Make x, y, from the lower left corner, the point (0, 0), and draw `size` times as big."""
        self.x, self.y, self.size = x, y, size

    def shade(self, *colors):
        """A color near one of these, each red, green and blue."""
        color = colors[self.random.integers(len(colors))] + self.random.integers(-10, 11, 3)
        return tuple(int(value) for value in color.clip(0, 255))

    def draw(self, label, color, shape, *corners):
        """Draw a "polygon" of the corners x, y, x, y, ..., or a "rectangle" or "ellipse" that
        reaches from the left and top to the right and bottom."""
        corners = np.array(corners).reshape(-1, 2) * self.size + (self.x, self.y)
        pixels = (corners * (1, -1) + (0, 128)) * (2 * self.height / 128)
        for picture, fill in ((self.photograph, color), (self.ids, label)):
            getattr(ImageDraw.Draw(picture), shape)(pixels.flatten().tolist(), fill=fill)

    def finish(self):
        """The photograph (H, W, 3), in some light and with noise, and the ids (H, W), uint8."""
        pixels = np.array(self.photograph.reduce(2))
        light, noise = self.random.uniform(0.85, 1.1), self.random.normal(0, 3, pixels.shape)
        return (light * pixels + noise).clip(0, 255).astype(np.uint8), np.array(self.ids)[::2, ::2]


def draw_house(canvas):
    wall, top = canvas.shade((190, 110, 85), (215, 180, 140)), canvas.random.uniform(25, 42)
    canvas.draw(BUILDING, wall, "rectangle", 0, top, 40, 0)
    canvas.draw(BUILDING, canvas.shade((130, 70, 60)), "polygon", -2, top, 20, top + 14, 42, top)
    for x in (5, 17, 29):  # windows
        for y in np.arange(top - 4, 9, -12):
            canvas.draw(BUILDING, (250, 235, 190), "rectangle", x, y, x + 6, y - 7)


def draw_tree(canvas):
    canvas.draw(VEGETATION, (95, 75, 40), "rectangle", -3, 26, 3, 0)
    crown = canvas.shade((60, 145, 55))
    for x, y, r in (-9, 33, 13), (9, 33, 13), (0, 47, 15):
        canvas.draw(VEGETATION, crown, "ellipse", x - r, y + r, x + r, y - r)


def draw_post(canvas):
    """A post with a traffic sign or a lantern."""
    iron = canvas.shade((35, 40, 40))
    canvas.draw(POLE, iron, "rectangle", -5, 62, 5, 0)
    if canvas.random.random() < 0.7:
        canvas.draw(SIGN, (250, 250, 240), "polygon", 0, 76, 15, 61, 0, 46, -15, 61)
        canvas.draw(SIGN, (245, 205, 20), "polygon", 0, 73, 12, 61, 0, 49, -12, 61)
    else:
        canvas.draw(POLE, iron, "polygon", -8, 58, 8, 58, 12, 76, 0, 83, -12, 76)
        canvas.draw(POLE, (255, 235, 170), "polygon", -4, 62, 4, 62, 6, 73, -6, 73)


def draw_person(canvas):
    canvas.draw(PERSON, (75, 35, 90), "rectangle", -6, 14, 6, 0)
    coat = canvas.shade((190, 40, 150), (130, 50, 180), (225, 80, 170))
    canvas.draw(PERSON, coat, "polygon", -13, 8, -8, 38, 8, 38, 13, 8)
    canvas.draw(PERSON, (240, 190, 160), "ellipse", -8, 52, 8, 36)


def draw_car(canvas):
    paint = canvas.shade((200, 30, 35), (30, 70, 190), (20, 140, 150))
    canvas.draw(CAR, paint, "polygon", -20, 20, -13, 36, 13, 36, 20, 20)
    canvas.draw(CAR, (190, 225, 240), "polygon", -16, 21, -11, 32, 11, 32, 16, 21)
    canvas.draw(CAR, paint, "rectangle", -25, 21, 25, 3)
    for x in (-17, 17):
        canvas.draw(CAR, (20, 20, 25), "rectangle", x - 5, 5, x + 5, 0)
        canvas.draw(CAR, (255, 245, 200), "ellipse", x - 4, 17, x + 4, 9)


def draw_scene(random, height, width):
    """A photograph (H, W, 3) and its label ids (H, W), uint8, drawn with the numpy generator."""
    canvas, right, horizon = Canvas(random, height, width), 128 * width / height, 72
    canvas.draw(SKY, canvas.shade((140, 195, 240)), "rectangle", 0, 128, right, 0)
    for x in random.uniform(0, right, 3):  # clouds
        canvas.move_to(x, random.uniform(100, 125))
        for shift in (-9, 0, 9):
            canvas.draw(SKY, (235, 243, 250), "ellipse", shift - 11, 5, shift + 11, -5)
    for x in np.arange(random.uniform(-40, 0), right, 40):  # houses, with gaps
        canvas.move_to(x, horizon - 2)
        if random.random() < 0.85:
            draw_house(canvas)
    canvas.move_to(0, 0)
    canvas.draw(SIDEWALK, canvas.shade((222, 210, 195)), "rectangle", 0, horizon, right, 0)
    middle, far, near = right * random.uniform(0.4, 0.6), 26, 0.3 * right
    canvas.draw(ROAD, canvas.shade((105, 105, 112)), "polygon", middle - far, horizon,
                middle + far, horizon, middle + near, 0, middle - near, 0)
    for y in range(5, horizon, 15):  # lane markings
        canvas.draw(ROAD, (240, 240, 235), "rectangle", middle - 2, y + 6, middle + 2, y)

    things = []  # (depth, x, function): the depth is 0 at the horizon, 1 at the lower edge
    for side, pavement in ((-1, middle), (1, right - middle)):
        depth = random.uniform(0.15, 0.9)
        things.append((depth, middle + side * (far + depth * (near - far)) / 2, draw_car))
        kinds = [draw_tree, draw_post, draw_person]
        kinds.append(kinds[random.integers(3)])
        for kind, place in zip(kinds, random.permutation(4), strict=True):
            depth = 0.05 if kind is draw_tree else random.uniform(0.1, 0.7)
            curb = far + depth * (near - far) + 6
            distance = curb + (place + random.random()) / 4 * (pavement - curb)
            things.append((depth, middle + side * distance, kind))
    for depth, x, draw_thing in sorted(things, key=lambda thing: thing[0]):  # far ones first
        canvas.move_to(x, (1 - depth) * horizon, 0.75 + 0.5 * depth)
        draw_thing(canvas)
    return canvas.finish()


def draw_cityscapes(root, counts, size, seed=0, draw_scene=draw_scene):
    """Write counts[split] scenes of size (H, W) of each split, in towns of 8; returns root."""
    for s, (split, count) in enumerate(counts.items()):
        kind = "gtCoarse" if split == "train_extra" else "gtFine"
        for i in range(count):
            photograph, ids = draw_scene(np.random.default_rng([seed, s, i]), *size)
            for folder, ending, pixels in (("leftImg8bit", "leftImg8bit", photograph),
                                           (kind, f"{kind}_labelIds", ids)):
                town = Path(root, folder, split, f"toytown{i // 8}")
                town.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(town / f"{town.name}_{i:06d}_000019_{ending}.png")
    return Path(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="DIR")
    parser.add_argument("--train", type=int, default=96, help="training scenes (96)")
    parser.add_argument("--val", type=int, default=16, help="validation scenes (16)")
    args = parser.parse_args()
    draw_cityscapes(args.root, {"train": args.train, "val": args.val}, (160, 320))
