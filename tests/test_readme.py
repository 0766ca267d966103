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

BLOCKS = "".join(re.findall(r"```sh\n(.*?)```", (SCRIPTS / "README.md").read_text(), re.S))
COMMANDS = re.findall(r"^(?:python|torchrun) .*", BLOCKS, re.M)
assert len(COMMANDS) == 10, COMMANDS
SMALL = "--backbone resnet18 --weights none --crop 32 64 --batch-size 4 --iters 2 --workers 0"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, tmp_path, monkeypatch, run_here):
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
    command = command.replace("torchrun --standalone --nproc_per_node=8", "python")
    for part in command.split("  #")[0].removesuffix("&&").split("&&"):
        words = part.replace("toy_cityscapes.py", "toy_cityscapes.py --train 3 --val 1")
        words = words.replace("train.py", f"train.py --out {tmp_path}/run").split() + (
            SMALL.split() if "train.py" in part else [])
        if words[1] == "-m":
            monkeypatch.setattr(sys, "argv", words[2:])
            runpy.run_module(words[2], run_name="__main__")
        else:
            run_here(" ".join(words[1:]))


def test_the_class_for_pascal_voc_trains_and_is_scored(tmp_path, run_here):
    """With copies of the two scripts that are changed as its docstring says, on a small drawn VOC:
    JPEGs, palette PNGs with 255 at the borders, and lists of names."""
    before, after = re.search(r"from\n`(.*?)` to `(.*?)`;", (TESTS / "voc.py").read_text()).groups()
    for name in ("evaluate.py", "train.py"):
        script = (SCRIPTS / name).read_text()
        assert script.count(f"\n{before}  #") == 1
        (tmp_path / name).write_text(script.replace(f"\n{before}  #", f"\n{after}  #"))
    rng, root = np.random.default_rng(0), tmp_path / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text(f"{split}1\n{split}2\n")
        for name in (f"{split}1", f"{split}2"):
            label = Image.fromarray(rng.choice([0, 5, 20, 255], (40, 60)).astype(np.uint8), "P")
            label.putpalette(list(range(256)) * 3)
            label.save(root / f"SegmentationClass/{name}.png")
            Image.effect_noise((60, 40), 50).convert("RGB").save(root / f"JPEGImages/{name}.jpg")
    process = run_here(f"{tmp_path}/train.py --data {tmp_path} --out {tmp_path}/run {SMALL}")
    assert "21 classes" in process.stdout
    process = run_here(f"{tmp_path}/evaluate.py --ckpt {tmp_path}/run/best.pt --data {tmp_path} "
                       f"--save-ids {tmp_path}/ids")
    assert "tv  " in process.stdout
    assert sorted(path.name for path in tmp_path.glob("ids/*")) == ["val1.png", "val2.png"]
