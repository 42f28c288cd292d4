"""A rank's files: whole or not there, its own, private, and nobody else's are touched."""

import io
import json
import os
import struct
import time
from types import SimpleNamespace

import pytest

from cenacle.core.step import Page, PageLoad
from cenacle.engine.cache import disk_store as module
from cenacle.engine.cache.disk_store import PageStore, fingerprint

GROUP, OTHER = "a" * 32, "b" * 32


def page(letter, begin=0):
    return Page(letter * 24, "" if not begin else "0" * 24, begin, begin + 256)


def content(mark, size=1000):
    header = json.dumps({"__metadata__": {"0.mark": mark}}).encode()
    return io.BytesIO(struct.pack("<Q", len(header)) + header + bytes(size))


SIZE = len(content(f"{GROUP}/rank-0").getbuffer())


class Opened:
    """A rank's disk, and what it said."""

    def __init__(self, home, group=GROUP, rank=0, budget=10**6):
        self.said = []
        self.disk = PageStore(home, group, rank, budget, self.said.append)

    def heard(self, count):
        ends = time.monotonic() + 5
        while len(self.said) < count:
            assert time.monotonic() < ends, self.said
            time.sleep(0.002)
        return self.said[count - 1]

    def write(self, *pages):
        for one in pages:
            self.disk.write(one, content(self.disk.about["mark"]))
            assert self.heard(len(self.said) + 1)["written"][0] == one.key
        return self

    def seek(self, *pages):
        self.disk.seek(PageLoad("n", pages))
        return self.heard(len(self.said) + 1)

    def files(self):
        return sorted(p for p in self.disk._folder.iterdir())


@pytest.fixture
def opened(tmp_path):
    made = []

    def make(home=tmp_path / "home", **how):
        made.append(Opened(home, **how))
        return made[-1]

    yield make
    for one in made:
        one.disk.close()
        assert not one.disk._thread.is_alive()


def test_what_was_written_is_found_again_oldest_first_and_is_private(opened):
    first = opened().write(page("1"), page("2", 256), page("3"))
    for path, used in zip(first.files(), (30, 10, 20), strict=True):
        os.utime(path, (used, used))
    second = opened()
    assert [row[0][0] for row in second.disk.listed] == ["2", "3", "1"]
    assert second.disk.listed[0][1:4] == ("0" * 24, 256, 512)
    assert second.disk.listed[0][4] == first.said[1]["written"][1] == SIZE
    assert second.seek(page("1"), page("2")) == {"checked": ["n", []], "notices": []}
    assert second.disk.path(page("1")) == first.files()[0]
    assert [row[0][0] for row in opened().disk.listed] == ["3", "1", "2"], "that was a use"
    for path in first.files():
        assert path.stat().st_mode & 0o777 == 0o600
    for folder in (first.disk._folder, first.disk._group, first.disk._home):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert opened(rank=1).disk.listed == []
    assert opened(group=OTHER).disk.listed == []


def flip(path):
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def rename(path):
    path.rename(path.with_name(path.name.replace("-0-256-", "-9-256-")))


@pytest.mark.parametrize("harm", [flip, shorten, empty, rename])
def test_a_damaged_file_is_not_used_but_removed(opened, harm):
    harm(opened().write(page("1"), page("2")).files()[0])
    again = opened()
    said = again.seek(page("1"), page("2"))
    assert said["checked"] == ["n", [page("1").key]]
    (notice,) = said["notices"]
    assert "is damaged: it was removed" in notice
    assert [path.name[0] for path in again.files()] == ["2"]


def test_a_file_that_is_gone_is_missed(opened):
    first = opened().write(page("1"))
    again = opened()
    first.files()[0].unlink()
    assert "No such file" in again.seek(page("1"))["notices"][0]
    assert "not there any more" in again.seek(page("1"))["notices"][0]


def test_what_another_group_wrote_is_not_used_and_stays(opened):
    theirs = opened(group=OTHER).write(page("1")).files()[0]
    mine = opened().write(page("2"))
    moved = mine.disk._folder / theirs.name
    theirs.rename(moved)
    again = opened()
    said = again.seek(page("1"), page("2"))
    assert said["checked"] == ["n", [page("1").key]]
    assert "is of another model or group: ignored" in said["notices"][0]
    again.disk.remove([page("1").key])
    again.write(page("3"))
    assert moved.exists()


