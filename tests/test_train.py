"""Training: the formulas, mmsegmentation's 20 steps, and the script as it runs, dies, fails and
goes on."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import MMSEG, run_differently, run_script, words_of
from fill import fill_state_dict, make_input, make_label
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from toy_cityscapes import draw_cityscapes

import train
from pspnet import FastPSPNet, PSPNet, load_net
from train import poly_lr, segmentation_loss

# The smallest run that has everything: a ResNet-18, 8 drawn scenes, 4 crops an iteration.
SMALL = "--backbone resnet18 --weights none --crop 40 64 --batch-size 4 --workers 0"
ITERATIONS = "--iters 6 --val-every 3 --save-every 1"


def read_checkpoint(path):
    return torch.load(path, weights_only=True)


# Formulas -----------------------------------------------------------------------------------------


def test_learning_rate_is_mmsegmentations_at_every_recorded_iteration():
    for step, rate in MMSEG["lr"].items():
        assert abs(poly_lr(step, 40_000) - rate) < 1e-12
    assert poly_lr(0, 1) == 0.01


def test_loss_is_the_sum_over_labelled_pixels_over_all_pixels():
    logits = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    label = torch.randint(0, 5, (2, 3, 4))
    label[0, 0], label[1, 2, 3] = 255, 255
    total = 0.0
    for b in range(2):
        for y in range(3):
            for x in range(4):
                if label[b, y, x] != 255:
                    exponentials = [math.exp(v) for v in logits[b, :, y, x].tolist()]
                    total -= math.log(exponentials[label[b, y, x]] / sum(exponentials))
    assert abs(segmentation_loss(logits, label).item() - total / 24) < 1e-12


def test_loss_of_void_is_zero_with_zero_gradient():
    logits = torch.randn(1, 5, 3, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 3, 4), 255))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


# Operations of the kinds that networks like this have, which the documentation of
# torch.use_deterministic_algorithms lists as nondeterministic on CUDA, by their names inside torch.
NONDETERMINISTIC = set(
    """_adaptive_avg_pool2d_backward upsample_bilinear2d_backward nll_loss2d_forward_summed
    reflection_pad2d_backward replication_pad2d_backward grid_sampler_2d_backward index_put
    index_put_ _index_put_impl_ put_ index_add index_add_ scatter_add scatter_add_ scatter_reduce
    cumsum histc bincount median""".split())


class Operations(TorchDispatchMode):
    """Notes the names of torch's operations, forward and backward, while it is entered."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        summed = name == "nll_loss2d_forward" and args[3] != 0  # args[3], the reduction: 0 is none
        self.names.add(f"{name}_summed" if summed else name)
        return operation(*args, **(kwargs or {}))


def test_no_operation_of_a_training_step_is_nondeterministic_on_cuda():
    images, label = torch.rand(2, 3, 40, 64), torch.randint(0, 19, (2, 40, 64))
    net = FastPSPNet(backbone="resnet18")
    with Operations() as step:
        logits, aux_logits = net(images)
        (segmentation_loss(logits, label) + segmentation_loss(aux_logits, label)).backward()
    assert "convolution_backward" in step.names
    assert not step.names & NONDETERMINISTIC
    # The usual way has three of them.
    with Operations() as step:
        logits, _ = PSPNet(backbone="resnet18")(images)
        torch.nn.functional.cross_entropy(logits, label).backward()
    assert len(step.names & NONDETERMINISTIC) == 3


@pytest.mark.usefixtures("all_cores")
def test_steps_of_sgd_equal_mmsegmentations():
    """Three of the 20 that are recorded, in float64: each loss depends on all updates before."""
    recorded = MMSEG["sgd20"]["r18b-d8", "float64"]
    net = FastPSPNet(backbone="resnet18")
    net.load_state_dict(fill_state_dict(net.state_dict()))
    net.double().train()
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0
    net.normalize = lambda images: images  # the recorded inputs are normalised already
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    for step, expected in enumerate(recorded["loss"][:3]):
        optimizer.param_groups[0]["lr"] = poly_lr(step, 80_000)
        logits, aux_logits = net(make_input((2, 3, 128, 256), f"step{step}").double())
        label = make_label(2, 128, 256, name=f"step{step}")
        loss = segmentation_loss(logits, label) + 0.4 * segmentation_loss(aux_logits, label)
        assert abs(loss.item() / expected - 1) < 1e-8, step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# The recipe ---------------------------------------------------------------------------------------


