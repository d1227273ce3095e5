"""With four ranks on two cores, modules run the cases where the number of ranks matters."""

from collections.abc import Iterator

import pytest

from memtile.layers import deferring_head


@pytest.fixture(autouse=True)
def restored_threshold() -> Iterator[None]:
    """`engine_cases.tiled` lowers it, in this process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferring_head, "LEAST_LOGITS", deferring_head.LEAST_LOGITS)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out the cases with four ranks that are not in their module's `AT_FOUR`."""
    items[:] = [item for item in items if not _is_left_out(item)]


def _is_left_out(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return False
    given, cases = item.callspec.params, getattr(item.module, "AT_FOUR", None)
    if cases is None or "name" not in given:
        return False
    return 4 in (given.get("outcome"), given.get("measured")) and given["name"] not in cases
