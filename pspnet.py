"""PSPNet, the Pyramid Scene Parsing Network (H. Zhao et al., CVPR 2017, arXiv:1612.01105).

    net = PSPNet(num_classes=19, backbone="resnet50_v1c")
    logits, aux_logits = net(images)  # images: RGB, (B, 3, H, W), 0..255; logits: (B, 19, H, W)
    net = load_net("best.pt")         # from train.py, or one of mmsegmentation's published files

    python pspnet.py                  # its stages, parameters and GFLOPs, and how fast it is

A ResNet that keeps an eighth of the image's resolution, a pyramid of averages over 1, 4, 9 and 36
regions that tells every position what scene it is in, and a classifier. Names and numbers are
mmsegmentation 1.2.2's (tests/test_pspnet.py: to 1e-9 in float64), for a fifth less arithmetic:
`PyramidHead` explains how, and why that is exact.
"""
import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Mean and standard deviation of ImageNet's photographs, RGB, in grey levels of 0..255.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

BINS = (1, 2, 3, 6)  # the pyramid averages over 1x1, 2x2, 3x3 and 6x6 regions (section 3.2)


# ------------------------------------------------------------------------------------------------
# The backbone: a ResNet (He et al., CVPR 2016) of output stride 8


def shortcut(in_channels, out_channels, stride):
    """The identity where a block keeps the shape, otherwise a 1x1 convolution with batch norm."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (ResNet-18): (B, in_channels, H, W) -> (B, channels,
    H/stride, W/stride). Only the first convolution is dilated, as in mmsegmentation."""

    expansion = 1

    def __init__(self, in_channels, channels, stride=1, dilation=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=dilation,
                               dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (ResNet-50, 101): (B, in_channels, H, W) ->
    (B, 4 channels, H/stride, W/stride). The 3x3 carries stride and dilation."""

    expansion = 4

    def __init__(self, in_channels, channels, stride=1, dilation=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=dilation, dilation=dilation,
                               bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = shortcut(in_channels, 4 * channels, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


TORCHVISION = "https://download.pytorch.org/models/"
OPENMMLAB = "https://download.openmmlab.com/pretrain/third_party/"
BACKBONES = {  # block, blocks per stage, deep stem, ImageNet weights (the name ends in the sha256)
    "resnet18": (BasicBlock, (2, 2, 2, 2), False, TORCHVISION + "resnet18-f37072fd.pth"),
    "resnet50": (Bottleneck, (3, 4, 6, 3), False, TORCHVISION + "resnet50-0676ba61.pth"),
    "resnet101": (Bottleneck, (3, 4, 23, 3), False, TORCHVISION + "resnet101-63fe2227.pth"),
    "resnet18_v1c": (BasicBlock, (2, 2, 2, 2), True, OPENMMLAB + "resnet18_v1c-b5776b93.pth"),
    "resnet50_v1c": (Bottleneck, (3, 4, 6, 3), True, OPENMMLAB + "resnet50_v1c-2cccc1ad.pth"),
    "resnet101_v1c": (Bottleneck, (3, 4, 23, 3), True, OPENMMLAB + "resnet101_v1c-e67eebb6.pth"),
}


class ResNet(nn.Module):
    """Normalised images (B, 3, H, W) -> stage 3 (B, 256 e, H/8, W/8) and stage 4 (B, 512 e, H/8,
    W/8), where e is the block's expansion, 1 or 4, and H/8 and W/8 round up.

    A classifier's stages 3 and 4 halve the resolution twice more. Here they have stride 1, and
    their 3x3 convolutions are dilated by 2 and 4: they reach as far in the image as their ImageNet
    weights are used to. The first block of such a stage keeps the dilation of the stage before,
    because its input has the spacing of that stage: so do torchvision
    (replace_stride_with_dilation) and mmsegmentation (contract_dilation). "V1c" is a stem of three
    3x3 convolutions, instead of one 7x7. Names are torchvision's, but for `stem`.
    """

    def __init__(self, name):
        super().__init__()
        block, depths, self.deep_stem, _ = BACKBONES[name]
        if self.deep_stem:
            self.stem = nn.Sequential(
                nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        def stage(in_channels, channels, depth, stride, first_dilation, dilation):
            blocks = [block(in_channels, channels, stride, first_dilation)]
            in_channels = channels * block.expansion
            blocks += [block(in_channels, channels, 1, dilation) for _ in range(depth - 1)]
            return nn.Sequential(*blocks)

        e = block.expansion  # channels: in, and of the 3x3; blocks; stride; dilation: first, others
        self.layer1 = stage(64, 64, depths[0], 1, 1, 1)
        self.layer2 = stage(64 * e, 128, depths[1], 2, 1, 1)
        self.layer3 = stage(128 * e, 256, depths[2], 1, 1, 2)
        self.layer4 = stage(256 * e, 512, depths[3], 1, 2, 4)

    def forward(self, x):
        x = self.stem(x) if self.deep_stem else F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer2(self.layer1(self.maxpool(x)))
        stage3 = self.layer3(x)
        return stage3, self.layer4(stage3)


# ------------------------------------------------------------------------------------------------
# Pooling and upsampling as matrix products: faster than PyTorch's functions for them on a CPU, and
# the gradients of those are documented as nondeterministic on CUDA (use_deterministic_algorithms)


def pooling_matrix(bins, size, like):
    """P of average pooling: P_h @ x @ P_w.mT holds the means of x (B, C, h, w) by regions.

    Bin i covers the positions from floor(i size / bins) to before ceil((i + 1) size / bins): bins
    overlap where `bins` doesn't divide `size`, as in adaptive_avg_pool2d.
    Returns (1, 1, bins, size), of the dtype and on the device of `like`.
    """
    i = torch.arange(bins, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)
    inside = (position >= i * size // bins) & (position < ((i + 1) * size + bins - 1) // bins)
    inside = inside.to(torch.promote_types(like.dtype, torch.float32))
    return (inside / inside.sum(dim=1, keepdim=True)).to(like.dtype)[None, None]


def interpolation_matrix(cells, size, like):
    """U of linear interpolation: U_h @ x @ U_w.mT stretches x (B, C, k, l) bilinearly to h x w.

    The centre of output position i lies at (i + 1/2) cells / size - 1/2 on the axis of the cells,
    held between the first and the last (align_corners=False). The weight of a cell is 1 at the
    cell and falls linearly to 0 at its neighbours.
    Returns (1, 1, size, cells), of the dtype and on the device of `like`.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)  # bfloat16 would misplace the centres
    i = torch.arange(size, device=like.device, dtype=dtype)[:, None]
    cell = torch.arange(cells, device=like.device, dtype=dtype)
    centre = ((i + 0.5) * (cells / size) - 0.5).clamp(0, cells - 1)
    return (1 - (centre - cell).abs()).clamp(min=0).to(like.dtype)[None, None]


