r"""Make mmseg.pt anew: what mmsegmentation 1.2.2 computes, on a CPU, from what fill.py makes.

    pip install --no-deps mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0
    pip install addict ftfy matplotlib opencv-python-headless prettytable pyyaml regex rich \
        scipy termcolor yapf
    python tests/record_mmseg.py OUT.pt  # two minutes

The two pip commands come after that of requirements.txt; torch 2.14.1 and numpy 2.4.6 were used.
The script prints how far OUT.pt is from tests/mmseg.pt: for each kind of entry the largest
difference, as a share of the largest value of the same tensor. pytest does not collect it.
"""
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
from mmseg.evaluation import IoUMetric  # noqa: E402

# Training is recorded of two variants: the norms of all gradients, and 64 values of each of these.
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
    schedule = mmseg.registry.PARAM_SCHEDULERS.build(
        config.param_scheduler[0], default_args={"optimizer": optimizer})
    return net, optimizer, schedule


def losses_of(net, size, *names):
    """The losses of a training batch by name, and their sum."""
    fields = [mmengine.structures.PixelData(data=x[None]) for x in make_label(2, *size, *names)]
    samples = [mmseg.structures.SegDataSample(gt_sem_seg=field) for field in fields]
    losses = net.train().loss(make_input((2, 3, *size), *names).double(), samples)
    return losses, net.parse_losses(losses)[0]


mmseg.utils.register_all_modules()
mmengine.MMLogger.get_current_instance().setLevel("WARNING")
new = {"models": {}, "metric": {}}

for variant in ("r50-d8", "r18b-d8", "r18-d8", "r50b-d8", "r101-d8", "r101b-d8"):
    net, shape = build(variant)[0], (1, 3, 65, 129)
    state = fill_state_dict(net.state_dict())
    features = net.double().eval().extract_feat(make_input(shape).double())
    new["models"][variant] = model = {
        "keys": [(name, tuple(value.shape)) for name, value in state.items()],
        "eval64": {shape: {"head": net.decode_head(features).detach(),
                           "aux_head": net.auxiliary_head(features).detach()}}}
    if variant in STAGES:
        losses, total = losses_of(net, (64, 128))
        total.backward()
        grads = {name: value.grad for name, value in net.named_parameters()}
        names = [f"backbone.{name}.weight" for name in STAGES[variant].split()] + HEADS.split()
        model["train64"] = {
            "losses": {name: losses[name].detach() for name in losses if "loss" in name},
            "grads": {name: {"norm": grads[name].norm(),
                             "first64": grads[name].flatten()[:64].clone()} for name in names},
            "grad_norm_all": {name: grad.norm().item() for name, grad in grads.items()},
            "running_after": {name: value for name, value in net.state_dict().items()
                              if name.startswith(STATISTICS)}}

net, optimizer, schedule = build("r18b-d8")
fill_state_dict(net.state_dict())
steps = []
for step in range(20):
    _, loss = losses_of(net.double(), (128, 256), f"step{step}")
    optimizer.update_params(loss)
    schedule.step()
    steps.append(loss.item())
new["sgd20"] = {("r18b-d8", "float64"): {"loss": steps}}

torch.manual_seed(0)
net, optimizer, schedule = build("r50-d8", "40k")
net.init_weights()
new["init"] = {"r50-d8": {
    name: {"mean": value.float().mean().item(),
           "std": value.float().std().item() if value.dim() else 0.0}
    for name, value in net.state_dict().items()}}
bgr = torch.from_numpy(np.random.RandomState(5).randint(0, 256, (12, 20, 3))).byte()
batch = {"inputs": [bgr.permute(2, 0, 1)], "data_samples": None}
new["preprocess"] = {"bgr": bgr, "out": net.data_preprocessor(batch)["inputs"]}
rates = []
for _ in range(40_000):
    rates += optimizer.get_lr()["lr"]
    schedule.step()
new["lr"] = {step: rates[step] for step in (0, 1, 2, 10, 100, 1000, 20_000, 39_998, 39_999)}

# Random maps. In the second case some classes are never labelled, and some never predicted, class
# 14 only where the label is void.
for case, count, unlabelled, unpredicted in (
        ("plain", 3, [], []), ("absent", 4, [3, 14, 16], [14, 16, 17])):
    random, size, maps = random_of(case), (64, 96), []
    for _ in range(count):
        label = random.choice(np.delete(range(19), unlabelled), size)
        agrees = random.random_sample(size) < 0.7
        pred = np.where(agrees, label, random.choice(np.delete(range(19), unpredicted), size))
        void = random.random_sample(size) < 0.1
        if case == "absent":
            pred[pred == 17] = 0
            pred[void & (random.random_sample(size) < 0.5)] = 14
        maps.append([pred, np.where(void, 255, label)])
    preds, labels = torch.tensor(np.swapaxes(maps, 0, 1), dtype=torch.uint8)
    pairs = (19 * labels.long() + preds)[labels != 255]
    areas = [IoUMetric.intersect_and_union(*pair, 19, 255) for pair in zip(preds, labels)]
    scores = IoUMetric.total_area_to_metrics(*(sum(area) for area in zip(*areas)))
    iou, acc = scores["IoU"], scores["Acc"]
    new["metric"][case] = {
        "preds": preds, "labels": labels,
        "exact": {"conf": pairs.bincount(minlength=361).view(19, 19)},  # without mmsegmentation
        "mmseg": {"IoU": torch.tensor(iou), "Acc": torch.tensor(acc), "aAcc": scores["aAcc"].item(),
                  "mIoU": np.nanmean(iou).item(), "mAcc": np.nanmean(acc).item()}}

torch.save(new, sys.argv[1])
recorded = Path(__file__).with_name("mmseg.pt")
if recorded.exists():
    old, worst = dict(tree_flatten_with_path(torch.load(recorded))[0]), {}
    for path, value in tree_flatten_with_path(new)[0]:
        kind = " ".join(key.key for key in path if str(getattr(key, "key", "")).isidentifier())
        pair = [value == old[path], True] if isinstance(value, str) else [value, old[path]]
        ours, theirs = np.nan_to_num(np.array(pair, float), nan=-1)
        worst[kind] = max(worst.get(kind, 0), abs(ours - theirs).max() / (abs(theirs).max() or 1))
    for kind, difference in worst.items():
        print(f"{difference:.1e} {kind}")
