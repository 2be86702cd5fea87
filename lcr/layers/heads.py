"""How many heads a mixer has if it is not told."""


def default_num_heads(d_model: int) -> int:
    """As many heads of width 64 as fit; if that makes fewer than four, of width 32, then 16. d_model: multiple of 16."""
    for width in (64, 32):
        if d_model % width == 0 and d_model // width >= 4:
            return d_model // width
    return max(1, d_model // 16)
