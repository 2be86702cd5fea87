"""Numbers as words: how lengths, shares and bytes are written, the printed table, the summary in sentences."""

from collections.abc import Sequence

from lcr.evaluation.series import REACH, Pooled, Series


def write_length(length: int) -> str:
    """512 -> "512", 1536 -> "1.5K", 65536 -> "64K", 1048576 -> "1M"; what is no multiple of 512 in full."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= unit and length % (unit // 2) == 0:
            return f"{length / unit:g}{name}"
    return f"{length:,}"


def write_bytes(count: int | float) -> str:
    """Decimal units: 17408 -> "17.4 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def write_rate(rate: int | float) -> str:
    """123456.0 -> "123k", 1234567.0 -> "1.23M"."""
    for unit in ("", "k", "M"):
        if rate < 999.5:
            return f"{rate:.3g}{unit}"
        rate /= 1000
    return f"{rate:.3g}G"


def write_percent(share: int | float) -> str:
    """In whole per cent: 0.974 -> "97"; "100" and "0" stand only for all and none, else ">99" and "<1"."""
    percent = round(100 * share)
    if percent == 100 and share < 1:
        return ">99"
    if percent == 0 and share > 0:
        return "<1"
    return str(percent)


def print_table(series: Sequence[Series]) -> str:
    """A block of lines for each series: exact match for each depth and length, and what it took."""
    return "\n\n".join(_block(one) for one in series)


def _block(series: Series) -> str:
    pooled = [series.pooled(length) for length in series.lengths]
    row = series.row

    def interval(p: Pooled) -> str:
        return f"{write_percent(p.exact_match_low)}-{write_percent(p.exact_match_high)}"

    lines = [("exact match, %", [write_length(length) for length in series.lengths])]
    for depth in series.depths:
        cells = [series.cells.get((length, depth)) for length in series.lengths]
        lines.append((f"  depth {depth:g}", [write_percent(cell.exact_match) if cell else "-" for cell in cells]))
    lines += [
        ("  all depths", [write_percent(p.exact_match) for p in pooled]),
        ("  95% interval", [interval(p) for p in pooled]),
        ("digits right, %", [write_percent(p.digit_accuracy) for p in pooled]),
        ("samples", [str(p.samples) for p in pooled]),
        ("tokens/s", [write_rate(p.tokens_per_second) for p in pooled]),
        ("peak memory", [write_bytes(p.peak_memory_bytes).replace(" ", "") for p in pooled]),
        ("state", [write_bytes(p.state_bytes).replace(" ", "") for p in pooled]),
    ]
    name_width = max(len(name) for name, _ in lines)
    widths = [max(len(values[i]) for _, values in lines) for i in range(len(pooled))]
    head = (
        f"{series.label}: {row.task}, trained on up to {write_length(row.training_length)} tokens, "
        f"checkpoint of step {row.checkpoint_step:,}; guessing gives {100 * row.chance_exact_match:.3g}% exact match, "
        f"{100 * row.chance_digit:.3g}% of the digits"
    )
    body = [
        name.ljust(name_width) + "".join("  " + value.rjust(width) for value, width in zip(values, widths, strict=True))
        for name, values in lines
    ]
    return "\n".join([head, *body])


def compare(series: Sequence[Series]) -> str:
    """Which architecture reaches furthest, in one sentence; of a single one, its summary."""
    if len(series) == 1:
        return summarise(series[0])
    furthest = max(one.reach() for one in series)
    if not furthest:
        return f"No architecture gives {100 * REACH:.0f}% exact match at every depth from the shortest length on."
    names = [one.label for one in series if one.reach() == furthest]
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return (
        f"Of {len(series)} architectures {listed} reach{'es' if len(names) == 1 else ''} furthest: at least "
        f"{100 * REACH:.0f}% exact match at every depth up to {write_length(furthest)} tokens."
    )


def summarise(series: Series) -> str:
    """How far one architecture reaches, in one or two sentences."""
    reach, longest = series.reach(), series.lengths[-1]
    percent = f"{100 * REACH:.0f}%"
    trained = f"{series.label}, trained on up to {write_length(series.training_length)} tokens,"
    if reach:
        factor = reach / series.training_length
        beyond = f" ({factor:.3g} times its training length)" if factor > 1 else ""
        sentence = (
            f"{trained} gives at least {percent} exact match at every depth up to {write_length(reach)} tokens{beyond}."
        )
    else:
        sentence = f"{trained} does not give {percent} exact match at every depth at any length from the shortest on."
    if reach < longest:
        pooled = series.pooled(longest)
        sentence += (
            f" At {write_length(longest)} it gives {write_percent(pooled.exact_match)}% "
            f"(95% interval {write_percent(pooled.exact_match_low)} to {write_percent(pooled.exact_match_high)}%, "
            f"{pooled.samples} samples)."
        )
    return sentence
