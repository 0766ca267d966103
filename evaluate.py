"""Score a PSPNet on Cityscapes, write its predictions, or predict photographs of your own.

    python evaluate.py --ckpt best.pt --data data/cityscapes
    torchrun --nproc_per_node=8 evaluate.py --ckpt best.pt    # the same numbers, faster
    python evaluate.py --ckpt best.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip
    python evaluate.py --ckpt best.pt --split test --save-ids submission
    python evaluate.py --ckpt best.pt --images photo.jpg holiday/ --save-color out

The checkpoint is one of train.py's or one that mmsegmentation published. The score is that of the
benchmark: every labelled pixel of the split, at full resolution, into one matrix of truth against
prediction; intersection over union per class from that; the mean over the classes.
"""
import argparse
import errno
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from cityscapes import (CLASSES, NUM_CLASSES, TRAIN_ID_TO_ID, Cityscapes, DataError, colored,
                        overlaid)
from pspnet import CheckpointError, load_net


class UserError(Exception):
    """What was asked for cannot be done. The text is a sentence for the user."""

    exit_code = 2


# ------------------------------------------------------------------------------------------------
# From an image to a class for every pixel


def tile_starts(length, tile):
    """Where tiles of `tile` pixels that cover `length` pixels begin: two thirds of a tile apart
    (rounded up), so that about a third overlaps; the last ends with the image."""
    stride = math.ceil(tile * 2 / 3)
    steps = math.ceil((length - tile) / stride)
    return [min(i * stride, length - tile) for i in range(steps + 1)]


def tiled_probabilities(net, image, tile):
    """Class probabilities (C, H, W) of an image (3, H, W), uint8 or float, 0..255: the average over
    overlapping tiles of `tile` pixels, (height, width)."""
    height, width = image.shape[1:]
    tile_height, tile_width = min(tile[0], height), min(tile[1], width)
    total = torch.zeros(NUM_CLASSES, height, width, device=image.device)
    tiles = torch.zeros(height, width, device=image.device)
    for top in tile_starts(height, tile_height):
        for left in tile_starts(width, tile_width):
            inside = np.s_[..., top: top + tile_height, left: left + tile_width]
            total[inside] += net(image[inside][None])[0][0].softmax(dim=0)
            tiles[inside] += 1
    return total / tiles


@torch.inference_mode()
def predict(net, image, scales=(1.0,), flip=False, tile=None):
    """The train id of every pixel: image (3, H, W), uint8 RGB -> (H, W), uint8, on that device.

    With several scales, or with flip (each scale also mirrored), the class probabilities of all of
    them are averaged at the size of the image, as mmsegmentation's test-time augmentation does.
    With tile = (height, width) the network sees such tiles instead of whole images, as in the
    authors' code (hszhao/semseg, tool/test.py; that pads images that are smaller than a tile).
    """
    size, total = image.shape[1:], 0
    views = [(scale, False) for scale in scales] + [(scale, True) for scale in scales if flip]
    for scale, mirrored in views:
        view = image
        if scale != 1:
            scaled = [max(1, int(length * scale + 0.5)) for length in size]
            view = F.interpolate(image[None].float(), scaled, mode="bilinear")[0]
        view = view.flip(2) if mirrored else view
        scores = tiled_probabilities(net, view, tile) if tile else net(view[None])[0][0]
        scores = scores.flip(2) if mirrored else scores
        if scale != 1:
            scores = F.interpolate(scores[None], size, mode="bilinear")[0]
        if len(views) > 1 and not tile:  # tiles are probabilities, and one view needs none
            scores = scores.softmax(dim=0)
        total = total + scores
    return total.max(dim=0).indices.byte()  # on a CPU several times as fast as argmax


# ------------------------------------------------------------------------------------------------
# From classes to scores


def confusion(label, prediction):
    """Pixels by truth (row) and prediction (column): train ids, uint8, of any one shape ->
    (NUM_CLASSES, NUM_CLASSES), int64. Void in the label is left out."""
    pairs = label.int() * NUM_CLASSES + prediction
    counts = torch.bincount(pairs.flatten(), minlength=256 * NUM_CLASSES)
    return counts.view(256, NUM_CLASSES)[:NUM_CLASSES]  # void is in the rows after these


