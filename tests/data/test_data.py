"""Every way a row can be bad is named with its place; every accepted shape loads."""
import json
import sys

import pytest

from minimath.config.schema import DataOptions
from minimath.core.errors import UserError
from minimath.data.examples import describe_report, load_examples

GOOD = {"problem": "What is 2 + 3?", "solution": "2 + 3 = 5. \\boxed{5}"}


def write(tmp_path, raw: bytes | str, name: str = "rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return path


def load(source, *, need=("solution",), **options):
    source = source if isinstance(source, list) else str(source)
    return load_examples(DataOptions(source=source, **options), need=need)


def load_one(tmp_path, row: dict, **options):
    return load(write(tmp_path, json.dumps(row) + "\n"), **options)[0][0]


def line(**fields) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


BAD_LINES = {  # raw line -> (reason, part of the fix)
    b"": ("empty row", "delete"),
    b"{oops": ("not JSON", "one complete object per line"),
    b'"just text"': ("a JSON str instead of an object", "problem"),
    b"[1, 2]": ("a JSON list instead of an object", "problem"),
    b'{"problem": "caf\xe9", "solution": "1"}': ("not UTF-8", "0xe9"),
    b'{"problem": "a\0b", "solution": "1"}': ("NUL byte", "rewrite"),
    b'{"problem": "a\\u0000b", "solution": "1"}': ("NUL character", "problem"),
    b'{"problem": "a\\ud83d", "solution": "1"}': ("half of a surrogate pair", "problem"),
    b'{"problem": 7, "solution": "1"}': ("problem has the wrong type", "int instead of text"),
    b'{"problem": "p", "solution": ["1"]}': ("solution has the wrong type", "list instead of text"),
    b'{"problem": "p", "solution": "1", "answer": true}': ("answer has the wrong type", "bool"),
    b'{"problem": " ", "solution": "1"}': ("empty problem", "fill it in"),
    b'{"problem": null, "solution": "1"}': ("empty problem", "fill it in"),
    b'{"problem": "\\u200b \\ufeff\\u202e", "solution": "1"}': ("empty problem", "fill it in"),
    b'{"problem": "p", "solution": "1", "answer": Infinity}': ("answer is infinite", "as text"),
    b'{"\\ud83d\\n[bold]": 1}': ("no column with the problem", "columns are \\ud83d\\n[bold]"),
    b'{"problem": "p", "solution": "s", "meta": {"a": 1, "a": 2}}': ("a key stands twice", "delete one 'a'"),
    b'{"problem": "p"}': ("no solution", "worked solution"),
    b'{"problem": "p", "solution": ""}': ("no solution", "worked solution"),
    b'{"problme": "p", "solution": "s"}': ("no column with the problem", "did you mean 'problem'"),
    b'{"data": {"problem": "p", "solution": "s"}}':
        ("no column with the problem", "nested: move the content of 'data'"),
    b'{"x": "' + b"y" * 1_000_001 + b'"}': ("row longer than 1 MB", "quote"),
    b"[" * 100_000: ("JSON nested too deep", "flatten"),
    b'{"messages": []}': ("malformed messages", "role"),
    b'{"messages": [{"role": "user"}]}': ("malformed messages", "message 1 needs role and content"),
    b'{"messages": [{"role": "asistant", "content": "x"}]}':
        ("malformed messages", "did you mean 'assistant'"),
    b'{"messages": [{"role": "assistant", "content": "x"}]}':
        ("malformed messages", "message 1 is from assistant"),
    b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}':
        ("malformed messages", "message 2 is from user after user"),
    b'{"messages": [{"role": "user", "content": ""}]}': ("malformed messages", "message 1 is empty"),
    b'{"messages": [{"role": "user", "content": 3}]}': ("content of message 1 has the wrong type", "int"),
    b'{"messages": [{"role": "user", "content": [{"type": "image", "text": null}]}]}':
        ("content of message 1 has the wrong type", "list"),
    b'{"messages": [{"role": "user", "content": "x"}]}': ("no solution", "messages"),
}


