"""Block sizes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How tables are cut into tiles, and how many programs share them.

    Attributes:
      tile: columns of a tile of the page table, a power of two.
      pages: columns of a tile of the real page table where that is the only table, a power of two.
      warps: of a program.
      programs: programs of the tables. Where there are more tiles, a program strides over them,
        with tail "keep" as far as its request's live columns reach.
    """

    tile: int = 1024
    pages: int = 256
    warps: int = 4
    programs: int = 8192

    @classmethod
    def heuristic(cls, rows: int, columns: int) -> "BlockConfig":
        """Small tiles for a small table, so that every multiprocessor of a Hopper GPU has work."""
        if rows * columns < 132 * 2048 * 4:
            return cls(tile=512, warps=2)
        return cls()

    @classmethod
    def of_pages(cls, requests: int, pages: int) -> "BlockConfig":
        """For page starts alone: small programs, and large tiles where there are many."""
        return cls(pages=256 if requests * pages >= 132 * 2048 else 128, warps=2)
