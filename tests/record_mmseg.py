r"""Make mmseg.pt anew: what mmsegmentation 1.2.2 computes from what fill.py makes, on a CPU.

    pip install --no-deps mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0
    pip install addict ftfy matplotlib opencv-python-headless prettytable pyyaml regex rich \
        scipy termcolor yapf
    python tests/record_mmseg.py OUT.pt

It prints how far OUT.pt is from tests/mmseg.pt: for each kind of entry the largest difference, as
a share of the largest value of that entry."""
import logging
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

SHAPE, SIZE, RATES = (1, 3, 65, 129), (64, 96), (0, 1, 2, 10, 100, 1000, 20_000, 39_998, 39_999)
VARIANTS = ("r50-d8", "r18b-d8", "r18-d8", "r50b-d8", "r101-d8", "r101b-d8")
# Two are trained: the norms of all gradients are recorded, and 64 values of each of these.
STAGES = {"r50-d8": "stem.0 layer1.0.downsample.0 layer4.0.conv2 layer4.2.conv3 layer4.2.bn3",
          "r18b-d8": "conv1 layer2.0.downsample.0 layer4.0.conv2 layer4.1.conv2 layer4.1.bn2"}
HEADS = """decode_head.psp_modules.0.1.conv.weight decode_head.psp_modules.3.1.bn.weight
    decode_head.bottleneck.conv.weight decode_head.bottleneck.bn.bias decode_head.conv_seg.weight
    decode_head.conv_seg.bias auxiliary_head.convs.0.conv.weight auxiliary_head.conv_seg.weight"""
STATISTICS = ("decode_head.psp_modules.0.1.bn.running", "decode_head.bottleneck.bn.running")


def build(variant, iterations="80k"):
    """A network without dropout, its optimizer and its schedule, by mmsegmentation's recipe."""
    name = f"pspnet_{variant}_4xb2-{iterations}_cityscapes-512x1024.py"
    config = mmengine.Config.fromfile(f"{mmseg.__path__[0]}/.mim/configs/pspnet/{name}")
    config.model.pretrained = None  # no ImageNet weights
    config.model.decode_head.dropout_ratio = config.model.auxiliary_head.dropout_ratio = 0
    net = mmseg.registry.MODELS.build(config.model)
    optimizer = mmengine.optim.build_optim_wrapper(net, config.optim_wrapper)
    kind, arguments = config.param_scheduler[0].pop("type"), config.param_scheduler[0]
    return net, optimizer, getattr(mmengine.optim, kind)(optimizer, **arguments)


def losses_of(net, size, *names):
    """In training: the losses by name, and their sum."""
    fields = [mmengine.structures.PixelData(data=x[None]) for x in make_label(2, *size, *names)]
    samples = [mmseg.structures.SegDataSample(gt_sem_seg=field) for field in fields]
    losses = net.train().loss(make_input((2, 3, *size), *names).double(), samples)
    return losses, net.parse_losses(losses)[0]


logging.disable(logging.INFO)
mmseg.utils.register_all_modules()
new = {"models": {}, "metric": {}, "versions": {
    "mmsegmentation": mmseg.__version__, "mmengine": mmengine.__version__, "torch": str(torch.__version__)}}

for variant in VARIANTS:
    net, *_ = build(variant)
    state = fill_state_dict(net.state_dict())
    features = net.double().eval().extract_feat(make_input(SHAPE).double())
    logits = {"head": net.decode_head(features), "aux_head": net.auxiliary_head(features)}
    new["models"][variant] = model = {
        "keys": [(name, tuple(value.shape)) for name, value in state.items()],
        "eval64": {SHAPE: {name: value.detach() for name, value in logits.items()}}}
    if variant in STAGES:
        losses, total = losses_of(net, (64, 128))
        total.backward()
        names = [f"backbone.{name}.weight" for name in STAGES[variant].split()] + HEADS.split()
        grads = {name: value.grad for name, value in net.named_parameters()}
        model["train64"] = {
            "losses": {name: losses[name].detach() for name in losses if "loss" in name},
            "grads": {name: {"norm": grads[name].norm(),
                             "first64": grads[name].flatten()[:64].clone()} for name in names},
            "grad_norm_all": {name: grad.norm().item() for name, grad in grads.items()},
            "running_after": {name: value for name, value in net.state_dict().items()
                              if name.startswith(STATISTICS)}}

