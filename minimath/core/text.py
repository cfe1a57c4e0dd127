"""Small functions on words that a user typed."""
import difflib


def comma_list(text: str) -> list[str]:
    """"a, b," -> ["a", "b"]."""
    return [item.strip() for item in text.split(",") if item.strip()]


def did_you_mean(name: str, options) -> str:
    """Suggest the closest option in parentheses, or return ""."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