@pytest.mark.parametrize("raw", BAD_LINES, ids=[f"{i}-{v[0]}" for i, v in enumerate(BAD_LINES.values())])
def test_a_bad_row_names_file_line_reason_and_fix_and_the_rest_is_kept(tmp_path, raw):
    path = write(tmp_path, line(id="first") + b"\n" + raw + b"\n" + line(id="last") + b"\n")
    examples, report = load(path)
    reason, fix = BAD_LINES[raw]
    assert [e.id for e in examples] == ["first", "last"] and report.kept == 2
    assert report.skipped == {reason: 1}
    assert report.rows[0].startswith(f"{path}:2: {reason}; ") and fix in report.rows[0]
    with pytest.raises(UserError, match="strict=true"):
        load(path, strict=True)


def test_a_truncated_last_line_is_named_and_a_whole_one_without_newline_is_kept(tmp_path):
    cut = write(tmp_path, line() + b"\n" + line()[:-9])
    assert load(cut)[1].skipped == {"truncated last line": 1}
    inside_a_letter = write(tmp_path, line() + b'\n{"problem": "caf\xc3')
    assert load(inside_a_letter)[1].skipped == {"truncated last line": 1}
    whole = write(tmp_path, line() + b"\n" + line())
    assert load(whole)[1].kept == 2 and load(whole)[1].skipped == {}


def test_bom_crlf_and_blank_lines_at_the_end_are_no_errors(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + line(id="a") + b"\r\n" + line(id="b") + b"\r\n\r\n\n")
    examples, report = load(path)
    assert [e.id for e in examples] == ["a", "b"] and not report.skipped
    assert [e.where for e in examples] == [f"{path}:1", f"{path}:2"]


def test_utf16_and_unknown_kinds_and_no_rows_are_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="UTF-16; save it as UTF-8"):
        load(write(tmp_path, json.dumps(GOOD).encode("utf-16")))
    with pytest.raises(UserError, match="unknown kind of file '.xml'"):
        load(write(tmp_path, b"<x/>", "rows.xml"))
    with pytest.raises(UserError, match="no usable row"):
        load(write(tmp_path, b""))
    with pytest.raises(UserError, match=r"2 skipped: 2 x not JSON\n.*rows.jsonl:1: not JSON"):
        load(write(tmp_path, b"a\nb\n"))
    with pytest.raises(UserError, match="not a readable parquet"):
        load(write(tmp_path, b"PAR1 no", "rows.parquet"))


def test_a_missing_file_names_the_nearest_existing_one(tmp_path):
    write(tmp_path, line() + b"\n", "train.jsonl")
    with pytest.raises(UserError, match="did you mean 'train.jsonl'"):
        load(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="nowhere does not exist.*train.jsonl"):
        load(tmp_path / "nowhere" / "deeper" / "x.jsonl")
    with pytest.raises(UserError, match="no data given"):
        load("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data files in this folder"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("name, asked", [
    ("openai/gsm8k", ("openai/gsm8k", None, "test")), ("openai/gsm8k:main", ("openai/gsm8k", "main", "test")),
    ("openai/gsm8k:main:train[:-200]", ("openai/gsm8k", "main", "train[:-200]")),
    ("owner/name::train[-200:]", ("owner/name", None, "train[-200:]"))])
def test_a_hub_name_may_have_its_configuration_and_its_split(monkeypatch, name, asked):
    monkeypatch.setattr("minimath.data.readers.without_network", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", lambda repo, config, split: [
        {"problem": f"{(repo, config, split)}", "answer": "1"}])
    example, = load_examples(DataOptions(source=name, split="test"))[0]
    assert example.problem == str(asked)


def test_a_hub_name_that_cannot_be_loaded_is_one_clear_error():
    with pytest.raises(UserError, match="data=nobody/nothing-here: is no file here, and as a hub data set"):
        load("nobody/nothing-here")


