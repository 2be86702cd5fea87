"""How many heads a mixer has if it is not told, and how wide they are."""


def default_num_heads(d_model: int) -> int:
    """As many heads of width 64 as fit; if that makes fewer than four, of width 32, then 16.

    d_model: a multiple of 16.
    """
    for width in (64, 32):
        if d_model % width == 0 and d_model // width >= 4:
            return d_model // width
    return max(1, d_model // 16)


def head_width(name: str, factor: float, d_model: int, num_heads: int) -> int:
    """factor d_model / num_heads, where `name` is the option that gave the factor.

    Raises: ValueError where that is not a whole number.
    """
    width = factor * d_model / num_heads
    if width != int(width) or width < 1:
        raise ValueError(
            f"{name}={factor} with d_model={d_model} and num_heads={num_heads}: expected a head width {name} d_model / "
            f"num_heads that is a whole number, not {width:g}. Choose num_heads to divide {factor * d_model:g}."
        )
    return int(width)
