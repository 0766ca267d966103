"""Cityscapes (M. Cordts et al., CVPR 2016, www.cityscapes-dataset.com): its labels, its files, and
an endless stream of training samples.

    dataset = Cityscapes("data/cityscapes", "val")
    image, label = dataset[0]                # uint8: (3, 1024, 2048) RGB, (1024, 2048) train ids
    stream = TrainingStream(Cityscapes("data/cityscapes", "train"), crop_size=(512, 1024), seed=0)
    image, label = stream[12345]             # uint8: (3, 512, 1024), (512, 1024), augmented

    python cityscapes.py --data DIR          # images per split, and a sheet of training samples
    python cityscapes.py --data DIR --check  # also decodes all: share of each class, what is wrong

The files are used as they come out of the official zip archives; nothing is prepared beforehand.
For other classes edit LABELS, from which everything else derives. For a data set in other files
write a class with len(dataset), dataset[i] as above, and dataset.classes, a list of entries with
name, category and color. (To save predictions it also needs dataset.name(i), a relative path
without an ending.)
"""
import argparse
import hashlib
import math
import os
import sys
import uuid
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

# The classes ------------------------------------------------------------------------------------


class Label(NamedTuple):  # a row of the table; elsewhere a label is a map (H, W) of train ids
    id: int  # in the *_labelIds.png files, and what the test server wants
    name: str
    train_id: int  # the network's class, 0 to 18; 255 (and -1) is void: not trained, not scored
    category: str  # a group of classes, scored as a whole too
    color: tuple  # red, green, blue


# cityscapesScripts 2.3.0, cityscapesscripts/helpers/labels.py
LABELS = (
    Label(0, "unlabeled", 255, "void", (0, 0, 0)),
    Label(1, "ego vehicle", 255, "void", (0, 0, 0)),
    Label(2, "rectification border", 255, "void", (0, 0, 0)),
    Label(3, "out of roi", 255, "void", (0, 0, 0)),
    Label(4, "static", 255, "void", (0, 0, 0)),
    Label(5, "dynamic", 255, "void", (111, 74, 0)),
    Label(6, "ground", 255, "void", (81, 0, 81)),
    Label(7, "road", 0, "flat", (128, 64, 128)),
    Label(8, "sidewalk", 1, "flat", (244, 35, 232)),
    Label(9, "parking", 255, "flat", (250, 170, 160)),
    Label(10, "rail track", 255, "flat", (230, 150, 140)),
    Label(11, "building", 2, "construction", (70, 70, 70)),
    Label(12, "wall", 3, "construction", (102, 102, 156)),
    Label(13, "fence", 4, "construction", (190, 153, 153)),
    Label(14, "guard rail", 255, "construction", (180, 165, 180)),
    Label(15, "bridge", 255, "construction", (150, 100, 100)),
    Label(16, "tunnel", 255, "construction", (150, 120, 90)),
    Label(17, "pole", 5, "object", (153, 153, 153)),
    Label(18, "polegroup", 255, "object", (153, 153, 153)),
    Label(19, "traffic light", 6, "object", (250, 170, 30)),
    Label(20, "traffic sign", 7, "object", (220, 220, 0)),
    Label(21, "vegetation", 8, "nature", (107, 142, 35)),
    Label(22, "terrain", 9, "nature", (152, 251, 152)),
    Label(23, "sky", 10, "sky", (70, 130, 180)),
    Label(24, "person", 11, "human", (220, 20, 60)),
    Label(25, "rider", 12, "human", (255, 0, 0)),
    Label(26, "car", 13, "vehicle", (0, 0, 142)),
    Label(27, "truck", 14, "vehicle", (0, 0, 70)),
    Label(28, "bus", 15, "vehicle", (0, 60, 100)),
    Label(29, "caravan", 255, "vehicle", (0, 0, 90)),
    Label(30, "trailer", 255, "vehicle", (0, 0, 110)),
    Label(31, "train", 16, "vehicle", (0, 80, 100)),
    Label(32, "motorcycle", 17, "vehicle", (0, 0, 230)),
    Label(33, "bicycle", 18, "vehicle", (119, 11, 32)),
    Label(-1, "license plate", -1, "vehicle", (0, 0, 142)),  # never drawn into the label files
)
VOID = 255  # the train id of pixels without a class
TRAIN_IDS = {label.id: label.train_id % 256 for label in LABELS}  # by id; -1 becomes 255
# For each train id but VOID the first label that has it.
CLASSES = [next((label for label in LABELS if label.train_id == i), None)
           for i in range(1 + max(i for i in TRAIN_IDS.values() if i != VOID))]
