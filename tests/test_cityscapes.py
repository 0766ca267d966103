"""The labels against the official table, the files in every disorder, and the training stream
against its definition."""
import csv

import numpy as np
import pytest
import torch
from conftest import TESTS
from PIL import ExifTags, Image
from torch.utils.data import DataLoader
from toy_cityscapes import draw_cityscapes

import cityscapes
from cityscapes import (CLASSES, TRAIN_IDS, VOID, Cityscapes, DataError, TrainingStream,
                        color_matrix, read_image, read_label)


class OneImage(list):
    """A data set of one's own."""

    classes = CLASSES


def stream_of(image, label, crop_size, seed=0):
    """Samples of one image (H, W, 3) and its train ids (H, W)."""
    pair = [Image.fromarray(np.asarray(pixels, np.uint8)) for pixels in (image, label)]
    return TrainingStream(OneImage([pair]), crop_size, seed)


def test_classes_and_train_ids_equal_the_official_table():
    with open(TESTS / "cityscapes_labels.csv") as file:
        rows = list(csv.DictReader(file))
    assert TRAIN_IDS == {int(row["id"]): int(row["trainId"]) for row in rows if row["id"] != "-1"}
    assert dict(enumerate(CLASSES)) == {
        int(row["trainId"]): (int(row["id"]), row["name"], row["category"],
                              (int(row["red"]), int(row["green"]), int(row["blue"])))
        for row in rows if row["trainId"] not in ("-1", "255")}


def test_labels_are_the_34_ids_in_one_grey_channel_and_others_are_named(tmp_path):
    ids = np.arange(34, dtype=np.uint8).reshape(2, 17)
    picture = Image.fromarray(ids)
    picture.save(tmp_path / "a.png")
    expected = [TRAIN_IDS[i] for i in range(34)]
    assert np.array(read_label(tmp_path / "a.png")).flatten().tolist() == expected
    wrong = {mode: picture.convert(mode) for mode in ("P", "RGB", "1")}
    wrong["I"] = picture.convert("I;16")
    wrong["33, 34"] = Image.fromarray(ids + 1)
    wrong["32, 255"] = Image.fromarray(ids - 1)
    for words, picture in wrong.items():
        picture.save(tmp_path / "a.png")
        with pytest.raises(DataError, match=rf"a.png .*\b{words}\b"):
            read_label(tmp_path / "a.png")


def test_images_of_8_bits_are_read_as_rgb_and_of_more_refused(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        picture = Image.fromarray(rgb).convert(mode)
        picture.save(tmp_path / "a.png")
        assert np.array_equal(read_image(tmp_path / "a.png"), picture.convert("RGB")), mode
    for mode in ("I;16", "I", "F"):
        Image.new(mode, (4, 4)).save(tmp_path / "a.tif")
        with pytest.raises(DataError, match="a.tif .*8 bits"):
            read_image(tmp_path / "a.tif")


def test_photographs_are_upright_even_where_metadata_are_broken(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn it clockwise
    exif[ExifTags.Base.XResolution] = 72.0
    sound = exif.tobytes()
    broken = sound.replace(b"\1\x1a\0\5", b"\1\x1a\0\2")  # the resolution's type: not 5 but text
    assert broken != sound
    upright = 4 * np.add.outer(np.arange(40), np.arange(24)).astype(np.uint8)
    for turns, metadata in ((1, sound), (1, broken), (0, b"Exif\0\0" + bytes(range(40)))):
        Image.fromarray(np.rot90(upright, turns)).save(tmp_path / "a.jpg", exif=metadata)
        picture = read_image(tmp_path / "a.jpg")
        assert picture.size == (24, 40) and np.allclose(picture.convert("L"), upright, atol=8)


def test_damaged_files_are_read_right_or_named(tmp_path, toy):
    """Cut anywhere, a bit flipped anywhere, bytes lost or put in: never other pixels in silence."""
    rng, damaged = np.random.default_rng(0), tmp_path / "damaged.png"
    for read, kind in ((read_image, "leftImg8bit"), (read_label, "gtFine")):
        path = next(toy.glob(f"{kind}/train/*/*"))
        whole, expected = path.read_bytes(), np.array(read(path))
        for i in rng.integers(0, len(whole), 100):
            flipped = bytes([whole[i] ^ 1 << rng.integers(8)])
            for rest in (b"", flipped + whole[i + 1:], whole[i + 3:], b"\0\1" + whole[i:]):
                damaged.write_bytes(whole[:i] + rest)
                try:
                    assert np.array_equal(read(damaged), expected)
                except DataError as error:
                    assert str(damaged) in str(error)


def test_files_are_found_among_others_and_behind_links(tmp_path):
    """Here the files of two cities have the same names, and one city is a link."""
    root = draw_cityscapes(tmp_path / "data", {"train": 2}, (16, 32), seed=1)
    for kind in ("leftImg8bit", "gtFine"):
        (root / kind / "train/toytown0").rename(tmp_path / kind)
        (root / kind / "train/zurich").symlink_to(tmp_path / kind)
    draw_cityscapes(root, {"train": 2}, (16, 32))
    images = root / "leftImg8bit/train"
    (images / "circle").symlink_to(images)
    (images / ".hidden").mkdir()
    for junk in ("notes.txt", "zurich/._a_leftImg8bit.png", ".hidden/a_leftImg8bit.png"):
        (images / junk).write_text("no image")
    dataset = Cityscapes(root, "train")
    assert [dataset.name(i) for i in range(len(dataset))] == [
        "toytown0/toytown0_000000_000019", "toytown0/toytown0_000001_000019",
        "zurich/toytown0_000000_000019", "zurich/toytown0_000001_000019"]
    for name, (picture, label) in zip(dataset.names, dataset, strict=True):
        assert np.array_equal(picture, Image.open(images / f"{name}_leftImg8bit.png"))
        ids = Image.open(root / f"gtFine/train/{name}_gtFine_labelIds.png")
        assert np.array_equal(label, np.vectorize(TRAIN_IDS.get)(ids))


def test_test_labels_are_void_and_coarse_labels_are_read(tmp_path):
    root = draw_cityscapes(tmp_path, {"test": 1, "train_extra": 1}, (16, 32))
    void, coarse = (np.array(Cityscapes(root, split)[0][1]) for split in ("test", "train_extra"))
    (path,) = root.glob("gtCoarse/train_extra/*/*")
    assert (void == VOID).all() and np.array_equal(coarse, read_label(path))


@pytest.mark.usefixtures("all_cores")
def test_samples_do_not_depend_on_workers_threads_or_what_was_read_before(toy):
    stream = TrainingStream(Cityscapes(toy, "train"), (48, 80), seed=3)
    loader = DataLoader(stream, batch_size=None, sampler=range(5, 21), num_workers=2, timeout=60)
    samples = list(enumerate(loader, 5))  # in one thread per worker; here in one per core
    for k, sample in reversed(samples):
        assert all(map(torch.equal, sample, stream[k])), k


def test_seeds_and_samples_differ_even_of_the_same_image():
    image, label = np.random.default_rng(0).integers(0, 256, (64, 128, 3)), np.zeros((64, 128))
    first, other = (stream_of(image, label, (48, 80), seed) for seed in (3, 4))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], other[0][0])


