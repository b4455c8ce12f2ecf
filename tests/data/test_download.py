"""COCO by HTTP against a local site that serves a small COCO as images.cocodataset.org does, and misbehaves."""

from __future__ import annotations

import io
import shutil
import stat
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import yaml

from fake_site import Site, coco_site
from laid.cli import main
from laid.data import download
from laid.data.coco import load_coco
from laid.data.download import Archive, CocoDownload
from laid.data.questions import read_questions
from laid.errors import LaidError
from laid.toy.render import render

ANNOTATIONS = "annotations/annotations_trainval2017.zip"
VAL = "zips/val2017.zip"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    root = tmp_path_factory.mktemp("origin") / "coco"
    render(root, train=30, val=24, canvas=56, seed=9)
    return root


@pytest.fixture(scope="module")
def content(origin):
    return coco_site(origin)


@pytest.fixture
def site(content):
    site = Site(content[0])
    yield site
    site.close()


@pytest.fixture
def make(site, content, tmp_path):
    def make(**kwargs):
        kwargs = {
            "archives": content[1],
            "wait": 0.001,
            "retries": 2,
            "timeout": 5.0,
            "connections": 3,
        } | kwargs
        return CocoDownload(tmp_path / "coco", site.base, **kwargs)

    return make


@pytest.fixture
def names(origin):
    return list(load_coco(origin, "val2017").images)


def same(origin, folder, name):
    return (origin / name).read_bytes() == (folder / name).read_bytes()


def images(folder):
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.glob("*2017/*") if not p.name.startswith(".")
    )


def test_annotations_whole_and_only_what_is_used(make, site, origin, tmp_path):
    make().annotations()
    coco = tmp_path / "coco"
    assert sorted(p.name for p in (coco / "annotations").iterdir()) == [
        "instances_train2017.json",
        "instances_val2017.json",
    ]
    assert all(same(origin, coco, f"annotations/instances_{s}2017.json") for s in ("train", "val"))
    assert not list((coco / ".download").glob("*.zip"))
    asked = len(site.log)
    make().annotations()
    assert len(site.log) == asked  # nothing left to do, nothing asked


def test_annotations_survive_a_bad_line(make, site, origin, tmp_path):
    size = len(site.files[ANNOTATIONS])
    site.plans[ANNOTATIONS] = [503, f"drop:{size // 3}", 503, f"drop:{size // 3}"]
    make().annotations()
    assert same(origin, tmp_path / "coco", "annotations/instances_train2017.json")


@pytest.mark.parametrize(
    "trick, says",
    [
        (404, "answers 404"),
        ("wrong", "its MD5 is"),
        ("flip", "its MD5 is"),
        ("short:900", "has 900 bytes, expected"),
    ],
)
def test_annotations_whole_or_an_error(make, site, tmp_path, trick, says):
    site.plans[ANNOTATIONS] = [trick]
    with pytest.raises(LaidError, match=says):
        make().annotations()
    assert not (tmp_path / "coco/annotations").exists()
    make().annotations()
    assert load_coco(tmp_path / "coco", "val2017").images


@pytest.mark.parametrize("trick", ["wrong", "short:900"])
def test_broken_archive_is_found_without_checksums_too(make, site, tmp_path, trick):
    site.plans[ANNOTATIONS] = [trick, trick]
    with pytest.raises(LaidError, match="not a whole zip archive|expected"):
        make(checksums=False).annotations()
    assert not (tmp_path / "coco/annotations").exists()
    site.plans[ANNOTATIONS] = []
    make(checksums=False).annotations()


def test_single_images_are_the_right_bytes_and_no_more(make, site, origin, names, tmp_path):
    source = make(images="single")
    source.annotations()
    assert source.images([names[3], names[7], names[3], "train2017/000000100004.png"]) == 3
    assert images(tmp_path / "coco") == sorted(["train2017/000000100004.png", names[3], names[7]])
    assert all(same(origin, tmp_path / "coco", name) for name in images(tmp_path / "coco"))
    # The archives themselves were not fetched: their directories only.
    assert sum(entry[2] for entry in site.asked(VAL)) < len(site.files[VAL]) / 2
    asked = len(site.log)
    assert make().images([names[3], names[7]]) == 0
    assert len(site.log) == asked


def test_image_with_one_wrong_bit_is_refused(make, site, names, tmp_path):
    source = make(images="single")
    source.annotations()
    site.plans[names[5]] = ["flip"]
    with pytest.raises(LaidError, match=f"{names[5]}: its CRC-32 is [0-9a-f]{{8}}, expected"):
        source.images(names[5:6])
    assert images(tmp_path / "coco") == []
    assert source.images(names[5:6]) == 1


