"""Cityscapes (M. Cordts et al., CVPR 2016, www.cityscapes-dataset.com): its classes, its files, and
an endless stream of training samples.

    dataset = Cityscapes("data/cityscapes", "val")
    picture, label = dataset[0]  # Pillow's pictures, 1024 pixels high and 2048 wide
    stream = TrainingStream(Cityscapes("data/cityscapes", "train"), crop_size=(512, 1024), seed=0)
    image, label = stream[12345]  # uint8 tensors: (3, 512, 1024), RGB, and (512, 1024)

    python cityscapes.py --data DIR          # counts the photographs, draws training samples
    python cityscapes.py --data DIR --check  # decodes all files first, and lists what is wrong

Two numbers stand for a class. Its id is the one in the official files. Its train id, 0 to 18, is
the one that the network learns. The train id 255 is void: such a pixel is neither trained nor
scored. A label is a map of train ids: it says for each pixel of a photograph which class is there.
Where code says picture, it is Pillow's. Where it says image, it is a tensor. (A label is first one
of Pillow's, then a tensor.)

To use other classes, edit CLASSES. In the files their ids may be any numbers to 255, and other
numbers, up to 33, are void. To use other files, write a class with __init__(root, split), __len__,
__getitem__(i), which returns (picture, label), and a class attribute `classes`. To save predictions
it also needs name(i), a path without an ending. Such a class is in tests/folders.py.
"""
import glob
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset


class SceneClass(NamedTuple):
    id: int  # the number in the *_labelIds.png files, which the test server wants as well
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
TRAIN_IDS = {entry.id: train_id for train_id, entry in enumerate(CLASSES)}  # id -> train id
# (If 255 is void in label files of your own, write TRAIN_IDS[VOID] = VOID here.)


# The files --------------------------------------------------------------------------------------


class DataError(Exception):
    """Something about the files is not as it must be. The text is a sentence for the user."""


def open_picture(path):
    """The picture in a file, decoded. Raises DataError, with the path, for a damaged file."""
    try:
        Image.open(path).verify()  # the checksums of a PNG. After that it must be opened again.
        picture = Image.open(path)
        picture.load()  # decodes it, and closes the file
        return picture
    except Exception as error:  # Pillow raises almost anything
        raise DataError(f"cannot decode {path} ({error})") from error


def read_picture(path):
    """An RGB picture. Raises DataError for damaged files and for other kinds of pixels."""
    picture = open_picture(path)
    if picture.mode.startswith(("I", "F", "LAB")):  # 16 or 32 bits, or another color space
        raise DataError(f"{path} has mode {picture.mode}: store it as RGB, 8 bits a channel")
    return picture.convert("RGB")


def read_label(path):
    """A file of ids, 0 to 33 -> a label, of train ids. Raises DataError for other files."""
    picture = open_picture(path)
    if picture.mode != "L":  # mode L: one number per pixel
        raise DataError(f"{path} is not a map of ids: its mode is {picture.mode}, not L")
    values = {value for count, value in picture.getcolors()}  # "colors" are numbers in mode L
    known = set(range(34)) | TRAIN_IDS.keys()  # the ids of Cityscapes, and those of CLASSES
    if not values <= known:
        raise DataError(f"{path} has {sorted(values - known)}: ids are 0 to 33 or in CLASSES")
    # Pillow takes a table of 256 entries: which train id takes the place of each value.
    return picture.point([TRAIN_IDS.get(value, VOID) for value in range(256)])


def paths_by_name(folder, ending):
    """The files folder/CITY/NAME + ending: a dictionary from "CITY/NAME" to the path, for example
    from "aachen/aachen_000000_000019". (glob leaves hidden files out.)"""
    paths = {}
    for file in glob.glob(f"*/*{ending}", root_dir=folder):
        paths[Path(file).as_posix().removesuffix(ending)] = Path(folder, file)
    return paths


