"""Train PSPNet on Cityscapes.

    python train.py --data data/cityscapes                                    # a GPU, or the CPU
    torchrun --standalone --nproc_per_node=8 train.py --data data/cityscapes  # eight GPUs
    python train.py --data data/cityscapes --resume                           # go on after a stop

All run one recipe, 40,000 iterations of 8 images of 512x1024. It is mmsegmentation 1.2.2's
pspnet_r50-d8_4xb2-40k_cityscapes-512x1024, which reached 77.85 mIoU on val. README.md lists how it
differs from the paper's. The folder --out gets

    last.pt, best.pt    checkpoints: the latest, and that of the best mIoU on val
    log.jsonl           a line of JSON every 10 iterations, and per save, start and validation
    val_NNNNNN.png      photographs, truth and prediction at each validation

A run may be killed at any moment. --resume goes on from last.pt, with the same samples, momentum
and, with as many processes, dropout. So on a CPU the weights at the end are the same bytes as those
of a run in one go. (Some iterations then stand twice in the log. The later line counts.)
"""
import argparse
import json
import math
import os
import sys
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from cityscapes import Cityscapes  # the data set: for one of your own change this line
from cityscapes import (VOID, DataError, TrainingStream, at_least, colored, save_sheet, to_picture,
                        to_tensors)
from evaluate import (autocast, compare_processes, evaluate, format_scores, predict, rank_and_world,
                      scores_of, share_of_cores, start_process)
from pspnet import BACKBONES, CheckpointError, FastPSPNet, load_backbone, load_net, read_weights


def poly_lr(iteration, iters, base_lr=0.01):
    """The learning rate of an iteration, 0 to iters - 1. It falls from base_lr to base_lr / 100,
    with power 0.9, as in mmengine 0.10.7, PolyLR. In the paper (section 5.1) it falls to 0."""
    end_lr = base_lr / 100
    return end_lr + (base_lr - end_lr) * (1 - iteration / max(1, iters - 1)) ** 0.9


def segmentation_loss(logits, label):
    """Cross entropy: logits (B, C, H, W), label (B, H, W) of train ids, int64, 255 void -> scalar.

    The sum over the labelled pixels is divided by the number of ALL pixels (mmsegmentation's
    avg_non_ignore=False). So a batch that is all void gives 0, not 0/0. And as every process
    divides by the same number, the mean of their losses is that of the whole batch."""
    return F.cross_entropy(logits, label, ignore_index=VOID, reduction="none").mean()


def parse_args(device, world):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/cityscapes", help="where leftImg8bit and gtFine are (%(default)s)")
    add("--out", default="runs/pspnet", help="results; all machines must see it (%(default)s)")
    add("--backbone", choices=BACKBONES, default="resnet50_v1c")
    add("--bins", type=at_least(1), nargs="*", default=[1, 2, 3, 6], metavar="K",
        help="levels of the pyramid; no number: no pyramid (1 2 3 6)")
    add("--weights", default="imagenet", metavar="imagenet|none|FILE",
        help="what the backbone starts from (imagenet, which is downloaded)")
    add("--init", metavar="FILE", help="start from a whole PSPNet, ours or mmsegmentation's")
    add("--crop", type=at_least(1), nargs=2, default=[512, 1024], metavar=("H", "W"),
        help="size of the training samples in pixels (512 1024)")
    add("--batch-size", type=at_least(1), default=8, help="images in all processes together (8)")
    add("--iters", type=at_least(1), default=40_000, help="iterations (40000)")
    add("--lr", type=at_least(0, float), default=0.01, help="the first learning rate (0.01)")
    add("--seed", type=at_least(0), default=0, help="of samples, dropout and new weights (0)")
    add("--workers", type=at_least(0), default=share_of_cores(8),
        help="processes that make samples, for each GPU (its share of the cores, up to 8)")
    add("--val-every", type=at_least(1), default=4000, help="iterations between validations (4000)")
    add("--save-every", type=at_least(1), default=500, help="iterations between checkpoints (500)")
    precision = "fp32"
    if device.type == "cuda":  # 8 crops in fp32 would need 20 GB
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    add("--precision", choices=("fp32", "bf16", "fp16"), default=precision,
        help="fp16 and bf16 are autocast (on a GPU bf16, fp16 where that is only emulated)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--coarse", action="store_true", help="train on train_extra's coarse labels as well")
    add("--resume", action="store_true", help="go on from last.pt in --out, or start without one")
    args = parser.parse_args()
    # Batch norm needs two values per channel, and the 1x1 level gives one per image. On GPUs
    # SyncBatchNorm takes the images of all processes together, on CPUs each has its own.
    least = 2 * world if device.type == "cpu" else 2
    if args.batch_size % world or args.batch_size < least:
        parser.error(f"--batch-size must be {least} or more, and a multiple of {world} (processes)")
    return args


