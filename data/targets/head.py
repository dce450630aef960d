"""A teacher's output matrix in the cache, stored beside the hidden states it multiplies.

``head.safetensors`` (float32 ``weight`` [V,H], and ``bias`` [V] if there is one) and the sealed
``head.json``: the file's sha256, the factor on the logits and their soft cap. It is stored before
any unit of the teacher, so that no states are ever without it.
"""

import hashlib
from dataclasses import dataclass, fields
from functools import lru_cache
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rekindle.data.errors import CacheFormatError, CacheMismatchError, unusable
from rekindle.data.storage.base import Store
from rekindle.data.storage.seal import REPAIR, read_sealed, seal
from rekindle.data.storage.store import open_store

HEAD_FILES = ("head.json", "head.safetensors")
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StoredHead:
    """logits = softcap(scale · (hidden Wᵀ + b)); ``softcap`` None: no cap."""

    weight: Floats  # [V,H]
    bias: Floats | None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    sha256: str = ""  # of the file it was read from
    place: tuple[str, str] | None = None  # the cache and the teacher's folder of that file

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle batches without the matrix: each process reads it once."""
        if self.place is None:
            return StoredHead, tuple(getattr(self, field.name) for field in fields(self))
        return _reload_head, (*self.place, self.sha256)

    def log_probs(self, hidden: Floats) -> Floats:
        """Return log-probabilities [P,V] at τ = 1 of ``hidden`` [P,H]."""
        logits = hidden @ self.weight.T
        if self.bias is not None:
            logits += self.bias
        logits *= np.float32(self.scale)
        if self.softcap is not None:
            logits = self.softcap * np.tanh(logits / self.softcap)
        logits -= logits.max(axis=1, keepdims=True)
        return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def write_head(store: Store, folder: str, head: StoredHead) -> None:
    """Store the matrix unless it exists. Raise CacheFormatError if another one is there."""
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    content = save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    sha256 = hashlib.sha256(content).hexdigest()
    store.create(f"{folder}/head.safetensors", content)
    store.create(
        f"{folder}/head.json",
        seal({"sha256": sha256, "scale": head.scale, "softcap": head.softcap}),
    )
    stored = read_head(store, folder)
    same = (stored.scale, stored.softcap) == (head.scale, head.softcap)
    if not same or stored.sha256 != sha256:
        raise CacheFormatError(
            f"{store.location}/{folder} already holds the output matrix of another model. Delete "
            f"{folder} to make this teacher anew"
        )


def read_head(store: Store, folder: str) -> StoredHead:
    """Return the matrix in a teacher's folder; raise CacheFormatError if it is missing or
    damaged.
    """
    name = f"{folder}/head.safetensors"
    path = f"{store.location}/{name}"
    message = f"{path} is missing or has no head.json beside it"
    with unusable(message, FileNotFoundError, advice=f". {REPAIR}"):
        record = read_sealed(store, f"{folder}/head.json")
        content = store.read_bytes(name)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != record.get("sha256"):
        raise CacheFormatError(f"{path} is damaged. {REPAIR}")
    bad_content = (SafetensorError, KeyError, ValueError, TypeError, OverflowError)
    with unusable(f"{path} is no output matrix", *bad_content):
        tensors = load(content)
        scale, softcap = float(record["scale"]), record["softcap"]
        place = (store.location, folder)
        head = StoredHead(tensors["weight"], tensors.get("bias"), scale, softcap, sha256, place)
        _check_head(head)
    _heads[(*place, sha256)] = head
    return head


_heads: WeakValueDictionary[tuple[str, str, str], StoredHead] = WeakValueDictionary()


@lru_cache(maxsize=8)  # teachers: their batches alternate
def _reload_head(location: str, folder: str, sha256: str) -> StoredHead:
    """Return the matrix another process has read, from this process's memory or from the file."""
    head = _heads.get((location, folder, sha256)) or read_head(open_store(location), folder)
    if head.sha256 != sha256:
        raise CacheMismatchError(
            f"{location}/{folder} has another output matrix than the one these targets were read "
            "with: it was replaced meanwhile. Open the cache again"
        )
    return head


def _check_head(head: StoredHead) -> None:
    """Raise ValueError or TypeError for wrong shapes, and for values that are not finite."""
    tensors = [head.weight] if head.bias is None else [head.weight, head.bias]
    if head.weight.ndim != 2 or {t.dtype for t in tensors} != {np.dtype(np.float32)}:
        raise ValueError("it must be float32 [V,H]")
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError("its bias must be [V]")
    # A sum of float32 in float64 cannot overflow, so it is finite exactly if its terms are.
    numbers = [t.sum(dtype=np.float64) for t in tensors] + [head.scale, head.softcap or 1.0]
    if not np.isfinite(numbers).all() or (head.softcap is not None and not head.softcap > 0):
        raise ValueError("it has NaN or infinity")


def encode_hidden(hidden: Floats) -> tuple[NDArray[np.int16], Floats]:
    """Encode states [P,H] as int16 with a scale [P] each: |error| ≤ row maximum / 65,534."""
    scale = np.abs(hidden).max(axis=1, initial=0.0) / 32767
    safe = np.where(scale > 0, scale, 1.0)
    # A subnormal scale is rounded so much that the largest quotient would wrap around.
    steps = np.clip(np.rint(hidden / safe[:, None]), -32767, 32767)
    return steps.astype(np.int16), scale.astype(np.float32)


def decode_hidden(stored: NDArray[np.int16], scale: Floats) -> Floats:
    """Decode the states [P,H]."""
    return stored.astype(np.float32) * scale[:, None]
