"""The bounded history of a cluster: minutes, and faults from the states of recovery."""

from cenacle.scheduler import recovery
from cenacle.server.cluster_history import MAX_FAULTS, MAX_MINUTES, ClusterHistory, Sample

START = 1_000_000.0  # seconds since 1970, at 100 s of the monotonic clock


def history():
    return ClusterHistory(2.0, 100.0, START)


def test_minutes_are_means_and_maxima_and_bounded():
    kept = history()
    for n in range(1, 31):
        free_bytes = 500 - n if n > 10 else None
        kept.add_sample(100.0 + 2 * n, Sample(float(n), n % 3, n, 10.0 * n, free_bytes))
    timeline = kept.timeline_json()
    assert timeline["tokens_per_s"] == [15.5]
    assert (timeline["running"], timeline["waiting"]) == ([2], [30])
    assert (timeline["sent_bytes_per_s"], timeline["disk_free_bytes"]) == ([155], [470])
    assert timeline["until"] == START + 60
    assert kept.timeline_json(timeline["version"]) is None
    assert kept.recent_json()["tokens_per_s"] == [float(n) for n in range(1, 31)]
    for n in range(2 * MAX_MINUTES):
        kept.add_sample(1000.0 + 60 * n, Sample(1.0, 0, 0))
    for name in Sample._fields:
        assert len(kept.timeline_json()[name]) == MAX_MINUTES
        assert len(kept.recent_json()[name]) == 150
    assert kept.timeline_json()["disk_free_bytes"][-1] is None


def test_faults_are_kept_with_their_times_and_reasons():
    kept, state = history(), recovery.RecoveryState(since_s=100.0)
    kept.observe(state)
    state = recovery.apply(state, recovery.RanksLost(110.0, "rank 1 was killed", 1))
    kept.observe(state)
    (fault,) = kept.timeline_json()["faults"]
    assert fault == {
        "began_at": START + 10,
        "ended_at": None,
        "reason": "rank 1 was killed",
        "rank": 1,
        "is_final": False,
    }
    state = recovery.apply(state, recovery.Started(114.0))
    kept.observe(state)
    assert kept.timeline_json()["faults"][0]["ended_at"] == START + 14
    # Between two observations: two faults, of which the last one's reason is known.
    for at in (120.0, 122.0):
        state = recovery.apply(state, recovery.RanksLost(at, f"lost at {at:g}", 0))
        state = recovery.apply(state, recovery.Started(at + 1))
    kept.observe(state)
    faults = kept.timeline_json()["faults"]
    assert [f["reason"] for f in faults] == ["rank 1 was killed", "lost at 122", "lost at 122"]
    # Seen recovering, then recovered and lost again before the next look.
    state = recovery.apply(state, recovery.GroupFailed(130.0, "given up", None))
    kept.observe(state)
    assert kept.timeline_json()["faults"][-1]["is_final"]
    version = kept.timeline_json()["version"]
    kept.observe(state)
    assert kept.timeline_json(version) is None


def test_faults_are_bounded():
    kept = history()
    kept.observe(recovery.RecoveryState(recoveries=10 * MAX_FAULTS))
    assert len(kept.timeline_json()["faults"]) == MAX_FAULTS
