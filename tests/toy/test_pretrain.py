import numpy as np
import pytest
import torch

from laid.data.coco import annotation_file, load_coco
from laid.data.haystacks import Haystack, HaystackSampler
from laid.data.questions import question_text
from laid.errors import LaidError
from laid.io import read_json
from laid.models.decoder import text_model
from laid.models.loading import load_model, parameters
from laid.models.prompts import OFFICIAL_PROMPT, PromptEncoder
from laid.toy.family import LIST_QUESTION, build_config, build_model, build_processor
from laid.toy.pretrain import (
    Curriculum,
    Pretraining,
    QuestionTree,
    image_grid,
    make_member,
)


@pytest.fixture(scope="module")
def coco(coco_root):
    return load_coco(coco_root, "train2017")


@pytest.fixture(scope="module")
def processor(coco, micro):
    return build_processor(coco.categories, micro.family.image_pixels)


@pytest.fixture(scope="module")
def model(processor, micro):
    model = build_model(build_config(processor, micro.family, micro.family.members["small"]), 5)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# ------------------------------------------------------------------ the tree of questions


@torch.no_grad()
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("images", [1, 2, 5])
def test_each_branch_is_the_single_question_asked_alone(processor, model, coco, images, grid):
    """Positions, and the output at every token of every branch, against a plain causal pass over prefix, images and
    that one question."""
    tree, text = QuestionTree(processor, coco.categories, grid), text_model(model)
    sampler = HaystackSampler(coco.labels, coco.categories, 0.8, [images, 1])
    haystack = sampler.sample(images, 4)
    asked = len(haystack.targets)
    assert asked >= 2
    layout = tree.layout(images, asked)
    visual = images * grid[0] * grid[1]
    bags = torch.randn(1, visual, text.config.hidden_size, generator=torch.Generator().manual_seed(1))
    embeds = text.embed_tokens(torch.from_numpy(tree.fill(layout, haystack))[None]).clone()
    embeds[:, layout.image] = bags
    together = text(
        inputs_embeds=embeds,
        position_ids=layout.positions,
        attention_mask={"full_attention": layout.mask},
        use_cache=False,
    ).last_hidden_state[0]

    def alone(question, answer=None):
        prompt = processor.encoder.encode(question, [grid] * images)
        assert prompt.block_starts.tolist() == layout.blocks.tolist()
        ids = torch.from_numpy(prompt.ids if answer is None else np.append(prompt.ids, answer))[None]
        positions = torch.from_numpy(prompt.positions)
        if answer is not None:
            positions = torch.cat([positions, positions[:, -1:] + 1], 1)
        embeds = text.embed_tokens(ids).clone()
        embeds[0, torch.from_numpy(np.flatnonzero(prompt.image_mask))] = bags[0]
        output = text(inputs_embeds=embeds, position_ids=positions[:, None], use_cache=False)
        return output.last_hidden_state[0], ids[0], positions

    close = {"rtol": 1e-4, "atol": 1e-4}
    for part, (target, answer), at, end in zip(
        layout.branches, haystack.targets, layout.answers, layout.ends
    ):
        single, ids, positions = alone(
            question_text("single", haystack.anchor, target), tree.yes if answer else tree.no
        )
        before = torch.arange(layout.stem.stop)
        assert torch.equal(layout.positions[:, 0, [*before, *range(part.start, part.stop)]], positions)
        torch.testing.assert_close(together[part], single[-(part.stop - part.start) :], **close)
        torch.testing.assert_close(together[at], single[-2], **close)
        torch.testing.assert_close(together[end], single[-1], **close)
        assert tree.fill(layout, haystack)[part].tolist() == ids[-(part.stop - part.start) :].tolist()
    single, ids, positions = alone(
        LIST_QUESTION.format(
            anchor="an " + haystack.anchor if haystack.anchor[0] in "aeiou" else "a " + haystack.anchor
        )
    )
    torch.testing.assert_close(together[layout.answers[-1]], single[-1], **close)
    length = layout.listing.stop - layout.listing.start
    assert torch.equal(layout.positions[:, 0, layout.listing], positions[:, -length:])
    name = processor.tokenizer.decode(tree.fill(layout, haystack)[layout.anchor])
    assert name == " " + haystack.anchor


