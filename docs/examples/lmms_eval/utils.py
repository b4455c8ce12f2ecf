"""Visual Haystacks for lmms-eval, as laid asks and scores it. VHS_QUESTIONS: folder of question files; VHS_IMAGES: of COCO."""

import os
from pathlib import Path

from laid.data.images import open_image
from laid.data.questions import OFFICIAL_PROMPT, ordered_images, parse_questions
from laid.evaluation.scoring import is_right, spoken_answer

QUESTIONS, IMAGES = (os.environ.get(name, "") for name in ("VHS_QUESTIONS", "VHS_IMAGES"))


def process_docs(docs):
    """The entries of a question file, checked, with their images in the order in which laid shows them."""
    questions = parse_questions(list(docs), QUESTIONS)
    return docs.from_list(
        [{"text": q.text, "images": ordered_images(q)[0], "answer": q.answer} for q in questions]
    )


def doc_to_visual(doc):
    return [open_image(Path(IMAGES) / name) for name in doc["images"]]


def doc_to_text(doc):
    return OFFICIAL_PROMPT + doc["text"]


def process_results(doc, results):
    said = spoken_answer(results[0])
    return {
        "accuracy": float(is_right({"answer": said, "label": doc["answer"]})),
        "compliance": float(said != "none"),
    }
