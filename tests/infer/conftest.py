"""What several files of tests of `infer compare` share."""

import pytest

from tests.support.compared import copied, make_runs


@pytest.fixture(scope="session")
def made(tmp_path_factory, small_cache, tiny_sd):
    """Two runs with all that they write while they train. Do not write into them."""
    return make_runs(tmp_path_factory.mktemp("runs"), tiny_sd, small_cache)


@pytest.fixture
def runs(made, tmp_path):
    """The two runs, to spoil."""
    return {name: copied(run, tmp_path / "runs" / name) for name, run in made.items()}
