"""Photographs and masks of your own, in plain folders, in place of Cityscapes: a class to copy. In
train.py and evaluate.py change one import, from `from cityscapes import Cityscapes` to
`from tests.folders import Folders as Cityscapes`; then, with data/mine/train/images/a.jpg and
data/mine/train/masks/a.png, and the same in data/mine/val, on a CPU

    python train.py --data data/mine --backbone resnet18 --weights none --crop 128 128 --lr 0.05
"""
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from cityscapes import SceneClass, read_picture


class Folders(Dataset):
    """dataset[i] -> (picture, label): RGB, and a mask of 0, 1, 2, ... and 255, void. `split` is
    "train" or "val"."""

    classes = [SceneClass(0, "background", "all", (70, 70, 70)),  # id, name, category, color
               SceneClass(1, "thing", "all", (220, 20, 60))]

    def __init__(self, root, split):
        self.folder = Path(root, split)
        self.paths = sorted(self.folder.glob("images/[!.]*"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return read_picture(self.paths[i]), Image.open(self.folder / f"masks/{self.name(i)}.png")

    def name(self, i):
        """The file that a prediction is saved as, without an ending."""
        return self.paths[i].stem
