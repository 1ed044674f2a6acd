import json
from pathlib import Path

import pytest
from datasets import Dataset

from wmss_trl.data.math import load_math_dataset, prompts_and_answers, to_prompt_completion


def convert(**example: str) -> dict[str, str]:
    return to_prompt_completion(Dataset.from_list([example]))[0]


@pytest.mark.parametrize(
    ("example", "completion"),
    [
        ({"solution": "1 + 1 = 2.", "answer": "2"}, "1 + 1 = 2.\n#### 2"),
        ({"solution": "1 + 1 = 2. #### 2", "answer": "2"}, "1 + 1 = 2. #### 2"),
        ({"solution": r"So \boxed{2}.", "answer": "2"}, r"So \boxed{2}."),
        ({"solution": "1 + 1 = 2."}, "1 + 1 = 2."),
        ({"answer": "2"}, "#### 2"),
        ({"answer": 2}, "#### 2"),
        ({"answer": "1 + 1 = <<1+1=2>>2\n#### 2"}, "1 + 1 = <<1+1=2>>2\n#### 2"),
    ],
)
def test_completion_ends_with_the_answer(example: dict, completion: str) -> None:
    converted = convert(question=" What is 1 + 1? ", **example)
    assert converted["prompt"] == "What is 1 + 1?\n"
    assert converted["completion"] == completion
    assert converted["question"] == " What is 1 + 1? "


def test_other_columns_stay_unless_the_trainer_would_read_them() -> None:
    converted = convert(question="1 + 1?", answer="2", type="sum", text="something else")
    assert converted["type"] == "sum"
    assert "text" not in converted


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "1 + 1?", "completion": " 2", "level": 1},
        {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}], "level": 1},
    ],
)
def test_data_the_trainer_takes_already_is_unchanged(example: dict) -> None:
    dataset = Dataset.from_list([example])
    assert to_prompt_completion(dataset) is dataset


def test_unknown_columns_are_named() -> None:
    with pytest.raises(ValueError, match=r"\['body', 'title'\].*`prompt` \+ `completion`"):
        convert(body="b", title="t")
    with pytest.raises(ValueError, match="accepted forms"):
        convert(question="alone")


def test_prompts_and_answers() -> None:
    user, assistant = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "The answer is 2."}
    cases = [
        ({"question": "1 + 1?", "solution": "1 + 1 = 2", "answer": "2"}, "1 + 1?\n", "2"),
        ({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}, "1 + 1?\n", "2"),
        ({"prompt": "1 + 1?", "completion": r" \boxed{2}"}, "1 + 1?", "2"),
        ({"prompt": [user], "completion": [assistant]}, [user], "2"),
        ({"messages": [user, assistant]}, [user], "2"),
        ({"messages": [user, assistant, user, assistant]}, [user, assistant, user], "2"),
        ({"messages": [user, assistant], "answer": "two"}, [user], "two"),
    ]
    for example, prompt, answer in cases:
        dataset = to_prompt_completion(Dataset.from_list([example]))
        assert prompts_and_answers(dataset) == ([prompt], [answer])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_loads_a_local_file(tmp_path: Path, suffix: str) -> None:
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(5)]
    path = tmp_path / f"problems{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    dataset = load_math_dataset(path, "train[:3]")
    assert dataset["completion"][:] == ["#### 1", "#### 2", "#### 3"]


def test_loads_a_local_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": split, "answer": "1"}))
    assert load_math_dataset(str(tmp_path))["prompt"][:] == ["train\n"]
    assert load_math_dataset(str(tmp_path), "test")["prompt"][:] == ["test\n"]


def test_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "problems.xlsx"
    path.touch()
    with pytest.raises(ValueError, match=r"\.jsonl"):
        load_math_dataset(path)
