"""Block sizes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How a table is cut into blocks, each the work of one warpgroup.

    A window is what 128 threads move with one 16-byte access each, 512 elements; fewer where a row
    pitch does not allow 16 bytes.

    Attributes:
      windows: windows that a block loads before it stores any.
      scalars: columns that a block copies one by one, in tables narrower than a window.
      blocks: blocks of a table. A block takes several turns where there would be more, as many as
        its request's live columns need.
    """

    windows: int
    scalars: int = 8
    blocks: int = 8192

    @classmethod
    def heuristic(cls, rows: int, columns: int) -> "BlockConfig":
        """Two windows, or one where that would leave multiprocessors without work.

        More windows amortise the latency of looking up the request (two dependent loads), until
        their registers leave room for fewer blocks; fewer spread a small table over the 132
        multiprocessors of a Hopper GPU.
        """
        return cls(windows=2 if rows * columns >= 132 * 2048 * 4 else 1)
