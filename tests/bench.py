"""Speed and memory, on a GPU or a CPU; pytest does not collect this.

    python tests/bench.py all --out bench.jsonl    # train, eval and loader, in ten minutes
    python tests/bench.py train                    # a training step
    python tests/bench.py eval                     # the prediction of an image of twice the crop
    python tests/bench.py loader --data DIR        # training samples, of drawn files without DIR
    python tests/bench.py heads --other FOLDER     # FastPSPNet here and in FOLDER/pspnet.py

It prints a summary, and appends lines of JSON to --out. Variants run in turn within a round, and a
ratio is a median over rounds. On a CPU add --crop 256 512 --batch-size 2. FOLDER is another version
of this project: git worktree add FOLDER COMMIT. mmsegmentation is measured where it is installed:
pip install --no-deps mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0, and what they import.
"""
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from unittest.mock import MagicMock

import torch
from torch.utils.data import DataLoader
from toy_cityscapes import draw_cityscapes

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))
import pspnet  # noqa: E402
from cityscapes import Cityscapes, TrainingStream  # noqa: E402
from evaluate import autocast, predict  # noqa: E402
from train import training_step  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The network, whether it is deterministic, and whether cuDNN tries its algorithms (benchmark)
VARIANTS = {"PSPNet": (pspnet.PSPNet, False, True),  # as anyone would run it
            "FastPSPNet": (pspnet.FastPSPNet, False, True),
            "FastPSPNet, deterministic": (pspnet.FastPSPNet, True, False)}  # as train.py runs it


def report(args, text, **values):
    """Print a line of the summary, and append the values to --out."""
    print(text, flush=True)
    if args.out:
        with open(args.out, "a") as file:
            print(json.dumps({**values, "command": args.command, "text": text}), file=file)


def ratios(times, reference):
    """times[variant] is a list, a time for each round -> the median, over the rounds, of each
    variant's time divided by that of the reference in the same round."""
    return {variant: median(a / b for a, b in zip(values, times[reference], strict=True))
            for variant, values in times.items()}


def timed(work, calls=1):
    """The mean time of some calls, in milliseconds."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    torch.get_device_module(DEVICE).synchronize()
    return 1000 * (time.perf_counter() - start) / calls


def in_turn(works, rounds):
    """The times of some functions, called in turn. The first round does not count."""
    times = {name: [] for name in works}
    for number, name in product(range(rounds + 1), works):
        ms = timed(works[name])
        times[name] += [ms] if number > 0 else []
    return times


def report_pair(args, title, times):
    """Report the times of two functions, and the ratio of the second to the first."""
    one, two = times
    ratio = ratios(times, one)[two]
    report(args, f"{title}: {one} {median(times[one]):.1f} ms, {two} {median(times[two]):.1f} ms, "
           f"ratio {ratio:.3f}", title=title, ms=times, ratio=ratio)


def our_work(net, training, precision, images, labels):
    """A function that does one step of train.py, or one prediction of evaluate.py."""
    net.to(DEVICE, memory_format=torch.channels_last).train(training)
    if not training:
        return partial(predict, net, images[0], precision)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    return partial(training_step, net, images, labels, optimizer, scaler, precision)


def their_work(training, precision, images, labels):
    """A function that does one step of mmengine's training loop, or of its test loop."""
    sys.modules.setdefault("mmcv._ext", MagicMock())  # compiled code, which it never calls
    import mmengine
    import mmseg.utils
    mmseg.utils.register_all_modules()
    path = ".mim/configs/pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py"
    config = mmengine.Config.fromfile(Path(mmseg.__file__).parent / path)
    config.model.pretrained = config.model.backbone.init_cfg = None  # no ImageNet weights
    net = mmseg.registry.MODELS.build(config.model)
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


def batch_of(batch_size, height, width):
    images = torch.randint(256, (batch_size, 3, height, width), dtype=torch.uint8, device=DEVICE)
    return images, torch.randint(19, (batch_size, height, width), device=DEVICE)


def measure(args, training, precision, variant):
    """(milliseconds of a step or prediction, GiB), in a process of its own. 0 GiB without CUDA."""
    size = args.crop if training else [2 * length for length in args.crop]
    batch = batch_of(args.batch_size if training else 1, *size)
    if variant == "mmsegmentation":
        work = their_work(training, precision, *batch)
    else:
        kind, deterministic, torch.backends.cudnn.benchmark = VARIANTS[variant]
        if deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        work = our_work(kind(), training, precision, *batch)
    try:
        timed(work)  # This call is longer.
    except torch.OutOfMemoryError:
        return float("nan"), float("nan")
    calls = max(1, min(args.calls, int(5000 / timed(work))))  # for five seconds at most
    return timed(work, calls), torch.cuda.max_memory_allocated() / 2**30


