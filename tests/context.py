"""What the pyramid is for: things that look the same, and that the rest of the picture tells apart.

    python tests/context.py runs/context     # 9 trainings: half an hour on a CPU with 2 cores

In the paper's figure 2 a network without a pyramid takes a boat on a river for a car. Here the left
end of a picture shows a street or a river, fog hides the middle, and out of the fog at the right
rise bodies: cars if it is a street, boats if it is a river. Photographs of bodies are drawn without
asking which, and nothing within 172 pixels of them tells. No further can ResNet-18 and the 3x3
convolution after it see: without a pyramid the network has to guess.

Cityscapes has no rivers and boats: they are labelled "terrain" and "bicycle", and fog "sky".
Writes runs/context/data (the scenes), a folder for each training and context.png, rows of
photograph | truth | prediction without a pyramid | with bins 1 | with bins 1, 2, 3, 6.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from toy_cityscapes import (CAR, ROAD, SKY, VEGETATION, Canvas, draw_cityscapes, draw_house,
                            draw_tree)

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))
from cityscapes import Cityscapes, colored, save_sheet, to_tensors  # noqa: E402
from evaluate import predict  # noqa: E402
from pspnet import load_net  # noqa: E402

WATER, BOAT = 22, 33  # the label ids of terrain and bicycle
SIZE = 48, 312  # pixels; in the units of Canvas 128 and 832
PYRAMIDS = (), (1,), (1, 2, 3, 6)
RECIPE = ("--backbone resnet18 --weights none --crop 48 352 --batch-size 6 --lr 0.05 "
          "--val-every 1000000")


def draw_context(random, height, width):
    """A photograph (H, W, 3) and its label ids (H, W), uint8, drawn with the numpy generator."""
    canvas, right = Canvas(random, height, width), 128 * width / height
    end = 206  # of the view at the left: 77 pixels, and the first body is at 251 or further
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


def folder_of(out, bins, seed):
    """Where the results of a training are."""
    return out / f"bins_{'_'.join(map(str, bins)) or 'none'}_seed_{seed}"


def train(out, bins, seed, iters):
    """Train with this pyramid, or finish what was begun; returns the validation, a dictionary."""
    folder = folder_of(out, bins, seed)
    command = [sys.executable, "train.py", "--data", out / "data", "--out", folder,
               *RECIPE.split(), "--iters", str(iters), "--seed", str(seed),
               "--bins", *map(str, bins)]
    subprocess.run([*command, "--resume"], cwd=TOP, check=True)
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "validation"][-1]


def summary(scores):
    """Mean, least and most of some scores, in percent."""
    return f"{100 * mean(scores):.1f} ({100 * min(scores):.1f} to {100 * max(scores):.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="DIR", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="trainings with each pyramid (3)")
    parser.add_argument("--iters", type=int, default=300, help="iterations of each training (300)")
    args = parser.parse_args()
    out = args.out.resolve()

    draw_cityscapes(out / "data", {"train": 128, "val": 32}, SIZE, draw_scene=draw_context)
    results = {bins: [] for bins in PYRAMIDS}
    for seed in range(args.seeds):
        for bins in PYRAMIDS:
            results[bins].append(train(out, bins, seed, args.iters))

    print(f"\nIoU in %, mean (least to most) of {args.seeds} seeds")
    print(f"{'bins':10}{'car':>22}{'boat':>22}{'mIoU':>22}")
    for bins, validations in results.items():
        car, boat = ([row["iou"] for validation in validations for row in validation["classes"]
                      if row["name"] == name] for name in ("car", "bicycle"))
        miou = [validation["miou"] for validation in validations]
        print(f"{' '.join(map(str, bins)) or 'none':10}"
              f"{summary(car):>22}{summary(boat):>22}{summary(miou):>22}")

    nets = [load_net(folder_of(out, bins, seed=0) / "best.pt") for bins in PYRAMIDS]
    scenes, pictures = Cityscapes(out / "data", "val"), []
    for picture, label in (scenes[i] for i in range(6)):
        image, _ = to_tensors((picture, label))
        predictions = [predict(net, image) for net in nets]
        pictures += [picture,
                     *(colored(ids, scenes.classes) for ids in (label, *predictions))]
    names = {"terrain": "river", "bicycle": "boat"}
    legend = [entry._replace(name=names.get(entry.name, entry.name)) for entry in scenes.classes]
    save_sheet(out / "context.png", pictures, 5, legend)
    print(f"the picture is {out / 'context.png'}")


if __name__ == "__main__":
    main()
