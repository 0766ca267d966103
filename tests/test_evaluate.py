"""Scores against mmsegmentation's numbers and the official rules, protocols against their
definitions, and the script itself."""
import json
import math
import os
from collections import Counter, namedtuple
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
from cityscapes import CLASSES, VOID
from evaluate import confusion, predict, predict_averaged, scores_of, tile_starts
from pspnet import PSPNet

IDS = np.array([entry.id for entry in CLASSES])  # train id -> label id


@pytest.fixture(scope="session")
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
    command = f"evaluate.py --data {toy} --workers 0 --ckpt "
    two = beside(run_script, f"{command} {checkpoint} --json {folder}/scores.json", 2)
    return SimpleNamespace(
        folder=folder, two=two, different=beside(evaluate_differently, command, checkpoint, folder),
        photographs=beside(predict_photographs, checkpoint, folder))


def evaluate_differently(command, checkpoint, folder):
    """Two processes, of which the second is given another checkpoint and another protocol."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    state["decode_head.conv_seg.bias"] += 1
    torch.save({"state_dict": state}, folder / "other.pt")
    return run_differently(command, [checkpoint, f"{folder}/other.pt --flip"], folder)


def predict_photographs(checkpoint, folder):
    """Predict a folder of photographs among other files; in a process of its own because it prints
    names of another encoding, which pytest could not."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))
    photos = folder / "photos"
    (photos / "folder").mkdir(parents=True)
    picture.save(photos / "rgb.png")
    picture.resize((33, 90)).save(photos / "photo.JPG")
    picture.convert("RGBA").save(photos / "alpha.webp", lossless=True)
    picture.save(os.fsencode(photos) + b"/stra\xdfe.png", "PNG")
    (photos / "._rgb.png").write_bytes(b"a Mac's shadow of the file")
    (photos / "rgb.xmp").write_text("what a program noted beside the photograph")
    (photos / "broken.png").write_bytes((photos / "rgb.png").read_bytes()[:500])
    (photos / os.fsdecode(b"kaputt\xfc.jpg")).write_text("not an image")
    return run_script(f"evaluate.py --ckpt {checkpoint} --images {photos} {folder}/missing.jpg "
                      f"--save-color {folder}/color --save-ids {folder}/ids --workers 1")


# Scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MMSEG["metric"])
def test_scores_equal_mmsegmentations(case):
    recorded = MMSEG["metric"][case]
    pairs = zip(recorded["labels"], recorded["preds"], strict=True)
    matrix = sum(confusion(label, prediction, 19) for label, prediction in pairs)[:19]
    assert torch.equal(matrix, recorded["exact"]["conf"])
    scores = scores_of(matrix, CLASSES)
    for name, ours in (("IoU", "iou"), ("Acc", "accuracy")):
        values = [math.nan if row[ours] is None else row[ours] for row in scores["classes"]]
        for theirs, tolerance in ((recorded["exact"], 1e-12), (recorded["mmseg"], 1e-6)):
            assert np.allclose(values, theirs[name], rtol=0, atol=tolerance, equal_nan=True)
    for name, ours in (("mIoU", "miou"), ("mAcc", "mean_accuracy"), ("aAcc", "pixel_accuracy")):
        assert abs(scores[ours] - recorded["exact"][name]) < 1e-12
        assert abs(scores[ours] - recorded["mmseg"][name]) < 1e-6


def test_confusion_equals_a_double_loop():
    rng = np.random.default_rng(0)
    label = rng.choice([*range(19), VOID], (20, 30)).astype(np.uint8)
    prediction = rng.integers(0, 19, (20, 30)).astype(np.uint8)
    expected = torch.zeros(256, 19, dtype=torch.int64)
    for y in range(20):
        for x in range(30):
            expected[label[y, x], prediction[y, x]] += 1
    assert torch.equal(confusion(torch.from_numpy(label), torch.from_numpy(prediction), 19),
                       expected)