def scores_of(matrix):
    """The figures of the benchmark and of mmsegmentation, from a matrix of `confusion`.

    Returns a dict, all between 0 and 1: "iou" and "accuracy" (class name -> float), "category_iou"
    (category -> float), and "miou", "mean_accuracy", "category_miou", "pixel_accuracy". A class
    that is neither in the truth nor in the predictions has no IoU, one that is not in the truth has
    no accuracy: they are None, and the means leave them out. Source: cityscapesScripts 2.3.0,
    evaluation/evalPixelLevelSemanticLabeling.py; mmsegmentation 1.2.2, IoUMetric.
    Raises DataError where the matrix is empty.
    """
    if not matrix.any():
        raise DataError("there is nothing to score: every pixel of the labels is void")

    def intersection_over_union(matrix):
        return matrix.diag() / (matrix.sum(dim=0) + matrix.sum(dim=1) - matrix.diag())

    def named(names, values):
        values = [None if math.isnan(value) else value for value in values.tolist()]
        return dict(zip(names, values, strict=True))

    matrix = matrix.cpu().double()
    iou, accuracy = intersection_over_union(matrix), matrix.diag() / matrix.sum(dim=1)
    categories = list(dict.fromkeys(entry.category for entry in CLASSES))
    # (classes, categories), 0 or 1: adds up the rows and the columns of each category
    member = torch.tensor([[entry.category == c for c in categories] for entry in CLASSES]).double()
    category_iou = intersection_over_union(member.T @ matrix @ member)
    names = [entry.name for entry in CLASSES]
    return {"miou": iou.nanmean().item(), "mean_accuracy": accuracy.nanmean().item(),
            "category_miou": category_iou.nanmean().item(),
            "pixel_accuracy": (matrix.diag().sum() / matrix.sum()).item(),
            "iou": named(names, iou), "accuracy": named(names, accuracy),
            "category_iou": named(categories, category_iou)}


def format_scores(scores):
    """The table for people: per class, per category, and the means with what they are over."""
    def percent(value):
        return "n/a" if value is None else f"{100 * value:.2f}"

    lines = [f"{'class':16}{'IoU %':>8}{'accuracy %':>12}"]
    lines += [f"{name:16}{percent(iou):>8}{percent(scores['accuracy'][name]):>12}"
              for name, iou in scores["iou"].items()]
    lines += ["", f"{'category':16}{'IoU %':>8}"]
    lines += [f"{name:16}{percent(iou):>8}" for name, iou in scores["category_iou"].items()]
    present = sum(value is not None for value in scores["iou"].values())
    categories_present = sum(value is not None for value in scores["category_iou"].values())
    lines += ["", f"mIoU {percent(scores['miou'])} % over {present} of {NUM_CLASSES} classes, "
              f"category mIoU {percent(scores['category_miou'])} % over {categories_present}, "
              f"pixel accuracy {percent(scores['pixel_accuracy'])} %, "
              f"mean accuracy {percent(scores['mean_accuracy'])} %"]
    return "\n".join(lines)


def describe(scales, flip, tile):
    """The protocol in words, and which published figures were measured with it."""
    all_scales, scales = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75], sorted(scales)
    known = {  # in parentheses what ResNet-50 reached on val
        ((1.0,), False, None): "mmsegmentation's mIoU (R-50-D8 512x1024 40k: 77.85)",
        (tuple(all_scales), True, None): "mmsegmentation's mIoU(ms+flip) (R-50-D8 40k: 79.18)",
        ((1.0,), True, (713, 713)): "hszhao/semseg's single scale, with flip (PSPNet50: 77.30)",
        (tuple(all_scales), True, (713, 713)): "hszhao/semseg's multi scale (PSPNet50: 78.38)",
    }
    published = known.get((tuple(scales), flip, tuple(tile) if tile else None), "no known figure")
    return (f"{'tiles of {}x{}'.format(*tile) if tile else 'whole images'}, scales "
            f"{' '.join(f'{scale:g}' for scale in scales)}, {'with' if flip else 'no'} flip; "
            f"for Cityscapes comparable with {published}")


# ------------------------------------------------------------------------------------------------
# Over all images, in all processes


def memory_format(device):
    """For the network: channels last on a GPU, as PyTorch advises, channels first on a CPU."""
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