def test_gsm8k_answers_are_split_and_their_marks_removed(tmp_path):
    e = load_one(tmp_path, {"question": "Clips?", "answer": "Sold 48/2 = <<48/2=24>>24.\nAll: 72\n#### 72"})
    assert (e.solution, e.answer) == ("Sold 48/2 = 24.\nAll: 72", "72")


def test_a_short_answer_is_a_final_answer_and_no_solution(tmp_path):
    row = {"question": "How many?", "answer": 1200.0}
    assert load_one(tmp_path, row, need=("answer",)).answer == "1200"
    with pytest.raises(UserError, match="no solution"):
        load_one(tmp_path, row)


def test_a_missing_answer_is_taken_from_the_box(tmp_path):
    row = {"problem": "p", "solution": "so \\boxed{1} or rather $\\boxed{\\frac{1}{2}}$."}
    assert load_one(tmp_path, row).answer == "\\frac{1}{2}"
    with pytest.raises(UserError, match="no answer"):
        load_one(tmp_path, {"problem": "p", "solution": "it is 5"}, need=("solution", "answer"))


def test_prompt_and_completion_load_as_text_and_as_messages(tmp_path):
    e = load_one(tmp_path, {"prompt": "p", "completion": "c"})
    assert (e.problem, e.solution, e.messages) == ("p", "c", None)
    chat = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": "c \\boxed{4}"}]}
    e = load_one(tmp_path, chat)
    assert [m["role"] for m in e.messages] == ["system", "user", "assistant"]
    assert (e.problem, e.solution, e.answer) == ("p", "c \\boxed{4}", "4")


