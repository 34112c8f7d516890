"""Every test runs on eight simulated CPU devices, whatever the machine has."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

import jax  # noqa: E402
import pytest  # noqa: E402

# LLVM's expensive passes make tiny programs no faster, and take half of the suite's time. What tests start as
# processes of their own is compiled as a user's is.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """Double precision inside one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing that tests prepare or compile reaches the user's cache."""
    os.environ["BIGMODEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