def outlive_signals(_):
    """For the workers of a DataLoader, which Ctrl-C and SIGTERM often reach as well: they ignore
    the one and outlive the other by 20 seconds, as train.py needs them until it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))


def default_workers(most):
    """How many workers one of this machine's processes starts: its share of the cores, 1 to `most`
    (torchrun says how many processes there are)."""
    return max(1, min(most, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def predictions(net, dataset, device, precision="fp32", workers=4, **protocol):
    """Yields (i, image, label, prediction) for each image i of this process's share of `dataset`.

    Process r of w has the images r, r + w, r + 2 w, ...: every image is seen exactly once. `net` is
    the plain network (DistributedDataParallel would send its buffers around in each forward), and
    is left in eval mode; `protocol` are the arguments of `predict`. Of `Photographs`, an image that
    could not be read comes as a string that says why, with label and prediction None. Prints at the
    end what the time went into.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = range(rank, len(dataset), world)
    loader = DataLoader(Subset(dataset, share), batch_size=None, num_workers=workers,
                        pin_memory=device.type != "cpu", worker_init_fn=outlive_signals)
    net.eval()
    waiting = working = rest = 0.0
    start = done = time.perf_counter()
    bar = tqdm(loader, "evaluating", unit=" images", leave=False,
               disable=None if rank == 0 else True)  # None: in a terminal only
    for i, (image, label) in zip(share, bar, strict=True):
        loaded, prediction = time.perf_counter(), None
        if not isinstance(image, str):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                prediction = predict(net, image.to(device, non_blocking=True), **protocol)
            if device.type != "cpu":
                torch.accelerator.synchronize()  # or its work would be counted as the caller's
        predicted = time.perf_counter()
        yield i, image, label, prediction
        waiting, working, rest = (waiting + loaded - done, working + predicted - loaded,
                                  rest + time.perf_counter() - predicted)
        done = time.perf_counter()
    if rank == 0:
        seconds = done - start
        print(f"{len(dataset)} images in {seconds:.1f} s, {len(dataset) / seconds:.2f} a second: "
              f"{waiting / seconds:.0%} of the time waiting for data, {working / seconds:.0%} "
              f"predicting, {rest / seconds:.0%} counting and saving", flush=True)


def evaluate(net, dataset, device, on_image, **options):
    """The confusion matrix of `net` on `dataset` over all processes: (NUM_CLASSES, NUM_CLASSES),
    int64, on the CPU, the same in each process. Every process must call it.

    on_image(i, image, label, prediction) is called for each image of this process; `options` are
    those of `predictions`.
    """
    matrix = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64, device=device)
    for i, image, label, prediction in predictions(net, dataset, device, **options):
        matrix += confusion(label.to(device, non_blocking=True), prediction)
        on_image(i, image, label, prediction)
    if dist.is_initialized():
        dist.all_reduce(matrix)
    return matrix.cpu()


# ------------------------------------------------------------------------------------------------
# Photographs and predictions as files


