"""The rotation as a product of complex numbers: one pass over the memory where the definition takes eight."""

import torch
from torch import Tensor

from kinetok.kernels.rotary import reference

WHOLE_VECTORS = 32
"""Head sizes that leave nothing over for the loop after the vectors, whose multiplications may be fused with the additions."""


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """``reference.apply_rotary`` to the bit: head sizes that are no multiple of 32 take the definition itself."""
    if x.shape[-1] % WHOLE_VECTORS:
        return reference.apply_rotary(x, table)
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    turns = table.to(torch.promote_types(table.dtype, torch.float32))[:, :, None]
    return torch.view_as_real(_complex(pairs) * _complex(turns)).flatten(-2).to(x.dtype)


def _complex(x: Tensor) -> Tensor:
    x = x.contiguous()
    return torch.view_as_complex(x.clone() if x.storage_offset() % 2 else x)  # no view may start at an odd number
