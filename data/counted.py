"""Write numbers of things: ``2 sequences``, ``1.5 MB``."""

BYTES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def counted(number: int, unit: str) -> str:
    """Return ``1 unit``, ``2 units``, with a thousands separator."""
    plural = "es" if unit.endswith("s") else "s"
    return f"{number:,} {unit}{'' if number == 1 else plural}"


def shown_bytes(size: int) -> str:
    """Return bytes with a decimal unit, in about three digits."""
    for factor, unit in BYTES:
        value = size / factor
        if value >= 0.9995:
            return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"
    return counted(size, "byte")
