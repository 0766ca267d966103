"""Speed, memory and repeatability, on a GPU or a CPU; pytest does not collect this.

    python tests/bench.py train              # training steps, each setting: images/s, peak memory
    python tests/bench.py eval               # predictions of images of twice the crop, 1024x2048
    python tests/bench.py profile            # where the time of a step in bf16 goes: a table
    python tests/bench.py loader --data DIR  # images/s that the cores make, from PNG and the cache
    python tests/bench.py bytes --data DIR   # are two runs, and a resumed one, the same bytes?
    python tests/bench.py learn --data DIR --iters 4000  # scores of whole runs, several seeds

Several can be given at once; all but the table are lines of JSON. With mmsegmentation 1.2.2,
mmengine 0.10.7 and mmcv-lite 2.1.0 installed, `train`, `eval` and `learn` measure its network as
well. On a CPU `train` and `eval` measure float32 alone, and --crop 256 512 --batch-size 2 is
enough. Convolutions in "fp32" use TF32 on a GPU, as is PyTorch's default.
"""

import argparse
import hashlib
import importlib.machinery
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

TESTS = Path(__file__).resolve().parent
SCRIPTS = TESTS.parent
sys.path.insert(0, str(SCRIPTS))

from cityscapes import Cityscapes, TrainingStream  # noqa: E402
from evaluate import predict  # noqa: E402
from pspnet import PSPNet, count_gflops, read_checkpoint  # noqa: E402
from train import segmentation_loss  # noqa: E402

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as train.py; before cuBLAS starts
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ON_CPU = DEVICE.type == "cpu"
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}
WITH_MMSEGMENTATION = importlib.util.find_spec("mmseg") is not None


def emit(**values):
    print(json.dumps(values), flush=True)


def synchronize():
    if not ON_CPU:
        torch.accelerator.synchronize()


def timed(build, images, seconds=6.0):
    """Time of build()(), which takes `images` images, over about `seconds`, after three calls to
    warm up; peak of the memory in use in GiB, on a GPU."""
    work = build()
    for _ in range(3):
        work()
    synchronize()
    if not ON_CPU:
        torch.accelerator.reset_peak_memory_stats()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(3):
            work()
        calls += 3
        synchronize()
    rate = images * calls / (time.perf_counter() - start)
    peak = None if ON_CPU else round(torch.accelerator.max_memory_allocated() / 2**30, 2)
    return {
        "images_per_s": float(f"{rate:.4g}"),
        "ms_per_call": round(1000 * images / rate, 2),
        "peak_gib": peak,
    }


def matrix_product():
    n = 1024 if ON_CPU else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def describe_machine():
    """The machine, and the rate of a product of matrices in bf16: TFLOP/s."""
    emit(
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type,
        cores=os.cpu_count(),
        cudnn=torch.backends.cudnn.version(),
        mmsegmentation=WITH_MMSEGMENTATION,
    )
    n = 1024 if ON_CPU else 8192
    tflops = 2 * n**3 * timed(matrix_product, 1, seconds=2)["images_per_s"] / 1e12
    emit(matrix_product_tflops=round(tflops, 2))
    return tflops


def compare(measure, builders, images, rounds):
    """Measure the settings in turn, `rounds` times, each in a process of its own: so none leaves
    the next its memory, its compiled code or cuDNN's choices. A setting that fails is a line too.
    Last the medians, and how many times as fast as mmsegmentation in the same round."""
    rates = {what: [] for what in builders}
    for _ in range(rounds):
        for what, build in builders.items():
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    result = pool.submit(timed, build, images).result()
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"[:500]}
            emit(measure=measure, setting=what, **result)
            rates[what].append(result.get("images_per_s", np.nan))
    for what, values in rates.items():
        times = {
            f"times {other}": round(np.nanmedian(np.divide(values, rates[other])), 2)
            for other in rates
            if "mmsegmentation" in other
        }
        emit(measure=measure, setting=what, median_images_per_s=np.nanmedian(values), **times)


# Ours ---------------------------------------------------------------------------------------------


