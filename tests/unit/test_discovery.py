"""Which head is meant, of those that were found; real multicast is in `tests/hosts`."""

import pytest

from cenacle.cluster.discovery import Announced, Found, choose
from cenacle.errors import ClusterError, InputError

ONE, TWO = Found("one", "10.0.0.1", 4747), Found("two", "10.0.0.2", 4747)


def test_the_only_head_is_meant_and_several_are_asked_about():
    assert choose([ONE]) == ONE
    assert choose([ONE, TWO], "two") == TWO
    with pytest.raises(InputError, match=r"one .10.0.0.1:4747., two .10.0.0.2:4747.; say which"):
        choose([ONE, TWO])
    with pytest.raises(InputError, match="no head is called three; there are: one"):
        choose([ONE, TWO], "three")
    with pytest.raises(ClusterError, match="no head was found in this network"):
        choose([])


def test_what_listens_on_this_machine_only_is_not_announced():
    said = []
    announced = Announced("one", ["127.0.0.1", "::1"], 4747, said.append)
    assert not announced._thread.is_alive()
    announced.close()
    assert said == []
