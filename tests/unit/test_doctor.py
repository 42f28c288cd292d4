"""What the system's own tools say, as they were recorded, and what the doctor makes of it."""

import json
import threading
import time
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from cenacle.cli.main import make_app
from cenacle.cluster import doctor
from cenacle.cluster.doctor import HostFacts, examine

# A Mac Studio as it should be.
IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\tinet 127.0.0.1 netmask 0xff000000
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\toptions=50b<RXCSUM,TXCSUM,VLAN_HWTAGGING,AV,CHANNEL_IO>
\tinet 192.168.1.10 netmask 0xffffff00 broadcast 192.168.1.255
\tmedia: autoselect (10Gbase-T <full-duplex>)
\tstatus: active
en1: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1280
\tinet 192.168.1.11 netmask 0xffffff00 broadcast 192.168.1.255
\tmedia: autoselect
\tstatus: active
"""
PORTS = """\

Hardware Port: Ethernet
Device: en0
Ethernet Address: aa:bb:cc:dd:ee:ff

Hardware Port: Wi-Fi
Device: en1
Ethernet Address: aa:bb:cc:dd:ee:fe
"""
PMSET = """\
System-wide power settings:
Currently in use:
 standby              0
 powernap             1
 lowpowermode         0
 sleep                0
 womp                 1
