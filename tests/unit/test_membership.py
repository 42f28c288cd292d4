"""The head's decisions, replayed from events."""

import random

import pytest

from cenacle.cluster.membership import (
    COOLDOWN_S,
    HEARTBEAT_TIMEOUT_S,
    MAX_COOLDOWN_S,
    MAX_TRIAL_COOLDOWN_S,
    MIN_PRESENCE_S,
    PROVEN_AFTER_S,
    AddNodes,
    Disconnect,
    GroupEnded,
    GroupReady,
    GroupRequestCancelled,
    GroupRequested,
    HeartbeatReceived,
    Membership,
    NodeConnected,
    NodeDisconnected,
    NodeRegistered,
    NodeRemoved,
    NodesRejected,
    Reject,
    StartGroup,
    Tick,
    apply_event,
    describe_mismatch,
    exclusion_reason,
    ineligible_nodes,
)
from cenacle.cluster.messages import UNKNOWN_NODE

VERSIONS = {"cenacle": "1", "mlx": "2", "mlx_lm": "3"}


def replay(*events, state=None):
    state = state or Membership(VERSIONS)
    done = []
    for event in events:
        state, actions = apply_event(state, event)
        done += actions
    return state, done


def connected(node_id, at=0.0, group_id=0, **versions):
    address = f"10.0.0.{ord(node_id[0])}"
    return NodeConnected(node_id, at, {**VERSIONS, **versions}, UNKNOWN_NODE, address, group_id)


TWO = (NodeRegistered("head", "a"), NodeRegistered("n", "b"))


def test_a_group_starts_when_enough_nodes_are_connected():
    state, done = replay(*TWO, GroupRequested(2), connected("n"))
    assert (state.phase, done) == ("waiting", [])
    assert [n.reason for n in ineligible_nodes(state)] == ["has not connected yet"]
    state, done = replay(connected("head"), state=state)
    assert done == [StartGroup(1, ("head", "n"))], "the head's machine has rank 0"
    assert state.phase == "forming"
    state, done = replay(GroupReady(1), connected("x"), state=state)
    assert state.phase == "running"


def test_no_group_starts_for_a_request_that_was_given_up():
    state, done = replay(*TWO, connected("head"), GroupRequested(2), GroupRequestCancelled())
    assert (state.phase, done) == ("idle", [])
    state, done = replay(connected("n"), state=state)
    assert (state.phase, done) == ("idle", [])
    assert replay(GroupRequested(2), state=state)[1] == [StartGroup(1, ("head", "n"))]


def test_all_nodes_of_the_cluster_are_waited_for_unless_a_number_is_given():
    known = (*TWO, NodeRegistered("m", "c"), connected("head"), connected("n"))
    assert replay(*known, GroupRequested(0))[1] == []
    assert replay(*known, GroupRequested(0), connected("m"))[1] == [
        StartGroup(1, ("head", "n", "m"))
    ]
    assert replay(*known, GroupRequested(2))[1] == [StartGroup(1, ("head", "n"))]
    assert replay(NodeRegistered("head", "a"), connected("head"), GroupRequested(0))[1] == [], (
        "one is no cluster"
    )
    assert replay(NodeRegistered("head", "a"), connected("head"), GroupRequested(1))[1] == [
        StartGroup(1, ("head",))
    ]


def test_no_group_without_the_heads_own_node():
    assert (
        replay(*TWO, NodeRegistered("m", "c"), connected("n"), connected("m"), GroupRequested(2))[1]
        == []
    )


@pytest.mark.parametrize(
    ("head", "node", "reason"),
    [
        ({}, {"mlx_vlm": "4"}, ""),
        ({"mlx_vlm": "4"}, {}, ""),
        ({"mlx_vlm": "4"}, {"mlx_vlm": "4"}, ""),
        ({"mlx_vlm": "4"}, {"mlx_vlm": "5"}, "mlx_vlm 5, expected 4"),
    ],
)
def test_optional_packages_are_compared_where_both_have_them(head, node, reason):
    assert reason in describe_mismatch({**VERSIONS, **head}, {**VERSIONS, **node})
    assert bool(describe_mismatch({**VERSIONS, **head}, {**VERSIONS, **node})) == bool(reason)


