"""Keys and passwords, typed by mistake: masked in what is shown, and kept out of what a run saves."""
import re
import urllib.parse

KEEPS_SECRETS_OUT = {"judge_url", "vllm_url", "judge_key_env", "vllm_key_env"}  # options: a wrong value is not shown


def mask(word: str) -> str:
    """Replace by *** what looks like a key, a token, a secret or a password."""
    name = r"[\w.-]*(?:key|token(?!s)|secret|passw(?:or)?d|credential)[\w.-]*"
    word = re.sub(rf"(?i)({name}=)[^&\s]+", r"\1***", word)
    word = re.sub(r"://[^/@\s]+@", "://***@", word)
    return re.sub(r"\b(?:sk-|hf_|gh[a-z]_|github_pat_|xox[a-z]-)[\w-]{8,}", "***", word)


def url_fault(url: str) -> str:
    """Say, without showing it, why a URL could hold a secret or is none, or ""."""
    try:
        parts = urllib.parse.urlsplit(url if "//" in url else f"//{url}")
        keeps = "@" in parts.netloc or parts.query or parts.fragment
    except ValueError:  # whose text may hold the URL
        return "this is no URL; give one like http://127.0.0.1:8080/v1"
    if keeps:
        return ("leave user, password and everything from a ? on out of it, they would be saved with the run; a key "
                "goes into the environment variable that judge_key_env or vllm_key_env names")
    return ""
