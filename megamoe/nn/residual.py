"""Residual connections whose branch is normed before it is added (Peri-LN, dual norm)."""

from collections.abc import Callable

from torch import Tensor, nn


class NormedResidual(nn.Module):
    """residual + norm(branch): the output norm of Peri-LN (Kim et al. 2025, section 3).

    Called as Megatron-core calls its bias-dropout-add: with (training, fused), and the function
    returned with ((branch, bias), residual, dropout).
    """

    def __init__(self, norm: nn.Module) -> None:
        """Take the norm of the branch's output."""
        super().__init__()
        self.norm = norm

    def forward(
        self,
        training: bool,  # noqa: FBT001 - Megatron-core's call
        fused: bool,  # noqa: FBT001, ARG002
    ) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Return the function that adds a normed branch to a residual of the same shape."""

        def add(branch: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = branch
            if bias is not None:
                output = output + bias
            output = nn.functional.dropout(self.norm(output), p=dropout, training=training)
            return residual + output

        return add
