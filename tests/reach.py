"""How far a position sees: |d logits at one position / d image|, drawn over a photograph.

    python tests/reach.py tests/pictures/reach.png     # half a minute on a CPU

Three untrained networks, of ResNet-18, differ in their levels. A caption says on how much of the
image the logits at the dot depend, and how far from it half of the gradient lies: the ring.
"""
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pictures import FONT, save_cells  # and the scripts are on the path
from toy_cityscapes import draw_scene

from pspnet import PSPNet

ROW, COLUMN = 110, 90  # the position
BANDS = np.array([(255, 250, 190), (255, 205, 80), (250, 140, 40), (220, 70, 60), (150, 30, 105),
                  (80, 15, 110)])  # a color for each factor of ten


def street_images(count):
    """Drawn streets, (count, 3, 192, 448), uint8."""
    scenes = [draw_scene(np.random.default_rng([0, i]), 192, 448)[0] for i in range(count)]
    return torch.from_numpy(np.array(scenes)).permute(0, 3, 1, 2)


def wake_up(net, images):
    """A new network in eval mode. Its blocks add 0 to their shortcuts, because the weight of their
    last batch norm is 0: make it 1. And give batch norm the statistics of these images."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
            module.reset_running_stats()
            module.momentum = None  # an average over all batches, of which there is one
    with torch.no_grad():
        net.train()(images)
    return net.eval()


def gradient_of(net, images):
    """|d sum of |logits| at the position / d image|, the mean over images and colors, (H, W)."""
    images = images.float().requires_grad_()
    logits, _ = net(images)
    gradient, = torch.autograd.grad(logits[:, :, ROW, COLUMN].abs().sum(), images)
    return gradient.abs().mean(dim=(0, 1))


def figures_of(gradient):
    """The share of the image with a gradient, and the distance within which half of it lies."""
    rows, columns = torch.meshgrid(*map(torch.arange, gradient.shape), indexing="ij")
    distance, order = ((rows - ROW) ** 2 + (columns - COLUMN) ** 2).sqrt().flatten().sort()
    sums = gradient.flatten().double()[order].cumsum(dim=0)
    half = distance[torch.searchsorted(sums, sums[-1] / 2)]
    return (gradient > 0).double().mean().item(), half.item()


def reach_of(title, gradient, images):
    """(caption, picture): the first image, dark, and in color where its pixels have a gradient."""
    share, half = figures_of(gradient)
    smooth = F.avg_pool2d(gradient[None], 15, stride=1, padding=7, count_include_pad=False)[0]
    band = -(smooth / smooth.max()).clamp(min=1e-30).log10().ceil().int()  # 0: down to a tenth
    gray = images[0].float().mean(dim=0).numpy()[..., None] // 12 / 21  # few steps: a small file
    color = BANDS[band.clamp(max=len(BANDS) - 1)] * (0.45 + 0.55 * gray)
    picture = Image.fromarray(np.where(gradient[..., None] > 0, color, 90 * gray).astype(np.uint8))
    for radius, fill in ((half, None), (4, "black")):
        box = COLUMN - radius, ROW - radius, COLUMN + radius, ROW + radius
        ImageDraw.Draw(picture).ellipse(box, fill, outline="white", width=2)
    caption = f"{100 * share:.0f} % of the image, half of the gradient within {half:.0f} pixels"
    return f"{title}: {caption}", picture


def scene_with_scale(images):
    """(caption, picture): the first image, and upon it what the colors of the others mean."""
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(picture)
    names = ("to 1/10", "to 1/100", "to 1/1000", "to 1e-4", "to 1e-5", "smaller")
    for i, (color, name) in enumerate(zip(BANDS, names, strict=True)):
        draw.rectangle((8 + 72 * i, 166, 79 + 72 * i, 187), tuple(color))
        draw.text((13 + 72 * i, 170), name, "white" if i > 2 else "black", FONT)
    return "drawn scene, and what the colors mean: parts of the largest gradient", picture


if __name__ == "__main__":
    images = street_images(4)
    cells = [scene_with_scale(images)]
    for title, bins in (("no pyramid", ()), ("level 2", (2,)), ("levels 1 2 3 6", (1, 2, 3, 6))):
        torch.manual_seed(0)
        net = wake_up(PSPNet(19, "resnet18", bins), images)
        cells.append(reach_of(title, gradient_of(net, images), images))
    save_cells(sys.argv[1], [cells[:2], cells[2:]])
