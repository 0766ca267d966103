"""PSPNet, the Pyramid Scene Parsing Network (H. Zhao et al., CVPR 2017, arXiv:1612.01105).

    net = PSPNet(num_classes=19, backbone="resnet50_v1c", bins=(1, 2, 3, 6))
    logits, aux_logits = net(images)  # images: RGB, (B, 3, H, W), 0..255; logits: (B, 19, H, W);
                                      # aux_logits: a second classifier's, for the loss, or None
    net = load_net("best.pt")         # from train.py, or one of mmsegmentation's published files

    python pspnet.py                  # parameters, GFLOPs, and a check that the head is exact

A ResNet that keeps an eighth of the image's resolution, a pyramid of averages over grids of 1x1,
2x2, 3x3 and 6x6 regions that tells every position what scene it is in, and a classifier. Names of
weights and results are those of mmsegmentation 1.2.2, the reference (tests/test_pspnet.py: to 1e-9
in float64), for a fifth less arithmetic: `PyramidHead.forward` explains how, and why it is exact.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Mean and standard deviation of ImageNet's photographs: R, G and B, each of 0..255.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


# The backbone -----------------------------------------------------------------------------------


def shortcut(in_channels, out_channels, stride):
    """The identity where a block keeps the shape, otherwise a 1x1 convolution with batch norm. The
    blocks call it `downsample`, as the files of weights do, whatever the stride."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (ResNet-18): (B, in_channels, H, W) -> (B, channels,
    H/stride, W/stride). Only the first convolution is dilated, as in mmsegmentation."""

    expansion = 1  # output channels divided by `channels`

    def __init__(self, in_channels, channels, stride=1, dilation=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=dilation,
                               dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn2.weight)  # a block starts as its shortcut
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
        nn.init.zeros_(self.bn3.weight)
        self.downsample = shortcut(in_channels, 4 * channels, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


TORCHVISION = "https://download.pytorch.org/models/"
OPENMMLAB = "https://download.openmmlab.com/pretrain/third_party/"
BACKBONES = {  # block, blocks per stage, ImageNet weights; V1c has another stem, see ResNet
    "resnet18": (BasicBlock, (2, 2, 2, 2), TORCHVISION + "resnet18-f37072fd.pth"),
    "resnet50": (Bottleneck, (3, 4, 6, 3), TORCHVISION + "resnet50-0676ba61.pth"),
    "resnet101": (Bottleneck, (3, 4, 23, 3), TORCHVISION + "resnet101-63fe2227.pth"),
    "resnet18_v1c": (BasicBlock, (2, 2, 2, 2), OPENMMLAB + "resnet18_v1c-b5776b93.pth"),
    "resnet50_v1c": (Bottleneck, (3, 4, 6, 3), OPENMMLAB + "resnet50_v1c-2cccc1ad.pth"),
    "resnet101_v1c": (Bottleneck, (3, 4, 23, 3), OPENMMLAB + "resnet101_v1c-e67eebb6.pth"),
}


class ResNet(nn.Module):
    """A ResNet (He et al., CVPR 2016) of output stride 8: normalised images (B, 3, H, W) -> stage 3
    (B, 256 e, H/8, W/8) and stage 4 (B, 512 e, H/8, W/8), where e is the block's expansion, 1 or 4,
    and H/8 and W/8 round up.

    In the original, stages 3 and 4 (`layer3`, `layer4`) halve the resolution as well. Here they
    have stride 1, and their 3x3 convolutions (of a BasicBlock the first) are dilated by 2 and 4, so
    that they reach as far in the image as their ImageNet weights are used to. The first block of
    such a stage keeps the dilation of the stage before, whose output it reads (as in torchvision
    and mmsegmentation). V1c has another stem, the layers before stage 1: three 3x3 convolutions
    instead of one 7x7.
    """

    def __init__(self, name):
        super().__init__()
        block, depths, _ = BACKBONES[name]
        self.deep_stem = name.endswith("_v1c")
        if self.deep_stem:
            self.stem = nn.Sequential(
                nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        def stage(in_channels, channels, depth, stride=1, dilation=1):
            before = max(1, dilation // 2)  # the dilation of the stage before: 1, 1, 1, 2
            blocks = [block(in_channels, channels, stride, before)]
            in_channels = channels * block.expansion
            blocks += [block(in_channels, channels, 1, dilation) for _ in range(depth - 1)]
            return nn.Sequential(*blocks)

        e = block.expansion
        self.layer1 = stage(64, 64, depths[0])
        self.layer2 = stage(64 * e, 128, depths[1], stride=2)
        self.layer3 = stage(128 * e, 256, depths[2], dilation=2)
        self.layer4 = stage(256 * e, 512, depths[3], dilation=4)

    def forward(self, x):
        x = self.stem(x) if self.deep_stem else F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer2(self.layer1(self.maxpool(x)))  # stem, maxpool, layer2: each halves H and W
        stage3 = self.layer3(x)
        return stage3, self.layer4(stage3)


# Pooling and stretching as matrix products ------------------------------------------------------


def unit_vectors(length, like):
    """The identity matrix, (1, length, length), on the device of `like`. What a linear function
    makes of its row i, the i-th unit vector, is column i of that function's own matrix."""
    dtype = torch.promote_types(like.dtype, torch.float32)  # bfloat16 is too coarse for positions
    return torch.eye(length, dtype=dtype, device=like.device)[None]


