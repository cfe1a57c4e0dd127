"""Words that a user typed: lists, the nearest name, and secrets that must not be shown or saved."""
import difflib
import re
import urllib.parse

import yaml

KEEPS_SECRETS_OUT = {"judge_url", "vllm_url", "teacher", "judge_key_env"}  # options: a wrong value is not shown


def comma_list(text: str) -> list[str]:
    """"a, b," -> ["a", "b"]."""
    return [item.strip() for item in text.split(",") if item.strip()]


def named_values(text: str) -> dict:
    """"a=true, b=high" -> {"a": True, "b": "high"}. ValueError: a part is no name and value."""
    parts = [item.partition("=") for item in comma_list(text)]
    if not all(name.strip().isidentifier() and sign for name, sign, _ in parts):
        raise ValueError(text)
    try:
        return {name.strip(): yaml.safe_load(value) for name, _, value in parts}
    except yaml.YAMLError as error:
        raise ValueError(text) from error


def no_effect(names: list[str], where: str) -> str:
    """Say of options that they do nothing there: "a and b have no effect ..."."""
    return f"{' and '.join(names)} {'have' if names[1:] else 'has'} no effect {where}"


def did_you_mean(name: str, options) -> str:
    """Suggest the closest option in parentheses, or return ""."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def mask(word: str) -> str:
    """Replace by *** what looks like a key, a token, a secret or a password."""
    name = r"[\w.-]*(?:key|token(?!s)|secret|passw(?:or)?d|credential)[\w.-]*"
    word = re.sub(rf"(?i)({name}=)[^&\s]+", r"\1***", word)
    word = re.sub(r"://[^/@\s]+@", "://***@", word)
    return re.sub(r"\b(?:sk-|hf_|gh[a-z]_|github_pat_|xox[a-z]-)[\w-]{8,}", "***", word)


def is_plain_url(url: str) -> bool:
    """Tell whether a URL has no place for a secret. ValueError: it is none."""
    parts = urllib.parse.urlsplit(url if "//" in url else f"//{url}")
    return not ("@" in parts.netloc or parts.query or parts.fragment)
