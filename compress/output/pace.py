"""How long something takes, in words: durations, and what is left of a number of steps."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds for people: 0.4 s, 12 s, 3 min, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def left(seconds: float) -> str:
    """``about 3 min left``."""
    return f"about {duration(seconds)} left"


def pace(done: float, total: float, seconds: float) -> str:
    """Rate and time left after ``done`` of ``total`` steps in ``seconds``, such as ``2.5/s, about 3 min left``."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = f"{done / seconds:.2g}/s" if done > seconds else f"{duration(seconds / done)} each"
    return f"{rate}, {left(seconds / done * (total - done))}" if done < total else rate
