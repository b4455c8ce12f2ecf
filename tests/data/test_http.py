"""Downloads from a real server that drops, truncates, lies and refuses: whole, or one clear error."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_site import Site
from laid.data.http import Http, RemoteFile
from laid.errors import LaidError

DATA = random.Random(1).randbytes(300_000)
MD5 = hashlib.md5(DATA).hexdigest()
NAME = "zips/big.zip"


@pytest.fixture
def site():
    site = Site({NAME: DATA})
    yield site
    site.close()


@pytest.fixture
def client():
    return Http(retries=3, timeout=5, wait=0.001)


def get(client, site, folder, **kwargs):
    client.download(f"{site.base}/{NAME}", folder / "big.zip", **kwargs)
    return (folder / "big.zip").read_bytes()


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir())


def test_plain(site, client, tmp_path):
    gained = []
    assert get(client, site, tmp_path, size=len(DATA), md5=MD5, progress=gained.append) == DATA
    assert sum(gained) == len(DATA) and leftovers(tmp_path) == ["big.zip"]
    assert site.asked(NAME) == [(NAME, "", len(DATA))]


def test_dropped_connections_are_resumed_where_they_stopped(site, client, tmp_path):
    site.plans[NAME] = ["drop:100000", "drop:50000", "drop:0", "drop:1"]
    gained = []
    assert get(client, site, tmp_path, md5=MD5, progress=gained.append) == DATA
    ranges = [entry[1] for entry in site.asked(NAME)]
    assert ranges == ["", "bytes=100000-", "bytes=150000-", "bytes=150000-", "bytes=150001-"]
    assert sum(entry[2] for entry in site.asked(NAME)) == len(DATA) == sum(gained)


def test_many_drops_are_no_reason_to_give_up_while_bytes_come(site, client, tmp_path):
    site.plans[NAME] = ["drop:20000"] * 14
    assert get(client, site, tmp_path, md5=MD5) == DATA


def test_next_call_goes_on_where_the_last_stopped(site, client, tmp_path):
    site.plans[NAME] = ["drop:120000"] + [503] * 4
    with pytest.raises(
        LaidError, match="answers 503 .*gave up after 4 attempts in a row, the next call goes on"
    ):
        get(client, site, tmp_path, md5=MD5)
    assert not (tmp_path / "big.zip").exists()
    assert get(Http(retries=0), site, tmp_path, md5=MD5) == DATA
    assert site.asked(NAME)[-1] == (NAME, "bytes=120000-", len(DATA) - 120000)


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_passing_refusals_are_tried_again(site, client, tmp_path, code):
    site.plans[NAME] = [code, code]
    assert get(client, site, tmp_path) == DATA


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_lasting_refusals_are_one_request_and_one_line(site, client, tmp_path, code):
    site.plans[NAME] = [code] * 9
    with pytest.raises(LaidError, match=f"{NAME}: the server answers {code}") as caught:
        get(client, site, tmp_path)
    assert len(site.asked(NAME)) == 1 and "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


def test_nobody_there(tmp_path, client):
    with pytest.raises(LaidError, match="no answer .*gave up after 4 attempts"):
        client.download("http://127.0.0.1:9/x.zip", tmp_path / "x.zip")
    with pytest.raises(LaidError, match="not an http"):
        client.download("file:///etc/passwd", tmp_path / "x.zip")
    assert leftovers(tmp_path) == []


def test_silence_counts_as_a_broken_connection(site, tmp_path):
    site.plans[NAME] = ["stall"]
    assert get(Http(retries=2, timeout=0.2, wait=0.001), site, tmp_path) == DATA
    assert site.plans[NAME] == []


def test_a_request_that_nobody_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(LaidError) as caught:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        Http(retries=1, timeout=0.1, wait=0.0, key="sk-secret").post(url, {"a": 1})
    assert "timed out" in str(caught.value) and "gave up after 2 attempts" in str(caught.value)


@pytest.mark.parametrize("host", ["a..b", "x" * 70])
def test_no_address_is_not_tried_again(host):
    with pytest.raises(LaidError, match="cannot be asked: "):
        Http(retries=0).post(f"http://{host}/v1", {})


def test_wrong_bytes_are_never_kept(site, client, tmp_path):
    for trick in ("wrong", "flip"):
        site.plans[NAME] = [trick]
        with pytest.raises(
            LaidError, match=f"its MD5 is [0-9a-f]+, expected {MD5}; the partial file was deleted"
        ):
            get(client, site, tmp_path, md5=MD5)
        assert leftovers(tmp_path) == []
    assert get(client, site, tmp_path, md5=MD5) == DATA


def test_wrong_end_of_a_resumed_file_is_fetched_once_more(site, client, tmp_path):
    site.plans[NAME] = ["drop:100000", "wrong"]
    assert get(client, site, tmp_path, md5=MD5) == DATA
    assert [entry[1] for entry in site.asked(NAME)] == ["", "bytes=100000-", ""]


def test_file_of_another_size_is_refused_before_it_is_fetched(site, client, tmp_path):
    with pytest.raises(LaidError, match="the server has 300000 bytes, expected 299999"):
        get(client, site, tmp_path, size=299_999)
    assert leftovers(tmp_path) == []


def test_a_file_cut_short_on_the_server(site, client, tmp_path):
    """The server claims that a part is all: only a known size or checksum can tell."""
    site.plans[NAME] = ["short:1000"]
    with pytest.raises(LaidError, match="the server has 1000 bytes, expected 300000"):
        get(client, site, tmp_path, size=len(DATA))
    site.plans[NAME] = ["short:1000"]
    with pytest.raises(LaidError, match="its MD5 is"):
        get(client, site, tmp_path, md5=MD5)
    assert leftovers(tmp_path) == []


def test_a_file_that_changed_between_calls_is_begun_anew(site, tmp_path):
    site.plans[NAME] = ["drop:100000", 503]
    with pytest.raises(LaidError):
        get(Http(retries=0, wait=0.001), site, tmp_path)
    site.files[NAME] = DATA[::-1]
    assert get(Http(retries=0, wait=0.001), site, tmp_path) == DATA[::-1]
    # The same where the server has no validators to compare, but a total of another length.
    (tmp_path / "big.zip").unlink()
    site.tags[NAME] = ""
    site.plans[NAME] = ["drop:100000", 503]
    with pytest.raises(LaidError):
        get(Http(retries=0, wait=0.001), site, tmp_path)
    site.files[NAME] = DATA[:150_000]
    assert get(Http(retries=2, wait=0.001), site, tmp_path) == DATA[:150_000]


def test_a_part_of_another_address_is_not_used(site, client, tmp_path):
    (tmp_path / ".big.zip.part").write_bytes(b"x" * 1000)
    assert get(client, site, tmp_path) == DATA
    assert site.asked(NAME)[0][1] == ""


def test_server_without_ranges_or_lengths(site, client, tmp_path):
    site.plans[NAME] = ["drop:100000", "whole"]
    assert get(client, site, tmp_path, md5=MD5) == DATA
    site.plans[NAME] = ["mute"]
    assert get(client, site, tmp_path, md5=MD5) == DATA


def test_own_check_speaks_and_nothing_is_kept(site, client, tmp_path):
    with pytest.raises(LaidError, match="it is Tuesday; the partial file was deleted"):
        get(client, site, tmp_path, check=lambda path: "it is Tuesday" if path.read_bytes() == DATA else None)
    assert leftovers(tmp_path) == []


TRICKS = st.sampled_from(
    [
        503,
        500,
        404,
        "drop:0",
        "drop:7",
        "drop:90000",
        "drop:299999",
        "short:5000",
        "wrong",
        "flip",
        "whole",
        "mute",
    ]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(TRICKS, max_size=5), max_size=3))
def test_whatever_happens_a_file_under_its_own_name_is_right(site, tmp_path_factory, calls):
    folder = tmp_path_factory.mktemp("any")
    client = Http(retries=2, timeout=5, wait=0.0)
    for plan in calls:
        site.plans[NAME] = list(plan)
        try:
            assert get(client, site, folder, size=len(DATA), md5=MD5) == DATA
            (folder / "big.zip").unlink()
        except LaidError as error:
            assert "\n" not in str(error) and not (folder / "big.zip").exists()
    site.plans[NAME] = []
    assert get(client, site, folder, size=len(DATA), md5=MD5) == DATA


def test_killed_in_the_middle_then_gone_on_with(site, tmp_path):
    site.rate = 0.01
    code = "import sys; from laid.data.http import Http; Http().download(sys.argv[1], sys.argv[2])"
    source = str(Path(__file__).resolve().parents[2] / "src")
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"{site.base}/{NAME}", str(tmp_path / "big.zip")],
        env={**os.environ, "PYTHONPATH": source},
    )
    part = tmp_path / ".big.zip.part"
    end = time.monotonic() + 20
    while time.monotonic() < end and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert not (tmp_path / "big.zip").exists() and 0 < have < len(DATA)
    site.rate = 0.0
    assert get(Http(retries=0), site, tmp_path, md5=MD5) == DATA
    assert site.asked(NAME)[-1][1] == f"bytes={have}-"


def test_remote_file_serves_zipfile(tmp_path, client):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for k in range(200):
            archive.writestr(f"f/{k}.bin", random.Random(k).randbytes(3000))
    whole = (tmp_path / "a.zip").read_bytes()
    site = Site({"a.zip": whole})
    try:
        with (
            zipfile.ZipFile(RemoteFile(client, f"{site.base}/a.zip")) as remote,
            zipfile.ZipFile(tmp_path / "a.zip") as local,
        ):
            assert [(e.filename, e.CRC, e.file_size) for e in remote.infolist()] == [
                (e.filename, e.CRC, e.file_size) for e in local.infolist()
            ]
            assert remote.read("f/7.bin") == local.read("f/7.bin")
        assert (
            sum(entry[2] for entry in site.log) < len(whole) / 10
        )  # the directory and one file, not the archive
        site.plans["a.zip"] = ["whole", "whole"]
        with pytest.raises(LaidError, match="does not serve parts"):
            RemoteFile(client, f"{site.base}/a.zip").read(10)
    finally:
        site.close()
