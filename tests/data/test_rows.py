"""Nothing of a row is dropped without a word, and a hint names what would work."""
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimath.config.schema import DataOptions
from minimath.core.errors import UserError
from minimath.data.examples import describe_report, load_examples
from minimath.data.rows import MISSING, THOUGHTS, is_worked

ASK = {"role": "user", "content": "2+3?"}
TALK = [{"role": "system", "content": "Answer in base 7."}, {"role": "user", "content": "x is 6."},
        {"role": "assistant", "content": "Noted."}, {"role": "user", "content": "What is x+1?"}]


def one(row: dict, *need):
    [example], report = load_examples([row], need=need)
    return example, report


def refused(row: dict, *need) -> str:
    with pytest.raises(UserError) as error:
        load_examples([row], need=need)
    return str(error.value)


def test_a_source_may_be_given_alone(tmp_path):
    rows = [{"problem": "p", "answer": "5"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    for source in (rows, tmp_path / "a.jsonl", str(tmp_path / "a.jsonl"), DataOptions(source=rows)):
        assert load_examples(source)[0][0].answer == "5"


@pytest.mark.parametrize("row", [{"problem": "p", "solution": "<think>So 2+3 is", "answer": "5"},
                                 {"messages": [ASK, {"role": "assistant", "content": "<think>\nSo 2+3 is"}]}])
def test_a_solution_that_was_cut_in_its_thought_is_refused_for_training(row):
    assert "thought never ends" in refused(row, "solution")
    assert one({"problem": "p", "solution": "<think>So 2+3 is", "answer": "5"}, "answer")[0].answer == "5"


# ---- columns

def test_the_problem_of_alpaca_is_instruction_and_input():
    row = {"instruction": "Add the two numbers.", "input": "2 and 3", "output": "\\boxed{5}"}
    assert one(row, "solution")[0].problem == "Add the two numbers.\n\n2 and 3"
    assert one({**row, "input": ""}, "solution")[0].problem == "Add the two numbers."
    assert one({"input": "2+3?", "output": "5"}, "solution")[0].problem == "2+3?"


def test_a_column_without_a_name_as_pandas_writes_its_index_is_never_taken_for_another(tmp_path):
    (tmp_path / "a.csv").write_text(",question\n7,2+3?\n")
    [example], report = load_examples(tmp_path / "a.csv")
    assert (example.problem, example.solution, example.answer) == ("2+3?", "", "") and report.unread == {"": 1}


def test_the_problem_of_svamp_is_body_and_question():
    example, report = one({"Body": "Tom has 8 pens. ", "Question": "And with 7 more?", "Answer": "15.0"}, "answer")
    assert (example.problem, example.answer) == ("Tom has 8 pens. And with 7 more?", "15.0") and not report.unread
    assert one({"Body": " ", "Question": "2+3?"})[0].problem == "2+3?"


@pytest.mark.parametrize("problem, solution", [
    ("query", "response"), ("Problem", "Solution"), ("QUESTION", "Output"), (" prompt ", "completion")])
def test_columns_have_many_names_in_any_case(problem, solution):
    example, report = one({problem: "2+3?", solution: "\\boxed{5}"}, "solution")
    assert (example.problem, example.solution, example.answer) == ("2+3?", "\\boxed{5}", "5")
    assert describe_report(report) == ""


@pytest.mark.parametrize("column, value", [
    ("options", ["A) 4", "B) 5"]), ("choices", {"text": ["4", "5"]}), ("context", "x is 6."), ("tools", "[]"),
    ("hint", "carry"), ("level", 5), ("question", "another"), ("Problem", "in capitals"), ("output", "a second one")])
def test_a_column_that_is_not_read_is_said(column, value):
    _, report = one({"problem": "p", "solution": "s", "answer": "5", column: value}, "solution")
    assert describe_report(report) == f"columns that are not read: {column} (1 rows)"


@pytest.mark.parametrize("value", ["", " ", None, [], {}, float("nan"), "NULL"])
def test_a_column_without_anything_in_it_is_not_worth_a_word(value):
    assert describe_report(one({"problem": "p", "answer": "5", "options": value}, "answer")[1]) == ""


def test_a_column_that_is_empty_gives_way_to_one_that_is_not():
    assert one({"problem": "", "question": "q", "answer": None, "final_answer": 5}, "answer")[0].problem == "q"


def test_hints_never_name_the_column_itself():
    text = refused({"exercise": "2+3?", "response": "5"}, "solution")
    assert "columns are exercise, response" in text and "did you mean 'response'" not in text and "question" in text
    assert "column soluton is not read (did you mean 'solution'?)" in refused({"problem": "p", "soluton": "s"},
                                                                             "solution")
    assert "column gold is not read" in refused({"problem": "p", "gold": "5"}, "answer")


# ---- answers

@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_written_without_an_exponent_and_is_the_same_number(number):
    answer = one({"problem": "p", "answer": number}, "answer")[0].answer
    assert float(answer) == number and not set(answer) & set("eE+") and not answer.endswith(".0")


@given(st.integers(-10**40, 10**40))
def test_an_integer_keeps_its_digits(number):
    assert one({"problem": "p", "answer": number}, "answer")[0].answer == str(number)


def test_a_column_of_32_bit_numbers_has_the_digits_that_were_meant(tmp_path):
    import pyarrow
    import pyarrow.parquet
    answers = pyarrow.array([0.1, 2.5, 1e-5, None], pyarrow.float32())
    pyarrow.parquet.write_table(pyarrow.table({"problem": list("pqrs"), "answer": answers}), tmp_path / "a.parquet")
    examples, report = load_examples(tmp_path / "a.parquet", need=("answer",))
    assert [e.answer for e in examples] == ["0.1", "2.5", "0.00001"] and report.skipped == {"no answer": 1}


@pytest.mark.parametrize("answer", sorted(MISSING))
def test_a_programs_word_for_nothing_is_no_answer(answer):
    assert f"answer is '{answer}', which is how programs write a missing one" in refused(
        {"problem": "p", "answer": answer}, "answer")
    example, _ = one({"problem": "p", "solution": "2+3=\\boxed{5}", "answer": answer}, "solution", "answer")
    assert example.answer == "5"
    assert "no solution" in refused({"problem": "p", "solution": answer}, "solution")


@pytest.mark.parametrize("answer", [
    r"\begin{pmatrix} 1 & 2 & 3 \\ 4 & 5 & 6 \end{pmatrix}", "x^2 + 3 x y + 5 y^2 - 2 = 0", "x = 1\ny = 2",
    r"\begin{cases} x + 1 & x > 0 \\ 2 x & \text{otherwise} \end{cases}", "( 1 , 2 , 3 , 4 , 5 , 6 , 7 )",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, holiday, birthday, never", "it is 5"])
def test_a_long_answer_without_prose_is_an_answer(answer):
    assert one({"problem": "p", "answer": answer}, "answer")[0].answer == answer


@pytest.mark.parametrize("text", ["2+3=5\n#### 5", "so \\boxed{5}", "First we add the two numbers and then we get five",
                                  "We add them.\nIt is 5"])
def test_prose_is_a_worked_solution(text):
    assert is_worked(text) and one({"question": "p", "answer": text}, "solution")[0].solution


def test_an_answer_in_a_list_of_one_is_taken_out_of_it():
    assert one({"problem": "p", "final_answer": ["5"]}, "answer")[0].answer == "5"
    assert "answer has the wrong type" in refused({"problem": "p", "answer": ["5", "6"]}, "answer")


# ---- chat rows

def test_sharegpt_rows_are_messages():
    row = {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "2+3?"},
                             {"from": "gpt", "value": "\\boxed{5}"}]}
    example, report = one(row, "solution", "answer")
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant"]
    assert (example.problem, example.answer, describe_report(report)) == ("2+3?", "5", "")
    row["conversations"][1]["from"] = "tool"
    assert "message 2 has role 'tool'" in refused(row)


@pytest.mark.parametrize("more, solution", [
    ({"reward_model": {"style": "rule", "ground_truth": "5"}}, ""),
    ({"reward_model": {"ground_truth": 5}, "extra_info": {"answer": "2+3=<<2+3=5>>5\n#### 5", "index": 1}}, "2+3=5"),
    ({"extra_info": {"answer": "2+3=5 so \\boxed{5}"}}, "2+3=5 so \\boxed{5}"), ({"ground_truth": "5"}, ""),
    ({"solution": "\\boxed{5}"}, "\\boxed{5}"), ({"completion": "\\boxed{5}"}, "\\boxed{5}"), ({"answer": 5.0}, "")])
def test_what_is_beside_a_prompt_of_messages_is_read(more, solution):
    example, report = one({"prompt": [ASK], **more}, "answer")
    assert (example.problem, example.answer, example.solution) == ("2+3?", "5", solution)
    assert example.asked() == [ASK] and describe_report(report) == ""
    assert [m["content"] for m in example.messages[1:]] == [solution] * bool(solution)


def test_the_problem_of_several_turns_holds_them_all():
    example, _ = one({"messages": TALK, "answer": "10"}, "answer")
    assert example.messages == example.asked() == TALK
    assert all(m["content"] in example.problem for m in TALK)
    answered, _ = one({"messages": [*TALK, {"role": "assistant", "content": "10"}]}, "solution")
    assert answered.asked() == TALK and answered.problem == example.problem and answered.solution == "10"


@pytest.mark.parametrize("field", THOUGHTS)
def test_thoughts_in_a_field_of_their_own_are_kept(field):
    row = {"messages": [ASK, {"role": "assistant", "content": "5", field: " 2+3 "}]}
    example, report = one(row, "solution")
    assert example.messages[1]["reasoning_content"] == "2+3" and describe_report(report) == ""
    assert "reasoning_content" not in one({"messages": [ASK, {**row["messages"][1], field: None}]})[0].messages[1]


@pytest.mark.parametrize("column", ["thinking", "reasoning_content", "Thinking"])
def test_thoughts_in_a_column_beside_the_solution_come_before_it(column):
    example, report = one({"problem": "2+3?", "solution": "5\n#### 5", column: "hm \\boxed{4}"}, "solution", "answer")
    assert (example.solution, example.answer) == ("<think>\nhm \\boxed{4}\n</think>\n\n5", "5")
    assert not report.unread
    example, report = one({"problem": "2+3?", "solution": "<think>a</think>5", column: "hm"}, "solution")
    assert example.solution == "<think>a</think>5" and report.unread


def test_other_fields_of_messages_are_said():
    _, report = one({"messages": [{**ASK, "thinking": "hm"}, {"role": "assistant", "content": "5", "weight": 0,
                                                             "tool_calls": [{}], "name": None}]}, "solution")
    assert set(report.unread) == {"thinking of messages", "weight of messages", "tool_calls of messages"}


# ---- files

@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_may_end_in_any_way(tmp_path, end, last):
    lines = ['{"problem": "2+3?", "answer": "5"}', '{"problem": "3+3?", "answer": "6"}']
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes((end.join(lines) + end * last).encode())
        assert [e.answer for e in load_examples(tmp_path / name)[0]] == ["5", "6"]
    (tmp_path / "a.csv").write_bytes((end.join(["problem,answer", "2+3?,5", "3+3?,6"]) + end * last).encode())
    assert [e.answer for e in load_examples(tmp_path / "a.csv")[0]] == ["5", "6"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("between", list(",;\t|"))
def test_the_header_tells_what_stands_between_cells(tmp_path, name, between):
    (tmp_path / name).write_text(f"\nproblem{between}answer\n2+3?{between}5\n'x.y'?{between}5.5\n")
    examples, report = load_examples(tmp_path / name, need=("answer",))
    assert [e.answer for e in examples] == ["5", "5.5"] and describe_report(report) == ""
