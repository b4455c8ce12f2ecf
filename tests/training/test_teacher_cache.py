import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from laid.cli import main
from laid.data.chat import read_chats
from laid.data.questions import read_questions, write_questions
from laid.errors import LaidError
from laid.io import sha256_folder
from laid.models.capture import QKCapture
from laid.models.features import ImageFeatures
from laid.models.forward import collate
from laid.models.loading import load_model
from laid.models.processing import Processor
from laid.training import teacher_cache
from laid.training.samples import build_samples
from laid.training.teacher import OnlineTeacher
from laid.training.teacher_cache import TeacherCache, build_cache, from_float8, shard_ranges, to_float8
from trainer_runs import Losses


def with_cache(config, **options):
    return config.changed({"teacher_cache": options})


@pytest.fixture(scope="module")
def inputs(family, coco_root, haystacks):
    return family["teacher"], coco_root, haystacks / "train.json"


@pytest.fixture(scope="module")
def folder(micro, inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "teacher_cache"
    build_cache(with_cache(micro, layers=[0, -1]), *inputs, out)
    return out


class Side:
    """A model and the training samples as it takes them."""

    def __init__(self, folder, root, questions):
        self.model, processor = load_model(folder), Processor.load(folder)
        self.features = ImageFeatures(self.model, processor, lambda path: root / path)
        self.samples = build_samples(read_chats(questions), self.features)

    def batch(self, indices):
        samples = [self.samples[k] for k in indices]
        return collate([s.prompt for s in samples], [f for s in samples for f in self.features.get(s.paths)])

    def labels(self, indices):
        return torch.stack([torch.from_numpy(self.samples[k].labels) for k in indices])


@pytest.fixture(scope="module")
def teacher(family, coco_root, haystacks):
    return Side(family["teacher"], coco_root, haystacks / "train.json")


@pytest.fixture
def student(family, coco_root, haystacks):
    return Side(family["small"], coco_root, haystacks / "train.json")


@torch.no_grad()
def test_it_holds_what_the_teacher_says(folder, teacher):
    """Each question alone through the library's model: its logits at the last two tokens, q_proj and k_proj's outputs."""
    cache = TeacherCache(folder)
    assert (cache.layers, cache.depth, cache.heads, cache.kv_heads, cache.head_dim) == ([0, 2], 3, 4, 2, 16)
    tokens = max(len(s.prompt.ids) for s in teacher.samples)
    for k in (0, 5, 23):
        inputs = teacher.batch([k])
        count = len(teacher.samples[k].prompt.ids)
        pixels = teacher.features.processor.pixels(
            [teacher.features.file(p) for p in teacher.samples[k].paths]
        )
        with QKCapture(teacher.model, [0, 2]) as capture:
            logits = teacher.model(
                input_ids=inputs.ids, attention_mask=torch.ones_like(inputs.ids),
                mm_token_type_ids=inputs.image_mask.int(), pixel_values=pixels[0], image_grid_thw=pixels[1],
            ).logits  # fmt: skip
            caught = capture.take()
        torch.testing.assert_close(cache.logits([k])[0], logits[0, -2:], rtol=1e-4, atol=1e-4)
        for layer in (0, 2):
            q, k_ = cache.queries_keys(layer, [k], tokens)
            assert q.shape == (1, 4, tokens, 16) and k_.shape == (1, 2, tokens, 16)
            torch.testing.assert_close(q[:, :, :count], caught[layer].q, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(k_[:, :, :count], caught[layer].k, rtol=1e-4, atol=1e-4)
            assert not q[:, :, count:].any() and not k_[:, :, count:].any()


@pytest.mark.parametrize("dtype, close", [("float32", 1e-4), ("bfloat16", 2e-2), ("float8", 6e-2)])
def test_losses_from_the_cache_are_those_of_the_teacher_at_hand(
    micro, inputs, teacher, student, tmp_path, dtype, close
):
    """Values and gradients of all of equation 8's parts; bfloat16 changes L_LAid by its 8 bits, float8 by its 4."""
    build_cache(with_cache(micro, layers=[-1], dtype=dtype), *inputs, tmp_path / "c")
    settings = micro.methods["laid"].changed({"gain": False})
    indices = [3, 1, 20, 8]
    found = []
    for source in (TeacherCache(tmp_path / "c"), OnlineTeacher(teacher.model, teacher.batch)):
        losses = Losses(student.model, settings, source)
        student.model.zero_grad()
        parts = losses(student.batch(indices), student.labels(indices), indices, 0.5)
        gradient = student.model.model.language_model.layers[1].self_attn.q_proj.weight.grad.clone()
        found.append((parts, gradient, losses.alignments["1-2"].w.grad))
    (cached, *cached_grads), (online, *online_grads) = found
    assert set(cached) == set(online) == {"sft", "kl", "laid", ""}
    for part in cached:
        exact = part in ("sft", "kl")  # logits are kept in float32
        torch.testing.assert_close(cached[part], online[part], rtol=1e-4 if exact else close, atol=1e-5)
        assert float(cached[part].detach()) > 0.01
    for a, b in zip(cached_grads, online_grads):
        assert (a - b).norm() < close * b.norm()


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 300.0, 1e20])
def test_float8_is_within_its_four_bits_of_each_head_s_largest(scale):
    g = torch.Generator().manual_seed(0)
    x = scale * torch.randn(50, 3, 16, generator=g) * 10 ** torch.randn(50, 3, 1, generator=g)
    x[7, 1] = 0
    x[8, 1, 0] = 448 * 2.0 ** torch.frexp(x[8, 1].abs().max())[1]  # at the very edge of the format
    back = from_float8(*to_float8(x))
    largest = x.abs().amax(-1, keepdim=True)
    assert back.dtype == torch.bfloat16 and torch.equal(back[7, 1], torch.zeros(16).bfloat16())
    # half a unit of the last of four bits, or of the smallest subnormal, which lies 2**-17 or less below the largest
    assert ((back.float() - x).abs() <= (x.abs() / 16).maximum(largest * 2**-17)).all()
    again = from_float8(*to_float8(back))
    assert torch.equal(again, back)  # what is read back is exact


