"""Train a ConvNet on digits, prune it 4x, retrain it, and print what that did.

    python examples/quickstart.py

Needs no data and no network, and takes about a minute and a half on two CPU cores. ``lightning
run`` and ``fabric run`` start it on the devices they are given.
"""

from typing import Any

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from spp_lightning import ConvNet, DigitsDataModule, SPPCallback, count_macs, launcher_options

TRAIN_STEPS = 420
PRUNE_AND_RETRAIN_STEPS = 560


def make_trainer(max_steps: int, **options: Any) -> Trainer:
    """A Trainer for so many steps, on the devices that the launcher was given."""
    return Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        check_val_every_n_epoch=5,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        **{"accelerator": "auto", **launcher_options(), **options},
    )


def print_table(
    net: LightningModule, accuracy: dict[str, float], macs: list[dict[str, int]]
) -> None:
    """Print accuracy, MACs and column sparsity, before and after."""
    dense, pruned = macs
    print(f"\n{'':10}{'dense':>14}{'pruned':>14}")
    print(f"{'accuracy':10}{accuracy['dense']:>14.2%}{accuracy['pruned']:>14.2%}")
    for name, count in dense.items():
        print(
            f"{name + ' MACs':10}{count:>14,}{pruned[name]:>14,}{1 - pruned[name] / count:>8.1%} less"
        )
    total = sum(dense.values()), sum(pruned.values())
    print(f"{'all MACs':10}{total[0]:>14,}{total[1]:>14,}{total[0] / total[1]:>8.2f}× fewer")


def main() -> None:
    """Train, prune, retrain, compare."""
    seed_everything(0, verbose=False)
    data = DigitsDataModule()
    net = ConvNet(milestones=[340, 400])
    accuracy: dict[str, float] = {}

    trainer = make_trainer(TRAIN_STEPS, logger=False)
    trainer.fit(net, data)
    accuracy["dense"] = trainer.test(net, data, verbose=False)[0]["test_acc"]
    macs = [count_macs(net, net.example_input_array)]

    logger = TensorBoardLogger("runs", name="quickstart")
    pruning = SPPCallback(speedup=4, interval=4)  # 4 steps suit a run this short; 180 is normal
    trainer = make_trainer(PRUNE_AND_RETRAIN_STEPS, logger=logger, callbacks=[pruning])
    trainer.fit(net, data)
    accuracy["pruned"] = trainer.test(net, data, verbose=False)[0]["test_acc"]
    macs.append(count_macs(net, net.example_input_array))

    if trainer.is_global_zero:
        print_table(net, accuracy, macs)
        print(f"\nThe curves: tensorboard --logdir {logger.log_dir}")


if __name__ == "__main__":
    main()
