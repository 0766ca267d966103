"""Scores against mmsegmentation's numbers and the official rules, protocols against their
definitions, and the script itself."""
import json
import math
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MMSEG, run_differently, run_script
from fill import fill_state_dict
from PIL import Image
from toy_cityscapes import draw_cityscapes

import evaluate
from cityscapes import CLASSES
from evaluate import confusion, predict, predict_averaged, scores_of, tile_starts
from pspnet import PSPNet

IDS = np.array([entry.id for entry in CLASSES])  # train id -> label id


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ResNet-18 PSPNet whose logits differ from class to class, with the weights of mmseg.pt."""
    net = PSPNet(backbone="resnet18")
    net.load_state_dict(fill_state_dict(net.state_dict()))
    path = tmp_path_factory.mktemp("net") / "r18b.pt"
    torch.save({"meta": {"CLASSES": ("road",)}, "state_dict": net.state_dict()}, path)
    return path


@pytest.fixture(scope="module", autouse=True)
def runs(beside, toy, checkpoint, tmp_path_factory):
    """What runs beside the tests of this file, future by name, and the folder it writes to."""
    folder = tmp_path_factory.mktemp("runs")
    torch.save({"state_dict": PSPNet(19, "resnet18").state_dict()}, folder / "other.pt")
    command, others = f"evaluate.py --data {toy} --ckpt", f"{folder}/other.pt --flip"
    return SimpleNamespace(
        folder=folder, different=beside(run_differently, command, [checkpoint, others], folder),
        two=beside(run_script, f"{command} {checkpoint} --json {folder}/scores.json", 2))


@pytest.mark.parametrize("case", MMSEG["metric"])
def test_confusion_and_scores_equal_mmsegmentations(case):
    recorded = MMSEG["metric"][case]
    pairs = zip(recorded["labels"], recorded["preds"], strict=True)
    matrix = sum(confusion(label, prediction, 19) for label, prediction in pairs)[:19]
    assert torch.equal(matrix, recorded["exact"]["conf"])
    scores = scores_of(matrix, CLASSES)
    for theirs, tolerance in ((recorded["exact"], 1e-12), (recorded["mmseg"], 1e-6)):
        for name, ours in (("mIoU", "miou"), ("mAcc", "mean_accuracy"), ("aAcc", "pixel_accuracy")):
            assert scores[ours] == pytest.approx(theirs[name], rel=0, abs=tolerance)
        for name, ours in (("IoU", "iou"), ("Acc", "accuracy")):
            values = np.array([row[ours] for row in scores["classes"]], float)  # None becomes NaN
            assert np.allclose(values, theirs[name], rtol=0, atol=tolerance, equal_nan=True)


def test_two_classes_of_one_name_are_two_rows_and_one_category_is_one():
    classes = [CLASSES[0], CLASSES[2], CLASSES[0]]
    scores = scores_of(torch.tensor([[3, 0, 1], [0, 2, 0], [2, 0, 4]]), classes)
    assert [row["name"] for row in scores["classes"]] == ["road", "building", "road"]
    assert [row["iou"] for row in scores["classes"]] == pytest.approx([3 / 6, 1, 4 / 7])
    assert scores["categories"] == [{"name": "flat", "iou": 1}, {"name": "construction", "iou": 1}]


def official_iou(truth, prediction, ids):
    """cityscapesScripts' rule for a class, or for a category with all its classes, on label ids:
    hits, over those and misses and false alarms, which are counted where the truth is of a class.
    Source: evalPixelLevelSemanticLabeling.py, getIouScoreForLabel and getIouScoreForCategory."""
    true, predicted = np.isin(truth, ids), np.isin(prediction, ids)
    hits, misses = (true & predicted).sum(), (true & ~predicted).sum()
    false_alarms = (~true & predicted & np.isin(truth, IDS)).sum()
    total = hits + misses + false_alarms
    return hits / total if total else None


def png(path):
    return np.array(Image.open(path))


def test_the_script_scores_by_the_official_rules_what_it_saves(
        toy, checkpoint, runs, tmp_path, run_here):
    """In one process, and in two, which cannot share 5 images evenly."""
    process = run_here(f"evaluate.py --ckpt {checkpoint} --data {toy} --save-ids {tmp_path}/ids "
                       f"--save-color {tmp_path}/color --json {tmp_path}/new/scores.json")
    names = evaluate.Cityscapes(toy, "val").names
    truth = np.stack([png(toy / f"gtFine/val/{name}_gtFine_labelIds.png") for name in names])
    saved = np.stack([png(tmp_path / f"ids/{name}.png") for name in names])
    assert len(list(tmp_path.glob("ids/*/*"))) == len(names)
    result = json.loads((tmp_path / "new/scores.json").read_text())
    assert (len(result["classes"]), len(result["categories"])) == (19, 7)
    for row in result["classes"] + result["categories"]:
        ids = [entry.id for entry in CLASSES if row["name"] in (entry.name, entry.category)]
        assert row["iou"] == pytest.approx(official_iou(truth, saved, ids), abs=1e-12)
    present = sum(row["iou"] is not None for row in result["classes"])
    assert 0 < present < 19  # some are absent, which the table must show
    assert f"over {present} of 19 classes" in process.stdout and "n/a" in process.stdout
    assert result["protocol"] == {"precision": "fp32", "scales": [1.0], "flip": False, "tile": None}
    assert np.sum(result["confusion_matrix"]) == np.isin(truth, IDS).sum()
    for name, ids in zip(names, saved, strict=True):
        color = png(tmp_path / f"color/{name}_color.png")
        assert all((color[ids == entry.id] == entry.color).all() for entry in CLASSES)
        image = png(toy / f"leftImg8bit/val/{name}_leftImg8bit.png")
        overlay = png(tmp_path / f"color/{name}_overlay.png")
        assert np.abs(overlay.astype(float) - (image / 2 + color / 2)).max() <= 1
    two = runs.two.result()
    assert two.returncode == 0 and two.stdout.count(" of 19 classes") == 1, two.stderr
    assert json.loads((runs.folder / "scores.json").read_text()) == result


def test_test_split_is_predicted_for_the_server_but_not_scored(toy, checkpoint, tmp_path, run_here):
    process = run_here(f"evaluate.py --ckpt {checkpoint} --data {toy} --split test --workers 0 "
                       f"--save-ids {tmp_path}/ids")
    assert "mIoU" not in process.stdout
    saved = {path.name: Image.open(path).mode for path in tmp_path.glob("ids/toytown0/*")}
    assert saved == {"toytown0_000000_000019.png": "L", "toytown0_000001_000019.png": "L"}


class SeesSinglePixels:
    """A network whose logits are read off each pixel by itself: images may be cut and mirrored."""

    arguments, sizes = {"num_classes": 19}, frozenset()

    def __call__(self, images):
        self.sizes |= {tuple(images.shape[-2:])}
        return -(images[:, :1].float() / 13 - torch.arange(19).view(-1, 1, 1)).abs(), None


@pytest.mark.parametrize(("length", "tile"), [
    (10, 10), (11, 10), (1024, 713), (2048, 713), (100, 3), (7, 2), (5, 1)])
def test_tiles_cover_every_pixel_and_overlap_by_a_third(length, tile):
    starts = tile_starts(length, tile)
    assert set().union(*(range(start, start + tile) for start in starts)) == set(range(length))
    assert len(set(starts)) == len(starts)
    assert all(b - a <= math.ceil(tile * 2 / 3) for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize("options", [
    {"tile": (24, 40)}, {"flip": True}, {"tile": (24, 40), "flip": True}, {"tile": (500, 500)}])
def test_a_network_that_only_sees_single_pixels_is_reproduced_exactly(options):
    net, image = SeesSinglePixels(), torch.randint(250, (3, 65, 97), dtype=torch.uint8)
    prediction = predict_averaged(net, image, **options)
    height, width = options.get("tile", (65, 97))
    assert net.sizes == {(min(height, 65), min(width, 97))}
    assert torch.equal(prediction, predict(net, image))


def test_protocols_average_probabilities_as_they_are_defined(checkpoint):
    """mmsegmentation (SegTTAModel): logits at the scaled size, mirrored back, resized to the image,
    softmax, mean. In float64, where no two sums tie."""
    net, total = evaluate.load_net(checkpoint).double(), 0
    image = torch.randint(256, (3, 48, 64), dtype=torch.uint8)
    assert torch.equal(predict(net, image), net(image[None])[0][0].argmax(0))
    with torch.no_grad():
        for scale in (0.5, 1.25):
            size = (round(48 * scale), round(64 * scale))
            scaled = F.interpolate(image[None].float(), size, mode="bilinear")
            for mirrored in (False, True):
                logits = net(scaled.flip(3) if mirrored else scaled)[0]
                logits = logits.flip(3) if mirrored else logits
                total = total + F.interpolate(logits, (48, 64), mode="bilinear").softmax(1)
    prediction = predict_averaged(net, image, scales=(0.5, 1.25), flip=True)
    assert torch.equal(prediction, total[0].argmax(0))


def test_the_script_predicts_by_the_protocol_and_names_it(toy, checkpoint, tmp_path, run_here):
    net = evaluate.load_net(checkpoint).to(memory_format=torch.channels_last)
    protocol = {"precision": "bf16", "scales": [0.5, 1.0], "flip": True, "tile": [48, 80]}
    matrix = evaluate.evaluate(net, evaluate.Cityscapes(toy, "val"), torch.device("cpu"),
                               partial(predict_averaged, **protocol), workers=0)
    process = run_here(f"evaluate.py --ckpt {checkpoint} --data {toy} --flip --tile 48 80 "
                       f"--scales 0.5 1 --workers 0 --precision bf16 --json {tmp_path}/a.json")
    assert process.stdout.endswith(f"5 images of val, {protocol}\n")
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["protocol"] == protocol
    assert result["confusion_matrix"] == matrix.tolist()


def test_values_that_are_not_finite_are_no_prediction(toy, tmp_path, checkpoint, mistake):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    photograph = next(toy.glob("leftImg8bit/val/*/*.png"))
    for name, value, precision in (("backbone.layer1.0.conv1.weight", math.nan, "fp32"),
                                   ("backbone.layer4.1.bn2.weight", math.inf, "fp32"),
                                   ("decode_head.bottleneck.bn.weight", 1e6, "fp16")):
        broken = {**state, name: torch.full_like(state[name], value)}
        torch.save({"state_dict": broken}, tmp_path / "net.pt")
        command = f"evaluate.py --ckpt {tmp_path}/net.pt --precision {precision} --workers 0 "
        mistake(f"{command} --data {toy}", "not finite")
        mistake(f"{command} --images {photograph} --save-color {tmp_path}/color", "not finite")
        assert not (tmp_path / "color").exists()


def test_label_values_that_are_no_class_are_an_error(toy, monkeypatch):
    dataset = evaluate.Cityscapes(toy, "val")
    picture, label = dataset[0]
    label.putpixel((3, 4), 254)
    monkeypatch.setattr(evaluate.Cityscapes, "__getitem__", lambda dataset, i: (picture, label))
    with pytest.raises(evaluate.DataError, match="neither one of the 19 classes nor 255"):
        evaluate.evaluate(PSPNet(19, "resnet18"), dataset, torch.device("cpu"), predict, 0)


def test_photographs_of_a_folder_are_predicted_and_broken_ones_named(checkpoint, tmp_path):
    """In a process of its own, as it prints names of another encoding, which pytest could not."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))
    photos, ids, color = (tmp_path / name for name in ("photos", "ids", "color"))
    (photos / "folder").mkdir(parents=True)
    picture.save(photos / "rgb.png")
    picture.save(photos / "photo.JPG")
    picture.convert("RGBA").save(photos / "alpha.webp", lossless=True)
    picture.save(os.fsencode(photos) + b"/stra\xdfe.png", "PNG")
    for name in ("._rgb.png", "rgb.xmp", "broken.png", os.fsdecode(b"kaputt\xfc.jpg")):
        (photos / name).write_bytes((photos / "rgb.png").read_bytes()[:500])
    process = run_script(f"evaluate.py --ckpt {checkpoint} --images {photos} {tmp_path}/none.jpg "
                         f"--save-color {color} --save-ids {ids}")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    *named, last = process.stderr.splitlines()
    assert len(named) == 4 and last == "evaluate.py: 4 files could not be read"
    for word in ("broken.png", "rgb.xmp", "kaputt\\udcfc.jpg", "none.jpg"):
        assert any(word in line for line in named), named
    names = {b"rgb.png.png", b"photo.JPG.png", b"alpha.webp.png", b"stra\xdfe.png.png"}
    assert {os.fsencode(path.name) for path in ids.iterdir()} == names
    assert len(list(color.iterdir())) == 8
    assert np.array_equal(png(ids / "rgb.png.png"), png(ids / "alpha.webp.png"))


