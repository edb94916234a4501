"""The mistakes of `planted_mistakes.py` fit the sources, so that each can be planted."""

from pathlib import Path

from mistakes import MISTAKES

ROOT = Path(__file__).parents[1]


def test_every_mistake_has_its_place():
    places = {m.name: (ROOT / m.file).read_text().count(m.old) for m in MISTAKES}
    assert {name: count for name, count in places.items() if count != 1} == {}
    assert len(places) == len(MISTAKES)
