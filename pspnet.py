"""PSPNet, the Pyramid Scene Parsing Network (H. Zhao et al., CVPR 2017, arXiv:1612.01105).

    net = PSPNet(num_classes=19, backbone="resnet50_v1c", bins=(1, 2, 3, 6))  # to read
    net = FastPSPNet(19)        # to run: the same function, with a fifth less arithmetic
    net = load_net("best.pt")   # from train.py, or one of mmsegmentation's published files
    logits, aux_logits = net(images)  # images: RGB, (B, 3, H, W), 0..255; logits: (B, 19, H, W)

    python pspnet.py            # parameters, arithmetic, and the difference between the two

The same shape is a boat on a river and a car on a street: the scene tells. PSPNet is a ResNet that
keeps an eighth of the image's resolution, and a head that looks at the whole scene. The head
averages the features over grids of 1x1, 2x2, 3x3 and 6x6 regions, and hands the averages back to
every position. Names of weights and results are those of mmsegmentation 1.2.2.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# Mean and standard deviation of ImageNet's photographs: R, G and B, each of 0..255.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def shortcut(in_channels, out_channels, stride):
    """nn.Identity where a block keeps the shape, otherwise a 1x1 convolution with batch norm. The
    blocks call it `downsample`, because files of weights do."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (ResNet-18): (B, in_channels, H, W) -> (B, channels,
    H/stride, W/stride). Only the first is dilated (see ResNet), as in mmsegmentation."""

    expansion = 1  # output channels divided by `channels`

    def __init__(self, in_channels, channels, stride=1, dilation=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=dilation,
                               dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn2.weight)  # at first a block adds 0 to its shortcut
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
        nn.init.zeros_(self.bn3.weight)  # at first a block adds 0 to its shortcut
        self.downsample = shortcut(in_channels, 4 * channels, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


TORCHVISION = "https://download.pytorch.org/models/"
OPENMMLAB = "https://download.openmmlab.com/pretrain/third_party/"
BACKBONES = {  # block, blocks in each stage, a deep stem (V1c: see ResNet), ImageNet weights
    "resnet18": (BasicBlock, (2, 2, 2, 2), False, TORCHVISION + "resnet18-f37072fd.pth"),
    "resnet50": (Bottleneck, (3, 4, 6, 3), False, TORCHVISION + "resnet50-0676ba61.pth"),
    "resnet101": (Bottleneck, (3, 4, 23, 3), False, TORCHVISION + "resnet101-63fe2227.pth"),
    "resnet18_v1c": (BasicBlock, (2, 2, 2, 2), True, OPENMMLAB + "resnet18_v1c-b5776b93.pth"),
    "resnet50_v1c": (Bottleneck, (3, 4, 6, 3), True, OPENMMLAB + "resnet50_v1c-2cccc1ad.pth"),
    "resnet101_v1c": (Bottleneck, (3, 4, 23, 3), True, OPENMMLAB + "resnet101_v1c-e67eebb6.pth"),
}


class ResNet(nn.Module):
    """A ResNet (He et al., CVPR 2016) whose output has an eighth of the image's resolution:
    normalised images (B, 3, H, W) -> stage 3 (B, 256 e, H/8, W/8) and stage 4 (B, 512 e, H/8, W/8),
    where e is the block's expansion, 1 or 4, and H/8 and W/8 are rounded up.

    In the original, stages 3 and 4 (`layer3`, `layer4`) halve the resolution too. Here they don't.
    So neighbouring positions are closer together in the image than the ImageNet weights expect: by
    a factor of 2 in stage 3, of 4 in stage 4. A 3x3 convolution of dilation 2 or 4 reads every
    second or fourth position, and spans the old distance. The first block of a stage still reads
    the stage before, so it keeps that stage's dilation: 1 in stage 3, 2 in stage 4 (as in
    torchvision and mmsegmentation). The stem is a 7x7 convolution, in V1c three 3x3 (deep)."""

    def __init__(self, name):
        super().__init__()
        block, depths, self.deep_stem, _ = BACKBONES[name]
        if self.deep_stem:
            layers = []
            for inputs, outputs, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
                layers.append(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False))
                layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
            self.stem = nn.Sequential(*layers)
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        e = block.expansion

        def stage(in_channels, channels, depth, stride=1, first_dilation=1, dilation=1):
            blocks = [block(in_channels, channels, stride, first_dilation)]
            for _ in range(depth - 1):
                blocks.append(block(e * channels, channels, 1, dilation))
            return nn.Sequential(*blocks)

        self.layer1 = stage(64, 64, depths[0])
        self.layer2 = stage(64 * e, 128, depths[1], stride=2)
        self.layer3 = stage(128 * e, 256, depths[2], first_dilation=1, dilation=2)  # not stride=2
        self.layer4 = stage(256 * e, 512, depths[3], first_dilation=2, dilation=4)  # not stride=2

    def forward(self, x):
        if self.deep_stem:
            x = self.stem(x)  # H/2, W/2
        else:
            x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer1(self.maxpool(x))  # H/4, W/4
        x = self.layer2(x)  # H/8, W/8, and from here on
        stage3 = self.layer3(x)
        stage4 = self.layer4(stage3)
        return stage3, stage4


class ConvBNReLU(nn.Sequential):
    """Convolution of stride 1 that keeps the size, batch norm, ReLU. nn.Sequential has a forward of
    its own. It runs the modules in the order in which they are assigned here."""

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)


class PyramidHead(nn.Module):
    """Pyramid pooling and classifier (section 3.2, figure 3): x (B, C, h, w) -> logits (B,
    num_classes, h, w). Each number k in `bins` is a level of the pyramid, which averages x over a
    grid of k x k regions. With bins=() there is no pyramid."""

    def __init__(self, in_channels, num_classes, bins=(1, 2, 3, 6)):
        super().__init__()
        channels = in_channels // 4  # of each level, and of the 3x3 convolution's output
        self.bins = tuple(bins)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(k), ConvBNReLU(in_channels, channels, 1))
            for k in self.bins)
        # The name is mmsegmentation's. It has nothing to do with the block Bottleneck.
        self.bottleneck = ConvBNReLU(in_channels + len(self.bins) * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        levels = [x]  # in ResNet-50 (B, 2048, h, w)
        for level in self.psp_modules:
            p = level(x)  # averages, 1x1 convolution, batch norm, ReLU: (B, 512, k, k)
            p = F.interpolate(p, x.shape[-2:], mode="bilinear", align_corners=False)
            levels.append(p)  # (B, 512, h, w)
        y = torch.cat(levels, dim=1)  # (B, 2048 + 4 * 512, h, w)
        y = self.bottleneck(y)  # 3x3 convolution, batch norm, ReLU: (B, 512, h, w)
        return self.conv_seg(self.dropout(y))


class AuxiliaryHead(nn.Sequential):
    """A second classifier, on stage 3: x (B, C, h, w) -> logits (B, num_classes, h, w). Its loss
    helps to train a deep network (section 3.3, figure 4). It is used in training only."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        channels = in_channels // 4
        self.convs = nn.Sequential(ConvBNReLU(in_channels, channels, 3))  # "convs.0" in files
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)


