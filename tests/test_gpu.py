"""What only a machine with a GPU can tell; skipped elsewhere. Each check runs in a process of its
own, from which conftest.py has not hidden the GPU. `python tests/test_gpu.py NAME` runs one."""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from toy_cityscapes import draw_cityscapes

SCRIPTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SCRIPTS))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # in a process of its own
SMALL = ("--backbone resnet18 --weights none --crop 64 128 --batch-size 4 --workers 2 --iters 6 "
         "--val-every 6 --save-every 1 --precision fp32 --resume").split()


def steps(device, precision):
    """The losses of three training steps, and the weights after them."""
    from evaluate import autocast
    from pspnet import FastPSPNet
    from train import segmentation_loss
    torch.manual_seed(0)
    net = FastPSPNet(backbone="resnet18").to(device, memory_format=torch.channels_last)
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0  # differs between devices
    images = torch.randint(256, (4, 3, 96, 160), dtype=torch.uint8).to(device)
    labels = torch.randint(19, (4, 96, 160)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    losses = []
    for _ in range(3):
        with autocast(device, precision):
            logits, aux_logits = net(images)
            loss = segmentation_loss(logits, labels) + 0.4 * segmentation_loss(aux_logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, list(net.parameters())


def start(folder, *torchrun):
    """Start train.py on toy scenes, with results in `folder`, or go on; returns the process."""
    data = draw_cityscapes(folder.parent / "data", {"train": 8, "val": 4}, (64, 128))
    return subprocess.Popen([sys.executable, *torchrun, SCRIPTS / "train.py", "--data", data,
                             "--out", folder, *SMALL])


def check_steps_equal_the_cpus(_):
    expected, _ = steps(torch.device("cpu"), "fp32")
    for precision, tolerance in (("fp32", 2e-3), ("bf16", 3e-2), ("fp16", 1e-2)):
        assert steps(DEVICE, precision)[0] == pytest.approx(expected, rel=tolerance), precision


def check_the_same_bytes_twice(_):
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which cuBLAS needs for that
    torch.use_deterministic_algorithms(True)  # an error where an operation is not
    for precision in ("fp32", "bf16", "fp16"):
        (first, weights), (second, again) = (steps(DEVICE, precision) for _ in range(2))
        assert first == second and all(map(torch.equal, weights, again)), precision


def check_a_resumed_run_has_the_same_bytes(folder):
    one, last = folder / "one/last.pt", folder / "killed/last.pt"
    killed = start(last.parent)
    while not last.exists() and killed.poll() is None:  # until it saves
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() != 0 and torch.load(last)["step"] < 6
    assert start(last.parent).wait() == start(one.parent).wait() == 0
    weights, resumed = (torch.load(path)["state_dict"].values() for path in (one, last))
    assert all(map(torch.equal, weights, resumed))


def check_two_gpus_give_the_losses_of_one(folder):
    losses = []
    for gpus in ("1", "2"):
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={gpus}".split()
        assert start(folder / gpus, *torchrun).wait() == 0
        events = map(json.loads, (folder / gpus / "log.jsonl").read_text().splitlines())
        losses.append([event["loss"] for event in events if event["event"] == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)  # each drops other channels


def run(*words):
    """Run Python with the GPUs that conftest.py has hidden, of which two are enough."""
    from conftest import GPUS
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1" if GPUS is None else GPUS}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def gpus():
    return int(run("-c", "import torch\nprint(torch.cuda.device_count())").stdout)


@pytest.mark.parametrize("name", [name for name in globals() if name.startswith("check_")])
def test_on_a_gpu(name, gpus):
    if gpus < (2 if "two_gpus" in name else 1):
        pytest.skip("needs GPUs")
    process = run(__file__, name)
    assert process.returncode == 0, process.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        globals()[sys.argv[1]](Path(folder))
