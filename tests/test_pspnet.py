"""The network against mmsegmentation 1.2.2's numbers (mmseg.pt), and FastPSPNet against PSPNet."""
import subprocess
import sys
from unittest.mock import ANY, Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import MMSEG, SCRIPTS
from fill import fill_state_dict, make_input, make_label
from torch._subclasses.fake_tensor import FakeTensorMode

import evaluate
from pspnet import (BACKBONES, CheckpointError, FastPSPNet, FastPyramidHead, PSPNet, PyramidHead,
                    load_backbone, load_net)

RECORDED = {"resnet18_v1c": "r18-d8", "resnet50_v1c": "r50-d8", "resnet101_v1c": "r101-d8",
            "resnet18": "r18b-d8", "resnet50": "r50b-d8", "resnet101": "r101b-d8"}


def filled_net(backbone, kind=PSPNet, bins=(1, 2, 3, 6)):
    """In float64, with the weights that mmsegmentation computed the recorded numbers with."""
    net = kind(19, backbone, bins)
    fill_state_dict(net.state_dict())
    return net.double()


def relative_error(actual, expected):
    """The largest difference as a share of the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("backbone", RECORDED)
def test_names_shapes_preprocessing_and_logits_of_all_six_variants_equal_mmsegmentations(backbone):
    net = filled_net(backbone, FastPSPNet).eval()
    recorded, images = MMSEG["models"][RECORDED[backbone]], MMSEG["preprocess"]
    assert {k: v.shape for k, v in net.state_dict().items()} == dict(recorded["keys"])
    rgb = images["bgr"].flip(2).permute(2, 0, 1)[None]  # there blue is first, and channels are last
    assert relative_error(net.normalize(rgb), images["out"]) < 1e-6
    expected = recorded["eval64"][1, 3, 65, 129]
    with torch.no_grad():
        stage3, stage4 = net.backbone(make_input((1, 3, 65, 129)).double())
        for kind in (PyramidHead, FastPyramidHead):
            assert relative_error(kind.forward(net.decode_head, stage4), expected["head"]) < 1e-9
        assert relative_error(net.auxiliary_head(stage3), expected["aux_head"]) < 1e-9


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize(("backbone", "kind", "layout"), [
    ("resnet50_v1c", FastPSPNet, torch.contiguous_format),
    ("resnet18", PSPNet, torch.contiguous_format), ("resnet18", FastPSPNet, torch.channels_last)])
def test_training_losses_gradients_and_statistics_equal_mmsegmentations(backbone, kind, layout):
    expected = MMSEG["models"][RECORDED[backbone]]["train64"]
    net = filled_net(backbone, kind).train().to(memory_format=layout)
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0
    net.normalize = lambda images: images  # the recorded input is normalised already
    label = make_label(2, 64, 128)
    loss, aux_loss = (F.cross_entropy(logits, label, ignore_index=255, reduction="none").mean()
                      for logits in net(make_input((2, 3, 64, 128)).double()))
    (loss + 0.4 * aux_loss).backward()
    assert relative_error(loss, expected["losses"]["decode.loss_ce"]) < 1e-9
    assert relative_error(0.4 * aux_loss, expected["losses"]["aux.loss_ce"]) < 1e-9
    norms = expected["grad_norm_all"]
    for name, p in net.named_parameters():
        assert abs(p.grad.norm() - norms[name]) < 1e-9 * max(norms.values()), name
    for name, gradient in expected["grads"].items():
        difference = net.get_parameter(name).grad.flatten()[:64] - gradient["first64"]
        assert difference.abs().max() < 1e-9 * gradient["norm"], name
    for name, statistic in expected["running_after"].items():
        assert relative_error(net.get_buffer(name), statistic) < 1e-9, name


def test_initialisation_has_mmsegmentations_statistics():
    torch.manual_seed(0)
    state = PSPNet().state_dict()
    for name, expected in MMSEG["init"]["r50-d8"].items():
        value = state[name].double()  # where the standard deviation is 0, exactly the mean
        tolerance = 6 * expected["std"] / value.numel() ** 0.5  # both are samples
        assert abs(value.mean() - expected["mean"]) <= tolerance, name
        assert abs(value.std(correction=0) - expected["std"]) <= tolerance, name


STEP_OF_THE_LESSONS = """
import sys, torch
from pspnet import PSPNet
from cityscapes import Cityscapes, TrainingStream
stream = TrainingStream(Cityscapes(sys.argv[1], "train"), (40, 64), seed=0)
images, labels = map(torch.stack, zip(stream[0], stream[1]))
net = PSPNet(19, "resnet18")
loss = sum(torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=255)
           for logits in net(images))
