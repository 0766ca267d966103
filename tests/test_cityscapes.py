"""The classes against the official table, disordered files, and samples against the recipe."""
import csv
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TESTS, run_script, sentence_of
from PIL import Image
from torch.utils.data import DataLoader
from toy_cityscapes import draw_cityscapes

import cityscapes
from cityscapes import (CLASSES, VOID, Cityscapes, DataError, SceneClass, TensorPairs,
                        TrainingStream, check_classes, color_matrix, colored, read_label,
                        read_pair, read_picture, save_sheet)

with open(TESTS / "cityscapes_labels.csv") as file:
    OFFICIAL = [row for row in csv.DictReader(file) if row["id"] != "-1"]  # -1: license plates
TRAIN_IDS = np.array([int(row["trainId"]) for row in OFFICIAL])  # of the label ids 0 to 33


class Pairs(list):  # a data set of one's own
    classes = CLASSES


def stream_of(photograph, label, crop_size, seed=0):  # (H, W, 3), (H, W)
    pair = [Image.fromarray(np.asarray(pixels, np.uint8)) for pixels in (photograph, label)]
    return TrainingStream(Pairs([pair]), crop_size, seed)


def test_classes_equal_the_official_table():
    rows = [row for row in OFFICIAL if row["trainId"] != "255"]
    for entry, row in zip(CLASSES, rows, strict=True):
        color = int(row["red"]), int(row["green"]), int(row["blue"])
        assert entry == (int(row["id"]), row["name"], row["category"], color)


def test_labels_get_official_train_ids_and_unknown_ids_and_other_modes_are_named(tmp_path,
                                                                                 monkeypatch):
    path, ids = tmp_path / "a.png", np.arange(34, dtype=np.uint8).reshape(2, 17)
    Image.fromarray(ids).save(path)
    assert np.array_equal(read_label(path), TRAIN_IDS[ids])
    for mode in ("P", "RGB", "1", "I;16"):
        Image.fromarray(ids).convert(mode).save(path)
        with pytest.raises(DataError, match=f"a.png .*mode is {mode[0]}"):
            read_label(path)
    for unknown in (34, 255):
        Image.fromarray(np.where(ids == 33, unknown, ids).astype(np.uint8)).save(path)
        with pytest.raises(DataError, match=rf"a.png has \[{unknown}\]"):
            read_label(path)
    monkeypatch.setitem(cityscapes.TRAIN_IDS, VOID, VOID)  # as a comment there says
    assert np.array_equal(read_label(path), TRAIN_IDS[np.where(ids == 33, 0, ids)])


def test_photographs_of_8_bits_are_read_as_rgb_and_of_more_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        picture = Image.fromarray(pixels).convert(mode)
        picture.save(tmp_path / "a.png")
        assert np.array_equal(read_picture(tmp_path / "a.png"), picture.convert("RGB")), mode
    for mode in ("I;16", "I", "F", "LAB"):
        Image.new(mode, (4, 4)).save(tmp_path / "a.tif")
        with pytest.raises(DataError, match="a.tif .*8 bits"):
            read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize(("read", "kind"), [(read_picture, "leftImg8bit"), (read_label, "gtFine")])
def test_damaged_files_are_read_right_or_named(read, kind, toy, tmp_path):
    rng, damaged = np.random.default_rng(0), tmp_path / "damaged.png"
    path = next(toy.glob(f"{kind}/train/*/*"))
    whole, right = path.read_bytes(), np.array(read(path))
    for i in rng.integers(0, len(whole), 100):
        flipped = bytes([whole[i] ^ 1 << rng.integers(8)])  # one bit of byte i
        for rest in (b"", flipped + whole[i + 1:], whole[i + 3:], b"\0\1" + whole[i:]):
            damaged.write_bytes(whole[:i] + rest)
            try:
                assert np.array_equal(read(damaged), right)
            except DataError as error:
                assert str(damaged) in str(error)


