"""PASCAL VOC 2012 in place of Cityscapes. In train.py and evaluate.py change one import, from
`from cityscapes import Cityscapes` to `from tests.voc import VOC as Cityscapes`; then

    python train.py --data data --crop 512 512      # data holds VOCdevkit

These are its 1,464 images. (The paper's 85.4 % on the test server took 10,582 images, and MS-COCO
before.) torchvision's data set gives pairs of pictures; what it lacks are the classes and names.
"""
from pathlib import Path

from torchvision.datasets import VOCSegmentation

from cityscapes import SceneClass

NAMES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse "
         "motorbike person plant sheep sofa train tv").split()


class VOC(VOCSegmentation):
    """dataset[i] -> (picture, label): RGB, and train ids, which are 255 at the borders of things.
    `split` is "train" or "val"."""

    classes = [SceneClass(i, name, "object" if i else "background",
                          (i * 37 % 256, i * 67 % 256, 97)) for i, name in enumerate(NAMES)]

    def __init__(self, root, split):
        super().__init__(root, image_set=split)

    def name(self, i):
        return Path(self.images[i]).stem
