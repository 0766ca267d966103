"""Speed and memory, on a GPU or a CPU; pytest does not collect this.

    python tests/bench.py train              # a training step: ms, images/s, memory on CUDA
    python tests/bench.py eval               # the prediction of an image of twice the crop
    python tests/bench.py loader --data DIR  # training samples: ms on one core, images/s of all
    python tests/bench.py head               # operations and bytes that both heads move, on a CPU

Results are lines of JSON. Where mmsegmentation is installed its network is measured as well (pip
install --no-deps mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0, and what these import).
"""
import importlib.util
import json
import logging
import os
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from unittest.mock import MagicMock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pspnet  # noqa: E402
from cityscapes import Cityscapes, TrainingStream  # noqa: E402
from evaluate import autocast, predict  # noqa: E402
from train import segmentation_loss  # noqa: E402
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def emit(**values):
    print(json.dumps(values), flush=True)


def our_work(args, training, precision, variant, images, labels):
    """A function that does one step of train.py, or one prediction of evaluate.py."""
    kind = pspnet.PSPNet if variant == "PSPNet" else pspnet.FastPSPNet
    net = kind(backbone=args.backbone).train(training)
    net.to(DEVICE, memory_format=torch.channels_last)
    model = torch.compile(net) if variant == "compiled" else net
    if not training:
        return partial(predict, model, images[0], precision)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    def step():
        with autocast(DEVICE, precision):
            logits, aux_logits = model(images)
            loss = segmentation_loss(logits, labels) + 0.4 * segmentation_loss(aux_logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def their_work(args, training, precision, variant, images, labels):
    """A function that does one step of mmengine's training loop, or of its test loop."""
    sys.modules.setdefault("mmcv._ext", MagicMock())  # compiled code, which it never calls
    import mmengine
    import mmseg.utils
    logging.disable(logging.INFO)
    mmseg.utils.register_all_modules()
    variant = f"{args.backbone.removeprefix('resnet')}b".replace("_v1cb", "")  # say, 50 or 50b
    name = f"pspnet_r{variant}-d8_4xb2-*k_cityscapes-512x1024.py"
    files = Path(mmseg.__file__).parent.glob(f".mim/configs/pspnet/{name}")
    config = mmengine.Config.fromfile(min(files))  # 40k before 80k, which differ in that alone
    config.model.pretrained = config.model.backbone.init_cfg = None  # no ImageNet weights
    net = mmseg.registry.MODELS.build(config.model)
    net.init_weights()
    net.to(DEVICE).train(training)
    torch.backends.cudnn.benchmark = True  # as in its default_runtime.py
    net.data_preprocessor.size = size = images.shape[2:]
    sizes = {"img_shape": size, "ori_shape": size, "pad_shape": size, "padding_size": [0] * 4}
    fields = [mmengine.structures.PixelData(data=label[None]) for label in labels]
    samples = [mmseg.structures.SegDataSample(gt_sem_seg=field, metainfo=sizes) for field in fields]
    batch = {"inputs": list(images), "data_samples": samples}
    if not training:
        return partial(torch.no_grad()(autocast(DEVICE, precision)(net.test_step)), batch)
    amp = {"type": "AmpOptimWrapper", "dtype": "bfloat16"} if precision == "bf16" else {}
    optimizer = mmengine.optim.build_optim_wrapper(net, {**config.optim_wrapper, **amp})
    return partial(net.train_step, batch, optimizer)


def timed(args, training, precision, variant):
    """What one setting takes, after three calls that do not count; peak_gib is 0 without CUDA."""
    batch_size, scale = (args.batch_size, 1) if training else (1, 2)
    size = [scale * length for length in args.crop]
    images = torch.randint(256, (batch_size, 3, *size), dtype=torch.uint8, device=DEVICE)
    labels = torch.randint(19, (batch_size, *size), device=DEVICE)
    function = their_work if variant == "mmsegmentation" else our_work
    work = function(args, training, precision, variant, images, labels)
    for call in range(3 + args.calls):
        if call == 3:
            torch.get_device_module(DEVICE).synchronize()
            start = time.perf_counter()
        work()
    torch.get_device_module(DEVICE).synchronize()
    seconds = (time.perf_counter() - start) / args.calls
    return {"ms": 1000 * seconds, "images_per_s": batch_size / seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def bench_net(args, training):
    """Time the settings in turn, --rounds times, each in a process of its own, so that none leaves
    the next its memory or compiled code. Last the medians, also of ratios within a round."""
    references = ["PSPNet"] + ["mmsegmentation"] * bool(importlib.util.find_spec("mmseg"))
    variants = ["FastPSPNet", *references] + ["compiled"] * args.compile
    precisions = ["fp32"] if DEVICE.type == "cpu" else ["fp32", "bf16"]
    times = {setting: [] for setting in product(precisions, variants)}
    for setting in list(times) * args.rounds:
        with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(timed, args, training, *setting).result()
        emit(setting=setting, **result)
        times[setting].append(result["ms"])
    for (precision, variant), values in times.items():
        ratios = {f"to {name}": median(a / b for a, b in zip(values, times[precision, name]))
                  for name in references}
        emit(setting=(precision, variant), median_ms=median(values), **ratios)


def bench_loader(args):
    stream = TrainingStream(Cityscapes(args.data, "train"), args.crop)
    stream.dataset.names = stream.dataset.names[:100]
    list(stream.dataset)  # the system has the files in memory now
    works = {"decoding alone": lambda k: stream.dataset[stream.index(k)],
             "sample": stream.__getitem__}
    times = {name: [] for name in works}
    torch.set_num_threads(1)
    for k, name in product(range(24), works):
        start = time.perf_counter()
        works[name](k)
        times[name].append(1000 * (time.perf_counter() - start))
    for name, values in times.items():
        ratio = median(values) / median(times["decoding alone"])
        emit(on_one_core=name, median_ms=median(values), to_decoding=ratio)
    for workers in sorted({1, 2, os.cpu_count()}):
        order = range((10 * workers + 1) * args.batch_size)
        batches = iter(DataLoader(stream, args.batch_size, sampler=order, num_workers=workers))
        next(batches)  # The workers have started.
        start = time.perf_counter()
        images = sum(len(image) for image, _ in batches)
        emit(workers=workers, images_per_s=images / (time.perf_counter() - start))


class Traffic(TorchDispatchMode):
    """Counts the operations whose outputs have a million values or more, and the bytes of those."""
    operations = bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if torch.is_tensor(t) and t.numel() >= 10**6]
        if tensors and not operation.is_view:
            self.operations += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def bench_head(args):
    channels = 512 * pspnet.BACKBONES[args.backbone][0].expansion
    x = torch.randn(2, channels, args.crop[0] // 8, args.crop[1] // 8)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    for kind in (pspnet.FastPyramidHead, pspnet.PyramidHead):
        head = kind(channels, 19).to(memory_format=torch.channels_last)
        with Traffic() as forward:
            logits = head(x)
        with Traffic() as backward:
            logits.sum().backward()
        start = time.perf_counter()
        for _ in range(args.calls):
            head(x).sum().backward()
        emit(head=kind.__name__, ms=1000 * (time.perf_counter() - start) / args.calls,
             forward_operations=forward.operations, forward_mb=forward.bytes / 1e6,
             backward_operations=backward.operations, backward_mb=backward.bytes / 1e6)


if __name__ == "__main__":
    jobs = {"train": partial(bench_net, training=True), "loader": bench_loader,
            "eval": partial(bench_net, training=False), "head": bench_head}
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("commands", choices=jobs, nargs="+")
    add("--data", default="data/cityscapes", metavar="DIR")
    add("--backbone", choices=pspnet.BACKBONES, default="resnet50_v1c")
    add("--crop", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"))
    add("--batch-size", type=int, default=8)
    add("--rounds", type=int, default=3, help="of train and eval (3)")
    add("--calls", type=int, default=10, help="steps or predictions timed in a round (10)")
    add("--compile", action="store_true", help="with torch.compile as well")
    args = parser.parse_args()
    for command in args.commands:
        emit(command=command, torch=torch.__version__, cores=os.cpu_count(),
             device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type)
        jobs[command](args)
