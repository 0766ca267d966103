"""Training: formulas, mmsegmentation's steps, the script as it runs, dies, fails and goes on."""
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import MMSEG, run_differently, words_of
from fill import fill_state_dict, make_input, make_label
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from toy_cityscapes import draw_cityscapes

import train
from pspnet import FastPSPNet, PSPNet
from train import poly_lr, segmentation_loss

# The smallest run that has everything: a ResNet-18, 8 drawn scenes, 4 crops an iteration.
SMALL = "--backbone resnet18 --weights none --crop 40 64 --batch-size 4 --workers 0"
STEPS = "--iters 3 --val-every 1"


def test_learning_rate_is_mmsegmentations_at_every_recorded_iteration():
    for step, rate in MMSEG["lr"].items():
        assert abs(poly_lr(step, 40_000) - rate) < 1e-12
    assert poly_lr(0, 1) == 0.01


def test_loss_is_the_sum_over_labelled_pixels_over_all_pixels():
    logits = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    label = torch.randint(0, 5, (2, 3, 4))
    label[0, 0] = label[1, 2, 3] = 255
    total = 0.0
    for b, y, x in (label != 255).nonzero().tolist():
        total -= logits[b, :, y, x].log_softmax(0)[label[b, y, x]]
    assert abs(segmentation_loss(logits, label) - total / 24) < 1e-12


def test_loss_of_void_is_zero_with_zero_gradient_and_told(capsys):
    logits = torch.randn(1, 5, 3, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 3, 4), 255))
    loss.backward()
    assert train.mean_over_processes(loss) == 0 and not logits.grad.any()
    assert "the loss is 0: no pixel of these samples is labelled" in capsys.readouterr().err


# What a network like this might use of the operations that are nondeterministic on CUDA, by the
# documentation of torch.use_deterministic_algorithms; the names are those inside torch.
NONDETERMINISTIC = set(
    """_adaptive_avg_pool2d_backward upsample_bilinear2d_backward nll_loss2d_forward_summed
    grid_sampler_2d_backward index_put_ _index_put_impl_ index_add_ scatter_add cumsum""".split())


class Operations(TorchDispatchMode):
    """Notes the names of torch's operations, forward and backward, while it is entered."""

    names = frozenset()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name == "nll_loss2d_forward" and args[3] != 0:  # the reduction, of which 0 is none
            name += "_summed"
        self.names |= {name}
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "loss", "count"), [
    (FastPSPNet, segmentation_loss, 0), (PSPNet, F.cross_entropy, 3)])
def test_a_training_step_has_no_nondeterministic_operation_the_usual_way_three(kind, loss, count):
    images = torch.rand(2, 3, 16, 24)
    label = torch.randint(0, 19, (2, 16, 24))
    with Operations() as step:
        sum(loss(logits, label) for logits in kind(backbone="resnet18")(images)).backward()
    assert len(step.names & NONDETERMINISTIC) == count


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


