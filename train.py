"""Train PSPNet on Cityscapes.

    python train.py --data data/cityscapes                                    # a GPU, or the CPU
    torchrun --standalone --nproc_per_node=8 train.py --data data/cityscapes  # eight GPUs
    python train.py --data data/cityscapes --resume                           # go on after a stop

All run one recipe: 40,000 iterations of 8 images of 512x1024, that of mmsegmentation 1.2.2's
pspnet_r50-d8_4xb2-40k_cityscapes-512x1024 (which reached 77.85 mIoU on val), in bfloat16 on a GPU
that has it. README.md lists how it differs from the paper's. The folder --out gets

    last.pt, best.pt    checkpoints: the latest, and that of the best mIoU on val
    log.jsonl           a line of JSON for each event: the recipe, 10 iterations, a validation
    val_NNNNNN.png      photographs, truth and prediction at each validation

A run may be ended at any moment by anything, and loses what came after last.pt. Resumed, it goes on
with the same samples and momentum, and, with the same number of processes, the same dropout.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from cityscapes import Cityscapes  # the data set: for one of your own change this line
from cityscapes import VOID, DataError, TrainingStream, colored, photograph, save_sheet, save_whole
from evaluate import (autocast, evaluate, format_scores, join_processes, predict, run, scores_of,
                      share_of_cores, this_process)
from pspnet import BACKBONES, CheckpointError, PSPNet, load_backbone, load_net, read_weights


def poly_lr(step, iters, base_lr=0.01):
    """The learning rate of iteration `step`, 0 to iters - 1: falls from base_lr to base_lr / 100,
    with power 0.9, as in mmengine 0.10.7, PolyLR; in the paper (section 5.1) it falls to 0."""
    end_lr = base_lr / 100
    return end_lr + (base_lr - end_lr) * (1 - step / max(1, iters - 1)) ** 0.9


def segmentation_loss(logits, label):
    """Cross entropy: logits (B, C, H, W), label (B, H, W) of train ids, int64, 255 void -> scalar.

    Void counts as 0 in the mean over ALL pixels (mmsegmentation's avg_non_ignore=False): a crop
    that is all void gives 0, not 0/0, and the mean over equal shares is that over the batch."""
    return F.cross_entropy(logits, label, ignore_index=VOID, reduction="none").mean()


def parse_args(device, world):
    """Returns the options, the recipe (a dict of the options on which the result depends), and in
    words what in the recipe differs from the reference, that is, from the defaults."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/cityscapes", help="where leftImg8bit and gtFine are (%(default)s)")
    add("--out", default="runs/pspnet", help="results; all machines must see it (%(default)s)")
    add("--backbone", choices=BACKBONES, default="resnet50_v1c")
    add("--bins", type=int, nargs="*", default=[1, 2, 3, 6], metavar="K",
        help="levels of the pyramid; no number: no pyramid (1 2 3 6)")
    add("--weights", default="imagenet", metavar="imagenet|none|FILE",
        help="what the backbone starts from (imagenet, which is downloaded)")
    add("--init", metavar="FILE", help="start from a whole PSPNet, ours or mmsegmentation's")
    add("--crop", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"),
        help="size of the training samples in pixels (512 1024)")
    add("--batch-size", type=int, default=8, help="images per iteration, in all processes (8)")
    add("--iters", type=int, default=40_000, help="iterations (40000)")
    add("--lr", type=float, default=0.01, help="learning rate of the first iteration (0.01)")
    add("--seed", type=int, default=0, help="of samples, dropout and new weights (0)")
    add("--workers", type=int, default=share_of_cores(16),
        help="processes that make samples for each GPU (its share of the cores, up to 16)")
    add("--val-every", type=int, default=4000, help="iterations between validations (4000)")
    add("--save-every", type=int, default=500, help="iterations between checkpoints (500)")
    # NVIDIA's GPUs before Ampere can only emulate bf16.
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    add("--precision", choices=("fp32", "bf16", "fp16"),
        default="bf16" if device.type != "cpu" and has_bf16 else "fp32",
        help="bf16 and fp16 are autocast (bf16 on a GPU that has it, otherwise fp32)")
    add("--compile", action="store_true",
        help="torch.compile the network (with several GPUs SyncBatchNorm cuts it into pieces)")
    add("--cache", metavar="DIR", help="keep decoded images here (25 GB for Cityscapes)")
    add("--coarse", action="store_true", help="train on train_extra's coarse labels as well")
    add("--resume", action="store_true", help="go on from last.pt in --out, or start without one")
    args = parser.parse_args()

    positive = *args.crop, *args.bins, args.batch_size, args.iters, args.val_every, args.save_every
    if min(positive) < 1 or not args.lr > 0 or args.workers < 0 or not 0 <= args.seed < 2**63:
        parser.error("numbers must be positive (--workers and --seed may be 0), and "
                     "--seed below 2**63")
    # The 1x1 level gives batch norm one value per image and channel, and it needs two: in each
    # process on a CPU, in all together on GPUs, whose SyncBatchNorm joins them.
    least = 2 * world if device.type == "cpu" else 2
    if args.batch_size % world or args.batch_size < least:
        parser.error(f"--batch-size must be a multiple of {world}, the number of processes, and "
                     f"{least} or more")
    # The result does not depend on these.
    neutral = ("data", "out", "workers", "cache", "val_every", "save_every", "resume")
    recipe = {name: value for name, value in vars(args).items() if name not in neutral}
    departures = [f"{name} {value} ({parser.get_default(name)})" for name, value in recipe.items()
                  if value != parser.get_default(name)]
    return args, recipe, departures


