"""Cityscapes (M. Cordts et al., CVPR 2016, www.cityscapes-dataset.com): its classes, its files, and
an endless stream of training samples.

    dataset = Cityscapes("data/cityscapes", "val")
    picture, label = dataset[0]  # of Pillow: RGB, and train ids in one channel, 2048 x 1024 pixels
    stream = TrainingStream(Cityscapes("data/cityscapes", "train"), crop_size=(512, 1024), seed=0)
    image, label = stream[12345]  # uint8 tensors: (3, 512, 1024), (512, 1024), augmented

    python cityscapes.py --data DIR          # images per split, and a sheet of training samples
    python cityscapes.py --data DIR --check  # decodes all files first, and lists what is wrong

A train id is the number of a class, 0 to 18. The train id 255 is void: not trained, not scored. A
picture is Pillow's, an image is a tensor, a label is a map of train ids. For other classes edit
CLASSES. For other files write a class like Cityscapes: made of (root, split), with len, [i] and, in
the class itself, classes. To save predictions it also needs name(i), a path without an ending.
"""
import argparse
import glob
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm


class SceneClass(NamedTuple):
    id: int  # the label id: in the *_labelIds.png files, and what the test server wants
    name: str
    category: str  # a group of classes, scored as a whole too
    color: tuple  # red, green, blue


# The position of a class in this list is its train id, and the number of the network's output.
CLASSES = [  # cityscapesScripts 2.3.0, cityscapesscripts/helpers/labels.py
    SceneClass(7, "road", "flat", (128, 64, 128)),
    SceneClass(8, "sidewalk", "flat", (244, 35, 232)),
    SceneClass(11, "building", "construction", (70, 70, 70)),
    SceneClass(12, "wall", "construction", (102, 102, 156)),
    SceneClass(13, "fence", "construction", (190, 153, 153)),
    SceneClass(17, "pole", "object", (153, 153, 153)),
    SceneClass(19, "traffic light", "object", (250, 170, 30)),
    SceneClass(20, "traffic sign", "object", (220, 220, 0)),
    SceneClass(21, "vegetation", "nature", (107, 142, 35)),
    SceneClass(22, "terrain", "nature", (152, 251, 152)),
    SceneClass(23, "sky", "sky", (70, 130, 180)),
    SceneClass(24, "person", "human", (220, 20, 60)),
    SceneClass(25, "rider", "human", (255, 0, 0)),
    SceneClass(26, "car", "vehicle", (0, 0, 142)),
    SceneClass(27, "truck", "vehicle", (0, 0, 70)),
    SceneClass(28, "bus", "vehicle", (0, 60, 100)),
    SceneClass(31, "train", "vehicle", (0, 80, 100)),
    SceneClass(32, "motorcycle", "vehicle", (0, 0, 230)),
    SceneClass(33, "bicycle", "vehicle", (119, 11, 32)),
]
VOID = 255  # the train id of all other pixels
TRAIN_IDS = {label_id: VOID for label_id in range(34)}  # label id, 0 to 33 -> train id
for train_id, entry in enumerate(CLASSES):
    TRAIN_IDS[entry.id] = train_id
assert len({entry.id for entry in CLASSES}) == len(CLASSES), "two of CLASSES have the same id"


# The files --------------------------------------------------------------------------------------


class DataError(Exception):
    """Something about the files is not as it must be. The text is a sentence for the user."""


def open_picture(path):
    """A decoded picture. Raises DataError, with the path, which Pillow's errors leave out."""
    try:
        with Image.open(path) as picture:
            picture.verify()  # the checksums of a PNG, which decoding leaves out
        with Image.open(path) as picture:
            picture.load()  # into memory, before the file is closed
        return picture
    except Exception as error:  # Pillow raises almost anything
        raise DataError(f"cannot decode {path} ({error})") from error


def read_image(path):
    """An RGB picture, turned upright. Raises DataError for damaged files and deep pixels."""
    picture = open_picture(path)
    if picture.mode.startswith(("I", "F", "LAB")):
        raise DataError(f"{path} has mode {picture.mode}: store it as RGB, 8 bits a channel")
    with suppress(Exception):  # broken EXIF data do no harm to the pixels
        ImageOps.exif_transpose(picture, in_place=True)
    return picture.convert("RGB")


def read_label(path):
    """A file of label ids -> a picture of train ids. Raises DataError for every other file."""
    picture = open_picture(path)
    if picture.mode != "L":  # In mode P, for example, values are places in a palette.
        raise DataError(f"{path} is no map of label ids: its mode is {picture.mode}, not L")
    ids = [value for value, count in enumerate(picture.histogram()) if count > 0]
    if not set(ids) <= set(TRAIN_IDS):
        raise DataError(f"{path} is no map of label ids: not all of its values are ids, {ids}")
    return picture.point([TRAIN_IDS.get(value, VOID) for value in range(256)])  # a table