assert None not in CLASSES, "the train ids of LABELS must be 0, 1, 2, ... without gaps, and 255"


class DataError(Exception):
    """Something about the files is not as it must be. The text is a sentence for the user."""


# The files. An image is a tensor, a picture an image of Pillow's. -------------------------------


def open_picture(path):
    """(picture, pixel format) of an image file: decoded, turned upright as its EXIF data ask; the
    format is a text in which "L;4" means grey of 4 bits, "I;16B" of 16. Raises DataError."""
    try:
        content = Path(path).read_bytes()
        Image.open(BytesIO(content)).verify()  # the checksums of a PNG, which decoding leaves out
        picture = Image.open(BytesIO(content))  # again, as verify() leaves nothing to decode
        pixel_format = f"{picture.mode} {picture.tile}"  # before load(), which empties .tile
        picture.load()
    except Exception as error:  # Pillow raises almost anything, and never says which file it was
        raise DataError(f"cannot decode {path} ({error})") from error
    with suppress(Exception):  # broken metadata do no harm to the pixels
        ImageOps.exif_transpose(picture, in_place=True)  # turns the pixels, then edits the EXIF
    return picture, pixel_format


def read_image(path):
    """RGB (3, H, W), uint8, of an image file; of 16 bits a channel the high bytes are taken. Raises
    DataError for a damaged file, and for pixels of 32 bits or in LAB."""
    picture, pixel_format = open_picture(path)
    if "I;16" in pixel_format:
        picture = Image.fromarray((np.array(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F", "LAB"):  # 32 bits: no fixed range; LAB: not in every Pillow
        raise DataError(f"{path} has pixels of mode {picture.mode}: store it as RGB or grey, with "
                        "8 bits a channel")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def read_label(path):
    """Train ids (H, W), uint8, of an image file of label ids, one channel of 8 bits. Raises
    DataError for a damaged file, another mode, and ids that are not in LABELS."""
    picture, pixel_format = open_picture(path)
    # P holds indices, which are ids here; grey of few bits (L;1, L;2, L;4) Pillow stretches.
    if picture.mode not in ("L", "P") or "L;" in pixel_format:
        raise DataError(f"{path} is not an image of one channel of 8 bits, as labels are: it has "
                        f"mode {picture.mode}, or fewer bits")
    unknown = [value for value in np.flatnonzero(picture.histogram()) if value not in TRAIN_IDS]
    if unknown:
        raise DataError(f"{path} has label ids that are not in the table of labels "
                        f"({', '.join(map(str, unknown))}): expected ids as in *_labelIds.png, "
                        "not train ids or colors")
    table = [TRAIN_IDS.get(value, VOID) for value in range(256)]
    return torch.from_numpy(np.array(picture.point(table)))


def read_pair(image_path, label_path):
    """Image (3, H, W) and label (H, W) of two files; without label_path the label is all void.
    Raises DataError where one of them cannot be read or their sizes differ."""
    image = read_image(image_path)
    if label_path is None:
        return image, torch.full(image.shape[1:], VOID, dtype=torch.uint8)
    label = read_label(label_path)
    if label.shape != image.shape[1:]:
        (h, w), (label_h, label_w) = image.shape[1:], label.shape
        raise DataError(f"sizes differ: {image_path} has {h} x {w} pixels, its label {label_path} "
                        f"{label_h} x {label_w}")
    return image, label


def save_whole(content, path, temporary):
    """torch.save(content), whole or not at all: at every moment `path` is the old file or the new
    one. `temporary` is a path in the same folder. Raises OSError, which names the file."""
    serialized = BytesIO()  # torch.save into a file would make a RuntimeError of a full disk
    torch.save(content, serialized)
    try:
        with open(temporary, "wb") as file:
            file.write(serialized.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror})") from error


class Cityscapes(Dataset):
    """A split of Cityscapes: "train" (2975 images), "val" (500), "test" (1525, whose labels are
    withheld: all void here), or "train_extra" (19998, coarse labels).

    dataset[i] -> (image, label): uint8 tensors (3, H, W), RGB, and (H, W), train ids, 255 void.
    Images are root/leftImg8bit/split/CITY/NAME_leftImg8bit.png, labels root/gtFine/split/CITY/
    NAME_gtFine_labelIds.png (or gtCoarse); names that begin with a dot are left out. With `cache`,
    a folder, each pair is decoded once, into a file of 3 H W + H W bytes there (in all 25 GB for
    train), which is mapped into memory: only what is used of it is read. Raises DataError for
    whatever is wrong with the files, and OSError for folders that may not be read or written."""

    classes = CLASSES

    def __init__(self, root, split, cache=None):
        self.root, self.split, self.cache = root, split, cache
        folder, ending = Path(root, "leftImg8bit", split), "_leftImg8bit.png"
        # os.listdir, because glob is silent about folders that may not be read.
        cities = os.listdir(folder) if folder.is_dir() else []
        self.names = sorted(f"{city}/{file.removesuffix(ending)}"
                            for city in cities if (folder / city).is_dir() and city[0] != "."
                            for file in os.listdir(folder / city)
                            if file.endswith(ending) and file[0] != ".")
        if not self.names:
            raise DataError(f"there are no images {folder}/*/*{ending}: --data must be the folder "
                            "in which the official archives were unpacked, with leftImg8bit and "
                            "gtFine (or gtCoarse) in it")
        label_paths = [self.paths(i)[1] for i in range(len(self))]
        missing = [path for path in label_paths if path and not path.exists()]
        if missing:
            raise DataError(f"{len(missing)} of the {len(self)} images of {split} have no label; "
                            f"the first that is missing is {missing[0]}")
        if cache:
            Path(cache).mkdir(parents=True, exist_ok=True)

    def __len__(self):
        return len(self.names)

    def name(self, i):
        """CITY/NAME of image i."""
        return self.names[i]

    def paths(self, i):
        """Path of image i, and of its label, or None for the test split."""
        image = Path(self.root, "leftImg8bit", self.split, f"{self.names[i]}_leftImg8bit.png")
        if self.split == "test":
            return image, None
        kind = "gtCoarse" if self.split == "train_extra" else "gtFine"
        return image, Path(self.root, kind, self.split, f"{self.names[i]}_{kind}_labelIds.png")

    def __getitem__(self, i):
        paths = self.paths(i)
        if not self.cache:
            return read_pair(*paths)
        # Named after the files' paths, dates and sizes and TRAIN_IDS: a change makes a new file.
        stats = [(path.resolve(), path.stat().st_mtime_ns, path.stat().st_size)
                 for path in paths if path]
        key = hashlib.sha256(repr((stats, TRAIN_IDS)).encode()).hexdigest()
        cached = Path(self.cache, f"{key}.pt")
        if not cached.exists():
            # Under a name of its own, as another process may write the same.
            save_whole(read_pair(*paths), cached, f"{cached}.{uuid.uuid4().hex}")
        try:
            return torch.load(cached, mmap=True, weights_only=True)
        except Exception as error:
            raise DataError(f"cannot read {cached} of the cache ({error}): remove it") from error


# Training samples -------------------------------------------------------------------------------

PADDING = (124, 116, 104)  # the mean color of ImageNet, which normalisation makes nearly 0


def color_matrix(brightness=0.0, contrast=1.0, saturation=1.0, hue=0.0):
    """Photometric distortion as one 3x4 matrix M: new RGB = M[:, :3] @ old RGB + M[:, 3].

    brightness is added to all channels (grey levels), contrast multiplies them afterwards;
    saturation multiplies a color's distance from the grey of the same mean; hue turns it around
    the grey axis (degrees; red to yellow to green is positive).

    mmsegmentation does the four one after the other, and clips to 0..255 after each; saturation and
    hue in HSV, which keeps the largest of R, G and B where this keeps their mean. On photographs
    (CamVid) saturation 1.5 moves a value by 2.2 grey levels on average, in HSV by 3.0; hue 36 by
    2.9, in HSV by 2.5.
    """
    angle = math.radians(hue)
    grey = np.full((3, 3), 1 / 3)  # projects on the grey axis, R = G = B
    quarter_turn = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # around it
    turn = math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * quarter_turn
    matrix = contrast * (grey + saturation * turn)
    return np.column_stack([matrix, matrix @ np.full(3, brightness)])


def window_and_size(length, crop, scale):
    """Along one axis: how many of `length` pixels a crop of `crop` pixels shows at `scale`, and how
    many pixels of the crop they fill (fewer than all where the scaled image is smaller)."""
    window = round(crop / scale)
    if window <= length:
        return window, crop
    return length, round(length * scale)


class TrainingStream(Dataset):
    """stream[k] is the k-th sample of a training run, k = 0, 1, 2, ... without an end: image
    (3, *crop_size), RGB, and label (*crop_size), train ids, both uint8.

    stream[k] depends on (seed, k) alone. So a run's data do not depend on how many workers or
    processes read them, and a run that is resumed at sample k reads none of those before:
    DataLoader(stream, sampler=range(k, end)). Samples 0 to N-1 are a permutation of the N images, N
    to 2N-1 another. The augmentation follows mmsegmentation 1.2.2 (RandomResize, RandomCrop,
    RandomFlip, PhotoMetricDistortion); pixels beyond the image are PADDING, their labels void."""

    def __init__(self, dataset, crop_size=(512, 1024), seed=0):
        self.dataset, self.crop_size, self.seed = dataset, tuple(crop_size), seed

    def index(self, k):
        """Which image sample k shows. (In the seeds 0 is for the order, 1 for the samples.)"""
        epoch, position = divmod(k, len(self.dataset))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.dataset))
        return order[position]

    def __getitem__(self, k):
        image, label = self.dataset[self.index(k)]  # (3, H, W), (H, W)
        rng = np.random.default_rng([self.seed, 1, k])
        scale = rng.uniform(0.5, 2.0)
        mirrored = rng.random() < 0.5
        # Brightness, contrast, saturation, hue, each with probability 0.5, in mmsegmentation's
        # ranges (its 18 for hue are OpenCV's units of 2 degrees)
        matrix = color_matrix(*(
            rng.uniform(low, high) if rng.random() < 0.5 else neutral
            for low, high, neutral in ((-32, 32, 0), (0.5, 1.5, 1), (0.5, 1.5, 1), (-36, 36, 0))))

        # Only what is under the crop is resized: a window of the photograph of about crop / scale.
        (height, width), (crop_height, crop_width) = label.shape, self.crop_size
        window_height, new_height = window_and_size(height, crop_height, scale)
        window_width, new_width = window_and_size(width, crop_width, scale)
        new_size = (new_height, new_width)
        for _ in range(11):  # 10 tries for a window of mixed classes; the 11th is taken anyway
            top = rng.integers(height - window_height + 1)
            left = rng.integers(width - window_width + 1)
            window = np.s_[..., top: top + window_height, left: left + window_width]  # on H and W
            old_label = label[window][None, None]
            new_label = F.interpolate(old_label, new_size, mode="nearest-exact")[0, 0]
            pixels = torch.bincount(new_label.flatten(), minlength=256)[:VOID]  # of each class
            if pixels.max() < 0.75 * pixels.sum():  # not so where all is void
                break
        # With the channels last in memory PyTorch is twice as fast.
        old_image = image[window][None].contiguous(memory_format=torch.channels_last)
        new_image = F.interpolate(old_image, new_size, mode="bilinear")[0]

        # Pillow multiplies each pixel by the matrix, rounds, and clips to 0..255.
        picture = photograph(new_image).convert("RGB", tuple(matrix.flatten()))
        padded_picture = Image.new("RGB", (crop_width, crop_height), PADDING)
        padded_picture.paste(ImageOps.mirror(picture) if mirrored else picture)
        padded_label = torch.full(self.crop_size, VOID, dtype=torch.uint8)
        padded_label[:new_height, :new_width] = new_label.flip(1) if mirrored else new_label
        return torch.from_numpy(np.array(padded_picture)).permute(2, 0, 1), padded_label


