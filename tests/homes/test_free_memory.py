"""Free memory is the least of what the system and each cgroup leave; limits are told apart."""

import pytest

from memtile.homes import limits


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of /proc and /sys of another system."""
    monkeypatch.setattr(limits, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(limits, "_OWN_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path / "sys")

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_this_system_tells():
    """On Linux some memory is free, and less than there can be."""
    assert 0 < limits.free_bytes() < 1 << 60


def test_without_cgroups_the_system_tells(system):
    """MemAvailable, in bytes."""
    system(meminfo="MemTotal: 9 kB\nMemAvailable:     5 kB\n")

    assert limits.free_bytes() == 5 * 1024


def test_a_limit_of_version_2_counts(system):
    """The limit less what is used, where cached files count as free."""
    system(
        meminfo="MemAvailable: 100 kB\n",
        cgroup="0::/job/step\n",
        **{
            "sys__job__step__memory.max": "9000\n",
            "sys__job__step__memory.current": "8000\n",
            "sys__job__step__memory.stat": "anon 1\nactive_file 300\ninactive_file 200\n",
        },
    )

    assert limits.free_bytes() == 1500


def test_the_tightest_group_above_counts(system):
    """A limit of any group above holds, and "max" is none."""
    system(
        meminfo="MemAvailable: 100 kB\n",
        cgroup="0::/job/step\n",
        **{
            "sys__job__step__memory.max": "max\n",
            "sys__job__step__memory.current": "8000\n",
            "sys__job__memory.max": "9000\n",
            "sys__job__memory.current": "8999\n",
        },
    )

    assert limits.free_bytes() == 1


def test_a_limit_of_version_1_counts(system):
    """Also in a container, where the group's own path is not there but its root is."""
    system(
        meminfo="MemAvailable: 100 kB\n",
        cgroup="9:name=systemd:/\n4:cpu,memory:/not/here\n0::/\n",
        **{
            "sys__memory__memory.limit_in_bytes": "9000\n",
            "sys__memory__memory.usage_in_bytes": "8000\n",
            "sys__memory__memory.stat": "active_file 9\ntotal_inactive_file 200\n",
        },
    )

    assert limits.free_bytes() == 1200


def test_more_used_than_allowed_is_nothing_free(system):
    """A group over its limit has no free bytes, not fewer than none."""
    system(
        meminfo="MemAvailable: 100 kB\n",
        cgroup="0::/\n",
        **{"sys__memory.max": "10\n", "sys__memory.current": "20\n"},
    )

    assert limits.free_bytes() == 0


def test_a_system_that_does_not_tell(system):
    """Without /proc it is None."""
    assert limits.free_bytes() is None


def test_limits_of_version_2(system):
    """The tightest of all groups above, in bytes and in processors; "max" is none."""
    system(
        cgroup="0::/job/step\n",
        **{
            "sys__job__step__memory.max": "max\n",
            "sys__job__memory.max": "9000\n",
            "sys__job__step__cpu.max": "max 100000\n",
            "sys__job__cpu.max": "150000 100000\n",
        },
    )

    assert (limits.memory_limit(), limits.processor_limit()) == (9000, 1.5)


def test_limits_of_version_1(system):
    """The same from the files of each controller."""
    system(
        cgroup="5:memory:/job\n4:cpu,cpuacct:/job\n",
        **{
            "sys__memory__memory.limit_in_bytes": "7000\n",
            "sys__cpu__job__cpu.cfs_quota_us": "50000\n",
            "sys__cpu__job__cpu.cfs_period_us": "100000\n",
        },
    )

    assert (limits.memory_limit(), limits.processor_limit()) == (7000, 0.5)


def test_no_limit_is_none(system):
    """Also where version 1 says it by a number, and where there are no cgroups."""
    assert (limits.memory_limit(), limits.processor_limit()) == (None, None)
    system(
        cgroup="5:memory:/\n4:cpu:/\n0::/\n",
        **{
            "sys__memory__memory.limit_in_bytes": "9223372036854771712\n",
            "sys__cpu__cpu.cfs_quota_us": "-1\n",
            "sys__cpu__cpu.cfs_period_us": "100000\n",
            "sys__cpu.max": "max 100000\n",
        },
    )

    assert (limits.memory_limit(), limits.processor_limit()) == (None, None)