def test_two_classes_of_one_name_are_two_rows_and_one_category_is_one():
    Entry = namedtuple("Entry", "name category")
    classes = [Entry("other", "nature"), Entry("house", "building"), Entry("other", "nature")]
    scores = scores_of(torch.tensor([[3, 0, 1], [0, 2, 0], [2, 0, 4]]), classes)
    assert [row["name"] for row in scores["classes"]] == ["other", "house", "other"]
    assert [row["iou"] for row in scores["classes"]] == pytest.approx([3 / 6, 1, 4 / 7])
    assert scores["categories"] == [{"name": "nature", "iou": 1}, {"name": "building", "iou": 1}]


def official_scores(pairs):
    """cityscapesScripts' rules in Python integers, on pairs of label id maps (truth, prediction):
    name -> IoU or None.

    IoU of a class: its hits, over those and its misses and its false alarms where the truth is of
    an evaluated class. Of a category: the same with all its evaluated classes as one.
    (evalPixelLevelSemanticLabeling.py, getIouScoreFor...)"""
    counts = Counter()
    for truth, prediction in pairs:
        counts.update(zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True))
    groups = {entry.name: {entry.id} for entry in CLASSES}
    for entry in CLASSES:
        groups.setdefault("category " + entry.category, set()).add(entry.id)
    everything = {entry.id for entry in CLASSES}
    scores = {}
    for name, ids in groups.items():
        hits = sum(n for (t, p), n in counts.items() if t in ids and p in ids)
        misses = sum(n for (t, p), n in counts.items() if t in ids and p not in ids)
        false_alarms = sum(n for (t, p), n in counts.items() if t in everything - ids and p in ids)
        total = hits + misses + false_alarms
        scores[name] = hits / total if total else None
    return scores


def png(path):
    return np.array(Image.open(path))


def test_script_scores_by_the_official_rules_what_it_saves(toy, checkpoint, tmp_path, run_here):
    process = run_here(f"evaluate.py --ckpt {checkpoint} --data {toy} --save-ids {tmp_path}/ids "
                       f"--save-color {tmp_path}/color --json {tmp_path}/new/scores.json")
    truths = {path.parent.name + "/" + path.name.replace("_gtFine_labelIds.png", ""): png(path)
              for path in toy.glob("gtFine/val/*/*_labelIds.png")}
    saved = {str(path.relative_to(tmp_path / "ids"))[:-4]: png(path)
             for path in tmp_path.glob("ids/*/*")}
    assert sorted(saved) == sorted(truths)
    official = official_scores((truths[name], saved[name]) for name in truths)
    result = json.loads((tmp_path / "new/scores.json").read_text())
    rows = result["classes"] + [row | {"name": f"category {row['name']}"}
                                for row in result["categories"]]
    assert {row["name"]: row["iou"] for row in rows} == pytest.approx(official, abs=1e-12)
    present = sum(row["iou"] is not None for row in result["classes"])
    assert 0 < present < 19  # some are absent, which the table must show
    assert f"over {present} of 19 classes" in process.stdout and "n/a" in process.stdout
    assert result["protocol"] == {"precision": "fp32", "scales": [1.0], "flip": False, "tile": None}
    assert sum(map(sum, result["confusion_matrix"])) == sum(
        np.isin(truth, IDS).sum() for truth in truths.values())
    for name, ids in saved.items():
        assert ids.shape == truths[name].shape
        color = png(tmp_path / f"color/{name}_color.png")
        assert all((color[ids == entry.id] == entry.color).all() for entry in CLASSES)
        image = png(toy / f"leftImg8bit/val/{name}_leftImg8bit.png")
        overlay = png(tmp_path / f"color/{name}_overlay.png")
        assert np.abs(overlay.astype(float) - (image / 2 + color / 2)).max() <= 1


def test_several_processes_give_the_scores_of_one(toy, checkpoint, runs, tmp_path, run_here):
    """5 images, which 2 doesn't divide; the confusion matrix is among what must be identical."""
    run_here(f"evaluate.py --ckpt {checkpoint} --data {toy} --json {tmp_path}/scores.json")
    process = runs.two.result()
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(" of 19 classes") == 1
    assert json.loads((runs.folder / "scores.json").read_text()) == json.loads(
        (tmp_path / "scores.json").read_text())


