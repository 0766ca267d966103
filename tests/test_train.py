"""train.py: its formulas, its steps against mmsegmentation's, and whole runs: what they leave, and
how they are killed, fail and go on. (Reproducible bytes on a GPU: see test_gpu.py.)"""
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from subprocess import DEVNULL, Popen
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import MMSEG, run_script, words_of
from fill import fill_state_dict, make_input, make_label
from toy_cityscapes import draw_cityscapes

import evaluate
import train
from cityscapes import CLASSES, Cityscapes, DataError, TrainingStream
from pspnet import CheckpointError, FastPSPNet, PSPNet
from train import poly_lr, segmentation_loss, training_step

# The smallest run that has everything: a ResNet-18, 8 drawn scenes, 4 crops an iteration
SMALL = "--backbone resnet18 --weights none --crop 40 64 --batch-size 4 --iters 3 --workers 0"
STEPS = "--lr 0.001 --val-every 2 --save-every 1"  # saves last, best, last, ..., last.pt
NAMES = [entry.name for entry in CLASSES]


def test_learning_rate_is_mmsegmentations_at_every_recorded_iteration():
    for iteration, rate in MMSEG["lr"].items():
        assert abs(poly_lr(iteration, 40_000) - rate) < 1e-12
    assert poly_lr(0, 1) == 0.01


def test_loss_is_the_sum_over_labelled_pixels_over_all_pixels():
    logits = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 3, 4))
    labels[0, 0] = labels[1, 2, 3] = 255
    total = 0
    for b, y, x in (labels != 255).nonzero().tolist():
        total -= logits[b, :, y, x].log_softmax(0)[labels[b, y, x]]
    assert abs(segmentation_loss(logits, labels) - total / 24) < 1e-12


def test_loss_of_void_is_zero_with_zero_gradient():
    logits = torch.randn(1, 5, 3, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 3, 4), 255))
    gradient, = torch.autograd.grad(loss, logits)
    assert loss == 0 and not gradient.any()


@pytest.mark.usefixtures("all_cores")
def test_steps_of_sgd_equal_mmsegmentations():
    """In float64. Each of the three losses depends on all updates before."""
    net = FastPSPNet(backbone="resnet18")
    net.load_state_dict(fill_state_dict(net.state_dict()))
    net.double().train()
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0
    net.normalize = lambda images: images  # the recorded inputs are normalised already
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for i, expected in enumerate(MMSEG["sgd"]):
        optimizer.param_groups[0]["lr"] = poly_lr(i, 80_000)
        images = make_input((2, 3, 128, 256), f"step{i}").double()
        labels = make_label(2, 128, 256, f"step{i}")
        loss = training_step(net, images, labels, optimizer, scaler)
        assert abs(loss.item() / expected - 1) < 1e-8, i


def test_defaults_are_the_reference_recipe(monkeypatch):
    options = vars(train.parse_args(torch.device("cpu"), world=1, argv=[]))
    recipe = {"backbone": "resnet50_v1c", "bins": [1, 2, 3, 6], "weights": "imagenet", "init": None,
              "crop": [512, 1024], "batch_size": 8, "iters": 40_000, "lr": 0.01, "seed": 0,
              "precision": "fp32", "coarse": False}
    assert options == options | recipe
    for has_bf16, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", Mock(return_value=has_bf16))
        assert train.parse_args(torch.device("cuda"), world=8, argv=[]).precision == precision


@pytest.mark.parametrize(("device", "world", "batch_size"), [
    ("cpu", 1, 1), ("cpu", 3, 3), ("cpu", 3, 8), ("cuda", 1, 1), ("cuda", 3, 4)])
def test_batches_that_processes_cannot_share_are_a_mistake(device, world, batch_size):
    """On a CPU each process needs two images, on GPUs all of them together do."""
    options = ["--batch-size", str(batch_size)]
    with pytest.raises(SystemExit):
        train.parse_args(torch.device(device), world, options)
    if batch_size % world == 0:  # Without the level k = 1 it is none.
        assert train.parse_args(torch.device(device), world, [*options, "--bins", "2"])


@pytest.mark.parametrize("option", ["--iters 0", "--iters 1.5", "--lr -1", "--lr nan", "--lr inf",
                                    f"--seed {10**9 + 1}"])
def test_numbers_out_of_range_are_a_mistake(option):
    with pytest.raises(SystemExit):
        train.parse_args(torch.device("cpu"), 1, option.split())


# Whole runs ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """The folders of two runs in one go: [1] by this process, [2] by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    train.main(f"--data {toy} --out {folder}/1 {SMALL} {STEPS}".split())
    process = run_script(f"train.py --data {toy} --out {folder}/2 {SMALL} {STEPS}", processes=2)
    assert process.returncode == 0, process.stderr
    return {1: folder / "1", 2: folder / "2"}