def test_mistakes_end_with_one_sentence(toy, checkpoint, tmp_path, mistake):
    def wrong(arguments, *words):
        mistake(f"evaluate.py {arguments}", *words)

    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({"state_dict": state, "model": {"num_classes": 19, "backbone": "resnet18"},
                "classes": [entry.name for entry in reversed(CLASSES)]}, tmp_path / "other.pt")
    torch.save({"state_dict": PSPNet(11, "resnet18").state_dict()}, tmp_path / "eleven.pt")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    here = f"--ckpt {checkpoint} --data {toy}"
    wrong(f"--data {toy}", "--ckpt")
    wrong(f"--ckpt {tmp_path}/file --data {toy}", "file cannot be read")
    wrong(f"--ckpt {tmp_path}/eleven.pt --data {toy}", "11 classes", "19")
    wrong(f"--ckpt {tmp_path}/other.pt --data {toy}", "['bicycle', 'moto", "['road', 'sidewalk'")
    wrong(f"{here} --scales -1", "--scales: -1 is not a number from 0.01 on")
    wrong(f"{here} --scales nan", "nan is not a number")
    wrong(f"{here} --split test", "no labels", "--save-ids")
    wrong(f"--ckpt {checkpoint} --images {toy}", "--save-color")
    wrong(f"--ckpt {checkpoint} --images {tmp_path}/empty --save-ids {tmp_path}/x", "no files")
    wrong(f"{here} --save-ids {tmp_path}/a --save-color {tmp_path}/a/b", "--save-color must not")
    wrong(f"{here} --save-ids {tmp_path}/file/ids", "file/ids")
    wrong(f"{here} --workers 0 --json {tmp_path}", "Is a directory", str(tmp_path))
    void = draw_cityscapes(tmp_path / "void", {"val": 1}, (32, 64))
    Image.new("L", (64, 32)).save(next(void.glob("gtFine/val/*/*.png")))
    wrong(f"--ckpt {checkpoint} --data {void} --workers 0", "nothing to score")
    image = next(void.glob("leftImg8bit/val/*/*.png"))
    wrong(f"--ckpt {checkpoint} --images {image} {image.parent} --save-ids {tmp_path}/x",
          "would both be saved as")
    image.write_bytes(image.read_bytes()[:200])
    wrong(f"--ckpt {checkpoint} --data {void} --workers 1", f"cannot decode {image}")


def test_processes_that_were_given_different_things_say_what_differs(runs):
    process = runs.different.result()
    assert process.returncode != 0 and 'evaluate.py", line' not in process.stderr
    assert "evaluate.py: the processes differ in ckpt, flip: " in process.stderr


def test_each_process_has_a_gpu_of_its_own_or_none_starts(monkeypatch):
    joined = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **how: joined.append(how))
    for name, value in {"is_available": True, "device_count": 2, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "6"}.items():
        monkeypatch.setenv(name, value)
    gpu = torch.device("cuda:1")
    assert evaluate.start_process() == (gpu, 5, 6) and joined[0]["device_id"] == gpu
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(evaluate.DataError, match="more processes than GPUs.*--nproc_per_node=2"):
        evaluate.start_process()


@pytest.mark.parametrize(("processes", "workers"), [("1", 4), ("8", 2), ("32", 1)])
def test_processes_share_the_cores(monkeypatch, processes, workers):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert evaluate.share_of_cores(4) == workers
