"""The README's commands as they stand there, on small data, and the classes for other data."""
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TESTS
from PIL import Image
from toy_cityscapes import draw_cityscapes

import evaluate
import train
from pspnet import PSPNet

BLOCKS = "".join(re.findall(r"```sh\n(.*?)```", (SCRIPTS / "README.md").read_text(), re.S))
COMMANDS = re.findall(r"^(?:python|torchrun) (?!-m pytest).*", BLOCKS, re.M)
assert len(COMMANDS) >= 8, COMMANDS
SMALL = "--backbone resnet18 --weights none --crop 32 64 --batch-size 4 --iters 2 --workers 0"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, tmp_path, monkeypatch):
    """With toy scenes as data/cityscapes, small sizes in training, a network that was saved before
    as best.pt, and without torchrun. What is behind && runs as well."""
    monkeypatch.chdir(tmp_path)
    root = draw_cityscapes("data/cityscapes", {"train": 4, "val": 2, "test": 1}, (32, 64))
    draw_cityscapes("data/toy", {"train": 4, "val": 2}, (32, 64))
    Path("holiday").mkdir()
    for path in ("photo.jpg", "holiday/a.jpg"):
        Image.open(next(root.glob("leftImg8bit/val/*/*.png"))).save(path)
    net = PSPNet(backbone="resnet18")
    Path("runs/pspnet").mkdir(parents=True)
    torch.save({"state_dict": net.state_dict(), "model": net.arguments}, "runs/pspnet/best.pt")
    for part in command.split("  #")[0].removesuffix("&&").split("&&"):
        part = part.replace("toy_cityscapes.py", "toy_cityscapes.py --train 3 --val 1")
        _, script, *arguments = re.sub(r"torchrun( --\S+)*", "python", part).split()
        if script == "train.py":
            train.main([*arguments, "--out", "run", *SMALL.split()])
        elif script == "evaluate.py":
            evaluate.main([*arguments, "--workers", "0"])
        elif script == "-m":
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_module(arguments[0], run_name="__main__")
        else:
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def write_voc(root, name, split, photograph, label):
    """Into a small PASCAL VOC: JPEGs, palette PNGs, and lists of names."""
    root = root / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with open(root / f"ImageSets/Segmentation/{split}.txt", "a") as file:
        print(name, file=file)
    label.putpalette(list(range(256)) * 3)
    label.save(root / f"SegmentationClass/{name}.png")
    photograph.save(root / f"JPEGImages/{name}.jpg")


def write_folders(root, name, split, photograph, label):
    for folder, ending, picture in (("images", "jpg", photograph), ("masks", "png", label)):
        (root / split / folder).mkdir(parents=True, exist_ok=True)
        picture.save(root / split / folder / f"{name}.{ending}")


@pytest.mark.parametrize(("file", "write", "classes", "last"), [
    ("voc", write_voc, 21, "tv  "), ("folders", write_folders, 2, "thing  ")])
def test_a_class_for_other_data_trains_and_is_scored(file, write, classes, last, tmp_path,
                                                     monkeypatch, capsys):
    """With the import that its docstring names, on noise whose labels have 255 as well."""
    text = " ".join((TESTS / f"{file}.py").read_text().split())
    before, after = re.search("from `(.*?)` to `(.*?)`;", text).groups()
    exec(after, changed := {})
    for module in (train, evaluate):
        assert Path(module.__file__).read_text().count(f"\n{before}  #") == 1
        monkeypatch.setattr(module, "Cityscapes", changed["Cityscapes"])
    rng = np.random.default_rng(0)
    for name in ("train1", "train2", "val1", "val2"):
        label = rng.choice([0, 1, classes - 1, 255], (40, 60)).astype(np.uint8)
        write(tmp_path / "data", name, name[:-1],
              Image.effect_noise((60, 40), 50).convert("RGB"), Image.fromarray(label))
    train.main(f"--data {tmp_path}/data --out {tmp_path}/run {SMALL}".split())
    assert f" of {classes} classes" in capsys.readouterr().out
    evaluate.main(f"--ckpt {tmp_path}/run/best.pt --data {tmp_path}/data --workers 0 "
                  f"--save-ids {tmp_path}/ids".split())
    assert last in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("ids/*")) == ["val1_ids.png", "val2_ids.png"]
