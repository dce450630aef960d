"""Bad caches, checkpoints and runs."""

from rekindle.data.changes.carry_out import change_teacher
from rekindle.data.storage.seal import seal
from rekindle.data.storage.store import LocalStore
from testlib.bad_input.row import Bad, Place

MAKE = "cache-teachers run.yaml"
TRAIN = "train-student run.yaml --out new"
GO_ON = "train-student run.yaml --out student --resume"
RENEWS = "`pipeline cache-teachers` makes it anew"
NOWHERE = ("nowhere", "is not a Rekindle cache", "make one with `pipeline cache-teachers`")
SHARD = "cache/targets/lm/data/*"
CUT = "6,530 were committed: it was cut short or changed"
STEPS = [f"student/checkpoints/step-0000000{step}" for step in (1, 2)]


def _written(name: str, content: str):
    return lambda place: place.write(name, content)


def _gone(*names: str):
    return lambda place: [place.drop(name) for name in names]


def _cut(*patterns: str):
    return lambda place: [place.cut(pattern) for pattern in patterns]


def _newer(place: Place) -> None:
    place.write("cache/cache.json", seal({}, 99))


def _changing(place: Place) -> None:
    change = {"action": "remove", "teacher": "lm", "version": 3}
    place.write("cache/cache.json", seal({"change": change}, 10))


def _renamed(place: Place) -> None:
    change_teacher(LocalStore(place / "cache"), "rename", "lm", "big")


def _unfinished(*spoils):
    """Return a killed run and the damage to its checkpoints."""

    def spoil(place: Place) -> None:
        for name in ("summary.json", "run.yaml", "model.safetensors"):
            place.drop(f"student/{name}")
        for one in spoils:
            one(place)

    return spoil


def _other_text(place: Place) -> None:
    place.rows("text.jsonl", {"text": "another river runs under the city"})


def _outside(place: Place) -> None:
    name = "cache/targets/lm/commits/00001-r001.json"
    place.change(name, path="../../../run.yaml")


