"""The labels against the official table, the files in every disorder, and the training stream
against its definition."""
import csv
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TESTS
from PIL import Image
from torch.utils.data import DataLoader
from toy_cityscapes import draw_cityscapes

import cityscapes
from cityscapes import (CLASSES, PADDING, TRAIN_IDS, VOID, Cityscapes, DataError, SceneClass,
                        TrainingStream, color_matrix, read_image, read_label)

IDS = np.array([entry.id for entry in CLASSES])  # train id -> label id


def write_pair(root, image, ids, name="aachen/aachen_000000_000019"):
    """One image (H, W, 3) with its label ids (H, W), in the layout of Cityscapes."""
    for kind, ending, pixels in (("leftImg8bit", "leftImg8bit", image),
                                 ("gtFine", "gtFine_labelIds", ids)):
        path = Path(root, kind, "train", f"{name}_{ending}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return Path(root)


def ks_distance(values, low, high):
    """Kolmogorov-Smirnov distance of the values from the uniform distribution, times sqrt(n); over
    1.95 once in a thousand."""
    values, n = (np.sort(values) - low) / (high - low), len(values)
    above, below = np.arange(1, n + 1) / n - values, values - np.arange(n) / n
    return max(above.max(), below.max()) * math.sqrt(n)


class OneImage(list):
    """A data set of one's own: one image, with any classes."""

    def __init__(self, picture, label, classes=CLASSES):
        super().__init__([(picture, label)])
        self.classes = classes


def equal(sample, other):
    return torch.equal(sample[0], other[0]) and torch.equal(sample[1], other[1])


@pytest.fixture(scope="module")
def stream(toy):
    return TrainingStream(Cityscapes(toy, "train"), (48, 80), seed=3)


# Classes ----------------------------------------------------------------------------------------


def test_classes_equal_the_official_table():
    with open(TESTS / "cityscapes_labels.csv") as file:
        rows = list(csv.DictReader(file))
    trained = sorted((row for row in rows if 0 <= int(row["trainId"]) < 255),
                     key=lambda row: int(row["trainId"]))
    assert [tuple(entry) for entry in CLASSES] == [
        (int(row["id"]), row["name"], row["category"],
         (int(row["red"]), int(row["green"]), int(row["blue"]))) for row in trained]
    assert TRAIN_IDS == {int(row["id"]): int(row["trainId"]) for row in rows if row["id"] != "-1"}


def test_all_34_ids_are_read_and_others_are_an_error_that_names_file_and_values(tmp_path):
    path, ids = tmp_path / "a.png", np.arange(34, dtype=np.uint8).reshape(2, 17)
    Image.fromarray(ids).save(path)
    assert np.array(read_label(path)).flatten().tolist() == [TRAIN_IDS[i] for i in range(34)]
    ids[0, 3], ids[1, 5] = 34, 255
    Image.fromarray(ids).save(path)
    with pytest.raises(DataError, match=r"a.png .* 34, 255\]"):
        read_label(path)


# One reader of image files ----------------------------------------------------------------------


def test_images_of_8_bits_are_read_as_rgb_and_of_more_refused(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        picture = Image.fromarray(rgb).convert(mode)
        picture.save(tmp_path / "a.png")
        assert np.array_equal(read_image(tmp_path / "a.png"), picture.convert("RGB")), mode
    for dtype in (np.uint16, np.int32, np.float32):
        Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tif")
        with pytest.raises(DataError, match="a.tif .*8 bits"):
            read_image(tmp_path / "a.tif")


def exif(*entries):
    """An EXIF block of (tag, type, count, value) entries, well formed or not."""
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
                    for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


def test_photographs_are_upright_even_where_other_metadata_are_broken(tmp_path):
    upright = np.add.outer(np.arange(0, 200, 5), np.arange(0, 48, 2)).astype(np.uint8)
    path, entry = tmp_path / "a.jpg", (0x112, 3, 1, b"\6\0")  # orientation 6: turn it clockwise
    for others in ([], [(0x11A, 2, 4, b"72 \0")], [(0x8825, 4, 1, b"\xff\xff\0\0")]):
        Image.fromarray(np.rot90(upright)).save(path, exif=exif(entry, *others), quality=95)
        red = np.array(read_image(path))[:, :, 0]
        assert red.shape == (40, 24) and np.abs(red.astype(int) - upright).max() < 8, others
    for garbage in (b"Exif\0\0" + bytes(range(40)), b"Exif\0\0II*\0\x08"):
        Image.fromarray(upright).save(path, exif=garbage)
        assert read_image(path).size == (24, 40)


def test_damaged_files_are_read_right_or_named(tmp_path):
    """Cut anywhere, a bit flipped anywhere, bytes lost or put in: never other pixels in silence."""
    rng = np.random.default_rng(0)
    root = draw_cityscapes(tmp_path, {"train": 1}, (32, 64))
    for read, kind in ((read_image, "leftImg8bit"), (read_label, "gtFine")):
        (path,) = root.glob(f"{kind}/*/*/*.png")
        whole, expected = path.read_bytes(), np.array(read(path))
        contents = [b"", b"404: not found"]
        for i in rng.integers(1, len(whole), 100):
            flipped = whole[i] ^ 1 << rng.integers(8)
            contents += [whole[:i], whole[:i] + bytes([flipped]) + whole[i + 1:],
                         whole[:i] + whole[i + 3:], whole[:i] + b"\0\1" + whole[i:]]
        named = 0
        for content in contents:
            path.write_bytes(content)
            try:
                assert np.array_equal(read(path), expected)
            except DataError as error:
                assert str(path) in str(error)
                named += 1
        assert named > 350


def test_labels_are_one_grey_channel_of_8_bits(tmp_path):
    path, ids = tmp_path / "a.png", np.array([[7, 8, 11, 12]] * 4, np.uint8)
    Image.fromarray(ids).save(path)
    assert np.array(read_label(path)).tolist() == [[0, 1, 2, 3]] * 4
    palette = Image.fromarray(ids // 6)  # places in a palette that holds the ids
    palette.putpalette([0, 0, 0, 7, 7, 7, 11, 11, 11])
    for wrong in (palette, Image.fromarray(ids.repeat(3, axis=1).reshape(4, 4, 3)),
                  Image.fromarray(ids.astype(np.uint16)), Image.fromarray(ids > 9)):
        wrong.save(path)
        with pytest.raises(DataError, match=f"its mode is {wrong.mode[0]}"):
            read_label(path)


# The data set -----------------------------------------------------------------------------------


def test_files_are_found_among_others_and_behind_links(tmp_path):
    root = draw_cityscapes(tmp_path / "a", {"train": 20}, (16, 32))
    names = Cityscapes(root, "train").names
    train = root / "leftImg8bit/train"
    for junk in (".DS_Store", "notes.txt", "toytown0/._toytown0_000000_000019_leftImg8bit.png",
                 "toytown0/readme.txt", ".hidden/x_leftImg8bit.png"):
        (train / junk).parent.mkdir(exist_ok=True)
        (train / junk).write_text("no image")
    (train / "toytown1").rename(tmp_path / "elsewhere")
    (train / "toytown1").symlink_to(tmp_path / "elsewhere")
    (train / "circle").symlink_to(train)
    dataset = Cityscapes(root, "train")
    assert dataset.names == names and len(names) == 20
    for i, (picture, label) in enumerate(dataset):
        image_path, label_path = dataset.paths(i)
        assert f"{image_path}" == f"{root}/leftImg8bit/train/{dataset.name(i)}_leftImg8bit.png"
        assert f"{label_path}" == f"{root}/gtFine/train/{dataset.name(i)}_gtFine_labelIds.png"
        assert np.array_equal(picture, Image.open(image_path))
        label = np.array(label)
        assert np.array_equal(IDS[label[label != VOID]],
                              np.array(Image.open(label_path))[label != VOID])


def test_images_of_one_name_in_two_cities_are_two_images(tmp_path):
    for name, id_ in (("aachen/0_0", 7), ("zurich/0_0", 8)):
        write_pair(tmp_path, np.zeros((2, 4, 3)), np.full((2, 4), id_), name)
    dataset = Cityscapes(tmp_path, "train")
    assert [np.unique(label).tolist() for _, label in dataset] == [[0], [1]]
    assert dataset.names == ["aachen/0_0", "zurich/0_0"]


def test_an_image_without_a_label_and_a_label_without_an_image_are_named(tmp_path):
    for kind in ("leftImg8bit", "gtFine"):  # .PNG and cities behind dead links are such cases
        root = draw_cityscapes(tmp_path / kind, {"train": 9}, (16, 32))
        shutil.rmtree(root / kind / "train/toytown1")
        (root / kind / "train/toytown1").symlink_to("/nowhere/toytown1")
        with pytest.raises(DataError, match="^1 names of train .*toytown1/toytown1_000008_000019$"):
            Cityscapes(root, "train")


def test_test_labels_are_void_and_coarse_labels_are_read(tmp_path):
    root = draw_cityscapes(tmp_path, {"test": 2, "train_extra": 3}, (16, 32))
    assert all((np.array(label) == VOID).all() for _, label in Cityscapes(root, "test"))
    coarse = Cityscapes(root, "train_extra")
    assert len(coarse) == 3 and all((np.array(label) != VOID).any() for _, label in coarse)


def test_a_wrong_folder_crop_or_sheet_is_a_sentence(tmp_path, toy, mistake):
    for folder in (tmp_path / "nowhere", toy.parent, toy / "leftImg8bit", tmp_path):
        mistake(f"cityscapes.py --data {folder}", f"no images {folder}/leftImg8bit/train/",
                "--data must be the folder")
    mistake(f"cityscapes.py --data {toy} --crop 0 3", "--crop")
    (tmp_path / "dir.png").mkdir()
    for sheet in ("dir.png", "none/samples.png"):
        mistake(f"cityscapes.py --data {toy} --crop 32 64 --sheet {tmp_path}/{sheet}", sheet)


# The stream: a pure function of (seed, k) ---------------------------------------------------------


@pytest.mark.usefixtures("all_cores")
def test_samples_do_not_depend_on_workers_threads_or_what_was_read_before(stream):
    loader = DataLoader(stream, batch_size=None, sampler=range(5, 21), num_workers=2, timeout=60)
    samples = list(enumerate(loader, 5))  # in one thread per worker; here in one per core
    assert all(equal(sample, stream[k]) for k, sample in reversed(samples))


def test_seeds_and_samples_differ_even_of_the_same_image(stream):
    dataset = stream.dataset
    first, other = (TrainingStream(OneImage(*dataset[0]), (48, 80), seed) for seed in (3, 4))
    assert not equal(first[0], first[1]) and not equal(first[0], other[0])


def test_every_epoch_is_another_permutation_of_all_images(stream):
    n = len(stream.dataset)
    epochs = [[stream.index(k) for k in range(e * n, (e + 1) * n)] for e in range(20)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20


# The stream: geometry -----------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_label_are_aligned_to_the_pixel_under_every_augmentation(tmp_path, axis):
    """Light where the label is road, dark where it is sky, in stripes of random width: after any
    scale, crop, flip and color a pixel must be nearer to the light grey exactly where its label is
    road. (No color is ever clipped.)"""
    rng = np.random.default_rng(0)
    stripes = np.repeat(rng.integers(0, 2, 200), rng.integers(1, 6, 200))[:150]
    mask = np.broadcast_to(stripes[:, None] if axis == 0 else stripes, (150, 150)).astype(bool)
    image = np.where(mask, 110, 70)[..., None].repeat(3, axis=2)
    root = write_pair(tmp_path, image, np.where(mask, 7, 23))
    stream = TrainingStream(Cityscapes(root, "train"), (96, 96))
    compared = 0
    for k in range(150):
        image, label = stream[k]
        image, label = image.float().mean(dim=0)[label != VOID], label[label != VOID]
        middle = (image.max() + image.min()) / 2
        clear = (image - middle).abs() > 3  # grey levels, of 20 at the least: the rest is rounding
        assert torch.equal(image[clear] > middle, label[clear] == 0), k
        compared += clear.sum().item()
    assert compared > 0.8 * 150 * 96 * 96


def test_a_crop_is_the_bilinear_interpolation_of_a_box_drawn_by_the_recipe(tmp_path, monkeypatch):
    """One image of 200x240 whose red is x and whose green is y, of many small classes, without
    color changes, against the textbook formula: output i shows the box at (i + 1/2) box / crop,
    where a pixel's center has its index and a half, and the label of the pixel beneath."""
    monkeypatch.setattr(cityscapes, "color_matrix", lambda **_: color_matrix())
    y, x = np.mgrid[:200, :240]
    ids = IDS[(y // 10 + 3 * (x // 10)) % len(IDS)]
    root = write_pair(tmp_path, np.stack([x, y, 0 * x], axis=2), ids)
    stream = TrainingStream(Cityscapes(root, "train"), (48, 64))
    tops, lefts, flips = [], [], 0
    for k in range(600):
        image, label = stream[k]
        draw = np.random.default_rng([0, 1, k])  # the stream's first three draws
        scale, left, top = draw.uniform(0.5, 2.0), draw.random(), draw.random()
        height, width = 48 / scale, 64 / scale  # of the box
        left, top = left * (240 - width), top * (200 - height)
        if image[0, 0, 0] > image[0, 0, -1]:
            image, label, flips = image.flip(2), label.flip(1), flips + 1
        rows = top + (np.arange(48) + 0.5) * height / 48
        columns = left + (np.arange(64) + 0.5) * width / 64
        # Pillow truncates: what is shown is up to 1 less.
        error = (columns - 0.5).clip(0, 239) - image[0].numpy()
        assert error.min() > -0.01 and error.max() < 1.01, k
        error = (rows - 0.5).clip(0, 199)[:, None] - image[1].numpy()
        assert error.min() > -0.01 and error.max() < 1.01, k
        beneath = ids[rows.astype(int)][:, columns.astype(int)]
        assert np.array_equal(IDS[label], beneath)
        tops.append(top / (200 - height))
        lefts.append(left / (240 - width))
    assert ks_distance(tops, 0, 1) < 1.95 and ks_distance(lefts, 0, 1) < 1.95
    assert abs(flips / 600 - 0.5) < 3.3 * 0.5 / math.sqrt(600)


@pytest.mark.parametrize("size", [(20, 30), (300, 31), (2, 400), (1, 1), (101, 99)])
def test_images_of_any_size_and_labels_only_take_values_that_were_there(tmp_path, size):
    rng = np.random.default_rng(0)
    root = write_pair(tmp_path, rng.integers(0, 256, (*size, 3)), rng.choice([7, 23, 33, 0], size))
    stream = TrainingStream(Cityscapes(root, "train"), (64, 96))
    for k in range(30):
        image, label = stream[k]
        assert image.shape == (3, 64, 96) and label.shape == (64, 96)
        assert image.dtype == label.dtype == torch.uint8
        assert set(label.unique().tolist()) <= {0, 10, 18, VOID}


def test_an_image_smaller_than_the_crop_is_padded_with_the_mean_color_and_void(tmp_path):
    root = write_pair(tmp_path, np.full((30, 40, 3), 250), np.tile([7, 23], (30, 20)))
    stream = TrainingStream(Cityscapes(root, "train"), (100, 120))
    for k in range(30):
        image, label = stream[k]
        rows, columns = (label != VOID).nonzero().max(dim=0).values + 1
        assert 15 <= rows <= 60 and 20 <= columns <= 80 and abs(columns / rows - 4 / 3) < 0.1
        assert (label[:rows, :columns] != VOID).all()
        assert (label != VOID).sum() == rows * columns
        padding = image[:, label == VOID]  # not distorted, as the image is
        assert (padding == torch.tensor(PADDING)[:, None]).all()


def test_no_class_has_three_quarters_of_the_labelled_pixels_unless_eleven_tries_failed(tmp_path):
    """The number of crops over the limit is what eleven independent tries leave, counted by drawing
    windows here."""
    rng = np.random.default_rng(0)
    blocks = rng.choice([7, 23, 0], (4, 8), p=[0.75, 0.15, 0.1])  # road, sky, uncounted void
    ids = np.repeat(np.repeat(blocks, 32, axis=0), 32, axis=1)

    def over(road, sky):
        return max(road, sky) >= 0.75 * (road + sky)

    def chance(scale):  # that eleven boxes in a row are over the limit
        size = np.array([32, 48]) / scale
        corners = rng.uniform((0, 0), np.array([128, 256]) - size, (100, 2))
        ends = corners + size
        windows = [ids[round(t): round(b), round(l): round(r)]
                   for (t, l), (b, r) in zip(corners, ends)]
        return np.mean([over((part == 7).sum(), (part == 23).sum()) for part in windows]) ** 11

    chances = np.repeat([chance(scale) for scale in np.linspace(0.5, 2, 100)], 3)
    root = write_pair(tmp_path, np.zeros((128, 256, 3)), ids)
    stream = TrainingStream(Cityscapes(root, "train"), (32, 48))
    labels = [stream[k][1] for k in range(300)]
    count = sum(over((label == 0).sum(), (label == 10).sum()).item() for label in labels)
    assert 5 < chances.sum() < 100, chances.sum()
    spread = np.sqrt((chances * (1 - chances)).sum())
    assert abs(count - chances.sum()) < 4 * spread + 0.1 * chances.sum()


# The stream: colors -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("brightness", 20.0, lambda rgb, grey: rgb + 20),
    ("contrast", 1.3, lambda rgb, grey: 1.3 * rgb),
    ("saturation", 0.6, lambda rgb, grey: grey + 0.6 * (rgb - grey)),
    ("hue", 60.0, lambda rgb, grey: 2 * grey - rgb[:, [1, 2, 0]]),  # red becomes yellow
    ("hue", 120.0, lambda rgb, grey: rgb[:, [2, 0, 1]])])  # red becomes green becomes blue
def test_each_distortion_by_itself(name, value, expected):
    rgb = np.random.default_rng(0).uniform(0, 255, (100, 3))
    matrix = color_matrix(**{name: value})
    actual = rgb @ matrix[:, :3].T + matrix[:, 3]
    assert np.abs(actual - expected(rgb, rgb.mean(axis=1, keepdims=True))).max() < 1e-10


def test_all_four_together_are_brightness_then_contrast_then_saturation_and_hue():
    parts = [np.vstack([color_matrix(**part), [0, 0, 0, 1]]) for part in (
        {"hue": 25}, {"saturation": 0.7}, {"contrast": 1.2}, {"brightness": 10})]
    expected = np.linalg.multi_dot(parts)[:3]
    assert np.abs(color_matrix(10, 1.2, 0.7, 25) - expected).max() < 1e-10


def test_colors_have_the_probabilities_and_ranges_of_the_recipe_rounded_and_clipped(
        tmp_path, monkeypatch):
    rng, drawn = np.random.default_rng(0), []
    monkeypatch.setattr(cityscapes, "color_matrix",
                        lambda **values: drawn.append(values) or color_matrix(**values))
    colors = rng.integers(0, 256, (4, 3))
    image = np.repeat(np.repeat(colors.reshape(2, 2, 3), 32, axis=0), 32, axis=1)
    root = write_pair(tmp_path, image, np.tile([7, 23], (64, 32)))
    stream = TrainingStream(Cityscapes(root, "train"), (64, 64))
    for k in range(600):
        sample, label = stream[k]
        matrix = color_matrix(**drawn[-1])
        expected = (colors @ matrix[:, :3].T + matrix[:, 3]).clip(0, 255)
        pixels = sample[:, label != VOID].T.numpy()
        nearest = np.abs(pixels[:, None].astype(float) - expected).max(axis=2).min(axis=1)
        assert (nearest <= 1.1).mean() > 0.6, k  # all but the pixels on the border of two patches
    recipe = {"brightness": (-32, 32, 0), "contrast": (0.5, 1.5, 1), "saturation": (0.5, 1.5, 1),
              "hue": (-36, 36, 0)}
    for name, (low, high, neutral) in recipe.items():
        values = np.array([values[name] for values in drawn])
        changed = values[values != neutral]
        assert abs(len(changed) / 600 - 0.5) < 3.3 * 0.5 / math.sqrt(600)
        assert ks_distance(changed, low, high) < 1.95


def test_own_labels_with_other_values_are_an_error_and_palettes_are_allowed():
    classes = [SceneClass(i, f"class {i}", "object", (i, i, i)) for i in range(3)]
    picture, label = Image.new("RGB", (60, 40)), np.zeros((40, 60), np.uint8)
    label[20:], label[:5], label[:, 25:35] = 1, 2, 255
    palette = Image.fromarray(label)
    palette.putpalette(list(range(256)) * 3)  # mode P, as torchvision's VOC gives them
    assert palette.mode == "P"
    _, sample = TrainingStream(OneImage(picture, palette, classes), (40, 40))[0]
    assert set(sample.unique().tolist()) <= {0, 1, 2, 255}
    label[label == 2] = 3
    stream = TrainingStream(OneImage(picture, Image.fromarray(label), classes), (100, 100))
    with pytest.raises(DataError, match="neither one of the 3 classes nor 255"):
        stream[0]


# python cityscapes.py ---------------------------------------------------------------------------


def test_check_counts_and_draws_clean_data(toy, tmp_path, run_here):
    process = run_here(f"cityscapes.py --data {toy} --check --crop 48 80 "
                       f"--sheet {tmp_path}/sheet.png")
    for words in ("train: 8 images", "val: 5 images", "test: 2 images"):
        assert words in process.stdout
    assert Image.open(tmp_path / "sheet.png").width == 4 * 480


def test_check_lists_everything_that_is_wrong(tmp_path, run_here):
    root = draw_cityscapes(tmp_path, {"train": 9, "val": 6, "test": 1}, (32, 64))
    images, labels = (sorted((root / kind).glob("*/*/*.png")) for kind in ("leftImg8bit", "gtFine"))
    images[0].write_bytes(b"no image")  # the test split comes first, then train and val
    images[1].write_bytes(images[1].read_bytes()[:-100])
    Image.new("L", (64, 30)).save(labels[3])
    Image.new("L", (64, 32), 40).save(labels[4])
    for label in labels[12:]:
        label.unlink()
    process = run_here(f"cityscapes.py --data {root} --check", codes=(1,))
    assert "the 5 problems above must be mended" in process.stderr
    problems = process.stderr.splitlines()
    for path, words in ((images[0], "decode"), (images[1], "decode"), (labels[3], "(64, 30)"),
                        (labels[4], "[40]"), ("val", "4 names of val")):
        assert any(str(path) in problem and words in problem for problem in problems), path
