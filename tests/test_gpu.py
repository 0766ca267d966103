"""What only a machine with a GPU can tell; skipped elsewhere. Each check runs in a process of its
own, because conftest.py hides the GPU from pytest. `python tests/test_gpu.py NAME`, a name in
CHECKS, runs one and prints what it measures, without a GPU on the CPU."""
import os
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from fill import fill_state_dict, make_input, make_label
from toy_cityscapes import draw_cityscapes

SCRIPTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SCRIPTS))
from evaluate import predict, predict_averaged  # noqa: E402
from pspnet import FastPSPNet, PSPNet  # noqa: E402
from train import training_step  # noqa: E402

CPU = torch.device("cpu")
# Name: precision, whether TF32 is allowed, and how far a device may be from float32 on a CPU: in
# logits and gradients (see compare), and in the share of pixels that get another class. Gradients
# differ most: a value that a rounding moves across 0, at a ReLU, changes its whole gradient. On a
# CPU bf16 has 0.024, 0.33, 0.03; fp16 0.0026, 0.1, 0.003; channels_last 1e-5, 0.007, 0.
LIMITS = {"fp32 without TF32": ("fp32", False, 1e-4, 0.03, 0.0005),
          "fp32": ("fp32", True, 0.01, 0.2, 0.008),  # TF32 rounds as fp16 does
          "fp16": ("fp16", True, 0.01, 0.2, 0.008),
          "bf16": ("bf16", True, 0.05, 0.5, 0.08)}


def compare(what, expected, found, limit):
    """Compare the tensors in two dictionaries. An error is the norm of the difference, divided by
    the norm of what is expected. (None of these tensors is nearly 0.)"""
    errors = {name: torch.dist(x.double(), found[name].double()) / x.double().norm()
              for name, x in expected.items()}
    name = max(errors, key=lambda name: errors[name].nan_to_num(torch.inf))
    print(f"{what}, {name}: error {errors[name]:.2g}, limit {limit}")
    assert errors[name] <= limit, f"{what}, {name}: error {errors[name]:.2g}, limit {limit}"


def filled(kind, device=CPU, backbone="resnet18"):
    """A network with the weights of fill.py, without dropout, on a device."""
    net = kind(backbone=backbone)
    net.load_state_dict(fill_state_dict(net.state_dict()))
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0  # differs between devices
    return net.to(device, memory_format=torch.channels_last)


def step(net, images, precision):
    """The logits and the gradients of one training step: two dictionaries, on the CPU."""
    outputs, labels = [], make_label(4, *images.shape[2:]).to(images.device)
    net.train().register_forward_hook(lambda module, inputs, output: outputs.extend(output))
    # train.py begins with a scale of 65536, with which the first gradients may overflow.
    scaler = torch.amp.GradScaler(images.device.type, 1024, enabled=precision == "fp16")
    training_step(net, images, labels, torch.optim.SGD(net.parameters()), scaler, precision)
    logits = {"logits": outputs[0].detach().cpu(), "aux_logits": outputs[1].detach().cpu()}
    return logits, {name: p.grad.cpu() for name, p in net.named_parameters()}


def check_step(device, kind=FastPSPNet, limits=LIMITS, size=(256, 512)):
    """A training step of the fast network on the device and of the plain network on the CPU."""
    images = (57 * make_input((4, 3, *size)) + 115).clamp(0, 255).byte()
    expected = step(filled(PSPNet), images, "fp32")
    for name, (precision, tf32, *largest, _) in limits.items():
        torch.backends.cudnn.allow_tf32 = tf32
        found = step(filled(kind, device), images.to(device), precision)
        for i in range(2):
            compare(name, expected[i], found[i], largest[i])


