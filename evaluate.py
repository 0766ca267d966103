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
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from cityscapes import Cityscapes, DataError, colored, overlaid, read_image
from pspnet import CheckpointError, load_net

# From an image to a class for every pixel -------------------------------------------------------


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
    total = torch.zeros(net.arguments["num_classes"], height, width, device=image.device)
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


# From classes to scores -------------------------------------------------------------------------


def confusion(label, prediction, num_classes):
    """Pixels by truth (row) and prediction (column): train ids, uint8, of any one shape ->
    (num_classes, num_classes), int64. Void in the label is left out."""
    pairs = label.int() * num_classes + prediction
    counts = torch.bincount(pairs.flatten(), minlength=256 * num_classes)
    return counts.view(256, num_classes)[:num_classes]  # void is in the rows after these


def intersection_over_union(matrix):
    """Of each class, from pixels by truth and prediction: NaN where a class is in neither."""
    return matrix.diag() / (matrix.sum(dim=0) + matrix.sum(dim=1) - matrix.diag())


def scores_of(matrix, classes):
    """The figures of the benchmark and of mmsegmentation, from a matrix of `confusion`.

    Returns a dict, all between 0 and 1: "miou", "mean_accuracy", "category_miou", "pixel_accuracy",
    "classes", a list of dicts with "name", "iou", "accuracy", and "categories" with "name", "iou".
    A class that is neither in the truth nor in the predictions has no IoU, one that is not in the
    truth has no accuracy: they are None, and the means leave them out. Source: cityscapesScripts
    2.3.0, evaluation/evalPixelLevelSemanticLabeling.py; mmsegmentation 1.2.2, IoUMetric.
    Raises DataError where the matrix is empty.
    """
    if not matrix.any():
        raise DataError("there is nothing to score: every pixel of the labels is void")
    matrix = matrix.cpu().double()
    iou, accuracy = intersection_over_union(matrix), matrix.diag() / matrix.sum(dim=1)
    categories = list(dict.fromkeys(entry.category for entry in classes))
    # (classes, categories), 0 or 1: adds up the rows and the columns of each category
    member = torch.tensor([[entry.category == c for c in categories] for entry in classes]).double()
    category_iou = intersection_over_union(member.T @ matrix @ member)

    def rows(names, **columns):
        return [{"name": name} | {key: None if values[i].isnan() else values[i].item()
                                  for key, values in columns.items()}
                for i, name in enumerate(names)]

    return {"miou": iou.nanmean().item(), "mean_accuracy": accuracy.nanmean().item(),
            "category_miou": category_iou.nanmean().item(),
            "pixel_accuracy": (matrix.diag().sum() / matrix.sum()).item(),
            "classes": rows([entry.name for entry in classes], iou=iou, accuracy=accuracy),
            "categories": rows(categories, iou=category_iou)}


def format_scores(scores):
    """The table for people: per class, per category, and the means with what they are over."""
    def percent(value):
        return "n/a" if value is None else f"{100 * value:.2f}"

    classes, categories = scores["classes"], scores["categories"]
    lines = [f"{'class':16}{'IoU %':>8}{'accuracy %':>12}"]
    lines += [f"{row['name']:16}{percent(row['iou']):>8}{percent(row['accuracy']):>12}"
              for row in classes]
    lines += ["", f"{'category':16}{'IoU %':>8}"]
    lines += [f"{row['name']:16}{percent(row['iou']):>8}" for row in categories]
    present, categories_present = (sum(row["iou"] is not None for row in rows)
                                   for rows in (classes, categories))
    lines += ["", f"mIoU {percent(scores['miou'])} % over {present} of {len(classes)} classes, "
              f"category mIoU {percent(scores['category_miou'])} % over {categories_present}, "
              f"pixel accuracy {percent(scores['pixel_accuracy'])} %, "
              f"mean accuracy {percent(scores['mean_accuracy'])} %"]
    return "\n".join(lines)


# Over all images, in all processes --------------------------------------------------------------


