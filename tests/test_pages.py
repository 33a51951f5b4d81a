"""What a page declares and what it is told, by many examples: refused by name or by line, or passed on exactly."""
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.digest import digest
from retrain_nb.records import UsageError
from retrain_nb.stores.pages import Parameter, check_parameters, page_code, read_cells, read_parameters

PAGES = Path(__file__).parent/"notebooks"
DECLARED = {p.name: p for p in (Parameter(name="limit", type="int", default=1), Parameter(name="rate", type="float", default=.5),
                                Parameter(name="name", type="str", default=""), Parameter(name="flag", type="bool", default=False))}


# What a page declares

@pytest.mark.parametrize("page", sorted(p.stem for p in PAGES.glob("odd_parameters_*.ipynb")))
def test_a_parameters_cell_that_leaves_room_is_refused_by_line(page: str) -> None:
    with pytest.raises(UsageError, match=r"parameters cell, line [12]: .*Write each parameter as"): read_parameters(PAGES/f"{page}.ipynb")


@pytest.mark.parametrize("page, words", [
    ("no_parameters", "has 0 code cells"), ("two_parameters", "has 2 code cells"), ("absent", "cannot read")])
def test_a_page_has_one_parameters_cell(page: str, words: str) -> None:
    with pytest.raises(UsageError, match=words): read_parameters(PAGES/f"{page}.ipynb")


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", '{"cells": 3}', '{"cells": [{"source": 1}]}', '{"cells": [3]}',
                                  '{"cells": [{"source": "", "metadata": {}}]}'])
def test_what_is_no_notebook_is_refused(tmp_path: Path, text: str) -> None:
    page = tmp_path/"page.ipynb"
    page.write_text(text)
    for read in (read_parameters, page_code):
        with pytest.raises(UsageError, match="is not a notebook"): read(page)


@pytest.mark.parametrize("source", ["x:str = {[]}", "x:str = {[]: 1}", "x:str = '\0'", "x:int = " + "-"*100_000 + "1", "x:int = " + "+".join("1"*5000)],
                         ids=["set", "dict", "nul", "signs", "sum"])
def test_a_default_that_python_itself_stumbles_over_is_refused(tmp_path: Path, source: str) -> None:
    page = tmp_path/"page.ipynb"
    page.write_text(json.dumps({"cells": [{"cell_type": "code", "source": source, "metadata": {"tags": ["parameters"]}}]}))
    with pytest.raises(UsageError, match=r"parameters cell(, line 1)?: .*Write each parameter as"): read_parameters(page)


def test_declarations_are_read_as_python_reads_them() -> None:
    declared = read_parameters(PAGES/"required_parameter.ipynb")
    assert [dataclasses.astuple(p) for p in declared.values()] == [
        ("folder", "str", "", "Where the record is left"), ("seed", "int", None, "The only source of randomness"),
        ("note", "str", 'a = "#b"', "With = and # in it"), ("share", "float", -1.0, "A whole number"), ("flag", "bool", False, "")]


# What a caller gives

@pytest.mark.parametrize("name, given, words", [
    ("limits", 1, "Did you mean `limit`"), ("limit", "seven", "found 'seven'"), ("limit", 7.0, "it is float"),
    ("limit", True, "it is bool"), ("limit", 2**53, "round"), ("limit", "9"*5000, "wants"), ("limit", None, "NoneType"),
    ("rate", "nan", "JSON"), ("rate", float("inf"), "JSON"), ("rate", "1_0", "spelled"),
    ("flag", "maybe", "true, false"), ("flag", 1, "it is int"),
    ("name", 3, "it is int"), ("name", Path("."), "PosixPath"), ("name", "\ud800", "Unicode"),
    ("name", b"x", "bytes"), ("name", ("x",), "tuple")])
def test_a_value_of_another_type_is_refused_by_name(name: str, given: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words): check_parameters(DECLARED, {name: given})


def test_numpy_values_are_refused() -> None:
    import numpy as np
    for name, value in {"limit": np.int64(3), "rate": np.float64(.5), "name": np.str_("x"), "flag": np.bool_(True)}.items():
        with pytest.raises(UsageError, match="it is numpy"): check_parameters(DECLARED, {name: value})