def bench_net(args, training):
    """Each measurement is a process of its own, so that it leaves nothing to the next: no memory,
    no chosen algorithm. Another round begins only if it is likely to end in time."""
    variants = [*VARIANTS] + ["mmsegmentation"] * bool(importlib.util.find_spec("mmseg"))
    settings = product(["fp32"] if DEVICE.type == "cpu" else ["bf16", "fp32"], variants)
    times, gib, seconds = {setting: [] for setting in settings}, {}, 0
    for number in range(args.rounds):
        start = time.monotonic()
        if number > 0 and start + seconds > args.deadline:
            break
        for setting in times:
            with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
                ms, gib[setting] = pool.submit(measure, args, training, *setting).result()
            times[setting].append(ms)
        seconds = time.monotonic() - start
    for precision, variant in times:
        values = {name: times[precision, name] for name in variants}
        to = {name: round(ratios(values, name)[variant], 3) for name in variants}
        ms, memory = values[variant], gib[precision, variant]
        text = f"{precision} {variant:26}{median(ms):9.1f} ms{memory:7.2f} GiB"
        text += "".join(f", {to[name]} of {name}" for name in to if "Fast" not in name)
        report(args, text, precision=precision, variant=variant, ms=ms, gib=memory, ratios=to)
        if variant == "FastPSPNet, deterministic":
            report(args, f"{precision} price of determinism: {to['FastPSPNet']} times the time")


def bench_loader(args):
    folder = tempfile.TemporaryDirectory()
    drawn = not Path(args.data, "leftImg8bit/train").is_dir()
    data = draw_cityscapes(folder.name, {"train": 8}, (1024, 2048)) if drawn else args.data
    dataset = Cityscapes(data, "train")
    dataset.names = dataset.names[:24]
    stream, times = TrainingStream(dataset, args.crop), {"decoding": [], "sample": []}
    for k in range(24):
        dataset[stream.index(k)]  # The system has the files in memory now.
        times["decoding"].append(timed(lambda k=k: dataset[stream.index(k)]))
        times["sample"].append(timed(lambda k=k: stream[k]))
    report_pair(args, "on one core" + " (drawn files)" * drawn, times)
    for workers in sorted({1, 2, os.cpu_count()}):
        batches = iter(DataLoader(stream, 8, sampler=range(80 * workers + 8), num_workers=workers))
        next(batches)  # The workers have started.
        speed = 80_000 * workers / timed(lambda batches=batches: sum(1 for _ in batches))
        report(args, f"{workers} workers: {speed:.1f} samples/s", workers=workers, per_s=speed)


def bench_heads(args):
    spec = importlib.util.spec_from_file_location("other", Path(args.other, "pspnet.py"))
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    for training, size in ((False, (1, 512, 1024)), (True, (2, 256, 512))):
        batch = batch_of(*size)
        here = our_work(pspnet.FastPSPNet(), training, "fp32", *batch)
        there = our_work(other.FastPSPNet(), training, "fp32", *batch)
        ms = in_turn({"there": there, "here": here}, 8)
        report_pair(args, "training step" if training else "prediction", ms)


if __name__ == "__main__":
    jobs = {"train": partial(bench_net, training=True), "eval": partial(bench_net, training=False),
            "loader": bench_loader, "heads": bench_heads}
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("commands", choices=["all", *jobs], nargs="+")
    add("--out", metavar="FILE")
    add("--data", default="data/cityscapes", metavar="DIR")
    add("--other", metavar="FOLDER")
    add("--crop", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"))
    add("--batch-size", type=int, default=8)
    add("--rounds", type=int, default=3, help="of train and eval, if there is time (3)")
    add("--calls", type=int, default=10, help="steps or predictions timed in a round (10)")
    args = parser.parse_args()
    args.command = "machine"
    commit = subprocess.getoutput(f"git -C '{TOP}' describe --always --dirty")
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    report(args, f"{card}, {os.cpu_count()} cores, torch {torch.__version__}, commit {commit}",
           **vars(args), card=card, cores=os.cpu_count(), machine=" ".join(os.uname()),
           torch=torch.__version__, cuda=torch.version.cuda, commit=commit)
    for command in [*jobs][:3] if args.commands == ["all"] else args.commands:
        args.command, args.deadline = command, time.monotonic() + 225  # loader is short
        print(f"\n{command}")
        jobs[command](args)
