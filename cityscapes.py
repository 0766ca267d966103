"""Cityscapes (M. Cordts et al., CVPR 2016, www.cityscapes-dataset.com): its labels, its files, and
an endless stream of training samples.

    dataset = Cityscapes("data/cityscapes", "val")
    image, label = dataset[0]                # uint8: (3, 1024, 2048) RGB, (1024, 2048) train ids
    stream = TrainingStream(Cityscapes("data/cityscapes", "train"), crop_size=(512, 1024), seed=0)
    image, label = stream[12345]             # uint8: (3, 512, 1024), (512, 1024), augmented

    python cityscapes.py --data DIR          # what is there, a sheet of samples, samples per second
    python cityscapes.py --data DIR --check  # decodes all files, says which are wrong

The files are used as they come out of the official zip archives; nothing is prepared beforehand.
For a data set of your own, name the files as there and edit LABELS (with train ids 0, 1, 2, ...):
everything else derives from it.
"""
import argparse
import hashlib
import math
import os
import sys
import tempfile
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# The classes


class Label(NamedTuple):
    id: int  # in the *_labelIds.png files, and what the test server wants
    name: str
    train_id: int  # the network's class, 0 to 18; 255 (and -1) is void: not trained, not scored
    category: str
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
VOID, UNKNOWN = 255, 254  # train ids: of pixels without a class; of ids that are not in LABELS
NUM_CLASSES = 1 + max(label.train_id for label in LABELS if label.train_id != VOID)
CLASSES = [next((label for label in LABELS if label.train_id == i), None)
           for i in range(NUM_CLASSES)]
assert None not in CLASSES, "the train ids of LABELS must be 0, 1, 2, ... without gaps, and 255"

# Tables: label id -> train id, train id -> label id, train id -> color (void is black)
ID_TO_TRAIN_ID = torch.full((256,), UNKNOWN, dtype=torch.uint8)
for _label in LABELS:
    if _label.id >= 0:
        ID_TO_TRAIN_ID[_label.id] = _label.train_id
TRAIN_ID_TO_ID = np.array([label.id for label in CLASSES], np.uint8)
COLORS = np.zeros((256, 3), np.uint8)
COLORS[:NUM_CLASSES] = [label.color for label in CLASSES]


class DataError(Exception):
    """Something about the files is not as it must be. The text is a sentence for the user."""

    def __init__(self, message):
        # A DataLoader makes the exception of a worker anew, from the text of the worker's whole
        # traceback. Its last line has the sentence.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


# ------------------------------------------------------------------------------------------------
# The files


