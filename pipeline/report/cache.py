"""What the report page says of caches: their content, their size, and whether they can be read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rekindle.data.cache import Cache
from rekindle.data.counted import counted
from rekindle.pipeline.report.page import Block, Facts, Note, Section
from rekindle.pipeline.report.table import NOTHING, Table, formatted, table_of

NOTE = (
    "A sequence is a piece of text that a model reads at once. A target is a teacher's output "
    "for a masked token or, from a task expert, for a sequence; the tail is the probability of "
    "everything that is not kept. Bytes/token: per token of text, all maskings together. "
    f"Ms/sequence: caching time per sequence that the teacher was run on ({NOTHING}: not "
    "recorded)."
)


@dataclass(frozen=True)
class TeacherFacts:
    """One cached teacher; ``positions`` are masked tokens, or sequences for a task expert.

    ``seconds_per_view``: recorded seconds of stage 1 per sequence (of each masked replica).
    """

    name: str
    targets: str
    positions: int
    bytes: int
    corpus_tokens: int
    seconds_per_view: float | None = None


@dataclass(frozen=True)
class CacheFacts:
    """What a cache holds; ``documents`` are the texts its sequences come from."""

    sequences: int
    tokens: int
    vocabulary: int
    teachers: list[TeacherFacts]
    documents: int | None = None


def _facts_of(cache: Cache) -> CacheFacts:
    tokens, teachers = cache.corpus.tokens, []
    for name, reader in sorted(cache.teachers.items()):
        masked = reader.masked and reader.kind.has_tail
        kept = reader.kind.description + (
            f", {counted(reader.replicas, 'masking')}" if masked else ""
        )
        rows = int(reader.commits.rows.sum())
        seconds = reader.seconds / rows if reader.seconds is not None and rows else None
        facts = TeacherFacts(name, kept, reader.positions, reader.bytes_on_disk, tokens, seconds)
        teachers.append(facts)
    size, documents = cache.corpus.info["tokenizer"]["size"], cache.corpus.documents
    return CacheFacts(len(cache), tokens, size, teachers, documents)


# --- caches that runs refer to
# ---------------------------------------------------------------------


@dataclass(frozen=True)
class KnownCache:
    """The cache at a path that runs name: its facts, or the ``problem`` that hides them.

    ``changed`` lists what differs from the time the runs read it.
    """

    path: str
    facts: CacheFacts | None = None
    problem: str = ""
    changed: list[str] = field(default_factory=list)


def find_cache(path: str, corpus: str, teachers: Mapping[str, str]) -> KnownCache:
    """Read the cache at ``path`` as far as possible and compare its fingerprints with those that
    runs have recorded for ``corpus`` and the ``teachers``' weights. Never raises.
    """
    try:
        cache = Cache.open(path)
        facts = _facts_of(cache)
        changed = [] if cache.corpus.fingerprint == corpus else ["its corpus"]
        for name, weights in teachers.items():
            reader = cache.teachers.get(name)
            if reader is None or reader.fingerprint != weights:
                changed.append(f"teacher {name}")
    # The page is about finished runs: whatever keeps their cache from being read (moved, a bucket
    # that needs credentials or a package, damage) is reported, and the rest is shown.
    except Exception as error:
        return KnownCache(path, problem=str(error) or type(error).__name__)
    return KnownCache(path, facts, changed=changed)


def cache_section(caches: Sequence[KnownCache]) -> Section:
    """Return what each cache holds, or why that is unknown."""
    blocks = [block for cache in caches for block in _blocks(cache)]
    return Section("The cache" if len(caches) < 2 else "The caches", blocks)


def _blocks(cache: KnownCache) -> Iterator[Block]:
    if (facts := cache.facts) is None:
        told = f"{cache.path} cannot be read any more ({cache.problem}): its facts are unknown."
        yield Note(told, warns=True)
        return
    about = {
        "at": cache.path,
        "text": f"{counted(facts.sequences, 'sequence')}, {counted(facts.tokens, 'token')}",
        "vocabulary": counted(facts.vocabulary, "token"),
        "targets": counted(sum(teacher.bytes for teacher in facts.teachers), "byte"),
    }
    yield Facts(list(about.items()))
    if changed := ", ".join(cache.changed):
        told = (
            f"Changed since the runs read it: {changed}. The following describes the cache as "
            "it is now."
        )
        yield Note(told, warns=True)
    if facts.teachers:
        yield teacher_table(facts.teachers, note=NOTE)


def teacher_table(teachers: Sequence[TeacherFacts], title: str = "", note: str = "") -> Table:
    """Return a row for each teacher: what is kept, how large it is, how long it took."""
    head = ["teacher", "kept for each target", "targets"]
    head += ["bytes", "bytes/target", "bytes/token", "ms/sequence"]
    rows = [
        [
            *(t.name, t.targets, f"{t.positions:,}", f"{t.bytes:,}"),
            f"{t.bytes / max(1, t.positions):.1f}",
            f"{t.bytes / max(1, t.corpus_tokens):.2f}",
            formatted(t.seconds_per_view and 1000 * t.seconds_per_view, "{:,.2f}"),
        ]
        for t in teachers
    ]
    return table_of(title, head, rows, 2, note)
