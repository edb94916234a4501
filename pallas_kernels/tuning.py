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
    def heuristic(cls, rows: int, columns: int, num_backends: int) -> "BlockConfig":
        """Two windows, or one in small tables and where there are many backends.

        Two share one lookup of their request, which is two dependent loads. One spreads a small
        table over the 132 multiprocessors of a Hopper GPU; and the stores to many backends hide the
        lookup, so that more blocks do better than more windows.
        """
        one = rows * columns < 132 * 2048 * 4 or num_backends >= 8
        return cls(windows=1 if one else 2)
