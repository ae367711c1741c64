"""Numbers as people read them: three significant digits, per cent, differences in words."""

from decimal import Decimal


def digits(value: float) -> str:
    """A number with three significant digits, or its whole part if that has more; no exponent.

    Examples:
        >>> digits(2.0947), digits(0.5), digits(12345.6), digits(12345), digits(1.234e-5)
        ('2.09', '0.5', '12,346', '12,345', '0.0000123')
    """
    if isinstance(value, int):
        return f"{value:,}"
    return f"{Decimal(f'{value:.3g}'):f}" if abs(value) < 999.5 else f"{value:,.0f}"


def percent(share: float, *, sign: str = "") -> str:
    """A share in per cent, to three digits and no finer than 0.001 %; only all of it is 100 %.

    Args:
        share: the share.
        sign: "+" to mark positive numbers, too.

    Examples:
        >>> percent(0.12345), percent(-0.0005), percent(0.0123, sign="+"), percent(0.9997)
        ('12.3 %', '-0.05 %', '+1.23 %', '99.97 %')
        >>> percent(1e-9), percent(0)
        ('<0.001 %', '0 %')
    """
    value = 100 * share
    if abs(value) < 1:  # above, it would round twice
        value = round(value, 3)
    if not value:
        return "<0.001 %" if share else "0 %"
    text = f"{min(value, 99.99):.2f}" if 99.95 <= value < 100 else digits(value)
    return f"{sign if value > 0 else ''}{text} %"


def compared(gap: float) -> str:
    """A relative difference in words.

    Examples:
        >>> compared(1.411 / 1.4117 - 1), compared(1.5 / 1.411 - 1), compared(0)
        ('0.05 % below', '6.31 % above', '0 % above')
    """
    return f"{percent(abs(gap))} {'below' if gap < 0 else 'above'}"
