"""The networks against mmsegmentation 1.2.2's numbers, FastPSPNet against PSPNet, and files of
weights."""
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import MMSEG, SCRIPTS, run_script
from fill import fill_state_dict, make_input, make_label
from torch._subclasses.fake_tensor import FakeTensorMode

import evaluate
from pspnet import (BACKBONES, CheckpointError, FastPSPNet, FastPyramidHead, PSPNet, PyramidHead,
                    load_backbone, load_net)

RECORDED = {"resnet18_v1c": "r18-d8", "resnet50_v1c": "r50-d8", "resnet101_v1c": "r101-d8",
            "resnet18": "r18b-d8", "resnet50": "r50b-d8", "resnet101": "r101b-d8"}


def filled_net(kind, backbone, bins=(1, 2, 3, 6)):
    """In float64, with the weights for which mmsegmentation's numbers were recorded."""
    net = kind(19, backbone, bins)
    fill_state_dict(net.state_dict())
    return net.double()


def relative_error(actual, expected):
    """The largest difference as a share of the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# Against mmsegmentation -------------------------------------------------------------------------


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_names_shapes_and_logits_equal_mmsegmentations(backbone):
    recorded = MMSEG["models"][RECORDED[backbone]]
    net = filled_net(PSPNet, backbone).eval()
    assert [(name, value.shape) for name, value in net.state_dict().items()] == recorded["keys"]
    expected = recorded["eval64"][1, 3, 65, 129]
    with torch.no_grad():
        stage3, stage4 = net.backbone(make_input((1, 3, 65, 129)).double())
        assert relative_error(net.auxiliary_head(stage3), expected["aux_head"]) < 1e-9
        assert relative_error(net.decode_head(stage4), expected["head"]) < 1e-9
        fast_head = FastPyramidHead(stage4.shape[1], 19).double().eval()
        fast_head.load_state_dict(net.decode_head.state_dict())
        assert relative_error(fast_head(stage4), expected["head"]) < 1e-9


def test_images_are_normalised_as_by_mmsegmentation():
    bgr = MMSEG["preprocess"]["bgr"]  # (H, W, 3): there blue is first, and channels are last
    rgb = bgr.flip(2).permute(2, 0, 1)[None]
    normalised = PSPNet(backbone="resnet18").normalize(rgb)
    assert relative_error(normalised, MMSEG["preprocess"]["out"]) < 1e-6


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize(("kind", "backbone", "layout"), [
    (FastPSPNet, "resnet50_v1c", torch.contiguous_format),
    (FastPSPNet, "resnet18", torch.channels_last),
    (PSPNet, "resnet18", torch.contiguous_format)])
def test_training_losses_gradients_and_statistics_equal_mmsegmentations(kind, backbone, layout):
    recorded = MMSEG["models"][RECORDED[backbone]]["train64"]
    net = filled_net(kind, backbone).train().to(memory_format=layout)
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0
    net.normalize = lambda images: images  # the recorded input is normalised already
    logits, aux_logits = net(make_input((2, 3, 64, 128)).double())
    labels = make_label(2, 64, 128)
    loss = F.cross_entropy(logits, labels, ignore_index=255, reduction="none").mean()
    aux_loss = F.cross_entropy(aux_logits, labels, ignore_index=255, reduction="none").mean()
    (loss + 0.4 * aux_loss).backward()

    assert relative_error(loss, recorded["losses"]["decode.loss_ce"]) < 1e-9
    assert relative_error(0.4 * aux_loss, recorded["losses"]["aux.loss_ce"]) < 1e-9
    norms = recorded["grad_norm_all"]  # of every parameter's gradient
    for name, parameter in net.named_parameters():
        assert abs(parameter.grad.norm() - norms[name]) < 1e-9 * max(norms.values()), name
    for name, gradient in recorded["grads"].items():  # some values of some
        difference = net.get_parameter(name).grad.flatten()[:64] - gradient["first64"]
        assert difference.abs().max() < 1e-9 * gradient["norm"], name
    for name, statistic in recorded["running_after"].items():
        assert relative_error(net.get_buffer(name), statistic) < 1e-9, name


def test_new_weights_have_the_mean_and_deviation_of_mmsegmentations():
    torch.manual_seed(0)
    for name, value in PSPNet().state_dict().items():
        recorded = MMSEG["init"]["r50-d8"][name]
        tolerance = 6 * recorded["std"] / value.numel() ** 0.5  # both are random; 0 for constants
        assert abs(value.double().mean() - recorded["mean"]) <= tolerance, name
        assert abs(value.double().std(correction=0) - recorded["std"]) <= tolerance, name


# FastPSPNet against PSPNet ----------------------------------------------------------------------


@pytest.mark.parametrize("bins", [(1, 2, 3, 6), (1, 2, 4, 8), (2,), ()])
def test_fast_network_has_the_values_gradients_and_statistics_of_the_textbooks(bins):
    textbook = filled_net(PSPNet, "resnet18", bins).train()
    fast = FastPSPNet(19, "resnet18", bins).double().train()
    fast.load_state_dict(textbook.state_dict())
    results = []
    for net in (fast, textbook):
        torch.manual_seed(0)  # the same images and dropout
        outputs = [*net(torch.randint(256, (2, 3, 64, 96))), *net(torch.randint(256, (2, 3, 33, 47)))]
        sum(output.square().mean() for output in outputs).backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        results.append([*outputs, *gradients, *net.buffers()])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-11 * max(1, expected.abs().max())


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (2, 100), (100, 2)])
def test_images_of_every_size_have_logits_of_that_size_and_bytes_equal_floats(size):
    textbook = filled_net(PSPNet, "resnet18_v1c").eval()
    fast = FastPSPNet(19, "resnet18_v1c").double().eval()
    fast.load_state_dict(textbook.state_dict())
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    logits, aux_logits = fast(images)
    assert logits.shape == (2, 19, *size) and aux_logits is None
    assert relative_error(logits, textbook(images)[0]) < 1e-11
    assert torch.equal(logits, fast(images.float())[0])
    for output in fast.float().train()(images):
        assert output.shape == (2, 19, *size) and output.dtype == torch.float32


def test_fast_head_is_about_as_accurate_in_bfloat16_as_the_textbooks():
    torch.manual_seed(0)
    textbook, fast = PyramidHead(256, 19).eval(), FastPyramidHead(256, 19).eval()
    fast.load_state_dict(textbook.state_dict())
    x = torch.rand(1, 256, 33, 65) * torch.rand(1, 256, 1, 1)  # channels of many sizes
    with torch.no_grad():
        expected = textbook(x)
        with torch.autocast("cpu", torch.bfloat16):
            error = (textbook(x) - expected).norm()
            fast_error = (fast(x) - expected).norm()
    assert fast_error < 1.5 * error


@pytest.mark.skipif(torch.__version__ < (2, 11) or not torch.backends.cuda.is_built(),
                    reason="needs a PyTorch with CUDA, and before 2.11 its driver")
def test_nothing_is_on_another_device_than_the_network(monkeypatch):
    """On a machine without a GPU: the operations of one, on shapes without values."""
    monkeypatch.setattr(evaluate, "argmax_class", lambda scores: scores.argmax(dim=0))
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda:0"):
            net = FastPSPNet(backbone="resnet18")
            images = torch.zeros(2, 3, 65, 129, dtype=torch.uint8)
        logits, aux_logits = net(images)
        at_scales = evaluate.predict_averaged(net.eval(), images[0], scales=(0.5, 1.25))
        in_tiles = evaluate.predict_averaged(net.eval(), images[0], flip=True, tile=(32, 48))
        for output in (logits, aux_logits, at_scales, in_tiles):
            assert output.device == images.device


def test_compiles_without_graph_breaks_and_gives_float32_under_autocast():
    net = torch.compile(FastPSPNet(backbone="resnet18"), fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        logits, aux_logits = net(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    assert logits.dtype == aux_logits.dtype == torch.float32


def test_exports_with_dynamic_height_and_width():
    net = FastPSPNet(backbone="resnet18").double().eval()
    # In multiples of 8: max pooling of torch before 2.15 wants to know the remainder.
    sizes = {2: 8 * torch.export.Dim("height", min=2, max=512),
             3: 8 * torch.export.Dim("width", min=2, max=512)}
    exported = torch.export.export(net, (255 * torch.rand(1, 3, 64, 96),),
                                   dynamic_shapes={"images": sizes}).module()
    images = 255 * torch.rand(1, 3, 40, 328)
    assert relative_error(exported(images)[0], net(images)[0]) < 1e-12


def test_script_prints_size_cost_and_that_both_networks_are_the_same():
    lines = run_script("pspnet.py").stdout.splitlines()
    assert lines[0] == "48,975,494 parameters"
    assert lines[1].startswith("PSPNet: 713 GFLOP")
    assert lines[2].startswith("FastPSPNet: 562 GFLOP")
    assert float(lines[3].split()[-1]) < 1e-12


STEP = """
import sys, torch
from pspnet import PSPNet
from cityscapes import Cityscapes, TrainingStream
stream = TrainingStream(Cityscapes(sys.argv[1], "train"), (40, 64), seed=0)
images, labels = map(torch.stack, zip(stream[0], stream[1]))
net = PSPNet(19, "resnet18")
logits, aux_logits = net(images)
loss = torch.nn.functional.cross_entropy(logits + aux_logits, labels.long(), ignore_index=255)
loss.backward()
torch.optim.SGD(net.parameters(), 0.01).step()
assert loss.isfinite()
"""


def test_the_two_lessons_alone_train_a_step(tmp_path, toy):
    for name in ("pspnet.py", "cityscapes.py"):
        lesson, _ = (SCRIPTS / name).read_text().split("\n# Here the lesson ends.")
        (tmp_path / name).write_text(lesson)
    subprocess.run([sys.executable, "-c", STEP, toy], cwd=tmp_path, check=True)


# Files of weights -------------------------------------------------------------------------------


def zeros_like(net):
    """The state_dict of a network, all zero. Each tensor is one zero seen many times, which makes
    a small file."""
    return {name: torch.zeros(()).expand(value.shape) for name, value in net.state_dict().items()}


def refusal_of(path):
    """The text with which load_net refuses a file: one line that begins with the path."""
    with pytest.raises(CheckpointError) as refusal:
        load_net(path)
    text = str(refusal.value)
    assert text.startswith(f"{path} ") and "\n" not in text
    return text


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_load_net_recognises_every_backbone_in_mmsegmentations_files(backbone, old, tmp_path):
    with torch.device("meta"):
        weights = zeros_like(PSPNet(11, backbone))
    if old:  # PyTorch before 1.0 had no counters in batch norm, and before 1.6 no zip files
        weights = {name: value for name, value in weights.items() if "num_batches" not in name}
    torch.save({"state_dict": weights, "meta": {}}, tmp_path / "net.pth",
               _use_new_zipfile_serialization=not old)
    net = load_net(tmp_path / "net.pth")
    assert net.arguments == {"num_classes": 11, "backbone": backbone, "bins": [1, 2, 3, 6]}
    assert net.class_names is None and not net.training
    assert not any(value.any() for value in net.state_dict().values())
