"""The labels against the official table, the files in every disorder, and the training stream
against its definition."""
import csv
import math
import os
import struct
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TESTS
from PIL import Image
from torch.utils.data import DataLoader
from toy_cityscapes import draw_cityscapes

import cityscapes
from cityscapes import (CLASSES, LABELS, TRAIN_IDS, VOID, Cityscapes, DataError, TrainingStream,
                        color_matrix, read_image, read_label)

IDS = np.array([label.id for label in CLASSES])  # train id -> label id


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


def equal(sample, other):
    return torch.equal(sample[0], other[0]) and torch.equal(sample[1], other[1])


@pytest.fixture(scope="module")
def stream(toy):
    return TrainingStream(Cityscapes(toy, "train"), (48, 80), seed=3)


# Labels -------------------------------------------------------------------------------------------


def test_labels_equal_the_official_table():
    with open(TESTS / "cityscapes_labels.csv") as file:
        official = [(int(row["id"]), row["name"], int(row["trainId"]), row["category"],
                     (int(row["red"]), int(row["green"]), int(row["blue"])))
                    for row in csv.DictReader(file)]
    assert [tuple(label) for label in LABELS] == official
    assert CLASSES == [label for i in range(19) for label in LABELS if label.train_id == i]
    assert TRAIN_IDS == {row[0]: 255 if row[2] == -1 else row[2] for row in official}


def test_all_34_ids_are_read_and_others_are_an_error_that_names_file_and_values(tmp_path):
    path, ids = tmp_path / "a.png", np.arange(34, dtype=np.uint8).reshape(2, 17)
    Image.fromarray(ids).save(path)
    expected = torch.tensor([label.train_id for label in LABELS[:-1]], dtype=torch.uint8)
    assert torch.equal(read_label(path), expected.view(2, 17))
    ids[0, 3], ids[1, 5] = 34, 255
    Image.fromarray(ids).save(path)
    with pytest.raises(DataError, match=r"a.png .*\(34, 255\)"):
        read_label(path)


# One reader of image files ------------------------------------------------------------------------