# Pictures ---------------------------------------------------------------------------------------


def photograph(image):
    """RGB (3, H, W), uint8 tensor -> a picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def colored(label, classes):
    """Train ids (H, W), uint8 tensor -> a picture in the colors of the classes; void is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = [entry.color for entry in classes]
    return Image.fromarray(palette[label.numpy()])


def overlaid(image, label, classes):
    """RGB (3, H, W) and train ids (H, W), uint8 tensors -> a picture of the photograph with the
    colors of the labels over it, half and half; void leaves the photograph as it is."""
    mask = Image.fromarray(np.where(label == VOID, 0, 128).astype(np.uint8))
    return Image.composite(colored(label, classes), photograph(image), mask)


def save_sheet(path, pictures, columns, classes):
    """Save pictures as a PNG, in rows of `columns`, above a legend of the classes. Each is put in a
    cell of 480 pixels' width that has the shape of the first picture."""
    width, height = 480, max(1, round(480 * pictures[0].height / pictures[0].width))
    legend_top = height * math.ceil(len(pictures) / columns)
    per_line = columns * width // 120  # entries of the legend, of 120 x 24 pixels
    legend_height = 24 * math.ceil(len(classes) / per_line)
    sheet = Image.new("RGB", (columns * width, legend_top + legend_height))
    for i, picture in enumerate(pictures):
        scale = min(width / picture.width, height / picture.height)
        size = [max(1, round(scale * length)) for length in picture.size]
        sheet.paste(picture.resize(size), (i % columns * width, i // columns * height))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, entry in enumerate(classes):
        x, y = 120 * (i % per_line), legend_top + 24 * (i // per_line)
        draw.rectangle((x + 4, y + 4, x + 20, y + 20), fill=tuple(entry.color))
        draw.text((x + 25, y + 4), entry.name, fill="white", font=font)
    sheet.save(path, "PNG")


# python cityscapes.py ---------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cityscapes",
                        help="where leftImg8bit and gtFine are (%(default)s)")
    parser.add_argument("--check", action="store_true",
                        help="decode all files: the share of each class, and what is wrong")
    parser.add_argument("--crop", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"),
                        help="size of the training samples in pixels (512 1024)")
    parser.add_argument("--sheet", default="samples.png", metavar="FILE",
                        help="where to draw training samples, a PNG (samples.png)")
    args = parser.parse_args()
    if min(args.crop) < 1:
        parser.error("--crop takes positive numbers")

    problems, shares = [], {}
    for split in ("train", "val", "test", "train_extra"):
        if not Path(args.data, "leftImg8bit", split).is_dir():
            continue  # not everybody has all; the sheet below asks for train
        try:
            dataset = Cityscapes(args.data, split)
        except DataError as error:
            problems.append(str(error))
            continue
        print(f"{split}: {len(dataset)} images")
        if args.check:
            pixels = np.zeros(256)  # by train id
            for i in tqdm(range(len(dataset)), split, leave=False):
                try:
                    _, label = dataset[i]
                    pixels += np.bincount(label.flatten(), minlength=256)
                except DataError as error:
                    problems.append(str(error))
            shares[split] = 100 * pixels / max(1, pixels[:VOID].sum())  # test has no labels
    if shares:
        print("\n% of labelled pixels  " + "".join(f"{split:>12}" for split in shares))
        for i, entry in enumerate(CLASSES):
            print(f"{entry.name:22}" + "".join(f"{share[i]:12.2f}" for share in shares.values()))
    if problems:
        print(*problems, sep="\n")
        sys.exit(f"cityscapes.py: the {len(problems)} problems above must be mended")
    stream = TrainingStream(Cityscapes(args.data, "train"), args.crop)
    save_sheet(args.sheet, [overlaid(*stream[k], CLASSES) for k in range(12)], 3, CLASSES)
    print(f"drew 12 training samples: {args.sheet}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for names in another encoding
    try:
        main()
    except (OSError, DataError) as error:
        sys.exit(f"cityscapes.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells report Ctrl-C
