"""Score a PSPNet on Cityscapes, write its predictions, or segment photographs of your own.

    python evaluate.py --ckpt best.pt --data data/cityscapes
    torchrun --standalone --nproc_per_node=8 evaluate.py --ckpt best.pt    # the same, faster
    python evaluate.py --ckpt best.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip
    python evaluate.py --ckpt best.pt --split test --save-ids submission
    python evaluate.py --ckpt best.pt --images photo.jpg holiday/ --save-color out

The checkpoint is one of train.py's or one that mmsegmentation published. All labeled pixels of the
split, at full resolution, are counted in one confusion matrix, of truth against prediction. From it
come each class's intersection over union (IoU) and their mean (mIoU). The options --precision,
--scales, --flip and --tile say how an image is predicted: they are the protocol of an evaluation.
"""
import os

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from cityscapes import VOID, TensorPairs


@torch.inference_mode()
def predict(net, image, precision="fp32"):
    """The train id of every pixel: image (3, H, W), uint8 RGB -> (H, W), uint8. The image and net
    are on the same device, and net is in eval mode. `precision` is explained at autocast, below."""
    with autocast(image.device, precision):
        logits, _ = net(image[None])  # _: the auxiliary logits, for training only
    return argmax_class(logits[0])


def argmax_class(scores):
    """Logits or probabilities (C, H, W) -> the index of the largest of the C, (H, W), uint8. Raises
    FloatingPointError where the largest is not finite. (If a network computes only NaN, argmax says
    class 0 everywhere, which looks like a prediction.)"""
    largest, index = scores.max(dim=0)
    if not largest.isfinite().all():
        raise FloatingPointError("the network computes values that are not finite: its weights are "
                                 "damaged, or too large for --precision fp16")
    return index.byte()


def autocast(device, precision):
    """A context in which the large operations of a network compute in half precision, "bf16" or
    "fp16". With "fp32" it does nothing. (On recent GPUs PyTorch's convolutions then use TF32: they
    round the float32 numbers that they multiply to 10 bits of mantissa.)"""
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=precision != "fp32")


def confusion_matrix(label, prediction, num_classes):
    """Label and prediction, train ids, uint8, both of the same shape -> (num_classes, num_classes),
    int64: at [t, p] the number of pixels of class t that were predicted as p. A label 3 predicted
    as 5 counts at [3, 5]. Void pixels are not counted, whatever was predicted there."""
    scored = label != VOID
    # A 3 that was predicted as 5 becomes 3 * 19 + 5 = 62. bincount counts each of these numbers.
    # (int, because the largest is 18 * 19 + 18 = 360, and uint8 ends at 255)
    codes = label[scored].int() * num_classes + prediction[scored]
    return torch.bincount(codes, minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(matrix):
    """IoU of each class. It is the number of pixels where label AND prediction are the class,
    divided by the number of pixels where label OR prediction is the class. A class that occurs in
    neither has NaN (0/0)."""
    both = matrix.diag().double()
    labeled, predicted = matrix.sum(dim=1), matrix.sum(dim=0)
    return both / (labeled + predicted - both)


def mean_iou(matrix):
    """The mean of the IoU over the classes that occur, in labels or in predictions. It is not a
    mean over images: the matrix has counted the pixels of all of them."""
    return intersection_over_union(matrix).nanmean()


def rank_and_world():
    """torchrun runs several copies of a program, a process for each GPU. Returns the number of this
    process, `rank`, and how many there are, `world`. Without torchrun they are 0 and 1."""
    if not dist.is_torchelastic_launched():  # not started by torchrun
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])  # which torchrun has set