def test_files_are_found_among_others_and_behind_links(tmp_path):
    root = draw_cityscapes(tmp_path / "data", {"train": 2}, (16, 32))
    other = draw_cityscapes(tmp_path / "other", {"train": 2}, (16, 32), seed=1)
    for kind in ("leftImg8bit", "gtFine"):  # a city that is a link, with the same names of files
        (root / kind / "train/zurich").symlink_to(other / kind / "train/toytown0")
    folder = root / "leftImg8bit/train"
    (folder / "circle").symlink_to(folder)
    (folder / ".hidden").mkdir()
    for junk in ("notes.txt", "zurich/._a_leftImg8bit.png", ".hidden/a_leftImg8bit.png"):
        (folder / junk).write_text("no photograph")
    dataset = Cityscapes(root, "train")
    names = [f"{city}/toytown0_00000{i}_000019" for city in ("toytown0", "zurich") for i in (0, 1)]
    assert [dataset.name(i) for i in range(len(dataset))] == names
    for name, (picture, label) in zip(names, dataset, strict=True):
        assert np.array_equal(picture, Image.open(folder / f"{name}_leftImg8bit.png"))
        ids = Image.open(root / f"gtFine/train/{name}_gtFine_labelIds.png")
        assert np.array_equal(label, TRAIN_IDS[np.array(ids)])


@pytest.mark.parametrize("kind", ["leftImg8bit", "gtFine"])
def test_photographs_without_labels_and_labels_without_photographs_are_refused(kind, tmp_path):
    root = draw_cityscapes(tmp_path, {"val": 3}, (16, 32))
    next(root.glob(f"{kind}/val/*/*_000001_*")).unlink()
    with pytest.raises(DataError, match="1 names of val .*toytown0/toytown0_000001_000019"):
        Cityscapes(root, "val")


def test_labels_of_test_are_void_and_those_of_train_extra_coarse(tmp_path):
    root = draw_cityscapes(tmp_path, {"test": 1, "train_extra": 1}, (16, 32))
    next(root.glob("gtFine/test/*/*")).unlink()
    assert np.array_equal(Cityscapes(root, "test")[0][1], np.full((16, 32), VOID))
    coarse = next(root.glob("gtCoarse/train_extra/*/*"))
    assert np.array_equal(Cityscapes(root, "train_extra")[0][1], read_label(coarse))


def test_pairs_become_tensors_also_of_labels_with_a_palette():
    rng = np.random.default_rng(0)
    pixels, ids = rng.integers(0, 256, (4, 6, 3), np.uint8), rng.integers(0, 19, (4, 6), np.uint8)
    label = Image.fromarray(ids)
    label.putpalette([9] * 768)  # which makes its mode P
    ((image, train_ids),) = TensorPairs(Pairs([(Image.fromarray(pixels), label)]))
    assert image.dtype == train_ids.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0), pixels) and np.array_equal(train_ids, ids)


def test_what_is_no_pair_is_refused_in_one_line_with_its_number(tmp_path):
    photograph, label, path = Image.new("RGB", (6, 4)), Image.new("L", (6, 4)), tmp_path / "a.bmp"
    photograph.save(path)
    path.write_bytes(path.read_bytes()[:-20])
    for pair, reason in (
            (None, "None"), ((photograph, None), "None"), ((photograph.convert("L"), label), "RGB"),
            ((photograph, Mock(load=Mock(side_effect=ValueError("two\n lines")))), "two lines"),
            ((photograph, label.convert("1")), "mode"), ((Image.open(path), label), "truncated"),
            ((photograph, label.resize((4, 6))), r"\(6, 4\), L \(4, 6\)"),
            ((photograph, Image.new("L", (6, 4), 19)), "19 classes")):
        with pytest.raises(DataError, match=rf"^number 1 of the data set.*{reason}.*\Z"):
            read_pair(Pairs([None, pair]), 1)


def test_names_of_classes_become_text_and_other_classes_are_refused():
    many = [SceneClass(i, i, "all", (i, 0, 255)) for i in range(255)]
    assert check_classes(many[:254]) == [str(i) for i in range(254)]
    one, two = many[0], many[1]
    for wrong in (None, {0: one, 1: two}, [tuple(one), tuple(two)], [one], many, [one, two, one],
                  [one, two._replace(id=256)], [one, two._replace(color=None)],
                  [one, two._replace(color=(0, 0, -1))]):
        with pytest.raises(DataError, match="list of 2 to 254 SceneClass"):
            check_classes(wrong)


@pytest.mark.parametrize(("brightness", "saturation", "hue", "contrast"), [
    (20, 1, 0, 1), (0, 0.6, 0, 1), (0, 1, 30, 1), (0, 1, 0, 1.3), (-9, 1.4, -120, 0.7)])