@pytest.mark.parametrize("trick, says", [("wrong", "not a whole image"), ("short:300", "not a whole image")])
def test_image_is_decoded_where_no_checksum_is_known(make, site, names, tmp_path, trick, says):
    source = make(images="single", checksums=False)
    source.annotations()
    site.plans[names[5]] = [trick]
    with pytest.raises(LaidError, match=says):
        source.images(names[5:6])
    site.files[names[5]] = site.files[names[6]]  # a good picture, the wrong one: same size here, so it passes
    assert source.images(names[5:6]) == 1 and not site.asked(VAL)


def test_image_of_another_size_is_refused(make, site, names, tmp_path):
    from PIL import Image

    source = make(images="single", checksums=False)
    source.annotations()
    other = io.BytesIO()
    Image.new("RGB", (57, 56)).save(other, "PNG")
    site.files[names[0]] = other.getvalue()
    with pytest.raises(LaidError, match="57 x 56 pixels, annotated as 56 x 56"):
        source.images(names[:1])
    assert images(tmp_path / "coco") == []


def test_one_missing_image_leaves_the_others(make, site, names, tmp_path):
    source = make(images="single", connections=1)
    source.annotations()
    site.plans[names[4]] = [404]
    with pytest.raises(
        LaidError, match=rf"{names[4]}: the server answers 404 .*\([4-7] of 8 images are there"
    ):
        source.images(names[:8])
    kept = images(tmp_path / "coco")
    assert set(names[:4]) <= set(kept) <= set(names[:8]) - {names[4]}
    before = len(site.log)
    assert source.images(names[:8]) == 8 - len(kept)
    assert {entry[0] for entry in site.log[before:]} == set(names[:8]) - set(kept)


def test_images_come_through_a_bad_line(make, site, origin, names, tmp_path):
    source = make(images="single")
    source.annotations()
    for at, name in enumerate(names):
        site.plans[name] = [["drop:40"], [503], ["drop:0", 500], []][at % 4]
    source.images(names)
    assert images(tmp_path / "coco") == names
    assert all(same(origin, tmp_path / "coco", name) for name in names)


def test_auto_takes_the_archive_when_most_is_missing(make, site, origin, names, tmp_path):
    source = make(images="auto")
    source.annotations()
    source.images(names[:5])
    assert images(tmp_path / "coco") == names[:5]
    site.plans[VAL] = ["drop:10000", 503]
    source.images(names[:22])  # 17 of 24 missing
    assert images(tmp_path / "coco") == names
    assert all(same(origin, tmp_path / "coco", name) for name in names)
    assert not list((tmp_path / "coco/.download").glob("*.zip"))


def test_interrupted_unpacking_is_gone_on_with(make, site, origin, names, tmp_path, monkeypatch):
    source = make(images="zip")
    source.annotations()
    true_copy, calls = shutil.copyfileobj, []

    def tired(src, dst, length):
        calls.append(1)
        if len(calls) > 10:
            dst.write(b"half a pict")
            raise KeyboardInterrupt
        true_copy(src, dst, length)

    monkeypatch.setattr(download.shutil, "copyfileobj", tired)
    with pytest.raises(KeyboardInterrupt):
        source.images(names)
    assert images(tmp_path / "coco") == names[:10]
    monkeypatch.setattr(download.shutil, "copyfileobj", true_copy)
    fetched = sum(entry[2] for entry in site.asked(VAL))
    (tmp_path / "coco" / names[2]).write_bytes(b"tampered with")
    source.images(names)
    assert images(tmp_path / "coco") == names and sum(entry[2] for entry in site.asked(VAL)) == fetched
    assert all(same(origin, tmp_path / "coco", name) for name in names)


def evil(origin, kind):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted((origin / "annotations").iterdir()):
            archive.write(file, f"annotations/{file.name}")
        if kind == "link":
            entry = zipfile.ZipInfo("annotations/link")
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, "/etc/passwd")
        else:
            archive.writestr(kind, b"evil")
    return packed.getvalue()