@pytest.fixture
def small(toy, tmp_path):
    """The options of a run into the folder tmp_path / "run"."""
    return f"--data {toy} --out {tmp_path}/run {SMALL}"


def logged(out, event):
    """The lines of the log of this event, by step. Of two of one step the later counts."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["event"] == event}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_leaves_checkpoints_log_and_pictures(runs, processes, toy, tmp_path):
    out = runs[processes]
    assert sorted(path.name for path in out.iterdir()) == [
        "best.pt", "last.pt", "log.jsonl", "val_000002.png", "val_000003.png"]
    scores = {step: line["miou"] for step, line in logged(out, "validation").items()}
    best, last = torch.load(out / "best.pt"), torch.load(out / "last.pt")
    assert best["best"] == last["best"] == max(scores.values())
    assert best["step"] == max(scores, key=scores.get) and last["step"] == 3
    evaluate.main(f"--ckpt {out}/best.pt --data {toy} --workers 0 "
                  f"--json {tmp_path}/scores.json".split())
    assert json.loads((tmp_path / "scores.json").read_text())["miou"] == best["best"]


@pytest.mark.parametrize(("processes", "tolerance"), [(1, 1e-4), (2, 1e-2)])
def test_the_script_takes_the_steps_of_the_recipe(runs, processes, tolerance, toy):
    """(Two images in a process: batch norm of the level k = 1 makes rounding larger.)"""
    torch.manual_seed(0)
    net = FastPSPNet(backbone="resnet18").train()
    first, momenta = [weight.detach().clone() for weight in net.parameters()], {}
    stream = TrainingStream(Cityscapes(toy, "train"), (40, 64), seed=0)
    log, last = logged(runs[processes], "train"), torch.load(runs[processes] / "last.pt")
    for i in range(3):
        mean_loss = 0
        for rank in range(processes):
            samples = [stream[4 * i + k] for k in range(rank, 4, processes)]
            images, labels = (torch.stack(tensors) for tensors in zip(*samples, strict=True))
            torch.manual_seed(i * processes + rank)  # the same dropout
            losses = [segmentation_loss(logits, labels.long()) for logits in net(images)]
            loss = (losses[0] + 0.4 * losses[1]) / processes
            loss.backward()  # adds up the gradients
            mean_loss += loss.item()
        assert abs(log[i + 1]["loss"] - mean_loss) < 1e-3
        with torch.no_grad():
            for name, weight in net.named_parameters():
                momenta[name] = 0.9 * momenta.get(name, 0) + weight.grad + 0.0005 * weight
                weight -= (0.00001 + 0.00099 * (1 - i / 2) ** 0.9) * momenta[name]
        net.zero_grad()

    largest = max(momentum.norm() for momentum in momenta.values())  # Some are only rounding.
    states = last["optimizer"]["state"].values()
    for (name, weight), old, state in zip(net.named_parameters(), first, states, strict=True):
        error = (state["momentum_buffer"] - momenta[name]).norm()
        assert error <= tolerance * (momenta[name].norm() + largest / 100), name
        error = (last["state_dict"][name] - weight).norm()
        assert error <= tolerance * (weight - old).norm() + 1e-6 * (weight.norm() + 1), name


def test_training_learns_and_logs_means(small, tmp_path, monkeypatch, capsys):
    """A line every 10 iterations and at each checkpoint, of the iterations since the last line. By
    the clock of this test an iteration takes a second, and to save a checkpoint 100."""
    losses = []

    def noting(*args):
        losses.append(training_step(*args))
        return losses[-1]

    monkeypatch.setattr(train, "training_step", noting)
    monkeypatch.setattr(os, "fsync", Mock())
    monkeypatch.setattr(train, "time", Mock(
        perf_counter=lambda: len(losses) + 100 * os.fsync.call_count))
    options = f"{small} --iters 12 --lr 0.02 --val-every 8 --save-every 4"
    monkeypatch.setattr(sys, "argv", ["train.py", *options.split()])
    train.main()
    log, validations = logged(tmp_path / "run", "train"), logged(tmp_path / "run", "validation")
    assert list(log) == [4, 8, 10, 12] and list(validations) == [8, 12]
    for begin, end in ((0, 4), (4, 8), (8, 10), (10, 12)):
        assert log[end]["loss"] == pytest.approx(torch.stack(losses[begin:end]).mean().item())
        assert log[end]["lr"] == pytest.approx(0.0002 + 0.0198 * (1 - (end - 1) / 11) ** 0.9)
        assert log[end]["seconds"] == 1
    assert validations[8]["gib"] == 0  # on a CPU
    assert capsys.readouterr().out.count(" of 19 classes") == 2  # tables
    assert sum(losses[8:]) < 0.95 * sum(losses[:4])


def check_equal(out, other):
    """Two runs saved the same bytes, and logged the same losses and scores."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = torch.load(out / name), torch.load(other / name)
        for part in ("state_dict", "optimizer"):
            torch.testing.assert_close(ours.pop(part), theirs.pop(part), rtol=0, atol=0)
        assert ours == theirs
    for event in ("train", "validation"):
        theirs = logged(other, event)
        for step, line in logged(out, event).items():
            assert line | {"seconds": 0} == theirs.pop(step) | {"seconds": 0}
        assert not theirs


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_equals_one_in_one_go(runs, small, tmp_path, monkeypatch, processes):
    """Of two processes one is killed, and torchrun starts both again, as README.md says."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    words, program = words_of(f"train.py {small} {STEPS} --resume"), tmp_path / "one_process.py"
    number = f"'{tmp_path}/' + os.environ.get('RANK', '0')"  # a file for the process's number
    program.write_text(f"import os\nopen({number}, 'w').write(str(os.getpid()))\n"
                       f"os.execv('{words[0]}', {words})\n")
    words = words_of(str(program), processes, restarts=1)
    process, out = Popen(words, stdout=DEVNULL, stderr=DEVNULL), tmp_path / "run"
    while not (out / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(int((tmp_path / str(processes - 1)).read_text()), signal.SIGKILL)
    assert process.wait(timeout=600) == (-signal.SIGKILL if processes == 1 else 0)
    if processes == 1:
        train.main(f"{small} {STEPS} --resume".split())
    assert len(logged(out, "start")) == 2  # at step 0, and at a checkpoint
    check_equal(out, runs[processes])


def test_a_full_disk_leaves_checkpoints_to_go_on_from(runs, small, tmp_path, monkeypatch):
    """There is no room for the last.pt of step 2. os.fsync says so at the latest."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=[None, None, OSError("No space left")]))
        with pytest.raises(OSError, match="No space left"):
            train.main(f"{small} {STEPS}".split())
    out, other = tmp_path / "run", tmp_path / "other"
    assert torch.load(out / "last.pt")["step"] == 1 and torch.load(out / "best.pt")["step"] == 2
    shutil.copytree(out, other)
    (other / "last.pt").unlink()
    for folder, step in ((out, 1), (other, 2)):
        train.main(f"{small} {STEPS} --out {folder} --resume".split())
        assert list(logged(folder, "start")) == [0, step]
        check_equal(folder, runs[1])


