"""Networks by name: published sizes, shapes, gradients, and every way to ask for one that does not exist."""

import sys
import types

import pytest
import torch
from torch import nn

from qkernels.models import available_models, build_model
from qkernels.models.resnet import PadShortcut, ResNet

SMALL_INPUT = [
    "resnet20",
    "preact_resnet20",
    "nin_d2_w1",
    "mobilenet_v1",
    "mobilenet_v2",
    "vit_tiny",
    "wrn_10_1",
]


def build_meta(name, *args, **kwargs):
    with torch.device("meta"):
        return build_model(name, *args, **kwargs).eval()


@pytest.mark.parametrize(
    "name, classes, image_size, count",
    [
        ("resnet20", 10, 32, 269_722),
        ("preact_resnet20", 10, 32, 269_722),
        ("resnet56", 10, 32, 853_018),
        ("resnet18", 1000, 224, 11_689_512),
        ("resnet34", 1000, 224, 21_797_672),
        ("resnet50", 1000, 224, 25_557_032),
        ("mobilenet_v1", 1000, 224, 4_231_976),
        ("mobilenet_v2", 1000, 224, 3_504_872),
        ("wrn_28_10", 10, 32, 36_479_194),
        ("vgg19", 1000, 224, 143_678_248),
        ("deit_tiny", 1000, 224, 5_717_416),
    ],
)
def test_parameter_counts_are_the_published_ones(name, classes, image_size, count):
    model = build_meta(name, classes, image_size=image_size)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.empty(2, 3, image_size, image_size, device="meta")).shape == (2, classes)


@pytest.mark.parametrize("name, outputs", [("resnet18_w16", 128), ("preact_resnet50_w16", 512)])
def test_qgens_resnets_have_a_quarter_of_the_width(name, outputs):
    model = build_meta(name, 10)
    assert model.conv1.weight.shape == (16, 3, 3, 3) and model.fc.in_features == outputs


@pytest.mark.parametrize("name", available_models())
def test_every_available_model_takes_cifar_images(name):
    assert build_meta(name, 7)(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", SMALL_INPUT)
@pytest.mark.parametrize("channels, image_size", [(1, 8), (3, 32)])
def test_forward_and_backward_reach_every_parameter(name, channels, image_size):
    torch.manual_seed(0)
    model = build_model(name, 5, channels, image_size)
    y = model(torch.randn(4, channels, image_size, image_size))
    assert y.shape == (4, 5) and y.isfinite().all()
    nn.functional.cross_entropy(y, torch.arange(4)).backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), parameter_name
        assert p.grad.any(), parameter_name


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet50", "mobilenet_v2", "deit_tiny"])
def test_large_images_get_the_imagenet_stem(name):
    torch.manual_seed(0)
    model = build_model(name, 3, image_size=80)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert first.stride[0] > 1
    model(torch.randn(2, 3, 80, 80)).sum().backward()
    assert first.weight.grad.any()


@pytest.mark.parametrize("name, final", [("resnet18", 4), ("mobilenet_v1", 4), ("mobilenet_v2", 4)])
def test_small_images_keep_their_resolution_in_the_stem(name, final):
    model = build_meta(name, 3)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert convs[0].stride == (1, 1)
    sizes = []
    convs[-1].register_forward_hook(lambda module, args, output: sizes.append(output.shape[-1]))
    model(torch.empty(1, 3, 32, 32, device="meta"))
    assert sizes == [final]


def test_stem_follows_the_image_size_at_the_boundary():
    assert isinstance(build_meta("resnet18", 3, image_size=64).maxpool, nn.Identity)
    assert isinstance(build_meta("resnet18", 3, image_size=65).maxpool, nn.MaxPool2d)