def test_defaults_are_the_reference_recipe(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    options = vars(train.parse_args(torch.device("cpu"), 1))
    recipe = {"backbone": "resnet50_v1c", "bins": [1, 2, 3, 6], "weights": "imagenet",
                      "init": None, "crop": [512, 1024], "batch_size": 8, "iters": 40_000,
                      "lr": 0.01, "seed": 0, "precision": "fp32", "compile": False,
                      "coarse": False}
    assert {name: options[name] for name in recipe} == recipe
    for has_bf16, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda has=has_bf16, **_: has)
        assert train.parse_args(torch.device("cuda"), 1).precision == precision


@pytest.mark.parametrize(("batch_size", "processes", "device", "enough"), [
    (1, 1, "cpu", 2), (4, 3, "cpu", 6), (3, 3, "cpu", 6), (6, 3, "cpu", None),
    (3, 3, "cuda", None), (4, 3, "cuda", 2), (1, 1, "cuda", 2), (2, 1, "cuda", None)])
def test_batches_that_processes_cannot_share_are_a_mistake(
        monkeypatch, capsys, batch_size, processes, device, enough):
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch-size", str(batch_size)])
    if enough is None:
        train.parse_args(torch.device(device), processes)
        return
    with pytest.raises(SystemExit):
        train.parse_args(torch.device(device), processes)
    words = f"a multiple of {processes}, the number of processes, and {enough} or more"
    assert words in capsys.readouterr().err


# The script ---------------------------------------------------------------------------------------


def start(toy, out, processes=1, restarts=0):
    """Start a run, or go on with it, and return it once it has written a checkpoint."""
    last = out / "last.pt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    command = f"train.py --data {toy} --out {out} {SMALL} {ITERATIONS} --resume"
    process = subprocess.Popen(
        words_of(command, processes, restarts), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    while not last.exists() or last.stat().st_mtime_ns == before:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


def kill(toy, out):
    """Start a run and end it by SIGKILL, in the middle of saving perhaps."""
    process = start(toy, out)
    process.kill()
    assert process.wait(timeout=600) == -signal.SIGKILL
    assert 1 <= read_checkpoint(out / "last.pt")["step"] < 6


def kill_one_of_two(toy, out):
    """Start a run of two processes under torchrun, which restarts it, and kill one of them."""
    process = start(toy, out, 2, restarts=1)
    children = [int(child) for path in Path(f"/proc/{process.pid}/task").glob("*/children")
                for child in path.read_text().split()]
    ranks = [pid for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors


@pytest.fixture(scope="module", autouse=True)
def runs(beside, toy, tmp_path_factory):
    """What runs beside the tests of this file, future by name; .folder has a folder for each.
    "one" and "two" are runs in one go, by as many processes."""
    folder = tmp_path_factory.mktemp("runs")
    root = draw_cityscapes(folder / "broken", {"train": 8, "val": 1}, (40, 64))
    stream = train.TrainingStream(train.Cityscapes(root, "train"))
    # Break an image that only process 1 reads: that of sample 5, which is in iteration 1.
    broken, _ = stream.dataset.paths(stream.index(5))
    broken.write_bytes(broken.read_bytes()[:200])
    command = f"train.py {SMALL} --workers 1 --data {{}} --out {folder}/{{}}"
    return SimpleNamespace(
        folder=folder, broken=broken,
        one=beside(run_script, command.format(toy, "one") + f" {ITERATIONS}"),
        killed=beside(kill, toy, folder / "killed"),
        two=beside(run_script, command.format(toy, "two") + f" {ITERATIONS}", 2),
        restarted=beside(kill_one_of_two, toy, folder / "restarted"),
        error=beside(run_script, command.format(root, "error"), 2),
        different=beside(run_differently, command.format(toy, "different"),
                         ["", "--lr 0.02 --seed 1"], folder))


@pytest.fixture
def reference(runs):
    """The folder of a run in one go."""
    assert runs.one.result().returncode == 0, runs.one.result().stderr
    return runs.folder / "one"


def comparable(value):
    """A checkpoint with a hash in place of each tensor."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    if torch.is_tensor(value):
        return value.dtype, hash(value.numpy().tobytes())
    return value


def events(out):
    """The lines of the log but for starts; of an iteration that stands there twice the later."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return list({(line["event"], line["step"]): line for line in lines
                 if line["event"] != "start"}.values())


def assert_same_run(out, reference):
    """Weights, momentum, everything else in last.pt and best.pt, and the log: identical, to the
    byte."""
    assert {json.dumps(event) for event in events(out)} == {
        json.dumps(event) for event in events(reference)}
    for name in ("last.pt", "best.pt"):
        ours, theirs = (comparable(read_checkpoint(folder / name)) for folder in (out, reference))
        assert ours == theirs, name