class Cityscapes(Dataset):
    """A split of Cityscapes: "train" (2975 photographs), "val" (500), "test" (1525, whose labels
    are withheld: here all pixels are void), or "train_extra" (19998, coarse labels). In the folder
    `root` the official archives were unpacked. dataset[i] -> (picture, label), both Pillow's, RGB
    and train ids. Raises DataError for what is wrong with the files."""

    classes = CLASSES

    def __init__(self, root, split):
        self.split = split
        folder, ending = Path(root, "leftImg8bit", split), "_leftImg8bit.png"
        self.picture_paths = paths_by_name(folder, ending)
        self.names = sorted(self.picture_paths)
        if not self.names:
            raise DataError(f"there are no files {folder}/*/*{ending}: --data must be the folder "
                            "in which the official archives were unpacked")
        kind = "gtCoarse" if split == "train_extra" else "gtFine"
        self.label_paths = paths_by_name(Path(root, kind, split), f"_{kind}_labelIds.png")
        unpaired = set(self.names) ^ set(self.label_paths)  # names that only one of them has
        if unpaired and split != "test":
            raise DataError(f"{len(unpaired)} names of {split} are of a photograph without a "
                            f"label (*_{kind}_labelIds.png), or the reverse: {min(unpaired)}, ...")

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]  # CITY/NAME

    def __getitem__(self, i):
        name = self.names[i]
        picture = read_picture(self.picture_paths[name])
        if self.split == "test":
            return picture, Image.new("L", picture.size, VOID)
        return picture, read_label(self.label_paths[name])


def read_pair(dataset, i):
    """Reads dataset[i], and returns it: a picture in RGB, and a label of the same size, whose
    values are train ids and VOID. Raises DataError if it is anything else, and IndexError where i
    is beyond the end. (Cityscapes has checked its files. This check is for other data sets.)"""
    try:
        picture, label = dataset[i]
        picture.load()  # decodes it, if the data set has only opened it
        label.load()
    except (IndexError, DataError):
        raise  # DataError says already what is wrong. With IndexError a loop over pairs ends.
    except Exception as error:
        text = " ".join(str(error).split()) or repr(error)
        raise DataError(f"number {i} of the data set is not a pair of pictures: {text}") from error
    # A label of your own may have mode P, whose values are places in a palette of colors.
    if picture.mode != "RGB" or label.mode not in ("L", "P") or picture.size != label.size:
        raise DataError(f"number {i} of the data set must be of modes RGB and L (or P), and of one "
                        f"size: it is {picture.mode} {picture.size}, {label.mode} {label.size}")
    counts = label.histogram()  # the number of pixels that have the value 0, 1, ... 255
    if any(counts[len(dataset.classes):VOID]):  # values that are neither a class nor void
        raise DataError(f"number {i} of the data set: its label has values that are neither one of "
                        f"{len(dataset.classes)} classes, from 0 on, nor {VOID}, void")
    return picture, label


def to_tensors(picture, label):
    """Pillow's pictures -> uint8 tensors: image (3, H, W), RGB, and label (H, W)."""
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # from (H, W, 3)
    return image, torch.from_numpy(np.array(label))


class TensorPairs(Dataset):
    """The pairs of a data set as tensors, for a DataLoader: [i] -> image, label (to_tensors)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return to_tensors(*read_pair(self.dataset, i))


# Training samples -------------------------------------------------------------------------------
PADDING = (124, 116, 104)  # the mean color of ImageNet, which normalization makes nearly 0


def color_matrix(brightness=0.0, saturation=1.0, hue=0.0, contrast=1.0):
    """A change of colors as a matrix (3, 4): new RGB = matrix[:, :3] @ old RGB + matrix[:, 3].
    (Pillow rounds the result, and clips it to 0..255.) It makes these changes, in this order:

    - `brightness`, in gray levels, is added to R, G and B;
    - the color is brought to YIQ, the color space of analog television. Y is how light a pixel is.
      I and Q are a point in a plane of tints, in which gray is at 0, 0. `saturation` multiplies I
      and Q, and `hue`, in degrees, turns the plane. Then the color is brought back to RGB.
      (mmsegmentation does this in HSV, and clips after each change.)
    - `contrast` multiplies R, G and B."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = math.cos(math.radians(hue)), math.sin(math.radians(hue))
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    stretch = np.diag([1, saturation, saturation])
    # A product of matrices acts from right to left.
    matrix = contrast * (np.linalg.inv(to_yiq) @ turn @ stretch @ to_yiq)
    # The same brightness on R, G and B has no tint. So only contrast changes it.
    offset = np.full(3, contrast * brightness)
    return np.column_stack([matrix, offset])


