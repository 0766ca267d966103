"""Score a PSPNet on Cityscapes, write its predictions, or segment photographs of your own.

    python evaluate.py --ckpt best.pt --data data/cityscapes
    torchrun --standalone --nproc_per_node=8 evaluate.py --ckpt best.pt    # the same, faster
    python evaluate.py --ckpt best.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip
    python evaluate.py --ckpt best.pt --split test --save-ids submission
    python evaluate.py --ckpt best.pt --images photo.jpg holiday/ --save-color out

The checkpoint is one of train.py's or one that mmsegmentation published. All labelled pixels of the
split, at full resolution, are counted in one confusion matrix, of truth against prediction. From it
come each class's intersection over union (IoU) and their mean (mIoU). The lesson is the first part,
up to the end of evaluate(). The words picture, image and label are those of cityscapes.py.
"""
import argparse
import hashlib
import json
import math
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from cityscapes import Cityscapes  # the data set: for one of your own change this line
from cityscapes import VOID, DataError, colored, read_image, to_picture, to_tensors
from pspnet import CheckpointError, load_net

# From an image to scores ------------------------------------------------------------------------


def autocast(device, precision):
    """The context in which a network computes in `precision`: "fp32" (on NVIDIA's GPUs TF32 for
    convolutions, PyTorch's default), "bf16" or "fp16"."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


@torch.inference_mode()
def predict(net, image, precision="fp32"):
    """The train id of every pixel: image (3, H, W), uint8 RGB, on the device of net, which is in
    eval mode -> (H, W), uint8, on the same device."""
    with autocast(image.device, precision):
        logits, _ = net(image[None])  # _: the auxiliary logits, for training only
    return argmax_class(logits[0])


def argmax_class(scores):
    """Logits or probabilities (C, H, W) -> the index of the largest of the C, (H, W), uint8. Raises
    CheckpointError where the largest is not finite: argmax would call NaN class 0."""
    largest, index = scores.max(dim=0)  # on a CPU several times as fast as argmax
    if not largest.isfinite().all():
        raise CheckpointError("the network computes values that are not finite: its weights are "
                              "damaged, or too large for --precision fp16")
    return index.byte()


def confusion(label, prediction, num_classes):
    """Pixels by truth (row) and prediction (column): train ids, uint8, both of the same shape ->
    (256, num_classes), int64. A label 3 predicted as 5 counts at [3, 5]. Row 255 is void."""
    # One number for each pair (truth, prediction), to count with bincount; uint8 would overflow.
    pairs = label.int() * num_classes + prediction
    return torch.bincount(pairs.flatten(), minlength=256 * num_classes).view(256, num_classes)


def intersection_over_union(matrix):
    """IoU of each class, from pixels by truth and prediction: those that are of the class in both,
    divided by those that are in one or both. NaN (0/0) for a class that is in neither."""
    return matrix.diag() / (matrix.sum(dim=0) + matrix.sum(dim=1) - matrix.diag())


def evaluate(net, dataset, device, predict_image, workers=4, save=None):
    """The confusion matrix of `net` on `dataset` over all processes: (classes, classes), int64, on
    the CPU, the same in each process. Every process must call it. It leaves net in eval mode.

    Of 2 processes and 8 images, process 0 has images 0, 2, 4, 6, process 1 has 1, 3, 5, 7: each is
    seen exactly once. `net` is the plain network: DistributedDataParallel would wait in each
    forward for processes that have no image left. predict_image(net, image) -> train ids (H, W).
    save(i, image, prediction), if given, is called for each image i. Raises DataError for labels
    with other values than train ids and VOID."""
    rank, world = rank_and_world()
    share = range(rank, len(dataset), world)
    loader = DataLoader(Subset(dataset, share), num_workers=workers,
                        batch_size=None, collate_fn=to_tensors)  # one pair at a time
    bar = tqdm(loader, "evaluating", unit=" images", leave=False,
               disable=None if rank == 0 else True)  # None: shown in a terminal only
    num_classes = len(dataset.classes)
    counts = torch.zeros(256, num_classes, dtype=torch.int64, device=device)  # by label, prediction
    net.eval()
    for i, (image, label) in zip(share, bar, strict=True):
        prediction = predict_image(net, image.to(device))
        counts += confusion(label.to(device), prediction, num_classes)
        if save:
            save(i, image, prediction)
    if world > 1:
        dist.all_reduce(counts)  # the sum over all processes
    if counts[num_classes:VOID].any():
        raise DataError(f"the labels have values that are neither one of the {num_classes} classes "
                        f"nor {VOID}, void")
    return counts[:num_classes].cpu()


# Here the lesson ends. What follows are tables, protocols, files and the command. ----------------


def scores_of(matrix, classes):
    """The figures of the benchmark and of mmsegmentation, as fractions, from the matrix of
    `evaluate`. What would be 0/0 is None, and the means leave it out. Raises DataError where all
    pixels are void. Source: cityscapesScripts 2.3.0, evaluation/evalPixelLevelSemanticLabeling.py;
    mmsegmentation 1.2.2, IoUMetric."""
    if not matrix.any():
        raise DataError("there is nothing to score: every pixel of the labels is void")
    matrix = matrix.double()
    iou = intersection_over_union(matrix)
    accuracy = matrix.diag() / matrix.sum(dim=1)
    categories = list(dict.fromkeys(entry.category for entry in classes))  # unique, in order
    # (classes, categories), 0 or 1: a product with it adds up what belongs to each category
    member = torch.tensor([[entry.category == c for c in categories] for entry in classes]).double()
    category_iou = intersection_over_union(member.T @ matrix @ member)

    def number(value):
        return None if value.isnan() else value.item()

    return {"miou": iou.nanmean().item(), "mean_accuracy": accuracy.nanmean().item(),
            "category_miou": category_iou.nanmean().item(),
            "pixel_accuracy": (matrix.diag().sum() / matrix.sum()).item(),
            "classes": [{"name": entry.name, "iou": number(iou[i]), "accuracy": number(accuracy[i])}
                        for i, entry in enumerate(classes)],
            "categories": [{"name": name, "iou": number(category_iou[i])}
                           for i, name in enumerate(categories)]}


def format_scores(scores):
    """The table for people: IoU and accuracy of each class, and the means, in percent."""
    def percent(value):
        return "n/a" if value is None else f"{100 * value:.2f}"

    lines = [f"{'class':16}{'IoU %':>8}{'accuracy %':>12}"]
    for row in scores["classes"]:
        lines.append(f"{row['name']:16}{percent(row['iou']):>8}{percent(row['accuracy']):>12}")
    present = [row for row in scores["classes"] if row["iou"] is not None]
    lines += ["", f"mIoU {percent(scores['miou'])} % "
              f"over {len(present)} of {len(scores['classes'])} classes, "
              f"category mIoU {percent(scores['category_miou'])} %, "
              f"pixel accuracy {percent(scores['pixel_accuracy'])} %, "
              f"mean accuracy {percent(scores['mean_accuracy'])} %"]
    return "\n".join(lines)


def tile_starts(length, tile):
    """The first pixel of each tile on an axis of `length` pixels, length >= tile: two thirds of a
    tile apart (rounded up), as in the authors' code. The last tile ends where the image ends."""
    stride = math.ceil(tile * 2 / 3)
    return [*range(0, length - tile, stride), length - tile]


