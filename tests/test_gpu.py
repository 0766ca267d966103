"""What only a machine with a GPU can tell; skipped elsewhere. Each check runs in a process of its
own, from which conftest.py has not hidden the GPU. `python tests/test_gpu.py NAME` runs one."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # in a process of its own
TRAIN = str(TESTS.parent / "train.py")
SMALL = ("--backbone resnet18 --weights none --crop 64 128 --batch-size 4 --workers 2 --iters 6 "
         "--val-every 6 --save-every 2 --precision fp32").split()


def steps(device, precision, count=3):
    """The losses of some training steps, and all weights after them in one tensor."""
    from evaluate import autocast
    from pspnet import FastPSPNet
    from train import segmentation_loss
    torch.manual_seed(0)
    net = FastPSPNet(backbone="resnet18").train()
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0  # differs between devices
    images = torch.randint(256, (4, 3, 96, 160), dtype=torch.uint8).to(device)
    labels = torch.randint(19, (4, 96, 160)).to(device)
    net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    losses = []
    for _ in range(count):
        with autocast(device, precision):
            logits, aux_logits = net(images)
            loss = segmentation_loss(logits, labels) + 0.4 * segmentation_loss(aux_logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten().cpu() for p in net.parameters()])


def train(out, *options, processes=1, program=(TRAIN,)):
    """Run train.py on toy scenes; returns the losses and the bytes of the weights."""
    from toy_cityscapes import draw_cityscapes
    data = out.parent / "data"
    if not data.exists():
        draw_cityscapes(data, {"train": 8, "val": 4}, (64, 128))
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()
    command = [sys.executable, *(torchrun if processes > 1 else []), *program,
               "--data", str(data), "--out", str(out), *SMALL, *options]
    subprocess.run(command, check=True)
    state = torch.load(out / "last.pt", weights_only=True, map_location="cpu")["state_dict"]
    losses = {}
    for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        if line["event"] == "train":
            losses[line["step"]] = line["loss"]
    return losses, [value.numpy().tobytes() for value in state.values()]


def check_steps_equal_the_cpus(_):
    expected, _ = steps(torch.device("cpu"), "fp32")
    for precision, tolerance in (("fp32", 2e-3), ("bf16", 3e-2), ("fp16", 1e-2)):
        losses, _ = steps(DEVICE, precision)
        assert losses == pytest.approx(expected, rel=tolerance), precision


def check_the_same_bytes_twice(_):
    torch.use_deterministic_algorithms(True)  # an error where an operation is not
    for precision in ("fp32", "bf16", "fp16"):
        (first, weights), (second, again) = (steps(DEVICE, precision) for _ in range(2))
        assert first == second and torch.equal(weights, again), precision


DIE = """
import os, runpy, sys
def die(source, target, replace=os.replace):
    replace(source, target)
    os._exit(9)
os.replace = die
runpy.run_path(sys.argv[0], run_name="__main__")"""


def check_a_resumed_run_has_the_same_bytes(folder):
    """The run dies when it has saved for the first time."""
    _, weights = train(folder / "one")
    with pytest.raises(subprocess.CalledProcessError):
        train(folder / "killed", program=["-c", f"import sys; sys.argv[0] = {TRAIN!r}\n{DIE}"])
    assert torch.load(folder / "killed/last.pt", weights_only=True)["step"] == 2
    _, resumed = train(folder / "killed", "--resume")
    assert resumed == weights


def check_two_gpus_give_the_losses_of_one(folder):
    """Nearly: each GPU drops other channels."""
    one, _ = train(folder / "one", "--save-every", "1")
    two, _ = train(folder / "two", "--save-every", "1", processes=2)
    assert list(two.values()) == pytest.approx(list(one.values()), rel=5e-2)


def run_check(name):
    from conftest import GPUS
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    env |= {"CUDA_VISIBLE_DEVICES": GPUS} if GPUS is not None else {}
    return subprocess.run([sys.executable, __file__, name], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def gpus():
    """How many GPUs there are."""
    return int(run_check("count").stdout or 0) if torch.backends.cuda.is_built() else 0


@pytest.mark.parametrize("name", [name for name in globals() if name.startswith("check_")])
def test_on_a_gpu(name, gpus):
    if gpus < (2 if "two_gpus" in name else 1):
        pytest.skip("needs GPUs")
    process = run_check(name)
    assert process.returncode == 0, process.stderr


if __name__ == "__main__":
    if sys.argv[1] == "count":
        print(torch.cuda.device_count())
    else:
        with tempfile.TemporaryDirectory() as folder:
            globals()[sys.argv[1]](Path(folder))
