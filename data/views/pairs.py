"""``pairs-<kind>-<fingerprint>``: per sequence, two texts of the corpus for sentence-pair experts,
and the student's encoding of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress, pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.encoder import LATEST_CUT_RULE
from rekindle.data.source.sentences import split_sentences
from rekindle.data.storage.base import Store
from rekindle.data.storage.columns import Lists, list_type, list_views
from rekindle.data.storage.shards import rows_in_batches
from rekindle.data.views.base import Lengths, StoredView
from rekindle.data.views.masking import generator

PairKind = Literal["adjacent", "same-document", "random", "record"]
RECORD = "record"
Pair = tuple[str, str] | None
CUT = "cut"  # key of ``view.json``; older views lack it
NO_PAIR = (np.zeros(0, np.int32), np.zeros(0, np.int32))
FEW_PAIRS = 0.05  # share of the sequences; an expert with fewer pairs teaches almost nothing
_SENTENCE_ENDS = "(they end with . ! ? or a blank line)"
_OR_RANDOM = (
    "use longer texts, or pairs: random, which needs no neighbours (a teacher that is already "
    "cached then needs another name)"
)
_NEEDS = {  # what a pair needs, and the advice if that is missing
    "adjacent": (f"sequence has two sentences of one document {_SENTENCE_ENDS}", _OR_RANDOM),
    "same-document": (f"document has two sentences {_SENTENCE_ENDS}", _OR_RANDOM),
    "random": ("sequence has a second document to pair with", "use more texts"),
}


class PairView(StoredView):
    """Text pairs from the corpus for sentence-pair experts, one per sequence where possible.

    ``adjacent``: two neighbouring sentences of the sequence, from one document. ``same-document``:
    a sentence of the sequence and another sentence of the same document. ``random``: a sentence of
    the sequence and one of another document. Partners come from the same corpus shard. A sequence
    without a pair has nulls. ``record``: the two texts that a sequence is made of, in a corpus of
    pairs.
    """

    kind = "pairs"
    tasks = ("sequence_classification", "regression")
    paired = True
    fields = (
        pa.field("digest", pa.string()),
        pa.field("text_a", pa.string()),
        pa.field("text_b", pa.string()),
        pa.field("input_ids", list_type(pa.int32())),
        pa.field("token_types", list_type(pa.uint8())),
    )
    list_column = "token_types"

    def __init__(self, corpus: Corpus, pairs: PairKind, seed: int, cut: int = LATEST_CUT_RULE):
        """``cut``: how pairs that are too long are shortened, see ``Tokenizer.encode_pair``."""
        self.pairs, self.cut = pairs, cut
        identity_facts = {"pairs": pairs} | ({CUT: cut} if cut > 1 else {})
        super().__init__(corpus, seed, identity_facts, pairs)

    @classmethod
    def as_stored(cls, corpus: Corpus, pairs: PairKind, seed: int, store: Store) -> "PairView":
        """Return the view as the cache in ``store`` has it, with its former way of
        cutting if any.
        """
        former = cls(corpus, pairs, seed, cut=1)
        existing = store.names(f"views/{former.name}")
        return former if existing else cls(corpus, pairs, seed)

    @staticmethod
    def cut_of(identity: Mapping[str, Any]) -> int:
        """Return how pairs were shortened in a view with this description (``view.json``)."""
        return int(identity.get(CUT, 1))

    @staticmethod
    def pairs_of(name: str) -> str:
        """Return the kind of pairs in the view of that recorded name."""
        return name.removeprefix("pairs-").rpartition("-")[0]

    @classmethod
    def is_valid_batch(cls, batch: pa.RecordBatch, lists: Lists, lengths: Lengths) -> bool:
        """Return whether each row has both texts or none."""
        return bool(batch["text_a"].is_null().equals(batch["text_b"].is_null()))

    def _columns(self, number: int, replica: int | None) -> Iterator[list[pa.Array]]:
        shard = self.corpus.shard(number)
        if self.pairs == RECORD:
            yield from map(self._record_columns, shard.batches())
            return
        table = shard.table()
        digests = table["digest"].to_pylist()
        pairs = make_pairs(
            [parts for batch in shard.batches() for parts in _document_parts(batch)],
            table["document"].to_pylist(),
            [generator(f"pairs/{self.pairs}", self.seed, digest) for digest in digests],
            self.pairs,
        )
        length = self.corpus.info["config"]["sequence_length"]
        for first, last in rows_in_batches(len(digests)):
            batch_pairs = pairs[first:last]
            encoded = [
                self.corpus.tokenizer.encode_pair(*pair, length, self.cut) if pair else NO_PAIR
                for pair in batch_pairs
            ]
            columns: list[list] = [digests[first:last]]
            columns += [[pair and pair[text] for pair in batch_pairs] for text in (0, 1)]
            columns += [[ids for ids, _ in encoded], [types.astype("u1") for _, types in encoded]]
            yield [pa.array(column, f.type) for column, f in zip(columns, self.fields, strict=True)]

    def _record_columns(self, batch: pa.RecordBatch) -> list[pa.Array]:
        texts = zip(*self.corpus.pairs(batch), strict=True)
        columns = [pa.array(column, pa.string()) for column in texts]
        return [batch["digest"], *columns, batch["input_ids"], batch["token_types"]]


def _document_parts(batch: pa.RecordBatch) -> list[list[str]]:
    """Return each row's text, split where another document begins."""
    tokens, characters = list_views(batch["char_starts"], "char_starts")
    lists, document_starts = list_views(batch["document_starts"], "document_starts")
    parts = []
    for row, text in enumerate(batch["text"].to_pylist()):
        first_tokens = document_starts[lists[row] + 1 : lists[row + 1]]
        cuts = characters[tokens[row] + first_tokens].tolist()
        parts.append([text[a:b] for a, b in pairwise([0, *cuts, len(text)])])
    return parts