def resized_box(picture, box, size, resampling):
    """A box of a picture, (left, top, right, bottom) in pixels with fractions, resized to `size`,
    (width, height). (Pillow's `resize` would also smooth what becomes smaller, which mmsegmentation
    does not.)"""
    return picture.transform(size, Image.Transform.EXTENT, box, resampling)


class TrainingStream(Dataset):
    """stream[k] is the k-th sample of a training run, k = 0, 1, 2, ... without an end: image
    (3, *crop_size), RGB, and label (*crop_size), train ids, both uint8 tensors.

    Of a data set, in one crop size, stream[k] depends on seed and k only. So the samples of a run
    are the same with any number of workers or processes, and after a restart. DataLoader(stream,
    sampler=range(k, end)) reads the samples k to end - 1.

    Samples 0 to N - 1 show the N photographs in a random order, N to 2 N - 1 in another. Each
    sample is a random crop of a photograph that is resized by a random factor. Its colors are
    changed, and half of the samples are mirrored. Where the resized photograph is smaller than the
    crop, the rest is PADDING and VOID. (In Cityscapes, with the default crop, it never is.) This
    augmentation follows mmsegmentation 1.2.2. Raises DataError, like read_pair."""

    def __init__(self, dataset, crop_size=(512, 1024), seed=0):
        self.dataset, self.crop_size, self.seed = dataset, tuple(crop_size), seed

    def index(self, k):
        """The number of the photograph from which sample k is cut."""
        epoch, position = divmod(k, len(self.dataset))
        # The seed is a list. The 0 in it stands for orders. In __getitem__ a 1 stands for crops. So
        # the two get different random numbers. (The order is computed anew for each sample: that
        # takes little time, and the stream has no state.)
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.dataset))
        return int(order[position])

    def __getitem__(self, k):
        picture, label = read_pair(self.dataset, self.index(k))
        rng = np.random.default_rng([self.seed, 1, k])

        box, cropped_label = self.choose_crop(label, rng)
        crop = resized_box(picture, box, cropped_label.size, Image.Resampling.BILINEAR)
        # Given the twelve numbers of a color_matrix, `convert` changes each color by it.
        crop = crop.convert("RGB", self.choose_colors(rng))
        if rng.random() < 0.5:
            crop, cropped_label = ImageOps.mirror(crop), ImageOps.mirror(cropped_label)

        # What a small photograph leaves free. A border has a width at the left, top, right, bottom.
        height, width = self.crop_size
        border = 0, 0, width - crop.width, height - crop.height
        crop = ImageOps.expand(crop, border, PADDING)
        cropped_label = ImageOps.expand(cropped_label, border, VOID)
        return to_tensors(crop, cropped_label)

    def choose_crop(self, label, rng):
        """Where to crop a photograph. Returns the box, and what the photograph's label shows in it,
        resized. (The label is cut here already, because the box is chosen by that.)

        mmsegmentation resizes the photograph by a random scale of 0.5 to 2, and then cuts out a
        crop. At scale 2 a crop of 512x1024 shows a box of 256x512 pixels of the photograph, at
        scale 0.5 one of 1024x2048. We cut out this box first, and resize it. That shows nearly the
        same, for less work. Where the photograph is smaller than the box, we cut out all of it."""
        scale = rng.uniform(0.5, 2.0)
        crop_height, crop_width = self.crop_size
        box_width = min(crop_width / scale, label.width)
        box_height = min(crop_height / scale, label.height)
        # The size of the box after it is resized: that of the crop, or less if the photograph is
        # small. (Pillow's sizes are width, height. A tensor's are height, width.)
        size = max(1, round(box_width * scale)), max(1, round(box_height * scale))
        # A crop that is nearly all road teaches little. If one class has 75 % or more of the
        # labeled pixels, or if there are none, try again. The eleventh box is taken as it is. (In
        # mmsegmentation this is called cat_max_ratio.)
        for _ in range(11):
            left = rng.uniform(0, label.width - box_width)
            top = rng.uniform(0, label.height - box_height)
            box = left, top, left + box_width, top + box_height
            # NEAREST, because train ids are names: a mean of 0 and 2 would be another class.
            cropped_label = resized_box(label, box, size, Image.Resampling.NEAREST)
            counts = cropped_label.histogram()[:VOID]  # the number of pixels of each class
            if max(counts) < 0.75 * sum(counts):
                break
        return box, cropped_label

    def choose_colors(self, rng):
        """The twelve numbers of a color_matrix. Each of its four changes is made with probability
        0.5, in the ranges of mmsegmentation."""
        def sometimes(low, high, neutral):
            return rng.uniform(low, high) if rng.random() < 0.5 else neutral

        matrix = color_matrix(brightness=sometimes(-32, 32, 0), saturation=sometimes(0.5, 1.5, 1),
                              hue=sometimes(-36, 36, 0), contrast=sometimes(0.5, 1.5, 1))
        return tuple(matrix.flatten())


