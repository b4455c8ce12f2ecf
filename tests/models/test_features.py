from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from laid.models.features import ImageFeatures
from laid.models.loading import load_model
from laid.models.processing import Processor
from laid.models.windows import windows_at_once


@pytest.fixture(scope="module")
def loaded(family):
    model = load_model(family["small"])
    # 2 x 2 visual tokens for a scene of 84 x 84 pixels
    return model, Processor.load(family["small"], min_pixels=56 * 56, max_pixels=56 * 56)


@pytest.fixture(scope="module")
def paths(coco_root):
    return [f"val2017/{p.name}" for p in sorted((coco_root / "val2017").iterdir())[:9]]


def features(loaded, coco_root, **options):
    model, processor = loaded
    seen = []

    def file(path):
        seen.append(path)
        return coco_root / path

    return ImageFeatures(model, processor, file, **options), seen


def test_each_image_goes_through_the_tower_once(loaded, coco_root, paths, monkeypatch):
    found, _ = features(loaded, coco_root, batch=4)
    calls = []
    tower = loaded[0].model.get_image_features
    monkeypatch.setattr(
        loaded[0].model, "get_image_features", lambda p, g: calls.append(len(g)) or tower(p, g), raising=True
    )
    found.prepare([*paths[:6], *paths[:3]])
    found.get([paths[0], paths[7], paths[0], paths[8]])
    found.prepare(paths, "images")
    # The last is one image of four tokens, which comes with itself to make up the least number of tokens in a pass.
    assert calls == [4, 2, 2, 2] and found.computed == sum(calls) - 1 == len(paths)


def test_features_are_the_models_own(loaded, coco_root, paths):
    """Batched or alone, they are what Qwen2_5_VLModel makes of the pixels."""
    model, processor = loaded
    found, _ = features(loaded, coco_root, batch=4)
    for path, feature in zip(paths, found.get(paths)):
        pixels, grid = processor.pixels([coco_root / path])
        with torch.no_grad():
            own = model.model.get_image_features(pixels, grid).pooler_output[0]
        assert feature.shape == (4, model.config.text_config.hidden_size)
        torch.testing.assert_close(feature, own, rtol=1e-4, atol=1e-5)
        assert not feature.requires_grad


def test_images_that_threads_read_ahead_are_the_same_bits(loaded, coco_root, paths, tmp_path):
    """As for a GPU, batch by batch; what the store has is not read."""
    plain, _ = features(loaded, coco_root, batch=4)
    ahead, _ = features(loaded, coco_root, batch=4, store=tmp_path)
    ahead.get(paths[4:6])
    ahead.kept.clear()
    ahead._readers = ThreadPoolExecutor(2)
    ahead.prepare(paths)
    assert all(map(torch.equal, ahead.get(paths), plain.get(paths)))
    assert ahead.computed == len(paths) and not ahead._read


@pytest.mark.parametrize("pixels", [28 * 28, 56 * 56])
def test_they_are_the_same_bits_whatever_they_were_computed_beside(loaded, family, coco_root, paths, pixels):
    """One visual token an image, as at small scale, or four: products of one to three rows round otherwise."""
    processor = Processor.load(family["small"], min_pixels=pixels, max_pixels=pixels)
    together, _ = features((loaded[0], processor), coco_root)
    for batch in (1, 2, 3, 4):
        found, _ = features((loaded[0], processor), coco_root, batch=batch)
        for a, b in zip(found.get(paths), together.get(paths), strict=True):
            assert len(a) == pixels // 28**2 and torch.equal(a, b)


@pytest.mark.parametrize("pixels", [56 * 56, 28 * 28])
def test_two_towers_see_what_is_opened_once(loaded, family, coco_root, paths, tmp_path, opened, pixels):
    """The other's features are the bits it makes by itself; patches that it would cut otherwise are its own matter."""
    processor = Processor.load(family["teacher"], min_pixels=pixels, max_pixels=pixels)
    other = load_model(family["teacher"]), processor
    expected = features(other, coco_root)[0].get(paths[:2])
    ours, kept = features(loaded, coco_root, batch=4)[0], features(other, coco_root)[0]
    stored, _ = features(other, coco_root, limit_bytes=0, store=tmp_path)
    ours.alongside(kept)
    ours.alongside(stored)
    opened.clear()
    ours.prepare(paths)
    assert all(map(torch.equal, kept.get(paths[:2]), expected)) and not stored.kept
    again, _ = features(other, coco_root, store=tmp_path)
    assert all(map(torch.equal, again.get(paths[:2]), expected))
    assert opened.most_common(1)[0][1] == (1 if pixels == 56 * 56 else 3)


@pytest.mark.parametrize("room", [0, 2, 5])
def test_a_small_memory_changes_nothing_but_the_work(loaded, coco_root, paths, room):
    all_, _ = features(loaded, coco_root)
    one = all_.get(paths[:1])[0]
    size = one.numel() * one.element_size()
    small, _ = features(loaded, coco_root, batch=2, limit_bytes=room * size)
    small.prepare(paths)
    assert small.computed < len(paths)
    for start in (0, 3, 6, 0, 1):
        wanted = [*paths[start : start + 3], paths[start]]
        for a, b in zip(small.get(wanted), all_.get(wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert small.bytes == sum(f.numel() * f.element_size() for f in small.kept.values()) <= room * size
    assert small.computed > len(paths)
    # Memory is given back only where what is kept is no view of a larger tensor.
    assert all(f.untyped_storage().nbytes() == size for f in small.kept.values())


def test_what_was_used_last_is_kept_longest(loaded, coco_root, paths):
    all_, _ = features(loaded, coco_root)
    size = all_.get(paths[:1])[0].numel() * 4
    found, _ = features(loaded, coco_root, limit_bytes=3 * size)
    for path in (paths[0], paths[1], paths[2], paths[0], paths[3]):
        found.get([path])
    assert list(found.kept) == [paths[2], paths[0], paths[3]]


def test_grids_come_from_headers_alone(loaded, coco_root, paths):
    found, seen = features(loaded, coco_root)
    assert found.grids(paths[:3] * 2) == [(2, 2)] * 6
    assert seen == paths[:3] and found.computed == 0


def test_windows_of_one_length_at_once_are_one_after_the_other(loaded, monkeypatch):
    """Three images of other sizes, windows cut off at their edges: the tower's own attention, in as many calls as there are lengths."""
    model, _ = loaded
    grid = torch.tensor([[1, 20, 12], [1, 4, 18], [1, 20, 12]])
    pixels = torch.randn(int(grid.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(0))
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def counted(query, *args, **kwargs):
        calls.append(query.shape)
        return real(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    config = model.config.vision_config
    monkeypatch.setattr(config, "_attn_implementation", "sdpa")  # and back at the end
    found = []
    with torch.no_grad():
        for _ in range(2):
            found.append(torch.cat(model.model.get_image_features(pixels, grid).pooler_output))
            calls.append(None)
            windows_at_once(model)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    ends = calls.index(None)
    one, all_at_once = calls[:ends], calls[ends + 1 : -1]
    lengths = {shape[2] for shape in one}
    assert len(all_at_once) == len(lengths) * config.depth < len(one)
