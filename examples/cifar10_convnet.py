"""Train and prune the CIFAR-10 ConvNet from the command line, by a YAML config.

    python examples/cifar10_convnet.py fit --config examples/configs/baseline.yaml
    python examples/cifar10_convnet.py fit --config examples/configs/spp_4x.yaml

A run that was stopped goes on with ``--ckpt_path runs/NAME/checkpoints/last.ckpt``. ``lightning
run`` and ``fabric run`` start the script too, and what they are told of accelerator, devices,
strategy, number of nodes and precision comes before the config.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from spp_lightning import CIFAR10DataModule, ConvNet, launcher_options

COMMON = str(Path(__file__).parent / "configs" / "common.yaml")


class CLI(LightningCLI):
    """LightningCLI that heeds the launcher."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer of the config, on the devices that the launcher was given."""
        return super().instantiate_trainer(**launcher_options(), **kwargs)


def main() -> None:
    """Run the subcommand that the command line asks for."""
    # A step is a few milliseconds: frequent saving would cost more than it could lose.
    checkpoint = ModelCheckpoint(
        every_n_train_steps=500, save_top_k=0, save_last=True, enable_version_counter=False
    )
    CLI(
        ConvNet,
        CIFAR10DataModule,
        trainer_defaults={"callbacks": [checkpoint]},
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            subcommand: {"default_config_files": [COMMON]}
            for subcommand in ("fit", "validate", "test", "predict")
        },
    )


if __name__ == "__main__":
    main()
