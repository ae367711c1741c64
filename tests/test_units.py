from lightning_dsmoe.units import compared, digits, percent


def test_three_significant_digits() -> None:
    numbers = (0, 0.0206, 0.5, 2.0947, 99.96, 1234567.0, 1234567, -3.4, 1.234e-7, 999.6)
    assert [digits(n) for n in numbers] == [
        "0",
        "0.0206",
        "0.5",
        "2.09",
        "100",
        "1,234,567",
        "1,234,567",
        "-3.4",
        "0.000000123",
        "1,000",
    ]


def test_only_all_of_it_is_a_hundred_per_cent() -> None:
    assert (percent(0.1234), percent(1), percent(1.0), percent(0)) == (
        "12.3 %",
        "100 %",
        "100 %",
        "0 %",
    )
    assert (percent(0.9994), percent(0.9996), percent(0.999999)) == ("99.9 %", "99.96 %", "99.99 %")


def test_signs() -> None:
    assert (percent(0.0123, sign="+"), percent(-0.0123, sign="+")) == ("+1.23 %", "-1.23 %")
    assert (percent(1e-9, sign="+"), percent(0.0, sign="+")) == ("<0.001 %", "0 %")
    assert (compared(-1e-9), compared(0.02)) == ("<0.001 % below", "2 % above")


def test_nothing_is_rounded_twice() -> None:
    assert percent(0.0123456) == "1.23 %"
    assert percent(0.0004996) == "0.05 %"
