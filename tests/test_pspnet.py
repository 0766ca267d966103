"""The networks against mmsegmentation's numbers and each other, and files of weights."""
import re
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
                    check_settings, load_backbone, load_net)

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


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_names_shapes_preprocessing_and_logits_equal_mmsegmentations(backbone):
    recorded = MMSEG[RECORDED[backbone]]
    net = filled_net(PSPNet, backbone).eval()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes == recorded["shapes"]
    bgr = MMSEG["preprocess"]["bgr"]  # (H, W, 3): there blue is first, and channels are last
    normalized = net.normalize(bgr.flip(2).permute(2, 0, 1)[None])
    assert relative_error(normalized, MMSEG["preprocess"]["out"]) < 1e-6  # float32
    expected = recorded["logits"]
    with torch.no_grad():
        stage3, stage4 = net.backbone(make_input((1, 3, 65, 129)).double())
        assert relative_error(net.auxiliary_head(stage3), expected["aux_head"]) < 1e-9
        assert relative_error(net.decode_head(stage4), expected["head"]) < 1e-9
        fast_head = FastPyramidHead(stage4.shape[1], 19).double().eval()
        fast_head.load_state_dict(net.decode_head.state_dict())
        assert relative_error(fast_head(stage4), expected["head"]) < 1e-9


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize(("kind", "backbone", "layout"), [
    (PSPNet, "resnet50_v1c", torch.contiguous_format),
    (FastPSPNet, "resnet18", torch.channels_last)])
def test_training_losses_gradients_and_statistics_equal_mmsegmentations(kind, backbone, layout):
    recorded = MMSEG[RECORDED[backbone]]["step"]
    net = filled_net(kind, backbone).train().to(memory_format=layout)
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0
    net.normalize = lambda images: images  # the recorded input is normalized already
    logits, aux_logits = net(make_input((2, 3, 64, 128)).double())
    labels = make_label(2, 64, 128)
    loss = F.cross_entropy(logits, labels, ignore_index=255, reduction="none").mean()
    aux_loss = F.cross_entropy(aux_logits, labels, ignore_index=255, reduction="none").mean()
    (loss + 0.4 * aux_loss).backward()
    assert relative_error(loss, recorded["losses"]["decode.loss_ce"]) < 1e-9
    assert relative_error(0.4 * aux_loss, recorded["losses"]["aux.loss_ce"]) < 1e-9
    norms = recorded["norms"]  # of every parameter's gradient
    for name, parameter in net.named_parameters():
        assert abs(parameter.grad.norm() - norms[name]) < 1e-9 * max(norms.values()), name
    for name, gradient in recorded["grads"].items():  # the first 16 values
        difference = net.get_parameter(name).grad.flatten()[:16] - gradient
        assert difference.abs().max() < 1e-9 * max(norms.values()), name
    for name, statistic in recorded["statistics"].items():  # of batch norm, 16 values as well
        assert relative_error(net.get_buffer(name).flatten()[:16], statistic) < 1e-9, name


def test_new_weights_have_the_mean_and_deviation_of_mmsegmentations():
    torch.manual_seed(0)
    weights = PSPNet().state_dict()
    for name, recorded in MMSEG["init"].items():
        value = weights[name].double()
        tolerance = 6 * recorded["std"] / value.numel() ** 0.5  # both are random, or constants
        assert abs(value.mean() - recorded["mean"]) <= tolerance, name
        assert abs(value.std(correction=0) - recorded["std"]) <= tolerance, name


@pytest.mark.parametrize("bins", [(1, 2, 3, 6), (1, 2, 4, 8), (2,), ()])
def test_fast_network_has_the_values_gradients_and_statistics_of_the_textbooks(bins):
    results = []
    for kind in (PSPNet, FastPSPNet):
        net, outputs = filled_net(kind, "resnet18", bins), []
        torch.manual_seed(0)  # the same images and dropout
        for size in ((48, 80), (33, 47), (2, 100), (1, 1)):
            outputs += net(torch.randint(256, (2, 3, *size)))
        sum(output.square().mean() for output in outputs).backward()
        results.append([*outputs, *[p.grad for p in net.parameters()], *net.buffers()])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-11 * max(1, expected.abs().max())


def test_fast_head_is_about_as_accurate_in_bfloat16_as_the_textbooks():
    torch.manual_seed(0)
    textbook, fast = PyramidHead(256, 19).eval(), FastPyramidHead(256, 19).eval()
    fast.load_state_dict(textbook.state_dict())
    x = torch.rand(1, 256, 33, 65) * torch.rand(1, 256, 1, 1)  # channels of many sizes
    with torch.no_grad():
        expected = textbook(x)
        with torch.autocast("cpu", torch.bfloat16):
            error, fast_error = (textbook(x) - expected).norm(), (fast(x) - expected).norm()
    assert fast_error < 1.5 * error