FAST_MATH = {"problem": "p", "generation": "<think>\n2 + 3 = 5\n</think>\n\nSo \\boxed{5}.", "answer": "5"}
OPEN_R1 = {"problem": "p", "solution": "the reference", "answer": "5", "problem_type": "Algebra", "uuid": "u",
           "is_reasoning_complete": [True, True, False, True],
           "generations": ["long and right \\boxed{5}", "wrong \\boxed{6}", "cut", "right \\boxed{5}"],
           "correctness_math_verify": [True, False, True, True], "correctness_llama": None,
           "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "the first right one"}]}


def test_the_rows_of_the_authors_own_sets_load(tmp_path):
    e = load_one(tmp_path, FAST_MATH, need=("solution", "answer"))
    assert (e.problem, e.solution, e.answer, e.messages) == ("p", FAST_MATH["generation"], "5", None)
    e = load_one(tmp_path, {"problem": "p", "answer": "5"}, need=("answer",))  # their RL set
    assert (e.problem, e.solution, e.answer) == ("p", "", "5")


def test_of_several_generations_the_shortest_that_is_right_and_whole_is_taken(tmp_path):
    e = load_one(tmp_path, OPEN_R1, need=("solution", "answer"))
    assert (e.problem, e.solution, e.answer, e.messages) == ("p", "right \\boxed{5}", "5", None)
    assert "generations" not in load([OPEN_R1])[1].unread and load([OPEN_R1])[1].unread["solution"] == 1
    by_llama = {**OPEN_R1, "correctness_math_verify": None, "correctness_llama": [True, False, False, False]}
    assert load_one(tmp_path, by_llama).solution == OPEN_R1["generations"][0]
    assert load_one(tmp_path, {**OPEN_R1, "is_reasoning_complete": None}).solution == "cut"


@pytest.mark.parametrize("change, reason, fix", [
    ({"correctness_math_verify": [False] * 4}, "no right generation", "none of 4"),
    ({"generations": []}, "no right generation", "none of 0"),
    ({"correctness_math_verify": None}, "generations without verdicts", "minimath sample"),
])
def test_generations_without_a_right_one_are_a_bad_row_for_sft_and_a_problem_for_rl(tmp_path, change, reason, fix):
    _, report = load(write(tmp_path, json.dumps(OPEN_R1 | change) + "\n" + json.dumps(GOOD) + "\n"))
    assert report.skipped == {reason: 1} and fix in report.rows[0]
    e = load_one(tmp_path, OPEN_R1 | change, need=("answer",))
    assert (e.problem, e.solution, e.answer) == ("p", "", "5")


def test_generations_beside_a_chat_and_its_completion_are_a_row_like_any():
    chat = {"prompt": [{"role": "user", "content": "p"}], "completion": "c \\boxed{4}"}
    examples, report = load([{**OPEN_R1, **chat, "messages": None, "problem": None}])
    assert examples[0].solution == "right \\boxed{5}" and report.unread["completion"] == 1


def test_generations_load_from_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([OPEN_R1]), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet")[0][0].solution == "right \\boxed{5}"


@pytest.mark.parametrize("name, library", [("a.parquet", "pyarrow"), ("owner/name", "datasets")])
def test_a_missing_reader_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(tmp_path)
    if "." in name:
        (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=f"pip install {library}"):
        load(name)


def test_the_first_name_of_a_column_counts(tmp_path):
    assert load_one(tmp_path, {"question": "q", "problem": "p", "solution": "s"}).problem == "p"


def test_a_list_of_dicts_loads_as_a_file_does_and_its_rows_have_numbers():
    rows = [{**GOOD, "id": "a"}, {"problem": "p"}, 7, {**GOOD, "id": "b"}, {**GOOD, "solution": "x" * 1_000_001}]
    examples, report = load(rows)
    assert [(e.id, e.where, e.answer) for e in examples] == [("a", "row 1", "5"), ("b", "row 4", "5")]
    assert report.skipped == {"no solution": 1, "int instead of an object": 1, "row longer than 1 MB": 1}
    assert [row.split("; ")[0] for row in report.rows] == [
        "row 2: no solution", "row 3: int instead of an object", "row 5: row longer than 1 MB"]
    assert len(load(rows, limit=1)[0]) == 1
    with pytest.raises(UserError, match="^row 2: no solution; .*strict=true"):
        load(rows, strict=True)
    with pytest.raises(UserError, match="^data: no usable row"):
        load([{"problem": "p"}])


def test_json_list_and_data_object_give_the_number_of_each_row(tmp_path):
    rows = [{**GOOD, "id": "a"}, {"problem": "p"}, {**GOOD, "id": "b"}, "text"]
    for name, text in (("a.json", json.dumps(rows, indent=1)), ("c.json", json.dumps(rows)),
                       ("b.json", json.dumps({"version": 1, "data": rows}, indent=1)),
                       ("d.json", json.dumps({"data": rows}))):
        examples, report = load(write(tmp_path, text, name))
        assert [(e.id, e.where) for e in examples] == [("a", f"{tmp_path / name}:row 1"),
                                                       ("b", f"{tmp_path / name}:row 3")]
        assert report.rows[0].startswith(f"{tmp_path / name}:row 2: no solution")
        assert report.rows[1].startswith(f"{tmp_path / name}:row 4: a JSON str instead of an object")


@pytest.mark.parametrize("raw, reason", [
    (json.dumps([GOOD, GOOD]).encode()[:-20], "not JSON .* line 1 column"),
    (b'[{"problem": "caf\xe9"}]', "not JSON .*0xe9"),
    (b'[{"problem": "a\0b"}]', "not JSON .*control character"), (b'[{"n": ' + b"9" * 5000 + b"}]", "not JSON .*digits"),
    (b"[" * 100_000, "not JSON .*recursion"), (json.dumps({"rows": 1}, indent=1).encode(), "no list of rows"),
    (b'[{"problem": "a", "problem": "b"}]', "a key stands twice; rename or delete one 'problem'")])
def test_a_spoiled_json_file_is_one_clear_error(tmp_path, raw, reason):
    with pytest.raises(UserError, match=f"a.json: {reason}"):
        load(write(tmp_path, raw, "a.json"))


def test_jsonl_under_the_name_json_loads(tmp_path):
    assert load(write(tmp_path, line() + b"\n" + line() + b"\n", "a.json"))[1].kept == 2


def test_a_json_list_may_be_called_jsonl(tmp_path):
    rows = [{"problem": name, "solution": "s"} for name in "abc"]
    for text in (json.dumps(rows), "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", json.dumps(rows, indent=1)):
        examples, report = load(write(tmp_path, text, "a.jsonl"))
        assert [e.problem for e in examples] == ["a", "b", "c"] and not report.skipped


def test_csv_rows_are_texts_and_numbered(tmp_path):
    text = 'problem,solution\r\n"two\nlines",007\r\nonly one cell\r\n 1,234\r\nb\xff,s4\r\nb\xff\r\na\0b,s\r\n'
    examples, report = load(write(tmp_path, text.encode("latin-1"), "a.csv"))
    path = tmp_path / "a.csv"
    assert [(e.where, e.problem, e.solution) for e in examples] == [
        (f"{path}:row 1", "two\nlines", "007"), (f"{path}:row 3", "1", "234")]
    assert [row.split("; ")[0] for row in report.rows] == [
        f"{path}:row 2: wrong number of cells", f"{path}:row 4: not UTF-8", f"{path}:row 5: not UTF-8",
        f"{path}:row 6: NUL byte"]
    tabs = write(tmp_path, "\ufeff problem \tsolution\np\ta, b\n", "a.tsv")
    assert load(tabs)[0][0].solution == "a, b"


@pytest.mark.parametrize("lost", ['"q,s\np,s\n', 'q,"s\np,s\n', 'q,"s'])
def test_csv_with_a_lost_quote_names_the_row(tmp_path, lost):
    examples, report = load(write(tmp_path, "problem,solution\np,s\n" + lost, "a.csv"))
    assert report.rows[0].startswith(f"{tmp_path / 'a.csv'}:row 2: quote not closed; ") and len(examples) == 1
    with pytest.raises(UserError, match="a.csv: not a readable table"):
        load(write(tmp_path, '"problem,solution\np,s\n', "a.csv"))


@pytest.mark.parametrize("name, text", [
    ("a.tsv", 'problem\tanswer\n"Why" asks Tom\t1\np\t2\n'), ("a.csv", 'problem,answer\n"Why" he,1\np,2\n'),
    ("b.tsv", 'problem\tanswer\n"Why\t1\nb\t2\n"c\t3\nq\t4\n')])
def test_a_cell_with_a_quote_of_its_own_loses_none_and_joins_no_rows_but_is_refused(tmp_path, name, text):
    examples, report = load(write(tmp_path, text, name), need=["answer"])
    assert all(e.problem in "pq" for e in examples) and len(examples) == 1
    assert report.rows[0].startswith(f"{tmp_path / name}:row 1: quote in the middle of a cell; ")


def test_csv_blank_lines_are_rows_only_between_rows_and_a_long_cell_is_a_long_row(tmp_path):
    text = "\nproblem,solution\n\np,s\n\n\n" + "x" * 1_000_001 + ",s\np,s\n\n"
    examples, report = load(write(tmp_path, text, "a.csv"))
    assert len(examples) == 2 and report.skipped == {"empty row": 3, "row longer than 1 MB": 1}


def test_a_csv_file_with_two_columns_of_one_name_is_refused_and_not_halved(tmp_path):
    with pytest.raises(UserError, match="a.csv: two columns are called 'answer'; rename one"):
        load(write(tmp_path, "problem,answer, answer,,\np,5,6,,\n", "a.csv"))


def test_a_csv_file_of_one_column_loads(tmp_path):
    examples, _ = load(write(tmp_path, "problem\np\nq\n", "a.csv"), need=())
    assert [e.problem for e in examples] == ["p", "q"]


def test_parquet_rows_are_numbered(tmp_path):
    import pyarrow
    import pyarrow.parquet
    table = pyarrow.Table.from_pylist([GOOD, {"problem": "p", "solution": None}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    examples, report = load(tmp_path / "a.parquet")
    assert examples[0].where.endswith("a.parquet:row 1")
    assert report.rows[0].startswith(f"{tmp_path / 'a.parquet'}:row 2: no solution")


def test_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path):
    import pyarrow
    import pyarrow.parquet
    texts = pyarrow.array([b"p", b"caf\xe9", b"q"]).view(pyarrow.utf8())
    pyarrow.parquet.write_table(pyarrow.table({"problem": texts, "solution": ["s"] * 3}), tmp_path / "a.parquet")
    examples, report = load(tmp_path / "a.parquet")
    assert [e.problem for e in examples] == ["p", "q"] and report.skipped == {"not UTF-8": 1}
    assert report.rows[0].startswith(f"{tmp_path / 'a.parquet'}:row 2: ")


def test_a_column_of_parquet_whose_name_is_not_utf8_is_one_clear_error(tmp_path):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["p"], "zzzz": ["s"]}), tmp_path / "a.parquet",
                                store_schema=False)
    path = write(tmp_path, (tmp_path / "a.parquet").read_bytes().replace(b"zzzz", b"\xff\xfe\xfd\xfc"), "b.parquet")
    with pytest.raises(UserError, match="b.parquet: not a readable parquet file"):
        load(path)