class Photographs(Dataset):
    """Image files of any size and mode: photographs[i] -> (image (3, H, W), uint8 RGB, None), or
    (why it cannot be read, None). `paths` are files, or folders whose images are taken."""

    def __init__(self, paths):
        endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        self.files = []  # as in Cityscapes, but without labels
        for path in map(Path, paths):
            if path.is_dir():
                self.files += [(file, None) for file in sorted(path.iterdir())
                               if file.suffix.lower() in endings]
            else:
                self.files.append((path, None))
        if not self.files:
            raise UserError(f"there are no image files in {', '.join(map(str, paths))}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            with Image.open(self.files[i][0]) as picture:
                picture = ImageOps.exif_transpose(picture)  # upright, as cameras mean it
                if picture.mode.startswith("I"):  # 16 bits
                    picture = Image.fromarray((np.array(picture) >> 8).astype(np.uint8))
                pixels = np.array(picture.convert("RGB"))
        except Exception as error:  # Pillow raises almost anything
            return f"{self.files[i][0]}: {error}", None
        return torch.from_numpy(pixels).permute(2, 0, 1), None


def name_of(files):
    """What to call an image's prediction: its file's name, without the ending of Cityscapes."""
    return files[0].stem.removesuffix("_leftImg8bit")


class Writer:
    """Writes predictions as PNGs in threads, while the network works on the next image.

    ids_folder/NAME.png: label ids, one channel, as the test server of Cityscapes takes them;
    color_folder/NAME_color.png and NAME_overlay.png: the colors, alone and over the photograph.
    """

    def __init__(self, ids_folder, color_folder):
        self.ids_folder, self.color_folder = ids_folder, color_folder
        self.pool, self.pending = ThreadPoolExecutor(2), deque()
        for folder in filter(None, (ids_folder, color_folder)):
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the folder {folder} ({error.strerror})") from error

    def save(self, name, image, prediction):
        """Write the prediction (H, W) for an image (3, H, W). At most 8 wait in memory."""
        self.pending.append(self.pool.submit(self.write, name, image, prediction.cpu().numpy()))
        self.finish(8)

    def finish(self, waiting=0):
        """Wait until at most `waiting` predictions are yet to be written."""
        while len(self.pending) > waiting:
            try:
                self.pending.popleft().result()
            except OSError as error:
                raise UserError(f"cannot write the predictions ({error})") from error

    def write(self, name, image, prediction):
        if self.ids_folder:
            ids = Image.fromarray(TRAIN_ID_TO_ID[prediction])
            ids.save(Path(self.ids_folder) / f"{name}.png")
        if self.color_folder:
            colored(prediction).save(Path(self.color_folder) / f"{name}_color.png")
            overlaid(image, prediction).save(Path(self.color_folder) / f"{name}_overlay.png")


# ------------------------------------------------------------------------------------------------
# As a script, alone or in several processes


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors; its text is the script's docstring."""

    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; --help lists the options")


def run(main, out_of_memory):
    """Run main(device, rank, world) and end the process with its exit code.

    torchrun starts the same script several times, and says in the environment which process this
    is. A user's mistake, or too little memory or disk, ends with a sentence on stderr and exit code
    2, Ctrl-C with 130, a fault of the program with a traceback and 1. Only the first process that
    fails prints: the others would say the same, or that a connection was lost. `out_of_memory` is
    the sentence that says what to change then.
    """
    store, world, script = None, 1, Path(sys.argv[0]).name
    try:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        rank, backend = 0, "gloo"
        if "RANK" in os.environ:
            launch, rank, world = next(dist.rendezvous("env://"))
            if launch.check(["mistake"]):  # torchrun --max-restarts would repeat it
                os._exit(2)
            # After a restart the store still holds the addresses of processes that have gone.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), launch)
            if device.type != "cpu":
                gpus, local_rank = torch.accelerator.device_count(), int(os.environ["LOCAL_RANK"])
                if local_rank >= gpus:
                    raise UserError(f"there are more processes than the {gpus} GPUs of this "
                                    f"machine: type torchrun --nproc_per_node={gpus}")
                torch.accelerator.set_device_index(local_rank)
                backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        code = main(device, rank, world)
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(code)
    except (UserError, DataError, CheckpointError) as error:
        code, message = getattr(error, "exit_code", 2), f"{script}: {error}"
    except KeyboardInterrupt:
        code, message = 130, f"{script}: interrupted"
    except Exception as error:
        code, message = 1, traceback.format_exc()
        # Of RuntimeErrors only the text tells: on a CPU (can't or cannot), of CUDA, of cuBLAS.
        texts = ("t allocate memory", "out of memory", "ALLOC_FAILED")
        if (isinstance(error, (torch.OutOfMemoryError, MemoryError))
                or any(text in str(error) for text in texts)):
            code, message = 2, f"{script}: out of memory: {out_of_memory}"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
                                               errno.EACCES, errno.EROFS, errno.EISDIR):
            code, message = 2, f"{script}: a file cannot be read or written: {error}"
    if store is None or store.add("failures", 1) == 1:
        print("\n" * (world > 1) + message, file=sys.stderr)  # not behind another's progress bar
    if store is not None and code == 2:
        launch.set("mistake", "")
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: Python would first wait for threads, and for processes that have gone


