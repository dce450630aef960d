"""What may be learnt from which kind of target: refused early, or proved to be right."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.data.targets.kinds.registry import VOCABULARY_KINDS, vocabulary_kind
from rekindle.data.targets.schema import TeacherInfo
from rekindle.kernels.divergences import DIVERGENCES, LINEAR
from rekindle.kernels.encoded import EncodedTargets
from rekindle.kernels.hidden import DenseTargets
from rekindle.kernels.losses import kd_loss, linear_kd_loss, merge_targets
from rekindle.kernels.targets import DecodedTargets
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.caching.sampling import threshold_sample
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.stages.resolve import plan_stages
from rekindle.train.config import DistillTerm
from rekindle.train.objective.terms import check_terms

DOCS = Path(__file__).parents[3] / "docs" / "targets.md"
SAMPLED = [name for name, kind in VOCABULARY_KINDS.items() if kind.is_sample]
SERVE = "targets.kind: topk (with tail: bucket), dense, hidden"


def info_of(name, kind, **about):
    sizes = {"k": 8, "temperatures": (1.0,), "vocabulary_size": 99, "hidden_size": 4}
    return TeacherInfo(name=name, task="masked_lm", kind=kind, view="masked-0", **(sizes | about))


def refused(terms, *infos):
    try:
        known = {info.name: info for info in infos}
        check_terms([parse_settings(DistillTerm, term) for term in terms], known, "masked_lm")
    except InputError as error:
        return str(error)
    return None


# --- the pairs ------------------------------------------------------------------------------------


def cell(kind, divergence):
    if not kind.is_sample:
        return "exact" if kind.has_all_probabilities else "with its tail bucket"
    return "unbiased" if LINEAR[divergence] else "refused"


@pytest.mark.parametrize(("kind", "divergence"), itertools.product(VOCABULARY_KINDS, DIVERGENCES))
def test_a_divergence_that_is_not_linear_is_refused_for_samples(kind, divergence):
    term = {"teachers": ["lm"], "divergence": divergence}
    found = refused([term], info_of("lm", kind))
    assert (found is not None) == (cell(VOCABULARY_KINDS[kind], divergence) == "refused")
    if found:
        assert found.startswith(
            f"train.objective.distill.0: divergence: {divergence} is not linear"
        )
        assert f"'lm' keeps a sample of them (targets.kind: {kind})" in found
        assert SERVE in found


def test_the_table_in_the_docs_is_that_of_the_classes():
    head = ["`divergence`", *(f"`{name}`" for name in VOCABULARY_KINDS)]
    rows = [head, ["---"] * len(head)]
    for divergence in DIVERGENCES:
        cells = (cell(kind, divergence) for kind in VOCABULARY_KINDS.values())
        rows.append([f"`{divergence}`", *cells])
    rows[1:2] = ["|" + "|".join(rows[1]) + "|"]
    lines = [row if isinstance(row, str) else f"| {' | '.join(row)} |" for row in rows]
    assert "\n".join(lines) in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize("sample", SAMPLED)
@pytest.mark.parametrize(
    ("other", "term", "fine"),
    [
        ("topk", {}, False),
        ("topk", {"tail": "none"}, True),
        ("dense", {}, True),
        ("dense", {"k": 8}, False),
        ("threshold", {}, True),
        ("random", {"k": 8}, True),
    ],
)
def test_a_mixture_of_a_sample_and_of_what_has_a_tail_is_refused(sample, other, term, fine):
    term = {"teachers": ["drawn", "other"], "combine": "mixture", **term}
    found = refused([term], info_of("drawn", sample), info_of("other", other))
    assert (found is None) == fine
    assert fine or "Use combine: separate, whose mean is the same" in found


# --- before any work ------------------------------------------------------------------------------

WRONG = {
    "divergence: jsd is not linear": {"divergence": "jsd"},
    r"stores the temperatures \[1.0\], not 2.0: a sample is of one distribution": {
        "temperature": 2.0
    },
    "keeps a sample of 64": {"k": 8},
}


@pytest.fixture
def run_config(tmp_path):
    def make(term, **more):
        values = {
            "corpus": {"source": [str(tmp_path / "none.jsonl")], "tokenizer": str(tmp_path / "no")},
            "cache": {"path": str(tmp_path / "cache")},
            "teachers": [{"name": "lm", "model": str(tmp_path / "no"), "task": "masked_lm"}],
            "student": {"model": str(tmp_path / "no")},
            "train": {"objective": {"distill": [{"teachers": ["lm"], **term}]}},
        }
        return parse_settings(RunConfig, values | more)

    return make


@pytest.mark.parametrize(("message", "term"), WRONG.items())
@pytest.mark.parametrize("act", [cache_teachers, plan_run])
def test_a_run_file_is_refused_before_anything_is_read(act, message, term, run_config, tmp_path):
    with pytest.raises(InputError, match=rf"^train\.objective\.distill\.0: .*{message}"):
        act(run_config(term))
    assert not (tmp_path / "cache").exists()


def test_stages_are_refused_before_the_first_one_begins(run_config):
    stages = [
        {"name": "first", "set": {"train.objective.distill": []}},
        {"name": "second", "set": {"teachers": [], "train.steps": 5}},
    ]
    config = run_config({"divergence": "tvd"}, stages=stages)
    with pytest.raises(InputError, match=r"^stage 'second': train\.objective\.distill\.0: .*tvd"):
        plan_stages(config, Path())


def test_what_the_file_says_of_a_kind_is_what_the_cache_will_hold(run_config):
    """Of the default, of a larger vocabulary's and of task experts'."""
    teacher = {"model": "m", "task": "causal_lm"}
    several = [
        {"name": "plain", **teacher},
        {"name": "warm", "targets": {"temperatures": [1, 2]}, **teacher},
        {"name": "drawn", "targets": {"kind": "random", "k": 9, "temperatures": [2]}, **teacher},
        {"name": "expert", "model": "m", "task": "regression"},
    ]
    kinds = [t.described_kind for t in run_config({}, teachers=several).teachers]
    assert [kind and (kind.name, kind.readable_temperature) for kind in kinds] == [
        ("threshold", 1.0),
        ("topk", 1.0),
        ("random", 2.0),
        None,
    ]


# --- in the kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_encoded_samples_know_what_they_are(divergence):
    ids = torch.arange(4, dtype=torch.int64).to(torch.uint16)[None]
    one = torch.zeros(1, dtype=torch.int64)
    scalars = (one.to(torch.uint16), one.to(torch.uint16), torch.full((1,), 32767).to(torch.int16))
    made = partial(EncodedTargets, ids, torch.zeros(1, 4, dtype=torch.uint8), *scalars)
    linear = partial(linear_kd_loss, torch.ones(1, 9), torch.zeros(9, 9))
    for loss in (partial(kd_loss, torch.zeros(1, 9)), linear):
        loss(made(), divergence=divergence)
        if LINEAR[divergence]:
            loss(made(sampled=True), divergence=divergence)
            continue
        with pytest.raises(ValueError, match="is not linear in the target, and the targets are a"):
            loss(made(sampled=True), divergence=divergence)


# --- what a student ends as, in float64 -----------------------------------------------------------

TEACHER = torch.tensor([0.42, 0.27, 0.14, 0.09, 0.05, 0.03], dtype=torch.float64)
V = len(TEACHER)


def random_draws():
    """Every outcome of two draws with replacement, and its probability."""
    pairs = list(itertools.product(range(V), repeat=2))
    ids = torch.tensor([[a, b if b != a else -1] for a, b in pairs])
    probs = torch.tensor([[0.5, 0.5] if a != b else [1.0, 0.0] for a, b in pairs]).double()
    weight = torch.stack([TEACHER[a] * TEACHER[b] for a, b in pairs])
    return DecodedTargets(ids, probs, torch.zeros(len(pairs)).double()), weight


def threshold_draws(count=128):
    """Outcomes of a threshold sample of three, at every uniform of a fine grid."""
    u = (torch.arange(count).double() + 0.5) / count
    ids, probs = threshold_sample(TEACHER.float().expand(count, V).contiguous(), 3, u)
    return DecodedTargets(ids, probs.double(), torch.zeros(count).double()), torch.ones(
        count
    ) / count


def fixed_point(*parts):
    """The student p [V] of the least Σ_i weight_i · D(target_i ‖ p) over all ``parts``."""
    z = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(250):
        optimizer.zero_grad()
        for targets, weight, options in parts:
            logits = z.expand(len(weight), V)
            settings = {"row_weight": weight.double(), "reduction": "sum", "impl": "torch"}
            kd_loss(logits, targets, **settings, **options).loss.backward()
        optimizer.step()
    return torch.softmax(z.detach(), 0)


def distance(p):
    return float((p - TEACHER).abs().sum() / 2)


DRAWS = {"random": random_draws, "threshold": threshold_draws}


@pytest.mark.covering
@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_of_samples_ends_as_the_teacher_where_that_is_allowed(kind, divergence):
    ended = distance(fixed_point((*DRAWS[kind](), {"divergence": divergence})))
    if cell(VOCABULARY_KINDS[kind], divergence) == "refused":
        assert ended > 0.05
    else:
        assert ended < 2e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_of_the_whole_distribution_ends_as_the_teacher(divergence):
    whole = DenseTargets(TEACHER.log()[None])
    ended = fixed_point((whole, torch.ones(1), {"divergence": divergence}))
    assert distance(ended) < (0.02 if divergence == "tvd" else 2e-3)  # a kink: steps of Adam's size


@pytest.mark.covering
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "none"])
@pytest.mark.parametrize("kind", SAMPLED)
def test_nothing_lies_outside_a_sample_whatever_the_tail(kind, tail):
    assert distance(fixed_point((*DRAWS[kind](), {"tail": tail}))) < 2e-3


def test_mixtures_with_a_sample():
    """Of the same teacher: with the whole of it right, with its top and their tail not; in terms of
    their own these are right, too.
    """
    drawn, weight = random_draws()
    count = len(weight)
    ids = torch.arange(V).expand(count, V)
    whole = DecodedTargets(ids, TEACHER.expand(count, V), torch.zeros(count).double())
    top = DecodedTargets(ids[:, :2], whole.probs[:, :2], TEACHER[2:].sum().expand(count))
    ended = [
        distance(fixed_point((merge_targets([drawn, other], [0.5, 0.5]), weight, {})))
        for other in (whole, top)
    ]
    assert ended[0] < 2e-3
    assert ended[1] > 0.02
    apart = fixed_point((drawn, weight, {}), (top, torch.ones(count) / count, {}))
    assert distance(apart) < 2e-3


def test_kinds_are_asked_as_they_are_read():
    """A sample tells the likeliest id where it keeps it as it is, draws never do."""
    above = {
        name: vocabulary_kind(info_of("lm", name)).certainty_threshold for name in VOCABULARY_KINDS
    }
    assert above == {
        "topk": 0,
        "dense": 0,
        "hidden": 0,
        "random": 1,
        "threshold": pytest.approx(1 / 8, rel=2e-3),
    }