def upsample(x, size):
    """x (B, C, h, w) -> (B, C, *size), bilinear, in float32 (or float64) also under autocast."""
    device = "cpu" if x.is_meta else x.device.type  # "meta", shapes without values, has no autocast
    with torch.autocast(device, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rows = interpolation_matrix(x.shape[-2], size[0], like=x)
        columns = interpolation_matrix(x.shape[-1], size[1], like=x)
        return rows @ (x @ columns.mT)


# ------------------------------------------------------------------------------------------------
# The heads


class ConvBNReLU(nn.Module):
    """Convolution of stride 1 that keeps the size, batch norm, ReLU."""

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class PyramidHead(nn.Module):
    """Pyramid pooling and classifier (section 3.2): x (B, C, h, w) -> (B, num_classes, h, w).

    `textbook_forward` is the paper's figure 3: average x over k x k regions for k = 1, 2, 3, 6;
    give each level a 1x1 convolution, batch norm and ReLU, which makes p_k, of k x k cells; stretch
    it to h x w; stack x and the four stretched levels; then a 3x3 convolution of that stack, batch
    norm and ReLU. Half of the channels that the 3x3 convolution reads are stretched from 1, 4, 9
    and 36 cells. `forward` computes the same without stretching anything. Everything up to the p_k
    and after the 3x3 convolution stays; what is between them is linear, and is rewritten:

    1. A convolution of a stack is the sum of one convolution per part, each with its own slice of
       the weight:  conv(stack; W) = conv(x; W_x) + sum over k of conv(stretched p_k; W_k).
    2. Stretching acts on rows and columns: stretched p = R p S^T with R (h, k) and S (w, k) from
       `interpolation_matrix`.
    3. A 3x3 convolution adds nine copies of its input, one for each tap (u, v) of the kernel,
       u and v = 0, 1, 2. At (i, j) a copy shows the input at (i + u - 1, j + v - 1), and its
       channels are mixed by the matrix W[u, v]. Mixing channels and moving pixels don't interfere,
       so mix first, on the k x k cells, and stretch and move after:
           conv(R p S^T; W) = sum over u and v of  R_u (W[u, v] p) S_v^T,
       where row i of R_u is row i + u - 1 of R, or zeros where R has no such row: they are the
       zero padding of the convolution. S_v likewise.
    4. For each output channel that sum is a product of block matrices: [R_0 R_1 R_2], (h, 3k),
       times the nine mixtures as blocks of a (3k, 3k) matrix, times [S_0 S_1 S_2]^T, (3k, w). The
       sum over the levels is such a product as well: the left factors stand side by side, (h, 36),
       the right ones below each other, (36, w), where 36 is 3 (1 + 2 + 3 + 6).

    Nothing is approximated, the weight remains one tensor, and the arithmetic of the whole network
    (ResNet-50, images of 512x1024) falls to 0.785 of the textbook's, of a training step to 0.796.
    """

    def __init__(self, in_channels, num_classes):
        super().__init__()
        channels = in_channels // 4
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(k), ConvBNReLU(in_channels, channels, 1))
            for k in BINS)
        # "bottleneck" is mmsegmentation's name for it; it has nothing to do with the block above.
        self.bottleneck = ConvBNReLU(in_channels + len(BINS) * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        h, w = x.shape[-2:]
        in_channels, channels = x.shape[1], self.conv_seg.in_channels
        parts = [in_channels] + [channels] * len(BINS)
        weight_x, *weights = self.bottleneck.conv.weight.split(parts, dim=1)
        # The rows of all levels first, (B, C, 1 + 2 + 3 + 6, w): x is large, and so is read once.
        strips = torch.cat([pooling_matrix(k, h, like=x) for k in BINS], dim=2) @ x
        levels = zip(BINS, strips.split(BINS, dim=2), self.psp_modules, weights, strict=True)
        lefts, rights = [], []
        for k, strip, (_, conv_bn_relu), weight in levels:
            means = strip @ pooling_matrix(k, w, like=x).mT  # over k x k regions
            cells = conv_bn_relu(means)  # (B, channels, k, k)
            # o, i: channels out and in; u, v: taps of the kernel; s, t: rows and columns of cells
            mixtures = torch.einsum("oiuv,bist->bousvt", weight, cells)
            blocks = mixtures.flatten(4, 5).flatten(2, 3)  # (B, channels, 3k, 3k)
            lefts.append(three_shifts(interpolation_matrix(k, h, like=x)))  # (1, 1, h, 3k)
            rights.append(blocks @ three_shifts(interpolation_matrix(k, w, like=x)).mT)
        y = F.conv2d(x, weight_x, padding=1)
        y += torch.cat(lefts, dim=3) @ torch.cat(rights, dim=2)  # (h, 36) @ (36, w) per channel
        y = F.relu(self.bottleneck.bn(y), inplace=True)
        return self.conv_seg(self.dropout(y))

    def textbook_forward(self, x):
        """The same as in the paper's figure, for the reader, for the tests and to compare times."""
        stretched = [F.interpolate(module(x), x.shape[-2:], mode="bilinear", align_corners=False)
                     for module in self.psp_modules]
        y = self.bottleneck(torch.cat([x, *stretched], dim=1))
        return self.conv_seg(self.dropout(y))


def three_shifts(matrix):
    """(1, 1, n, k) -> (1, 1, n, 3k): as the three taps of a convolution see the rows. Row i of the
    result is rows i - 1, i and i + 1 side by side, with zeros beyond the first and the last."""
    padded = F.pad(matrix, (0, 0, 1, 1))
    return torch.cat([padded[:, :, :-2], padded[:, :, 1:-1], padded[:, :, 2:]], dim=3)


class AuxiliaryHead(nn.Module):
    """A classifier on stage 3, which helps to train the deep network (section 3.3, figure 4):
    x (B, C, h, w) -> (B, num_classes, h, w)."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        channels = in_channels // 4
        self.convs = nn.Sequential(ConvBNReLU(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        return self.conv_seg(self.dropout(self.convs(x)))


# ------------------------------------------------------------------------------------------------
# The network


class PSPNet(nn.Module):
    """The whole network; `backbone` is a name in BACKBONES.

    net(images) -> (logits, aux_logits). images: RGB, (B, 3, H, W), uint8 or float, 0..255, any H
    and W; the network normalises them itself. Both logits: (B, num_classes, H, W), float;
    aux_logits is None in eval mode, where nobody uses it. In train mode B must be 2 or more, as the
    1x1 level of the pyramid gives batch norm one value per image.

    Weights start at random, as in mmsegmentation 1.2.2: convolutions Kaiming normal over the fan
    out, classifiers N(0, 0.01^2) with bias 0, and 0 for the last batch norm of each residual block,
    which so starts as its shortcut. `load_backbone` brings ImageNet's weights.
    """

    def __init__(self, num_classes=19, backbone="resnet50_v1c"):
        super().__init__()
        self.num_classes, self.backbone_name = num_classes, backbone
        channels = 512 * BACKBONES[backbone][0].expansion
        self.backbone = ResNet(backbone)
        self.decode_head = PyramidHead(channels, num_classes)
        self.auxiliary_head = AuxiliaryHead(channels // 2, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
        for head in (self.decode_head, self.auxiliary_head):
            nn.init.normal_(head.conv_seg.weight, std=0.01)
            nn.init.zeros_(head.conv_seg.bias)

    def forward(self, images):
        size = images.shape[-2:]
        stage3, stage4 = self.backbone(self.normalize(images))
        logits = upsample(self.decode_head(stage4), size)
        aux_logits = upsample(self.auxiliary_head(stage3), size) if self.training else None
        return logits, aux_logits

    def normalize(self, images):
        """Grey levels of 0..255 -> standard deviations from the mean, in the weights' dtype."""
        dtype = self.decode_head.conv_seg.weight.dtype
        return torch.stack([(images[:, c].to(dtype) - MEAN[c]) / STD[c] for c in range(3)], dim=1)


# ------------------------------------------------------------------------------------------------
# Weights from files


class CheckpointError(Exception):
    """A file does not hold the weights that were asked for. The text is a sentence for the user."""


def read_checkpoint(path):
    """What torch.save wrote to `path`, tensors on the CPU; nothing in it is run (weights_only).

    Raises CheckpointError where the file is missing, damaged, or holds other Python objects.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint; it is cut short, or not "
                              f"a file of tensors and plain Python ({reason})") from error


def shapes(state):
    """name -> shape in a state dict, except batch norm's counters, which older files lack."""
    return {name: getattr(value, "shape", None) for name, value in state.items()
            if not str(name).endswith("num_batches_tracked")}


def load_net(path):
    """The PSPNet that the checkpoint holds, on the CPU, in eval mode, in float32.

    Reads checkpoints of train.py and mmsegmentation's (the names are the same) for every backbone
    in BACKBONES, recognised by names and shapes: net.backbone_name and net.num_classes tell.
    Raises CheckpointError for every other file. That includes mmsegmentation's PSPNets of output
    stride 32 and of align_corners=True (crop 769x769), although their weights would fit.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a checkpoint of a PSPNet: it has no 'state_dict'")
    config = str(checkpoint.get("meta"))  # mmsegmentation keeps the text of its configuration there
    for setting in ("strides=(1, 2, 2, 2)", "align_corners=True"):
        if setting in config:
            raise CheckpointError(f"{path} was trained with {setting}, which would need another "
                                  "network than this (strides=(1, 2, 1, 1), align_corners=False)")
    num_classes, *_ = shapes(state).get("decode_head.conv_seg.bias") or [1]
    for backbone in BACKBONES:
        with torch.device("meta"):  # names and shapes without values
            net = PSPNet(num_classes, backbone)
        if shapes(net.state_dict()) == shapes(state):
            net.load_state_dict(dict(state), assign=True)  # the values of the file instead of none
            return net.float().eval()
    raise CheckpointError(f"{path} is not a checkpoint of a PSPNet with one of the backbones "
                          f"{', '.join(BACKBONES)}: its names and shapes are others")


def load_backbone(net, weights):
    """Put the weights of an ImageNet classifier into net.backbone.

    `weights` is "imagenet", for the file in BACKBONES (kept in torch.hub's cache once downloaded),
    or a path. Raises CheckpointError where they cannot be had or belong to another backbone.
    """
    if weights == "imagenet":
        url = BACKBONES[net.backbone_name][-1]
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        except (OSError, RuntimeError) as error:  # no network, no space, or another sha256
            raise CheckpointError(f"cannot download the ImageNet weights {url} ({error}): copy the "
                                  "file here and type --weights FILE, or --weights none") from error
    else:
        state = read_checkpoint(weights)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    if shapes(state) != shapes(net.backbone.state_dict()):
        raise CheckpointError(f"{weights} does not hold the weights of a {net.backbone_name}: "
                              "its names and shapes are others")
    net.backbone.load_state_dict(state)


# ------------------------------------------------------------------------------------------------
# python pspnet.py


def print_stages(net, size):
    """A line per stage as it runs: operation, channels, stride, dilation, output size; parameters.
    `net` is on the device "meta", which has shapes without values."""
    hooks = []
    print(f"{'stage':18}{'operation':16}{'channels':>8}{'stride':>8}{'dilation':>10}{'output':>12}")

    def hook(name, operation):
        def print_line(module, _, output):
            _, channels, height, width = output.shape
            dilations = {conv.dilation[0] for conv in module.modules()
                         if isinstance(conv, nn.Conv2d) and conv.kernel_size[0] > 1}
            dilation = ", ".join(map(str, sorted(dilations)))
            print(f"{name:18}{operation:16}{channels:8}{round(size[0] / height):8}{dilation:>10}"
                  f"{f'{height} x {width}':>12}")
        hooks.append(net.get_submodule(name).register_forward_hook(print_line))

    deep = net.backbone.deep_stem
    hook("backbone.stem" if deep else "backbone.conv1", "3 conv 3x3" if deep else "conv 7x7")
    hook("backbone.maxpool", "max pool 3x3")
    for name in ("backbone.layer1", "backbone.layer2", "backbone.layer3", "backbone.layer4"):
        blocks = net.get_submodule(name)
        hook(name, f"{len(blocks)} {type(blocks[0]).__name__}")
    hook("decode_head", "pyramid, 3x3")
    hook("auxiliary_head", "conv 3x3")
    net.train()(torch.empty(2, 3, *size, device="meta"))
    for handle in hooks:
        handle.remove()
    parameters = sum(p.numel() for p in net.parameters())
    auxiliary = sum(p.numel() for p in net.auxiliary_head.parameters())
    print(f"\n{parameters:,} parameters, {parameters - auxiliary:,} without the auxiliary head")


def count_gflops(net, shape, training):
    """10^9 floating-point operations, two per multiply-add, of a forward (and backward)."""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        outputs = net.train(training)(torch.empty(shape, device="meta"))
        if training:
            sum(output.sum() for output in outputs).backward()
    return counter.get_total_flops() / 1e9


def measure(textbook, backbone, size):
    """task -> (seconds of its second run, peak memory in MiB of the process so far), for the exact
    or the textbook's head. Call it in a process of its own: a process keeps its peak."""
    import resource  # not on Windows

    h, w = size
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    net = PSPNet(backbone=backbone).to(device)
    if textbook:
        net.decode_head.forward = net.decode_head.textbook_forward
    features = torch.rand(1, net.decode_head.psp_modules[0][1].conv.in_channels, h // 8, w // 8)
    images = torch.randint(256, (1, 3, h, w), dtype=torch.uint8)
    pair = torch.randint(256, (2, 3, h // 2, w // 2), dtype=torch.uint8)
    features, images, pair = features.to(device), images.to(device), pair.to(device)

    def head():
        with torch.inference_mode():
            net.eval().decode_head(features)

    def forward():
        with torch.inference_mode():
            net.eval()(images)

    def training_step():
        sum(output.mean() for output in net.train()(pair)).backward()

    results = {}
    for task, label in ((head, f"head, 1 image of {h}x{w}"), (forward, f"network, 1 x {h}x{w}"),
                        (training_step, f"forward + backward, 2 x {h // 2}x{w // 2}")):
        for _ in range(2):
            start = time.perf_counter()
            task()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds = time.perf_counter() - start
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 if device.type == "cpu"
                else torch.accelerator.max_memory_allocated() / 2**20)
        results[label] = seconds, peak
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50_v1c")
    parser.add_argument("--size", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"),
                        help="size of the images in pixels (512 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each head (3)")
    args = parser.parse_args()
    if min(args.size) < 16 or args.rounds < 1:
        parser.error("--size takes 16 pixels or more, --rounds 1 or more")

    with torch.device("meta"):
        net, textbook = PSPNet(backbone=args.backbone), PSPNet(backbone=args.backbone)
    textbook.decode_head.forward = textbook.decode_head.textbook_forward
    print_stages(net, args.size)
    for training in (False, True):
        ours, others = (count_gflops(n, (2, 3, *args.size), training) / 2 for n in (net, textbook))
        print(f"{'forward + backward' if training else 'forward':18} {ours:5.0f} GFLOPs per image, "
              f"{ours / others:.3f} of the {others:.0f} with the textbook's head")

    print(f"\nseconds and peak memory, medians of {args.rounds} rounds of exact and textbook's "
          f"head in turn (torch {torch.__version__}, {torch.get_num_threads()} threads):")
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    rounds = [[pool.submit(measure, textbook, args.backbone, args.size).result()
               for textbook in (False, True)] for _ in range(args.rounds)]
    for label in rounds[0][0]:
        print(f"{label:34}", end="")
        for head, name in enumerate(("exact", "textbook")):
            seconds, memory = zip(*(pair[head][label] for pair in rounds), strict=True)
            print(f"{name} {median(seconds):6.2f} s {median(memory):6.0f} MiB   ", end="")
        print(f"{median(a[label][0] / b[label][0] for a, b in rounds):.2f} of the time")


if __name__ == "__main__":
    main()
