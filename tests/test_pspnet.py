"""The network against mmsegmentation 1.2.2's numbers (mmseg.pt), and FastPSPNet against PSPNet."""
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import MMSEG, SCRIPTS
from fill import fill_state_dict, make_input, make_label
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import pspnet
from pspnet import (BACKBONES, CheckpointError, FastPSPNet, FastPyramidHead, PSPNet, PyramidHead,
                    load_backbone, load_net)

VARIANTS = {"r18-d8": "resnet18_v1c", "r50-d8": "resnet50_v1c", "r101-d8": "resnet101_v1c",
            "r18b-d8": "resnet18", "r50b-d8": "resnet50", "r101b-d8": "resnet101"}


def filled_net(variant, kind=PSPNet):
    """A network with the weights that mmsegmentation computed the recorded numbers with."""
    net = kind(backbone=VARIANTS[variant])
    net.load_state_dict(fill_state_dict(net.state_dict()))
    return net


def relative_error(actual, expected):
    """The largest difference as a share of the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# mmsegmentation -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_shapes_and_logits_of_all_six_variants_equal_mmsegmentations(variant):
    net, recorded = filled_net(variant), MMSEG["models"][variant]
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == {
        k: tuple(s) for k, s in recorded["keys"]}
    net.double().eval()
    fast = FastPSPNet(backbone=VARIANTS[variant]).double().eval()
    fast.load_state_dict(net.state_dict())
    for shape, expected in recorded["eval64"].items():
        with torch.no_grad():
            stage3, stage4 = net.backbone(make_input(shape).double())
            for head in (net.decode_head, fast.decode_head):
                assert relative_error(head(stage4), expected["head"]) < 1e-9
            assert relative_error(net.auxiliary_head(stage3), expected["aux_head"]) < 1e-9


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize(("variant", "kind", "memory_format"), [
    ("r50-d8", FastPSPNet, torch.contiguous_format), ("r18b-d8", PSPNet, torch.contiguous_format),
    ("r18b-d8", FastPSPNet, torch.channels_last)])
def test_training_losses_gradients_and_batch_norm_statistics_equal_mmsegmentations(
        variant, kind, memory_format):
    expected = MMSEG["models"][variant]["train64"]
    net = filled_net(variant, kind).double().train().to(memory_format=memory_format)
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0
    net.normalize = lambda images: images  # the recorded input is normalised already
    logits, aux_logits = net(make_input((2, 3, 64, 128)).double())
    label = make_label(2, 64, 128)
    loss = F.cross_entropy(logits, label, ignore_index=255, reduction="none").mean()
    aux_loss = 0.4 * F.cross_entropy(aux_logits, label, ignore_index=255, reduction="none").mean()
    (loss + aux_loss).backward()
    assert abs(loss / expected["losses"]["decode.loss_ce"] - 1) < 1e-9
    assert abs(aux_loss / expected["losses"]["aux.loss_ce"] - 1) < 1e-9
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert set(gradients) == set(expected["grad_norm_all"])
    largest = max(expected["grad_norm_all"].values())
    for name, norm in expected["grad_norm_all"].items():
        assert abs(gradients[name].norm().item() - norm) < 1e-9 * largest, name
    for name, gradient in expected["grads"].items():
        difference = (gradients[name].flatten()[:64] - gradient["first64"]).abs().max()
        assert difference < 1e-9 * gradient["norm"], name
    state = net.state_dict()
    for name, statistic in expected["running_after"].items():
        assert relative_error(state[name], statistic) < 1e-9, name


def test_initialisation_has_mmsegmentations_statistics():
    torch.manual_seed(0)
    state = PSPNet().state_dict()
    for name, expected in MMSEG["init"]["r50-d8"].items():
        value = state[name].double()
        if expected["std"] == 0 or value.numel() == 1:
            assert (value == expected["mean"]).all(), name
        else:  # both are samples of n: their spread differs by a factor of about 1 +- 1 / sqrt(n)
            n = value.numel()
            assert abs(value.std().item() / expected["std"] - 1) < 6 / n**0.5, name
            error = abs(value.mean().item() - expected["mean"])
            assert error < 6 * expected["std"] * (2 / n) ** 0.5, name


def test_preprocessing_equals_mmsegmentations():
    recorded = MMSEG["preprocess"]
    image = recorded["bgr"].flip(2).permute(2, 0, 1)[None]  # blue first, channels last -> RGB
    assert relative_error(PSPNet(backbone="resnet18").normalize(image), recorded["out"]) < 1e-6


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101"])
def test_imagenet_weights_are_torchvisions_v1_and_fit_the_backbone(name):
    assert BACKBONES[name][-1] == torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    with torch.device("meta"):
        ours, theirs = pspnet.ResNet(name), torchvision.models.get_model(name)
    del theirs.fc
    assert pspnet.shapes(ours.state_dict()) == pspnet.shapes(theirs.state_dict())


# The lesson, and the fast network --------------------------------------------------------------


STEP_OF_THE_LESSONS = """
import pickle, sys, torch
from pspnet import PSPNet
from cityscapes import Cityscapes, TrainingStream
stream = TrainingStream(Cityscapes(sys.argv[1], "train"), (40, 64), seed=0)
images, labels = (torch.stack(tensors) for tensors in zip(*[stream[k] for k in range(4)]))
torch.manual_seed(0)
net = PSPNet(19, "resnet18").train()
optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
losses = []
for _ in range(4):
    loss = sum(torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=255)
               for logits in net(images))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(losses)
