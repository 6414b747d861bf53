"""How work is cut to the sizes of caches."""
from dataclasses import dataclass

__all__ = ['Tuning']


@dataclass(frozen=True)
class Tuning:
    """What the order of work goes by, in bytes where nothing else is said; results do not depend on it.

    Attributes:
        chunk: Images that one thread takes through the network together.
        block: Of a convolution's input that are taken through all its output channels together.
        large_weights: Of a convolution's weights above which it is ``large_block`` instead.
        large_block: The same, of large weights.
        streamed_weights: Of a layer's weights up to which they stream past each position, unless it reads these again.
        longest_run: Of a product without tiles, in steps of four bytes.
        steps_at_once: Steps of the product whose weights for a block of channels half fill the first-level cache.
        segment_weights: Of the weights of layers that are worked through together.
        together_weights: Of a layer's weights above which the threads share it, each with some of the output channels.
        band: Of all maps of such layers, for the rows that are worked on.
        most_bands: That a map is cut into at most.
    """

    chunk: int = 4
    block: int = 256 << 10
    large_weights: int = 1 << 20
    large_block: int = 700 << 10
    streamed_weights: int = 1200 << 10
    longest_run: int = 256
    steps_at_once: int = 16
    segment_weights: int = 600 << 10
    together_weights: int = 1500 << 10
    band: int = 800 << 10
    most_bands: int = 256
