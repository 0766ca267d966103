"""Scores against mmsegmentation's numbers and the official rules, protocols against their
definitions, and the script itself."""

import json
import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MMSEG, assert_mistake, run_script
from fill import fill_state_dict
from PIL import Image
from toy_cityscapes import draw_cityscapes

import evaluate
from cityscapes import CLASSES, LABELS, NUM_CLASSES, TRAIN_ID_TO_ID, VOID
from evaluate import confusion, predict, scores_of, tile_starts
from pspnet import PSPNet


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A ResNet-18 PSPNet whose logits differ from class to class, with the weights of mmseg.pt."""
    net = PSPNet(backbone="resnet18")
    net.load_state_dict(fill_state_dict(net.state_dict()))
    path = tmp_path_factory.mktemp("net") / "r18b.pt"
    torch.save({"meta": {"CLASSES": ("road",)}, "state_dict": net.state_dict()}, path)
    return path


# Scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MMSEG["metric"])
def test_scores_equal_mmsegmentations(case):
    recorded = MMSEG["metric"][case]
    matrix = sum(
        confusion(label, prediction)
        for label, prediction in zip(recorded["labels"], recorded["preds"], strict=True)
    )
    assert torch.equal(matrix, recorded["exact"]["conf"])
    scores = scores_of(matrix)
    for name, ours in (("IoU", "iou"), ("Acc", "accuracy")):
        values = torch.tensor(
            [math.nan if v is None else v for v in scores[ours].values()], dtype=torch.float64
        )
        assert torch.allclose(values, recorded["exact"][name], rtol=0, atol=1e-12, equal_nan=True)
        assert torch.allclose(
            values.float(), recorded["mmseg"][name], rtol=0, atol=1e-6, equal_nan=True
        )
    for name, ours in (("mIoU", "miou"), ("mAcc", "mean_accuracy"), ("aAcc", "pixel_accuracy")):
        assert abs(scores[ours] - recorded["exact"][name]) < 1e-12
        assert abs(scores[ours] - recorded["mmseg"][name]) < 1e-6


def test_confusion_equals_a_double_loop_and_leaves_void_out():
    rng = np.random.default_rng(0)
    label = rng.choice([*range(NUM_CLASSES), VOID], (20, 30)).astype(np.uint8)
    prediction = rng.integers(0, NUM_CLASSES, (20, 30)).astype(np.uint8)
    expected = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64)
    for y in range(20):
        for x in range(30):
            if label[y, x] != VOID:
                expected[label[y, x], prediction[y, x]] += 1
    assert torch.equal(confusion(torch.from_numpy(label), torch.from_numpy(prediction)), expected)


def official_scores(pairs):
    """cityscapesScripts' rules in Python integers, on pairs of label id maps (truth, prediction):
    name -> IoU or None.

    IoU of a class: its hits, over those and its misses and its false alarms where the truth is of
    an evaluated class. Of a category: the same with all its evaluated classes as one.
    (evalPixelLevelSemanticLabeling.py, getIouScoreFor...)"""
    counts = Counter()
    for truth, prediction in pairs:
        counts.update(zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True))
    evaluated = [label for label in LABELS if 0 <= label.train_id < 255]
    groups = {label.name: {label.id} for label in evaluated}
    for label in evaluated:
        groups.setdefault("category " + label.category, set()).add(label.id)
    everything = {label.id for label in evaluated}
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


def frames(root, split):
    """name of a frame -> its truth as label ids, from the files"""
    return {
        path.name.replace("_gtFine_labelIds.png", ""): png(path)
        for path in root.glob(f"gtFine/{split}/*/*_labelIds.png")
    }


@pytest.fixture(scope="module")
def evaluated(toy, checkpoint, tmp_path_factory):
    """What evaluate.py prints, and the folder where it wrote everything it can, for the validation
    split."""
    folder = tmp_path_factory.mktemp("evaluated")
    process = run_script(
        f"evaluate.py --ckpt {checkpoint} --data {toy} --save-ids {folder}/ids "
        f"--save-color {folder}/color --json {folder}/scores.json"
    )
    assert process.returncode == 0, process.stderr
    return process, folder


def test_script_scores_by_the_official_rules_what_it_saves(toy, evaluated):
    process, tmp_path = evaluated
    truths, result = frames(toy, "val"), json.loads((tmp_path / "scores.json").read_text())
    assert sorted(path.name for path in (tmp_path / "ids").iterdir()) == sorted(
        f"{name}.png" for name in truths
    )
    official = official_scores(
        (truth, png(tmp_path / "ids" / f"{name}.png")) for name, truth in truths.items()
    )
    for name, iou in [
        *result["iou"].items(),
        *((f"category {k}", v) for k, v in result["category_iou"].items()),
    ]:
        assert official.pop(name) == (iou if iou is None else pytest.approx(iou, abs=1e-12)), name
    assert not official
    present = [v for v in result["iou"].values() if v is not None]
    assert result["miou"] == pytest.approx(sum(present) / len(present), abs=1e-12)
    assert (
        0 < len(present) < NUM_CLASSES
    )  # some classes are absent, which the table and the mean must show
    assert f"over {len(present)} of 19 classes" in process.stdout and "n/a" in process.stdout
    assert "whole images" in process.stdout and "77.85" in process.stdout
    assert result["protocol"] == {"scales": [1.0], "flip": False, "tile": None, "precision": "fp32"}
    assert result["images"] == 5 and sum(map(sum, result["confusion_matrix"])) == sum(
        np.isin(truth, TRAIN_ID_TO_ID).sum() for truth in truths.values()
    )
    assert sorted(path.name for path in (tmp_path / "color").iterdir()) == sorted(
        f"{name}_{kind}.png" for name in truths for kind in ("color", "overlay")
    )
    for name in truths:
        ids, color = (
            png(tmp_path / "ids" / f"{name}.png"),
            png(tmp_path / f"color/{name}_color.png"),
        )
        assert ids.shape == truths[name].shape
        assert all((color[ids == label.id] == label.color).all() for label in CLASSES)
        image = png(next(toy.glob(f"leftImg8bit/val/*/{name}_*.png")))
        overlay = png(tmp_path / f"color/{name}_overlay.png")
        assert np.abs(overlay.astype(float) - (image / 2 + color / 2)).max() <= 1


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_scores_of_one(toy, checkpoint, evaluated, tmp_path, processes):
    """5 images, which neither 2 nor 3 divides; the confusion matrix is among what must be
    identical."""
    process = run_script(
        f"evaluate.py --ckpt {checkpoint} --data {toy} --json {tmp_path}/scores.json",
        processes=processes,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(" of 19 classes") == 1
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(
        (evaluated[1] / "scores.json").read_text()
    )


def test_test_split_is_predicted_for_the_server_but_not_scored(toy, checkpoint, tmp_path):
    assert_mistake(
        run_script(f"evaluate.py --ckpt {checkpoint} --data {toy} --split test"),
        "withheld",
        "--save-ids",
    )
    process = run_script(
        f"evaluate.py --ckpt {checkpoint} --data {toy} --split test --save-ids {tmp_path}/ids"
    )
    assert process.returncode == 0, process.stderr
    assert "mIoU" not in process.stdout
    assert sorted(path.name for path in (tmp_path / "ids").iterdir()) == [
        "toytown0_000000_000019.png",
        "toytown0_000001_000019.png",
    ]
    for path in (tmp_path / "ids").iterdir():
        with Image.open(path) as picture:
            assert (picture.mode, picture.size) == ("L", (128, 64))
        assert np.isin(png(path), TRAIN_ID_TO_ID).all()


# Protocols ----------------------------------------------------------------------------------------


class ReadsPosition(torch.nn.Module):
    """A network that returns logits (19 classes) read off each pixel by itself, so that it may be
    cut and mirrored at will."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        classes = torch.arange(NUM_CLASSES).view(-1, 1, 1)
        red, green = images[:, :1].float(), images[:, 1:2].float()
        return -((red + 2 * green) / 40 - classes).abs(), None


