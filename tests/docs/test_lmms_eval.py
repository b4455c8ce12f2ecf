"""docs/examples/lmms_eval asks what `laid evaluate` asks; lmms-eval itself is not needed here (docs/guides/benchmarks.md)."""

from importlib import util
from pathlib import Path

import pytest
import yaml

from laid.data.questions import haystack_file, read_questions
from laid.evaluation.evaluate import Evaluator
from laid.io import read_json
from laid.methods.registry import load_with_method

FOLDER = Path(__file__).resolve().parents[2] / "docs/examples/lmms_eval"


class Docs(list):
    """What the task needs of a datasets.Dataset."""

    from_list = staticmethod(list)


@pytest.fixture
def utils(haystacks, coco_root, monkeypatch):
    monkeypatch.setenv("VHS_QUESTIONS", str(haystacks / "test"))
    monkeypatch.setenv("VHS_IMAGES", str(coco_root))
    spec = util.spec_from_file_location("utils", FOLDER / "utils.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task(file, utils):
    """A task's settings as lmms-eval reads them: `include` below, functions out of the module beside."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _, node: getattr(utils, node.value.removeprefix("utils.")))
    settings = yaml.load(file.read_text(), Loader)
    if "include" in settings:
        settings = yaml.load((FOLDER / settings.pop("include")).read_text(), Loader) | settings
    return settings


def test_the_prompts_are_those_of_laid(utils, haystacks, coco_root, family, micro):
    """By the chat template, with a block for every image, as a processor makes them of lmms-eval's messages."""
    found = task(FOLDER / "vhs_5.yaml", utils)
    where = found["dataset_kwargs"]
    file = Path(where["data_dir"]) / where["data_files"][found["test_split"]]
    docs = found["process_docs"](Docs(read_json(file)))
    evaluator = Evaluator(load_with_method(micro, "base", family["small"], None), coco_root, micro.evaluation)
    asked = evaluator.ask(read_questions(haystack_file(haystacks / "test", 5)))
    tokenizer = evaluator.processor.tokenizer
    assert len(docs) == len(asked) == 10
    for doc, ours in zip(docs, asked, strict=True):
        images = found["doc_to_visual"](doc)
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": found["doc_to_text"](doc)}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert doc["images"] == ours.paths and len(images) == 5
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours.prompt.ids.tolist()
        assert doc[found["doc_to_target"]] == ours.question.answer


def test_answers_are_scored_as_laid_scores_them(utils):
    score = task(FOLDER / "vhs_1.yaml", utils)["process_results"]
    for said, right, plain in (("Yes.", 1, 1), ("no", 0, 1), ("yes and no", 1, 1), ("perhaps", 0, 0)):
        assert score({"answer": "yes"}, [said]) == {"accuracy": right, "compliance": plain}


def test_every_size_names_its_file(utils):
    files = sorted(FOLDER.glob("vhs_*.yaml"))
    for file in files:
        found, size = task(file, utils), file.stem.removeprefix("vhs_")
        assert found["task"] == file.stem and {m["metric"] for m in found["metric_list"]} == {
            "accuracy",
            "compliance",
        }
        assert found["dataset_kwargs"]["data_files"] == {"test": f"visual_haystack_{size}.json"}
    group = yaml.safe_load((FOLDER / "vhs.yaml").read_text())
    assert set(group["task"]) < {file.stem for file in files}
