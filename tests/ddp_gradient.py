"""For test_train.py, under torchrun: the gradient of a global batch of 4 images, batch norm and
dropout frozen, in float64, by DistributedDataParallel over all processes and by rank 0 alone.
Prints the largest difference, as a share of the largest gradient."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fill import fill_state_dict, make_label
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pspnet import PSPNet  # noqa: E402
from train import segmentation_loss  # noqa: E402

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
net = PSPNet(backbone="resnet18")
net.load_state_dict(fill_state_dict(net.state_dict()))
net.double().train()
for module in net.modules():
    if isinstance(module, (nn.BatchNorm2d, nn.Dropout2d)):
        module.eval()
images = torch.rand(4, 3, 33, 65, generator=torch.Generator().manual_seed(0)) * 255
label = make_label(4, 33, 65)  # with different shares of void in each image


def gradients(model, mine):
    net.zero_grad()
    logits, aux_logits = model(images[mine])
    loss = segmentation_loss(logits, label[mine])
    (loss + 0.4 * segmentation_loss(aux_logits, label[mine])).backward()
    return [p.grad.clone() for p in net.parameters()]


shared = gradients(DistributedDataParallel(net), slice(rank, None, world))
alone = gradients(net, slice(None))
if rank == 0:
    largest = max(gradient.abs().max() for gradient in alone)
    difference = max((a - b).abs().max() for a, b in zip(shared, alone, strict=True))
    print((difference / largest).item())
dist.destroy_process_group()