def make_pairs(
    texts: list[list[str]],
    documents: list[str],
    generators: list[np.random.Generator],
    kind: PairKind,
) -> list[Pair]:
    """Return one pair of sentences per row, or None where the rows allow none.

    ``texts``: each row's text, split where another document begins; ``documents``: the document of
    its first part. Neighbours never cross documents; the other kinds use the first part.
    """
    sentences_of = [[[t[a:b] for a, b in split_sentences(t)] for t in parts] for parts in texts]
    if kind == "adjacent":
        neighbours = [[pair for part in parts for pair in pairwise(part)] for parts in sentences_of]
        return [
            choices[int(random.integers(len(choices)))] if choices else None
            for choices, random in zip(neighbours, generators, strict=True)
        ]
    same_document = kind == "same-document"
    return _distant_pairs(
        [parts[0] for parts in sentences_of], documents, generators, same_document
    )


def _distant_pairs(
    rows: list[list[str]],
    documents: list[str],
    generators: list[np.random.Generator],
    same_document: bool,
) -> list[Pair]:
    """Pair a sentence of each row with any other of the same document, or of another one."""
    sentences: list[str] = []  # document after document
    starts: dict[int, int] = {}
    lows: dict[str, int] = {}
    highs: dict[str, int] = {}
    for row in sorted(range(len(rows)), key=lambda row: documents[row]):
        starts[row] = len(sentences)
        lows.setdefault(documents[row], len(sentences))
        sentences += rows[row]
        highs[documents[row]] = len(sentences)
    pairs: list[Pair] = []
    for row, random in enumerate(generators):
        low, high = lows[documents[row]], highs[documents[row]]
        choices = high - low - 1 if same_document else len(sentences) - (high - low)
        if not rows[row] or choices < 1:
            pairs.append(None)
            continue
        first = starts[row] + int(random.integers(len(rows[row])))
        other = int(random.integers(choices))
        if same_document:
            second = low + other + (low + other >= first)
        else:
            second = other + (high - low if other >= low else 0)
        pairs.append((sentences[first], sentences[second]))
    return pairs


def count_sequences(
    corpus: Corpus, domains: Sequence[str] | None, shards: NDArray[np.int64] | None = None
) -> int:
    """Return how many sequences (of ``domains``; None: all) are in the ``shards``, or in all."""
    numbers = np.arange(len(corpus.commits)) if shards is None else shards
    if domains is None:
        return int(corpus.commits_by_unit.rows[numbers].sum())
    chosen = compress(
        corpus.commits_by_unit.counts_by_name("domains"),
        np.isin(np.arange(len(corpus.commits)), numbers),
    )
    return sum((counts or {}).get(name, 0) for counts in chosen for name in {*domains})


def few_pairs_warning(teacher: str, kind: str, with_pair: int, possible: int) -> str | None:
    """Return a warning if an expert has a pair in less than FEW_PAIRS of the sequences that it
    ``possible`` teach (those of its domains), of which ``with_pair`` have one; None otherwise.
    """
    if kind == RECORD or not possible or with_pair >= FEW_PAIRS * possible:
        return None
    requirement, advice = _NEEDS[kind]
    if not with_pair:
        return (
            f"teacher {teacher!r}, pairs: {kind}: no {requirement}, so there is no pair and "
            f"nothing to teach: {advice}"
        )
    return (
        f"teacher {teacher!r}, pairs: {kind}: only {100 * with_pair / possible:.2g} % of its "
        f"sequences have a pair (this warning appears below {100 * FEW_PAIRS:g} %), and it does "
        f"not teach the others. Hardly any {requirement}: {advice}"
    )