net, optimizer, schedule = build("r18b-d8")
fill_state_dict(net.state_dict())
net.double()
steps = []
for step in range(20):
    steps.append(losses_of(net, (128, 256), f"step{step}")[1])
    optimizer.update_params(steps[-1])
    schedule.step()
new["sgd20"] = {("r18b-d8", "float64"): {"loss": [loss.item() for loss in steps]}}

torch.manual_seed(0)
net, optimizer, schedule = build("r50-d8", "40k")
net.init_weights()
new["init"] = {"r50-d8": {name: {
    "mean": value.float().mean().item(),
    "std": value.float().std().item() if value.dim() else 0.0}  # a number's is NaN
    for name, value in net.state_dict().items()}}
bgr = torch.from_numpy(np.random.RandomState(5).randint(0, 256, (12, 20, 3))).byte()
batch = {"inputs": [bgr.permute(2, 0, 1)], "data_samples": None}
new["preprocess"] = {"bgr": bgr, "out": net.data_preprocessor(batch)["inputs"]}
rates = []
for _ in range(40_000):
    rates += optimizer.get_lr()["lr"]
    schedule.step()
new["lr"] = {step: rates[step] for step in RATES}

for name, images, unlabelled, unpredicted in (
        ("plain", 3, [], []), ("absent", 4, [3, 14, 16], [14, 16, 17])):
    random, maps = random_of(name), []
    for _ in range(images):
        label = random.choice(np.delete(range(19), unlabelled), SIZE)
        right = random.random_sample(SIZE) < 0.7
        prediction = np.where(right, label, random.choice(np.delete(range(19), unpredicted), SIZE))
        void = random.random_sample(SIZE) < 0.1
        if name == "absent":  # 17 is labelled and not predicted, 14 predicted where void
            prediction[prediction == 17] = 0
            prediction[void & (random.random_sample(SIZE) < 0.5)] = 14
        maps.append((prediction, np.where(void, 255, label)))
    preds, labels = torch.tensor(np.array(maps).swapaxes(0, 1), dtype=torch.uint8)
    metric = mmseg.evaluation.IoUMetric
    areas = [metric.intersect_and_union(*pair, 19, 255) for pair in zip(preds, labels)]
    scores = metric.total_area_to_metrics(*(sum(area) for area in zip(*areas)))
    pairs = (19 * labels.long() + preds)[labels != 255]
    new["metric"][name] = {
        "preds": preds, "labels": labels, "exact": {"conf": pairs.bincount(minlength=361).view(19, 19)},
        "mmseg": {"IoU": torch.from_numpy(scores["IoU"]), "Acc": torch.from_numpy(scores["Acc"]),
                  "aAcc": float(scores["aAcc"]), "mIoU": float(np.nanmean(scores["IoU"])),
                  "mAcc": float(np.nanmean(scores["Acc"]))}}

torch.save(new, sys.argv[1])
RECORDED = Path(__file__).with_name("mmseg.pt")
if RECORDED.exists():
    old, worst = dict(tree_flatten_with_path(torch.load(RECORDED))[0]), {}
    for path, value in tree_flatten_with_path(new)[0]:
        kind = " ".join(key.key for key in path if str(getattr(key, "key", "")).isidentifier())
        if isinstance(value, str):
            error = float(value != old[path])
        else:
            value, expected = np.nan_to_num(np.array([value, old[path]], float), nan=-1)
            error = abs(value - expected).max() / (abs(expected).max() or 1)
        worst[kind] = max(worst.get(kind, 0.0), error)
    for kind, error in worst.items():
        print(f"{error:.1e} {kind}")
