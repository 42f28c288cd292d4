"""Requests of tests, as `httpx.get` and `httpx.post` make them, each with a connection of its own.

Those read the system's certificates at each call, which takes longer than a tiny model's answer.
"""

import httpx

from support.polling import DEADLINE_S

HTTP = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=DEADLINE_S)