def position_image(height, width):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x % 256, y % 256, 0 * x]).byte()


@pytest.mark.parametrize(
    ("length", "tile"), [(10, 10), (11, 10), (1024, 713), (2048, 713), (100, 3), (7, 2), (5, 1)]
)
def test_tiles_cover_every_pixel_and_overlap_by_a_third(length, tile):
    starts = tile_starts(length, tile)
    covered = set()
    for start in starts:
        assert 0 <= start <= length - tile
        covered |= set(range(start, start + tile))
    assert covered == set(range(length))
    assert len(set(starts)) == len(starts)
    assert all(b - a <= math.ceil(tile * 2 / 3) for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize(
    "options",
    [{"tile": (24, 40)}, {"flip": True}, {"tile": (24, 40), "flip": True}, {"tile": (500, 500)}],
)
def test_a_network_that_only_sees_single_pixels_is_reproduced_exactly(options):
    net, image = ReadsPosition(), position_image(65, 97)
    assert torch.equal(predict(net, image, **options), predict(net, image))
    if "tile" in options:
        assert all(
            size == (min(65, options["tile"][0]), min(97, options["tile"][1]))
            for size in net.sizes[:-1]
        )


def test_one_tile_equals_the_whole_image(checkpoint):
    net, image = evaluate.load_net(checkpoint), position_image(48, 64)
    assert torch.equal(predict(net, image, tile=(48, 64)), predict(net, image))


def test_the_prediction_of_a_mirrored_image_is_the_mirrored_prediction_with_flip(checkpoint):
    net, image = evaluate.load_net(checkpoint), position_image(48, 64)
    mirrored = predict(net, image.flip(2), flip=True)
    assert (
        mirrored.flip(1) == predict(net, image, flip=True)
    ).float().mean() > 0.999  # but for ties
    assert not torch.equal(predict(net, image.flip(2)).flip(1), predict(net, image))


def test_scales_and_flip_average_probabilities_as_mmsegmentation_does(checkpoint):
    """mmsegmentation: logits at the scaled size, mirrored back, resized to the image, softmax, mean
    (SegTTAModel)."""
    net, image = evaluate.load_net(checkpoint), position_image(48, 64)
    total = 0
    with torch.no_grad():
        for scale in (0.5, 1.25):
            scaled = F.interpolate(
                image[None].float(), (int(48 * scale + 0.5), int(64 * scale + 0.5)), mode="bilinear"
            )
            for mirrored in (False, True):
                logits = net(scaled.flip(3) if mirrored else scaled)[0]
                logits = logits.flip(3) if mirrored else logits
                total = total + F.interpolate(logits, (48, 64), mode="bilinear").softmax(1)
    assert torch.equal(
        predict(net, image, scales=(0.5, 1.25), flip=True), total[0].argmax(0).byte()
    )


def test_script_names_the_protocol_and_what_it_can_be_compared_with(toy, checkpoint, tmp_path):
    process = run_script(
        f"evaluate.py --ckpt {checkpoint} --data {toy} --flip --tile 48 80 --scales 0.5 1 "
        f"--json {tmp_path}/scores.json"
    )
    assert process.returncode == 0, process.stderr
    assert (
        "tiles of 48x80, scales 0.5 1, with flip" in process.stdout
        and "no known figure" in process.stdout
    )
    assert json.loads((tmp_path / "scores.json").read_text())["protocol"]["tile"] == [48, 80]
    for arguments, figure in (
        (([1.0], False, None), "77.85"),
        (([0.5, 0.75, 1.0, 1.25, 1.5, 1.75], True, None), "79.18"),
        (([1.0], True, [713, 713]), "77.30"),
    ):
        assert figure in evaluate.describe(*arguments)


# Photographs --------------------------------------------------------------------------------------


def test_photographs_of_any_size_and_mode_are_predicted_and_broken_ones_named(checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (40, 70, 3)).astype(np.uint8)
    folder = tmp_path / "photos"
    folder.mkdir()
    picture = Image.fromarray(rgb)
    picture.save(folder / "rgb.png")
    picture.resize((33, 90)).save(folder / "photo.jpg")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.convert("1").save(folder / "bits.png")
    Image.fromarray((rgb[..., 0].astype(np.uint16) * 257)).save(folder / "deep.png")
    rotated = Image.Exif()
    rotated[274] = 6  # hold the camera upright
    picture.save(folder / "upright.jpg", exif=rotated, quality=95)
    (folder / "broken.png").write_bytes((folder / "rgb.png").read_bytes()[:500])
    (folder / "notes.txt").write_text("not an image")
    process = run_script(
        f"evaluate.py --ckpt {checkpoint} --images {folder} {tmp_path}/missing.jpg "
        f"{folder}/one.webp --save-color {tmp_path}/out --save-ids {tmp_path}/ids"
    )
    assert process.returncode == 1, process.stderr
    assert "3 of 11 images could not be read" in process.stdout
    assert all(
        f"{path}: " in process.stdout
        for path in (folder / "broken.png", tmp_path / "missing.jpg", folder / "one.webp")
    )
    sizes = {path.stem: Image.open(path).size for path in (tmp_path / "ids").iterdir()}
    assert sizes == {
        "rgb": (70, 40),
        "photo": (33, 90),
        "grey": (70, 40),
        "palette": (70, 40),
        "alpha": (70, 40),
        "bits": (70, 40),
        "deep": (70, 40),
        "upright": (40, 70),
    }
    assert len(list((tmp_path / "out").iterdir())) == 16
    assert np.array_equal(png(tmp_path / "ids/rgb.png"), png(tmp_path / "ids/alpha.png"))
    photographs = evaluate.Photographs([folder])
    names = [path.name for path, _ in photographs.files]
    assert np.array_equal(photographs[names.index("deep.png")][0][0], rgb[..., 0])


# Mistakes -----------------------------------------------------------------------------------------


def test_mistakes_end_with_exit_code_2_and_one_sentence(toy, checkpoint, tmp_path, mistake):
    def wrong(arguments, *words):
        mistake(f"evaluate.py {arguments}", *words)

    torch.save(
        {"state_dict": PSPNet(num_classes=11, backbone="resnet18").state_dict()},
        tmp_path / "classes.pt",
    )
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:100000])
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    wrong(f"--data {toy}", "--ckpt")
    wrong(f"--ckpt {tmp_path}/none.pt --data {toy}", "no checkpoint file", "none.pt")
    wrong(f"--ckpt {tmp_path}/cut.pt --data {toy}", "cut.pt", "cut short")
    wrong(f"--ckpt {tmp_path}/classes.pt --data {toy}", "11 classes", "19")
    wrong(f"--ckpt {checkpoint} --data {tmp_path}/nowhere", "no folder", "--data")
    wrong(f"--ckpt {checkpoint} --data {toy} --scales big", "--scales", "big")
    wrong(f"--ckpt {checkpoint} --data {toy} --scales -1", "positive")
    wrong(f"--ckpt {checkpoint} --data {toy} --split test", "withheld", "--save-ids")
    wrong(f"--ckpt {checkpoint} --images {toy}", "--save-color")
    wrong(
        f"--ckpt {checkpoint} --images {tmp_path}/empty --save-color {tmp_path}/x", "no image files"
    )
    wrong(
        f"--ckpt {checkpoint} --data {toy} --save-ids {tmp_path}/a --save-color {tmp_path}/a/b",
        "separate folders",
    )
    wrong(
        f"--ckpt {checkpoint} --data {toy} --save-ids {tmp_path}/file/ids", "cannot make the folder"
    )
    (tmp_path / "again").mkdir()
    photograph = next(toy.glob("leftImg8bit/val/*/*.png"))
    (tmp_path / "again" / photograph.name).write_bytes(photograph.read_bytes())
    wrong(
        f"--ckpt {checkpoint} --images {photograph} {tmp_path}/again --save-ids {tmp_path}/x",
        "two images",
    )
    before = photograph.read_bytes()
    wrong(
        f"--ckpt {checkpoint} --images {photograph} --save-ids {photograph.parent}",
        "among the images",
    )
    assert photograph.read_bytes() == before
    wrong(
        f"--ckpt {checkpoint} --data {toy} --json {tmp_path}/none/scores.json",
        "--json",
        "no folder",
    )
    wrong(f"--ckpt {checkpoint} --data {toy} --workers -1", "--workers")
    wrong(f"--ckpt {checkpoint} --data {toy} --workers 0 --json {tmp_path}", "cannot be", "written")
    void = draw_cityscapes(tmp_path / "void", {"val": 1}, (32, 64))
    Image.new("L", (64, 32)).save(next(void.glob("gtFine/val/*/*.png")))
    wrong(f"--ckpt {checkpoint} --data {void} --workers 0", "nothing to score")


