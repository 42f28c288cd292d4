"""The service that lets a node rejoin its cluster after a restart: launchd or systemd.

Owns: the text of the service file.
Does not know: whether it is enabled; `cenacle join --service` writes the file.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from xml.sax.saxutils import escape


def service_file(home: Path, platform: str = sys.platform) -> tuple[Path, str, str]:
    """The service that runs `cenacle join` when the machine starts.

    Args:
        home: CENACLE_HOME of the service.
        platform: as `sys.platform`.

    Returns:
        Path and contents of the file, and the command that enables the service.
    """
    command = [sys.executable, "-m", "cenacle", "join"]
    if platform == "darwin":  # never run; the tests read the text
        path = Path.home() / "Library" / "LaunchAgents" / "org.cenacle.join.plist"
        arguments = "".join(f"    <string>{escape(p)}</string>\n" for p in command)
        text = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" '
            '"http://www.apple.com/DTDs/PropertyList-1.0.dtd">\n'
            '<plist version="1.0">\n<dict>\n'
            "  <key>Label</key><string>org.cenacle.join</string>\n"
            f"  <key>ProgramArguments</key>\n  <array>\n{arguments}  </array>\n"
            "  <key>EnvironmentVariables</key>\n"
            f"  <dict><key>CENACLE_HOME</key><string>{escape(str(home))}</string></dict>\n"
            "  <key>RunAtLoad</key><true/>\n"
            "  <key>KeepAlive</key><dict><key>SuccessfulExit</key><false/></dict>\n"
            "  <key>StandardErrorPath</key>"
            f"<string>{escape(str(home / 'agent.log'))}</string>\n"
            "</dict>\n</plist>\n"
        )
        return path, text, f"launchctl load -w {shlex.quote(str(path))}"
    path = Path.home() / ".config" / "systemd" / "user" / "cenacle-join.service"
    quoted = " ".join(f'"{_escape_systemd(p)}"' for p in command)
    text = (
        "[Unit]\nDescription=Agent of this node in a Cenacle cluster\n"
        "After=network-online.target\n\n"
        f'[Service]\nExecStart={quoted}\nEnvironment="CENACLE_HOME={_escape_systemd(str(home))}"\n'
        "Restart=on-failure\nRestartSec=5\n\n"
        "[Install]\nWantedBy=default.target\n"
    )
    enable = f"systemctl --user enable --now {path.name}; loginctl enable-linger"
    return path, text, enable


def _escape_systemd(text: str) -> str:
    """For use between quotes in a unit file."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