def main():
    device, rank, world = start_process()  # this process: its GPU or CPU, its number, of how many
    args = parse_args(device, world)
    out = Path(args.out)
    if rank == 0 and out.exists() and not args.resume:
        raise DataError(f"{out} exists already: type --resume to go on with it, or another --out")

    train_set, val_set = Cityscapes(args.data, "train"), Cityscapes(args.data, "val")
    if args.coarse:
        train_set = ConcatDataset([train_set, Cityscapes(args.data, "train_extra")])
        train_set.classes = val_set.classes
    class_names = [entry.name for entry in val_set.classes]
    # The recipe: what the weights depend on. A resumed run must have the same.
    not_recipe = ("data", "out", "workers", "val_every", "save_every", "resume")
    recipe = {name: value for name, value in vars(args).items() if name not in not_recipe}
    recipe.update(images=len(train_set), classes=class_names)

    # The network: `net` is the plain one, evaluated and saved; `model` is net wrapped for training.
    torch.manual_seed(args.seed % 2**32)
    net = FastPSPNet(len(class_names), args.backbone, args.bins)
    if world > 1 and device.type != "cpu":  # statistics of all processes' images
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(device, memory_format=torch.channels_last)  # the layout in which convolutions are fast
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    # The start: a checkpoint of this run, or the weights of --weights or --init. (A run that was
    # killed between the first best.pt and the first last.pt has best.pt only.)
    saved = [path for path in (out / "last.pt", out / "best.pt") if path.exists()]
    start, best_miou = 0, -1.0
    if args.resume and saved:
        start, best_miou = restore(saved[0], recipe, net, optimizer, scaler)
    elif rank == 0:  # DistributedDataParallel, below, copies them to the other processes
        load_first_weights(net, args, class_names)
    compare_processes(start=start, **recipe)  # an error where two machines got different options
    model = torch.compile(net) if args.compile else net  # It has net's weights.
    if world > 1:  # Backward averages the gradients, so that all processes take the same step.
        model = DistributedDataParallel(model)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        print(f"{world} x {device.type}, {args.precision}: {len(train_set)} images to train on, "
              f"{len(val_set)} to validate, iterations {start} to {args.iters}", flush=True)
        write_log(out, "start", start, processes=world, device=str(device), **recipe)

    # Iteration i has the samples from i * batch_size on. Of two processes 0 has the even ones.
    stream = TrainingStream(train_set, args.crop, args.seed)
    samples = range(start * args.batch_size + rank, args.iters * args.batch_size, world)
    loader = DataLoader(stream, args.batch_size // world, sampler=samples,
                        num_workers=args.workers, pin_memory=device.type != "cpu")
    bar = tqdm(range(start, args.iters), initial=start, total=args.iters, disable=rank > 0)

    net.train()
    for iteration, (image, label) in zip(bar, loader, strict=True):
        image = image.to(device, non_blocking=True)  # (B, 3, H, W), uint8; B: of this process
        label = label.to(device, non_blocking=True).long()  # (B, H, W), as cross_entropy wants it
        lr = poly_lr(iteration, args.iters, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Dropout gets a seed of its own in each iteration and process: a resumed run has the same.
        torch.manual_seed(((args.seed * args.iters + iteration) * world + rank) % 2**32)

        with autocast(device, args.precision):
            logits, aux_logits = model(image)
            loss = segmentation_loss(logits, label)
            loss = loss + 0.4 * segmentation_loss(aux_logits, label)  # section 3.3
        scaler.scale(loss).backward()  # for fp16, where small gradients would be 0
        scaler.step(optimizer)  # scales back; leaves out a step that is not finite
        scaler.update()
        optimizer.zero_grad()

        step = iteration + 1  # how many iterations are finished
        validating = step % args.val_every == 0 or step == args.iters
        saving = step % args.save_every == 0 or validating
        if step % 10 == 0 or saving:
            mean_loss = mean_over_processes(loss)  # waits for the GPU
            if rank == 0:
                write_log(out, "train", step, lr=lr, loss=mean_loss)
            bar.set_postfix_str(f"loss {mean_loss:.3f}, lr {lr:.2g}", refresh=False)
        if validating:
            scores = validate(net, val_set, device, args, out / f"val_{step:06}.png")
            net.train()  # validate has left it in eval mode
            if rank == 0:
                write_log(out, "validation", step, **scores)
        if saving and rank == 0:
            is_best = validating and scores["miou"] > best_miou
            best_miou = scores["miou"] if is_best else best_miou
            checkpoint = {"state_dict": net.state_dict(), "model": net.arguments,
                          "classes": class_names, "optimizer": optimizer.state_dict(),
                          "scaler": scaler.state_dict(), "step": step, "best": best_miou,
                          "recipe": recipe}
            if is_best:  # before last.pt, so that a kill between the two loses nothing
                save(checkpoint, out / "best.pt")
            save(checkpoint, out / "last.pt")

    if rank == 0 and start < args.iters:
        print(f"best mIoU {100 * best_miou:.2f} %. Look at {out}/val_{step:06}.png. Then type\n"
              f"python evaluate.py --ckpt {out}/best.pt --images PHOTO --save-color {out}/photos")


# Here the lesson ends. What follows are first weights, checkpoints, the log, validation. ----------


def load_first_weights(net, args, class_names):
    """Give `net` the weights that --init or --weights names. If --init knows other classes, the two
    classifiers, main and auxiliary, stay new. Raises CheckpointError for another network."""
    if args.init:
        other = load_net(args.init)
        if {**other.arguments, "num_classes": len(class_names)} != net.arguments:
            raise CheckpointError(f"--init {args.init} is another network: {other.arguments}")
        state = other.state_dict()
        if other.arguments != net.arguments or other.class_names not in (None, class_names):
            print(f"{args.init} knows other classes: the two classifiers start at random")
            for name, value in net.state_dict().items():
                if ".conv_seg." in name:
                    state[name] = value
        net.load_state_dict(state)
    elif args.weights != "none":
        load_backbone(net, args.weights)


def restore(path, recipe, net, optimizer, scaler):
    """Give `net`, `optimizer` and `scaler` what the checkpoint holds. Returns how many iterations
    it has finished, and its best mIoU. Raises CheckpointError where it is of another recipe."""
    state, checkpoint = read_weights(path)
    before = checkpoint.get("recipe") or {}
    changed = [f"{name} was {before.get(name)} and is {recipe.get(name)}"
               for name in {**before, **recipe} if before.get(name) != recipe.get(name)]
    if changed:
        raise CheckpointError(f"the recipe of {path} was another ({'; '.join(changed)}): resume "
                              "with the old one, or start again with another --out")
    net.load_state_dict(state)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"], checkpoint["best"]


def save(checkpoint, path):
    """torch.save, whole or not at all: at every moment `path` is the old file or the new one.
    Raises FloatingPointError where weights are not finite: the old file is worth more."""
    if not all(value.isfinite().all() for value in checkpoint["state_dict"].values()):
        raise FloatingPointError("weights are not finite, and not saved: try a lower --lr")
    content = BytesIO()  # torch.save into a file would make a RuntimeError of a full disk
    torch.save(checkpoint, content)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # to the disk, before the name
    os.replace(temporary, path)


def write_log(out, event, step, **values):
    """Append a line of JSON to log.jsonl."""
    with open(out / "log.jsonl", "a") as file:
        print(json.dumps({"event": event, "step": step, **values}), file=file)


def mean_over_processes(loss):
    """The mean loss of all processes, a number. Raises FloatingPointError if it is not finite."""
    _, world = rank_and_world()
    loss = loss.detach()
    if world > 1:
        dist.all_reduce(loss)
    mean_loss = loss.item() / world
    if not math.isfinite(mean_loss):
        raise FloatingPointError(f"the loss is {mean_loss}: start again with a lower --lr")
    if mean_loss == 0:
        tqdm.write("the loss is 0: no pixel of these samples is labelled", file=sys.stderr)
    return mean_loss


def validate(net, val_set, device, args, picture_path):
    """Score `net`. Every process must call this. Process 0 prints the table, and draws photograph,
    truth and prediction of six images from all over the split."""
    rank, world = rank_and_world()
    if world > 1:  # Without SyncBatchNorm processes differ in batch norm's running statistics.
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)  # Those of process 0 count.
    predict_image = partial(predict, precision=args.precision)
    matrix = evaluate(net, val_set, device, predict_image, args.workers)
    scores = scores_of(matrix, val_set.classes)
    if rank == 0:
        print(f"\n{format_scores(scores)}\nsix images of val: {picture_path}", flush=True)
        pictures = []
        for i in range(0, len(val_set), max(1, len(val_set) // 6))[:6]:
            image, label = to_tensors(val_set[i])
            prediction = predict_image(net, image.to(device)).cpu()
            pictures += [to_picture(image), colored(label, val_set.classes),
                         colored(prediction, val_set.classes)]
        save_sheet(picture_path, pictures, 3, val_set.classes)
    return scores


if __name__ == "__main__":
    # The same bytes each time, also on a GPU, where PyTorch can: it warns where it cannot.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for that
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # takes time and helps nobody here
    try:
        main()
    except (OSError, DataError, CheckpointError, FloatingPointError) as error:
        # A worker's error has its traceback before the sentence.
        sys.exit(f"train.py: {str(error).strip().splitlines()[-1]}")