def check_prediction(device, kind=FastPSPNet, limits=LIMITS, size=(256, 512)):
    """The classes that each protocol gives on the device and on the CPU."""
    images = (57 * make_input((4, 3, *size)) + 115).clamp(0, 255).byte()
    reference, net = filled(PSPNet).eval(), filled(kind, device).eval()
    # With these images' statistics of batch norm more classes occur than with those of fill.py.
    torch.optim.swa_utils.update_bn([images], reference)
    net.load_state_dict(reference.state_dict())
    image, tile = images[0], [length // 2 for length in size]
    for protocol in ({}, {"scales": (0.75, 1.25), "flip": True}, {"flip": True, "tile": tile}):
        function = partial(predict_averaged, **protocol) if protocol else predict
        expected = function(reference, image)
        for name, (precision, tf32, _, _, limit) in limits.items():
            torch.backends.cudnn.allow_tf32 = tf32
            found = function(net, image.to(device), precision=precision).cpu()
            share = (found != expected).double().mean().item()
            print(f"{name}, {protocol}: {share:.2g} of the pixels differ, limit {limit}")
            assert share <= limit, f"{name}, {protocol}: {share:.2g}, limit {limit}"


def train_words(iters, batch_size, backbone="resnet18", crop=(64, 128)):
    """The words of a command for drawn scenes and fill.py's weights; a folder must be added."""
    draw_cityscapes("data", {"train": 8, "val": 1}, crop)
    net = filled(PSPNet, backbone=backbone)
    torch.save({"state_dict": net.state_dict(), "model": net.arguments}, "init.pt")
    options = (f"--data data --init init.pt --backbone {backbone} --crop {crop[0]} {crop[1]} "
               f"--batch-size {batch_size} --iters {iters} --save-every 1 --resume --out")
    return [sys.executable, SCRIPTS / "train.py", *options.split()]


def tensors_of(folder):
    """The weights, statistics and momenta (after one step: gradients plus weight decay)."""
    checkpoint = torch.load(f"{folder}/last.pt", map_location="cpu")
    momenta = checkpoint["optimizer"]["state"].items()
    return checkpoint["state_dict"] | {f"{i}": state["momentum_buffer"] for i, state in momenta}


def check_same_bytes(device, backbone="resnet50_v1c", crop=(512, 1024)):
    """train.py twice, then killed and resumed, with its own backbone, crop and precision."""
    large = device.type == "cuda" and torch.cuda.mem_get_info()[1] > 14e9
    words = train_words(4, 8 if large else 2, backbone, crop)
    for out in "12":
        process = subprocess.run([*words, out], stderr=subprocess.PIPE)
        assert process.returncode == 0 and b"deterministic" not in process.stderr, process.stderr
    killed, last = subprocess.Popen([*words, "3"]), Path("3/last.pt")
    while not last.exists() and killed.poll() is None:  # until it saves
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() != 0 and torch.load(last, map_location="cpu")["step"] < 4
    subprocess.run([*words, "3"], check=True)
    for out in "23":
        compare(f"run {out}", tensors_of("1"), tensors_of(out), limit=0)


def check_two_gpus(device):
    """The first step of train.py on one GPU and on two, without dropout and TF32."""
    program = "import torch, train\ntorch.nn.Dropout2d.forward = lambda self, x: x\n"
    Path("without_dropout.py").write_text(f"{program}train.main()\ntrain.end_process()\n")
    env = os.environ | {"NVIDIA_TF32_OVERRIDE": "0", "PYTHONPATH": str(SCRIPTS)}
    python, _, *options = train_words(1, 4)
    for n in "12":
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={n}".split()
        words = [python, *torchrun, "without_dropout.py", "--precision", "fp32", *options, n]
        subprocess.run(words, env=env, check=True)
    compare("two GPUs", tensors_of("1"), tensors_of("2"), limit=0.03)


CHECKS = {"step": check_step, "prediction": check_prediction, "same_bytes": check_same_bytes,
          "two_gpus": check_two_gpus}


@cache
def run(*words):
    """Run Python with the GPUs that conftest.py has hidden. `timeout` also ends what it starts."""
    from conftest import GPUS
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1" if GPUS is None else GPUS}
    return subprocess.run(["timeout", "--kill-after=30", "900", sys.executable, *words], env=env,
                          capture_output=True, text=True)


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name):
    gpus = run("-c", "import torch\nprint(torch.cuda.device_count())").stdout
    if int(gpus) < (2 if name == "two_gpus" else 1):
        pytest.skip("needs GPUs")
    process = run(__file__, name)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize("check", [check_step, check_prediction])
def test_a_check_passes_bf16_on_a_cpu_and_fails_a_wrong_network(check):
    check = partial(check, CPU, limits={"bf16": LIMITS["bf16"]}, size=(48, 64))
    check()
    with pytest.raises(AssertionError, match="limit"):
        check(kind=partial(FastPSPNet, bins=(1, 2, 6, 3)))  # The last two levels are exchanged.


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        CHECKS[sys.argv[1]](device)
