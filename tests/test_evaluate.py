"""Scores and protocols against their definitions, and the script itself."""
import json
import math
import os
import re
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
from cityscapes import CLASSES, Cityscapes, to_picture
from evaluate import confusion, predict_averaged, scores_of, tile_starts
from pspnet import PSPNet, load_net

IDS = np.array([entry.id for entry in CLASSES])  # train id -> label id
NOISE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 35, 53), np.uint8))
PROTOCOL = {"precision": "bf16", "scales": [0.5, 1.0], "flip": True, "tile": [64, 80]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ResNet-18 PSPNet whose logits differ from class to class, with the weights of mmseg.pt."""
    net = PSPNet(backbone="resnet18")
    net.load_state_dict(fill_state_dict(net.state_dict()))
    path = tmp_path_factory.mktemp("net") / "r18b.pt"
    torch.save({"state_dict": net.state_dict()}, path)
    return path


@pytest.fixture(scope="module", autouse=True)
def runs(beside, toy, checkpoint, tmp_path_factory):
    """What runs beside the tests of this file, future by name, and the folder it writes to."""
    folder = tmp_path_factory.mktemp("runs")
    photos, picture = tmp_path_factory.mktemp("photos"), to_picture(NOISE)
    picture.save(photos / "rgb.png")
    picture.resize((33, 90)).save(photos / "photo.JPG")
    picture.convert("RGBA").save(photos / "alpha.webp", lossless=True)
    picture.save(os.fsencode(photos) + b"/stra\xdfe.png", "PNG")
    (photos / "._rgb.png").write_bytes(b"a Mac's shadow of the file")
    (photos / "broken.png").write_bytes((photos / "rgb.png").read_bytes()[:500])
    (photos / os.fsdecode(b"kaputt\xfc.jpg")).write_text("not an image")
    torch.save({"state_dict": PSPNet(backbone="resnet18").state_dict()}, folder / "other.pt")
    command = f"evaluate.py --data {toy} --workers 0 --ckpt {checkpoint}"
    two = (f"{command} --precision bf16 --scales 0.5 1 --flip --tile 64 80 --save-ids {folder}/ids "
           f"--save-color {folder}/color --json {folder}/new/scores.json")
    photographs = (f"{command} --images {photos} {folder}/missing.jpg --save-ids {folder}/photo-ids"
                   f" --save-color {folder}/photo-color")  # it prints names which pytest could not
    differing = ["", f"--flip --ckpt {folder}/other.pt"]
    return SimpleNamespace(
        folder=folder, two=beside(run_script, two, 2), photographs=beside(run_script, photographs),
        different=beside(run_differently, command, differing, folder))


def pngs(folder, pattern):
    """The PNG files that match, which are all of one size, in the order of their names."""
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob(pattern))])


@pytest.mark.parametrize("case", MMSEG["metric"])
def test_scores_equal_mmsegmentations(case):
    recorded = MMSEG["metric"][case]
    pairs = zip(recorded["labels"], recorded["preds"], strict=True)
    matrix = sum(confusion(label, prediction, 19) for label, prediction in pairs)[:19]
    assert torch.equal(matrix, recorded["exact"]["conf"])
    scores = scores_of(matrix, CLASSES)
    ours = {"mIoU": scores["miou"], "mAcc": scores["mean_accuracy"],
            "aAcc": scores["pixel_accuracy"], "IoU": [row["iou"] for row in scores["classes"]],
            "Acc": [row["accuracy"] for row in scores["classes"]]}
    for name, values in ours.items():
        values = np.array(values, float)  # None becomes NaN
        assert np.allclose(values, recorded["mmseg"][name], rtol=0, atol=1e-6, equal_nan=True)


def test_confusion_equals_a_double_loop():
    label, prediction = NOISE[0], NOISE[1] % 19
    expected = np.zeros((256, 19), int)
    for y, x in np.ndindex(35, 53):
        expected[label[y, x], prediction[y, x]] += 1
    assert np.array_equal(confusion(label, prediction, 19), expected)


def test_two_classes_of_one_name_are_two_rows_and_one_category_is_one():
    classes = [CLASSES[8], CLASSES[2], CLASSES[8]]
    scores = scores_of(torch.tensor([[3, 0, 1], [0, 2, 0], [2, 0, 4]]), classes)
    rows = [(row["name"], row["iou"]) for row in scores["classes"] + scores["categories"]]
    assert rows == [("vegetation", 3 / 6), ("building", 1), ("vegetation", 4 / 7),
                    ("nature", 1), ("construction", 1)]


@pytest.mark.parametrize(("length", "tile"), [
    (10, 10), (11, 10), (1024, 713), (2048, 713), (100, 3), (7, 2), (5, 1)])
def test_tiles_cover_every_pixel_and_overlap_by_a_third(length, tile):
    starts = tile_starts(length, tile)
    assert set().union(*(range(start, start + tile) for start in starts)) == set(range(length))
    assert len(set(starts)) == len(starts)
    assert all(b - a <= math.ceil(tile * 2 / 3) for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize(("options", "size"), [
    ({"flip": True}, (35, 53)), ({"tile": (500, 40)}, (35, 40)),
    ({"tile": (24, 40), "flip": True}, (24, 40))])
def test_a_network_that_only_sees_single_pixels_is_reproduced_exactly(options, size):
    def net(images):  # its logits are red, green and blue
        assert images.shape[2:] == size
        return images.float(), None

    net.arguments = {"num_classes": 3}
    assert torch.equal(predict_averaged(net, NOISE, **options), NOISE.argmax(0))


def test_protocols_average_probabilities_as_they_are_defined(checkpoint):
    """mmsegmentation (SegTTAModel): logits at the scaled size, mirrored back, resized to the image,
    softmax, mean."""
    net, total = load_net(checkpoint), 0
    for scale in (0.5, 1.25):
        size = (round(35 * scale), round(53 * scale))
        scaled = F.interpolate(NOISE[None].float(), size, mode="bilinear")
        for axes in ([], [3]):
            logits = net(scaled.flip(axes))[0].flip(axes)
            total = total + F.interpolate(logits, (35, 53), mode="bilinear").softmax(1)
    prediction = predict_averaged(net, NOISE, scales=(0.5, 1.25), flip=True)
    assert torch.equal(prediction, total[0].argmax(0))


def test_label_values_that_are_no_class_are_an_error(toy):
    val_set = Cityscapes(toy, "val")
    val_set.classes = CLASSES[:13]  # and not 13, car
    with pytest.raises(evaluate.DataError, match="neither one of the 13 classes nor 255"):
        evaluate.evaluate(torch.nn.Identity(), val_set, "cpu", lambda _, image: image[0] % 13, 0)


def test_test_split_is_predicted_for_the_server_but_not_scored(toy, checkpoint, tmp_path, run_here):
    process = run_here(f"evaluate.py --ckpt {checkpoint} --data {toy} --split test --workers 0 "
                       f"--save-ids {tmp_path}")
    assert "mIoU" not in process.stdout
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")) == [
        f"toytown0/toytown0_00000{i}_000019.png" for i in range(2)]
    images = torch.from_numpy(pngs(toy, "leftImg8bit/test/*/*")).permute(0, 3, 1, 2)
    logits, _ = load_net(checkpoint)(images)
    assert (pngs(tmp_path, "*/*") == IDS[logits.argmax(1)]).mean() > 0.999  # sums in other orders


def official_iou(truth, prediction, ids):
    """cityscapesScripts' rule (getIouScoreForLabel, getIouScoreForCategory): hits, over those and
    misses and false alarms where the truth is of an evaluated class."""
    true, predicted = np.isin(truth, ids), np.isin(prediction, ids)
    total = (np.isin(truth, IDS) & (true | predicted)).sum()
    return (true & predicted).sum() / total if total else None


def test_script_scores_by_the_official_rules_what_it_saves(toy, runs):
    process, folder = runs.two.result(), runs.folder
    assert process.returncode == 0, process.stderr
    truth, image = pngs(toy, "gtFine/val/*/*_labelIds.png"), pngs(toy, "leftImg8bit/val/*/*")
    ids, color = pngs(folder, "ids/*/*"), pngs(folder, "color/*/*_color.png")
    result = json.loads((folder / "new/scores.json").read_text())
    rows = result["classes"] + result["categories"]
    for row in rows:
        group = [entry.id for entry in CLASSES if row["name"] in (entry.name, entry.category)]
        assert row["iou"] == pytest.approx(official_iou(truth, ids, group), abs=1e-12)
    assert len(rows) == 19 + 7
    assert process.stdout.count(" of 19 classes") == 1 and "n/a" in process.stdout
    assert all((color[ids == entry.id] == entry.color).all() for entry in CLASSES)
    overlay = pngs(folder, "color/*/*_overlay.png")
    assert np.abs(overlay.astype(float) - (image / 2 + color / 2)).max() <= 1


def test_two_processes_give_the_scores_of_one_by_the_protocol_that_they_name(toy, checkpoint, runs):
    net = load_net(checkpoint).to(memory_format=torch.channels_last)
    matrix = evaluate.evaluate(net, Cityscapes(toy, "val"), torch.device("cpu"),
                               lambda net, image: predict_averaged(net, image, **PROTOCOL), 0)
    runs.two.result()
    result = json.loads((runs.folder / "new/scores.json").read_text())
    assert result["protocol"] == PROTOCOL and result["confusion_matrix"] == matrix.tolist()
    assert result | scores_of(matrix, CLASSES) == result


def test_photographs_of_a_folder_are_predicted_and_broken_ones_named(runs):
    process, ids = runs.photographs.result(), runs.folder / "photo-ids"
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "evaluate.py: 3 files could not be read" in process.stderr
    assert re.findall(r"cannot decode \S*/(\S+)", process.stderr) == [
        "broken.png", "kaputt\\udcfc.jpg", "missing.jpg"]
    sizes = {os.fsencode(path.stem): Image.open(path).size for path in ids.iterdir()}
    assert sizes == {b"rgb.png": (53, 35), b"photo.JPG": (33, 90), b"alpha.webp": (53, 35),
                     b"stra\xdfe.png": (53, 35)}
    assert len(list((runs.folder / "photo-color").iterdir())) == 8
    assert np.array_equal(pngs(ids, "rgb*"), pngs(ids, "alpha*"))


def test_values_that_are_not_finite_are_no_prediction(toy, tmp_path, checkpoint, mistake):
    for value, precision in ((math.nan, "fp32"), (math.inf, "fp32"), (1e6, "fp16")):
        content = torch.load(checkpoint)
        content["state_dict"]["decode_head.bottleneck.bn.weight"].fill_(value)
        torch.save(content, tmp_path / "broken.pt")
        for pictures in (f"--data {toy}", f"--images {toy}/leftImg8bit/val/toytown0"):
            mistake(f"evaluate.py --ckpt {tmp_path}/broken.pt --precision {precision} --workers 0 "
                    f"{pictures} --save-ids {tmp_path}/ids", "not finite")
    assert not (tmp_path / "ids").exists()


def test_mistakes_end_with_one_sentence(toy, checkpoint, tmp_path, mistake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = draw_cityscapes("data/cityscapes", {"val": 1}, (32, 64))  # the default of --data
    image = next(data.glob("leftImg8bit/val/*/*"))
    torch.save(torch.load(checkpoint) | {"classes": ["bicycle"] * 19}, "other.pt")
    torch.save({"state_dict": PSPNet(11, "resnet18").state_dict()}, "eleven.pt")
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:100000])
    command = f"evaluate.py --workers 0 --ckpt {checkpoint}"
    mistake("evaluate.py", "--ckpt")
    for arguments, *words in (
            ("--ckpt cut.pt", "cut.pt", "cannot be read"), ("--ckpt eleven.pt", "11"),
            ("--ckpt other.pt", "bicycle"), ("--data nowhere", "no images", "--data"),
            ("--scales -1", "--scales: -1 is not a number from 0.01 on"),
            ("--scales nan", "nan is not a number"), ("--workers -1", "--workers"),
            ("--split test", "no labels", "--save-ids"), (f"--images {toy}", "--save-color"),
            (f"--images {toy} --save-ids x", "no files"),
            (f"--images {image} {image.parent} --save-ids x", "would both be saved as"),
            ("--save-ids a --save-color a/b", "--save-color must not"),
            ("--save-ids cut.pt/ids", "cut.pt/ids"), ("--json cut.pt/scores.json", "cut.pt"),
            ("--json .", "Is a directory")):
        mistake(f"{command} {arguments}", *words)
    Image.new("L", (64, 32)).save(next(data.glob("gtFine/val/*/*")))
    mistake(command, "nothing to score")
    image.write_bytes(image.read_bytes()[:200])
    mistake(f"{command} --workers 1", f"cannot decode {image}")


def test_processes_that_were_given_different_things_say_what_differs(runs):
    process = runs.different.result()
    assert process.returncode != 0 and 'evaluate.py", line' not in process.stderr
    assert "evaluate.py: the processes differ in ckpt, flip: " in process.stderr


def test_each_process_has_a_gpu_of_its_own_or_none_starts(monkeypatch):
    used, environment = [], {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "6"}
    monkeypatch.setattr("os.environ", environment)
    monkeypatch.setattr("torch.cuda", SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, set_device=used.append))
    monkeypatch.setattr("torch.distributed.init_process_group",
                        lambda device_id, timeout: used.append(device_id))
    evaluate.start_process()
    assert used == [torch.device("cuda:1")] * 2
    environment["LOCAL_RANK"] = "2"
    with pytest.raises(evaluate.DataError, match="more processes than GPUs.*--nproc_per_node=2"):
        evaluate.start_process()


def test_processes_share_the_cores(monkeypatch):
    for cores, processes, workers in ((16, 1, 4), (16, 8, 2), (2, 1, 2), (2, 4, 1)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert evaluate.share_of_cores(4) == workers
