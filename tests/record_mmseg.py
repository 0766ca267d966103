r"""Make mmseg.pt anew: what mmsegmentation 1.2.2 computes from what fill.py makes, on a CPU.

    pip install --no-deps mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0
    pip install addict ftfy matplotlib opencv-python-headless prettytable pyyaml regex rich \
        scipy termcolor yapf
    python tests/record_mmseg.py OUT.pt

It prints how far OUT.pt is from tests/mmseg.pt: for each kind of entry the largest difference, as
a share of the largest value of the entry. Both hold only what the tests read."""
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from fill import fill_state_dict, make_input, make_label, random_of
from torch.utils._pytree import tree_flatten_with_path

sys.modules["mmcv._ext"] = MagicMock()  # compiled code, which PSPNet never calls
import mmengine  # noqa: E402
import mmseg.utils  # noqa: E402

mmseg.utils.register_all_modules()
new = {"models": {}, "metric": {}}
VARIANTS = "r50-d8 r18b-d8 r18-d8 r50b-d8 r101-d8 r101b-d8".split()
# Two are trained. Of all gradients the norm is recorded, of these 64 values as well.
STAGES = {"r50-d8": "stem.0 layer1.0.downsample.0 layer4.0.conv2 layer4.2.conv3 layer4.2.bn3",
          "r18b-d8": "conv1 layer2.0.downsample.0 layer4.0.conv2 layer4.1.conv2 layer4.1.bn2"}
HEADS = """decode_head.psp_modules.0.1.conv.weight decode_head.psp_modules.3.1.bn.weight
    decode_head.bottleneck.conv.weight decode_head.bottleneck.bn.bias decode_head.conv_seg.weight
    decode_head.conv_seg.bias auxiliary_head.convs.0.conv.weight auxiliary_head.conv_seg.weight"""


def build(variant, iterations="80k"):
    """The network as mmsegmentation initialises it, but without dropout; optimizer; schedule."""
    name = f"pspnet_{variant}_4xb2-{iterations}_cityscapes-512x1024.py"
    config = mmengine.Config.fromfile(f"{mmseg.__path__[0]}/.mim/configs/pspnet/{name}")
    config.model.pretrained = None  # no ImageNet weights
    config.model.decode_head.dropout_ratio = config.model.auxiliary_head.dropout_ratio = 0
    torch.manual_seed(0)
    net = mmseg.registry.MODELS.build(config.model)
    net.init_weights()
    optimizer = mmengine.optim.build_optim_wrapper(net, config.optim_wrapper)
    schedule = mmengine.optim.PolyLR(optimizer, end=.., eta)
    return net, optimizer, schedule
