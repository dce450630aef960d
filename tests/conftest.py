"""Shared fixtures: real text, tokenizers trained on it, and tiny random model directories of every
family.
"""

import gc
import json
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from rekindle.data.cores import cores

pytest.register_assert_rewrite("testlib")

# A loaded machine is no fault of an example's.
settings.register_profile(
    "rekindle", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("rekindle")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # there is one for each core
    torch.set_num_threads(1)  # OpenMP has read its variable by now
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
# Without a GPU, Triton kernels run under its interpreter. That is chosen before triton is imported,
# and transformers imports it for any test file.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

WORDS = [
    "the",
    "a",
    "of",
    "in",
    "to",
    "and",
    "model",
    "teacher",
    "student",
    "learns",
    "guides",
    "writes",
    "reads",
    "small",
    "large",
    "old",
    "new",
    "quick",
    "cache",
    "token",
    "masked",
    "causal",
    "gradient",
    "loss",
    "river",
    "mountain",
    "city",
    "engine",
    "paper",
    "number",
    "light",
    "water",
    "runs",
    "falls",
    "rises",
    "gives",
    "takes",
    "keeps",
    "under",
    "over",
    "between",
    "beside",
    "without",
    "against",
]


GIGABYTES_OF_A_WORKER = 2


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run in a process for each core, as far as there is memory for it, where nobody says otherwise
    (-n, --pdb) and pytest-xdist is there; files that are named run in this process.

    Each begins with a stretch of neighbours, which share fixtures, and then takes from the others.
    A folder of tests/extras stays in one process: two clusters of Ray take each other's ports.
    """
    option = config.option
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist"):
        return
    folders = [Path(argument.partition("::")[0]).is_dir() for argument in config.args]
    if option.numprocesses is None and not option.usepdb and any(folders):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
        option.numprocesses = max(1, min(cores(), memory // GIGABYTES_OF_A_WORKER))
        extras = all(Path(argument).is_relative_to("tests/extras") for argument in config.args)
        option.dist = "loadgroup" if extras else "worksteal"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage meanwhile, nor later among what was imported and collected: it stays, and
    looking through it took a fifth of the time. Nor often: with Python's own thresholds it was a
    tenth again, for circles of a few megabytes.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 10, 20)
        gc.enable()


# Files, and folders whose files share fixtures: these, or single tests, take many seconds.
DEAR = {
    *(f"train/{name}.py" for name in ("test_distributed", "test_evaluate", "loop/test_loop")),
    *("train/methods/test_method_replaced_tokens.py", "train/record/test_resume.py"),
    *("train/objective/test_estimator_targets.py", "kernels/test_distributed.py"),
    *(f"pipeline/test_{name}.py" for name in ("torchrun", "recipes", "cli")),
    *(f"pipeline/{name}" for name in ("builtin", "cycle", "plan", "stages", "sweep")),
    *("pipeline/report/test_page_browser.py", "pipeline/checks/test_audit_judges.py"),
    *(f"pipeline/caching/{name}" for name in ("test_object_store.py", "test_repair.py")),
    *(f"pipeline/caching/{name}" for name in ("self_evolution", "estimators", "compute_unit")),
    *("golden/test_digests.py", "data/source/test_python_docs.py"),
}
TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what is DEAR: tests near the end of the list are taken by the other process,
    which would set up their fixtures once more, or wait for one long test. Slow tests have an hour.
    """
    from testlib.covering import leave_the_rest_slow

    leave_the_rest_slow(items)
    dear = {TESTS / name for name in DEAR}
    assert all(path.exists() for path in dear)
    items.sort(key=lambda item: dear.isdisjoint({item.path, item.path.parent}))
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))