def test_pad_shortcut_is_option_a():
    x = torch.randn(2, 16, 5, 5)
    y = PadShortcut(16, 32, 2)(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and not y[:, :8].any() and not y[:, 24:].any()


def test_pre_activation_block_is_the_papers_formula():
    torch.manual_seed(0)
    block = build_model("preact_resnet18", 3).layer2[0].eval()
    x = torch.randn(2, 64, 8, 8)
    a = torch.relu(block.bn1(x))
    expected = block.conv2(torch.relu(block.bn2(block.conv1(a)))) + block.downsample(a)
    assert torch.equal(block(x), expected)


def test_block_is_the_papers_formula():
    torch.manual_seed(0)
    block = build_model("resnet50", 3).layer1[0].eval()
    x = torch.randn(2, 64, 4, 4)
    y = torch.relu(block.bn1(block.conv1(x)))
    y = block.bn3(block.conv3(torch.relu(block.bn2(block.conv2(y)))))
    assert torch.equal(block(x), torch.relu(y + block.downsample(x)))


def test_inverted_residuals_add_their_input():
    torch.manual_seed(0)
    for block in build_model("mobilenet_v2", 3).eval().features[1:-1]:
        x = torch.randn(1, block.conv[0][0].in_channels, 4, 4)
        y = block.conv(x)
        torch.testing.assert_close(block(x), x + y if x.shape == y.shape else y)


def test_a_pre_activation_network_ends_in_a_relu():
    torch.manual_seed(0)
    model, seen = build_model("preact_resnet20", 3).eval(), []
    model.bn1.register_forward_hook(lambda module, x, y: seen.append(y))
    y = model(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(y, model.fc(torch.relu(seen[0]).mean((2, 3))))


def test_vit_is_the_papers_formula():
    torch.manual_seed(0)
    model, x = build_model("vit_tiny", 5, 1, 8).eval(), torch.randn(2, 1, 8, 8)
    t = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(x)], 1) + model.pos_embed
    for block in model.blocks:
        heads = []
        for part in block.attn.qkv(block.norm1(t)).view(2, -1, 3, 3, 64).unbind(3):
            q, k, v = part.unbind(2)
            heads.append(torch.softmax(q @ k.mT / 8.0, -1) @ v)
        t = t + block.attn.proj(torch.cat(heads, -1))
        t = t + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(t))))
    torch.testing.assert_close(model(x), model.head(model.norm(t)[:, 0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, strides",
    [
        ("mobilenet_v1", [2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]),
        ("mobilenet_v2", [2, 1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]),
        ("resnet50", [1] * 3 + [2, 1, 1, 1] + [2, 1, 1, 1, 1, 1] + [2, 1, 1]),  # torchvision's, "v1.5"
    ],
)
def test_images_shrink_in_the_published_layers(name, strides):
    convs = [m for m in build_meta(name, 10, image_size=224).modules() if isinstance(m, nn.Conv2d)]
    assert [m.stride[0] for m in convs if m.kernel_size == (3, 3)] == strides


def test_activations_and_heads_are_the_published_ones():
    kinds = [type(m) for m in build_meta("mobilenet_v2", 10).modules()]
    assert kinds.count(nn.ReLU6) == 35 and nn.ReLU not in kinds
    assert [type(m) for m in build_meta("vgg19", 10).modules()].count(nn.ReLU) == 16
    assert [block.attn.heads for block in build_meta("vit_tiny", 10).blocks] == [3] * 6


def test_attribute_names_are_the_published_ones():
    assert {"conv1.weight", "layer2.0.downsample.1.running_var", "fc.bias"} <= set(
        build_meta("resnet18", 9).state_dict()
    )
    names = set(build_meta("mobilenet_v2", 9).state_dict())
    assert {"features.1.conv.0.0.weight", "features.18.1.weight", "classifier.1.weight"} <= names
    names = set(build_meta("deit_tiny", 9, image_size=224).state_dict())
    assert {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.11.attn.qkv.weight",
        "head.bias",
    } <= names
    assert {"features.49.weight", "classifier.6.bias"} <= set(
        build_meta("vgg19", 9, image_size=224).state_dict()
    )


def test_nin_follows_depth_and_width():
    model = build_model("nin_d3_w2", 4)
    convs = [m for m in model if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [50] * 9 + [4]
    assert [c.stride[0] for c in convs] == [2, 1, 1] * 3 + [1]
    assert [c.kernel_size[0] for c in convs] == [3, 1, 1] * 3 + [1]


def test_convolutions_are_he_initialised():
    torch.manual_seed(0)
    weight = build_model("resnet18", 10).layer3[1].conv1.weight
    assert abs(weight.std().item() - (2 / (256 * 9)) ** 0.5) < 1e-4


def test_vit_tiny_tells_positions_apart_from_the_start():
    torch.manual_seed(0)
    model = build_model("vit_tiny", 10)
    patches = model.patch_embed(torch.randn(8, 3, 32, 32))
    assert 0.5 < (model.pos_embed.std() / patches.std()).item() < 2


def test_weights_depend_on_the_seed_alone():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_model("vit_tiny", 10).parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", ["resnet20", "preact_resnet20", "mobilenet_v2", "vit_tiny"])
def test_models_compile_into_one_graph(name):
    torch.manual_seed(0)
    model, x = build_model(name, 10, 1, 8), torch.randn(2, 1, 8, 8)
    model.eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


def test_vit_has_second_derivatives_with_math_attention():
    torch.manual_seed(0)
    model = build_model("vit_tiny", 3, 1, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = model(torch.randn(2, 1, 8, 8)).square().sum()
    weight = model.blocks[0].attn.qkv.weight
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), weight)
    assert second.isfinite().all() and second.any()


def test_available_models_are_sorted_and_build():
    names = available_models()
    assert names == sorted(names) and {"resnet20", "vit_tiny", "wrn_28_10"} <= set(names)


def test_unknown_name_lists_the_models():
    with pytest.raises(
        ValueError, match=r"name='resnet19': unknown model; expected one of .*resnet20.*nin_d<depth>"
    ):
        build_model("resnet19", 10)
    with pytest.raises(ValueError, match="name='timm:': unknown model"):
        build_model("timm:", 10)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("resnet20", {"num_classes": 0}, "num_classes=0: expected an integer of at least 1"),
        ("resnet20", {"num_classes": 2.0}, "num_classes=2.0: expected an integer"),
        ("resnet20", {"in_channels": 0}, "in_channels=0: expected an integer of at least 1"),
        ("resnet20", {"image_size": -1}, "image_size=-1: expected an integer of at least 1"),
        ("wrn_11_2", {}, "wrn_11_2: the depth must be 6n \\+ 4"),
        ("wrn_16_0", {}, "wrn_16_0: the depth must be .* the width at least 1"),
        ("nin_d0_w1", {}, "nin_d0_w1: depth and width must be at least 1"),
        ("vgg19", {"image_size": 8}, "image_size=8: vgg19 halves the image five times"),
        ("vit_tiny", {"image_size": 33}, "image_size=33: expected a multiple of the patch size 4"),
        ("deit_tiny", {"image_size": 8}, "image_size=8: expected a multiple of the patch size 16"),
    ],
)
def test_bad_arguments_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **({"num_classes": 10} | arguments))