def test_defaults_are_the_reference_recipe(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    options = vars(train.parse_args(torch.device("cpu"), 1))
    recipe = {"backbone": "resnet50_v1c", "bins": [1, 2, 3, 6], "weights": "imagenet", "init": None,
              "crop": [512, 1024], "batch_size": 8, "iters": 40_000, "lr": 0.01, "seed": 0,
              "precision": "fp32", "compile": False, "coarse": False}
    assert {name: options[name] for name in recipe} == recipe
    for has_bf16, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", Mock(return_value=has_bf16))
        assert train.parse_args(torch.device("cuda"), 8).precision == precision  # on eight GPUs


@pytest.mark.parametrize(("batch_size", "processes", "device", "least"), [
    (4, 3, "cpu", 6), (1, 1, "cuda", 2)])
def test_batches_that_processes_cannot_share_are_a_mistake(
        monkeypatch, capsys, batch_size, processes, device, least):
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch-size", str(batch_size)])
    with pytest.raises(SystemExit):
        train.parse_args(torch.device(device), processes)
    words = f"must be {least} or more, and a multiple of {processes} (processes)"
    assert words in capsys.readouterr().err


def run(toy, out, processes, killed=False):
    """Run the script; if `killed` until it has saved, then SIGKILL it, or one of two processes."""
    command = f"train.py --data {toy} --out {out} {SMALL} {STEPS} --resume"
    process = Popen(words_of(command, processes, restarts=int(killed)), text=True, stdout=PIPE,
                    stderr=PIPE, env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    if killed:
        while not (out / "last.pt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [pid for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(process.pid if processes == 1 else int(ranks[-1]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == (-signal.SIGKILL if killed and processes == 1 else 0), stderr
    return SimpleNamespace(out=out, stdout=stdout, stderr=stderr)


@pytest.fixture(scope="module", autouse=True)
def runs(beside, toy, tmp_path_factory):
    """Futures of what runs beside these tests; .whole and .killed by the number of processes."""
    folder = tmp_path_factory.mktemp("runs")
    broken = draw_cityscapes(folder / "broken", {"train": 8, "val": 1}, (40, 64))
    for path in broken.glob("leftImg8bit/train/*/*"):
        path.write_bytes(path.read_bytes()[:200])
    command = f"train.py {SMALL} {STEPS} --workers 1 --data {toy} --out {folder}/run"
    return SimpleNamespace(
        whole={n: beside(run, toy, folder / f"whole{n}", n) for n in (1, 2)},
        killed={n: beside(run, toy, folder / f"killed{n}", n, killed=True) for n in (1, 2)},
        different=beside(run_differently, command, ["", "--lr 0.02 --seed 1"], folder),
        error=beside(run_differently, command, [f"--out {broken}/run", f"--data {broken}"], broken))


@pytest.fixture
def reference(runs):
    """The folder of a run in one go, by one process."""
    return runs.whole[1].result().out


@pytest.fixture
def small(toy, tmp_path):
    return f"train.py --data {toy} --out {tmp_path}/run {SMALL}"


def events(out):
    """The lines of the log by event and step, but for starts; of two of one step the later."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return {(line["event"], line["step"]): line for line in lines if line["event"] != "start"}


def contents(out):
    """The log, and all that is in last.pt and best.pt, with a hash in place of each tensor."""
    saved = [torch.load(out / "last.pt"), torch.load(out / "best.pt")]
    return events(out), tree_map_only(torch.Tensor, lambda t: hash(t.numpy().tobytes()), saved)


def test_a_run_leaves_checkpoints_log_pictures_and_a_table(runs, toy, tmp_path, run_here):
    one = runs.whole[1].result()
    assert sorted(path.name for path in one.out.iterdir()) == [
        "best.pt", "last.pt", "log.jsonl", "val_000001.png", "val_000002.png", "val_000003.png"]
    assert "1 x cpu, fp32: 8 images to train on, 5 to validate, iterations 0 to 3" in one.stdout
    assert one.stdout.count("of 19 classes") == 3
    assert f"Look at {one.out}/val_000003.png" in one.stdout
    log = events(one.out)
    best = max(log["validation", step]["miou"] for step in (1, 2, 3))
    assert torch.load(one.out / "last.pt")["best"] == best
    scores = tmp_path / "scores.json"
    run_here(f"evaluate.py --ckpt {one.out}/best.pt --data {toy} --workers 0 --json {scores}")
    assert json.loads(scores.read_text())["miou"] == best


@pytest.mark.parametrize(("processes", "tolerance"), [(1, 1e-4), (2, 1e-2)])
def test_the_script_takes_the_steps_of_the_recipe(toy, runs, processes, tolerance):
    """Three, written out: more would amplify rounding, which differs from processor to processor.
    So does the batch norm of the 1x1 level where a process has but two images."""
    out = runs.whole[processes].result().out
    torch.manual_seed(0)
    net = FastPSPNet(19, "resnet18").to(memory_format=torch.channels_last).train()
    weights = dict(net.named_parameters())
    momenta = [torch.zeros_like(w) for w in weights.values()]
    stream = train.TrainingStream(train.Cityscapes(toy, "train"), (40, 64), seed=0)
    for step in range(3):
        loss = 0  # the mean over the processes
        for rank in range(processes):
            samples = [stream[4 * step + i] for i in range(rank, 4, processes)]
            images, labels = (torch.stack(tensors) for tensors in zip(*samples, strict=True))
            torch.manual_seed(step * processes + rank)  # the same dropout
            for logits, factor in zip(net(images), (1, 0.4), strict=True):
                total = F.cross_entropy(logits, labels.long(), ignore_index=255, reduction="sum")
                loss += factor * total / labels.numel() / processes
        assert loss.item() == pytest.approx(events(out)["train", step + 1]["loss"], rel=1e-3)
        gradients = torch.autograd.grad(loss, weights.values())
        rate = 0.0001 + 0.0099 * (1 - step / 2) ** 0.9
        with torch.no_grad():
            for w, momentum, gradient in zip(weights.values(), momenta, gradients, strict=True):
                momentum.mul_(0.9).add_(gradient + 0.0005 * w)
                w.sub_(rate * momentum)

    last = torch.load(out / "last.pt")
    states = last["optimizer"]["state"].values()
    # Relative to the largest: the gradient of a bias before a batch norm is 0 but for rounding.
    largest = max(momentum.norm() for momentum in momenta)
    for (name, w), momentum, state in zip(weights.items(), momenta, states, strict=True):
        assert (state["momentum_buffer"] - momentum).norm() <= tolerance * largest, name
        assert (last["state_dict"][name] - w).norm() <= tolerance / 100 * (largest + w.norm()), name


def test_training_learns_and_logs_and_validates_as_often_as_told(tmp_path, small, run_here):
    run_here(f"{small} --iters 12 --lr 0.02 --val-every 8 --save-every 4")
    log = events(tmp_path / "run")
    assert [step for event, step in log if event == "train"] == [4, 8, 10, 12]
    assert [step for event, step in log if event == "validation"] == [8, 12]
    assert log["train", 12]["loss"] < 0.95 * log["train", 4]["loss"]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds processes as Linux does")
def test_a_run_that_is_killed_and_goes_on_equals_one_in_one_go(runs, small, run_here, processes):
    """Of one process, it is resumed here; of two, torchrun has restarted it, and it has ended."""
    out = runs.killed[processes].result().out
    run_here(f"{small} {STEPS} --out {out} --resume")
    assert contents(out) == contents(runs.whole[processes].result().out)


@pytest.mark.parametrize("room", [1, 2])
def test_a_disk_that_gets_full_leaves_the_old_checkpoints_and_the_resumed_run_equals_one_in_one_go(
        small, tmp_path, reference, run_here, mistake, monkeypatch, room):
    """After one, best.pt, there is no last.pt yet. os.fsync tells of a full disk at the latest."""
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", Mock(side_effect=[None] * room + [OSError("No space left")]))
        mistake(f"{small} {STEPS}", "No space left")
    assert [torch.load(path)["step"] for path in tmp_path.glob("run/*.pt")] == [1] * room
    run_here(f"{small} {STEPS} --resume")
    assert contents(tmp_path / "run") == contents(reference)


def test_an_error_of_one_process_ends_all_of_them_and_names_the_file(runs):
    process = runs.error.result()  # It comes when no process holds the output any more.
    assert process.returncode != 0
    assert re.search("train.py: .*cannot decode .*/broken/leftImg8bit/train/", process.stderr)


def test_processes_that_were_given_different_options_refuse_to_train_together(runs):
    process = runs.different.result()
    assert process.returncode != 0
    assert "train.py: the processes differ in lr, seed: " in process.stderr


@pytest.mark.parametrize(("options", "words"), [
    ("--iters 4 --lr 1e+30", "the loss is nan"),
    ("--iters 8 --lr 1e5 --save-every 1", "weights are not finite")])  # losses still are
def test_a_run_that_diverges_says_what_to_do_and_saves_only_finite_weights(
        small, tmp_path, mistake, options, words):
    mistake(f"{small} {options}", words, "lower --lr")
    for path in tmp_path.glob("run/*.pt"):
        weights = torch.load(path)["state_dict"].values()
        assert all(value.isfinite().all() for value in weights)


@pytest.mark.parametrize(("precision", "scale", "bins"), [
    ("bf16", None, []), ("fp16", 8.0, [1, 2, 4, 8])])
def test_coarse_labels_half_precision_and_other_pyramids_are_trained_resumed_and_scored(
        small, tmp_path, run_here, precision, scale, bins):
    root = draw_cityscapes(tmp_path / "data", {"train": 4, "val": 1, "train_extra": 3}, (16, 32))
    command = (f"{small} --data {root} --crop 16 16 --batch-size 2 --iters 2 --coarse "
               f"--precision {precision} --bins {' '.join(map(str, bins))}")
    run_here(command)
    best, last = tmp_path / "run/best.pt", tmp_path / "run/last.pt"
    content, checkpoint = best.read_bytes(), torch.load(last)
    assert checkpoint["recipe"]["images"] == 7 and checkpoint["model"]["bins"] == bins
    checkpoint["scaler"]["scale"] = 8.0
    torch.save(checkpoint | {"step": 1, "best": 1.0}, last)
    run_here(f"{command} --resume")
    # The scale of the gradients is the checkpoint's, and what is no better no new best.pt.
    assert torch.load(last)["scaler"].get("scale") == scale
    assert best.read_bytes() == content
    run_here(f"evaluate.py --ckpt {best} --data {root} --workers 0")


def test_init_takes_all_weights_but_the_classifiers_of_other_classes(tmp_path, capsys):
    names = [entry.name for entry in train.Cityscapes.classes]
    args = SimpleNamespace(weights="none", init=tmp_path / "other.pt")
    for num_classes, classes, same in ((19, names, True), (19, None, True), (7, None, False),
                                       (19, names[::-1], False)):
        net = PSPNet(19, "resnet18")
        other = PSPNet(num_classes, "resnet18")
        theirs = {name: value + 1 for name, value in other.state_dict().items()}
        torch.save({"state_dict": theirs, "model": other.arguments, "classes": classes}, args.init)
        train.load_first_weights(net, args, names)
        for name, value in net.state_dict().items():
            assert torch.equal(value, theirs[name]) == (same or ".conv_seg." not in name), name
        assert ("other classes" in capsys.readouterr().out) != same
    with pytest.raises(train.CheckpointError, match="resnet18.*'bins': .1, 2, 3, 6."):
        train.load_first_weights(PSPNet(19, "resnet18", [1, 2, 4, 8]), args, names)


def test_mistakes_end_with_one_sentence(small, tmp_path, reference, mistake):
    for options, *words in (
            (f"--data {tmp_path}/nowhere", "no images", "--data"),
            ("--bins 0", "--bins: 0 is not a number from 1 on"),
            ("--seed -1", "--seed"),
            (f"--seed {2**70} --weights {tmp_path}/none.pth", "No such file", "none.pth"),
            ("--lr nan", "--lr"),
            ("--backbone vgg", "--backbone", "resnet50_v1c"),
            (f"--init {tmp_path}/none.pt", "No such file", "none.pt"),
            (f"--out {reference}/last.pt/run", f"{reference}/last.pt"),
            (f"--out {reference}", "exists already", "--resume"),
            (f"--out {reference} --iters 3 --lr 0.02 --resume", "lr was 0.01 and is 0.02")):
        mistake(f"{small} {options}", *words)
        assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_cannot_be_resumed_from_is_refused(small, tmp_path, reference, mistake):
    last, whole = tmp_path / "last.pt", torch.load(reference / "last.pt")
    newer = whole["recipe"] | {"momentum": 0.95}  # of a program that has this option
    for content, words in (
            ([1], f"{last} holds no dictionary of weights"),
            ({"state_dict": whole["state_dict"]}, f"the recipe of {last} was another"),
            (whole | {"recipe": newer}, "momentum was 0.95 and is None")):
        torch.save(content, last)
        mistake(f"{small} {STEPS} --out {tmp_path} --resume", words)
    last.write_bytes(last.read_bytes()[:10**6])
    mistake(f"{small} {STEPS} --out {tmp_path} --resume", f"{last} cannot be read")
