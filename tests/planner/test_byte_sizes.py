"""Byte sizes as people write them."""

import pytest

from memtile.costmodel import format_byte_size, parse_byte_size, parse_speed
from memtile.errors import ArgumentError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096B", 4096),
        ("1MiB", 1 << 20),
        ("1 mib", 1 << 20),
        (" 1.5GiB ", 3 << 29),
        ("512KiB", 512 << 10),
        ("2TiB", 2 << 40),
        ("1KB", 1000),
        ("2.5MB", 2_500_000),
        ("3GB", 3_000_000_000),
        ("1.9B", 1),
    ],
)
def test_sizes_mean_what_their_units_say(text, nbytes):
    """Binary units are powers of 1024, decimal ones of 1000, in any case and spacing."""
    assert parse_byte_size(text, "--size") == nbytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1MiB", "1 M", "1e6B", "1,5MiB", "1MiBs", "one", "٣KB"]
)
def test_what_is_no_size_is_refused_with_an_example(text):
    """Nothing is guessed: the option, the value and a right way to write it are in the message."""
    with pytest.raises(ArgumentError, match=r"^--size .* is not a size: .* such as 1MiB") as raised:
        parse_byte_size(text, "--size")
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("text", ["600", " 600 ", "1.5", "0"])
def test_a_number_without_a_unit_is_refused(text):
    """The message names the units that may be meant."""
    with pytest.raises(ArgumentError, match=f"no unit: write {text.strip()}MiB") as raised:
        parse_byte_size(text, "--size")
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("text", ["0B", "0MiB", "0.5B", "0.0001KiB"])
def test_a_size_of_nothing_is_refused(text):
    """Less than one byte is refused, also as a fraction."""
    with pytest.raises(ArgumentError, match="less than one byte"):
        parse_byte_size(text, "--size")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1 << 20, "1.00 MiB"),
        (3 << 29, "1.50 GiB"),
        (113_246_208, "108 MiB"),
        (25 << 20, "25.0 MiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes_are_shown_with_three_digits(nbytes, text):
    """A size is shown in the largest unit that leaves one digit or more before the point."""
    assert format_byte_size(nbytes) == text


@pytest.mark.parametrize(
    ("text", "unit", "speed"),
    [
        ("50GB/s", "B", 50e9),
        ("50 gb / s", "B", 50e9),
        ("7GiB/S", "B", 7 * 2**30),
        ("400TFLOP/s", "FLOP", 400e12),
        ("1.5 Tflops", "FLOP", 1.5e12),
        ("312T", "B", None),
        ("GB/s", "B", None),
        ("0GB/s", "B", None),
        ("5TB/s", "FLOP", None),
        ("5TB", "FLOP", None),
        ("2TFLOPs/s", "FLOP", 2e12),
        ("2TFLOP", "FLOP", None),
        ("50GB", "B", None),
    ],
)
def test_speeds_are_sizes_in_a_second(text, unit, speed):
    """Bytes or operations a second; anything else is refused with an example."""
    if speed is None:
        with pytest.raises(ArgumentError, match=r"no speed: write what is done in a second"):
            parse_speed(text, "--link", unit)
    else:
        assert parse_speed(text, "--link", unit) == speed
