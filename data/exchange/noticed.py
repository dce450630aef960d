"""What an import did to rows that were not as a cache keeps them."""

from dataclasses import dataclass

from rekindle.data.counted import counted


@dataclass
class Noticed:
    """What was done to the rows, to be said once: positions of each."""

    sorted: int = 0
    cut: int = 0
    over: int = 0  # whose masses summed to a little more than 1
    untold: int = 0  # without a target, of sequences that have a row

    def told(self, k: int) -> list[str]:
        """A sentence for each."""
        said = [
            (self.sorted, "candidates were put in order of probability at {}"),
            (
                self.cut,
                f"the {k} likeliest candidates are kept, the others' mass in the tail, at {{}}",
            ),
            (self.over, "masses a little above 1 (rounding) were scaled to 1 at {}"),
            (self.untold, "without a target, in sequences that have a row: {}"),
        ]
        return [told.format(counted(count, "position")) for count, told in said if count]
