"""Block sizes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How a table is cut into blocks, each the work of one warpgroup.

    A window is 128 threads times the elements of one 16-byte access (fewer where a row pitch does
    not allow 16 bytes): 512 elements. All windows of a block are loaded before the first store.

    Attributes:
      windows: windows of a row that one block copies.
      scalars: columns that one block copies one by one, in tables narrower than a window.
    """

    windows: int
    scalars: int = 8

    @classmethod
    def heuristic(cls, rows: int, columns: int) -> "BlockConfig":
        """Blocks of 8 KiB, or of 4 KiB where the table would give fewer than four waves of blocks.

        Larger blocks amortise the latency of looking up the request (two dependent loads); smaller
        ones spread a small table over the 132 multiprocessors of a Hopper GPU.
        """
        blocks = rows * columns // 2048
        return cls(windows=4 if blocks >= 4 * 132 else 2)
