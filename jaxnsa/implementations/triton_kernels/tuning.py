"""Block sizes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How tables are cut into programs.

    Attributes:
      tokens: columns of the page table that a program copies in one turn, a power of two.
      pages: columns of the real page table, where that is the only one.
      warps: of a program.
      programs: that share the tables. A program takes several turns where there would be more, as
        many as its request's live columns need.
    """

    tokens: int = 1024
    pages: int = 256
    warps: int = 4
    programs: int = 8192

    @classmethod
    def heuristic(cls, rows: int, columns: int) -> "BlockConfig":
        """Small pieces for a small table, so that every multiprocessor of a Hopper GPU has work."""
        if rows * columns < 132 * 2048 * 4:
            return cls(tokens=512, warps=2)
        return cls()
