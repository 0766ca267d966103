"""Score a PSPNet on Cityscapes, write its predictions, or segment photographs of your own.

    python evaluate.py --ckpt best.pt --data data/cityscapes
    torchrun --standalone --nproc_per_node=8 evaluate.py --ckpt best.pt    # the same, faster
    python evaluate.py --ckpt best.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip
    python evaluate.py --ckpt best.pt --split test --save-ids submission
    python evaluate.py --ckpt best.pt --images photo.jpg holiday/ --save-color out

The checkpoint is one of train.py's or one that mmsegmentation published. All labelled pixels of the
split, at full resolution, are counted in one confusion matrix, of truth against prediction. From it
come each class's intersection over union (IoU) and their mean (mIoU). The options --precision,
--scales, --flip and --tile are the protocol: how an image is predicted.
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
from cityscapes import VOID, DataError, at_least, colored, read_image, to_picture, to_tensors
from pspnet import CheckpointError, load_net


def autocast(device, precision):
    """A context in which the large operations of a network compute in `precision`: "fp32" (on
    NVIDIA's GPUs TF32 for convolutions, PyTorch's default), "bf16" or "fp16"."""
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
    # One number for each pair (truth, prediction), to count with bincount. (int: uint8 overflows.)
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
    seen exactly once. `net` is the plain network: in each forward DistributedDataParallel waits for
    all processes, and one may have no image left. predict_image(net, image) -> train ids (H, W).
    save(i, image, prediction), if given, is called for each image i. Raises DataError for labels
    with other values than train ids and VOID."""
    rank, world = rank_and_world()  # torchrun runs `world` copies of the program: this is `rank`
    share = range(rank, len(dataset), world)
    loader = DataLoader(Subset(dataset, share), num_workers=workers,
                        batch_size=None, collate_fn=to_tensors)  # no batches, single pairs
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


# Here the lesson ends. What follows are tables, protocols, processes and the command. ------------


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
    # (classes, categories), 0 or 1. member.T @ matrix adds up rows by category, @ member columns.
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
    present = sum(row["iou"] is not None for row in scores["classes"])
    return "\n".join([
        *lines, f"\nmIoU {percent(scores['miou'])} % over {present} of {len(lines) - 1} classes, "
        f"category mIoU {percent(scores['category_miou'])} %, "
        f"pixel accuracy {percent(scores['pixel_accuracy'])} %, "
        f"mean accuracy {percent(scores['mean_accuracy'])} %"])


def tile_starts(length, tile):
    """The first pixel of each tile on an axis of `length` pixels, length >= tile: two thirds of a
    tile apart (rounded up), as in the authors' code. The last tile ends where the image ends."""
    stride = math.ceil(tile * 2 / 3)
    return [*range(0, length - tile, stride), length - tile]


def tiled_probabilities(net, images, tile):
    """Class probabilities (1, C, H, W) of one image (1, 3, H, W): the average over overlapping
    tiles of `tile` pixels, (height, width)."""
    height, width = images.shape[2:]
    tile_height, tile_width = min(tile[0], height), min(tile[1], width)
    total = torch.zeros(1, net.arguments["num_classes"], height, width, device=images.device)
    count = torch.zeros(height, width, device=images.device)  # of the tiles over each pixel
    for top in tile_starts(height, tile_height):
        for left in tile_starts(width, tile_width):
            window = np.s_[..., top: top + tile_height, left: left + tile_width]  # of H and W
            logits, _ = net(images[window])
            total[window] += logits.softmax(dim=1)
            count[window] += 1
    return total / count


@torch.inference_mode()
def predict_averaged(net, image, precision="fp32", scales=(1.0,), flip=False, tile=None):
    """As `predict`, but from class probabilities that are averaged over views of the image: at
    these scales, and with flip each mirrored too. With tile = (height, width) the network sees
    tiles of each view. Source: mmsegmentation's test-time augmentation; for tiles the authors'
    hszhao/semseg, tool/test.py, which pads smaller images."""
    size = image.shape[1:]
    total = 0  # of the probabilities of all views, (1, C, H, W)
    for scale in scales:
        view_size = [max(1, round(length * scale)) for length in size]
        resized = F.interpolate(image[None].float(), view_size, mode="bilinear")
        for mirrored in ([False, True] if flip else [False]):
            view = resized.flip(3) if mirrored else resized
            with autocast(image.device, precision):
                if tile:
                    probabilities = tiled_probabilities(net, view, tile)
                    probabilities = F.interpolate(probabilities, size, mode="bilinear")
                else:
                    logits, _ = net(view)
                    probabilities = F.interpolate(logits, size, mode="bilinear").softmax(dim=1)
            total = total + (probabilities.flip(3) if mirrored else probabilities)
    return argmax_class(total[0])  # the largest sum is the largest average


