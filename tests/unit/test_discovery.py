"""Which head is meant, of those that were found; real multicast is in `tests/hosts`."""

import pytest

from cenacle.cluster.discovery import DiscoveredHead, HeadAnnouncement, choose_head
from cenacle.errors import ClusterError, InputError

ONE, TWO = DiscoveredHead("one", "10.0.0.1", 4747), DiscoveredHead("two", "10.0.0.2", 4747)


def test_the_only_head_is_chosen_and_several_need_a_name():
    assert choose_head([ONE]) == ONE
    assert choose_head([ONE, TWO], "two") == TWO
    with pytest.raises(InputError, match=r"one .10.0.0.1:4747., two .10.0.0.2:4747.; choose one"):
        choose_head([ONE, TWO])
    with pytest.raises(InputError, match=r"expected one of one .*, got three"):
        choose_head([ONE, TWO], "three")
    with pytest.raises(ClusterError, match="no head was found by mDNS"):
        choose_head([])


def test_a_head_on_the_loopback_device_is_not_announced():
    failures = []
    announcement = HeadAnnouncement("one", ["127.0.0.1", "::1"], 4747, failures.append)
    assert not announcement._thread.is_alive()
    announcement.close()
    assert failures == []
