"""Speed, memory and repeatability, on an accelerator or a CPU; pytest does not collect this. Each
line that it prints is JSON.

    python tests/bench.py train             # images/s, peak memory of a training step, each setting
    python tests/bench.py eval              # the same for whole images of twice the crop, 1024x2048
    python tests/bench.py profile           # where the time of the fastest training step goes
    python tests/bench.py loader --data DIR # images/s that the cores make, from PNG and the cache
    python tests/bench.py bytes --data DIR  # are two runs, and a resumed one, the same bytes?
    python tests/bench.py learn --data DIR  # scores of whole runs from scratch: seeds, precisions

With mmsegmentation 1.2.2, mmengine 0.10.7 and mmcv-lite 2.1.0 installed, `train`, `eval` and
`learn` measure its model as well, and the first two print how many times as fast each setting is.
On a CPU they measure float32 alone, and --crop 256 512 --batch-size 2 is enough.
"""

import argparse
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

SCRIPTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SCRIPTS))

from cityscapes import Cityscapes, TrainingStream  # noqa: E402
from evaluate import predict  # noqa: E402
from pspnet import PSPNet, PyramidHead, count_gflops  # noqa: E402
from train import segmentation_loss  # noqa: E402

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EXACT = PyramidHead.forward
KINDS = ("train", "eval", "profile", "loader", "bytes", "learn")
RATES = {}  # (what is measured, setting) -> images/s in each round


def synchronize():
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