def test_a_silent_node_is_lost_and_named():
    state, done = replay(
        *TWO, connected("head"), connected("n"), HeartbeatReceived("head", HEARTBEAT_TIMEOUT_S)
    )
    state, done = replay(Tick(HEARTBEAT_TIMEOUT_S + 0.1), state=state)
    assert done == [Disconnect("n", f"has sent no heartbeat for {HEARTBEAT_TIMEOUT_S:g} s")]
    assert [n.name for n in ineligible_nodes(state)] == ["b"]
    assert replay(Tick(HEARTBEAT_TIMEOUT_S + 0.2), state=state)[1] == [], "once"
    assert replay(HeartbeatReceived("n", HEARTBEAT_TIMEOUT_S + 0.3), state=state)[0] == state, (
        "it has to come again"
    )
    assert not ineligible_nodes(
        replay(connected("n", 9.0), HeartbeatReceived("head", 9.0), state=state)[0]
    )


def test_other_versions_are_rejected_with_advice():
    state, done = replay(*TWO, GroupRequested(2), connected("head"), connected("n", mlx="2.1"))
    (refuse,) = done
    assert isinstance(refuse, Reject)
    assert "mlx 2.1, expected 2" in refuse.reason
    assert "pip install cenacle==1" in refuse.reason
    assert replay(NodeDisconnected("n", "left"), connected("n"), state=state)[1] == [
        StartGroup(1, ("head", "n"))
    ]


def test_a_removed_node_cannot_reconnect():
    state, done = replay(
        *TWO,
        connected("head"),
        connected("n"),
        NodeRemoved("n"),
        NodeDisconnected("n", "x"),
        GroupRequested(2),
    )
    assert done == [Disconnect("n", "was removed from this cluster")]
    state, done = replay(connected("n"), state=state)
    assert isinstance(done[0], Disconnect)
    assert list(state.nodes) == ["head"]


def test_one_group_at_a_time_with_increasing_ids():
    state, done = replay(
        *TWO, connected("head"), connected("n"), GroupRequested(2), GroupReady(1), GroupRequested(2)
    )
    assert [a.group_id for a in done] == [1], "not while the first one is there"
    state, done = replay(GroupEnded(1), state=state)
    assert done == [StartGroup(2, ("head", "n"))]
    assert replay(GroupReady(1), GroupEnded(1), state=state)[0] == state, (
        "too late: of another group"
    )
    _, done = replay(
        *TWO,
        connected("head"),
        connected("n"),
        GroupRequested(2),
        state=Membership(VERSIONS, group_id=7),
    )
    assert done == [StartGroup(8, ("head", "n"))], "also after the head was started again"


THREE = (*TWO, NodeRegistered("m", "c"))


def heartbeats(at, *node_ids):
    """All of these are heard, and the time comes."""
    return (*(HeartbeatReceived(w, at) for w in node_ids or ("head", "n", "m")), Tick(at))


def two_of_three():
    """A group works without m, which was lost and is back since 20."""
    state, _ = replay(
        *THREE, *(connected(w) for w in ("head", "n", "m")), GroupRequested(0), GroupReady(1, 1.0)
    )
    lost = (
        NodeDisconnected("m", "is gone"),
        GroupEnded(1, 2.0, "m"),
        GroupRequested(0),
        GroupRequested(2, temporary=True),
    )
    state, done = replay(*lost, GroupReady(2, 8.0), connected("m", 20.0), state=state)
    assert done == [StartGroup(2, ("head", "n"))]
    return state


def test_a_returning_node_is_added_after_the_minimum_presence():
    state, done = replay(*heartbeats(20.0 + MIN_PRESENCE_S - 0.1), state=two_of_three())
    assert done == []
    assert "after it has been connected for 5 s" in exclusion_reason(state, state.nodes["m"])
    state, done = replay(*heartbeats(20.0 + MIN_PRESENCE_S), state=state)
    assert done == [AddNodes(2, ("m",))]
    assert exclusion_reason(state, state.nodes["m"]) == "is being added to the group"
    state, done = replay(*heartbeats(30.0), state=state)
    assert done == [], "once"
    state, done = replay(
        GroupEnded(2, 31.0), GroupRequested(0), GroupReady(3, 33.0), *heartbeats(50.0), state=state
    )
    assert done == [StartGroup(3, ("head", "n", "m"))], "an end in peace is nobody's failure"
    assert not ineligible_nodes(state)


def test_a_node_that_keeps_reconnecting_is_not_added():
    state, done = two_of_three(), []
    for n in range(20):
        at = 20.0 + 4 * n
        events = (
            NodeDisconnected("m", "is gone"),
            connected("m", at),
            *heartbeats(at + MIN_PRESENCE_S - 0.5),
        )
        state, more = replay(*events, state=state)
        done += more
    assert done == []