def find_split(root, split):
    """split/city/name -> [image path, label path], sorted; None where there is no such file.

    Images are root/leftImg8bit/split/CITY/NAME_leftImg8bit.png, labels root/gtFine/split/CITY/
    NAME_gtFine_labelIds.png (gtCoarse for the split "train_extra"). Cities may be missing, other
    files may lie about, upper and lower case don't matter (the key is in lower case). Raises
    DataError where root, leftImg8bit or gtFine is missing; a split without a folder has no files.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: give --data the folder that holds leftImg8bit "
                        "and gtFine")
    kind = "gtCoarse" if split == "train_extra" else "gtFine"
    files = {}
    for position, (folder, ending) in enumerate(
            (("leftImg8bit", "_leftImg8bit.png"), (kind, f"_{kind}_labelIds.png"))):
        top = subfolder(root, folder)
        paths = [Path(parent, name) for name_of_split in os.listdir(top)
                 if name_of_split.lower() == split
                 for parent, _, names in os.walk(top / name_of_split, followlinks=True)
                 for name in names]
        for path in paths:
            if path.name.lower().endswith(ending.lower()) and not path.name.startswith("."):
                key = str(path.relative_to(top)).lower()[: -len(ending)]
                files.setdefault(key, [None, None])[position] = path
    return dict(sorted(files.items()))


def subfolder(root, name):
    """The folder `name` in root, in any case. Raises DataError, which says where it is instead."""
    for path in root.iterdir():
        if path.name.lower() == name.lower() and path.is_dir():
            return path
    near = [folder for folder in [*root.resolve().parents[:2], *sorted(root.iterdir())]
            if os.path.isdir(folder / name)]
    if near:
        raise DataError(f"{root} has no folder {name}, but {near[0]} has: type --data {near[0]}")
    archive = {"leftImg8bit": "leftImg8bit_trainvaltest.zip", "gtFine": "gtFine_trainvaltest.zip",
               "gtCoarse": "gtCoarse.zip"}[name]
    raise DataError(f"{root} has no folder {name}: unpack {archive} there, or give --data another "
                    "folder")


def decode(path, modes):
    """The pixels of an image file as a uint8 array: (H, W, 3) for modes ("RGB",), else (H, W).

    An image is converted to RGB from any mode. Raises DataError, with the path, where the file
    cannot be decoded to the end, or is a label of more than one byte a pixel.
    """
    try:
        data = path.read_bytes()
        if data.startswith(b"\x89PNG") and b"IEND\xaeB`\x82" not in data:
            raise ValueError("it is cut short")  # Pillow might not notice
        picture = Image.open(BytesIO(data))
        if modes == ("RGB",) and picture.mode != "RGB":
            picture = picture.convert("RGB")
        pixels = np.array(picture)
    except Exception as error:  # Pillow raises almost anything, and never says which file it was
        raise DataError(f"cannot decode {path} ({error}): download or unpack it again") from error
    if picture.mode not in modes:
        raise DataError(f"{path} has mode {picture.mode}: labels are images of one byte a pixel")
    return pixels


def decode_pair(image_path, label_path):
    """Image (H, W, 3) and label ids (H, W) of two files, uint8; all ids are 0 without a label file.
    Raises DataError where one cannot be decoded or their sizes differ."""
    image = decode(image_path, ("RGB",))
    if label_path is None:
        return image, np.zeros(image.shape[:2], np.uint8)
    ids = decode(label_path, ("L", "P"))
    if ids.shape != image.shape[:2]:
        raise DataError(f"sizes differ: {image_path} has {image.shape[0]} x {image.shape[1]} "
                        f"pixels, its label {label_path} {ids.shape[0]} x {ids.shape[1]}")
    return image, ids


def to_train_ids(ids, path):
    """Train ids (uint8 tensor) of the label ids (uint8 array of any shape) in the file `path`; all
    void where that is None. Raises DataError where ids are not in LABELS."""
    ids = torch.from_numpy(ids)
    if path is None:
        return torch.full_like(ids, VOID)
    # What ID_TO_TRAIN_ID[ids] gives, three times as fast.
    train_ids = ID_TO_TRAIN_ID.index_select(0, ids.flatten().int()).view(ids.shape)
    unknown = train_ids == UNKNOWN
    if unknown.any():
        values = ", ".join(map(str, ids[unknown].unique().tolist()))
        raise DataError(f"{path} has label ids that are not in the table of labels ({values}): "
                        "expected ids as in *_labelIds.png, not train ids or colors")
    return train_ids


class Cityscapes(Dataset):
    """A split of Cityscapes: "train" (2975 images), "val" (500), "test" (1525, whose labels are
    withheld: all void here), or "train_extra" (19998, coarse labels).

    dataset[i] -> (image, label): uint8 tensors (3, H, W), RGB, and (H, W), train ids, 255 void.
    With `cache`, a folder, each pair of files is decoded once, into a file of 4 H W bytes there (in
    all 25 GB for train; those of files that have changed since stay, unused).
    Raises DataError for whatever is wrong with the files.
    """

    def __init__(self, root, split, cache=None):
        found = {name: paths for name, paths in find_split(root, split).items() if paths[0]}
        if not found:
            raise DataError(f"there are no images *_leftImg8bit.png in {root}/leftImg8bit/{split}")
        if split == "test":
            found = {name: [image, None] for name, (image, _) in found.items()}
        unlabelled = [name for name, (_, label) in found.items() if label is None]
        if unlabelled and split != "test":
            raise DataError(f"{len(unlabelled)} of the {len(found)} images of {split} have no "
                            f"label file; the first is {found[unlabelled[0]][0]}")
        self.files = list(found.values())
        self.cache = Path(cache) if cache else None
        if cache:
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"cannot make the cache folder {cache} ({error})") from error

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image, ids = self.read(i)
        return torch.from_numpy(image).permute(2, 0, 1), to_train_ids(ids, self.files[i][1])

    def read(self, i):
        """Image (H, W, 3) and label ids (H, W), uint8 arrays; from the cache they are mapped into
        memory, and only what is used of them is read from the disk."""
        if self.cache is None:
            return decode_pair(*self.files[i])
        # The name holds all that the content depends on: a changed PNG gets a file of its own.
        stats = [(path.resolve(), path.stat().st_mtime_ns, path.stat().st_size)
                 for path in self.files[i] if path]
        key = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
        path = self.cache / f"{self.files[i][0].stem}-{key}.npy"
        if not path.exists():
            write_cache(path, *decode_pair(*self.files[i]))
        try:
            rows = np.load(path, mmap_mode="c")  # (H, 4 W); writable in memory, which torch wants
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"cannot read the cache file {path} ({error}): remove it") from error
        width = rows.shape[1] // 4
        return rows[:, : 3 * width].reshape(-1, width, 3), rows[:, 3 * width:]


def write_cache(path, image, ids):
    """Write (H, 4 W) bytes to `path`: in each row the pixels of the image, then those of the label.

    A file under its final name is always whole, whoever else writes it at the same time.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, np.concatenate([image.reshape(len(image), -1), ids], axis=1))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write the cache file {path} ({error}): free space, or give "
                        "--cache another folder, or none") from error