def pooling_matrix(cells, length, like):
    """P, (1, 1, cells, length), of average pooling: with P of h and Q of w, P @ x @ Q.mT holds the
    means of x (B, C, h, w) by regions, which overlap where `cells` doesn't divide `length`."""
    pooled = F.adaptive_avg_pool1d(unit_vectors(length, like), cells)
    return pooled.mT.to(like.dtype)[None]


def interpolation_matrix(cells, length, like):
    """R, (1, 1, length, cells), of linear interpolation: with R of h and S of w, R @ p @ S.mT
    stretches p (B, C, cells, cells) bilinearly to h x w (align_corners=False)."""
    stretched = F.interpolate(unit_vectors(cells, like), length, mode="linear")
    return stretched.mT.to(like.dtype)[None]


def upsample(x, size):
    """x (B, C, h, w) -> (B, C, *size), bilinear, in float32 (or float64) also under autocast,
    because the loss is computed from it. (F.interpolate is slower on a CPU, and on CUDA its
    gradient is nondeterministic; see torch.use_deterministic_algorithms.)"""
    device = "cpu" if x.is_meta else x.device.type  # "meta", shapes without values, has no autocast
    with torch.autocast(device, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rows = interpolation_matrix(x.shape[-2], size[0], like=x)
        columns = interpolation_matrix(x.shape[-1], size[1], like=x)
        return rows @ (x @ columns.mT)


# The heads --------------------------------------------------------------------------------------


class ConvBNReLU(nn.Sequential):
    """Convolution of stride 1 that keeps the size, batch norm, ReLU: nn.Sequential runs its
    attributes in the order in which they are set."""

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)


def three_shifts(matrix):
    """R, (1, 1, n, k) -> [R_0 R_1 R_2] of step 4 below, (1, 1, n, 3k): row i of the result is rows
    i - 1, i and i + 1 side by side, with zeros beyond the first and the last."""
    padded = F.pad(matrix, (0, 0, 1, 1))  # a row of zeros above and below
    return torch.cat([padded[:, :, :-2], padded[:, :, 1:-1], padded[:, :, 2:]], dim=3)