def timed(work, images, seconds=6.0):
    """images/s and peak memory of work(), after three calls to warm up, over about `seconds`."""
    for _ in range(3):
        work()
    synchronize()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < seconds:
        for _ in range(3):
            work()
        calls += 3
        synchronize()
    rate = images * calls / (time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None
    return {
        "images_per_s": round(rate, 2),
        "ms_per_step": round(1000 * images / rate, 2),
        "peak_gib": memory and round(memory, 2),
    }


def emit(**values):
    print(json.dumps(values), flush=True)


def machine():
    emit(
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type,
        cores=os.cpu_count(),
        cudnn=torch.backends.cudnn.version(),
    )
    n = 8192 if DEVICE.type != "cpu" else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rate = timed(lambda: a @ b, 1, seconds=2)["images_per_s"]
    emit(matrix_product_tflops=round(2 * n**3 * rate / 1e12, 1))


def our_step(args, precision, channels_last, compiled, textbook=False, deterministic=True):
    """One training step of train.py with data on the device already."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic
    PyramidHead.forward = PyramidHead.textbook_forward if textbook else EXACT
    net = PSPNet(backbone=args.backbone).to(
        DEVICE, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
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


def mmsegmentation(backbone):
    """Its config for one of our backbones, with a stand-in for mmcv's compiled extension, which
    PSPNet never calls."""
    if importlib.util.find_spec("mmseg") is None:
        return None
    if "mmcv._ext" not in sys.modules:
        stub = types.ModuleType("mmcv._ext")
        stub.__getattr__ = lambda name: (
            (lambda *a, **k: None)
            if not name.startswith("__")
            else (_ for _ in ()).throw(AttributeError(name))
        )
        stub.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
        sys.modules["mmcv._ext"] = stub
    import mmseg
    from mmengine.config import Config
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    folder = Path(mmseg.__file__).parent / ".mim/configs/pspnet"
    depth, _, v1c = backbone.removeprefix("resnet").partition("_")
    pattern = f"pspnet_r{depth}{'' if v1c else 'b'}-d8_4xb2-*k_cityscapes-512x1024.py"
    config = Config.fromfile(min(folder.glob(pattern)))  # 40k before 80k, which differ in that

    def plain(value):  # SyncBN needs a process group; one process has nothing to synchronise
        if isinstance(value, dict):
            if value.get("type") == "SyncBN":
                value["type"] = "BN"
            for child in value.values():
                plain(child)

    plain(config.model)
    config.model.pretrained = config.model.backbone.init_cfg = None
    return config


def their_step(args, config, amp):
    """One training step as mmengine's loop does it, images as bytes on the device already."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True  # its default_runtime.py
    config.model.data_preprocessor.size = tuple(args.crop)
    model = MODELS.build(config.model).to(DEVICE).train()
    wrapper = dict(config.optim_wrapper)
    if amp:
        wrapper |= {"type": "AmpOptimWrapper", "loss_scale": "dynamic"}
    optimizer = build_optim_wrapper(model, wrapper)
    images = list(
        torch.randint(256, (args.batch_size, 3, *args.crop), dtype=torch.uint8, device=DEVICE)
    )
    labels = torch.randint(19, (args.batch_size, 1, *args.crop), device=DEVICE)

    def step():
        samples = []
        for label in labels:
            sample = SegDataSample()
            sample.gt_sem_seg = PixelData(data=label)
            samples.append(sample)
        model.train_step({"inputs": list(images), "data_samples": samples}, optimizer)

    return step


def attempt(measure, what, build, images):
    """Measure one setting; a setting that fails is a line as well."""
    try:
        result = timed(build(), images)
        RATES.setdefault((measure, what), []).append(result["images_per_s"])
        emit(measure=measure, setting=what, **result)
    except Exception as error:
        emit(measure=measure, setting=what, error=str(error).splitlines()[0])
    gc.collect()
    torch.compiler.reset()  # what was compiled for one head is not for the other
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def summarize(measure, reference, gflops=None):
    """The median of the rounds of each setting, how many times as fast as mmsegmentation that is
    in the same round, and for `gflops` an image (our arithmetic) how much is done in a second."""
    for (kind, what), rates in RATES.items():
        if kind == measure:
            rate = statistics.median(rates)
            times = [a / b for a, b in zip(rates, RATES.get((kind, reference), []))]
            emit(
                measure=measure,
                setting=what,
                rounds=len(rates),
                median_images_per_s=rate,
                times_mmsegmentation=round(statistics.median(times), 2) if times else None,
                tflops=round(rate * gflops / 1000, 1) if gflops and "head" not in what else None,
            )


def bench_train(args):
    shape = (args.batch_size, 3, *args.crop)
    with torch.device("meta"):
        gflops = count_gflops(PSPNet(backbone=args.backbone), shape, training=True)
    emit(gflops_per_step=round(gflops, 1))
    settings = {
        "fp32, TF32": ("fp32", False, False),
        "bf16": ("bf16", False, False),
        "bf16, channels last": ("bf16", True, False),
    }
    if DEVICE.type == "cpu":
        settings = {"fp32": ("fp32", False, False)}
    elif args.compile:
        settings["bf16, channels last, compiled"] = ("bf16", True, True)
    builders = {what: partial(our_step, args, *setting) for what, setting in settings.items()}
    what, build = list(builders.items())[-1]  # the best, one hopes
    builders[f"{what}, textbook's head"] = partial(build, textbook=True)
    builders[f"{what}, not deterministic"] = partial(build, deterministic=False)
    config = mmsegmentation(args.backbone)
    if config:
        builders["mmsegmentation as it ships"] = partial(their_step, args, config, amp=False)
        if DEVICE.type != "cpu":
            builders["mmsegmentation, its AMP"] = partial(their_step, args, config, amp=True)
    for _ in range(args.rounds):
        for what, build in builders.items():
            attempt("train", what, build, args.batch_size)
    summarize("train", "mmsegmentation as it ships", gflops / args.batch_size)


def our_prediction(args, image, precision, channels_last):
    """evaluate.py's prediction of one whole image, which is on the device already."""
    torch.backends.cudnn.benchmark = False
    net = PSPNet(backbone=args.backbone).eval()
    net.to(DEVICE, memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def work():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            predict(net, image)

    return work


def their_prediction(config, image):
    """The same by mmengine's test loop."""
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    torch.backends.cudnn.benchmark = True  # its default_runtime.py
    model = MODELS.build(config.model).to(DEVICE).eval()
    size = image.shape[1:]
    sample = SegDataSample(
        metainfo={"img_shape": size, "ori_shape": size, "pad_shape": size, "padding_size": [0] * 4}
    )

    def work():
        with torch.no_grad():
            model.test_step({"inputs": [image], "data_samples": [sample]})

    return work


def bench_eval(args):
    torch.use_deterministic_algorithms(False)
    image = torch.randint(
        256, (3, *(2 * length for length in args.crop)), dtype=torch.uint8, device=DEVICE
    )
    settings = {"fp32": ("fp32", False)}
    if DEVICE.type != "cpu":
        settings |= {"fp32, channels last": ("fp32", True), "bf16, channels last": ("bf16", True)}
    config = mmsegmentation(args.backbone)
    builders = {
        what: partial(our_prediction, args, image, *setting) for what, setting in settings.items()
    }
    if config:
        builders["mmsegmentation's test_step"] = partial(their_prediction, config, image)
    for _ in range(args.rounds):
        for what, build in builders.items():
            attempt("eval", what, build, 1)
    summarize("eval", "mmsegmentation's test_step")


def bench_profile(args):
    step = our_step(args, "bf16", DEVICE.type == "cuda", args.compile)
    for _ in range(3):
        step()
    with torch.profiler.profile() as profile:
        step()
        synchronize()
    print(
        profile.key_averages().table(
            sort_by=f"self_{'cuda' if DEVICE.type == 'cuda' else 'cpu'}_time_total", row_limit=25
        )
    )


def bench_loader(args):
    with tempfile.TemporaryDirectory() as cache:
        for what, folder in (
            ("from PNG", None),
            ("filling the cache", cache),
            ("from the cache", cache),
        ):
            stream = TrainingStream(Cityscapes(args.data, "train", folder), args.crop)
            for workers in sorted({1, 2, os.cpu_count() // 2, os.cpu_count()}):
                loader = DataLoader(
                    stream, args.batch_size, sampler=range(args.samples), num_workers=workers
                )
                batches = iter(loader)
                next(batches)
                start, images = time.perf_counter(), 0
                for image, _ in batches:
                    images += len(image)
                emit(
                    measure="loader",
                    setting=what,
                    workers=workers,
                    images_per_s=round(images / (time.perf_counter() - start), 1),
                )


def bench_bytes(args):
    def start(out, *extra):
        height, width = args.crop
        options = (
            f"--data {args.data} --backbone {args.backbone} --weights none --crop {height} {width} "
            f"--batch-size {args.batch_size} --iters {args.iters} --val-every {args.iters} "
            f"--save-every {max(1, args.iters // 4)}"
        )
        command = [sys.executable, SCRIPTS / "train.py", "--out", out, *options.split(), *extra]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def digest(out, *extra):
        assert start(out, *extra).wait() == 0
        state = torch.load(Path(out) / "last.pt", weights_only=True)
        momenta = [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
        tensors = [*state["state_dict"].values(), *momenta]
        content = b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)
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
        third = digest(f"{folder}/c", "--resume")
    emit(
        measure="bytes",
        iterations=args.iters,
        seconds=round(seconds, 1),
        first=first,
        second=second,
        resumed=third,
        same=first == second == third,
    )


class TheirNet(torch.nn.Module):
    """mmsegmentation's PSPNet, called as train.py and evaluate.py call ours."""

    def __init__(self, num_classes, backbone):
        super().__init__()
        config = mmsegmentation(backbone)
        from mmseg.registry import MODELS  # only now: that has put the stand-in in its place

        self.num_classes, self.backbone_name = num_classes, backbone
        self.model = MODELS.build(config.model)
        self.model.init_weights()

    def forward(self, images):
        statistics, size = self.model.data_preprocessor, images.shape[2:]
        features = self.model.extract_feat((images - statistics.mean) / statistics.std)
        heads = [self.model.decode_head, self.model.auxiliary_head][: 1 + self.training]
        outputs = [
            torch.nn.functional.interpolate(head(features), size, mode="bilinear").float()
            for head in heads
        ]
        return (outputs + [None])[:2]


def train_theirs():
    """train.py on the same command line, with mmsegmentation's network in the place of ours."""
    import train

    train.PSPNet = TheirNet
    train.run(train.main, "lower --batch-size")


def bench_learn(args):
    """Whole runs of train.py, each network in each precision from each seed: scores and spread."""
    programs = {"ours": [SCRIPTS / "train.py"]}
    if importlib.util.find_spec("mmseg"):
        programs["mmsegmentation"] = ["-c", "import bench; bench.train_theirs()"]
    paths = [str(SCRIPTS / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    height, width = args.crop
    for network, precision in itertools.product(programs, args.precisions):
        runs = []
        for seed in range(args.seeds):
            out = Path(args.out, f"{network}_{precision}_{seed}")
            options = (
                f"--data {args.data} --out {out} --backbone {args.backbone} --weights none "
                f"--crop {height} {width} --batch-size {args.batch_size} --iters {args.iters} "
                f"--val-every {args.iters} --precision {precision} --seed {seed}"
            )
            resume = ["--resume"] if Path(out, "last.pt").exists() else []
            command = [sys.executable, *programs[network], *options.split(), *resume]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            *_, last = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
            runs.append({score: last[score] for score in ("miou", "pixel_accuracy")})
            emit(measure="learn", network=network, precision=precision, seed=seed, **runs[-1])
        for score in ("miou", "pixel_accuracy"):
            values = [run[score] for run in runs]
            mean, least, most = (round(100 * f(values), 2) for f in (statistics.mean, min, max))
            emit(
                measure="learn",
                network=network,
                precision=precision,
                seeds=args.seeds,
                percent=score,
                mean=mean,
                least=least,
                most=most,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=KINDS, nargs="+")
    parser.add_argument("--backbone", default="resnet50_v1c")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop", type=int, nargs=2, default=[512, 1024])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--data", default="data/cityscapes")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--out", default="runs/learn")
    arguments = parser.parse_args()
    machine()
    for name in arguments.what:
        globals()[f"bench_{name}"](arguments)