def rank_and_world():
    """The number of this process, and how many there are: torchrun tells each process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_process():
    """(device, rank, world): the GPU of this process, or the CPU; its number; how many processes
    there are. Raises DataError where there are fewer GPUs than processes."""
    rank, world = rank_and_world()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= gpus:
            raise DataError(f"there are more processes than GPUs: type --nproc_per_node={gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1:  # Without device_id NCCL, which connects GPUs, would guess one.
        dist.init_process_group(device_id=device if device.type == "cuda" else None,
                                timeout=timedelta(minutes=30))  # in train.py 0 may download weights
    return device, rank, world


def compare_processes(**settings):
    """Raises DataError, in every process, unless all have the same settings. On two machines
    options and files may differ, and the result would mix them."""
    _, world = rank_and_world()
    everyones = [settings] * world  # replaced below
    if world > 1:
        dist.all_gather_object(everyones, settings)
    differing = [key for key in settings if any(other[key] != settings[key] for other in everyones)]
    if differing:
        raise DataError(f"the processes differ in {', '.join(differing)}: all of them need the "
                        "same options and the same files")


def share_of_cores(most):
    """How many workers each process of this machine starts: its share of the cores, 1 to `most`."""
    return max(1, min(most, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


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
        help="average over overlapping tiles of this many pixels (whole images)")
    add("--save-ids", metavar="DIR", help="write label ids, one PNG per image")
    add("--save-color", metavar="DIR", help="write colors, also over the image")
    add("--json", metavar="FILE", help="write the scores of train or val")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32",
        help="bf16 and fp16 are autocast, for speed (fp32)")
    add("--workers", type=at_least(0), default=share_of_cores(4),
        help="processes that decode images, for each GPU (its share of the cores, up to 4)")
    args = parser.parse_args()
    ids, color = args.save_ids, args.save_color
    if (args.images or args.split == "test") and (args.json or not (ids or color)):
        parser.error("photographs and the test split have no labels to score with: leave out "
                     "--json, and add --save-color DIR, or --save-ids DIR for the test server")
    if ids and color and Path(color).resolve().is_relative_to(Path(ids).resolve()):
        parser.error("--save-color must not be in --save-ids: the server takes one PNG per image")
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
            found = sorted(file for file in path.glob("[!.]*") if file.is_file())
        for file in found:
            if file.name in files:
                raise DataError(f"{files[file.name]} and {file} would both be saved as {file.name}"
                                ".png: predict them into different folders")
            files[file.name] = file
    if not files:
        raise DataError(f"there are no files in {', '.join(paths)}")
    return files


def main():
    device, rank, world = start_process()
    args = parse_args()
    net = load_net(args.ckpt).to(device, memory_format=torch.channels_last)
    names = [entry.name for entry in Cityscapes.classes]
    if net.arguments["num_classes"] != len(names) or net.class_names not in (None, names):
        raise CheckpointError(f"{args.ckpt} was trained for {net.arguments['num_classes']} classes "
                              f"({net.class_names}), the data set has {len(names)} ({names})")
    dataset = photographs(args.images) if args.images else Cityscapes(args.data, args.split)
    protocol = {name: vars(args)[name] for name in ("precision", "scales", "flip", "tile")}
    ckpt = hashlib.sha256(Path(args.ckpt).read_bytes()).hexdigest()
    compare_processes(ckpt=ckpt, images=len(dataset), **protocol)

    predict_image = partial(predict, precision=args.precision)
    if args.flip or args.tile or args.scales != [1.0]:
        predict_image = partial(predict_averaged, **protocol)
    if args.images:
        unreadable = torch.tensor(0, device=device)
        for name in list(dataset)[rank::world]:
            try:
                picture = read_image(dataset[name])
            except DataError as error:  # The other photographs are predicted all the same.
                sys.stderr.write(f"{error}\n")  # in one piece, among other processes' lines
                unreadable += 1
                continue
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            save_prediction(image, predict_image(net, image.to(device)), name, args)
        if world > 1:  # All wait here, as torchrun ends all processes at the first error.
            dist.all_reduce(unreadable)
        if unreadable > 0:
            raise DataError(f"{unreadable} files could not be read")
        return

    def save(i, image, prediction):
        save_prediction(image, prediction, dataset.name(i), args)

    saver = save if args.save_ids or args.save_color else None
    matrix = evaluate(net, dataset, device, predict_image, args.workers, saver)
    if rank == 0 and args.split != "test":
        scores = scores_of(matrix, Cityscapes.classes)
        print(format_scores(scores))
        print(f"{len(dataset)} images of {args.split}, {protocol}")
        if args.json:
            result = {"checkpoint": args.ckpt, "model": net.arguments, "split": args.split,
                      "images": len(dataset), "protocol": protocol, **scores,
                      "confusion_matrix": matrix.tolist()}
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, DataError, CheckpointError) as error:
        # A worker's error has its traceback before the sentence.
        sys.exit(f"evaluate.py: {str(error).strip().splitlines()[-1]}")