def test_test_split_is_predicted_for_the_server_but_not_scored(toy, checkpoint, tmp_path, run_here):
    process = run_here(f"evaluate.py --ckpt {checkpoint} --data {toy} --split test --workers 0 "
                       f"--save-ids {tmp_path}/ids")
    assert "mIoU" not in process.stdout
    saved = sorted(tmp_path.glob("ids/*/*"))
    assert [str(path.relative_to(tmp_path)) for path in saved] == [
        f"ids/toytown0/toytown0_00000{i}_000019.png" for i in range(2)]
    assert {Image.open(path).mode for path in saved} == {"L"}


# Protocols ----------------------------------------------------------------------------------------


class ReadsPosition(torch.nn.Module):
    """A network that returns logits (19 classes) read off each pixel by itself, so that it may be
    cut and mirrored at will."""

    def __init__(self):
        super().__init__()
        self.arguments, self.sizes = {"num_classes": 19}, []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        red, green = images[:, :1].float(), images[:, 1:2].float()
        return -((red + 2 * green) / 40 - torch.arange(19).view(-1, 1, 1)).abs(), None


def position_image(height, width):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x % 256, y % 256, 0 * x]).byte()


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
    net, image = ReadsPosition(), position_image(65, 97)
    prediction = predict_averaged(net, image, **options)
    if "tile" in options:
        tile = min(65, options["tile"][0]), min(97, options["tile"][1])
        assert set(net.sizes) == {tile}
    assert torch.equal(prediction, predict(net, image))


def test_protocols_average_probabilities_as_they_are_defined(checkpoint):
    """mmsegmentation (SegTTAModel): logits at the scaled size, mirrored back, resized to the image,
    softmax, mean. In float64, where no two sums tie."""
    net, image = evaluate.load_net(checkpoint).double(), position_image(48, 64)
    total = 0
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
    val_set = evaluate.Cityscapes(toy, "val")
    net = evaluate.load_net(checkpoint).to(memory_format=torch.channels_last)
    protocol = {"precision": "bf16", "scales": [0.5, 1.0], "flip": True, "tile": [48, 80]}
    plain, averaged = (
        evaluate.evaluate(net, val_set, torch.device("cpu"), function, 0)
        for function in (predict, lambda net, image: predict_averaged(net, image, **protocol)))
    process = run_here(f"evaluate.py --ckpt {checkpoint} --data {toy} --flip --tile 48 80 "
                       f"--scales 0.5 1 --workers 0 --precision bf16 --json {tmp_path}/a.json")
    assert process.stdout.endswith(f"5 images of val, {protocol}\n")
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["protocol"] == protocol
    assert result["confusion_matrix"] == averaged.tolist() != plain.tolist()


def test_values_that_are_not_finite_are_no_prediction(toy, tmp_path, checkpoint, mistake):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    changes = {"nan": ("backbone.layer1.0.conv1.weight", math.nan, "fp32"),
               "inf": ("backbone.layer4.1.bn2.weight", math.inf, "fp32"),
               "fp16": ("decode_head.bottleneck.bn.weight", 1e6, "fp16")}
    for name, (key, value, precision) in changes.items():
        broken = {**state, key: state[key].clone()}
        broken[key].flatten()[:] = value
        torch.save({"state_dict": broken}, tmp_path / f"{name}.pt")
        command = f"evaluate.py --ckpt {tmp_path}/{name}.pt --precision {precision} --workers 0 "
        mistake(f"{command} --data {toy}", "not finite")
        photograph = next(toy.glob("leftImg8bit/val/*/*.png"))
        mistake(f"{command} --images {photograph} --save-color {tmp_path}/color", "not finite")
        assert not (tmp_path / "color").exists()


def test_label_values_that_are_no_class_are_an_error(toy, checkpoint):
    class Own(list):
        classes = CLASSES

    picture, label = evaluate.Cityscapes(toy, "val")[0]
    net = evaluate.load_net(checkpoint)
    for value in (19, 254):
        label.putpixel((3, 4), value)
        with pytest.raises(evaluate.DataError, match="neither one of the 19 classes nor 255"):
            evaluate.evaluate(net, Own([(picture, label)]), torch.device("cpu"), predict, 0)


# Photographs --------------------------------------------------------------------------------------


