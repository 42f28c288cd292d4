"""Numbers as text for people."""


def format_bytes(n: float) -> str:
    """Bytes in decimal units, three or four digits: 1.27 GB."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.{2 if n < 10 else 1}f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")