def evaluate(net, dataset, device, predict_image=predict, workers=4, save=None):
    """The confusion matrix of `net` on `dataset`: (classes, classes), int64, on the CPU.

        net = load_net("best.pt")  # a function of pspnet.py
        matrix = evaluate(net, Cityscapes("data/cityscapes", "val"), torch.device("cpu"))
        print(f"{mean_iou(matrix):.4f}")

    `net` is left in eval mode. `predict_image` is a function like `predict`: it takes net and image
    and returns train ids (H, W). If a function `save` is given, save(i, image, prediction) is
    called for each image i. Raises DataError for files that are wrong, like read_pair.

    With several processes (start_process, below, connects them) each must call `evaluate`, and each
    gets the whole matrix."""
    # Of two processes the first has the images 0, 2, 4, ..., the second 1, 3, 5, ... So each image
    # is counted exactly once. One process has them all.
    rank, world = rank_and_world()
    indices = range(rank, len(dataset), world)  # of the images of this process
    loader = DataLoader(TensorPairs(dataset), sampler=indices, num_workers=workers,
                        batch_size=None)  # no batches, as sizes may differ: image is (3, H, W)
    pairs = tqdm(loader, "evaluating", unit=" images", leave=False, disable=rank > 0)
    num_classes = len(dataset.classes)
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    net.eval()
    for i, (image, label) in zip(indices, pairs, strict=True):  # The loader keeps the order.
        prediction = predict_image(net, image.to(device))
        matrix += confusion_matrix(label.to(device), prediction, num_classes)
        if save:
            save(i, image, prediction)
    if world > 1:
        dist.all_reduce(matrix)  # In each process it becomes the sum over all processes.
    return matrix.cpu()


# Here the lesson ends. What follows are tables, protocols, processes and the command. ------------
import argparse
import hashlib
import json
import math
import sys
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageOps

from cityscapes import Cityscapes  # For data of your own: from FILE import CLASS as Cityscapes
from cityscapes import DataError, at_least, check_classes, colored, read_picture, to_picture
from pspnet import CheckpointError, load_net


def scores_of(matrix, classes):
    """The figures of the benchmark and of mmsegmentation, as fractions, from the matrix of
    `evaluate`. What would be 0/0 is None, and the means leave it out. Raises DataError where all
    pixels are void. Source: cityscapesScripts 2.3.0, evaluation/evalPixelLevelSemanticLabeling.py;
    mmsegmentation 1.2.2, IoUMetric."""
    if not matrix.any():
        raise DataError("there is nothing to score: no images, or their labels are all void")
    matrix = matrix.double()
    iou = intersection_over_union(matrix)
    accuracy = matrix.diag() / matrix.sum(dim=1)
    # The confusion matrix of categories: each class is counted as its category.
    categories = list(dict.fromkeys(entry.category for entry in classes))  # unique, in order
    place = [categories.index(entry.category) for entry in classes]
    category_matrix = matrix.new_zeros(len(categories), len(categories))
    for i in range(len(classes)):
        for j in range(len(classes)):
            category_matrix[place[i], place[j]] += matrix[i, j]
    category_iou = intersection_over_union(category_matrix)

    def or_none(values):  # NaN is no JSON
        return [None if math.isnan(value) else value for value in values.tolist()]

    rows = zip(classes, or_none(iou), or_none(accuracy))
    groups = zip(categories, or_none(category_iou))
    return {"miou": mean_iou(matrix).item(), "mean_accuracy": accuracy.nanmean().item(),
            "category_miou": category_iou.nanmean().item(),
            "pixel_accuracy": (matrix.diag().sum() / matrix.sum()).item(),
            "classes": [{"name": str(entry.name), "iou": class_iou, "accuracy": class_accuracy}
                        for entry, class_iou, class_accuracy in rows],
            "categories": [{"name": str(name), "iou": group_iou} for name, group_iou in groups]}


def format_scores(scores):
    """The table for people: IoU and accuracy of each class, and the means, in percent."""
    def percent(value):
        return "n/a" if value is None else f"{100 * value:.2f}"

    text = f"{'class':16}{'IoU %':>8}{'accuracy %':>12}\n"
    for row in scores["classes"]:
        text += f"{row['name']:16}{percent(row['iou']):>8}{percent(row['accuracy']):>12}\n"
    present = [row for row in scores["classes"] if row["iou"] is not None]
    return (f"{text}\nmIoU {percent(scores['miou'])} % over {len(present)} of "
            f"{len(scores['classes'])} classes, category mIoU {percent(scores['category_miou'])} %"
            f", pixel accuracy {percent(scores['pixel_accuracy'])} %, "
            f"mean accuracy {percent(scores['mean_accuracy'])} %")


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
            rows, columns = slice(top, top + tile_height), slice(left, left + tile_width)
            logits, _ = net(images[:, :, rows, columns])
            total[:, :, rows, columns] += logits.softmax(dim=1)
            count[rows, columns] += 1
    return total / count