def main(device, rank, world):
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True, metavar="FILE",
                        help="a checkpoint of train.py or of mmsegmentation")
    parser.add_argument("--data", default="data/cityscapes", metavar="DIR",
                        help="folder with leftImg8bit and gtFine (data/cityscapes)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="val")
    parser.add_argument("--images", nargs="+", metavar="PATH",
                        help="predict these image files, or folders of them, instead of a split")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="S",
                        help="average over the image at these multiples of its size (1)")
    parser.add_argument("--flip", action="store_true", help="average over the mirrored image too")
    parser.add_argument("--tile", type=int, nargs=2, metavar=("H", "W"),
                        help="slide over tiles of this many pixels (whole images)")
    parser.add_argument("--save-ids", metavar="DIR", help="write label ids, one PNG per image")
    parser.add_argument("--save-color", metavar="DIR", help="write colors, also over the image")
    parser.add_argument("--json", metavar="FILE", help="write the scores of train or val")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="bf16 is autocast, for speed (fp32)")
    parser.add_argument("--workers", type=int, default=default_workers(4),
                        help="processes that decode images, for each GPU (4, or its share)")
    args = parser.parse_args()

    if not min(*args.scales, *(args.tile or [1])) > 0 or args.workers < 0:
        raise UserError("--scales, --tile and --workers take positive numbers")
    folders = [Path(folder).resolve() for folder in (args.save_ids, args.save_color) if folder]
    if len(folders) == 2 and (folders[0] in [folders[1], *folders[1].parents]
                              or folders[1] in folders[0].parents):
        raise UserError("--save-ids and --save-color must be separate folders: the benchmark takes "
                        "one PNG per image from a folder and all folders in it")
    if args.images and not folders:
        raise UserError("--images has nowhere to write to: add --save-color DIR or --save-ids DIR")
    if args.split == "test" and not folders and not args.images:
        raise UserError("the test split cannot be scored, its labels are withheld: add --save-ids "
                        "DIR for a submission to the test server")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise UserError(f"there is no folder for --json {args.json}")
    net = load_net(args.ckpt)
    if net.num_classes != NUM_CLASSES:
        raise UserError(f"{args.ckpt} was trained for {net.num_classes} classes, but the table in "
                        f"cityscapes.py has {NUM_CLASSES}")
    net.to(device, memory_format=memory_format(device))
    dataset = Photographs(args.images) if args.images else Cityscapes(args.data, args.split)
    names = [name_of(files) for files in dataset.files]
    if folders and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two images would both be saved as {twice}.png: predict them into "
                        "different folders")
    if not {files[0].resolve().parent for files in dataset.files}.isdisjoint(folders):
        raise UserError("the predictions would be written among the images: give another folder to "
                        "--save-ids and --save-color")
    if rank == 0:
        print(f"{args.ckpt}: PSPNet with {net.backbone_name}, {NUM_CLASSES} classes")
    protocol = {"scales": args.scales, "flip": args.flip, "tile": args.tile}
    options = {"precision": args.precision, "workers": args.workers, **protocol}
    writer = Writer(args.save_ids, args.save_color)

    if args.images:
        broken = []
        for i, image, _, prediction in predictions(net, dataset, device, **options):
            if prediction is None:
                broken.append(image)
            else:
                writer.save(names[i], image, prediction)
        writer.finish()
        everywhere = [broken]
        if dist.is_initialized():
            everywhere = [None] * world
            dist.all_gather_object(everywhere, broken)
        broken = sum(everywhere, [])
        if broken and rank == 0:
            print(f"{len(broken)} of {len(dataset)} images could not be read:", *broken, sep="\n")
        return 1 if broken else 0

    def on_image(i, image, _, prediction):
        if folders:
            writer.save(names[i], image, prediction)

    matrix = evaluate(net, dataset, device, on_image, **options)
    writer.finish()
    if rank == 0 and args.split != "test":
        scores = scores_of(matrix)
        print(format_scores(scores))
        print(f"{len(dataset)} images of {args.split}, {describe(**protocol)}")
        if args.json:
            Path(args.json).write_text(json.dumps(
                {"checkpoint": args.ckpt, "backbone": net.backbone_name, "split": args.split,
                 "images": len(dataset), "protocol": protocol | {"precision": args.precision},
                 **scores, "confusion_matrix": matrix.tolist()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run(main, "give --tile 713 713, or --precision bf16")