def test_photographs_of_a_folder_are_predicted_and_broken_ones_named(runs):
    process, ids = runs.photographs.result(), runs.folder / "ids"
    assert process.returncode == 1 and "Traceback" not in process.stderr
    named = [line for line in process.stderr.splitlines() if line.startswith("cannot decode")]
    assert len(named) == 4 and "evaluate.py: 4 files could not be read" in process.stderr
    for word in ("broken.png", "rgb.xmp", "kaputt\\udcfc.jpg", "missing.jpg"):
        assert any(word in line for line in named), named
    sizes = {os.fsencode(path.stem): Image.open(path).size for path in ids.iterdir()}
    assert sizes == {b"rgb.png": (70, 40), b"photo.JPG": (33, 90), b"alpha.webp": (70, 40),
                     b"stra\xdfe.png": (70, 40)}
    assert len(list((runs.folder / "color").iterdir())) == 8
    assert np.array_equal(png(ids / "rgb.png.png"), png(ids / "alpha.webp.png"))


# Mistakes -----------------------------------------------------------------------------------------


def test_mistakes_end_with_one_sentence(toy, checkpoint, tmp_path, mistake):
    def wrong(arguments, *words):
        mistake(f"evaluate.py {arguments}", *words)

    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({"state_dict": state, "model": {"num_classes": 19, "backbone": "resnet18"},
                "classes": [entry.name for entry in reversed(CLASSES)]}, tmp_path / "other.pt")
    torch.save({"state_dict": PSPNet(11, "resnet18").state_dict()}, tmp_path / "eleven.pt")
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:100000])
    (tmp_path / "file").touch()
    for folder in ("empty", "again"):
        (tmp_path / folder).mkdir()
    here = f"--ckpt {checkpoint} --data {toy}"
    wrong(f"--data {toy}", "--ckpt")
    wrong(f"--ckpt {tmp_path}/cut.pt --data {toy}", "cut.pt", "cannot be read")
    wrong(f"--ckpt {tmp_path}/eleven.pt --data {toy}", "11 classes", "19")
    wrong(f"--ckpt {tmp_path}/other.pt --data {toy}", "(['bicycle', 'motorcycle'",
          "(['road', 'sidewalk'")
    wrong(f"--ckpt {checkpoint} --data {tmp_path}/nowhere", "no images", "--data")
    wrong(f"{here} --scales -1", "--scales: -1 is not a number from 0.01 on")
    wrong(f"{here} --scales nan", "nan is not a number")
    wrong(f"{here} --workers -1", "--workers")
    wrong(f"{here} --split test", "no labels", "--save-ids")
    wrong(f"--ckpt {checkpoint} --images {toy}", "--save-color")
    wrong(f"--ckpt {checkpoint} --images {tmp_path}/empty --save-ids {tmp_path}/x", "no files")
    wrong(f"{here} --save-ids {tmp_path}/a --save-color {tmp_path}/a/b", "separate folders")
    wrong(f"{here} --save-ids {tmp_path}/file/ids", "file/ids")
    wrong(f"{here} --json {tmp_path}/file/scores.json", "file")
    wrong(f"{here} --workers 0 --json {tmp_path}", "Is a directory", str(tmp_path))
    photograph = next(toy.glob("leftImg8bit/val/*/*.png"))
    before = photograph.read_bytes()
    (tmp_path / "again" / photograph.name).write_bytes(before)
    wrong(f"--ckpt {checkpoint} --images {photograph} {tmp_path}/again --save-ids {tmp_path}/x",
          "would both be saved as")
    void = draw_cityscapes(tmp_path / "void", {"val": 1}, (32, 64))
    Image.new("L", (64, 32)).save(next(void.glob("gtFine/val/*/*.png")))
    wrong(f"--ckpt {checkpoint} --data {void} --workers 0", "nothing to score")
    image = next(void.glob("leftImg8bit/val/*/*.png"))
    image.write_bytes(before[:200])
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert evaluate.start_process() == (torch.device("cpu"), 5, 6)
    assert joined[1]["device_id"] is None


@pytest.mark.parametrize(("cores", "processes", "workers"), [
    (16, None, 4), (16, 8, 2), (2, 1, 2), (2, 4, 1)])
def test_processes_share_the_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert evaluate.share_of_cores(4) == workers
