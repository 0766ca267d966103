"""Score a PSPNet on Cityscapes, write its predictions, or segment photographs of your own.

    python evaluate.py --ckpt best.pt --data data/cityscapes
    torchrun --nproc_per_node=8 evaluate.py --ckpt best.pt    # the same numbers, faster
    python evaluate.py --ckpt best.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip
    python evaluate.py --ckpt best.pt --split test --save-ids submission
    python evaluate.py --ckpt best.pt --images photo.jpg holiday/ --save-color out

The checkpoint is one of train.py's or one that mmsegmentation published. As in the benchmark, all
labelled pixels of the split, at full resolution, are counted in one confusion matrix, of truth
against prediction; from it come each class's intersection over union (IoU) and their mean (mIoU).
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
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from cityscapes import Cityscapes  # the data set: for one of your own change this line
from cityscapes import VOID, DataError, colored, overlaid, read_image
from pspnet import CheckpointError, load_net

# From an image to a class for every pixel -------------------------------------------------------


def autocast(device, precision):
    """The context in which a network computes in `precision`: "fp32" (on NVIDIA's GPUs TF32 for
    convolutions, PyTorch's default), "bf16" or "fp16"."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def tile_starts(length, tile):
    """The first pixel of each tile on an axis of `length` pixels, length >= tile: two thirds of a
    tile apart (rounded up), as in the authors' code; the last tile ends where the image ends."""
    stride = math.ceil(tile * 2 / 3)
    return [*range(0, length - tile, stride), length - tile]


def tiled_probabilities(net, image, tile):
    """Class probabilities (C, H, W) of an image (3, H, W), uint8 or float, 0..255: the average over
    overlapping tiles of `tile` pixels, (height, width)."""
    height, width = image.shape[1:]
    tile_height, tile_width = min(tile[0], height), min(tile[1], width)
    total = torch.zeros(net.arguments["num_classes"], height, width, device=image.device)
    count = torch.zeros(height, width, device=image.device)  # tiles over each pixel
    for top in tile_starts(height, tile_height):
        for left in tile_starts(width, tile_width):
            inside = np.s_[..., top: top + tile_height, left: left + tile_width]  # an index
            logits, _ = net(image[inside][None])  # _: the auxiliary logits, None here
            total[inside] += logits[0].softmax(dim=0)
            count[inside] += 1
    return total / count


@torch.inference_mode()
def predict(net, image, precision="fp32", scales=(1.0,), flip=False, tile=None):
    """The train id of every pixel: image (3, H, W), uint8 RGB, on the device of net -> (H, W),
    uint8, on the same device. `precision` is that of the network, see `autocast`.

    With several scales, or with flip (each scale also mirrored), the class probabilities of all of
    them are averaged at the size of the image, as mmsegmentation's test-time augmentation does.
    With tile = (height, width) the network sees tiles of that size of the scaled images, as in the
    authors' hszhao/semseg, tool/test.py (which pads smaller images; here the tile shrinks)."""
    size = image.shape[1:]
    total = 0
    for scale in scales:
        for mirrored in ([False, True] if flip else [False]):
            view = image
            if scale != 1:
                scaled = [max(1, int(length * scale + 0.5)) for length in size]
                view = F.interpolate(image[None].float(), scaled, mode="bilinear")[0]
            if mirrored:
                view = view.flip(2)
            with autocast(image.device, precision):
                if tile:
                    output = tiled_probabilities(net, view, tile)
                else:
                    output = net(view[None])[0][0]  # the main logits, (C, H, W), of the one image
            if mirrored:
                output = output.flip(2)
            if scale != 1:
                output = F.interpolate(output[None], size, mode="bilinear")[0]
            total = total + (output if tile else output.softmax(dim=0))
    return total.max(dim=0).indices.byte()  # on a CPU several times as fast as argmax


# From classes to scores -------------------------------------------------------------------------


def confusion(label, prediction, num_classes):
    """Pixels by truth (row) and prediction (column): train ids, uint8, both of the same shape ->
    (num_classes, num_classes), int64. Void in the label is left out."""
    pairs = label.int() * num_classes + prediction  # int, because uint8 would overflow
    counts = torch.bincount(pairs.flatten(), minlength=256 * num_classes)
    return counts.view(256, num_classes)[:num_classes]  # drops the row of void, 255


def intersection_over_union(matrix):
    """IoU of each class, or category, from pixels by truth and prediction; NaN (0/0) where both
    have none of it."""
    return matrix.diag() / (matrix.sum(dim=0) + matrix.sum(dim=1) - matrix.diag())


def scores_of(matrix, classes):
    """The figures of the benchmark and of mmsegmentation, from a matrix of `confusion` on the CPU:
    a dict (its keys stand in `return`) of fractions, 0 to 1. A class neither in the truth nor in
    the predictions has no IoU, one not in the truth no accuracy: they are None, and the means leave
    them out. Source: cityscapesScripts 2.3.0, evaluation/evalPixelLevelSemanticLabeling.py;
    mmsegmentation 1.2.2, IoUMetric. Raises DataError where all pixels were void."""
    if not matrix.any():
        raise DataError("there is nothing to score: every pixel of the labels is void")
    matrix = matrix.double()
    iou, accuracy = intersection_over_union(matrix), matrix.diag() / matrix.sum(dim=1)
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
    """The table for people: IoU and accuracy per class, IoU per category, and the means."""
    def percent(value):
        return "n/a" if value is None else f"{100 * value:.2f}"

    classes, categories = scores["classes"], scores["categories"]
    lines = [f"{'class':16}{'IoU %':>8}{'accuracy %':>12}"]
    lines += [f"{row['name']:16}{percent(row['iou']):>8}{percent(row['accuracy']):>12}"
              for row in classes]
    lines += ["", f"{'category':16}{'IoU %':>8}"]
    lines += [f"{row['name']:16}{percent(row['iou']):>8}" for row in categories]
    present = sum(row["iou"] is not None for row in classes)
    categories_present = sum(row["iou"] is not None for row in categories)
    lines += ["", f"mIoU {percent(scores['miou'])} % over {present} of {len(classes)} classes, "
              f"category mIoU {percent(scores['category_miou'])} % over {categories_present}, "
              f"pixel accuracy {percent(scores['pixel_accuracy'])} %, "
              f"mean accuracy {percent(scores['mean_accuracy'])} %"]
    return "\n".join(lines)


# Over all images, in all processes --------------------------------------------------------------


def this_process():
    """(device, rank, world): the accelerator of this process, or the CPU; its number; how many
    processes there are. torchrun tells them in the environment; without it there is one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type != "cpu":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))  # "local": on this machine
        devices = torch.accelerator.device_count()
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > devices:
            sys.exit(1 if local_rank > 0 else f"there are more processes than the {devices} GPUs "
                     f"of this machine: type torchrun --nproc_per_node={devices}")
        device = torch.device(device.type, local_rank)
        torch.accelerator.set_device_index(local_rank)
    return device, rank, world


def join_processes(world):
    """Wait until all `world` processes have called this. Process 0 does so last, when it has looked
    for mistakes in the files: so they are told once, and nothing is downloaded twice."""
    if world > 1:
        dist.init_process_group()
        dist.barrier()  # because on GPUs the line before doesn't wait


def share_of_cores(most):
    """How many workers of a DataLoader each process of this machine starts: its share of the cores,
    1 to `most` (torchrun says how many processes there are)."""
    return max(1, min(most, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def run(main):
    """Call main. A mistake of the user's ends the script with one sentence, every other error with
    its traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for names in another encoding
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except (OSError, DataError, CheckpointError) as error:
        # From a DataLoader's worker it comes with a traceback; the last line is the sentence.
        sentence = str(error).strip().rpartition("\n")[2].removeprefix("cityscapes.DataError: ")
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells report Ctrl-C
    # Here the error is gone, and with it main's progress bar, which ends its line.
    sys.exit(f"{Path(sys.argv[0]).name}: {sentence}")


def evaluate(net, dataset, device, workers=4, ids_folder=None, color_folder=None, **protocol):
    """The confusion matrix of `net` on `dataset` over all processes, (classes, classes), int64, on
    the CPU, the same in each process. Every process must call it.

    Process r of w has the images r, r + w, r + 2 w, ...: each is seen exactly once. `net` is the
    plain network (DistributedDataParallel would send its buffers around in each forward), and is
    left in eval mode; `protocol` goes to `predict`, the folders to `save_prediction`."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = range(rank, len(dataset), world)
    loader = DataLoader(Subset(dataset, share), num_workers=workers, batch_size=None)  # one by one
    bar = tqdm(loader, "evaluating", unit=" images", leave=False,
               disable=None if rank == 0 else True)  # None: in a terminal only
    num_classes = len(dataset.classes)
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    net.eval()
    for i, (image, label) in zip(share, bar, strict=True):
        prediction = predict(net, image.to(device), **protocol)
        matrix += confusion(label.to(device), prediction, num_classes)
        if ids_folder or color_folder:
            save_prediction(prediction.cpu(), image, dataset.name(i), dataset.classes, ids_folder,
                            color_folder)
    if dist.is_initialized():
        dist.all_reduce(matrix)
    return matrix.cpu()


def save_prediction(prediction, image, name, classes, ids_folder, color_folder):
    """Write a prediction (H, W) for an image (3, H, W) as PNGs, in the folders that are not None.

    ids_folder/NAME.png: label ids, one channel, as the test server of Cityscapes takes them (train
    ids where the classes have no `id`); color_folder/NAME_color.png and NAME_overlay.png: the
    colors, alone and over the photograph. Raises OSError."""
    for folder in filter(None, (ids_folder, color_folder)):
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)  # a name may be CITY/NAME
    if ids_folder:
        ids = np.array([getattr(entry, "id", i) for i, entry in enumerate(classes)], np.uint8)
        Image.fromarray(ids[prediction.numpy()]).save(Path(ids_folder, f"{name}.png"))
    if color_folder:
        colored(prediction, classes).save(Path(color_folder, f"{name}_color.png"))
        overlaid(image, prediction, classes).save(Path(color_folder, f"{name}_overlay.png"))


class Photographs(Dataset):
    """Image files as a data set without labels: all is void. `paths` are files, and folders, whose
    files are taken, but for hidden ones. What cannot be read is left out, and .problems has a
    sentence for it. Raises DataError for two files of one stem, and where there is no file."""

    classes = Cityscapes.classes

    def __init__(self, paths):
        self.files, self.problems, names = [], [], {}
        for path in map(Path, paths):
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                if file != path and (file.name.startswith(".") or not file.is_file()):
                    continue
                try:
                    read_image(file)  # for its problems; it is read again when its turn comes
                except DataError as error:
                    self.problems.append(str(error))
                    continue
                if file.stem in names:
                    raise DataError(f"{names[file.stem]} and {file} would both be saved as "
                                    f"{file.stem}.png: predict them into different folders")
                names[file.stem] = file
                self.files.append(file)
        if not self.files and not self.problems:
            raise DataError(f"there are no files in {', '.join(map(str, paths))}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = read_image(self.files[i])
        return image, torch.full(image.shape[1:], VOID, dtype=torch.uint8)

    def name(self, i):
        return self.files[i].stem


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, metavar="FILE",
                        help="a checkpoint of train.py or of mmsegmentation")
    parser.add_argument("--data", default="data/cityscapes",
                        help="where leftImg8bit and gtFine are (%(default)s)")
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
                        help="processes that decode images, for each GPU (its share of the cores, "
                        "up to 4)")
    args = parser.parse_args()

    numbers = args.scales + (args.tile or [])
    if not all(0 < number < math.inf for number in numbers) or args.workers < 0:
        parser.error("--scales and --tile take positive numbers, --workers 0 or more")
    folders = [os.path.realpath(folder) for folder in (args.save_ids, args.save_color) if folder]
    if len(folders) == 2 and os.path.commonpath(folders) in folders:  # one is in the other
        parser.error("--save-ids and --save-color must be separate folders: the benchmark takes "
                     "one PNG per image from a folder and all folders in it")
    if (args.images or args.split == "test") and (args.json or not folders):
        parser.error("there is nothing to score: photographs have no labels, and those of the test "
                     "split are withheld: leave out --json, and add --save-color DIR, or "
                     "--save-ids DIR, which the test server takes")
    return args


def main():
    args = parse_args()
    device, rank, world = this_process()
    if rank > 0:
        join_processes(world)
    net = load_net(args.ckpt).to(device, memory_format=torch.channels_last)
    dataset = Photographs(args.images) if args.images else Cityscapes(args.data, args.split)
    names = [entry.name for entry in dataset.classes]
    # mmsegmentation's checkpoints do not tell the names.
    if net.arguments["num_classes"] != len(names) or net.classes not in (None, names):
        raise CheckpointError(f"{args.ckpt} was trained for {net.arguments['num_classes']} classes "
                              f"({', '.join(net.classes or ['unnamed'])}), the data set has "
                              f"{len(names)} ({', '.join(names)})")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    for folder in filter(None, (args.save_ids, args.save_color)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        if args.images and Path(folder).resolve() in [f.parent.resolve() for f in dataset.files]:
            raise DataError(f"predictions in {folder} could overwrite the photographs there: give "
                            "another folder to --save-ids and --save-color")
    if rank == 0:  # no mistake was found
        join_processes(world)

    protocol = {name: vars(args)[name] for name in ("precision", "scales", "flip", "tile")}
    matrix = evaluate(net, dataset, device, args.workers, args.save_ids, args.save_color,
                      **protocol)
    if rank > 0:
        return
    if args.save_ids or args.save_color:
        folders = " and ".join(filter(None, (args.save_ids, args.save_color)))
        print(f"predicted {len(dataset)} images: {folders}")
    if args.images and dataset.problems:
        print(*dataset.problems, sep="\n", file=sys.stderr)
        sys.exit(f"evaluate.py: {len(dataset.problems)} files could not be read")
    if args.images or args.split == "test":
        return
    scores = scores_of(matrix, dataset.classes)
    print(format_scores(scores))
    print(f"{len(dataset)} images of {args.split}, {protocol}")
    if args.json:
        Path(args.json).write_text(json.dumps(
            {"checkpoint": args.ckpt, "model": net.arguments, "split": args.split,
             "images": len(dataset), "protocol": protocol, **scores,
             "confusion_matrix": matrix.tolist()}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