def test_a_mistake_in_several_processes_is_said_once(toy, tmp_path):
    """... and not again when torchrun repeats the command, which it does after every failure if
    told to."""
    process = run_script(
        f"evaluate.py --ckpt {tmp_path}/none.pt --data {toy}", processes=2, restarts=1
    )
    assert process.returncode != 0  # torchrun's, which adds a report of its own
    assert [line for line in process.stderr.splitlines() if "evaluate.py: " in line] == [
        f"evaluate.py: there is no checkpoint file {tmp_path}/none.pt"
    ]


def test_more_processes_than_gpus_is_a_mistake(monkeypatch, mistake):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.distributed, "rendezvous", lambda url: iter([(torch.distributed.HashStore(), 1, 2)])
    )
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    mistake("evaluate.py --ckpt x", "more processes than the 1 GPUs", "--nproc_per_node=1")


def test_an_image_that_does_not_decode_stops_the_evaluation_with_its_name(checkpoint, tmp_path):
    root = draw_cityscapes(tmp_path, {"val": 3}, (32, 64))
    image = sorted(root.glob("leftImg8bit/val/*/*.png"))[1]
    image.write_bytes(image.read_bytes()[:200])
    assert_mistake(
        run_script(f"evaluate.py --ckpt {checkpoint} --data {root}"), image.name, "cut short"
    )


@pytest.fixture
def ended(monkeypatch, capsys):
    """ended(error, out_of_memory) -> exit code and stderr of a script whose main raises error."""

    def end(error, out_of_memory):
        def main(device, rank, world):
            raise error

        monkeypatch.setattr("os._exit", sys.exit)
        with pytest.raises(SystemExit) as exit_info:
            evaluate.run(main, out_of_memory)
        return exit_info.value.code, capsys.readouterr().err

    return end


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_too_little_memory_ends_with_a_sentence_that_says_what_to_change(error, ended):
    code, errors = ended(error, "use less")
    assert code == 2 and errors.endswith(": out of memory: use less\n") and errors.count("\n") == 1


def test_a_fault_of_the_program_ends_with_its_traceback(ended):
    code, errors = ended(RuntimeError("shape mismatch"), "use less")
    assert code == 1 and errors.startswith("Traceback") and "RuntimeError: shape mismatch" in errors


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(16, None, 4), (16, 8, 2), (2, 1, 2), (2, 4, 1)]
)
def test_processes_share_the_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert evaluate.default_workers(4) == workers