def test_no_more_nodes_are_added_than_requested():
    state, _ = replay(
        *THREE, connected("head"), connected("n"), GroupRequested(2), GroupReady(1, 1.0)
    )
    state, done = replay(connected("m", 2.0), *heartbeats(60.0), state=state)
    assert done == []
    assert exclusion_reason(state, state.nodes["m"]) == "is not needed: 2 nodes were requested"
    new = (NodeRegistered("x", "d"), connected("x", 2.0))  # all that are known: a new one, too
    state, done = replay(*new, *heartbeats(60.0, "head", "n", "m", "x"), state=two_of_three())
    assert done == [AddNodes(2, ("m", "x"))]


def test_nodes_that_connect_one_after_the_other_are_added_together():
    state, _ = replay(NodeRegistered("x", "d"), connected("x", 22.0), state=two_of_three())
    all_four = ("head", "n", "m", "x")
    state, done = replay(*heartbeats(25.5, *all_four), state=state)
    assert done == [], "x has not stayed long enough"
    assert replay(*heartbeats(27.5, *all_four), state=state)[1] == [AddNodes(2, ("m", "x"))]
    # One that comes and goes does not keep the other out.
    events = (NodeDisconnected("x", "is gone"), connected("x", 34.0), *heartbeats(35.5, *all_four))
    assert replay(*events, state=state)[1] == [AddNodes(2, ("m",))]


def test_the_cooldown_doubles_with_every_failed_join():
    state, now, rests = two_of_three(), 25.0, []
    for number in range(3, 21, 2):
        state, done = replay(*heartbeats(now), state=state)
        assert done == [AddNodes(number - 1, ("m",))]
        now += 1
        events = (
            GroupEnded(number - 1, now),
            GroupRequested(0),
            GroupReady(number, now),
            *heartbeats(now + 2),
        )
        state, done = replay(
            *events, GroupEnded(number, now + 3, "m"), GroupRequested(0), state=state
        )
        assert done == [StartGroup(number, ("head", "n", "m"))], "not at once with m again"
        (node,) = ineligible_nodes(state)
        assert node.connected
        assert "the group failed after it had joined" in node.reason
        rests.append(node.cooldown_until_s - now - 3)
        now += 9
        less = (GroupRequested(2, temporary=True), GroupReady(number + 1, now))
        state, done = replay(*less, state=state)
        assert done == [StartGroup(number + 1, ("head", "n"))]
        now = max(now + MIN_PRESENCE_S, node.cooldown_until_s)
    assert rests == [min(MAX_COOLDOWN_S, COOLDOWN_S * 2**n) for n in range(9)]
    # A minute of work, and it is as good as any other.
    events = (
        *heartbeats(now),
        GroupEnded(20, now),
        GroupRequested(0),
        GroupReady(21, now),
        *heartbeats(now + PROVEN_AFTER_S),
    )
    state, _ = replay(*events, GroupEnded(21, now + 99, "m"), state=state)
    assert not ineligible_nodes(state)


def test_which_node_is_blamed_for_a_group_that_failed_after_a_join():
    state, _ = replay(
        *heartbeats(25.0), GroupEnded(2, 26.0), GroupRequested(0), state=two_of_three()
    )
    assert state.members == ("head", "n", "m")
    for blamed, resting in (("m", ["c"]), ("", ["c"]), ("n", []), (None, [])):
        after, _ = replay(GroupEnded(3, 27.0, blamed), state=state)
        assert [n.name for n in ineligible_nodes(after)] == resting, blamed
    after, _ = replay(
        GroupEnded(3, 27.0, "m"),
        NodeDisconnected("m", "is gone"),
        connected("m", 29.0),
        state=state,
    )
    assert "is excluded for 10 s" in after.nodes["m"].reason, "also when it comes again"
    assert not ineligible_nodes(replay(*heartbeats(37.0), state=after)[0])


def test_a_rejected_node_does_not_disturb_the_group():
    state, _ = replay(*heartbeats(25.0), state=two_of_three())
    state, done = replay(
        NodesRejected(("m",), 26.0, "it has another model"), *heartbeats(35.0), state=state
    )
    assert done == []
    assert state.running
    assert state.nodes["m"].reason == "is excluded for 10 s: it has another model"
    assert replay(*heartbeats(36.0), state=state)[1] == [AddNodes(2, ("m",))]


