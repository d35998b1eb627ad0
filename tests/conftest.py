"""What every test shares: a cache directory of its own, away from the user's."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator


# Nothing is judged by the clock: a machine that is busy with something else is slow, not wrong.
settings.register_profile("kvmtool", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvmtool")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes and sizes that tests remember must not come from, or reach, the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMTOOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("KVMTOOL_KERNEL", "KVMTOOL_CORE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def signals_heard() -> Iterator[None]:
    """What a test starts hears every signal, though a script's background or nohup ignores some."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)  # not handed on, unlike SIG_IGN
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
