"""What the pyramid is for: things that look the same, and that the rest of the picture tells apart.

    python tests/context.py runs/context          # 9 trainings: half an hour on 2 cores
    python tests/context.py runs/quick --quick    # 6 small ones: 5 minutes

In the paper's figure 2 a network without a pyramid takes a boat on a river for a car. Here the left
end of a picture shows a street or a river, fog hides the middle, and out of the fog at the right
rise bodies: cars if it is a street, boats if it is a river. Photographs of bodies are drawn without
asking which, and nothing within 172 pixels of them tells. No further can ResNet-18 and the 3x3
convolution after it see: without a pyramid the network has to guess. With --quick the network is a
ResNet-10, of one block in each stage. It sees 84 pixels at most, and the scenes are smaller.

Cityscapes has no rivers and boats: they are labeled "terrain" and "bicycle", and fog "sky".
Writes into the folder its scenes, a folder for each training, and context.png.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from pictures import TOP, cells_of, save_cells  # and the scripts are on the path
from toy_cityscapes import (CAR, ROAD, SKY, VEGETATION, Canvas, draw_cityscapes, draw_house,
                            draw_tree)

from cityscapes import Cityscapes
from pspnet import BACKBONES, BasicBlock, Variant, load_net

WATER, BOAT = 22, 33  # the label ids of terrain and bicycle
PYRAMIDS = {"no pyramid": (), "one average": (1,), "pyramid 1 2 3 6": (1, 2, 3, 6)}
RECIPE = "--weights none --lr 0.05 --val-every 1000000"
PROGRAM = "import context, train; train.main()"  # train.py, which then knows resnet10
# The size of the scenes and of the crops in pixels, the network, batch size, iterations, and seeds
FULL = (48, 312), (48, 352), "resnet18", 6, 300, 3
QUICK = (32, 184), (32, 208), "resnet10", 4, 220, 2
BACKBONES["resnet10"] = Variant(BasicBlock, (1, 1, 1, 1), False, "")


def draw_context(random, height, width):
    """A photograph (H, W, 3) and its label ids (H, W), uint8, drawn with the numpy generator."""
    canvas, right = Canvas(random, height, width), 128 * width / height
    end = 206  # of the view at the left. The first body is at right - 162 or further: at 670 in the
    # full scenes and 574 in the quick ones, 174 and 92 pixels away.
    canvas.draw(SKY, (205, 210, 215), "rectangle", 0, 128, right, 0)  # fog
    canvas.draw(SKY, (150, 200, 240), "rectangle", 0, 128, end, 0)
    if random.random() < 0.5:
        body = CAR
        for x in range(0, end - 40, 41):
            canvas.move_to(x, 55)
            draw_house(canvas)
        canvas.move_to(0, 0)
        canvas.draw(ROAD, canvas.shade((95, 95, 100)), "rectangle", 0, 58, end, 0)
        for x in range(5, end - 30, 45):  # lane markings
            canvas.draw(ROAD, (240, 240, 235), "rectangle", x, 33, x + 25, 26)
    else:
        body = BOAT
        for x in range(20, end, 41):
            canvas.move_to(x, 60)
            draw_tree(canvas)
        canvas.move_to(0, 0)
        canvas.draw(VEGETATION, canvas.shade((70, 150, 60)), "rectangle", 0, 78, end, 58)
        canvas.draw(WATER, canvas.shade((40, 110, 200)), "rectangle", 0, 58, end, 0)
        for x, y in random.uniform((0, 10), (end - 25, 50), (10, 2)):  # waves
            canvas.draw(WATER, (170, 210, 245), "rectangle", x, y + 4, x + 22, y)
    for x in (right - random.uniform(113, 128), right - random.uniform(35, 50)):
        canvas.move_to(x, random.uniform(13, 43))
        paint = canvas.shade((200, 30, 35), (30, 70, 190), (20, 140, 150))
        canvas.draw(body, paint, "rectangle", -22, 62, 22, 0)
        canvas.draw(body, paint, "rectangle", -34, 30, 34, 0)
        for window in (-16, 3):
            canvas.draw(body, (190, 225, 240), "rectangle", window, 54, window + 13, 36)
    return canvas.finish()


def train(out, bins, seed, kind):
    """Train with this pyramid, or finish what was begun; returns the folder of the results, and the
    last validation, a dictionary."""
    _, crop, backbone, batch_size, iters, _ = kind
    folder = out / f"bins_{'_'.join(map(str, bins)) or 'none'}_seed_{seed}"
    command = [sys.executable, "-c", PROGRAM, "--data", out / "data", "--out", folder,
               *RECIPE.split(), "--backbone", backbone, "--crop", *map(str, crop),
               "--batch-size", str(batch_size), "--iters", str(iters), "--seed", str(seed),
               "--bins", *map(str, bins)]
    subprocess.run([*command, "--resume"], cwd=TOP / "tests", check=True)
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return folder, [event for event in events if event["event"] == "validation"][-1]


def summary(scores):
    """Mean, least and most of some scores, in percent."""
    return f"{100 * mean(scores):.1f} ({100 * min(scores):.1f} to {100 * max(scores):.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="DIR", type=Path)
    parser.add_argument("--seeds", type=int, help="trainings with each pyramid (3, or quick 2)")
    parser.add_argument("--quick", action="store_true", help="smaller scenes, a smaller network")
    args = parser.parse_args()
    out, kind = args.out.resolve(), QUICK if args.quick else FULL
    seeds = args.seeds or kind[-1]

    draw_cityscapes(out / "data", {"train": 128, "val": 32}, kind[0], draw_scene=draw_context)
    validations, nets = {title: [] for title in PYRAMIDS}, {}
    for seed in reversed(range(seeds)):  # the last, seed 0, is drawn
        for title, bins in PYRAMIDS.items():
            folder, validation = train(out, bins, seed, kind)
            validations[title].append(validation)
            nets[title] = load_net(folder / "best.pt")

    print(f"\nIoU in %, mean (least to most) of {seeds} seeds")
    print(f"{'':16}{'car':>22}{'boat':>22}{'mIoU':>22}")
    for title, results in validations.items():
        car, boat = ([row["iou"] for result in results for row in result["classes"]
                      if row["name"] == name] for name in ("car", "bicycle"))
        miou = summary([result["miou"] for result in results])
        print(f"{title:16}{summary(car):>22}{summary(boat):>22}{miou:>22}")

    streets, rivers = [], []
    for picture, label in Cityscapes(out / "data", "val"):
        has_cars = label.histogram()[13] > 0  # 13 is the train id of cars
        (streets if has_cars else rivers).append((picture, label))
    columns = [cells_of("a street at the left, so these are cars (blue)", streets[0], nets),
               cells_of("a river at the left, so these are boats (red)", rivers[0], nets)]
    save_cells(out / "context.png", zip(*columns, strict=True), 1.5)


if __name__ == "__main__":
    main()
