"""Which range of numbers the 256 steps of a byte shall cover: what was seen of a map, and the search over it."""
from typing import List, Optional, Tuple

import torch

__all__ = ['Observer', 'best_range', 'channel_ranges']

SAMPLES = 1 << 12  # values kept of each map of each batch
MOST = 1 << 14  # of all batches together
CLIPPED = 8.  # how much more an error counts that cuts a value off: those of an image come together, and add up
MARGIN = 1.25  # how much wider the range is, for values that calibration has not shown
FEW = 100  # positions of a channel that say little of what it may hold
NARROWEST = 1 / 256  # of the map's range, what a channel's own is taken for at least
SHARES = torch.linspace(1., 0.3, 29)  # of a map's largest value that are tried for the last step


class Observer:
    """What a map held: its ends, and a sample of its values."""

    def __init__(self, generator: Optional[torch.Generator] = None) -> None:
        """
        Args:
            generator: For the sample; by default one of its own, always the same.
        """
        self.low, self.high = 0., 0.  # with zero between them
        self.samples: List[torch.Tensor] = []
        self.generator = generator or torch.Generator().manual_seed(0)

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)

    def see(self, values: torch.Tensor) -> None:
        """Look at a map.

        Args:
            values: Any tensor of numbers.
        """
        values = values.detach().flatten().float()
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        if len(values) > SAMPLES:
            values = values[torch.randint(len(values), (SAMPLES,), generator=self.generator).to(values.device)]
        self.samples.append(values)

    def range(self, symmetric: bool = False) -> Tuple[float, float]:
        """The range whose 256 steps leave the least squared error over the sample.

        Args:
            symmetric: Zero is the middle step, where there are negative values.

        Returns:
            The range's ends.
        """
        values = torch.cat(self.samples)
        if len(values) > MOST:
            values = values[torch.randperm(len(values), generator=self.generator)[:MOST].to(values.device)]
        return best_range(values, self.low, self.high, symmetric)


def channel_ranges(ends: torch.Tensor, count: int, whole: Tuple[float, float]) -> torch.Tensor:
    """For each channel a range between its own and that of the whole map, and wider by a margin.

    A channel's own would leave its values the most steps; but the weights that read it are rounded in steps as well,
    times the map's, and would become as unequal as the channels are. So it is their geometric mean. Where few positions
    were seen, it is nearer to that of the whole map.

    Args:
        ends: Of each channel the least and the greatest value, ``(C, 2)``.
        count: How many positions were seen.
        whole: The range that was found for all of them together.

    Returns:
        The ranges' ends, ``(C, 2)``.
    """
    wanted = torch.tensor(whole)
    ends = torch.stack([ends[:, 0].minimum(NARROWEST * wanted[0]), ends[:, 1].maximum(NARROWEST * wanted[1])], 1)
    share = 0.5 + 0.5 * FEW / (FEW + count)
    wider = ((wanted[1] - wanted[0]) / (ends[:, 1] - ends[:, 0])).clamp(min=1.).pow(share)
    return MARGIN * wider[:, None] * ends


def best_range(values: torch.Tensor, low: float, high: float, symmetric: bool = False) -> Tuple[float, float]:
    """The range whose 256 steps leave the least squared error, which may clip a few values; their errors count more.

    Args:
        values: A sample.
        low: The least value there is, not above zero.
        high: The greatest, not below.
        symmetric: Zero is the middle step (128 of 0 to 255), where there are negative values.

    Returns:
        The range's ends.
    """
    def least(lows: torch.Tensor, highs: torch.Tensor) -> Tuple[float, float]:
        lows, highs = lows.to(values.device), highs.to(values.device)
        steps = ((highs - lows) / 255).clamp(min=1e-30)[:, None]
        zeros = (-lows[:, None] / steps).round()
        rounded = (values / steps + zeros).round()
        inside = rounded.clamp(0, 255)
        errors = ((inside - zeros) * steps - values).square()
        k = int(torch.where(inside == rounded, errors, CLIPPED * errors).mean(dim=1).argmin())
        return float(lows[k]), float(highs[k])

    if symmetric and low < 0:
        highs = max(-low, high) * SHARES
        return least(-highs * 128 / 127, highs)
    ones = torch.ones_like(SHARES)
    _, high = least(low * ones, high * SHARES)
    low, _ = least(low * SHARES, high * ones)
    return low, high
