"""Networks that torch.fx cannot trace as a whole: parts of them are compact, the rest stays."""

import copy

import pytest
import torch
from networks import pruned
from torch import nn
from torch.nn import functional as F

from spp_lightning import ColumnConv2d, compact, compact_report, load_compact, save_compact
from spp_lightning.compaction.graph.network import CompactNetwork


def block(channels, filters, **options):
    return nn.Sequential(
        nn.Conv2d(channels, filters, 3, padding=1, **options), nn.BatchNorm2d(filters), nn.ReLU()
    )


class Backbone(nn.Module):
    """Two maps by name, as torchvision's backbones with feature pyramids return them."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = block(3, 16), block(16, 16, stride=2)

    def forward(self, x):
        fine = self.fine(x)
        return {"fine": fine, "coarse": self.coarse(fine)}


class Head(nn.Module):
    """Calls its layers for every map of a list."""

    def __init__(self):
        super().__init__()
        self.conv, self.scores = block(16, 16), nn.Conv2d(16, 2, 1)

    def forward(self, maps):
        return [self.scores(self.conv(x)) for x in maps]


class Detector(nn.Module):
    """Images of different sizes in, as many boxes out as the scores want: nothing to trace."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), Head()
        self.last = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, images):
        found = []
        for image in [image for image in images if image.shape[-1] > 4]:
            maps = self.backbone(image[None])
            fine, coarse = self.head(maps=list(maps.values()))
            scores = self.last(fine) + F.interpolate(coarse, scale_factor=2.0)
            found.append({"scores": scores[scores > scores.detach().mean().item()]})
        return found