FILLED = [Path(__file__).parent / folder for folder in ("kernels", "train")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hold NaN in new memory during the tests of FILLED folders.

    No fixture: it would come after those of a wider scope, in which most students are trained. Not
    on a machine with a GPU, where a deterministic operator is another one than its user runs;
    there only the tests that need it ask for it.
    """
    if not any(item.path.is_relative_to(folder) for folder in FILLED):
        return (yield)
    from testlib.kernels.memory import nan_in_new_memory

    if torch.cuda.is_available():
        return (yield)
    with nan_in_new_memory():
        return (yield)


@pytest.fixture(scope="session")
def shared() -> Path:
    from testlib.corpora import SHARED

    if not SHARED.is_dir():
        pytest.skip("the shared corpora are not on this machine (set REKINDLE_SHARED)")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def quick_disk():
    """A disk that answers at once: no test pulls the plug, and what a killed process wrote stays.

    Tests of what a disk is asked for, or of its errors, put their own over it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_copies(tmp_path_factory: pytest.TempPathFactory):
    """Copies of objects of this session's servers: others have objects of the same names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REKINDLE_COPIES", str(tmp_path_factory.mktemp("copies")))
        yield


@pytest.fixture(autouse=True)
def own_log_handlers():
    """The command line logs to the stderr of the moment; that of a test is closed after it."""
    log = logging.getLogger("rekindle")
    handlers, level = list(log.handlers), log.level
    yield
    log.handlers = handlers
    if log.level != level:  # setLevel looks through all loggers there are: thousands
        log.level = level
        log._cache.clear()  # it has no children


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(4, 14))).capitalize() + "."
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents in two domains, of very different lengths."""
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    lines = []
    for number in range(40):
        text = " ".join(sentences(1 + (number * 7) % 12, number))
        lines.append(
            {"id": f"d{number}", "text": text, "domain": "even" if number % 2 == 0 else "odd"}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT tokenizer directory with a few hundred tokens."""
    from transformers import BertTokenizerFast

    # Written, not trained: the trainer breaks ties anew in every process, and what a test sees
    # (how often a random model's best guess is right, say) must not depend on that.
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    halves = [(w[: len(w) // 2], "##" + w[len(w) // 2 :]) for w in sorted(WORDS)[::4] if len(w) > 3]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *letters]
    pieces += ["##" + letter for letter in letters] + [part for half in halves for part in half]
    pieces += [piece for w in sorted(WORDS) for piece in (w[:2], "##" + w[-2:])]
    whole = [w for n, w in enumerate(sorted(WORDS)) if n % 4 or len(w) <= 3]
    path = tmp_path_factory.mktemp("wordpiece")
    (path / "vocab.txt").write_text("\n".join(dict.fromkeys([*pieces, *whole])) + "\n")
    fast = BertTokenizerFast(vocab=str(path / "vocab.txt"), model_max_length=512)
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bytelevel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 tokenizer directory with a few hundred tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    path = tmp_path_factory.mktemp("bytelevel")
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        sentences(400, 1), vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False
    )
    trainer.save_model(str(path))
    fast = GPT2TokenizerFast(
        vocab=str(path / "vocab.json"), merges=str(path / "merges.txt"), model_max_length=256
    )
    fast.save_pretrained(path)
    return path


FAMILIES = {
    "bert": ("BertConfig", {"num_hidden_layers": 2, "intermediate_size": 48}),
    "roberta": ("RobertaConfig", {"num_hidden_layers": 2, "intermediate_size": 48}),
    "electra": (
        "ElectraConfig",
        {"num_hidden_layers": 2, "intermediate_size": 48, "embedding_size": 24},
    ),
    "deberta": (
        "DebertaV2Config",
        {
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
        },
    ),
    "modernbert": ("ModernBertConfig", {"num_hidden_layers": 2, "intermediate_size": 48}),
    "gpt2": ("GPT2Config", {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 256}),
    "llama": (
        "LlamaConfig",
        {"num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 1},
    ),
    "mistral": (
        "MistralConfig",
        {"num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 1},
    ),
}
COMMON = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 256}

ModelFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """make_model(family, auto_class, tokenizer_dir, **config) -> a saved model directory."""
    import transformers

    from rekindle.data.corpus.tokenizer import load_tokenizer

    made: dict[str, Path] = {}

    def make(family: str, auto: str, tokenizer: Path, seed: int = 0, **extra: object) -> Path:
        key = json.dumps([family, auto, str(tokenizer), seed, extra], sort_keys=True, default=str)
        if key in made:
            return made[key]
        loaded = load_tokenizer(str(tokenizer))
        name, values = FAMILIES[family]
        base = {} if family == "gpt2" else dict(COMMON)
        ids = {
            "vocab_size": loaded.size,
            "pad_token_id": loaded.pad_id,
            "bos_token_id": loaded.eos_id,
            "eos_token_id": loaded.eos_id,
            "initializer_range": 0.5,
        }
        config = getattr(transformers, name)(**(base | ids | values | extra))
        torch.manual_seed(seed)
        model = getattr(transformers, auto).from_config(config)
        path = tmp_path_factory.mktemp(f"{family}-")
        model.save_pretrained(path)
        loaded.save(str(path))
        made[key] = path
        return path

    return make


Teacher = dict[str, Any]
TeacherFactory = Callable[..., Teacher]


@pytest.fixture(scope="session")
def make_teacher(make_model: ModelFactory, wordpiece: Path) -> TeacherFactory:
    """make_teacher(name, task, seed=…, config={…}, **more) -> a teacher's part of a run file.

    A BERT for every task but causal_lm, which is a Llama; ``config`` is of the model. Of one layer:
    what is asked of a teacher here is its output, in two thirds of the time of two.
    """
    from testlib.models import AUTO

    def make(name: str, task: str, seed: int = 0, config: Any = None, **more: Any) -> Teacher:
        family = "llama" if task == "causal_lm" else "bert"
        labels = {"num_labels": 1} if task == "regression" else {}
        own = {"num_hidden_layers": 1} | labels | (config or {})
        model = make_model(family, AUTO[task], wordpiece, seed, **own)
        return {"name": name, "model": str(model), "task": task} | more

    return make


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Models this small lose more at OpenMP's barriers than they gain, once cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_corpus(corpus_file: Path, wordpiece: Path) -> dict[str, Any]:
    """A run file's corpus: 12 short sequences of two domains."""
    return {
        "source": [str(corpus_file)],
        "tokenizer": str(wordpiece),
        "domain_field": "domain",
        "sequence_length": 24,
        "limit_sequences": 12,
    }


Configure = Callable[..., Any]


@pytest.fixture(scope="session")
def configure(small_corpus: dict[str, Any]) -> Configure:
    """configure(path, teachers, corpus={…}, cache={…}) -> RunConfig over ``small_corpus``.

    Three shards of 5, 5 and 2 sequences, two replicas that mask every token once between them.
    """
    from rekindle.data.settings import parse_settings
    from rekindle.pipeline.config import RunConfig

    def make(
        path: Path,
        teachers: Sequence[Mapping[str, Any]],
        corpus: Mapping[str, Any] | None = None,
        cache: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        where = {
            "path": str(path),
            "sequences_per_shard": 5,
            "replicas": 2,
            "mask": {"policy": "cover"},
        }
        values = {
            "corpus": small_corpus | dict(corpus or {}),
            "cache": where | dict(cache or {}),
            "teachers": [dict(teacher) for teacher in teachers],
        }
        return parse_settings(RunConfig, values)

    return make


@pytest.fixture(scope="session")
def make_cache(configure: Configure, one_thread: None) -> Configure:
    """make_cache(path, teachers, corpus, cache) -> ``configure``'s RunConfig, its cache made."""
    from rekindle.pipeline.caching.cache_teachers import cache_teachers

    def make(path: Path, teachers: Sequence[Mapping[str, Any]], *sections: Any) -> Any:
        config = configure(path, teachers, *sections)
        cache_teachers(config)
        return config

    return make


@pytest.fixture(scope="session")
def s3_server():
    """A moto server, which takes seconds to start."""
    for module in ("moto", "s3fs", "flask"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[dev]'")
    from testlib.servers.s3 import S3Server

    server = S3Server()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def s3(s3_server):
    """The URL of an empty bucket on a moto server."""
    import s3fs

    from testlib.servers.faulty_s3 import forget_clients
    from testlib.servers.s3 import credentials

    s3_server.forget()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in credentials(s3_server.url).items():
            patch.setenv(name, value)
        try:
            forget_clients()
            s3fs.S3FileSystem().mkdir("bucket")
            yield "s3://bucket"
        finally:
            forget_clients()


def pytest_make_parametrize_id(val, argname):
    """Name bytes by their argument: packed ones hold the time, and every worker is to collect the
    same tests.
    """
    return argname if isinstance(val, bytes) else None
