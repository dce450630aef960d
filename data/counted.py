"""How a number of things is written: ``2 sequences``, ``1.5 MB``. Knows no thing."""

BYTES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def counted(number: int, unit: str) -> str:
    """``1 unit``, ``2 units``, with thousands set apart."""
    more = "es" if unit.endswith("s") else "s"
    return f"{number:,} {unit}{'' if number == 1 else more}"


def shown_bytes(size: int) -> str:
    """Bytes with a unit of a thousand each, three digits or so."""
    for each, unit in BYTES:
        value = size / each
        if value >= 0.9995:
            return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"
    return counted(size, "byte")