def test_a_run_leaves_checkpoints_log_pictures_and_a_table(
        toy, runs, reference, tmp_path, run_here):
    out, printed, errors = reference, runs.one.result().stdout, runs.one.result().stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "best.pt", "last.pt", "log.jsonl", "val_000003.png", "val_000006.png"]
    assert "1 x cpu, fp32: 8 images to train on, 5 to validate, iterations 0 to 6" in printed
    assert printed.count("of 19 classes") == 2 and f"Look at {out}/val_000006.png" in printed
    assert ", loss " in errors
    log = events(out)
    train_steps = [("train", step) for step in range(1, 7)]
    assert [(line["event"], line["step"]) for line in log] == [
        *train_steps[:3], ("validation", 3), *train_steps[3:], ("validation", 6)]
    assert [line["lr"] for line in log if line["event"] == "train"] == [
        poly_lr(step, 6) for step in range(6)]
    best = max(line["miou"] for line in log if line["event"] == "validation")
    assert read_checkpoint(out / "last.pt")["best"] == best
    run_here(f"evaluate.py --ckpt {out}/best.pt --data {toy} --workers 0 "
             f"--json {tmp_path}/scores.json")
    # The same function, the same network
    assert json.loads((tmp_path / "scores.json").read_text())["miou"] == best


def written_out(toy, iters, world):
    """Three of the steps that train.py should take: the losses, and after the last step the
    momenta and weights by name. (More amplify the rounding of float32, which differs from processor
    to processor.)"""
    torch.manual_seed(0)
    net = FastPSPNet(19, "resnet18").to(memory_format=torch.channels_last).train()
    weights, losses = dict(net.named_parameters()), []
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
    stream = train.TrainingStream(train.Cityscapes(toy, "train"), (40, 64), seed=0)
    for step in range(3):
        total = 0  # of the losses of all processes
        for rank in range(world):
            samples = [stream[4 * step + i] for i in range(rank, 4, world)]
            images, labels = (torch.stack(tensors) for tensors in zip(*samples, strict=True))
            torch.manual_seed(step * world + rank)  # the same dropout
            for logits, weight in zip(net(images), (1, 0.4), strict=True):
                right = labels.long().where(labels < 19, 0)[:, None]
                probability = logits.softmax(1).gather(1, right)[:, 0]
                total -= weight * probability.log()[labels < 19].sum() / labels.numel()
        losses.append(total.item() / world)
        gradients = torch.autograd.grad(total / world, weights.values())
        rate = 0.0001 + 0.0099 * (1 - step / (iters - 1)) ** 0.9
        with torch.no_grad():
            for (name, w), gradient in zip(weights.items(), gradients, strict=True):
                momenta[name].mul_(0.9).add_(gradient + 0.0005 * w)
                w.sub_(rate * momenta[name])
    return losses, momenta, weights


def test_the_script_takes_the_steps_of_the_recipe(toy, tmp_path, run_here):
    out = tmp_path / "run"
    run_here(f"train.py --data {toy} --out {out} {SMALL} --iters 3")
    _, momenta, weights = written_out(toy, 3, world=1)
    last = read_checkpoint(out / "last.pt")
    states = last["optimizer"]["state"].values()
    # Relative to all momenta: the gradient of a bias before a batch norm is 0 but for rounding.
    largest = torch.stack([m.norm() for m in momenta.values()]).norm()
    for (name, weight), state in zip(weights.items(), states, strict=True):
        assert (state["momentum_buffer"] - momenta[name]).norm() <= 1e-4 * largest, name
        assert (last["state_dict"][name] - weight).norm() <= 1e-6 * (largest + weight.norm()), name


def test_two_processes_take_the_steps_of_the_recipe_together(toy, runs):
    assert runs.two.result().returncode == 0, runs.two.result().stderr
    losses = [line["loss"] for line in events(runs.folder / "two") if line["event"] == "train"]
    assert losses[:3] == pytest.approx(written_out(toy, 6, world=2)[0], rel=1e-3)


def test_training_learns(toy, tmp_path, run_here):
    out = tmp_path / "run"
    run_here(f"train.py --data {toy} --out {out} {SMALL} --iters 16 --save-every 4")
    losses = {line["step"]: line["loss"] for line in events(out) if line["event"] == "train"}
    assert losses[12] + losses[16] < 0.95 * (losses[4] + losses[8])


