"""Train PSPNet on Cityscapes.

    python train.py --data data/cityscapes                                    # a GPU, or the CPU
    torchrun --standalone --nproc_per_node=8 train.py --data data/cityscapes  # eight GPUs
    python train.py --data data/cityscapes --resume                           # go on after a stop

The recipe is the same with any number of GPUs: ResNet-50, levels 1, 2, 3 and 6, 40,000 iterations
of 8 crops of 512x1024, a learning rate from 0.01 to 0.0001, momentum 0.9, weight decay 0.0005. It
follows mmsegmentation 1.2.2, pspnet_r50-d8_4xb2-40k_cityscapes-512x1024, which reached 77.85 mIoU
on val. README.md lists what differs from that and from the paper. The folder --out gets

    last.pt, best.pt    checkpoints: the latest, and that of the best mIoU on val
    val_NNNNNN.png      photographs, truth and prediction at each validation
    log.jsonl           JSON: a line at the start, every 10 iterations, and at each of the above

A run may be killed at any moment. The same command with --resume goes on from last.pt, with the
same samples and the same dropout, as if it had not been killed. On a CPU the weights at the end are
then the same to the last bit. (That needs the same number of processes. After a kill log.jsonl has
some iterations twice. The later line counts.)
"""
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from cityscapes import VOID, TrainingStream
from evaluate import autocast, start_process
from pspnet import FastPSPNet


def poly_lr(iteration, iters, base_lr=0.01):
    """The learning rate of an iteration, 0 to iters - 1. It falls from base_lr to base_lr / 100,
    with power 0.9, as in mmengine 0.10.7, PolyLR. In the paper (section 5.1) it falls to 0."""
    end_lr = base_lr / 100
    progress = iteration / max(1, iters - 1)  # from 0 to 1. (max: for a run of one iteration)
    return end_lr + (base_lr - end_lr) * (1 - progress) ** 0.9


def segmentation_loss(logits, labels):
    """Cross entropy: logits (B, C, H, W), labels (B, H, W) of train ids, int64, 255 void -> scalar.

    By default cross_entropy divides the sum of the losses by the number of labeled pixels. Here it
    is divided by the number of all pixels, as in mmsegmentation (avg_non_ignore=False). So a batch
    without labels has loss 0, not 0/0. And all processes divide by the same number: the mean of
    their losses is the loss of the whole batch."""
    return F.cross_entropy(logits, labels, ignore_index=VOID, reduction="none").mean()


def training_step(model, images, labels, optimizer, scaler, precision="fp32"):
    """One step of SGD: images (B, 3, H, W), uint8, and labels (B, H, W), int64 -> the loss, a
    scalar. `precision` is explained at autocast.

    `scaler` does something in "fp16" only. There small gradients would become 0. So it multiplies
    the loss by a large factor, and divides the gradients by it before the step. If a gradient is
    infinite, it skips the step, and takes a smaller factor from then on."""
    with autocast(images.device, precision):
        logits, aux_logits = model(images)
        loss = segmentation_loss(logits, labels)
        loss = loss + 0.4 * segmentation_loss(aux_logits, labels)  # 0.4: section 5.1
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()  # the factor
    return loss.detach()