def test_an_error_in_a_worker_ends_all_processes_and_names_the_file(tmp_path):
    """One photograph of 8 is damaged, which one of two processes reads first."""
    data = draw_cityscapes(tmp_path / "data", {"train": 8, "val": 1}, (40, 64))
    damaged = sorted(data.glob("leftImg8bit/train/*/*"))[7]
    damaged.write_bytes(damaged.read_bytes()[:200])
    process = run_script(f"train.py --data {data} --out {tmp_path}/run {SMALL} --workers 1", 2)
    message = f"train.py: cityscapes.DataError: cannot decode {damaged}"
    assert process.returncode != 0 and message in process.stderr


def test_processes_with_different_options_do_not_start(runs, toy, small, tmp_path, monkeypatch):
    """In place of torch.distributed: another process, with other values of some settings."""
    def gather(everyones, settings):
        others = {"lr": 0.02, "seed": 1, "step": 500, "ckpt": "another file", "flip": True}
        everyones[:] = settings, {key: others.get(key, settings[key]) for key in settings}

    monkeypatch.setattr(evaluate, "dist", SimpleNamespace(
        is_initialized=lambda: True, get_world_size=lambda: 2, all_gather_object=gather,
        is_torchelastic_launched=lambda: False))
    with pytest.raises(DataError, match="the processes differ in step, lr, seed: "):
        train.main(small.split())
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="the processes differ in ckpt, flip: "):
        evaluate.main(f"--ckpt {runs[1]}/best.pt --data {toy}".split())


def test_a_run_that_diverges_ends_and_saves_only_finite_weights(small, tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError, match="the loss is (nan|inf).*lower --lr"):
        train.main(f"{small} --iters 4 --lr 1e9".split())
    assert not list(tmp_path.glob("run/*.pt"))
    monkeypatch.setattr(train, "poly_lr", lambda iteration, *_: [0.01, math.inf][iteration])
    with pytest.raises(FloatingPointError, match="weights are not finite.*lower --lr"):
        train.main(f"{small} --out {tmp_path}/other --save-every 1".split())
    assert torch.load(tmp_path / "other/last.pt")["step"] == 1


