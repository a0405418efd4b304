"""Keys of documents and names of namespaces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfusion_rag import InvalidInputError
from kvfusion_rag.store import document_key, namespace_key, require_namespace
from kvfusion_rag.store.keys import document_part, namespace_part, path_of

field = st.text("ab\0é", max_size=3)
ids = st.lists(st.integers(0, 2**40), max_size=3)


@settings(max_examples=50)
@given(a=st.tuples(field, field, ids), b=st.tuples(field, field, ids))
def test_keys_are_equal_only_for_equal_fields(a, b):
    one, other = document_key(*a), document_key(*b)
    assert (one == other) == (a == b)
    path_of(one)  # raises if it is not a key
    assert namespace_part(one) == namespace_key(a[1])
    assert (document_part(one) == document_part(other)) == (a[1:] == b[1:])


def test_fields_cannot_be_shifted_into_each_other():
    assert document_key("ab", "", [1]) != document_key("a", "b", [1]) != document_key("", "ab", [1])


def test_key_reveals_no_text():
    key = document_key("fingerprint", "tenant", [1])
    assert "tenant" not in key and "fingerprint" not in key


@pytest.mark.parametrize("name", ["../other", "a/b", "a\\b", "..", ".", "a\0b", "x" * 129, "\ud800", None, 3, "é"])
def test_namespace_must_be_a_plain_name(name):
    with pytest.raises(InvalidInputError, match="namespace is"):
        require_namespace(name)


@pytest.mark.parametrize("name", ["", "tenant 1", "user@example.org", "a.b:c"])
def test_plain_names_are_namespaces(name):
    require_namespace(name)