def test_float8_is_half_the_size_and_says_its_error(micro, inputs, folder, tmp_path, capsys):
    index = build_cache(with_cache(micro, layers=[0, -1], dtype="float8"), *inputs, tmp_path / "c")
    cache, exact, tokens = TeacherCache(tmp_path / "c"), TeacherCache(folder), max(index["lengths"])
    every = range(len(index["lengths"]))
    for layer in (0, 2):
        for kind, got, wanted in zip("qk", *(c.queries_keys(layer, every, tokens) for c in (cache, exact))):
            error = ((got.double() - wanted.double()).square().sum() / wanted.double().square().sum()).sqrt()
            assert error.item() == pytest.approx(index["float8_error"][f"{kind}.{layer}"], rel=1e-3)
            assert 0.015 < error < 0.035
    assert "q.0 in float8, relative error 2." in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "float8"])
def test_the_size_is_known_before(micro, micro_file, inputs, tmp_path, capsys, dtype):
    """By the command, without weights; the shards are that large but for their headers."""
    config = with_cache(micro, layers=[0, -1], dtype=dtype)
    (tmp_path / "c.yaml").write_text(json.dumps({"teacher_cache": config.teacher_cache.model_dump()}))
    words = [f"--{name}={path}" for name, path in zip(("teacher", "coco", "questions"), inputs)]
    assert (
        main(["teacher-cache", "--size", "--config", str(micro_file), str(tmp_path / "c.yaml"), *words]) == 0
    )
    said = capsys.readouterr().out
    index = build_cache(config, *inputs, tmp_path / "c")
    assert capsys.readouterr().out.splitlines()[0] == said.strip()
    tokens = sum(index["lengths"])
    width = {"float32": 4 * 16, "float8": 16 + 1}[dtype]
    vocabulary = load_file(tmp_path / "c/shard-00000.safetensors")["logits"].shape[-1]
    expected = 24 * 2 * vocabulary * 4 + 2 * width * (4 + 2) * tokens
    size = sum(f.stat().st_size for f in (tmp_path / "c").glob("*.safetensors"))
    assert 0 < size - expected < 2000 * len(index["shards"])
    told = f"{expected / 1e6:.1f} MB" if expected >= 1e6 else f"{expected / 1e3:.1f} kB"
    assert f", {told} in all" in said
    assert main(["teacher-cache", *words]) == 2
    assert "give --out, a folder for the cache" in capsys.readouterr().err