@pytest.mark.skipif(torch.__version__ < (2, 11) or not torch.backends.cuda.is_built(),
                    reason="needs a PyTorch with CUDA, and before 2.11 its driver")
def test_nothing_is_on_another_device_than_the_network(monkeypatch):
    monkeypatch.setattr(evaluate, "argmax_class", lambda scores: scores.argmax(dim=0))
    with FakeTensorMode(), torch.no_grad():  # a GPU's operations, without values and without a GPU
        with torch.device("cuda:0"):
            net = FastPSPNet(backbone="resnet18")
            images = torch.zeros(2, 3, 65, 129, dtype=torch.uint8)
        outputs = [*net(images), evaluate.predict_averaged(
            net.eval(), images[0], scales=(0.5,), flip=True, tile=(24, 48))]
        assert all(output.device == images.device for output in outputs)


def test_compiles_whole_and_gives_float32_logits_of_the_images_size_under_autocast():
    net = torch.compile(FastPSPNet(7, "resnet18"), fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        logits, aux_logits = net(torch.zeros(2, 3, 33, 47, dtype=torch.uint8))
    assert logits.shape == aux_logits.shape == (2, 7, 33, 47)
    assert logits.dtype == aux_logits.dtype == torch.float32


def test_exports_with_dynamic_height_and_width():
    net = FastPSPNet(backbone="resnet18").double().eval()
    # In multiples of 8: max pooling of torch before 2.15 wants to know the remainder.
    height, width = (8 * torch.export.Dim(name, min=2, max=512) for name in ("height", "width"))
    exported = torch.export.export(net, (255 * torch.rand(1, 3, 64, 96),),
                                   dynamic_shapes={"images": {2: height, 3: width}}).module()
    images = 255 * torch.rand(1, 3, 40, 328)
    assert relative_error(exported(images)[0], net(images)[0]) < 1e-12


def test_script_prints_size_cost_and_that_both_networks_are_the_same():
    parameters, cost, fast_cost, difference = run_script("pspnet.py").stdout.splitlines()
    assert parameters == "48,975,494 parameters"
    assert cost.startswith("PSPNet: 713 GFLOP") and fast_cost.startswith("FastPSPNet: 562 GFLOP")
    assert float(difference.split()[-1]) < 1e-12


STEP = """import sys, torch, cityscapes, pspnet
stream = cityscapes.TrainingStream(cityscapes.Cityscapes(sys.argv[1], "train"), (40, 64))
images, labels = torch.utils.data.default_collate([stream[0], stream[1]])
net = pspnet.PSPNet(19, "resnet18")
torch.nn.functional.cross_entropy(sum(net(images)), labels.long(), ignore_index=255).backward()
torch.optim.SGD(net.parameters(), 0.01).step()"""


def test_the_two_lessons_alone_train_a_step(tmp_path, toy):
    for name in ("pspnet.py", "cityscapes.py"):
        lesson, _ = (SCRIPTS / name).read_text().split("\n# Here the lesson ends.")
        (tmp_path / name).write_text(lesson)
    subprocess.run([sys.executable, "-c", STEP, toy], cwd=tmp_path, check=True)


def zero_weights(backbone, num_classes):
    """As in a file of mmsegmentation, but each tensor is one zero that is seen many times."""
    weights = {}
    for name, shape in MMSEG[RECORDED[backbone]]["shapes"].items():
        shape = (num_classes, *shape[1:]) if ".conv_seg." in name else shape
        weights[name] = torch.zeros(()).expand(shape)
    return weights


@pytest.mark.parametrize("backbone", BACKBONES)
def test_load_net_recognizes_every_backbone_in_mmsegmentations_files(backbone, tmp_path):
    torch.save({"state_dict": zero_weights(backbone, 11)}, tmp_path / "net.pth")
    net = load_net(tmp_path / "net.pth")
    assert net.arguments == {"num_classes": 11, "backbone": backbone, "bins": [1, 2, 3, 6]}
    assert net.class_names is None and not net.training
    assert not any(value.any() for value in net.state_dict().values())


@pytest.mark.parametrize("bins", [(1, 2, 3, 6), (2, 1, 6, 3), (1, 2, 4, 8), ()])
def test_load_net_builds_the_network_that_was_saved_and_bytes_equal_floats(bins, tmp_path):
    net, path = FastPSPNet(2, "resnet18", bins).eval(), tmp_path / "net.pt"
    torch.save({"state_dict": net.state_dict(), "model": net.arguments, "classes": [8, 9]}, path)
    loaded = load_net(path)
    assert (loaded.arguments, loaded.class_names) == (net.arguments, ["8", "9"])
    images = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    logits, aux_logits = loaded(images)
    assert torch.equal(logits, net(images.float())[0]) and aux_logits is None


@pytest.mark.parametrize("old", [True, False])
def test_load_net_reads_files_of_old_and_new_pytorch_and_refuses_damaged_ones(old, tmp_path):
    path, weights = tmp_path / "net.pth", PSPNet(19, "resnet18").state_dict()
    for name, zero in zero_weights("resnet18", 19).items():
        weights[name] = zero
        if old and "num_batches" in name:  # There was none before 1.0. (Zip files came with 1.6.)
            del weights[name]
    torch.save(weights, path, _use_new_zipfile_serialization=not old)
    assert not load_net(path).backbone.conv1.weight.any()
    whole = path.read_bytes()
    for damaged in (b"", b"404: not found\n", whole[: len(whole) // 2], whole[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"^{path} cannot be read .*\Z"):  # one line
            load_net(path)
    with pytest.raises(OSError, match="nothing.pth"):
        load_net(tmp_path / "nothing.pth")


def test_load_net_refuses_what_is_no_network_of_ours_and_runs_no_code(tmp_path):
    path, weights = tmp_path / "net.pth", zero_weights("resnet18", 19)
    for content, reason in (
            ({"state_dict": exec}, "cannot be read .*exec"),
            ({"state_dict": None}, "no dictionary"),
            ([torch.zeros(3)], "no dictionary"),
            ({"state_dict": {f"module.{name}": weights[name] for name in weights}}, "no PSPNet"),
            ({"state_dict": {}, "model": {"backbone": "resnet18"}}, "no PSPNet .*backbone.conv1"),
            ({"state_dict": weights, "model": {"backbone": "resnet18", "bins": [1]}}, "no PSPNet")):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=rf"^{path} .*{reason}.*\Z"):  # one line
            load_net(path)


OURS = """backbone=dict(dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), style='pytorch')
pool_scales = (1, 2, 3, 6), init_cfg=dict(type='Normal', std=0.01), align_corners=False
mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]"""
OTHERS = ("strides=(1, 2, 2, 2)", "dilations=(1, 1, 1, 1)", "pool_scales=(1, 2, 3)",
          "align_corners=True", "style='caffe'", "mean=[0, 0, 0]", "std=[1.0, 1.0, 1.0]")
WAYS_TO_WRITE = ({}, {" ": ""}, {" ": "\r\n\t"}, {"=": " = "}, {")": "\n,)", "]": "\n,]"},
                 {"(": "[", ")": "]"}, {"[": "(", "]": ")"}, {"=": "': "})


def test_other_settings_of_mmsegmentation_are_refused_however_written_and_ours_accepted():
    for way in map(str.maketrans, WAYS_TO_WRITE):
        check_settings(OURS.translate(way))
        for setting in OTHERS:
            with pytest.raises(ValueError, match=f"trained with {setting.partition('=')[0]}="):
                check_settings(setting.translate(way))


def test_load_net_finds_settings_and_names_in_files_of_mmsegmentation_0_and_1(tmp_path):
    path, names = tmp_path / "net.pth", [f"class {i}" for i in range(19)]
    for meta in ({"config": OURS, "CLASSES": tuple(names)},
                 {"cfg": OURS, "dataset_meta": {"classes": tuple(names)}}):
        torch.save({"state_dict": zero_weights("resnet18", 19), "meta": meta}, path)
        assert load_net(path).class_names == names
    for key in ("config", "cfg"):
        torch.save({"state_dict": {}, "meta": {key: "align_corners=True"}}, path)
        with pytest.raises(CheckpointError, match="align_corners=True"):
            load_net(path)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101"])
def test_imagenet_weights_are_torchvisions_and_downloaded_once(backbone, tmp_path, monkeypatch):
    weights = torchvision.models.get_model(backbone).state_dict()
    url = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    load = Mock(wraps=torch.hub.load_state_dict_from_url)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    monkeypatch.setattr(torch.hub, "download_url_to_file",
                        lambda url, path, *_, **__: torch.save(weights, path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    net = PSPNet(backbone=backbone)
    load_backbone(net, "imagenet")
    load_backbone(net, "imagenet")
    load.assert_called_once_with(url, map_location="cpu", check_hash=True, weights_only=True)
    for name, value in net.backbone.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_weights_that_cannot_be_had_or_are_anothers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", Mock(side_effect=OSError("no net")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    address = "https://download.openmmlab.com/pretrain/third_party/resnet18_v1c-b5776b93.pth"
    with pytest.raises(CheckpointError, match=rf"{address} \(no net\): give --weights FILE"):
        load_backbone(PSPNet(backbone="resnet18_v1c"), "imagenet")
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="file.pth holds no resnet18"):
        load_backbone(PSPNet(backbone="resnet18"), tmp_path / "file.pth")