class PSPNet(nn.Module):
    """The whole network. `backbone` is a name in BACKBONES, `bins` are the levels of PyramidHead.

    net(images) -> (logits, aux_logits). images: RGB, (B, 3, H, W), uint8 or float, 0..255, any H
    and W. The network normalises them itself. logits and aux_logits: (B, num_classes, H, W), float.
    In eval mode aux_logits are None. In train mode, with 1 among the bins, B must be 2 or more:
    that level has one value per channel and image, and batch norm needs two. Weights start at
    random, as in mmsegmentation 1.2.2: convolutions Kaiming normal over the fan out, classifiers
    N(0, 0.01^2) with bias 0. `load_backbone` brings ImageNet's weights."""

    Head = PyramidHead  # FastPSPNet has another Head, and another `upsample`

    def __init__(self, num_classes=19, backbone="resnet50_v1c", bins=(1, 2, 3, 6)):
        super().__init__()
        # Checkpoints hold the arguments, so that load_net can build the network again.
        self.arguments = {"num_classes": num_classes, "backbone": backbone, "bins": list(bins)}
        channels = 512 * BACKBONES[backbone][0].expansion
        self.backbone = ResNet(backbone)
        self.decode_head = self.Head(channels, num_classes, bins)
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
        logits = self.upsample(self.decode_head(stage4), size)
        aux_logits = None
        if self.training:
            aux_logits = self.upsample(self.auxiliary_head(stage3), size)
        return logits, aux_logits

    def upsample(self, x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    def normalize(self, images):
        """Values of 0..255 -> standard deviations from the mean, in the weights' dtype."""
        images = images.to(self.decode_head.conv_seg.weight.dtype)
        channels = [(images[:, c] - MEAN[c]) / STD[c] for c in range(3)]
        return torch.stack(channels, dim=1)


# Here the lesson ends. What follows is the same network, only faster, and files of weights. ------


def region_matrix(k, length, like):
    """M, (k, length), in the dtype and on the device of `like`: M[m, r] is 1 where position r lies
    in region m, else 0. Region m of the k regions of an axis starts at floor(m length / k) and ends
    before ceil((m + 1) length / k), as in nn.AdaptiveAvgPool2d."""
    m = torch.arange(k, device=like.device)[:, None]
    r = torch.arange(length, device=like.device)
    inside = ((m * length) // k <= r) & (r * k < (m + 1) * length)  # r < ceil(a / k): r k < a
    return inside.to(like.dtype)


def interpolation_matrix(cells, length, like):
    """R, (length, cells), of linear interpolation along an axis (align_corners=False): value r is
    the sum over m of R[r, m] times cell m. R[r, m] is 1 minus the distance from r to m, or 0."""
    dtype = torch.promote_types(like.dtype, torch.float32)  # bfloat16 cannot hold 256.5
    r = torch.arange(length, dtype=dtype, device=like.device)[:, None]
    m = torch.arange(cells, dtype=dtype, device=like.device)
    position = (r + 0.5) * cells / length - 0.5  # of r's center, in cells
    distance = (position.clamp(0, cells - 1) - m).abs()
    return (1 - distance).clamp(min=0).to(like.dtype)


def with_neighbours(matrix):
    """(length, k) -> (length, 3 k): the new row r is [row r - 1, row r, row r + 1]. Rows beyond the
    ends are 0, which is the zero padding of the convolution."""
    before = F.pad(matrix, (0, 0, 1, 0))[:-1]
    after = F.pad(matrix, (0, 0, 0, 1))[1:]
    return torch.cat([before, matrix, after], dim=1)


class FastPyramidHead(PyramidHead):
    """The same function as PyramidHead, for half its arithmetic (a fifth of the network's).

    A convolution of concatenated channels is the sum of one convolution per part. So take one level
    p, k x k cells in each channel i, and its part W of the weight. Stretched to h x w, channel i is
    at row r and column c the sum over m and n of R[r, m] p[i, m, n] S[c, n], with the interpolation
    matrices R of h and S of w. The 3x3 convolution sums nine shifts (u, v = 0, 1, 2) of it, where R
    and S are 0 beyond the ends:

        y[o, r, c] = sum over i, u, v, m, n of
                     R[r + u - 1, m]  W[o, i, u, v]  p[i, m, n]  S[c + v - 1, n]

    PyramidHead multiplies R, p and S first, and then by W at h x w positions. This head multiplies
    W and p first, on k x k cells, then R, and S last. It is the same sum in another order."""

    def forward(self, x):
        channels = x.shape[1]
        parts = [channels] + [channels // 4] * len(self.bins)  # of x, and of each level
        weight_of_x, *weights = self.bottleneck.conv.weight.split(parts, dim=1)
        y = F.conv2d(x, weight_of_x, padding=1)
        if self.bins:
            y = y + self.convolve_levels(x, weights)
        y = F.relu(self.bottleneck.bn(y), inplace=True)
        return self.conv_seg(self.dropout(y))

    def convolve_levels(self, x, weights):
        """The y of the formula, summed over the levels: (B, o, h, w). Only step 3 makes something
        as large as y, once for all levels. Channels are last: fast where x is channels_last."""
        h, w = x.shape[2:]
        lefts, rights = [], []  # of the last product, by level
        levels = zip(self.bins, self.pool(x), self.psp_modules, weights, strict=True)
        for k, means, (_, conv_bn_relu), W in levels:  # _: nn.AdaptiveAvgPool2d, not used
            p = conv_bn_relu(means)  # (B, i, m, n)
            Wp = torch.einsum("oiuv,bimn->bumvno", W, p)  # 1. the sum over i: (B, u, m, v, n, o)
            Wp = Wp.flatten(3).flatten(1, 2)  # (B, u m, v n o): "u m" is one axis, of 3 k
            R = with_neighbours(interpolation_matrix(k, h, x))  # (r, u m): R[r + u - 1, m]
            RWp = R @ Wp  # 2. the sum over u and m: (B, r, v n o)
            lefts.append(RWp.unflatten(2, (3 * k, -1)))  # (B, r, v n, o)
            rights.append(with_neighbours(interpolation_matrix(k, w, x)))  # S: (c, v n)
        # 3. the sum over v, n and levels, side by side (one axis, K): (c, K) @ (B, r, K, o)
        y = torch.cat(rights, dim=1) @ torch.cat(lefts, dim=2)  # (B, r, c, o)
        return y.permute(0, 3, 1, 2)

    def pool(self, x):
        """x (B, C, h, w) -> a list with the means of each level's regions, (B, C, k, k). Sums are
        products with 0 and 1, and divided afterwards: bfloat16 holds 1 exactly, but not 1 / 3."""
        h, w = x.shape[2:]
        x = x.permute(0, 2, 3, 1)  # (B, h, w, C)
        rows = torch.cat([region_matrix(k, h, x) for k in self.bins])  # (1 + 2 + 3 + 6, h)
        counts = rows.float().sum(dim=1, keepdim=True)  # bfloat16 is exact up to 256 only
        strips = (rows @ x.flatten(2) / counts).to(x.dtype)  # (B, 1 + 2 + 3 + 6, w C)
        means = []
        for k, strip in zip(self.bins, strips.split(self.bins, dim=1), strict=True):
            columns = region_matrix(k, w, x)
            counts = columns.float().sum(dim=1, keepdim=True)
            cells = (columns @ strip.unflatten(2, (w, -1)) / counts).to(x.dtype)  # (B, k, k, C)
            means.append(cells.permute(0, 3, 1, 2))
        return means


class FastPSPNet(PSPNet):
    """The same function as PSPNet: faster, and on CUDA with the same gradients in every run."""

    Head = FastPyramidHead

    def upsample(self, x, size):
        """Bilinear as well, as two matrix products: on CUDA the gradient of F.interpolate is not
        deterministic by default. In float32 (or float64) also under autocast, for the loss."""
        device = "cpu" if x.is_meta else x.device.type  # "meta" has no autocast
        with torch.autocast(device, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            R = interpolation_matrix(x.shape[2], size[0], x)
            S = interpolation_matrix(x.shape[3], size[1], x)
            return R @ (x @ S.mT)


class CheckpointError(Exception):
    """A file does not hold the weights that were asked for. The text is a sentence for the user."""


def reason_of(error):
    """The line of a loading error that says what is wrong, in PyTorch's words."""
    return str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]


def read_weights(path):
    """(state dict, checkpoint) of a file of torch.save's, on the CPU. A bare state dict is
    returned twice. Raises OSError, and CheckpointError where the file holds no weights."""
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)  # runs no code
        except Exception as error:  # a damaged file makes torch.load raise almost anything
            raise CheckpointError(f"{path} cannot be read as what torch.save writes "
                                  f"({reason_of(error)})") from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no dictionary of weights")
    return state, checkpoint


def shapes(state):
    """name -> shape in a state dict, without batch norm's counters, which older files lack."""
    return {name: getattr(value, "shape", None) for name, value in state.items()
            if not str(name).endswith("num_batches_tracked")}


def load_net(path):
    """The FastPSPNet that a checkpoint holds, on the CPU, in eval mode, in float32. Its attribute
    class_names is a list, or None where the checkpoint has none. A checkpoint of train.py has the
    arguments of PSPNet in "model"; in one of mmsegmentation the shapes tell the backbone.

    Raises OSError, and CheckpointError for every other file, also for mmsegmentation's PSPNets of
    output stride 32 and of align_corners=True (crop 769x769), although their weights would fit."""
    state, checkpoint = read_weights(path)
    config = str(checkpoint.get("meta"))  # where mmsegmentation keeps the text of its configuration
    for setting in ("strides=(1, 2, 2, 2)", "align_corners=True"):
        if setting in config:
            raise CheckpointError(f"{path} was trained with {setting}, which would need another "
                                  "network than this (strides=(1, 2, 1, 1), align_corners=False)")
    classifier = shapes(state).get("decode_head.conv_seg.bias") or [1]
    for backbone in BACKBONES:
        arguments = {"num_classes": classifier[0], "backbone": backbone}
        try:
            with torch.device("meta"):  # a device without memory: names and shapes, no values
                net = FastPSPNet(**checkpoint.get("model", arguments))
            if shapes(net.state_dict()) == shapes(state):
                # From a plain dict batch norm adds the counters that older files lack.
                net.load_state_dict(dict(state), assign=True)  # "meta" holds nothing to copy to
                class_names = checkpoint.get("classes")
                net.class_names = class_names if isinstance(class_names, list) else None
                return net.float().eval()
        except Exception:  # "model" or the weights are those of another program
            break
    raise CheckpointError(f"{path} holds no PSPNet of this program or of mmsegmentation: names, "
                          f"shapes or types are others (the first is {next(iter(state), None)!r})")


def load_backbone(net, weights):
    """Put an ImageNet classifier's weights into net.backbone: of the file `weights`, or, if that is
    "imagenet", of the file in BACKBONES, which torch.hub downloads once. Raises OSError, and
    CheckpointError where they can't be had or are another backbone's."""
    backbone = net.arguments["backbone"]
    if weights == "imagenet":
        _, _, _, url = BACKBONES[backbone]
        weights = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        if not weights.exists():
            try:  # It puts the file there, whole or not at all.
                torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
            except Exception as error:  # no network, no space, another hash
                raise CheckpointError(f"cannot download {url} ({reason_of(error)}): give --weights "
                                      "FILE, or --weights none") from error
    state, _ = read_weights(weights)
    state = {name: value for name, value in state.items() if not str(name).startswith("fc.")}
    if shapes(state) != shapes(net.backbone.state_dict()):
        raise CheckpointError(f"{weights} does not hold a {backbone}: names and shapes are others")
    net.backbone.load_state_dict(state)


if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode  # on Windows it warns when it is imported

    net = PSPNet().double().eval()
    fast = FastPSPNet().double().eval()
    fast.load_state_dict(net.state_dict())
    images = torch.randint(256, (1, 3, 128, 256))
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{parameters:,} parameters")
    for kind in (PSPNet, FastPSPNet):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:  # without values
            kind().eval()(torch.empty(1, 3, 512, 1024))
        print(f"{kind.__name__}: {counter.get_total_flops() / 1e9:.0f} GFLOP for 512x1024 pixels")
    with torch.inference_mode():
        difference = (fast(images)[0] - net(images)[0]).abs().max()
    print(f"largest difference of their logits, of a random image in float64: {difference:.2g}")
