import copy
import shutil
from pathlib import Path

import pytest
import torch

from laid.cli import main
from laid.data.questions import haystack_file, ordered_images, read_questions, write_questions
from laid.errors import LaidError
from laid.evaluation.cells import read_cell
from laid.evaluation.evaluate import Evaluator, evaluate_cells, seed_of
from laid.evaluation.scoring import spoken_answer
from laid.evaluation.sets import question_sets
from laid.io import read_json, write_json
from laid.methods.registry import load_with_method


def changed(config, **evaluation):
    return config.changed({"evaluation": evaluation})


@pytest.fixture(scope="module")
def loaded(micro, family):
    return load_with_method(micro, "base", family["small"], None)


@pytest.fixture(scope="module")
def questions(haystacks):
    return [q for size in (1, 2, 5) for q in read_questions(haystack_file(haystacks / "test", size))]


def evaluator(loaded, coco_root, micro, **evaluation):
    return Evaluator(loaded, coco_root, changed(micro, **evaluation).evaluation)


def answers(*args, questions, **options):
    found = evaluator(*args, **options)
    return found.answer(found.ask(questions))


def same(ours, theirs):
    assert [(a["id"], a["answer"], a["needles"]) for a in ours] == [
        (a["id"], a["answer"], a["needles"]) for a in theirs
    ]
    if ours[0]["p_yes"] is not None:
        assert [a["p_yes"] for a in ours] == pytest.approx([a["p_yes"] for a in theirs], abs=1e-4)


def test_answers_do_not_depend_on_the_batch(loaded, coco_root, micro, questions):
    whole = answers(loaded, coco_root, micro, questions=questions)
    assert len({a["answer"] for a in whole}) == 2 and len({a["p_yes"] for a in whole}) > 20
    for options in (
        {"batch_tokens": 1},
        {"batch_tokens": 150},
        {"chunk_tokens": 13},
        {"feature_cache_gb": 0},
    ):
        same(answers(loaded, coco_root, micro, questions=questions, **options), whole)
    turned = answers(loaded, coco_root, micro, questions=questions[::-1])
    same(turned[::-1], whole)


@torch.no_grad()
def test_an_answer_is_what_the_library_model_says(loaded, coco_root, micro, questions):
    """Pixels, ids and order put together anew for one question; p_yes from the library's own logits."""
    question = questions[-1]
    (answer,) = answers(loaded, coco_root, micro, questions=[question])
    paths, needles = ordered_images(question, micro.evaluation.order_seed)
    assert answer["needles"] == needles and [paths[k] for k in needles] == list(question.needles)
    pixels, grid = loaded.processor.pixels([coco_root / p for p in paths])
    ids = torch.from_numpy(loaded.processor.encoder.encode(question.text, [(1, 1)] * len(paths)).ids)[None]
    kinds = (ids == loaded.model.config.image_token_id).int()
    logits = loaded.model(
        input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds,
        attention_mask=torch.ones_like(ids),
    ).logits[0, -1]  # fmt: skip
    tokenizer = loaded.processor.tokenizer
    spelt = {
        word: [i for i in range(len(tokenizer)) if tokenizer.decode(i).strip(" ").lower() == word]
        for word in ("yes", "no")
    }
    yes, no = (logits[spelt[word]].exp().sum() for word in ("yes", "no"))
    assert answer["p_yes"] == pytest.approx(float(yes / (yes + no)), abs=1e-4)
    assert answer["answer"] == ("yes" if yes > no else "no") and answer["label"] == question.answer


def test_each_image_is_seen_once_whatever_the_sizes(loaded, coco_root, micro, questions):
    found = evaluator(loaded, coco_root, micro)
    for part in (questions[:10], questions[10:], questions):
        found.answer(found.ask(part))
    assert found.features.computed == len({p for q in questions for p in q.needles + q.distractors})