def resize(maps, size):
    """Maps (C, H, W) -> (C, *size), bilinear."""
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def tiled_probabilities(net, image, tile):
    """Class probabilities (C, H, W) of an image (3, H, W): the average over overlapping tiles of
    `tile` pixels, (height, width)."""
    height, width = image.shape[1:]
    tile_height, tile_width = min(tile[0], height), min(tile[1], width)
    total = torch.zeros(net.arguments["num_classes"], height, width, device=image.device)
    count = torch.zeros(height, width, device=image.device)  # of the tiles over each pixel
    for top in tile_starts(height, tile_height):
        for left in tile_starts(width, tile_width):
            window = np.s_[..., top: top + tile_height, left: left + tile_width]  # on H and W
            logits, _ = net(image[window][None])
            total[window] += logits[0].softmax(dim=0)
            count[window] += 1
    return total / count


@torch.inference_mode()
def predict_averaged(net, image, precision="fp32", scales=(1.0,), flip=False, tile=None):
    """As `predict`, but from class probabilities that are averaged over views of the image: at
    these scales, and with flip each mirrored too. With tile = (height, width) the network sees
    tiles of each view. Source: mmsegmentation's test-time augmentation; for tiles the authors'
    hszhao/semseg, tool/test.py, which pads smaller images."""
    height, width = image.shape[1:]
    total = torch.zeros(net.arguments["num_classes"], height, width, device=image.device)
    for scale in scales:
        view_size = (max(1, round(height * scale)), max(1, round(width * scale)))
        for mirrored in ([False, True] if flip else [False]):
            view = resize(image.float(), view_size)
            if mirrored:
                view = view.flip(2)
            with autocast(image.device, precision):
                if tile:
                    probabilities = resize(tiled_probabilities(net, view, tile), (height, width))
                else:
                    logits, _ = net(view[None])
                    probabilities = resize(logits[0], (height, width)).softmax(dim=0)
            total += probabilities.flip(2) if mirrored else probabilities
    return argmax_class(total)  # the largest sum is the largest average


