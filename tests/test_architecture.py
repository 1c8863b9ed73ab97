"""Which room imports which, and what importing the package loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import spp_lightning
from spp_lightning import compact, save_compact

PACKAGE = Path(spp_lightning.__file__).parent
METHOD_OF_COMPACTION = (
    *("method.masks", "method.selection", "method.groups", "method.computed"),
    "method.evaluation",
)
FLOORS = (  # of compaction, the lowest first; a room may import its own floor and those below
    ("native", *METHOD_OF_COMPACTION),
    (
        *("compaction.geometry", "compaction.epilogue", "compaction.spec", "compaction.int8_spec"),
        *("compaction.agreement", "compaction.timing", "compaction.macs"),
        "compaction.int8_spec",
    ),
    ("compaction.kernels",),
    ("compaction.layers",),
    ("compaction.graph",),
)


def up_to(floor):
    """The rooms of compaction's floors up to one, itself included."""
    return tuple(room for rooms in FLOORS[: floor + 1] for room in rooms)


MAY_IMPORT = {  # what each room may import besides itself
    "native": (),
    "method": ("native",),
    **{room: up_to(i) for i, rooms in enumerate(FLOORS) if i for room in rooms},
    "compaction.file": up_to(4),
    "compaction.pipeline": up_to(4),
    "compaction.report": up_to(4),
    "compaction.quantize": up_to(4),
    "compaction": ("compaction",),  # the public names of its rooms
    "planning": ("method", "compaction"),
    "export": ("native", "compaction"),
    "training": ("method", "compaction", "planning"),
    "data": (),
    "models": ("compaction",),
    "cli": ("method", "compaction", "planning", "export", "training", "models", "data"),
    "": (
        "method",
        "compaction",
        "planning",
        "export",
        "training",
        "models",
        "data",
    ),  # spp_lightning/__init__.py
}
THIRD_PARTY = {  # of the rooms that a pruned network needs in production
    "native": set(),
    "method": {"torch", "torch_pruning"},
    "compaction": {"torch", "numpy", "triton"},
    "planning": {"torch", "numpy"},
}
NOT_LOADED = (
    *("lightning", "pytorch_lightning", "torchvision", "sklearn", "tensorboard"),
    *("click", "jsonargparse", "onnx", "torch_pruning"),
)


def lies_in(module, room):
    return module == room or module.startswith(f"{room}.")


def modules():
    """The package's modules, such as ``method.rule``; the package itself is ``""``."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), file


MODULES = dict(modules())


def imports(source):
    """What a source text imports: modules of this package, and the first names of all others."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == PACKAGE.name:
                own.add(rest if rest in MODULES else rest.rpartition(".")[0])
            else:
                others.add(first)
    return own, others - sys.stdlib_module_names


def upward(module, source):
    """What a module's source text imports and its room must not."""
    room = max((room for room in MAY_IMPORT if lies_in(module, room)), key=len)
    allowed = (room, *MAY_IMPORT[room])
    targets = imports(source)[0]
    return sorted(x for x in targets if not any(lies_in(x, room) for room in allowed))


def test_no_room_imports_upwards():
    found = {module: upward(module, file.read_text()) for module, file in MODULES.items()}
    assert {module: targets for module, targets in found.items() if targets} == {}


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("method.rule", "from spp_lightning.compaction import timing", ["compaction.timing"]),
        ("compaction.graph.fuse", "from spp_lightning.compaction import compact", ["compaction"]),
        ("compaction.macs", "def f():\n import spp_lightning.method.rule", ["method.rule"]),
        ("training.callback", "from spp_lightning.data.base import x", ["data.base"]),
        ("compaction.layers.chain", "from spp_lightning import SPPPruner", [""]),
        ("compaction.file.graph", "from spp_lightning.compaction.graph.join import join", []),
    ],
)
def test_imports_are_found(module, source, found):
    assert upward(module, source) == found


@pytest.mark.parametrize("room", THIRD_PARTY)
def test_production_rooms_need_torch_and_little_else(room):
    found = set()
    for module, file in MODULES.items():
        if lies_in(module, room):
            found |= imports(file.read_text())[1]
    assert found == THIRD_PARTY[room]


LOAD_AND_RUN = """
import sys
import torch
from spp_lightning import load_compact
x, expected = torch.load(sys.argv[2], weights_only=True)
assert torch.equal(load_compact(sys.argv[1])(x), expected)
"""
COMPACT_AND_PRUNE = "import sys\nfrom spp_lightning import compact, SPPPruner"


@pytest.mark.parametrize("script", [LOAD_AND_RUN, COMPACT_AND_PRUNE], ids=["load", "compact"])
def test_running_a_compact_network_loads_torch_alone(script, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).eval()
    net[0].weight.data[:, 1:] = 0
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        fast = compact(net, x)
        torch.save((x, fast(x)), tmp_path / "expected.pt")
    save_compact(fast, tmp_path / "net.spp")
    script = f"{script}\nprint(*(name for name in {NOT_LOADED} if name in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "net.spp", tmp_path / "expected.pt"],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
