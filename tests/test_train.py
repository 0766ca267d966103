"""Training: the formulas, mmsegmentation's 20 steps, and the script as it runs, stops, fails and
goes on."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MMSEG, run_script, words_of
from fill import fill_state_dict, make_input, make_label
from test_pspnet import images_for, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from toy_cityscapes import draw_cityscapes

import train
from pspnet import PSPNet, load_net, read_checkpoint
from train import poly_lr, segmentation_loss

# The smallest run that has everything: a ResNet-18, 8 drawn scenes, 2 crops an iteration.
SMALL = "--backbone resnet18 --weights none --crop 40 64 --batch-size 4 --workers 1"


def small_run(toy, out, arguments, **options):
    return run_script(f"train.py --data {toy} --out {out} {SMALL} {arguments}", **options)


def events(out):
    """The lines of log.jsonl without what depends on the speed of the machine."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "waiting")}
        for line in lines
    ]


def assert_same_run(out, reference):
    """Weights, momentum, everything else in last.pt and best.pt, and the log: identical, to the
    byte."""
    assert events(out) == events(reference)
    for name in ("last.pt", "best.pt"):
        assert_equal(read_checkpoint(out / name), read_checkpoint(reference / name), name)


def assert_equal(a, b, where):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}[{key}]")
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes(), where
    else:
        assert a == b, where


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
    assert segmentation_loss(logits, label).item() == pytest.approx(total / 24, abs=1e-12)


def test_loss_of_void_is_zero_with_zero_gradient_and_one_labelled_pixel_counts_as_one():
    logits = torch.randn(1, 5, 3, 4, requires_grad=True)
    label = torch.full((1, 3, 4), 255)
    loss = segmentation_loss(logits, label)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()
    label[0, 1, 2] = 3
    assert segmentation_loss(logits, label).item() == pytest.approx(
        -logits[0, :, 1, 2].log_softmax(0)[3].item() / 12, rel=1e-5
    )


# Operations of the kinds that networks like this have, which the documentation of
# torch.use_deterministic_algorithms lists as nondeterministic on CUDA, by their names inside torch.
NONDETERMINISTIC = set(
    """_adaptive_avg_pool2d_backward upsample_bilinear2d_backward nll_loss2d_forward_summed
    reflection_pad2d_backward replication_pad2d_backward grid_sampler_2d_backward index_put
    index_put_ _index_put_impl_ put_ index_add index_add_ scatter_add scatter_add_ scatter_reduce
    cumsum histc bincount median""".split()
)


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
    net = PSPNet(backbone="resnet18")
    images, label = torch.rand(2, 3, 40, 64), torch.randint(0, 19, (2, 40, 64))
    with Operations() as step:
        logits, aux_logits = net(images)
        (segmentation_loss(logits, label) + segmentation_loss(aux_logits, label)).backward()
    assert "convolution_backward" in step.names
    assert not step.names & NONDETERMINISTIC
    # The usual way has three of them.
    net.decode_head.forward = net.decode_head.textbook_forward
    with Operations() as step:
        torch.nn.functional.cross_entropy(net(images)[0], label).backward()
    assert len(step.names & NONDETERMINISTIC) == 3


def test_twenty_steps_of_sgd_equal_mmsegmentations():
    recorded = MMSEG["sgd20"]["r18b-d8", "float64"]
    net = PSPNet(backbone="resnet18")
    net.load_state_dict(fill_state_dict(net.state_dict()))
    net.double().train()
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    for step, expected in enumerate(recorded["loss"]):
        optimizer.param_groups[0]["lr"] = poly_lr(step, 80_000)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(recorded["lr"][step], abs=1e-12)
        logits, aux_logits = net(images_for(make_input((2, 3, 128, 256), f"step{step}").double()))
        label = make_label(2, 128, 256, name=f"step{step}")
        loss = segmentation_loss(logits, label) + 0.4 * segmentation_loss(aux_logits, label)
        assert loss.item() == pytest.approx(expected, rel=1e-7), step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = net.state_dict()
    for name, expected in recorded["final"].items():
        assert relative_error(state[name].flatten()[:64].double(), expected["first64"]) < 1e-7, name
        assert state[name].norm().item() == pytest.approx(expected["norm"], rel=1e-7), name


