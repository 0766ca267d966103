"""The network against mmsegmentation 1.2.2's numbers (mmseg.pt), torchvision's ResNets and the
textbook's pyramid head."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from fill import fill_state_dict, make_input, make_label
from torch.utils._python_dispatch import TorchDispatchMode

import pspnet
from conftest import MMSEG
from pspnet import BACKBONES, CheckpointError, PSPNet, PyramidHead, load_backbone, load_net

VARIANTS = {"r50-d8": "resnet50_v1c", "r18b-d8": "resnet18"}


def filled_net(variant):
    """A PSPNet with the weights that mmsegmentation computed the recorded numbers with."""
    net = PSPNet(backbone=VARIANTS[variant])
    net.load_state_dict(fill_state_dict(net.state_dict()))
    return net


def images_for(normalised):
    """Grey levels that the network's own normalisation turns into the given input."""
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (pspnet.MEAN, pspnet.STD)
    )
    return (normalised.double() * std + mean).to(normalised.dtype)


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# mmsegmentation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_shapes_and_parameter_counts_are_mmsegmentations(variant):
    net, recorded = PSPNet(backbone=VARIANTS[variant]), MMSEG["models"][variant]
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == {
        k: tuple(s) for k, s in recorded["keys"]
    }
    assert sum(p.numel() for p in net.parameters()) == recorded["n_params"]
    auxiliary = sum(p.numel() for p in net.auxiliary_head.parameters())
    assert recorded["n_params"] - auxiliary == recorded["n_params_no_aux"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("recorded", "dtype", "tolerance"),
    [("eval", torch.float32, 1e-5), ("eval64", torch.float64, 1e-9)],
)
def test_logits_equal_mmsegmentations(variant, recorded, dtype, tolerance):
    net = filled_net(variant).to(dtype).eval()
    for shape, expected in MMSEG["models"][variant][recorded].items():
        images = images_for(make_input(shape).to(dtype))
        with torch.no_grad():
            stage3, stage4 = net.backbone(net.normalize(images))
            assert relative_error(net.decode_head(stage4), expected["head"]) < tolerance
            assert relative_error(net.auxiliary_head(stage3), expected["aux_head"]) < tolerance
            if "argmax" in expected:
                assert torch.equal(net(images)[0].argmax(1).byte(), expected["argmax"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_losses_gradients_and_batch_norm_statistics_equal_mmsegmentations(variant):
    expected = MMSEG["models"][variant]["train64"]
    net = filled_net(variant).double().train()
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0
    logits, aux_logits = net(images_for(make_input((2, 3, 64, 128)).double()))
    label = make_label(2, 64, 128)
    loss = F.cross_entropy(logits, label, ignore_index=255, reduction="none").mean()
    aux_loss = 0.4 * F.cross_entropy(aux_logits, label, ignore_index=255, reduction="none").mean()
    (loss + aux_loss).backward()
    assert abs(loss / expected["losses"]["decode.loss_ce"] - 1) < 1e-9
    assert abs(aux_loss / expected["losses"]["aux.loss_ce"] - 1) < 1e-9
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert set(gradients) == set(expected["grad_norm_all"])
    for name, norm in expected["grad_norm_all"].items():
        assert abs(gradients[name].norm().item() / norm - 1) < 1e-9, name
    for name, gradient in expected["grads"].items():
        assert relative_error(gradients[name].flatten()[:64], gradient["first64"]) < 1e-9, name
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
            assert (
                abs(value.mean().item() - expected["mean"]) < 6 * expected["std"] * (2 / n) ** 0.5
            ), name


def test_preprocessing_equals_mmsegmentations():
    recorded = MMSEG["preprocess"]
    image = (
        recorded["bgr"].flip(2).permute(2, 0, 1)[None]
    )  # blue first, channels last -> RGB, first
    assert torch.allclose(
        PSPNet(backbone="resnet18").normalize(image), recorded["out"], rtol=1e-6, atol=1e-6
    )


# The backbones ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_backbone_equals_torchvisions_with_dilation(name):
    torch.manual_seed(0)
    theirs = (
        torchvision.models.get_model(name, replace_stride_with_dilation=[False, True, True])
        .double()
        .eval()
    )
    ours = pspnet.ResNet(name).double().eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        stage3, stage4 = ours(x)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        expected3 = theirs.layer3(theirs.layer2(theirs.layer1(x)))
        assert relative_error(stage3, expected3) < 1e-12
        assert relative_error(stage4, theirs.layer4(expected3)) < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101"])
def test_imagenet_weights_are_torchvisions_v1(name):
    assert BACKBONES[name][-1] == torchvision.models.get_model_weights(name).IMAGENET1K_V1.url


# The exact pyramid head -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 128), (90, 90), (97, 97), (128, 256), (9, 17), (5, 3)])
@pytest.mark.parametrize(("batch", "training"), [(1, False), (3, False), (3, True)])
def test_exact_head_equals_textbook_head_in_value_and_every_gradient(size, batch, training):
    torch.manual_seed(0)
    head = PyramidHead(16, 5).double().train(training)
    for name, value in head.state_dict().items():  # statistics that batch norm would have learnt
        if name.endswith(("running_mean", "bn.bias")):
            value.normal_()
        if name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5)
    statistics = {name: value.clone() for name, value in head.state_dict().items()}
    x = torch.randn(batch, 16, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(batch, 5, *size, dtype=torch.float64)
    results = []
    for forward in (head.forward, head.textbook_forward):
        head.load_state_dict(statistics)
        torch.manual_seed(1)  # the same dropout
        logits = forward(x)
        gradients = torch.autograd.grad((logits * weight).sum(), [x, *head.parameters()])
        results.append([logits, *gradients, *(b.double() for b in head.buffers())])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-12 * max(1, expected.abs().max())


class LargestOutput(TorchDispatchMode):
    """Notes the shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.shapes += [
            tuple(t.shape)
            for t in (output if isinstance(output, tuple) else (output,))
            if torch.is_tensor(t)
        ]
        return output


def test_no_tensor_of_twice_the_features_channels_at_their_resolution():
    head, x = PyramidHead(64, 5).eval(), torch.randn(1, 64, 24, 40)
    for forward, expected in ((head.forward, False), (head.textbook_forward, True)):
        with LargestOutput() as seen, torch.no_grad():
            forward(x)
        assert any(np.prod(shape) >= 128 * 24 * 40 for shape in seen.shapes) == expected


@pytest.mark.parametrize("training", [False, True])
def test_multiply_adds_are_at_most_four_fifths_of_the_textbooks(training, monkeypatch):
    with torch.device("meta"):
        net = PSPNet()
    exact = pspnet.count_gflops(net, (2, 3, 512, 1024), training)
    monkeypatch.setattr(PyramidHead, "forward", PyramidHead.textbook_forward)
    assert exact <= 0.80 * pspnet.count_gflops(net, (2, 3, 512, 1024), training)


def test_exact_head_is_as_accurate_as_the_textbooks_in_bfloat16():
    torch.manual_seed(0)
    head, x = PyramidHead(256, 19).eval(), torch.randn(1, 256, 33, 65)
    with torch.no_grad():
        expected = head.textbook_forward(x)
        with torch.autocast("cpu", torch.bfloat16):
            exact_error = (head(x).float() - expected).pow(2).mean().sqrt()
            textbook_error = (head.textbook_forward(x).float() - expected).pow(2).mean().sqrt()
    assert exact_error < 1.2 * textbook_error


def test_channels_last_gives_the_same():
    torch.manual_seed(0)
    net, images = PSPNet(backbone="resnet18").eval(), torch.rand(2, 3, 65, 129) * 255
    with torch.no_grad():
        expected = net(images)[0]
        net.to(memory_format=torch.channels_last)
        actual = net(images.to(memory_format=torch.channels_last))[0]
    assert relative_error(actual, expected) < 1e-4


def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    net = PSPNet(backbone="resnet18").train()
    net.decode_head.dropout.p = net.auxiliary_head.dropout.p = 0.0
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")  # needs no C++ compiler
    with torch.autocast("cpu", torch.bfloat16):
        outputs = compiled(images)
        expected = net(images)
    for actual, reference in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float32  # the labels' resolution, in full precision
        assert relative_error(actual, reference) < 0.05


def test_exports_with_dynamic_height_and_width():
    torch.manual_seed(0)
    net = PSPNet(backbone="resnet18").eval()
    any_size = torch.__version__ >= (2, 15)  # max pooling of torch 2.11 wants to know the remainder
    step = 1 if any_size else 8
    height, width = (
        step * torch.export.Dim(name, min=16 // step, max=4096 // step)
        for name in ("height", "width")
    )
    exported = torch.export.export(
        net,
        (torch.rand(1, 3, 64, 96) * 255,),
        dynamic_shapes={"images": {2: height, 3: width}},
    ).module()
    for size in ((64, 96), (72, 136), (40, 328), *[(65, 129), (40, 333)] * any_size):
        images = torch.rand(1, 3, *size) * 255
        with torch.no_grad():
            assert relative_error(exported(images)[0], net(images)[0]) < 1e-5


# The network's contract ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (1, 1), (8, 100)])
def test_logits_have_the_size_of_the_images_and_bytes_equal_floats(size):
    torch.manual_seed(0)
    net = PSPNet(num_classes=7, backbone="resnet18_v1c")
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    logits, aux_logits = net.train()(images)
    assert logits.shape == aux_logits.shape == (2, 7, *size)
    assert logits.dtype == aux_logits.dtype == torch.float32
    with torch.no_grad():
        logits, aux_logits = net.eval()(images)
        assert logits.shape == (2, 7, *size)
        assert aux_logits is None
        assert torch.equal(logits, net(images.float())[0])


@pytest.mark.parametrize("size", [(64, 128), (65, 129), (31, 20)])
def test_upsample_equals_interpolate(size):
    x = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    expected = F.interpolate(x, size, mode="bilinear", align_corners=False)
    assert (pspnet.upsample(x, size) - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("bins", "size"), [(1, 7), (2, 7), (3, 64), (6, 64), (6, 128), (6, 5), (3, 256)]
)
def test_pooling_matrix_equals_adaptive_pooling(bins, size):
    x = torch.randn(2, 3, size, dtype=torch.float64)
    expected = F.adaptive_avg_pool1d(x, bins)
    assert (x @ pspnet.pooling_matrix(bins, size, like=x)[0].mT - expected).abs().max() < 1e-14


def test_matrices_are_as_exact_as_bfloat16_allows():
    for matrix in (pspnet.pooling_matrix, pspnet.interpolation_matrix):
        arguments = (6, 300) if matrix is pspnet.pooling_matrix else (6, 1030)
        exact = matrix(*arguments, like=torch.zeros((), dtype=torch.float64))
        rounded = matrix(*arguments, like=torch.zeros((), dtype=torch.bfloat16))
        assert torch.all((rounded.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6)


# Checkpoints --------------------------------------------------------------------------------------


def mmsegmentation_file(
    path, backbone, num_classes=19, legacy=False, config="align_corners=False", without=()
):
    """A file like those mmsegmentation published: `meta` and `state_dict`; each tensor is one zero
    seen many times, so that it is small."""
    with torch.device("meta"):
        state = PSPNet(num_classes, backbone).state_dict()
    state = type(state)(
        (k, torch.zeros((), dtype=v.dtype).expand(v.shape))
        for k, v in state.items()
        if not k.endswith(without)
    )
    meta = {
        "mmseg_version": "0.5.0",
        "config": config,
        "CLASSES": ("road", "sidewalk"),
        "PALETTE": [[128, 64, 128]],
        "epoch": 108,
        "iter": 40000,
        "env_info": "sys.platform: linux",
    }
    torch.save({"meta": meta, "state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_load_net_recognises_every_backbone_in_mmsegmentations_files(backbone, legacy, tmp_path):
    net = load_net(
        mmsegmentation_file(tmp_path / "net.pth", backbone, num_classes=11, legacy=legacy)
    )
    assert (net.backbone_name, net.num_classes, net.training) == (backbone, 11, False)
    assert all(not value.is_meta and (value == 0).all() for value in net.state_dict().values())


def test_load_net_gives_the_same_logits_as_the_net_that_was_saved(tmp_path):
    net = filled_net("r18b-d8").eval()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pt")
    images = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(load_net(tmp_path / "net.pt")(images)[0], net(images)[0])


def test_load_net_reads_files_without_batch_norms_counters(tmp_path):
    path = mmsegmentation_file(tmp_path / "net.pth", "resnet18", without=("num_batches_tracked",))
    net = load_net(path)
    assert net.backbone_name == "resnet18"
    assert all(
        value == 0
        for name, value in net.state_dict().items()
        if name.endswith("num_batches_tracked")
    )


def refused_files(folder):
    """file -> what the one sentence must say of it"""
    good = mmsegmentation_file(folder / "good.pth", "resnet18")
    torch.save(
        {"state_dict": torchvision.models.resnet18().state_dict()}, folder / "classifier.pth"
    )
    torch.save([torch.zeros(3)], folder / "list.pth")
    torch.save({"net": {}}, folder / "other.pth")
    torch.save({"state_dict": {"weight": 3, 4: 5}}, folder / "number.pth")
    torch.save(
        {"state_dict": {"decode_head.conv_seg.bias": torch.zeros(2, 3)}}, folder / "bias.pth"
    )
    torch.save({"state_dict": re.compile("code")}, folder / "objects.pth")
    torch.save({"state_dict": np.float64(1)}, folder / "numpy.pth")
    (folder / "empty.pth").touch()
    (folder / "text.pth").write_text("404: not found\n")
    content = good.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        (folder / f"cut{share}.pth").write_bytes(content[: int(share * len(content))])
    legacy = mmsegmentation_file(folder / "legacy.pth", "resnet18", legacy=True).read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        (folder / f"legacy{share}.pth").write_bytes(legacy[: int(share * len(legacy))])
    mmsegmentation_file(
        folder / "missing.pth", "resnet18", without=("decode_head.conv_seg.weight",)
    )
    mmsegmentation_file(
        folder / "r50-d32.pth", "resnet50", config="backbone=dict(strides=(1, 2, 2, 2))"
    )
    mmsegmentation_file(
        folder / "769x769.pth", "resnet50_v1c", config="align_corners=False ... align_corners=True"
    )
    return {
        "nothing.pth": "there is no",
        ".": "there is no",
        "classifier.pth": "names and shapes",
        "list.pth": "no 'state_dict'",
        "other.pth": "no 'state_dict'",
        "number.pth": "names and shapes",
        "bias.pth": "names and shapes",
        "objects.pth": "cannot be read",
        "numpy.pth": "cannot be read",
        "empty.pth": "cannot be read",
        "text.pth": "cannot be read",
        "missing.pth": "names and shapes",
        "r50-d32.pth": "strides=(1, 2, 2, 2)",
        "769x769.pth": "align_corners=True",
    } | {
        f"{kind}{share}.pth": "cannot be read"
        for kind in ("cut", "legacy")
        for share in (0.1, 0.5, 0.9, 0.999)
    }


def test_load_net_refuses_everything_else_in_one_sentence(tmp_path):
    for name, expected in refused_files(tmp_path).items():
        with pytest.raises(CheckpointError) as refusal:
            load_net(tmp_path / name)
        message = str(refusal.value)
        assert str(tmp_path / name) in message, name
        assert expected in message, (name, message)
        assert "\n" not in message, name


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


def test_load_backbone_says_what_to_do_when_the_download_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network"))
    )
    monkeypatch.setattr(
        "torch.hub.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(
        CheckpointError, match="(?s)resnet50_v1c-2cccc1ad.pth.*no network.*--weights"
    ):
        load_backbone(PSPNet(), "imagenet")