def our_step(
    args, precision, channels_last, compiled, textbook=False, deterministic=True, autotuned=False
):
    """One training step as in train.py, the data on the device already."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = autotuned
    net = PSPNet(backbone=args.backbone).to(DEVICE, memory_format=LAYOUTS[channels_last])
    if textbook:  # the head as the paper draws it
        net.decode_head.forward = net.decode_head.textbook_forward
    net.train()
    model = torch.compile(net) if compiled else net
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    image = torch.randint(256, (args.batch_size, 3, *args.crop), dtype=torch.uint8, device=DEVICE)
    label = torch.randint(19, (args.batch_size, *args.crop), device=DEVICE)

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            logits, aux_logits = model(image)
            loss = segmentation_loss(logits, label) + 0.4 * segmentation_loss(aux_logits, label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def large_image(args):
    size = [2 * length for length in args.crop]
    return torch.randint(256, (3, *size), dtype=torch.uint8, device=DEVICE)


def our_prediction(args, precision, channels_last):
    """evaluate.py's prediction of one whole image, which is on the device already."""
    net = PSPNet(backbone=args.backbone).eval().to(DEVICE, memory_format=LAYOUTS[channels_last])
    image = large_image(args)

    def work():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            predict(net, image)

    return work


# mmsegmentation -----------------------------------------------------------------------------------


def mmsegmentation(backbone):
    """Its config for one of our backbones. Its SyncBN is batch norm where there is one process. A
    stand-in takes the place of mmcv's compiled extension, which PSPNet never calls."""

    def missing(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: None

    stub = types.ModuleType("mmcv._ext")
    stub.__getattr__ = missing
    stub.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
    sys.modules.setdefault("mmcv._ext", stub)
    import mmseg
    from mmengine.config import Config
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    folder = Path(mmseg.__file__).parent / ".mim/configs/pspnet"
    depth, _, v1c = backbone.removeprefix("resnet").partition("_")
    pattern = f"pspnet_r{depth}{'' if v1c else 'b'}-d8_4xb2-*k_cityscapes-512x1024.py"
    config = Config.fromfile(min(folder.glob(pattern)))  # 40k before 80k, which differ in that
    config.model.pretrained = config.model.backbone.init_cfg = None
    return config


def their_step(args, amp):
    """One training step as mmengine's loop does it, images as bytes on the device already."""
    config = mmsegmentation(args.backbone)
    from mmengine.optim import build_optim_wrapper
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    torch.backends.cudnn.benchmark = True  # its default_runtime.py
    config.model.data_preprocessor.size = tuple(args.crop)
    model = MODELS.build(config.model).to(DEVICE).train()
    wrapper = dict(config.optim_wrapper)
    if amp:
        wrapper |= {"type": "AmpOptimWrapper", "loss_scale": "dynamic"}
    optimizer = build_optim_wrapper(model, wrapper)
    shape = (args.batch_size, 3, *args.crop)
    images = list(torch.randint(256, shape, dtype=torch.uint8, device=DEVICE))
    labels = torch.randint(19, (args.batch_size, 1, *args.crop), device=DEVICE)

    def step():
        samples = []
        for label in labels:
            sample = SegDataSample()
            sample.gt_sem_seg = PixelData(data=label)
            samples.append(sample)
        model.train_step({"inputs": list(images), "data_samples": samples}, optimizer)

    return step


def their_prediction(args):
    """The prediction of one whole image by mmengine's test loop."""
    config = mmsegmentation(args.backbone)
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    torch.backends.cudnn.benchmark = True  # its default_runtime.py
    model = MODELS.build(config.model).to(DEVICE).eval()
    image = large_image(args)
    size = image.shape[1:]
    sample = SegDataSample(
        metainfo={"img_shape": size, "ori_shape": size, "pad_shape": size, "padding_size": [0] * 4}
    )

    def work():
        with torch.no_grad():
            model.test_step({"inputs": [image], "data_samples": [sample]})

    return work


class TheirNet(torch.nn.Module):
    """mmsegmentation's PSPNet, called as train.py and evaluate.py call ours."""

    def __init__(self, num_classes, backbone):
        super().__init__()
        config = mmsegmentation(backbone)
        from mmseg.registry import MODELS

        self.num_classes, self.backbone_name = num_classes, backbone
        self.model = MODELS.build(config.model)
        self.model.init_weights()

    def forward(self, images):
        preprocessor = self.model.data_preprocessor
        features = self.model.extract_feat((images - preprocessor.mean) / preprocessor.std)
        heads = [self.model.decode_head, self.model.auxiliary_head][: 1 + self.training]
        # Stretched in the precision of the head, as there.
        logits = [
            F.interpolate(head(features), images.shape[2:], mode="bilinear") for head in heads
        ]
        return (*map(torch.Tensor.float, logits), None)[:2]


def train_theirs():
    """train.py on the same command line, with mmsegmentation's network in the place of ours."""
    import train

    train.PSPNet = TheirNet
    train.run(train.main, "lower --batch-size")


# What can be measured -----------------------------------------------------------------------------


def bench_train(args, tflops):
    with torch.device("meta"):
        net = PSPNet(backbone=args.backbone)
    gflops = count_gflops(net, (2, 3, *args.crop), training=True) / 2
    emit(
        gflops_per_image=round(gflops), images_per_s_at_matrix_rate=round(1000 * tflops / gflops, 1)
    )
    layouts = {
        "fp32": ("fp32", False),
        "bf16": ("bf16", False),
        "bf16, channels last": ("bf16", True),
    }
    if ON_CPU:
        layouts = {"fp32": ("fp32", False)}
    settings = {what: partial(our_step, args, *layout, False) for what, layout in layouts.items()}
    best, layout = list(layouts.items())[-1]
    if args.compile:
        best += ", compiled"
        settings[best] = partial(our_step, args, *layout, True)
    settings |= {
        f"{best}, textbook's head": partial(settings[best], textbook=True),
        f"{best}, not deterministic": partial(settings[best], deterministic=False),
    }
    if not ON_CPU:
        settings[f"{best}, not deterministic, cuDNN autotuned"] = partial(
            settings[best], deterministic=False, autotuned=True
        )
    if WITH_MMSEGMENTATION:
        settings["mmsegmentation as it ships"] = partial(their_step, args, amp=False)
        if not ON_CPU:
            settings["mmsegmentation's AMP"] = partial(their_step, args, amp=True)
    compare("train", settings, args.batch_size, args.rounds)


def bench_eval(args, _):
    ours = partial(our_prediction, args)
    settings = {"fp32": partial(ours, "fp32", False)}
    if not ON_CPU:
        settings |= {
            "fp32, channels last": partial(ours, "fp32", True),
            "bf16, channels last": partial(ours, "bf16", True),
        }
    if WITH_MMSEGMENTATION:
        settings["mmsegmentation's test_step"] = partial(their_prediction, args)
    compare("eval", settings, 1, args.rounds)


def bench_profile(args, _):
    step = our_step(args, "bf16", not ON_CPU, args.compile)
    for _ in range(3):
        step()
    synchronize()
    with torch.profiler.profile() as profile:
        step()
        synchronize()
    kind = "cpu" if ON_CPU else "device"
    print(profile.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=25))