def test_unknown_stem_is_named():
    with pytest.raises(ValueError, match='stem=\'mnist\': expected "cifar" or "imagenet"'):
        ResNet([1], [16], 10, stem="mnist")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_absent_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.models", raising=False)
    with pytest.raises(ImportError, match=f"name='{package}:resnet18': .*pip install {package}"):
        build_model(f"{package}:resnet18", 10)


def test_timm_is_asked_for_the_right_sizes(monkeypatch):
    calls = []
    fake = types.ModuleType("timm")
    fake.is_model = lambda name: name == "tiny"
    fake.create_model = lambda name, **options: calls.append((name, options)) or nn.Identity()
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert isinstance(build_model("timm:tiny", 7, 1), nn.Identity)
    assert calls == [("tiny", {"num_classes": 7, "in_chans": 1})]
    with pytest.raises(ValueError, match="name='timm:huge': timm has no model 'huge'"):
        build_model("timm:huge", 7)


def test_torchvision_is_asked_for_the_right_sizes(monkeypatch):
    calls = []
    fake = types.ModuleType("torchvision.models")
    fake.list_models = lambda: ["tiny"]
    fake.get_model = lambda name, **options: calls.append((name, options)) or nn.Identity()
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    assert isinstance(build_model("torchvision:tiny", 7), nn.Identity)
    assert calls == [("tiny", {"weights": None, "num_classes": 7})]
    with pytest.raises(ValueError, match="in_channels=1: torchvision models take 3"):
        build_model("torchvision:tiny", 7, 1)
    with pytest.raises(ValueError, match="name='torchvision:huge': torchvision has no model 'huge'"):
        build_model("torchvision:huge", 7)
