"""The machines a plan is made for. Named ones live in launch/clusters/*.toml."""

from dataclasses import dataclass
from typing import Literal

from megamoe.recipe.check import Checked, PositiveFloat, PositiveInt


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster(Checked):
    """A number of equal nodes."""

    name: str
    num_nodes: PositiveInt
    devices_per_node: PositiveInt  # GPUs, or processes on a machine without one
    device: Literal["cpu", "cuda"]
    device_name: str
    peak_flops_per_s: (
        PositiveFloat | None
    )  # dense bf16, of one device; None where MFU means nothing
    memory_bytes: PositiveInt | None  # of one device
    network_bytes_per_s: PositiveFloat | None  # of one node, all links together

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.devices_per_node