# Here the lesson ends. What follows are sheets of pictures and the command. ----------------------
import argparse
import sys

from PIL import ImageDraw
from tqdm import tqdm


def to_picture(image):
    """An image, uint8 tensor (3, H, W) -> a picture."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def colored(label, classes):
    """A label, (H, W) or Pillow's -> a picture in the colors of the classes; void is black. The
    colors are a palette (mode P). So Pillow resizes it without blending colors of two classes."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = [entry.color for entry in classes]
    picture = Image.fromarray(np.asarray(label))
    picture.putpalette(palette.tobytes())
    return picture


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
    draw = ImageDraw.Draw(sheet)
    for i, entry in enumerate(classes):
        row, column = divmod(i, per_line)
        x, y = 120 * column, legend_top + 24 * row
        draw.rectangle((x + 4, y + 4, x + 20, y + 20), fill=tuple(entry.color))
        draw.text((x + 25, y + 4), str(entry.name), fill="white")
    sheet.save(path, "PNG")


def check_classes(classes):
    """The names of a data set's classes. Raises DataError unless `classes` is a list of SceneClass,
    and the bytes of labels and pictures can hold their numbers."""
    def fits(entry):
        return (isinstance(entry, SceneClass) and np.shape(entry.color) == (3,)
                and all(number in range(256) for number in (entry.id, *entry.color)))

    fine = isinstance(classes, (list, tuple)) and all(fits(entry) for entry in classes)
    ids = {entry.id for entry in classes} if fine else set()
    if not 2 <= len(ids) < VOID or len(ids) < len(classes):
        raise DataError(f"`classes` must be a list of 2 to {VOID - 1} SceneClass, each with another"
                        f" id, ids and colors from 0 to 255, but it is {classes!r:.300}")
    return [str(entry.name) for entry in classes]


def at_least(least, kind=int):
    """A type for argparse: a number of this kind, from `least` to a billion."""
    def number(text):
        value = kind(text)
        if not least <= value <= 10**9:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to 10**9")
        return value
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/cityscapes", help="where leftImg8bit and gtFine are (%(default)s)")
    add("--check", action="store_true", help="decode all files first")
    add("--crop", type=at_least(1), nargs=2, default=[512, 1024], metavar=("H", "W"), help="pixels")
    add("--sheet", default="samples.png", help="a PNG of training samples (%(default)s)")
    args = parser.parse_args()

    check_classes(CLASSES)
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
        for i in tqdm(range(len(dataset)) if args.check else [], split, leave=False):
            try:
                read_pair(dataset, i)
            except DataError as error:
                problems.append(f"{split}/{dataset.name(i)}: {error}")
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