CACHES = (
    Bad("inspect of a missing cache", "inspect nowhere", *NOWHERE, code=3),
    Bad("verify of a missing cache", "verify nowhere", *NOWHERE, code=3),
    Bad("gc of a missing cache", "gc nowhere", *NOWHERE, code=3),
    Bad("training from a missing cache",
        f"{TRAIN} --set cache.path=nowhere", *NOWHERE, code=3),
    Bad("import into a missing cache",
        "import-targets nowhere new text.jsonl --provenance model=x", *NOWHERE, code=3),
    Bad("export of a missing cache",
        "export-targets nowhere --out new.jsonl", *NOWHERE, code=3),
    Bad("a file as the cache", "inspect run.yaml", "run.yaml", *NOWHERE[1:], code=3),
    Bad("a cache of a newer format", TRAIN, "cache format 99", "reads formats 1 to",
        "a later one, or make the cache again", _newer, 3),
    Bad("adding to a cache of a newer format", MAKE, "cache format 99", "reads formats 1 to",
        "a later one, or make the cache again", _newer, 3),
    Bad("a changed manifest", "inspect cache", "cache/cache.json", "its checksum does not match",
        RENEWS, lambda place: place.change("cache/cache.json", teachers={}), 3),
    Bad("a truncated manifest", TRAIN, "cache/cache.json", "is not valid JSON",
        "`pipeline verify`", _cut("cache/cache.json"), 3),
    Bad("verify of a truncated shard", "verify cache", "1 problem in cache", "exactly",
        "`pipeline cache-teachers`", _cut(SHARD), 3),
    Bad("inspect of a truncated shard",
        "inspect cache", "cache/targets/lm/data", CUT, RENEWS,
        _cut(SHARD), 3),
    Bad("training from a truncated shard", TRAIN, "cache/targets/lm/data", CUT, RENEWS,
        _cut(SHARD), 3),
    Bad("export of a truncated shard", "export-targets cache --teacher lm --out new.jsonl",
        "cache/targets/lm/data", CUT, RENEWS, _cut(SHARD), 3),
    Bad("a missing shard", TRAIN, "cache/targets/lm/data", "missing although it was committed",
        RENEWS, _gone("cache/targets/lm/data"), 3),
    Bad("a missing unit of a teacher", TRAIN, "teacher 'lm'", "has targets for 75.0% of the cache",
        "Finish it with `pipeline cache-teachers`",
        _gone("cache/targets/lm/commits/00001-r001.json")),
    Bad("a truncated commit record", TRAIN, "commits/00001-r001.json", "is not valid JSON",
        "`pipeline verify`", _cut("cache/targets/lm/commits/00001-r001.json"), 3),
    Bad("a commit record that points outside the cache",
        "verify cache", "1 problem in cache", "exactly",
        "`pipeline cache-teachers`", _outside, 3),
    Bad("a truncated corpus shard", TRAIN, "cache/corpus/data", "were committed", RENEWS,
        _cut("cache/corpus/data/*"), 3),
    Bad("missing masks", TRAIN, "cache has the masked views none",
        "Masked-LM students need the view", "`pipeline cache-teachers` makes",
        _gone("cache/views")),
    Bad("a teacher's record that is empty", TRAIN, "targets/lm/teacher.json", "is missing", RENEWS,
        _written("cache/targets/lm/teacher.json", "{}"), 3),
    Bad("a corpus record that is empty", TRAIN, "cache/corpus/corpus.json",
        "does not say what the corpus is made of", RENEWS,
        _written("cache/corpus/corpus.json", "{}"), 3),
    Bad("a cache without its tokenizer", TRAIN, "cache/corpus/tokenizer/tokenizer.json",
        "is damaged", RENEWS, _gone("cache/corpus/tokenizer"), 3),
    Bad("a cache whose text has changed", MAKE, "text.jsonl (has other content)",
        "the corpus source has changed", "Use another cache.path", _other_text, 3),
    Bad("a cache with another sequence_length", f"{MAKE} --set corpus.sequence_length=32",
        "sequence_length: 24 there, 32 here", "holds a corpus that was made differently",
        "Use another cache.path", code=3),
    Bad("a cache with another tokenizer", MAKE, "another tokenizer",
        "holds a corpus that was made differently", "Use another cache.path",
        lambda place: place.change("tokens/tokenizer_config.json", mask_token="the"), 3),
    Bad("inspect of an unknown teacher", "inspect cache --teacher lmm",
        "no teacher 'lmm'", "it has: expert, lm"),
    Bad("export of an unknown teacher",
        "export-targets cache --teacher lmm --out new", "no teacher 'lmm'", "it has: expert, lm"),
    Bad("teachers of a missing cache", "teachers nowhere", *NOWHERE, code=3),
    Bad("removal of an unknown teacher", "teachers cache --remove lmm --yes",
        "no teacher 'lmm'", "it has: expert, lm", "did you mean 'lm'?"),
    Bad("--remove without --yes", "teachers cache --remove lm",
        "--remove lm takes 4 units", "nothing was removed", "Add --yes"),
    Bad("two changes at once", "teachers cache --remove lm --rename expert e",
        "--remove and --rename", "give one of them"),
    Bad("--rename to a name that is taken", "teachers cache --rename lm expert",
        "already has a teacher 'expert'", "give another name",
        "`pipeline teachers cache --remove expert`"),
    Bad("--rename to a name that cannot be a folder", "teachers cache --rename lm a/b",
        "--rename lm a/b: to: a name becomes a folder", "the first of them a letter or a digit"),
    Bad("--transcode to an unknown codec",
        "teachers cache --transcode lm zstd", "--transcode lm zstd",
        "a teacher is transcoded to default or compact", "under another name"),
    Bad("--transcode of an expert", "teachers cache --transcode expert compact",
        "'expert' keeps 2 logits", "compact is only a codec for topk and threshold"),
    Bad("a cache whose change is unfinished", MAKE, "teacher 'lm' is being removed",
        "or that was interrupted", "Run `pipeline teachers cache --remove lm --yes` (again) first",
        _changing),
    Bad("a run file with a renamed teacher, to cache", MAKE, "teacher 'lm' was renamed to 'big'",
        "To cache the same model twice, give this one a third name",
        "call it 'big' in the run file or command", _renamed),
    Bad("a run file with a renamed teacher, to train", TRAIN, "no teacher 'lm'",
        "Teacher 'lm' was renamed to 'big'", "`pipeline teachers cache --rename big lm`", _renamed),
    Bad("push of an unknown teacher", "push cache me/x --teacher lmm",
        "no teacher 'lmm'", "it has: expert, lm", "did you mean 'lm'?"),
    Bad("push of a teacher that reveals a private text", "push cache me/x --teacher lm",
        "lm (masked_lm", "the text can be read", "Send them with --with-readable-targets"),
    Bad("push of an unfinished cache", "push cache me/x", "cache is not finished: expert",
        "nothing was sent", "`pipeline cache-teachers` goes on",
        _gone("cache/targets/expert/commits/00001.json")),
    Bad("cache-teachers into a hub", f"{MAKE} --set cache.path=hf://datasets/me/x",
        "hf://datasets/me/x", "can be read, not written to", "`pipeline push DIR OWNER/NAME`"),
    Bad("an address that names no repository", "inspect hf://datasets/x", "'hf://datasets/x'",
        "is no place on a hub", "give hf://datasets/OWNER/NAME"),
    Bad("a cache on a hub without a network", "inspect hf://datasets/me/x", "hf://datasets/me/x",
        "HF_HUB_OFFLINE is set", "`hf download`"),
    Bad("a teacher cached with another codec", f"{MAKE} --set teachers.0.targets.codec=compact",
        "a teacher 'lm' that differs from this one", "codec: 'default' there, 'compact' here",
        "`pipeline teachers cache --transcode lm compact`", code=3),
)  # fmt: skip

