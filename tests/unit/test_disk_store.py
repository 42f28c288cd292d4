"""A rank's files are complete or absent, private, and those of others are left alone."""

import io
import json
import os
import struct
import time
from types import SimpleNamespace

import pytest

from cenacle.core.step import Page, PageLoad, PageReport
from cenacle.engine.cache import disk_store
from cenacle.engine.cache.disk_store import PageStore, fingerprint

GROUP, OTHER = "a" * 32, "b" * 32


def page(letter, begin=0):
    return Page(letter * 24, "" if not begin else "0" * 24, begin, begin + 256)


def content(owner, size=1000):
    header = json.dumps({"__metadata__": {"0.mark": owner}}).encode()
    return io.BytesIO(struct.pack("<Q", len(header)) + header + bytes(size))


SIZE = len(content(f"{GROUP}/rank-0").getbuffer())


class OpenStore:
    """A rank's page store, and its reports."""

    def __init__(self, home, group=GROUP, rank=0, budget_bytes=10**6):
        self.reports = []
        self.store = PageStore(home, group, rank, budget_bytes, self.reports.append)

    def report(self, count):
        deadline = time.monotonic() + 5
        while len(self.reports) < count:
            assert time.monotonic() < deadline, self.reports
            time.sleep(0.002)
        return self.reports[count - 1]

    def write(self, *pages):
        for one in pages:
            self.store.write(one, content(self.store.metadata["mark"]))
            assert self.report(len(self.reports) + 1).written[0] == one.key
        return self

    def check(self, *pages):
        self.store.check(PageLoad("n", pages))
        return self.report(len(self.reports) + 1)

    def files(self):
        return sorted(p for p in self.store._folder.iterdir())


@pytest.fixture
def open_store(tmp_path):
    stores = []

    def open_one(home=tmp_path / "home", **arguments):
        stores.append(OpenStore(home, **arguments))
        return stores[-1]

    yield open_one
    for opened in stores:
        opened.store.close()
        assert not opened.store._thread.is_alive()


def test_pages_are_listed_least_recently_used_first_and_are_private(open_store):
    first = open_store().write(page("1"), page("2", 256), page("3"))
    for path, used in zip(first.files(), (30, 10, 20), strict=True):
        os.utime(path, (used, used))
    second = open_store()
    assert [row[0][0] for row in second.store.listing] == ["2", "3", "1"]
    assert second.store.listing[0][1:4] == ("0" * 24, 256, 512)
    assert second.store.listing[0][4] == first.reports[1].written[1] == SIZE
    assert second.check(page("1"), page("2")) == PageReport(checked=("n", []))
    assert second.store.path(page("1")) == first.files()[0]
    assert [row[0][0] for row in open_store().store.listing] == ["3", "1", "2"], "a check is a use"
    for path in first.files():
        assert path.stat().st_mode & 0o777 == 0o600
    for folder in (first.store._folder, first.store._group_folder, first.store._home):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert open_store(rank=1).store.listing == []
    assert open_store(group=OTHER).store.listing == []


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


@pytest.mark.parametrize("damage", [flip, shorten, empty, rename])
def test_a_damaged_file_is_removed(open_store, damage):
    damage(open_store().write(page("1"), page("2")).files()[0])
    again = open_store()
    report = again.check(page("1"), page("2"))
    assert report.checked == ("n", [page("1").key])
    (notice,) = report.notices
    assert "is damaged: it was removed" in notice
    assert [path.name[0] for path in again.files()] == ["2"]


def test_a_missing_file_is_reported(open_store):
    first = open_store().write(page("1"))
    again = open_store()
    first.files()[0].unlink()
    assert "No such file" in again.check(page("1")).notices[0]
    assert "no longer exists" in again.check(page("1")).notices[0]


def test_pages_of_another_group_are_ignored_and_left_alone(open_store):
    theirs = open_store(group=OTHER).write(page("1")).files()[0]
    mine = open_store().write(page("2"))
    moved = mine.store._folder / theirs.name
    theirs.rename(moved)
    again = open_store()
    report = again.check(page("1"), page("2"))
    assert report.checked == ("n", [page("1").key])
    assert "belongs to another model or group: ignored" in report.notices[0]
    again.store.remove([page("1").key])
    again.write(page("3"))
    assert moved.exists()


