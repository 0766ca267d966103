r"""Make mmseg.pt anew: what mmsegmentation 1.2.2 computes, on a CPU, from what fill.py makes.

    pip install --no-deps mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0
    pip install addict ftfy matplotlib opencv-python-headless prettytable pyyaml regex rich \
        scipy termcolor yapf
    python tests/record_mmseg.py OUT.pt

It prints how far OUT.pt is from tests/mmseg.pt, kind by kind: the largest difference in an entry,
as a share of the largest value in it. pytest does not collect this.
"""
import logging
import math
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from fill import fill_state_dict, make_input, make_label, random_of

sys.modules["mmcv._ext"] = MagicMock()  # compiled code, which PSPNet never calls
import mmengine  # noqa: E402
import mmengine.optim  # noqa: E402
import mmseg.utils  # noqa: E402
from mmseg.evaluation import IoUMetric  # noqa: E402
from mmseg.registry import MODELS, PARAM_SCHEDULERS  # noqa: E402

VARIANTS = ("r50-d8", "r18b-d8", "r18-d8", "r50b-d8", "r101-d8", "r101b-d8")
# Training is recorded of two. Of these gradients 64 values are recorded, of all gradients the norm.
GRADIENTS = {"r50-d8": "stem.0 layer1.0.downsample.0 layer4.0.conv2 layer4.2.conv3 layer4.2.bn3",
             "r18b-d8": "conv1 layer2.0.downsample.0 layer4.0.conv2 layer4.1.conv2 layer4.1.bn2"}
HEADS = """decode_head.psp_modules.0.1.conv.weight decode_head.psp_modules.3.1.bn.weight
    decode_head.bottleneck.conv.weight decode_head.bottleneck.bn.bias decode_head.conv_seg.weight
    decode_head.conv_seg.bias auxiliary_head.convs.0.conv.weight auxiliary_head.conv_seg.weight"""


def config_of(variant):
    name = f"pspnet_{variant}_4xb2-*k_cityscapes-512x1024.py"
    files = Path(mmseg.__file__).parent.glob(f".mim/configs/pspnet/{name}")
    config = mmengine.Config.fromfile(min(files))  # of 40k iterations, where there is none of 80k
    config.model.pretrained = None  # no ImageNet weights
    return config


def filled_net(variant):
    """In float64, without dropout."""
    net = MODELS.build(config_of(variant).model)
    fill_state_dict(net.state_dict())
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    return net.double()


def losses_of(net, images, labels):
    """The losses by name, and their sum, which training descends."""
    fields = [mmengine.structures.PixelData(data=label[None]) for label in labels]
    samples = [mmseg.structures.SegDataSample(gt_sem_seg=field) for field in fields]
    losses = net.loss(images.double(), samples)
    return losses, net.parse_losses(losses)[0]


def optimizer_and_schedule(variant, net):
    config = config_of(variant)
    optimizer = mmengine.optim.build_optim_wrapper(net, config.optim_wrapper)
    arguments = {"default_args": {"optimizer": optimizer}}
    return optimizer, PARAM_SCHEDULERS.build(config.param_scheduler[0], **arguments)


@torch.no_grad()
def record_model(variant):
    net, shape = filled_net(variant).eval(), (1, 3, 65, 129)
    keys = [(name, tuple(value.shape)) for name, value in net.state_dict().items()]
    features = net.extract_feat(make_input(shape).double())
    logits = {"head": net.decode_head(features), "aux_head": net.auxiliary_head(features)}
    return {"keys": keys, "eval64": {shape: logits}}


def record_training(variant):
    """Of one pass forward and back."""
    net = filled_net(variant).train()
    losses, total = losses_of(net, make_input((2, 3, 64, 128)), make_label(2, 64, 128))
    total.backward()
    gradients = {name: value.grad for name, value in net.named_parameters()}
    names = [f"backbone.{name}.weight" for name in GRADIENTS[variant].split()] + HEADS.split()
    state = net.state_dict()
    statistics = [f"decode_head.{name}.bn.running_{kind}" for kind in ("mean", "var")
                  for name in ("psp_modules.0.1", "bottleneck")]
    return {"losses": {name: losses[name].detach() for name in ("decode.loss_ce", "aux.loss_ce")},
            "grads": {name: {"norm": gradients[name].norm(),
                             "first64": gradients[name].flatten()[:64].clone()} for name in names},
            "grad_norm_all": {name: value.norm().item() for name, value in gradients.items()},
            "running_after": {name: state[name] for name in statistics}}


def record_steps(variant, steps=20):
    net, losses = filled_net(variant).train(), []
    optimizer, schedule = optimizer_and_schedule(variant, net)
    for step in range(steps):
        images = make_input((2, 3, 128, 256), f"step{step}")
        _, loss = losses_of(net, images, make_label(2, 128, 256, f"step{step}"))
        optimizer.update_params(loss)
        schedule.step()
        losses.append(loss.item())
    return {"loss": losses}


def record_rates(iterations=40_000):
    optimizer, schedule = optimizer_and_schedule("r50-d8", torch.nn.Linear(1, 1))
    rates = []
    for _ in range(iterations):
        rates += optimizer.get_lr()["lr"]
        schedule.step()
    return {step: rates[step] for step in (0, 1, 2, 10, 100, 1000, 20_000, 39_998, 39_999)}


def record_preprocessing():
    bgr = torch.tensor(np.random.RandomState(5).randint(0, 256, (12, 20, 3)), dtype=torch.uint8)
    preprocessor = MODELS.build(config_of("r50-d8").model.data_preprocessor)
    out = preprocessor({"inputs": [bgr.permute(2, 0, 1)], "data_samples": None})["inputs"]
    return {"bgr": bgr, "out": out}


def record_initialisation(variant):
    torch.manual_seed(0)
    net = MODELS.build(config_of(variant).model)
    net.init_weights()
    return {name: {"mean": value.float().mean().item(),
                   "std": value.float().std().item() if value.numel() > 1 else 0.0}
            for name, value in net.state_dict().items()}


def record_scores(name, images, labelled, predicted):
    """Of random maps, where 7 of 10 pixels are right and 1 of 10 is void."""
    random, size, labels, preds = random_of(name), (64, 96), [], []
    for _ in range(images):
        label = random.choice(labelled, size)
        right = random.random_sample(size) < 0.7
        pred = np.where(right, label, random.choice(predicted, size))
        void = random.random_sample(size) < 0.1
        if name == "absent":
            pred[pred == 17] = 0
            pred[void & (random.random_sample(size) < 0.5)] = 14  # a class that is nowhere else
        labels.append(np.where(void, 255, label))
        preds.append(pred)
    labels, preds = (torch.tensor(np.stack(maps), dtype=torch.uint8) for maps in (labels, preds))
    areas = [IoUMetric.intersect_and_union(*pair, 19, 255) for pair in zip(preds, labels)]
    scores = IoUMetric.total_area_to_metrics(*(sum(area) for area in zip(*areas)))
    return scores, labels, preds
