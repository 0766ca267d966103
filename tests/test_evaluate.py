"""evaluate.py: scores and protocols against their definitions, and the script as users run it."""
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MMSEG, run_script, sentence_of
from fill import fill_state_dict, make_maps
from PIL import ExifTags, Image
from toy_cityscapes import draw_cityscapes

import evaluate
from cityscapes import CLASSES, VOID, Cityscapes, DataError, to_picture
from evaluate import confusion_matrix, predict_averaged, scores_of
from pspnet import CheckpointError, PSPNet, load_net

IDS = np.array([entry.id for entry in CLASSES])  # train id -> label id, which ascends
NOISE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 35, 53), np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A PSPNet of a ResNet-18, with weights that predict many classes."""
    net, path = PSPNet(backbone="resnet18"), tmp_path_factory.mktemp("net") / "net.pt"
    torch.save({"state_dict": fill_state_dict(net.state_dict())}, path)
    return path


def pngs(folder, pattern):
    """The PNG files that match, which are all of one size, in the order of their names."""
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob(pattern))])


def are_largest(train_ids, scores):
    """Whether the scores (C, H, W) of these classes (H, W) are the largest, but for rounding."""
    chosen = scores.gather(0, torch.as_tensor(train_ids).long()[None])[0]
    return (chosen > scores.max(dim=0).values - 1e-3).all()


@pytest.mark.parametrize("case", ["plain", "absent"])
def test_scores_equal_mmsegmentations(case):
    preds, labels = make_maps(case)
    matrix = confusion_matrix(labels, preds, num_classes=19)
    scores = scores_of(matrix, CLASSES)
    ours = {"mIoU": evaluate.mean_iou(matrix).item(), "mAcc": scores["mean_accuracy"],
            "aAcc": scores["pixel_accuracy"], "IoU": [row["iou"] for row in scores["classes"]],
            "Acc": [row["accuracy"] for row in scores["classes"]]}
    for name, value in ours.items():
        value, expected = np.array(value, float), MMSEG["scores"][case][name]  # None becomes NaN
        assert np.allclose(value, expected, rtol=0, atol=1e-6, equal_nan=True), name


def test_confusion_matrix_equals_a_loop_over_pixels_where_void_is_not_counted():
    label = torch.where(NOISE[0] < 50, VOID, NOISE[0] % 19)
    prediction = torch.where(label == VOID, NOISE[1], NOISE[1] % 19)  # any value where void
    expected = torch.zeros(19, 19, dtype=torch.int64)
    for truth, predicted in zip(label.flatten().tolist(), prediction.flatten().tolist()):
        if truth != VOID:
            expected[truth, predicted] += 1
    assert torch.equal(confusion_matrix(label, prediction, 19), expected)


@pytest.mark.parametrize(("length", "tile"), [(9, 9), (10, 9), (2048, 713), (100, 3), (5, 1)])
def test_tiles_cover_every_pixel_and_overlap_by_a_third(length, tile):
    starts = evaluate.tile_starts(length, tile)
    covered = {pixel for start in starts for pixel in range(start, start + tile)}
    assert covered == set(range(length))
    distances = [b - a for a, b in zip(starts, starts[1:])]
    assert all(0 < distance <= math.ceil(tile * 2 / 3) for distance in distances)


@pytest.mark.parametrize(("options", "size"), [({"flip": True}, (35, 53)),
    ({"tile": (500, 40)}, (35, 40)), ({"tile": (24, 40), "flip": True}, (24, 40))])
def test_a_network_that_only_sees_single_pixels_is_reproduced_exactly(options, size):
    def net(images):  # its logits are red, green and blue
        assert images.shape[2:] == size
        return images.float(), None

    net.arguments = {"num_classes": 3}
    assert torch.equal(predict_averaged(net, NOISE, **options), NOISE.argmax(0))
    images = NOISE[None].float()
    assert torch.allclose(evaluate.tiled_probabilities(net, images, size), images.softmax(dim=1))


def test_scales_and_flip_average_as_mmsegmentation_does(checkpoint):
    """Its SegTTAModel: logits at the scaled size, mirrored back, resized, softmax, mean."""
    net, probabilities = load_net(checkpoint), 0
    for size in ((18, 26), (44, 66)):  # 0.5 and 1.25 times 35x53
        scaled = F.interpolate(NOISE[None].float(), size, mode="bilinear")
        for axes in ([], [3]):
            logits = F.interpolate(net(scaled.flip(axes))[0].flip(axes), (35, 53), mode="bilinear")
            probabilities = probabilities + logits[0].softmax(0) / 4
    assert are_largest(predict_averaged(net, NOISE, scales=(0.5, 1.25), flip=True), probabilities)


@pytest.mark.parametrize(("value", "precision"), [(math.nan, "fp32"), (1e6, "fp16")])
def test_values_that_are_not_finite_are_no_prediction(checkpoint, value, precision):
    net = load_net(checkpoint)
    net.decode_head.bottleneck.bn.weight.data.fill_(value)
    for predict in (evaluate.predict, predict_averaged):
        with pytest.raises(FloatingPointError, match="not finite"):
            predict(net, NOISE, precision)


@pytest.fixture(scope="module")
def two(toy, checkpoint, tmp_path_factory):
    """Two processes score val by a protocol: .folder and .stdout, and .scores of --json."""
    folder = tmp_path_factory.mktemp("two")
    process = run_script(
        f"evaluate.py --data {toy} --ckpt {checkpoint} --workers 1 --save-ids {folder}/ids "
        f"--save-color {folder}/color --json {folder}/new/scores.json "
        "--precision bf16 --scales 0.5 1 --flip --tile 64 80", processes=2)
    assert process.returncode == 0, process.stderr
    scores = json.loads((folder / "new/scores.json").read_text())
    return SimpleNamespace(folder=folder, stdout=process.stdout, scores=scores)


def test_two_processes_score_by_the_official_rules_what_they_save(toy, two):
    """Those of cityscapesScripts (getIouScoreForLabel, getIouScoreForCategory): hits, over those
    and misses and false alarms where the truth is of an evaluated class."""
    truth, ids = pngs(toy, "gtFine/val/*/*_labelIds.png"), pngs(two.folder, "ids/*/*_ids.png")
    ious = []
    for row in two.scores["classes"] + two.scores["categories"]:
        group = [entry.id for entry in CLASSES if row["name"] in (entry.name, entry.category)]
        true, predicted = np.isin(truth, group), np.isin(ids, group)
        total = (np.isin(truth, IDS) & (true | predicted)).sum()
        ious.append((true & predicted).sum() / total if total else None)
        assert row["iou"] == pytest.approx(ious[-1], abs=1e-12), row
    assert len(ious) == 19 + 7
    mean = np.mean([iou for iou in ious[19:] if iou is not None])
    assert two.scores["category_miou"] == pytest.approx(mean, abs=1e-12)
    assert two.stdout.count(f"mIoU {100 * two.scores['miou']:.2f} %") == 1  # one process prints
    color, overlay = (pngs(two.folder, f"color/*/*_{kind}.png") for kind in ("color", "overlay"))
    assert all((color[ids == entry.id] == entry.color).all() for entry in CLASSES)
    assert abs(overlay - (pngs(toy, "leftImg8bit/val/*/*") / 2 + color / 2)).max() <= 1


def test_two_processes_count_what_one_counts_by_the_protocol_that_they_name(toy, checkpoint, two):
    protocol = {"precision": "bf16", "scales": [0.5, 1.0], "flip": True, "tile": [64, 80]}
    net = load_net(checkpoint).to(memory_format=torch.channels_last)
    matrix = evaluate.evaluate(net, Cityscapes(toy, "val"), torch.device("cpu"), workers=0,
                               predict_image=lambda *pair: predict_averaged(*pair, **protocol))
    expected = {"images": 5, "protocol": protocol, "confusion_matrix": matrix.tolist()}
    assert two.scores == two.scores | expected | scores_of(matrix, CLASSES)


def test_the_test_split_is_predicted_but_not_scored(toy, checkpoint, tmp_path, capsys):
    evaluate.main(f"--ckpt {checkpoint} --data {toy} --split test --workers 0 "
                  f"--save-ids {tmp_path}".split())
    assert "mIoU" not in capsys.readouterr().out
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")) == [
        "toytown0/toytown0_000000_000019_ids.png", "toytown0/toytown0_000001_000019_ids.png"]
    assert len(np.unique(pngs(tmp_path, "*/*"))) > 2  # and not void, as the labels are


def test_what_cannot_be_scored_is_told(checkpoint, tmp_path, capsys, monkeypatch):
    draw_cityscapes(tmp_path, {"val": 1}, (32, 64))
    label, = tmp_path.glob("gtFine/val/*/*")
    command = f"--ckpt {checkpoint} --data {tmp_path} --workers 0".split()
    Image.new("L", (64, 32), 7).save(label)  # all is road
    evaluate.main(command)
    assert "a mask of 0 and 255" in capsys.readouterr().err
    monkeypatch.setattr(Cityscapes, "__len__", lambda dataset: 0)
    with pytest.raises(DataError, match="nothing to score"):
        evaluate.main(command)


class Named(list):  # as much of a data set as names_of needs
    name = list.__getitem__


def test_names_are_relative_paths_and_no_two_are_one_file(tmp_path):
    assert evaluate.names_of(Named([Path("town/a"), 7])) == [Path("town/a"), Path("7")]
    for wrong in (["/a"], [".."], ["../a"], ["a/../../b"], [""], ["."],
                  ["a", "./a"], [Path("a"), "a"], [7, "7"]):
        with pytest.raises(DataError, match="must be relative paths without .., and no two the sa"):
            evaluate.names_of(Named(wrong))
    (tmp_path / "a.jpg").touch()
    assert list(evaluate.photographs([str(tmp_path), f"{tmp_path}/a.jpg"])) == ["a.jpg"]
    with pytest.raises(DataError, match="would both be saved as a.jpg_ids.png"):
        evaluate.photographs([str(tmp_path), "elsewhere/a.jpg"])


@pytest.mark.parametrize(("num_classes", "names"), [(11, None), (19, ["bicycle"] * 19)])
def test_a_checkpoint_of_other_classes_is_refused(toy, tmp_path, num_classes, names):
    net = PSPNet(num_classes, "resnet18")
    content = {"state_dict": net.state_dict(), "model": net.arguments, "classes": names}
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=f"for {num_classes} classes.*the data set has"):
        evaluate.main(f"--ckpt {tmp_path}/other.pt --data {toy}".split())


def test_photographs_of_a_folder_are_predicted_and_broken_ones_named(checkpoint, tmp_path):
    photos, picture = tmp_path / "photos", to_picture(NOISE)
    photos.mkdir()
    picture.save(photos / "rgb.png", exif=b"no EXIF data")
    picture.convert("RGBA").save(photos / "alpha.webp", lossless=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # The camera was turned: upright it is 33 x 90.
    picture.resize((90, 33)).save(photos / "turned.JPG", exif=exif)
    picture.save(photos / os.fsdecode(b"stra\xdfe"), "PNG")  # Latin-1, not UTF-8
    (photos / "._rgb.png").write_bytes(b"hidden: a Mac's shadow of the file")
    (photos / "broken.png").write_bytes((photos / "rgb.png").read_bytes()[:500])
    (photos / os.fsdecode(b"kaputt\xfc.jpg")).write_text("not an image")
    process = run_script(f"evaluate.py --ckpt {checkpoint} --images {photos} {tmp_path}/missing.jpg"
                         f" --save-ids {tmp_path}/ids --save-color {tmp_path}/color")
    assert sentence_of(process) == "evaluate.py: 3 files could not be read"
    assert re.findall(r"cannot decode \S*/(\S+)", process.stderr) == [
        "broken.png", "kaputt\\udcfc.jpg", "missing.jpg"]
    assert len(list(tmp_path.glob("color/*"))) == 8
    ids = {os.fsencode(path.name): np.array(Image.open(path)) for path in tmp_path.glob("ids/*")}
    assert ids.pop(b"turned.JPG_ids.png").shape == (90, 33)
    assert sorted(ids) == [b"alpha.webp_ids.png", b"rgb.png_ids.png", b"stra\xdfe_ids.png"]
    logits, _ = load_net(checkpoint)(NOISE[None])
    assert all(are_largest(np.searchsorted(IDS, pixels), logits[0]) for pixels in ids.values())


def test_results_of_an_earlier_call_are_not_predicted_again(checkpoint, tmp_path):
    to_picture(NOISE).save(tmp_path / "a.png")
    to_picture(NOISE).save(tmp_path / "autumn_color.png")  # no result, only called like one
    for _ in range(2):
        evaluate.main(f"--ckpt {checkpoint} --images {tmp_path} --save-ids {tmp_path} "
                      f"--save-color {tmp_path}".split())
        assert sorted(path.name for path in tmp_path.glob("*_overlay.png")) == [
            "a.png_overlay.png", "autumn_color.png_overlay.png"]


def test_only_torchrun_makes_several_processes_and_not_leftover_variables(monkeypatch):
    left = {"MASTER_ADDR": "localhost", "RANK": "1", "WORLD_SIZE": "4"}
    for environment, expected in (({}, (0, 1)), (left, (0, 1)), ({"WORLD_SIZE": ""}, (0, 1)),
                                  ({**left, "TORCHELASTIC_RUN_ID": "none"}, (1, 4))):
        monkeypatch.setattr(os, "environ", environment)
        assert evaluate.rank_and_world() == expected


def test_each_process_has_a_gpu_of_its_own_or_none_starts(monkeypatch):
    monkeypatch.setattr(torch, "cuda", Mock(device_count=lambda: 2))
    monkeypatch.setattr(evaluate, "dist", Mock())
    monkeypatch.setattr(evaluate, "rank_and_world", lambda: (5, 6))
    monkeypatch.setenv("LOCAL_RANK", "1")
    gpu = torch.device("cuda", 1)
    assert evaluate.start_process() == (gpu, 5, 6)
    torch.cuda.set_device.assert_called_once_with(gpu)
    assert evaluate.dist.init_process_group.call_args.kwargs["device_id"] == gpu
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DataError, match="more processes than GPUs.*--nproc_per_node=2"):
        evaluate.start_process()
    monkeypatch.setattr(evaluate, "rank_and_world", lambda: (0, 1))  # LOCAL_RANK is left over.
    assert evaluate.start_process() == (torch.device("cuda", 0), 0, 1)


def test_processes_share_the_cores(monkeypatch):
    for cores, processes, workers in ((16, "", 4), (16, "8", 2), (2, "1", 2), (2, "4", 1)):
        monkeypatch.setattr(os, "cpu_count", Mock(return_value=cores))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert evaluate.share_of_cores(4) == workers