@pytest.mark.parametrize("bins", ["", "1 2 4 8"])
def test_other_pyramids_are_trained_resumed_and_scored(toy, tmp_path, run_here, bins):
    command = f"train.py --data {toy} --out {tmp_path}/run {SMALL} --iters 1 --bins {bins}"
    run_here(command)
    run_here(f"{command} --resume")  # of a run that has ended
    net = load_net(tmp_path / "run/best.pt")
    assert net.arguments["bins"] == [int(k) for k in bins.split()]
    run_here(f"evaluate.py --ckpt {tmp_path}/run/best.pt --data {toy} --workers 0")


def test_a_run_that_is_killed_and_resumed_equals_one_in_one_go(toy, runs, reference, run_here):
    runs.killed.result()
    out = runs.folder / "killed"
    command = f"train.py --data {toy} --out {out} {SMALL} {ITERATIONS} --resume"
    run_here(command)
    assert_same_run(out, reference)


class Killed(BaseException):
    """Nobody catches it."""


def test_a_run_that_dies_between_the_first_best_and_last_checkpoint_equals_one_in_one_go(
        toy, tmp_path, run_here, monkeypatch):
    command = f"train.py --data {toy} --out {{}} {SMALL} --iters 4 --val-every 2 --save-every 2"
    run_here(command.format(tmp_path / "one"))

    def replace(source, target, replace=os.replace):
        if target.name == "last.pt":
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("os.replace", replace)
        run_here(command.format(tmp_path / "killed"))
    assert (tmp_path / "killed/best.pt").exists() and not (tmp_path / "killed/last.pt").exists()
    run_here(command.format(tmp_path / "killed") + " --resume")
    assert_same_run(tmp_path / "killed", tmp_path / "one")


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds processes as Linux does")
def test_torchrun_restarts_a_process_that_died_and_the_run_equals_one_in_one_go(runs):
    runs.restarted.result()
    assert runs.two.result().returncode == 0, runs.two.result().stderr
    assert_same_run(runs.folder / "restarted", runs.folder / "two")


def test_an_error_of_one_process_ends_all_of_them_and_names_the_file(runs):
    process = runs.error.result()
    assert process.returncode != 0  # it returns when no process holds its output any more
    told = [line for line in process.stderr.splitlines() if "train.py: " in line]
    assert any(f"cannot decode {runs.broken}" in line for line in told), process.stderr


def test_processes_that_were_given_different_options_refuse_to_train_together(runs):
    process = runs.different.result()
    assert process.returncode != 0
    assert "train.py: the processes differ in lr, seed: " in process.stderr
    assert not (runs.folder / "different").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_what_one_needs_to_know(
        toy, tmp_path, mistake):
    mistake(f"train.py --data {toy} --out {tmp_path}/run {SMALL} --iters 9 --lr 1e+30",
            "the loss is", "lower --lr")
    assert not (tmp_path / "run/last.pt").exists()


def test_weights_that_are_not_finite_are_never_saved(toy, tmp_path, mistake):
    """The losses of the first iterations are finite: the weights after them are not."""
    mistake(f"train.py --data {toy} --out {tmp_path}/run {SMALL} --iters 8 --save-every 1 --lr 1e5",
            "not finite", "lower --lr")
    for path in (tmp_path / "run").glob("*.pt"):
        assert all(v.isfinite().all() for v in read_checkpoint(path)["state_dict"].values())


def test_labels_that_are_all_void_are_told(tmp_path, run_here):
    root = draw_cityscapes(tmp_path / "data", {"train": 2, "val": 1}, (40, 64))
    for path in root.glob("gtFine/train/*/*.png"):
        Image.new("L", (64, 40)).save(path)
    process = run_here(f"train.py --data {root} --out {tmp_path}/run {SMALL} --iters 2")
    assert "the loss is 0: no pixel of these samples is labelled" in process.stderr


def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(
        toy, tmp_path, reference, mistake, monkeypatch):
    """os.fsync is where a disk that is full says so at the latest. Iteration 5 saves last.pt."""
    def fsync(_):
        raise OSError(28, "No space left")

    last = tmp_path / "last.pt"
    torch.save(read_checkpoint(reference / "last.pt") | {"step": 4}, last)
    content = last.read_bytes()
    monkeypatch.setattr("os.fsync", fsync)
    mistake(f"train.py --data {toy} --out {tmp_path} {SMALL} {ITERATIONS} --resume",
            "No space left")
    assert last.read_bytes() == content


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_coarse_labels_and_half_precision_train(tmp_path, run_here, precision):
    root = draw_cityscapes(tmp_path / "data", {"train": 4, "val": 1, "train_extra": 3}, (16, 32))
    command = (f"train.py --data {root} --out {tmp_path}/run {SMALL} --crop 16 16 --batch-size 2 "
               f"--coarse --precision {precision} --iters ")
    run_here(command + "4")
    last = read_checkpoint(tmp_path / "run/last.pt")
    assert last["recipe"]["images"] == 7 and last["best"] >= 0
    assert not {v.dtype for v in last["state_dict"].values()} & {torch.float16, torch.bfloat16}
    if precision == "fp16":
        last["scaler"]["scale"] = 8.0
        torch.save(last | {"step": 3, "best": 1.0}, tmp_path / "run/last.pt")
        best = (tmp_path / "run/best.pt").read_bytes()
        run_here(command + "4 --resume")
        # The scale of the gradients is the checkpoint's, and what is no better no new best.pt.
        assert read_checkpoint(tmp_path / "run/last.pt")["scaler"]["scale"] == 8.0
        assert (tmp_path / "run/best.pt").read_bytes() == best


