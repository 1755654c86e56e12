"""Test-wide settings: a compilation cache, four simulated CPU devices, and the real speech where it is at hand."""

import os
import pathlib
import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "qsv-test-jax-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Most programs here run once or a few times, and take longer to optimize than that saves.
jax.config.update("jax_disable_most_optimizations", True)


# Of the 65,530 memory maps that a process has on Linux.
_MANY_MAPS = 25_000


@pytest.fixture(autouse=True, scope="module")
def _without_programs_of_other_modules():
    """Every compiled program takes memory maps; past their limit the next one crashes the process."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > _MANY_MAPS:
        jax.clear_caches()


@pytest.fixture
def optimized_programs():
    """Programs as users have them, for a test whose figures may hang on a rounding."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


DEFAULT_DATA_DIR = pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def speech_dir() -> pathlib.Path:
    """Folder with `an4/`, `librispeech251/`, `emodb/` and `noise/`; set QSV_TEST_DATA to move it."""
    folder = pathlib.Path(os.environ.get("QSV_TEST_DATA", DEFAULT_DATA_DIR)).resolve()
    if not (folder / "an4").is_dir():
        pytest.skip(f"no real speech in {folder}; set QSV_TEST_DATA to a folder with an4/, librispeech251/, noise/")
    return folder
