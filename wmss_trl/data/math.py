"""Math problems with reference solutions, brought into the form that SFTTrainer takes."""

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from wmss_trl.evaluation.math_answers import extract_answer

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_ACCEPTED = "`prompt` + `completion`, `messages`, `question` + `solution` (+ `answer`), or `question` + `answer`"
# SFTTrainer gives these columns a meaning of its own, so a converted data set must not carry them along.
_TRAINER_COLUMNS = {
    "assistant_masks",
    "chat_template_kwargs",
    "conversations",
    "image",
    "images",
    "input_ids",
    "labels",
    "seq_lengths",
    "text",
    "tools",
}


def load_math_dataset(name_or_path: str | Path, split: str = "train", *, config_name: str | None = None) -> Dataset:
    """
    Loads math problems from a file, a folder or the Hub and converts them, see [`to_prompt_completion`].

    Args:
        name_or_path (`str` or `Path`):
            Local `.json`, `.jsonl` or `.parquet` file, local folder of such files, or id of a data set on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split to load, slices such as `"train[:100]"` included. A single file has only the split `"train"`.
        config_name (`str`, *optional*):
            Name of the data set's configuration, such as `"main"` of `"openai/gsm8k"`.

    Returns:
        `Dataset` with `prompt` and `completion`, or `messages`, beside its other columns.
    """
    path = Path(name_or_path)
    if path.is_file():
        if path.suffix not in _LOADERS:
            raise ValueError(f"Cannot load {path}: expected a file that ends in {', '.join(_LOADERS)}")
        return to_prompt_completion(load_dataset(_LOADERS[path.suffix], data_files=str(path), split=split))
    return to_prompt_completion(load_dataset(str(name_or_path), config_name, split=split))


def to_prompt_completion(dataset: Dataset) -> Dataset:
    r"""
    Adds `prompt` and `completion` columns to problems that have a `question` and a `solution`, an `answer`, or both.

    The completion is the solution, ending with `#### answer` unless the solution already states its final answer in
    that form or in `\boxed{}`. An `answer` that contains `####` is taken for a worked solution, as in GSM8K. Data sets
    that already have `prompt` and `completion`, or `messages`, are returned unchanged. Other columns are kept, except
    for those that SFTTrainer would read (such as `text`).

    Args:
        dataset (`Dataset`):
            Data set in one of the accepted forms.

    Returns:
        `Dataset` that SFTTrainer accepts.
    """
    columns = set(dataset.column_names)
    if "messages" in columns or {"prompt", "completion"} <= columns:
        return dataset
    if "question" not in columns or not columns & {"solution", "answer"}:
        raise ValueError(f"Columns {sorted(columns)} are in none of the accepted forms: {_ACCEPTED}")

    def convert(example: dict[str, Any]) -> dict[str, str]:
        solution, answer = example.get("solution"), example.get("answer")
        answer = "" if answer is None else str(answer)
        if not solution and "####" in answer:
            solution, answer = answer, ""
        completion = (solution or "").strip()
        if answer and "####" not in completion and r"\boxed{" not in completion:
            completion = f"{completion}\n#### {answer}".strip()
        # The line break is a token boundary in common tokenizers, so the prompt stays a prefix of the whole.
        return {"prompt": f"{example['question'].strip()}\n", "completion": completion}

    return dataset.map(convert, remove_columns=sorted(columns & _TRAINER_COLUMNS), desc="Building prompts")


def prompts_and_answers(dataset: Dataset) -> tuple[list[str | list[dict[str, str]]], list[str | None]]:
    """
    Splits a converted data set into what is asked and what should come out, for evaluation by generation.

    Args:
        dataset (`Dataset`):
            Data set as returned by [`to_prompt_completion`].

    Returns:
        `tuple` of the prompts (texts or conversations without the final assistant message) and the reference answers:
        the `answer` column where there is one, else what [`~wmss_trl.evaluation.math_answers.extract_answer`] finds in
        the reference completion.
    """
    prompts, answers = [], []
    for example in dataset:
        if "prompt" in example:
            prompt, completion = example["prompt"], example["completion"]
        else:
            *prompt, completion = example["messages"]
            completion = [completion]
        if not isinstance(completion, str):
            completion = completion[-1]["content"]
        answer = example.get("answer")
        prompts.append(prompt)
        answers.append(extract_answer(completion) if answer is None or "####" in str(answer) else str(answer))
    return prompts, answers