def this_process():
    """(device, rank, world): which of the `world` processes that torchrun started this is, and its
    GPU (or other accelerator), or the CPU. Without torchrun, which says it in the environment,
    there is one process. Ends the process where there are more of them than GPUs."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type != "cpu":
        local_rank, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
        if local_rank >= devices:
            sys.exit(f"there are more processes than the {devices} GPUs of this machine: type "
                     f"torchrun --nproc_per_node={devices}")
        torch.accelerator.set_device_index(local_rank)
        device = torch.device(device.type, local_rank)
    return device, rank, world


def share_of_cores(most):
    """How many workers each of this machine's processes starts: its share of the cores, 1 to `most`
    (torchrun says how many processes there are)."""
    return max(1, min(most, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def sentence_of(error):
    """The text of an error for people. That of a DataLoader's worker comes as its whole traceback,
    of which the last line is the sentence."""
    return str(error).strip().rpartition("\n")[2].removeprefix("cityscapes.DataError: ")


def autocast(device, precision):
    """The context in which the network computes in `precision`: "fp32", "bf16" or "fp16"."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def evaluate(net, dataset, device, precision="fp32", workers=4, ids_folder=None, color_folder=None,
             **protocol):
    """The confusion matrix of `net` on `dataset` over all processes, (classes, classes), int64, on
    the CPU, the same in each process. Every process must call it.

    Process r of w has the images r, r + w, r + 2 w, ...: each is seen exactly once. `net` is the
    plain network (DistributedDataParallel would send its buffers around in each forward), and is
    left in eval mode; `protocol` are the arguments of `predict`, the folders of `save_prediction`.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = range(rank, len(dataset), world)
    loader = DataLoader(Subset(dataset, share), batch_size=None, num_workers=workers,
                        pin_memory=device.type != "cpu")
    bar = tqdm(loader, "evaluating", unit=" images", leave=False,
               disable=None if rank == 0 else True)  # None: in a terminal only
    num_classes = len(dataset.classes)
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    net.eval()
    for i, (image, label) in zip(share, bar, strict=True):
        with autocast(device, precision):
            prediction = predict(net, image.to(device, non_blocking=True), **protocol)
        matrix += confusion(label.to(device, non_blocking=True), prediction, num_classes)
        if ids_folder or color_folder:
            save_prediction(prediction.cpu(), image, dataset.name(i), dataset.classes, ids_folder,
                            color_folder)
    if dist.is_initialized():
        dist.all_reduce(matrix)
    return matrix.cpu()


# Predictions as files ---------------------------------------------------------------------------


def save_prediction(prediction, image, name, classes, ids_folder, color_folder):
    """Write a prediction (H, W) for an image (3, H, W) as PNGs, in the folders that are not None.

    ids_folder/NAME.png: label ids, one channel, as the test server of Cityscapes takes them (train
    ids where the classes have no `id`); color_folder/NAME_color.png and NAME_overlay.png: the
    colors, alone and over the photograph. Raises OSError.
    """
    for folder in filter(None, (ids_folder, color_folder)):
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
    if ids_folder:
        ids = np.array([getattr(entry, "id", i) for i, entry in enumerate(classes)], np.uint8)
        Image.fromarray(ids[prediction]).save(Path(ids_folder, f"{name}.png"))
    if color_folder:
        colored(prediction, classes).save(Path(color_folder, f"{name}_color.png"))
        overlaid(image, prediction, classes).save(Path(color_folder, f"{name}_overlay.png"))


def find_photographs(paths, folders):
    """The image files among `paths`: files, and every file of a folder that is not hidden. Raises
    DataError where there are none, and where a prediction, which is named after its photograph,
    would overwrite another or could overwrite a photograph, as it would lie in the same folder."""
    files = []
    for path in map(Path, paths):
        files += sorted(file for file in path.iterdir() if file.is_file()
                        and not file.name.startswith(".")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"there are no files in {', '.join(map(str, paths))}")
    by_name = {}
    for file in files:
        other = by_name.setdefault(file.stem, file)
        if other is not file:
            raise DataError(f"{other} and {file} would both be saved as {file.stem}.png: predict "
                            "them one after the other, into different folders")
        if file.resolve().parent in [Path(folder).resolve() for folder in folders]:
            raise DataError(f"the prediction of {file} would be written beside it: give another "
                            "folder to --save-ids and --save-color")
    return files


def predict_photographs(net, files, classes, device, precision, ids_folder, color_folder,
                        **protocol):
    """Predict this process's share of the files and save what comes out. Returns how many could
    not be read, in all processes; each is named on stderr."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    unreadable = torch.tensor(0)
    for file in tqdm(files[rank::world], "predicting", leave=False, disable=None):
        try:
            image = read_image(file)
        except DataError as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            unreadable += 1
            continue
        with autocast(device, precision):
            prediction = predict(net, image.to(device), **protocol)
        save_prediction(prediction.cpu(), image, file.stem, classes, ids_folder, color_folder)
    if dist.is_initialized():
        dist.all_reduce(unreadable)  # waits for the others, which torchrun would end at an error
    return unreadable.item()