def test_generated_answers_are_scored_by_their_words(loaded, coco_root, micro, questions):
    options = {"scoring": "generate", "max_new_tokens": 3}
    found = evaluator(loaded, coco_root, micro, **options)
    asked = found.ask(questions)
    together = found.answer(asked)
    same(answers(loaded, coco_root, micro, questions=questions, batch_tokens=1, **options), together)
    assert {a["p_yes"] for a in together} == {None}
    # one by the library's own generate
    paths = asked[12].paths
    pixels, grid = loaded.processor.pixels([coco_root / p for p in paths])
    ids = torch.from_numpy(asked[12].prompt.ids)[None]
    said = loaded.model.generate(
        input_ids=ids, pixel_values=pixels, image_grid_thw=grid, attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == loaded.model.config.image_token_id).int(), do_sample=False, max_new_tokens=3,
    )[0, ids.shape[1] :]  # fmt: skip
    text = loaded.processor.tokenizer.decode(said, skip_special_tokens=True)
    assert together[12]["answer"] == spoken_answer(text)


def test_a_model_that_says_yes_scores_yes(loaded, coco_root, micro, questions):
    """A head that always speaks of the same word: the words reach the answer."""
    tokenizer = loaded.processor.tokenizer
    for word, expected in (("yes", "yes"), ("no", "no"), ("star", "none")):
        other = copy.deepcopy(loaded)
        other.processor = loaded.processor
        with torch.no_grad():
            # the final norm ends on a constant, which one row of the head alone answers to
            other.model.model.language_model.norm.weight.zero_()
            other.model.model.language_model.norm.register_forward_hook(lambda m, a, out: out + 1.0)
            other.model.lm_head.weight.zero_()
            other.model.lm_head.weight[tokenizer(word, add_special_tokens=False)["input_ids"][0]] = 1.0
        found = answers(
            other, coco_root, micro, questions=questions[:4], scoring="generate", max_new_tokens=1
        )
        assert {a["answer"] for a in found} == {expected}


# ------------------------------------------------------------------ cells


def cells(micro, family, coco_root, haystacks, out, method="base", runs=(), sizes=(1, 2, 5)):
    sets = question_sets([haystacks / "test"], sizes, coco_root)
    return evaluate_cells(micro, "small", method, family["small"], runs, coco_root, sets, out)


