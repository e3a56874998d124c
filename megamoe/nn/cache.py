"""What attention keeps of the tokens before: keys and values, or the latents they are made from.

Shapes: P positions, B batch, ... of one token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class LayerCache:
    """What one layer keeps, part by part: of all tokens, or of the last `window`.

    All tokens need room from the beginning, so that a step writes its own position and copies
    nothing. A window is short: once it is full, a step moves it.
    """

    def __init__(self, buffers: tuple[Tensor, ...], *, window: int | None) -> None:
        """Take room for the positions, empty so far.

        Args:
            buffers: [P, B, ...] for each part; P is all there is room for.
            window: how many of the last tokens are kept, at most P; None: all.
        """
        assert window is None or len(buffers[0]) <= window, (len(buffers[0]), window)
        self.buffers = buffers
        self.window = window
        self.num_tokens = 0  # seen, not held

    @property
    def num_held(self) -> int:
        """Return the number of positions that are held."""
        return min(self.num_tokens, len(self.buffers[0]))

    @property
    def bytes_per_token(self) -> int:
        """Return what one token of one sequence takes."""
        return sum(math.prod(buffer.shape[2:]) * buffer.element_size() for buffer in self.buffers)

    @property
    def num_bytes(self) -> int:
        """Return what all there is room for takes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)

    def bytes_at(self, length: int) -> int:
        """Return what one sequence of a length takes."""
        held = length if self.window is None else min(length, self.window)
        return held * self.bytes_per_token

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add tokens; return each part of those that were held and of the new ones, in order.

        Args:
            new: [P, B, ...] for each part; any number of tokens in the room of a window, and as
                many as there is room for where all are kept.
        """
        start, end = self.num_held, self.num_held + len(new[0])
        self.num_tokens += len(new[0])
        if end <= len(self.buffers[0]):
            for buffer, part in zip(self.buffers, new, strict=True):
                buffer[start:end] = part
            return tuple(buffer[:end] for buffer in self.buffers)
        assert len(self.buffers[0]) == self.window, (end, len(self.buffers[0]), self.window)
        seen = tuple(
            torch.cat((buffer[:start], part))
            for buffer, part in zip(self.buffers, new, strict=True)
        )
        for buffer, part in zip(self.buffers, seen, strict=True):
            buffer.copy_(part[-len(buffer) :])
        return seen


@dataclass(frozen=True, slots=True)
class Cache:
    """What all layers keep of one batch of sequences of one length, the first layer first."""

    layers: tuple[LayerCache, ...]

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of each sequence so far."""
        return self.layers[0].num_tokens

    @property
    def num_bytes(self) -> int:
        """Return what all there is room for takes."""
        return sum(layer.num_bytes for layer in self.layers)

    def bytes_at(self, length: int) -> int:
        """Return what one sequence of a length takes."""
        return sum(layer.bytes_at(length) for layer in self.layers)


def make_layer_cache(
    shapes: tuple[tuple[int, ...], ...],
    *,
    window: int | None,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> LayerCache:
    """Return an empty cache of one layer.

    Args:
        shapes: of each part of one token.
        window: how many of the last tokens are kept; None: all.
        size: sequences, and tokens of each at most.
        dtype: of all parts.
        device: where to keep them; on "meta" sizes alone exist.
    """
    batch, capacity = size
    positions = capacity if window is None else min(capacity, window)
    return LayerCache(
        tuple(
            torch.empty(positions, batch, *shape, dtype=dtype, device=device) for shape in shapes
        ),
        window=window,
    )
