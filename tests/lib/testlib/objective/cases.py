"""Objectives of every kind, by the world with the teachers they name."""


def term(*teachers, **values):
    return {"teachers": list(teachers), **values}


def alone(*terms):
    return {"hard": {"weight": 0}, "distill": list(terms)}


FALL = {"schedule": "linear", "from": 1.0, "to": 0.0, "over": 0.5}
RISE = {"schedule": "linear", "from": 0.0, "to": 1.0, "over": 0.5}
OBJECTIVES = {
    "plain": {"hard": {"weight": 0.7}},
    "ce and kd": {"distill": [term("big", temperature=2.0, weight=0.6)]},
    "kd alone": {"hard": {"weight": 0}, "distill": [term("big", temperature=4.0)]},
    "kd alone, dense": {"hard": {"weight": 0}, "distill": [term("whole")]},
    "prefix": {"distill": [term("wide", k=5)]},
    "two terms": {"distill": [term("big", temperature=2.0), term("wide", weight=0.3)]},
    "mixture": {"distill": [term("big", "wide", temperature=2.0, combine="mixture")]},
    "separate": {"distill": [term("big", "wide", temperature=2.0, weight=0.4)]},
    "separate, alone": {"hard": {"weight": 0}, "distill": [term("big", "odd.lm")]},
    "route": {"distill": [term("odd.lm", "even.lm", "big", combine="route", temperature=2.0)]},
    "route, alone": {"hard": {"weight": 0}, "distill": [term("odd.lm", "wide", combine="route")]},
    "route, first always": {"distill": [term("big", "odd.lm", combine="route", weight=0.6)]},
    "entropy": {"distill": [term("big", entropy_fraction=0.3, temperature=2.0, weight=0.7)]},
    "entropy, alone": {"hard": {"weight": 0}, "distill": [term("wide", entropy_fraction=0.5)]},
    "entropy, all": {"distill": [term("big", entropy_fraction=1.0)]},
    "entropy, separate": {"distill": [term("big", "odd.lm", entropy_fraction=0.3)]},
    "entropy, route": {
        "hard": {"weight": 0.5},
        "distill": [term("odd.lm", "big", combine="route", entropy_fraction=0.3)],
    },
    "entropy, beside": {
        "distill": [term("odd.lm", weight=0.4), term("big", entropy_fraction=0.3), term("wide")]
    },
    "one domain": {"distill": [term("odd.lm", temperature=2.0, weight=0.5)]},
    "one domain alone": {"hard": {"weight": 0}, "distill": [term("odd.lm")]},
    "a teacher per domain": {"distill": [term("odd.lm"), term("even.lm", temperature=2.0)]},
    "classifier": {"distill": [term("sense", temperature=3.0)]},
    "classifier, masked": {"distill": [term("sense", view="masked")]},
    "classifier, logits": {"distill": [term("sense", divergence="mse", temperature=2.0)]},
    "regression": {"hard": {"weight": 0}, "distill": [term("score", weight=0.1)]},
    "ranking": alone(term("score", ranking={})),
    "ranking, pairs alone": alone(term("score", ranking={"pointwise": 0}, weight=0.3)),
    "ranking, points alone": alone(term("score", ranking={"pairwise": 0})),
    "ranking by domain": alone(term("score", ranking={"group": "domain", "pairwise": 0.4})),
    "ranking by document": {
        "distill": [term("score", ranking={"group": "document", "pairwise": 2.0}, weight=0.3)]
    },
    "ranking, best pairs": alone(
        term("score", ranking={"group": "domain", "pairs": "best", "pointwise": 0.2}, weight=0.3)
    ),
    "ranking, lists": alone(
        term(
            "score",
            ranking={"pointwise": 0, "pairwise": 0, "listwise": 1.5, "group": "document"},
            temperature=2.0,
        )
    ),
    "ranking, masked": alone(term("score", ranking={"pointwise": 0.5}, view="masked")),
    "pseudo-labels": alone(term("sense", divergence="pseudo_label", confidence=0.6)),
    "pseudo-labels, masked": {
        "distill": [term("sense", divergence="pseudo_label", confidence=0.5, view="masked")]
    },
    "pseudo-labels of several": {
        "distill": [
            term("topics", divergence="pseudo_label", confidence=0.7, weight=0.7),
            term("pair", divergence="pseudo_label", confidence=0.6),
        ]
    },
    "pseudo-labels of all": alone(term("sense", divergence="pseudo_label", confidence=0)),
    "pseudo-labels of tokens": alone(term("tags", divergence="pseudo_label", confidence=0.5)),
    "pseudo-labels of tokens at masks": alone(
        term("tags", divergence="pseudo_label", confidence=0.5, positions="masked")
    ),
    "multi-label": {"hard": {"weight": 0}, "distill": [term("topics", temperature=2.0)]},
    "tokens": {"distill": [term("tags", temperature=2.0, weight=0.4)]},
    "tokens, masked": {"hard": {"weight": 0}, "distill": [term("tags", view="masked")]},
    "tokens, at masks": {"distill": [term("tags", positions="masked", temperature=2.0)]},
    "tokens, at masks, masked": {
        "hard": {"weight": 0},
        "distill": [term("tags", positions="masked", view="masked")],
    },
    "words, at masks": {"distill": [term("big", positions="masked")]},
    "experts": {"distill": [term("sense", "score", "tags", temperature=2.0)]},
    "pairs": {"hard": {"weight": 0}, "distill": [term("pair", temperature=2.0)]},
    "everything": {
        "hard": {"weight": 0.5},
        "distill": [
            term("big", "wide", temperature=2.0, weight=0.9, combine="mixture"),
            term("odd.lm", weight=0.2),
            term("sense", "topics", "tags", weight=0.3),
            term("score", view="masked", weight=0.05),
            term("pair", weight=0.7),
        ],
    },
}


