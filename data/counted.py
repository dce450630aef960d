"""How a number of things is written: ``1 sequence``, ``2 sequences``. Knows no thing."""


def counted(number: int, unit: str) -> str:
    """``1 unit``, ``2 units``, with thousands set apart."""
    more = "es" if unit.endswith("s") else "s"
    return f"{number:,} {unit}{'' if number == 1 else more}"