def bench_loader(args, _):
    with tempfile.TemporaryDirectory() as cache:
        plain, cached = (
            TrainingStream(Cityscapes(args.data, "train", folder), args.crop)
            for folder in (None, cache)
        )
        cores = os.cpu_count()
        # The first pass reads the PNGs from the disk and fills the cache; it is not counted.
        samples = range(min(len(cached.dataset), 5 * max(4, cores) * args.batch_size))
        for _ in DataLoader(cached, batch_size=None, sampler=samples, num_workers=cores):
            pass
        for what, stream in (("from PNG", plain), ("from the cache", cached)):
            for workers in sorted({1, 2, cores // 2, cores} - {0}):
                # While the first batch is made every worker makes one: these don't count.
                samples = range(5 * max(4, workers) * args.batch_size)
                batches = DataLoader(stream, args.batch_size, sampler=samples, num_workers=workers)
                images = 0
                for i, (image, _) in enumerate(batches):
                    images += len(image)
                    if i + 1 == workers:
                        start, images = time.perf_counter(), 0
                rate = images / (time.perf_counter() - start)
                emit(measure="loader", setting=what, workers=workers, images_per_s=round(rate, 1))


def options_of(args, out):
    """What train.py is told in `bytes` and `learn`."""
    height, width = map(str, args.crop)
    return [
        *("--data", args.data, "--out", str(out), "--backbone", args.backbone, "--weights", "none"),
        *("--crop", height, width, "--batch-size", str(args.batch_size)),
        *("--iters", str(args.iters), "--val-every", str(args.iters)),
        *("--save-every", str(max(1, args.iters // 4))),
    ]


def bench_bytes(args, _):
    def start(out, *extra):
        command = [sys.executable, SCRIPTS / "train.py", *options_of(args, out), *extra]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def digest(out, *extra):
        assert start(out, *extra).wait() == 0
        checkpoint = read_checkpoint(Path(out, "last.pt"))
        momenta = [s["momentum_buffer"] for s in checkpoint["optimizer"]["state"].values()]
        tensors = [*checkpoint["state_dict"].values(), *momenta]
        content = b"".join(tensor.numpy().tobytes() for tensor in tensors)
        return hashlib.sha256(content).hexdigest()[:16]

    with tempfile.TemporaryDirectory() as folder:
        since = time.perf_counter()
        first = digest(f"{folder}/a")
        seconds = time.perf_counter() - since
        second = digest(f"{folder}/b")
        # The third is stopped at its first checkpoint and resumed.
        process = start(f"{folder}/c")
        while not Path(folder, "c/last.pt").exists() and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        process.wait()
        resumed_from = read_checkpoint(Path(folder, "c/last.pt"))["step"]
        third = digest(f"{folder}/c", "--resume")
    emit(
        measure="bytes",
        iterations=args.iters,
        seconds=round(seconds, 1),
        first=first,
        second=second,
        resumed_from=resumed_from,
        resumed=third,
        same=first == second == third and resumed_from < args.iters,
    )


def bench_learn(args, _):
    """Whole runs of train.py, each network in each precision from each seed: scores and spread. A
    run that is in --out already is gone on with."""
    programs = {"ours": [SCRIPTS / "train.py"]}
    if WITH_MMSEGMENTATION:
        theirs = (
            f"import sys; sys.path.insert(0, {str(TESTS)!r}); import bench; bench.train_theirs()"
        )
        programs["mmsegmentation"] = ["-c", theirs]
    for network, precision in itertools.product(programs, args.precisions):
        runs = []
        for seed in range(args.seeds):
            height, width = args.crop
            size = f"{args.backbone}_{height}x{width}_{args.batch_size}x{args.iters}"
            out = Path(args.out, f"{network}_{size}_{precision}_{seed}")
            options = [*options_of(args, out), "--precision", precision, "--seed", str(seed)]
            resume = ["--resume"] if Path(out, "last.pt").exists() else []
            command = [sys.executable, *programs[network], *options, *resume]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            *_, last = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
            runs.append({score: 100 * last[score] for score in ("miou", "pixel_accuracy")})
            emit(measure="learn", network=network, precision=precision, seed=seed, **runs[-1])
        for score in ("miou", "pixel_accuracy"):
            values = [run[score] for run in runs]
            summary = {f.__name__: round(f(values), 2) for f in (statistics.mean, min, max)}
            emit(measure="learn", network=network, precision=precision, percent=score, **summary)


MEASUREMENTS = {
    "train": bench_train,
    "eval": bench_eval,
    "profile": bench_profile,
    "loader": bench_loader,
    "bytes": bench_bytes,
    "learn": bench_learn,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=MEASUREMENTS, nargs="+")
    add("--backbone", default="resnet50_v1c")
    add("--batch-size", type=int, default=8)
    add("--crop", type=int, nargs=2, default=[512, 1024])
    add("--rounds", type=int, default=3, help="of train and eval")
    add("--compile", action="store_true", help="train and profile with torch.compile as well")
    add("--data", default="data/cityscapes")
    add("--iters", type=int, default=200, help="of bytes and learn")
    add("--seeds", type=int, default=3, help="of learn: 0, 1, ...")
    add("--precisions", nargs="+", default=["fp32", "bf16"], help="of learn")
    add("--out", default="runs/learn", help="where learn keeps its runs")
    arguments = parser.parse_args()
    matrix_rate = describe_machine()
    for name in arguments.what:
        MEASUREMENTS[name](arguments, matrix_rate)
