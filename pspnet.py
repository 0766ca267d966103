"""PSPNet, the Pyramid Scene Parsing Network (H. Zhao et al., CVPR 2017, arXiv:1612.01105).

    net = PSPNet(num_classes=19, backbone="resnet50_v1c", bins=(1, 2, 3, 6))
    logits, aux_logits = net(images)  # images: RGB, (B, 3, H, W), 0..255; logits: (B, 19, H, W)

The task is semantic segmentation: name the class of every pixel of a photograph. The same shape can
be a boat on a river or a car on a street: only the rest of the scene tells which. PSPNet therefore
has two parts. A ResNet computes features at one eighth of the photograph's resolution. Then a head
divides this map of features into 1, 2x2, 3x3 and 6x6 regions, and averages the features of each
region. Every position gets the averages of the regions in which it lies, blended with those of the
regions beside them. So it is classified by what is there and by what is around it, up to the whole
scene.

The modules have the names that they have in mmsegmentation 1.2.2, a well-known library, so that its
files of weights can be loaded. `python pspnet.py` prints the number of parameters and operations.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Mean and standard deviation of red, green and blue in ImageNet's photographs, on a scale of 0..255
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


# The ResNet, and what dilation is for -----------------------------------------------------------
#
# A ResNet (He et al., CVPR 2016) has a few first layers, and then four stages. A stage is a row of
# blocks. The first layers make the map four times smaller than the image. Stage 1 keeps its size.
# In the original each of the stages 2, 3 and 4 halves it again. So positions that are neighbors on
# the map are 8 pixels of the image apart in stage 2, 16 in stage 3, and 32 in stage 4. Here stages
# 3 and 4 keep the size of stage 2, because a map of classes needs the resolution. Neighbors stay 8
# pixels apart.
#
# But training does not begin with random weights. It begins with weights that an original ResNet
# has learned on ImageNet. In that network the 3x3 convolutions have learned to read positions that
# are 16 pixels apart in stage 3, and 32 in stage 4. Dilation restores this distance. A 3x3
# convolution of dilation d reads every d-th position, here 8 * d pixels apart.
#
#     3x3 convolution of       learned distance    distance of neighbors    dilation, the quotient
#     stage 3, first block      8 pixels           8 pixels                 1
#     stage 3, other blocks    16                  8                        2
#     stage 4, first block     16                  8                        2
#     stage 4, other blocks    32                  8                        4
#
# The first block of a stage has learned the distance of the stage before. In the ResNet of these
# weights this block halves the map: its 3x3 convolution has a stride of 2. So it reads the larger
# map. (In the paper a 1x1 convolution of this block has the stride.)


def shortcut(in_channels, out_channels, stride):
    """nn.Identity where a block keeps the shape, otherwise a 1x1 convolution with batch norm. The
    blocks call it `downsample`, because that is its name in files of weights."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (ResNet-18). `width` is the number of channels of
    both. x (B, in_channels, H, W) -> (B, width, H/stride, W/stride). Only the first convolution has
    the stride and the dilation: the table above is about this one. (The second reads neighbors, 8
    pixels apart, even where its weights have learned 16 or 32. This mismatch is mmsegmentation's.
    ResNet-50 and 101 do not have it.)"""

    expansion = 1  # the number of output channels divided by `width`

    def __init__(self, in_channels, width, stride=1, dilation=1):
        super().__init__()
        # A 3x3 kernel of dilation d reaches d positions to each side. With d positions of padding
        # only the stride changes the size of the map.
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=dilation,
                               dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        # A new block adds 0 to its shortcut. So training begins as if there were few layers.
        nn.init.zeros_(self.bn2.weight)
        self.downsample = shortcut(in_channels, width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (ResNet-50, 101). `width` is the number of
    channels of the 3x3 one, which has the stride and the dilation. x (B, in_channels, H, W) ->
    (B, 4 * width, H/stride, W/stride)."""

    expansion = 4

    def __init__(self, in_channels, width, stride=1, dilation=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation,
                               bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        nn.init.zeros_(self.bn3.weight)  # A new block adds 0 to its shortcut.
        self.downsample = shortcut(in_channels, 4 * width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


def stage(block, in_channels, width, depth, stride=1, first_dilation=1, dilation=1):
    """`depth` blocks in a row, which end with width * expansion channels. The first block may have
    a stride, and a dilation that differs from that of the others (see the table above)."""
    blocks = [block(in_channels, width, stride, first_dilation)]
    for _ in range(depth - 1):
        blocks.append(block(block.expansion * width, width, 1, dilation))
    return nn.Sequential(*blocks)


class Variant(NamedTuple):
    block: type  # BasicBlock or Bottleneck
    depths: tuple  # the number of blocks in each of the four stages
    deep_stem: bool  # True: the first layers are three 3x3 convolutions ("V1c"). False: one 7x7
    weights_file: str  # the name of a file with weights that were trained on ImageNet


BACKBONES = {
    "resnet18": Variant(BasicBlock, (2, 2, 2, 2), False, "resnet18-f37072fd.pth"),
    "resnet50": Variant(Bottleneck, (3, 4, 6, 3), False, "resnet50-0676ba61.pth"),
    "resnet101": Variant(Bottleneck, (3, 4, 23, 3), False, "resnet101-63fe2227.pth"),
    "resnet18_v1c": Variant(BasicBlock, (2, 2, 2, 2), True, "resnet18_v1c-b5776b93.pth"),
    "resnet50_v1c": Variant(Bottleneck, (3, 4, 6, 3), True, "resnet50_v1c-2cccc1ad.pth"),
    "resnet101_v1c": Variant(Bottleneck, (3, 4, 23, 3), True, "resnet101_v1c-e67eebb6.pth"),
}


class ResNet(nn.Module):
    """A ResNet whose output has an eighth of the image's resolution: normalized images (B, 3, H, W)
    -> the maps of stage 3 (B, 256 * e, H/8, W/8) and stage 4 (B, 512 * e, H/8, W/8). e is the
    block's expansion, 1 or 4. H/8 and W/8 are rounded up. In files of weights stages 1 to 4 are
    called layer1 to layer4. `name` is one of BACKBONES."""

    def __init__(self, name):
        super().__init__()
        variant = BACKBONES[name]
        self.deep_stem = variant.deep_stem
        if self.deep_stem:
            layers = []
            for in_channels, channels, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
                conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            self.stem = nn.Sequential(*layers)
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        block, depths, e = variant.block, variant.depths, variant.block.expansion  # e: 1 or 4
        self.layer1 = stage(block, 64, 64, depths[0])
        self.layer2 = stage(block, 64 * e, 128, depths[1], stride=2)
        # In the original these two have stride=2, and no dilation.
        self.layer3 = stage(block, 128 * e, 256, depths[2], first_dilation=1, dilation=2)
        self.layer4 = stage(block, 256 * e, 512, depths[3], first_dilation=2, dilation=4)

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


class ConvBNReLU(nn.Module):
    """A convolution that keeps the size, then batch norm, then ReLU."""

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class PyramidHead(nn.Module):
    """Pyramid pooling and classifier (section 3.2, figure 3): x (B, C, h, w) -> logits (B,
    num_classes, h, w).

    Each number k in `bins` is a level of the pyramid. A level divides the map x into a grid of k by
    k regions, and averages the features of each region. So k = 1 averages the whole map. A 1x1
    convolution reduces the averages to a quarter of the channels, and interpolation stretches them
    to h x w. The map x and all levels are concatenated. A 3x3 convolution and a classifier follow.

    Where k does not divide h, regions share rows: for h = 64 and k = 6 the first region has the
    rows 0 to 10, and the second 10 to 21. With bins=() there is no pyramid.

    train.py trains FastPSPNet, below the lesson. It has a faster `forward` for this head. So if you
    change this head, replace FastPSPNet by PSPNet in train.py and in load_net."""

    def __init__(self, in_channels, num_classes, bins=(1, 2, 3, 6)):
        super().__init__()
        # The number of channels of each level, and of the 3x3 convolution's output. (In the paper
        # each of N levels has 1/N of the channels. That is the same for four levels.)
        channels = in_channels // 4
        self.bins = tuple(bins)
        self.psp_modules = nn.ModuleList()
        for k in self.bins:
            average = nn.AdaptiveAvgPool2d(k)  # k is the size of the output: (B, C, k, k)
            self.psp_modules.append(nn.Sequential(average, ConvBNReLU(in_channels, channels, 1)))
        # The name is mmsegmentation's. It has nothing to do with the class Bottleneck.
        self.bottleneck = ConvBNReLU(in_channels + len(self.bins) * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)  # drops whole channels
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        parts = [x]  # x is (B, 2048, h, w) in ResNet-50.
        for average_and_conv in self.psp_modules:
            p = average_and_conv(x)  # one vector for each region: (B, 512, k, k)
            # Every position gets the vector of its region, blended with those of regions beside it.
            p = F.interpolate(p, x.shape[-2:], mode="bilinear", align_corners=False)
            parts.append(p)  # (B, 512, h, w)
        features = torch.cat(parts, dim=1)  # (B, 2048 + 4 * 512, h, w)
        y = self.bottleneck(features)  # 3x3 convolution, batch norm, ReLU: (B, 512, h, w)
        return self.conv_seg(self.dropout(y))


class AuxiliaryHead(nn.Module):
    """A second classifier, on stage 3: x (B, C, h, w) -> logits (B, num_classes, h, w). Its loss
    helps to train a deep network (section 4, figure 4), and it is used for nothing else."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        channels = in_channels // 4
        # A Sequential of one module, because in files of weights it is called convs.0
        self.convs = nn.Sequential(ConvBNReLU(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        return self.conv_seg(self.dropout(self.convs(x)))


class PSPNet(nn.Module):
    """The whole network. `backbone` is a name in BACKBONES, `bins` are the levels of PyramidHead.

    net(images) -> (logits, aux_logits). images: RGB, (B, 3, H, W), uint8 or float, 0..255, any H
    and W. The network normalizes them itself. logits and aux_logits: (B, num_classes, H, W), float.

    In eval mode aux_logits is None. In train mode B must be at least 2. The reason is the level
    k = 1: there a channel has a single value per image, and batch norm can't compute a variance
    from one value. (Without this level a batch of one is possible.)

    The weights of a new network are random. `load_backbone`, below the lesson, brings those of a
    ResNet that was trained on ImageNet."""

    Head = PyramidHead  # the class of decode_head. FastPSPNet, below, replaces it by another.

    def __init__(self, num_classes=19, backbone="resnet50_v1c", bins=(1, 2, 3, 6)):
        super().__init__()
        # Checkpoints hold these arguments, so that the network can be built again.
        self.arguments = {"num_classes": num_classes, "backbone": backbone, "bins": list(bins)}
        # A buffer goes to the GPU with the network. These two are not saved with the weights.
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        channels = 512 * BACKBONES[backbone].block.expansion  # of stage 4; half of them in stage 3
        self.backbone = ResNet(backbone)
        self.decode_head = self.Head(channels, num_classes, bins)
        self.auxiliary_head = AuxiliaryHead(channels // 2, num_classes)
        # The initial values are those of mmsegmentation. Batch norm keeps its own: bias 0,
        # and weight 1 (but 0 where a block ends).
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
        """Values of 0..255 -> floats of mean about 0 and standard deviation about 1."""
        return (images.to(self.mean.dtype) - self.mean) / self.std


# Here the lesson ends. What follows is the same network, only faster, and files of weights. ------
import re
from pathlib import Path


def matrix_of(function, length, like):
    """The matrix (outputs, length) of a linear function. Column j is function(e_j), where e_j is
    the vector with a 1 at place j and 0 elsewhere. The matrix is on the device of the tensor
    `like`, and float32 (or float64, if `like` is)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    unit_vectors = torch.eye(length, dtype=dtype, device=like.device)  # row j is e_j
    # PyTorch applies such a function to each channel of (B, channels, length). So the unit vectors
    # are given as the channels of a batch of one. In the result, [0], row j is function(e_j). The
    # transpose, .mT, makes it column j.
    return function(unit_vectors[None])[0].mT


def averaging_matrix(h, w, k, like):
    """(k * k, h * w): a product with it averages a map of h x w positions over k x k regions. A row
    stands for a region, and a column for a position. An entry is the weight of the position in the
    average over the region: the weight of its y in the region, times the weight of its x."""
    y_weights = matrix_of(lambda x: F.adaptive_avg_pool1d(x, k), h, like)  # (k, h)
    x_weights = matrix_of(lambda x: F.adaptive_avg_pool1d(x, k), w, like)  # (k, w)
    # Region (i, j) and position (r, c): the product of y_weights[i, r] and x_weights[j, c]
    weights = y_weights[:, None, :, None] * x_weights[None, :, None, :]  # (k, k, h, w)
    return weights.reshape(k * k, h * w)


def interpolation_matrix(length, new_length, like):
    """(new_length, length): a product with it stretches `length` values to `new_length`."""
    return matrix_of(lambda x: F.interpolate(x, new_length, mode="linear"), length, like)


class FastPyramidHead(PyramidHead):
    """The same function as PyramidHead, computed in another order, which takes half as many
    operations.

    PyramidHead concatenates x and the levels, and convolves. That is a sum of convolutions: one of
    x and one of each level, each with its part of the weights. x has half of the channels. For x
    nothing changes here. The other half costs nearly nothing.

    Take one level. In each channel i it has k x k cells, p[i, m, n]. PyramidHead does two things
    with them.

    First it stretches them to h x w. Row r and column c then have, with the interpolation matrices
    R (h, k) and S (w, k), the value

        sum over m, n of  R[r, m] S[c, n] p[i, m, n].

    Then it convolves. The 3x3 weights W[o, i, u, v] of output channel o add up the channels i and
    the neighbors u, v = 0, 1, 2 in rows r-1, r, r+1 and columns c-1, c, c+1:

        y[o, r, c] = sum over i, u, v, m, n of  W[o, i, u, v] R[r+u-1, m] S[c+v-1, n] p[i, m, n].

    There is no ReLU between the two. So this is a sum of products, which may be computed in any
    order. PyramidHead multiplies p, R and S first, and W last, at all h x w positions (64 x 128 for
    a crop of 512x1024). Here the sum over i comes first, of W and p on k x k cells (at most 36).
    Then follow the sums with R over u and m, and with S over v and n."""

    def forward(self, x):
        _, in_channels, h, w = x.shape
        channels = [in_channels] + [in_channels // 4] * len(self.bins)  # of x and of each level
        weight_of_x, *weights = self.bottleneck.conv.weight.split(channels, dim=1)
        means = self.averages(x)
        pyramid = 0  # the sum of the convolutions of all levels, (B, 512, h, w) in ResNet-50
        for level, k in enumerate(self.bins):
            # [0] of a module averages, which `averages` has done. [1] is ConvBNReLU.
            p = self.psp_modules[level][1](means[level])  # [b, i, m, n], b: the image of the batch
            rows = self.shifts(interpolation_matrix(k, h, x)).to(x.dtype)  # [r, u, m]: R[r+u-1, m]
            columns = self.shifts(interpolation_matrix(k, w, x)).to(x.dtype)  # [c, v, n]: of S
            # The sum over i: (B, 512, 3, 3, k, k)
            q = torch.einsum("oiuv,bimn->bouvmn", weights[level], p)
            # The sum over u and m: (B, 512, h, 3, k)
            q = torch.einsum("bouvmn,rum->borvn", q, rows)
            # The sum over v and n: (B, 512, h, w)
            pyramid = pyramid + torch.einsum("borvn,cvn->borc", q, columns)
        y = F.conv2d(x, weight_of_x, padding=1) + pyramid
        y = F.relu(self.bottleneck.bn(y), inplace=True)
        return self.conv_seg(self.dropout(y))

    def shifts(self, matrix):
        """The interpolation matrix R (length, k) -> (length, 3, k), in which [r, u] is the row
        R[r+u-1] of the formula. Beyond the ends it is 0: the convolution pads with zeros."""
        padded = F.pad(matrix, (0, 0, 1, 1))  # a row of zeros before the first and after the last
        return torch.stack([padded[:-2], padded[1:-1], padded[2:]], dim=1)

    def averages(self, x):
        """x (B, C, h, w) -> for each level its averages (B, C, k, k).

        nn.AdaptiveAvgPool2d computes the same, but its gradient on CUDA differs from run to run.
        Here one matrix product averages for all levels at once, so that x is read once. (In half
        precision the matrix is rounded. So a mean may be off by 0.4 %, and in fp16 by 1 % where the
        photograph has 24 megapixels.)"""
        if not self.bins:
            return []
        matrix = torch.cat([averaging_matrix(*x.shape[2:], k, x) for k in self.bins]).to(x.dtype)
        # (B, C, h w) @ (h w, 1 + 4 + 9 + 36) -> (B, C, 50)
        means = x.flatten(2) @ matrix.mT
        levels = means.split([k * k for k in self.bins], dim=2)
        return [level.unflatten(2, (k, k)) for k, level in zip(self.bins, levels, strict=True)]


class FastPSPNet(PSPNet):
    """The same function as PSPNet, for four fifths of the operations. It avoids the operations of
    PyTorch whose gradient on CUDA varies from run to run."""

    Head = FastPyramidHead

    def upsample(self, x, size):
        """x (B, C, h, w), size (H, W) -> (B, C, H, W). Bilinear interpolation as two products: R
        stretches the rows, S the columns. The result is float32 (or float64) under autocast too,
        because the loss needs that."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            R = interpolation_matrix(x.shape[2], size[0], x)  # (H, h)
            S = interpolation_matrix(x.shape[3], size[1], x)  # (W, w)
            return R @ (x @ S.mT)


class CheckpointError(Exception):
    """A file does not hold the weights that were asked for. The text is a sentence for the user."""


def reason_of(error):
    """The beginning of an error's text, on one line. Where torch.load refuses a file, the text
    begins with advice to run the code in the file. That advice is left out."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]  # the whole text, if it has none
    return " ".join(text.split())[:200] or repr(error)


def read_weights(path):
    """Reads what torch.save has written, to the CPU -> (weights, checkpoint), both dictionaries. A
    checkpoint holds weights in "state_dict". A file may also hold weights only. Then both are the
    same. Raises OSError, and CheckpointError for other files."""
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)  # runs no code
        except Exception as error:  # a damaged file makes torch.load raise almost anything
            raise CheckpointError(f"{path} cannot be read as what torch.save writes "
                                  f"({reason_of(error)})") from error
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict", {}), dict):
        return checkpoint.get("state_dict", checkpoint), checkpoint
    raise CheckpointError(f"{path} holds no dictionary of weights")


def arguments_of(weights):
    """The arguments of PSPNet for weights of mmsegmentation. How many blocks stage 3 has, and the
    kind of stem, tell the backbone. Raises KeyError where they don't."""
    num_classes = len(weights["decode_head.conv_seg.bias"])
    depth = len({key.split(".")[2] for key in weights if key.startswith("backbone.layer3.")})
    deep_stem = "backbone.stem.0.weight" in weights
    for name, variant in BACKBONES.items():
        if variant.depths[2] == depth and variant.deep_stem == deep_stem:
            return {"num_classes": num_classes, "backbone": name}
    raise KeyError(f"no ResNet has {depth} blocks in stage 3")


# Some settings of mmsegmentation change what a network computes, but neither the names nor the
# shapes of its weights. These are the values of this network, without spaces, and with ( for [.
SETTINGS = {"strides": "(1,2,1,1)", "dilations": "(1,1,2,4)", "contract_dilation": "True",
            "style": "'pytorch'", "pool_scales": "(1,2,3,6)", "align_corners": "False",
            "bgr_to_rgb": "True", "to_rgb": "True", "mean": "(123.675,116.28,103.53)",
            "std": "(58.395,57.12,57.375)"}


def check_settings(text):
    """Raises ValueError where a text, a configuration of mmsegmentation, has another value for one
    of SETTINGS. For example `strides = [1, 2, 2, 1]` is brought to `strides=(1,2,2,1)`, of which
    the value is (1,2,2,1). That is not (1,2,1,1)."""
    text = "".join(text.split()).replace("[", "(").replace("]", ")").replace(",)", ")")
    for name, value in SETTINGS.items():
        # A tuple reaches to its bracket, another value to the next comma or bracket.
        pattern = r"\(.*?\)" if value.startswith("(") else r"[^,)]*"
        for other in re.findall(rf"\b{name}'?[=:]({pattern})", text):
            if not other.startswith(value):  # the next line may follow, as spaces are gone
                raise ValueError(f"it was trained with {name}={other}, and this has {value}")


def load_net(path):
    """The FastPSPNet that a checkpoint holds, on the CPU, in eval mode, in float32. Its attribute
    class_names is a list, or None where the checkpoint has none. A checkpoint of train.py has the
    arguments of PSPNet in "model". Raises OSError, and CheckpointError for every other file, also
    for mmsegmentation's with other SETTINGS (for example those of crop 769x769)."""
    weights, checkpoint = read_weights(path)
    try:
        meta = dict(checkpoint.get("meta") or {})  # mmsegmentation's: how the file was made
        check_settings(str(meta.get("cfg", meta.get("config"))))
        arguments = checkpoint.get("model") or arguments_of(weights)
        net = FastPSPNet(**arguments)
        # Old files lack batch norm's counters (num_batches_tracked). PyTorch accepts that if it
        # does not know the version of the weights. `dict` drops the version, an attribute.
        net.load_state_dict(dict(weights))
        dataset_meta = meta.get("dataset_meta", {})
        names = checkpoint.get("classes") or meta.get("CLASSES") or dataset_meta.get("classes")
        net.class_names = [str(name) for name in names] if names else None
    except Exception as error:  # the file is one of another program
        raise CheckpointError(f"{path} holds no PSPNet of this program or of mmsegmentation "
                              f"({reason_of(error)})") from error
    return net.eval()


def load_backbone(net, source):
    """Put weights of an ImageNet classifier into net.backbone. `source` is a file, or "imagenet":
    the file in BACKBONES, which torch.hub downloads once. Raises OSError, and CheckpointError where
    they can't be had or are another backbone's."""
    backbone = net.arguments["backbone"]
    path = source
    if source == "imagenet":
        file = BACKBONES[backbone].weights_file
        folder = "openmmlab.com/pretrain/third_party" if "v1c" in file else "pytorch.org/models"
        url = f"https://download.{folder}/{file}"
        path = Path(torch.hub.get_dir(), "checkpoints", file)
        if not path.exists():
            try:  # torch.hub puts the file there, whole or not at all.
                torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True,
                                                   weights_only=True)
            except Exception as error:  # no network, no space, another hash
                raise CheckpointError(f"cannot download {url} ({reason_of(error)}): give --weights "
                                      "FILE, or --weights none") from error
    weights, _ = read_weights(path)
    try:  # without the classifier of ImageNet
        net.backbone.load_state_dict({name: value for name, value in weights.items()
                                      if not name.startswith("fc.")})
    except Exception as error:
        raise CheckpointError(f"{path} holds no {backbone} ({reason_of(error)})") from error


if __name__ == "__main__":
    from torch._subclasses.fake_tensor import FakeTensorMode  # shapes without values, in no time
    from torch.utils.flop_counter import FlopCounterMode

    net = PSPNet().double().eval()
    fast = FastPSPNet().double().eval()
    fast.load_state_dict(net.state_dict())
    images = torch.randint(256, (1, 3, 64, 128))
    print(f"{sum(parameter.numel() for parameter in net.parameters()):,} parameters")
    for kind in (PSPNet, FastPSPNet):
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            kind().eval()(torch.empty(1, 3, 512, 1024))
        print(f"{kind.__name__}: {counter.get_total_flops() / 1e9:.0f} GFLOP for 512x1024 pixels")
    difference = (fast(images)[0] - net(images)[0]).abs().max().item()
    print(f"largest difference of their logits, of a random image in float64: {difference:.2g}")
