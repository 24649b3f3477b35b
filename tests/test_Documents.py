"""What stands between two markers is replaced, and nothing else."""

import pytest

from Documents import with_part


def test_a_document_is_replaced_between_its_markers_only():
    begin, end = "<!-- a:begin (generated) -->", "<!-- a:end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    new = with_part(text, "a", "new")
    assert new == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    assert with_part(new, "a", "new") == new
    for lacking in ("no markers", begin, text + text, text.replace("a:", "b:")):
        with pytest.raises(ValueError, match="There must be one line .*a:begin"):
            with_part(lacking, "a", "new")