class Sums(nn.Module):
    """A control flow that depends on the values: torch.fx can't trace it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(block(8, 8), block(8, 8))

    def forward(self, x):
        return self.inner(x) if x.detach().sum().item() > -1e9 else x


class Shifts(Sums):
    """Writes to its input."""

    def forward(self, x):
        if x.detach().sum().item() > -1e9:
            x.add_(1)
        return self.inner(x)


def sums(kind=Sums):
    return pruned(nn.Sequential(block(3, 8), kind(), block(8, 24), nn.Conv2d(24, 4, 1)))


def layers_of(network):
    return [name for name, x in network.named_modules() if isinstance(x, ColumnConv2d)]


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return pruned(Detector()), [torch.randn(3, 16, 16), torch.randn(3, 8, 24)]


def test_the_largest_traceable_parts_of_a_detector_are_compact(detector):
    net, images = detector
    message = r"parts .* compact: backbone, head\.conv;.* one by one: head\.scores, last\."
    with pytest.warns(UserWarning, match=message):
        fast = compact(net, images)
    assert type(fast) is Detector and type(net.backbone) is Backbone
    kinds = {type(x) for x in fast.modules()}
    assert nn.BatchNorm2d not in kinds and nn.ReLU not in kinds
    report = compact_report(fast, images)
    assert report.parts == ("backbone", "head.conv") and report.opaque == ()
    assert "Compact parts: backbone, head.conv." in str(report)
    assert [row.name for row in report.layers] == layers_of(fast)
    more = [*images, torch.randn(3, 12, 8)]
    with torch.no_grad():
        for found, expected in zip(fast(more), net(more), strict=True):
            torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The network can't be traced")
def test_saving_a_detector_says_which_parts_to_save(detector, tmp_path):
    net, images = detector
    fast = compact(net, images)
    parts = (
        r"Save each of its compact parts by itself, `model\.backbone`, `model\.head\.conv`, and set"
    )
    with pytest.raises(ValueError, match=parts):
        save_compact(fast, tmp_path / "net.spp")
    loaded = copy.deepcopy(fast)
    for part, (parent, child) in {
        fast.backbone: (loaded, "backbone"),
        fast.head.conv: (loaded.head, "conv"),
    }.items():
        save_compact(part, tmp_path / child)
        setattr(parent, child, load_compact(tmp_path / child))
    with torch.no_grad():
        for found, expected in zip(loaded(images), fast(images), strict=True):
            assert torch.equal(found["scores"], expected["scores"])


@pytest.mark.filterwarnings("ignore:The network can't be traced")
def test_a_part_whose_attributes_the_network_reads_stays(detector):
    class Reader(Detector):
        def forward(self, images):
            assert self.backbone.fine[0].stride == (1, 1)
            return [self.backbone(image[None])["coarse"] for image in images]

    _, images = detector
    net = pruned(Reader())
    fast = compact(net, images)
    assert compact_report(fast, images).parts == ("backbone.coarse",)
    with torch.no_grad():
        for found, expected in zip(fast(images), net(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_module_that_cannot_be_traced_is_called_as_it_is(tmp_path):
    torch.manual_seed(0)
    net, x = sums(), torch.randn(1, 3, 12, 12)
    fast = compact(net, x)  # without a warning
    assert type(fast) is CompactNetwork and fast.opaque_layers == ["1"]
    assert compact_report(fast, x).opaque == ("1",)
    assert type(fast.get_submodule("1.inner")) is CompactNetwork
    inside = ["1.inner.0.0", "1.inner.1.0"]
    assert sorted(layers_of(fast)) == sorted(["0.0", *inside, "2.0", "3"])
    x = torch.randn(3, 3, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"layer 1 .* got test_parts\.Sums; to save the network"):
        save_compact(fast, tmp_path / "net.spp")


def test_a_module_that_writes_to_its_input_is_not_called_from_a_graph():
    net, x = sums(Shifts), torch.randn(1, 3, 12, 12)
    with pytest.warns(UserWarning, match="1, which can't be traced, writes to its inputs"):
        fast = compact(net, x)
    assert compact_report(fast, x).parts == ("0", "1.inner", "2")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-3, atol=1e-4)


class Pyramid(nn.Module):
    """A dict with a dict and a list in, a dict with a list out."""

    def __init__(self):
        super().__init__()
        self.first, self.second = block(3, 8), nn.Conv2d(8, 4, 3)

    def forward(self, batch, scale=None):
        if scale is not None:
            raise ValueError("there is no scale")
        y = self.first(batch["images"]["left"] + batch["images"]["right"])
        more, _ = batch["more"]
        return {"maps": [y, self.second(y)], "given": more}


def test_lists_and_dicts_go_in_and_out(tmp_path):
    torch.manual_seed(0)
    net = pruned(Pyramid())
    images = {"left": torch.randn(2, 3, 8, 8), "right": torch.randn(2, 3, 8, 8)}
    batch = {"images": images, "more": [torch.ones(2), torch.ones(1)]}
    fast = compact(net, batch)
    assert {step.kind for step in fast.compact_steps} >= {"input", "layer", "output"}
    save_compact(fast, tmp_path / "net.spp")
    with torch.no_grad():
        expected = net(batch)
        for made in (fast, load_compact(tmp_path / "net.spp")):
            found = made(dict(reversed(batch.items())))
            assert torch.equal(found["given"], batch["more"][0])
            for ours, theirs in zip(found["maps"], expected["maps"], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="must be a list or a tuple of 2, as in its example"):
        fast({**batch, "more": []})
    with pytest.raises(ValueError, match="must be a dict with the keys left, right"):
        fast({**batch, "images": images | {"middle": torch.ones(1)}})


def test_calls_without_effect_are_dropped():
    """What stands between a norm and its activation in timm's BatchNormAct2d."""

    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.drop, self.act = nn.Sequential(nn.Identity(), nn.Dropout(0.0)), nn.ReLU(True)

        def forward(self, x):
            torch._assert(x.ndim == 4, "expected 4 dimensions")
            x = F.batch_norm(
                *(x, self.running_mean, self.running_var, self.weight, self.bias),
                *(False, 0.1, self.eps),
            )
            return self.act(self.drop(F.dropout(x, 0.5, self.training)))

    net = pruned(nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8), nn.Conv2d(8, 4, 3)))
    fast = compact(net, torch.randn(1, 3, 9, 9))
    assert [step.kind for step in fast.compact_steps] == ["input", "layer", "layer", "output"]
