"""Commit records: the small files whose existence is the only proof that a unit is done."""

import builtins
import json
import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError

from rekindle.data.errors import CacheFormatError, unusable
from rekindle.data.storage.seal import REPAIR, SEAL, checksum
from rekindle.data.storage.store import safe_name

ROWS_PER_BATCH = 128  # 128 sequences x 512 positions are a few MB: one checksum, one page-in
SECONDS = "seconds"  # a fact: see `seconds_of`
Region = tuple[int, int, str]  # offset, length, xxh3_64


@dataclass(frozen=True)
class Commit:
    """What a commit record says of one unit."""

    unit: str
    path: Annotated[str, AfterValidator(safe_name)]  # relative to the set's folder
    rows: int
    bytes: int
    sha256: str
    regions: tuple[Region, ...]  # covering the whole file
    facts: dict[str, Any]  # what the owner of the set wants to know
    rows_per_batch: int = ROWS_PER_BATCH  # of every record batch but the last

    def to_bytes(self) -> builtins.bytes:
        """The record as JSON, with its own checksum last."""
        body = asdict(self)
        if self.rows_per_batch == ROWS_PER_BATCH:  # as before there were others
            del body["rows_per_batch"]
        return (json.dumps(body | {SEAL: checksum(body)}, indent=1) + "\n").encode()

    def count(self, fact: str) -> int:
        """A number in the facts; CacheFormatError where there is none."""
        found = self.facts.get(fact)
        if type(found) is not int or found < 0:
            raise CacheFormatError(
                f"the commit record of {self.path} does not say how many {fact} it has. {REPAIR}"
            )
        return found

    @staticmethod
    def from_json(body: Any, where: str) -> "Commit":
        """Parse and check a record read from ``where``; CacheFormatError when it is damaged."""
        told = f"the commit record {where} is damaged"
        wrong = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
        with unusable(told, *wrong, advice=f". {REPAIR}"):
            stated = body.pop(SEAL)
            if stated != checksum(body):
                raise ValueError("its checksum does not match")
            commit = _parsed(body)
            _check_regions(commit.regions, commit.bytes)
            if commit.rows_per_batch <= 0 or ROWS_PER_BATCH % commit.rows_per_batch:
                raise ValueError(f"{commit.rows_per_batch} rows a record batch")
            # Rows are counted out below: first they must be as many as the regions can hold.
            batches = -(-commit.rows // commit.rows_per_batch)
            if commit.rows < 0 or len(commit.regions) - 1 - batches not in (0, 1):
                raise ValueError(f"{commit.rows} rows in {len(commit.regions)} regions")
        return commit


_PARSER = TypeAdapter(Commit)


def _parsed(body: Any) -> Commit:
    """The record that ``body`` is; ValueError, in a line, where a field is none of a record."""
    try:
        return _PARSER.validate_python(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}") from None


def seconds_of(commit: Commit) -> float | None:
    """The seconds that the unit took to compute, where its record says so.

    A fact of the record alone: neither the data nor any fingerprint depends on it, so that two runs
    of one unit still give the same bytes of data.
    """
    found: Any = commit.facts.get(SECONDS)
    if type(found) in (int, float) and 0 <= found < math.inf:
        return float(found)
    return None


def _check_regions(regions: tuple[Region, ...], size: int) -> None:
    """ValueError unless the regions follow each other from the file's first byte to its last."""
    at = 0
    for offset, length, _ in regions:
        if offset != at or length <= 0:
            raise ValueError("its regions do not follow each other")
        at += length
    if at != size or not regions:
        raise ValueError("its regions do not cover the file")