def test_images_of_8_and_16_bits_are_read_as_rgb_and_of_32_refused(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    grey = Image.fromarray(rgb).convert("L")
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        picture = Image.fromarray(rgb).convert(mode)
        picture.save(tmp_path / "a.png")
        expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(read_image(tmp_path / "a.png"), expected), mode
    deep = np.array(grey).astype(np.uint16) * 256 + 77  # the low bytes don't matter
    for ending in ("png", "tif"):
        Image.fromarray(deep).save(tmp_path / f"a.{ending}")
        expected = torch.from_numpy(np.array(grey)).expand(3, -1, -1)
        assert torch.equal(read_image(tmp_path / f"a.{ending}"), expected), ending
    for dtype in (np.int32, np.float32):  # of 32 bits: no fixed range
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
        image = read_image(path)
        difference = (image[0].int() - torch.from_numpy(upright).int()).abs().max()
        assert image.shape == (3, 40, 24) and difference < 8, others
    for garbage in (b"Exif\0\0" + bytes(range(40)), b"Exif\0\0II*\0\x08"):
        Image.fromarray(upright).save(path, exif=garbage)
        assert read_image(path).shape == (3, 40, 24)


def test_damaged_files_are_read_right_or_named(tmp_path):
    """Cut anywhere, a bit flipped anywhere, bytes lost or put in: never other pixels in silence."""
    rng = np.random.default_rng(0)
    root = draw_cityscapes(tmp_path, {"train": 1}, (32, 64))
    for read, kind in ((read_image, "leftImg8bit"), (read_label, "gtFine")):
        (path,) = root.glob(f"{kind}/*/*/*.png")
        whole, expected = path.read_bytes(), read(path)
        contents = [b"", b"404: not found"]
        for i in rng.integers(1, len(whole), 100):
            flipped = whole[i] ^ 1 << rng.integers(8)
            contents += [whole[:i], whole[:i] + bytes([flipped]) + whole[i + 1:],
                         whole[:i] + whole[i + 3:], whole[:i] + b"\0\1" + whole[i:]]
        named = 0
        for content in contents:
            path.write_bytes(content)
            try:
                assert torch.equal(read(path), expected)
            except DataError as error:
                assert str(path) in str(error)
                named += 1
        assert named > 350


def test_labels_are_one_channel_of_8_bits(tmp_path):
    path, ids = tmp_path / "a.png", np.array([[7, 8, 11, 12]] * 4, np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette(list(range(256)) * 3)
    for picture in (Image.fromarray(ids), palette):  # palettes of few colors have few bits
        picture.save(path)
        assert read_label(path).tolist() == [[0, 1, 2, 3]] * 4
    for wrong in (Image.fromarray(ids.repeat(3, axis=1).reshape(4, 4, 3)),
                  Image.fromarray(ids.astype(np.uint16)), Image.fromarray(ids > 9)):
        wrong.save(path)
        with pytest.raises(DataError, match="one channel of 8 bits"):
            read_label(path)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(
            ">I", zlib.crc32(kind + body))

    for bits in (1, 2, 4):  # grey PNGs, which Pillow scales to 0..255
        header = struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                         + chunk(b"IDAT", zlib.compress(bytes(1 + bits))) + chunk(b"IEND", b""))
        with pytest.raises(DataError, match="one channel of 8 bits"):
            read_label(path)


# The data set -------------------------------------------------------------------------------------


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
    for i, (image, label) in enumerate(dataset):
        image_path, label_path = dataset.paths(i)
        assert f"{image_path}" == f"{root}/leftImg8bit/train/{dataset.name(i)}_leftImg8bit.png"
        assert f"{label_path}" == f"{root}/gtFine/train/{dataset.name(i)}_gtFine_labelIds.png"
        assert np.array_equal(image.permute(1, 2, 0), np.array(Image.open(image_path)))
        labelled = label != VOID
        assert np.array_equal(IDS[label[labelled]], np.array(Image.open(label_path))[labelled])


def test_images_of_one_name_in_two_cities_are_two_images(tmp_path):
    for name, id_ in (("aachen/0_0", 7), ("zurich/0_0", 8)):
        write_pair(tmp_path, np.zeros((2, 4, 3)), np.full((2, 4), id_), name)
    dataset = Cityscapes(tmp_path, "train")
    assert [label.unique().tolist() for _, label in dataset] == [[0], [1]]
    assert dataset.names == ["aachen/0_0", "zurich/0_0"]


def test_test_labels_are_void_and_coarse_labels_are_read(tmp_path):
    root = draw_cityscapes(tmp_path, {"test": 2, "train_extra": 3}, (16, 32))
    assert all((label == VOID).all() for _, label in Cityscapes(root, "test"))
    coarse = Cityscapes(root, "train_extra")
    assert len(coarse) == 3 and all((label != VOID).any() for _, label in coarse)


def test_a_wrong_folder_crop_or_sheet_is_a_sentence(tmp_path, toy, mistake):
    for folder in (tmp_path / "nowhere", toy.parent, toy / "leftImg8bit", tmp_path):
        mistake(f"cityscapes.py --data {folder}", f"no images {folder}/leftImg8bit/train/",
                "--data must be the folder")
    mistake(f"cityscapes.py --data {toy} --crop 0 3", "--crop")
    (tmp_path / "dir.png").mkdir()
    for sheet in ("dir.png", "none/samples.png"):
        mistake(f"cityscapes.py --data {toy} --crop 32 64 --sheet {tmp_path}/{sheet}", sheet)


def test_a_folder_that_may_not_be_read_is_named(toy, monkeypatch, mistake):
    def listdir(path):
        if str(path).endswith("toytown0"):  # chmod would not keep root out
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    listed = os.listdir
    monkeypatch.setattr("os.listdir", listdir)
    mistake(f"cityscapes.py --data {toy}", "toytown0", "Permission denied")


# The cache ----------------------------------------------------------------------------------------


def test_the_cache_changes_nothing_and_is_read_instead_of_the_files(
        stream, tmp_path, monkeypatch):
    expected = [stream[k] for k in range(16)]
    cached = TrainingStream(Cityscapes(stream.dataset.root, "train", tmp_path), (48, 80), seed=3)
    order = np.arange(16).repeat(2).tolist()  # each sample from both workers, which write at once
    loader = DataLoader(cached, batch_size=None, sampler=order, num_workers=2, timeout=60)
    assert all(equal(sample, expected[k]) for k, sample in zip(order, loader, strict=True))
    assert len(list(tmp_path.iterdir())) == 8  # and no file half written
    monkeypatch.setattr(cityscapes, "read_pair", None)  # from now on nothing can be decoded
    assert all(equal(cached[k], sample) for k, sample in enumerate(expected))


def test_a_changed_file_or_table_is_decoded_again(tmp_path, monkeypatch):
    root = write_pair(tmp_path / "data", np.full((16, 16, 3), 10), np.full((16, 16), 7))
    dataset = Cityscapes(root, "train", cache=tmp_path / "cache")
    assert (dataset[0][0] == 10).all()
    write_pair(root, np.full((16, 16, 3), 20), np.full((16, 16), 7))
    os.utime(dataset.paths(0)[0], ns=(1, 1))  # even if the new one looks older
    assert (dataset[0][0] == 20).all()
    write_pair(root, np.full((16, 16, 3), 20), np.full((16, 16), 23))
    assert (dataset[0][1] == 10).all()
    monkeypatch.setitem(TRAIN_IDS, 23, 5)
    assert (dataset[0][1] == 5).all()


def test_a_damaged_cache_and_one_that_cannot_be_written_are_errors(toy, tmp_path, monkeypatch):
    dataset = Cityscapes(toy, "train", cache=tmp_path / "cut")
    dataset[0]
    (path,) = (tmp_path / "cut").iterdir()
    for size in (path.stat().st_size - 1, 60, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(DataError, match=f"{path.name} .*remove it"):
            dataset[0]
    path.unlink()
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError(28, "disk full")))
    with pytest.raises(OSError, match=f"cannot write {path} .*disk full"):
        dataset[0]