def test_every_epoch_is_another_permutation_of_all_images():
    stream = TrainingStream(range(8))
    epochs = np.reshape([stream.index(k) for k in range(160)], (20, 8))
    assert (np.sort(epochs) == range(8)).all()
    assert len(np.unique(epochs, axis=0)) == 20


def test_a_crop_is_the_bilinear_interpolation_of_the_box_that_the_recipe_draws(monkeypatch):
    """Without color changes, an image whose red is x and whose green is y, against the textbook
    formula: pixel i shows the box at (i + 1/2) box / crop, where the first pixel of the photograph
    reaches from 0 to 1; and its label is that of the pixel there. Where one class has 75 % of the
    labels another box is drawn, ten times at most."""
    monkeypatch.setattr(cityscapes, "color_matrix", lambda **_: color_matrix())
    y, x = np.mgrid[:200, :240]
    classes = np.where(x + y < 260, 0, (y + 3 * x) % 19)  # much road, and small spots
    classes[:, :60] = VOID
    stream = stream_of(np.stack([x, y, 0 * x], axis=2), classes, (48, 64))
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
        exact = np.stack(np.meshgrid(columns.clip(0.5, 239.5), rows.clip(0.5, 199.5))) - 0.5
        error = exact - image[:2].numpy()  # Pillow truncates: what is shown is up to 1 less
        assert error.min() > -0.01 and error.max() < 1.01, k
    assert 120 < flips < 180
    assert set(tries) == set(range(11))


@pytest.mark.parametrize("size", [(20, 30), (300, 31), (2, 400), (1, 1), (101, 99)])
def test_images_of_any_size_are_padded_with_the_undistorted_mean_color_and_void(size):
    stream = stream_of(np.full((*size, 3), 250), np.full(size, 5), (64, 96))
    for k in range(30):
        image, label = stream[k]
        scale = np.random.default_rng([0, 1, k]).uniform(0.5, 2.0)
        height, width = np.multiply(size, scale).round().clip(1, (64, 96)).astype(int)
        expected = torch.full((64, 96), VOID, dtype=torch.uint8)
        expected[:height, :width] = 5
        assert torch.equal(label, expected)
        assert image.shape == (3, 64, 96) and image.dtype == torch.uint8
        assert (image[:, label == VOID].T == torch.tensor([124, 116, 104])).all()