@pytest.mark.parametrize("method", ["base", "yarn", "self_extend"])
def test_cells_are_written_and_read_back_and_the_same_bytes_again(
    micro, family, coco_root, haystacks, tmp_path, method
):
    made = cells(micro, family, coco_root, haystacks, tmp_path / "a/small" / method, method)
    cells(micro, family, coco_root, haystacks, tmp_path / "b/small" / method, method)
    for cell, size in zip(made, (1, 2, 5), strict=True):
        files = [tmp_path / x / "small" / method / f"{size}.json" for x in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert read_cell(files[0]) == cell
        asked = read_questions(haystack_file(haystacks / "test", size))
        assert cell["n"] == cell["questions"] == len(asked) and cell["seeds"] == [0]
        right = {a["id"]: a["answer"] == a["label"] for a in cell["answers"]}
        assert cell["accuracy"] == pytest.approx(sum(right.values()) / len(right))
        assert {(a["id"], a["label"]) for a in cell["answers"]} == {(q.id, q.answer) for q in asked}
        # three tokens and three positions an image beside a constant text
        assert cell["tokens_mean"] == cell["positions_mean"] == made[0]["tokens_mean"] + 3 * (size - 1)
    assert read_json(tmp_path / "a/small" / method / "cost.json")["wall_seconds"] > 0


def test_any_folder_will_do(micro, family, coco_root, haystacks, tmp_path):
    (made,) = cells(micro, family, coco_root, haystacks, tmp_path / "anything", sizes=(1,))
    assert read_json(tmp_path / "anything/1.json") == made


def test_suites_asked_in_one_process_are_as_asked_apart(
    micro_file, family, coco_root, haystacks, tmp_path, capsys
):
    """And an --out or a --cost that belongs to none of them is refused before anything is asked."""
    words = ["evaluate", "--config", str(micro_file), "--student-name", "small", "--method", "base"]
    words += ["--model", str(family["small"]), "--coco", str(coco_root), "--device", "cpu"]
    asked = {
        size: [
            "--questions",
            str(haystack_file(haystacks / "test", size)),
            "--out",
            str(tmp_path / f"both/{size}"),
        ]
        for size in (2, 5)
    }
    assert (
        main([*words, *asked[2], *asked[5][:2]]) == 2
        and "2 times --questions, 1 times --out" in capsys.readouterr().err
    )
    assert main([*words, *asked[2], *asked[5], "--cost", str(tmp_path / "cost.json")]) == 2
    assert "--out is given 2 times" in capsys.readouterr().err and not any(tmp_path.iterdir())
    assert main([*words, *asked[2], *asked[5]]) == 0
    for size in (2, 5):
        assert main([*words, *asked[size][:3], str(tmp_path / f"apart/{size}")]) == 0
        both, apart = (tmp_path / name / str(size) for name in ("both", "apart"))
        assert (both / f"{size}.json").read_bytes() == (apart / f"{size}.json").read_bytes()
        assert (both / "cost.json").is_file()


class Killed(BaseException):
    pass


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(
    micro, family, coco_root, haystacks, tmp_path, monkeypatch, capsys
):
    config, out = changed(micro, batch_tokens=150), tmp_path / "cut"
    data = (family, coco_root, haystacks)
    cells(config, *data, tmp_path / "whole")
    asked, answered = [], Evaluator._answered

    def killed(after):
        def answer(self, batch, spoken):
            if len(asked) == after:
                raise Killed
            asked.append({item.question.id for item in batch})
            return answered(self, batch, spoken)

        asked.clear()
        monkeypatch.setattr(Evaluator, "_answered", answer)
        if after is None:
            cells(config, *data, out)
        else:
            with pytest.raises(Killed):
                cells(config, *data, out)
        return list(asked)

    first = killed(after=6)
    assert (out / "1.json").is_file() and not (out / "5.json").exists()  # a size is written as it ends
    (out / "1.json").unlink()  # as a workflow does with what a job that failed made
    (part,) = out.glob(".2.json.part")
    part.write_bytes(part.read_bytes()[:-9])  # its last batch is cut short
    lost, *rest = killed(after=None)
    assert lost == first[-1] and not [b for b in first[:-1] if b in rest]
    assert f"goes on after {sum(map(len, first[:-1]))} of 30 answers" in capsys.readouterr().err
    for size in (1, 2, 5):
        assert (out / f"{size}.json").read_bytes() == (tmp_path / f"whole/{size}.json").read_bytes()
    assert {p.name for p in out.iterdir()} == {"1.json", "2.json", "5.json", "cost.json"}

    killed(after=2)
    config = changed(micro, batch_tokens=150, order_seed=1)
    whole = killed(after=None)
    assert sum(map(len, whole)) == 30 and "asked again" in capsys.readouterr().err
    cells(config, *data, tmp_path / "whole")
    assert (out / "5.json").read_bytes() == (tmp_path / "whole/5.json").read_bytes()


def test_all_answers_are_there_and_no_model_is_loaded(
    micro, family, coco_root, haystacks, tmp_path, monkeypatch
):
    """Killed between the last answer and the end, of the second of two seeds."""
    runs = [tmp_path / f"seed{k}" for k in (0, 1)]
    for run in runs:
        shutil.copytree(family["small"], run / "model")
    place = (micro, family, coco_root, haystacks, tmp_path / "out", "sft", runs)
    with monkeypatch.context() as patch:
        patch.setattr("laid.evaluation.measure.write_cell", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            cells(*place, sizes=(1,))
    monkeypatch.delattr("laid.evaluation.evaluate.load_with_method")
    (cell,) = cells(*place, sizes=(1,))
    assert cell["seeds"] == [0, 1] and cell["n"] == 20


def test_only_base_is_base(micro, family, coco_root, haystacks, tmp_path):
    """The training-free methods change answers; SelfExtend only beyond its neighbour window (16 positions here)."""
    p_yes = {
        method: [a["p_yes"] for cell in cells(micro, family, coco_root, haystacks, tmp_path / "small" / method, method)
                 for a in cell["answers"]]
        for method in ("base", "yarn", "self_extend")
    }  # fmt: skip
    assert p_yes["yarn"] != p_yes["base"] != p_yes["self_extend"] != p_yes["yarn"]


def test_labels_of_tables(micro, family, coco_root, haystacks, tmp_path):
    from laid.models.loading import load_model, parameter_label, parameters

    (cell,) = cells(micro, family, coco_root, haystacks, tmp_path / "small/base", sizes=[2, 2])
    assert (
        cell["label"] == parameter_label(parameters(load_model(family["small"])))
        and cell["role"] == "student"
    )
    named = micro.changed({"models": {"labels": {"teacher": "32B"}}})
    (cell,) = evaluate_cells(
        named,
        "teacher",
        "base",
        family["teacher"],
        [],
        coco_root,
        question_sets([haystacks / "test/visual_haystack_2.json"], [], coco_root),
        tmp_path / "teacher/base",
    )
    assert cell["label"] == "32B" and cell["role"] == "teacher"


def refused(match, *args, **kwargs):
    out: Path = kwargs["out"]
    with pytest.raises(LaidError, match=match) as caught:
        cells(*args, **kwargs)
    assert "\n" not in str(caught.value) and not out.exists()


def test_wrong_inputs_are_one_line_and_nothing_is_written(micro, family, coco_root, haystacks, tmp_path):
    data, out = (micro, family, coco_root, haystacks), tmp_path / "small/base"
    refused("no method 'best'; methods: ", *data, method="best", out=out)
    refused("method sft is trained: give its run folders", *data, method="sft", out=out)
    refused("method base takes no --runs", *data, runs=[tmp_path / "seed0"], out=out)
    refused("expected a run folder named seed<K>", *data, method="sft", runs=[tmp_path / "last"], out=out)
    refused(
        "two of the 2 runs have the same seed",
        *data,
        method="sft",
        runs=[tmp_path / "a/seed1", tmp_path / "seed1"],
        out=out,
    )
    refused("this run did not finish", *data, method="sft", runs=[tmp_path / "seed0"], out=out)
    write_json(tmp_path / "kd/seed0/run.json", {"method": "kd"})
    refused("a run of kd, not of sft", *data, method="sft", runs=[tmp_path / "kd/seed0"], out=out)
    refused("visual_haystack_7.json: no such file", *data, sizes=[1, 7], out=out)
    other = shutil.copytree(haystacks, tmp_path / "haystacks")
    shutil.copy(haystack_file(other / "test", 2), haystack_file(other / "test", 1))
    refused("has 2 images, expected 1", micro, family, coco_root, other, out=out)
    asked = read_questions(haystack_file(haystacks / "test", 1))
    write_questions(
        haystack_file(other / "test", 1),
        [asked[0].__class__(**{**vars(asked[0]), "needles": ("val2017/9.png",)})],
    )
    refused(
        "no such image: 1 of the 49 images .* first val2017/9.png; .* laid data ",
        micro,
        family,
        coco_root,
        other,
        out=out,
    )
    haystack_file(other / "test", 1).write_text("[{")
    refused("not valid JSON", micro, family, coco_root, other, out=out)
    refused("no such checkpoint folder", micro, {"small": tmp_path / "none"}, coco_root, haystacks, out=out)


def test_a_broken_image_is_named(micro, family, coco_root, haystacks, tmp_path):
    root = shutil.copytree(coco_root, tmp_path / "coco")
    question = read_questions(haystack_file(haystacks / "test", 1))[0]
    file = root / question.needles[0]
    file.write_bytes(file.read_bytes()[:200])
    refused(
        f"{file}: not a whole image", micro, family, root, haystacks, sizes=[1], out=tmp_path / "small/base"
    )


def test_seeds_of_runs():
    assert [seed_of(f"runs/small/sft/seed{k}") for k in (0, 12)] == [0, 12]
    for name in ("seed", "seed-1", "seedx", "0"):
        with pytest.raises(LaidError, match="named seed<K>"):
            seed_of(f"runs/{name}")