# Any name, any value: refused, or passed on exactly

ODD_NAMES = ('limit = 1; open("pwned", "w"); x', "limit\nimport os", "__import__", "limit ", "Limit", "ｌｉｍｉｔ", "")
ODD_TEXTS = ('"; import os; "', "\\", '\\"', "\x00", "a\u2028!ls", "{0.__class__}", "$(ls)", "\r\n%time", "007", "1e3", "NaN", "true", "0x10",
             "１")
NAMES = st.sampled_from([*DECLARED, *ODD_NAMES]) | st.text(max_size=20)
VALUES = st.one_of(st.text(max_size=40), st.integers(), st.floats(), st.booleans(), st.none(), st.binary(max_size=4), st.decimals(),
                   st.dates(), st.lists(st.integers(), max_size=2), st.sampled_from(ODD_TEXTS))


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(NAMES, VALUES, max_size=3))
def test_any_name_and_value_is_refused_or_reaches_the_page_exactly(wanted: dict[str, Any]) -> None:
    from papermill.translators import PythonTranslator
    try: typed = check_parameters(DECLARED, wanted)
    except UsageError as e:
        assert e.cause and e.cure
        return
    code = PythonTranslator.codify(typed)
    space: dict[str, Any] = {}
    exec(code, space)
    space.pop("__builtins__")
    assert space == typed and {k: type(v) for k, v in space.items()} == {k: type(v) for k, v in typed.items()}
    assert code.isascii() and len(code.splitlines()) == 1 + len(DECLARED)
    for name, value in wanted.items(): assert value == typed[name] or (type(value) is str and DECLARED[name].type != "str")
    json.dumps(typed, allow_nan=False).encode()


# What a page does

def saved(page: Path, *cells: tuple[str, str | list[str]], **more: Any) -> Path:
    "A notebook of these cells, kind and source of each; code has `more`"
    whole = [{"cell_type": kind, "metadata": {}, "source": source, **(more if kind == "code" else {})} for kind, source in cells]
    page.write_text(json.dumps({"cells": whole, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return page


def test_the_code_of_a_page_is_the_list_of_its_code_cells(tmp_path: Path) -> None:
    page = saved(tmp_path/"page.ipynb", ("markdown", "# Délais"), ("code", "limit:int = 15"), ("code", "é = limit\né"))
    assert page_code(page) == digest(["limit:int = 15", "é = limit\né"])


@pytest.mark.parametrize("cells, more", [
    ([("code", ["a = 1\n", "a"])], {}),                                               # Lines, as the format also has them
    ([("code", "a = 1\na")], {"outputs": [{"text": "1"}], "execution_count": 7}),     # It has run
    ([("markdown", "# New"), ("code", "a = 1\na"), ("raw", "more")], {})])
def test_prose_and_outputs_make_no_other_page(tmp_path: Path, cells: list, more: dict) -> None:
    plain = saved(tmp_path/"plain.ipynb", ("code", "a = 1\na"))
    assert page_code(saved(tmp_path/"page.ipynb", *cells, **more)) == page_code(plain)


@pytest.mark.parametrize("sources", [["a = 1\nb = 2"], ["b = 2", "a = 1"], ["a = 1"], ["a = 1", "b = 2", ""], ["a = 1", "b = 2 "]])
def test_other_code_in_other_cells_or_another_order_is_another_page(tmp_path: Path, sources: list[str]) -> None:
    page = saved(tmp_path/"page.ipynb", ("code", "a = 1"), ("code", "b = 2"))
    assert page_code(saved(tmp_path/"other.ipynb", *(("code", source) for source in sources))) != page_code(page)


def test_a_page_is_left_as_it_was() -> None:
    page = PAGES/"required_parameter.ipynb"
    before = page.read_bytes(), page.stat().st_mtime_ns
    read_cells(page), read_parameters(page), page_code(page)
    assert (page.read_bytes(), page.stat().st_mtime_ns) == before