def test_numbers_as_answers_are_plain_text_and_nan_is_a_missing_answer(tmp_path):
    for number, text in ((3.0, "3"), (0.5, "0.5"), (1e16, "10000000000000000"), (-0.0, "0"), (float("nan"), "")):
        assert load_one(tmp_path, {**GOOD, "solution": "s", "answer": number}).answer == text


def test_a_markdown_heading_is_no_final_answer(tmp_path):
    solution = "#### Step 1\n2 + 3 = 5.\nSo \\boxed{5}"
    e = load_one(tmp_path, {"problem": "p", "solution": solution})
    assert (e.solution, e.answer) == (solution, "5")


def test_what_would_be_left_out_of_a_folder_or_file_is_said(tmp_path):
    write(tmp_path, line(), "a.jsonl")
    write(tmp_path, b"\0\5\7 Mac OS X", "._a.jsonl")  # the Finder's notes on a.jsonl
    write(tmp_path, b"\x1f\x8b", "a.jsonl.gz")
    assert load(tmp_path)[1].kept == 1 and not load(tmp_path)[1].skipped
    for source in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(UserError, match=r"split=train\[:100\] is for a hub data set"):
            load(source, split="train[:100]")
    write(tmp_path, b"\x1f\x8b", "b.jsonl.gz")
    with pytest.raises(UserError, match="b.jsonl.gz: compressed files are not read"):
        load(tmp_path)


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    write(tmp_path, line(id="a") + b"\n", "my_train.jsonl")
    write(tmp_path, line(id="b") + b"\n", "my_test.jsonl")
    assert [e.id for e in load(tmp_path, split="test")[0]] == ["b"]
    assert len(load(tmp_path, split="validation")[0]) == 2


def test_repeated_ids_and_problems_are_kept_and_noted_and_limit_stops(tmp_path):
    path = write(tmp_path, (line(id="a") + b"\n") * 3)
    examples, report = load(path)
    assert len(examples) == 3 and report.notes == {"repeated id": 2, "repeated problem": 2}
    assert "2 x repeated id" in describe_report(report)
    assert len(load(path, limit=2)[0]) == 2


def test_the_report_keeps_20_rows_and_all_counts(tmp_path):
    _, report = load(write(tmp_path, b"bad\n" * 50 + line() + b"\n"))
    assert report.skipped == {"not JSON": 50} and len(report.rows) == 20
    assert describe_report(report).startswith("1 rows kept, 50 skipped: 50 x not JSON")