def test_strangers_stay_and_what_was_never_finished_goes(opened):
    folder = opened().write(page("1")).disk._folder
    stranger, fresh = folder / "notes.txt", folder / f".{'3' * 24}.01234567"
    old = folder / f".{'4' * 24}.01234567"
    for path in (stranger, fresh, old):
        path.write_text("x")
    os.utime(old, (1, 1))
    again = opened()
    assert len(again.disk.listed) == 1
    assert again.disk.notices == [f"{stranger} is not of this program: ignored"]
    assert (stranger.exists(), fresh.exists(), old.exists()) == (True, True, False)


def test_a_page_that_is_there_twice_is_kept_once(opened):
    first = opened().write(page("1"))
    first.disk.write(page("1"), content(first.disk.about["mark"], 500))
    first.heard(2)
    assert len(first.files()) == 2
    assert len(opened().disk.listed) == 1
    assert len(first.files()) == 1


def test_other_groups_make_room_the_longest_unused_first(opened, tmp_path):
    others = opened(group=OTHER).write(page("1"), page("2"), page("3"))
    for path, used in zip(others.files(), (30, 10, 20), strict=True):
        os.utime(path, (used, used))
    (tmp_path / "home" / "mine").mkdir()
    (tmp_path / "home" / "mine" / "rank-0").mkdir()
    stays = tmp_path / "home" / "mine" / "rank-0" / others.files()[0].name
    stays.write_text("in a folder that is not of our form")
    mine = opened(budget=3 * SIZE)
    mine.write(page("4"))
    assert [path.name[0] for path in others.files()] == ["1", "3"]
    mine.write(page("5"), page("6"))
    assert not others.disk._group.exists()
    mine.write(page("7"))
    assert len(mine.files()) == 4, "its own are the front's to remove"
    mine.disk.remove([page("7").key, "unknown"])
    mine.write(page("8"))
    assert [path.name[0] for path in mine.files()] == ["4", "5", "6", "8"]
    assert stays.exists()


def test_a_full_disk_is_said_once(opened, monkeypatch):
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda _: SimpleNamespace(free=module.SPARED + 10)
    )
    full = opened()
    for letter in "12":
        full.disk.write(page(letter), content("x"))
    assert "less than 1 GB would be left: no more prompts" in full.heard(1)["notices"][0]
    assert full.heard(2) == {"failed": page("2").key}
    assert full.files() == []


def test_a_write_that_fails_leaves_nothing(opened, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.Path, "replace", fails)
    full = opened()
    full.disk.write(page("1"), content("x"))
    assert "No space left on device" in full.heard(1)["notices"][0]
    assert full.files() == []


def test_a_folder_that_cannot_be_used_is_a_notice(opened, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / GROUP).write_text("x")
    there = opened()
    there.disk.write(page("1"), content("x"))
    assert there.heard(1)["failed"] == page("1").key
    assert there.heard(1)["notices"]


def test_a_folder_that_others_can_read_is_not_used(opened):
    first = opened().write(page("1"))
    first.disk._group.chmod(0o750)
    again = opened()
    assert again.disk.listed is None
    assert "is not this user's alone: no prompts are kept there" in again.disk.notices[0]
    again.disk.write(page("2"), content("x"))
    assert again.heard(1)["failed"] == page("2").key
    assert len(first.files()) == 1


def test_a_fingerprint_is_of_the_weights_and_of_all_that_was_decided(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(300_000))
    os.utime(weights, (5, 5))
    seen = [fingerprint(tmp_path, {"plan": 1}), fingerprint(tmp_path, {"plan": 2})]
    (tmp_path / "notes.txt").write_text("x")
    assert fingerprint(tmp_path, {"plan": 1}) == seen[0]
    for at in (0, 150_000, 299_999):
        data = bytearray(300_000)
        data[at] = 1
        weights.write_bytes(data)
        os.utime(weights, (5, 5))
        seen.append(fingerprint(tmp_path, {"plan": 1}))
    os.utime(weights, (6, 6))
    seen.append(fingerprint(tmp_path, {"plan": 1}))
    (tmp_path / "config.json").write_text("{ }")
    seen.append(fingerprint(tmp_path, {"plan": 1}))
    assert len(set(seen)) == len(seen) == 7
    assert all(len(one) == 32 for one in seen)