def test_gradient_of_a_global_batch_does_not_depend_on_the_number_of_processes():
    process = run_script("tests/ddp_gradient.py", processes=2)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 1e-12


# The recipe ---------------------------------------------------------------------------------------


def test_defaults_are_the_reference_recipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = train.parse_args(torch.device("cpu"))
    recipe = {name: getattr(args, name, 2975) for name in train.REFERENCE}
    assert recipe == train.REFERENCE
    train.print_recipe(args, recipe, torch.device("cpu"), 1, 500)
    assert capsys.readouterr().out.splitlines()[-1] == "departs from the reference in nothing"
    train.print_recipe(args, recipe | {"lr": 0.02}, torch.device("cpu"), 2, 500)
    departures = capsys.readouterr().out.splitlines()[-1]
    assert "lr 0.02 (0.01)" in departures and "batch norm over 4 images" in departures
    for has_bf16, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda has=has_bf16, **_: has)
        assert train.parse_args(torch.device("cuda")).precision == precision


# The script ---------------------------------------------------------------------------------------

ITERATIONS = "--iters 12 --val-every 6 --save-every 2"


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory):
    """A run of 12 iterations in one go."""
    out = tmp_path_factory.mktemp("reference")
    process = small_run(toy, out, ITERATIONS)
    assert process.returncode == 0, process.stderr
    return out, process


def test_a_run_leaves_checkpoints_log_pictures_and_a_table(toy, reference, tmp_path):
    out, process = reference
    names = "best.pt last.pt log.jsonl val_000006.png val_000012.png"
    assert sorted(path.name for path in out.iterdir()) == names.split()
    assert "departs from the reference in backbone resnet18 (resnet50_v1c); weights none " in (
        process.stdout
    )
    assert "road " in process.stdout and "of 19 classes" in process.stdout
    for words in ("images/s", "waiting for data", "loss"):
        assert words in process.stderr
    log = events(out)
    assert [(line["event"], line["step"]) for line in log] == [
        ("recipe", 0),
        ("validation", 6),
        ("train", 10),
        ("train", 12),
        ("validation", 12),
    ]
    assert log[2]["lr"] == poly_lr(9, 12) and log[3]["lr"] == poly_lr(11, 12) == 1e-4
    best = max(line["miou"] for line in log if line["event"] == "validation")
    assert read_checkpoint(out / "last.pt")["best_miou"] == best
    process = run_script(
        f"evaluate.py --ckpt {out}/best.pt --data {toy} --json {tmp_path}/scores.json"
    )
    assert process.returncode == 0, process.stderr
    # The same function, the same network
    assert json.loads((tmp_path / "scores.json").read_text())["miou"] == best