def initialize(net, args, classes):
    """Give `net` the weights that --init or --weights names. If --init knows other classes, the two
    classifiers, main and auxiliary, stay new. Raises CheckpointError for another backbone or
    pyramid."""
    if args.init:
        other = load_net(args.init)
        if {**other.arguments, "num_classes": len(classes)} != net.arguments:
            raise CheckpointError(f"--init {args.init} is another network: {other.arguments}")
        state = other.state_dict()
        if other.arguments != net.arguments or other.classes not in (None, classes):
            print(f"{args.init} knows other classes: the two classifiers start at random")
            own = net.state_dict()
            state |= {name: own[name] for name in own if ".conv_seg." in name}  # the classifiers
        net.load_state_dict(state)
    elif args.weights != "none":
        load_backbone(net, args.weights)


def restore(path, recipe, net, optimizer, scaler):
    """Give `net`, `optimizer` and `scaler` what the checkpoint of a run holds; returns its step and
    history. Raises CheckpointError where it is of another recipe."""
    state, checkpoint = read_weights(path)
    before = checkpoint.get("recipe", {})
    changed = [f"{name} was {before.get(name)} and is {recipe.get(name)}"
               for name in before | recipe if before.get(name) != recipe.get(name)]
    if changed:
        raise CheckpointError(f"the recipe of {path} was another ({'; '.join(changed)}): resume "
                              "with the old one, or start again with another --out")
    net.load_state_dict(state)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"], checkpoint["history"]


def best_miou(history):
    """The best mIoU among the validations of a run."""
    return max(event["miou"] for event in history if event["event"] == "validation")


