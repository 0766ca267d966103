r"""Make mmseg.pt anew: what mmsegmentation 1.2.2 computes, on a CPU, from what fill.py makes.

    pip install --no-deps mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0
    pip install addict ftfy matplotlib opencv-python-headless prettytable pyyaml regex rich \
        scipy termcolor yapf
    python tests/record_mmseg.py OUT.pt  # a minute

The two pip commands come after that of requirements.txt; torch 2.14.1 and numpy 2.4.6 were used.
The script prints how far OUT.pt is from tests/mmseg.pt: for each part the largest difference, as a
share of the largest value of the same tensor. pytest does not collect it.
"""
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from fill import fill_state_dict, make_input, make_label, make_maps
from torch.utils._pytree import tree_leaves

sys.modules["mmcv._ext"] = MagicMock()  # compiled code, which PSPNet never calls
import mmengine  # noqa: E402
import mmseg.utils  # noqa: E402
from mmseg.evaluation import IoUMetric  # noqa: E402

TRAINED = "r50-d8", "r18b-d8"  # the variants of which a training step is recorded


def build(variant, iterations="80k"):
    """A network without dropout, its optimizer and its schedule, by mmsegmentation's recipe."""
    name = f"pspnet_{variant}_4xb2-{iterations}_cityscapes-512x1024.py"
    config = mmengine.Config.fromfile(f"{mmseg.__path__[0]}/.mim/configs/pspnet/{name}")
    config.model.pretrained = None  # no ImageNet weights
    config.model.decode_head.dropout_ratio = config.model.auxiliary_head.dropout_ratio = 0
    net = mmseg.registry.MODELS.build(config.model)
    optimizer = mmengine.optim.build_optim_wrapper(net, config.optim_wrapper)
    schedule = mmseg.registry.PARAM_SCHEDULERS.build(
        config.param_scheduler[0], default_args={"optimizer": optimizer})
    return net, optimizer, schedule


def losses_of(net, size, *names):
    """The losses of a training batch by name, and their sum."""
    fields = [mmengine.structures.PixelData(data=x[None]) for x in make_label(2, *size, *names)]
    samples = [mmseg.structures.SegDataSample(gt_sem_seg=field) for field in fields]
    losses = net.train().loss(make_input((2, 3, *size), *names).double(), samples)
    return losses, net.parse_losses(losses)[0]


def starts_of(tensors):
    """The first 16 values of each tensor in a dictionary."""
    return {name: tensor.flatten()[:16].clone() for name, tensor in tensors.items()}


mmseg.utils.register_all_modules()
mmengine.MMLogger.get_current_instance().setLevel("WARNING")
new = {}
for variant in ("r50-d8", "r18b-d8", "r18-d8", "r50b-d8", "r101-d8", "r101b-d8"):
    net = build(variant)[0]
    shapes = {name: tuple(x.shape) for name, x in fill_state_dict(net.state_dict()).items()}
    features = net.double().eval().extract_feat(make_input((1, 3, 65, 129)).double())
    logits = {"head": net.decode_head(features), "aux_head": net.auxiliary_head(features)}
    new[variant] = {"shapes": shapes, "logits": {key: x.detach() for key, x in logits.items()}}
    if variant in TRAINED:
        losses, total = losses_of(net, (64, 128))
        total.backward()
        grads = {name: x.grad for name, x in net.named_parameters()}
        statistics = {name: x for name, x in net.named_buffers() if "running" in name}
        new[variant]["step"] = {
            "losses": {name: losses[name].detach() for name in losses if "loss" in name},
            "norms": {name: grad.norm().item() for name, grad in grads.items()},
            "grads": starts_of(grads), "statistics": starts_of(statistics)}

net, optimizer, schedule = build("r18b-d8")
fill_state_dict(net.state_dict())
new["sgd"] = []  # the losses of three steps
for step in range(3):
    _, loss = losses_of(net.double(), (128, 256), f"step{step}")
    optimizer.update_params(loss)
    schedule.step()
    new["sgd"].append(loss.item())

torch.manual_seed(0)
net, optimizer, schedule = build("r50-d8", "40k")
net.init_weights()
new["init"] = {name: {"mean": x.double().mean().item(), "std": x.double().std(correction=0).item()}
               for name, x in net.state_dict().items()}
bgr = torch.from_numpy(np.random.RandomState(5).randint(0, 256, (12, 20, 3))).byte()
batch = {"inputs": [bgr.permute(2, 0, 1)], "data_samples": None}
new["preprocess"] = {"bgr": bgr, "out": net.data_preprocessor(batch)["inputs"]}
rates = []
for _ in range(40_000):
    rates += optimizer.get_lr()["lr"]
    schedule.step()
new["lr"] = {step: rates[step] for step in (0, 1, 2, 10, 100, 1000, 20_000, 39_998, 39_999)}

new["scores"] = {}
for case in ("plain", "absent"):
    areas = [IoUMetric.intersect_and_union(*pair, 19, 255) for pair in zip(*make_maps(case))]
    scores = IoUMetric.total_area_to_metrics(*(sum(area) for area in zip(*areas)))
    new["scores"][case] = {
        "IoU": torch.tensor(scores["IoU"]), "Acc": torch.tensor(scores["Acc"]),
        "mIoU": np.nanmean(scores["IoU"]).item(), "mAcc": np.nanmean(scores["Acc"]).item(),
        "aAcc": scores["aAcc"].item()}

torch.save(new, sys.argv[1])
old = torch.load(Path(__file__).with_name("mmseg.pt"))
for part in new:
    errors = []
    for ours, theirs in zip(tree_leaves(new[part]), tree_leaves(old[part]), strict=True):
        ours, theirs = (torch.as_tensor(x).double().nan_to_num(-1) for x in (ours, theirs))
        errors.append(((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300)).item())
    print(f"{part}: {max(errors):.1e}")