def main(argv=None):
    # `device` is the GPU or CPU of this process, `rank` its number, `world` how many there are.
    device, rank, world = start_process()
    # The options. (On a GPU half precision is the default. So the device must be known before.)
    # parse_args and data_sets, and the class Run, stand below the lesson.
    args = parse_args(device, world, argv)
    train_set, val_set = data_sets(args)

    # FastPSPNet computes what PSPNet computes, only faster.
    torch.manual_seed(args.seed)
    net = FastPSPNet(len(val_set.classes), args.backbone, args.bins)
    if world > 1 and device.type != "cpu":  # batch norm over the images of all processes
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    # channels_last is faster: all channels of a position lie side by side in memory.
    net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    # A Run knows what is written to the folder --out, and how. load_or_resume gives the backbone
    # its weights of ImageNet, or with --resume everything that the latest checkpoint holds. `start`
    # is how many iterations are finished already.
    run = Run(args, net, optimizer, scaler, train_set, val_set, device)
    start = run.load_or_resume()

    # `model` is what a training step calls: `net`, or with several processes a wrapper around it.
    # What is evaluated and saved is `net` itself.
    model = net
    if world > 1:
        # All processes begin with the weights of process 0. In each backward the gradients are
        # averaged over the processes, so that all take the same step.
        model = DistributedDataParallel(net)

    # Iteration i uses samples i * batch_size to (i + 1) * batch_size - 1, dealt out like cards. Of
    # two processes, with 8 a batch, process 0 gets 24, 26, 28 and 30 in iteration 3.
    stream = TrainingStream(train_set, args.crop, args.seed)
    samples = range(start * args.batch_size + rank, args.iters * args.batch_size, world)
    loader = DataLoader(stream, args.batch_size // world, sampler=samples,
                        num_workers=args.workers, pin_memory=device.type != "cpu")
    bar = tqdm(range(start, args.iters), initial=start, total=args.iters, disable=rank > 0)

    net.train()
    for iteration, (images, labels) in zip(bar, loader, strict=True):  # `bar` also draws progress.
        lr = poly_lr(iteration, args.iters, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Dropout is random. Each seed, iteration and process has a different number here. A
        # resumed run has the same numbers again.
        torch.manual_seed((args.seed * args.iters + iteration) * world + rank)

        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True).long()  # cross_entropy needs int64
        loss = training_step(model, images, labels, optimizer, scaler, args.precision)
        run.losses.append(loss)  # a tensor: to read its value we would have to wait for the GPU

        step = iteration + 1  # how many iterations are finished
        validating = step % args.val_every == 0 or step == args.iters
        saving = validating or step % args.save_every == 0
        if saving or step % 10 == 0:
            # Their mean goes to the log. If it is not finite, the run ends here, unsaved.
            run.log_losses(step, lr, bar)
        if validating:
            run.validate(step)  # scores net on val, and saves best.pt if it is the best so far
            net.train()  # validate has left it in eval mode
        if saving:
            run.save(step, "last.pt")  # weights, momentum, scaler, step, best mIoU, recipe


# Here the lesson ends. What follows are the options, the data sets, and what a run writes. --------
import argparse
import json
import os
import sys
import time
from functools import partial
from io import BytesIO
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import ConcatDataset

from cityscapes import Cityscapes  # For data of your own: from FILE import CLASS as Cityscapes
from cityscapes import (DataError, TensorPairs, at_least, check_classes, colored, read_pair,
                        save_sheet, to_picture)
from evaluate import (compare_processes, end_process, evaluate, format_scores, predict,
                      rank_and_world, scores_of, share_of_cores, warn_of_one_class)
from pspnet import BACKBONES, CheckpointError, load_backbone, load_net, read_weights


