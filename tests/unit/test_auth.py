import sqlite3
import stat
import threading

import pytest

from cenacle.errors import InputError
from cenacle.server.auth import DAY_S, ApiKey, KeyStore


class Clock:
    now = 20_000.0 * DAY_S + 100

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def keys(tmp_path):
    made = KeyStore(tmp_path / "keys.db", Clock())
    yield made
    made.close()


def test_a_secret_finds_only_its_own_key(keys):
    alice, bob = keys.add("alice", 1000, 2), keys.add("bob")
    assert keys.find(alice) == ApiKey("alice", Clock.now, 1000, 2)
    assert keys.find(bob).name == "bob"
    assert alice != bob
    assert len(alice) > 40
    for wrong in ("", "alice", alice[:-1], alice + "A", alice.upper(), "\xff\xfe", "\x00"):
        assert keys.find(wrong) is None
    keys.remove("alice")
    assert keys.find(alice) is None
    assert [k.name for k in keys.list_keys()] == ["bob"]


def test_only_the_owner_can_read_the_file_and_it_holds_no_secret(keys):
    secret = keys.add("alice")
    files = list(keys.path.parent.iterdir())
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}
    held = b"".join(f.read_bytes() for f in files)
    assert b"alice" in held
    assert secret.encode() not in held
    assert secret.removeprefix("cen-").encode() not in held


def test_a_readable_file_is_made_private(tmp_path):
    path = tmp_path / "keys.db"
    path.touch()
    path.chmod(0o644)
    KeyStore(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_changes_of_another_process_are_visible_at_once(keys):
    other = KeyStore(keys.path, Clock())
    secret = other.add("late")
    assert keys.find(secret).name == "late"
    other.remove("late")
    assert keys.find(secret) is None
    other.close()


def test_tokens_are_counted_by_day_over_restarts_and_processes(keys):
    clock = keys._clock
    keys.add("alice", 100)
    keys.charge("alice", 30)
    assert keys.used_today("alice") == 30
    keys.save()
    keys.charge("alice", 1)
    other = KeyStore(keys.path, clock)
    assert other.used_today("alice") == 30
    other.charge("alice", 5)
    other.close()
    assert keys.used_today("alice") == 36
    keys.close()
    again = KeyStore(keys.path, clock)
    assert again.used_today("alice") == 36
    assert again.seconds_until_reset() == DAY_S - 100
    clock.now += DAY_S
    assert again.used_today("alice") == 0
    clock.now -= DAY_S
    again.remove("alice")
    again.add("alice", 100)
    assert again.used_today("alice") == 36  # a new key is no new budget
    again.close()


def test_concurrent_charges_are_all_counted(keys):
    def charge() -> None:
        for _ in range(200):
            keys.charge("alice", 1)
            keys.save()

    threads = [threading.Thread(target=charge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert keys.used_today("alice") == 800


def test_wrong_names_and_limits_are_refused(keys):
    keys.add("alice")
    for name in ("", "a b", "a" * 65, "-x", "a\n", "é", "../x"):
        with pytest.raises(InputError, match="name"):
            keys.add(name)
    with pytest.raises(InputError, match="already"):
        keys.add("alice")
    with pytest.raises(InputError, match="tokens-per-day"):
        keys.add("bob", 0)
    with pytest.raises(InputError, match="keys list"):
        keys.remove("nobody")


def test_a_file_that_is_not_a_key_store_is_refused(tmp_path):
    path = tmp_path / "keys.db"
    path.write_text("not a database" * 100)
    with pytest.raises(InputError, match="keys add NAME"):
        KeyStore(path)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE keys (a)")
    db.close()
    with pytest.raises(InputError, match=r"other\.db"):
        KeyStore(other)


def test_a_key_may_be_limited_to_models(keys):
    secret = keys.add("carol", models=["b", "a", "b"])
    found = keys.find(secret)
    assert found.models == ("a", "b")
    assert found.may_use("x", "b")
    assert not found.may_use("x")
    assert keys.list_keys() == [found]
    keys.remove("carol")
    free = keys.find(keys.add("carol"))
    assert free.models == ()
    assert free.may_use("x")
    with pytest.raises(InputError, match="the name of a model"):
        keys.add("dave", models=[""])
