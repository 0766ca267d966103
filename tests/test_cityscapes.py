"""The labels against the official table, the files in every disorder, and the training stream
against its definition."""

import csv
import math
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TESTS, assert_mistake, run_script
from PIL import Image
from toy_cityscapes import draw_cityscapes
from torch.utils.data import DataLoader

import cityscapes
from cityscapes import (
    CLASSES,
    LABELS,
    NUM_CLASSES,
    VOID,
    Cityscapes,
    DataError,
    TrainingStream,
    color_matrix,
)


def write_pair(root, image, ids, name="aachen_000000_000019", split="train"):
    """One image (H, W, 3) with its label ids (H, W), in the layout of Cityscapes."""
    city = name.split("_")[0]
    for kind, ending, pixels in (
        ("leftImg8bit", "leftImg8bit", image),
        ("gtFine", "gtFine_labelIds", ids),
    ):
        if pixels is not None:
            folder = Path(root) / kind / split / city
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(pixels, np.uint8)).save(folder / f"{name}_{ending}.png")
    return Path(root)


def ks_distance(values, low, high):
    """Kolmogorov-Smirnov distance of the values from the uniform distribution, times sqrt(n); over
    1.95 once in a thousand."""
    values = (np.sort(values) - low) / (high - low)
    n = len(values)
    return max(
        np.max(np.arange(1, n + 1) / n - values), np.max(values - np.arange(n) / n)
    ) * math.sqrt(n)


# Labels -----------------------------------------------------------------------------------------


def test_labels_equal_the_official_table():
    with open(TESTS / "cityscapes_labels.csv") as file:
        official = [
            (
                int(row["id"]),
                row["name"],
                int(row["trainId"]),
                row["category"],
                (int(row["red"]), int(row["green"]), int(row["blue"])),
            )
            for row in csv.DictReader(file)
        ]
    assert [tuple(label) for label in LABELS] == official
    assert [label.name for label in CLASSES] == [
        row[1] for row in sorted(official, key=lambda r: r[2]) if 0 <= row[2] < 255
    ]


def test_train_ids_colors_and_label_ids_follow_from_the_table():
    for label in LABELS[:-1]:
        assert cityscapes.ID_TO_TRAIN_ID[label.id] == label.train_id
    for label in CLASSES:
        assert cityscapes.TRAIN_ID_TO_ID[label.train_id] == label.id
        assert tuple(cityscapes.COLORS[label.train_id]) == label.color
    assert tuple(cityscapes.COLORS[VOID]) == (0, 0, 0)


def test_all_34_ids_are_read_and_others_are_an_error_that_names_file_and_values(tmp_path):
    ids = np.arange(34, dtype=np.uint8).reshape(2, 17)
    dataset = Cityscapes(write_pair(tmp_path, np.zeros((2, 17, 3)), ids), "train")
    image, label = dataset[0]
    assert label.flatten().tolist() == [label.train_id for label in LABELS[:-1]]
    assert (image.shape, image.dtype, label.dtype) == ((3, 2, 17), torch.uint8, torch.uint8)
    ids[0, 3], ids[1, 5] = 34, 255
    write_pair(tmp_path, np.zeros((2, 17, 3)), ids)
    for read in (lambda: dataset[0], lambda: TrainingStream(dataset, (4, 34))[0]):
        with pytest.raises(
            DataError, match=r"aachen_000000_000019_gtFine_labelIds.png .*\(34, 255\)"
        ):
            read()


# Files ------------------------------------------------------------------------------------------


