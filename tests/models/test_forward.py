import pytest
import torch
from transformers import DynamicCache

from laid.data.questions import question_text
from laid.models.features import ImageFeatures
from laid.models.forward import collate, embed, generate, hidden_states, last_logits, logits_at
from laid.models.loading import load_model
from laid.models.processing import Processor

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TEXTS = [
    question_text("single", "star", "disc"),
    "star?",
    question_text("any", "arrow", "ring"),
    "Please answer: is there a star in all of the images with a disc, a ring?",
]


class Setup:
    """A tiny model, questions over images of several grids, and what transformers alone makes of them."""

    def __init__(self, model, processor, root):
        self.model, self.processor = model, processor
        files = [f"val2017/{p.name}" for p in sorted((root / "val2017").iterdir())]
        self.features = ImageFeatures(model, processor, lambda path: root / path)
        self.paths = [files[:3], files[2:3], files[4:9], files[9:11]]
        self.prompts = [
            processor.encoder.encode(text, self.features.grids(paths))
            for text, paths in zip(TEXTS, self.paths)
        ]
        self.root = root

    def batch(self, *which):
        return collate(
            [self.prompts[k] for k in which], [f for k in which for f in self.features.get(self.paths[k])]
        )

    def inputs(self, k):
        """The k-th question as the library itself takes it: token ids and pixels."""
        pixels, grid = self.processor.pixels([self.root / p for p in self.paths[k]])
        ids = torch.from_numpy(self.prompts[k].ids)[None]
        kinds = (ids == self.model.config.image_token_id).int()
        return {
            "input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds,
            "attention_mask": torch.ones_like(ids),
        }  # fmt: skip


def setup_with(folder, root, attention="sdpa"):
    # 84 x 84 pixels are 3 x 3 visual tokens here
    processor = Processor.load(folder, min_pixels=84 * 84, max_pixels=84 * 84)
    return Setup(load_model(folder, attention=attention), processor, root)


@pytest.fixture(scope="module")
def tiny(family, coco_root):
    return setup_with(family["small"], coco_root)


@torch.no_grad()
def test_logits_are_those_of_the_whole_library_model(tiny):
    """Ids and pixels through Qwen2_5_VLForConditionalGeneration, vision tower, positions and all."""
    spread = []
    for k in range(4):
        theirs = tiny.model(**tiny.inputs(k)).logits[0]
        ours = last_logits(tiny.model, tiny.batch(k))[0]
        torch.testing.assert_close(ours, theirs[-1], **CLOSE)
        spread.append(ours)
        hidden = hidden_states(tiny.model, tiny.batch(k))
        at = torch.tensor([0, 5, len(theirs) - 1])
        torch.testing.assert_close(
            logits_at(tiny.model, hidden, torch.zeros_like(at), at), theirs[at], **CLOSE
        )
    assert torch.stack(spread).std(0).max() > 0.1  # the questions do not all look alike to this model


@torch.no_grad()
def test_a_batch_of_several_lengths_is_one_by_one(tiny):
    alone = torch.cat([last_logits(tiny.model, tiny.batch(k)) for k in range(4)])
    torch.testing.assert_close(last_logits(tiny.model, tiny.batch(0, 1, 2, 3)), alone, **CLOSE)
    torch.testing.assert_close(last_logits(tiny.model, tiny.batch(3, 1)), alone[[3, 1]], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 10_000])
def test_reading_piece_by_piece_changes_nothing(tiny, chunk):
    whole = last_logits(tiny.model, tiny.batch(0, 1, 2, 3))
    torch.testing.assert_close(last_logits(tiny.model, tiny.batch(0, 1, 2, 3), chunk), whole, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [0, 9])
def test_eager_attention_agrees(tiny, family, coco_root, chunk):
    eager = setup_with(family["small"], coco_root, "eager")
    ours, theirs = (last_logits(s.model, s.batch(0, 1, 2, 3), chunk) for s in (tiny, eager))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@torch.no_grad()
def test_the_past_sees_no_future(tiny):
    """Another ending changes no logit before it."""
    prompt = tiny.prompts[0]
    other = tiny.processor.encoder.encode(
        TEXTS[0].replace("star", "moon"), tiny.features.grids(tiny.paths[0])
    )
    assert len(prompt.ids) == len(other.ids)
    differ = int((prompt.ids != other.ids).argmax())
    features = tiny.features.get(tiny.paths[0])
    a, b = (hidden_states(tiny.model, collate([p], features))[0] for p in (prompt, other))
    torch.testing.assert_close(a[:differ], b[:differ], **CLOSE)
    assert (a[differ:] - b[differ:]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("chunk", [0, 11])
def test_greedy_answers_are_those_of_the_library(tiny, chunk):
    stop = tiny.model.generation_config.eos_token_id
    for k in range(4):
        inputs = tiny.inputs(k)
        theirs = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=6)[
            0, inputs["input_ids"].shape[1] :
        ]
        theirs = theirs.tolist()
        ours = generate(tiny.model, tiny.batch(k), 6, [stop], chunk)
        assert ours == [theirs[: theirs.index(stop)] if stop in theirs else theirs]


@torch.no_grad()
def test_generation_in_a_batch_stops_each_answer_by_itself(tiny):
    """Whatever token is declared the end, a batch gives what each question gives alone."""
    twins = [tiny.prompts[0]] * 2
    features = [tiny.features.get(tiny.paths[0]), tiny.features.get(list(reversed(tiny.paths[0])))]
    batch = collate(twins, features[0] + features[1])
    free = [generate(tiny.model, collate([p], f), 5, [])[0] for p, f in zip(twins, features)]
    assert [len(a) for a in free] == [5, 5]
    for stop in {*free[0], *free[1]}:
        expected = [a[: a.index(stop)] if stop in a else a for a in free]
        assert generate(tiny.model, batch, 5, [stop]) == expected
    with pytest.raises(ValueError, match="one length"):
        generate(tiny.model, tiny.batch(0, 1), 5, [])


def test_embeddings_hold_the_features_where_images_are(tiny):
    batch = tiny.batch(0, 2)
    embeds = embed(tiny.model, batch)
    table = tiny.model.model.language_model.embed_tokens.weight
    assert torch.equal(embeds[batch.image_mask], batch.features)
    assert torch.equal(embeds[~batch.image_mask], table[batch.ids[~batch.image_mask]])
    assert batch.features.shape[0] == int(batch.image_mask.sum()) == 9 * (3 + 5)
    assert (
        batch.token_mask.sum(1).tolist()
        == batch.lengths.tolist()
        == [len(tiny.prompts[k].ids) for k in (0, 2)]
    )


@torch.no_grad()
def test_a_question_without_images(tiny):
    prompt = tiny.processor.encoder.encode(TEXTS[1], [])
    ids = torch.from_numpy(prompt.ids)[None]
    theirs = tiny.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    torch.testing.assert_close(last_logits(tiny.model, collate([prompt], []))[0], theirs, **CLOSE)


@torch.no_grad()
def test_a_cache_is_filled_as_far_as_the_prompt_goes(tiny):
    cache = DynamicCache()
    last_logits(tiny.model, tiny.batch(0), 0, cache)
    assert cache.get_seq_length() == len(tiny.prompts[0].ids)
