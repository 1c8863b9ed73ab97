"""Column-pruned convolutions on a GPU: an implicit GEMM over the kept columns, in Triton.

Shapes and names, shared with the CPU kernels: a convolution of ``G`` groups with weight
``(N, C/G, kh, kw)`` is stored as its ``T`` kept columns. ``columns[t]`` is
``(c * kh + i) * kw + j`` with the input channel ``c`` counted over all groups; ``weight[r, t]`` is
the weight of filter ``r`` of column t's group.

The forward pass of a group is the matrix product ``weight (N/G, T_g) @ x_columns (T_g, B·Ho·Wo)``
on the tensor cores, whose right side is gathered from ``x`` tile by tile and never stored. What
bounds it is not the product but the gather, one load per element, since neighbouring columns lie
anywhere; so everything about an element that can be is worked out before the loop:

* its address is a pointer of its pixel plus an offset of its column: one instruction;
* whether it lies in the zero padding is ``outside[pixel] & taps[column] != 0``, one instruction:
  bit ``i`` of ``outside`` says that row ``i`` of the kernel falls off the image there, bit
  ``15 + j`` that column ``j`` does, and ``taps`` has the bits of the element's ``i`` and ``j``;
* the next tile's loads are issued before the product of the present one.

Loads coalesce along pixels in NCHW. In channels-last they coalesce along the columns of one kernel
position, so there all tiles are transposed, and the columns should be ordered by position: see
`channels_last_order`.

Block sizes are tuned when a kernel first meets a size: that takes seconds, and must be over before
a CUDA graph is captured. No atomic additions are used: the same call gives the same bits for as
long as the process lives; another one may choose other blocks, which add up in another order.

Each of `forward`, `backward_input` and `backward_weight` has a function to call and the kernels
that it launches; `tables` makes what they read of the columns, `tiles` is what they share.

This package can be imported without Triton; `is_available` says whether its functions work.
"""

from spp_lightning.compaction.kernels.gpu.backward_input import column_conv2d_backward_input
from spp_lightning.compaction.kernels.gpu.backward_weight import column_conv2d_backward_weight
from spp_lightning.compaction.kernels.gpu.forward import column_conv2d
from spp_lightning.compaction.kernels.gpu.language import is_available
from spp_lightning.compaction.kernels.gpu.tables import channels_last_order, column_table

__all__ = [
    "channels_last_order",
    "column_conv2d",
    "column_conv2d_backward_input",
    "column_conv2d_backward_weight",
    "column_table",
    "is_available",
]
