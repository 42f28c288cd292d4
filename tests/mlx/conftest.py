"""What several tests of the native extension share."""

import pytest

from cenacle import native

KERNELS = native.extension().available_kernels() if native.is_available() else ["none"]


@pytest.fixture(params=KERNELS)
def kernels(request):
    """The extension, with each set of kernels that this processor has."""
    if not native.is_available():
        pytest.skip(native.unavailable_reason())
    module = native.extension()
    before = module.selected_kernels()
    module.select_kernels(request.param)
    yield module
    module.select_kernels(before)