# Processes --------------------------------------------------------------------------------------


def start_process():
    """(device, rank, world): the GPU of this process, or the CPU; its number; how many processes
    there are. torchrun tells them in the environment. Raises DataError where GPUs are too few."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= gpus:
            raise DataError(f"there are more processes than GPUs: type --nproc_per_node={gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1:  # Without device_id NCCL, which connects GPUs, would guess one.
        dist.init_process_group(device_id=device if device.type == "cuda" else None,
                                timeout=timedelta(minutes=30))  # process 0 may download weights
    return device, rank, world


def rank_and_world():
    """The number of this process, and how many processes there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value):
    """The values that all processes give, a list in the order of their numbers."""
    _, world = rank_and_world()
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def compare_processes(**settings):
    """Raises DataError, in every process, unless all have the same settings. On two machines
    options and files may differ, and one result would be made of two."""
    values = gather(settings)
    differing = [name for name in settings if any(v[name] != values[0][name] for v in values)]
    if differing:
        raise DataError(f"the processes differ in {', '.join(differing)}: all of them need the "
                        "same options and the same files")


def share_of_cores(most):
    """How many workers each process of this machine starts: its share of the cores, 1 to `most`."""
    return max(1, min(most, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


# python evaluate.py -----------------------------------------------------------------------------


def at_least(least, kind=int):
    """A type for argparse: a finite number of this kind that is not below `least`."""
    def number(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return value
    return number


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="one of train.py or of mmsegmentation")
    add("--data", default="data/cityscapes", help="where leftImg8bit and gtFine are (%(default)s)")
    add("--split", choices=("train", "val", "test"), default="val")
    add("--images", nargs="+", metavar="PATH", help="predict these files, or folders of them")
    add("--scales", type=at_least(0.01, float), nargs="+", default=[1.0], metavar="S",
        help="average over the image at these multiples of its size (1)")
    add("--flip", action="store_true", help="average over the mirrored image too")
    add("--tile", type=at_least(1), nargs=2, metavar=("H", "W"),
        help="slide over tiles of this many pixels (whole images)")
    add("--save-ids", metavar="DIR", help="write label ids, one PNG per image")
    add("--save-color", metavar="DIR", help="write colors, also over the image")
    add("--json", metavar="FILE", help="write the scores of train or val")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32",
        help="bf16 and fp16 are autocast, for speed (fp32)")
    add("--workers", type=at_least(0), default=share_of_cores(4),
        help="processes that decode images, for each GPU (its share of the cores, up to 4)")
    args = parser.parse_args()
    folders = [Path(folder).resolve() for folder in (args.save_ids, args.save_color) if folder]
    if len(folders) == 2 and (folders[0].is_relative_to(folders[1])
                              or folders[1].is_relative_to(folders[0])):
        parser.error("--save-ids and --save-color must be separate folders, as the benchmark takes "
                     "one PNG per image")
    if (args.images or args.split == "test") and (args.json or not folders):
        parser.error("photographs and the test split have no labels to score with: leave out "
                     "--json, and add --save-color DIR, or --save-ids DIR for the test server")
    return args


def save_prediction(image, prediction, name, args):
    """Write a prediction, train ids (H, W), for an image: to --save-ids as NAME.png, label ids for
    the test server; to --save-color as NAME_color.png and, over the image, NAME_overlay.png."""
    prediction, classes = prediction.cpu().numpy(), Cityscapes.classes
    for folder in filter(None, (args.save_ids, args.save_color)):
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)  # a name may be CITY/NAME
    if args.save_ids:
        ids = np.array([entry.id for entry in classes], np.uint8)
        Image.fromarray(ids[prediction]).save(Path(args.save_ids, f"{name}.png"))
    if args.save_color:
        color = colored(prediction, classes)
        color.save(Path(args.save_color, f"{name}_color.png"))
        overlay = Image.blend(to_picture(image), color, 0.5)
        overlay.save(Path(args.save_color, f"{name}_overlay.png"))