@torch.inference_mode()
def predict_averaged(net, image, precision="fp32", scales=(1.0,), flip=False, tile=None):
    """As `predict`, but from class probabilities that are averaged over views of the image: at
    these scales, and with flip each mirrored too. With tile = (height, width) the network sees
    tiles of each view.

    Without tiles this follows mmsegmentation's test-time augmentation: it resizes logits, and then
    takes the softmax. With tiles it follows the authors' hszhao/semseg, tool/test.py: that takes
    the softmax, and then resizes. (It also pads images that are smaller than a tile, which we do
    not, and mirrors each tile, where we mirror the image.)"""
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


def start_process():
    """Give this process its GPU, and connect it with the others, if there are any. Returns (device,
    rank, world): the GPU, or the CPU; the number of the process; how many processes there are.
    Raises DataError where there are fewer GPUs than processes."""
    rank, world = rank_and_world()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Of several machines each runs some of the processes. LOCAL_RANK counts on one machine.
        local_rank = int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else 0
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise DataError(f"there are more processes than GPUs: type --nproc_per_node={gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1:
        # NCCL, which connects GPUs, would guess the device if it were not told. A process may wait
        # half an hour for the others, for example while process 0 downloads weights.
        dist.init_process_group(device_id=device if device.type == "cuda" else None,
                                timeout=timedelta(minutes=30))
    return device, rank, world


def end_process():
    """Every process calls this when its work is done. On GPUs NCCL warns if the group of processes
    is not closed. On CPUs closing can hang, if another process has ended already."""
    if dist.is_initialized() and torch.cuda.is_available():
        dist.destroy_process_group()


def compare_processes(**settings):
    """Raises DataError, in every process, unless all have the same settings. On two machines
    options and files may differ, and the result would mix them."""
    everyones = [settings]
    if dist.is_initialized():  # several processes
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, settings)
    differing = [key for key in settings if any(other[key] != settings[key] for other in everyones)]
    if differing:
        raise DataError(f"the processes differ in {', '.join(differing)}: give them all the same")


def share_of_cores(most):
    """How many workers each process of this machine starts: its share of the cores, 1 to `most`."""
    return max(1, min(most, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def parse_args(argv):
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
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of autocast (fp32)")
    add("--workers", type=at_least(0), default=share_of_cores(4), help="loaders (%(default)s)")
    args = parser.parse_args(argv)
    saving = args.save_ids or args.save_color
    if (args.images or args.split == "test") and (args.json or not saving):
        parser.error("photographs and the test split have no labels to score with: leave out "
                     "--json, and add --save-color DIR, or --save-ids DIR for the test server")
    if args.images and rank_and_world()[1] > 1:
        parser.error("--images is for one process: type python, not torchrun")
    return args


def warn_of_one_class(counts, where):
    """Say so where labels show fewer than two classes. counts[c] is their number of pixels of class
    c. With data of one's own the commonest mistake is a mask of 0 and 255: class 0 and void."""
    train_ids = [c for c, count in enumerate(counts) if count > 0]
    if len(train_ids) < 2:
        print(f"the labels of {where} show no other class than {train_ids}, and {VOID} is void: a "
              f"mask of 0 and {VOID} must become one of 0 and 1", file=sys.stderr)


def names_of(dataset):
    """The paths, without an ending, under which predictions are saved. Raises DataError where one
    would be outside of the folder, and where one would replace another."""
    names = [Path(str(dataset.name(i))) for i in range(len(dataset))]
    wrong = [name for name in names if name.is_absolute() or ".." in name.parts or not name.parts]
    if wrong or len(set(names)) < len(names):
        raise DataError("the names of images must be relative paths without .., and no two the "
                        f"same: {', '.join(map(str, wrong or names)):.300}")
    return names


ENDINGS = ("_ids.png", "_color.png", "_overlay.png")  # of what save_prediction writes


def save_prediction(args, name, image, prediction):
    """Write a prediction, train ids (H, W), for an image: to --save-ids as NAME_ids.png, label ids
    for the test server; to --save-color as NAME_color.png and, over the image, NAME_overlay.png."""
    prediction, classes = prediction.cpu().numpy(), Cityscapes.classes
    for folder in filter(None, (args.save_ids, args.save_color)):
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)  # a name may be CITY/NAME
    if args.save_ids:
        ids = np.array([entry.id for entry in classes], np.uint8)
        Image.fromarray(ids[prediction]).save(Path(args.save_ids, f"{name}_ids.png"))
    if args.save_color:
        color = colored(prediction, classes).convert("RGB")
        color.save(Path(args.save_color, f"{name}_color.png"))
        overlay = Image.blend(to_picture(image), color, 0.5)
        overlay.save(Path(args.save_color, f"{name}_overlay.png"))


def photographs(paths):
    """The files among `paths`, and those in the folders among them that are not hidden: a
    dictionary by name. Predictions that were saved beside them are left out: a.jpg_color.png, if
    a.jpg is there. Raises DataError for two files of one name, and where there is none."""
    files = {}
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.glob("[!.]*") if file.is_file())
        for file in found:
            if files.setdefault(file.name, file) != file:
                raise DataError(f"{files[file.name]} and {file} would both be saved as {file.name}_"
                                "ids.png: predict them into different folders")
    if not files:
        raise DataError(f"there are no files in {', '.join(paths)}")
    predictions = {name + ending for name in files for ending in ENDINGS}
    return {name: file for name, file in files.items() if name not in predictions}