"""
BRIDGE = """\
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tmember: en2 flags=3<LEARNING,DISCOVER>
\tmedia: <unknown type>
\tstatus: inactive
"""
FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"
OUTPUTS = {
    "sysctl -n hw.memsize": "274877906944\n",
    "sysctl -n iogpu.wired_limit_mb": "229376\n",
    "sysctl -n vm.swapusage": "total = 0.00M  used = 0.00M  free = 0.00M  (encrypted)\n",
    "sw_vers -productVersion": "26.3\n",
    "memory_pressure -Q": "The system has 274877906944 (16777216 pages with a page size of "
    "16384).\n"
    "System-wide memory free percentage: 84%\n",
    "pmset -g": PMSET,
    "pmset -g therm": "Note: No thermal warning level has been recorded\n"
    "Note: No performance warning level has been recorded\n",
    "pmset -g batt": "Now drawing from 'AC Power'\n",
    "system_profiler SPThunderboltDataType": "      Speed: Up to 80 Gb/s\n  Thunderbolt 5 Bus:\n",
    "ibv_devices": "    device                 node GUID\n    ------              -----------\n"
    "    rdma_en2            8005c2d1a5a50000\n    rdma_en3            8005c2d1a5a50001\n",
    "ifconfig": IFCONFIG,
    "ifconfig bridge0": BRIDGE,
    "networksetup -listallhardwareports": PORTS,
    "route": "   route to: default\n  gateway: 192.168.1.1\n  interface: en0\n",
    f"{FIREWALL} --getglobalstate": "Firewall is disabled. (State = 0)\n",
    f"{FIREWALL} --getblockall": "Firewall has block all state set to disabled.\n",
}
MAC = HostFacts("Darwin", OUTPUTS, versions={"mlx": ("0.32.4", "0.32.4")}, clock_skew_s=0.3)
LINUX = HostFacts(
    "Linux",
    {
        "/proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "timedatectl show -p NTPSynchronized --value": "yes\n",
        "ufw status": "Status: inactive\n",
        "route": "default via 10.0.0.1 dev eth0 proto dhcp src 10.0.0.5 metric 100\n",
        "/sys/class/net/eth0/mtu": "1500\n",
        "/sys/class/net/eth0/speed": "10000\n",
    },
    versions={"mlx": ("0.32.4", "0.32.4")},
)


def test_good_findings():
    for facts in (MAC, LINUX):
        found = examine(facts)
        assert [f.level for f in found] == ["good"] * len(found)
        assert all(f.message.endswith(".") and not f.fix for f in found)
    assert "Ethernet (en0), 10000 Mbit/s, MTU 1500" in " ".join(f.message for f in examine(MAC))
    assert "rdma_en2, rdma_en3" in " ".join(f.message for f in examine(MAC))


def test_missing_facts_are_no_findings():
    assert examine(HostFacts("Darwin")) == examine(HostFacts("Linux")) == []


CASES = [
    (
        MAC,
        {"sysctl -n iogpu.wired_limit_mb": "0\n"},
        "warning",
        "about 75 % of this Mac's 274.9 GB",
        "sudo sysctl iogpu.wired_limit_mb=222823",
    ),
    (
        MAC,
        {"sysctl -n iogpu.wired_limit_mb": "260000\n"},
        "bad",
        "leaves the system 2.25 GB",
        "iogpu.wired_limit_mb=222822",
    ),
    (
        MAC,
        {"memory_pressure -Q": "System-wide memory free percentage: 12%"},
        "warning",
        "12 %",
        "Quit",
    ),
    (MAC, {"memory_pressure -Q": "System-wide memory free percentage: 3%"}, "bad", "3 %", "Quit"),
    (
        MAC,
        {"sysctl -n vm.swapusage": "total = 8192.00M  used = 5000.50M  free = 3191.50M"},
        "warning",
        "5.24 GB of memory are swapped to disk",
        "--node-weights",
    ),
    (
        MAC,
        {"pmset -g therm": "CPU_Scheduler_Limit \t= 100\nCPU_Speed_Limit \t= 70\n"},
        "warning",
        "hot",
        "cooling",
    ),
    (
        MAC,
        {"pmset -g": PMSET.replace("lowpowermode         0", "lowpowermode         1")},
        "warning",
        "Low Power Mode",
        "pmset -a lowpowermode 0",
    ),
    (
        MAC,
        {"pmset -g": PMSET.replace(" sleep                0", " sleep                10")},
        "warning",
        "sleeps after 10 minutes",
        "pmset -c sleep 0",
    ),
    (MAC, {"pmset -g batt": "Now drawing from 'Battery Power'\n"}, "warning", "battery", "Plug"),
    (MAC, {"sw_vers -productVersion": "26.1\n"}, "warning", "macOS 26.1 has no RDMA", "26.2"),
    (
        MAC,
        {"ibv_devices": "    device                 node GUID\n"},
        "warning",
        "RDMA over Thunderbolt is off",
        "rdma_ctl enable",
    ),
    (
        MAC,
        {"ifconfig bridge0": BRIDGE.replace("inactive", "active")},
        "warning",
        "bridge is active",
        "inactive",
    ),
    (MAC, {"route": "  interface: en1\n"}, "bad", "Wi-Fi (en1)", "cable"),
    (MAC, {"route": "  interface: en1\n"}, "warning", "1280 bytes", "1500"),
    (MAC, {"ifconfig": IFCONFIG.replace("10Gbase-T", "100baseTX")}, "bad", "100 Mbit/s", "cable"),
    (
        MAC,
        {f"{FIREWALL} --getblockall": "Firewall has block all state set to enabled.\n"},
        "bad",
        "blocks all incoming",
        "allow",
    ),
    (
        MAC,
        {f"{FIREWALL} --getglobalstate": "Firewall is enabled. (State = 1)\n"},
        "warning",
        "firewall is on",
        "Allow it",
    ),
    (
        replace(LINUX, memory_bytes=65_000_000 << 10, available_bytes=600_000 << 10),
        {},
        "warning",
        "614.4 MB of 66.6 GB",
        "Quit",
    ),
    (
        LINUX,
        {"/proc/pressure/memory": "some avg10=40.00 avg60=22.50 avg300=9.00 total=9\n"},
        "bad",
        "22 % of the last minute",
        "--node-weights",
    ),
    (
        LINUX,
        {"/sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"},
        "warning",
        "Large pages are off",
        "madvise",
    ),
    (
        LINUX,
        {"/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n"},
        "warning",
        "powersave",
        "performance",
    ),
    (
        LINUX,
        {"/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "17\n"},
        "warning",
        "17 times",
        "cooling",
    ),
    (
        LINUX,
        {"timedatectl show -p NTPSynchronized --value": "no\n"},
        "warning",
        "not synchronized by NTP",
        "set-ntp",
    ),
    (
        LINUX,
        {"route": "10.0.0.9 dev wlan0 src 10.0.0.5", "/sys/class/net/wlan0/wireless": ""},
        "bad",
        "Wi-Fi (wlan0)",
        "cable",
    ),
    (LINUX, {"/sys/class/net/eth0/speed": "100\n"}, "bad", "eth0 runs at 100 Mbit/s", "cable"),
    (LINUX, {"/sys/class/net/eth0/mtu": "1400\n"}, "warning", "1400 bytes", "1500"),
    (
        LINUX,
        {"ufw status": "Status: active\n\nTo   Action   From\n"},
        "warning",
        "ufw",
        "ufw allow",
    ),
    (LINUX, {"firewall-cmd --state": "running\n"}, "warning", "firewalld", "firewall-cmd"),
]


@pytest.mark.parametrize(("well", "outputs", "level", "message", "fix"), CASES)
def test_each_problem_is_found(well, outputs, level, message, fix):
    facts = replace(well, outputs={**well.outputs, **outputs})
    findings = [f for f in examine(facts) if f.level != "good"]
    assert any(f.level == level and message in f.message and fix in f.fix for f in findings), (
        findings
    )
    assert len(findings) <= 2  # and nothing else: en1 is both Wi-Fi and small


@pytest.mark.parametrize(
    ("change", "level", "what"),
    [
        ({"env": {"MLX_METAL_FAST_SYNCH": "1"}}, "bad", "MLX_METAL_FAST_SYNCH is set"),
        ({"max_open_files": 256}, "warning", "256 files"),
        ({"free_disk_bytes": 3 * 10**9}, "warning", "3.00 GB are free"),
        (
            {"versions": {"mlx": ("0.31.0", "0.32.4")}},
            "bad",
            "needs mlx 0.32.4, but 0.31.0 is installed",
        ),
        (
            {"versions": {"mlx-lm": (None, "0.32.2")}},
            "bad",
            "mlx-lm 0.32.2, but none is installed",
        ),
        ({"clock_skew_s": 95.0}, "bad", "95 s ahead of"),
        ({"clock_skew_s": -95.0}, "bad", "95 s behind"),
        ({"unreachable_head": "two:80"}, "bad", "two:80 does not answer"),
    ],
)
def test_each_problem_of_any_system_is_found(change, level, what):
    found = [f for f in examine(replace(LINUX, **change)) if f.level != "good"]
    assert [(f.level, what in f.message, bool(f.fix)) for f in found] == [(level, True, True)]


def test_missing_kernels_are_reported():
    found = examine(replace(LINUX, kernels_unavailable_reason="no compiler"))
    assert any("no compiler" in f.message for f in found if f.level == "warning")


def test_the_worst_comes_first():
    facts = replace(LINUX, max_open_files=256, clock_skew_s=99.0)
    assert [f.level for f in examine(facts)][:3] == ["bad", "warning", "good"]


@pytest.mark.parametrize("ahead_s", [0, 3600])
def test_the_clock_of_the_head_is_compared(ahead_s):
    class Head(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response_only(503)
            self.send_header("Date", formatdate(time.time() + ahead_s, usegmt=True))
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Head) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        facts = doctor.gather(f"127.0.0.1:{server.server_port}")
        thread.join(120)
    assert facts.clock_skew_s == pytest.approx(ahead_s, abs=3)


@pytest.mark.parametrize("head", ["127.0.0.1:1", "127.0.0.1:x", "no-such-host.invalid"])
def test_a_head_that_does_not_answer_is_a_problem(head):
    assert doctor.gather(head).unreachable_head == head


def test_the_command_checks_this_machine(monkeypatch):
    result = CliRunner().invoke(make_app(), ["doctor", "--json"])
    report = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == (0 if report["healthy"] else 1)
    assert any("Versions match" in f["message"] for f in report["findings"])
    monkeypatch.setattr(doctor, "gather", lambda _: replace(LINUX, clock_skew_s=500.0))
    result = CliRunner().invoke(make_app(), ["doctor"])
    assert result.exit_code == 1
    assert "NTP" in result.stdout
    monkeypatch.setattr(doctor, "gather", lambda _: LINUX)
    result = CliRunner().invoke(make_app(), ["doctor"])
    assert result.exit_code == 0
    assert "No problems found" in result.stdout