def test_unknown_files_stay_and_stale_unfinished_files_are_removed(open_store):
    folder = open_store().write(page("1")).store._folder
    stranger, fresh = folder / "notes.txt", folder / f".{'3' * 24}.01234567"
    old = folder / f".{'4' * 24}.01234567"
    for path in (stranger, fresh, old):
        path.write_text("x")
    os.utime(old, (1, 1))
    again = open_store()
    assert len(again.store.listing) == 1
    assert again.store.notices == [f"{stranger} is not a file of the prefix cache: ignored"]
    assert (stranger.exists(), fresh.exists(), old.exists()) == (True, True, False)


def test_a_page_with_two_files_keeps_one(open_store):
    first = open_store().write(page("1"))
    first.store.write(page("1"), content(first.store.metadata["mark"], 500))
    first.report(2)
    assert len(first.files()) == 2
    assert len(open_store().store.listing) == 1
    assert len(first.files()) == 1


def test_pages_of_other_groups_are_evicted_least_recently_used_first(open_store, tmp_path):
    others = open_store(group=OTHER).write(page("1"), page("2"), page("3"))
    for path, used in zip(others.files(), (30, 10, 20), strict=True):
        os.utime(path, (used, used))
    (tmp_path / "home" / "mine").mkdir()
    (tmp_path / "home" / "mine" / "rank-0").mkdir()
    stays = tmp_path / "home" / "mine" / "rank-0" / others.files()[0].name
    stays.write_text("in a folder with another kind of name")
    mine = open_store(budget_bytes=3 * SIZE)
    mine.write(page("4"))
    assert [path.name[0] for path in others.files()] == ["1", "3"]
    mine.write(page("5"), page("6"))
    assert not others.store._group_folder.exists()
    mine.write(page("7"))
    assert len(mine.files()) == 4, "the scheduler removes its own"
    mine.store.remove([page("7").key, "unknown"])
    mine.write(page("8"))
    assert [path.name[0] for path in mine.files()] == ["4", "5", "6", "8"]
    assert stays.exists()


def test_a_full_disk_is_reported_once(open_store, monkeypatch):
    monkeypatch.setattr(
        disk_store.shutil,
        "disk_usage",
        lambda _: SimpleNamespace(free=disk_store.MIN_FREE_BYTES + 10),
    )
    full = open_store()
    for letter in "12":
        full.store.write(page(letter), content("x"))
    (notice,) = full.report(1).notices
    assert "no more pages are written to disk" in notice
    assert "less than 1 GB would be left" in notice
    assert full.report(2) == PageReport(failed=page("2").key)
    assert full.files() == []


def test_a_write_that_fails_leaves_nothing(open_store, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_store.Path, "replace", fails)
    full = open_store()
    full.store.write(page("1"), content("x"))
    assert "No space left on device" in full.report(1).notices[0]
    assert full.files() == []


def test_an_unusable_folder_is_a_notice(open_store, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / GROUP).write_text("x")
    unusable = open_store()
    unusable.store.write(page("1"), content("x"))
    assert unusable.report(1).failed == page("1").key
    assert unusable.report(1).notices


def test_a_folder_that_other_users_can_read_is_not_used(open_store):
    first = open_store().write(page("1"))
    first.store._group_folder.chmod(0o750)
    again = open_store()
    assert again.store.listing is None
    (notice,) = again.store.notices
    assert notice.startswith("prefix cache on disk is disabled")
    assert "other users can access" in notice
    again.store.write(page("2"), content("x"))
    assert again.report(1).failed == page("2").key
    assert len(first.files()) == 1


def test_a_fingerprint_depends_on_the_weights_and_all_settings(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(300_000))
    os.utime(weights, (5, 5))
    fingerprints = [fingerprint(tmp_path, {"plan": 1}), fingerprint(tmp_path, {"plan": 2})]
    (tmp_path / "notes.txt").write_text("x")
    assert fingerprint(tmp_path, {"plan": 1}) == fingerprints[0]
    for offset in (0, 150_000, 299_999):
        data = bytearray(300_000)
        data[offset] = 1
        weights.write_bytes(data)
        os.utime(weights, (5, 5))
        fingerprints.append(fingerprint(tmp_path, {"plan": 1}))
    os.utime(weights, (6, 6))
    fingerprints.append(fingerprint(tmp_path, {"plan": 1}))
    (tmp_path / "config.json").write_text("{ }")
    fingerprints.append(fingerprint(tmp_path, {"plan": 1}))
    assert len(set(fingerprints)) == len(fingerprints) == 7
    assert all(len(f) == 32 for f in fingerprints)