def predict_photographs(net, device, predict_image, args):
    """Predict and save those of --images. Raises DataError if some could not be read."""
    files, unreadable = photographs(args.images), 0
    for name, path in tqdm(files.items(), "predicting", unit=" images", leave=False):
        try:
            picture = read_picture(path)
        except DataError as error:  # The other photographs are predicted all the same.
            tqdm.write(str(error), file=sys.stderr)
            unreadable += 1
            continue
        with suppress(Exception):  # Turn it upright, if its EXIF data say how. They may be broken.
            ImageOps.exif_transpose(picture, in_place=True)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        save_prediction(args, name, image, predict_image(net, image.to(device)))
    print(f"{len(files) - unreadable} predictions are in {args.save_color or args.save_ids}")
    if unreadable:
        raise DataError(f"{unreadable} files could not be read")


def main(argv=None):
    args = parse_args(argv)
    device, rank, _ = start_process()
    net = load_net(args.ckpt).to(device, memory_format=torch.channels_last)
    class_names = check_classes(Cityscapes.classes)
    num_classes, known = net.arguments["num_classes"], net.class_names or class_names
    if num_classes != len(class_names) or known != class_names:
        raise CheckpointError(f"{args.ckpt} was trained for {num_classes} classes ({known}), and "
                              f"the data set has {len(class_names)} classes ({class_names})")
    protocol = {name: vars(args)[name] for name in ("precision", "scales", "flip", "tile")}
    predict_image = partial(predict, precision=args.precision)
    if args.flip or args.tile or args.scales != [1.0]:
        predict_image = partial(predict_averaged, **protocol)
    if args.images:
        return predict_photographs(net, device, predict_image, args)

    dataset = Cityscapes(args.data, args.split)
    ckpt = hashlib.sha256(Path(args.ckpt).read_bytes()).hexdigest()
    compare_processes(ckpt=ckpt, images=len(dataset), **protocol)
    saving = args.save_ids or args.save_color
    names = names_of(dataset) if saving else None

    def save(i, image, prediction):
        save_prediction(args, names[i], image, prediction)

    matrix = evaluate(net, dataset, device, predict_image, args.workers, save if saving else None)
    if rank == 0 and args.split != "test":
        scores = scores_of(matrix, Cityscapes.classes)
        warn_of_one_class(matrix.sum(dim=1), args.split)
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
        end_process()
    except (OSError, DataError, CheckpointError, FloatingPointError) as error:
        # A worker's error has its traceback before the sentence.
        sys.exit(f"evaluate.py: {(str(error).strip() or repr(error)).splitlines()[-1]}")