def validate(net, val_set, device, args, picture_path):
    """Score `net`; every process must call this. Process 0 prints the table, and draws photograph,
    truth and prediction of six images from all over the split."""
    if dist.is_initialized():  # without SyncBatchNorm each process has statistics of its own
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
    matrix = evaluate(net, val_set, device, args.workers, precision=args.precision)
    scores = scores_of(matrix, val_set.classes)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"\n{format_scores(scores)}", flush=True)
        pictures = []
        for i in range(0, len(val_set), max(1, len(val_set) // 6))[:6]:
            image, label = val_set[i]
            prediction = predict(net, image.to(device), args.precision).cpu()
            pictures += [photograph(image), colored(label, val_set.classes),
                         colored(prediction, val_set.classes)]
        save_sheet(picture_path, pictures, 3, val_set.classes)
    net.train()  # the evaluation was in eval mode
    return scores


def main():
    device, rank, world = this_process()
    args, recipe, departures = parse_args(device, world)
    out, last = Path(args.out), Path(args.out, "last.pt")
    if rank > 0:  # wait for process 0, which looks for mistakes first and joins below
        join_processes(world)
    elif out.exists() and not args.resume:
        raise DataError(f"{out} exists already: type --resume to go on with it, or another --out")

    train_set, val_set = Cityscapes(args.data, "train", args.cache), Cityscapes(args.data, "val")
    classes = [entry.name for entry in val_set.classes]
    if args.coarse:
        train_set = ConcatDataset([train_set, Cityscapes(args.data, "train_extra", args.cache)])
    recipe |= {"images": len(train_set), "classes": classes}

    # `net` is the plain network, which is evaluated and saved; `model` is net wrapped to train it.
    torch.manual_seed(args.seed)
    net = PSPNet(len(classes), args.backbone, args.bins)
    if world > 1 and device.type != "cpu":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    step, history = 0, [{"event": "recipe", "step": 0, **recipe}]  # iterations, events so far
    if args.resume and last.exists():
        step, history = restore(last, recipe, net, optimizer, scaler)
    elif rank == 0:  # DistributedDataParallel hands its weights to the other processes
        initialize(net, args, classes)

    if rank == 0:
        out.mkdir(parents=True, exist_ok=args.resume)
        print(f"{world} x {device.type}; {len(train_set)} images to train on, {len(val_set)} to "
              f"validate; iterations {step} to {args.iters}\n"
              f"departs from the reference in: {'; '.join(departures) or 'nothing'}", flush=True)
        join_processes(world)  # no mistake was found
    # Process 0 writes the log anew from `history`, without what came after last.pt.
    log = open(out / "log.jsonl" if rank == 0 else os.devnull, "w", buffering=1)
    print(*map(json.dumps, history), sep="\n", file=log)
    model = torch.compile(net) if args.compile else net
    if world > 1:
        model = DistributedDataParallel(model)

    stream = TrainingStream(train_set, args.crop, args.seed)
    # Iteration i has the batch_size samples from i * batch_size on, process r every world-th.
    samples = range(step * args.batch_size + rank, args.iters * args.batch_size, world)
    batches = iter(DataLoader(stream, args.batch_size // world, sampler=samples,
                              num_workers=args.workers, pin_memory=device.type != "cpu"))
    loss_sum = torch.zeros((), device=device)
    logged, since, waited = step, time.perf_counter(), 0.0  # at the log's latest line, or since it
    bar = tqdm(total=args.iters, initial=step, unit="it", disable=rank > 0)

    while step < args.iters:
        before = time.perf_counter()
        image, label = next(batches)  # (B, 3, H, W), (B, H, W), uint8; B: of this process
        waited += time.perf_counter() - before
        image = image.to(device, non_blocking=True)
        label = label.to(device, non_blocking=True).long()
        rate = poly_lr(step, args.iters, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(hash((args.seed, step, rank)))  # so a resumed run has the same dropout

        with autocast(device, args.precision):
            logits, aux_logits = model(image)
            loss = segmentation_loss(logits, label) + 0.4 * segmentation_loss(aux_logits, label)
        scaler.scale(loss).backward()  # the scaler does something in fp16 only
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss_sum += loss.detach()
        step += 1

        validating = step % args.val_every == 0 or step == args.iters
        saving = step % args.save_every == 0 or validating
        if not (step % 10 == 0 or saving):
            continue
        if world > 1:
            dist.all_reduce(loss_sum)
        iterations = step - logged
        mean_loss = loss_sum.item() / iterations / world  # waits for the device
        seconds = time.perf_counter() - since
        if not math.isfinite(mean_loss):
            sys.exit(1 if rank > 0 else f"train.py: the loss of iterations {logged + 1} to {step} "
                     f"is {mean_loss}: start again with a lower --lr and another --out")
        history.append({"event": "train", "step": step, "lr": rate, "loss": mean_loss,
                        "images_per_second": iterations * args.batch_size / seconds,
                        "waiting": waited / seconds})
        print(json.dumps(history[-1]), file=log)
        bar.set_postfix_str("loss {loss:.3f}, lr {lr:.2g}, {images_per_second:.1f} images/s, "
                            "{waiting:.0%} waiting for data".format(**history[-1]), refresh=False)
        bar.update(iterations)
        if validating:
            scores = validate(net, val_set, device, args, out / f"val_{step:06}.png")
            history.append({"event": "validation", "step": step, **scores})
            print(json.dumps(history[-1]), file=log)
        if saving and rank == 0:
            checkpoint = {"state_dict": net.state_dict(), "model": net.arguments,
                          "classes": classes, "optimizer": optimizer.state_dict(),
                          "scaler": scaler.state_dict(), "step": step, "history": history,
                          "recipe": recipe}
            # best.pt first: a run that is killed before the other is there validates again.
            if validating and scores["miou"] == best_miou(history):  # history has this one too
                save_whole(checkpoint, out / "best.pt", out / "best.pt.tmp")
            save_whole(checkpoint, last, out / "last.pt.tmp")
        loss_sum.zero_()
        logged, since, waited = step, time.perf_counter(), 0.0

    bar.close()
    if rank == 0:
        print(f"best mIoU {100 * best_miou(history):.2f} %: {out}/best.pt")


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may not repeat itself
    torch.use_deterministic_algorithms(True, warn_only=True)  # so that runs repeat where they can
    torch.utils.deterministic.fill_uninitialized_memory = False  # takes time, and helps nobody here
    run(main)