def test_the_script_takes_the_steps_of_the_recipe(toy, tmp_path):
    """Three steps once more, written out: loss, weight of the auxiliary loss, SGD, rate. (More of
    them amplify the rounding of float32, which differs from processor to processor.)"""
    process = small_run(toy, tmp_path, "--iters 3")
    assert process.returncode == 0, process.stderr
    torch.manual_seed(0)
    net = PSPNet(19, "resnet18").train()
    weights = list(net.parameters())
    momenta = [torch.zeros_like(w) for w in weights]
    stream = train.TrainingStream(train.Cityscapes(toy, "train"), (40, 64), seed=0)
    for step in range(3):
        images, labels = zip(*(stream[4 * step + i] for i in range(4)), strict=True)
        labels = torch.stack(labels).long()
        torch.manual_seed(step * 2**12)  # the same dropout
        logits, aux_logits = net(torch.stack(images))
        loss = 0
        for scores, weight in ((logits, 1), (aux_logits, 0.4)):
            probability = scores.softmax(1).gather(1, labels.where(labels < 19, 0)[:, None])[:, 0]
            loss -= weight * probability.log()[labels < 19].sum() / labels.numel()
        gradients = torch.autograd.grad(loss, weights)
        rate = 0.0001 + 0.0099 * (1 - step / 2) ** 0.9
        with torch.no_grad():
            for w, m, g in zip(weights, momenta, gradients, strict=True):
                m.mul_(0.9).add_(g + 0.0005 * w)
                w.sub_(rate * m)
    last = read_checkpoint(tmp_path / "last.pt")
    states = last["optimizer"]["state"].values()
    # Relative to the whole, as the gradient of a bias before a batch norm is 0 but for rounding.
    size = torch.stack([m.norm() for m in momenta]).norm()
    for (name, w), state, m in zip(net.named_parameters(), states, momenta, strict=True):
        assert (last["state_dict"][name] - w).norm() <= 2e-5 * size, name
        assert (state["momentum_buffer"] - m).norm() <= 2e-5 * size, name


def test_training_learns(toy, tmp_path):
    process = small_run(toy, tmp_path, "--iters 30 --val-every 30")
    assert process.returncode == 0, process.stderr
    log = events(tmp_path)
    losses = [line["loss"] for line in log if line["event"] == "train"]
    assert losses[-1] < 0.85 * losses[0]
    # Always answering sidewalk, the largest class, gives 0.3.
    assert log[-1]["pixel_accuracy"] > 0.45


@pytest.fixture(scope="module")
def reference_of_two(toy, tmp_path_factory):
    """The same run by two processes."""
    out = tmp_path_factory.mktemp("reference_of_two")
    process = small_run(toy, out, ITERATIONS, processes=2)
    assert process.returncode == 0, process.stderr
    return out, process


def start(toy, out, processes=1, restarts=0, resume=""):
    """Start a run and return it once it has written a checkpoint."""
    last = out / "last.pt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    command = f"train.py --data {toy} --out {out} {SMALL} {ITERATIONS} {resume}"
    process = subprocess.Popen(
        words_of(command, processes, restarts),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not last.exists() or last.stat().st_mtime_ns == before:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_stopped_and_resumed_equals_one_in_one_go(toy, tmp_path, processes, request):
    """SIGTERM to the script, or to torchrun: all processes save, say how to go on, and end within
    seconds."""
    reference = request.getfixturevalue("reference" if processes == 1 else "reference_of_two")[0]
    process = start(toy, tmp_path, processes)
    since = time.monotonic()
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=30)[1]
    assert time.monotonic() - since < 20
    assert process.returncode != 0
    step = read_checkpoint(tmp_path / "last.pt")["step"]
    assert 2 <= step < 12
    saying = f"train.py: stopped; {tmp_path}/last.pt holds iteration {step}, the same command"
    assert message.count(saying) == 1
    assert "Traceback" not in message.split("torch/distributed/")[0]
    resumed = small_run(toy, tmp_path, f"{ITERATIONS} --resume", processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path, reference)


def test_a_run_that_is_killed_and_resumed_equals_one_in_one_go(toy, tmp_path, reference):
    """SIGKILL at two moments; whatever is being written then, last.pt is whole."""
    for moment, resume in ((0.05, ""), (0.5, "--resume")):
        process = start(toy, tmp_path, resume=resume)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert small_run(toy, tmp_path, f"{ITERATIONS} --resume").returncode == 0
    assert_same_run(tmp_path, reference[0])