# ------------------------------------------------------------------------------------------------
# Training samples

PADDING = (124, 116, 104)  # the mean color of ImageNet, which normalisation makes 0 (to 0.01)


def color_matrix(brightness=0.0, contrast=1.0, saturation=1.0, hue=0.0):
    """Photometric distortion as one 3x4 matrix M: new RGB = M[:, :3] @ old RGB + M[:, 3].

    brightness is added to all channels (grey levels), contrast multiplies them afterwards;
    saturation multiplies a color's distance from the grey of the same mean; hue turns it around
    the grey axis (degrees; red to yellow to green is positive).

    mmsegmentation does the four one after the other, the last two in HSV. Brightness and contrast
    are the same here, except for its rounding and clipping to 0..255 after each. Saturation and hue
    are other distortions of the same strength: HSV keeps the largest of R, G and B where this keeps
    their mean. On the photographs of CamVid saturation 1.5 moves a value by 3.0 grey levels on
    average, to places that are 2.9 apart in the two; for 0.5 it is 2.7 and 2.6, for hue 36 it is
    2.5 and 1.6. In the most saturated colors they are up to 86 (saturation) and 66 (hue) apart.
    """
    angle = math.radians(hue)
    grey = np.full((3, 3), 1 / 3)  # projects on the grey axis
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # 90 degrees around it
    turn = math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * across
    matrix = contrast * (grey + saturation * turn)
    return np.column_stack([matrix, np.full(3, contrast * brightness)])


def window_and_size(length, crop, scale):
    """How many of `length` pixels a crop of `crop` pixels covers at `scale`, and how many pixels
    of the crop they fill: all, or fewer where the scaled image is smaller than the crop."""
    window = round(crop / scale)
    return (window, crop) if window <= length else (length, round(length * scale))