def test_colors_change_by_the_formulas_of_yiq(brightness, saturation, hue, contrast):
    yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    rgb = np.random.default_rng(0).uniform(0, 255, (3, 100))
    matrix = color_matrix(brightness=brightness, saturation=saturation, hue=hue, contrast=contrast)
    y, i, q = yiq @ (matrix[:, :3] @ rgb + matrix[:, 3:])
    old_y, old_i, old_q = yiq @ (rgb + brightness)
    tint = saturation * (old_i + 1j * old_q) * np.exp(1j * np.radians(hue))
    assert np.allclose(y, contrast * old_y) and np.allclose(i + 1j * q, contrast * tint)


def test_every_epoch_is_another_permutation_of_all_photographs_and_so_with_other_seeds():
    stream, other = TrainingStream(range(8), seed=0), TrainingStream(range(8), seed=1)
    epochs = np.reshape([stream.index(k) for k in range(160)], (20, 8))
    assert (np.sort(epochs) == range(8)).all()
    assert len(np.unique(epochs, axis=0)) == 20
    assert epochs[0].tolist() != [other.index(k) for k in range(8)]


@pytest.mark.usefixtures("all_cores")
def test_samples_do_not_depend_on_workers_threads_or_what_was_read_before(toy):
    stream = TrainingStream(Cityscapes(toy, "train"), (48, 80), seed=3)
    loader = DataLoader(stream, batch_size=None, sampler=range(5, 21), num_workers=2, timeout=60)
    for k, (image, label) in reversed(list(enumerate(loader, 5))):  # read in one thread per worker
        assert torch.equal(stream[k][0], image) and torch.equal(stream[k][1], label), k


def test_a_sample_is_the_bilinear_interpolation_of_the_box_that_the_recipe_draws(monkeypatch):
    """Pixel i of a crop shows the box at (i + 1/2) box / crop. Pixel 0 of a picture is 0 to 1."""
    monkeypatch.setattr(cityscapes, "color_matrix", lambda **_: color_matrix())
    y, x = np.mgrid[:200, :240]
    noise = np.random.default_rng(0).integers(0, 256, (200, 240))
    photograph = np.stack([x, x, noise], axis=2)  # red shows whether it is mirrored
    classes = np.where(x + y < 260, 0, (y + 3 * x) % 19)  # much road, and small spots
    classes[:, :60] = VOID
    stream = stream_of(photograph, classes, (48, 64))
    flips, tries = 0, []
    for k in range(300):
        draw = np.random.default_rng([0, 1, k])
        height, width = np.array([48, 64]) / draw.uniform(0.5, 2.0)  # of the box
        for attempt in range(11):
            columns = draw.random() * (240 - width) + (np.arange(64) + 0.5) * width / 64
            rows = draw.random() * (200 - height) + (np.arange(48) + 0.5) * height / 48
            beneath = classes[np.ix_(rows.astype(int), columns.astype(int))]
            pixels = np.bincount(beneath[beneath != VOID], minlength=19)
            if pixels.max() < 0.75 * pixels.sum():
                break
        tries.append(attempt)
        image, label = stream[k]
        if image[0, 0, 0] > image[0, 0, -1]:
            image, label, flips = image.flip(2), label.flip(1), flips + 1
        assert np.array_equal(label, beneath), k
        wide = [np.interp(columns - 0.5, range(240), row) for row in noise]
        exact = [np.interp(rows - 0.5, range(200), column) for column in np.transpose(wide)]
        error = np.transpose(exact) - image[2].numpy()  # Pillow cuts off fractions
        assert error.min() > -0.01 and error.max() < 1.01, k
    assert 120 < flips < 180
    assert set(tries) == set(range(11))


@pytest.mark.parametrize("size", [(20, 30), (300, 31), (2, 400), (1, 1), (101, 99)])
def test_small_photographs_are_padded_with_exactly_the_mean_color_and_void(size):
    stream = stream_of(np.full((*size, 3), 250), np.full(size, 5), (64, 96), seed=7)
    for k in range(30):
        image, label = stream[k]
        scale = np.random.default_rng([7, 1, k]).uniform(0.5, 2.0)
        height = ((np.arange(64) + 0.5) / scale < size[0]).sum()  # of what is in the photograph
        width = ((np.arange(96) + 0.5) / scale < size[1]).sum()
        expected = np.full((64, 96), VOID)
        expected[:height, :width] = 5
        assert np.array_equal(label, expected)
        assert (image[:, label == VOID].T == torch.tensor([124, 116, 104])).all()
        assert (image[:, label == 5].T == image[:, 0, 0]).all()  # up to the edge