class PyramidHead(nn.Module):
    """Pyramid pooling and classifier (section 3.2, figure 3): x (B, C, h, w) -> (B, num_classes, h,
    w). `bins` are the levels: k averages x over a grid of k x k regions; () leaves them out."""

    def __init__(self, in_channels, num_classes, bins=(1, 2, 3, 6)):
        super().__init__()
        channels = in_channels // 4  # of each level, and of the 3x3 convolution's output
        self.bins = tuple(bins)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(k), ConvBNReLU(in_channels, channels, 1))
            for k in self.bins)
        # "bottleneck" is mmsegmentation's name for it; it has nothing to do with the block above.
        self.bottleneck = ConvBNReLU(in_channels + len(self.bins) * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def textbook_forward(self, x):
        """As in the paper: each level averages x, has a 1x1 convolution, batch norm and ReLU, and
        is stretched to h x w; a 3x3 convolution reads the stack of x and the levels (in ResNet-50
        2048 + 4 * 512 channels)."""
        stretched = [F.interpolate(level(x), x.shape[-2:], mode="bilinear", align_corners=False)
                     for level in self.psp_modules]
        y = self.bottleneck(torch.cat([x, *stretched], dim=1))
        return self.conv_seg(self.dropout(y))

    def forward(self, x):
        """The same with less arithmetic: channels are mixed before they are stretched.

        Half of the channels that the 3x3 convolution reads are stretched from 1, 4, 9 and 36 cells.
        Call p_k the k x k cells of level k, after their ReLU. What is between the p_k and the batch
        norm after the 3x3 convolution is linear, and is rewritten:

        1. A convolution of a stack is the sum of one convolution per part, each with its own slice
           of the weight:  conv(stack; W) = conv(x; W_x) + sum over k of conv(stretched p_k; W_k).
           The next two steps are about one level, and write p and W for its p_k and W_k.
        2. Stretching acts on rows and columns of each channel i of p: it makes R p_i S^T of p_i,
           with R (h, k) and S (w, k) from `interpolation_matrix`.
        3. A 3x3 convolution adds nine copies of its input, one for each tap (u, v) of the kernel,
           u and v = 0, 1, 2. At (r, c) a copy shows the input at (r + u - 1, c + v - 1), and
           output channel o mixes its channels i by W[o, i, u, v]. Mixing channels and moving
           pixels don't interfere, so mix first, on the k x k cells, and stretch and move after:
               conv(R p S^T; W)_o = sum over u, v of  R_u (sum over i of W[o, i, u, v] p_i) S_v^T,
           where row r of R_u is row r + u - 1 of R, or zeros where R has no such row: they are the
           zero padding of the convolution. S_v likewise.
        4. That sum is a product of block matrices: [R_0 R_1 R_2], (h, 3k), times the nine mixtures
           as blocks of a (3k, 3k) matrix, times [S_0 S_1 S_2]^T, (3k, w). Multiply the last two;
           then the sum over the levels is one product as well: the left factors stand side by
           side, the right ones below each other; the inner dimension is 3 (1 + 2 + 3 + 6) = 36.
        """
        parts = [x.shape[1]] + [x.shape[1] // 4] * len(self.bins)  # channels of x, of each level
        weight_x, *weights = self.bottleneck.conv.weight.split(parts, dim=1)
        y = F.conv2d(x, weight_x, padding=1)
        if self.bins:
            y += self.convolved_levels(x, weights)
        y = F.relu(self.bottleneck.bn(y), inplace=True)
        return self.conv_seg(self.dropout(y))

    def convolved_levels(self, x, weights):
        """The sum over k of conv(stretched p_k; W_k), (B, channels, h, w), by steps 2 to 4."""
        h, w = x.shape[-2:]
        # Down the columns for all levels at once, as x is large: (B, C, 1 + 2 + 3 + 6, w).
        strips = torch.cat([pooling_matrix(k, h, like=x) for k in self.bins], dim=2) @ x
        lefts, rights = [], []
        for k, strip, (_, conv_bn_relu), weight in zip(
                self.bins, strips.split(self.bins, dim=2), self.psp_modules, weights, strict=True):
            means = strip @ pooling_matrix(k, w, like=x).mT  # k x k, as _, the pooling, gives
            p = conv_bn_relu(means)  # (B, channels, k, k)
            # b: images; o, i: channels out and in; u, v: taps; m, n: rows and columns of cells
            mixtures = torch.einsum("oiuv,bimn->boumvn", weight, p)
            blocks = mixtures.reshape(*mixtures.shape[:2], 3 * k, 3 * k)
            lefts.append(three_shifts(interpolation_matrix(k, h, like=x)))  # (1, 1, h, 3k)
            rights.append(blocks @ three_shifts(interpolation_matrix(k, w, like=x)).mT)
        return torch.cat(lefts, dim=3) @ torch.cat(rights, dim=2)  # (h, 36) @ (36, w) per channel


class AuxiliaryHead(nn.Sequential):
    """A classifier on stage 3, which helps to train the deep network (section 3.3, figure 4):
    x (B, C, h, w) -> (B, num_classes, h, w)."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        channels = in_channels // 4
        self.convs = nn.Sequential(ConvBNReLU(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)


class PSPNet(nn.Module):
    """The whole network; `backbone` is a name in BACKBONES, `bins` as in PyramidHead (the paper's
    table 1 compares some).

    net(images) -> (logits, aux_logits). images: RGB, (B, 3, H, W), uint8 or float, 0..255, any H
    and W; the network normalises them itself. Both logits: (B, num_classes, H, W), float;
    aux_logits is None in eval mode, where nobody uses it. In train mode B must be 2 or more where 1
    is among the bins, as that level gives batch norm one value per image.

    Weights start at random, as in mmsegmentation 1.2.2: convolutions Kaiming normal over the fan
    out, classifiers N(0, 0.01^2) with bias 0, and 0 for the last batch norm of each residual block.
    `load_backbone` brings ImageNet's weights.
    """

    def __init__(self, num_classes=19, backbone="resnet50_v1c", bins=(1, 2, 3, 6)):
        super().__init__()
        # A checkpoint has them beside the weights, so that load_net can build the network again.
        self.arguments = {"num_classes": num_classes, "backbone": backbone, "bins": list(bins)}
        self.classes = None  # their names, where load_net finds them in a checkpoint
        channels = 512 * BACKBONES[backbone][0].expansion
        self.backbone = ResNet(backbone)
        self.decode_head = PyramidHead(channels, num_classes, bins)
        self.auxiliary_head = AuxiliaryHead(channels // 2, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
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
        """Values of 0..255 -> standard deviations from the mean, in the weights' dtype. (MEAN and
        STD stay Python's numbers: they are on no device, and in no file of weights.)"""
        dtype = self.decode_head.conv_seg.weight.dtype
        return torch.stack([(images[:, c].to(dtype) - MEAN[c]) / STD[c] for c in range(3)], dim=1)


# Weights from files -----------------------------------------------------------------------------


class CheckpointError(Exception):
    """A file does not hold the weights that were asked for. The text is a sentence for the user."""


def read_checkpoint(path):
    """What torch.save wrote to `path`, tensors on the CPU; nothing in it is run (weights_only).
    Raises OSError, and CheckpointError where the file is damaged or holds other Python objects."""
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file makes torch.load raise almost anything
            reason = " ".join(str(error).split()) or type(error).__name__
            if "GLOBAL " in reason:  # PyTorch's text, in which the name of a class follows
                reason = (f"it holds {reason.partition('GLOBAL ')[2].split()[0]}, which is code: "
                          "save {'state_dict': ...} alone, with the program that wrote the file")
            raise CheckpointError(f"{path} cannot be read as tensors and plain Python; get it "
                                  f"again, or remove it ({reason})") from error


def shapes(state):
    """name -> shape in a state dict, except batch norm's counters, which older files lack. (The
    dictionary of another program may hold anything.)"""
    return {name: getattr(value, "shape", None) for name, value in state.items()
            if not str(name).endswith("num_batches_tracked")}


def read_weights(path):
    """(state dict, checkpoint) in a file; a state dict that is there alone counts as both. Raises
    OSError, and CheckpointError where there is no state dict."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no dictionary of weights")
    return state, checkpoint


def load_net(path):
    """The PSPNet that the checkpoint holds, on the CPU, in eval mode, in float32. net.classes are
    the names of its classes, or None where the checkpoint doesn't tell.

    train.py's checkpoints say which network they are of ("model", the arguments of PSPNet).
    mmsegmentation's (the names of the weights are the same) are recognised by their shapes.
    Raises OSError, and CheckpointError for every other file, also for mmsegmentation's PSPNets of
    output stride 32 and of align_corners=True (crop 769x769), although their weights would fit.
    """
    state, checkpoint = read_weights(path)
    config = str(checkpoint.get("meta"))  # where mmsegmentation keeps the text of its configuration
    for setting in ("strides=(1, 2, 2, 2)", "align_corners=True"):
        if setting in config:
            raise CheckpointError(f"{path} was trained with {setting}, which would need another "
                                  "network than this (strides=(1, 2, 1, 1), align_corners=False)")
    if "model" in checkpoint:
        candidates = [checkpoint["model"]]
    else:
        shape = shapes(state).get("decode_head.conv_seg.bias") or [1]  # without it nothing fits
        candidates = [{"num_classes": shape[0], "backbone": backbone} for backbone in BACKBONES]
    for arguments in candidates:
        try:
            with torch.device("meta"):  # a device of PyTorch: names and shapes without values
                net = PSPNet(**arguments)
        except Exception as error:  # the "model" of another program
            raise CheckpointError(f"{path}: its 'model' is no PSPNet of ours ({error})") from error
        if shapes(net.state_dict()) == shapes(state):
            # A plain dict has no version of its format, so batch norm fills in missing counters.
            net.load_state_dict(dict(state), assign=True)  # as nothing can be copied to "meta"
            net.classes = checkpoint.get("classes")
            return net.float().eval()
    raise CheckpointError(f"{path} does not hold the weights of a PSPNet: names and shapes are "
                          f"not those of {candidates}")


def load_backbone(net, weights):
    """Put the weights of an ImageNet classifier into net.backbone: from the path `weights`, or, if
    that is "imagenet", from the file in BACKBONES, kept in torch.hub's cache once downloaded.
    Raises OSError, and CheckpointError where they can't be had or are another backbone's."""
    backbone = net.arguments["backbone"]
    if weights == "imagenet":
        url = BACKBONES[backbone][-1]
        weights = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        if not weights.exists():
            hash_prefix = weights.stem.rpartition("-")[2]  # the name ends in digits of its SHA-256
            try:
                weights.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, weights, hash_prefix)  # whole or not at all
            except (OSError, RuntimeError) as error:  # no network, no space, or another hash
                raise CheckpointError(f"cannot download the ImageNet weights {url} ({error}): get "
                                      "the file by other means and type --weights FILE, or "
                                      "--weights none") from error
    state, _ = read_weights(weights)
    state = {name: value for name, value in state.items() if not str(name).startswith("fc.")}
    if shapes(state) != shapes(net.backbone.state_dict()):
        raise CheckpointError(f"{weights} does not hold the weights of a {backbone}: its names and "
                              "shapes are others")
    net.backbone.load_state_dict(state)


def count_gflops(net, shape):
    """10^9 floating-point operations of convolutions and matrix products, two per multiply-add, in
    a forward pass of images of this shape; net is on the device "meta" (shapes without values)."""
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(shape, device="meta"))
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    net = PSPNet().double().eval()
    image = torch.randint(256, (1, 3, 128, 256), dtype=torch.uint8)
    with torch.device("meta"):
        weightless = PSPNet().eval()
    with torch.inference_mode():
        exact, _ = net(image)
        exact_gflops = count_gflops(weightless, (1, 3, 512, 1024))
        for network in (net, weightless):  # both have the other head from here on
            network.decode_head.forward = network.decode_head.textbook_forward
        textbook, _ = net(image)
        textbook_gflops = count_gflops(weightless, (1, 3, 512, 1024))
    parameters = sum(p.numel() for p in net.parameters())
    print(f"PSPNet with {net.arguments['backbone']}: {parameters:,} parameters")
    print(f"GFLOPs for an image of 512x1024: exact head {exact_gflops:.0f}, textbook's "
          f"{textbook_gflops:.0f}, ratio {exact_gflops / textbook_gflops:.3f}")
    print(f"a random image of 128x256 in float64: logits up to {textbook.abs().max():.2g}, "
          f"largest difference between the heads {(exact - textbook).abs().max():.2g}")