def test_files_are_found_among_others_in_any_case_and_behind_links(tmp_path):
    root = draw_cityscapes(tmp_path / "a", {"train": 20}, (16, 32))
    expected = [Path(image).name for image, _ in Cityscapes(root, "train").files]
    (root / "leftImg8bit/train/.DS_Store").touch()
    (root / "leftImg8bit/train/toytown0/._toytown0_000000_000019_leftImg8bit.png").write_text(
        "a Mac's shadow of the file"
    )
    (root / "leftImg8bit/train/toytown0/readme.txt").touch()
    for other in ("color", "instanceIds", "labelTrainIds"):
        Image.new("L", (3, 3)).save(
            root / f"gtFine/train/toytown0/toytown0_000000_000019_gtFine_{other}.png"
        )
    moved = tmp_path / "elsewhere"
    (root / "leftImg8bit/train/toytown1").rename(moved)
    (root / "leftImg8bit/train/toytown1").symlink_to(moved)
    (root / "gtFine/train/toytown2").rename(root / "gtFine/train/ToyTown2")
    label = root / "gtFine/train/toytown0/toytown0_000003_000019_gtFine_labelIds.png"
    label.rename(label.with_name(label.name.upper()))
    (root / "leftImg8bit/train").rename(root / "leftImg8bit/Train")
    (root / "gtFine").rename(root / "GTFINE")
    dataset = Cityscapes(root, "train")
    assert [Path(image).name for image, _ in dataset.files] == expected
    for (image_path, label_path), (image, label) in zip(dataset.files, dataset, strict=True):
        assert image_path.name[:20].lower() == label_path.name[:20].lower()
        assert np.array_equal(image.permute(1, 2, 0), np.array(Image.open(image_path)))
        assert np.array_equal(
            cityscapes.TRAIN_ID_TO_ID[label[label != VOID]],
            np.array(Image.open(label_path))[label != VOID],
        )


def test_images_of_one_name_in_two_cities_are_two_images(tmp_path):
    for city in ("aachen", "zurich"):
        write_pair(tmp_path, np.zeros((2, 4, 3)), np.full((2, 4), 7 if city == "aachen" else 8))
        for kind in ("leftImg8bit", "gtFine"):
            (tmp_path / kind / "train/aachen").rename(tmp_path / kind / f"train/{city}_")
    dataset = Cityscapes(tmp_path, "train")
    assert [label.unique().tolist() for _, label in dataset] == [[0], [1]]


def test_test_labels_are_void_also_when_id_0_is_a_class(tmp_path, monkeypatch):
    root = draw_cityscapes(tmp_path, {"test": 1}, (16, 32))
    table = cityscapes.ID_TO_TRAIN_ID.clone()
    table[0] = 3
    monkeypatch.setattr(cityscapes, "ID_TO_TRAIN_ID", table)
    assert (Cityscapes(root, "test")[0][1] == VOID).all()


def test_coarse_labels_without_their_images_are_no_problem(tmp_path, capsys):
    root = draw_cityscapes(tmp_path, {"train": 1, "val": 1, "test": 1}, (16, 32))
    (root / "gtCoarse/train_extra/augsburg").mkdir(parents=True)
    Image.new("L", (32, 16)).save(
        root / "gtCoarse/train_extra/augsburg/augsburg_000000_000000_gtCoarse_labelIds.png"
    )
    assert cityscapes.survey(root, check=True) == []
    assert "train_extra" not in capsys.readouterr().out


def test_test_labels_are_void_and_coarse_labels_are_read(tmp_path):
    root = draw_cityscapes(tmp_path, {"train": 1, "test": 2, "train_extra": 3}, (16, 32))
    (root / "gtFine/train_extra").rename(root / "coarse")
    for path in list((root / "coarse").glob("*/*")):
        path.rename(path.with_name(path.name.replace("gtFine", "gtCoarse")))
    (root / "gtCoarse").mkdir()
    (root / "coarse").rename(root / "gtCoarse/train_extra")
    assert all((label == VOID).all() for _, label in Cityscapes(root, "test"))
    coarse = Cityscapes(root, "train_extra")
    assert len(coarse) == 3
    assert all((label != VOID).any() for _, label in coarse)