loss.backward()
torch.optim.SGD(net.parameters(), 0.01).step()
assert loss.isfinite()
"""


def test_the_lessons_alone_train_a_step(tmp_path, toy):
    for name in ("pspnet.py", "cityscapes.py"):
        lesson, _ = (SCRIPTS / name).read_text().split("\n# Here the lesson ends.")
        (tmp_path / name).write_text(lesson)
    subprocess.run([sys.executable, "-c", STEP_OF_THE_LESSONS, toy], cwd=tmp_path, check=True)


@pytest.mark.parametrize("bins", [(1, 2, 3, 6), (1, 2, 4, 8), ()])
def test_fast_network_equals_the_textbooks_in_value_every_gradient_and_statistics(bins):
    results = []
    for kind in (FastPSPNet, PSPNet):
        net = filled_net("resnet18", kind, bins).train()
        torch.manual_seed(0)  # the same images and dropout
        images, odd_images = torch.randint(256, (2, 3, 64, 96)), torch.randint(256, (2, 3, 33, 47))
        outputs = [*net(images), *net(odd_images)]
        loss = sum(output.square().mean() for output in outputs)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        results.append([*outputs, *gradients, *net.buffers()])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-11 * max(1, expected.abs().max())


def test_fast_head_is_as_accurate_as_the_textbooks_in_bfloat16_and_its_means_are_not_biased():
    torch.manual_seed(0)
    head = FastPyramidHead(256, 19).eval()
    x = torch.rand(1, 256, 33, 65) * torch.rand(1, 256, 1, 1)  # channels of many sizes
    with torch.no_grad():
        expected = head(x)
        with torch.autocast("cpu", torch.bfloat16):
            fast_error, textbook_error = ((kind.forward(head, x) - expected).norm()
                                          for kind in (FastPyramidHead, PyramidHead))
    assert fast_error < 1.2 * textbook_error
    for k, means in zip(head.bins, head.pool(x.bfloat16()), strict=True):
        assert relative_error(means.double().mean(), F.adaptive_avg_pool2d(x, k).mean()) < 6e-4


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (2, 100)])
def test_logits_have_the_size_of_the_images_and_bytes_equal_floats(size):
    net = FastPSPNet(num_classes=7, backbone="resnet18_v1c")
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    outputs = net.train()(images)
    logits, aux_logits = net.eval()(images)
    assert aux_logits is None and torch.equal(logits, net(images.float())[0])
    for output in (*outputs, logits):
        assert output.shape == (2, 7, *size) and output.dtype == torch.float32


@pytest.mark.skipif(torch.__version__ < (2, 11) or not torch.backends.cuda.is_built(),
                    reason="needs a PyTorch with CUDA, and before 2.11 its driver")
def test_nothing_is_on_another_device_than_the_network(monkeypatch):
    """On a machine without a GPU: the operations of one, on shapes without values."""
    monkeypatch.setattr(evaluate, "argmax_class", lambda scores: scores.argmax(dim=0))
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda:0"):
            net = FastPSPNet(backbone="resnet18")
            images = torch.zeros(2, 3, 65, 129, dtype=torch.uint8)
        outputs = [*net(images)]
        for protocol in ({}, {"scales": (0.5, 1.25)}, {"flip": True, "tile": (32, 48)}):
            outputs.append(evaluate.predict_averaged(net.eval(), images[0], **protocol))
        assert all(output.device == images.device for output in outputs)


def test_compiles_without_graph_breaks_and_gives_float32_under_autocast():
    net = torch.compile(FastPSPNet(backbone="resnet18"), fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        logits, aux_logits = net(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    assert logits.dtype == aux_logits.dtype == torch.float32  # at the labels' resolution


def test_exports_with_dynamic_height_and_width():
    net = FastPSPNet(backbone="resnet18").double().eval()
    # In multiples of 8: max pooling of torch before 2.15 wants to know the remainder.
    height, width = (8 * torch.export.Dim(name, min=2, max=512) for name in ("height", "width"))
    exported = torch.export.export(net, (torch.rand(1, 3, 64, 96) * 255,),
                                   dynamic_shapes={"images": {2: height, 3: width}}).module()
    images = torch.rand(1, 3, 40, 328) * 255
    assert relative_error(exported(images)[0], net(images)[0]) < 1e-12


@pytest.mark.usefixtures("all_cores")
def test_the_script_shows_that_both_networks_are_the_same(run_here):
    process = run_here("pspnet.py")
    for words in ("48,975,494 parameters", "FastPSPNet: 561 GFLOP", "\nPSPNet: 713 GFLOP"):
        assert words in process.stdout
    assert float(process.stdout.split()[-1]) < 1e-12


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_load_net_recognises_every_backbone_in_mmsegmentations_files(backbone, legacy, tmp_path):
    path = tmp_path / "net.pth"
    with torch.device("meta"):
        state = PSPNet(11, backbone).state_dict()
    # Each tensor is one zero seen many times, for a small file; old files lack counters.
    state = {name: torch.zeros(()).expand(value.shape)
             for name, value in state.items() if not (legacy and name.endswith("_tracked"))}
    torch.save({"state_dict": state, "meta": {}}, path, _use_new_zipfile_serialization=not legacy)
    net = load_net(path)
    assert net.arguments == {"num_classes": 11, "backbone": backbone, "bins": [1, 2, 3, 6]}
    assert net.class_names is None and not net.training
    assert all((value == 0).all() for value in net.state_dict().values())


@pytest.mark.parametrize("bins", [(1, 2, 3, 6), (2, 1, 6, 3), (1, 2, 4, 8), ()])
def test_load_net_builds_the_network_that_was_saved(tmp_path, bins):
    net = FastPSPNet(4, "resnet18", bins).eval()
    torch.save({"state_dict": net.state_dict(), "model": net.arguments, "classes": list("abcd")},
               tmp_path / "net.pt")
    loaded = load_net(tmp_path / "net.pt")
    images = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    assert torch.equal(loaded(images)[0], net(images)[0])
    assert (loaded.arguments, loaded.class_names) == (net.arguments, list("abcd"))


def test_load_net_refuses_everything_else_in_one_sentence_with_the_path(tmp_path):
    path = tmp_path / "net.pth"

    def refuses(words):
        with pytest.raises(CheckpointError) as refusal:
            load_net(path)
        message = str(refusal.value)
        assert str(path) in message and words in message and "\n" not in message, message

    keys = MMSEG["models"]["r18b-d8"]["keys"]
    state = {name: torch.zeros(()).expand(shape) for name, shape in keys}
    for legacy in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for damaged in (b"", b"404: not found\n", whole[: len(whole) // 2], whole[:-9]):
            path.write_bytes(damaged)
            refuses("cannot be read")
    for content, words in (
            ([torch.zeros(3)], "no dictionary of weights"),
            ({"state_dict": None}, "no dictionary of weights"),
            ({"state_dict": exec}, "exec"),
            ({"state_dict": {"weight": 3, 4: 5}}, "names, shapes"),
            ({"state_dict": {f"module.{name}": value for name, value in state.items()}},
             "'module.backbone.conv1.weight'"),
            ({"state_dict": {name: value.char() for name, value in state.items()}}, "types"),
            ({"state_dict": state, "model": "resnet18"}, "types are others"),
            ({"state_dict": state, "model": {"backbone": "resnet18", "bins": [1]}}, "shapes"),
            ({"state_dict": state, "meta": "strides=(1, 2, 2, 2)"}, "strides=(1, 2, 2, 2)"),
            ({"state_dict": state, "meta": {"config": "align_corners=True"}}, "align_corners")):
        torch.save(content, path)
        refuses(words)
    for name in ("nothing.pth", "."):
        with pytest.raises(OSError, match=str(tmp_path / name)):
            load_net(tmp_path / name)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101"])
def test_imagenet_weights_are_torchvisions_and_downloaded_once(backbone, tmp_path, monkeypatch):
    net, state = PSPNet(backbone=backbone), torchvision.models.get_model(backbone).state_dict()
    download = Mock(side_effect=lambda url, path, *_, **__: torch.save(state, path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    load_backbone(net, "imagenet")
    load_backbone(net, "imagenet")
    url = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    download.assert_called_once_with(url, ANY, url[-12:-4], progress=True)
    for name, value in net.backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_imagenet_weights_that_cannot_be_had_or_are_anothers_are_refused(tmp_path, monkeypatch):
    def refuses(words):
        with pytest.raises(CheckpointError, match=f"resnet18-f37072fd.pth.*{words}"):
            load_backbone(net, "imagenet")

    net = PSPNet(backbone="resnet18")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", Mock(side_effect=ValueError("the port is no number")))
    refuses("the port is no number.*--weights FILE")
    cached = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    cached.write_bytes(b"<!DOCTYPE html>")
    refuses("cannot be read")
    for content, words in ((exec, "exec was not an allowed global"),
                           (torchvision.models.resnet34().state_dict(), "not hold a resnet18")):
        torch.save(content, cached)
        refuses(words)