def test_init_takes_all_weights_but_the_classifiers_of_other_classes(tmp_path, capsys):
    torch.manual_seed(0)
    names = [entry.name for entry in train.Cityscapes.classes]
    for num_classes, classes, same in ((19, names, True), (19, None, True), (7, None, False),
                                       (19, names[::-1], False)):
        other, net = PSPNet(num_classes, "resnet18"), PSPNet(19, "resnet18")
        own = {name: value.clone() for name, value in net.state_dict().items()}
        torch.save({"state_dict": other.state_dict(), "model": other.arguments,
                    "classes": classes}, tmp_path / "other.pt")
        args = train.argparse.Namespace(weights="none", init=tmp_path / "other.pt")
        train.load_first_weights(net, args, names)
        expected = other.state_dict()
        for name, value in net.state_dict().items():
            taken = same or ".conv_seg." not in name
            assert torch.equal(value, (expected if taken else own)[name]), name
        assert ("other classes" in capsys.readouterr().out) != same
    for net in (PSPNet(19, "resnet18_v1c"), PSPNet(19, "resnet18", [1, 2, 4, 8])):
        with pytest.raises(train.CheckpointError, match="resnet18.*'bins': .1, 2, 3, 6."):
            train.load_first_weights(net, args, names)


# Mistakes -----------------------------------------------------------------------------------------


def test_mistakes_end_with_one_sentence(toy, tmp_path, reference, mistake, monkeypatch):
    def wrong(arguments, *words, data=toy, out=tmp_path / "run"):
        mistake(f"train.py --data {data} --out {out} {SMALL} {arguments}", *words)
        assert not (tmp_path / "run").exists()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", Mock(side_effect=OSError("no network")))
    (tmp_path / "file").touch()
    wrong("", "no images", "--data", data=tmp_path / "nowhere")
    wrong("--iters 0", "--iters: 0 is not a number from 1 on")
    wrong("--bins 0", "--bins")
    wrong("--seed -1", "--seed")
    wrong(f"--seed {2**70} --weights {tmp_path}/none.pth", "No such file")  # large ones are fine
    wrong("--lr nan", "--lr")
    wrong("--backbone vgg", "--backbone", "vgg", "resnet50_v1c")
    wrong("--weights imagenet", "no network", "resnet18-f37072fd.pth", "--weights FILE")
    wrong(f"--weights {tmp_path}/none.pth", "No such file", "none.pth")
    wrong(f"--init {tmp_path}/none.pt", "No such file", "none.pt")
    wrong("", f"{tmp_path}/file", out=tmp_path / "file/run")
    wrong(ITERATIONS, "exists already", "--resume", "--out", out=reference)
    wrong(f"{ITERATIONS} --lr 0.02 --seed 1 --resume", "lr was 0.01 and is 0.02",
          "seed was 0 and is 1", out=reference)


def test_a_checkpoint_that_cannot_be_resumed_from_is_refused(toy, tmp_path, reference, mistake):
    last = tmp_path / "last.pt"
    command = f"train.py --data {toy} --out {tmp_path} {SMALL} {ITERATIONS} --resume"
    content = (reference / "last.pt").read_bytes()
    last.write_bytes(content[: len(content) // 2])
    mistake(command, f"{last} cannot be read")
    torch.save([1], last)
    mistake(command, f"{last} holds no dictionary of weights")
    whole = read_checkpoint(reference / "last.pt")
    torch.save({"state_dict": whole["state_dict"]}, last)
    mistake(command, f"the recipe of {last} was another", "backbone was None and is resnet18")
    whole["recipe"]["momentum"] = 0.95  # of a program that had this option
    torch.save(whole, last)
    mistake(command, "momentum was 0.95 and is None")
