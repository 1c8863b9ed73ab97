"""Two processes prune like one, and their checkpoints go both ways."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TinyModule, tiny_data
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from spp_lightning import SPPCallback, launcher_options

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
LAST, MIDDLE = 40, 12
COUPLED = importlib.util.find_spec("torch_pruning") is not None


def run(record, batch_size, folder=None, ckpt_path=None, kernels="auto", granularity="column"):
    """Fit to the last step, in as many processes as the launcher says; note every step's state."""

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.rand(1 + trainer.global_rank)  # what a rank draws for itself must not matter
            pruner = callback.pruner
            p = {name: p.clone() for name, p in pruner.probability.items()}
            mask = {name: mask.clone() for name, mask in pruner.mask.items()}
            record.append((trainer.global_step, p, mask))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Double at once: Lightning loads a checkpoint before it converts the module. The kernels
        # of kept columns compute in float32.
        module = TinyModule() if kernels == "compact" else TinyModule().double()
    callback = SPPCallback(
        prune_ratio=0.75, A=0.25, interval=2, kernels=kernels, granularity=granularity
    )
    callbacks = [callback, Watch()]
    if folder is not None:
        name = "one" if batch_size == 32 else "two"
        file = name + "-{step}"
        callbacks.append(ModelCheckpoint(folder, file, every_n_train_steps=MIDDLE, save_top_k=-1))
    trainer = Trainer(
        callbacks=callbacks,
        max_steps=LAST,
        max_epochs=-1,
        # Sums in another order differ by 1e-16, far less than the norms.
        precision="32-true" if kernels == "compact" else "64-true",
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"accelerator": "cpu"} | launcher_options()),
    )
    # One batch an epoch, all images: Lightning itself can't go on in the middle of an epoch.
    trainer.fit(module, tiny_data(32, batch_size), ckpt_path=ckpt_path)
    assert callback.pruner.finished
    return module.state_dict(), trainer.world_size


def main(folder, rank):
    """What each of two processes does.

    A run, that resumed, one process's resumed, kept columns, coupled channels.
    """
    torch.manual_seed(1000 + rank)
    results = []
    for options in (
        {"folder": folder},
        {"ckpt_path": f"{folder}/two-step={MIDDLE}.ckpt"},
        {"ckpt_path": f"{folder}/one-step={MIDDLE}.ckpt"},
        {"kernels": "compact"},
        *([{"granularity": "coupled-channel"}] if COUPLED else []),
    ):
        record = []
        results.append((record, *run(record, 16, **options)))
    torch.save(results, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs of one process, with twice the batch, and those of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    ours = []
    one = [(ours, *run(ours, 32, folder))]
    options = ["--accelerator=cpu", "--devices=2", "--strategy=ddp", "--main-port=29547"]
    command = [sys.executable, "-m", "spp_lightning.training.launcher", "run", *options, __file__]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[i]) for i in (1, 2)),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([*command, str(folder)], check=True, env=environment, timeout=240)
    resumed = []
    one.append((resumed, *run(resumed, 32, ckpt_path=folder / f"two-step={MIDDLE}.ckpt")))
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    return one, *ranks


WHOLE, RESUMED, FROM_ONE, KEPT = range(4)
ONE_WHOLE, ONE_FROM_TWO = range(2)


def assert_same(first, second, steps):
    """Probabilities and masks are the same, bit for bit, at each of these steps."""
    first, second = ({step: state for step, *state in record} for record in (first, second))
    for step in steps:
        for ours, theirs in zip(first[step], second[step], strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), step


def zeros(weights):
    return [int((weights[f"conv{i}.weight"].flatten(1) == 0).all(0).sum()) for i in (1, 2)]


RUNS = {"whole": WHOLE, "resumed": RESUMED, "from_one": FROM_ONE, "kept_columns": KEPT}


@pytest.mark.parametrize("which", RUNS.values(), ids=RUNS)
def test_ranks_are_the_same_bit_for_bit(runs, which):
    _, first, second = runs
    (record, weights, world), (other_record, other_weights, _) = first[which], second[which]
    begin = 0 if which in (WHOLE, KEPT) else MIDDLE
    assert world == 2
    assert [step for step, *_ in record] == list(range(begin, LAST))
    assert_same(record, other_record, range(begin, LAST))
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert zeros(weights) == [21, 54]
    masks = [mask["conv2"] for _, _, mask in record[:6]]
    assert not any(map(torch.equal, masks, masks[1:]))


@pytest.mark.skipif(not COUPLED, reason="Torch-Pruning is not installed")
def test_ranks_prune_the_same_coupled_channels(runs):
    (record, weights, _), (other_record, other_weights, _) = (ranks[-1] for ranks in runs[1:])
    assert_same(record, other_record, range(LAST))
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    for writer, reader in (("conv1", "conv2"), ("conv2", "head")):
        filters = weights[f"{writer}.weight"].flatten(1).any(1)
        columns = weights[f"{reader}.weight"].transpose(0, 1).flatten(1).any(1)
        assert filters.sum() == 2 and torch.equal(filters, columns)  # of 8 channels


def test_resumed_is_as_if_never_stopped(runs):
    _, ranks, _ = runs
    assert_same(ranks[WHOLE][0], ranks[RESUMED][0], range(MIDDLE, LAST))
    whole, resumed = ranks[WHOLE][1], ranks[RESUMED][1]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("which", "other", "begin"),
    [(WHOLE, ONE_WHOLE, 0), (FROM_ONE, ONE_WHOLE, MIDDLE), (WHOLE, ONE_FROM_TWO, MIDDLE)],
    ids=["two_and_one", "two_go_on_from_one", "one_goes_on_from_two"],
)
def test_two_are_like_one_with_twice_the_batch(runs, which, other, begin):
    one, ranks, _ = runs
    (record, weights, _), (other_record, other_weights, world) = ranks[which], one[other]
    assert world == 1
    assert_same(record, other_record, range(begin, LAST))
    torch.testing.assert_close(weights, other_weights, rtol=0, atol=1e-12)
    assert zeros(weights) == zeros(other_weights) == [21, 54]


if __name__ == "__main__":
    main(sys.argv[1], int(os.environ["RANK"]))
