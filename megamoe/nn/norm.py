"""Root-mean-square norm (Zhang and Sennrich 2019), plain or zero-centred.

Shapes: ... any leading dimensions, D normalised dimension.
"""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * gain, with gain = weight, or 1 + weight when zero-centred.

    The statistic and the product are float32; the result has the dtype of the input.
    """

    def __init__(self, dim: int, *, eps: float, zero_centered: bool) -> None:
        """Create a norm over the last dimension, of size `dim`."""
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = nn.Parameter(torch.zeros(dim) if zero_centered else torch.ones(dim))

    def forward(self, x_D: Tensor) -> Tensor:
        """Return the normed input, same shape and dtype."""
        x32_D = x_D.float()
        gain_D = 1 + self.weight.float() if self.zero_centered else self.weight.float()
        scale = torch.rsqrt(x32_D.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x32_D * scale * gain_D).to(x_D.dtype)
