"""What one client may use: sizes and deadlines of the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..images.fetch import AllowedHosts


@dataclass(frozen=True)
class Limits:
    """Sizes and deadlines. Times are in seconds.

    Args:
        max_body_bytes: size of a request's body.
        max_image_body_bytes: the same where the model sees images, of which a chat has all.
        max_messages: messages of a chat; a template takes time for each while others wait.
        max_connections: open at once; the oldest idle one makes room for a new one.
        max_connections_per_address: the same for each client address.
        head_timeout_s: to receive a request's head.
        body_timeout_s: to receive a request's body.
        write_timeout_s: for which a client may leave a full send buffer unread.
        tls_handshake_timeout_s: to complete a connection's TLS handshake.
        keep_alive_s: for which an idle connection is kept between requests.
        stream_keep_alive_s: without a token after which a stream sends a keep-alive.
        token_timeout_s: without a token after which an answer is aborted; the group has a shorter
            deadline of its own.
        shutdown_timeout_s: that running requests get to finish when the server is told to stop.
        max_image_pixels: of an image as the model sees it, where its checkpoint allows more.
        image_hosts: from which images may be fetched.
        max_drained_bytes: how much of an oversized body is read and discarded, so that a client
            that sends everything before it reads still sees the refusal.
    """

    max_body_bytes: int = 10_000_000
    max_image_body_bytes: int = 32_000_000
    max_messages: int = 10_000
    max_connections: int = 4096
    max_connections_per_address: int = 1024
    head_timeout_s: float = 30.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    tls_handshake_timeout_s: float = 10.0
    keep_alive_s: int = 75
    stream_keep_alive_s: float = 3.0
    token_timeout_s: float = 900.0
    shutdown_timeout_s: int = 5
    max_drained_bytes: int = 100_000_000
    max_image_pixels: int = 1 << 20
    image_hosts: AllowedHosts = field(default_factory=AllowedHosts)