class TrainingStream(Dataset):
    """stream[k] is the k-th sample of a training run, k = 0, 1, 2, ...: image (3, *crop_size), RGB,
    and label (*crop_size), train ids, both uint8.

    Everything random about it is a function of (seed, k) alone. So a run's data do not depend on
    how many workers or processes read them, and a run that is resumed at sample k reads none of
    those before. Samples 0 to N-1 are a permutation of the N images, N to 2N-1 another, and so on
    without an end: DataLoader(stream, sampler=range(first, last)) reads some.

    A sample, as in mmsegmentation 1.2.2 (RandomResize, RandomCrop, RandomFlip,
    PhotoMetricDistortion): scale uniform in 0.5 to 2; a crop in which no class has 75 % of the
    labelled pixels (after 10 tries the 11th is taken as it is); mirrored with probability 0.5;
    brightness +-32, contrast and saturation 0.5 to 1.5, hue +-36 degrees (18 of OpenCV's units),
    each with probability 0.5; missing pixels are PADDING, their labels void.
    """

    def __init__(self, dataset, crop_size=(512, 1024), seed=0):
        self.dataset, self.crop_size, self.seed = dataset, tuple(crop_size), seed

    def index(self, k):
        """Which image of the data set sample k shows: each epoch is a permutation of its own."""
        epoch, position = divmod(k, len(self.dataset))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.dataset))
        return order[position]

    def __getitem__(self, k):
        i = self.index(k)
        image, ids = self.dataset.read(i)  # (H, W, 3), (H, W)

        rng = np.random.default_rng([self.seed, 1, k])
        scale = rng.uniform(0.5, 2.0)
        mirrored = rng.random() < 0.5
        brightness, contrast, saturation, hue = (
            rng.uniform(low, high) if rng.random() < 0.5 else neutral
            for low, high, neutral in ((-32, 32, 0), (0.5, 1.5, 1), (0.5, 1.5, 1), (-36, 36, 0)))

        # Only what is under the crop is resized: a window of the photograph of about crop / scale.
        (height, width), (crop_height, crop_width) = ids.shape, self.crop_size
        window_height, new_height = window_and_size(height, crop_height, scale)
        window_width, new_width = window_and_size(width, crop_width, scale)
        for _ in range(11):
            top = rng.integers(height - window_height + 1)
            left = rng.integers(width - window_width + 1)
            rows = top + (np.arange(new_height) + 0.5) * window_height / new_height
            columns = left + (np.arange(new_width) + 0.5) * window_width / new_width
            new_ids = ids[rows.astype(int)][:, columns.astype(int)]  # the pixels under the centres
            pixels_of_id = torch.bincount(torch.from_numpy(new_ids).flatten(), minlength=256)
            pixels_of_class = torch.bincount(ID_TO_TRAIN_ID, weights=pixels_of_id)[:NUM_CLASSES]
            if pixels_of_class.max() < 0.75 * pixels_of_class.sum():  # all void is no good either
                break
        window = image[top: top + window_height, left: left + window_width]
        new_image = F.interpolate(torch.from_numpy(window).permute(2, 0, 1)[None],
                                  (new_height, new_width), mode="bilinear")[0]
        new_label = to_train_ids(new_ids, self.dataset.files[i][1])
        if mirrored:
            new_image, new_label = new_image.flip(2), new_label.flip(1)

        # In multiples of 1/4096 the products are exact in float32, and so is the sum, in whatever
        # order threads and processors add it up: this step gives the same bytes everywhere.
        matrix = np.round(color_matrix(brightness, contrast, saturation, hue) * 4096) / 4096
        matrix = torch.from_numpy(matrix).float()
        padded_image = torch.tensor(PADDING, dtype=torch.uint8)[:, None, None]
        padded_image = padded_image.repeat(1, *self.crop_size)
        padded_label = torch.full(self.crop_size, VOID, dtype=torch.uint8)
        padded_label[:new_height, :new_width] = new_label
        # Strips of 32 rows, because they stay in the processor's cache.
        colored_image = padded_image[:, :new_height, :new_width]
        for strip, old in zip(colored_image.split(32, dim=1), new_image.split(32, dim=1)):
            new = torch.addmm(matrix[:, 3:] + 0.5, matrix[:, :3], old.flatten(1).float())
            strip.copy_(new.clamp_(0, 255).view(old.shape))  # rounds down, hence + 0.5
        return padded_image, padded_label


# ------------------------------------------------------------------------------------------------
# Pictures