@pytest.mark.parametrize(
    "damage", ["cut in half", "cut by a byte", "cut to nothing", "text", "a flipped byte"]
)
@pytest.mark.parametrize("kind", ["leftImg8bit", "gtFine"])
def test_a_file_that_does_not_decode_is_named(tmp_path, kind, damage):
    root = draw_cityscapes(tmp_path, {"train": 1}, (64, 64))
    (path,) = (root / kind).glob("*/*/*.png")
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0x10
    path.write_bytes(
        {
            "cut in half": data[: len(data) // 2],
            "cut by a byte": data[:-1],
            "cut to nothing": b"",
            "text": b"404: not found",
            "a flipped byte": bytes(flipped),
        }[damage]
    )
    with pytest.raises(DataError, match=path.name):
        Cityscapes(root, "train")[0]


def test_sizes_that_differ_and_labels_in_color_are_named(tmp_path):
    root = write_pair(tmp_path / "sizes", np.zeros((8, 16, 3)), np.zeros((8, 12)))
    with pytest.raises(DataError, match="(?s)8 x 16 .*labelIds.png 8 x 12"):
        Cityscapes(root, "train")[0]
    root = write_pair(tmp_path / "color", np.zeros((8, 16, 3)), np.zeros((8, 16, 3)))
    with pytest.raises(DataError, match="labelIds.png has mode RGB"):
        Cityscapes(root, "train")[0]


def test_a_workers_error_is_still_one_sentence(tmp_path):
    root = write_pair(tmp_path, np.zeros((8, 16, 3)), np.full((8, 16), 99))
    with pytest.raises(DataError) as error:
        next(iter(DataLoader(Cityscapes(root, "train"), num_workers=1)))
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_mistakes_with_the_folder_end_with_a_sentence_that_says_what_to_type(tmp_path, toy):
    def mistake(folder, *words):
        with pytest.raises(DataError) as error:
            Cityscapes(folder, "train")
        for word in words:
            assert word in str(error.value), str(error.value)

    mistake(tmp_path / "nowhere", "there is no folder", "--data")
    mistake(toy.parent, f"--data {toy}")
    mistake(toy / "leftImg8bit", f"--data {toy}")
    mistake(toy / "leftImg8bit/train", f"--data {toy}")
    mistake(tmp_path, "no folder leftImg8bit", "leftImg8bit_trainvaltest.zip")
    root = draw_cityscapes(tmp_path / "labels", {"train": 6, "val": 1}, (16, 32))
    labels = sorted((root / "gtFine/train").glob("*/*"))
    for path in labels[2:]:
        path.unlink()
    mistake(root, "4 of the 6", "toytown0_000002_000019_leftImg8bit.png")
    (root / "gtFine").rename(root / "gtfine_of_old")
    mistake(root, "no folder gtFine", "gtFine_trainvaltest.zip")
    with pytest.raises(DataError, match="gtCoarse.zip"):
        Cityscapes(toy, "train_extra")
    assert_mistake(
        run_script(f"cityscapes.py --data {tmp_path}/nowhere"), "there is no folder", str(tmp_path)
    )


# The stream: a pure function of (seed, k) ---------------------------------------------------------


@pytest.fixture(scope="module")
def stream(toy):
    return TrainingStream(Cityscapes(toy, "train"), (48, 80), seed=3)


def equal(sample, other):
    return torch.equal(sample[0], other[0]) and torch.equal(sample[1], other[1])


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_samples_do_not_depend_on_the_number_of_workers_or_on_what_was_read_before(stream, workers):
    loader = DataLoader(stream, batch_size=None, sampler=range(5, 21), num_workers=workers)
    for k, sample in reversed(list(enumerate(loader, 5))):
        assert equal(sample, stream[k]), k


def test_the_main_process_and_a_worker_make_the_same_bytes_whatever_their_threads(stream):
    expected = [stream[k] for k in range(8)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert all(equal(stream[k], expected[k]) for k in range(8))
    finally:
        torch.set_num_threads(threads)


def test_seeds_and_samples_differ(toy, stream):
    assert not equal(stream[0], stream[8])
    assert not equal(stream[0], TrainingStream(stream.dataset, (48, 80), seed=4)[0])


def test_every_epoch_is_another_permutation_of_all_images(stream):
    n = len(stream.dataset)
    epochs = [[stream.index(k) for k in range(e * n, (e + 1) * n)] for e in range(20)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20


# The stream: geometry -----------------------------------------------------------------------------


def neutral_colors(monkeypatch):
    monkeypatch.setattr(cityscapes, "color_matrix", lambda *_: color_matrix())


@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_label_are_aligned_to_the_pixel_under_every_augmentation(tmp_path, axis):
    """Light where the label is road, dark where it is sky, in stripes of random width: after any
    scale, crop, flip and color a pixel must be nearer to the light grey exactly where its label is
    road. (No color is ever clipped.)"""
    rng = np.random.default_rng(0)
    stripes = np.repeat(rng.integers(0, 2, 200), rng.integers(1, 6, 200))[:150]
    mask = np.broadcast_to(stripes[:, None] if axis == 0 else stripes, (150, 150)).astype(bool)
    root = write_pair(
        tmp_path, np.where(mask, 110, 70)[..., None].repeat(3, axis=2), np.where(mask, 7, 23)
    )
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


def coordinates_stream(tmp_path, monkeypatch, crop):
    """A stream over one image of 200x240 whose red is x and whose green is y, of many small
    classes, without color changes."""
    neutral_colors(monkeypatch)
    y, x = np.mgrid[:200, :240]
    ids = np.array([label.id for label in CLASSES])[(y // 10 + 3 * (x // 10)) % NUM_CLASSES]
    root = write_pair(tmp_path, np.stack([x, y, 0 * x], axis=2), ids)
    return TrainingStream(Cityscapes(root, "train"), crop), ids


def test_scale_position_and_flip_have_the_distributions_of_the_recipe(tmp_path, monkeypatch):
    stream, _ = coordinates_stream(tmp_path, monkeypatch, (48, 64))
    scales, lefts, tops, flips = [], [], [], []
    for k in range(600):
        image, _ = stream[k]
        red, green = image[0].float().mean(dim=0), image[1].float().mean(dim=1)
        slope = ((red[56] - red[8]) / 48).item()
        window = np.array([48, 64]) / [((green[40] - green[8]) / 32).item() ** -1, abs(slope) ** -1]
        flips.append(slope < 0)
        scales.append(1 / abs(slope))
        tops.append(((green[24] + green[23]) / 2 - (window[0] - 1) / 2).item() / (200 - window[0]))
        lefts.append(((red[32] + red[31]) / 2 - (window[1] - 1) / 2).item() / (240 - window[1]))
    assert ks_distance(scales, 0.5, 2) < 1.95
    assert ks_distance(tops, 0, 1) < 1.95
    assert ks_distance(lefts, 0, 1) < 1.95
    assert abs(np.mean(flips) - 0.5) < 3.3 * 0.5 / math.sqrt(600)
    assert abs(np.corrcoef(scales, flips)[0, 1]) < 3.3 / math.sqrt(600)


def test_a_crop_is_the_bilinear_interpolation_of_its_window_without_shift(tmp_path, monkeypatch):
    """Against the textbook formula: output i samples the window at (i + 1/2) window / crop - 1/2,
    labels the pixel beneath."""
    stream, ids = coordinates_stream(tmp_path, monkeypatch, (48, 64))
    for k in range(60):
        image, label = stream[k]
        draw = np.random.default_rng([0, 1, k])  # the stream's first two draws: scale and flip
        scale, mirrored = draw.uniform(0.5, 2.0), draw.random() < 0.5
        if mirrored:
            image, label = image.flip(2), label.flip(1)
        window = [round(48 / scale), round(64 / scale)]
        y, x = ((np.arange(n) + 0.5) * w / n - 0.5 for n, w in zip((48, 64), window, strict=True))
        y, x = y.clip(0, window[0] - 1), x.clip(0, window[1] - 1)
        left, top = (
            round((image[0, 0].float().numpy() - x).mean()),
            round((image[1, :, 0].float().numpy() - y).mean()),
        )
        assert np.abs(image[0].numpy() - (left + x)).max() <= 1
        assert np.abs(image[1].numpy() - (top + y)[:, None]).max() <= 1
        rows, columns = (
            np.floor((np.arange(n) + 0.5) * w / n).astype(int)
            for n, w in zip((48, 64), window, strict=True)
        )
        assert np.array_equal(cityscapes.TRAIN_ID_TO_ID[label], ids[top + rows][:, left + columns])


@pytest.mark.parametrize("size", [(20, 30), (300, 31), (17, 400), (1, 1), (101, 99)])
def test_images_of_any_size_and_labels_only_take_values_that_were_there(tmp_path, size):
    rng = np.random.default_rng(0)
    root = write_pair(tmp_path, rng.integers(0, 256, (*size, 3)), rng.choice([7, 23, 33, 0], size))
    stream = TrainingStream(Cityscapes(root, "train"), (64, 96))
    for k in range(30):
        image, label = stream[k]
        assert (
            image.shape == (3, 64, 96)
            and label.shape == (64, 96)
            and image.dtype == label.dtype == torch.uint8
        )
        assert set(label.unique().tolist()) <= {0, 10, 18, VOID}


def test_an_image_smaller_than_the_crop_is_padded_with_the_mean_color_and_void(tmp_path):
    root = write_pair(tmp_path, np.full((30, 40, 3), 250), np.tile([7, 23], (30, 20)))
    stream = TrainingStream(Cityscapes(root, "train"), (100, 120))
    for k in range(30):
        image, label = stream[k]
        rows, columns = (label != VOID).nonzero().max(dim=0).values + 1
        assert 15 <= rows <= 60 and 20 <= columns <= 80 and abs(columns / rows - 4 / 3) < 0.1
        assert (
            (label[:rows, :columns] != VOID).all()
            and (label[rows:] == VOID).all()
            and (label[:, columns:] == VOID).all()
        )
        padding = image[:, label == VOID]
        assert (padding == torch.tensor([[124], [116], [104]])).all()


def test_no_class_has_three_quarters_of_the_labelled_pixels_unless_eleven_tries_failed(tmp_path):
    """The number of crops over the limit is what eleven independent tries leave, counted by drawing
    windows here."""
    rng = np.random.default_rng(0)
    blocks = rng.choice(
        [7, 23, 0], (4, 8), p=[0.75, 0.15, 0.1]
    )  # road, sky and void, which does not count
    ids = np.repeat(np.repeat(blocks, 32, axis=0), 32, axis=1)

    def over(ids):
        road, sky = (ids == 7).sum(), (ids == 23).sum()
        return max(road, sky) >= 0.75 * (road + sky)

    def chance(scale):  # that eleven windows in a row are over the limit
        h, w = round(32 / scale), round(48 / scale)
        tops, lefts = rng.integers(0, 128 - h + 1, 100), rng.integers(0, 256 - w + 1, 100)
        return (
            np.mean([over(ids[t : t + h, l : l + w]) for t, l in zip(tops, lefts, strict=True)])
            ** 11
        )

    chances = np.array([chance(scale) for scale in np.linspace(0.5, 2, 300)])
    stream = TrainingStream(
        Cityscapes(write_pair(tmp_path, np.zeros((128, 256, 3)), ids), "train"), (32, 48)
    )
    count = sum(
        over(np.array([7, 23, 0])[np.searchsorted([0, 10, 255], stream[k][1].numpy())])
        for k in range(300)
    )
    assert 5 < chances.sum() < 100, chances.sum()
    assert (
        abs(count - chances.sum())
        < 4 * np.sqrt((chances * (1 - chances)).sum()) + 0.1 * chances.sum()
    )
    only_road = write_pair(tmp_path / "road", np.zeros((64, 64, 3)), np.full((64, 64), 7))
    assert (
        TrainingStream(Cityscapes(only_road, "train"), (32, 32))[0][1] == 0
    ).all()  # the 11th is taken as it is


# The stream: colors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("brightness", 20.0, lambda rgb, grey: rgb + 20),
        ("contrast", 1.3, lambda rgb, grey: 1.3 * rgb),
        ("saturation", 0.6, lambda rgb, grey: grey + 0.6 * (rgb - grey)),
        ("saturation", 0.0, lambda rgb, grey: grey + 0 * rgb),
        (
            "hue",
            120.0,
            lambda rgb, grey: rgb[:, [2, 0, 1]],
        ),  # red becomes green becomes blue becomes red
        ("hue", 360.0, lambda rgb, grey: rgb),
    ],
)
def test_each_distortion_by_itself(name, value, expected):
    rgb = np.random.default_rng(0).uniform(0, 255, (100, 3))
    matrix = color_matrix(**{name: value})
    actual = rgb @ matrix[:, :3].T + matrix[:, 3]
    assert np.abs(actual - expected(rgb, rgb.mean(axis=1, keepdims=True))).max() < 1e-10


def test_a_small_turn_of_hue_goes_from_red_towards_yellow_and_keeps_the_grey():
    matrix = color_matrix(hue=36)[:, :3]
    red, grey = matrix @ [255, 0, 0], matrix @ [90, 90, 90]
    assert red[0] > red[1] > red[2]
    assert np.abs(grey - 90).max() < 1e-10


def test_all_four_together_are_brightness_then_contrast_then_saturation_and_hue():
    one = np.vstack([color_matrix(10, 1.2, 0.7, 25), [0, 0, 0, 1]])
    parts = [
        np.vstack([color_matrix(**part), [0, 0, 0, 1]])
        for part in ({"hue": 25}, {"saturation": 0.7}, {"contrast": 1.2}, {"brightness": 10})
    ]
    assert np.abs(one - parts[0] @ parts[1] @ parts[2] @ parts[3]).max() < 1e-10


def test_colors_are_drawn_with_the_probabilities_and_ranges_of_the_recipe(stream, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        cityscapes, "color_matrix", lambda *values: drawn.append(values) or color_matrix(*values)
    )
    for k in range(600):
        stream[k]
    for values, (low, high, neutral) in zip(
        np.array(drawn).T, [(-32, 32, 0), (0.5, 1.5, 1), (0.5, 1.5, 1), (-36, 36, 0)], strict=True
    ):
        changed = values[values != neutral]
        assert abs(len(changed) / 600 - 0.5) < 3.3 * 0.5 / math.sqrt(600)
        assert ks_distance(changed, low, high) < 1.95


def test_a_sample_has_the_colors_of_its_matrix_rounded_and_clipped(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (16, 3))
    image = np.repeat(np.repeat(colors.reshape(4, 4, 3), 32, axis=0), 32, axis=1)
    root = write_pair(tmp_path, image, np.tile([7, 23], (128, 64)))
    drawn = []
    monkeypatch.setattr(
        cityscapes, "color_matrix", lambda *values: drawn.append(color_matrix(*values)) or drawn[-1]
    )
    stream = TrainingStream(Cityscapes(root, "train"), (64, 64))
    for k in range(40):
        sample, label = stream[k]
        expected = (colors @ drawn[-1][:, :3].T + drawn[-1][:, 3]).clip(0, 255)
        pixels = sample[:, label != VOID].T.numpy()
        nearest = np.abs(pixels[:, None].astype(float) - expected).max(axis=2).min(axis=1)
        assert (nearest <= 0.6).mean() > 0.6  # all but the pixels on the border of two patches


# The cache ----------------------------------------------------------------------------------------


def test_the_cache_changes_nothing_but_is_read_instead_of_the_files(toy, tmp_path, monkeypatch):
    plain = TrainingStream(Cityscapes(toy, "train"), (48, 80))
    cached = TrainingStream(Cityscapes(toy, "train", cache=tmp_path / "cache"), (48, 80))
    assert all(equal(plain[k], cached[k]) for k in range(16))
    monkeypatch.setattr(cityscapes, "decode_pair", None)  # from now on nothing can be decoded
    assert all(equal(cached[k], cached[k]) for k in range(8))
    image, ids = cached.dataset.read(0)
    assert isinstance(image, np.memmap) and isinstance(ids, np.memmap)
    assert len(list((tmp_path / "cache").iterdir())) == 8


def test_a_changed_file_is_decoded_again(tmp_path):
    root = write_pair(tmp_path / "data", np.full((16, 16, 3), 10), np.full((16, 16), 7))
    dataset = Cityscapes(root, "train", cache=tmp_path / "cache")
    assert (dataset[0][0] == 10).all()
    write_pair(root, np.full((16, 16, 3), 20), np.full((16, 16), 7))
    os.utime(dataset.files[0][0], ns=(1, 1))  # even if the new one looks older
    assert (dataset[0][0] == 20).all()
    write_pair(root, np.full((16, 16, 3), 20), np.full((16, 16), 23))
    assert (dataset[0][1] == 10).all()


def test_many_may_write_the_cache_at_once(toy, tmp_path):
    plain = Cityscapes(toy, "train")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from cityscapes import Cityscapes;"
        "d = Cityscapes(sys.argv[2], 'train', cache=sys.argv[3]); "
        "[d[i] for _ in range(3) for i in range(len(d))]"
    )
    with ThreadPoolExecutor(4) as pool:
        codes = pool.map(
            lambda _: (
                subprocess.run([sys.executable, "-c", program, SCRIPTS, toy, tmp_path]).returncode
            ),
            range(4),
        )
    assert list(codes) == [0] * 4
    assert len(list(tmp_path.iterdir())) == 8  # and no file half written
    cached = Cityscapes(toy, "train", cache=tmp_path)
    assert all(equal(plain[i], cached[i]) for i in range(8))


def test_a_full_disk_an_unusable_folder_and_a_damaged_cache_are_errors(toy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot make the cache folder"):
        Cityscapes(toy, "train", cache=tmp_path / "file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1000, limits[1])
    )  # files may not grow, as on a full disk
    try:
        with pytest.raises(DataError, match="cannot write the cache .*free space"):
            Cityscapes(toy, "train", cache=tmp_path / "full")[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "full").iterdir()) == []
    dataset = Cityscapes(toy, "train", cache=tmp_path / "cut")
    dataset[0]
    (path,) = (tmp_path / "cut").iterdir()
    for size in (0, 60, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(DataError, match=f"{path.name} .*remove it"):
            dataset[0]


# python cityscapes.py -----------------------------------------------------------------------------


def test_script_surveys_draws_and_measures_clean_data(toy, tmp_path):
    process = run_script(
        f"cityscapes.py --data {toy} --check --crop 48 80 --sheet {tmp_path}/sheet.png"
    )
    assert process.returncode == 0, process.stderr
    assert (
        "train: 8 images" in process.stdout
        and "val: 5 images" in process.stdout
        and "test: 2 images" in process.stdout
    )
    road = next(line.split() for line in process.stdout.splitlines() if line.startswith("road"))
    labels = torch.cat([label.flatten() for _, label in Cityscapes(toy, "train")])
    assert float(road[1]) == pytest.approx(
        100 * ((labels == 0).sum() / (labels != VOID).sum()).item(), abs=0.006
    )
    assert "times decoding" in process.stdout and "times as fast" in process.stdout
    assert Image.open(tmp_path / "sheet.png").width == 3 * 480


def test_check_lists_everything_that_is_wrong(tmp_path):
    root = draw_cityscapes(tmp_path, {"train": 9, "val": 2, "test": 1}, (32, 64))
    images, labels = (sorted((root / kind).glob("*/*/*.png")) for kind in ("leftImg8bit", "gtFine"))
    test, train, val = (0, slice(1, 10), slice(10, 12))
    images[test].write_bytes(b"no image")
    broken = images[train][0]
    broken.write_bytes(broken.read_bytes()[:-100])
    images[train][1].unlink()
    labels[train][2].unlink()
    Image.new("L", (64, 30)).save(labels[train][3])
    Image.new("L", (64, 32), 40).save(labels[train][4])
    labels[val][1].write_bytes(b"")
    process = run_script(f"cityscapes.py --data {root} --check")
    assert process.returncode == 1, process.stderr
    problems = process.stdout[process.stdout.index("bicycle") :].splitlines()[1:]
    assert problems[-1] == "7 problems" and len(problems) == 8
    for path, word in (
        (images[test], "decode"),
        (broken, "cut short"),
        (labels[train][1], "no image"),
        (images[train][2], "no label"),
        (labels[train][3], "sizes differ"),
        (labels[train][4], "(40)"),
        (labels[val][1], "decode"),
    ):
        assert any(str(path) in problem and word in problem for problem in problems), (
            path,
            word,
            problems,
        )


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux does")
def test_check_keeps_no_file_open_for_the_images_that_it_has_seen(toy, monkeypatch):
    def open_files(*_):
        counts.append(len(os.listdir("/proc/self/fd")))

    counts = []
    cityscapes.survey(toy, check=True)  # what multiprocessing opens once and for all
    open_files()
    monkeypatch.setattr(cityscapes, "print", open_files, raising=False)  # it prints each split
    cityscapes.survey(toy, check=True)
    assert len(counts) > 3 and max(counts) == counts[0]
