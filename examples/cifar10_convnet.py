"""Train and prune the CIFAR-10 ConvNet from the command line, by a YAML config.

    python examples/cifar10_convnet.py fit --config examples/configs/baseline.yaml
    python examples/cifar10_convnet.py fit --config examples/configs/spp_4x.yaml

``lightning run`` and ``fabric run`` start it too; their accelerator, devices, strategy, number of
nodes and precision come before those of the config.
"""

from lightning.pytorch.cli import LightningCLI

from spp_lightning import CIFAR10DataModule, ConvNet


def main() -> None:
    """Parse the command line and run the asked subcommand."""
    LightningCLI(
        ConvNet,
        CIFAR10DataModule,
        save_config_kwargs={"overwrite": True},
    )


if __name__ == "__main__":
    main()
