"""What an import changed in rows that were not in a cache's form."""

from dataclasses import dataclass

from rekindle.data.counted import counted


@dataclass
class Noticed:
    """Counts of positions changed, to be reported once."""

    sorted: int = 0
    cut: int = 0
    above_one: int = 0  # masses that summed to slightly more than 1
    missing: int = 0  # without a target, in sequences that have a row

    def sentences(self, k: int) -> list[str]:
        """Return a sentence for each count that is not 0."""
        templates = [
            (self.sorted, "candidates were sorted by probability at {}"),
            (
                self.cut,
                f"the {k} likeliest candidates are kept, the others' mass in the tail, at {{}}",
            ),
            (self.above_one, "masses a little above 1 (rounding) were scaled to 1 at {}"),
            (self.missing, "without a target, in sequences that have a row: {}"),
        ]
        return [text.format(counted(count, "position")) for count, text in templates if count]
