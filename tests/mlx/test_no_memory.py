"""What MLX does when there is no memory, against the words that are found for it."""

import subprocess
import sys

from cenacle.ranks import exit_reason


def test_what_mlx_does_where_memory_is_refused():
    """Told by its own words, as MLX's are not: it writes to where no memory is."""
    program = "import mlx.core as mx; mx.eval(mx.zeros((10**7, 10**7)) + 1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    if done.returncode < 0:
        assert "when the system refuses it memory" in exit_reason.describe_exit(done.returncode)
    else:
        assert exit_reason.describe_error(RuntimeError(done.stderr.decode())).startswith(
            "ran out of memory"
        )