def paths_by_name(folder, ending):
    """CITY/NAME -> path, of every file folder/CITY/NAME + ending. Hidden files are left out."""
    paths = {}
    for file in glob.glob(f"*/*{ending}", root_dir=folder):
        paths[Path(file).as_posix().removesuffix(ending)] = Path(folder, file)
    return paths


class Cityscapes(Dataset):
    """A split of Cityscapes: "train" (2975 images), "val" (500), "test" (1525, whose labels are
    withheld: all void here), or "train_extra" (19998, coarse labels). In the folder `root` the
    official archives were unpacked. dataset[i] -> (picture, label), both Pillow's: RGB, and train
    ids. Raises DataError for what is wrong with the files."""

    classes = CLASSES

    def __init__(self, root, split):
        self.split = split
        folder, ending = Path(root, "leftImg8bit", split), "_leftImg8bit.png"
        self.image_paths = paths_by_name(folder, ending)
        self.names = sorted(self.image_paths)
        if not self.names:
            raise DataError(f"there are no images {folder}/*/*{ending}: --data must be the folder "
                            "in which the official archives were unpacked")
        kind = "gtCoarse" if split == "train_extra" else "gtFine"
        self.label_paths = paths_by_name(Path(root, kind, split), f"_{kind}_labelIds.png")
        unpaired = sorted(self.image_paths.keys() ^ self.label_paths.keys())
        if unpaired and split != "test":
            raise DataError(f"{len(unpaired)} names of {split} have an image without a label, or a "
                            f"label without an image; the first is {unpaired[0]}")

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]  # CITY/NAME

    def __getitem__(self, i):
        name = self.names[i]
        picture = read_image(self.image_paths[name])
        if self.split == "test":
            return picture, Image.new("L", picture.size, VOID)
        label = read_label(self.label_paths[name])
        if label.size != picture.size:
            raise DataError(f"{self.label_paths[name]} and its image have different sizes: "
                            f"{label.size} and {picture.size}")
        return picture, label


# Training samples -------------------------------------------------------------------------------
PADDING = (124, 116, 104)  # the mean color of ImageNet, which normalisation makes nearly 0


def to_tensors(pair):
    """(picture, label) of Pillow's -> uint8 tensors: image (3, H, W), RGB, and label (H, W)."""
    image, label = (torch.from_numpy(np.array(picture)) for picture in pair)
    return image.permute(2, 0, 1), label


