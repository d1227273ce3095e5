"""Every home keeps the contract."""

import pytest
from home_contract import HomeContract
from home_machine import home_state_machine
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from memtile.homes import DeviceHome, DiskHome, Home, HostHome


class TestDeviceHome(HomeContract):
    def make_home(self) -> Home:
        return DeviceHome()


class TestHostHome(HomeContract):
    def make_home(self) -> Home:
        return HostHome()


class TestDiskHome(HomeContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path

    def make_home(self) -> Home:
        return DiskHome(self.folder)


class TestDiskHomeDirect(TestDiskHome):
    @pytest.fixture(autouse=True)
    def _no_free_memory(self, monkeypatch):
        monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda: 0)

    def make_home(self) -> Home:
        home = super().make_home()
        if home.path != "direct":
            pytest.skip("the folder's filesystem has no direct I/O")
        return home


_SETTINGS = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


class _DirectHome(DiskHome):
    """A disk home that never goes through the page cache, where that is possible."""

    def _better_path(self):
        return "direct", "the test wants it"


@pytest.mark.parametrize("make_home", [DeviceHome, HostHome, DiskHome, _DirectHome])
def test_anything_in_any_order_agrees_with_a_plain_model(make_home):
    """Parking, writing, reading, evicting and dropping in any order loses and mixes nothing.

    The machine's rules compare each read with what was written; the first difference raises.
    """
    run_state_machine_as_test(home_state_machine(make_home), settings=_SETTINGS)
