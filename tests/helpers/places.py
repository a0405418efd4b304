"""Passages about places, all with the same answer."""

ANSWER = "thomas grant"
PLACES = (
    "harbour", "mill", "quarry", "bakery", "school", "station", "museum", "chapel", "forge", "brewery", "market",
    "bridge", "castle", "garden", "theatre", "library",
)  # fmt: skip


def place(number: int) -> str:
    """Return a passage with the answer's words, but not adjacent, since a negative must not contain the answer."""
    name = PLACES[number]
    return f"The {name} was opened by a man of the name of grant. At the {name}, thomas kept the books of the {name}."
