"""Train PSPNet on Cityscapes.

    python train.py --data data/cityscapes                                    # a GPU, or the CPU
    torchrun --standalone --nproc_per_node=8 train.py --data data/cityscapes  # eight GPUs
    python train.py --data data/cityscapes --resume                           # go on after a stop

Each is the same experiment: 40,000 iterations of 8 images of 512x1024, with the recipe of
mmsegmentation 1.2.2's pspnet_r50-d8_4xb2-40k_cityscapes-512x1024 (77.85 mIoU on val), in bfloat16
on a GPU. README.md lists how that recipe differs from the paper's. The folder --out gets

    last.pt, best.pt    checkpoints: the latest, and that of the best mIoU on val
    log.jsonl           a line of JSON for each event: the recipe, 10 iterations, a validation
    val_NNNNNN.png      photographs, truth and prediction at each validation
"""
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from cityscapes import (NUM_CLASSES, VOID, Cityscapes, TrainingStream, colored, photograph,
                        save_sheet)
from evaluate import (Parser, UserError, default_workers, evaluate, format_scores, memory_format,
                      outlive_signals, run, scores_of)
from pspnet import BACKBONES, CheckpointError, PSPNet, load_backbone, load_net, read_checkpoint

REFERENCE = {  # mmsegmentation's recipe
    "backbone": "resnet50_v1c", "weights": "imagenet", "init": None, "crop": [512, 1024],
    "batch_size": 8, "iters": 40_000, "lr": 0.01, "precision": "fp32", "coarse": False,
    "images": 2975}
LOG_EVERY = 10  # iterations; only then, and to save, does the program itself wait for the device


def poly_lr(step, iters, base_lr=0.01):
    """The learning rate of iteration `step`, 0 to iters - 1: from base_lr down to base_lr / 100 in
    the last, with power 0.9 (the paper's section 5.1; mmengine 0.10.7, PolyLR)."""
    end_lr = base_lr / 100
    return end_lr + (base_lr - end_lr) * (1 - step / max(1, iters - 1)) ** 0.9


def segmentation_loss(logits, label):
    """Cross entropy: logits (B, C, H, W), label (B, H, W) of train ids, int64, 255 void -> scalar.

    The sum over the labelled pixels is divided by ALL pixels (mmsegmentation's avg_non_ignore=
    False): a crop that is all void gives 0, not 0/0, and the mean over processes is that over all.
    """
    return F.cross_entropy(logits, label, ignore_index=VOID, reduction="none").mean()


# ------------------------------------------------------------------------------------------------
# The command line


def parse_args(device):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/cityscapes", metavar="DIR",
        help="folder with leftImg8bit and gtFine (data/cityscapes)")
    add("--out", default="runs/pspnet", metavar="DIR", help="where results go (runs/pspnet)")
    add("--backbone", choices=BACKBONES, default="resnet50_v1c")
    add("--weights", default="imagenet", metavar="imagenet|none|FILE",
        help="what the backbone starts from (imagenet, which is downloaded)")
    add("--init", metavar="FILE",
        help="start from a whole PSPNet, ours or mmsegmentation's, instead of --weights")
    add("--crop", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"),
        help="size of the training samples in pixels (512 1024)")
    add("--batch-size", type=int, default=8, help="images an iteration, in all processes (8)")
    add("--iters", type=int, default=40_000, help="iterations (40000)")
    add("--lr", type=float, default=0.01, help="learning rate of the first iteration (0.01)")
    add("--seed", type=int, default=0, help="of samples, dropout and new weights (0)")
    add("--workers", type=int, default=default_workers(8),
        help="processes that make samples for each GPU (8, or its share of the cores)")
    add("--val-every", type=int, default=4000, help="iterations between validations (4000)")
    add("--save-every", type=int, default=1000, help="iterations between checkpoints (1000)")
    # GPUs before NVIDIA's Ampere can only imitate bf16.
    fast = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    add("--precision", choices=("fp32", "bf16"),
        default="bf16" if device.type != "cpu" and fast else "fp32",
        help="bf16 is autocast (bf16 on a GPU that has it, otherwise fp32)")
    add("--compile", action="store_true",
        help="torch.compile the network (with several GPUs SyncBatchNorm cuts it into pieces)")
    add("--cache", metavar="DIR", help="keep decoded images here (25 GB for Cityscapes)")
    add("--coarse", action="store_true", help="train on train_extra's coarse labels as well")
    add("--resume", action="store_true", help="go on from last.pt in --out")
    return parser.parse_args()


