"""The questions of cells: one file a size, read and checked, and the words in which a question is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laid.data.coco import SPLITS, annotation_file
from laid.data.pope import is_pope, read_pope
from laid.data.questions import OFFICIAL_PROMPT, Question, haystack_file, read_questions
from laid.errors import LaidError
from laid.evaluation.scoring import pope_answer, spoken_answer


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one cell and the file they stand in.

    spoken: what a generated response says, by the rule of the benchmark.
    """

    file: Path
    questions: list[Question]
    spoken: Callable[[str], str] = spoken_answer

    @property
    def size(self) -> int:
        """Images per question."""
        return self.questions[0].size

    @property
    def images(self) -> list[str]:
        """The images that the questions name, sorted."""
        return sorted({p for q in self.questions for p in (*q.needles, *q.distractors)})

    def inputs(self, coco_root: str | Path) -> dict[str, Any]:
        """What answers follow from beside the model, as laid.provenance takes it; official questions do without annotations."""
        files = {f"annotations_{split}": annotation_file(coco_root, split) for split in SPLITS}
        labelled = {name: file for name, file in files.items() if file.is_file()}
        return {"questions": self.file, "images": (coco_root, self.images), **labelled}


def read_set(file: Path, coco_root: str | Path, size: int | None = None) -> QuestionSet:
    """Read a file of haystacks (VHs JSON) or of POPE's questions; `size`: the images that each question must have.

    Raises LaidError for a file that is missing or broken, and for questions of several sizes.
    """
    if is_pope(file):
        return QuestionSet(file, read_pope(file, coco_root), pope_answer)
    questions = read_questions(file)
    expected = questions[0].size if size is None else size
    wrong = next((q for q in questions if q.size != expected), None)
    if wrong is not None:
        raise LaidError(f"{file}: question {wrong.id} has {wrong.size} images, expected {expected}")
    return QuestionSet(file, questions)


def question_sets(
    questions: Sequence[Path], sizes: Sequence[int], coco_root: str | Path
) -> list[QuestionSet]:
    """Question files, or one folder of visual_haystack_<size>.json and the sizes wanted, as sets. Raises LaidError."""
    if len(questions) == 1 and questions[0].is_dir():
        if not sizes:
            raise LaidError(
                f"{questions[0]}: a folder of question files: give the sizes with --sizes, or name one file"
            )
        return [read_set(haystack_file(questions[0], size), coco_root, size) for size in dict.fromkeys(sizes)]
    sets = [read_set(file, coco_root) for file in questions]
    found = [part.size for part in sets]
    if len(set(found)) < len(found):
        raise LaidError(
            f"{questions[0]}: {len(found)} question files for {len(set(found))} sizes: a cell holds one"
        )
    if sizes and set(sizes) != set(found):
        raise LaidError(
            f"--sizes {' '.join(map(str, sizes))}: the question files have {', '.join(map(str, sorted(found)))} images"
        )
    return sets


def prompt_of(question: Question) -> str:
    """What stands before a question: the official runner's words, or nothing before POPE's."""
    return "" if question.mode == "object" else OFFICIAL_PROMPT
