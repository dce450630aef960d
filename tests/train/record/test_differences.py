"""Where nested settings differ: at which keys, and at no other."""

from hypothesis import given
from hypothesis import strategies as st

from rekindle.train.record.run_folder import differences

trees = st.recursive(
    st.integers(0, 2) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), trees), min_size=1, max_size=4))
def test_differences_are_where_values_differ_and_nowhere_else(settings):
    def at(tree, key):
        for part in key.split("."):
            tree = (
                tree[int(part)]
                if isinstance(tree, list)
                else None
                if tree is None
                else tree.get(part)
            )
        return tree

    found = differences(settings, items=True)
    for key, values in found.items():
        assert values == [at(one, key) for one in settings]
        assert any(value != values[0] for value in values)
    if not found:  # a key that is missing is one that is null
        assert all(_without_nulls(one) == _without_nulls(settings[0]) for one in settings)


def _without_nulls(tree):
    if isinstance(tree, dict):
        return {k: _without_nulls(v) for k, v in tree.items() if v is not None}
    return [_without_nulls(v) for v in tree] if isinstance(tree, list) else tree
