"""What several tests of the native extension share."""

import pytest

from cenacle import native

KERNELS = native.module().kernels() if native.available() else ["none"]


@pytest.fixture(params=KERNELS)
def kernels(request):
    """The extension, with each set of kernels that this processor has."""
    if not native.available():
        pytest.skip(native.why_not())
    module = native.module()
    before = module.used()
    module.use(request.param)
    yield module
    module.use(before)