def test_colors_have_the_probabilities_and_ranges_of_the_recipe_rounded_and_clipped(monkeypatch):
    noise, drawn = np.random.default_rng(0).integers(0, 256, (64, 96, 3)), []
    stream = stream_of(noise, np.zeros((64, 96)), (16, 24))
    samples = [stream[k][0].flatten(1).numpy() for k in range(600)]
    monkeypatch.setattr(cityscapes, "color_matrix",
                        lambda **values: drawn.append(values) or color_matrix())
    for k, sample in enumerate(samples):
        plain = stream[k][0].flatten(1).numpy()  # the same crop in its own colors
        matrix = color_matrix(**drawn[k])
        exact = (matrix[:, :3] @ plain + matrix[:, 3:]).clip(0, 255)
        assert np.abs(sample - exact).max() < 0.501, k
    for name, low, high, neutral in (("brightness", -32, 32, 0), ("contrast", 0.5, 1.5, 1),
                                     ("saturation", 0.5, 1.5, 1), ("hue", -36, 36, 0)):
        changed = sorted(values[name] for values in drawn if values[name] != neutral)
        assert 260 < len(changed) < 340, name
        assert np.allclose(changed, np.linspace(low, high, len(changed)), atol=0.1 * (high - low))


def test_sheets_show_labels_in_the_colors_of_their_classes_only_also_resized(tmp_path):
    label = np.random.default_rng(0).choice([*range(19), VOID], (40, 60)).astype(np.uint8)
    colors = {VOID: (0, 0, 0)} | {i: entry.color for i, entry in enumerate(CLASSES)}
    picture = colored(torch.from_numpy(label), CLASSES)
    expected = [[colors[train_id] for train_id in row] for row in label]
    assert np.array_equal(picture.convert("RGB"), expected)
    save_sheet(tmp_path / "sheet.png", [Image.new("RGB", (90, 45)), picture], 2, CLASSES)
    sheet = Image.open(tmp_path / "sheet.png")
    shown, legend = sheet.crop((480, 0, 960, 240)), sheet.crop((0, 240, *sheet.size))
    assert {color for _, color in shown.getcolors()} == set(colors.values())
    assert {color for _, color in legend.getcolors()} > set(colors.values())


def test_script_lists_everything_that_is_wrong(tmp_path):
    root = draw_cityscapes(tmp_path, {"train": 3, "val": 2, "train_extra": 2}, (32, 64))
    images, labels = (sorted(root.glob(f"{kind}/train/*/*")) for kind in ("leftImg8bit", "gtFine"))
    Image.new("RGB", (64, 32)).save(images[0], "BMP")
    images[0].write_bytes(images[0].read_bytes()[:-9])
    Image.new("L", (64, 30)).save(labels[1])
    Image.new("L", (64, 32), 40).save(labels[2])
    next(root.glob("gtFine/val/*/*")).unlink()
    next(root.glob("leftImg8bit/train_extra/*/*")).unlink()
    process = run_script(f"cityscapes.py --data {root} --check")
    for words in ("train/toytown0/toytown0_000000_000019: cannot decode", "L (64, 30)",
                  "has [40]", "1 names of val ", "1 names of train_extra "):
        assert words in process.stderr
    assert sentence_of(process) == "cityscapes.py: the 5 problems above must be mended"


def test_script_counts_checks_and_draws(toy, tmp_path, monkeypatch, capsys):
    sheet = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", f"cityscapes.py --data {toy} --check --sheet {sheet}".split())
    cityscapes.main()
    assert "train: 8 images\nval: 5 images\ntest: 2 images\n" in capsys.readouterr().out
    assert Image.open(sheet).width == 4 * 480
    monkeypatch.setattr(sys, "argv", f"cityscapes.py --data {toy} --sheet {tmp_path}".split())
    with pytest.raises(OSError, match=str(tmp_path)):
        cityscapes.main()


def test_a_wrong_folder_is_named(tmp_path, toy):
    for folder in (tmp_path / "nowhere", toy.parent, toy / "leftImg8bit"):
        with pytest.raises(DataError, match=f"no files {folder}/leftImg8bit/train/.*--data"):
            Cityscapes(folder, "train")