def children(pid):
    """Process ids of the children of `pid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def test_a_process_that_is_killed_is_restarted_and_the_run_equals_one_in_one_go(
    toy, tmp_path, reference_of_two
):
    process = start(toy, tmp_path, 2, restarts=1)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert_same_run(tmp_path, reference_of_two[0])


def test_an_error_of_one_process_ends_all_of_them_and_is_what_one_reads(tmp_path):
    """An image that only process 1 reads is broken: within a minute everything is gone, and its
    name is the only message."""
    root = draw_cityscapes(tmp_path / "data", {"train": 8, "val": 1}, (40, 64))
    stream = train.TrainingStream(train.Cityscapes(root, "train"))
    # Sample 5 is in iteration 1, and process 5 % 2 has it.
    broken, _ = stream.dataset.files[stream.index(5)]
    broken.write_bytes(broken.read_bytes()[:200])
    since = time.monotonic()
    # It returns when no process holds its output any more.
    process = small_run(root, tmp_path / "run", ITERATIONS, processes=2)
    assert time.monotonic() - since < 60
    assert process.returncode != 0
    lines = [
        line
        for line in process.stderr.splitlines()
        if "train.py: " in line or "Error" in line and "ChildFailed" not in line
    ]
    assert lines == [
        f"train.py: cannot decode {broken} (it is cut short): download or unpack it again"
    ]


def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(toy, tmp_path, reference):
    def limit():  # no file may become larger than a megabyte, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    out = tmp_path
    torch.save(
        read_checkpoint(reference[0] / "last.pt") | {"step": 8, "validated": 6}, out / "last.pt"
    )
    content = (out / "last.pt").read_bytes()
    process = small_run(toy, out, f"{ITERATIONS} --resume", preexec_fn=limit)
    assert process.returncode == 2
    assert "cannot write" in process.stderr and "Traceback" not in process.stderr
    assert f"go on with --resume; {out}/last.pt holds iteration 8" in process.stderr
    assert (out / "last.pt").read_bytes() == content
    assert not list(out.glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run_with_what_one_needs_to_know(toy, tmp_path):
    process = small_run(toy, tmp_path, f"{ITERATIONS} --lr 1e+30")
    assert process.returncode == 2, process.stderr
    message = process.stderr.strip().splitlines()[-1]
    assert "the loss of iteration 2 is nan, at learning rate 9.2e+29" in message
    assert "with samples 4 to 7" in message
    assert "there is no checkpoint yet" in message
    assert not (tmp_path / "last.pt").exists()


def test_init_takes_all_weights_but_the_classifiers_of_other_classes(tmp_path, capsys):
    torch.manual_seed(0)
    for num_classes in (19, 7):
        other, net = PSPNet(num_classes, "resnet18"), PSPNet(19, "resnet18")
        random = net.state_dict()["decode_head.conv_seg.weight"].clone()
        torch.save({"state_dict": other.state_dict()}, tmp_path / "other.pt")
        train.start_from(net, tmp_path / "other.pt")
        expected = other.state_dict()
        for name, value in net.state_dict().items():
            if num_classes == 19 or ".conv_seg." not in name:
                assert torch.equal(value, expected[name]), name
        assert torch.equal(net.state_dict()["decode_head.conv_seg.weight"], random) == (
            num_classes == 7
        )
        assert ("7 classes, not 19" in capsys.readouterr().out) == (num_classes == 7)
    with pytest.raises(train.UserError, match="--backbone resnet18"):
        train.start_from(PSPNet(19, "resnet18_v1c"), tmp_path / "other.pt")


def test_coarse_labels_the_cache_and_bfloat16_train(tmp_path):
    root = draw_cityscapes(tmp_path / "data", {"train": 4, "val": 1, "train_extra": 3}, (40, 64))
    for path in list((root / "gtFine/train_extra").glob("*/*")):
        target = Path(str(path).replace("gtFine", "gtCoarse"))
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    process = small_run(
        root, tmp_path / "run", f"--iters 2 --coarse --precision bf16 --cache {tmp_path}/cache"
    )
    assert process.returncode == 0, process.stderr
    assert "7 images to train on" in process.stdout
    assert "coarse True (False)" in process.stdout and "precision bf16 (fp32)" in process.stdout
    assert len(list((tmp_path / "cache").iterdir())) == 7
    assert math.isfinite(events(tmp_path / "run")[1]["loss"])
    assert all(
        v.dtype != torch.bfloat16
        for v in read_checkpoint(tmp_path / "run/last.pt")["state_dict"].values()
    )


# Mistakes -----------------------------------------------------------------------------------------


def test_mistakes_end_with_exit_code_2_and_one_sentence(
    toy, tmp_path, reference, mistake, monkeypatch
):
    def wrong(arguments, *words, data=toy, out=tmp_path / "run"):
        mistake(f"train.py --data {data} --out {out} {SMALL} {arguments}", *words)

    out = reference[0]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "torch.hub.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network"))
    )
    (tmp_path / "file").touch()
    wrong("", "no folder", "--data", data=tmp_path / "nowhere")
    wrong("", f"--data {toy}", data=toy / "leftImg8bit")
    wrong("--iters 0", "positive")
    wrong(f"--seed {2**64}", "--seed 0 to 8388607")
    wrong("--iters many", "--iters", "many")
    wrong("--backbone vgg", "--backbone", "vgg", "resnet50_v1c")
    wrong("--batch-size 1", "two images in each process", "--batch-size 2")
    wrong("--weights imagenet", "cannot download", "resnet18-f37072fd.pth", "--weights FILE")
    wrong(f"--weights {tmp_path}/none.pth", "no checkpoint file", "none.pth")
    wrong(f"--init {tmp_path}/none.pt", "no checkpoint file", "none.pt")
    wrong(f"--cache {tmp_path}/file", "cannot make the cache folder")
    wrong("", "cannot write to", "--out", out=tmp_path / "file/run")
    wrong("--resume", "there is no ", "last.pt to go on from", "leave --resume out")
    wrong(ITERATIONS, "already holds a run", "--resume", "--out", out=out)
    wrong(
        f"{ITERATIONS} --lr 0.02 --seed 1 --resume",
        "lr was 0.01 and is 0.02",
        "seed was 0 and is 1",
        out=out,
    )


@pytest.mark.parametrize(
    ("batch_size", "words"),
    [
        (4, "shared by 3 processes: type --batch-size 6"),
        (2, "shared by 3 processes: type --batch-size 6"),
        (3, "two images in each process.*--batch-size 6"),
    ],
)
def test_batches_that_processes_cannot_share_are_a_mistake(monkeypatch, batch_size, words):
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch-size", str(batch_size)])
    cpu = torch.device("cpu")
    with pytest.raises(train.UserError, match=words):
        train.check_args(train.parse_args(cpu), cpu, 3)


def test_a_damaged_checkpoint_is_refused_and_the_good_one_named(toy, tmp_path, reference, mistake):
    last, best = (reference[0] / name for name in ("last.pt", "best.pt"))
    content = last.read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    command = f"train.py --data {toy} --out {tmp_path} {SMALL} {ITERATIONS} --resume"
    mistake(command, "last.pt cannot be read", "cut short", "start again")
    (tmp_path / "best.pt").write_bytes(best.read_bytes())
    (tmp_path / "last.pt").rename(tmp_path / "cut.pt")
    mistake(command, f"there is no {tmp_path}/last.pt to go on from: copy {tmp_path}/best.pt there")
    mistake(command.removesuffix("--resume"), "already holds a run")
    (tmp_path / "cut.pt").rename(tmp_path / "last.pt")
    step = read_checkpoint(best)["step"]
    mistake(command, f"best.pt holds iteration {step}: copy it to {tmp_path}/last.pt")
    torch.save({"state_dict": load_net(best).state_dict()}, tmp_path / "last.pt")
    mistake(command, "is not a checkpoint of train.py", "--init")
