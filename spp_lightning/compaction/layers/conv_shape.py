"""What layers that compute a convolution tell of it under the names of ``nn.Conv2d``."""

from __future__ import annotations

from spp_lightning.compaction.geometry import Geometry

__all__ = ["ConvShape"]


class ConvShape:
    """The attributes of an ``nn.Conv2d`` that follow from a layer's ``geometry``."""

    geometry: Geometry

    @property
    def in_channels(self) -> int:
        """Input channels."""
        return self.geometry.channels

    @property
    def out_channels(self) -> int:
        """Output channels."""
        return self.geometry.filters

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return self.geometry.kernel_size

    @property
    def stride(self) -> tuple[int, int]:
        """Input pixels between two outputs, by rows and columns."""
        return self.geometry.stride

    @property
    def padding(self) -> tuple[int, int]:
        """Pixels that stand for 0 on each side, by rows and columns."""
        return self.geometry.padding

    @property
    def dilation(self) -> tuple[int, int]:
        """Distance of the kernel's elements, by rows and columns."""
        return self.geometry.dilation

    @property
    def groups(self) -> int:
        """Convolution groups."""
        return self.geometry.groups