class TrainingStream(Dataset):
    """stream[k] is the k-th sample of a training run, k = 0, 1, 2, ... without an end: image
    (3, *crop_size), RGB, and label (*crop_size), train ids, both uint8 tensors.

    stream[k] depends on seed and k, not on what was read before. So neither workers nor processes
    nor a resumed start change a run's data: DataLoader(stream, sampler=range(k, end)). Samples 0 to
    N-1 are a permutation of the N images, N to 2N-1 another. The augmentation follows
    mmsegmentation 1.2.2. Raises DataError for labels with other values than train ids and VOID."""

    def __init__(self, dataset, crop_size=(512, 1024), seed=0):
        self.dataset, self.crop_size, self.seed = dataset, tuple(crop_size), seed

    def index(self, k):
        """The index of the image from which sample k is cut."""
        epoch, position = divmod(k, len(self.dataset))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.dataset))
        return int(order[position])

    def __getitem__(self, k):
        picture, label = self.dataset[self.index(k)]
        rng = np.random.default_rng([self.seed, 1, k])  # 1: other numbers than in `index`

        # One would resize the photograph by a random scale, then crop. It is cheaper to resize only
        # the box that the crop shows (EXTENT). With scale 2 and crop 512x1024 it is 256x512 pixels.
        scale = rng.uniform(0.5, 2.0)
        height, width = self.crop_size
        box_height = min(height / scale, picture.height)
        box_width = min(width / scale, picture.width)
        # (width, height): the crop's, or less where the scaled photograph is smaller (padded below)
        new_size = (round(box_width * scale), round(box_height * scale))

        # No crop should be nearly all road: where one class has 75 % or more of the labels, draw
        # another box (mmsegmentation's cat_max_ratio). The eleventh is taken as it is.
        for _ in range(11):
            left = rng.uniform(0, picture.width - box_width)
            top = rng.uniform(0, picture.height - box_height)
            box = (left, top, left + box_width, top + box_height)
            new_label = label.transform(new_size, Image.Transform.EXTENT, box,
                                        Image.Resampling.NEAREST)
            pixels = new_label.histogram()[:VOID]  # of each class, not of void
            if max(pixels) < 0.75 * sum(pixels):
                break  # Keep this box.
        if any(pixels[len(self.dataset.classes):]):
            raise DataError(f"label {self.index(k)} has values that are neither one of the "
                            f"{len(self.dataset.classes)} classes nor {VOID}, void")
        # (Pillow cuts fractions off: the image gets about 0.5 grey levels darker.)
        new_picture = picture.transform(new_size, Image.Transform.EXTENT, box,
                                        Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            new_picture, new_label = ImageOps.mirror(new_picture), ImageOps.mirror(new_label)

        def sometimes(low, high, neutral):
            return rng.uniform(low, high) if rng.random() < 0.5 else neutral

        # Photometric distortion, in mmsegmentation's ranges (OpenCV's hue of 18 is 36 degrees)
        matrix = color_matrix(brightness=sometimes(-32, 32, 0), contrast=sometimes(0.5, 1.5, 1),
                              saturation=sometimes(0.5, 1.5, 1), hue=sometimes(-36, 36, 0))
        new_picture = new_picture.convert("RGB", tuple(matrix.flatten()))  # applies the matrix

        image, label = to_tensors((new_picture, new_label))
        missing = (0, width - new_size[0], 0, height - new_size[1])  # left, right, top, bottom
        channels = [F.pad(image[c], missing, value=PADDING[c]) for c in range(3)]
        return torch.stack(channels), F.pad(label, missing, value=VOID)


def color_matrix(brightness=0.0, contrast=1.0, saturation=1.0, hue=0.0):
    """A photometric distortion as one 3x4 matrix M: new RGB = M[:, :3] @ old RGB + M[:, 3], which
    Pillow rounds and clips to 0..255.

    brightness (grey levels) is added to all channels. contrast multiplies them afterwards.
    saturation multiplies the difference between a color and the grey of the same mean. hue turns
    that difference around the axis R = G = B (degrees; red to yellow to green is positive).
    (In mmsegmentation the last two keep the largest of R, G and B; here they keep the mean.)"""
    angle = math.radians(hue)
    to_grey = np.full((3, 3), 1 / 3)  # a color -> the grey of the same mean
    difference = np.eye(3) - to_grey  # a color -> how it differs from that grey
    # The cross product of (1, 1, 1) / sqrt(3) and a color: its difference, turned by 90 degrees
    quarter_turn = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turned = math.cos(angle) * difference + math.sin(angle) * quarter_turn
    matrix = contrast * (to_grey + saturation * turned)
    return np.column_stack([matrix, matrix @ np.full(3, brightness)])


# Here the lesson ends. What follows are pictures and the command. -------------------------------


def to_picture(image):
    """An image, uint8 tensor (3, H, W) -> a picture."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def colored(label, classes):
    """A label, (H, W) or Pillow's -> a picture in the colors of the classes; void is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = [entry.color for entry in classes]
    return Image.fromarray(palette[np.asarray(label)])


def save_sheet(path, pictures, columns, classes):
    """Save pictures as a PNG, in rows of `columns`, above a legend of the classes. Each is resized
    to 480 pixels' width and the shape of the first."""
    cell = (480, max(1, round(480 * pictures[0].height / pictures[0].width)))
    legend_top = cell[1] * math.ceil(len(pictures) / columns)
    per_line = columns * cell[0] // 120  # entries of the legend, of 120 x 24 pixels
    legend_height = 24 * math.ceil(len(classes) / per_line)
    sheet = Image.new("RGB", (columns * cell[0], legend_top + legend_height))
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        sheet.paste(picture.resize(cell), (column * cell[0], row * cell[1]))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, entry in enumerate(classes):
        row, column = divmod(i, per_line)
        x, y = 120 * column, legend_top + 24 * row
        draw.rectangle((x + 4, y + 4, x + 20, y + 20), fill=tuple(entry.color))
        draw.text((x + 25, y + 4), entry.name, fill="white", font=font)
    sheet.save(path, "PNG")


def at_least(least, kind=int):
    """A type for argparse: a finite number of this kind that is not below `least`."""
    def number(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return value
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cityscapes",
                        help="where leftImg8bit and gtFine are (%(default)s)")
    parser.add_argument("--check", action="store_true", help="decode all files first")
    parser.add_argument("--crop", type=at_least(1), nargs=2, default=[512, 1024],
                        metavar=("H", "W"), help="size of the training samples, pixels (512 1024)")
    parser.add_argument("--sheet", default="samples.png", metavar="FILE",
                        help="where to draw training samples, a PNG (%(default)s)")
    args = parser.parse_args()

    problems = []
    for split in ("train", "val", "test", "train_extra"):
        if not Path(args.data, "leftImg8bit", split).is_dir():
            continue  # not everybody has all four
        try:
            dataset = Cityscapes(args.data, split)
        except DataError as error:
            problems.append(str(error))
            continue
        print(f"{split}: {len(dataset)} images")
        for i in tqdm(range(len(dataset) if args.check else 0), split, leave=False):
            try:
                dataset[i]
            except DataError as error:
                problems.append(str(error))
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        raise DataError(f"the {len(problems)} problems above must be mended")
    stream = TrainingStream(Cityscapes(args.data, "train"), args.crop)
    pictures = []
    for k in range(8):
        image, label = stream[k]
        pictures += [to_picture(image), colored(label, CLASSES)]
    save_sheet(args.sheet, pictures, 4, CLASSES)
    print(f"drew 8 training samples and their labels: {args.sheet}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, DataError) as error:
        sys.exit(f"cityscapes.py: {error}")