def test_supervised_places(processor, coco):
    """What stands at the indices of a layout, by decoding them."""
    tree = QuestionTree(processor, coco.categories)
    a, b, c = coco.categories[:3]
    haystack = Haystack(images=[0, 1], needle=0, anchor=a, targets=[(b, True), (c, False)], objects=(a, b))
    layout = tree.layout(2, 2)
    ids = tree.fill(layout, haystack)
    say = processor.tokenizer.decode
    assert [say(ids[p.start + layout.target]) for p in layout.branches] == [f" {b}", f" {c}"]
    assert [say(ids[e]) for e in layout.ends] == ["yes", "no"]
    assert say(ids[layout.answers[0]]) == say(ids[layout.answers[-1]]) == "\n"
    assert set(ids[layout.image].tolist()) == {processor.encoder.pad_id}
    assert say(ids[: layout.branches[0].stop - 1]).endswith(
        f"{OFFICIAL_PROMPT}{question_text('single', a, b)}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert say(ids[layout.listing]) == ", what is there?<|im_end|>\n<|im_start|>assistant\n"


def test_names_of_several_tokens_are_refused(processor, coco):
    with pytest.raises(LaidError, match="splits ' fire hydrant' into"):
        QuestionTree(processor, (*coco.categories, "fire hydrant"))


# ------------------------------------------------------------------ images of several tokens


@torch.no_grad()
def test_every_token_of_an_image_stands_for_all_of_its_objects(micro, coco, coco_root, monkeypatch):
    """What the language model is given, without noise, against a sum over all annotations, one at a time."""
    settings = {"image_pixels": 56 * 56, "pretrain": {"noise": 0.0}}
    family = micro.family.changed(settings)
    processor = build_processor(coco.categories, family.image_pixels)
    training = Pretraining(processor, coco, family, family.members["small"], "small")
    haystack = training.sampler.sample(3, 2)
    monkeypatch.setattr(training.sampler, "sample", lambda size, targets: haystack)
    given = {}
    training.text.register_forward_pre_hook(lambda _m, _a, kw: given.update(kw), with_kwargs=True)
    heads = (torch.nn.Linear(32, len(coco.categories)), torch.nn.Linear(32, 1))
    layers = {k: torch.zeros(4, 400, 32) for k in (0, 1)}
    training._language_step(3, 0.0, layers, *heads)

    data = read_json(annotation_file(coco_root, "train2017"))
    names = {entry["id"]: entry["name"] for entry in data["categories"]}
    weight = training.text.embed_tokens.weight
    pad, at = processor.encoder.pad_id, 0
    prompt = processor.encoder.encode("?", [(2, 2)] * 3)
    blocks = np.flatnonzero(prompt.ids == pad).reshape(3, 4)
    for number, tokens in zip(haystack.images, blocks):
        image = coco.images[training.sampler.paths[number]]
        wanted = torch.zeros(32)
        for entry in data["annotations"]:
            if entry["image_id"] == image.id:
                wanted += weight[
                    processor.tokenizer.convert_tokens_to_ids("\u0120" + names[entry["category_id"]])
                ]
                at += 1
        for token in tokens:
            torch.testing.assert_close(given["inputs_embeds"][0, token], wanted)
    assert at >= 3


def test_four_tokens_an_image_are_trained(micro, coco_root, coco, tmp_path):
    """Both phases run, and the tower comes nearer to what the language model was taught."""
    config = micro.changed(
        {"family": {"image_pixels": 56 * 56, "pretrain": {"reach": 60, "vision": {"steps": 40}}}}
    )
    make_member(config, "small", coco_root, tmp_path / "small")
    log = read_json(tmp_path / "small/pretrain.json")
    errors = [line["error"] for line in log if line["phase"] == "vision"]
    assert errors[-1] < errors[0]


def test_images_of_different_grids_are_refused(coco):
    import dataclasses

    path = min(coco.images)
    wide = dataclasses.replace(coco.images[path], width=336)
    odd = dataclasses.replace(coco, images={**coco.images, path: wide})
    with pytest.raises(LaidError, match=r"makes 1 x 4 visual tokens, .* 2 x 2: .* crop them"):
        image_grid(build_processor(coco.categories, 56 * 56), odd)


# ------------------------------------------------------------------ the curriculum


def test_the_curriculum_rises_only_when_the_running_accuracy_passes():
    curriculum = Curriculum(start=3, window=10, threshold=0.9, grow=1.5)
    for _ in range(31):  # 1 - 0.5 * 0.95 ** n passes 0.9 at n = 32
        curriculum.update(1.0)
    assert curriculum.largest == 3
    sizes = []
    for _ in range(200):
        curriculum.update(1.0)
        sizes.append(int(curriculum.largest))
    assert list(dict.fromkeys(sizes)) == [4, 6, 10]  # 3 x 1.5 = 4.5, then 6.75, then the window
    poor = Curriculum(3, 10, 0.9, 1.5)
    for _ in range(500):
        poor.update(0.85)
    assert poor.largest == 3


def test_sizes_drawn_cover_one_to_the_largest():
    curriculum = Curriculum(start=8, window=8, threshold=0.9, grow=1.5)
    rng = np.random.default_rng(0)
    drawn = [curriculum.draw(rng) for _ in range(2000)]
    counts = np.bincount(drawn, minlength=9)
    assert counts[0] == 0 and len(counts) == 9 and counts[1:].min() > 30
    # 0.3 of all, and the share of log-uniform sizes in [8, 8.999) of [1, 8.999)
    assert counts[8] / 2000 == pytest.approx(0.3 + 0.7 * np.log(8.999 / 8) / np.log(8.999), abs=0.04)
    small = Curriculum(start=3, window=2, threshold=0.9, grow=1.5)
    assert {small.draw(rng) for _ in range(50)} == {1, 2}


# ------------------------------------------------------------------ making a member


def made(micro, coco_root, out, name="small"):
    make_member(micro, name, coco_root, out)
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_two_runs_give_the_same_bytes_and_a_checkpoint_that_loads(micro, coco_root, tmp_path):
    first = made(micro, coco_root, tmp_path / "a/small")
    torch.rand(3)  # the global state of random numbers has no say
    assert first == made(micro, coco_root, tmp_path / "b/small")
    model = load_model(tmp_path / "a/small")
    record, log = read_json(tmp_path / "a/small/laid.json"), read_json(tmp_path / "a/small/pretrain.json")
    assert record["parameters"] == parameters(model) and record["window"] == 4
    assert {line["phase"] for line in log} == {"language", "vision"}
    assert all(np.isfinite(v) for line in log for v in line.values() if not isinstance(v, str))
    assert (tmp_path / "a/small.cost.json").is_file()
    # the positions it was trained on: those of its own window
    span = (
        PromptEncoder(build_processor(load_coco(coco_root, "train2017").categories, 784).tokenizer)
        .encode("For the image with a star, is there a circle?", [(1, 1)] * 4)
        .span
    )
    assert span <= model.config.text_config.max_position_embeddings < span + 24


def test_another_seed_gives_other_weights(micro, coco_root, tmp_path, monkeypatch):
    monkeypatch.setattr(Pretraining, "vision", lambda self: 1.0)
    weights = []
    for seed in (0, 1):
        config = micro.changed({"family": {"members": {"small": {"seed": seed}}}})
        weights.append(made(config, coco_root, tmp_path / str(seed))["model.safetensors"])
    assert weights[0] != weights[1]


def test_an_unreached_window_is_an_error_and_nothing_is_written(micro, coco_root, tmp_path):
    config = micro.changed({"family": {"pretrain": {"threshold": 0.99}}})
    with pytest.raises(LaidError, match="stopped at 3 of 4 images after 3 steps") as caught:
        make_member(config, "small", coco_root, tmp_path / "small")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_unknown_members(micro, coco_root, tmp_path):
    with pytest.raises(LaidError, match="no 'large'; it has teacher, small"):
        make_member(micro, "large", coco_root, tmp_path / "large")


@pytest.mark.parametrize(
    "part, key, value, match",
    [
        ("member", "hidden_size", 48, "hidden_size 48 is not 2 heads x head_dim 16 = 32"),
        ("member", "kv_heads", 3, "2 heads cannot share 3 kv_heads"),
        ("family", "mrope_section", [2, 3, 4], r"adds up to 9, head_dim 16 has 8 frequencies"),
    ],
)
def test_sizes_that_contradict_each_other(micro, processor, part, key, value, match):
    """Told before a model is made: transformers would fail at the first forward pass, deep inside attention."""
    parts = {"family": micro.family, "member": micro.family.members["small"]}
    parts[part] = parts[part].changed({key: value})
    with pytest.raises(LaidError, match=match):
        build_config(processor, parts["family"], parts["member"])


def test_validation_images_are_never_trained_on(micro, coco_root, coco, tmp_path, monkeypatch):
    from laid.data.haystacks import split_paths

    seen = {}
    monkeypatch.setattr(Pretraining, "language", lambda self: seen.update(paths=set(self.sampler.paths)))
    monkeypatch.setattr(Pretraining, "vision", lambda self: 1.0)
    make_member(micro, "small", coco_root, tmp_path / "small")
    kept, held = split_paths(coco, 0.25, 0)
    assert seen["paths"] == set(kept) and not seen["paths"] & set(held)


def test_the_losses_fall(micro, coco, processor):
    """On one-image haystacks listing the needle's objects and ending the turn are soon learned."""
    family = micro.family.changed({"pretrain": {"start_size": 1, "warmup_steps": 5, "lr_adamw": 0.01}})
    member = family.members["small"].changed({"window": 1, "steps": 75})
    training = Pretraining(processor, coco, family, member, "small")
    training.language()
    first, last = training.log[0], training.log[-1]
    assert (first["step"], last["step"]) == (25, 75)
    assert last["list"] < first["list"] - 0.15 and last["end"] < 0.05