def photograph(image):
    """RGB (3, H, W), uint8 tensor -> a picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def colored(label):
    """Train ids (H, W), uint8 -> a picture in the official colors; void is black."""
    return Image.fromarray(COLORS[label])


def overlaid(image, label):
    """RGB (3, H, W) and train ids (H, W), uint8 tensors -> a picture of the photograph with the
    colors of the labels over it, half and half; void leaves the photograph as it is."""
    mask = Image.fromarray(np.where(label == VOID, 0, 128).astype(np.uint8))
    return Image.composite(colored(label), photograph(image), mask)


def save_sheet(path, rows, width=480):
    """Save rows of pictures, each scaled to `width` pixels, above a legend of the classes."""
    rows = [[picture.resize((width, round(width * picture.height / picture.width)))
             for picture in row] for row in rows]
    # The entries of the legend have 120 x 24 pixels.
    columns = max(len(row) for row in rows)
    line, per_line = 24, columns * width // 120
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (columns * width, sum(heights) + line * -(-NUM_CLASSES // per_line)))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(picture, (j * width, sum(heights[:i])))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, label in enumerate(CLASSES):
        x, y = 120 * (i % per_line), sum(heights) + line * (i // per_line)
        draw.rectangle((x + 4, y + 4, x + 20, y + 20), fill=label.color)
        draw.text((x + 25, y + 4), label.name, fill="white", font=font)
    sheet.save(path)


# ------------------------------------------------------------------------------------------------
# python cityscapes.py


def examine(job):
    """What is wrong with a pair of files (a sentence or None), and its pixels by train id: a numpy
    array (256,), since each tensor that comes from another process keeps a file open."""
    image_path, label_path, with_image = job
    try:
        if with_image:
            _, ids = decode_pair(image_path, label_path)
        else:
            ids = decode(label_path, ("L", "P"))
        return None, np.bincount(to_train_ids(ids, label_path).numpy().ravel(), minlength=256)
    except DataError as error:
        return str(error), np.zeros(256, int)


def survey(root, check):
    """Print the images of each split and the share of each class; with `check`, decode the images
    as well. Returns what is wrong: a sentence per file."""
    problems, shares = [], {}
    for split in ("train", "val", "test", "train_extra"):
        if split == "train_extra" and not (Path(root, "gtCoarse").is_dir()
                                           and Path(root, "leftImg8bit", split).is_dir()):
            continue  # few have it
        found = find_split(root, split).values()
        jobs = [(image, None if split == "test" else label, check) for image, label in found
                if image and (check if split == "test" else label)]
        if split != "test":
            problems += [f"{image or label} has no {'label' if image else 'image'} beside it"
                         for image, label in found if not (image and label)]
        with ProcessPoolExecutor() as pool:
            results = list(tqdm(pool.map(examine, jobs, chunksize=4), f"decoding {split}",
                                len(jobs), unit=" files", leave=False, disable=None))
        problems += [problem for problem, _ in results if problem]
        pixels = sum((pixels for _, pixels in results), np.zeros(256, int))
        print(f"{split}: {sum(image is not None for image, _ in found)} images")
        if pixels[:NUM_CLASSES].any():
            shares[split] = 100 * pixels[:NUM_CLASSES] / pixels[:NUM_CLASSES].sum()
    print("\n% of labelled pixels  " + "".join(f"{split:>12}" for split in shares))
    for label in CLASSES:
        print(f"{label.name:22}" + "".join(f"{s[label.train_id]:12.2f}" for s in shares.values()))
    return problems


def measure(root, crop_size, samples=24):
    """Print milliseconds, on one core, to decode, to make a sample, and to make one cached."""
    torch.set_num_threads(1)
    seconds = []  # of decoding, of a sample, of a cached sample
    with tempfile.TemporaryDirectory() as cache:
        plain, cached = (TrainingStream(Cityscapes(root, "train", folder), crop_size)
                         for folder in (None, cache))
        for k in range(min(samples, len(plain.dataset))):
            files = plain.dataset.files[plain.index(k)]
            cached[k]  # decodes, writes the cache, and reads the PNGs into the system's memory
            moments = [time.perf_counter()]
            for work in (lambda: decode_pair(*files), lambda: plain[k], lambda: cached[k]):
                work()
                moments.append(time.perf_counter())
            seconds.append(np.diff(moments))
    print(f"\none core, crop {crop_size[0]}x{crop_size[1]}, medians:")
    decoding, sample, from_cache = 1000 * np.median(seconds, axis=0)
    print(f"decoding the two files alone {decoding:6.1f} ms\n"
          f"a training sample            {sample:6.1f} ms, {1000 / sample:.0f} a second, "
          f"{sample / decoding:.2f} times decoding\n"
          f"with a warm cache            {from_cache:6.1f} ms, {1000 / from_cache:.0f} a second, "
          f"{sample / from_cache:.1f} times as fast")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cityscapes", metavar="DIR",
                        help="folder with leftImg8bit and gtFine (data/cityscapes)")
    parser.add_argument("--check", action="store_true",
                        help="decode the images as well, not only the labels")
    parser.add_argument("--crop", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"),
                        help="size of the training samples in pixels (512 1024)")
    parser.add_argument("--sheet", default="samples.png", metavar="FILE",
                        help="where to draw training samples (samples.png)")
    args = parser.parse_args()

    if min(args.crop) < 1 or not Path(args.sheet).resolve().parent.is_dir():
        raise DataError("--crop takes positive numbers, --sheet a file in a folder that exists")
    problems = survey(args.data, args.check)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problems")
        sys.exit(1)
    stream = TrainingStream(Cityscapes(args.data, "train"), args.crop)
    save_sheet(args.sheet, [[overlaid(*stream[3 * row + column]) for column in range(3)]
                            for row in range(4)])
    print(f"\ndrew 12 training samples: {args.sheet}")
    measure(args.data, args.crop)


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"cityscapes.py: {error}", file=sys.stderr)
        sys.exit(2)