def test_a_full_disk_is_told_before_the_pass(micro, inputs, tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: room)
    with pytest.raises(LaidError, match="needs .* MB, 100.0 kB are free: choose another folder"):
        build_cache(with_cache(micro, layers=[0, -1]), *inputs, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_same_bytes_again(micro, inputs, folder, tmp_path):
    build_cache(with_cache(micro, layers=[0, -1]), *inputs, tmp_path / "again")
    assert sha256_folder(tmp_path / "again") == sha256_folder(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_a_killed_pass_goes_on(micro, inputs, tmp_path, monkeypatch):
    """Killed in the third of six shards; the other two are not computed again, one that was cut short is."""
    config = with_cache(micro, layers=[0, -1])
    monkeypatch.setattr(teacher_cache, "SHARD", 4)
    build_cache(config, *inputs, tmp_path / "whole")
    real, calls = teacher_cache._teacher_pass, []

    def counted(model, features, samples, *rest):
        calls.append([s.index for s in samples])
        if len(calls) == die:
            raise KeyboardInterrupt
        return real(model, features, samples, *rest)

    monkeypatch.setattr(teacher_cache, "_teacher_pass", counted)
    die, out = 3, tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        build_cache(config, *inputs, out)
    (partial,) = tmp_path.glob(".cache.partial-*")
    assert sorted(p.name for p in partial.iterdir()) == [f"shard-0000{k}.safetensors" for k in (0, 1)]
    assert not out.exists()
    shard = partial / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    die = 0
    calls.clear()
    build_cache(config, *inputs, out)
    assert calls == [list(range(start, start + 4)) for start in (4, 8, 12, 16, 20)]
    assert sha256_folder(out) == sha256_folder(tmp_path / "whole")
    assert not list(tmp_path.glob(".cache.partial-*"))
    indices = [22, 3, 7, 8, 0]  # across shards
    whole, one = TeacherCache(out), TeacherCache(tmp_path / "whole")
    assert torch.equal(whole.logits(indices), one.logits(indices))


def test_other_settings_take_up_nothing(micro, inputs, tmp_path, monkeypatch):
    config = with_cache(micro, layers=[0])
    stale = tmp_path / ".cache.partial-0123456789ab"
    stale.mkdir()
    (stale / "shard-00000.safetensors").write_text("of another pass")
    build_cache(config, *inputs, tmp_path / "cache")
    TeacherCache(tmp_path / "cache").verify()
    assert not stale.exists()


def test_shards_are_bounded_by_questions_and_by_bytes():
    assert shard_ranges([10] * 5, 1, 0) == [range(5)]
    assert shard_ranges([10] * 1100, 1, 0) == [range(512), range(512, 1024), range(1024, 1100)]
    mebi = 1 << 20
    assert shard_ranges([100, 100, 100, 300, 1, 1], mebi, 0) == [
        range(2),
        range(2, 3),
        range(3, 4),
        range(4, 6),
    ]
    assert shard_ranges([1, 1, 1], 0, 128 * mebi) == [range(2), range(2, 3)]


# ------------------------------------------------------------------ what is wrong is found


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "broken")


def refused(match, folder, questions=None):
    with pytest.raises(LaidError, match=match) as caught:
        TeacherCache(folder, questions)
    assert "\n" not in str(caught.value)


def test_missing_cut_and_foreign_shards(broken, folder):
    shard = broken / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused("shard-00000.safetensors: cannot be read .*; make the cache again", broken)
    shard.unlink()
    refused("shard-00000.safetensors: cannot be read", broken)
    shard.write_bytes(b"")
    refused("shard-00000.safetensors: cannot be read", broken)


def test_a_changed_byte_is_found_by_verify(broken, folder):
    TeacherCache(folder).verify()
    shard = broken / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(LaidError, match="shard-00000.safetensors: changed since it was written"):
        TeacherCache(broken).verify()


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("format", "laid-cell/1", "not a teacher cache"),
        ("lengths", [1, 2, 3], "do not cover its 3 questions"),
        ("heads", 8, r"q.0 has shape \(\d+, 64\), expected \(\d+, 128\)"),
        ("layers", [0, 1], "k.1 has shape"),
        ("shards", None, "index.json: shards: Input should be a valid list: changed by hand"),
        ("provenance", {}, "index.json: provenance.data: Field required"),
        ("lengths", ["1"], r"index.json: lengths.0: Input should be a valid integer"),
    ],
)
def test_a_changed_index_is_found(broken, key, value, match):
    index = json.loads((broken / "index.json").read_text())
    index[key] = value
    (broken / "index.json").write_text(json.dumps(index))
    refused(match, broken)


def test_a_shard_outside_the_folder_is_refused(broken):
    index = json.loads((broken / "index.json").read_text())
    index["shards"][0]["file"] = "../elsewhere.safetensors"
    (broken / "index.json").write_text(json.dumps(index))
    refused("leaves its folder", broken)


def test_other_questions_and_layers(folder, haystacks, tmp_path):
    assert TeacherCache(folder, haystacks / "train.json").lengths
    write_questions(tmp_path / "less.json", read_questions(haystacks / "train.json")[1:])
    refused("was made from other questions than", folder, tmp_path / "less.json")
    (tmp_path / "broken.json").write_text("[{")
    refused("broken.json.*JSON", folder, tmp_path / "broken.json")
    refused("no such file", tmp_path / "nowhere")
    with pytest.raises(LaidError, match=r"holds teacher layers \[0, 2\], layer 1 is asked for"):
        TeacherCache(folder).queries_keys(1, [0], 60)


def test_a_layer_the_teacher_does_not_have(micro, inputs, tmp_path):
    with pytest.raises(LaidError, match="layer 7 does not exist: the model has 3 layers"):
        build_cache(with_cache(micro, layers=[7]), *inputs, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_no_layers_keep_logits_alone(micro, inputs, folder, tmp_path):
    build_cache(with_cache(micro, layers=[]), *inputs, tmp_path / "c")
    cache = TeacherCache(tmp_path / "c")
    torch.testing.assert_close(cache.logits([1, 2]), TeacherCache(folder).logits([1, 2]))
    assert (tmp_path / "c/shard-00000.safetensors").stat().st_size < 1.1 * cache.logits(range(24)).nbytes