def parse_args(device, world, argv):
    """On several machines, which all see --data and --out, type on each of them (as one line)

    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400
        --rdzv_id=1 train.py

    torchrun can start a run again after a failure (the first word gives each attempt a port):

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc_per_node=8
        --max-restarts=3 train.py --resume

    The mIoU of a validation is that in --precision. evaluate.py computes in fp32 unless it is told.
    """
    parser = argparse.ArgumentParser(description=__doc__, epilog=parse_args.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/cityscapes", help="where leftImg8bit and gtFine are (%(default)s)")
    add("--out", default="runs/pspnet", help="results; all machines must see it (%(default)s)")
    add("--backbone", choices=BACKBONES, default="resnet50_v1c")
    add("--bins", type=at_least(1), nargs="*", default=[1, 2, 3, 6], metavar="K",
        help="levels of the pyramid; no number: no pyramid (1 2 3 6)")
    add("--weights", default="imagenet", metavar="imagenet|none|FILE", help="of the backbone")
    add("--init", metavar="FILE", help="start from a whole PSPNet, ours or mmsegmentation's")
    add("--crop", type=at_least(1), nargs=2, default=[512, 1024], metavar=("H", "W"), help="pixels")
    add("--batch-size", type=at_least(1), default=8, help="images in all processes together (8)")
    add("--iters", type=at_least(1), default=40_000, help="iterations (40000)")
    add("--lr", type=at_least(0, float), default=0.01, help="the first learning rate (0.01)")
    add("--seed", type=at_least(0), default=0, help="of samples, dropout and new weights (0)")
    add("--workers", type=at_least(0), default=share_of_cores(16), help="loaders (%(default)s)")
    add("--val-every", type=at_least(1), default=4000, help="iterations between validations (4000)")
    add("--save-every", type=at_least(1), default=500, help="iterations between checkpoints (500)")
    precision = "fp32"
    if device.type == "cuda":  # 8 crops in fp32 would need 20 GB
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    add("--precision", choices=("fp32", "bf16", "fp16"), default=precision,
        help="fp16 and bf16 are autocast (on a GPU bf16, fp16 where that is only emulated)")
    add("--coarse", action="store_true", help="train on train_extra's coarse labels as well")
    add("--resume", action="store_true", help="go on from last.pt in --out, or start without one")
    args = parser.parse_args(argv)
    # In the level k = 1 each image gives one value per channel. Batch norm needs at least two. On
    # GPUs SyncBatchNorm counts the images of all processes. On CPUs each process is on its own.
    least = (2 if 1 in args.bins else 1) * (world if device.type == "cpu" else 1)
    if args.batch_size % world or args.batch_size < least:
        parser.error(f"--batch-size must be {least} or more, and a multiple of {world} (processes)")
    return args


def data_sets(args):
    """The data sets to train on and to validate on."""
    train_set, val_set = Cityscapes(args.data, "train"), Cityscapes(args.data, "val")
    if args.coarse:
        train_set = ConcatDataset([train_set, Cityscapes(args.data, "train_extra")])
        train_set.classes = val_set.classes
    check_classes(val_set.classes)
    for split, dataset in (("train", train_set), ("val", val_set)):
        if len(dataset) == 0:
            raise DataError(f"the data set has no images in {split}")
        labels = [read_pair(dataset, i)[1] for i in six_of(dataset)]
        counts = sum(torch.tensor(label.histogram()) for label in labels)
        warn_of_one_class(counts[:VOID], f"six images of {split}")
    return train_set, val_set


def six_of(dataset):
    """The numbers of six images (or of all, if there are fewer) from all over a data set."""
    return sorted({i * len(dataset) // 6 for i in range(6)})


def load_first_weights(net, args, class_names):
    """Give `net` the weights that --init or --weights names. If --init knows other classes, the two
    classifiers, main and auxiliary, stay new. Raises CheckpointError for another network."""
    if args.init:
        other = load_net(args.init)
        theirs, ours = other.arguments, net.arguments
        if (theirs["backbone"], theirs["bins"]) != (ours["backbone"], ours["bins"]):
            raise CheckpointError(f"--init {args.init} is another network: {theirs}")
        weights, own_weights = other.state_dict(), net.state_dict()
        same_number = theirs["num_classes"] == ours["num_classes"]
        if not same_number or other.class_names not in (None, class_names):
            print(f"{args.init} knows other classes: the two classifiers start at random")
            weights.update({key: own_weights[key] for key in weights if ".conv_seg." in key})
        net.load_state_dict(weights)
    elif args.weights != "none":
        load_backbone(net, args.weights)


class Run:
    """A training and its folder --out: where it starts, and what it writes after which step."""

    def __init__(self, args, net, optimizer, scaler, train_set, val_set, device):
        self.args, self.net, self.optimizer, self.scaler = args, net, optimizer, scaler
        self.val_set, self.device, self.out = val_set, device, Path(args.out)
        self.rank, self.world = rank_and_world()
        self.class_names = check_classes(val_set.classes)
        # The recipe: the options that influence the weights. --resume refuses another recipe. (The
        # number of processes may change. It influences dropout, and on CPUs batch norm.)
        self.recipe = {**vars(args), "images": len(train_set), "classes": self.class_names}
        for name in ("data", "out", "workers", "val_every", "save_every", "resume"):
            del self.recipe[name]
        self.best_miou = -1.0
        self.losses = []  # of the iterations that are not logged yet

    def load_or_resume(self):
        """Load first weights or a checkpoint. Returns how many iterations are finished. Raises
        DataError where --out exists already, or where processes got different options."""
        step = 0
        saved = [path for path in (self.out / "last.pt", self.out / "best.pt") if path.exists()]
        if self.args.resume and saved:  # best.pt is a whole checkpoint, too
            step = self.restore(saved[0])
        elif self.rank == 0:  # the others get them from DistributedDataParallel
            load_first_weights(self.net, self.args, self.class_names)
        compare_processes(step=step, **self.recipe)
        if self.rank == 0:
            try:  # as late as here, so that no mistake above leaves an empty folder
                self.out.mkdir(parents=True, exist_ok=self.args.resume)
            except FileExistsError as error:  # also if another process has just made it
                raise DataError(f"{self.out} exists already: type --resume to go on with it, or "
                                "another --out") from error
            print(f"{self.world} x {self.device.type}, {self.args.precision}: "
                  f"{self.recipe['images']} images to train on, {len(self.val_set)} to validate, "
                  f"iterations {step} to {self.args.iters}", flush=True)
            self.log("start", step, processes=self.world, device=str(self.device), **self.recipe)
        self.clock = time.perf_counter()  # The log's `seconds` are counted from here.
        return step

    def restore(self, path):
        """Load a checkpoint, and return how many iterations it has finished. Raises CheckpointError
        where it is of another recipe."""
        weights, checkpoint = read_weights(path)
        before = checkpoint.get("recipe") or {}
        changed = [f"{name} was {before.get(name)} and is {self.recipe.get(name)}"
                   for name in sorted({*before, *self.recipe})
                   if before.get(name) != self.recipe.get(name)]
        if changed:
            raise CheckpointError(f"the recipe of {path} was another ({'; '.join(changed)}): "
                                  "resume with the old one, or start again with another --out")
        self.net.load_state_dict(weights)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.best_miou = checkpoint["best"]
        return checkpoint["step"]

    def log_losses(self, step, lr, bar):
        """The mean of the losses since the last time, over all processes. Raises FloatingPointError
        where it is not finite."""
        loss = torch.stack(self.losses).mean()
        if self.world > 1:
            dist.all_reduce(loss)  # the sum over all processes
        mean_loss = loss.item() / self.world  # waits for the GPU
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {mean_loss}: start again with a lower --lr")
        seconds = (time.perf_counter() - self.clock) / len(self.losses)  # of an iteration
        bar.set_postfix_str(f"loss {mean_loss:.3f}, lr {lr:.2g}", refresh=False)
        self.log("train", step, lr=lr, loss=mean_loss, seconds=round(seconds, 3))
        self.losses, self.clock = [], time.perf_counter()

    def validate(self, step):
        """Every process must call this. Process 0 prints the table, draws some predictions, and
        saves best.pt."""
        if self.world > 1:
            # Without SyncBatchNorm, on CPUs, the running means and variances of batch norm differ
            # from process to process. Those of process 0 count.
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)
        predict_image = partial(predict, precision=self.args.precision)
        matrix = evaluate(self.net, self.val_set, self.device, predict_image, self.args.workers)
        scores = scores_of(matrix, self.val_set.classes)
        if self.rank == 0:
            pictures, classes = [], self.val_set.classes  # photographs, truth and prediction
            for i in six_of(self.val_set):
                image, label = TensorPairs(self.val_set)[i]
                prediction = predict_image(self.net, image.to(self.device)).cpu()
                pictures.append(to_picture(image))
                pictures += [colored(train_ids, classes) for train_ids in (label, prediction)]
            save_sheet(self.out / f"val_{step:06}.png", pictures, 3, classes)
            print(f"\n{format_scores(scores)}\nPredictions in {self.args.precision}: "
                  f"{self.out}/val_{step:06}.png", flush=True)
            gib = torch.cuda.max_memory_allocated() / 2**30  # the most so far; 0 on a CPU
            self.log("validation", step, gib=round(gib, 2), **scores)
            labeled = matrix.sum(dim=1)  # the number of pixels of each class
            warn_of_one_class(labeled, "val")
            if (labeled > 0).sum() > 1 and scores["miou"] > self.best_miou:
                self.best_miou = scores["miou"]
                # best.pt is written before last.pt. If the run is killed between the two, last.pt
                # is older than this validation. Then a resumed run repeats it.
                self.save(step, "best.pt")

    def save(self, step, name):
        """Process 0 writes a checkpoint, from which --resume can go on. At every moment the file is
        the old one or the new one, never a part. Raises FloatingPointError where weights are not
        finite: the old file is worth more."""
        if self.rank > 0:
            return
        weights = self.net.state_dict()
        if not all(value.isfinite().all() for value in weights.values()):
            raise FloatingPointError("weights are not finite, and not saved: try a lower --lr")
        checkpoint = {"state_dict": weights, "model": self.net.arguments,
                      "classes": self.class_names, "optimizer": self.optimizer.state_dict(),
                      "scaler": self.scaler.state_dict(), "step": step, "best": self.best_miou,
                      "recipe": self.recipe}
        # Into a file torch.save would raise RuntimeError, not OSError, when the disk is full.
        content = BytesIO()
        torch.save(checkpoint, content)
        temporary = self.out / f"{name}.tmp"
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # to the disk, before it gets its name
        os.replace(temporary, self.out / name)
        self.clock = time.perf_counter()  # Validating and saving are not part of an iteration.

    def log(self, event, step, **values):
        """Append a line of JSON to log.jsonl."""
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as file:
                print(json.dumps({"event": event, "step": step, **values}), file=file)


if __name__ == "__main__":
    # Only operations that give the same result each time. (On a GPU PyTorch has others that are
    # faster. It warns where it has no such operation.)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for that
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # takes time and helps nobody here
    try:
        main()
        end_process()
    except (OSError, DataError, CheckpointError, FloatingPointError) as error:
        # A worker's error has its traceback before the sentence.
        sys.exit(f"train.py: {(str(error).strip() or repr(error)).splitlines()[-1]}")