def photographs(paths):
    """The files among `paths`, and those in the folders among them, but for hidden ones: a
    dictionary by name. Raises DataError for two of one name, and where there is none."""
    files = {}
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.is_file())
            found = [file for file in found if not file.name.startswith(".")]
        for file in found:
            if file.name in files:
                raise DataError(f"{files[file.name]} and {file} would both be saved as {file.name}"
                                ".png: predict them into different folders")
            files[file.name] = file
    if not files:
        raise DataError(f"there are no files in {', '.join(paths)}")
    return files


def segment_photographs(files, net, device, predict_image, args):
    """Predict this process's share of the files, and save each under its whole name: photo.jpg and
    photo.png are two. Raises DataError, at the end and in every process, if some can't be read."""
    rank, world = rank_and_world()
    unreadable = 0
    for name in list(files)[rank::world]:
        try:
            picture = read_image(files[name])
        except DataError as error:
            print(error, file=sys.stderr)
            unreadable += 1
            continue
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        save_prediction(image, predict_image(net, image.to(device)), name, args)
    unreadable = sum(gather(unreadable))
    if unreadable:
        raise DataError(f"{unreadable} files could not be read")


def main():
    device, rank, _ = start_process()
    args = parse_args()
    net = load_net(args.ckpt).to(device, memory_format=torch.channels_last)
    with open(args.ckpt, "rb") as file:
        ckpt = hashlib.file_digest(file, "sha256").hexdigest()
    classes = Cityscapes.classes
    names, known = [entry.name for entry in classes], net.class_names
    if net.arguments["num_classes"] != len(names) or known not in (None, names):
        raise CheckpointError(f"{args.ckpt} was trained for {net.arguments['num_classes']} classes "
                              f"({known}), the data set has {len(names)} ({names})")
    dataset = photographs(args.images) if args.images else Cityscapes(args.data, args.split)
    protocol = {name: vars(args)[name] for name in ("precision", "scales", "flip", "tile")}
    compare_processes(ckpt=ckpt, images=len(dataset), **protocol)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)

    predict_image = partial(predict, precision=args.precision)
    if args.flip or args.tile or args.scales != [1.0]:
        predict_image = partial(predict_averaged, **protocol)
    if args.images:
        segment_photographs(dataset, net, device, predict_image, args)
        return

    def save(i, image, prediction):
        save_prediction(image, prediction, dataset.name(i), args)

    saving = args.save_ids or args.save_color
    matrix = evaluate(net, dataset, device, predict_image, args.workers, save if saving else None)
    if rank == 0 and args.split != "test":
        scores = scores_of(matrix, classes)
        print(format_scores(scores))
        print(f"{len(dataset)} images of {args.split}, {protocol}")
        if args.json:
            result = {"checkpoint": args.ckpt, "model": net.arguments, "split": args.split,
                      "images": len(dataset), "protocol": protocol, **scores,
                      "confusion_matrix": matrix.tolist()}
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, DataError, CheckpointError) as error:
        # The text of a worker's error has many lines. The sentence is the last.
        sys.exit(f"evaluate.py: {str(error).strip().splitlines()[-1]}")