@pytest.mark.parametrize(("values", "expected"), [
    ({"brightness": 20}, lambda rgb, grey: rgb + 20),
    ({"contrast": 1.3}, lambda rgb, grey: 1.3 * rgb),
    ({"saturation": 0.6}, lambda rgb, grey: grey + 0.6 * (rgb - grey)),
    ({"hue": 60}, lambda rgb, grey: 2 * grey - rgb[[1, 2, 0]]),  # red becomes yellow
    ({"hue": 120}, lambda rgb, grey: rgb[[2, 0, 1]]),  # red becomes green becomes blue
    ({"brightness": 20, "contrast": 1.3, "saturation": 0.6, "hue": 120},
     lambda rgb, grey: 1.3 * (grey + 20 + 0.6 * (rgb - grey)[[2, 0, 1]]))])
def test_each_distortion_by_itself_and_all_in_their_order(values, expected):
    rgb, matrix = np.random.default_rng(0).uniform(0, 255, (3, 100)), color_matrix(**values)
    actual = matrix[:, :3] @ rgb + matrix[:, 3:]
    assert np.abs(actual - expected(rgb, rgb.mean(axis=0))).max() < 1e-10


def test_colors_have_the_probabilities_and_ranges_of_the_recipe_rounded_and_clipped(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3))
    stream, drawn = stream_of(image, np.zeros((64, 96)), (16, 24)), []
    samples = [stream[k][0] for k in range(600)]
    monkeypatch.setattr(cityscapes, "color_matrix",
                        lambda **values: drawn.append(values) or color_matrix())
    for k, sample in enumerate(samples):
        plain = stream[k][0].flatten(1).numpy()  # the same crop in its own colors
        matrix = color_matrix(**drawn[k])
        exact = (matrix[:, :3] @ plain + matrix[:, 3:]).clip(0, 255)
        assert np.abs(sample.flatten(1).numpy() - exact).max() < 0.501, k
    for name, low, high, neutral in (("brightness", -32, 32, 0), ("contrast", 0.5, 1.5, 1),
                                     ("saturation", 0.5, 1.5, 1), ("hue", -36, 36, 0)):
        changed = sorted(values[name] for values in drawn if values[name] != neutral)
        assert 260 < len(changed) < 340
        uniform = np.linspace(low, high, len(changed))
        assert np.abs(changed - uniform).max() < 0.1 * (high - low), name


def test_own_labels_may_have_a_palette_but_no_value_that_is_no_class():
    label = Image.new("P", (60, 40), 2)
    label.putpalette([9, 9, 9] * 256)
    dataset = OneImage([(Image.new("RGB", (60, 40)), label)])
    stream = TrainingStream(dataset, (10, 10))
    dataset.classes = CLASSES[:3]
    assert (stream[0][1] == 2).all()
    dataset.classes = CLASSES[:2]
    with pytest.raises(DataError, match="2 classes"):
        stream[0]


def test_a_wrong_folder_crop_or_sheet_is_a_sentence(tmp_path, toy, mistake):
    for folder in (tmp_path / "nowhere", toy.parent, toy / "leftImg8bit", tmp_path):
        mistake(f"cityscapes.py --data {folder}", f"no images {folder}/leftImg8bit/train/",
                "--data must be the folder")
    mistake(f"cityscapes.py --data {toy} --crop 0 3", "--crop")
    (tmp_path / "dir.png").mkdir()
    for sheet in ("dir.png", "none/samples.png"):
        mistake(f"cityscapes.py --data {toy} --crop 32 64 --sheet {tmp_path}/{sheet}", sheet)


def test_check_counts_and_draws_clean_data(toy, tmp_path, run_here):
    process = run_here(f"cityscapes.py --data {toy} --check --crop 48 80 "
                       f"--sheet {tmp_path}/sheet.png")
    for words in ("train: 8 images", "val: 5 images", "test: 2 images"):
        assert words in process.stdout
    assert Image.open(tmp_path / "sheet.png").width == 4 * 480


def test_check_lists_everything_that_is_wrong(tmp_path, run_here):
    root = draw_cityscapes(tmp_path, {"train": 3, "val": 2, "train_extra": 2}, (32, 64))
    images, labels = (sorted(root.glob(f"{kind}/train/*/*")) for kind in ("leftImg8bit", "gtFine"))
    images[0].write_bytes(b"no image")
    Image.new("L", (64, 30)).save(labels[1])
    Image.new("L", (64, 32), 40).save(labels[2])
    for single in ("gtFine/val", "leftImg8bit/train_extra"):
        next(root.glob(f"{single}/*/*_000001_*")).unlink()
    problems = run_here(f"cityscapes.py --data {root} --check", codes=(1,)).stderr.splitlines()
    for path, words in (
            (images[0], "decode"), (labels[1], "(64, 30)"), (labels[2], "[40]"),
            ("val", "toytown0/toytown0_000001"), ("train_extra", "toytown0/toytown0_000001")):
        assert any(f"{path} " in problem and words in problem for problem in problems), words
    assert "the 5 problems above must be mended" in problems[-1]