def test_the_cooldown_after_failed_trials_is_at_most_a_minute():
    """Trying costs nobody: unlike one that broke a group it does not rest for ever longer."""
    state, now, rests = two_of_three(), 25.0, []
    for _ in range(5):
        state, done = replay(*heartbeats(now), state=state)
        assert done == [AddNodes(2, ("m",))]
        state, _ = replay(NodesRejected(("m",), now, "its disk is full"), state=state)
        rests.append(state.nodes["m"].cooldown_until_s - now)
        now = state.nodes["m"].cooldown_until_s
    assert rests == [
        COOLDOWN_S,
        2 * COOLDOWN_S,
        4 * COOLDOWN_S,
        MAX_TRIAL_COOLDOWN_S,
        MAX_TRIAL_COOLDOWN_S,
    ]
    state, _ = replay(*heartbeats(now), NodesRejected(("m",), now, "its disk is full"), state=state)
    again = (
        NodeDisconnected("m", "is gone"),
        connected("m", now + 1),
        *heartbeats(now + 1 + MIN_PRESENCE_S),
    )
    state, done = replay(*again, state=state)
    assert done == [AddNodes(2, ("m",))], "whoever started it again may have seen to it"


def test_a_node_that_connects_while_another_is_added_waits():
    state, _ = replay(
        *heartbeats(25.0), NodeRegistered("x", "d"), connected("x", 25.5), state=two_of_three()
    )
    state, done = replay(GroupEnded(2, 26.0), GroupRequested(0), state=state)
    assert done == [StartGroup(3, ("head", "n", "m"))], "x has not been tried"
    state, done = replay(GroupReady(3, 28.0), *heartbeats(34.0, "head", "n", "m", "x"), state=state)
    assert done == [AddNodes(3, ("x",))]
    # If who was chosen is gone, whoever is here will do.
    events = (
        *heartbeats(25.0),
        NodeRegistered("x", "d"),
        connected("x", 25.5),
        NodeDisconnected("m", "is gone"),
        GroupEnded(2, 26.0),
    )
    state, done = replay(*events, GroupRequested(3), state=two_of_three())
    assert done == [AddNodes(2, ("m",)), StartGroup(3, ("head", "n", "x"))]


def test_a_head_with_an_old_roster_does_not_use_an_id_twice():
    events = (*TWO, connected("head"), connected("n", group_id=41), GroupRequested(2))
    assert replay(*events)[1] == [StartGroup(42, ("head", "n"))]


def test_names_are_unique():
    state, _ = replay(
        NodeRegistered("head", "mac"), NodeRegistered("x", "mac"), NodeRegistered("y", "mac")
    )
    assert [n.name for n in state.nodes.values()] == ["mac", "mac-2", "mac-3"]


@pytest.mark.parametrize("seed", range(20))
def test_invariants_hold_for_random_events(seed):
    dice = random.Random(seed)
    state, now, epochs, formed = Membership(VERSIONS), 0.0, [], None
    log = []
    for _ in range(400):
        now += dice.random()
        node_id = dice.choice(["head", "a", "b", "c"])
        event = dice.choice(
            [
                NodeRegistered(node_id, dice.choice("xy")),
                connected(node_id, now, mlx=dice.choice("2229")),
                connected("head", now),
                HeartbeatReceived(node_id, now),
                NodeDisconnected(node_id, "gone"),
                NodeRemoved(dice.choice("abc")),
                GroupRequested(dice.choice([0, 1, 2, 3])),
                GroupReady(dice.choice([formed or 0, 1])),
                GroupEnded(dice.choice([formed or 0, 1]), now, dice.choice(["", "a", None])),
                NodesRejected(("a", "b"), now, "it is"),
                Tick(now),
            ]
        )
        log.append(event)
        before = state
        state, actions = apply_event(state, event)
        for action in actions:
            if isinstance(action, StartGroup):
                assert not before.members or isinstance(event, GroupEnded), "two groups"
                assert all(state.nodes[m].eligible for m in action.members)
                assert action.members[0] == next(iter(state.nodes))
                epochs.append(action.group_id)
                formed = action.group_id
            if isinstance(action, AddNodes):
                assert before.running
                assert action.group_id == formed
                assert not set(action.ids) & set(state.members)
                assert all(state.nodes[m].eligible for m in action.ids)
    assert epochs == sorted(set(epochs))
    assert epochs, "this tests something"
    assert replay(*log)[0] == state
