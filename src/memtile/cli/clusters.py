"""The options of `memtile plan` for many ranks: all that belong together, or a clear refusal."""

from dataclasses import dataclass, fields
from typing import Any

from memtile.cli.errors import CommandError
from memtile.planning import Speeds, parse_byte_size, parse_speed


@dataclass(frozen=True)
class ClusterOptions:
    """What was given of a cluster; None: it was not.

    Args:
        world_size: ranks.
        engine: that shards over them.
        device_memory: of one rank.
        offload: where shards live.
        link: speed between ranks.
        host_link: speed between host and device.
        disk: speed of a rank's disk.
        flops: operations of a rank in a second.
    """

    world_size: int | None
    engine: str | None
    device_memory: str | None
    offload: str | None
    link: str | None
    host_link: str | None
    disk: str | None
    flops: str | None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if given and self.world_size is None:
            raise CommandError(
                f"{_option(given[0])} is of a cluster: give --world-size N and --engine with it."
            )
        if self.world_size is not None and self.engine is None:
            raise CommandError("--world-size needs --engine: give --engine fsdp2 or zero3 with it.")

    def check_alone(self, given: dict[str, object]) -> None:
        """Refuse what plans one process, beside a cluster.

        Raises:
            CommandError: some of it is given.
        """
        for option, value in given.items():
            if value is not None:
                raise CommandError(
                    f"{option} plans one process: leave it out beside --world-size, whose limit is "
                    "--device-memory."
                )

    def arguments(self) -> dict[str, Any]:  # keywords of plan_ranks
        """What `memtile.planner.plan_ranks` takes.

        Raises:
            ArgumentError: a size or a speed cannot be read.
        """
        memory = self.device_memory
        return {
            "world_size": self.world_size,
            "engine": self.engine,
            "device_memory": memory and parse_byte_size(memory, "--device-memory"),
            "offload": self.offload or "none",
            "speeds": Speeds(
                flops=_speed(self.flops, "--flops", "FLOP"),
                link=_speed(self.link, "--link", "B"),
                host=_speed(self.host_link, "--host-link", "B"),
                disk=_speed(self.disk, "--disk", "B"),
            ),
        }


def _speed(text: str | None, option: str, unit: str) -> float | None:
    return None if text is None else parse_speed(text, option, unit)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
