"""What stands between two markers is replaced, and nothing else."""

from pathlib import Path

import pytest

from Documents import report_parser, run_report, with_part


def test_a_document_is_replaced_between_its_markers_only():
    begin, end = "<!-- a:begin (generated) -->", "<!-- a:end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    new = with_part(text, "a", "new")
    assert new == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    assert with_part(new, "a", "new") == new
    for lacking in ("no markers", begin, text + text, text.replace("a:", "b:")):
        with pytest.raises(ValueError, match="There must be one line .*a:begin"):
            with_part(lacking, "a", "new")


def test_a_report_writes_and_draws_and_its_check_does_neither(capsys):
    document, drawn = Path("a.md"), []
    document.write_text("<!-- a:begin (generated) -->\nold\n<!-- a:end -->\n")
    parser = report_parser("Tables.")
    assert parser.parse_args(["--check"]).check and not parser.parse_args([]).check

    def report(check, part="new"):
        run_report(parser, check, lambda: {document: {"a": part}}, lambda: drawn.append(part))

    with pytest.raises(SystemExit, match="1"):
        report(check=True)
    assert "not in a.md. Run 'make report'" in capsys.readouterr().err
    assert "old" in document.read_text() and not drawn
    report(check=False)
    assert "new" in document.read_text() and drawn == ["new"]
    report(check=True)
    assert "The documents show" in capsys.readouterr().out and drawn == ["new"]


@pytest.mark.parametrize("fails", ["documents", "draw"])
def test_a_result_that_cannot_be_read_is_one_line(fails, capsys):
    def refuse():
        raise ValueError("x.json has no 'seed'")

    parts = (
        {"documents": refuse, "draw": None} if fails == "documents" else {"documents": dict, "draw": refuse}
    )
    with pytest.raises(SystemExit, match="1"):
        run_report(report_parser("Tables."), False, **parts)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("x.json has no 'seed'")