@pytest.mark.parametrize(
    "kind",
    ["../evil.txt", "annotations/../../evil.txt", "/tmp/evil.txt", "link", "a\\..\\evil", "C:evil.txt"],
)
def test_archives_that_would_leave_the_folder_are_not_used(make, site, origin, tmp_path, kind):
    site.files[ANNOTATIONS] = evil(origin, kind)
    with pytest.raises(LaidError, match="would leave the folder: the archive is not used"):
        make(checksums=False).annotations()
    assert not (tmp_path / "coco/annotations").exists()
    assert not list(tmp_path.rglob("evil*"))


def test_archive_without_the_files(make, site, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("annotations/instances_val2017.json", b"{}")
    site.files[ANNOTATIONS] = packed.getvalue()
    with pytest.raises(LaidError, match="lacks 1 of 2 files, first annotations/instances_train2017.json"):
        make(checksums=False).annotations()
    assert not (tmp_path / "coco/annotations").exists()


def test_disk_space_is_looked_at_first(make, site, names, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(
        LaidError, match=r"annotations \(archive and files\) need 0\.\d+ GB, 0.00 GB are free"
    ):
        make().annotations()
    assert site.log == []
    monkeypatch.undo()
    make().annotations()
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(LaidError, match="5 images of val2017 need .* are free"):
        make(images="single").images(names[:5])
    assert not any(site.asked(name) for name in names)


def test_real_sizes_are_known_before_anything_is_asked(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(0, 0, 700_000_000))
    source = CocoDownload(tmp_path / "coco", "http://127.0.0.1:9", wait=0.001, retries=0)
    with pytest.raises(LaidError, match="need 0.76 GB, 0.70 GB are free"):
        source.annotations()


def test_unknown_images_and_two_at_once_are_refused(make, names):
    source = make()
    source.annotations()
    with pytest.raises(LaidError, match="1 images are not in .*instances_val2017.json, first val2017/x.jpg"):
        source.images([names[0], "val2017/x.jpg"])
    with pytest.raises(LaidError, match="not an image of COCO 2017"):
        source.images(["test2017/000000000001.jpg"])
    with source._alone(), pytest.raises(LaidError, match="another process is downloading"):
        make().images(names[:1])


def test_whole_chain_by_the_command_line(site, content, origin, tmp_path, monkeypatch, capsys):
    """data fetches annotations, then the images that the questions of haystacks name, and no others."""
    monkeypatch.setattr(download, "ARCHIVES", content[1])
    overlay = tmp_path / "overlay.yaml"
    settings = {
        "data": {"source": "download", "download": {"base": site.base, "images": "single"}},
        "haystacks": {
            "train": {"questions": 4, "min_size": 2, "max_size": 3},
            "validation": {"share": 0.5, "questions": 2, "sizes": [2]},
            "test": {"questions": 4, "sizes": [1, 3]},
        },
    }
    overlay.write_text(yaml.safe_dump(settings))
    base = str(Path(__file__).resolve().parents[2] / "config.yaml")
    coco, out = tmp_path / "coco", tmp_path / "haystacks"
    config = ["--config", base, str(overlay)]
    assert main(["data", *config, "--out", str(coco)]) == 0
    assert images(coco) == []
    assert main(["haystacks", *config, "--coco", str(coco), "--out", str(out)]) == 0
    files = sorted(p for p in out.rglob("*.json") if p.name not in ("shortcuts.json", "laid.json"))
    needed = {path for file in files for q in read_questions(file) for path in q.needles + q.distractors}
    assert images(coco) == []
    ask = ["data", *config, "--out", str(coco), "--questions", *map(str, files)]
    assert main(ask) == 0
    assert images(coco) == sorted(needed) and 4 < len(needed) < 54
    # Question files by hand, as for the official ones: missing images are fetched, broken ones are named.
    victim, broken = sorted(needed)[:2]
    (coco / victim).unlink()
    assert main(ask) == 0 and same(origin, coco, victim)
    (coco / broken).write_bytes((coco / broken).read_bytes()[:-400])
    capsys.readouterr()
    assert main(ask) == 2
    assert f"{broken}: not a whole image" in capsys.readouterr().err
    (coco / broken).unlink()
    assert main([*ask, "--all-images"]) == 0 and len(images(coco)) == 54


def test_published_archives():
    """Size and MD5 as several independent lists of COCO 2017 state them."""
    assert download.ARCHIVES["annotations"] == Archive(
        ANNOTATIONS, 252907541, "f4bbac642086de4f52a3fdda2de5fa2c"
    )
    assert download.ARCHIVES["val2017"] == Archive(VAL, 815585330, "442b8da7639aecaf257c1dceb8ba8c80")
    assert download.ARCHIVES["train2017"].size == 19336861798