# The stream: a pure function of (seed, k) ---------------------------------------------------------


@pytest.mark.usefixtures("all_cores")
def test_samples_do_not_depend_on_workers_threads_or_what_was_read_before(stream):
    loader = DataLoader(stream, batch_size=None, sampler=range(5, 21), num_workers=2, timeout=60)
    samples = list(enumerate(loader, 5))  # in one thread per worker; here in one per core
    assert all(equal(sample, stream[k]) for k, sample in reversed(samples))


def test_seeds_and_samples_differ_even_of_the_same_image(stream):
    first, other = (TrainingStream([stream.dataset[0]], (48, 80), seed) for seed in (3, 4))
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
        clear = (image - middle).abs() > 2  # grey levels, of 20 at the least: the rest is rounding
        assert torch.equal(image[clear] > middle, label[clear] == 0), k
        compared += clear.sum().item()
    assert compared > 0.8 * 150 * 96 * 96


def test_a_crop_is_the_bilinear_interpolation_of_a_window_drawn_by_the_recipe(
        tmp_path, monkeypatch):
    """One image of 200x240 whose red is x and whose green is y, of many small classes, without
    color changes, against the textbook formula: output i samples the window at (i + 1/2) window /
    crop - 1/2, labels the pixel beneath. The window's position is uniform."""
    monkeypatch.setattr(cityscapes, "color_matrix", lambda *_: color_matrix())
    y, x = np.mgrid[:200, :240]
    ids = IDS[(y // 10 + 3 * (x // 10)) % len(IDS)]
    root = write_pair(tmp_path, np.stack([x, y, 0 * x], axis=2), ids)
    stream = TrainingStream(Cityscapes(root, "train"), (48, 64))
    tops, lefts = [], []
    for k in range(600):
        image, label = stream[k]
        draw = np.random.default_rng([0, 1, k])  # the stream's first two draws: scale and flip
        scale, mirrored = draw.uniform(0.5, 2.0), draw.random() < 0.5
        if mirrored:
            image, label = image.flip(2), label.flip(1)
        height, width = round(48 / scale), round(64 / scale)  # of the window
        rows, columns = (np.arange(48) + 0.5) * height / 48, (np.arange(64) + 0.5) * width / 64
        y, x = (rows - 0.5).clip(0, height - 1), (columns - 0.5).clip(0, width - 1)
        top = round((image[1, :, 0].float().numpy() - y).mean())
        left = round((image[0, 0].float().numpy() - x).mean())
        assert np.abs(image[0].numpy() - (left + x)).max() <= 1
        assert np.abs(image[1].numpy() - (top + y)[:, None]).max() <= 1
        beneath = ids[top + rows.astype(int)][:, left + columns.astype(int)]
        assert np.array_equal(IDS[label], beneath)
        tops.append(top / (200 - height))
        lefts.append(left / (240 - width))
    assert ks_distance(tops, 0, 1) < 1.95
    assert ks_distance(lefts, 0, 1) < 1.95


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
        padding = image[:, label == VOID]
        assert (padding == torch.tensor([[124], [116], [104]])).all()


def test_no_class_has_three_quarters_of_the_labelled_pixels_unless_eleven_tries_failed(tmp_path):
    """The number of crops over the limit is what eleven independent tries leave, counted by drawing
    windows here."""
    rng = np.random.default_rng(0)
    blocks = rng.choice([7, 23, 0], (4, 8), p=[0.75, 0.15, 0.1])  # road, sky, uncounted void
    ids = np.repeat(np.repeat(blocks, 32, axis=0), 32, axis=1)

    def over(road, sky):
        return max(road, sky) >= 0.75 * (road + sky)

    def chance(scale):  # that eleven windows in a row are over the limit
        h, w = round(32 / scale), round(48 / scale)
        corners = zip(rng.integers(0, 128 - h + 1, 100), rng.integers(0, 256 - w + 1, 100))
        windows = [ids[top: top + h, left: left + w] for top, left in corners]
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
                        lambda *values: drawn.append(values) or color_matrix(*values))
    colors = rng.integers(0, 256, (4, 3))
    image = np.repeat(np.repeat(colors.reshape(2, 2, 3), 32, axis=0), 32, axis=1)
    root = write_pair(tmp_path, image, np.tile([7, 23], (64, 32)))
    stream = TrainingStream(Cityscapes(root, "train"), (64, 64))
    for k in range(600):
        sample, label = stream[k]
        matrix = color_matrix(*drawn[-1])
        expected = (colors @ matrix[:, :3].T + matrix[:, 3]).clip(0, 255)
        pixels = sample[:, label != VOID].T.numpy()
        nearest = np.abs(pixels[:, None].astype(float) - expected).max(axis=2).min(axis=1)
        assert (nearest <= 0.6).mean() > 0.6, k  # all but the pixels on the border of two patches
    recipe = [(-32, 32, 0), (0.5, 1.5, 1), (0.5, 1.5, 1), (-36, 36, 0)]
    for values, (low, high, neutral) in zip(np.array(drawn).T, recipe, strict=True):
        changed = values[values != neutral]
        assert abs(len(changed) / 600 - 0.5) < 3.3 * 0.5 / math.sqrt(600)
        assert ks_distance(changed, low, high) < 1.95


# python cityscapes.py -----------------------------------------------------------------------------


def test_check_counts_and_draws_clean_data(toy, tmp_path, run_here):
    process = run_here(f"cityscapes.py --data {toy} --check --crop 48 80 "
                       f"--sheet {tmp_path}/sheet.png")
    for words in ("train: 8 images", "val: 5 images", "test: 2 images"):
        assert words in process.stdout
    road = next(line.split() for line in process.stdout.splitlines() if line.startswith("road"))
    labels = torch.cat([label.flatten() for _, label in Cityscapes(toy, "train")])
    share = ((labels == 0).sum() / (labels != VOID).sum()).item()
    assert abs(float(road[1]) - 100 * share) < 0.006
    assert Image.open(tmp_path / "sheet.png").width == 3 * 480


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
    problems = process.stdout[process.stdout.index("bicycle"):].splitlines()[1:]
    assert len(problems) == 5
    for path, words in ((images[0], "decode"), (images[1], "decode"),
                        (images[3], "has 32 x 64 pixels"), (labels[3], f"{labels[3]} 30 x 64"),
                        (labels[4], "(40)"), (labels[12], "4 of the 6 images of val")):
        assert any(str(path) in problem and words in problem for problem in problems), path