@pytest.mark.parametrize(("precision", "scale", "bins"), [
    ("bf16", None, []), ("fp16", 8.0, [1, 2, 4, 8])])
def test_coarse_labels_half_precision_and_other_bins_resume(tmp_path, precision, scale, bins):
    draw_cityscapes(tmp_path, {"train": 4, "val": 1, "train_extra": 3}, (16, 32))
    options = f"--coarse --precision {precision} --bins {' '.join(map(str, bins))} --iters 2"
    command = f"--data {tmp_path} --out {tmp_path}/run {SMALL} --crop 8 8 --batch-size 2 {options}"
    train.main(command.split())
    best, last = tmp_path / "run/best.pt", tmp_path / "run/last.pt"
    content, checkpoint = best.read_bytes(), torch.load(last)
    assert checkpoint["recipe"]["images"] == 7 and checkpoint["model"]["bins"] == bins
    checkpoint["scaler"]["scale"] = 8.0
    torch.save(checkpoint | {"step": 1, "best": 1.0}, last)
    train.main(f"{command} --resume".split())
    # The scale of the gradients is the checkpoint's, and what is no better is no new best.pt.
    assert torch.load(last)["scaler"].get("scale") == scale
    assert best.read_bytes() == content
    evaluate.main(f"--ckpt {best} --data {tmp_path} --workers 0".split())


@pytest.mark.parametrize(("num_classes", "names", "same"), [
    (19, NAMES, True), (19, None, True), (19, NAMES[::-1], False), (7, None, False)])
def test_init_takes_all_but_classifiers_of_other_classes(tmp_path, num_classes, names, same):
    net, other = PSPNet(19, "resnet18"), PSPNet(num_classes, "resnet18")
    theirs = {name: value + 1 for name, value in other.state_dict().items()}
    args = SimpleNamespace(init=tmp_path / "other.pt")
    torch.save({"state_dict": theirs, "model": other.arguments, "classes": names}, args.init)
    train.load_first_weights(net, args, NAMES)
    for name, value in net.state_dict().items():
        assert torch.equal(value, theirs[name]) == (same or ".conv_seg." not in name), name


@pytest.mark.parametrize(("backbone", "bins"), [("resnet18", "1, 2"), ("resnet50", "1, 2, 3, 6")])
def test_init_refuses_another_network(small, tmp_path, backbone, bins):
    net = PSPNet(19, backbone, [int(k) for k in bins.split(", ")])
    torch.save({"state_dict": net.state_dict(), "model": net.arguments}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=f"another network.*'{backbone}', 'bins': .{bins}.}}"):
        train.main(f"{small} --init {tmp_path}/other.pt".split())


def test_a_folder_that_exists_is_left_alone(runs, small):
    with pytest.raises(DataError, match=f"{runs[1]} exists already: type --resume to go on with "):
        train.main(f"{small} {STEPS} --out {runs[1]}".split())
    assert torch.load(runs[1] / "last.pt")["step"] == 3


def test_resume_refuses_another_recipe_and_damaged_checkpoints(runs, small, tmp_path):
    last = shutil.copytree(runs[1], tmp_path / "run") / "last.pt"
    with pytest.raises(CheckpointError, match="last.pt was another .lr was 0.001 and is 0.02;"):
        train.main(f"{small} {STEPS} --lr 0.02 --seed 1 --resume".split())
    last.write_bytes(last.read_bytes()[:10**6])
    with pytest.raises(CheckpointError, match="last.pt cannot be read"):
        train.main(f"{small} {STEPS} --resume".split())


class Masks(Cityscapes):
    def __getitem__(self, i):
        picture, label = super().__getitem__(i)
        return picture, label.point([0] + [255] * 255)  # road is 0, all else 255, void


def test_masks_of_0_and_255_are_told_and_never_the_best(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "Cityscapes", Masks)
    train.main(f"{small} --iters 1".split())
    told = re.findall("the labels of (.*) show no .*a mask of 0 and 255", capsys.readouterr().err)
    assert told == ["six images of train", "six images of val", "val"]
    assert [path.name for path in tmp_path.glob("run/*.pt")] == ["last.pt"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split_is_a_mistake(small, monkeypatch, split):
    monkeypatch.setattr(Cityscapes, "__len__", lambda dataset: int(dataset.split != split))
    with pytest.raises(DataError, match=f"the data set has no images in {split}"):
        train.main(small.split())