# python evaluate.py -----------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32",
                        help="bf16 and fp16 are autocast, for speed (fp32)")
    parser.add_argument("--workers", type=int, default=share_of_cores(4),
                        help="processes that decode images, for each GPU (4, or its share)")
    args = parser.parse_args()

    if not min(*args.scales, *(args.tile or [1])) > 0 or args.workers < 0:
        parser.error("--scales and --tile take positive numbers, --workers 0 or more")
    folders = [os.path.realpath(folder) for folder in (args.save_ids, args.save_color) if folder]
    if len(folders) == 2 and os.path.commonpath(folders) in folders:  # one is in the other
        parser.error("--save-ids and --save-color must be separate folders: the benchmark takes "
                     "one PNG per image from a folder and all folders in it")
    if (args.images or args.split == "test") and not folders:
        parser.error("there is nothing to score: photographs have no labels, and those of the test "
                     "split are withheld: add --save-color DIR, or --save-ids DIR, which the test "
                     "server takes")
    if args.json and (args.images or args.split == "test"):
        parser.error("--json takes scores, and there are none without labels")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        parser.error(f"there is no folder for --json {args.json}")
    return args


def main():
    args = parse_args()
    device, rank, world = this_process()
    if rank > 0:  # waits for process 0, which looks for mistakes before it joins, and tells of them
        dist.init_process_group()
    net = load_net(args.ckpt).to(device, memory_format=torch.channels_last)
    names = [entry.name for entry in Cityscapes.classes]
    if net.arguments["num_classes"] != len(names) or net.classes not in (None, names):
        raise CheckpointError(f"{args.ckpt} was trained for {net.arguments['num_classes']} classes "
                              f"({', '.join(net.classes or ['unnamed'])}), the data set has "
                              f"{len(names)} ({', '.join(names)})")
    folders = {"ids_folder": args.save_ids, "color_folder": args.save_color}
    for folder in filter(None, folders.values()):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if args.images:
        files = find_photographs(args.images, list(filter(None, folders.values())))
    else:
        dataset = Cityscapes(args.data, args.split)
    if rank == 0 and world > 1:
        dist.init_process_group()

    protocol = {"scales": args.scales, "flip": args.flip, "tile": args.tile}
    if args.images:
        unreadable = predict_photographs(net, files, Cityscapes.classes, device, args.precision,
                                         **folders, **protocol)
        sys.exit(1 if unreadable else 0)
    matrix = evaluate(net, dataset, device, args.precision, args.workers, **folders, **protocol)
    if rank > 0 or args.split == "test":
        return
    scores = scores_of(matrix, dataset.classes)
    print(format_scores(scores))
    views = f"tiles of {args.tile[0]}x{args.tile[1]}" if args.tile else "whole images"
    scales = " ".join(f"{scale:g}" for scale in args.scales)
    print(f"{len(dataset)} images of {args.split}, {views}, scales {scales}, "
          f"{'with' if args.flip else 'no'} flip")
    if args.json:
        Path(args.json).write_text(json.dumps(
            {"checkpoint": args.ckpt, "model": net.arguments, "split": args.split,
             "images": len(dataset), "protocol": protocol | {"precision": args.precision},
             **scores, "confusion_matrix": matrix.tolist()}, indent=1) + "\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for names in another encoding
    try:
        main()
    except (OSError, DataError, CheckpointError) as error:
        sys.exit(f"evaluate.py: {sentence_of(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