RUNS = (
    Bad("--resume where no run was begun",
        "train-student run.yaml --out nowhere --resume", "nowhere",
        "nothing to go on with", "Leave --resume out to begin"),
    Bad("an existing run folder",
        "train-student run.yaml --out student", "student", "is not empty",
        "--resume to continue"),
    Bad("--resume with another configuration", f"{GO_ON} --set train.seed=5",
        "train.seed: 0 there, 5 here", "was begun with another configuration", "another --out",
        code=3),
    Bad("all checkpoints truncated", GO_ON, "student cannot continue",
        "none of its checkpoints is sound", "Restore a checkpoint from a copy",
        _unfinished(_cut(*(f"{step}/model.safetensors" for step in STEPS))), 3),
    Bad("all checkpoints without their optimizer", GO_ON, "student cannot continue",
        "none of its checkpoints is sound", "Restore a checkpoint from a copy",
        _unfinished(_gone(*(f"{step}/optimizer.safetensors" for step in STEPS))), 3),
    Bad("all checkpoints without their trainer state", GO_ON, "student cannot continue",
        "none of its checkpoints is sound", "Restore a checkpoint from a copy",
        _unfinished(_cut(*(f"{step}/trainer.json" for step in STEPS))), 3),
    Bad("a run's truncated record", GO_ON, "student/run.json", "is damaged",
        "start a new run in another --out", _cut("student/run.json"), 3),
    Bad("compare of a run with a truncated record", "compare student", "student/run.json",
        "is damaged", "leave it out", _cut("student/run.json"), 3),
    Bad("compare on a folder that is no run", "compare lm", "lm", "no run and no sweep",
        "Give directories that its --out named"),
    Bad("export of a truncated checkpoint", f"export {STEPS[1]} --out new",
        f"{STEPS[1]}/model.safetensors", "is damaged or truncated", "Copy or download it again",
        _cut(f"{STEPS[1]}/model.safetensors")),
)  # fmt: skip

ROWS = CACHES + RUNS