KINDS = ("animals", "pets", "weather")  # animals and pets share two of three labels
MUKI = {"combine": "uncertainty", "weight": 20.0}
MERGED = {
    "route, experts": alone(term("odd.plants", "animals", combine="route", temperature=2.0)),
    "route, experts of two tasks": alone(
        term("odd.score", "animals", combine="route", temperature=2.0)
    ),
    "route, tokens": {"distill": [term("odd.tags", "tags", combine="route", view="masked")]},
    "route, tokens at masks": alone(
        term("odd.tags", "tags", combine="route", positions="masked", temperature=2.0)
    ),
    "mixture, one expert": alone(term("unnamed", combine="mixture")),
    "mixture, nothing shared": alone(term("animals", "weather", combine="mixture")),
    "mixture, merged": {"distill": [term("animals", "pets", combine="mixture", temperature=2.0)]},
    "mixture, apart": alone(term("animals", "pets", combine="mixture", labels="apart")),
    "mixture, apart without names": alone(
        term("unnamed", "animals", combine="mixture", labels="apart")
    ),
    "mixture, masked": {"distill": [term("animals", "pets", combine="mixture", view="masked")]},
    "mixture, one domain": alone(term("animals", "odd.plants", combine="mixture")),
    "mixture, pairs": alone(term("pair.a", "pair.b", combine="mixture", weight=3.0)),
    "mixture, reverse": alone(
        term("animals", "weather", combine="mixture", divergence="reverse_kl", temperature=2.0)
    ),
    "mixture, jsd": alone(term("animals", "pets", combine="mixture", divergence="jsd")),
    "mixture, skewed": alone(
        term("animals", "pets", combine="mixture", divergence="skew_kl", skew=0.3, temperature=2.0)
    ),
    "mixture, tvd": alone(term(*KINDS, combine="mixture", divergence="tvd", temperature=2.0)),
    "concatenate": alone(term("animals", "weather", combine="concatenate")),
    "concatenate, merged": alone(term(*KINDS, combine="concatenate", temperature=2.0)),
    "concatenate, apart": alone(term(*KINDS, combine="concatenate", labels="apart")),
    "concatenate, one domain": {
        "distill": [term("odd.plants", "pets", combine="concatenate", divergence="jsd")]
    },
    "pseudo-labels, route": alone(
        term("odd.plants", "animals", combine="route", divergence="pseudo_label", confidence=0.6)
    ),
    "ranking, one domain": alone(term("odd.score", ranking={}, weight=0.2)),
    "muki": alone(term(*KINDS, **MUKI)),
    "muki, hot": {"distill": [term(*KINDS, temperature=2.0, **MUKI)]},
    "muki, apart": alone(term("animals", "pets", labels="apart", **MUKI)),
    "muki, hard": alone(term(*KINDS, uncertainty={"selection": "hard"}, **MUKI)),
    "muki, no margin": alone(term(*KINDS, uncertainty={"margin": False, "sharpness": 1.0}, **MUKI)),
    "muki, hard, no margin": alone(
        term(*KINDS, uncertainty={"margin": False, "selection": "hard"}, temperature=2.0, **MUKI)
    ),
    "muki, hard, reverse": alone(
        term(*KINDS, uncertainty={"selection": "hard"}, divergence="reverse_kl", **MUKI)
    ),
    "muki, jsd": alone(term("weather", "pets", divergence="jsd", temperature=2.0, **MUKI)),
    "muki, tvd, hard": alone(
        term(*KINDS, uncertainty={"selection": "hard"}, divergence="tvd", **MUKI)
    ),
    "muki, one domain": alone(term("odd.plants", "weather", **MUKI)),
    "muki, pairs": alone(term("pair.a", "pair.b", labels="merge", **MUKI)),
    "all of it": {
        "hard": {"weight": 0.5},
        "distill": [
            term("lm", entropy_fraction=0.3, weight=0.6),
            term("animals", "pets", "weather", **MUKI),
            term("pair.a", "pair.b", combine="mixture", weight=0.7),
            term("odd.tags", "tags", combine="route", positions="masked", weight=0.3),
            term("odd.plants", "odd.score", view="masked", weight=0.2),
        ],
    },
}
CAUSAL = {
    "kd": {"distill": [term("lm", temperature=2.0, weight=0.5)]},
    "two terms and an expert": {"distill": [term("odd"), term("lm", weight=0.2), term("sense")]},
    "expert": {"hard": {"weight": 0}, "distill": [term("sense", temperature=2.0)]},
    "separate": {"distill": [term("odd", "lm", temperature=2.0)]},
    "route": {"distill": [term("odd", "lm", combine="route", temperature=2.0, weight=0.5)]},
    "entropy": {"distill": [term("lm", entropy_fraction=0.3, temperature=2.0)]},
    "entropy, alone": alone(term("odd", "lm", combine="route", entropy_fraction=0.5)),
}
WORLDS = {"masked_world": OBJECTIVES, "experts_world": MERGED, "causal_world": CAUSAL}
CASES = [(world, name) for world, objectives in WORLDS.items() for name in objectives]
# Variants of other cases: only a divergence, a temperature, or the weighing of experts within a row
# differs. Splitting a step can only change rows, means and passes, and these are the same.
_WITHIN_A_ROW = {
    *("classifier, logits", "pseudo-labels of all", "entropy, all", "ranking, points alone"),
    *("mixture, reverse", "mixture, jsd", "mixture, skewed", "mixture, tvd"),
    *("muki, hot", "muki, no margin", "muki, hard, no margin", "muki, hard, reverse"),
    *("muki, jsd", "muki, tvd, hard", "concatenate, merged"),
}
SPLIT = [case for case in CASES if case[1] not in _WITHIN_A_ROW]
assert len(CASES) - len(SPLIT) == len(_WITHIN_A_ROW)