def check_args(args, device, world):
    """Raises UserError for options that are wrong whatever the data."""
    if min(*args.crop, args.batch_size, args.iters, args.val_every, args.save_every) < 1:
        raise UserError("--crop, --batch-size, --iters, --val-every, --save-every must be positive")
    if not args.lr > 0 or args.workers < 0 or not 0 <= args.seed < 2**23:
        raise UserError("--lr must be positive, --workers not negative, --seed 0 to 8388607")
    least = 1 if world > 1 and device.type != "cpu" else 2  # images in a process
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {world} processes: "
                        f"type --batch-size {max(-(-args.batch_size // world), least) * world}")
    if args.batch_size < least * world:
        raise UserError("batch norm needs two images in each process, because the pyramid's first "
                        f"level is one value per image: type --batch-size {2 * world}")


def print_recipe(args, recipe, device, world, val_images):
    """Say what is about to be trained, and in what it departs from the reference."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    departures = [f"{key} {recipe[key]} ({value})" for key, value in REFERENCE.items()
                  if recipe[key] != value]
    if world > 1 and device.type == "cpu":
        departures.append(f"batch norm over {args.batch_size // world} images, because "
                          f"SyncBatchNorm needs GPUs ({args.batch_size})")
    lines = {
        "network": f"PSPNet, {args.backbone}, {NUM_CLASSES} classes, weights: "
                   f"{args.init or args.weights}",
        "data": f"{recipe['images']} images to train on; {val_images} to validate on, every "
                f"{args.val_every} iterations",
        "samples": f"{args.crop[0]}x{args.crop[1]}, scale 0.5 to 2, no class over 75 %, mirrored, "
                   f"colors distorted, seed {args.seed}",
        "schedule": f"{args.iters} iterations of {args.batch_size} images; learning rate "
                    f"{args.lr:g} to {args.lr / 100:g}, poly 0.9",
        "optimizer": "SGD, momentum 0.9, weight decay 0.0005; auxiliary loss 0.4",
        "device": f"{world} x {name}, {args.precision}, {'compiled' if args.compile else 'eager'}, "
                  f"{'SyncBatchNorm' if world > 1 and device.type != 'cpu' else 'BatchNorm'}",
        "departs from the reference in": "; ".join(departures) or "nothing"}
    print(*(f"{key:10} {value}" for key, value in lines.items()), sep="\n", flush=True)


# ------------------------------------------------------------------------------------------------
# Checkpoints


class Stopped(UserError):
    """The run was told to stop: what it has saved, and how to go on."""

    exit_code = 128 + signal.SIGTERM  # as shells have it


def start_from(net, path):
    """Give `net` the weights of another PSPNet; without the classifiers if the classes differ."""
    other = load_net(path)
    if other.backbone_name != net.backbone_name:
        raise UserError(f"--init {path} has another backbone: type --backbone "
                        f"{other.backbone_name}")
    state = other.state_dict()
    if other.num_classes != net.num_classes:
        print(f"{path} knows {other.num_classes} classes, not {net.num_classes}: the two "
              "classifiers start at random")
        state |= {name: value for name, value in net.state_dict().items() if ".conv_seg." in name}
    net.load_state_dict(state)


def write_checkpoint(checkpoint, path):
    """Write `path` whole or not at all: at every moment it is the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns some OSErrors into RuntimeErrors
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} after iteration {checkpoint['step']} "
                        f"({str(error).splitlines()[0]}): free space and go on with --resume; "
                        f"{kept(path.with_name('last.pt'))}") from error


def kept(last):
    """What a run that has to end leaves behind: a clause for its last message."""
    if not last.exists():
        return "there is no checkpoint yet"
    return f"{last} holds iteration {read_checkpoint(last)['step']}"


def read_run(out, recipe):
    """The checkpoint out/last.pt. Raises UserError where it is damaged or of another recipe."""
    last, best = out / "last.pt", out / "best.pt"
    if not last.exists():
        advice = f"copy {best} there" if best.exists() else "leave --resume out, or change --out"
        raise UserError(f"there is no {last} to go on from: {advice}")
    try:
        checkpoint = read_checkpoint(last)
    except CheckpointError as error:
        advice = "there is no other checkpoint, start again"
        if best.exists():
            advice = (f"{best} holds iteration {read_checkpoint(best)['step']}: copy it to {last} "
                      "to go on from there")
        raise UserError(f"{error}; {advice}") from error
    if not isinstance(checkpoint, dict) or "recipe" not in checkpoint:
        raise UserError(f"{last} is not a checkpoint of train.py: --init takes weights of others")
    changed = [f"{name} was {value} and is {recipe[name]}"
               for name, value in checkpoint["recipe"].items() if value != recipe[name]]
    if changed:
        raise UserError(f"the recipe of {last} was another ({'; '.join(changed)}): resume with the "
                        "old one, or start again with another --out")
    return checkpoint


