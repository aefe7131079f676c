"""The fixture `lines`: one world of line pods for a whole session, whichever test files ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lines import Lines
from midstream_testbed.fleet import Fleet
from midstream_testbed.vpc import Vpc


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lines]:
    with Vpc.create() as vpc, Fleet(vpc, tmp_path_factory.mktemp("lines")) as fleet:
        yield Lines.build(vpc, fleet)
