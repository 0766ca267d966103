"""The README's commands as they stand there, on small data, and the class for PASCAL VOC."""
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

from pspnet import PSPNet

README = (SCRIPTS / "README.md").read_text()
BLOCKS = "".join(re.findall(r"```sh\n(.*?)```", README, re.S))
COMMANDS = re.findall(r"^(?:python|torchrun) .*", BLOCKS, re.M)
assert len(COMMANDS) == 10, COMMANDS
SMALL = ("--backbone resnet18 --weights none --crop 32 64 --batch-size 4 --iters 2 --workers 0 "
         "--out {}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, tmp_path, monkeypatch, run_here):
    """With toy scenes as data/cityscapes, small sizes in training, a network that was saved before
    as best.pt, and without torchrun, whose options are those of all tests with two processes. What
    is behind && runs as well."""
    monkeypatch.chdir(tmp_path)
    root = draw_cityscapes("data/cityscapes", {"train": 4, "val": 2, "test": 1}, (32, 64))
    photograph = next(root.glob("leftImg8bit/val/*/*.png"))
    for path in ("photo.jpg", "holiday/a.jpg"):
        Path(path).parent.mkdir(exist_ok=True)
        Image.open(photograph).save(path)
    net = PSPNet(backbone="resnet18")
    Path("runs/pspnet").mkdir(parents=True)
    torch.save({"state_dict": net.state_dict(), "model": net.arguments}, "runs/pspnet/best.pt")
    command = command.replace("torchrun --standalone --nproc_per_node=8", "python")
    for part in filter(None, map(str.split, command.split("  #")[0].split("&&"))):
        interpreter, *words = part
        assert interpreter == "python"
        if "tests/toy_cityscapes.py" in words:
            words += ["--train", "3", "--val", "1", "--size", "32", "64"]
        if "data/toy" in words and "train.py" in words:  # which the command before has drawn
            run_here("tests/toy_cityscapes.py data/toy --train 3 --val 1 --size 32 64")
            words += ["--iters", "2", "--crop", "32", "64"]
        elif "train.py" in words:
            words += SMALL.format(tmp_path / "run").split()
        if words[0] == "-m":
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_module(words[1], run_name="__main__")
        else:
            run_here(" ".join(words))


def test_the_class_for_pascal_voc_trains_and_is_scored(tmp_path, monkeypatch, run_here):
    """With copies of the two scripts that are changed as its docstring says, on a small drawn VOC:
    JPEGs, palette PNGs with 255 at the borders, and lists of names."""
    voc = (TESTS / "voc.py").read_text()
    before, after = re.search(r"from\n`(.*?)` to `(.*?)`;", voc).groups()
    monkeypatch.syspath_prepend(SCRIPTS)
    for name in ("evaluate.py", "train.py"):
        script = (SCRIPTS / name).read_text()
        assert script.count(f"\n{before}  #") == 1
        (tmp_path / name).write_text(script.replace(f"\n{before}  #", f"\n{after}  #"))
    rng, root = np.random.default_rng(0), tmp_path / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, names in (("train", "ab"), ("val", "cd")):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for name in names:
            label = Image.fromarray(rng.choice([0, 5, 20, 255], (40, 60)).astype(np.uint8), "P")
            label.putpalette(list(range(256)) * 3)
            label.save(root / f"SegmentationClass/{name}.png")
            pixels = rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg")
    train = f"--data {tmp_path} {SMALL.format(tmp_path / 'run')}"
    process = run_here(f"{tmp_path}/train.py {train}")
    assert "21 classes" in process.stdout
    process = run_here(f"{tmp_path}/evaluate.py --ckpt {tmp_path}/run/best.pt --data {tmp_path} "
                       f"--workers 0 --save-ids {tmp_path}/ids")
    assert "tv  " in process.stdout
    assert sorted(path.name for path in (tmp_path / "ids").iterdir()) == ["c.png", "d.png"]