def open_log(path, step, validated):
    """Open the log to write on, without the lines that the checkpoint does not know of: those after
    iteration `step`, and of validations after iteration `validated`."""
    before = []
    lines = path.read_text().splitlines() if step > 0 and path.exists() else []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # the run was killed while it wrote
            break
        if event["step"] <= (validated if event["event"] == "validation" else step):
            before.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(before))
    os.replace(temporary, path)
    return open(path, "a")


# ------------------------------------------------------------------------------------------------
# Training


def agree(value):
    """The largest value that any process has. All of them must ask, and wait for each other."""
    value = torch.tensor(value)  # on the CPU: a GPU need not be waited for
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def main(device, rank, world):
    args = parse_args(device)
    check_args(args, device, world)
    out, last, best = Path(args.out), Path(args.out, "last.pt"), Path(args.out, "best.pt")
    # torchrun --max-restarts repeats the same command when a process has crashed.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    resume = args.resume or (restarted and last.exists())
    if (last.exists() or best.exists()) and not resume:
        raise UserError(f"{out} already holds a run: type --resume to go on with it, or --out for "
                        "another folder")
    train_set = Cityscapes(args.data, "train", args.cache)
    val_set = Cityscapes(args.data, "val")
    if args.coarse:
        train_set.files += Cityscapes(args.data, "train_extra").files
    settings = vars(args) | {"images": len(train_set)}
    recipe = {name: settings[name] for name in (*REFERENCE, "seed")}

    # `net` is the plain network, which is evaluated and saved; `model` is what trains it.
    torch.use_deterministic_algorithms(True, warn_only=True)  # so that runs repeat
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for that
    torch.utils.deterministic.fill_uninitialized_memory = False  # takes time, and helps nobody here
    torch.manual_seed(args.seed)
    net = PSPNet(NUM_CLASSES, args.backbone)
    if rank == 0 and not resume:  # DistributedDataParallel hands rank 0's weights to the others
        if args.init:
            start_from(net, args.init)
        elif args.weights != "none":
            load_backbone(net, args.weights)
    if world > 1 and device.type != "cpu":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(device, memory_format=memory_format(device))
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    step, losses = 0, []  # iterations done; the loss of each since the last line of the log
    validated, best_miou = 0, -1.0  # iteration of the latest validation; best mIoU so far
    if resume:
        checkpoint = read_run(out, recipe)
        net.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, validated, best_miou, losses = (
            checkpoint[name] for name in ("step", "validated", "best_miou", "losses"))
        del checkpoint
    model = torch.compile(net) if args.compile else net
    if world > 1:
        model = DistributedDataParallel(model, [device] if device.type != "cpu" else None)

    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            log = open_log(out / "log.jsonl", step, validated)
        except OSError as error:
            raise UserError(f"cannot write to {out} ({error.strerror}): give another --out"
                            ) from error
        print_recipe(args, recipe, device, world, len(val_set))

    # Iteration i = 0, 1, ... (messages and the log count from 1) has samples i * args.batch_size
    # and following, process r every world-th of them.
    stream = TrainingStream(train_set, args.crop, args.seed)
    samples = range(step * args.batch_size + rank, args.iters * args.batch_size, world)
    batches = iter(DataLoader(stream, args.batch_size // world, sampler=samples,
                              num_workers=args.workers, pin_memory=device.type != "cpu",
                              worker_init_fn=outlive_signals))

    def note(event, **values):
        if rank == 0:
            print(json.dumps({"event": event, "step": step, **values}), file=log, flush=True)

    def save(*names):
        if not all(value.isfinite().all() for value in net.state_dict().values()):
            raise UserError(f"the weights after iteration {step} are not finite: start again with "
                            f"a lower --lr and another --out; {kept(last)}")
        if rank == 0:
            checkpoint = {
                "state_dict": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                "validated": validated, "best_miou": best_miou, "losses": losses, "recipe": recipe}
            for name in names:
                write_checkpoint(checkpoint, out / name)
        agree(0)  # a barrier: nobody ends before it is written

    stop_signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop_signals.append(1))

    def stop():
        raise Stopped(f"stopped; {last} holds iteration {step}, the same command with --resume "
                      "goes on from there")

    recent = []  # losses that are still on the device

    def read_losses():
        """Move the losses of the latest iterations, the mean over all processes, to `losses`."""
        values = torch.stack(recent) / world  # waits for the device
        if world > 1:
            dist.all_reduce(values)
        for i, value in enumerate(values.tolist(), step - len(recent)):
            if not math.isfinite(value):
                raise UserError(
                    f"the loss of iteration {i + 1} is {value}, at learning rate "
                    f"{poly_lr(i, args.iters, args.lr):.2g} and with samples {i * args.batch_size} "
                    f"to {(i + 1) * args.batch_size - 1}: start again with a lower --lr "
                    f"and another --out; {kept(last)}")
            losses.append(value)
        recent.clear()

    def validate():
        nonlocal validated, best_miou
        if world > 1:  # without SyncBatchNorm each process has running statistics of its own
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)
        # To show: six images that are far apart. Process 0 has the multiples of `world`.
        rows, every = [], world * max(1, len(val_set) // (6 * world))

        def on_image(i, image, label, prediction):
            if stop_signals:
                stop()  # last.pt is from before this validation, which will be done again
            if i % every == 0 and len(rows) < 6:
                rows.append([photograph(image), colored(label), colored(prediction.cpu())])

        scores = scores_of(evaluate(net, val_set, device, on_image,
                                    precision=args.precision, workers=args.workers))
        net.train()
        better, validated = scores["miou"] > best_miou, step
        best_miou = max(best_miou, scores["miou"])
        note("validation", **scores)
        if rank == 0:
            save_sheet(out / f"val_{step:06}.png", rows)
            print(format_scores(scores) if step == args.iters else
                  f"iteration {step}: mIoU {100 * scores['miou']:.2f} %, pixel accuracy "
                  f"{100 * scores['pixel_accuracy']:.2f} %", flush=True)
        # best.pt first: if the run is killed between the two, the validation is done again.
        save(*(["best.pt"] if better else []), "last.pt")

    def validation_is_due():
        return step % args.val_every == 0 or step == args.iters

    if step == 0:
        note("recipe", **recipe)
    waiting, since, since_step = 0.0, time.perf_counter(), step  # for the speed
    with tqdm(total=args.iters, initial=step, unit="it", disable=rank > 0,
              mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        while True:
            if validation_is_due() and step > validated:  # not in step 0, and not twice
                before = time.perf_counter()
                bar.clear()
                validate()
                since += time.perf_counter() - before
            if step == args.iters:
                break

            before = time.perf_counter()
            image, label = next(batches)  # (B, 3, H, W), (B, H, W), uint8; B: of this process
            waiting += time.perf_counter() - before
            image = image.to(device, non_blocking=True)
            label = label.to(device, non_blocking=True).long()
            rate = optimizer.param_groups[0]["lr"] = poly_lr(step, args.iters, args.lr)
            # Dropout is a function of (seed, iteration, process) alone: 23, 28 and 12 bits.
            torch.manual_seed(args.seed * 2**40 + step * 2**12 + rank)

            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                logits, aux_logits = model(image)
                loss = segmentation_loss(logits, label) + 0.4 * segmentation_loss(aux_logits, label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recent.append(loss.detach())
            step += 1

            stopping = agree(len(stop_signals))
            logging = step % LOG_EVERY == 0 or step == args.iters
            # Before a validation too, so that a stop in it loses nothing.
            saving = step % args.save_every == 0 or validation_is_due() or stopping
            if logging or saving:
                read_losses()
            if logging:
                seconds = time.perf_counter() - since
                speed = (step - since_step) * args.batch_size / seconds
                mean_loss = sum(losses) / len(losses)
                note("train", lr=rate, loss=mean_loss, images_per_second=speed,
                     waiting=waiting / seconds)
                bar.set_postfix_str(f"loss {mean_loss:.3f}, lr {rate:.2g}, {speed:.1f} images/s, "
                                    f"{waiting / seconds:.0%} waiting for data", refresh=False)
                bar.update(step - bar.n)
                losses.clear()
                waiting, since, since_step = 0.0, time.perf_counter(), step
            if saving:
                save("last.pt")
            if stopping:
                stop()
    if rank == 0:
        print(f"the best mIoU, {100 * best_miou:.2f} %, is that of {out / 'best.pt'}")


if __name__ == "__main__":
    run(main, "lower --batch-size or --crop, or use more GPUs")