assert losses[-1] < losses[0]
"""


def test_the_lessons_alone_train_a_step(tmp_path, toy):
    for name in ("pspnet.py", "cityscapes.py"):
        lesson, line, _ = (SCRIPTS / name).read_text().partition("\n# Here the lesson ends.")
        assert line
        (tmp_path / name).write_text(lesson)
    subprocess.run([sys.executable, "-c", STEP_OF_THE_LESSONS, toy], cwd=tmp_path, check=True)


@pytest.mark.parametrize("size", [(64, 128), (97, 97), (9, 17), (5, 3)])
@pytest.mark.parametrize(("batch", "training", "bins"), [
    (1, False, (1, 2, 3, 6)), (3, True, (1, 2, 3, 6)), (3, True, (1, 2, 4, 8)), (3, True, ())])
def test_fast_head_equals_textbook_head_in_value_every_gradient_and_statistics(
        size, batch, training, bins):
    torch.manual_seed(0)
    textbook = PyramidHead(16, 5, bins).double().train(training)
    fill_state_dict(textbook.state_dict())  # as if batch norm had learnt
    fast = FastPyramidHead(16, 5, bins).double().train(training)
    fast.load_state_dict(textbook.state_dict())
    x = torch.randn(batch, 16, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(batch, 5, *size, dtype=torch.float64)
    results = []
    for head in (fast, textbook):
        torch.manual_seed(1)  # the same dropout
        logits = head(x)
        gradients = torch.autograd.grad((logits * weight).sum(), [x, *head.parameters()])
        results.append([logits, *gradients, *(b.double() for b in head.buffers())])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-11 * max(1, expected.abs().max())


@pytest.mark.parametrize("size", [(64, 96), (49, 67)])
def test_fast_network_equals_the_textbooks_in_value_every_gradient_and_statistics(size):
    net = filled_net("r18b-d8").double().train()
    fast = FastPSPNet(backbone="resnet18").double().train()
    fast.load_state_dict(net.state_dict())
    images = torch.randint(256, (2, 3, *size))
    results = []
    for network in (fast, net):
        torch.manual_seed(1)
        logits, aux_logits = network(images)
        loss = (logits.square() + aux_logits.square()).mean()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        results.append([logits, aux_logits, *gradients, *(b.double() for b in network.buffers())])
    largest = max(gradient.abs().max() for gradient in results[1])
    for actual, expected in zip(*results, strict=True):
        # A bias before a batch norm has a gradient of 0, but for rounding: hence not to itself.
        assert (actual - expected).abs().max() <= 1e-11 * largest


def test_training_takes_at_most_four_fifths_of_the_textbooks_multiply_adds():
    operations = []
    for kind in (FastPSPNet, PSPNet):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            sum(output.sum() for output in kind()(torch.empty(2, 3, 512, 1024))).backward()
        operations.append(counter.get_total_flops())
    assert operations[0] <= 0.80 * operations[1]


def test_fast_head_is_as_accurate_as_the_textbooks_in_bfloat16_and_its_means_are_not_biased():
    torch.manual_seed(0)
    fast, textbook = FastPyramidHead(256, 19).eval(), PyramidHead(256, 19).eval()
    fast.load_state_dict(textbook.state_dict())
    x = torch.rand(1, 256, 33, 65)
    with torch.no_grad():
        expected = textbook(x)
        with torch.autocast("cpu", torch.bfloat16):
            fast_error = (fast(x).float() - expected).pow(2).mean().sqrt()
            textbook_error = (textbook(x).float() - expected).pow(2).mean().sqrt()
            pooled = fast.pool(x.bfloat16())
    assert fast_error < 1.2 * textbook_error
    for k, means in zip(fast.bins, pooled, strict=True):
        exact = F.adaptive_avg_pool2d(x.bfloat16().double(), k)
        assert means.double().mean().item() == pytest.approx(exact.mean().item(), rel=1e-3)


def test_upsample_equals_interpolate():
    x = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    for size in ((64, 128), (65, 129), (31, 20)):
        expected = F.interpolate(x, size, mode="bilinear", align_corners=False)
        assert (FastPSPNet(backbone="resnet18").upsample(x, size) - expected).abs().max() < 1e-12


# The network's contract ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PSPNet, FastPSPNet])
@pytest.mark.parametrize("size", [(33, 47), (1, 1), (2, 100)])
def test_logits_have_the_size_of_the_images_and_bytes_equal_floats(size, kind):
    torch.manual_seed(0)
    net = kind(num_classes=7, backbone="resnet18_v1c")
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    logits, aux_logits = net.train()(images)
    assert logits.shape == aux_logits.shape == (2, 7, *size)
    assert logits.dtype == aux_logits.dtype == torch.float32
    with torch.no_grad():
        logits, aux_logits = net.eval()(images)
        assert logits.shape == (2, 7, *size) and aux_logits is None
        assert torch.equal(logits, net(images.float())[0])


@pytest.mark.skipif(torch.__version__ < (2, 11) or not torch.backends.cuda.is_built(),
                    reason="needs a PyTorch with CUDA, and before 2.11 its driver")
def test_nothing_is_on_another_device_than_the_network():
    """On a machine without a GPU: the operations of one, on shapes without values."""
    with FakeTensorMode(), torch.no_grad():
        net = FastPSPNet(backbone="resnet18")
        state = {name: torch.empty(value.shape, dtype=value.dtype, device="cuda:0")
                 for name, value in net.state_dict().items()}
        net.load_state_dict(state, assign=True)
        images = torch.zeros(2, 3, 65, 129, dtype=torch.uint8, device="cuda:0")
        outputs = [*net.train()(images), net.eval()(images)[0]]
        for protocol in ({}, {"scales": (0.5, 1.25)}, {"flip": True}, {"tile": (32, 48)},
                         {"scales": (0.5, 1), "flip": True, "tile": (32, 48)}):
            with pytest.MonkeyPatch.context() as patch:  # whether all are finite nobody can know
                patch.setattr(evaluate, "argmax_class", lambda scores: scores.max(dim=0).indices)
                outputs.append(evaluate.predict_averaged(net, images[0], **protocol))
        assert all(output.device == images.device for output in outputs)


def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    net = FastPSPNet(backbone="resnet18", bins=(2, 3, 6)).train()
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")  # needs no C++ compiler
    with torch.autocast("cpu", torch.bfloat16):
        outputs, expected = compiled(images), net(images)
    for actual, reference in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float32  # the labels' resolution, in full precision
        assert relative_error(actual, reference) < 0.05


def test_exports_with_dynamic_height_and_width():
    torch.manual_seed(0)
    net = FastPSPNet(backbone="resnet18").double().eval()
    # In multiples of 8: max pooling of torch before 2.15 wants to know the remainder.
    height, width = (8 * torch.export.Dim(name, min=2, max=512) for name in ("height", "width"))
    exported = torch.export.export(net, (torch.rand(1, 3, 64, 96) * 255,),
                                   dynamic_shapes={"images": {2: height, 3: width}}).module()
    for size in ((64, 96), (72, 136), (40, 328)):
        images = torch.rand(1, 3, *size) * 255
        with torch.no_grad():
            assert relative_error(exported(images)[0], net(images)[0]) < 1e-12


@pytest.mark.usefixtures("all_cores")
def test_the_script_shows_that_both_networks_are_the_same(run_here):
    process = run_here("pspnet.py")
    for words in ("48,975,494 parameters", "FastPSPNet: 561 GFLOP", "\nPSPNet: 713 GFLOP"):
        assert words in process.stdout
    assert float(process.stdout.split()[-1]) < 1e-12


# Checkpoints --------------------------------------------------------------------------------------


def mmsegmentation_file(path, backbone, num_classes=19, legacy=False, config="", without=()):
    """A file like those mmsegmentation published: `meta` and `state_dict`; each tensor is one zero
    seen many times, so that it is small."""
    with torch.device("meta"):
        state = PSPNet(num_classes, backbone).state_dict()
    state = type(state)((k, torch.zeros((), dtype=v.dtype).expand(v.shape))
                        for k, v in state.items() if not k.endswith(without))
    meta = {"mmseg_version": "0.5.0", "config": config, "CLASSES": ("road", "sidewalk")}
    torch.save({"meta": meta, "state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_load_net_recognises_every_backbone_in_mmsegmentations_files(backbone, legacy, tmp_path):
    without = ("num_batches_tracked",) if legacy else ()  # older files lack batch norm's counters
    path = mmsegmentation_file(tmp_path / "net.pth", backbone, 11, legacy, without=without)
    net = load_net(path)
    assert (net.arguments["backbone"], net.arguments["num_classes"]) == (backbone, 11)
    assert net.arguments["bins"] == [1, 2, 3, 6] and net.class_names is None and not net.training
    assert all(not value.is_meta and (value == 0).all() for value in net.state_dict().values())


@pytest.mark.parametrize("bins", [(1, 2, 3, 6), (2, 1, 6, 3), (1, 2, 4, 8), (1,), ()])
def test_load_net_builds_the_network_that_was_saved(tmp_path, bins):
    torch.manual_seed(0)
    net = FastPSPNet(4, "resnet18", bins).eval()
    torch.save({"state_dict": net.state_dict(), "model": net.arguments, "classes": list("abcd")},
               tmp_path / "net.pt")
    loaded = load_net(tmp_path / "net.pt")
    images = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded(images)[0], net(images)[0])
    assert (loaded.arguments, loaded.class_names) == (net.arguments, list("abcd"))


def test_load_net_refuses_everything_else_in_one_sentence(tmp_path):
    path = tmp_path / "net.pth"

    def refused(words):
        with pytest.raises(CheckpointError) as refusal:
            load_net(path)
        message = str(refusal.value)
        assert str(path) in message and words in message and "\n" not in message, message

    state = torch.load(mmsegmentation_file(path, "resnet18"), weights_only=True)["state_dict"]
    for content, words in (
            ([torch.zeros(3)], "no dictionary of weights"),
            ({"state_dict": None}, "no dictionary of weights"),
            ({"net": {}}, "names, shapes"),
            ({"state_dict": {"weight": 3, 4: 5}}, "names, shapes"),
            ({"state_dict": {"decode_head.conv_seg.bias": torch.zeros(2, 3)}}, "names, shapes"),
            ({"state_dict": re.compile("code")}, "re._compile"),
            ({"state_dict": {f"module.{name}": value for name, value in state.items()}},
             "'module.backbone.conv1.weight'"),
            ({"state_dict": {name: value.char() for name, value in state.items()}}, "types"),
            ({"state_dict": state, "model": "resnet18"}, "types are others"),
            ({"state_dict": state, "model": {"backbone": "resnet18", "bins": [1]}}, "shapes")):
        torch.save(content, path)
        refused(words)
    for options, words in (({"without": ("conv_seg.weight",)}, "names, shapes"),
                           ({"config": "strides=(1, 2, 2, 2)"}, "strides=(1, 2, 2, 2)"),
                           ({"config": "align_corners=True"}, "align_corners=True")):
        mmsegmentation_file(path, "resnet50", **options)
        refused(words)
    damaged = [b"", b"404: not found\n"]
    for legacy in (True, False):
        whole = mmsegmentation_file(path, "resnet18", legacy=legacy).read_bytes()
        damaged += [whole[: int(share * len(whole))] for share in (0.1, 0.5, 0.999)]
    for content in damaged:
        path.write_bytes(content)
        refused("cannot be read")
    for name in ("nothing.pth", "."):
        with pytest.raises(OSError, match=str(tmp_path / name)):
            load_net(tmp_path / name)


def test_load_backbone_reads_a_classifiers_weights_and_refuses_anothers(tmp_path):
    torch.manual_seed(0)
    classifier = torchvision.models.resnet18()
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    net = PSPNet(backbone="resnet18")
    load_backbone(net, tmp_path / "resnet18.pth")
    assert torch.equal(net.backbone.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)
    for backbone in ("resnet18_v1c", "resnet50"):
        with pytest.raises(CheckpointError, match=backbone):
            load_backbone(PSPNet(backbone=backbone), tmp_path / "resnet18.pth")


def test_imagenet_weights_are_downloaded_once_and_never_run_as_code(tmp_path, monkeypatch):
    def download(url, path, sha256, progress):
        downloads.append((url, sha256))
        torch.save(torchvision.models.resnet18().state_dict(), path)

    downloads, net = [], PSPNet(backbone="resnet18")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    load_backbone(net, "imagenet")
    load_backbone(net, "imagenet")
    assert downloads == [(BACKBONES["resnet18"][-1], "f37072fd")]
    cached = next(tmp_path.rglob("resnet18-f37072fd.pth"))
    for damage in (b"", cached.read_bytes()[:1000], b"<!DOCTYPE html>"):
        cached.write_bytes(damage)
        with pytest.raises(CheckpointError, match=f"{cached} cannot be read"):
            load_backbone(net, "imagenet")
    torch.save(re.compile("code"), cached)
    with pytest.raises(CheckpointError, match=f"{cached}.*GLOBAL re._compile was not"):
        load_backbone(net, "imagenet")


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("the port is no number")])
def test_load_backbone_says_what_to_do_when_the_download_fails(tmp_path, monkeypatch, error):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", Mock(side_effect=error))
    with pytest.raises(CheckpointError, match=f"resnet18-f37072fd.pth.*{error}.*--weights"):
        load_backbone(PSPNet(backbone="resnet18"), "imagenet")
